/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A sidecar is a qcow2 image beside a disk, which has no more than the
 * disk's bitmaps.  If the disk is a local file the image refers to it as
 * its raw data file, so that QEMU can open the image as the disk.
 *
 * It is made under another name, which it loses when it is complete, so
 * that nobody ever sees a part of one.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qcow2/create.h"
#include "qcow2/error.h"
#include "qcow2/file.h"
#include "qcow2/header-update.h"
#include "qcow2/image.h"
#include "qcow2/lock.h"

#include "bitmap-persist.h"

struct sidecar {
  struct dirty_container container;
  char *path;
  char *disk;                   /* a file which may be the disk, or NULL */
  bool changes;                 /* other filters may change its size */
  bool existed;                 /* once: it is not made again */
  struct qcow2_file file;
  struct qcow2_file disk_file;  /* it is only open to be locked */
};

static struct sidecar *
sidecar_of (struct dirty_container *container)
{
  return (struct sidecar *) container;
}

static uint64_t
round_up (uint64_t size)
{
  return (size + 511) & ~UINT64_C (511);
}

static int
lock_file (const struct qcow2_file *file, enum qcow2_lock lock,
           GError **error)
{
  if (qcow2_lock_file (file->fd, lock, error) == 0)
    return 0;
  g_prefix_error (error, "%s: ", file->name);
  return -1;
}

/* Making one. */

