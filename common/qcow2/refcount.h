/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Reference counts ("Host cluster management"), reading side. */

#ifndef QCOW2_REFCOUNT_H
#define QCOW2_REFCOUNT_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/image.h"

/* The number of refcounts in one refcount block. */
static inline uint64_t
qcow2_refcounts_per_block (const struct qcow2_image *image)
{
  return (uint64_t) image->cluster_size * 8 >> image->header->refcount_order;
}

/* Refcount number i of those in a block. */
extern uint64_t qcow2_refcount_get (const uint8_t *block, uint64_t i,
                                    uint32_t refcount_order);

extern void qcow2_refcount_put (uint8_t *block, uint64_t i,
                                uint32_t refcount_order, uint64_t value);

/* Count the clusters of the container that are in use (whose refcount is
 * not 0), but stop as soon as limit of them were found.  Returns 0, or
 * -1 with error set.
 */
extern int qcow2_refcount_count_used (const struct qcow2_image *image,
                                      const struct qcow2_io *io,
                                      uint64_t limit, uint64_t *used,
                                      GError **error);

#endif /* QCOW2_REFCOUNT_H */
