/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A container that is a local file or block device.
 *
 * Locking: one thread at a time if it is written to, else any number.
 */

#ifndef QCOW2_FILE_H
#define QCOW2_FILE_H

#include "qcow2/io.h"

struct qcow2_file {
  struct qcow2_io io;
  int fd;                       /* -1: not open */
  uint64_t size;                /* in bytes */
  char *name;                   /* for messages */
};

/* Open a file with flags of open(2); what O_CREAT makes may be read by
 * everybody whom the umask allows.  Without O_RDWR it cannot be written.
 * Anything but a regular file or a block device is an error.
 */
extern int qcow2_file_open (struct qcow2_file *file, const char *path,
                            int flags, GError **error);

/* One that is not open is left alone. */
extern void qcow2_file_close (struct qcow2_file *file);

#endif /* QCOW2_FILE_H */
