/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Encrypted images (the header's crypt_method, and "Full disk encryption
 * header pointer" in the format's specification).
 */

#ifndef QCOW2_CRYPT_H
#define QCOW2_CRYPT_H

#include <stddef.h>
#include <stdint.h>

#include <glib.h>

#include "qcow2/header.h"
#include "qcow2/io.h"

struct qcow2_crypt;

/* Find the key of an image whose crypt_method is not NONE.  passphrase
 * has length bytes, which need not be text; it is not kept, and wiping
 * it is up to the caller.  io is only used during the call.
 *
 * This is slow by design: deriving keys takes about two seconds for each
 * key slot that is tried, and at most about thirty in all.
 *
 * Returns NULL with error set: EACCES if the passphrase does not open
 * the image, EINVAL for a bad LUKS header, ENOTSUP for a cipher or a
 * hash that this build cannot do.  Without libgcrypt it is always
 * ENOTSUP.
 *
 * An AES image (crypt_method 1) has nothing to tell a wrong passphrase
 * from the right one: it opens with any but the empty one, and then
 * reads as garbage.
 */
extern struct qcow2_crypt *qcow2_crypt_open (const struct qcow2_header *header,
                                             const struct qcow2_io *io,
                                             const char *passphrase,
                                             size_t length, GError **error);

/* Wipes the keys.  Nothing may be using crypt, which may be NULL. */
extern void qcow2_crypt_close (struct qcow2_crypt *crypt);

/* Decrypt in place count bytes of the disk, which begin at guest_offset
 * on the disk and were read from host_offset of the container, or of the
 * external data file.  All three are in bytes and multiples of 512.
 * Only for what is stored as it is: compressed clusters are not
 * encrypted.
 *
 * May be called from any number of threads at once; they do not wait for
 * each other.  Returns 0, or -1 with error set and undefined bytes in
 * buf.
 */
extern int qcow2_crypt_decrypt (struct qcow2_crypt *crypt,
                                void *buf, size_t count,
                                uint64_t guest_offset, uint64_t host_offset,
                                GError **error);

#endif /* QCOW2_CRYPT_H */
