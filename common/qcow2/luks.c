/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* From a passphrase to the master key of a LUKS1 header.
 *
 * A key slot holds the master key, "split" into 4000 stripes (so that a
 * slot can be destroyed by overwriting any part of it) and encrypted with
 * the disk's own cipher.  The key of that is derived from the passphrase
 * by PBKDF2, with so many iterations that guessing is slow.  The header
 * has a digest of the master key, again by PBKDF2, which tells whether
 * what came out is right.
 *
 * Nothing in the header is trusted.  It is as strict as QEMU, which
 * checks unused slots as well.  Iterations are the one field that no
 * format rule limits: each derivation is first weighed by the speed of
 * this machine, and refused if all of them together would take longer
 * than MAX_SECONDS.  Slots are weighed one by one when their turn comes,
 * so that a slot which nobody needs does no harm.
 */

#include <config.h>

#include <inttypes.h>
#include <stdbool.h>
#include <string.h>

#include "qcow2/error.h"
#include "qcow2/format.h"
#include "qcow2/luks.h"

#ifdef HAVE_LIBGCRYPT

#include <gcrypt.h>

#define HEADER_LENGTH 592
#define SECTOR QCOW2_CIPHER_SECTOR
#define NAME_LENGTH 32
#define DIGEST_LENGTH 20
#define SALT_LENGTH 32

#define SLOTS 8
#define SLOT_LENGTH 48
#define SLOT_ENABLED 0x00ac71f3U
#define SLOT_DISABLED 0x0000deadU
#define STRIPES 4000

/* Where key material may begin at the earliest. */
#define FIRST_SLOT_SECTOR (4096 / SECTOR)

#define MAX_SECONDS 30

/* Enough to be measured, but less than a millisecond or two. */
#define SAMPLE_ITERATIONS 2000

struct slot {
  bool enabled;
  uint32_t iterations;
  uint8_t salt[SALT_LENGTH];
  uint64_t offset;              /* of the key material from the header's */
};

struct luks {
  struct qcow2_cipher_spec spec;
  int hash;                     /* libgcrypt's number */
  uint8_t digest[DIGEST_LENGTH];
  uint8_t salt[SALT_LENGTH];
  uint32_t iterations;
  uint64_t material_length;     /* bytes in each slot, in whole sectors */
  struct slot slots[SLOTS];

  double iteration_seconds;     /* what one iteration of PBKDF2 takes */
  double seconds_left;
};

/* Parsing and validation. */

/* A name, of which at most NAME_LENGTH bytes including a NUL are stored
 * at buf.
 */
static const char *
parse_name (const char *what, const uint8_t *buf, GError **error)
{
  if (!memchr (buf, '\0', NAME_LENGTH)) {
    qcow2_fail (error, EINVAL, "LUKS header: the %s does not end with a NUL "
                "byte in its %d bytes", what, NAME_LENGTH);
    return NULL;
  }
  return (const char *) buf;
}

static int
parse_names (struct luks *luks, const uint8_t *buf, GError **error)
{
  const char *cipher = parse_name ("cipher name", buf + 8, error);
  const char *mode = cipher ? parse_name ("cipher mode", buf + 40, error)
                            : NULL;
  const char *hash = mode ? parse_name ("hash name", buf + 72, error) : NULL;

  if (!hash)
    return -1;
  if (qcow2_cipher_parse (cipher, mode, qcow2_be32 (buf + 108), &luks->spec,
                          error) == -1) {
    g_prefix_error (error, "LUKS header: ");
    return -1;
  }
  luks->hash = qcow2_cipher_find_hash (hash);
  if (!luks->hash) {
    g_autofree char *safe_hash = g_strescape (hash, NULL);

    return qcow2_fail (error, ENOTSUP, "LUKS header: hash is \"%s\", which "
                       "is not supported", safe_hash);
  }
  return 0;
}

