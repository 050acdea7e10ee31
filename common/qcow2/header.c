/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Parsing and validating the header.
 *
 * Nothing here trusts the file.  The fixed part is read first and tells
 * how long the header area is (at most one cluster, 2 MiB); extensions
 * are then read one by one, each checked against what is left of the
 * area before memory is taken for it.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/error.h"
#include "qcow2/header.h"

/* The first bytes of the file are read at once: almost always they hold
 * the whole header, and over a network each read costs a round trip.
 */
#define HEAD_LENGTH 4096

/* No program makes more than a handful. */
#define MAX_EXTENSIONS 1024

/* Type and length of an extension. */
#define EXTENSION_HEAD 8

#define FEATURE_NAME_ENTRY 48
#define FEATURE_NAME_LENGTH 46

bool
qcow2_header_probe (const void *buf, size_t count)
{
  return count >= 4 && qcow2_be32 (buf) == QCOW2_MAGIC;
}

static void
extension_free (gpointer p)
{
  struct qcow2_extension *ext = p;

  g_bytes_unref (ext->data);
  g_free (ext);
}

void
qcow2_header_free (struct qcow2_header *header)
{
  if (!header)
    return;
  g_free (header->backing_file);
  g_free (header->backing_format);
  g_free (header->data_file);
  g_ptr_array_unref (header->extensions);
  g_free (header);
}

GBytes *
qcow2_header_find_extension (const struct qcow2_header *header, uint32_t type)
{
  for (guint i = 0; i < header->extensions->len; ++i) {
    const struct qcow2_extension *ext =
      g_ptr_array_index (header->extensions, i);

    if (ext->type == type)
      return ext->data;
  }
  return NULL;
}

uint64_t
qcow2_header_l1_needed (const struct qcow2_header *header, uint64_t disk_size)
{
  const unsigned bits = header->cluster_bits + qcow2_header_l2_bits (header);

  return (disk_size >> bits) +
    ((disk_size & ((UINT64_C (1) << bits) - 1)) != 0);
}

/* A table that starts at offset and has this many bytes: aligned to a
 * cluster, and the sum does not leave the range of a file offset.
 */
static int
check_table_place (const struct qcow2_header *header, const char *what,
                   uint64_t offset, uint64_t bytes, GError **error)
{
  const uint64_t cluster_size = UINT64_C (1) << header->cluster_bits;

  if (offset & (cluster_size - 1))
    return qcow2_fail (error, EINVAL,
                       "%s offset %" PRIu64 " is not a multiple of "
                       "the cluster size %" PRIu64,
                       what, offset, cluster_size);
  if (offset > (uint64_t) INT64_MAX - bytes)
    return qcow2_fail (error, EINVAL,
                       "%s offset %" PRIu64 " is too large", what, offset);
  return 0;
}

int
qcow2_header_check_l1 (const struct qcow2_header *header, const char *what,
                       uint64_t disk_size, uint64_t offset, uint32_t entries,
                       GError **error)
{
  const uint64_t needed = qcow2_header_l1_needed (header, disk_size);
  const uint64_t bytes = (uint64_t) entries * 8;

  if (bytes > QCOW2_MAX_L1_BYTES)
    return qcow2_fail (error, EINVAL,
                       "%s has %" PRIu32 " entries, but at most %" PRIu64
                       " are allowed",
                       what, entries, QCOW2_MAX_L1_BYTES / 8);
  if (entries < needed)
    return qcow2_fail (error, EINVAL,
                       "%s has %" PRIu32 " entries, but a disk of %" PRIu64
                       " bytes needs %" PRIu64,
                       what, entries, disk_size, needed);
  return check_table_place (header, what, offset, bytes, error);
}

/* The fixed part ("Header", bytes 0-71 and, in version 3, 72-104). */

