/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The one way in which the qcow2 module reaches its container.
 *
 * The caller implements struct qcow2_io over whatever holds the bytes:
 * an nbdkit layer, a file descriptor, a buffer in a test.  Functions of
 * the module take it as a parameter and do not keep it, so that every
 * thread does its I/O through its own connection.
 */

#ifndef QCOW2_IO_H
#define QCOW2_IO_H

#include <stddef.h>
#include <stdint.h>

#include <glib.h>

struct qcow2_io {
  /* Read exactly count bytes at offset (both in bytes, any alignment).
   * The module never asks for bytes beyond get_size.  Returns 0, or -1
   * with error set.  Called from many threads if the caller of the
   * module is.
   */
  int (*pread) (const struct qcow2_io *io, void *buf, size_t count,
                uint64_t offset, GError **error);

  /* The size of the container in bytes.  Does not fail. */
  uint64_t (*get_size) (const struct qcow2_io *io);

  /* The rest is NULL if the container cannot be written to. */

  /* Write exactly count bytes, inside the container. */
  int (*pwrite) (const struct qcow2_io *io, const void *buf, size_t count,
                 uint64_t offset, GError **error);

  /* What was written before is on stable storage when this returns; of
   * what was written since the last flush a crash may keep any part.
   */
  int (*flush) (const struct qcow2_io *io, GError **error);

  /* Make the container larger; what it gains reads as zeroes.  NULL if
   * its size cannot change.
   */
  int (*grow) (const struct qcow2_io *io, uint64_t size, GError **error);
};

/* Read count bytes of metadata; all of them must lie in the container.
 * what names the structure in the error message.
 */
extern int qcow2_io_read_exact (const struct qcow2_io *io, const char *what,
                                void *buf, size_t count, uint64_t offset,
                                GError **error);

/* Read count bytes of a cluster's contents.  A container may end inside
 * its last cluster: up to slack - 1 bytes that lie beyond the end read
 * as zeroes.  More than that is an error (a truncated image).
 */
extern int qcow2_io_read_padded (const struct qcow2_io *io, uint32_t slack,
                                 void *buf, size_t count, uint64_t offset,
                                 GError **error);

/* Write metadata; the container grows if the range ends beyond its end. */
extern int qcow2_io_write (const struct qcow2_io *io, const void *buf,
                           size_t count, uint64_t offset, GError **error);

#endif /* QCOW2_IO_H */
