/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Encrypted images.
 *
 * qemu-img takes more than two seconds to make one (it measures how fast
 * it derives keys) and on some machines fails to measure, so only a few
 * are made by it.  For all the ciphers, its image gets a LUKS header made
 * by test-luks.c; QEMU opens that and writes the data.
 */

#include <config.h>

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <glib.h>
#include <glib/gstdio.h>

#include "qcow2/crypt.h"
#include "qcow2/error.h"
#include "qcow2/image.h"
#include "qcow2/mapping.h"
#include "qcow2/test-luks.h"
#include "qcow2/twofish.h"

/* Twofish: the vectors of its specification, which has the key bytes in
 * this order and a plaintext of zeroes (appendix B.2).
 */
static void
test_twofish (void)
{
  static const uint8_t key[32] = {
    0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef,
    0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10,
    0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77,
    0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
  };
  static const uint8_t expected[2][QCOW2_TWOFISH_BLOCK] = {
    { 0xcf, 0xd1, 0xd2, 0xe5, 0xa9, 0xbe, 0x9c, 0xdf,
      0x50, 0x1f, 0x13, 0xb8, 0x92, 0xbd, 0x22, 0x48 },
    { 0x37, 0x52, 0x7b, 0xe0, 0x05, 0x23, 0x34, 0xb8,
      0x9f, 0x0c, 0xfc, 0xca, 0xe8, 0x7c, 0xfa, 0x20 },
  };
  static const uint8_t zeroes[QCOW2_TWOFISH_BLOCK];
  struct qcow2_twofish twofish;
  uint8_t block[QCOW2_TWOFISH_BLOCK];

  for (unsigned i = 0; i < 2; ++i) {
    memset (block, 0, sizeof block);
    qcow2_twofish_set_key (&twofish, key, 24 + 8 * i);
    qcow2_twofish_encrypt (&twofish, block);
    g_assert_cmpmem (block, sizeof block, expected[i], sizeof expected[i]);
    qcow2_twofish_decrypt (&twofish, block);
    g_assert_cmpmem (block, sizeof block, zeroes, sizeof zeroes);
  }
}

#ifdef HAVE_LIBGCRYPT

#define CLUSTER 65536
#define DATA_LENGTH (300 * 512) /* more than a batch of sectors */
#define PASSPHRASE "correct horse"

/* A container in memory. */

struct container {
  struct qcow2_io io;
  uint8_t *data;
  uint64_t size;
};

static int
container_pread (const struct qcow2_io *io, void *buf, size_t count,
                 uint64_t offset, GError **error)
{
  const struct container *container = (const struct container *) io;

  g_assert_cmpuint (offset, <=, container->size);
  g_assert_cmpuint (count, <=, container->size - offset);
  memcpy (buf, container->data + offset, count);
  return 0;
}

static uint64_t
container_get_size (const struct qcow2_io *io)
{
  return ((const struct container *) io)->size;
}

static void
container_init (struct container *container, void *data, uint64_t size)
{
  container->io.pread = container_pread;
  container->io.get_size = container_get_size;
  container->data = data;
  container->size = size;
}

/* A header, of which only what the encryption needs is filled in, and
 * the LUKS header that belongs to it.
 */
struct fixture {
  struct qcow2_header header;
  struct qcow2_extension extension;
  uint8_t extension_data[16];
  struct container container;
};

static void
put64 (uint8_t *p, uint64_t v)
{
  v = GUINT64_TO_BE (v);
  memcpy (p, &v, sizeof v);
}

static void
set_extension (struct fixture *f, uint64_t offset, uint64_t length)
{
  put64 (f->extension_data, offset);
  put64 (f->extension_data + 8, length);
}

static struct fixture *
fixture_new (const struct test_luks *luks)
{
  struct fixture *f = g_new0 (struct fixture, 1);
  const uint64_t size = CLUSTER + TEST_LUKS_LENGTH;

  f->extension.type = QCOW2_EXT_CRYPTO;
  f->extension.data = g_bytes_new_static (f->extension_data,
                                          sizeof f->extension_data);
  set_extension (f, CLUSTER, TEST_LUKS_LENGTH);
  f->header.cluster_bits = 16;
  f->header.crypt_method = QCOW2_CRYPT_LUKS;
  f->header.extensions = g_ptr_array_new ();
  g_ptr_array_add (f->header.extensions, &f->extension);
  container_init (&f->container, g_malloc0 (size), size);
  test_luks_format (luks, f->container.data + CLUSTER);
  return f;
}

