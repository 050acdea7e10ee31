/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A local file as a container, for the programs that tests run. */

#ifndef FILE_IO_H
#define FILE_IO_H

#include <stdint.h>

#include "qcow2/io.h"

struct file {
  struct qcow2_io io;
  int fd;
  uint64_t size;
};

/* Open a file; flags as for open(2).  Returns -1 with errno set. */
extern int file_open (struct file *file, const char *path, int flags);
extern void file_close (struct file *file);

#endif /* FILE_IO_H */
