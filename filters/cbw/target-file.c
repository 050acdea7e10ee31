/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Files and block devices as targets.
 *
 * A write is done by a helper thread, so that who waits for it can give
 * up; or by the caller, if it would not.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __linux__
#include <linux/fs.h>
#endif

#include "dirty/node.h"
#include "qcow2/lock.h"

#include "helpers.h"
#include "target.h"

/* Writes to one target at the same time. */
#define THREADS 8

struct file {
  struct target target;
  int fd;
  bool temporary;               /* and unlinked */
  bool created;                 /* by us */
  struct helpers *helpers;
};

/* What the layers below serve. */
static GPtrArray *forbidden_files, *forbidden_directories;

struct write_job {
  struct file *file;
  const void *buf;
  uint32_t count;
  uint64_t offset;
  target_done done;
  gpointer opaque;
};

static int
write_all (const struct file *file, const uint8_t *buf, uint32_t count,
           uint64_t offset)
{
  while (count > 0) {
    const ssize_t n = pwrite (file->fd, buf, count, offset);

    if (n == -1 && errno == EINTR)
      continue;
    if (n <= 0)
      return n == -1 ? errno : ENOSPC;
    buf += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static void
write_now (gpointer opaque)
{
  struct write_job *job = opaque;
  const int error = write_all (job->file, job->buf, job->count, job->offset);

  job->done (job->opaque, error);
  target_unref (&job->file->target);
  g_free (job);
}

static void
file_write (struct target *target, const void *buf, uint32_t count,
            uint64_t offset, bool direct, target_done done, gpointer opaque)
{
  struct file *file = (struct file *) target;
  struct write_job *job;

  if (direct) {
    done (opaque, write_all (file, buf, count, offset));
    return;
  }
  job = g_new (struct write_job, 1);
  job->file = (struct file *) target_ref (target);
  job->buf = buf;
  job->count = count;
  job->offset = offset;
  job->done = done;
  job->opaque = opaque;
  helpers_run (file->helpers, write_now, job);
}

static int
file_read (struct target *target, void *buf, uint32_t count, uint64_t offset)
{
  const struct file *file = (struct file *) target;
  uint8_t *p = buf;

  while (count > 0) {
    const ssize_t n = pread (file->fd, p, count, offset);

    if (n == -1 && errno == EINTR)
      continue;
    if (n <= 0)
      return n == -1 ? errno : EIO;
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

/* That it fails does no harm: the space stays taken. */
static void
file_discard (struct target *target, uint64_t offset, uint64_t count)
{
#if defined FALLOC_FL_PUNCH_HOLE && defined FALLOC_FL_KEEP_SIZE
  const struct file *file = (struct file *) target;

  while (fallocate (file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    offset, count) == -1 && errno == EINTR)
    ;
#endif
}

static void
file_purge (struct target *target)
{
  struct file *file = (struct file *) target;

  /* A helper that hangs may keep the file open. */
  if ((file->temporary || file->created) && ftruncate (file->fd, 0) == -1)
    file_discard (target, 0, target->used);
  if (file->created)
    unlink (target->name);
  else if (!file->temporary)
    file_discard (target, 0, target->used);
}

static void
file_cancel (struct target *target)
{
  /* Nothing stops a system call that hangs; but this can be done. */
  struct file *file = (struct file *) target;

  if (file->created)
    unlink (target->name);
  file->created = false;
}

static void
file_free (struct target *target)
{
  struct file *file = (struct file *) target;

  if (file->helpers)
    helpers_free (file->helpers);
  if (file->fd != -1)
    close (file->fd);
  g_free (target->name);
  g_free (file);
}

static const struct target_ops ops = {
  .write = file_write,
  .read = file_read,
  .discard = file_discard,
  .purge = file_purge,
  .cancel = file_cancel,
  .free = file_free,
};

static struct file *
file_new (const char *name)
{
  struct file *file = g_new0 (struct file, 1);

  file->target.ops = &ops;
  refs_init (&file->target.refs, 1);
  file->target.name = g_strdup (name);
  file->target.minimum = 1;
  file->fd = -1;
  file->helpers = helpers_new (THREADS);
  return file;
}

static int
fail (GError **error, int code, const char *what, const char *name)
{
  return dirty_fail (error, code, "target %s: %s: %s", name, what,
                     g_strerror (code));
}

static void
forbid (GPtrArray **list, const char *path)
{
  if (!*list)
    *list = g_ptr_array_new_with_free_func (g_free);
  g_ptr_array_add (*list, target_complete_name (path));
}

void
target_forbid_file (const char *path)
{
  forbid (&forbidden_files, path);
}

void
target_forbid_directory (const char *path)
{
  forbid (&forbidden_directories, path);
}

void
target_allow_all (void)
{
  g_clear_pointer (&forbidden_files, g_ptr_array_unref);
  g_clear_pointer (&forbidden_directories, g_ptr_array_unref);
}

static bool
is_listed (const GPtrArray *list, const struct stat *st)
{
  struct stat other;

  for (guint i = 0; list && i < list->len; ++i)
    if (stat (g_ptr_array_index (list, i), &other) == 0 &&
        other.st_dev == st->st_dev && other.st_ino == st->st_ino)
      return true;
  return false;
}

static bool
is_in_listed_directory (const char *name)
{
  g_autofree char *real = realpath (name, NULL);
  g_autofree char *directory = g_path_get_dirname (real ? real : name);
  struct stat st;

  return stat (directory, &st) == 0 && is_listed (forbidden_directories, &st);
}

static int
check_allowed (const char *name, const struct stat *st, GError **error)
{
  if (!is_listed (forbidden_files, st) && !is_in_listed_directory (name))
    return 0;
  return dirty_fail (error, EINVAL, "target %s is, or could be, a part of "
                     "what is served, and would be destroyed", name);
}

/* Of a block device it is what the device likes best. */
static uint32_t
preferred_size (const struct file *file, const struct stat *st)
{
  unsigned size = st->st_blksize;

#if defined BLKIOOPT && defined BLKPBSZGET
  if (S_ISBLK (st->st_mode) &&
      (ioctl (file->fd, BLKIOOPT, &size) == -1 || size == 0) &&
      ioctl (file->fd, BLKPBSZGET, &size) == -1)
    size = st->st_blksize;
#endif
  return size;
}

/* Is it what it can be, and how large? */
static int
inspect (struct file *file, GError **error)
{
  struct target *target = &file->target;
  struct stat st;
  off_t end;

  if (fstat (file->fd, &st) == -1)
    return fail (error, errno, "fstat", target->name);
  if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode))
    return dirty_fail (error, EINVAL, "target %s is neither a regular file "
                       "nor a block device", target->name);
  if (!file->temporary && check_allowed (target->name, &st, error) == -1)
    return -1;
  end = lseek (file->fd, 0, SEEK_END);
  if (end == -1)
    return fail (error, errno, "lseek", target->name);
  target->size = end;
  target->preferred = preferred_size (file, &st);
  return 0;
}

/* Directory entries come and go, the file itself stays. */
static int
open_unlinked (const char *directory)
{
  g_autofree char *name = g_strdup_printf ("%s/cbw.XXXXXX", directory);
  int fd;

#ifdef O_TMPFILE
  fd = open (directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd != -1)
    return fd;
#endif
  fd = mkostemp (name, O_CLOEXEC);
  if (fd != -1)
    unlink (name);
  return fd;
}

static char *
temporary_directory (void)
{
  const char *directory = getenv ("TMPDIR");

  if (directory && *directory)
    return target_complete_name (directory);
  return g_strdup (access ("/var/tmp", W_OK | X_OK) == 0 ? "/var/tmp" :
                   "/tmp");
}

struct target *
target_open_temporary (uint64_t size, GError **error)
{
  g_autofree char *directory = temporary_directory ();
  g_autofree char *name = g_strdup_printf ("(a temporary file in %s)",
                                           directory);
  struct file *file = file_new (name);

  file->temporary = true;
  file->fd = open_unlinked (directory);
  if (file->fd == -1) {
    fail (error, errno, "creating it", name);
    goto error;
  }
  if (ftruncate (file->fd, size) == -1) {
    fail (error, errno, "giving it the disk's size", name);
    goto error;
  }
  if (inspect (file, error) == -1)
    goto error;
  return &file->target;

 error:
  target_unref (&file->target);
  return NULL;
}

static int
open_named (struct file *file, GError **error)
{
  const char *name = file->target.name;
  const int flags = O_RDWR | O_CLOEXEC | O_NOCTTY;

  file->fd = open (name, flags);
  if (file->fd == -1 && errno == ENOENT) {
    file->fd = open (name, flags | O_CREAT | O_EXCL, 0600);
    file->created = file->fd != -1;
  }
  return file->fd == -1 ? fail (error, errno, "opening it", name) : 0;
}

/* Another snapshot, or QEMU, may be using it. */
static int
lock (const struct file *file, GError **error)
{
  g_autoptr (GError) reason = NULL;

  if (qcow2_lock_file (file->fd, QCOW2_LOCK_RAW_WRITER, &reason) == 0 ||
      reason->code != EBUSY)
    return 0;
  return dirty_fail (error, EBUSY, "target %s is in use by another snapshot "
                     "or another program", file->target.name);
}

struct target *
target_open_file (const char *path, uint64_t size, GError **error)
{
  struct file *file = file_new (path);

  if (open_named (file, error) == -1 || lock (file, error) == -1)
    goto error;
  if (file->created && ftruncate (file->fd, size) == -1) {
    fail (error, errno, "giving it the disk's size", path);
    goto error;
  }
  if (inspect (file, error) == -1 ||
      target_check_size (&file->target, size, error) == -1)
    goto error;
  return &file->target;

 error:
  if (file->created)
    unlink (path);
  target_unref (&file->target);
  return NULL;
}

int
target_check_file (const char *path, GError **error)
{
  g_autofree char *directory = g_path_get_dirname (path);
  struct stat st;

  if (stat (path, &st) == -1) {
    if (errno != ENOENT)
      return fail (error, errno, "opening it", path);
    if (access (directory, W_OK | X_OK) == -1)
      return fail (error, errno, "it does not exist and cannot be created",
                   path);
    return 0;
  }
  if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode))
    return dirty_fail (error, EINVAL, "target %s is neither a regular file "
                       "nor a block device", path);
  if (access (path, R_OK | W_OK) == -1)
    return fail (error, errno, "it cannot be written", path);
  return check_allowed (path, &st, error);
}
