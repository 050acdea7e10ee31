/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The container is brought to the state of the node in one way, whatever
 * has changed: both are compared, which gives a plan.
 *
 *    save     content is written in place, of bitmaps that are marked as
 *             in use in the container until the plan is done
 *    remove, add, flags
 *             the directory is changed, at once
 *
 * A bitmap that may have lost bits, or of which the container has a
 * complete copy that is to become another, is removed and added again in
 * the same change of the directory.
 *
 * Whether that is so is known as long as all goes well.  After a failure
 * nobody knows what the container has, so it is read again, and contents
 * are compared as well.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "dirty/persist-internal.h"
#include "qcow2/error.h"
#include "qcow2/format.h"
#include "qcow2/header-update.h"

#define MIN_INTENT_BITS 16
#define MAX_INTENT_BITS 24
#define INTENT_REGIONS 4096     /* at most, as far as possible */

struct plan {
  struct dirty_persist *p;
  enum persist_purpose purpose;
  bool only_add;
  bool needs_intent;
  GPtrArray *save;              /* struct dirty_bitmap */
  GPtrArray *replaced;          /* the same, whose content is in add */
  GPtrArray *remove, *add;
  GArray *flags;
};

static void
plan_init (struct plan *plan, struct dirty_persist *p,
           enum persist_purpose purpose, bool only_add)
{
  memset (plan, 0, sizeof *plan);
  plan->p = p;
  plan->purpose = purpose;
  plan->only_add = only_add;
  plan->save = g_ptr_array_new ();
  plan->replaced = g_ptr_array_new ();
  plan->remove = g_ptr_array_new_with_free_func (g_free);
  plan->add = g_ptr_array_new_with_free_func (g_free);
  plan->flags = g_array_new (FALSE, FALSE,
                             sizeof (struct qcow2_bitmap_new_flags));
}

static void
plan_clear (struct plan *plan)
{
  g_ptr_array_unref (plan->save);
  g_ptr_array_unref (plan->replaced);
  g_ptr_array_unref (plan->remove);
  g_ptr_array_unref (plan->add);
  g_array_unref (plan->flags);
}

/* Making the plan. */

static void
plan_remove (struct plan *plan, const char *name)
{
  g_ptr_array_add (plan->remove, g_strdup (name));
}

static void
plan_add (struct plan *plan, const char *name, unsigned granularity_bits,
          uint32_t flags, struct dirty_bits *content)
{
  struct qcow2_bitmap_new *new = g_new (struct qcow2_bitmap_new, 1);

  new->name = name;
  new->granularity_bits = granularity_bits;
  new->flags = flags;
  new->content = content;
  g_ptr_array_add (plan->add, new);
}

static void
plan_flags (struct plan *plan, const struct qcow2_bitmap *stored,
            uint32_t flags)
{
  const struct qcow2_bitmap_new_flags new = {
    stored->name, flags | (stored->flags & QCOW2_BITMAP_EXTRA_COMPATIBLE)
  };

  if (new.flags != stored->flags)
    g_array_append_val (plan->flags, new);
}

/* The names of a node's persistent bitmaps. */
static GHashTable *
names_of (const struct dirty_node *node)
{
  GHashTable *names = g_hash_table_new (g_str_hash, g_str_equal);

  for (guint i = 0; i < node->bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);

    if (bitmap->persistent)
      g_hash_table_add (names, bitmap->name);
  }
  return names;
}

bool
persist_is_ours (const struct qcow2_bitmap *bitmap)
{
  return strcmp (bitmap->name, DIRTY_INTENT_NAME) != 0;
}

/* Is it to be marked as in use? */
static bool
want_in_use (const struct plan *plan, const struct qcow2_bitmap *stored)
{
  if (plan->purpose == PERSIST_ARM)
    return true;
  if (plan->purpose == PERSIST_CLEAN)
    return false;
  return !stored || stored->flags & QCOW2_BITMAP_IN_USE ||
    atomic_load (&plan->p->armed);
}

