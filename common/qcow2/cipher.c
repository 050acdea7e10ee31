/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Sector ciphers on top of libgcrypt.
 *
 * A libgcrypt handle holds the IV, so only one thread at a time can use
 * it.  The handles of a cipher are kept in a pool: a request takes an
 * idle one, makes another if there is none, and puts it back.  The
 * pool's lock is held for those few instructions, never while
 * decrypting.
 *
 * What libgcrypt does for one sector takes 60 to 150 ns with the CPU's
 * help for AES, so the loop around it does as little as it can: all IVs
 * of a batch are made at once, those of ESSIV with one call to
 * libgcrypt, and in ECB mode, which has none, the whole batch is one
 * call.
 *
 * libgcrypt has no Twofish with 192-bit keys.  qemu-img can use it, but
 * only in XTS mode; that is in twofish.c, and needs no handle.
 */

#include <config.h>

#include <stdbool.h>
#include <string.h>

#include "qcow2/cipher.h"
#include "qcow2/error.h"
#include "qcow2/twofish.h"

#ifdef HAVE_LIBGCRYPT

#include <gcrypt.h>

#define MAX_BLOCK 16
#define BATCH 64                /* sectors */

/* As an algorithm: no number of libgcrypt's. */
#define TWOFISH192 -1

struct handle {
  gcry_cipher_hd_t data;        /* NULL for TWOFISH192 */
  gcry_cipher_hd_t essiv;       /* NULL without ESSIV */
  struct handle *next;          /* in the pool */
};

struct qcow2_cipher {
  struct qcow2_cipher_spec spec;
  uint8_t key[QCOW2_CIPHER_MAX_KEY];
  uint8_t essiv_key[QCOW2_CIPHER_MAX_KEY];
  struct qcow2_twofish *twofish; /* TWOFISH192: for the data, the tweak */
  GMutex lock;
  struct handle *idle;          /* under lock */
};

/* Names. */

static const struct {
  const char *name;
  size_t key_length;
  int algorithm;
} algorithms[] = {
  { "aes", 16, GCRY_CIPHER_AES128 },
  { "aes", 24, GCRY_CIPHER_AES192 },
  { "aes", 32, GCRY_CIPHER_AES256 },
  { "cast5", 16, GCRY_CIPHER_CAST5 },
  { "serpent", 16, GCRY_CIPHER_SERPENT128 },
  { "serpent", 24, GCRY_CIPHER_SERPENT192 },
  { "serpent", 32, GCRY_CIPHER_SERPENT256 },
  { "twofish", 16, GCRY_CIPHER_TWOFISH128 },
  { "twofish", 24, TWOFISH192 },
  { "twofish", 32, GCRY_CIPHER_TWOFISH },
};

static const struct {
  const char *name;
  int mode;
} modes[] = {
  { "cbc", GCRY_CIPHER_MODE_CBC },
  { "ctr", GCRY_CIPHER_MODE_CTR },
  { "ecb", GCRY_CIPHER_MODE_ECB },
  { "xts", GCRY_CIPHER_MODE_XTS },
};

static const struct {
  const char *name;
  int hash;
} hashes[] = {
  { "md5", GCRY_MD_MD5 },
  { "ripemd160", GCRY_MD_RMD160 },
  { "sha1", GCRY_MD_SHA1 },
  { "sha224", GCRY_MD_SHA224 },
  { "sha256", GCRY_MD_SHA256 },
  { "sha384", GCRY_MD_SHA384 },
  { "sha512", GCRY_MD_SHA512 },
};

int
qcow2_cipher_find_hash (const char *name)
{
  for (size_t i = 0; i < G_N_ELEMENTS (hashes); ++i)
    if (strcmp (hashes[i].name, name) == 0)
      return gcry_md_test_algo (hashes[i].hash) == 0 ? hashes[i].hash : 0;
  return 0;
}

static int
find_algorithm (const char *name, size_t key_length)
{
  for (size_t i = 0; i < G_N_ELEMENTS (algorithms); ++i)
    if (strcmp (algorithms[i].name, name) == 0 &&
        algorithms[i].key_length == key_length)
      return algorithms[i].algorithm;
  return GCRY_CIPHER_NONE;
}

static size_t
find_block_length (int algorithm)
{
  return algorithm == TWOFISH192 ? QCOW2_TWOFISH_BLOCK
                                 : gcry_cipher_get_algo_blklen (algorithm);
}

static int
find_mode (const char *name)
{
  for (size_t i = 0; i < G_N_ELEMENTS (modes); ++i)
    if (strcmp (modes[i].name, name) == 0)
      return modes[i].mode;
  return GCRY_CIPHER_MODE_NONE;
}

/* ESSIV encrypts with the same cipher, but with a hash of the key as the
 * key; so the hash must be as long as a key of that cipher.
 */
static int
parse_essiv (const char *name, const char *hash,
             struct qcow2_cipher_spec *spec)
{
  spec->ivgen = QCOW2_IVGEN_ESSIV;
  spec->essiv_hash = hash ? qcow2_cipher_find_hash (hash) : 0;
  if (!spec->essiv_hash)
    return -1;
  spec->essiv_algorithm =
    find_algorithm (name, gcry_md_get_algo_dlen (spec->essiv_hash));
  return spec->essiv_algorithm ? 0 : -1;
}

