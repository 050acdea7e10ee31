/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Ciphers for disks: every sector of 512 bytes is encrypted for itself,
 * with an initialization vector (IV) that is made from its number.
 *
 * Used by crypt.c and luks.c, and only there if there is libgcrypt.  It
 * must have been initialized.
 */

#ifndef QCOW2_CIPHER_H
#define QCOW2_CIPHER_H

#include <stddef.h>
#include <stdint.h>

#include <glib.h>

#define QCOW2_CIPHER_SECTOR 512

/* The longest key in bytes: XTS mode has two of 256 bits. */
#define QCOW2_CIPHER_MAX_KEY 64

enum qcow2_ivgen {
  QCOW2_IVGEN_NONE,             /* the mode has no IV */
  QCOW2_IVGEN_PLAIN,            /* the sector's number, 32 bits of it */
  QCOW2_IVGEN_PLAIN64,          /* the sector's number */
  QCOW2_IVGEN_ESSIV,            /* the same, encrypted with a hashed key */
};

/* What a cipher does, without its key.  Filled by qcow2_cipher_parse. */
struct qcow2_cipher_spec {
  int algorithm;                /* libgcrypt's number, as the next three */
  int mode;
  int essiv_algorithm;          /* 0 without ESSIV */
  int essiv_hash;               /* 0 without ESSIV */
  enum qcow2_ivgen ivgen;
  size_t block_length;          /* bytes that the algorithm works on */
  size_t key_length;            /* in bytes; XTS: of both keys together */
};

/* libgcrypt's number of the hash that LUKS calls so, or 0 if it is not
 * known or not available.
 */
extern int qcow2_cipher_find_hash (const char *name);

/* Find the cipher that LUKS calls name ("aes") with a mode such as
 * "xts-plain64" or "cbc-essiv:sha256" and keys of key_length bytes.
 * Returns -1 with error set (ENOTSUP) if there is none.
 */
extern int qcow2_cipher_parse (const char *name, const char *mode,
                               size_t key_length,
                               struct qcow2_cipher_spec *spec,
                               GError **error);

struct qcow2_cipher;

/* A cipher with a key of spec->key_length bytes, of which it keeps a
 * copy; neither parameter is needed afterwards.  Returns NULL with error
 * set if libgcrypt refuses.  Free with qcow2_cipher_free, which wipes
 * the key.
 */
extern struct qcow2_cipher *
qcow2_cipher_new (const struct qcow2_cipher_spec *spec, const uint8_t *key,
                  GError **error);
extern void qcow2_cipher_free (struct qcow2_cipher *cipher);

/* Decrypt count sectors in place; the first has the number sector.  May
 * be called from many threads at once.
 */
extern int qcow2_cipher_decrypt (struct qcow2_cipher *cipher, void *buf,
                                 size_t count, uint64_t sector,
                                 GError **error);

#endif /* QCOW2_CIPHER_H */
