/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* An extension is added behind the end marker first, where nobody looks;
 * then the marker becomes the head of the extension.  If the name of the
 * backing file stands in the way it is copied further behind, and the
 * header told so, before.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/error.h"
#include "qcow2/header-update.h"

#define HEAD 8                  /* type and length of an extension */
#define SECTOR 512

static uint64_t
round_up (uint64_t n)
{
  return (n + 7) & ~UINT64_C (7);
}

static struct qcow2_extension *
find (const struct qcow2_header *header, uint32_t type)
{
  for (guint i = 0; i < header->extensions->len; ++i) {
    struct qcow2_extension *ext = g_ptr_array_index (header->extensions, i);

    if (ext->type == type)
      return ext;
  }
  return NULL;
}

int
qcow2_header_set_autoclear (struct qcow2_header *header,
                            const struct qcow2_io *io, uint64_t autoclear,
                            GError **error)
{
  uint8_t field[8];

  qcow2_put_be64 (field, autoclear);
  if (qcow2_io_write (io, field, sizeof field, QCOW2_HEADER_AUTOCLEAR,
                      error) == -1)
    return -1;
  header->autoclear = autoclear;
  return 0;
}

int
qcow2_header_check_writable (const struct qcow2_header *header,
                             GError **error)
{
  const bool corrupt = header->incompatible & QCOW2_INCOMPAT_CORRUPT;

  if (!corrupt && !(header->incompatible & QCOW2_INCOMPAT_DIRTY))
    return 0;
  return qcow2_fail (error, EROFS, "the image is marked as %s, so nothing "
                     "can be written to it; \"qemu-img check -r all\" "
                     "repairs it", corrupt ? "corrupt" : "dirty");
}

int
qcow2_header_begin_writing (struct qcow2_header *header,
                            const struct qcow2_io *io, GError **error)
{
  const uint64_t known = header->autoclear &
    (QCOW2_AUTOCLEAR_BITMAPS | QCOW2_AUTOCLEAR_RAW_DATA_FILE);

  if (qcow2_header_check_writable (header, error) == -1)
    return -1;
  if (known == header->autoclear)
    return 0;
  if (qcow2_header_set_autoclear (header, io, known, error) == -1)
    return -1;
  return io->flush (io, error);
}

static int
move_backing_name (struct qcow2_header *header, const struct qcow2_io *io,
                   uint64_t offset, GError **error)
{
  uint8_t field[8];

  qcow2_put_be64 (field, offset);
  if (qcow2_io_write (io, header->backing_file,
                      strlen (header->backing_file), offset, error) == -1 ||
      io->flush (io, error) == -1 ||
      qcow2_io_write (io, field, sizeof field, QCOW2_HEADER_BACKING_OFFSET,
                      error) == -1 ||
      io->flush (io, error) == -1)
    return -1;
  header->backing_offset = offset;
  return 0;
}

/* Where the extensions end when there is one more, with what says so. */
static uint64_t
end_with (const struct qcow2_header *header, size_t length)
{
  return header->extensions_end + HEAD + round_up (length) + HEAD;
}

/* If extensions are to end there: the new offset of the backing name, or 0
 * if it can stay.  The old one stays until the header refers to the new.
 */
static uint64_t
new_name_offset (const struct qcow2_header *header, uint64_t end)
{
  return !header->backing_offset || end <= header->backing_offset ? 0 :
    round_up (MAX (end,
                   header->backing_offset + strlen (header->backing_file)));
}

int
qcow2_header_check_room (const struct qcow2_header *header, size_t length,
                         GError **error)
{
  const uint64_t cluster_size = UINT64_C (1) << header->cluster_bits;
  const uint64_t end = end_with (header, length);
  const uint64_t offset = new_name_offset (header, end);
  const uint64_t used = offset ? offset + strlen (header->backing_file) : end;

  if (header->extensions_end % 8 != 0 || used > cluster_size)
    return qcow2_fail (error, ENOSPC, "the header has no room for another "
                       "extension: %" PRIu64 " bytes are needed, the first "
                       "cluster has %" PRIu64, used, cluster_size);
  return 0;
}

static int
make_room (struct qcow2_header *header, const struct qcow2_io *io,
           size_t length, GError **error)
{
  const uint64_t offset = new_name_offset (header, end_with (header, length));

  if (qcow2_header_check_room (header, length, error) == -1)
    return -1;
  return offset ? move_backing_name (header, io, offset, error) : 0;
}

int
qcow2_header_add_extension (struct qcow2_header *header,
                            const struct qcow2_io *io, uint32_t type,
                            const void *data, size_t length, GError **error)
{
  const uint64_t offset = header->extensions_end;
  const uint64_t end = offset + HEAD + round_up (length);
  g_autofree uint8_t *buf = g_malloc0 (end + HEAD - offset);
  struct qcow2_extension *ext;

  qcow2_put_be32 (buf, type);
  qcow2_put_be32 (buf + 4, length);
  memcpy (buf + HEAD, data, length);
  if (make_room (header, io, length, error) == -1 ||
      qcow2_io_write (io, buf + HEAD, end - offset, offset + HEAD,
                      error) == -1 ||
      io->flush (io, error) == -1 ||
      qcow2_io_write (io, buf, HEAD, offset, error) == -1 ||
      io->flush (io, error) == -1)
    return -1;
  ext = g_new (struct qcow2_extension, 1);
  ext->type = type;
  ext->offset = offset;
  ext->data = g_bytes_new (data, length);
  g_ptr_array_add (header->extensions, ext);
  header->extensions_end = end;
  return 0;
}

int
qcow2_header_put_extension (struct qcow2_header *header,
                            const struct qcow2_io *io, uint32_t type,
                            const void *data, size_t length, GError **error)
{
  struct qcow2_extension *ext = find (header, type);

  if (qcow2_io_write (io, data, length, ext->offset + HEAD, error) == -1)
    return -1;
  g_bytes_unref (ext->data);
  ext->data = g_bytes_new (data, length);
  return 0;
}

bool
qcow2_header_extension_can_tear (const struct qcow2_header *header,
                                 uint32_t type)
{
  const struct qcow2_extension *ext = find (header, type);
  const uint64_t first = ext->offset + HEAD;
  const uint64_t last = first + g_bytes_get_size (ext->data) - 1;

  return first / SECTOR != last / SECTOR;
}

int
qcow2_header_drop_extension (struct qcow2_header *header,
                             const struct qcow2_io *io, uint32_t type,
                             GError **error)
{
  static const uint8_t end_marker[HEAD];
  struct qcow2_extension *ext = find (header, type);
  const guint last = header->extensions->len - 1;

  if (!ext || g_ptr_array_index (header->extensions, last) != ext)
    return 0;
  if (qcow2_io_write (io, end_marker, HEAD, ext->offset, error) == -1)
    return -1;
  header->extensions_end = ext->offset;
  g_ptr_array_remove_index (header->extensions, last);
  return 0;
}
