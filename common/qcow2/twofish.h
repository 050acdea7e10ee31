/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Twofish, for the one key length that libgcrypt does not have. */

#ifndef QCOW2_TWOFISH_H
#define QCOW2_TWOFISH_H

#include <stddef.h>
#include <stdint.h>

#define QCOW2_TWOFISH_BLOCK 16

struct qcow2_twofish {
  uint32_t subkeys[40];
  uint32_t boxes[4][256];       /* the S-boxes and the MDS matrix in one */
};

/* key_length is 16, 24 or 32 bytes.  Wiping the result is up to the
 * caller.
 */
extern void qcow2_twofish_set_key (struct qcow2_twofish *twofish,
                                   const uint8_t *key, size_t key_length);

/* Of one block, in place. */
extern void qcow2_twofish_encrypt (const struct qcow2_twofish *twofish,
                                   uint8_t *block);
extern void qcow2_twofish_decrypt (const struct qcow2_twofish *twofish,
                                   uint8_t *block);

/* Decrypt count bytes (a multiple of the block) in XTS mode, in place.
 * tweak_key is the cipher with the second half of the XTS key, iv has
 * one block.
 */
extern void qcow2_twofish_xts_decrypt (const struct qcow2_twofish *data_key,
                                       const struct qcow2_twofish *tweak_key,
                                       const uint8_t *iv,
                                       uint8_t *buf, size_t count);

#endif /* QCOW2_TWOFISH_H */
