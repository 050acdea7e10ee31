/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Changing the header of an image in place, so that a crash leaves the old
 * header or the new one.  Only single writes within a sector of 512 bytes
 * are relied on to happen as a whole.
 *
 * Locking: one thread at a time.  The header in memory is changed with the
 * one in the container; after a failure they may differ.
 */

#ifndef QCOW2_HEADER_UPDATE_H
#define QCOW2_HEADER_UPDATE_H

#include "qcow2/header.h"

/* An image which is marked as dirty or corrupt, so that its refcounts cannot
 * be relied upon, is an error.
 */
extern int qcow2_header_check_writable (const struct qcow2_header *header,
                                        GError **error);

/* Before anything else is written ("Header", autoclear_features): the same,
 * and bits whose meaning we do not know are cleared.  Flushed.
 */
extern int qcow2_header_begin_writing (struct qcow2_header *header,
                                       const struct qcow2_io *io,
                                       GError **error);

/* Not flushed. */
extern int qcow2_header_set_autoclear (struct qcow2_header *header,
                                       const struct qcow2_io *io,
                                       uint64_t autoclear, GError **error);

/* Is there room for an extension with this length of data?  If not the
 * error is ENOSPC.
 */
extern int qcow2_header_check_room (const struct qcow2_header *header,
                                    size_t length, GError **error);

/* Add an extension behind the others.  If there is no room for it the
 * error is ENOSPC, and nothing has changed.  Flushed.
 */
extern int qcow2_header_add_extension (struct qcow2_header *header,
                                       const struct qcow2_io *io,
                                       uint32_t type, const void *data,
                                       size_t length, GError **error);

/* Overwrite the data of the first extension of this type, which has the
 * same length.  Not flushed.
 */
extern int qcow2_header_put_extension (struct qcow2_header *header,
                                       const struct qcow2_io *io,
                                       uint32_t type, const void *data,
                                       size_t length, GError **error);

/* Could a crash leave only a part of what put_extension writes? */
extern bool qcow2_header_extension_can_tear (
  const struct qcow2_header *header, uint32_t type);

/* Remove the first extension of this type, if no other stands behind it;
 * those that do would be lost.  Not flushed.
 */
extern int qcow2_header_drop_extension (struct qcow2_header *header,
                                        const struct qcow2_io *io,
                                        uint32_t type, GError **error);

#endif /* QCOW2_HEADER_UPDATE_H */
