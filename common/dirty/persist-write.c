/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Before the first write all bitmaps that record are marked as in use in
 * the container, and there is an intent; before each write the intent has
 * its region.  If that cannot be stored the write must fail: passed on, it
 * might be missing after a crash.
 */

#include <config.h>

#include <errno.h>

#include "dirty/persist-internal.h"
#include "qcow2/error.h"

/* The intent has changed; see dirty_intent_write. */
static int
write_intent (gpointer opaque, struct dirty_bits *intent, GError **error)
{
  struct dirty_persist *p = opaque;
  struct qcow2_bitmap *bitmap = NULL;
  int r = -1;

  g_mutex_lock (&p->lock);
  if (persist_read_to_write (p, error) == 0) {
    bitmap = qcow2_bitmap_store_find (p->store, DIRTY_INTENT_NAME);
    if (!bitmap || bitmap->granularity_bits !=
        dirty_bits_granularity_bits (intent)) {
      bitmap = NULL;
      qcow2_fail (error, EIO, "the bitmap \"%s\" has disappeared",
                  DIRTY_INTENT_NAME);
    }
  }
  if (bitmap)
    r = qcow2_bitmap_store_save (p->store, p->io, bitmap, intent,
                                 p->intent_stored, error);
  dirty_bits_free (p->intent_stored);
  p->intent_stored = r == 0 ? dirty_bits_copy (intent) : NULL;
  if (r == -1)
    persist_drop (p);
  g_mutex_unlock (&p->lock);
  return r;
}

void
persist_begin_intent (struct dirty_persist *p)
{
  p->intent = dirty_intent_new (p->intent_stored, write_intent, p);
}

void
persist_disarm (struct dirty_persist *p)
{
  atomic_store (&p->armed, false);
  g_clear_pointer (&p->intent, dirty_intent_free);
}

void
dirty_persist_add_writer (struct dirty_persist *p)
{
  atomic_fetch_add (&p->writers, 1);
}

void
dirty_persist_remove_writer (struct dirty_persist *p)
{
  atomic_fetch_sub (&p->writers, 1);
}

/* Is there anything that writes make stale? */
static bool
is_recording (const struct dirty_node *node)
{
  for (guint i = 0; i < node->bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);

    if (bitmap->persistent && bitmap->recording && !bitmap->inconsistent)
      return true;
  }
  return false;
}

static int
arm_container (struct dirty_persist *p, GError **error)
{
  if (!is_recording (p->node))
    return 0;
  if (persist_read_to_write (p, error) == -1 ||
      persist_write_state (p, PERSIST_ARM, false, error) == -1)
    return -1;
  if (p->intent_stored && p->options.intent)
    persist_begin_intent (p);
  return 0;
}

/* Get all ready for writes, if another write has not done it. */
static int
arm (struct dirty_persist *p, GError **error)
{
  int r = 0;

  g_mutex_lock (&p->lock);
  if (!atomic_load (&p->armed)) {
    r = arm_container (p, error);
    atomic_store (&p->armed, r == 0);
  }
  g_mutex_unlock (&p->lock);
  return r;
}

int
dirty_persist_begin_write (struct dirty_persist *p, uint64_t offset,
                           uint64_t count, GError **error)
{
  if (!p->active)
    return dirty_fail (error, EPERM, "node '%s' is inactive: another program "
                       "may be using its image; \"blockdev-set-active\" "
                       "takes it back", p->node->name);
  if ((!atomic_load (&p->armed) && arm (p, error) == -1) ||
      (p->intent &&
       dirty_intent_begin_write (p->intent, offset, count, error) == -1))
    return persist_fail (p, error);
  return 0;
}
