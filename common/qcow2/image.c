/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <inttypes.h>

#include "qcow2/codec.h"
#include "qcow2/error.h"
#include "qcow2/image.h"

/* Bytes of a table that a miss reads.  Smaller slices read less that is
 * not needed, larger ones cost fewer round trips over a network.  This
 * one maps 128 MiB at the usual 64 KiB clusters.
 */
#define SLICE_SIZE 16384

/* Checks that need no reading beyond what the header's own did. */
static int
check_supported (const struct qcow2_header *header, GError **error)
{
  if (!qcow2_codec_available (header->compression))
    return qcow2_fail (error, ENOTSUP, "the image is compressed with %s, "
                       "for which this build has no support",
                       qcow2_codec_name (header->compression));
  return 0;
}

struct qcow2_image *
qcow2_image_open (const struct qcow2_io *io, GError **error)
{
  struct qcow2_image *image = g_new0 (struct qcow2_image, 1);

  image->header = qcow2_header_load (io, error);
  if (!image->header || check_supported (image->header, error) == -1)
    goto error;
  image->snapshots = qcow2_snapshots_load (image->header, io,
                                           &image->snapshots_length, error);
  if (!image->snapshots)
    goto error;

  image->cluster_size = UINT32_C (1) << image->header->cluster_bits;
  image->slice_size = MIN (image->cluster_size, SLICE_SIZE);
  qcow2_image_set_cache_size (image, 0);
  return image;

 error:
  qcow2_image_close (image);
  return NULL;
}

void
qcow2_image_set_cache_size (struct qcow2_image *image, uint64_t cache_size)
{
  qcow2_cache_free (image->clusters);
  qcow2_cache_free (image->tables);
  image->tables = qcow2_cache_new (image->slice_size, cache_size / 2);
  image->clusters = qcow2_cache_new (image->cluster_size, cache_size / 2);
}

void
qcow2_image_close (struct qcow2_image *image)
{
  if (!image)
    return;
  qcow2_cache_free (image->clusters);
  qcow2_cache_free (image->tables);
  if (image->snapshots)
    g_ptr_array_unref (image->snapshots);
  qcow2_header_free (image->header);
  g_free (image);
}

static uint64_t
round_size (uint64_t size)
{
  return size & ~UINT64_C (511);
}

void
qcow2_image_active_view (const struct qcow2_image *image,
                         struct qcow2_view *view)
{
  view->size = round_size (image->header->size);
  view->l1_offset = image->header->l1_offset;
  view->l1_entries = image->header->l1_entries;
}

int
qcow2_image_snapshot_view (const struct qcow2_image *image,
                           const struct qcow2_snapshot *snapshot,
                           struct qcow2_view *view, GError **error)
{
  g_autofree char *name = g_strescape (snapshot->name, NULL);
  g_autofree char *what = g_strdup_printf ("the L1 table of snapshot \"%s\"",
                                           name);

  if (snapshot->disk_size > INT64_MAX)
    return qcow2_fail (error, EINVAL, "the disk size of snapshot \"%s\" is %"
                       PRIu64 ", but must be at most %" PRId64,
                       name, snapshot->disk_size, INT64_MAX);
  if (qcow2_header_check_l1 (image->header, what, snapshot->disk_size,
                             snapshot->l1_offset, snapshot->l1_entries,
                             error) == -1)
    return -1;
  view->size = round_size (snapshot->disk_size);
  view->l1_offset = snapshot->l1_offset;
  view->l1_entries = snapshot->l1_entries;
  return 0;
}