static int
parse_head (struct luks *luks, const uint8_t *buf, GError **error)
{
  if (memcmp (buf, "LUKS\xba\xbe", 6) != 0)
    return qcow2_fail (error, EINVAL, "LUKS header: "
                       "it does not begin with the magic LUKS\\xba\\xbe");
  if (qcow2_be16 (buf + 6) != 1)
    return qcow2_fail (error, ENOTSUP, "LUKS header: version is %u, but only "
                       "1 is known", qcow2_be16 (buf + 6));
  if (parse_names (luks, buf, error) == -1)
    return -1;

  memcpy (luks->digest, buf + 112, DIGEST_LENGTH);
  memcpy (luks->salt, buf + 132, SALT_LENGTH);
  luks->iterations = qcow2_be32 (buf + 164);
  if (luks->iterations == 0)
    return qcow2_fail (error, EINVAL, "LUKS header: "
                       "the master key's iterations are 0");
  luks->material_length =
    (luks->spec.key_length * STRIPES + SECTOR - 1) / SECTOR * SECTOR;
  return 0;
}

/* Only an enabled slot's key material is ever read. */
static int
check_material (const struct luks *luks, const struct slot *slot, unsigned nr,
                uint64_t length, GError **error)
{
  if (slot->offset < FIRST_SLOT_SECTOR * SECTOR)
    return qcow2_fail (error, EINVAL, "LUKS key slot %u: the key material's "
                       "sector is %" PRIu64 ", but must be at least %d",
                       nr, slot->offset / SECTOR, FIRST_SLOT_SECTOR);
  if (slot->enabled && slot->offset + luks->material_length > length)
    return qcow2_fail (error, EINVAL, "LUKS key slot %u: the key material's "
                       "sector is %" PRIu64 ", but %" PRIu64 " bytes from "
                       "there are not inside the header (%" PRIu64 " bytes)",
                       nr, slot->offset / SECTOR, luks->material_length,
                       length);
  return 0;
}

static int
parse_slot (const struct luks *luks, struct slot *slot, unsigned nr,
            const uint8_t *buf, uint64_t length, GError **error)
{
  const uint32_t state = qcow2_be32 (buf);
  const uint32_t stripes = qcow2_be32 (buf + 44);

  slot->enabled = state == SLOT_ENABLED;
  slot->iterations = qcow2_be32 (buf + 4);
  memcpy (slot->salt, buf + 8, SALT_LENGTH);
  slot->offset = (uint64_t) qcow2_be32 (buf + 40) * SECTOR;

  if (!slot->enabled && state != SLOT_DISABLED)
    return qcow2_fail (error, EINVAL, "LUKS key slot %u: the state is 0x%"
                       PRIx32 ", but must be 0x%x (enabled) or 0x%x "
                       "(disabled)", nr, state, SLOT_ENABLED, SLOT_DISABLED);
  if (slot->enabled && slot->iterations == 0)
    return qcow2_fail (error, EINVAL,
                       "LUKS key slot %u: the iterations are 0", nr);
  if (stripes != STRIPES)
    return qcow2_fail (error, EINVAL, "LUKS key slot %u: stripes is %" PRIu32
                       ", but must be %d", nr, stripes, STRIPES);
  return check_material (luks, slot, nr, length, error);
}

static int
check_overlaps (const struct luks *luks, GError **error)
{
  for (unsigned i = 0; i < SLOTS; ++i) {
    for (unsigned j = i + 1; j < SLOTS; ++j) {
      const uint64_t a = luks->slots[i].offset, b = luks->slots[j].offset;

      if (MAX (a, b) - MIN (a, b) < luks->material_length)
        return qcow2_fail (error, EINVAL, "LUKS key slots %u and %u overlap: "
                           "their key material begins at sectors %" PRIu64
                           " and %" PRIu64, i, j, a / SECTOR, b / SECTOR);
    }
  }
  return 0;
}

