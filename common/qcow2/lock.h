/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */


/* Image locks, as QEMU takes them: so that an image which one program
 * writes to is not opened by another.
 */

#ifndef QCOW2_LOCK_H
#define QCOW2_LOCK_H

#include <glib.h>

enum qcow2_lock {
  QCOW2_LOCK_READER,            /* of an image */
  QCOW2_LOCK_WRITER,
  QCOW2_LOCK_RAW_WRITER,        /* of a raw disk that an image refers to */
};

/* Lock an open file, which must be readable, until all descriptors of this
 * opening are closed; a fork shares them.  If another program uses the
 * file in a way that excludes this one the error is EBUSY.
 */
extern int qcow2_lock_file (int fd, enum qcow2_lock lock, GError **error);

#endif /* QCOW2_LOCK_H */
