/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Bitmaps are in the container as QEMU has them there: complete, or marked
 * as in use.  What is in use and "auto" can be recovered after a crash if
 * there is an intent (see intent.h), which is a bitmap too: its content,
 * or the intent, or both.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "dirty/persist-internal.h"
#include "dirty/transaction.h"
#include "qcow2/error.h"
#include "qcow2/format.h"

static _Thread_local bool is_outside;

void
dirty_persist_outside (void)
{
  is_outside = true;
}

/* May this thread use the container? */
static bool
may_use (const struct dirty_persist *p)
{
  return !(p->container->requests_only && is_outside);
}

static int
check_may_use (const struct dirty_persist *p, GError **error)
{
  if (may_use (p))
    return 0;
  return dirty_fail (error, ENOTSUP, "%s: this cannot be stored now, as the "
                     "plugin or a filter handles one request of all clients "
                     "at a time; use bitmap-store=FILE", p->container->name);
}

struct dirty_persist *
dirty_persist_new (struct dirty_node *node, struct dirty_container *container,
                   const struct dirty_persist_options *options)
{
  struct dirty_persist *p = g_new0 (struct dirty_persist, 1);

  p->node = node;
  p->container = container;
  p->options = *options;
  p->active = true;
  g_mutex_init (&p->lock);
  dirty_lock ();
  node->persist = p;
  dirty_unlock ();
  return p;
}

static void
close_container (struct dirty_persist *p)
{
  persist_drop (p);
  if (p->io)
    p->container->close (p->container);
  p->io = NULL;
}

void
dirty_persist_free (struct dirty_persist *p)
{
  dirty_lock ();
  p->node->persist = NULL;
  dirty_unlock ();
  close_container (p);
  g_clear_pointer (&p->intent, dirty_intent_free);
  g_mutex_clear (&p->lock);
  g_free (p);
}

int
persist_fail (const struct dirty_persist *p, GError **error)
{
  g_prefix_error (error, "%s: ", p->container->name);
  return -1;
}

static void G_GNUC_PRINTF (2, 3)
report (const struct dirty_persist *p, const char *fs, ...)
{
  g_autofree char *message = NULL;
  va_list args;

  va_start (args, fs);
  message = g_strdup_vprintf (fs, args);
  va_end (args);
  p->options.report (message);
}

/* Reading the container. */

void
persist_drop (struct dirty_persist *p)
{
  const GPtrArray *bitmaps = p->node->bitmaps;

  qcow2_bitmap_store_close (p->store);
  qcow2_image_close (p->image);
  p->store = NULL;
  p->image = NULL;
  p->diverged = true;
  p->flushed = false;
  g_clear_pointer (&p->intent_stored, dirty_bits_free);
  for (guint i = 0; i < bitmaps->len; ++i) {
    struct dirty_bitmap *bitmap = g_ptr_array_index (bitmaps, i);

    g_clear_pointer (&bitmap->stored, dirty_bits_free);
  }
}

static int
check_size (const struct dirty_persist *p, GError **error)
{
  const uint64_t size = p->image->header->size;
  const uint64_t wanted = p->node->size;

  if (size / 512 == wanted / 512 + (wanted % 512 != 0))
    return 0;
  /* It is being taken back, and another program may have resized it. */
  if (!p->active && p->container->is_image) {
    dirty_node_resize (p->node, size & ~UINT64_C (511));
    return 0;
  }
  return qcow2_fail (error, EINVAL, "its bitmaps are those of a disk of %"
                     PRIu64 " bytes, but this one has %" PRIu64, size,
                     wanted);
}

static int
check_names (const struct dirty_persist *p, GError **error)
{
  const GPtrArray *list = qcow2_bitmap_store_list (p->store);
  g_autoptr (GHashTable) names = g_hash_table_new (g_str_hash, g_str_equal);

  for (guint i = 0; i < list->len; ++i) {
    struct qcow2_bitmap *bitmap = g_ptr_array_index (list, i);

    if (!g_hash_table_add (names, bitmap->name)) {
      g_autofree char *shown = g_strescape (bitmap->name, NULL);

      return qcow2_fail (error, EINVAL, "there are two bitmaps \"%s\"",
                         shown);
    }
  }
  return 0;
}