/* Parse the header at buf; length is that of the whole header area. */
static int
parse (struct luks *luks, const uint8_t *buf, uint64_t length, GError **error)
{
  if (parse_head (luks, buf, error) == -1)
    return -1;
  for (unsigned i = 0; i < SLOTS; ++i) {
    const uint8_t *p = buf + HEADER_LENGTH - (SLOTS - i) * SLOT_LENGTH;

    if (parse_slot (luks, &luks->slots[i], i, p, length, error) == -1)
      return -1;
  }
  return check_overlaps (luks, error);
}

/* Key derivation. */

/* Find out how long an iteration takes: the best of a few tries, since
 * other work of the machine only makes it seem slower.
 */
static void
measure (struct luks *luks)
{
  uint8_t key[1];
  gint64 best = G_MAXINT64;

  for (int i = 0; i < 3; ++i) {
    const gint64 start = g_get_monotonic_time ();

    gcry_kdf_derive ("x", 1, GCRY_KDF_PBKDF2, luks->hash,
                     luks->salt, SALT_LENGTH, SAMPLE_ITERATIONS,
                     sizeof key, key);
    best = MIN (best, g_get_monotonic_time () - start);
  }
  luks->iteration_seconds = best / 1e6 / SAMPLE_ITERATIONS;
  luks->seconds_left = MAX_SECONDS;
}

/* PBKDF2 makes the key in pieces as long as the hash, each with all of
 * the iterations.  what has them.
 */
static int
derive (struct luks *luks, const char *what, uint32_t iterations,
        const uint8_t *salt, const void *secret, size_t secret_length,
        uint8_t *key, size_t key_length, GError **error)
{
  const size_t piece = gcry_md_get_algo_dlen (luks->hash);
  const double seconds = luks->iteration_seconds * iterations *
    ((key_length + piece - 1) / piece);
  gcry_error_t err;

  if (seconds > luks->seconds_left)
    return qcow2_fail (error, EINVAL, "LUKS header: %s iterations are %"
                       PRIu32 ", for which this machine needs %.0f seconds, "
                       "but all key derivations together may take at most %d",
                       what, iterations, seconds, MAX_SECONDS);
  luks->seconds_left -= seconds;

  err = gcry_kdf_derive (secret, secret_length, GCRY_KDF_PBKDF2, luks->hash,
                         salt, SALT_LENGTH, iterations, key_length, key);
  if (err)
    return qcow2_fail (error, ENOTSUP, "libgcrypt cannot derive a key: %s",
                       gcry_strerror (err));
  return 0;
}

/* The anti-forensic splitter's diffusion: buf is replaced by the hashes
 * of its pieces, each of which is as long as the hash (the last one may
 * be shorter) and preceded by its number.
 */
static void
diffuse (int hash, uint8_t *buf, size_t length)
{
  const size_t piece = gcry_md_get_algo_dlen (hash);
  uint8_t in[4 + QCOW2_CIPHER_MAX_KEY], out[QCOW2_CIPHER_MAX_KEY];
  uint32_t number = 0;

  while (length > 0) {
    const size_t n = MIN (piece, length);
    const uint32_t be = GUINT32_TO_BE (number);

    memcpy (in, &be, sizeof be);
    memcpy (in + sizeof be, buf, n);
    gcry_md_hash_buffer (hash, out, in, sizeof be + n);
    memcpy (buf, out, n);
    buf += n;
    length -= n;
    ++number;
  }
  explicit_bzero (in, sizeof in);
  explicit_bzero (out, sizeof out);
}

/* Merge the stripes into the key that they were split from. */
static void
merge (const struct luks *luks, const uint8_t *stripes, uint8_t *key)
{
  const size_t length = luks->spec.key_length;

  memset (key, 0, length);
  for (unsigned i = 0; i < STRIPES; ++i, stripes += length) {
    if (i > 0)
      diffuse (luks->hash, key, length);
    for (size_t j = 0; j < length; ++j)
      key[j] ^= stripes[j];
  }
}

