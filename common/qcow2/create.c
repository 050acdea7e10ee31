/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */


/* The image is laid out in one piece: header, refcount table, refcount
 * blocks, L1 table, and if there is a data file, L2 tables.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/create.h"
#include "qcow2/error.h"
#include "qcow2/format.h"

#define HEADER_LENGTH 112       /* with compression type and padding */
#define REFCOUNT_ORDER 4

/* Clusters are at least that large; and if all are mapped, so large that
 * the L2 tables have at most so many entries, as far as that is possible.
 */
#define CLUSTER_BITS 16
#define MAX_MAPPED (UINT64_C (2) << 20)

struct layout {
  uint64_t size;                /* of the disk */
  const char *data_file;
  unsigned cluster_bits;
  uint64_t cluster_size;
  uint64_t l1_entries;
  /* In clusters. */
  uint64_t table, blocks, l1, l2;
};

static uint64_t
divide_up (uint64_t n, uint64_t by)
{
  return n / by + (n % by != 0);
}

static uint64_t
total (const struct layout *l)
{
  return 1 + l->table + l->blocks + l->l1 + l->l2;
}

static uint64_t
l1_offset (const struct layout *l)
{
  return (1 + l->table + l->blocks) << l->cluster_bits;
}

static uint64_t
l2_offset (const struct layout *l)
{
  return l1_offset (l) + (l->l1 << l->cluster_bits);
}

static void
choose_clusters (struct layout *l)
{
  l->cluster_bits = CLUSTER_BITS;
  while (l->data_file && l->cluster_bits < QCOW2_MAX_CLUSTER_BITS &&
         l->size >> l->cluster_bits > MAX_MAPPED)
    l->cluster_bits++;
  l->cluster_size = UINT64_C (1) << l->cluster_bits;
}

static int
plan (struct layout *l, GError **error)
{
  uint64_t table, blocks;

  choose_clusters (l);
  l->l1_entries = divide_up (l->size, l->cluster_size * l->cluster_size / 8);
  l->l1 = divide_up (l->l1_entries * 8, l->cluster_size);
  l->l2 = l->data_file ? l->l1_entries : 0;
  if (l->l1_entries * 8 > QCOW2_MAX_L1_BYTES)
    return qcow2_fail (error, EINVAL, "a disk of %" PRIu64 " bytes is too "
                       "large for an image", l->size);
  do {
    table = l->table;
    blocks = l->blocks;
    l->blocks = divide_up (total (l), l->cluster_size >> (REFCOUNT_ORDER - 3));
    l->table = divide_up (l->blocks * 8, l->cluster_size);
  } while (table != l->table || blocks != l->blocks);
  return 0;
}

/* Write one cluster, in a buffer that is cleared after it. */
static int
put_cluster (const struct layout *l, const struct qcow2_io *io, uint8_t *buf,
             uint64_t offset, GError **error)
{
  const int r = qcow2_io_write (io, buf, l->cluster_size, offset, error);

  memset (buf, 0, l->cluster_size);
  return r;
}

/* A table of offsets of clusters that lie behind each other. */
static int
write_offsets (const struct layout *l, const struct qcow2_io *io,
               uint8_t *buf, uint64_t place, uint64_t clusters,
               uint64_t first, uint64_t entries, uint64_t flags,
               GError **error)
{
  const uint64_t per_cluster = l->cluster_size / 8;

  for (uint64_t i = 0; i < clusters; ++i) {
    for (uint64_t j = 0; j < per_cluster; ++j) {
      const uint64_t n = i * per_cluster + j;

      if (n < entries)
        qcow2_put_be64 (buf + j * 8,
                        (first + (n << l->cluster_bits)) | flags);
    }
    if (put_cluster (l, io, buf, place + (i << l->cluster_bits), error) == -1)
      return -1;
  }
  return 0;
}