int
persist_read (struct dirty_persist *p, GError **error)
{
  if (p->store)
    return 0;
  p->image = qcow2_image_open (p->io, error);
  if (p->image && check_size (p, error) == 0)
    p->store = qcow2_bitmap_store_open (p->image, p->io, error);
  if (p->store && check_names (p, error) == 0)
    return 0;
  persist_drop (p);
  return -1;
}

int
persist_read_to_write (struct dirty_persist *p, GError **error)
{
  if (!p->options.writable)
    return qcow2_fail (error, EROFS, "it is read-only");
  if (persist_read (p, error) == -1)
    return -1;
  /* What was read may have been written just before a crash. */
  if (!p->flushed && p->io->flush (p->io, error) == -1) {
    persist_drop (p);
    return -1;
  }
  p->flushed = true;
  if (p->diverged) {
    if (persist_write_state (p, PERSIST_RECONCILE, false, error) == -1)
      return -1;
    p->diverged = false;
  }
  return 0;
}

struct dirty_bits *
persist_get_bits (struct dirty_persist *p, struct qcow2_bitmap *bitmap,
                  GError **error)
{
  struct dirty_bits *bits = dirty_bits_new (p->node->size,
                                            bitmap->granularity_bits);

  if (qcow2_bitmap_store_load (p->store, p->io, bitmap, bits, error) == 0)
    return bits;
  dirty_bits_free (bits);
  return NULL;
}

int
persist_find_intent (struct dirty_persist *p, GError **error)
{
  struct qcow2_bitmap *bitmap = qcow2_bitmap_store_find (p->store,
                                                         DIRTY_INTENT_NAME);
  g_autoptr (GError) e = NULL;

  g_clear_pointer (&p->intent_stored, dirty_bits_free);
  if (!bitmap || !(bitmap->flags & QCOW2_BITMAP_AUTO) ||
      bitmap->flags & QCOW2_BITMAP_IN_USE ||
      !qcow2_bitmap_store_fits (p->store, bitmap))
    return 0;
  p->intent_stored = persist_get_bits (p, bitmap, &e);
  /* One that makes no sense is as good as none; it may be replaced. */
  if (p->intent_stored || e->code == EINVAL)
    return 0;
  g_propagate_error (error, g_steal_pointer (&e));
  return -1;
}

struct qcow2_image *
dirty_persist_probe (const struct qcow2_io *io, GError **error)
{
  struct qcow2_image *image = qcow2_image_open (io, error);
  struct qcow2_bitmap_store *store =
    image ? qcow2_bitmap_store_open (image, io, error) : NULL;

  if (!store || qcow2_bitmap_store_check (store, io, error) == -1)
    g_clear_pointer (&image, qcow2_image_close);
  qcow2_bitmap_store_close (store);
  return image;
}

/* Loading. */

static struct dirty_bitmap *
new_bitmap (struct dirty_persist *p, const struct qcow2_bitmap *stored)
{
  struct dirty_bitmap *bitmap = g_new0 (struct dirty_bitmap, 1);

  bitmap->node = p->node;
  bitmap->name = g_strdup (stored->name);
  bitmap->persistent = true;
  bitmap->recording = stored->flags & QCOW2_BITMAP_AUTO;
  bitmap->bits = dirty_bits_new (p->node->size, stored->granularity_bits);
  return bitmap;
}

static void
make_inconsistent (const struct dirty_persist *p, struct dirty_bitmap *bitmap)
{
  bitmap->inconsistent = true;
  report (p, "%s: bitmap '%s' is inconsistent, because it was in use when "
          "a program ended without storing it; it can only be removed",
          p->container->name, bitmap->name);
}

/* Whether it was complete in the container, or can be made so. */
static int
load_content (struct dirty_persist *p, struct dirty_bitmap *bitmap,
              struct qcow2_bitmap *stored, GError **error)
{
  const bool in_use = stored->flags & QCOW2_BITMAP_IN_USE;
  g_autoptr (GError) e = NULL;