static void
fixture_free (struct fixture *f)
{
  g_ptr_array_unref (f->header.extensions);
  g_bytes_unref (f->extension.data);
  g_free (f->container.data);
  g_free (f);
}

static struct qcow2_crypt *
fixture_open (struct fixture *f, const char *passphrase, GError **error)
{
  return qcow2_crypt_open (&f->header, &f->container.io,
                           passphrase, strlen (passphrase), error);
}

static void
assert_opens (struct fixture *f, const char *passphrase)
{
  g_autoptr (GError) error = NULL;
  struct qcow2_crypt *crypt = fixture_open (f, passphrase, &error);

  g_assert_no_error (error);
  g_assert_nonnull (crypt);
  qcow2_crypt_close (crypt);
}

static void
assert_fails (struct fixture *f, const char *passphrase,
              int code, const char *message)
{
  g_autoptr (GError) error = NULL;

  g_assert_null (fixture_open (f, passphrase, &error));
  g_assert_error (error, QCOW2_ERROR, code);
  if (!strstr (error->message, message))
    g_error ("\"%s\" is not in \"%s\"", message, error->message);
}

/* The data that is encrypted everywhere. */
static uint8_t test_data[DATA_LENGTH];

static void
make_data (void)
{
  uint32_t x = 1;

  for (size_t i = 0; i < sizeof test_data; ++i) {
    x = x * 1103515245 + 12345;
    test_data[i] = x >> 16;
  }
}

/* All that QEMU can do. */

static const char *const all_modes[] = { "xts", "cbc", "ecb", "ctr" };

static const struct {
  const char *name, *hash;
} all_ivgens[] = {
  { "plain", NULL }, { "plain64", NULL },
  { "essiv", "sha256" }, { "essiv", "md5" },
};

static const char *const all_hashes[] = {
  "md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160",
};

static const struct test_luks all_ciphers[] = {
  { .cipher = "aes", .bits = 128 },
  { .cipher = "aes", .bits = 192 },
  { .cipher = "aes", .bits = 256 },
  { .cipher = "twofish", .bits = 128 },
  { .cipher = "twofish", .bits = 256 },
  { .cipher = "serpent", .bits = 128 },
  { .cipher = "serpent", .bits = 192 },
  { .cipher = "serpent", .bits = 256 },
  { .cipher = "cast5", .bits = 128 },
};

static const struct test_luks default_luks = {
  "aes", 256, "xts", "plain64", NULL, "sha256"
};

/* CAST5 has short blocks and only one key length. */
static bool
is_possible (const struct test_luks *luks)
{
  return !g_str_equal (luks->cipher, "cast5") ||
    (!g_str_equal (luks->mode, "xts") && !luks->ivgen_hash);
}

/* Call test for each mode and IV generator with the cipher. */
static void
for_all_modes (const struct test_luks *cipher,
               void (*test) (const struct test_luks *luks))
{
  struct test_luks luks = *cipher;

  for (size_t i = 0; i < G_N_ELEMENTS (all_modes); ++i) {
    for (size_t j = 0; j < G_N_ELEMENTS (all_ivgens); ++j) {
      luks.mode = all_modes[i];
      luks.ivgen = all_ivgens[j].name;
      luks.ivgen_hash = all_ivgens[j].hash;
      luks.hash = "sha256";
      if (is_possible (&luks)) {
        g_test_message ("%s-%u %s-%s:%s", luks.cipher, luks.bits, luks.mode,
                        luks.ivgen, luks.ivgen_hash ? luks.ivgen_hash : "");
        test (&luks);
      }
    }
  }
}

static void
for_all_hashes (void (*test) (const struct test_luks *luks))
{
  struct test_luks luks = default_luks;

  for (size_t i = 0; i < G_N_ELEMENTS (all_hashes); ++i) {
    luks.hash = all_hashes[i];
    g_test_message ("%s", luks.hash);
    test (&luks);
  }
}

/* Decrypting what test-luks.c encrypted. */

/* Decrypt the data in pieces of various lengths, so that each begins at
 * another sector.
 */
