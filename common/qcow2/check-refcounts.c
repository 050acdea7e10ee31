/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <inttypes.h>

#include "qcow2/check-internal.h"
#include "qcow2/error.h"
#include "qcow2/refcount.h"

/* No file reaches beyond that, so QEMU fails to read there, while what is
 * beyond the end of the file otherwise reads as zeroes.
 */
#define MAX_OFFSET (INT64_MAX & ~((INT64_C (1) << 30) - 1))

static uint64_t
table_entry (const struct check *c, uint64_t i)
{
  return i < c->refcount_table_entries ?
    qcow2_be64 (c->refcount_table + i * 8) : 0;
}

enum block { BLOCK_MISSING, BLOCK_BAD, BLOCK_READ };

/* Read refcount block number i into c->buf. */
static int
read_block (struct check *c, uint64_t i, enum block *state, GError **error)
{
  const uint64_t offset = table_entry (c, i) & QCOW2_REFTABLE_OFFSET_MASK;

  *state = BLOCK_READ;
  if (!offset)
    *state = BLOCK_MISSING;
  else if ((offset & (c->image->cluster_size - 1)) || offset > MAX_OFFSET)
    *state = BLOCK_BAD;
  else
    return check_read (c, c->buf, c->image->cluster_size, offset, error);
  return 0;
}

/* One and unknown are noted, all that is asked for while L2 tables are
 * walked.
 */
static int
load_block (struct check *c, uint64_t i, GError **error)
{
  const uint64_t per_block = qcow2_refcounts_per_block (c->image);
  const uint64_t first = i * per_block;
  const uint64_t n = MIN (per_block, c->tally->clusters - first);
  const uint32_t order = c->image->header->refcount_order;
  uint8_t *flags = c->tally->flags + first;
  enum block state;

  if (read_block (c, i, &state, error) == -1)
    return -1;
  if (state == BLOCK_MISSING)
    return 0;
  for (uint64_t j = 0; j < n; ++j) {
    if (state == BLOCK_BAD)
      flags[j] |= CLUSTER_UNKNOWN;
    else if (qcow2_refcount_get (c->buf, j, order) == 1)
      flags[j] |= CLUSTER_IS_ONE;
  }
  return 0;
}

int
check_refcounts_load (struct check *c, GError **error)
{
  const struct qcow2_header *header = c->image->header;
  const uint64_t bytes =
    (uint64_t) header->refcount_table_clusters << header->cluster_bits;
  const uint64_t per_block = qcow2_refcounts_per_block (c->image);

  c->refcount_table = g_try_malloc (bytes);
  if (!c->refcount_table && bytes)
    return qcow2_fail (error, ENOMEM, "no memory for the refcount table");
  if (check_read (c, c->refcount_table, bytes, header->refcount_table_offset,
                  error) == -1)
    return -1;
  c->refcount_table_entries = bytes / 8;
  for (uint64_t i = 0; i * per_block < c->tally->clusters; ++i)
    if (load_block (c, i, error) == -1)
      return -1;
  return 0;
}

/* For a cluster that the container does not have: only damaged images
 * refer to one.
 */
static int
is_one_outside (struct check *c, uint64_t cluster, bool *is_one, bool *known,
                GError **error)
{
  const uint32_t order = c->image->header->refcount_order;
  const uint64_t per_block = qcow2_refcounts_per_block (c->image);
  const uint64_t block =
    table_entry (c, cluster / per_block) & QCOW2_REFTABLE_OFFSET_MASK;
  const uint64_t bit = cluster % per_block << order;
  uint8_t buf[8];

  *is_one = false;
  *known = (block & (c->image->cluster_size - 1)) == 0 &&
    block <= MAX_OFFSET;
  if (!block || !*known)
    return 0;
  if (check_read (c, buf, MAX (1U << order >> 3, 1), block + bit / 8,
                  error) == -1)
    return -1;
  *is_one = qcow2_refcount_get (buf, order < 3 ? (bit & 7) >> order : 0,
                                order) == 1;
  return 0;
}

int
check_refcount_is_one (struct check *c, uint64_t offset, bool *is_one,
                       bool *known, GError **error)
{
  const uint64_t cluster = offset >> c->image->header->cluster_bits;

  if (cluster >= c->tally->clusters)
    return is_one_outside (c, cluster, is_one, known, error);
  *is_one = c->tally->flags[cluster] & CLUSTER_IS_ONE;
  *known = !(c->tally->flags[cluster] & CLUSTER_UNKNOWN);
  return 0;
}

