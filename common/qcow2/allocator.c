/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The refcount table is kept in memory; of the refcount blocks, some.
 * Changes are written at once, so what is kept can be dropped at any time.
 *
 * A block that is missing describes only free clusters.  When one of them
 * is to be used a block is made, in the first cluster that it describes:
 * so it describes itself, and no other block changes.  Nothing refers to
 * it until its entry of the table is written.
 *
 * A table that is full is replaced by a larger one.  That and the blocks
 * which describe it lie directly behind all that the old table describes,
 * so nothing can be there, and again no other block changes.  One write to
 * the header makes all of it valid.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/allocator.h"
#include "qcow2/error.h"
#include "qcow2/refcount.h"

#define MAX_BLOCKS 16           /* in memory */

/* Refcount blocks are written in these pieces. */
#define SECTOR 512

struct qcow2_allocator {
  struct qcow2_image *image;
  uint64_t *table;              /* offsets of refcount blocks, or 0 */
  uint64_t entries;             /* of the table */
  GHashTable *blocks;           /* index + 1 -> bytes of the block */
  uint64_t first_free;          /* no cluster before this one is free */
};

static uint64_t
per_block (const struct qcow2_allocator *a)
{
  return qcow2_refcounts_per_block (a->image);
}

static unsigned
cluster_bits (const struct qcow2_allocator *a)
{
  return a->image->header->cluster_bits;
}

static int
load_table (struct qcow2_allocator *a, const struct qcow2_io *io,
            GError **error)
{
  const struct qcow2_header *header = a->image->header;
  const uint64_t bytes =
    (uint64_t) header->refcount_table_clusters << header->cluster_bits;

  a->entries = bytes / 8;
  a->table = g_try_malloc (bytes);
  if (!a->table)
    return qcow2_fail (error, ENOMEM, "no memory for the refcount table");
  if (qcow2_io_read_exact (io, "the refcount table", a->table, bytes,
                           header->refcount_table_offset, error) == -1)
    return -1;
  for (uint64_t i = 0; i < a->entries; ++i) {
    a->table[i] = qcow2_be64 (&a->table[i]);
    if (a->table[i] & (a->image->cluster_size - 1) ||
        a->table[i] >= io->get_size (io))
      return qcow2_fail (error, EIO, "entry %" PRIu64 " of the refcount table "
                         "is %" PRIu64 ", which is not the offset of a "
                         "cluster in the file", i, a->table[i]);
  }
  return 0;
}

/* Of refcount blocks each describes other clusters; one that is used twice
 * would have to be changed in two places, and a small file could describe
 * any number of them.
 */
static int
check_blocks (const struct qcow2_allocator *a, GError **error)
{
  g_autoptr (GHashTable) seen = g_hash_table_new (g_int64_hash,
                                                  g_int64_equal);

  for (uint64_t i = 0; i < a->entries; ++i)
    if (a->table[i] && !g_hash_table_add (seen, &a->table[i]))
      return qcow2_fail (error, EIO, "entry %" PRIu64 " of the refcount table "
                         "is %" PRIu64 ", as is another one: the image is "
                         "corrupt", i, a->table[i]);
  return 0;
}

struct qcow2_allocator *
qcow2_allocator_new (struct qcow2_image *image, const struct qcow2_io *io,
                     GError **error)
{
  struct qcow2_allocator *a = g_new0 (struct qcow2_allocator, 1);

  a->image = image;
  a->blocks = g_hash_table_new_full (NULL, NULL, NULL, g_free);
  if (load_table (a, io, error) == -1 || check_blocks (a, error) == -1) {
    qcow2_allocator_free (a);
    return NULL;
  }
  return a;
}

void
qcow2_allocator_free (struct qcow2_allocator *a)
{
  if (!a)
    return;
  g_hash_table_unref (a->blocks);
  g_free (a->table);
  g_free (a);
}

/* Refcount blocks. */

static void
keep_block (struct qcow2_allocator *a, uint64_t index, uint8_t *block)
{
  if (g_hash_table_size (a->blocks) >= MAX_BLOCKS)
    g_hash_table_remove_all (a->blocks);
  g_hash_table_insert (a->blocks, GSIZE_TO_POINTER (index + 1), block);
}

/* A block that exists.  Valid until the next is asked for.  NULL with
 * error set.
 */