static int
write_blocks (const struct layout *l, const struct qcow2_io *io, uint8_t *buf,
              GError **error)
{
  const uint64_t per_block = l->cluster_size >> (REFCOUNT_ORDER - 3);

  for (uint64_t i = 0; i < l->blocks; ++i) {
    for (uint64_t j = 0; j < per_block && i * per_block + j < total (l); ++j)
      qcow2_put_be16 (buf + j * 2, 1);
    if (put_cluster (l, io, buf, (1 + l->table + i) << l->cluster_bits,
                     error) == -1)
      return -1;
  }
  return 0;
}

static void
put_header (const struct layout *l, uint8_t *buf)
{
  qcow2_put_be32 (buf, QCOW2_MAGIC);
  qcow2_put_be32 (buf + 4, 3);
  qcow2_put_be32 (buf + 20, l->cluster_bits);
  qcow2_put_be64 (buf + 24, l->size);
  qcow2_put_be32 (buf + 36, l->l1_entries);
  qcow2_put_be64 (buf + 40, l1_offset (l));
  qcow2_put_be64 (buf + QCOW2_HEADER_REFCOUNT_TABLE, l->cluster_size);
  qcow2_put_be32 (buf + QCOW2_HEADER_REFCOUNT_TABLE + 8, l->table);
  qcow2_put_be32 (buf + 96, REFCOUNT_ORDER);
  qcow2_put_be32 (buf + 100, HEADER_LENGTH);
  if (l->data_file) {
    const size_t length = strlen (l->data_file);

    qcow2_put_be64 (buf + 72, QCOW2_INCOMPAT_DATA_FILE);
    qcow2_put_be64 (buf + QCOW2_HEADER_AUTOCLEAR,
                    QCOW2_AUTOCLEAR_RAW_DATA_FILE);
    qcow2_put_be32 (buf + HEADER_LENGTH, QCOW2_EXT_DATA_FILE);
    qcow2_put_be32 (buf + HEADER_LENGTH + 4, length);
    memcpy (buf + HEADER_LENGTH + 8, l->data_file, length);
  }
}

static int
write_all (const struct layout *l, const struct qcow2_io *io, uint8_t *buf,
           GError **error)
{
  const uint64_t clusters = divide_up (l->size, l->cluster_size);

  if (write_offsets (l, io, buf, l->cluster_size, l->table,
                     (1 + l->table) << l->cluster_bits, l->blocks, 0,
                     error) == -1 ||
      write_blocks (l, io, buf, error) == -1 ||
      write_offsets (l, io, buf, l1_offset (l), l->l1, l2_offset (l),
                     l->data_file ? l->l1_entries : 0, QCOW2_ENTRY_COPIED,
                     error) == -1 ||
      write_offsets (l, io, buf, l2_offset (l), l->l2, 0, clusters,
                     QCOW2_ENTRY_COPIED, error) == -1 ||
      io->flush (io, error) == -1)
    return -1;
  put_header (l, buf);
  if (put_cluster (l, io, buf, 0, error) == -1)
    return -1;
  return io->flush (io, error);
}

int
qcow2_create (const struct qcow2_io *io, uint64_t size, const char *data_file,
              GError **error)
{
  struct layout l = { .size = size, .data_file = data_file };
  g_autofree uint8_t *buf = NULL;

  if (size % 512 != 0)
    return qcow2_fail (error, EINVAL, "the size %" PRIu64 " is not a multiple "
                       "of 512", size);
  if (data_file && strlen (data_file) > QCOW2_MAX_BACKING_NAME)
    return qcow2_fail (error, EINVAL, "the name of the data file is longer "
                       "than %d bytes", QCOW2_MAX_BACKING_NAME);
  if (plan (&l, error) == -1)
    return -1;
  buf = g_try_malloc0 (l.cluster_size);
  if (!buf)
    return qcow2_fail (error, ENOMEM, "no memory for a cluster");
  return write_all (&l, io, buf, error);
}
