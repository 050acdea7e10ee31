/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* qcow2-check IMAGE
 *
 * The consistency check of the qcow2 module, its figures as the members
 * of a JSON object that "qemu-img check --output=json" prints.  Findings
 * go to stderr.  Exits with 0 whatever it finds, with 1 if it could not
 * open or check the image.
 */

#include <config.h>

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "qcow2/check.h"
#include "qcow2/file.h"

static void
report (void *opaque, const char *message)
{
  fprintf (stderr, "%s\n", message);
}

static int
progress (void *opaque, unsigned percent)
{
  return 0;
}

static int
check (const struct qcow2_io *io, GError **error)
{
  const struct qcow2_check_observer observer = {
    .report = report,
    .progress = progress,
  };
  struct qcow2_check_result r;
  struct qcow2_image *image = qcow2_image_open (io, error);
  int ret;

  if (!image)
    return -1;
  ret = qcow2_check (image, io, &observer, &r, error);
  qcow2_image_close (image);
  if (ret == 0)
    printf ("{\"corruptions\": %" PRIu64 ", \"leaks\": %" PRIu64
            ", \"check-errors\": %" PRIu64 ", \"total-clusters\": %" PRIu64
            ", \"allocated-clusters\": %" PRIu64
            ", \"fragmented-clusters\": %" PRIu64
            ", \"compressed-clusters\": %" PRIu64
            ", \"image-end-offset\": %" PRIu64 "}\n",
            r.corruptions, r.leaks, r.check_errors, r.total_clusters,
            r.allocated_clusters, r.fragmented_clusters,
            r.compressed_clusters, r.image_end_offset);
  return ret;
}

int
main (int argc, char *argv[])
{
  g_autoptr (GError) error = NULL;
  struct qcow2_file file;

  if (argc != 2) {
    fprintf (stderr, "usage: %s IMAGE\n", argv[0]);
    return EXIT_FAILURE;
  }
  if (qcow2_file_open (&file, argv[1], O_RDONLY, &error) == -1 ||
      check (&file.io, &error) == -1) {
    fprintf (stderr, "%s: %s\n", argv[1], error->message);
    return EXIT_FAILURE;
  }
  qcow2_file_close (&file);
  return EXIT_SUCCESS;
}