static int
read_head (const struct qcow2_io *io, uint8_t *buf, GError **error)
{
  const uint64_t size = io->get_size (io);

  memset (buf, 0, HEAD_LENGTH);
  if (size && io->pread (io, buf, MIN (size, HEAD_LENGTH), 0, error) == -1)
    return -1;
  if (!qcow2_header_probe (buf, size))
    return qcow2_fail (error, EINVAL, "not a qcow2 image: "
                       "the file does not begin with the magic QFI\\xfb");
  if (size < QCOW2_V2_HEADER_LENGTH)
    return qcow2_fail (error, EINVAL, "the qcow2 header is truncated: "
                       "the file has only %" PRIu64 " bytes", size);
  return 0;
}

static int
check_cluster_bits (const struct qcow2_header *header, GError **error)
{
  const uint32_t bits = header->cluster_bits;

  if (bits < QCOW2_MIN_CLUSTER_BITS || bits > QCOW2_MAX_CLUSTER_BITS)
    return qcow2_fail (error, EINVAL, "cluster_bits is %" PRIu32
                       ", but must be between %d and %d", bits,
                       QCOW2_MIN_CLUSTER_BITS, QCOW2_MAX_CLUSTER_BITS);
  if ((header->incompatible & QCOW2_INCOMPAT_EXTENDED_L2) &&
      bits < QCOW2_MIN_EXTENDED_CLUSTER_BITS)
    return qcow2_fail (error, EINVAL, "cluster_bits is %" PRIu32
                       ", but an image with extended L2 entries needs "
                       "at least %d", bits, QCOW2_MIN_EXTENDED_CLUSTER_BITS);
  return 0;
}

static int
parse_version (struct qcow2_header *header, const uint8_t *buf,
               GError **error)
{
  header->version = qcow2_be32 (buf + 4);
  header->cluster_bits = qcow2_be32 (buf + 20);

  switch (header->version) {
  case 2:
    header->refcount_order = 4;
    header->header_length = QCOW2_V2_HEADER_LENGTH;
    return check_cluster_bits (header, error);

  case 3:
    header->incompatible = qcow2_be64 (buf + 72);
    header->compatible = qcow2_be64 (buf + 80);
    header->autoclear = qcow2_be64 (buf + 88);
    header->refcount_order = qcow2_be32 (buf + 96);
    header->header_length = qcow2_be32 (buf + 100);
    if (check_cluster_bits (header, error) == -1)
      return -1;
    if (header->header_length < QCOW2_V3_HEADER_LENGTH ||
        header->header_length > UINT32_C (1) << header->cluster_bits)
      return qcow2_fail (error, EINVAL, "header_length is %" PRIu32
                         ", but must be between %d and the cluster size %"
                         PRIu32, header->header_length,
                         QCOW2_V3_HEADER_LENGTH,
                         UINT32_C (1) << header->cluster_bits);
    return 0;

  default:
    return qcow2_fail (error, ENOTSUP, "qcow2 version is %" PRIu32
                       ", but only versions 2 and 3 are known",
                       header->version);
  }
}

static int
parse_compression (struct qcow2_header *header, const uint8_t *buf,
                   GError **error)
{
  const unsigned type =
    header->header_length > QCOW2_V3_HEADER_LENGTH ? buf[104] : 0;

  if (type > QCOW2_COMPRESSION_ZSTD)
    return qcow2_fail (error, ENOTSUP, "compression_type is %u, but only "
                       "0 (deflate) and 1 (zstd) are known", type);
  if ((type != 0) != !!(header->incompatible & QCOW2_INCOMPAT_COMPRESSION))
    return qcow2_fail (error, EINVAL, "compression_type is %u, but "
                       "incompatible feature bit 3 (compression type) is %s",
                       type, type ? "not set" : "set");
  header->compression = type;
  return 0;
}

static void
parse_fields (struct qcow2_header *header, const uint8_t *buf)
{
  header->size = qcow2_be64 (buf + 24);
  header->l1_entries = qcow2_be32 (buf + 36);
  header->l1_offset = qcow2_be64 (buf + 40);
  header->refcount_table_offset = qcow2_be64 (buf + 48);
  header->refcount_table_clusters = qcow2_be32 (buf + 56);
  header->nr_snapshots = qcow2_be32 (buf + 60);
  header->snapshots_offset = qcow2_be64 (buf + 64);
}