static uint64_t
max_refcount (const struct check *c)
{
  const unsigned width = 1U << c->image->header->refcount_order;

  return UINT64_MAX >> (64 - width);
}

static void
refer_to_block (struct check *c, uint64_t i, uint64_t entry)
{
  const uint64_t offset = entry & QCOW2_REFTABLE_OFFSET_MASK;
  const uint64_t cluster = offset >> c->image->header->cluster_bits;

  if (entry & QCOW2_REFTABLE_RESERVED_MASK)
    check_corrupt (c, 1, "entry %" PRIu64 " of the refcount table has "
                   "reserved bits set: 0x%" PRIx64, i, entry);
  else if (offset & (c->image->cluster_size - 1))
    check_corrupt (c, 1, "entry %" PRIu64 " of the refcount table has the "
                   "offset %" PRIu64 ", which is not a multiple of the "
                   "cluster size", i, offset);
  else if (cluster >= c->end)
    check_corrupt (c, 1, "refcount block %" PRIu64 " at offset %" PRIu64
                   " lies beyond the end of the file", i, offset);
  else if (offset) {
    uint64_t count;

    check_refer (c, "a refcount block", offset, c->image->cluster_size, 1);
    count = MIN (qcow2_tally_get (c->tally, cluster), max_refcount (c));
    if (count != 1)
      check_corrupt (c, 1, "refcount block %" PRIu64 " at offset %" PRIu64
                     " is used %" PRIu64 " times", i, offset, count);
  }
}

void
check_refcounts_refer (struct check *c)
{
  const struct qcow2_header *header = c->image->header;

  check_refer (c, "the refcount table", header->refcount_table_offset,
               c->refcount_table_entries * 8, 1);
  for (uint64_t i = 0; i < c->refcount_table_entries; ++i) {
    const uint64_t entry = table_entry (c, i);

    if (entry)
      refer_to_block (c, i, entry);
  }
}

/* The references to a cluster, as far as a refcount can tell. */
static uint64_t
limited_count (struct check *c, uint64_t cluster)
{
  const uint64_t count = qcow2_tally_get (c->tally, cluster);
  const uint64_t max = max_refcount (c);

  if (count > max)
    check_corrupt (c, count - max, "cluster %" PRIu64 " has %" PRIu64
                   " references, more than a refcount can tell",
                   cluster, count);
  return MIN (count, max);
}

static void
compare_cluster (struct check *c, uint64_t cluster, uint64_t refcount,
                 uint64_t count)
{
  if (refcount < count)
    check_corrupt (c, 1, "cluster %" PRIu64 " has refcount %" PRIu64
                   ", but %" PRIu64 " references", cluster, refcount, count);
  else if (refcount > count) {
    c->result->leaks++;
    check_report (c, "cluster %" PRIu64 " has refcount %" PRIu64
                  ", but only %" PRIu64 " references (leaked)",
                  cluster, refcount, count);
  }
}

/* Compare n clusters from first on, whose refcounts are in c->buf.
 * highest is set to the last one that is in use.
 */
static void
compare_block (struct check *c, uint64_t first, uint64_t n,
               enum block state, uint64_t *highest)
{
  const uint32_t order = c->image->header->refcount_order;

  for (uint64_t j = 0; j < n; ++j) {
    const uint64_t count = limited_count (c, first + j);
    const uint64_t refcount =
      state == BLOCK_READ ? qcow2_refcount_get (c->buf, j, order) : 0;

    if (state == BLOCK_BAD)
      continue;
    if (count || refcount)
      *highest = first + j;
    if (count != refcount)
      compare_cluster (c, first + j, refcount, count);
  }
  if (state == BLOCK_BAD) {
    c->result->check_errors += n;
    check_report (c, "the refcounts of %" PRIu64 " clusters from %" PRIu64
                  " on cannot be read", n, first);
  }
}

int
check_refcounts_compare (struct check *c, GError **error)
{
  const uint64_t per_block = qcow2_refcounts_per_block (c->image);
  uint64_t highest = 0;

  for (uint64_t first = 0; first < c->end; first += per_block) {
    const uint64_t n = MIN (per_block, c->end - first);
    enum block state;

    if (check_progress (c, 80 + first * 20 / c->end, error) == -1 ||
        read_block (c, first / per_block, &state, error) == -1)
      return -1;
    compare_block (c, first, n, state, &highest);
  }
  c->result->image_end_offset =
    (highest + 1) << c->image->header->cluster_bits;
  return check_progress (c, 100, error);
}
