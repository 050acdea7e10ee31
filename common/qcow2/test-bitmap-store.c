/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What it costs to save a bitmap is in proportion to what has changed, and
 * what fails leaks nothing.  That the content is right is compared with
 * QEMU's in tests/.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "qcow2/bitmap-store.h"
#include "qcow2/check.h"
#include "qcow2/create.h"
#include "qcow2/error.h"

#define DISK (UINT64_C (1) << 40)
#define STEP (DISK / 16)
#define GRANULARITY_BITS 16

/* A container in memory, which counts. */
struct container {
  struct qcow2_io io;
  GByteArray *bytes;
  uint64_t written, flushes;
  uint64_t limit;               /* of its size */
};

static struct container *
container_of (const struct qcow2_io *io)
{
  return (struct container *) io;
}

static int
container_pread (const struct qcow2_io *io, void *buf, size_t count,
                 uint64_t offset, GError **error)
{
  memcpy (buf, container_of (io)->bytes->data + offset, count);
  return 0;
}

static int
container_pwrite (const struct qcow2_io *io, const void *buf, size_t count,
                  uint64_t offset, GError **error)
{
  memcpy (container_of (io)->bytes->data + offset, buf, count);
  container_of (io)->written += count;
  return 0;
}

static int
container_flush (const struct qcow2_io *io, GError **error)
{
  container_of (io)->flushes++;
  return 0;
}

static int
container_grow (const struct qcow2_io *io, uint64_t size, GError **error)
{
  GByteArray *bytes = container_of (io)->bytes;
  const guint before = bytes->len;

  if (size > container_of (io)->limit)
    return qcow2_fail (error, ENOSPC, "it is full");
  g_byte_array_set_size (bytes, size);
  memset (bytes->data + before, 0, size - before);
  return 0;
}

static uint64_t
container_get_size (const struct qcow2_io *io)
{
  return container_of (io)->bytes->len;
}

/* An image in it, with an empty bitmap "b". */
struct fixture {
  struct container container;
  struct qcow2_image *image;
  struct qcow2_bitmap_store *store;
};

static void
open_image (struct fixture *f)
{
  const struct qcow2_io *io = &f->container.io;
  GError *error = NULL;

  f->image = qcow2_image_open (io, &error);
  g_assert_no_error (error);
  f->store = qcow2_bitmap_store_open (f->image, io, &error);
  g_assert_no_error (error);
}

static void
close_image (struct fixture *f)
{
  qcow2_bitmap_store_close (f->store);
  qcow2_image_close (f->image);
}

static int
add (struct fixture *f, const char *name, GError **error)
{
  g_autoptr (GPtrArray) list = g_ptr_array_new ();
  struct qcow2_bitmap_new new = {
    name, GRANULARITY_BITS, QCOW2_BITMAP_AUTO | QCOW2_BITMAP_IN_USE, NULL
  };
  const struct qcow2_bitmap_changes changes = { .add = list };

  g_ptr_array_add (list, &new);
  return qcow2_bitmap_store_change (f->store, &f->container.io, &changes,
                                    error);
}

static void
set_up (struct fixture *f, gconstpointer data)
{
  GError *error = NULL;

  f->container.io = (struct qcow2_io) {
    container_pread, container_get_size, container_pwrite, container_flush,
    container_grow
  };
  f->container.bytes = g_byte_array_new ();
  f->container.limit = UINT32_MAX;
  qcow2_create (&f->container.io, DISK, NULL, &error);
  g_assert_no_error (error);
  open_image (f);
  add (f, "b", &error);
  g_assert_no_error (error);
}

static void
tear_down (struct fixture *f, gconstpointer data)
{
  close_image (f);
  g_byte_array_unref (f->container.bytes);
}

static void
ignore (void *opaque, const char *message)
{
}

static int
go_on (void *opaque, unsigned percent)
{
  return 0;
}

static void
check_leaks (struct fixture *f)
{
  const struct qcow2_check_observer observer = { ignore, go_on, NULL };
  struct qcow2_check_result result;
  GError *error = NULL;

  qcow2_check (f->image, &f->container.io, &observer, &result, &error);
  g_assert_no_error (error);
  g_assert_cmpuint (result.corruptions, ==, 0);
  g_assert_cmpuint (result.leaks, ==, 0);
}

/* Save, and count the bytes that are written. */
static uint64_t
save (struct fixture *f, struct dirty_bits *bits, struct dirty_bits *stored)
{
  const uint64_t before = f->container.written;
  GError *error = NULL;

  qcow2_bitmap_store_save (f->store, &f->container.io,
                           qcow2_bitmap_store_find (f->store, "b"), bits,
                           stored, &error);
  g_assert_no_error (error);
  return f->container.written - before;
}

static void
test_proportion (struct fixture *f, gconstpointer data)
{
  struct dirty_bits *bits = dirty_bits_new (DISK, GRANULARITY_BITS);
  struct dirty_bits *stored = dirty_bits_copy (bits);
  uint64_t flushes;

  /* All clusters of bits. */
  for (uint64_t i = 0; i < DISK; i += 1000 << GRANULARITY_BITS)
    dirty_bits_set (bits, i, 1);
  g_assert_cmpuint (save (f, bits, stored), >=, DISK >> GRANULARITY_BITS >> 3);
  dirty_bits_free (stored);

  /* Nothing at all. */
  stored = dirty_bits_copy (bits);
  flushes = f->container.flushes;
  g_assert_cmpuint (save (f, bits, stored), ==, 0);
  g_assert_cmpuint (f->container.flushes, ==, flushes);

  /* Ten granules, far from each other. */
  for (uint64_t i = 1; i < 11; ++i)
    dirty_bits_set (bits, i * STEP + 12345678, 1);
  g_assert_cmpuint (save (f, bits, stored), ==, 10 * 512);
  dirty_bits_free (stored);

  /* All of it: no content, only a table. */
  stored = dirty_bits_copy (bits);
  dirty_bits_set (bits, 0, DISK);
  g_assert_cmpuint (save (f, bits, stored), <=, 64 << 10);
  check_leaks (f);
  dirty_bits_free (stored);
  dirty_bits_free (bits);
}

/* Again and again on a full disk. */
static void
test_full (struct fixture *f, gconstpointer data)
{
  struct dirty_bits *bits = dirty_bits_new (DISK, GRANULARITY_BITS);
  struct qcow2_bitmap *b;

  for (uint64_t i = 0; i < DISK; i += STEP)
    dirty_bits_set (bits, i, 1);
  for (unsigned i = 0; i < 20; ++i) {
    g_autoptr (GError) error = NULL;

    f->container.limit = f->container.bytes->len + (i << 15);
    b = qcow2_bitmap_store_find (f->store, "b");
    if (i % 2)
      add (f, "another", &error);
    else
      qcow2_bitmap_store_save (f->store, &f->container.io, b, bits, NULL,
                               &error);
    if (error) {
      g_assert_error (error, QCOW2_ERROR, ENOSPC);
      close_image (f);
      open_image (f);
    }
    check_leaks (f);
    if (!error)
      break;
  }
  dirty_bits_free (bits);
}

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  g_test_add ("/bitmap-store/proportion", struct fixture, NULL, set_up,
              test_proportion, tear_down);
  g_test_add ("/bitmap-store/full", struct fixture, NULL, set_up, test_full,
              tear_down);
  return g_test_run ();
}