static uint8_t *
get_block (struct qcow2_allocator *a, const struct qcow2_io *io,
           uint64_t index, GError **error)
{
  uint8_t *block = g_hash_table_lookup (a->blocks,
                                        GSIZE_TO_POINTER (index + 1));

  if (block)
    return block;
  block = g_try_malloc (a->image->cluster_size);
  if (!block) {
    qcow2_fail (error, ENOMEM, "no memory for a refcount block");
    return NULL;
  }
  if (qcow2_io_read_exact (io, "a refcount block", block,
                           a->image->cluster_size, a->table[index],
                           error) == -1) {
    g_free (block);
    return NULL;
  }
  keep_block (a, index, block);
  return block;
}

/* Write the sectors of a block that have refcounts begin to end - 1. */
static int
write_refcounts (struct qcow2_allocator *a, const struct qcow2_io *io,
                 uint64_t index, const uint8_t *block, uint64_t begin,
                 uint64_t end, GError **error)
{
  const unsigned order = a->image->header->refcount_order;
  const uint64_t first = (begin << order) / 8 / SECTOR * SECTOR;
  const uint64_t last = ((end - 1) << order) / 8 / SECTOR * SECTOR + SECTOR;

  return qcow2_io_write (io, block + first, last - first,
                         a->table[index] + first, error);
}

/* Blocks for the range of the first of them and those behind it, written
 * from its first cluster on.  In that range this many clusters, beginning
 * with the blocks, have refcount 1; all else in the ranges is free.
 */
static int
write_new_blocks (struct qcow2_allocator *a, const struct qcow2_io *io,
                  uint64_t first, uint64_t blocks, uint64_t used,
                  GError **error)
{
  g_autofree uint8_t *block = g_try_malloc (a->image->cluster_size);

  if (!block)
    return qcow2_fail (error, ENOMEM, "no memory for a refcount block");
  for (uint64_t i = 0; i < blocks; ++i) {
    memset (block, 0, a->image->cluster_size);
    for (uint64_t j = 0; j < per_block (a) && i * per_block (a) + j < used;
         ++j)
      qcow2_refcount_put (block, j, a->image->header->refcount_order, 1);
    if (qcow2_io_write (io, block, a->image->cluster_size,
                        (first + i) << cluster_bits (a), error) == -1)
      return -1;
  }
  return 0;
}

/* Write entries of the table, as they stand in memory. */
static int
write_entries (struct qcow2_allocator *a, const struct qcow2_io *io,
               uint64_t begin, uint64_t end, GError **error)
{
  g_autofree uint8_t *buf = g_malloc ((end - begin) * 8);

  for (uint64_t i = begin; i < end; ++i)
    qcow2_put_be64 (buf + (i - begin) * 8, a->table[i]);
  return qcow2_io_write (io, buf, (end - begin) * 8,
                         a->image->header->refcount_table_offset + begin * 8,
                         error);
}

/* Make blocks that are missing, one behind the other.  The first describes
 * the others, as far as it can, those the next: an entry of the table is
 * written when those are safe that describe its block.
 */
static int
create_blocks (struct qcow2_allocator *a, const struct qcow2_io *io,
               uint64_t index, uint64_t blocks, GError **error)
{
  const uint64_t first = index * per_block (a);

  if (index == 0)
    return qcow2_fail (error, EIO, "the first refcount block is missing");
  if (write_new_blocks (a, io, first, blocks, blocks, error) == -1)
    return -1;
  for (uint64_t i = 0; i < blocks; ++i)
    a->table[index + i] = (first + i) << cluster_bits (a);
  for (uint64_t done = 0, next = 1; done < blocks;
       done = next, next = MIN (blocks, done * per_block (a)))
    if (io->flush (io, error) == -1 ||
        write_entries (a, io, index + done, index + next, error) == -1)
      return -1;
  return 0;
}

/* The refcount table. */

/* Where a larger table goes, and what describes it. */
struct extent {
  uint64_t first;               /* cluster: the blocks, then the table */
  uint64_t blocks;
  uint64_t table;               /* clusters */
};

static struct extent
place_table (const struct qcow2_allocator *a, uint64_t wanted)
{
  const uint64_t per_cluster = a->image->cluster_size / 8;
  struct extent e = { .first = a->entries * per_block (a) };
  uint64_t blocks;

  do {
    blocks = e.blocks;
    e.table = (wanted + blocks + per_cluster - 1) / per_cluster;
    e.blocks = (e.table + blocks + per_block (a) - 1) / per_block (a);
  } while (e.blocks != blocks);
  return e;
}

