/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The qcow2 header and its extensions ("Header" and "Header extensions"
 * in the format's specification).
 */

#ifndef QCOW2_HEADER_H
#define QCOW2_HEADER_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "qcow2/format.h"
#include "qcow2/io.h"

/* A header extension as it stands in the file.  All are kept, known or
 * not, in their order, so that a rewritten header loses nothing.
 */
struct qcow2_extension {
  uint32_t type;
  uint64_t offset;              /* of its type, in the file */
  GBytes *data;
};

struct qcow2_header {
  uint32_t version;             /* 2 or 3 */
  uint32_t cluster_bits;
  uint64_t size;                /* virtual size in bytes, as it stands */
  enum qcow2_crypt_method crypt_method;
  uint32_t l1_entries;
  uint64_t l1_offset;
  uint64_t refcount_table_offset;
  uint32_t refcount_table_clusters;
  uint32_t nr_snapshots;
  uint64_t snapshots_offset;

  /* Version 2 images get the values that version 3 gives to them. */
  uint64_t incompatible, compatible, autoclear;
  uint32_t refcount_order;      /* a refcount has 1 << refcount_order bits */
  uint32_t header_length;
  enum qcow2_compression compression;

  char *backing_file;           /* NULL if there is none */
  char *backing_format;         /* NULL if not given */
  char *data_file;              /* NULL if not given */
  GPtrArray *extensions;        /* of struct qcow2_extension */
  uint64_t extensions_end;      /* where the end marker stands, or could */
  uint64_t backing_offset;      /* of the name, or 0 */
};

/* True if the bytes at buf (count of them) begin as a qcow2 image does. */
extern bool qcow2_header_probe (const void *buf, size_t count);

/* Read and validate the header and its extensions.  What is returned is
 * consistent in itself: sizes do not overflow, tables are aligned and
 * within the limits of format.h, the L1 table covers the disk, and only
 * known incompatible features are set.  Whether backing files, data
 * files or encryption are wanted is for the caller to decide.
 *
 * Returns NULL with error set.  Free with qcow2_header_free.
 */
extern struct qcow2_header *qcow2_header_load (const struct qcow2_io *io,
                                               GError **error);
extern void qcow2_header_free (struct qcow2_header *header);

/* The data of the first extension of a type, owned by the header, or
 * NULL.
 */
extern GBytes *qcow2_header_find_extension (const struct qcow2_header *header,
                                            uint32_t type);

/* Bytes that one entry of an L2 table takes, and how many L2 entries
 * (log2) one table, which fills one cluster, has.
 */
static inline uint32_t
qcow2_header_l2_entry_size (const struct qcow2_header *header)
{
  return header->incompatible & QCOW2_INCOMPAT_EXTENDED_L2 ? 16 : 8;
}

static inline uint32_t
qcow2_header_l2_bits (const struct qcow2_header *header)
{
  return header->cluster_bits -
    (header->incompatible & QCOW2_INCOMPAT_EXTENDED_L2 ? 4 : 3);
}

/* Number of L1 entries that a disk of this size needs. */
extern uint64_t qcow2_header_l1_needed (const struct qcow2_header *header,
                                        uint64_t disk_size);

/* Check the place and length of the L1 table of a disk of disk_size
 * bytes: alignment, QEMU's limit, and that the entries the disk needs
 * are there.  A table may have more of them than that.  what names it.
 */
extern int qcow2_header_check_l1 (const struct qcow2_header *header,
                                  const char *what, uint64_t disk_size,
                                  uint64_t offset, uint32_t entries,
                                  GError **error);

#endif /* QCOW2_HEADER_H */
