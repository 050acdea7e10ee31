/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Twofish, written from its specification ("Twofish: A 128-Bit Block
 * Cipher", Schneier et al., 1998; names and section numbers are its),
 * and XTS mode (IEEE 1619).
 *
 * qemu-img can create images with 192-bit Twofish keys, which libgcrypt
 * cannot read.  That is all that this is for; everything else goes
 * through libgcrypt.  It is written to be short: the tables that depend
 * on the key are made once for each key (section 7.1, "full keying"),
 * and all others are computed.
 */

#include <config.h>

#include <string.h>

#include <glib.h>

#include "qcow2/twofish.h"

#define ROUNDS 16

/* The polynomials of the two fields, without x^8. */
#define MDS_POLYNOMIAL 0x69
#define RS_POLYNOMIAL 0x4d

/* The permutations q0 and q1 are made from these (section 4.3.5). */
static const uint8_t t[2][4][16] = {
  {
    { 8, 1, 7, 13, 6, 15, 3, 2, 0, 11, 5, 9, 14, 12, 10, 4 },
    { 14, 12, 11, 8, 1, 2, 3, 5, 15, 4, 10, 6, 7, 0, 9, 13 },
    { 11, 10, 5, 14, 6, 13, 9, 0, 12, 8, 15, 3, 2, 4, 7, 1 },
    { 13, 7, 15, 4, 1, 2, 6, 14, 9, 11, 3, 0, 8, 5, 12, 10 },
  },
  {
    { 2, 8, 11, 13, 15, 7, 6, 14, 3, 1, 9, 4, 0, 10, 12, 5 },
    { 1, 14, 2, 11, 4, 12, 3, 7, 6, 13, 10, 5, 15, 9, 0, 8 },
    { 4, 12, 7, 5, 1, 6, 9, 10, 0, 14, 13, 8, 2, 11, 3, 15 },
    { 11, 9, 5, 1, 12, 3, 13, 14, 6, 4, 7, 15, 2, 0, 8, 10 },
  },
};

static const uint8_t mds[4][4] = {
  { 0x01, 0xef, 0x5b, 0x5b },
  { 0x5b, 0xef, 0xef, 0x01 },
  { 0xef, 0x5b, 0x01, 0xef },
  { 0xef, 0x01, 0xef, 0x5b },
};

static const uint8_t rs[4][8] = {
  { 0x01, 0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e },
  { 0xa4, 0x56, 0x82, 0xf3, 0x1e, 0xc6, 0x68, 0xe5 },
  { 0x02, 0xa1, 0xfc, 0xc1, 0x47, 0xae, 0x3d, 0x19 },
  { 0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e, 0x03 },
};

/* Which of q0 and q1 byte number j goes through in the function h: after
 * the XOR with L3 the entry q_order[3][j], and so on down to L0, and
 * q_order[0][j] last of all (section 4.3.2, figure 2).
 */
static const uint8_t q_order[5][4] = {
  { 1, 0, 1, 0 },
  { 0, 0, 1, 1 },
  { 0, 1, 0, 1 },
  { 1, 1, 0, 0 },
  { 1, 0, 0, 1 },
};

static inline uint32_t
rol (uint32_t x, unsigned n)
{
  return x << n | x >> (32 - n);
}

static inline uint32_t
ror (uint32_t x, unsigned n)
{
  return x >> n | x << (32 - n);
}

static uint8_t
multiply (uint8_t a, uint8_t b, uint8_t polynomial)
{
  uint8_t product = 0;

  for (; b; b >>= 1) {
    if (b & 1)
      product ^= a;
    a = a << 1 ^ (a & 0x80 ? polynomial : 0);
  }
  return product;
}

/* The permutation q0 or q1 of a byte. */
static uint8_t
permute (unsigned which, uint8_t x)
{
  const uint8_t (*const tables)[16] = t[which];
  unsigned a = x >> 4, b = x & 15;

  for (unsigned i = 0; i < 4; i += 2) {
    const unsigned sum = a ^ b;
    const unsigned difference = a ^ (b >> 1 | (b & 1) << 3) ^ (a << 3 & 8);

    a = tables[i][sum];
    b = tables[i + 1][difference];
  }
  return b << 4 | a;
}

/* What byte number j of the function h's argument contributes to its
 * result.  L has k words.
 */
static uint32_t
h_byte (unsigned j, uint8_t x, const uint32_t *L, unsigned k)
{
  uint32_t result = 0;

  for (unsigned i = k; i > 0; --i)
    x = permute (q_order[i][j], x) ^ (uint8_t) (L[i - 1] >> (8 * j));
  x = permute (q_order[0][j], x);

  for (unsigned row = 0; row < 4; ++row)
    result |= (uint32_t) multiply (x, mds[row][j], MDS_POLYNOMIAL)
      << (8 * row);
  return result;
}

/* The function h of a word whose four bytes are all x, as the key
 * schedule has them.
 */
static uint32_t
h (uint8_t x, const uint32_t *L, unsigned k)
{
  return h_byte (0, x, L, k) ^ h_byte (1, x, L, k) ^
    h_byte (2, x, L, k) ^ h_byte (3, x, L, k);
}

/* The word of S that eight bytes of the key give. */
static uint32_t
rs_word (const uint8_t *key)
{
  uint32_t result = 0;

  for (unsigned row = 0; row < 4; ++row) {
    uint8_t sum = 0;

    for (unsigned i = 0; i < 8; ++i)
      sum ^= multiply (key[i], rs[row][i], RS_POLYNOMIAL);
    result |= (uint32_t) sum << (8 * row);
  }
  return result;
}

static inline uint32_t
load (const uint8_t *p)
{
  uint32_t v;

  memcpy (&v, p, sizeof v);
  return GUINT32_FROM_LE (v);
}

static inline void
store (uint8_t *p, uint32_t v)
{
  v = GUINT32_TO_LE (v);
  memcpy (p, &v, sizeof v);
}

void
qcow2_twofish_set_key (struct qcow2_twofish *twofish,
                       const uint8_t *key, size_t key_length)
{
  const unsigned k = key_length / 8;
  uint32_t even[4], odd[4], S[4];

  for (unsigned i = 0; i < k; ++i) {
    even[i] = load (key + 8 * i);
    odd[i] = load (key + 8 * i + 4);
    S[k - 1 - i] = rs_word (key + 8 * i);
  }
  for (unsigned i = 0; i < 20; ++i) {
    const uint32_t a = h (2 * i, even, k);
    const uint32_t b = rol (h (2 * i + 1, odd, k), 8);

    twofish->subkeys[2 * i] = a + b;
    twofish->subkeys[2 * i + 1] = rol (a + 2 * b, 9);
  }
  for (unsigned j = 0; j < 4; ++j)
    for (unsigned x = 0; x < 256; ++x)
      twofish->boxes[j][x] = h_byte (j, x, S, k);

  explicit_bzero (even, sizeof even);
  explicit_bzero (odd, sizeof odd);
  explicit_bzero (S, sizeof S);
}

static inline uint32_t
g (const struct qcow2_twofish *twofish, uint32_t x)
{
  return twofish->boxes[0][x & 0xff] ^ twofish->boxes[1][x >> 8 & 0xff] ^
    twofish->boxes[2][x >> 16 & 0xff] ^ twofish->boxes[3][x >> 24];
}

static inline void
encrypt_round (const struct qcow2_twofish *twofish, unsigned round,
               uint32_t a, uint32_t b, uint32_t *c, uint32_t *d)
{
  const uint32_t t0 = g (twofish, a), t1 = g (twofish, rol (b, 8));
  const uint32_t *k = twofish->subkeys + 8 + 2 * round;

  *c = ror (*c ^ (t0 + t1 + k[0]), 1);
  *d = rol (*d, 1) ^ (t0 + 2 * t1 + k[1]);
}

static inline void
decrypt_round (const struct qcow2_twofish *twofish, unsigned round,
               uint32_t a, uint32_t b, uint32_t *c, uint32_t *d)
{
  const uint32_t t0 = g (twofish, a), t1 = g (twofish, rol (b, 8));
  const uint32_t *k = twofish->subkeys + 8 + 2 * round;

  *c = rol (*c, 1) ^ (t0 + t1 + k[0]);
  *d = ror (*d ^ (t0 + 2 * t1 + k[1]), 1);
}

void
qcow2_twofish_encrypt (const struct qcow2_twofish *twofish, uint8_t *block)
{
  const uint32_t *k = twofish->subkeys;
  uint32_t a = load (block) ^ k[0], b = load (block + 4) ^ k[1];
  uint32_t c = load (block + 8) ^ k[2], d = load (block + 12) ^ k[3];

  for (unsigned round = 0; round < ROUNDS; round += 2) {
    encrypt_round (twofish, round, a, b, &c, &d);
    encrypt_round (twofish, round + 1, c, d, &a, &b);
  }
  store (block, c ^ k[4]);
  store (block + 4, d ^ k[5]);
  store (block + 8, a ^ k[6]);
  store (block + 12, b ^ k[7]);
}

void
qcow2_twofish_decrypt (const struct qcow2_twofish *twofish, uint8_t *block)
{
  const uint32_t *k = twofish->subkeys;
  uint32_t c = load (block) ^ k[4], d = load (block + 4) ^ k[5];
  uint32_t a = load (block + 8) ^ k[6], b = load (block + 12) ^ k[7];

  for (unsigned round = ROUNDS; round > 0; round -= 2) {
    decrypt_round (twofish, round - 1, c, d, &a, &b);
    decrypt_round (twofish, round - 2, a, b, &c, &d);
  }
  store (block, a ^ k[0]);
  store (block + 4, b ^ k[1]);
  store (block + 8, c ^ k[2]);
  store (block + 12, d ^ k[3]);
}

/* XTS. */

static void
xor_block (uint8_t *block, const uint64_t *tweak)
{
  uint64_t v[2];

  memcpy (v, block, sizeof v);
  v[0] ^= tweak[0];
  v[1] ^= tweak[1];
  memcpy (block, v, sizeof v);
}

/* Multiply by x in GF(2^128), little endian. */
static void
next_tweak (uint64_t *tweak)
{
  const uint64_t low = GUINT64_FROM_LE (tweak[0]);
  const uint64_t high = GUINT64_FROM_LE (tweak[1]);

  tweak[0] = GUINT64_TO_LE (low << 1 ^ (high >> 63 ? 0x87 : 0));
  tweak[1] = GUINT64_TO_LE (high << 1 | low >> 63);
}

void
qcow2_twofish_xts_decrypt (const struct qcow2_twofish *data_key,
                           const struct qcow2_twofish *tweak_key,
                           const uint8_t *iv, uint8_t *buf, size_t count)
{
  uint64_t tweak[2];

  memcpy (tweak, iv, sizeof tweak);
  qcow2_twofish_encrypt (tweak_key, (uint8_t *) tweak);
  for (size_t i = 0; i < count; i += QCOW2_TWOFISH_BLOCK) {
    xor_block (buf + i, tweak);
    qcow2_twofish_decrypt (data_key, buf + i);
    xor_block (buf + i, tweak);
    next_tweak (tweak);
  }
}
