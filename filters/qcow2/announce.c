/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What other filters and QMP clients can learn about an image. */

#include <config.h>

#include "dirty/node.h"
#include "qcow2/codec.h"
#include "qcow2/format.h"

#include "qcow2-filter.h"

void
announce_image (const char *base, const struct qcow2_header *header,
                const struct source *container)
{
  struct dirty_image *image = g_new0 (struct dirty_image, 1);

  image->filename = g_utf8_make_valid (config.file.path ? config.file.path : "",
                                       -1);
  image->virtual_size = header->size - header->size % 512;
  image->actual_size = source_size (container);
  image->cluster_size = UINT32_C (1) << header->cluster_bits;
  image->version = header->version;
  image->compression =
    header->compression == QCOW2_COMPRESSION_ZSTD ? "zstd" : "zlib";
  image->refcount_bits = 1U << header->refcount_order;
  image->encrypted = header->crypt_method != QCOW2_CRYPT_NONE;
  image->dirty = header->incompatible & QCOW2_INCOMPAT_DIRTY;
  image->corrupt = header->incompatible & QCOW2_INCOMPAT_CORRUPT;
  image->extended_l2 = header->incompatible & QCOW2_INCOMPAT_EXTENDED_L2;
  image->lazy_refcounts = header->compatible & QCOW2_COMPAT_LAZY_REFCOUNTS;
  dirty_node_set_image (dirty_node_of_export (base), image);
}
