/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The states of clusters.
 *
 * Readers and writers look at states without a lock.  What makes that
 * right is the order of things: a cluster leaves the state ON_DISK before
 * any write that changes it on the disk is passed down.  A reader of the
 * disk looks again after it has read: if the cluster is still ON_DISK,
 * what it got is old; if not, it reads from where the cluster is now.  So
 * nobody ever waits for a reader, and readers wait for nobody.
 *
 * What a snapshot had is given back when it ends, however long somebody
 * keeps a reference to it.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "utils/displayable.h"
#include "utils/export-name.h"

#include "snapshot.h"

#define PER_WORD 32             /* clusters */

/* A word all of whose clusters have one state. */
static uint64_t
uniform (enum state state)
{
  return state * UINT64_C (0x5555555555555555);
}

static void
frozen_free (gpointer p)
{
  struct frozen *frozen = p;

  dirty_bits_free (frozen->bits);
  g_free (frozen->name);
  g_free (frozen);
}

static void
snapshot_free (struct snapshot *s)
{
  /* It never came to be: what is in the target is not ours. */
  if (s->target)
    target_drop (s->target);
  g_ptr_array_unref (s->frozen);
  status_cache_clear (&s->status);
  g_mutex_clear (&s->lock);
  g_free ((gpointer) s->states);
  g_free (s->reason);
  g_free (s->target_name);
  g_free (s->bitmap);
  g_free (s->name);
  g_free (s);
}

struct snapshot *
snapshot_ref (struct snapshot *s)
{
  refs_inc (&s->refs);
  return s;
}

void
snapshot_unref (struct snapshot *s)
{
  if (s && refs_dec (&s->refs))
    snapshot_free (s);
}

int
snapshot_check_name (const char *name, GError **error)
{
  g_autofree char *export = qf_export_name_join ("", "snapshot", name);
  g_autofree char *shown = qf_displayable (name, 512);

  if (!*name || strlen (name) > DIRTY_MAX_NAME || !export ||
      strstr (name, "/dirty/") || g_str_has_suffix (name, "/dirty"))
    return dirty_fail (error, EINVAL, "\"%s\" cannot be the name of a "
                       "snapshot: it needs 1 to %d bytes of UTF-8, without "
                       "\"/dirty/\"", shown, DIRTY_MAX_NAME);
  return 0;
}

/* Making one. */

static uint32_t
choose_cluster_size (const struct target *target, uint32_t wanted)
{
  uint32_t size = wanted ? wanted : DEFAULT_CLUSTER_SIZE;

  if (!wanted)
    while (size < target->preferred && size < MAX_CLUSTER_SIZE)
      size <<= 1;
  return size;
}

static int
set_clusters (struct snapshot *s, const struct snapshot_options *options,
              GError **error)
{
  const uint32_t size = choose_cluster_size (s->target,
                                             options->cluster_size);
  uint64_t words;

  if (size < s->target->minimum)
    return dirty_fail (error, EINVAL, "cbw-cluster-size: %" PRIu32 " is less "
                       "than what target %s can write, which is %" PRIu32,
                       size, s->target_name, s->target->minimum);
  s->cluster_bits = __builtin_ctz (size);
  s->clusters = (s->size >> s->cluster_bits) +
    ((s->size & (size - 1)) != 0);
  words = s->clusters / PER_WORD + 1;
  s->states = words > G_MAXSIZE / 8 ? NULL : g_try_malloc0 (words * 8);
  if (!s->states)
    return dirty_fail (error, ENOMEM, "there is no memory to take a snapshot "
                       "of %" PRIu64 " clusters; a larger cbw-cluster-size "
                       "needs less", s->clusters);
  if (s->bitmap)
    memset ((void *) s->states, 0xff, words * 8);
  return 0;
}