static void
decrypt_pieces (struct qcow2_crypt *crypt, uint8_t *buf,
                uint64_t guest_offset, uint64_t host_offset)
{
  g_autoptr (GError) error = NULL;
  size_t offset = 0;

  for (size_t n = 512; offset < DATA_LENGTH; offset += n, n += 7 * 512) {
    n = MIN (n, DATA_LENGTH - offset);
    qcow2_crypt_decrypt (crypt, buf + offset, n, guest_offset + offset,
                         host_offset + offset, &error);
    g_assert_no_error (error);
  }
}

/* At a host offset whose sector number has more than 32 bits. */
static void
check_in_memory (const struct test_luks *luks)
{
  const uint64_t host_offset = UINT64_C (0x12345678000) * 512 - 4 * 512;
  g_autofree uint8_t *buf = g_memdup2 (test_data, DATA_LENGTH);
  g_autoptr (GError) error = NULL;
  struct fixture *f = fixture_new (luks);
  struct qcow2_crypt *crypt;

  test_luks_enable (luks, f->container.data + CLUSTER, 0, PASSPHRASE);
  crypt = fixture_open (f, PASSPHRASE, &error);
  g_assert_no_error (error);
  test_luks_encrypt (luks, buf, DATA_LENGTH / 512, host_offset / 512);
  decrypt_pieces (crypt, buf, 0, host_offset);
  g_assert_cmpmem (buf, DATA_LENGTH, test_data, DATA_LENGTH);
  qcow2_crypt_close (crypt);
  fixture_free (f);
}

static void
test_memory (gconstpointer cipher)
{
  for_all_modes (cipher, check_in_memory);
}

static void
test_memory_hashes (void)
{
  for_all_hashes (check_in_memory);
}

/* The legacy encryption; it is LUKS's aes-128-cbc-plain64 with another
 * key, so only QEMU can tell whether it is right.
 */
static void
test_aes_passphrases (void)
{
  struct fixture *f = fixture_new (&default_luks);

  f->header.crypt_method = QCOW2_CRYPT_AES;
  g_ptr_array_set_size (f->header.extensions, 0);
  assert_fails (f, "", EACCES, "the passphrase does not open the image");
  assert_opens (f, "x");
  assert_opens (f, "longer than the sixteen bytes that count");
  fixture_free (f);
}

static void
test_slots (void)
{
  struct fixture *f = fixture_new (&default_luks);
  uint8_t *area = f->container.data + CLUSTER;

  assert_fails (f, "two", EACCES, "the passphrase does not open the image");
  test_luks_enable (&default_luks, area, 2, "two");
  test_luks_enable (&default_luks, area, 7, "seven");
  test_luks_enable (&default_luks, area, 4, "");
  assert_opens (f, "two");
  assert_opens (f, "seven");
  assert_opens (f, "");
  assert_fails (f, "tw", EACCES, "the passphrase does not open the image");
  assert_fails (f, "two ", EACCES, "the passphrase does not open the image");
  fixture_free (f);
}

/* Many threads with one crypt. */

struct thread_data {
  struct qcow2_crypt *crypt;
  const uint8_t *encrypted;
};

static gpointer
decrypt_often (gpointer p)
{
  const struct thread_data *data = p;

  for (unsigned i = 0; i < 50; ++i) {
    g_autofree uint8_t *buf = g_memdup2 (data->encrypted, DATA_LENGTH);

    decrypt_pieces (data->crypt, buf, 0, 0);
    g_assert_cmpmem (buf, DATA_LENGTH, test_data, DATA_LENGTH);
  }
  return NULL;
}

static void
test_threads (void)
{
  g_autofree uint8_t *buf = g_memdup2 (test_data, DATA_LENGTH);
  struct fixture *f = fixture_new (&default_luks);
  struct thread_data data = { .encrypted = buf };
  GThread *threads[8];

  test_luks_enable (&default_luks, f->container.data + CLUSTER, 0,
                    PASSPHRASE);
  test_luks_encrypt (&default_luks, buf, DATA_LENGTH / 512, 0);
  data.crypt = fixture_open (f, PASSPHRASE, NULL);
  g_assert_nonnull (data.crypt);
  for (size_t i = 0; i < G_N_ELEMENTS (threads); ++i)
    threads[i] = g_thread_new ("decrypt", decrypt_often, &data);
  for (size_t i = 0; i < G_N_ELEMENTS (threads); ++i)
    g_thread_join (threads[i]);
  qcow2_crypt_close (data.crypt);
  fixture_free (f);
}