static int
parse_ivgen (const char *name, const char *ivgen, const char *hash,
             struct qcow2_cipher_spec *spec)
{
  if (strcmp (ivgen, "plain") == 0)
    spec->ivgen = QCOW2_IVGEN_PLAIN;
  else if (strcmp (ivgen, "plain64") == 0)
    spec->ivgen = QCOW2_IVGEN_PLAIN64;
  else if (strcmp (ivgen, "essiv") != 0 ||
           parse_essiv (name, hash, spec) == -1)
    return -1;
  if (spec->mode == GCRY_CIPHER_MODE_ECB)
    spec->ivgen = QCOW2_IVGEN_NONE;
  return 0;
}

/* mode is "MODE-IVGEN" or "MODE-IVGEN:HASH". */
static int
parse_mode (const char *name, const char *mode,
            struct qcow2_cipher_spec *spec)
{
  g_autofree char *copy = g_strdup (mode);
  char *ivgen = strchr (copy, '-');
  char *hash = NULL;

  if (!ivgen)
    return -1;
  *ivgen++ = '\0';
  hash = strchr (ivgen, ':');
  if (hash)
    *hash++ = '\0';

  spec->mode = find_mode (copy);
  if (!spec->mode)
    return -1;
  return parse_ivgen (name, ivgen, hash, spec);
}

int
qcow2_cipher_parse (const char *name, const char *mode, size_t key_length,
                    struct qcow2_cipher_spec *spec, GError **error)
{
  g_autofree char *safe_name = g_strescape (name, NULL);
  g_autofree char *safe_mode = g_strescape (mode, NULL);
  bool xts;

  memset (spec, 0, sizeof *spec);
  if (parse_mode (name, mode, spec) == -1)
    return qcow2_fail (error, ENOTSUP, "cipher mode is \"%s\" (with the "
                       "cipher \"%s\"), which is not supported",
                       safe_mode, safe_name);

  xts = spec->mode == GCRY_CIPHER_MODE_XTS;
  if (!xts || key_length % 2 == 0)
    spec->algorithm = find_algorithm (name, key_length / (xts ? 2 : 1));
  spec->block_length = find_block_length (spec->algorithm);
  spec->key_length = key_length;
  if (!spec->algorithm ||
      (xts && spec->block_length != MAX_BLOCK) ||
      (!xts && spec->algorithm == TWOFISH192))
    return qcow2_fail (error, ENOTSUP, "cipher is \"%s\" in mode \"%s\" with "
                       "a key of %zu bytes, which is not supported",
                       safe_name, safe_mode, key_length);
  return 0;
}

/* The pool of handles. */

static void
handle_free (struct handle *handle)
{
  gcry_cipher_close (handle->data);
  gcry_cipher_close (handle->essiv);
  g_free (handle);
}

static gcry_error_t
open_keyed (gcry_cipher_hd_t *hd, int algorithm, int mode,
            const uint8_t *key, size_t key_length)
{
  gcry_error_t err = gcry_cipher_open (hd, algorithm, mode, 0);

  if (err)
    return err;
  return gcry_cipher_setkey (*hd, key, key_length);
}

static struct handle *
handle_new (const struct qcow2_cipher *cipher, GError **error)
{
  const struct qcow2_cipher_spec *spec = &cipher->spec;
  struct handle *handle = g_new0 (struct handle, 1);
  gcry_error_t err = 0;

  if (!cipher->twofish)
    err = open_keyed (&handle->data, spec->algorithm, spec->mode,
                      cipher->key, spec->key_length);
  if (!err && spec->ivgen == QCOW2_IVGEN_ESSIV)
    err = open_keyed (&handle->essiv, spec->essiv_algorithm,
                      GCRY_CIPHER_MODE_ECB, cipher->essiv_key,
                      gcry_md_get_algo_dlen (spec->essiv_hash));
  if (err) {
    qcow2_fail (error, ENOTSUP, "libgcrypt cannot set up the cipher %s: %s",
                gcry_cipher_algo_name (spec->algorithm), gcry_strerror (err));
    handle_free (handle);
    return NULL;
  }
  return handle;
}

static struct handle *
handle_take (struct qcow2_cipher *cipher, GError **error)
{
  struct handle *handle;

  g_mutex_lock (&cipher->lock);
  handle = cipher->idle;
  if (handle)
    cipher->idle = handle->next;
  g_mutex_unlock (&cipher->lock);
  return handle ? handle : handle_new (cipher, error);
}

static void
handle_put (struct qcow2_cipher *cipher, struct handle *handle)
{
  g_mutex_lock (&cipher->lock);
  handle->next = cipher->idle;
  cipher->idle = handle;
  g_mutex_unlock (&cipher->lock);
}

static struct qcow2_twofish *
twofish_new (const uint8_t *key, size_t key_length)
{
  struct qcow2_twofish *twofish = g_new (struct qcow2_twofish, 2);

  qcow2_twofish_set_key (&twofish[0], key, key_length / 2);
  qcow2_twofish_set_key (&twofish[1], key + key_length / 2, key_length / 2);
  return twofish;
}

