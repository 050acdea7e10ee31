/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* There are two epochs.  Writes mark their regions in the current one.
 * When a store begins the other becomes the current one; when it ends the
 * intent of the current one alone is stored, and the other is emptied.
 *
 * Why no write is lost.  All steps are sequentially consistent.  A write
 *
 *    (W1) marks the bitmaps
 *    (W2) sees which epoch is current
 *    (W3) marks its region there
 *    (W4) sees that its region is stable
 *
 * and a store
 *
 *    (S1) changes the current epoch
 *    (S2) copies the bitmaps, and stores the copies
 *    (S3) says that no region is stable
 *    (S4) copies the current epoch
 *    (S5) stores this as the intent
 *    (S6) says that the regions in it are stable
 *
 * If W2 saw the epoch from before S1, then W1 was before S2: the write is
 * in the stored bitmaps.  Else W3 marked the epoch that S4 copies.  If W4
 * was before S3, so was W3 before S4: the write is in the intent.  If W4
 * was after S3, the region was stable only if it was in a copy.
 *
 * A write whose region is not stable lets the intent of both epochs be
 * stored, under a lock; others that wait for the lock meanwhile are in the
 * same or the next one.
 *
 * An epoch that could not be emptied because the store has failed becomes
 * the current one again with the next: regions stay in the intent for
 * longer than they have to.  So do those that a slow write marks in an
 * epoch which is being emptied.
 */

#include <config.h>

#include <stdatomic.h>

#include "dirty/intent.h"

struct dirty_intent {
  dirty_intent_write write;
  gpointer opaque;
  struct dirty_bits *epochs[2];
  atomic_uint current;          /* epoch */
  struct dirty_bits *stable;
  GMutex lock;                  /* for who stores the intent */
};

struct dirty_intent *
dirty_intent_new (struct dirty_bits *stored, dirty_intent_write write,
                  gpointer opaque)
{
  struct dirty_intent *intent = g_new0 (struct dirty_intent, 1);

  intent->write = write;
  intent->opaque = opaque;
  intent->epochs[0] = dirty_bits_copy (stored);
  intent->epochs[1] =
    dirty_bits_new (dirty_bits_size (stored),
                    dirty_bits_granularity_bits (stored));
  intent->stable = dirty_bits_copy (stored);
  g_mutex_init (&intent->lock);
  return intent;
}

void
dirty_intent_free (struct dirty_intent *intent)
{
  dirty_bits_free (intent->epochs[0]);
  dirty_bits_free (intent->epochs[1]);
  dirty_bits_free (intent->stable);
  g_mutex_clear (&intent->lock);
  g_free (intent);
}

struct dirty_bits *
dirty_intent_copy (struct dirty_intent *intent)
{
  struct dirty_bits *bits = dirty_bits_copy (intent->epochs[0]);

  dirty_bits_merge (bits, intent->epochs[1]);
  return bits;
}

static void
mark (struct dirty_intent *intent, uint64_t offset, uint64_t count)
{
  const unsigned current = atomic_load (&intent->current);

  dirty_bits_set (intent->epochs[current], offset, count);
}

static bool
is_stable (struct dirty_intent *intent, uint64_t offset, uint64_t count)
{
  return dirty_bits_all (intent->stable, offset, count);
}

/* Under the lock: store a set, which then is what is stable. */
static int
store (struct dirty_intent *intent, struct dirty_bits *bits, GError **error)
{
  if (intent->write (intent->opaque, bits, error) == -1)
    return -1;
  dirty_bits_merge (intent->stable, bits);
  return 0;
}

/* Under the lock: let all be stored that is marked in any epoch. */
static int
store_both (struct dirty_intent *intent, GError **error)
{
  struct dirty_bits *bits = dirty_intent_copy (intent);
  const int r = store (intent, bits, error);

  dirty_bits_free (bits);
  return r;
}

int
dirty_intent_begin_write (struct dirty_intent *intent, uint64_t offset,
                          uint64_t count, GError **error)
{
  int r = 0;

  if (count == 0)
    return 0;
  mark (intent, offset, count);
  if (is_stable (intent, offset, count))
    return 0;
  g_mutex_lock (&intent->lock);
  /* The epoch may have been emptied since, which is good for the bitmaps,
   * but then nobody would ever call the region stable.
   */
  mark (intent, offset, count);
  if (!is_stable (intent, offset, count))
    r = store_both (intent, error);
  g_mutex_unlock (&intent->lock);
  return r;
}

void
dirty_intent_begin_store (struct dirty_intent *intent)
{
  atomic_fetch_xor (&intent->current, 1);
}

int
dirty_intent_end_store (struct dirty_intent *intent, GError **error)
{
  const uint64_t size = dirty_bits_size (intent->stable);
  const unsigned current = atomic_load (&intent->current);
  struct dirty_bits *bits;
  int r;

  g_mutex_lock (&intent->lock);
  dirty_bits_clear (intent->stable, 0, size);
  bits = dirty_bits_copy (intent->epochs[current]);
  r = store (intent, bits, error);
  if (r == 0)
    dirty_bits_clear (intent->epochs[!current], 0, size);
  g_mutex_unlock (&intent->lock);
  dirty_bits_free (bits);
  return r;
}