/* Hostile headers. */

#define SLOT(nr, field) (208 + 48 * (nr) + (field))
#define NAME32 "12345678901234567890123456789012"
#define NAME31_NUL "aes\0" "5678901234567890123456789012"

/* A change to the header, whose slot 0 opens with PASSPHRASE.  code is 0
 * if it does so nevertheless.
 */
static const struct edit {
  const char *name;
  unsigned offset;
  unsigned length;
  const char *bytes;
  int code;
  const char *message;
} edits[] = {
  { "magic", 0, 1, "l", EINVAL, "magic" },
  { "version 0", 6, 2, "\0\0", ENOTSUP, "version is 0" },
  { "version 2", 6, 2, "\0\2", ENOTSUP, "version is 2" },
  { "cipher without NUL", 8, 32, NAME32, EINVAL, "cipher name" },
  { "cipher and junk", 8, 32, NAME31_NUL, 0, NULL },
  { "cipher in capitals", 8, 4, "AES", ENOTSUP, "cipher is \"AES\"" },
  { "no cipher", 8, 1, "\0", ENOTSUP, "cipher is \"\"" },
  { "control characters", 8, 4, "a\n\33", ENOTSUP, "\"a\\n\\033\"" },
  { "mode without NUL", 40, 32, NAME32, EINVAL, "cipher mode" },
  { "no IV generator", 40, 4, "xts", ENOTSUP, "cipher mode is \"xts\"" },
  { "unknown mode", 40, 10, "lrw-plain", ENOTSUP, "\"lrw-plain\"" },
  { "unknown generator", 40, 10, "xts-benbi", ENOTSUP, "\"xts-benbi\"" },
  { "superfluous hash", 40, 19, "xts-plain64:sha256", 0, NULL },
  { "ESSIV without hash", 40, 10, "xts-essiv", ENOTSUP, "\"xts-essiv\"" },
  { "ESSIV, unknown hash", 40, 14, "xts-essiv:foo", ENOTSUP, "essiv:foo" },
  { "ESSIV, wrong length", 40, 15, "xts-essiv:sha1", ENOTSUP, "essiv:sha1" },
  { "hash without NUL", 72, 32, NAME32, EINVAL, "hash name" },
  { "unknown hash", 72, 7, "sha257", ENOTSUP, "hash is \"sha257\"" },
  { "payload 0", 104, 4, "\0\0\0\0", 0, NULL },
  { "payload huge", 104, 4, "\377\377\377\377", 0, NULL },
  { "no key", 108, 4, "\0\0\0\0", ENOTSUP, "key of 0 bytes" },
  { "odd key", 108, 4, "\0\0\0\77", ENOTSUP, "key of 63 bytes" },
  { "half key", 108, 4, "\0\0\0\40", EACCES, "the passphrase" },
  { "huge key", 108, 4, "\377\377\377\377", ENOTSUP, "of 4294967295 bytes" },
  { "huge even key", 108, 4, "\200\0\0\100", ENOTSUP, "of 2147483712 bytes" },
  { "digest", 112, 1, "x", EACCES, "the passphrase" },
  { "no iterations", 164, 4, "\0\0\0\0", EINVAL, "iterations are 0" },
  { "all iterations", 164, 4, "\377\377\377\377", EINVAL,
    "the master key's iterations are 4294967295" },
  { "UUID without NUL", 168, 32, NAME32, 0, NULL },

  { "slot 0 state", SLOT (0, 0), 4, "\0\0\0\1", EINVAL, "key slot 0" },
  { "slot 7 state", SLOT (7, 0), 4, "\0\0\0\0", EINVAL, "key slot 7" },
  { "slot 0 iterations", SLOT (0, 4), 4, "\0\0\0\0", EINVAL,
    "iterations are 0" },
  { "slot 0 all iterations", SLOT (0, 4), 4, "\377\377\377\377", EINVAL,
    "key slot 0's iterations are 4294967295" },
  { "slot 1 not enabled", SLOT (1, 4), 4, "\377\377\377\377", 0, NULL },
  { "slot 1 not needed", SLOT (1, 0), 8, "\0\254\161\363\377\377\377\377",
    0, NULL },
  { "slot 0 salt", SLOT (0, 8), 1, "x", EACCES, "the passphrase" },
  { "slot 0 at 0", SLOT (0, 40), 4, "\0\0\0\0", EINVAL, "sector is 0" },
  { "slot 0 in header", SLOT (0, 40), 4, "\0\0\0\7", EINVAL, "sector is 7" },
  { "slot 0 far away", SLOT (0, 40), 4, "\377\377\377\377", EINVAL,
    "sector is 4294967295" },
  { "slot 0 over the end", SLOT (0, 40), 4, "\0\0\15\325", EINVAL,
    "sector is 3541" },
  { "slot 0 overlaps 1", SLOT (0, 40), 4, "\0\0\0\144", EINVAL,
    "slots 0 and 1 overlap" },
  { "slot 7 overlaps 6", SLOT (7, 40), 4, "\0\0\13\330", EINVAL,
    "slots 6 and 7 overlap" },
  { "slot 7 far away", SLOT (7, 40), 4, "\377\377\377\377", 0, NULL },
  { "slot 0 no stripes", SLOT (0, 44), 4, "\0\0\0\0", EINVAL, "stripes is 0" },
  { "slot 0 stripes", SLOT (0, 44), 4, "\377\377\377\377", EINVAL,
    "stripes is 4294967295" },
  { "slot 7 stripes", SLOT (7, 44), 4, "\0\0\17\237", EINVAL,
    "stripes is 3999" },
};

