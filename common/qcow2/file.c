/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qcow2/error.h"
#include "qcow2/file.h"

static const struct qcow2_file *
file_of_io (const struct qcow2_io *io)
{
  return (const struct qcow2_file *) io;
}

static int
fail (const char *what, uint64_t offset, int err, GError **error)
{
  return qcow2_fail (error, err, "%s at offset %" PRIu64 ": %s", what, offset,
                     g_strerror (err));
}

static int
file_pread (const struct qcow2_io *io, void *buf, size_t count,
            uint64_t offset, GError **error)
{
  const struct qcow2_file *file = file_of_io (io);
  char *p = buf;

  while (count > 0) {
    const ssize_t n = pread (file->fd, p, count, offset);

    if (n == -1 && errno == EINTR)
      continue;
    if (n == 0)
      return qcow2_fail (error, EIO, "the file has become shorter than %"
                         PRIu64 " bytes", offset + count);
    if (n == -1)
      return fail ("reading", offset, errno, error);
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
file_pwrite (const struct qcow2_io *io, const void *buf, size_t count,
             uint64_t offset, GError **error)
{
  const struct qcow2_file *file = file_of_io (io);
  const char *p = buf;

  while (count > 0) {
    const ssize_t n = pwrite (file->fd, p, count, offset);

    if (n == -1 && errno == EINTR)
      continue;
    if (n <= 0)
      return fail ("writing", offset, n ? errno : ENOSPC, error);
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
file_flush (const struct qcow2_io *io, GError **error)
{
  const struct qcow2_file *file = file_of_io (io);

  if (fdatasync (file->fd) == -1)
    return qcow2_fail (error, errno, "flushing: %s", g_strerror (errno));
  return 0;
}

static int
file_grow (const struct qcow2_io *io, uint64_t size, GError **error)
{
  struct qcow2_file *file = (struct qcow2_file *) io;

  if (ftruncate (file->fd, size) == -1)
    return qcow2_fail (error, errno, "growing to %" PRIu64 " bytes: %s",
                       size, g_strerror (errno));
  file->size = size;
  return 0;
}

static uint64_t
file_get_size (const struct qcow2_io *io)
{
  return file_of_io (io)->size;
}

/* The type of the file, and its size. */
static int
examine (struct qcow2_file *file, bool *regular, GError **error)
{
  struct stat st;
  off_t size;

  if (fstat (file->fd, &st) == -1)
    return qcow2_fail (error, errno, "%s: %s", file->name,
                       g_strerror (errno));
  if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode))
    return qcow2_fail (error, EINVAL, "%s: not a regular file or block "
                       "device", file->name);
  size = lseek (file->fd, 0, SEEK_END);
  if (size == -1)
    return qcow2_fail (error, errno, "%s: lseek: %s", file->name,
                       g_strerror (errno));
  *regular = S_ISREG (st.st_mode);
  file->size = size;
  return 0;
}

int
qcow2_file_open (struct qcow2_file *file, const char *path, int flags,
                 GError **error)
{
  bool regular = false;

  memset (file, 0, sizeof *file);
  file->name = g_utf8_make_valid (path, -1);
  /* Without blocking, so that a FIFO cannot stop us. */
  file->fd = open (path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0666);
  if (file->fd == -1) {
    qcow2_fail (error, errno, "%s: %s", file->name, g_strerror (errno));
    qcow2_file_close (file);
    return -1;
  }
  if (examine (file, &regular, error) == -1) {
    qcow2_file_close (file);
    return -1;
  }
  file->io.pread = file_pread;
  file->io.get_size = file_get_size;
  if ((flags & O_ACCMODE) == O_RDWR) {
    file->io.pwrite = file_pwrite;
    file->io.flush = file_flush;
    file->io.grow = regular ? file_grow : NULL;
  }
  return 0;
}

void
qcow2_file_close (struct qcow2_file *file)
{
  if (file->fd != -1)
    close (file->fd);
  file->fd = -1;
  g_clear_pointer (&file->name, g_free);
}
