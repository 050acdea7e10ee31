/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The layer below, as a connection sees it. */

#ifndef CBW_BELOW_H
#define CBW_BELOW_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-filter.h>

struct below {
  nbdkit_next *next;
  uint32_t maximum;             /* bytes in a request */
  bool coherent;                /* all connections see the same */
  GMutex *lock;                 /* taken for requests, or NULL */
  GMutex *probe;                /* see below_can_extents */
};

static inline void
below_lock (const struct below *below)
{
  if (below->lock)
    g_mutex_lock (below->lock);
}

static inline void
below_unlock (const struct below *below)
{
  if (below->lock)
    g_mutex_unlock (below->lock);
}

/* As nbdkit's .can_extents; not asked before it has to be known, as plugins
 * may have to look at all of the disk.  -1: the layers below have failed.
 */
extern int below_can_extents (const struct below *below);

/* Read any number of bytes; returns 0 or an errno value. */
extern int below_read (const struct below *below, void *buf, uint64_t count,
                       uint64_t offset);

#endif /* CBW_BELOW_H */