static uint32_t
want_flags (const struct plan *plan, const struct dirty_bitmap *bitmap,
            const struct qcow2_bitmap *stored)
{
  if (!bitmap->recording)
    return 0;
  return want_in_use (plan, stored) ?
    QCOW2_BITMAP_AUTO | QCOW2_BITMAP_IN_USE : QCOW2_BITMAP_AUTO;
}

/* Has the container, of which nothing is known, another content?  If it is
 * marked as in use there it may have more, but not less: it is not known
 * what the intent has.
 */
static int
compare (const struct plan *plan, struct dirty_bitmap *bitmap,
         struct qcow2_bitmap *stored, uint32_t flags, bool *other,
         GError **error)
{
  *other = stored->granularity_bits !=
    dirty_bits_granularity_bits (bitmap->bits) ||
    !qcow2_bitmap_store_fits (plan->p->store, stored);
  if (*other)
    return 0;
  dirty_bits_free (bitmap->stored);
  bitmap->stored = persist_get_bits (plan->p, stored, error);
  if (!bitmap->stored)
    return -1;
  *other = !dirty_bits_includes (bitmap->stored, bitmap->bits) ||
    (!((stored->flags | flags) & QCOW2_BITMAP_IN_USE) &&
     !dirty_bits_includes (bitmap->bits, bitmap->stored));
  return 0;
}

static int
plan_bitmap (struct plan *plan, struct dirty_bitmap *bitmap, GError **error)
{
  struct qcow2_bitmap *stored = qcow2_bitmap_store_find (plan->p->store,
                                                         bitmap->name);
  const uint32_t flags = want_flags (plan, bitmap, stored);
  bool replace = !stored || bitmap->replaced;

  if (bitmap->inconsistent) {
    /* It may be gone if removing it has failed. */
    if (!stored)
      plan_add (plan, bitmap->name, dirty_bits_granularity_bits (bitmap->bits),
                QCOW2_BITMAP_IN_USE, NULL);
    return 0;
  }
  if (stored && plan->only_add)
    return 0;
  plan->needs_intent |= (flags & QCOW2_BITMAP_IN_USE) != 0;
  if (!replace && plan->purpose == PERSIST_RECONCILE &&
      compare (plan, bitmap, stored, flags, &replace, error) == -1)
    return -1;
  if (replace) {
    if (stored)
      plan_remove (plan, bitmap->name);
    dirty_bits_free (bitmap->stored);
    bitmap->stored = dirty_bits_copy (bitmap->bits);
    plan_add (plan, bitmap->name, dirty_bits_granularity_bits (bitmap->bits),
              flags, bitmap->stored);
    g_ptr_array_add (plan->replaced, bitmap);
    return 0;
  }
  if (stored->flags & QCOW2_BITMAP_IN_USE && !(flags & QCOW2_BITMAP_IN_USE))
    g_ptr_array_add (plan->save, bitmap);
  plan_flags (plan, stored, flags);
  return 0;
}

/* Bitmaps of the container that the node does not have. */
static void
plan_others (struct plan *plan)
{
  const GPtrArray *list = qcow2_bitmap_store_list (plan->p->store);
  g_autoptr (GHashTable) ours = names_of (plan->p->node);

  for (guint i = 0; i < list->len; ++i) {
    const struct qcow2_bitmap *stored = g_ptr_array_index (list, i);

    if (persist_is_ours (stored) &&
        !g_hash_table_contains (ours, stored->name))
      plan_remove (plan, stored->name);
  }
}

/* What a new intent does not cover must never be recovered with it. */
static void
plan_inconsistent (struct plan *plan)
{
  const GPtrArray *bitmaps = plan->p->node->bitmaps;

  for (guint i = 0; i < bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (bitmaps, i);
    const struct qcow2_bitmap *stored =
      bitmap->persistent && bitmap->inconsistent ?
      qcow2_bitmap_store_find (plan->p->store, bitmap->name) : NULL;

    if (stored)
      plan_flags (plan, stored, QCOW2_BITMAP_IN_USE);
  }
}

