/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* crash-bitmaps IMAGE SEED OPERATIONS TRIES DIRECTORY EVERY
 *
 * Does random operations on the bitmaps of an image, in memory, and looks
 * at what a crash between any two of the writes might leave: with all that
 * was written, and TRIES times with parts of what was not flushed lost.
 * Each time the image must be free of corruptions, and a bitmap that is
 * not marked as in use must hold what was written up to then.
 *
 * Operations may fail, as I/O does; then all is opened again, and must be
 * as good.
 *
 * Every EVERYth image is written to DIRECTORY, for qemu-img, with a name
 * that begins with the numbers of corruptions and leaks that we found.  The
 * last line of the output says how many crashes there were.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crash/judge.h"
#include "crash/recorder.h"
#include "qcow2/bitmap-store.h"

#define NAMES 5
#define CONTENT_BITS 12         /* granularity of what we compare */

/* What bitmaps have to hold, from an event on. */
struct moment {
  guint event;
  struct dirty_bits *content[NAMES]; /* NULL: the bitmap need not be there */
};

/* A bitmap as we know it. */
struct known {
  bool exists;
  bool in_use;
  unsigned granularity_bits;
  struct dirty_bits *truth;     /* all that was written */
  struct dirty_bits *stored;    /* what the image has; NULL: not known */
};

struct run {
  GRand *rand;
  struct recorder *recorder;
  struct qcow2_image *image;
  struct qcow2_bitmap_store *store;
  struct known known[NAMES];
  GArray *moments;              /* of struct moment */
  struct judge judge;
  guint failures;               /* that we let happen */
};

static const struct qcow2_io *
io_of (struct run *run)
{
  return recorder_io (run->recorder);
}

static const char *
name_of (unsigned n)
{
  static const char *const names[NAMES] = {
    "a", "b", "a name of some length", "d", "nbdkit-write-intent"
  };

  return names[n];
}

static unsigned
below (struct run *run, unsigned n)
{
  return g_rand_int_range (run->rand, 0, n);
}

/* From now on these have to be in the image, or marked as in use. */
static void
note_moment (struct run *run)
{
  struct moment moment = { .event = recorder_events (run->recorder) };

  for (unsigned n = 0; n < NAMES; ++n)
    if (run->known[n].exists)
      moment.content[n] = dirty_bits_copy (run->known[n].truth);
  g_array_append_val (run->moments, moment);
}

static void
open_image (struct run *run)
{
  GError *error = NULL;

  run->image = qcow2_image_open (io_of (run), &error);
  must (0, error, "open");
  run->store = qcow2_bitmap_store_open (run->image, io_of (run), &error);
  must (0, error, "open bitmaps");
}

static void
close_image (struct run *run)
{
  qcow2_bitmap_store_close (run->store);
  qcow2_image_close (run->image);
}

static void
forget (struct known *known)
{
  g_clear_pointer (&known->truth, dirty_bits_free);
  g_clear_pointer (&known->stored, dirty_bits_free);
  known->exists = false;
}

/* At first, and after a failure: open again, and see which of the bitmaps
 * are there.
 */
static void
recover (struct run *run)
{
  close_image (run);
  recorder_fail_after (run->recorder, UINT_MAX);
  open_image (run);
  for (unsigned n = 0; n < NAMES; ++n) {
    struct known *known = &run->known[n];
    const struct qcow2_bitmap *bitmap =
      qcow2_bitmap_store_find (run->store, name_of (n));

    g_clear_pointer (&known->stored, dirty_bits_free);
    if (!bitmap) {
      forget (known);
      continue;
    }
    known->in_use = bitmap->flags & QCOW2_BITMAP_IN_USE;
    if (!known->exists) {
      known->exists = true;
      known->granularity_bits = bitmap->granularity_bits;
      known->truth = dirty_bits_new (run->image->header->size,
                                     bitmap->granularity_bits);
    }
  }
  note_moment (run);
}

/* Operations.  Each returns -1 if I/O failed. */