static void
test_hostile (void)
{
  struct fixture *f = fixture_new (&default_luks);
  uint8_t *area = f->container.data + CLUSTER;
  uint8_t good[592];

  test_luks_enable (&default_luks, area, 0, PASSPHRASE);
  memcpy (good, area, sizeof good);
  for (size_t i = 0; i < G_N_ELEMENTS (edits); ++i) {
    const struct edit *edit = &edits[i];

    g_test_message ("%s", edit->name);
    memcpy (area + edit->offset, edit->bytes, edit->length);
    if (edit->code)
      assert_fails (f, PASSPHRASE, edit->code, edit->message);
    else
      assert_opens (f, PASSPHRASE);
    memcpy (area, good, sizeof good);
  }
  assert_opens (f, PASSPHRASE);
  fixture_free (f);
}

/* The header extension, and where it points to. */
static void
test_extension (void)
{
  struct fixture *f = fixture_new (&default_luks);
  const uint64_t size = f->container.size;

  test_luks_enable (&default_luks, f->container.data + CLUSTER, 0,
                    PASSPHRASE);
  set_extension (f, CLUSTER, 4096 + 256000);
  assert_opens (f, PASSPHRASE);
  set_extension (f, CLUSTER, 4096 + 256000 - 1);
  assert_fails (f, PASSPHRASE, EINVAL, "key slot 0: the key material");
  set_extension (f, CLUSTER, 592);
  assert_fails (f, PASSPHRASE, EINVAL, "key slot 0: the key material");
  set_extension (f, CLUSTER, 591);
  assert_fails (f, PASSPHRASE, EINVAL, "length is 591");
  set_extension (f, CLUSTER, 0);
  assert_fails (f, PASSPHRASE, EINVAL, "length is 0");
  set_extension (f, CLUSTER, (16 << 20) + 1);
  assert_fails (f, PASSPHRASE, EINVAL, "length is 16777217");
  set_extension (f, CLUSTER, UINT64_MAX);
  assert_fails (f, PASSPHRASE, EINVAL, "length is 18446744073709551615");
  set_extension (f, 0, TEST_LUKS_LENGTH);
  assert_fails (f, PASSPHRASE, EINVAL, "magic");
  set_extension (f, CLUSTER + 512, 4096);
  assert_fails (f, PASSPHRASE, EINVAL, "not a multiple");
  set_extension (f, UINT64_MAX << 16, 4096);
  assert_fails (f, PASSPHRASE, EINVAL, "beyond the end of the file");
  set_extension (f, CLUSTER, TEST_LUKS_LENGTH + 1);
  assert_fails (f, PASSPHRASE, EINVAL, "beyond the end of the file");
  set_extension (f, CLUSTER, TEST_LUKS_LENGTH);
  f->container.size = size - 1;
  assert_fails (f, PASSPHRASE, EINVAL, "beyond the end of the file");
  f->container.size = size;

  g_bytes_unref (f->extension.data);
  f->extension.data = g_bytes_new_static (f->extension_data, 15);
  assert_fails (f, PASSPHRASE, EINVAL, "extension has 15 bytes");
  g_ptr_array_set_size (f->header.extensions, 0);
  assert_fails (f, PASSPHRASE, EINVAL, "no header extension");
  fixture_free (f);
}

