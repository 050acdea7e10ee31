/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* LUKS version 1 headers ("LUKS On-Disk Format Specification"). */

#ifndef QCOW2_LUKS_H
#define QCOW2_LUKS_H

#include <stddef.h>
#include <stdint.h>

#include <glib.h>

#include "qcow2/cipher.h"
#include "qcow2/io.h"

/* Open the LUKS header that lies in the length bytes at offset of io,
 * all of which are inside the container, with a passphrase (of
 * passphrase_length bytes).  Every active key slot is tried in turn, so
 * this may take a while: see qcow2_crypt_open, also for the errors.
 *
 * Returns the cipher with the master key, whose sectors the caller
 * numbers; or NULL with error set.
 */
extern struct qcow2_cipher *qcow2_luks_open (const struct qcow2_io *io,
                                             uint64_t offset, uint64_t length,
                                             const char *passphrase,
                                             size_t passphrase_length,
                                             GError **error);

#endif /* QCOW2_LUKS_H */