static int
change_directory (struct run *run)
{
  g_autoptr (GPtrArray) remove = g_ptr_array_new ();
  g_autoptr (GPtrArray) add = g_ptr_array_new_with_free_func (g_free);
  const struct qcow2_bitmap_changes changes = {
    .remove = remove, .add = add,
  };
  g_autoptr (GError) error = NULL;

  /* What is removed need not be there any more, what is added not yet. */
  for (unsigned n = 0; n < NAMES; ++n) {
    struct known *known = &run->known[n];

    if (known->exists && below (run, 3) == 0) {
      g_ptr_array_add (remove, (gpointer) name_of (n));
      forget (known);
    }
  }
  note_moment (run);
  for (unsigned n = 0; n < NAMES; ++n) {
    struct qcow2_bitmap_new *bitmap;

    if (run->known[n].exists || below (run, 3))
      continue;
    bitmap = g_new0 (struct qcow2_bitmap_new, 1);
    bitmap->name = name_of (n);
    bitmap->granularity_bits = 9 + below (run, 6);
    bitmap->flags = QCOW2_BITMAP_AUTO | QCOW2_BITMAP_IN_USE;
    g_ptr_array_add (add, bitmap);
  }
  if (qcow2_bitmap_store_change (run->store, io_of (run), &changes,
                                 &error) == -1)
    return -1;
  for (unsigned n = 0; n < NAMES; ++n) {
    struct known *known = &run->known[n];
    const struct qcow2_bitmap *bitmap =
      qcow2_bitmap_store_find (run->store, name_of (n));

    if (bitmap && !known->exists) {
      known->exists = known->in_use = true;
      known->granularity_bits = bitmap->granularity_bits;
      known->truth = dirty_bits_new (run->image->header->size,
                                     bitmap->granularity_bits);
      known->stored = dirty_bits_copy (known->truth);
    }
  }
  note_moment (run);
  return 0;
}

static int
set_in_use (struct run *run, unsigned n, bool in_use)
{
  struct qcow2_bitmap *bitmap =
    qcow2_bitmap_store_find (run->store, name_of (n));
  uint32_t flags = bitmap->flags & ~QCOW2_BITMAP_IN_USE;

  if (in_use)
    flags |= QCOW2_BITMAP_IN_USE;
  if (qcow2_bitmap_store_set_flags (run->store, io_of (run), bitmap, flags,
                                    NULL) == -1)
    return -1;
  run->known[n].in_use = in_use;
  return 0;
}

/* The guest writes: bitmaps that record are marked as in use before. */
static int
write_guest (struct run *run)
{
  const uint64_t size = run->image->header->size;
  const uint64_t offset = g_rand_double (run->rand) * size;
  const uint64_t count = below (run, 4) ? below (run, 100000) : size;
  const struct qcow2_io *io = io_of (run);

  for (unsigned n = 0; n < NAMES; ++n)
    if (run->known[n].exists && !run->known[n].in_use &&
        set_in_use (run, n, true) == -1)
      return -1;
  if (io->flush (io, NULL) == -1)
    return -1;
  for (unsigned n = 0; n < NAMES; ++n)
    if (run->known[n].exists)
      dirty_bits_set (run->known[n].truth, offset, count);
  note_moment (run);
  return 0;
}

/* Clearing a bitmap: what it holds may then be less. */
static void
clear_one (struct run *run)
{
  struct known *known = &run->known[below (run, NAMES)];

  if (!known->exists || !known->in_use)
    return;
  dirty_bits_clear (known->truth, 0, dirty_bits_size (known->truth));
  note_moment (run);
}

static int
save (struct run *run, unsigned n)
{
  struct known *known = &run->known[n];
  struct qcow2_bitmap *bitmap =
    qcow2_bitmap_store_find (run->store, name_of (n));

  if (qcow2_bitmap_store_save (run->store, io_of (run), bitmap, known->truth,
                               known->stored, NULL) == -1)
    return -1;
  g_clear_pointer (&known->stored, dirty_bits_free);
  known->stored = dirty_bits_copy (known->truth);
  return 0;
}

/* Save all, and perhaps say that nobody uses them. */
static int
save_all (struct run *run)
{
  const bool close = below (run, 2);

  for (unsigned n = 0; n < NAMES; ++n)
    if (run->known[n].exists && run->known[n].in_use &&
        (save (run, n) == -1 || (close && set_in_use (run, n, false) == -1)))
      return -1;
  return 0;
}

static int
operate (struct run *run)
{
  switch (below (run, 8)) {
  case 0 ... 1:
    return change_directory (run);
  case 2 ... 4:
    return write_guest (run);
  case 5:
    clear_one (run);
    return 0;
  default:
    return save_all (run);
  }
}