static unsigned
choose_granularity (const struct dirty_persist *p)
{
  unsigned bits = MIN_INTENT_BITS;

  if (p->options.intent_granularity_bits)
    return p->options.intent_granularity_bits;
  while ((bits < MAX_INTENT_BITS &&
          p->node->size > (uint64_t) INTENT_REGIONS << bits) ||
         p->node->size >> bits >> 3 >= QCOW2_MAX_BITMAP_BYTES / 2)
    bits++;
  return bits;
}

/* A new intent has what the writes going on need. */
static void
plan_new_intent (struct plan *plan)
{
  struct dirty_persist *p = plan->p;

  p->intent_stored = p->intent ? dirty_intent_copy (p->intent) :
    dirty_bits_new (p->node->size, choose_granularity (p));
  plan_add (plan, DIRTY_INTENT_NAME,
            dirty_bits_granularity_bits (p->intent_stored),
            QCOW2_BITMAP_AUTO, p->intent_stored);
}

/* Without an intent bitmaps that were recovered must be complete first. */
static void
plan_to_save_all (struct plan *plan)
{
  const GPtrArray *bitmaps = plan->p->node->bitmaps;

  for (guint i = 0; i < bitmaps->len; ++i) {
    struct dirty_bitmap *bitmap = g_ptr_array_index (bitmaps, i);
    const struct qcow2_bitmap *stored =
      bitmap->persistent && !bitmap->inconsistent ?
      qcow2_bitmap_store_find (plan->p->store, bitmap->name) : NULL;

    if (stored && stored->flags & QCOW2_BITMAP_IN_USE &&
        !g_ptr_array_find (plan->save, bitmap, NULL) &&
        !g_ptr_array_find (plan->replaced, bitmap, NULL))
      g_ptr_array_add (plan->save, bitmap);
  }
}

/* One that is not kept must not be there when bitmaps are in use to which
 * it says nothing.
 */
static bool
is_intent_outdated (const struct plan *plan)
{
  if (plan->p->options.intent)
    return plan->purpose == PERSIST_CLEAN;
  return plan->needs_intent || plan->purpose == PERSIST_CLEAN ||
    plan->purpose == PERSIST_ARM;
}

static int
plan_intent (struct plan *plan, GError **error)
{
  struct dirty_persist *p = plan->p;
  const bool exists =
    qcow2_bitmap_store_find (p->store, DIRTY_INTENT_NAME) != NULL;

  if (plan->purpose == PERSIST_CLEAN || !p->options.intent) {
    if (exists && is_intent_outdated (plan)) {
      plan_to_save_all (plan);
      plan_remove (plan, DIRTY_INTENT_NAME);
    }
  }
  else if (plan->needs_intent && !p->intent_stored) {
    if (persist_find_intent (p, error) == -1)
      return -1;
    if (!p->intent_stored) {
      plan_inconsistent (plan);
      if (exists)
        plan_remove (plan, DIRTY_INTENT_NAME);
      plan_new_intent (plan);
    }
  }
  if (!p->options.intent && plan->needs_intent)
    plan_inconsistent (plan);
  return 0;
}

static int
make_plan (struct plan *plan, GError **error)
{
  const GPtrArray *bitmaps = plan->p->node->bitmaps;

  if (!plan->only_add)
    plan_others (plan);
  for (guint i = 0; i < bitmaps->len; ++i) {
    struct dirty_bitmap *bitmap = g_ptr_array_index (bitmaps, i);

    if (bitmap->persistent && plan_bitmap (plan, bitmap, error) == -1)
      return -1;
  }
  return plan_intent (plan, error);
}

/* Following the plan. */

int
persist_save (struct dirty_persist *p, struct dirty_bitmap *bitmap,
              struct dirty_bits *copy, GError **error)
{
  struct qcow2_bitmap *stored = qcow2_bitmap_store_find (p->store,
                                                         bitmap->name);
  int r = -1;

  if (!stored)
    qcow2_fail (error, EIO, "bitmap \"%s\" has disappeared", bitmap->name);
  else
    r = qcow2_bitmap_store_save (p->store, p->io, stored, copy,
                                 bitmap->stored, error);
  if (r == -1) {
    dirty_bits_free (copy);
    return -1;
  }
  dirty_bits_free (bitmap->stored);
  bitmap->stored = copy;
  return 0;
}

