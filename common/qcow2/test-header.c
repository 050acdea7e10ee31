/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The header: what is accepted, and what the errors say. */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "qcow2/error.h"
#include "qcow2/header.h"
#include "qcow2/test-memory.h"

/* A 4 or 8 byte field set to a value, and a word of the message. */
struct bad {
  const char *name;
  unsigned offset, width;
  uint64_t value;
  int code;
  const char *word;
};

static const struct bad bad[] = {
  { "magic", 0, 4, 0, EINVAL, "magic" },
  { "version-1", 4, 4, 1, ENOTSUP, "version is 1" },
  { "version-4", 4, 4, 4, ENOTSUP, "version is 4" },
  { "backing-offset", 8, 8, 513, EINVAL, "backing_file_offset" },
  { "backing-inside", 8, 8, 64, EINVAL, "backing_file_offset" },
  { "cluster-bits-8", 20, 4, 8, EINVAL, "cluster_bits is 8" },
  { "cluster-bits-22", 20, 4, 22, EINVAL, "cluster_bits is 22" },
  { "cluster-bits-max", 20, 4, UINT32_MAX, EINVAL, "cluster_bits" },
  { "size", 24, 8, UINT64_MAX, EINVAL, "size is" },
  { "size-l1", 24, 8, MEMORY_DISK + 1, EINVAL, "l1_table" },
  { "crypt", 32, 4, 3, ENOTSUP, "crypt_method is 3" },
  { "l1-size", 36, 4, 0x10000000, EINVAL, "l1_table" },
  { "l1-offset", 40, 8, 513, EINVAL, "l1_table offset 513" },
  { "l1-offset-max", 40, 8, UINT64_MAX << 9, EINVAL, "too large" },
  { "refcount-offset", 48, 8, 1, EINVAL, "refcount_table" },
  { "refcount-none", 56, 4, 0, EINVAL, "refcount_table_clusters is 0" },
  { "refcount-max", 56, 4, UINT32_MAX, EINVAL, "refcount_table_clusters" },
  { "snapshots", 60, 4, 65537, EINVAL, "nb_snapshots is 65537" },
  { "incompatible", 72, 8, 1 << 20, ENOTSUP, "bit 20" },
  { "compression-bit", 72, 8, 8, EINVAL, "compression" },
  { "extended-small", 72, 8, 16, EINVAL, "extended L2" },
  { "refcount-order", 96, 4, 7, EINVAL, "refcount_order is 7" },
  { "length-short", 100, 4, 100, EINVAL, "header_length is 100" },
  { "length-long", 100, 4, 513, EINVAL, "header_length is 513" },
  { "extension", 108, 4, 401, EINVAL, "header extension" },
};

static void
test_bad (gconstpointer data)
{
  const struct bad *b = data;
  g_autofree struct memory *m = memory_new ();
  g_autoptr (GError) error = NULL;

  memory_put32 (m, 104, 0x12345678);    /* an extension, of length 0 */
  if (b->width == 4)
    memory_put32 (m, b->offset, b->value);
  else
    memory_put64 (m, b->offset, b->value);
  g_assert_null (qcow2_header_load (&m->io, &error));
  g_assert_error (error, QCOW2_ERROR, b->code);
  g_assert_nonnull (strstr (error->message, b->word));
}

static void
test_good (void)
{
  g_autofree struct memory *m = memory_new ();
  g_autoptr (GError) error = NULL;
  struct qcow2_header *header = qcow2_header_load (&m->io, &error);

  g_assert_no_error (error);
  g_assert_cmpuint (header->size, ==, MEMORY_DISK);
  g_assert_cmpuint (header->l1_entries, ==, 8);
  g_assert_cmpuint (qcow2_header_l1_needed (header, MEMORY_DISK), ==, 8);
  g_assert_cmpuint (qcow2_header_l1_needed (header, MEMORY_DISK + 1), ==, 9);
  g_assert_null (header->backing_file);
  qcow2_header_free (header);
}

