/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */


/* Making new images. */

#ifndef QCOW2_CREATE_H
#define QCOW2_CREATE_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/io.h"

/* Write an empty version 3 image into an empty container which can grow.
 * size is that of the disk in bytes, a multiple of 512.
 *
 * If data_file is not NULL the image says that the disk is the raw file of
 * that name ("External data file"): each cluster is mapped to its own place
 * there.  Nothing is done to that file.
 *
 * The header is written last; all is flushed.
 */
extern int qcow2_create (const struct qcow2_io *io, uint64_t size,
                         const char *data_file, GError **error);

#endif /* QCOW2_CREATE_H */
