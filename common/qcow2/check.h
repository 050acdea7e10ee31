/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The consistency check: every reference to every cluster of the
 * container is counted, and compared with its refcount.
 */

#ifndef QCOW2_CHECK_H
#define QCOW2_CHECK_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/image.h"

/* The figures of "qemu-img check", counted by the same rules. */
struct qcow2_check_result {
  uint64_t corruptions;         /* the image is damaged */
  uint64_t leaks;               /* clusters kept for no use: harmless */
  uint64_t check_errors;        /* clusters that could not be checked */
  uint64_t total_clusters;      /* of the active disk */
  uint64_t allocated_clusters;  /* of those */
  uint64_t fragmented_clusters; /* not behind the one before them */
  uint64_t compressed_clusters;
  uint64_t image_end_offset;    /* in bytes: behind the last used cluster */
};

struct qcow2_check_observer {
  /* Something is wrong.  Called for the first QCOW2_CHECK_MAX_REPORTS
   * findings; the others are only counted.
   */
  void (*report) (void *opaque, const char *message);

  /* Called often; percent of the work is done.  If it does not return 0
   * the check is given up, with the error ECANCELED.
   */
  int (*progress) (void *opaque, unsigned percent);

  void *opaque;
};

#define QCOW2_CHECK_MAX_REPORTS 100

/* Check an image.  It is not changed, nor are its caches used.  Takes 3
 * bytes of memory for each cluster of the container and a few MiB.
 *
 * Returns 0 with result set, whatever was found; or -1 with error set if
 * the check could not be made: a read failed (EIO), there is not enough
 * memory (ENOMEM), or it was given up (ECANCELED).
 */
extern int qcow2_check (const struct qcow2_image *image,
                        const struct qcow2_io *io,
                        const struct qcow2_check_observer *observer,
                        struct qcow2_check_result *result, GError **error);

#endif /* QCOW2_CHECK_H */
