/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "qcow2/crypt.h"
#include "qcow2/error.h"

#include "chain.h"
#include "qcow2-filter.h"

/* The part of a LUKS header that belongs to the master key: all that is
 * in front of the key slots' own data, the key's digest and salt
 * included.
 */
#define LUKS_HEADER_LENGTH 592

static GMutex keys_lock;
static GHashTable *keys;        /* GBytes -> struct qcow2_crypt */

/* What identifies the key of an image. */
static GBytes *
key_identity (const struct qcow2_image *image, const struct qcow2_io *io,
              GError **error)
{
  const struct qcow2_header *header = image->header;
  GBytes *place = qcow2_header_find_extension (header, QCOW2_EXT_CRYPTO);
  uint8_t id[1 + LUKS_HEADER_LENGTH] = { header->crypt_method };

  if (header->crypt_method == QCOW2_CRYPT_LUKS) {
    if (!place || g_bytes_get_size (place) < 16) {
      qcow2_fail (error, EINVAL, "the image is encrypted with LUKS, but its "
                  "header does not say where the LUKS header is");
      return NULL;
    }
    if (qcow2_io_read_exact (io, "the LUKS header", id + 1,
                             LUKS_HEADER_LENGTH,
                             qcow2_be64 (g_bytes_get_data (place, NULL)),
                             error) == -1)
      return NULL;
  }
  return g_bytes_new (id, sizeof id);
}

/* Try every passphrase that was given. */
static struct qcow2_crypt *
derive (const struct qcow2_image *image, const struct qcow2_io *io,
        GError **error)
{
  struct qcow2_crypt *crypt = NULL;

  if (config.passphrases->len == 0) {
    qcow2_fail (error, EACCES, "the image is encrypted (%s): a passphrase is "
                "needed, see qcow2-passphrase",
                image->header->crypt_method == QCOW2_CRYPT_LUKS ?
                "LUKS" : "legacy AES");
    return NULL;
  }
  for (guint i = 0; i < config.passphrases->len && !crypt; ++i) {
    const char *passphrase = g_ptr_array_index (config.passphrases, i);

    g_clear_error (error);
    crypt = qcow2_crypt_open (image->header, io, passphrase,
                              strlen (passphrase), error);
  }
  return crypt;
}

static void
crypt_free (gpointer p)
{
  qcow2_crypt_close (p);
}

int
keys_get (const struct qcow2_image *image, const struct qcow2_io *io,
          struct qcow2_crypt **crypt, GError **error)
{
  GBytes *id;

  *crypt = NULL;
  if (image->header->crypt_method == QCOW2_CRYPT_NONE)
    return 0;
  id = key_identity (image, io, error);
  if (!id)
    return -1;

  /* Held while deriving: connections that come at once derive once. */
  g_mutex_lock (&keys_lock);
  if (!keys)
    keys = g_hash_table_new_full (g_bytes_hash, g_bytes_equal,
                                  (GDestroyNotify) g_bytes_unref, crypt_free);
  *crypt = g_hash_table_lookup (keys, id);
  if (!*crypt) {
    *crypt = derive (image, io, error);
    if (*crypt)
      g_hash_table_insert (keys, g_bytes_ref (id), *crypt);
  }
  g_mutex_unlock (&keys_lock);
  g_bytes_unref (id);
  return *crypt ? 0 : -1;
}

void
keys_forget_all (void)
{
  g_clear_pointer (&keys, g_hash_table_unref);
}