static void
twofish_free (struct qcow2_twofish *twofish)
{
  if (twofish)
    explicit_bzero (twofish, 2 * sizeof *twofish);
  g_free (twofish);
}

struct qcow2_cipher *
qcow2_cipher_new (const struct qcow2_cipher_spec *spec, const uint8_t *key,
                  GError **error)
{
  struct qcow2_cipher *cipher = g_new0 (struct qcow2_cipher, 1);

  cipher->spec = *spec;
  memcpy (cipher->key, key, spec->key_length);
  if (spec->ivgen == QCOW2_IVGEN_ESSIV)
    gcry_md_hash_buffer (spec->essiv_hash, cipher->essiv_key,
                         key, spec->key_length);
  if (spec->algorithm == TWOFISH192)
    cipher->twofish = twofish_new (key, spec->key_length);
  g_mutex_init (&cipher->lock);
  /* Whatever can go wrong with a handle does so here, with the first. */
  cipher->idle = handle_new (cipher, error);
  if (!cipher->idle) {
    qcow2_cipher_free (cipher);
    return NULL;
  }
  return cipher;
}

void
qcow2_cipher_free (struct qcow2_cipher *cipher)
{
  struct handle *handle;

  if (!cipher)
    return;
  while ((handle = cipher->idle) != NULL) {
    cipher->idle = handle->next;
    handle_free (handle);
  }
  twofish_free (cipher->twofish);
  g_mutex_clear (&cipher->lock);
  explicit_bzero (cipher, sizeof *cipher);
  g_free (cipher);
}

/* Decryption. */

/* The IVs of count sectors, one behind the other.  An IV that is longer
 * than the number is filled with zeroes.
 */
static gcry_error_t
make_ivs (const struct qcow2_cipher_spec *spec, struct handle *handle,
          uint8_t *ivs, size_t count, uint64_t sector)
{
  const size_t length = count * spec->block_length;
  const uint64_t mask =
    spec->ivgen == QCOW2_IVGEN_PLAIN ? UINT32_MAX : UINT64_MAX;

  memset (ivs, 0, length);
  for (size_t i = 0; i < count; ++i) {
    const uint64_t number = GUINT64_TO_LE ((sector + i) & mask);

    memcpy (ivs + i * spec->block_length, &number, sizeof number);
  }
  if (!handle->essiv)
    return 0;
  return gcry_cipher_encrypt (handle->essiv, ivs, length, NULL, 0);
}

static gcry_error_t
decrypt_sector (const struct qcow2_cipher *cipher, struct handle *handle,
                uint8_t *buf, const uint8_t *iv)
{
  const struct qcow2_cipher_spec *spec = &cipher->spec;
  gcry_error_t err;

  if (cipher->twofish) {
    qcow2_twofish_xts_decrypt (&cipher->twofish[0], &cipher->twofish[1], iv,
                               buf, QCOW2_CIPHER_SECTOR);
    return 0;
  }
  if (spec->mode == GCRY_CIPHER_MODE_CTR)
    err = gcry_cipher_setctr (handle->data, iv, spec->block_length);
  else
    err = gcry_cipher_setiv (handle->data, iv, spec->block_length);
  if (err)
    return err;
  return gcry_cipher_decrypt (handle->data, buf, QCOW2_CIPHER_SECTOR,
                              NULL, 0);
}

static gcry_error_t
decrypt_batch (const struct qcow2_cipher *cipher, struct handle *handle,
               uint8_t *buf, size_t count, uint64_t sector)
{
  const struct qcow2_cipher_spec *spec = &cipher->spec;
  uint8_t ivs[BATCH * MAX_BLOCK];
  gcry_error_t err;

  if (spec->ivgen == QCOW2_IVGEN_NONE)
    return gcry_cipher_decrypt (handle->data, buf,
                                count * QCOW2_CIPHER_SECTOR, NULL, 0);

  err = make_ivs (spec, handle, ivs, count, sector);
  for (size_t i = 0; !err && i < count; ++i)
    err = decrypt_sector (cipher, handle, buf + i * QCOW2_CIPHER_SECTOR,
                          ivs + i * spec->block_length);
  return err;
}

int
qcow2_cipher_decrypt (struct qcow2_cipher *cipher, void *buf, size_t count,
                      uint64_t sector, GError **error)
{
  struct handle *handle = handle_take (cipher, error);
  uint8_t *p = buf;
  gcry_error_t err = 0;

  if (!handle)
    return -1;
  while (!err && count > 0) {
    const size_t n = MIN (count, BATCH);

    err = decrypt_batch (cipher, handle, p, n, sector);
    p += n * QCOW2_CIPHER_SECTOR;
    sector += n;
    count -= n;
  }
  handle_put (cipher, handle);
  if (err)
    return qcow2_fail (error, EIO, "decryption failed: %s",
                       gcry_strerror (err));
  return 0;
}

#endif /* HAVE_LIBGCRYPT */