  if (in_use && (!bitmap->recording || !p->intent_stored ||
                 !qcow2_bitmap_store_fits (p->store, stored))) {
    make_inconsistent (p, bitmap);
    return 0;
  }
  bitmap->stored = persist_get_bits (p, stored, &e);
  if (!bitmap->stored && in_use && e->code == EINVAL) {
    make_inconsistent (p, bitmap);
    return 0;
  }
  if (!bitmap->stored) {
    g_propagate_error (error, g_steal_pointer (&e));
    return -1;
  }
  dirty_bits_merge (bitmap->bits, bitmap->stored);
  if (in_use) {
    dirty_bits_merge (bitmap->bits, p->intent_stored);
    report (p, "%s: bitmap '%s' was recovered: it has all that was written, "
            "and up to %" PRIu64 " bytes more", p->container->name,
            bitmap->name, dirty_bits_count (p->intent_stored) <<
            dirty_bits_granularity_bits (p->intent_stored));
  }
  return 0;
}

/* All of them, or NULL with error set. */
static GPtrArray *
load_bitmaps (struct dirty_persist *p, GError **error)
{
  g_autoptr (GPtrArray) bitmaps =
    g_ptr_array_new_with_free_func (dirty_bitmap_free);
  const GPtrArray *list = qcow2_bitmap_store_list (p->store);

  for (guint i = 0; i < list->len; ++i) {
    struct qcow2_bitmap *stored = g_ptr_array_index (list, i);
    struct dirty_bitmap *bitmap;

    if (!persist_is_ours (stored))
      continue;
    if (dirty_bitmap_find (p->node, stored->name, NULL)) {
      qcow2_fail (error, EEXIST, "it has a bitmap '%s', as has node '%s'",
                  stored->name, p->node->name);
      return NULL;
    }
    bitmap = new_bitmap (p, stored);
    g_ptr_array_add (bitmaps, bitmap);
    if (load_content (p, bitmap, stored, error) == -1)
      return NULL;
  }
  return g_steal_pointer (&bitmaps);
}

/* Can an intent of the granularity that the user wants be stored? */
static int
check_granularity (const struct dirty_persist *p, GError **error)
{
  const unsigned bits = p->options.intent_granularity_bits;

  if (!bits || p->node->size >> bits >> 3 <= QCOW2_MAX_BITMAP_BYTES / 2)
    return 0;
  return qcow2_fail (error, EINVAL, "bitmap-intent-granularity: %" PRIu64
                     " is too small for a disk of %" PRIu64 " bytes",
                     UINT64_C (1) << bits, p->node->size);
}

static int
read_bitmaps (struct dirty_persist *p, GError **error)
{
  GPtrArray *bitmaps = NULL;

  if (check_granularity (p, error) == 0 && persist_read (p, error) == 0 &&
      qcow2_bitmap_store_check (p->store, p->io, error) == 0 &&
      persist_find_intent (p, error) == 0)
    bitmaps = load_bitmaps (p, error);
  if (!bitmaps)
    return persist_fail (p, error);
  g_ptr_array_extend_and_steal (p->node->bitmaps, bitmaps);
  p->diverged = false;
  return 0;
}

/* With both locks, and closed gates. */
static int
load (struct dirty_persist *p, GError **error)
{
  int r = -1;

  g_mutex_lock (&p->lock);
  p->io = p->container->open (p->container, p->node->size,
                              p->options.writable, error);
  if (p->io) {
    p->options.writable &= p->io->pwrite != NULL;
    p->node->image_writable = p->options.writable && p->container->is_image;
    r = read_bitmaps (p, error);
    if (r == -1)
      close_container (p);
  }
  g_mutex_unlock (&p->lock);
  p->loaded = r == 0;
  return r;
}

static int
load_once (struct dirty_persist *p, uint64_t size, GError **error)
{
  struct dirty_node *node = p->node;
  int r;

  if (node->sized && node->size != size)
    return dirty_fail (error, EINVAL, "%s: it keeps bitmaps of a disk of %"
                       PRIu64 " bytes, but now the disk has %" PRIu64,
                       p->container->name, node->size, size);
  if (p->loaded || !p->active)
    return 0;
  dirty_gates_close (&node, 1);
  node->size = size;
  r = load (p, error);
  node->sized |= r == 0;
  dirty_gates_open (&node, 1);
  return r;
}