static int
check_refcount_table (const struct qcow2_header *header, GError **error)
{
  const uint64_t bytes =
    (uint64_t) header->refcount_table_clusters << header->cluster_bits;

  if (header->refcount_order > QCOW2_MAX_REFCOUNT_ORDER)
    return qcow2_fail (error, EINVAL, "refcount_order is %" PRIu32
                       ", but must be at most %d",
                       header->refcount_order, QCOW2_MAX_REFCOUNT_ORDER);
  if (header->refcount_table_clusters == 0)
    return qcow2_fail (error, EINVAL, "refcount_table_clusters is 0: "
                       "the image has no refcount table");
  if (bytes > QCOW2_MAX_REFCOUNT_TABLE_BYTES)
    return qcow2_fail (error, EINVAL, "refcount_table_clusters is %" PRIu32
                       ", but the table may have at most %" PRIu64 " bytes",
                       header->refcount_table_clusters,
                       QCOW2_MAX_REFCOUNT_TABLE_BYTES);
  return check_table_place (header, "refcount_table",
                            header->refcount_table_offset, bytes, error);
}

static int
check_snapshot_table (const struct qcow2_header *header, GError **error)
{
  if (header->nr_snapshots == 0)
    return 0;
  if (header->nr_snapshots > QCOW2_MAX_SNAPSHOTS)
    return qcow2_fail (error, EINVAL, "nb_snapshots is %" PRIu32
                       ", but must be at most %d",
                       header->nr_snapshots, QCOW2_MAX_SNAPSHOTS);
  return check_table_place (header, "snapshot table",
                            header->snapshots_offset,
                            QCOW2_MAX_SNAPSHOT_TABLE_BYTES, error);
}

static int
check_fields (const struct qcow2_header *header, const uint8_t *buf,
              GError **error)
{
  if (qcow2_be32 (buf + 32) > QCOW2_CRYPT_LUKS)
    return qcow2_fail (error, ENOTSUP, "crypt_method is %" PRIu32
                       ", but only 0 (none), 1 (AES) and 2 (LUKS) are known",
                       qcow2_be32 (buf + 32));
  if (qcow2_be32 (buf + 32) != QCOW2_CRYPT_LUKS &&
      qcow2_header_find_extension (header, QCOW2_EXT_CRYPTO))
    return qcow2_fail (error, EINVAL, "crypt_method is %" PRIu32
                       ", but there is a header extension for the "
                       "encryption, which only 2 (LUKS) has",
                       qcow2_be32 (buf + 32));
  if (header->size > INT64_MAX)
    return qcow2_fail (error, EINVAL, "size is %" PRIu64
                       ", but must be at most %" PRId64,
                       header->size, INT64_MAX);
  if (qcow2_header_check_l1 (header, "l1_table", header->size,
                             header->l1_offset, header->l1_entries,
                             error) == -1 ||
      check_refcount_table (header, error) == -1 ||
      check_snapshot_table (header, error) == -1)
    return -1;
  return 0;
}

/* The strings and extensions behind the fixed part. */

/* Where the header area ends: at the backing file's name if there is
 * one, else at the end of the first cluster.
 */
static int
header_area_end (const struct qcow2_header *header, const uint8_t *buf,
                 uint64_t *end, GError **error)
{
  const uint64_t cluster_size = UINT64_C (1) << header->cluster_bits;
  const uint64_t backing_offset =
    qcow2_be64 (buf + QCOW2_HEADER_BACKING_OFFSET);

  if (backing_offset > cluster_size)
    return qcow2_fail (error, EINVAL, "backing_file_offset is %" PRIu64
                       ", but the name must lie in the first cluster "
                       "(%" PRIu64 " bytes)", backing_offset, cluster_size);
  if (backing_offset && backing_offset < header->header_length)
    return qcow2_fail (error, EINVAL, "backing_file_offset is %" PRIu64
                       ", which is inside the header (%" PRIu32 " bytes)",
                       backing_offset, header->header_length);
  *end = backing_offset ? backing_offset : cluster_size;
  return 0;
}

