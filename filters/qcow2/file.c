/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Local files.
 *
 * Names of other files that stand in an image come from whoever made the
 * image.  They are opened beneath a directory that the user named, with
 * openat2(2), whose RESOLVE_BENEATH does the whole job in the kernel.
 * Where that call does not exist, the path is walked one component at a
 * time and no symbolic link is followed at all.
 *
 * Files are opened without blocking, so that a FIFO cannot stop us, and
 * only regular files and block devices are read.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef HAVE_LINUX_OPENAT2_H
#include <linux/openat2.h>
#endif

#include "qcow2/error.h"

#include "source.h"

#define OPEN_FLAGS (O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)

struct file {
  struct source source;
  int fd;
  uint64_t size;
};

static struct file *
file_of_io (const struct qcow2_io *io)
{
  return (struct file *) source_of_io (io);
}

static int
file_pread (const struct qcow2_io *io, void *buf, size_t count,
            uint64_t offset, GError **error)
{
  const struct file *file = file_of_io (io);
  char *out = buf;

  while (count > 0) {
    const ssize_t n = pread (file->fd, out, count, offset);

    if (n == -1 && errno == EINTR)
      continue;
    if (n <= 0)
      return qcow2_fail (error, n ? errno : EIO, "%s: reading at offset %"
                         PRIu64 ": %s", file->source.name, offset,
                         n ? g_strerror (errno) : "the file became shorter");
    out += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static uint64_t
file_get_size (const struct qcow2_io *io)
{
  return file_of_io (io)->size;
}

static int
file_extents (struct source *source, uint64_t offset, uint64_t count,
              source_add_extent add, void *opaque, GError **error)
{
  const struct file *file = (struct file *) source;
  const uint64_t end = offset + count;
  int r = 0;

  while (offset < end && r == 0) {
    uint32_t type = 0;
    off_t next = lseek (file->fd, offset, SEEK_DATA);

    if (next == -1 && errno == ENXIO) { /* a hole up to the end */
      next = end;
      type = NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO;
    }
    else if ((uint64_t) next > offset && next != -1)
      type = NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO;
    else
      next = lseek (file->fd, offset, SEEK_HOLE);
    if (next == -1 || (uint64_t) next > end || (uint64_t) next <= offset)
      next = end;
    r = add (opaque, offset, next - offset, type, error);
    offset = next;
  }
  return r;
}

static int
file_prefetch (struct source *source, uint64_t offset, uint64_t count,
               GError **error)
{
  /* Only a hint: failure does not matter. */
  posix_fadvise (((struct file *) source)->fd, offset, count,
                 POSIX_FADV_WILLNEED);
  return 0;
}

static int64_t
file_allocated (struct source *source)
{
  struct stat st;

  if (fstat (((struct file *) source)->fd, &st) == -1 ||
      !S_ISREG (st.st_mode))
    return -1;
  return (int64_t) st.st_blocks * 512;
}

static void
file_close (struct source *source)
{
  close (((struct file *) source)->fd);
  g_free (source->name);
  g_free (source);
}

struct source *
file_open_fd (int fd, const char *name, GError **error)
{
  struct file *file;
  struct stat st;
  off_t size;

  if (fstat (fd, &st) == -1 ||
      !(S_ISREG (st.st_mode) || S_ISBLK (st.st_mode))) {
    qcow2_fail (error, EINVAL, "%s: not a regular file or block device",
                name);
    close (fd);
    return NULL;
  }
  size = lseek (fd, 0, SEEK_END);
  if (size == -1) {
    qcow2_fail (error, errno, "%s: lseek: %s", name, g_strerror (errno));
    close (fd);
    return NULL;
  }

  file = g_new0 (struct file, 1);
  file->source.io.pread = file_pread;
  file->source.io.get_size = file_get_size;
  file->source.name = g_strdup (name);
  file->source.extents = file_extents;
  file->source.prefetch = file_prefetch;
  file->source.allocated = file_allocated;
  file->source.close = file_close;
  file->fd = fd;
  file->size = size;
  return &file->source;
}

struct source *
file_open (const char *path, GError **error)
{
  const int fd = open (path, OPEN_FLAGS);

  if (fd == -1) {
    qcow2_fail (error, errno, "%s: %s", path, g_strerror (errno));
    return NULL;
  }
  return file_open_fd (fd, path, error);
}

/* One component at a time, without following any link. */
static int
walk_beneath (int dirfd, const char *path)
{
  g_auto (GStrv) parts = g_strsplit (path, "/", -1);
  int fd = dup (dirfd);

  for (size_t i = 0; parts[i] && fd != -1; ++i) {
    const int flags = parts[i + 1] ? O_PATH | O_DIRECTORY | O_CLOEXEC :
      OPEN_FLAGS;
    int next;

    if (!*parts[i] || strcmp (parts[i], ".") == 0)
      continue;
    if (strcmp (parts[i], "..") == 0) {
      next = -1;
      errno = EXDEV;
    }
    else
      next = openat (fd, parts[i], flags | O_NOFOLLOW);
    close (fd);
    fd = next;
  }
  return fd;
}

static int
open_beneath (int dirfd, const char *path)
{
#if defined (HAVE_LINUX_OPENAT2_H) && defined (SYS_openat2)
  struct open_how how = {
    .flags = OPEN_FLAGS,
    .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS,
  };
  const int fd = syscall (SYS_openat2, dirfd, path, &how, sizeof how);

  /* EPERM is what a sandbox that does not know the call answers. */
  if (fd != -1 || (errno != ENOSYS && errno != EPERM))
    return fd;
#endif
  return walk_beneath (dirfd, path);
}

struct source *
file_open_beneath (const char *dir, const char *path, GError **error)
{
  const bool absolute = g_path_is_absolute (path);
  g_autofree char *full =
    absolute ? g_strdup (path) : g_build_filename (dir, path, NULL);
  g_autofree char *shown = g_strescape (full, NULL);
  int dirfd, fd, err;

  if (absolute) {
    qcow2_fail (error, EPERM, "\"%s\" is an absolute name, but only names "
                "relative to the directory %s are allowed", shown, dir);
    return NULL;
  }
  dirfd = open (dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (dirfd == -1) {
    qcow2_fail (error, errno, "%s: %s", dir, g_strerror (errno));
    return NULL;
  }
  fd = open_beneath (dirfd, path);
  err = errno;
  close (dirfd);
  if (fd == -1) {
    if (err == EXDEV || err == ELOOP)
      qcow2_fail (error, EPERM, "%s: the name leads out of the directory %s",
                  shown, dir);
    else
      qcow2_fail (error, err, "%s: %s", shown, g_strerror (err));
    return NULL;
  }
  return file_open_fd (fd, shown, error);
}