static int
save_all (const struct plan *plan, GError **error)
{
  for (guint i = 0; i < plan->save->len; ++i) {
    struct dirty_bitmap *bitmap = g_ptr_array_index (plan->save, i);

    if (persist_save (plan->p, bitmap, dirty_bits_copy (bitmap->bits),
                      error) == -1)
      return -1;
  }
  return 0;
}

/* If the header is so that a crash could tear it there are no bitmaps
 * while it changes.
 */
static void
warn_of_gap (struct dirty_persist *p)
{
  g_autofree char *message = NULL;

  if (p->warned || !qcow2_header_find_extension (p->image->header,
                                                 QCOW2_EXT_BITMAPS) ||
      !qcow2_header_extension_can_tear (p->image->header, QCOW2_EXT_BITMAPS))
    return;
  p->warned = true;
  message = g_strdup_printf ("%s: the place of the bitmaps lies across two "
                             "sectors of the header: a crash at the moment "
                             "when their number changes loses them",
                             p->container->name);
  p->options.report (message);
}

static int
change_directory (const struct plan *plan, const GArray *flags,
                  GError **error)
{
  const struct qcow2_bitmap_changes changes = {
    .remove = plan->remove, .add = plan->add, .flags = flags,
  };

  warn_of_gap (plan->p);
  return qcow2_bitmap_store_change (plan->p->store, plan->p->io, &changes,
                                    error);
}

/* Each of the flags is valid alone. */
static int
set_flags (const struct plan *plan, GError **error)
{
  const struct dirty_persist *p = plan->p;

  for (guint i = 0; i < plan->flags->len; ++i) {
    const struct qcow2_bitmap_new_flags *new =
      &g_array_index (plan->flags, struct qcow2_bitmap_new_flags, i);
    struct qcow2_bitmap *stored = qcow2_bitmap_store_find (p->store,
                                                           new->name);

    if (qcow2_bitmap_store_set_flags (p->store, p->io, stored, new->flags,
                                      error) == -1)
      return -1;
  }
  return plan->flags->len > 0 ? p->io->flush (p->io, error) : 0;
}

static int
follow (const struct plan *plan, GError **error)
{
  const bool directory = plan->remove->len > 0 || plan->add->len > 0;

  if (save_all (plan, error) == -1)
    return -1;
  switch (plan->purpose) {
  case PERSIST_CLEAN:
    if (set_flags (plan, error) == -1)
      return -1;
    return directory ? change_directory (plan, NULL, error) : 0;
  case PERSIST_ARM:
    if (!directory)
      return set_flags (plan, error);
    return change_directory (plan, plan->flags, error);
  default:
    return change_directory (plan, plan->flags, error);
  }
}

/* Nothing is left to be done. */
static void
note (const struct plan *plan)
{
  struct dirty_persist *p = plan->p;

  for (guint i = 0; i < plan->replaced->len; ++i) {
    struct dirty_bitmap *bitmap = g_ptr_array_index (plan->replaced, i);

    bitmap->replaced = false;
  }
  if (!qcow2_bitmap_store_find (p->store, DIRTY_INTENT_NAME))
    g_clear_pointer (&p->intent_stored, dirty_bits_free);
  if (atomic_load (&p->armed) && !p->intent && p->intent_stored &&
      p->options.intent)
    persist_begin_intent (p);
}

static bool
is_empty (const struct plan *plan)
{
  return plan->save->len == 0 && plan->remove->len == 0 &&
    plan->add->len == 0 && plan->flags->len == 0;
}

int
persist_write_state (struct dirty_persist *p, enum persist_purpose purpose,
                     bool only_add, GError **error)
{
  struct plan plan;
  int r;

  plan_init (&plan, p, purpose, only_add);
  r = make_plan (&plan, error);
  if (r == 0 && !is_empty (&plan)) {
    r = qcow2_header_begin_writing (p->image->header, p->io, error);
    if (r == 0)
      r = follow (&plan, error);
  }
  if (r == 0)
    note (&plan);
  plan_clear (&plan);
  if (r == -1)
    persist_drop (p);
  return r;
}