/* QEMU. */

static char *directory;
static char *qemu_img, *qemu_io; /* NULL if not there */

static char *
find_tool (const char *variable, const char *name)
{
  const char *value = g_getenv (variable);

  /* Set but empty: configure did not find it. */
  if (value)
    return *value ? g_strdup (value) : NULL;
  return g_find_program_in_path (name);
}

static char *
path_of (const char *name)
{
  return g_build_filename (directory, name, NULL);
}

/* Run a command whose words are separated by "|".  Returns false if it
 * fails, with what it says on stderr.
 */
static bool
run_command (const char *command, char **messages)
{
  g_auto (GStrv) argv = g_strsplit (command, "|", 0);
  g_autoptr (GError) error = NULL;
  int status;

  g_spawn_sync (NULL, argv, NULL, G_SPAWN_STDOUT_TO_DEV_NULL, NULL, NULL,
                NULL, messages, &status, &error);
  g_assert_no_error (error);
  return g_spawn_check_wait_status (status, NULL);
}

/* qemu-img now and then says that it was unable to measure. */
static void
run_qemu_img (const char *arguments)
{
  g_autofree char *command = g_strdup_printf ("%s|%s", qemu_img, arguments);

  for (unsigned tries = 0; ; ++tries) {
    g_autofree char *messages = NULL;

    if (run_command (command, &messages))
      return;
    if (tries == 50 || !strstr (messages, "CPU usage"))
      g_error ("%s: %s", command, messages);
  }
}

/* Make an image with a secret in QEMU's encrypt.* options. */
static void
create_image (const char *path, const char *options)
{
  g_autofree char *arguments =
    g_strdup_printf ("create|-q|-f|qcow2|--object|secret,id=s,data=%s|"
                     "-o|encrypt.key-secret=s,%s|%s|1M",
                     PASSPHRASE, options, path);

  run_qemu_img (arguments);
}

/* Have QEMU write the data; the first and the last cluster are only
 * partly written.
 */
#define GUEST_OFFSET (CLUSTER + 3 * 512)

static void
write_data (const char *path)
{
  g_autofree char *pattern = path_of ("pattern");
  g_autofree char *messages = NULL;
  g_autofree char *command =
    g_strdup_printf ("%s|--object|secret,id=s,data=%s|--image-opts|"
                     "driver=qcow2,file.filename=%s,encrypt.key-secret=s|"
                     "-c|write -s %s %d %d", qemu_io, PASSPHRASE, path,
                     pattern, GUEST_OFFSET, DATA_LENGTH);

  if (!run_command (command, &messages) || *messages)
    g_error ("%s: %s", command, messages);
}

static void
load_container (struct container *container, const char *path)
{
  g_autoptr (GError) error = NULL;
  char *data;
  gsize size;

  g_file_get_contents (path, &data, &size, &error);
  g_assert_no_error (error);
  container_init (container, data, size);
}

static void
save_container (const struct container *container, const char *path)
{
  FILE *fp = fopen (path, "wb");

  g_assert_nonnull (fp);
  g_assert_cmpuint (fwrite (container->data, 1, container->size, fp), ==,
                    container->size);
  g_assert_cmpint (fclose (fp), ==, 0);
}

