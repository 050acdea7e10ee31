/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/bitmap.h"
#include "qcow2/error.h"

#define MAX_DIRECTORY_BYTES                                             \
  ((uint64_t) QCOW2_MAX_BITMAPS *                                       \
   (QCOW2_BITMAP_ENTRY_LENGTH + QCOW2_MAX_BITMAP_NAME + 1))

void
qcow2_bitmap_free (gpointer p)
{
  struct qcow2_bitmap *bitmap = p;

  g_free (bitmap->table);
  g_free (bitmap->name);
  g_free (bitmap);
}

static int
check_extension (const struct qcow2_header *header,
                 const struct qcow2_bitmaps *bitmaps, GError **error)
{
  if (bitmaps->nr == 0 || bitmaps->nr > QCOW2_MAX_BITMAPS)
    return qcow2_fail (error, EINVAL, "nb_bitmaps in the bitmaps extension "
                       "is %" PRIu32 ", but must be 1 to %d",
                       bitmaps->nr, QCOW2_MAX_BITMAPS);
  if (bitmaps->directory_size == 0 ||
      bitmaps->directory_size > MAX_DIRECTORY_BYTES)
    return qcow2_fail (error, EINVAL, "bitmap_directory_size is %" PRIu64
                       ", but must be 1 to %" PRIu64,
                       bitmaps->directory_size, MAX_DIRECTORY_BYTES);
  if (bitmaps->directory_offset == 0 ||
      bitmaps->directory_offset % (UINT64_C (1) << header->cluster_bits) ||
      bitmaps->directory_offset > INT64_MAX)
    return qcow2_fail (error, EINVAL, "bitmap_directory_offset is %" PRIu64
                       ", but must be a multiple of the cluster size and "
                       "not 0", bitmaps->directory_offset);
  return 0;
}

int
qcow2_bitmaps_find (const struct qcow2_header *header,
                    struct qcow2_bitmaps *bitmaps, GError **error)
{
  GBytes *bytes = qcow2_header_find_extension (header, QCOW2_EXT_BITMAPS);
  const uint8_t *data;
  gsize length;

  memset (bitmaps, 0, sizeof *bitmaps);
  if (!(header->autoclear & QCOW2_AUTOCLEAR_BITMAPS))
    return 0;
  if (!bytes)
    return qcow2_fail (error, EINVAL, "the autoclear bit for bitmaps is "
                       "set, but there is no bitmaps extension");
  data = g_bytes_get_data (bytes, &length);
  if (length != QCOW2_EXT_BITMAPS_LENGTH)
    return qcow2_fail (error, EINVAL, "the bitmaps extension has %zu bytes, "
                       "but must have %d", length, QCOW2_EXT_BITMAPS_LENGTH);
  if (qcow2_be32 (data + 4) != 0)
    return qcow2_fail (error, EINVAL, "the reserved field of the bitmaps "
                       "extension is %" PRIu32 ", but must be 0",
                       qcow2_be32 (data + 4));
  bitmaps->nr = qcow2_be32 (data);
  bitmaps->directory_size = qcow2_be64 (data + 8);
  bitmaps->directory_offset = qcow2_be64 (data + 16);
  return check_extension (header, bitmaps, error);
}

uint64_t
qcow2_bitmap_entries (const struct qcow2_header *header,
                      uint32_t granularity_bits)
{
  const uint64_t size = header->size & ~UINT64_C (511);
  const uint64_t granules = (size >> granularity_bits) +
    ((size & ((UINT64_C (1) << granularity_bits) - 1)) != 0);
  const uint64_t per_entry = UINT64_C (8) << header->cluster_bits;

  return MAX (granules / per_entry + (granules % per_entry != 0), 1);
}

/* The limits of a bitmap's table; as in QEMU, a bitmap that is in use may
 * be too short or too long for the disk.
 */
static int
check_table (const struct qcow2_header *header,
             const struct qcow2_bitmap *bitmap, const char *shown,
             GError **error)
{
  const uint64_t bytes =
    (uint64_t) bitmap->table_entries << header->cluster_bits;
  const uint64_t wanted = qcow2_bitmap_entries (header,
                                                bitmap->granularity_bits);

  if (bitmap->table_offset == 0 || bitmap->table_offset > INT64_MAX ||
      bitmap->table_offset % (UINT64_C (1) << header->cluster_bits))
    return qcow2_fail (error, EINVAL, "bitmap_table_offset of bitmap \"%s\" "
                       "is %" PRIu64 ", but must be a multiple of the "
                       "cluster size and not 0",
                       shown, bitmap->table_offset);
  if (bitmap->table_entries == 0 || bytes > QCOW2_MAX_BITMAP_BYTES)
    return qcow2_fail (error, EINVAL, "bitmap_table_size of bitmap \"%s\" is "
                       "%" PRIu32 ", but must be 1 to %" PRIu64,
                       shown, bitmap->table_entries,
                       QCOW2_MAX_BITMAP_BYTES >> header->cluster_bits);
  if (!(bitmap->flags & QCOW2_BITMAP_IN_USE) &&
      bitmap->table_entries != wanted)
    return qcow2_fail (error, EINVAL, "bitmap_table_size of bitmap \"%s\" is "
                       "%" PRIu32 ", but must be %" PRIu64 " for this disk",
                       shown, bitmap->table_entries, wanted);
  return 0;
}

