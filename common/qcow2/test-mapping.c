/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The mapping: runs and where they end. */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "qcow2/error.h"
#include "qcow2/mapping.h"
#include "qcow2/test-memory.h"

#define C MEMORY_CLUSTER
#define L2 4096                 /* where the tests' L2 tables are */
#define DATA 16384

struct fixture {
  struct memory *m;
  struct qcow2_image *image;
  struct qcow2_view view;
};

static void
open_image (struct fixture *f)
{
  g_autoptr (GError) error = NULL;

  f->image = qcow2_image_open (&f->m->io, &error);
  g_assert_no_error (error);
  qcow2_image_set_cache_size (f->image, 1 << 16);
  qcow2_image_active_view (f->image, &f->view);
}

static void
setup (struct fixture *f, gconstpointer data)
{
  f->m = memory_new ();
}

static void
teardown (struct fixture *f, gconstpointer data)
{
  qcow2_image_close (f->image);
  g_free (f->m);
}

static void
expect (struct fixture *f, uint64_t offset, uint64_t count,
        enum qcow2_run_type type, uint64_t length, uint64_t host_offset)
{
  g_autoptr (GError) error = NULL;
  struct qcow2_run run;

  qcow2_map (f->image, &f->view, &f->m->io, offset, count, &run, &error);
  g_assert_no_error (error);
  g_assert_cmpuint (run.type, ==, type);
  g_assert_cmpuint (run.length, ==, length);
  if (type == QCOW2_RUN_DATA || type == QCOW2_RUN_COMPRESSED)
    g_assert_cmpuint (run.host_offset, ==, host_offset);
}

static void
expect_error (struct fixture *f, uint64_t offset, const char *word)
{
  g_autoptr (GError) error = NULL;
  struct qcow2_run run;

  g_assert_cmpint (qcow2_map (f->image, &f->view, &f->m->io, offset, 1, &run,
                              &error), ==, -1);
  g_assert_error (error, QCOW2_ERROR, EIO);
  g_assert_nonnull (strstr (error->message, word));
}

/* L2 table number i of the disk. */
static uint64_t
add_l2 (struct fixture *f, unsigned i)
{
  const uint64_t table = L2 + i * C;

  memory_put64 (f->m, MEMORY_L1 + i * 8, table | QCOW2_ENTRY_COPIED);
  return table;
}

static void
test_empty (struct fixture *f, gconstpointer data)
{
  open_image (f);
  expect (f, 0, MEMORY_DISK, QCOW2_RUN_UNALLOCATED, MEMORY_DISK, 0);
  expect (f, 77, 1000, QCOW2_RUN_UNALLOCATED, 1000, 0);
  /* One slice of the L1 table says it all. */
  f->m->reads = 0;
  expect (f, 12345, MEMORY_DISK - 12345, QCOW2_RUN_UNALLOCATED,
          MEMORY_DISK - 12345, 0);
  g_assert_cmpuint (f->m->reads, ==, 0);
}

/* A hole goes from an L2 table through missing ones into another. */
static void
test_hole_across_tables (struct fixture *f, gconstpointer data)
{
  const uint64_t first = add_l2 (f, 1), last = add_l2 (f, 4);

  memory_put64 (f->m, first, DATA);
  memory_put64 (f->m, last + 8, DATA + C);
  open_image (f);
  expect (f, 0, MEMORY_DISK, QCOW2_RUN_UNALLOCATED, 64 * C, 0);
  expect (f, 64 * C, MEMORY_DISK - 64 * C, QCOW2_RUN_DATA, C, DATA);
  expect (f, 65 * C, MEMORY_DISK - 65 * C, QCOW2_RUN_UNALLOCATED,
          (4 * 64 + 1 - 65) * C, 0);
}

static void
test_contiguous_data (struct fixture *f, gconstpointer data)
{
  const uint64_t first = add_l2 (f, 0), second = add_l2 (f, 1);

  for (unsigned i = 0; i < 4; ++i) {
    memory_put64 (f->m, first + (60 + i) * 8, DATA + i * C);
    memory_put64 (f->m, second + i * 8, DATA + (4 + i) * C);
  }
  memory_put64 (f->m, second + 4 * 8, DATA + 9 * C);
  open_image (f);
  expect (f, 60 * C, 20 * C, QCOW2_RUN_DATA, 8 * C, DATA);
  expect (f, 61 * C + 5, 20 * C, QCOW2_RUN_DATA, 7 * C - 5, DATA + C + 5);
  expect (f, 61 * C + 5, 600, QCOW2_RUN_DATA, 600, DATA + C + 5);
  expect (f, 68 * C, C, QCOW2_RUN_DATA, C, DATA + 9 * C);
}

