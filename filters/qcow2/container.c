/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The container as a place where the bitmap-persist filter keeps bitmaps.
 *
 * Metadata is written through a context of its own of the layer below,
 * which was opened when the server started.  Its size never changes.  If
 * the container is a local file it can grow all the same: what lies beyond
 * the size of the context is read and written through a descriptor of
 * ours, and connections that are made later see it below them.
 *
 * The descriptor also has the locks by which QEMU and we know of each
 * other.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>

#include "dirty/persist.h"
#include "qcow2/error.h"
#include "qcow2/file.h"
#include "qcow2/lock.h"

#include "qcow2-filter.h"

/* Enough to tell whether a file is the container. */
#define HEAD 512

struct written {
  struct dirty_container container;
  struct qcow2_io io;
  struct layer layer;           /* the context */
  bool can_flush;
  struct qcow2_file file;       /* fd -1: it is not a local file */
  bool wanted, writable;        /* by the bitmap-persist filter */
};

static struct written written;

/* I/O. */

static int
fail (int err, const char *what, size_t count, uint64_t offset,
      GError **error)
{
  err = err ? err : EIO;
  return qcow2_fail (error, err, "%s %zu bytes at offset %" PRIu64 ": %s",
                     what, count, offset, g_strerror (err));
}

/* How much of a range the context has. */
static size_t
count_below (size_t count, uint64_t offset)
{
  const uint64_t size = written.layer.limits.size;

  return offset >= size ? 0 : MIN (count, size - offset);
}

static int
container_pread (const struct qcow2_io *io, void *buf, size_t count,
                 uint64_t offset, GError **error)
{
  const struct qcow2_io *below = &written.layer.source.io;
  const struct qcow2_io *file = &written.file.io;
  const size_t n = count_below (count, offset);

  if (n && below->pread (below, buf, n, offset, error) == -1)
    return -1;
  if (n == count)
    return 0;
  return file->pread (file, (char *) buf + n, count - n, offset + n, error);
}

