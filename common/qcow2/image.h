/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A qcow2 image, opened for reading.
 *
 * Once it is set up the object is immutable but for its caches, which
 * lock for themselves: functions that take an image may be called from
 * many threads, each with its own qcow2_io over the same container.
 */

#ifndef QCOW2_IMAGE_H
#define QCOW2_IMAGE_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/cache.h"
#include "qcow2/header.h"
#include "qcow2/io.h"
#include "qcow2/snapshot.h"

struct qcow2_image {
  struct qcow2_header *header;
  GPtrArray *snapshots;         /* of struct qcow2_snapshot */
  uint64_t snapshots_length;    /* of their table, in bytes */
  uint32_t cluster_size;        /* in bytes */
  uint32_t slice_size;          /* bytes of a table that are read at once */
  struct qcow2_cache *tables;   /* slices of L1 and L2 tables, by offset */
  struct qcow2_cache *clusters; /* decompressed, by L2 descriptor */
};

/* A disk in an image: the active one, or that of a snapshot. */
struct qcow2_view {
  uint64_t size;                /* in bytes, a multiple of 512 */
  uint64_t l1_offset;
  uint32_t l1_entries;
};

/* Open the image in io, which is not kept.  Its caches are empty and
 * have no room.
 *
 * Fails if the header or the snapshot table is bad or if the image needs
 * something this build does not have.  Returns NULL with error set.
 */
extern struct qcow2_image *qcow2_image_open (const struct qcow2_io *io,
                                             GError **error);

/* Bound the memory (bytes) for tables and decompressed clusters, half
 * for each.  Empties the caches, so nothing of the image may be in use.
 */
extern void qcow2_image_set_cache_size (struct qcow2_image *image,
                                        uint64_t cache_size);

/* Nothing of the image may be in use. */
extern void qcow2_image_close (struct qcow2_image *image);

/* The active disk; or that of a snapshot, which fails if the snapshot's
 * L1 table is bad.  As in QEMU the size is rounded down to 512 bytes.
 */
extern void qcow2_image_active_view (const struct qcow2_image *image,
                                     struct qcow2_view *view);
extern int qcow2_image_snapshot_view (const struct qcow2_image *image,
                                      const struct qcow2_snapshot *snapshot,
                                      struct qcow2_view *view,
                                      GError **error);

#endif /* QCOW2_IMAGE_H */
