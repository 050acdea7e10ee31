/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* qcow2-bitmap IMAGE COMMAND [ARGUMENT...]
 *
 *    create SIZE [DATA-FILE]       make the image
 *    list                          print name, granularity and flags of each
 *    add NAME GRANULARITY          a new bitmap, which records
 *    remove NAME
 *    set NAME OFFSET COUNT         mark bytes as dirty
 *    clear NAME
 *    dump NAME                     print start and length of what is dirty
 *    lock reader|writer|raw        lock the file until the input ends
 *
 * The qcow2 module's bitmaps, for tests that compare them with QEMU's.
 */

#include <config.h>

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qcow2/bitmap-store.h"
#include "qcow2/create.h"
#include "qcow2/file.h"
#include "qcow2/lock.h"

struct opened {
  struct qcow2_file file;
  struct qcow2_image *image;
  struct qcow2_bitmap_store *store;
};

static void
must (int r, const GError *error)
{
  if (r == 0 && !error)
    return;
  fprintf (stderr, "qcow2-bitmap: %s\n", error ? error->message : "failed");
  exit (1);
}

static uint64_t
number (const char *text)
{
  return g_ascii_strtoull (text, NULL, 0);
}

static void
create (struct opened *o, char **args)
{
  GError *error = NULL;
  const int r = qcow2_create (&o->file.io, number (args[0]), args[1], &error);

  must (r, error);
}

static void
list (struct opened *o, char **args)
{
  const GPtrArray *bitmaps = qcow2_bitmap_store_list (o->store);

  for (guint i = 0; i < bitmaps->len; ++i) {
    const struct qcow2_bitmap *bitmap = g_ptr_array_index (bitmaps, i);

    printf ("%s %" PRIu64 " %s%s\n", bitmap->name,
            UINT64_C (1) << bitmap->granularity_bits,
            bitmap->flags & QCOW2_BITMAP_AUTO ? "auto" : "disabled",
            bitmap->flags & QCOW2_BITMAP_IN_USE ? " in-use" : "");
  }
}

static void
add (struct opened *o, char **args)
{
  g_autoptr (GPtrArray) array = g_ptr_array_new ();
  struct qcow2_bitmap_new bitmap = {
    .name = args[0],
    .granularity_bits = __builtin_ctzll (number (args[1])),
    .flags = QCOW2_BITMAP_AUTO,
  };
  const struct qcow2_bitmap_changes changes = { .add = array };
  GError *error = NULL;
  int r;

  g_ptr_array_add (array, &bitmap);
  r = qcow2_bitmap_store_change (o->store, &o->file.io, &changes, &error);
  must (r, error);
}

static void
remove_one (struct opened *o, char **args)
{
  g_autoptr (GPtrArray) array = g_ptr_array_new ();
  const struct qcow2_bitmap_changes changes = { .remove = array };
  GError *error = NULL;
  int r;

  g_ptr_array_add (array, args[0]);
  r = qcow2_bitmap_store_change (o->store, &o->file.io, &changes, &error);
  must (r, error);
}

static struct qcow2_bitmap *
find (struct opened *o, const char *name)
{
  struct qcow2_bitmap *bitmap = qcow2_bitmap_store_find (o->store, name);

  if (!bitmap) {
    fprintf (stderr, "qcow2-bitmap: there is no bitmap %s\n", name);
    exit (1);
  }
  return bitmap;
}

static struct dirty_bits *
load (struct opened *o, struct qcow2_bitmap *bitmap)
{
  struct dirty_bits *bits = dirty_bits_new (o->image->header->size,
                                            bitmap->granularity_bits);
  GError *error = NULL;
  const int r = qcow2_bitmap_store_load (o->store, &o->file.io, bitmap, bits,
                                         &error);

  must (r, error);
  return bits;
}

/* Change what a bitmap holds, in the order in which a filter would. */
static void
save (struct opened *o, struct qcow2_bitmap *bitmap, struct dirty_bits *bits,
      struct dirty_bits *stored)
{
  const struct qcow2_io *io = &o->file.io;
  const uint32_t flags = bitmap->flags;
  GError *error = NULL;

