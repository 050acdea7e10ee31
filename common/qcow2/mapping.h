/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* From guest offsets to what is stored there ("Cluster mapping", "L1
 * table", "L2 table", "Extended L2 Entries").
 */

#ifndef QCOW2_MAPPING_H
#define QCOW2_MAPPING_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/image.h"

enum qcow2_run_type {
  QCOW2_RUN_UNALLOCATED,    /* the image says nothing (no backing: zeroes) */
  QCOW2_RUN_ZERO,           /* reads as zeroes, occupies nothing */
  QCOW2_RUN_ZERO_ALLOCATED, /* reads as zeroes, space is set aside for it */
  QCOW2_RUN_DATA,           /* stored as it is */
  QCOW2_RUN_COMPRESSED,     /* all or a part of one compressed cluster */
};

/* A range of the disk that is all of one kind.  All fields in bytes. */
struct qcow2_run {
  enum qcow2_run_type type;
  uint64_t length;              /* of the range on the disk */

  /* DATA: where the range's first byte is in the container, or in the
   * external data file if there is one; the others follow it.  COMPRESSED: where the cluster's compressed data begins,
   * and how many bytes of the container it may extend over.
   */
  uint64_t host_offset;
  uint32_t host_length;
  uint64_t descriptor;          /* COMPRESSED: names the cluster's data */
};

/* Find the run at offset of the view, limited to count bytes (at least
 * 1; the range lies inside the view).  Adjoining clusters of one kind,
 * and of contiguous data, make one run.  Reads tables through io as far
 * as they are not cached.
 *
 * Returns 0, or -1 with error set: EIO if the tables are damaged.
 */
extern int qcow2_map (struct qcow2_image *image,
                      const struct qcow2_view *view,
                      const struct qcow2_io *io,
                      uint64_t offset, uint64_t count,
                      struct qcow2_run *run, GError **error);

#endif /* QCOW2_MAPPING_H */