/* Read the whole disk of 1 MiB. */
static void
read_disk (struct qcow2_image *image, struct qcow2_crypt *crypt,
           const struct qcow2_io *io, uint8_t *disk)
{
  g_autoptr (GError) error = NULL;
  struct qcow2_view view;
  struct qcow2_run run;

  qcow2_image_active_view (image, &view);
  g_assert_cmpuint (view.size, ==, 1 << 20);
  memset (disk, 0, view.size);
  for (uint64_t offset = 0; offset < view.size; offset += run.length) {
    qcow2_map (image, &view, io, offset, view.size - offset, &run, &error);
    g_assert_no_error (error);
    if (run.type != QCOW2_RUN_DATA)
      continue;
    qcow2_io_read_padded (io, CLUSTER, disk + offset, run.length,
                          run.host_offset, &error);
    g_assert_no_error (error);
    qcow2_crypt_decrypt (crypt, disk + offset, run.length, offset,
                         run.host_offset, &error);
    g_assert_no_error (error);
  }
}

/* Check that the image has what write_data wrote. */
static void
check_image (const char *path, const char *passphrase)
{
  g_autofree uint8_t *disk = g_malloc (1 << 20);
  g_autofree uint8_t *expected = g_malloc0 (1 << 20);
  g_autoptr (GError) error = NULL;
  struct container container;
  struct qcow2_image *image;
  struct qcow2_crypt *crypt;

  load_container (&container, path);
  image = qcow2_image_open (&container.io, &error);
  g_assert_no_error (error);
  crypt = qcow2_crypt_open (image->header, &container.io,
                            passphrase, strlen (passphrase), &error);
  g_assert_no_error (error);
  read_disk (image, crypt, &container.io, disk);
  memcpy (expected + GUEST_OFFSET, test_data, DATA_LENGTH);
  g_assert_cmpmem (disk, 1 << 20, expected, 1 << 20);
  qcow2_crypt_close (crypt);
  qcow2_image_close (image);
  g_free (container.data);
}

/* An empty image made by qemu-img, whose LUKS header has room for any
 * other.
 */
static const char *
get_base (void)
{
  static char *path;

  if (!path) {
    path = path_of ("base.qcow2");
    create_image (path, "encrypt.format=luks,encrypt.iter-time=10");
  }
  return path;
}

static void
replace_luks_header (struct container *container,
                     const struct test_luks *luks)
{
  g_autofree uint8_t *area = g_malloc (TEST_LUKS_LENGTH);
  g_autoptr (GError) error = NULL;
  struct qcow2_header *header = qcow2_header_load (&container->io, &error);
  const uint8_t *extension;
  uint64_t offset;

  g_assert_no_error (error);
  extension =
    g_bytes_get_data (qcow2_header_find_extension (header, QCOW2_EXT_CRYPTO),
                      NULL);
  offset = qcow2_be64 (extension);
  g_assert_cmpuint (qcow2_be64 (extension + 8), >=, TEST_LUKS_LENGTH);
  qcow2_header_free (header);

  test_luks_format (luks, area);
  test_luks_enable (luks, area, 0, PASSPHRASE);
  memcpy (container->data + offset, area, TEST_LUKS_LENGTH);
}

static void
check_with_qemu (const struct test_luks *luks)
{
  g_autofree char *path = path_of ("test.qcow2");
  struct container container;

  /* QEMU 7.2 aborts if the key material does not end with a sector. */
  if (test_luks_key_length (luks) % 16 != 0)
    return;
  load_container (&container, get_base ());
  replace_luks_header (&container, luks);
  save_container (&container, path);
  g_free (container.data);
  write_data (path);
  check_image (path, PASSPHRASE);
}

static bool
skip_without_qemu (void)
{
  if (qemu_img && qemu_io)
    return false;
  g_test_skip ("qemu-img or qemu-io not found");
  return true;
}

static void
test_qemu (gconstpointer cipher)
{
  if (!skip_without_qemu ())
    for_all_modes (cipher, check_with_qemu);
}

static void
test_qemu_hashes (void)
{
  if (!skip_without_qemu ())
    for_all_hashes (check_with_qemu);
}

/* Twofish with 192 bits: only QEMU can make it for us. */
static void
test_qemu_twofish_192 (void)
{
  g_autofree char *path = path_of ("twofish.qcow2");

  if (skip_without_qemu ())
    return;
  create_image (path, "encrypt.format=luks,encrypt.iter-time=10,"
                "encrypt.cipher-alg=twofish-192");
  write_data (path);
  check_image (path, PASSPHRASE);
}

static void
test_qemu_aes (void)
{
  g_autofree char *path = path_of ("aes.qcow2");

  if (skip_without_qemu ())
    return;
  create_image (path, "encrypt.format=aes");
  write_data (path);
  check_image (path, PASSPHRASE);
}