  if (qcow2_bitmap_store_set_flags (o->store, io, bitmap,
                                    flags | QCOW2_BITMAP_IN_USE,
                                    &error) == -1 ||
      io->flush (io, &error) == -1 ||
      qcow2_bitmap_store_save (o->store, io, bitmap, bits, stored,
                               &error) == -1 ||
      qcow2_bitmap_store_set_flags (o->store, io, bitmap, flags,
                                    &error) == -1)
    must (-1, error);
}

static void
set (struct opened *o, char **args)
{
  struct qcow2_bitmap *bitmap = find (o, args[0]);
  struct dirty_bits *stored = load (o, bitmap);
  struct dirty_bits *bits = dirty_bits_copy (stored);

  dirty_bits_set (bits, number (args[1]), number (args[2]));
  save (o, bitmap, bits, stored);
  dirty_bits_free (bits);
  dirty_bits_free (stored);
}

static void
clear (struct opened *o, char **args)
{
  struct qcow2_bitmap *bitmap = find (o, args[0]);
  struct dirty_bits *bits = dirty_bits_new (o->image->header->size,
                                            bitmap->granularity_bits);

  save (o, bitmap, bits, NULL);
  dirty_bits_free (bits);
}

static void
dump (struct opened *o, char **args)
{
  struct dirty_bits *bits = load (o, find (o, args[0]));
  uint64_t length;

  for (uint64_t at = 0; at < dirty_bits_size (bits); at += length)
    if (dirty_bits_get (bits, at, &length))
      printf ("%" PRIu64 " %" PRIu64 "\n", at, length);
  dirty_bits_free (bits);
}

static void
lock (struct opened *o, char **args)
{
  const enum qcow2_lock kind =
    strcmp (args[0], "reader") == 0 ? QCOW2_LOCK_READER :
    strcmp (args[0], "writer") == 0 ? QCOW2_LOCK_WRITER :
    QCOW2_LOCK_RAW_WRITER;
  GError *error = NULL;
  const int r = qcow2_lock_file (o->file.fd, kind, &error);

  must (r, error);
  printf ("locked\n");
  fflush (stdout);
  while (getchar () != EOF)
    ;
}

static const struct command {
  const char *name;
  void (*run) (struct opened *o, char **args);
  int arguments, optional;
  int flags;                    /* of open(2) */
  bool is_raw;                  /* not opened as an image */
} commands[] = {
  { "create", create, 1, 1, O_RDWR | O_CREAT | O_EXCL, true },
  { "list", list, 0, 0, O_RDONLY, false },
  { "add", add, 2, 0, O_RDWR, false },
  { "remove", remove_one, 1, 0, O_RDWR, false },
  { "set", set, 3, 0, O_RDWR, false },
  { "clear", clear, 1, 0, O_RDWR, false },
  { "dump", dump, 1, 0, O_RDONLY, false },
  { "lock", lock, 1, 0, O_RDWR, true },
};

static const struct command *
find_command (const char *name, int arguments)
{
  for (size_t i = 0; i < G_N_ELEMENTS (commands); ++i)
    if (strcmp (commands[i].name, name) == 0 &&
        arguments >= commands[i].arguments &&
        arguments <= commands[i].arguments + commands[i].optional)
      return &commands[i];
  return NULL;
}

int
main (int argc, char *argv[])
{
  const struct command *command =
    argc < 3 ? NULL : find_command (argv[2], argc - 3);
  struct opened o = { 0 };
  GError *error = NULL;

  if (!command) {
    fprintf (stderr, "usage: qcow2-bitmap IMAGE COMMAND [ARGUMENT...]\n");
    return 2;
  }
  must (qcow2_file_open (&o.file, argv[1], command->flags, &error), error);
  if (!command->is_raw) {
    o.image = qcow2_image_open (&o.file.io, &error);
    must (0, error);
    o.store = qcow2_bitmap_store_open (o.image, &o.file.io, &error);
    must (0, error);
  }
  command->run (&o, argv + 3);
  qcow2_bitmap_store_close (o.store);
  qcow2_image_close (o.image);
  qcow2_file_close (&o.file);
  return 0;
}