/* Read a slot's key material and decrypt it with the slot's key, as a
 * disk of its own.
 */
static int
decrypt_material (const struct luks *luks, const struct qcow2_io *io,
                  uint64_t offset, const uint8_t *key,
                  uint8_t *material, GError **error)
{
  struct qcow2_cipher *cipher;
  int r;

  if (qcow2_io_read_exact (io, "LUKS key material", material,
                           luks->material_length, offset, error) == -1)
    return -1;
  cipher = qcow2_cipher_new (&luks->spec, key, error);
  if (!cipher)
    return -1;
  r = qcow2_cipher_decrypt (cipher, material, luks->material_length / SECTOR,
                            0, error);
  qcow2_cipher_free (cipher);
  return r;
}

/* Whether key is the master key: 1 or 0, or -1 with error set. */
static int
check_master_key (struct luks *luks, const uint8_t *key, GError **error)
{
  uint8_t digest[DIGEST_LENGTH];

  if (derive (luks, "the master key's", luks->iterations, luks->salt,
              key, luks->spec.key_length, digest, sizeof digest, error) == -1)
    return -1;
  return memcmp (digest, luks->digest, sizeof digest) == 0;
}

/* Try the passphrase on one slot.  Returns 1 with the master key in key,
 * 0 if the passphrase is not the slot's, or -1 with error set.
 */
static int
try_slot (struct luks *luks, const struct qcow2_io *io, uint64_t offset,
          unsigned nr, const char *passphrase, size_t passphrase_length,
          uint8_t *key, GError **error)
{
  const struct slot *slot = &luks->slots[nr];
  g_autofree char *what = g_strdup_printf ("key slot %u's", nr);
  uint8_t *material;
  int r = -1;

  if (derive (luks, what, slot->iterations, slot->salt,
              passphrase, passphrase_length, key, luks->spec.key_length,
              error) == -1)
    return -1;

  material = g_malloc (luks->material_length);
  if (decrypt_material (luks, io, offset + slot->offset, key,
                        material, error) == 0) {
    merge (luks, material, key);
    r = check_master_key (luks, key, error);
  }
  explicit_bzero (material, luks->material_length);
  g_free (material);
  return r;
}

/* Returns 0 with the master key in key, or -1 with error set. */
static int
unlock (struct luks *luks, const struct qcow2_io *io, uint64_t offset,
        const char *passphrase, size_t passphrase_length,
        uint8_t *key, GError **error)
{
  measure (luks);
  for (unsigned i = 0; i < SLOTS; ++i) {
    int r;

    if (!luks->slots[i].enabled)
      continue;
    r = try_slot (luks, io, offset, i, passphrase, passphrase_length,
                  key, error);
    if (r != 0)
      return r == 1 ? 0 : -1;
  }
  return qcow2_fail (error, EACCES,
                     "the passphrase does not open the image");
}

struct qcow2_cipher *
qcow2_luks_open (const struct qcow2_io *io, uint64_t offset, uint64_t length,
                 const char *passphrase, size_t passphrase_length,
                 GError **error)
{
  struct qcow2_cipher *cipher = NULL;
  struct luks luks = { 0 };
  uint8_t buf[HEADER_LENGTH];
  uint8_t key[QCOW2_CIPHER_MAX_KEY];

  if (length < HEADER_LENGTH) {
    qcow2_fail (error, EINVAL, "LUKS header length is %" PRIu64
                ", but must be at least %d", length, HEADER_LENGTH);
    return NULL;
  }
  if (qcow2_io_read_exact (io, "the LUKS header", buf, sizeof buf, offset,
                           error) == -1 ||
      parse (&luks, buf, length, error) == -1)
    return NULL;

  if (unlock (&luks, io, offset, passphrase, passphrase_length, key,
              error) == 0)
    cipher = qcow2_cipher_new (&luks.spec, key, error);
  explicit_bzero (key, sizeof key);
  return cipher;
}

#endif /* HAVE_LIBGCRYPT */