/* Read from the header area, of which head holds the first bytes. */
static int
area_read (const struct qcow2_io *io, const uint8_t *head, const char *what,
           void *buf, size_t count, uint64_t offset, GError **error)
{
  if (offset + count <= MIN (HEAD_LENGTH, io->get_size (io))) {
    memcpy (buf, head + offset, count);
    return 0;
  }
  return qcow2_io_read_exact (io, what, buf, count, offset, error);
}

static int
load_backing_file (struct qcow2_header *header, const struct qcow2_io *io,
                   const uint8_t *buf, GError **error)
{
  const uint64_t offset = qcow2_be64 (buf + 8);
  const uint32_t length = qcow2_be32 (buf + 16);
  const uint64_t cluster_size = UINT64_C (1) << header->cluster_bits;

  if (!offset)
    return 0;
  if (length > MIN (QCOW2_MAX_BACKING_NAME, cluster_size - offset))
    return qcow2_fail (error, EINVAL, "backing_file_size is %" PRIu32
                       ", but must be at most %" PRIu64, length,
                       MIN (QCOW2_MAX_BACKING_NAME, cluster_size - offset));
  if (!length)
    return 0;

  header->backing_offset = offset;
  header->backing_file = g_malloc0 (length + 1);
  if (area_read (io, buf, "the backing file's name",
                 header->backing_file, length, offset, error) == -1)
    return -1;
  if (strlen (header->backing_file) != length)
    return qcow2_fail (error, EINVAL,
                       "the backing file's name contains a NUL byte");
  return 0;
}

/* A name stored as an extension's data. */
static int
extension_string (const struct qcow2_header *header, uint32_t type,
                  const char *what, char **result, GError **error)
{
  GBytes *bytes = qcow2_header_find_extension (header, type);
  const char *data;
  gsize length;

  if (!bytes)
    return 0;
  data = g_bytes_get_data (bytes, &length);
  if (length > QCOW2_MAX_BACKING_NAME)
    return qcow2_fail (error, EINVAL, "%s is %zu bytes long, but must be at "
                       "most %d", what, (size_t) length,
                       QCOW2_MAX_BACKING_NAME);
  if (length && memchr (data, 0, length))
    return qcow2_fail (error, EINVAL, "%s contains a NUL byte", what);
  *result = g_strndup (data, length);
  return 0;
}

static int
load_extension_data (struct qcow2_header *header, const struct qcow2_io *io,
                     const uint8_t *buf, uint32_t type, uint32_t length,
                     uint64_t offset, GError **error)
{
  struct qcow2_extension *ext;
  uint8_t *data = g_try_malloc (MAX (length, 1));

  if (!data)
    return qcow2_fail (error, ENOMEM, "no memory for a header extension of %"
                       PRIu32 " bytes", length);
  if (area_read (io, buf, "a header extension", data, length, offset,
                 error) == -1) {
    g_free (data);
    return -1;
  }

  ext = g_new (struct qcow2_extension, 1);
  ext->type = type;
  ext->offset = offset - EXTENSION_HEAD;
  ext->data = g_bytes_new_take (data, length);
  g_ptr_array_add (header->extensions, ext);
  return 0;
}

static int
load_extensions (struct qcow2_header *header, const struct qcow2_io *io,
                 const uint8_t *buf, uint64_t end, GError **error)
{
  uint64_t offset = header->header_length;
  uint8_t head[EXTENSION_HEAD];
  uint32_t type, length;

  header->extensions_end = offset;
  /* An old file may end right behind its header, without an end marker. */
  while (end - offset >= sizeof head && offset < io->get_size (io)) {
    if (area_read (io, buf, "a header extension", head, sizeof head, offset,
                   error) == -1)
      return -1;
    type = qcow2_be32 (head);
    length = qcow2_be32 (head + 4);
    offset += sizeof head;
    if (type == QCOW2_EXT_END)
      break;
    if (length > end - offset)
      return qcow2_fail (error, EINVAL, "header extension 0x%" PRIx32
                         " at offset %" PRIu64 " has %" PRIu32
                         " bytes, but only %" PRIu64 " are left for it",
                         type, offset - sizeof head, length, end - offset);
    if (header->extensions->len == MAX_EXTENSIONS)
      return qcow2_fail (error, EINVAL,
                         "the header has more than %d extensions",
                         MAX_EXTENSIONS);
    if (load_extension_data (header, io, buf, type, length, offset,
                             error) == -1)
      return -1;
    /* The data is padded to a multiple of 8; end need not be one. */
    offset += MIN ((length + UINT64_C (7)) & ~UINT64_C (7), end - offset);
    header->extensions_end = offset;
  }
  return 0;
}

