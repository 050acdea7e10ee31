/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Reading refcounts.
 *
 * The refcount table lists refcount blocks of one cluster each; a block
 * has a refcount of 1 << refcount_order bits for each host cluster.
 * Widths below 8 bits put the first refcount into the lowest bits.
 */

#include <config.h>

#include <inttypes.h>

#include "qcow2/error.h"
#include "qcow2/refcount.h"

uint64_t
qcow2_refcount_get (const uint8_t *block, uint64_t i, uint32_t refcount_order)
{
  const unsigned width = 1U << refcount_order; /* in bits */

  switch (refcount_order) {
  case 3: return block[i];
  case 4: return qcow2_be16 (block + i * 2);
  case 5: return qcow2_be32 (block + i * 4);
  case 6: return qcow2_be64 (block + i * 8);
  default:
    return (block[i * width >> 3] >> (i * width & 7)) & ((1U << width) - 1);
  }
}

void
qcow2_refcount_put (uint8_t *block, uint64_t i, uint32_t refcount_order,
                    uint64_t value)
{
  const unsigned width = 1U << refcount_order; /* in bits */
  const unsigned shift = i * width & 7;

  switch (refcount_order) {
  case 3: block[i] = value; break;
  case 4: qcow2_put_be16 (block + i * 2, value); break;
  case 5: qcow2_put_be32 (block + i * 4, value); break;
  case 6: qcow2_put_be64 (block + i * 8, value); break;
  default:
    block[i * width >> 3] &= ~(((1U << width) - 1) << shift);
    block[i * width >> 3] |= value << shift;
  }
}

/* How many of the first n refcounts in a block are not 0. */
static uint64_t
count_nonzero (const uint8_t *block, uint64_t n, uint32_t order)
{
  uint64_t found = 0;

  for (uint64_t i = 0; i < n; ++i)
    found += qcow2_refcount_get (block, i, order) != 0;
  return found;
}

static int
count_in_block (const struct qcow2_image *image, const struct qcow2_io *io,
                uint64_t table_index, uint64_t entries, uint8_t *block,
                uint64_t *used, GError **error)
{
  const uint64_t entry_offset =
    image->header->refcount_table_offset + table_index * 8;
  uint8_t entry[8];
  uint64_t offset;

  if (qcow2_io_read_exact (io, "the refcount table", entry, sizeof entry,
                           entry_offset, error) == -1)
    return -1;
  offset = qcow2_be64 (entry) & QCOW2_REFTABLE_OFFSET_MASK;
  if (!offset)
    return 0;
  if (offset & (image->cluster_size - 1))
    return qcow2_fail (error, EIO, "entry %" PRIu64 " of the refcount table "
                       "has the offset %" PRIu64 ", which is not a multiple "
                       "of the cluster size", table_index, offset);
  if (qcow2_io_read_exact (io, "a refcount block", block,
                           image->cluster_size, offset, error) == -1)
    return -1;
  *used += count_nonzero (block, entries, image->header->refcount_order);
  return 0;
}

int
qcow2_refcount_count_used (const struct qcow2_image *image,
                           const struct qcow2_io *io, uint64_t limit,
                           uint64_t *used, GError **error)
{
  const uint64_t clusters =
    io->get_size (io) / image->cluster_size +
    (io->get_size (io) % image->cluster_size != 0);
  const uint64_t per_block = qcow2_refcounts_per_block (image);
  const uint64_t table_entries =
    (uint64_t) image->header->refcount_table_clusters *
    (image->cluster_size / 8);
  g_autofree uint8_t *block = g_try_malloc (image->cluster_size);

  if (!block)
    return qcow2_fail (error, ENOMEM, "no memory for a refcount block");
  *used = 0;
  for (uint64_t i = 0, done = 0;
       i < table_entries && done < clusters && *used < limit;
       ++i, done += per_block) {
    if (count_in_block (image, io, i, MIN (per_block, clusters - done),
                        block, used, error) == -1)
      return -1;
  }
  return 0;
}