/* Crashes. */

static void
check_content (struct run *run, struct qcow2_image *image,
               const struct remains *remains, const struct moment *moment)
{
  GError *error = NULL;
  struct qcow2_bitmap_store *store =
    qcow2_bitmap_store_open (image, &remains->io, &error);

  must (0, error, "bitmaps after a crash");
  for (unsigned n = 0; n < NAMES; ++n) {
    struct qcow2_bitmap *bitmap = qcow2_bitmap_store_find (store,
                                                           name_of (n));
    struct dirty_bits *bits;
    uint64_t before;

    if (!bitmap || bitmap->flags & QCOW2_BITMAP_IN_USE || !moment->content[n])
      continue;
    bits = dirty_bits_new (image->header->size, bitmap->granularity_bits);
    must (qcow2_bitmap_store_load (store, &remains->io, bitmap, bits, &error),
          error, "load after a crash");
    before = dirty_bits_count (bits);
    dirty_bits_merge (bits, moment->content[n]);
    if (dirty_bits_count (bits) != before) {
      fprintf (stderr, "bitmap %s lacks %" PRIu64 " granules\n", name_of (n),
               dirty_bits_count (bits) - before);
      exit (1);
    }
    dirty_bits_free (bits);
  }
  qcow2_bitmap_store_close (store);
}

static void
examine (struct run *run, const struct remains *remains,
         const struct moment *moment)
{
  GError *error = NULL;
  struct qcow2_image *image = qcow2_image_open (&remains->io, &error);

  must (0, error, "open after a crash");
  judge_image (&run->judge, image, remains);
  check_content (run, image, remains, moment);
  qcow2_image_close (image);
}

static void
crash_everywhere (struct run *run, unsigned tries)
{
  static const unsigned keeps[] = { 100, 50, 0, 90, 10, 75, 25 };
  struct remains *remains = remains_new (run->recorder);
  guint next = 0;

  for (guint events = 0; events <= recorder_events (run->recorder);
       ++events) {
    while (next + 1 < run->moments->len &&
           g_array_index (run->moments, struct moment, next + 1).event <=
           events)
      next++;
    for (unsigned i = 0; i <= tries; ++i) {
      remains_crash (remains, events, keeps[i % G_N_ELEMENTS (keeps)],
                     run->rand);
      examine (run, remains,
               &g_array_index (run->moments, struct moment, next));
    }
  }
  remains_free (remains);
}

static void
free_run (struct run *run)
{
  close_image (run);
  for (guint i = 0; i < run->moments->len; ++i)
    for (unsigned n = 0; n < NAMES; ++n)
      dirty_bits_free (g_array_index (run->moments, struct moment,
                                      i).content[n]);
  for (unsigned n = 0; n < NAMES; ++n)
    forget (&run->known[n]);
  g_array_unref (run->moments);
  recorder_free (run->recorder);
  g_rand_free (run->rand);
}

int
main (int argc, char *argv[])
{
  struct run run = { 0 };
  GError *error = NULL;
  char *bytes;
  gsize size;

  if (argc != 7) {
    fprintf (stderr, "usage: crash-bitmaps IMAGE SEED OPERATIONS TRIES "
             "DIRECTORY EVERY\n");
    return 2;
  }
  g_file_get_contents (argv[1], &bytes, &size, &error);
  must (0, error, argv[1]);
  run.rand = g_rand_new_with_seed (number (argv[2]));
  run.recorder = recorder_new (bytes, size);
  run.moments = g_array_new (FALSE, FALSE, sizeof (struct moment));
  g_free (bytes);
  open_image (&run);
  recover (&run);
  for (unsigned i = number (argv[3]); i > 0; --i) {
    if (below (&run, 4) == 0)
      recorder_fail_after (run.recorder, below (&run, 25));
    if (operate (&run) == -1) {
      run.failures++;
      recover (&run);
    }
    recorder_fail_after (run.recorder, UINT_MAX);
  }
  run.judge.directory = argv[5];
  run.judge.every = number (argv[6]);
  crash_everywhere (&run, number (argv[4]));
  printf ("%u events, %u failures, %u crashes\n",
          recorder_events (run.recorder), run.failures, run.judge.crashes);
  free_run (&run);
  return 0;
}
