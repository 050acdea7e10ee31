/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* LUKS1 headers and encrypted sectors, made for test-crypt.c: what
 * luks.c and cipher.c undo, and without their code.  QEMU opens the
 * result.
 */

#ifndef QCOW2_TEST_LUKS_H
#define QCOW2_TEST_LUKS_H

#include <stddef.h>
#include <stdint.h>

/* A header has 4096 bytes, and eight slots which for the longest key
 * have so many.
 */
#define TEST_LUKS_SLOT 258048
#define TEST_LUKS_LENGTH (4096 + 8 * TEST_LUKS_SLOT)

/* How a disk is encrypted.  The names are those in a LUKS header. */
struct test_luks {
  const char *cipher;           /* "aes" */
  unsigned bits;                /* of a key of the cipher */
  const char *mode;             /* "xts" */
  const char *ivgen;            /* "plain64" */
  const char *ivgen_hash;       /* NULL except for "essiv" */
  const char *hash;             /* for the key derivation */
};

/* Bytes that the master key has.  It is always the same. */
extern size_t test_luks_key_length (const struct test_luks *luks);

/* Fill area (TEST_LUKS_LENGTH bytes) with a header that has eight
 * disabled slots.
 */
extern void test_luks_format (const struct test_luks *luks, uint8_t *area);

/* Enable a slot (0 to 7), which passphrase opens. */
extern void test_luks_enable (const struct test_luks *luks, uint8_t *area,
                              unsigned slot, const char *passphrase);

/* Encrypt count sectors of 512 bytes in place with the master key. */
extern void test_luks_encrypt (const struct test_luks *luks, uint8_t *buf,
                               size_t count, uint64_t sector);

#endif /* QCOW2_TEST_LUKS_H */