static void
test_kinds (struct fixture *f, gconstpointer data)
{
  const uint64_t table = add_l2 (f, 0);

  memory_put64 (f->m, table, QCOW2_L2_ZERO);
  memory_put64 (f->m, table + 8, QCOW2_L2_ZERO);
  memory_put64 (f->m, table + 16, DATA | QCOW2_L2_ZERO);
  /* 61 bits of offset, one of sectors: from byte 700, 2 sectors. */
  memory_put64 (f->m, table + 24,
                QCOW2_L2_COMPRESSED | UINT64_C (1) << 61 | 700);
  memory_put64 (f->m, table + 32,
                QCOW2_L2_COMPRESSED | UINT64_C (1) << 61 | 700);
  open_image (f);
  expect (f, 0, 64 * C, QCOW2_RUN_ZERO, 2 * C, 0);
  expect (f, 2 * C, 62 * C, QCOW2_RUN_ZERO_ALLOCATED, C, 0);
  expect (f, 3 * C, 61 * C, QCOW2_RUN_COMPRESSED, C, 700);
  expect (f, 3 * C + 9, 61 * C, QCOW2_RUN_COMPRESSED, C - 9, 700);
}

static void
test_damaged (struct fixture *f, gconstpointer data)
{
  const uint64_t table = add_l2 (f, 0);

  memory_put64 (f->m, table, DATA);
  memory_put64 (f->m, MEMORY_L1 + 8, UINT64_C (1) << 40);
  open_image (f);
  /* What is damaged behind a run does not spoil it. */
  expect (f, 63 * C, 4 * C, QCOW2_RUN_UNALLOCATED, C, 0);
  expect_error (f, 64 * C, "beyond the end of the file");
  expect_error (f, 100 * C, "beyond the end of the file");
}

static void
test_version_2_zero (struct fixture *f, gconstpointer data)
{
  memory_put32 (f->m, 4, 2);
  memset (f->m->data + 72, 0, 48);
  memory_put64 (f->m, add_l2 (f, 0), DATA | QCOW2_L2_ZERO);
  open_image (f);
  expect_error (f, 0, "version 2");
}

/* 16 KiB clusters, subclusters of 512 bytes. */
static void
test_extended (struct fixture *f, gconstpointer data)
{
  const uint32_t cluster = 16384;
  const uint64_t table = 2 * cluster;

  memory_put32 (f->m, 20, 14);
  memory_put64 (f->m, 24, 16 * cluster);
  memory_put32 (f->m, 36, 1);
  memory_put64 (f->m, 40, cluster);
  memory_put64 (f->m, 48, 0);
  memory_put64 (f->m, 72, QCOW2_INCOMPAT_EXTENDED_L2);
  memory_put64 (f->m, cluster, table);
  /* Subclusters 0-1 data, 2-3 zero, the rest not there. */
  memory_put64 (f->m, table, 3 * cluster);
  memory_put64 (f->m, table + 8, UINT64_C (0xc00000003));
  /* The next cluster: all zero, without space. */
  memory_put64 (f->m, table + 24, UINT64_C (0xffffffff00000000));
  /* Both data and zero. */
  memory_put64 (f->m, table + 32, 3 * cluster);
  memory_put64 (f->m, table + 40, UINT64_C (0x100000001));
  open_image (f);
  expect (f, 100, cluster, QCOW2_RUN_DATA, 924, 3 * cluster + 100);
  expect (f, 1024, cluster, QCOW2_RUN_ZERO_ALLOCATED, 1024, 0);
  expect (f, 2048, 10 * cluster, QCOW2_RUN_UNALLOCATED, cluster - 2048, 0);
  expect (f, cluster, 10 * cluster, QCOW2_RUN_ZERO, cluster, 0);
  expect_error (f, 2 * cluster, "both");
}

static void
test_end_of_file (void)
{
  g_autofree struct memory *m = memory_new ();
  g_autoptr (GError) error = NULL;
  uint8_t buf[600];

  m->size = 1000;
  memset (m->data, 7, m->size);
  memset (buf, 9, sizeof buf);
  g_assert_cmpint (qcow2_io_read_padded (&m->io, 512, buf, 512, 900, NULL),
                   ==, 0);
  g_assert_cmpuint (buf[99], ==, 7);
  g_assert_cmpuint (buf[100], ==, 0);
  g_assert_cmpint (qcow2_io_read_padded (&m->io, 512, buf, 512, 1000,
                                         &error), ==, -1);
  g_assert_error (error, QCOW2_ERROR, EIO);
  g_assert_cmpint (qcow2_io_read_exact (&m->io, "it", buf, 101, 900, NULL),
                   ==, -1);
  g_assert_cmpint (qcow2_io_read_exact (&m->io, "it", buf, 100, 900, NULL),
                   ==, 0);
}

#define ADD(name, func)                                                 \
  g_test_add ("/mapping/" name, struct fixture, NULL, setup, func, teardown)

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  ADD ("empty", test_empty);
  ADD ("hole-across-tables", test_hole_across_tables);
  ADD ("contiguous-data", test_contiguous_data);
  ADD ("kinds", test_kinds);
  ADD ("damaged", test_damaged);
  ADD ("version-2-zero", test_version_2_zero);
  ADD ("extended", test_extended);
  g_test_add_func ("/io/end-of-file", test_end_of_file);
  return g_test_run ();
}
