/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The two ways in which a qcow2 image can be encrypted.
 *
 * AES, the legacy one: AES-128 in CBC mode.  The passphrase itself, cut
 * or padded with zeroes to 16 bytes, is the key, and the IV is the
 * number of the sector on the disk.
 *
 * LUKS: a complete LUKS1 header lies somewhere in the container, where a
 * header extension points to.  The IV comes from the number of the
 * sector in the container (the host offset); that LUKS header's payload
 * offset plays no part.
 */

#include <config.h>

#include <assert.h>
#include <inttypes.h>
#include <string.h>

#ifdef HAVE_LIBGCRYPT
#include <gcrypt.h>
#endif

#include "qcow2/cipher.h"
#include "qcow2/crypt.h"
#include "qcow2/error.h"
#include "qcow2/luks.h"

#ifdef HAVE_LIBGCRYPT

#define AES_KEY_LENGTH 16

/* QEMU's headers have at most 2 MiB, most of it key material. */
#define MAX_LUKS_LENGTH (UINT64_C (16) << 20)

struct qcow2_crypt {
  struct qcow2_cipher *cipher;
  bool host_sectors;            /* IVs come from the host offset */
};

/* Other code in the process may have set up libgcrypt before us, and in
 * another way.
 */
static void
init_libgcrypt (void)
{
  static gsize initialized = 0;

  if (!g_once_init_enter (&initialized))
    return;
  gcry_check_version (NULL);
  if (!gcry_control (GCRYCTL_INITIALIZATION_FINISHED_P)) {
    gcry_control (GCRYCTL_DISABLE_SECMEM, 0);
    gcry_control (GCRYCTL_INITIALIZATION_FINISHED, 0);
  }
  g_once_init_leave (&initialized, 1);
}

static struct qcow2_cipher *
open_aes (const char *passphrase, size_t length, GError **error)
{
  struct qcow2_cipher_spec spec;
  struct qcow2_cipher *cipher;
  uint8_t key[AES_KEY_LENGTH] = { 0 };

  if (length == 0) {
    qcow2_fail (error, EACCES,
                "the passphrase does not open the image: it is empty");
    return NULL;
  }
  if (qcow2_cipher_parse ("aes", "cbc-plain64", sizeof key, &spec,
                          error) == -1)
    return NULL;
  memcpy (key, passphrase, MIN (length, sizeof key));
  cipher = qcow2_cipher_new (&spec, key, error);
  explicit_bzero (key, sizeof key);
  return cipher;
}

/* Where the header extension says that the LUKS header is. */
static int
find_luks (const struct qcow2_header *header, const struct qcow2_io *io,
           uint64_t *offset, uint64_t *length, GError **error)
{
  const uint64_t cluster_size = UINT64_C (1) << header->cluster_bits;
  const uint64_t size = io->get_size (io);
  GBytes *extension = qcow2_header_find_extension (header, QCOW2_EXT_CRYPTO);
  const uint8_t *data;
  gsize data_length;

  if (!extension)
    return qcow2_fail (error, EINVAL, "crypt_method is 2 (LUKS), but there "
                       "is no header extension for the encryption");
  data = g_bytes_get_data (extension, &data_length);
  if (data_length != 16)
    return qcow2_fail (error, EINVAL, "the encryption header extension has "
                       "%zu bytes, but must have 16", (size_t) data_length);
  *offset = qcow2_be64 (data);
  *length = qcow2_be64 (data + 8);

  if (*offset & (cluster_size - 1))
    return qcow2_fail (error, EINVAL, "LUKS header offset %" PRIu64
                       " is not a multiple of the cluster size %" PRIu64,
                       *offset, cluster_size);
  if (*length > MAX_LUKS_LENGTH)
    return qcow2_fail (error, EINVAL, "LUKS header length is %" PRIu64
                       ", but must be at most %" PRIu64,
                       *length, MAX_LUKS_LENGTH);
  if (*offset > size || *length > size - *offset)
    return qcow2_fail (error, EINVAL, "the LUKS header at offset %" PRIu64
                       " (%" PRIu64 " bytes) ends beyond the end of the file "
                       "(%" PRIu64 " bytes)", *offset, *length, size);
  return 0;
}

static struct qcow2_cipher *
open_luks (const struct qcow2_header *header, const struct qcow2_io *io,
           const char *passphrase, size_t length, GError **error)
{
  uint64_t luks_offset = 0, luks_length = 0;

  if (find_luks (header, io, &luks_offset, &luks_length, error) == -1)
    return NULL;
  return qcow2_luks_open (io, luks_offset, luks_length,
                          passphrase, length, error);
}

struct qcow2_crypt *
qcow2_crypt_open (const struct qcow2_header *header, const struct qcow2_io *io,
                  const char *passphrase, size_t length, GError **error)
{
  const bool luks = header->crypt_method == QCOW2_CRYPT_LUKS;
  struct qcow2_cipher *cipher;
  struct qcow2_crypt *crypt;

  init_libgcrypt ();
  cipher = luks ? open_luks (header, io, passphrase, length, error)
                : open_aes (passphrase, length, error);
  if (!cipher)
    return NULL;

  crypt = g_new (struct qcow2_crypt, 1);
  crypt->cipher = cipher;
  crypt->host_sectors = luks;
  return crypt;
}

void
qcow2_crypt_close (struct qcow2_crypt *crypt)
{
  if (!crypt)
    return;
  qcow2_cipher_free (crypt->cipher);
  g_free (crypt);
}

int
qcow2_crypt_decrypt (struct qcow2_crypt *crypt, void *buf, size_t count,
                     uint64_t guest_offset, uint64_t host_offset,
                     GError **error)
{
  const uint64_t offset = crypt->host_sectors ? host_offset : guest_offset;

  assert ((count | offset) % QCOW2_CIPHER_SECTOR == 0);
  return qcow2_cipher_decrypt (crypt->cipher, buf,
                               count / QCOW2_CIPHER_SECTOR,
                               offset / QCOW2_CIPHER_SECTOR, error);
}

#else /* !HAVE_LIBGCRYPT */

struct qcow2_crypt *
qcow2_crypt_open (const struct qcow2_header *header, const struct qcow2_io *io,
                  const char *passphrase, size_t length, GError **error)
{
  qcow2_fail (error, ENOTSUP, "the image is encrypted, but this build has "
              "no support for encryption");
  return NULL;
}

void
qcow2_crypt_close (struct qcow2_crypt *crypt)
{
}

int
qcow2_crypt_decrypt (struct qcow2_crypt *crypt, void *buf, size_t count,
                     uint64_t guest_offset, uint64_t host_offset,
                     GError **error)
{
  return qcow2_fail (error, ENOTSUP,
                     "this build has no support for encryption");
}

#endif /* !HAVE_LIBGCRYPT */