static void
test_version_2 (void)
{
  g_autofree struct memory *m = memory_new ();
  struct qcow2_header *header;

  memory_put32 (m, 4, 2);
  memset (m->data + 72, 0, 48);
  header = qcow2_header_load (&m->io, NULL);
  g_assert_nonnull (header);
  g_assert_cmpuint (header->refcount_order, ==, 4);
  g_assert_cmpuint (header->header_length, ==, 72);
  qcow2_header_free (header);
}

/* Extensions keep their order and their bytes, whatever they are. */
static void
test_extensions (void)
{
  g_autofree struct memory *m = memory_new ();
  const struct qcow2_extension *ext;
  struct qcow2_header *header;

  memory_put32 (m, 104, 0xdeadbeef);
  memory_put32 (m, 108, 5);
  memcpy (m->data + 112, "hello", 5);
  memory_put32 (m, 120, QCOW2_EXT_BACKING_FORMAT);
  memory_put32 (m, 124, 3);
  memcpy (m->data + 128, "raw", 3);
  memory_put64 (m, 8, 256);
  memory_put32 (m, 16, 4);
  memcpy (m->data + 256, "base", 4);

  header = qcow2_header_load (&m->io, NULL);
  g_assert_nonnull (header);
  g_assert_cmpuint (header->extensions->len, ==, 2);
  ext = g_ptr_array_index (header->extensions, 0);
  g_assert_cmphex (ext->type, ==, 0xdeadbeef);
  g_assert_cmpmem (g_bytes_get_data (ext->data, NULL),
                   g_bytes_get_size (ext->data), "hello", 5);
  g_assert_cmpstr (header->backing_format, ==, "raw");
  g_assert_cmpstr (header->backing_file, ==, "base");
  qcow2_header_free (header);
}

static void
test_nul_in_name (void)
{
  g_autofree struct memory *m = memory_new ();
  g_autoptr (GError) error = NULL;

  memory_put64 (m, 8, 256);
  memory_put32 (m, 16, 4);
  memcpy (m->data + 256, "a\0bc", 4);
  g_assert_null (qcow2_header_load (&m->io, &error));
  g_assert_nonnull (strstr (error->message, "NUL"));
}

static void
test_feature_name (void)
{
  g_autofree struct memory *m = memory_new ();
  g_autoptr (GError) error = NULL;

  memory_put64 (m, 72, UINT64_C (1) << 40);
  memory_put32 (m, 104, QCOW2_EXT_FEATURE_NAMES);
  memory_put32 (m, 108, 48);
  m->data[112] = 0;
  m->data[113] = 40;
  strcpy ((char *) m->data + 114, "time travel");
  g_assert_null (qcow2_header_load (&m->io, &error));
  g_assert_error (error, QCOW2_ERROR, ENOTSUP);
  g_assert_nonnull (strstr (error->message, "time travel (bit 40)"));
}

static void
test_truncated (void)
{
  g_autofree struct memory *m = memory_new ();

  for (m->size = 0; m->size < 104; ++m->size) {
    g_autoptr (GError) error = NULL;

    g_assert_null (qcow2_header_load (&m->io, &error));
    g_assert_error (error, QCOW2_ERROR, EINVAL);
  }
}

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  g_test_add_func ("/header/good", test_good);
  g_test_add_func ("/header/version-2", test_version_2);
  g_test_add_func ("/header/extensions", test_extensions);
  g_test_add_func ("/header/nul-in-name", test_nul_in_name);
  g_test_add_func ("/header/feature-name", test_feature_name);
  g_test_add_func ("/header/truncated", test_truncated);
  for (size_t i = 0; i < G_N_ELEMENTS (bad); ++i) {
    g_autofree char *path = g_strdup_printf ("/header/bad/%s", bad[i].name);

    g_test_add_data_func (path, &bad[i], test_bad);
  }
  return g_test_run ();
}
