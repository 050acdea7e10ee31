/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Facts of the qcow2 format: offsets, masks, limits.  All integers in a
 * qcow2 file are big endian and, in the header, naturally aligned; in
 * buffers they need not be, so they are read with the functions below.
 */

#ifndef QCOW2_FORMAT_H
#define QCOW2_FORMAT_H

#include <stdint.h>
#include <string.h>

#include <glib.h>

#define QCOW2_MAGIC 0x514649fbU /* "QFI\xfb" */

/* Limits.  The format has no upper limit for most of these; the values
 * are those of QEMU, beyond which no image can have been made by it.
 */
#define QCOW2_MIN_CLUSTER_BITS 9
#define QCOW2_MIN_EXTENDED_CLUSTER_BITS 14
#define QCOW2_MAX_CLUSTER_BITS 21
#define QCOW2_MAX_REFCOUNT_ORDER 6
#define QCOW2_MAX_L1_BYTES (UINT64_C (32) << 20)
#define QCOW2_MAX_REFCOUNT_TABLE_BYTES (UINT64_C (8) << 20)
#define QCOW2_MAX_BACKING_NAME 1023
#define QCOW2_MAX_SNAPSHOTS 65536
#define QCOW2_MAX_SNAPSHOT_EXTRA 1024
#define QCOW2_MAX_SNAPSHOT_TABLE_BYTES (UINT64_C (64) << 20)

/* Lengths of the header's fixed part. */
#define QCOW2_V2_HEADER_LENGTH 72
#define QCOW2_V3_HEADER_LENGTH 104

/* Places of fields in it. */
#define QCOW2_HEADER_BACKING_OFFSET 8
#define QCOW2_HEADER_REFCOUNT_TABLE 48 /* offset, then clusters */
#define QCOW2_HEADER_AUTOCLEAR 88

/* Feature bits. */
#define QCOW2_INCOMPAT_DIRTY (UINT64_C (1) << 0)
#define QCOW2_INCOMPAT_CORRUPT (UINT64_C (1) << 1)
#define QCOW2_INCOMPAT_DATA_FILE (UINT64_C (1) << 2)
#define QCOW2_INCOMPAT_COMPRESSION (UINT64_C (1) << 3)
#define QCOW2_INCOMPAT_EXTENDED_L2 (UINT64_C (1) << 4)
#define QCOW2_INCOMPAT_KNOWN                                            \
  (QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT |                      \
   QCOW2_INCOMPAT_DATA_FILE | QCOW2_INCOMPAT_COMPRESSION |              \
   QCOW2_INCOMPAT_EXTENDED_L2)
#define QCOW2_COMPAT_LAZY_REFCOUNTS (UINT64_C (1) << 0)
#define QCOW2_AUTOCLEAR_BITMAPS (UINT64_C (1) << 0)
#define QCOW2_AUTOCLEAR_RAW_DATA_FILE (UINT64_C (1) << 1)

/* Header extension types. */
#define QCOW2_EXT_END 0U
#define QCOW2_EXT_BACKING_FORMAT 0xe2792acaU
#define QCOW2_EXT_FEATURE_NAMES 0x6803f857U
#define QCOW2_EXT_BITMAPS 0x23852875U
#define QCOW2_EXT_BITMAPS_LENGTH 24
#define QCOW2_EXT_CRYPTO 0x0537be77U
#define QCOW2_EXT_DATA_FILE 0x44415441U

enum qcow2_crypt_method {
  QCOW2_CRYPT_NONE = 0,
  QCOW2_CRYPT_AES = 1,
  QCOW2_CRYPT_LUKS = 2,
};

enum qcow2_compression {
  QCOW2_COMPRESSION_DEFLATE = 0,
  QCOW2_COMPRESSION_ZSTD = 1,
};

/* L1 and L2 entries. */
#define QCOW2_ENTRY_OFFSET_MASK UINT64_C (0x00fffffffffffe00)
#define QCOW2_L1_RESERVED_MASK UINT64_C (0x7f000000000001ff)
#define QCOW2_L2_RESERVED_MASK UINT64_C (0x3f000000000001fe)
#define QCOW2_ENTRY_COPIED (UINT64_C (1) << 63)
#define QCOW2_L2_COMPRESSED (UINT64_C (1) << 62)
#define QCOW2_L2_ZERO (UINT64_C (1) << 0)
#define QCOW2_SUBCLUSTERS 32

/* The refcount table's entries. */
#define QCOW2_REFTABLE_OFFSET_MASK UINT64_C (0xfffffffffffffe00)
#define QCOW2_REFTABLE_RESERVED_MASK UINT64_C (0x1ff)

/* Bitmaps. */
#define QCOW2_MAX_BITMAPS 65535
#define QCOW2_MAX_BITMAP_NAME 1023
#define QCOW2_MAX_BITMAP_BYTES (UINT64_C (512) << 20)
#define QCOW2_MIN_GRANULARITY_BITS 9
#define QCOW2_MAX_GRANULARITY_BITS 31
#define QCOW2_BITMAP_ENTRY_LENGTH 24 /* of the fixed part */
#define QCOW2_BITMAP_IN_USE (UINT32_C (1) << 0)
#define QCOW2_BITMAP_AUTO (UINT32_C (1) << 1)
#define QCOW2_BITMAP_EXTRA_COMPATIBLE (UINT32_C (1) << 2)
#define QCOW2_BITMAP_TYPE_DIRTY 1
#define QCOW2_BITMAP_ENTRY_ONES (UINT64_C (1) << 0)
#define QCOW2_BITMAP_ENTRY_RESERVED_MASK UINT64_C (0xff000000000001fe)

static inline uint16_t
qcow2_be16 (const void *p)
{
  uint16_t v;
  memcpy (&v, p, sizeof v);
  return GUINT16_FROM_BE (v);
}

static inline uint32_t
qcow2_be32 (const void *p)
{
  uint32_t v;
  memcpy (&v, p, sizeof v);
  return GUINT32_FROM_BE (v);
}

static inline uint64_t
qcow2_be64 (const void *p)
{
  uint64_t v;
  memcpy (&v, p, sizeof v);
  return GUINT64_FROM_BE (v);
}

static inline void
qcow2_put_be16 (void *p, uint16_t v)
{
  v = GUINT16_TO_BE (v);
  memcpy (p, &v, sizeof v);
}

static inline void
qcow2_put_be32 (void *p, uint32_t v)
{
  v = GUINT32_TO_BE (v);
  memcpy (p, &v, sizeof v);
}

static inline void
qcow2_put_be64 (void *p, uint64_t v)
{
  v = GUINT64_TO_BE (v);
  memcpy (p, &v, sizeof v);
}

#endif /* QCOW2_FORMAT_H */