static int
check_bitmap (const struct qcow2_header *header,
              const struct qcow2_bitmap *bitmap, uint8_t type,
              uint32_t extra, GError **error)
{
  const uint32_t known = QCOW2_BITMAP_IN_USE | QCOW2_BITMAP_AUTO |
    QCOW2_BITMAP_EXTRA_COMPATIBLE;
  g_autofree char *shown = g_strescape (bitmap->name, NULL);

  if (!*shown)
    return qcow2_fail (error, EINVAL, "a bitmap has no name");
  if (type != QCOW2_BITMAP_TYPE_DIRTY)
    return qcow2_fail (error, EINVAL, "bitmap \"%s\" is of type %u, but only "
                       "1 (a dirty bitmap) is known", shown, type);
  if (bitmap->flags & ~known)
    return qcow2_fail (error, EINVAL, "bitmap \"%s\" has the flags 0x%" PRIx32
                       ", of which 0x%" PRIx32 " are not known",
                       shown, bitmap->flags, bitmap->flags & ~known);
  if (bitmap->granularity_bits < QCOW2_MIN_GRANULARITY_BITS ||
      bitmap->granularity_bits > QCOW2_MAX_GRANULARITY_BITS)
    return qcow2_fail (error, EINVAL, "granularity_bits of bitmap \"%s\" is %"
                       PRIu32 ", but must be %d to %d",
                       shown, bitmap->granularity_bits,
                       QCOW2_MIN_GRANULARITY_BITS,
                       QCOW2_MAX_GRANULARITY_BITS);
  if (extra != 0)
    return qcow2_fail (error, EINVAL, "bitmap \"%s\" has %" PRIu32 " bytes of "
                       "extra data, which are not known", shown, extra);
  return check_table (header, bitmap, shown, error);
}

/* Take the next bitmap from the rest of the directory.  Returns the
 * length of its entry, or 0 with error set.
 */
static size_t
take_bitmap (const struct qcow2_header *header, const uint8_t *entry,
             size_t rest, struct qcow2_bitmap *bitmap, GError **error)
{
  uint32_t name_length, extra;
  uint64_t length;

  if (rest < QCOW2_BITMAP_ENTRY_LENGTH)
    goto too_short;
  bitmap->table_offset = qcow2_be64 (entry);
  bitmap->table_entries = qcow2_be32 (entry + 8);
  bitmap->flags = qcow2_be32 (entry + 12);
  bitmap->granularity_bits = entry[17];
  name_length = qcow2_be16 (entry + 18);
  extra = qcow2_be32 (entry + 20);
  length = (QCOW2_BITMAP_ENTRY_LENGTH + (uint64_t) extra + name_length + 7) &
    ~UINT64_C (7);
  if (length > rest)
    goto too_short;
  if (name_length > QCOW2_MAX_BITMAP_NAME) {
    qcow2_fail (error, EINVAL, "the name of a bitmap has %" PRIu32 " bytes, "
                "but at most %d are allowed",
                name_length, QCOW2_MAX_BITMAP_NAME);
    return 0;
  }
  bitmap->name =
    g_strndup ((const char *) entry + QCOW2_BITMAP_ENTRY_LENGTH + extra,
               name_length);
  if (check_bitmap (header, bitmap, entry[16], extra, error) == -1)
    return 0;
  return length;

 too_short:
  qcow2_fail (error, EINVAL, "the bitmap directory is shorter than its "
              "entries");
  return 0;
}

GPtrArray *
qcow2_bitmaps_load (const struct qcow2_header *header,
                    const struct qcow2_bitmaps *bitmaps,
                    const struct qcow2_io *io, GError **error)
{
  g_autoptr (GPtrArray) array =
    g_ptr_array_new_with_free_func (qcow2_bitmap_free);
  g_autofree uint8_t *directory = NULL;
  size_t done = 0;

  if (bitmaps->nr == 0)
    return g_steal_pointer (&array);
  directory = g_try_malloc (bitmaps->directory_size);
  if (!directory) {
    qcow2_fail (error, ENOMEM, "no memory for the bitmap directory");
    return NULL;
  }
  if (qcow2_io_read_exact (io, "the bitmap directory", directory,
                           bitmaps->directory_size,
                           bitmaps->directory_offset, error) == -1)
    return NULL;
  while (done < bitmaps->directory_size) {
    struct qcow2_bitmap *bitmap = g_new0 (struct qcow2_bitmap, 1);
    size_t length;

    g_ptr_array_add (array, bitmap);
    length = take_bitmap (header, directory + done,
                          bitmaps->directory_size - done, bitmap, error);
    if (length == 0)
      return NULL;
    bitmap->entry = done;
    done += length;
  }
  if (array->len != bitmaps->nr) {
    qcow2_fail (error, EINVAL, "the bitmap directory has %u entries, but "
                "nb_bitmaps is %" PRIu32, array->len, bitmaps->nr);
    return NULL;
  }
  return g_steal_pointer (&array);
}
