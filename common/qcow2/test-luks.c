/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <glib.h>

#include "qcow2/test-luks.h"

#ifdef HAVE_LIBGCRYPT

#include <gcrypt.h>

#define STRIPES 4000
#define ITERATIONS 1000
#define MAX_KEY 64

static void
put16 (uint8_t *p, uint16_t v)
{
  v = GUINT16_TO_BE (v);
  memcpy (p, &v, sizeof v);
}

static void
put32 (uint8_t *p, uint32_t v)
{
  v = GUINT32_TO_BE (v);
  memcpy (p, &v, sizeof v);
}

static int
find_cipher (const char *name, unsigned bits)
{
  static const struct {
    const char *name;
    unsigned bits;
    int algorithm;
  } table[] = {
    { "aes", 128, GCRY_CIPHER_AES128 },
    { "aes", 192, GCRY_CIPHER_AES192 },
    { "aes", 256, GCRY_CIPHER_AES256 },
    { "twofish", 128, GCRY_CIPHER_TWOFISH128 },
    { "twofish", 256, GCRY_CIPHER_TWOFISH },
    { "serpent", 128, GCRY_CIPHER_SERPENT128 },
    { "serpent", 192, GCRY_CIPHER_SERPENT192 },
    { "serpent", 256, GCRY_CIPHER_SERPENT256 },
    { "cast5", 128, GCRY_CIPHER_CAST5 },
  };

  for (size_t i = 0; i < G_N_ELEMENTS (table); ++i)
    if (g_str_equal (table[i].name, name) && table[i].bits == bits)
      return table[i].algorithm;
  g_assert_not_reached ();
}

static int
find_mode (const char *name)
{
  if (g_str_equal (name, "xts"))
    return GCRY_CIPHER_MODE_XTS;
  if (g_str_equal (name, "cbc"))
    return GCRY_CIPHER_MODE_CBC;
  if (g_str_equal (name, "ctr"))
    return GCRY_CIPHER_MODE_CTR;
  g_assert_cmpstr (name, ==, "ecb");
  return GCRY_CIPHER_MODE_ECB;
}

static int
find_hash (const char *name)
{
  return gcry_md_map_name (name);
}

size_t
test_luks_key_length (const struct test_luks *luks)
{
  return luks->bits / 8 * (g_str_equal (luks->mode, "xts") ? 2 : 1);
}

static void
make_master_key (uint8_t *key)
{
  for (unsigned i = 0; i < MAX_KEY; ++i)
    key[i] = 5 * i * i + 11 * i + 3;
}

/* Encrypt one block with the ESSIV key. */
static void
essiv (const struct test_luks *luks, const uint8_t *key, uint8_t *iv,
       size_t length)
{
  const int hash = find_hash (luks->ivgen_hash);
  const unsigned hash_length = gcry_md_get_algo_dlen (hash);
  uint8_t salt[64];
  gcry_cipher_hd_t hd;

  gcry_md_hash_buffer (hash, salt, key, test_luks_key_length (luks));
  g_assert (gcry_cipher_open (&hd, find_cipher (luks->cipher,
                                                8 * hash_length),
                              GCRY_CIPHER_MODE_ECB, 0) == 0);
  g_assert (gcry_cipher_setkey (hd, salt, hash_length) == 0);
  g_assert (gcry_cipher_encrypt (hd, iv, length, NULL, 0) == 0);
  gcry_cipher_close (hd);
}

static void
set_iv (const struct test_luks *luks, gcry_cipher_hd_t hd,
        const uint8_t *key, uint64_t sector)
{
  const size_t length =
    gcry_cipher_get_algo_blklen (find_cipher (luks->cipher, luks->bits));
  const unsigned number_length = g_str_equal (luks->ivgen, "plain") ? 4 : 8;
  uint8_t iv[16] = { 0 };

  for (unsigned i = 0; i < number_length; ++i)
    iv[i] = sector >> (8 * i);
  if (luks->ivgen_hash)
    essiv (luks, key, iv, length);
  if (g_str_equal (luks->mode, "ctr"))
    g_assert (gcry_cipher_setctr (hd, iv, length) == 0);
  else if (!g_str_equal (luks->mode, "ecb"))
    g_assert (gcry_cipher_setiv (hd, iv, length) == 0);
}

static void
encrypt (const struct test_luks *luks, const uint8_t *key,
         uint8_t *buf, size_t count, uint64_t sector)
{
  gcry_cipher_hd_t hd;

  g_assert (gcry_cipher_open (&hd, find_cipher (luks->cipher, luks->bits),
                              find_mode (luks->mode), 0) == 0);
  g_assert (gcry_cipher_setkey (hd, key, test_luks_key_length (luks)) == 0);
  for (size_t i = 0; i < count; ++i) {
    set_iv (luks, hd, key, sector + i);
    g_assert (gcry_cipher_encrypt (hd, buf + 512 * i, 512, NULL, 0) == 0);
  }
  gcry_cipher_close (hd);
}