static int
sync_directory (const char *path, GError **error)
{
  g_autofree char *directory = g_path_get_dirname (path);
  const int fd = open (directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  int r = fd == -1 ? -1 : fsync (fd);

  if (r == -1)
    r = qcow2_fail (error, errno, "%s: %s", directory, g_strerror (errno));
  if (fd != -1)
    close (fd);
  return r;
}

/* The name of the disk's file if the image can refer to it. */
static const char *
data_file (const struct sidecar *s, uint64_t size)
{
  return s->disk_file.fd != -1 && s->disk_file.size == size ? s->disk : NULL;
}

static int
fill (struct sidecar *s, const char *temporary, uint64_t size,
      GError **error)
{
  if (qcow2_create (&s->file.io, round_up (size), data_file (s, size),
                    error) == -1) {
    g_prefix_error (error, "%s: ", s->file.name);
    return -1;
  }
  if (lock_file (&s->file, QCOW2_LOCK_WRITER, error) == -1)
    return -1;
  /* Not all file systems have links. */
  if (link (temporary, s->path) == -1 &&
      (errno == EEXIST || rename (temporary, s->path) == -1))
    return qcow2_fail (error, errno, "%s: %s", s->path, g_strerror (errno));
  return sync_directory (s->path, error);
}

static int
create (struct sidecar *s, uint64_t size, GError **error)
{
  g_autofree char *temporary = g_strdup_printf ("%s.%08x", s->path,
                                                g_random_int ());
  int r;

  if (qcow2_file_open (&s->file, temporary, O_RDWR | O_CREAT | O_EXCL,
                       error) == -1)
    return -1;
  r = fill (s, temporary, size, error);
  unlink (temporary);
  if (r == 0)
    nbdkit_debug ("bitmap-persist: %s: made for a disk of %" PRIu64 " bytes",
                  s->path, size);
  return r;
}

/* Using it. */

/* Who writes to the disk does not want others to do it. */
static int
lock_disk (struct sidecar *s, bool writable, GError **error)
{
  if (!s->disk ||
      qcow2_file_open (&s->disk_file, s->disk, O_RDONLY, NULL) == -1)
    return 0;                   /* it is something else */
  return !writable ? 0 :
    lock_file (&s->disk_file, QCOW2_LOCK_RAW_WRITER, error);
}

static int
open_file (struct sidecar *s, uint64_t size, bool writable, GError **error)
{
  if (qcow2_file_open (&s->file, s->path, writable ? O_RDWR : O_RDONLY,
                       error) == 0) {
    s->existed = true;
    return lock_file (&s->file, writable ? QCOW2_LOCK_WRITER :
                      QCOW2_LOCK_READER, error);
  }
  if (!writable || s->existed ||
      !g_error_matches (*error, QCOW2_ERROR, ENOENT))
    return -1;
  g_clear_error (error);
  if (create (s, size, error) == -1)
    return -1;
  s->existed = true;
  return 0;
}

static void
sidecar_close (struct dirty_container *container)
{
  struct sidecar *s = sidecar_of (container);

  qcow2_file_close (&s->file);
  qcow2_file_close (&s->disk_file);
}

static const struct qcow2_io *
sidecar_open (struct dirty_container *container, uint64_t size, bool writable,
              GError **error)
{
  struct sidecar *s = sidecar_of (container);
  GError *e = NULL;

  if (lock_disk (s, writable, &e) == 0 &&
      open_file (s, size, writable, &e) == 0)
    return &s->file.io;
  sidecar_close (container);
  g_propagate_error (error, e);
  return NULL;
}

/* Before the server starts. */

static int
check_new (const struct sidecar *s, GError **error)
{
  g_autofree char *directory = g_path_get_dirname (s->path);

  if (access (directory, W_OK | X_OK) == -1)
    return qcow2_fail (error, errno, "%s: no file can be made there: %s",
                       directory, g_strerror (errno));
  return 0;
}

static int
check_not_disk (const struct sidecar *s, GError **error)
{
  struct stat ours, disk;

  if (s->disk && stat (s->path, &ours) == 0 && stat (s->disk, &disk) == 0 &&
      ours.st_dev == disk.st_dev && ours.st_ino == disk.st_ino)
    return qcow2_fail (error, EINVAL, "%s: this is the disk itself, whose "
                       "bitmaps need a file of their own", s->path);
  return 0;
}

/* Is it the sidecar of a disk like ours?  If it does not say which, and the
 * disk need not be like the file, that is seen when the disk is known.
 */
static int
check_disk (const struct sidecar *s, const struct qcow2_image *image,
            GError **error)
{
  struct qcow2_file disk = { .fd = -1 };
  int r = 0;

  if (s->changes && g_strcmp0 (image->header->data_file, s->disk) != 0)
    return 0;
  if (s->disk && qcow2_file_open (&disk, s->disk, O_RDONLY, NULL) == 0 &&
      round_up (disk.size) != round_up (image->header->size))
    r = qcow2_fail (error, EINVAL, "%s: this is the sidecar of a disk of %"
                    PRIu64 " bytes, but %s has %" PRIu64, s->path,
                    image->header->size, s->disk, disk.size);
  qcow2_file_close (&disk);
  return r;
}

static int
check_image (const struct sidecar *s, const struct qcow2_file *file,
             bool writable, GError **error)
{
  struct qcow2_image *image = dirty_persist_probe (&file->io, error);
  int r;

  if (!image) {
    g_prefix_error (error, "%s: ", s->path);
    return -1;
  }
  r = check_disk (s, image, error);
  if (r == 0 && writable) {
    r = qcow2_header_check_writable (image->header, error);
    g_prefix_error (error, "%s: ", s->path);
  }
  qcow2_image_close (image);
  return r;
}

static int
check_existing (const struct sidecar *s, bool writable, GError **error)
{
  struct qcow2_file file;
  int r;

  if (qcow2_file_open (&file, s->path, O_RDONLY, error) == -1)
    return -1;
  r = check_image (s, &file, writable, error);
  if (r == 0)
    r = lock_file (&file, writable ? QCOW2_LOCK_WRITER : QCOW2_LOCK_READER,
                   error);
  if (r == 0 && writable && access (s->path, W_OK) == -1)
    r = qcow2_fail (error, errno, "%s: %s", s->path, g_strerror (errno));
  qcow2_file_close (&file);
  return r;
}

static int
sidecar_check (struct dirty_container *container, bool writable,
               GError **error)
{
  const struct sidecar *s = sidecar_of (container);

  if (check_not_disk (s, error) == -1)
    return -1;
  if (access (s->path, F_OK) == 0)
    return check_existing (s, writable, error);
  return writable ? check_new (s, error) : 0;
}

struct dirty_container *
sidecar_new (const char *path, const char *disk, bool changes)
{
  struct sidecar *s = g_new0 (struct sidecar, 1);

  s->path = g_strdup (path);
  s->disk = g_strdup (disk);
  s->changes = changes;
  s->file.fd = s->disk_file.fd = -1;
  s->container.name = s->path;
  s->container.open = sidecar_open;
  s->container.close = sidecar_close;
  s->container.check = sidecar_check;
  return &s->container;
}

void
sidecar_free (struct dirty_container *container)
{
  struct sidecar *s = sidecar_of (container);

  g_free (s->path);
  g_free (s->disk);
  g_free (s);
}
