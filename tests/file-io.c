/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qcow2/error.h"
#include "file-io.h"

static int
file_pread (const struct qcow2_io *io, void *buf, size_t count,
            uint64_t offset, GError **error)
{
  const struct file *file = (const struct file *) io;
  char *p = buf;

  while (count > 0) {
    const ssize_t n = pread (file->fd, p, count, offset);

    if (n <= 0)
      return qcow2_fail (error, EIO, "pread: %s",
                         n == 0 ? "end of file" : strerror (errno));
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
  const struct file *file = (const struct file *) io;
  const char *p = buf;

  while (count > 0) {
    const ssize_t n = pwrite (file->fd, p, count, offset);

    if (n == -1)
      return qcow2_fail (error, errno, "pwrite: %s", strerror (errno));
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
file_flush (const struct qcow2_io *io, GError **error)
{
  return 0;
}

static int
file_grow (const struct qcow2_io *io, uint64_t size, GError **error)
{
  struct file *file = (struct file *) io;

  if (ftruncate (file->fd, size) == -1)
    return qcow2_fail (error, errno, "ftruncate: %s", strerror (errno));
  file->size = size;
  return 0;
}

static uint64_t
file_get_size (const struct qcow2_io *io)
{
  return ((const struct file *) io)->size;
}

int
file_open (struct file *file, const char *path, int flags)
{
  struct stat st;

  memset (file, 0, sizeof *file);
  file->fd = open (path, flags | O_CLOEXEC, 0666);
  if (file->fd == -1 || fstat (file->fd, &st) == -1)
    return -1;
  file->size = st.st_size;
  file->io.pread = file_pread;
  file->io.get_size = file_get_size;
  if ((flags & O_ACCMODE) != O_RDONLY) {
    file->io.pwrite = file_pwrite;
    file->io.flush = file_flush;
    file->io.grow = file_grow;
  }
  return 0;
}

void
file_close (struct file *file)
{
  close (file->fd);
}
