/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The check at start.
 *
 * A filter cannot read from the layer below before connections are
 * accepted, but an image that is broken should keep the server from
 * starting.  The file plugin's parameter goes past us, so we look at the
 * file ourselves.
 *
 * It need not be what the layer below serves: other plugins use that
 * parameter too, and filters (xz, offset, ...) may change what is in it.
 * A file that begins as a qcow2 image does is taken for one unless a
 * parameter tells that only a part of it is served.  One that does not
 * is an error only if nothing hints at another use.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qcow2/error.h"

#include "qcow2-filter.h"

struct file {
  struct qcow2_io io;
  int fd;
  uint64_t size;
};

static const struct file *
file_of_io (const struct qcow2_io *io)
{
  return (const struct file *) ((const char *) io -
                                G_STRUCT_OFFSET (struct file, io));
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
      return qcow2_fail (error, n ? errno : EIO, "reading the file: %s",
                         n ? g_strerror (errno) : "it became shorter");
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

/* Contents that a filter between the file and us turns into an image. */
static bool
is_wrapped (const uint8_t *head)
{
  static const struct { size_t offset, length; const char *bytes; } magic[] = {
    { 0, 6, "\xfd" "7zXZ\0" },
    { 0, 2, "\x1f\x8b" },       /* gzip */
    { 0, 3, "BZh" },
    { 0, 4, "\x28\xb5\x2f\xfd" }, /* zstd */
    { 0, 4, "LZIP" },
    { 0, 6, "LUKS\xba\xbe" },
    { 257, 5, "ustar" },
  };

  for (size_t i = 0; i < G_N_ELEMENTS (magic); ++i)
    if (memcmp (head + magic[i].offset, magic[i].bytes, magic[i].length) == 0)
      return true;
  return false;
}

static bool
should_check (const struct file *file)
{
  uint8_t head[DISK_HEAD] = { 0 };
  const size_t n = MIN (file->size, sizeof head);

  if (n && file_pread (&file->io, head, n, 0, NULL) == -1)
    return false;               /* the plugin will meet that too */
  return qcow2_header_probe (head, n) ||
    (!config.other_keys && !is_wrapped (head));
}

static int
check_snapshot (const struct qcow2_image *image, GError **error)
{
  const struct qcow2_snapshot *sn;
  struct qcow2_view view;

  if (!config.snapshot)
    return 0;
  sn = qcow2_snapshots_find (image->snapshots, config.snapshot);
  if (!sn)
    return qcow2_fail (error, ENOENT, "qcow2-snapshot: the image has no "
                       "snapshot with the name or ID \"%s\"",
                       config.snapshot);
  return qcow2_image_snapshot_view (image, sn, &view, error);
}

static int
check_image (const struct file *file, GError **error)
{
  struct qcow2_image *image = qcow2_image_open (&file->io, error);
  int r = -1;

  if (image && disk_check_permitted (image->header, error) == 0)
    r = check_snapshot (image, error);
  qcow2_image_close (image);
  return r;
}

int
start_check (void)
{
  struct file file = {
    .io = { .pread = file_pread, .get_size = file_get_size },
  };
  g_autoptr (GError) error = NULL;
  struct stat st;
  int r = 0;

  if (!config.file || config.files != 1 || config.moved)
    return 0;
  file.fd = open (config.file, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file.fd == -1)
    return 0;                   /* the plugin says what is wrong */
  if (fstat (file.fd, &st) == 0 && S_ISREG (st.st_mode)) {
    file.size = st.st_size;
    if (should_check (&file))
      r = check_image (&file, &error);
  }
  close (file.fd);
  if (r == -1)
    nbdkit_error ("%s: %s", config.file, error->message);
  return r;
}
