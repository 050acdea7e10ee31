/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What the layer below says of the disk: where it has data.
 *
 * A snapshot's clusters do not change as long as they are on the disk, so
 * what was said of them once holds until then, for all readers.  It is
 * kept, because the question can cost much, however little is asked for:
 * plugins ask servers, and lseek may look at all that follows.
 *
 * Memory: what is kept is limited, see status.c.
 * Locking: all functions may be called by any threads.
 */

#ifndef CBW_STATUS_H
#define CBW_STATUS_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "below.h"
#include "refs.h"

/* An answer.  It does not change any more. */
struct status {
  refs refs;
  uint64_t start, end;          /* what it tells about, in bytes */
  struct nbdkit_extents *extents;
};

/* The answers about a snapshot's disk. */
struct status_cache {
  uint64_t size;                /* of the disk, in bytes */
  GMutex lock;
  GCond changed;
  GQueue answers;               /* of struct status, the last used first */
  size_t n_extents;             /* in all of them */
  GQueue asking;                /* of uint64_t: about which regions */
  bool useless;                 /* the layer below fails, or is brief */
};

extern void status_cache_init (struct status_cache *cache, uint64_t size);
extern void status_cache_clear (struct status_cache *cache);

/* What is from offset on, which a client asks for with these flags up to
 * end.  The answer, to be unref'ed, begins there or before; it may end
 * anywhere behind it.  NULL with *err set.
 */
extern struct status *status_ask (struct status_cache *cache,
                                  const struct below *below, uint64_t offset,
                                  uint64_t end, uint32_t flags, int *err);

/* The number of the extent that has this offset. */
extern size_t status_find (const struct status *status, uint64_t offset);

extern void status_unref (struct status *status);

#endif /* CBW_STATUS_H */
