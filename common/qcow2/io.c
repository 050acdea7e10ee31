/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/error.h"
#include "qcow2/io.h"

/* Bytes of [offset, offset+count) that lie inside the container. */
static size_t
bytes_inside (const struct qcow2_io *io, size_t count, uint64_t offset)
{
  const uint64_t size = io->get_size (io);

  if (offset >= size)
    return 0;
  return MIN (count, size - offset);
}

int
qcow2_io_read_exact (const struct qcow2_io *io, const char *what,
                     void *buf, size_t count, uint64_t offset, GError **error)
{
  if (bytes_inside (io, count, offset) < count)
    return qcow2_fail (error, EIO,
                       "%s at offset %" PRIu64 " (%zu bytes) ends beyond "
                       "the end of the file (%" PRIu64 " bytes): "
                       "the image is truncated or damaged",
                       what, offset, count, io->get_size (io));

  return io->pread (io, buf, count, offset, error);
}

int
qcow2_io_read_padded (const struct qcow2_io *io, uint32_t slack,
                      void *buf, size_t count, uint64_t offset,
                      GError **error)
{
  const size_t inside = bytes_inside (io, count, offset);

  if (offset + count - MIN (offset + count, io->get_size (io)) >= slack)
    return qcow2_fail (error, EIO,
                       "data at offset %" PRIu64 " (%zu bytes) lies beyond "
                       "the end of the file (%" PRIu64 " bytes): "
                       "the image is truncated or damaged",
                       offset, count, io->get_size (io));

  if (inside && io->pread (io, buf, inside, offset, error) == -1)
    return -1;
  memset ((char *) buf + inside, 0, count - inside);
  return 0;
}

int
qcow2_io_write (const struct qcow2_io *io, const void *buf, size_t count,
                uint64_t offset, GError **error)
{
  const uint64_t size = io->get_size (io);

  if (offset + count > size) {
    if (!io->grow)
      return qcow2_fail (error, ENOSPC, "the container has %" PRIu64 " bytes, "
                         "and cannot become larger", size);
    if (io->grow (io, offset + count, error) == -1)
      return -1;
  }
  return io->pwrite (io, buf, count, offset, error);
}