/* The feature name table ("Feature name table"): entries of a type (0 is
 * incompatible), a bit number and a zero-padded name.
 */
static char *
feature_name (const struct qcow2_header *header, unsigned bit)
{
  GBytes *table = qcow2_header_find_extension (header,
                                               QCOW2_EXT_FEATURE_NAMES);
  gsize length = 0;
  const uint8_t *p = table ? g_bytes_get_data (table, &length) : NULL;

  for (; length >= FEATURE_NAME_ENTRY;
       p += FEATURE_NAME_ENTRY, length -= FEATURE_NAME_ENTRY) {
    if (p[0] == 0 && p[1] == bit) {
      g_autofree char *name = g_strndup ((const char *) p + 2,
                                         FEATURE_NAME_LENGTH);
      return g_strescape (name, NULL);
    }
  }
  return NULL;
}

static int
check_features (const struct qcow2_header *header, GError **error)
{
  const uint64_t unknown = header->incompatible & ~QCOW2_INCOMPAT_KNOWN;
  g_autoptr (GString) list = NULL;

  if (!unknown)
    return 0;

  list = g_string_new (NULL);
  for (unsigned bit = 0; bit < 64; ++bit) {
    if (unknown & (UINT64_C (1) << bit)) {
      g_autofree char *name = feature_name (header, bit);

      g_string_append_printf (list, "%s%s%s(bit %u)", list->len ? ", " : "",
                              name ? name : "", name ? " " : "", bit);
    }
  }
  return qcow2_fail (error, ENOTSUP, "the image uses incompatible features "
                     "which are not supported: %s", list->str);
}

static int
load (struct qcow2_header *header, const struct qcow2_io *io, GError **error)
{
  uint8_t buf[HEAD_LENGTH];
  uint64_t end = 0;

  if (read_head (io, buf, error) == -1)
    return -1;
  if (parse_version (header, buf, error) == -1)
    return -1;
  if (io->get_size (io) < header->header_length)
    return qcow2_fail (error, EINVAL, "the qcow2 header is truncated: "
                       "header_length is %" PRIu32 ", the file has only %"
                       PRIu64 " bytes", header->header_length,
                       io->get_size (io));
  parse_fields (header, buf);
  if (header_area_end (header, buf, &end, error) == -1 ||
      load_extensions (header, io, buf, end, error) == -1 ||
      /* Unknown features first: they may change what the rest means. */
      check_features (header, error) == -1 ||
      parse_compression (header, buf, error) == -1 ||
      check_fields (header, buf, error) == -1 ||
      load_backing_file (header, io, buf, error) == -1 ||
      extension_string (header, QCOW2_EXT_BACKING_FORMAT,
                        "the backing format", &header->backing_format,
                        error) == -1 ||
      extension_string (header, QCOW2_EXT_DATA_FILE,
                        "the external data file's name", &header->data_file,
                        error) == -1)
    return -1;
  header->crypt_method = qcow2_be32 (buf + 32);
  return 0;
}

struct qcow2_header *
qcow2_header_load (const struct qcow2_io *io, GError **error)
{
  struct qcow2_header *header = g_new0 (struct qcow2_header, 1);

  header->extensions = g_ptr_array_new_with_free_func (extension_free);
  if (load (header, io, error) == -1) {
    qcow2_header_free (header);
    return NULL;
  }
  return header;
}