int
dirty_persist_load (struct dirty_persist *p, uint64_t size, GError **error)
{
  int r;

  dirty_changes_lock ();
  dirty_lock ();
  r = load_once (p, size, error);
  dirty_unlock ();
  dirty_changes_unlock ();
  return r;
}

/* Storing. */

/* One that the container has as in use; others are complete there. */
static bool
is_in_use (const struct dirty_persist *p, const struct dirty_bitmap *bitmap)
{
  const struct qcow2_bitmap *stored =
    bitmap->persistent && !bitmap->inconsistent ?
    qcow2_bitmap_store_find (p->store, bitmap->name) : NULL;

  return stored && stored->flags & QCOW2_BITMAP_IN_USE;
}

static int
store_bitmap (struct dirty_persist *p, struct dirty_bitmap *bitmap,
              struct dirty_bits *copy, GError **error)
{
  int r = 0;

  g_mutex_lock (&p->lock);
  if (persist_read_to_write (p, error) == -1)
    r = -1;
  else if (is_in_use (p, bitmap)) {
    r = persist_save (p, bitmap, copy, error);
    copy = NULL;
    if (r == -1)
      persist_drop (p);
  }
  g_mutex_unlock (&p->lock);
  dirty_bits_free (copy);
  return r;
}

/* Store what bitmaps hold, while writes go on.  Under the changes lock, by
 * which the list stays as it is.  Copies are taken of all before any is
 * stored, which the intent wants.
 */
static int
store_changes (struct dirty_persist *p, GError **error)
{
  const GPtrArray *bitmaps = p->node->bitmaps;
  g_autofree struct dirty_bits **copies =
    g_new0 (struct dirty_bits *, bitmaps->len);
  struct dirty_intent *intent = atomic_load (&p->armed) ? p->intent : NULL;
  int r = 0;

  if (intent)
    dirty_intent_begin_store (intent);
  for (guint i = 0; i < bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (bitmaps, i);

    if (bitmap->persistent && bitmap->recording && !bitmap->inconsistent)
      copies[i] = dirty_bits_copy (bitmap->bits);
  }
  for (guint i = 0; i < bitmaps->len; ++i)
    if (copies[i] && r == 0)
      r = store_bitmap (p, g_ptr_array_index (bitmaps, i), copies[i], error);
    else
      dirty_bits_free (copies[i]);
  return r == 0 && intent ? dirty_intent_end_store (intent, error) : r;
}

/* Nobody uses the container, for now: it shall look like it.  With the
 * gate closed.
 */
static int
clean (struct dirty_persist *p, GError **error)
{
  int r;

  g_mutex_lock (&p->lock);
  r = persist_read_to_write (p, error);
  if (r == 0)
    r = persist_write_state (p, PERSIST_CLEAN, false, error);
  persist_disarm (p);
  g_mutex_unlock (&p->lock);
  return r;
}

static int
clean_if_idle (struct dirty_persist *p, bool last, GError **error)
{
  struct dirty_gate *gate = &p->node->gates[DIRTY_GATE_PERSIST];
  int r = 0;

  dirty_lock ();
  dirty_gate_close (gate);
  if (last || atomic_load (&p->writers) == 0)
    r = clean (p, error);
  dirty_gate_open (gate);
  dirty_unlock ();
  return r;
}

int
dirty_persist_store (struct dirty_persist *p, bool last, GError **error)
{
  int r = 0;

  dirty_changes_lock ();
  if (p->loaded && p->options.writable && may_use (p)) {
    r = store_changes (p, error);
    if (r == 0)
      r = clean_if_idle (p, last, error);
  }
  dirty_changes_unlock ();
  return r == -1 ? persist_fail (p, error) : 0;
}

