/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The snapshot table. */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "qcow2/error.h"
#include "qcow2/image.h"
#include "qcow2/test-memory.h"

#define TABLE 8192

/* Append a snapshot at offset; returns where the next one goes. */
static uint64_t
add (struct memory *m, uint64_t offset, const char *id, const char *name,
     uint32_t extra, uint64_t disk_size)
{
  const size_t id_length = strlen (id), name_length = strlen (name);
  uint64_t end = offset + 40;

  memory_put64 (m, offset, MEMORY_L1);
  memory_put32 (m, offset + 8, 8);
  memory_put32 (m, offset + 12, id_length << 16 | name_length);
  memory_put32 (m, offset + 16, 1000000000);
  memory_put32 (m, offset + 36, extra);
  if (extra >= 16)
    memory_put64 (m, end + 8, disk_size);
  end += extra;
  memcpy (m->data + end, id, id_length);
  memcpy (m->data + end + id_length, name, name_length);
  end += id_length + name_length;
  memory_put32 (m, 60, qcow2_be32 (m->data + 60) + 1);
  return (end + 7) & ~UINT64_C (7);
}

static void
test_load_and_find (void)
{
  g_autofree struct memory *m = memory_new ();
  g_autoptr (GError) error = NULL;
  struct qcow2_image *image;
  const struct qcow2_snapshot *sn;
  struct qcow2_view view;
  uint64_t at = TABLE;

  memory_put64 (m, 64, TABLE);
  at = add (m, at, "1", "first", 16, 4096);
  at = add (m, at, "2", "same", 0, 0);
  at = add (m, at, "3", "same", 24, 2000);
  add (m, at, "4", "2", 1024, 512);
  image = qcow2_image_open (&m->io, &error);
  g_assert_no_error (error);

  sn = qcow2_snapshots_find (image->snapshots, "first");
  g_assert_cmpstr (sn->id, ==, "1");
  g_assert_cmpuint (sn->disk_size, ==, 4096);
  g_assert_cmpuint (sn->date_sec, ==, 1000000000);
  g_assert_cmpint (qcow2_image_snapshot_view (image, sn, &view, NULL), ==, 0);
  g_assert_cmpuint (view.size, ==, 4096);

  sn = qcow2_snapshots_find (image->snapshots, "same");
  g_assert_cmpstr (sn->id, ==, "2");
  g_assert_cmpuint (sn->disk_size, ==, MEMORY_DISK);
  /* A name goes before an ID. */
  sn = qcow2_snapshots_find (image->snapshots, "2");
  g_assert_cmpstr (sn->id, ==, "4");
  sn = qcow2_snapshots_find (image->snapshots, "3");
  g_assert_cmpstr (sn->name, ==, "same");
  g_assert_cmpint (qcow2_image_snapshot_view (image, sn, &view, NULL), ==, 0);
  g_assert_cmpuint (view.size, ==, 1536);
  g_assert_null (qcow2_snapshots_find (image->snapshots, "5"));
  qcow2_image_close (image);
}

static void
expect_error (struct memory *m, const char *word)
{
  g_autoptr (GError) error = NULL;

  g_assert_null (qcow2_image_open (&m->io, &error));
  g_assert_error (error, QCOW2_ERROR, EINVAL);
  g_assert_nonnull (strstr (error->message, word));
}

static void
test_bad (void)
{
  g_autofree struct memory *m = memory_new ();

  memory_put64 (m, 64, TABLE);
  add (m, TABLE, "1", "first", 1025, 0);
  expect_error (m, "extra_data_size");
  memory_put32 (m, TABLE + 36, 0);
  memory_put64 (m, 64, UINT64_C (1) << 40);
  expect_error (m, "beyond the end of the file");
  memory_put64 (m, 64, 8000);
  expect_error (m, "snapshot table offset 8000");
}

/* A bad L1 table is only an error for that snapshot. */
static void
test_bad_l1 (void)
{
  g_autofree struct memory *m = memory_new ();
  struct qcow2_image *image;
  struct qcow2_view view;

  memory_put64 (m, 64, TABLE);
  add (m, TABLE, "1", "first", 16, MEMORY_DISK + 512);
  image = qcow2_image_open (&m->io, NULL);
  g_assert_nonnull (image);
  g_assert_cmpint (qcow2_image_snapshot_view
                   (image, g_ptr_array_index (image->snapshots, 0), &view,
                    NULL), ==, -1);
  qcow2_image_close (image);
}

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  g_test_add_func ("/snapshot/load-and-find", test_load_and_find);
  g_test_add_func ("/snapshot/bad", test_bad);
  g_test_add_func ("/snapshot/bad-l1", test_bad_l1);
  return g_test_run ();
}