/* Keeping to the block size of the layer below. */
static int
write_aligned (const uint8_t *buf, size_t count, uint64_t offset,
               GError **error)
{
  nbdkit_next *next = written.layer.next;

  while (count > 0) {
    const uint32_t n = MIN (count, written.layer.limits.maximum);
    int err = 0;

    if (next->pwrite (next, buf, n, offset, 0, &err) == -1)
      return fail (err, "writing", n, offset, error);
    buf += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
write_below (const void *buf, size_t count, uint64_t offset, GError **error)
{
  const struct qcow2_io *below = &written.layer.source.io;
  uint64_t start = offset, end = offset + count;
  g_autofree uint8_t *bounce = NULL;

  limits_align (&written.layer.limits, &start, &end);
  if (start == offset && end == offset + count)
    return write_aligned (buf, count, offset, error);
  bounce = g_try_malloc (end - start);
  if (!bounce)
    return fail (ENOMEM, "writing", count, offset, error);
  if (below->pread (below, bounce, end - start, start, error) == -1)
    return -1;
  memcpy (bounce + (offset - start), buf, count);
  return write_aligned (bounce, end - start, start, error);
}

static int
container_pwrite (const struct qcow2_io *io, const void *buf, size_t count,
                  uint64_t offset, GError **error)
{
  const struct qcow2_io *file = &written.file.io;
  const size_t n = count_below (count, offset);

  if (n && write_below (buf, n, offset, error) == -1)
    return -1;
  if (n == count)
    return 0;
  if (!file->pwrite)
    return fail (EROFS, "writing", count, offset, error);
  return file->pwrite (file, (const char *) buf + n, count - n, offset + n,
                       error);
}

static int
container_flush (const struct qcow2_io *io, GError **error)
{
  nbdkit_next *next = written.layer.next;
  int err = 0;

  if (written.can_flush && next->flush (next, 0, &err) == -1) {
    err = err ? err : EIO;
    return qcow2_fail (error, err, "flushing: %s", g_strerror (err));
  }
  return written.file.fd == -1 || !written.file.io.flush ? 0 :
    written.file.io.flush (&written.file.io, error);
}

static int
container_grow (const struct qcow2_io *io, uint64_t size, GError **error)
{
  const struct qcow2_io *file = &written.file.io;

  if (written.file.fd == -1 || !file->grow)
    return qcow2_fail (error, ENOSPC, "the container has %" PRIu64 " bytes, "
                       "and can become larger only if it is a local file "
                       "below the file plugin", io->get_size (io));
  return file->grow (file, size, error);
}

static uint64_t
container_get_size (const struct qcow2_io *io)
{
  const uint64_t size = written.layer.limits.size;

  return written.file.fd == -1 ? size : MAX (size, written.file.size);
}

/* The local file. */

static bool
has_same_head (const struct qcow2_io *a, const struct qcow2_io *b)
{
  uint8_t heads[2][HEAD] = { 0 };

  return a->pread (a, heads[0], HEAD, 0, NULL) == 0 &&
    b->pread (b, heads[1], HEAD, 0, NULL) == 0 &&
    memcmp (heads[0], heads[1], HEAD) == 0;
}

/* Other plugins and filters use the parameter in other ways: is the file
 * what lies below?  Another program may have made it larger since.
 */
static bool
is_below (const struct qcow2_file *file)
{
  return file->size >= HEAD && file->size >= written.layer.limits.size &&
    has_same_head (&file->io, &written.layer.source.io);
}

static int
lock_local_file (enum qcow2_lock lock, GError **error)
{
  if (qcow2_lock_file (written.file.fd, lock, error) == 0)
    return 0;
  g_prefix_error (error, "%s: ", written.file.name);
  return -1;
}

static int
open_local_file (bool writable, GError **error)
{
  const char *path = local_file_whole (&config.file);

  if (!path ||
      (qcow2_file_open (&written.file, path, writable ? O_RDWR : O_RDONLY,
                        NULL) == -1 &&
       qcow2_file_open (&written.file, path, O_RDONLY, NULL) == -1))
    return 0;
  if (!is_below (&written.file)) {
    qcow2_file_close (&written.file);
    return 0;
  }
  return lock_local_file (writable ? QCOW2_LOCK_WRITER : QCOW2_LOCK_READER,
                          error);
}

/* For the bitmap-persist filter. */

static const struct qcow2_io *
container_open (struct dirty_container *container, uint64_t size,
                bool writable, GError **error)
{
  nbdkit_next *next = written.layer.next;

  if (!next) {
    qcow2_fail (error, EIO, "%s: the layer below the qcow2 filter could not "
                "be opened to store bitmaps there", container->name);
    return NULL;
  }
  writable &= next->can_write (next) == 1;
  if (open_local_file (writable, error) == -1) {
    qcow2_file_close (&written.file);
    return NULL;
  }
  written.io.pread = container_pread;
  written.io.get_size = container_get_size;
  written.io.pwrite = writable ? container_pwrite : NULL;
  written.io.flush = container_flush;
  written.io.grow = container_grow;
  return &written.io;
}

static void
container_close (struct dirty_container *container)
{
  qcow2_file_close (&written.file);
}

static int
container_release (struct dirty_container *container, GError **error)
{
  return disk_give_away ("", error);
}

static void
container_take_back (struct dirty_container *container)
{
  disk_take_back ("");
}

/* Are the bitmaps all right, if the file is an image at all? */
static int
check_bitmaps (const struct qcow2_io *io, GError **error)
{
  const size_t n = MIN (io->get_size (io), HEAD);
  uint8_t head[HEAD] = { 0 };
  struct qcow2_image *image;

  if (n == 0 || io->pread (io, head, n, 0, NULL) == -1 ||
      !qcow2_header_probe (head, n))
    return 0;
  image = dirty_persist_probe (io, error);
  if (!image) {
    g_prefix_error (error, "%s: ", written.file.name);
    return -1;
  }
  qcow2_image_close (image);
  return 0;
}

/* And is another program using it? */
static int
check_local_file (bool writable, GError **error)
{
  const char *path = local_file_whole (&config.file);
  int r;

  if (!path || qcow2_file_open (&written.file, path, O_RDONLY, NULL) == -1)
    return 0;
  r = check_bitmaps (&written.file.io, error);
  if (r == 0)
    r = lock_local_file (writable ? QCOW2_LOCK_WRITER : QCOW2_LOCK_READER,
                         error);
  qcow2_file_close (&written.file);
  return r;
}

static int
container_check (struct dirty_container *container, bool writable,
                 GError **error)
{
  written.wanted = true;
  written.writable = writable;
  return check_local_file (writable, error);
}

/* For the qcow2 filter. */

void
container_offer (void)
{
  written.file.fd = -1;
  written.container.name =
    config.file.path ? config.file.path : "the image";
  written.container.is_image = true;
  written.container.requests_only =
    config.thread_model < NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS;
  written.container.open = container_open;
  written.container.close = container_close;
  written.container.check = container_check;
  written.container.release = container_release;
  written.container.take_back = container_take_back;
  dirty_node_of_export ("")->container = &written.container;
}

bool
container_is_written (void)
{
  return written.wanted && written.writable;
}

void
container_start (nbdkit_backend *backend)
{
  nbdkit_next *next;
  int can_flush;

  if (!written.wanted)
    return;
  next = nbdkit_next_context_open (backend, !written.writable, "", 1);
  if (!next)
    return;
  if (next->prepare (next) == -1 || next->can_write (next) == -1 ||
      (can_flush = next->can_flush (next)) == -1 ||
      layer_init (&written.layer, next, "") == -1) {
    nbdkit_next_context_close (next);
    memset (&written.layer, 0, sizeof written.layer);
    return;
  }
  written.can_flush = can_flush;
}

void
container_stop (void)
{
  nbdkit_next *next = written.layer.next;

  if (next) {
    next->finalize (next);
    nbdkit_next_context_close (next);
  }
  memset (&written.layer, 0, sizeof written.layer);
}