struct snapshot *
snapshot_new (struct dirty_node *node, uint64_t size,
              const struct snapshot_options *options, GError **error)
{
  struct target *target = target_open (options->target, size, error);
  struct snapshot *s;

  if (!target)
    return NULL;
  s = g_new0 (struct snapshot, 1);
  refs_init (&s->refs, 1);
  g_mutex_init (&s->lock);
  g_queue_init (&s->copies);
  status_cache_init (&s->status, size);
  s->node = node;
  s->name = g_strdup (options->name);
  s->bitmap = g_strdup (options->bitmap);
  s->target = target;
  s->target_name = g_strdup (target->name);
  s->break_snapshot = options->break_snapshot;
  s->timeout = MIN (options->timeout, G_MAXUINT);
  s->size = size;
  s->frozen = g_ptr_array_new_with_free_func (frozen_free);
  if (set_clusters (s, options, error) == -1) {
    snapshot_unref (s);
    return NULL;
  }
  return s;
}

/* Make accessible what is dirty, rounded out to clusters. */
static void
allow_dirty (struct snapshot *s, struct dirty_bits *bits)
{
  uint64_t offset = 0, length;

  for (; offset < s->size; offset += length) {
    const bool dirty = dirty_bits_get (bits, offset, &length);
    const uint64_t end = ((offset + length - 1) >> s->cluster_bits) + 1;

    for (uint64_t c = offset >> s->cluster_bits; dirty && c < end; ++c) {
      const uint64_t word = atomic_load (&s->states[c / PER_WORD]);
      const unsigned shift = c % PER_WORD * 2;

      if ((word >> shift & 3) == INACCESSIBLE)
        s->accessible += snapshot_bytes (s, c, 1);
      atomic_store (&s->states[c / PER_WORD],
                    word & ~(UINT64_C (3) << shift));
    }
  }
}

static void
freeze_bitmaps (struct snapshot *s)
{
  const GPtrArray *bitmaps = s->node->bitmaps;

  for (guint i = 0; i < bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (bitmaps, i);
    struct frozen *frozen;

    if (bitmap->inconsistent)
      continue;
    frozen = g_new (struct frozen, 1);
    frozen->name = g_strdup (bitmap->name);
    frozen->bits = dirty_bits_copy (bitmap->bits);
    g_ptr_array_add (s->frozen, frozen);
  }
}

int
snapshot_freeze (struct snapshot *s, GError **error)
{
  struct dirty_bits *bits;

  if (s->node->inactive)
    return dirty_fail (error, EROFS, "Node '%s' is inactive: another program "
                       "may be writing to its disk", s->node->name);
  if (s->node->size != s->size)
    return dirty_fail (error, EAGAIN, "the size of node '%s' has changed "
                       "while snapshot '%s' was being made: try again",
                       s->node->name, s->name);
  freeze_bitmaps (s);
  if (!s->bitmap) {
    s->accessible = s->size;
    return 0;
  }
  bits = snapshot_frozen (s, s->bitmap);
  if (!bits)
    return dirty_fail (error, ENOENT, "Dirty bitmap '%s' not found in node "
                       "'%s', or it is inconsistent", s->bitmap,
                       s->node->name);
  allow_dirty (s, bits);
  return 0;
}

struct dirty_bits *
snapshot_frozen (const struct snapshot *s, const char *name)
{
  for (guint i = 0; i < s->frozen->len; ++i) {
    const struct frozen *frozen = g_ptr_array_index (s->frozen, i);

    if (strcmp (frozen->name, name) == 0)
      return frozen->bits;
  }
  return NULL;
}

/* States. */

uint64_t
snapshot_bytes (const struct snapshot *s, uint64_t cluster, uint64_t n)
{
  return MIN (n << s->cluster_bits, s->size - (cluster << s->cluster_bits));
}

enum state
snapshot_run (const struct snapshot *s, uint64_t cluster, uint64_t end,
              uint64_t *length)
{
  uint64_t word = atomic_load (&s->states[cluster / PER_WORD]);
  const enum state state = word >> cluster % PER_WORD * 2 & 3;
  uint64_t c = cluster + 1;

  while (c < end) {
    if (c % PER_WORD == 0) {
      word = atomic_load (&s->states[c / PER_WORD]);
      if (word == uniform (state)) {
        c += PER_WORD;
        continue;
      }
    }
    if ((word >> c % PER_WORD * 2 & 3) != state)
      break;
    c++;
  }
  *length = MIN (c, end) - cluster;
  return state;
}