/* An image of which nothing is ours, and a key slot added to it. */
static void
test_qemu_slots (void)
{
  g_autofree char *path = path_of ("slots.qcow2");
  g_autofree char *amend =
    g_strdup_printf ("amend|--object|secret,id=s,data=%s|"
                     "--object|secret,id=n,data=another|"
                     "-o|encrypt.state=active,encrypt.new-secret=n,"
                     "encrypt.keyslot=5,encrypt.iter-time=10|--image-opts|"
                     "driver=qcow2,file.filename=%s,encrypt.key-secret=s",
                     PASSPHRASE, path);
  struct container container;

  if (skip_without_qemu ())
    return;
  load_container (&container, get_base ());
  save_container (&container, path);
  g_free (container.data);
  write_data (path);
  check_image (path, PASSPHRASE);
  run_qemu_img (amend);
  check_image (path, PASSPHRASE);
  check_image (path, "another");
}

static void
set_up (void)
{
  g_autofree char *pattern = NULL;
  struct container data;

  make_data ();
  directory = g_dir_make_tmp ("test-crypt.XXXXXX", NULL);
  g_assert_nonnull (directory);
  qemu_img = find_tool ("QEMU_IMG", "qemu-img");
  qemu_io = find_tool ("QEMU_IO", "qemu-io");
  pattern = path_of ("pattern");
  container_init (&data, test_data, DATA_LENGTH);
  save_container (&data, pattern);
}

static void
tear_down (void)
{
  GDir *dir = g_dir_open (directory, 0, NULL);
  const char *name;

  while ((name = g_dir_read_name (dir)) != NULL) {
    g_autofree char *path = path_of (name);

    g_unlink (path);
  }
  g_dir_close (dir);
  g_rmdir (directory);
  g_free (directory);
  g_free (qemu_img);
  g_free (qemu_io);
}

static void
add_tests (void)
{
  for (size_t i = 0; i < G_N_ELEMENTS (all_ciphers); ++i) {
    const struct test_luks *luks = &all_ciphers[i];
    g_autofree char *memory = g_strdup_printf ("/crypt/memory/%s-%u",
                                               luks->cipher, luks->bits);
    g_autofree char *qemu = g_strdup_printf ("/crypt/qemu/%s-%u",
                                             luks->cipher, luks->bits);

    g_test_add_data_func (memory, luks, test_memory);
    g_test_add_data_func (qemu, luks, test_qemu);
  }
  g_test_add_func ("/crypt/memory/hashes", test_memory_hashes);
  g_test_add_func ("/crypt/qemu/hashes", test_qemu_hashes);
  g_test_add_func ("/crypt/qemu/twofish-192", test_qemu_twofish_192);
  g_test_add_func ("/crypt/qemu/legacy-aes", test_qemu_aes);
  g_test_add_func ("/crypt/qemu/slots", test_qemu_slots);
  g_test_add_func ("/crypt/aes-passphrases", test_aes_passphrases);
  g_test_add_func ("/crypt/slots", test_slots);
  g_test_add_func ("/crypt/threads", test_threads);
  g_test_add_func ("/crypt/hostile", test_hostile);
  g_test_add_func ("/crypt/extension", test_extension);
}

#else /* !HAVE_LIBGCRYPT */

static void
test_unsupported (void)
{
  const struct qcow2_header header = { .crypt_method = QCOW2_CRYPT_LUKS };
  const struct qcow2_io io = { 0 };
  g_autoptr (GError) error = NULL;

  g_assert_null (qcow2_crypt_open (&header, &io, "x", 1, &error));
  g_assert_error (error, QCOW2_ERROR, ENOTSUP);
}

static void
set_up (void)
{
}

static void
tear_down (void)
{
}

static void
add_tests (void)
{
  g_test_add_func ("/crypt/unsupported", test_unsupported);
}

#endif /* !HAVE_LIBGCRYPT */

int
main (int argc, char *argv[])
{
  int r;

  g_test_init (&argc, &argv, NULL);
  g_test_add_func ("/crypt/twofish", test_twofish);
  add_tests ();
  set_up ();
  r = g_test_run ();
  tear_down ();
  return r;
}
