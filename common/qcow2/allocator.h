/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Allocating and freeing host clusters ("Host cluster management").
 *
 * Offsets are in bytes of the container, counts in clusters.
 *
 * Order of writes, which makes any crash harmless but for leaks:
 *
 *    allocate, write the clusters' content, flush, write the reference
 *    remove the reference, flush, free
 *
 * The flushes are the caller's, so that many clusters can share one; those
 * that the refcount structures need among themselves are done here.
 *
 * Locking: one thread at a time, which is the only one that writes to the
 * container's metadata.  After a failure the object does not know what is
 * in the container: it must be freed, and opened again.
 */

#ifndef QCOW2_ALLOCATOR_H
#define QCOW2_ALLOCATOR_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/image.h"

struct qcow2_allocator;

/* Reads the refcount table.  The image must stay as long as the allocator,
 * and its header is changed when the table moves.  NULL with error set.
 */
extern struct qcow2_allocator *
qcow2_allocator_new (struct qcow2_image *image, const struct qcow2_io *io,
                     GError **error);

/* NULL is allowed. */
extern void qcow2_allocator_free (struct qcow2_allocator *allocator);

/* Take this many free clusters which lie behind each other.  Their content
 * is not defined, and may lie beyond the end of the container.
 */
extern int qcow2_allocate (struct qcow2_allocator *allocator,
                           const struct qcow2_io *io, uint64_t clusters,
                           uint64_t *offset, GError **error);

/* Lower the refcounts of clusters. */
extern int qcow2_free (struct qcow2_allocator *allocator,
                       const struct qcow2_io *io, uint64_t offset,
                       uint64_t clusters, GError **error);

#endif /* QCOW2_ALLOCATOR_H */