/* Write the table to its new place, from entries in host order. */
static int
write_table (const struct qcow2_allocator *a, const struct qcow2_io *io,
             const uint64_t *table, const struct extent *e, GError **error)
{
  const uint64_t bytes = e->table << cluster_bits (a);
  g_autofree uint8_t *buf = g_try_malloc (bytes);

  if (!buf)
    return qcow2_fail (error, ENOMEM, "no memory for the refcount table");
  for (uint64_t i = 0; i < bytes / 8; ++i)
    qcow2_put_be64 (buf + i * 8, table[i]);
  return qcow2_io_write (io, buf, bytes,
                         (e->first + e->blocks) << cluster_bits (a), error);
}

/* Let the header refer to the table in the extent. */
static int
switch_table (struct qcow2_allocator *a, const struct qcow2_io *io,
              const struct extent *e, GError **error)
{
  const uint64_t offset = (e->first + e->blocks) << cluster_bits (a);
  uint8_t fields[12];

  qcow2_put_be64 (fields, offset);
  qcow2_put_be32 (fields + 8, e->table);
  if (io->flush (io, error) == -1 ||
      qcow2_io_write (io, fields, sizeof fields, QCOW2_HEADER_REFCOUNT_TABLE,
                      error) == -1 ||
      io->flush (io, error) == -1)
    return -1;
  a->image->header->refcount_table_offset = offset;
  a->image->header->refcount_table_clusters = e->table;
  return 0;
}

/* Replace the table by one of at least as many entries. */
static int
grow_table (struct qcow2_allocator *a, const struct qcow2_io *io,
            uint64_t wanted, GError **error)
{
  const struct extent e = place_table (a, MAX (wanted, a->entries * 3 / 2));
  const uint64_t bytes = e.table << cluster_bits (a);
  const uint64_t old_offset = a->image->header->refcount_table_offset;
  const uint64_t old_clusters = a->image->header->refcount_table_clusters;
  uint64_t *table;

  if (bytes > QCOW2_MAX_REFCOUNT_TABLE_BYTES)
    return qcow2_fail (error, ENOSPC, "the refcount table is as large as it "
                       "may be: the image is full");
  table = g_try_malloc0 (bytes);
  if (!table)
    return qcow2_fail (error, ENOMEM, "no memory for the refcount table");
  memcpy (table, a->table, a->entries * 8);
  for (uint64_t i = 0; i < e.blocks; ++i)
    table[a->entries + i] = (e.first + i) << cluster_bits (a);
  if (write_new_blocks (a, io, e.first, e.blocks, e.blocks + e.table,
                        error) == -1 ||
      write_table (a, io, table, &e, error) == -1 ||
      switch_table (a, io, &e, error) == -1) {
    g_free (table);
    return -1;
  }
  g_free (a->table);
  a->table = table;
  a->entries = bytes / 8;
  return qcow2_free (a, io, old_offset, old_clusters, error);
}

/* Clusters. */

/* Look for a run of free clusters.  Sets *first, and *missing to the first
 * block that must be made before the run can be used, or UINT64_MAX.
 */
static int
find_free (struct qcow2_allocator *a, const struct qcow2_io *io,
           uint64_t clusters, uint64_t *first, uint64_t *missing,
           GError **error)
{
  const uint64_t n = per_block (a);
  uint64_t found = 0, cluster = a->first_free;

  *missing = UINT64_MAX;
  while (found < clusters) {
    const uint64_t index = cluster / n;
    const uint8_t *block = NULL;

    if (index < a->entries && a->table[index]) {
      block = get_block (a, io, index, error);
      if (!block)
        return -1;
    }
    else if (*missing == UINT64_MAX)
      *missing = index;
    for (uint64_t end = (index + 1) * n; cluster < end && found < clusters;
         ++cluster) {
      const bool used = block &&
        qcow2_refcount_get (block, cluster % n,
                            a->image->header->refcount_order) != 0;

      if (used)
        *missing = UINT64_MAX;
      found = used ? 0 : found + 1;
    }
  }
  *first = cluster - clusters;
  return 0;
}

