/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Write intent: which regions of a disk may have been written since the
 * bitmaps were last stored.
 *
 * As long as the stored intent covers all writes that the stored bitmaps
 * do not have, bitmaps can be recovered after a crash: what was stored, or
 * is in the intent.  A region that is in the stored intent is called stable.
 *
 * Locking: all functions may be called at the same time, but for store_*,
 * which one thread at a time calls.  A write whose region is stable takes
 * no lock.
 */

#ifndef DIRTY_INTENT_H
#define DIRTY_INTENT_H

#include <stdint.h>

#include <glib.h>

#include "dirty/bits.h"

struct dirty_intent;

/* Store and flush the intent.  It may be torn by a crash: of each region
 * that was or is in it, the old or the new state is there.  -1 with error
 * set if that failed.  Called by one thread at a time.
 */
typedef int (*dirty_intent_write) (gpointer opaque, struct dirty_bits *intent,
                                   GError **error);

/* An intent of which it is assumed that it is stored: the regions in
 * stored, whose granularity it has.
 */
extern struct dirty_intent *dirty_intent_new (struct dirty_bits *stored,
                                              dirty_intent_write write,
                                              gpointer opaque);
extern void dirty_intent_free (struct dirty_intent *intent);

/* All regions that should be stored.  Free the set. */
extern struct dirty_bits *dirty_intent_copy (struct dirty_intent *intent);

/* A write has been marked in the bitmaps, and may be passed on when this
 * has returned 0.  On failure it must not, and -1 is returned with error
 * set.
 */
extern int dirty_intent_begin_write (struct dirty_intent *intent,
                                     uint64_t offset, uint64_t count,
                                     GError **error);

/* Before the bitmaps are copied, to be stored; after this all that has been
 * written is in the copy, or will be in the intent when the store ends.
 */
extern void dirty_intent_begin_store (struct dirty_intent *intent);

/* The copies are stored and flushed: reduce the stored intent to what has
 * been written since begin_store.  If the store has failed this must not
 * be called; if it fails itself, nothing is forgotten.
 */
extern int dirty_intent_end_store (struct dirty_intent *intent,
                                   GError **error);

#endif /* DIRTY_INTENT_H */