int
dirty_persist_try_store (struct dirty_persist *p, GError **error)
{
  int r = 0;

  if (!dirty_changes_trylock ())
    return 0;
  if (p->loaded && p->options.writable)
    r = store_changes (p, error);
  dirty_changes_unlock ();
  return r == -1 ? persist_fail (p, error) : 0;
}

/* Giving the container away. */

static int
check_idle (const struct dirty_node *node, GError **error)
{
  for (guint i = 0; i < node->bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);

    if (bitmap->persistent && bitmap->users)
      return dirty_fail (error, EBUSY, "Bitmap '%s' of node '%s' is busy: a "
                         "client or another operation is using it",
                         bitmap->name, node->name);
  }
  return 0;
}

static void
forget_bitmaps (struct dirty_node *node)
{
  for (guint i = node->bitmaps->len; i-- > 0; ) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);

    if (bitmap->persistent)
      g_ptr_array_remove_index (node->bitmaps, i);
  }
}

static int
deactivate (struct dirty_persist *p, GError **error)
{
  if (check_idle (p->node, error) == -1)
    return -1;
  if (p->loaded && p->options.writable && clean (p, error) == -1)
    return persist_fail (p, error);
  if (p->container->release && p->container->release (p->container,
                                                      error) == -1)
    return persist_fail (p, error);
  g_mutex_lock (&p->lock);
  close_container (p);
  g_mutex_unlock (&p->lock);
  forget_bitmaps (p->node);
  p->loaded = p->active = false;
  dirty_node_give_away (p->node);
  return 0;
}

/* If the disk was not yet opened there is nothing to be loaded yet. */
static int
activate (struct dirty_persist *p, GError **error)
{
  if (p->node->sized && load (p, error) == -1)
    return -1;
  if (p->container->take_back)
    p->container->take_back (p->container);
  p->active = true;
  p->node->inactive = false;
  return 0;
}

int
dirty_persist_set_active (struct dirty_persist *p, bool active,
                          GError **error)
{
  int r = 0;

  if (check_may_use (p, error) == -1)
    return -1;
  dirty_changes_lock ();
  dirty_lock ();
  dirty_gates_close (&p->node, 1);
  if (p->active != active)
    r = active ? activate (p, error) : deactivate (p, error);
  dirty_gates_open (&p->node, 1);
  dirty_unlock ();
  dirty_changes_unlock ();
  return r;
}

/* Transactions. */

int
dirty_persist_check (struct dirty_persist *p, GError **error)
{
  int r;

  if (!p->loaded)
    return dirty_fail (error, EINVAL, "Node '%s' has not been opened yet, so "
                       "its bitmaps are not known", p->node->name);
  if (!p->options.writable)
    return dirty_fail (error, EROFS, "Node '%s' is read-only",
                       p->node->name);
  if (check_may_use (p, error) == -1)
    return -1;
  g_mutex_lock (&p->lock);
  r = persist_read_to_write (p, error);
  g_mutex_unlock (&p->lock);
  return r == -1 ? persist_fail (p, error) : 0;
}

bool
dirty_persist_has (struct dirty_persist *p, const char *name)
{
  bool has;

  g_mutex_lock (&p->lock);
  has = p->store && qcow2_bitmap_store_find (p->store, name);
  g_mutex_unlock (&p->lock);
  return has;
}

bool
dirty_persist_is_writable (const struct dirty_persist *p)
{
  return p->options.writable;
}

int
dirty_persist_commit (struct dirty_persist *p, bool only_add, GError **error)
{
  int r;

  g_mutex_lock (&p->lock);
  r = persist_read_to_write (p, error);
  if (r == 0)
    r = persist_write_state (p, PERSIST_COMMIT, only_add, error);
  g_mutex_unlock (&p->lock);
  return r == -1 ? persist_fail (p, error) : 0;
}

void
dirty_persist_revert (struct dirty_persist *p)
{
  g_autoptr (GError) error = NULL;

  g_mutex_lock (&p->lock);
  persist_drop (p);
  if (persist_read_to_write (p, &error) == -1) {
    report (p, "%s: %s; this will be tried again", p->container->name,
            error->message);
    /* Not even by a write that the intent has already. */
    persist_disarm (p);
  }
  g_mutex_unlock (&p->lock);
}