void
test_luks_encrypt (const struct test_luks *luks, uint8_t *buf,
                   size_t count, uint64_t sector)
{
  uint8_t key[MAX_KEY];

  make_master_key (key);
  encrypt (luks, key, buf, count, sector);
}

static void
derive (const struct test_luks *luks, const uint8_t *salt,
        const void *secret, size_t secret_length,
        uint8_t *key, size_t key_length)
{
  g_assert (gcry_kdf_derive (secret, secret_length, GCRY_KDF_PBKDF2,
                             find_hash (luks->hash), salt, 32, ITERATIONS,
                             key_length, key) == 0);
}

static size_t
material_sectors (const struct test_luks *luks)
{
  return (test_luks_key_length (luks) * STRIPES + 511) / 512;
}

/* QEMU expects slots to be so far apart. */
static size_t
slot_sectors (const struct test_luks *luks)
{
  return (material_sectors (luks) + 7) / 8 * 8;
}

void
test_luks_format (const struct test_luks *luks, uint8_t *area)
{
  const size_t key_length = test_luks_key_length (luks);
  uint8_t key[MAX_KEY];

  memset (area, 0, TEST_LUKS_LENGTH);
  make_master_key (key);
  memcpy (area, "LUKS\xba\xbe", 6);
  put16 (area + 6, 1);
  strcpy ((char *) area + 8, luks->cipher);
  snprintf ((char *) area + 40, 32, "%s-%s%s%s", luks->mode, luks->ivgen,
            luks->ivgen_hash ? ":" : "",
            luks->ivgen_hash ? luks->ivgen_hash : "");
  strcpy ((char *) area + 72, luks->hash);
  put32 (area + 104, TEST_LUKS_LENGTH / 512);
  put32 (area + 108, key_length);
  memset (area + 132, 'm', 32);
  derive (luks, area + 132, key, key_length, area + 112, 20);
  put32 (area + 164, ITERATIONS);
  strcpy ((char *) area + 168, "00000000-0000-0000-0000-000000000000");

  for (unsigned i = 0; i < 8; ++i) {
    uint8_t *p = area + 208 + 48 * i;

    put32 (p, 0xdead);
    put32 (p + 40, 8 + i * slot_sectors (luks));
    put32 (p + 44, STRIPES);
  }
}

/* One step of the anti-forensic splitter. */
static void
diffuse (int hash, uint8_t *key, size_t length)
{
  const size_t piece = gcry_md_get_algo_dlen (hash);

  for (size_t i = 0; i * piece < length; ++i) {
    const size_t n = MIN (piece, length - i * piece);
    uint8_t in[4 + MAX_KEY], out[MAX_KEY];

    put32 (in, i);
    memcpy (in + 4, key + i * piece, n);
    gcry_md_hash_buffer (hash, out, in, 4 + n);
    memcpy (key + i * piece, out, n);
  }
}

/* All stripes but the last are arbitrary. */
static void
split (const struct test_luks *luks, const uint8_t *key, uint8_t *stripes)
{
  const size_t length = test_luks_key_length (luks);
  const int hash = find_hash (luks->hash);
  uint8_t sum[MAX_KEY] = { 0 };

  for (unsigned i = 0; i < STRIPES; ++i, stripes += length) {
    const bool last = i == STRIPES - 1;

    for (size_t j = 0; j < length; ++j) {
      stripes[j] = last ? key[j] ^ sum[j] : (uint8_t) (i * 37 + j * 101);
      sum[j] ^= stripes[j];
    }
    if (!last)
      diffuse (hash, sum, length);
  }
}

void
test_luks_enable (const struct test_luks *luks, uint8_t *area,
                  unsigned slot, const char *passphrase)
{
  uint8_t *p = area + 208 + 48 * slot;
  uint8_t *material = area + 4096 + slot * slot_sectors (luks) * 512;
  uint8_t master_key[MAX_KEY], key[MAX_KEY];

  put32 (p, 0x00ac71f3);
  put32 (p + 4, ITERATIONS);
  memset (p + 8, '0' + slot, 32);
  derive (luks, p + 8, passphrase, strlen (passphrase),
          key, test_luks_key_length (luks));
  make_master_key (master_key);
  split (luks, master_key, material);
  encrypt (luks, key, material, material_sectors (luks), 0);
}

#endif /* HAVE_LIBGCRYPT */