void
snapshot_set_state (struct snapshot *s, uint64_t cluster, enum state state)
{
  _Atomic uint64_t *word = &s->states[cluster / PER_WORD];
  const unsigned shift = cluster % PER_WORD * 2;

  atomic_store (word, (atomic_load (word) & ~(UINT64_C (3) << shift)) |
                (uint64_t) state << shift);
}

bool
snapshot_is_saved (const struct snapshot *s, uint64_t offset, uint64_t count)
{
  const uint64_t last = MIN (offset + count, s->size);
  uint64_t cluster = offset >> s->cluster_bits, length;

  if (offset >= last || atomic_load (&s->ended))
    return true;
  for (; cluster <= (last - 1) >> s->cluster_bits; cluster += length)
    if (snapshot_run (s, cluster, ((last - 1) >> s->cluster_bits) + 1,
                      &length) == ON_DISK)
      return false;
  return true;
}

struct target *
snapshot_target (struct snapshot *s)
{
  struct target *target;

  g_mutex_lock (&s->lock);
  target = s->target ? target_ref (s->target) : NULL;
  g_mutex_unlock (&s->lock);
  return target;
}

/* The end. */

/* With the lock held.  Of several reasons the first one counts. */
static void
stop (struct snapshot *s, int error, const char *reason)
{
  if (!s->reason)
    s->reason = g_strdup (reason);
  if (!atomic_load (&s->ended))
    atomic_store (&s->ended, error);
  copies_wake (s);
}

void
snapshot_stop (struct snapshot *s, const char *reason)
{
  g_mutex_lock (&s->lock);
  stop (s, ESHUTDOWN, reason);
  g_mutex_unlock (&s->lock);
  copies_wake_for_memory ();
}

static void
end (struct snapshot *s, int error, bool hangs, const char *reason,
     target_done done, gpointer opaque)
{
  struct target *target;

  g_mutex_lock (&s->lock);
  target = s->target;
  s->target = NULL;
  stop (s, error, reason);
  g_mutex_unlock (&s->lock);
  copies_wake_for_memory ();
  if (target)
    target_retire (target, hangs, done, opaque);
  else if (done)
    done (opaque, 0);
}

void
snapshot_break (struct snapshot *s, int error, bool hangs,
                const char *fs, ...)
{
  g_autofree char *reason = NULL;
  va_list args;

  va_start (args, fs);
  reason = g_strdup_vprintf (fs, args);
  va_end (args);
  if (!atomic_load (&s->ended))
    nbdkit_error ("snapshot %s of node %s is broken: %s", s->name,
                  s->node->name, reason);
  end (s, error, hangs, reason, NULL, NULL);
}

void
snapshot_delete (struct snapshot *s, const char *reason, target_done done,
                 gpointer opaque)
{
  end (s, ESHUTDOWN, false, reason, done, opaque);
}

/* With the lock held: take away a cluster; was it in the target? */
static bool
take_away (struct snapshot *s, uint64_t cluster)
{
  uint64_t length;
  const enum state state = snapshot_run (s, cluster, cluster + 1, &length);

  if (state == INACCESSIBLE)
    return false;
  snapshot_set_state (s, cluster, INACCESSIBLE);
  s->accessible -= snapshot_bytes (s, cluster, 1);
  return state == COPIED;
}

int
snapshot_discard (struct snapshot *s, uint64_t offset, uint64_t count,
                  int *err)
{
  const uint64_t size = snapshot_cluster_size (s);
  const uint64_t stop = offset + count == s->size ? s->clusters :
    (offset + count) >> s->cluster_bits;
  uint64_t cluster = (offset + size - 1) >> s->cluster_bits;
  struct target *target = snapshot_target (s);

  if (!target) {
    *err = EIO;
    return -1;
  }
  while (cluster < stop) {
    const uint64_t first = cluster;

    /* A piece of those that the target has, in one go. */
    g_mutex_lock (&s->lock);
    while (cluster < stop && take_away (s, cluster))
      cluster++;
    g_mutex_unlock (&s->lock);
    if (cluster > first)
      target_discard (target, first << s->cluster_bits,
                      snapshot_bytes (s, first, cluster - first));
    if (cluster < stop)
      cluster++;
  }
  target_unref (target);
  return 0;
}