/* Add or subtract 1 in the refcounts of clusters whose blocks exist. */
static int
change (struct qcow2_allocator *a, const struct qcow2_io *io, uint64_t first,
        uint64_t clusters, int by, GError **error)
{
  const unsigned order = a->image->header->refcount_order;
  const uint64_t n = per_block (a);

  for (uint64_t end = first + clusters, next; first < end; first = next) {
    const uint64_t index = first / n;
    uint8_t *block = get_block (a, io, index, error);

    if (!block)
      return -1;
    next = MIN (end, (index + 1) * n);
    for (uint64_t i = first; i < next; ++i) {
      const uint64_t count = qcow2_refcount_get (block, i % n, order);

      if (count == 0 && by < 0)
        return qcow2_fail (error, EIO, "the cluster at offset %" PRIu64
                           " is in use, but its refcount is 0: the image is "
                           "corrupt", i << cluster_bits (a));
      qcow2_refcount_put (block, i % n, order, count + by);
    }
    if (write_refcounts (a, io, index, block, first % n,
                         (next - 1) % n + 1, error) == -1)
      return -1;
  }
  return 0;
}

/* Make blocks from index on, such that behind them a run has room. */
static int
make_room (struct qcow2_allocator *a, const struct qcow2_io *io,
           uint64_t index, uint64_t clusters, GError **error)
{
  const uint64_t needed = clusters / (per_block (a) - 1) + 1;
  uint64_t blocks = 0;

  while (blocks < needed && index + blocks < a->entries &&
         a->table[index + blocks] == 0)
    blocks++;
  if (blocks < needed && index + blocks >= a->entries)
    return grow_table (a, io, index + needed, error);
  return create_blocks (a, io, index, blocks, error);
}

static bool
overlaps (uint64_t offset, uint64_t bytes, uint64_t other_offset,
          uint64_t other_bytes)
{
  return offset < other_offset + other_bytes && other_offset < offset + bytes;
}

/* Clusters that are in use whatever their refcount says: an image in which
 * it is wrong must not lose more than it has lost.
 */
static int
check_free (const struct qcow2_allocator *a, uint64_t first,
            uint64_t clusters, GError **error)
{
  const struct qcow2_header *header = a->image->header;
  const uint64_t cluster_size = a->image->cluster_size;
  const uint64_t offset = first * cluster_size;
  const uint64_t bytes = clusters * cluster_size;
  bool used = first == 0 ||
    overlaps (offset, bytes, header->l1_offset,
              (uint64_t) header->l1_entries * 8) ||
    overlaps (offset, bytes, header->refcount_table_offset,
              header->refcount_table_clusters * cluster_size) ||
    overlaps (offset, bytes, header->snapshots_offset,
              a->image->snapshots_length);

  for (uint64_t i = 0; i < a->entries && !used; ++i)
    used = a->table[i] && overlaps (offset, bytes, a->table[i], cluster_size);
  if (!used)
    return 0;
  return qcow2_fail (error, EIO, "the cluster at offset %" PRIu64 " has the "
                     "refcount 0, but it is in use: the image is corrupt",
                     offset);
}

int
qcow2_allocate (struct qcow2_allocator *a, const struct qcow2_io *io,
                uint64_t clusters, uint64_t *offset, GError **error)
{
  uint64_t first, missing;

  for (;;) {
    if (find_free (a, io, clusters, &first, &missing, error) == -1)
      return -1;
    if (missing == UINT64_MAX)
      break;
    /* New blocks take clusters of the run, so look again. */
    if (make_room (a, io, missing, clusters, error) == -1)
      return -1;
  }
  if (check_free (a, first, clusters, error) == -1 ||
      change (a, io, first, clusters, 1, error) == -1)
    return -1;
  if (clusters == 1 || first == a->first_free)
    a->first_free = first + clusters;
  *offset = first << cluster_bits (a);
  return 0;
}

int
qcow2_free (struct qcow2_allocator *a, const struct qcow2_io *io,
            uint64_t offset, uint64_t clusters, GError **error)
{
  const uint64_t first = offset >> cluster_bits (a);
  const uint64_t last = first + clusters - 1;

  for (uint64_t index = first / per_block (a); index <= last / per_block (a);
       ++index)
    if (index >= a->entries || a->table[index] == 0)
      return qcow2_fail (error, EIO, "the cluster at offset %" PRIu64
                         " is in use, but has no refcount: the image is "
                         "corrupt", offset);
  a->first_free = MIN (a->first_free, first);
  return change (a, io, first, clusters, -1, error);
}
