/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The write intent: whenever a crash might happen, the stored bitmap and
 * the stored intent together must have every write that was passed on.
 */

#include <config.h>

#include <errno.h>
#include <stdatomic.h>

#include "dirty/intent.h"
#include "dirty/node.h"

#define SIZE (UINT64_C (1) << 30)
#define REGION_BITS 20
#define WRITERS 4
#define STORES 400

static struct dirty_intent *
new_intent (dirty_intent_write write, gpointer opaque)
{
  struct dirty_bits *empty = dirty_bits_new (SIZE, REGION_BITS);
  struct dirty_intent *intent = dirty_intent_new (empty, write, opaque);

  dirty_bits_free (empty);
  return intent;
}

/* A disk that is written to in pieces, each of which is there as soon as it
 * is written; a crash is a look at it.
 */
struct disk {
  struct dirty_intent *intent;
  struct dirty_bits *bitmap;    /* in memory */
  GMutex lock;                  /* of all below */
  struct dirty_bits *stored_bitmap, *stored_intent;
  struct dirty_bits *passed;    /* writes that were passed on */
  guint intents;                /* times that it was stored */
  atomic_bool stop;
  atomic_uint fail;             /* every so many intents; 0: none */
};

/* Under the lock. */
static void
check_crash (struct disk *disk)
{
  struct dirty_bits *recovered = dirty_bits_copy (disk->stored_bitmap);
  uint64_t before;

  dirty_bits_merge (recovered, disk->stored_intent);
  before = dirty_bits_count (recovered);
  dirty_bits_merge (recovered, disk->passed);
  g_assert_cmpuint (dirty_bits_count (recovered), ==, before);
  dirty_bits_free (recovered);
}

/* Let a part of the disk be what bits says. */
static void
store_piece (struct disk *disk, struct dirty_bits *stored,
             struct dirty_bits *bits, uint64_t begin, uint64_t end)
{
  uint64_t length;

  g_mutex_lock (&disk->lock);
  dirty_bits_clear (stored, begin, end - begin);
  for (uint64_t at = begin; at < end; at += length)
    if (dirty_bits_get (bits, at, &length)) {
      length = MIN (length, end - at);
      dirty_bits_set (stored, at, length);
    }
  check_crash (disk);
  g_mutex_unlock (&disk->lock);
}

static void
store_all (struct disk *disk, struct dirty_bits *stored,
           struct dirty_bits *bits, uint64_t end)
{
  const uint64_t piece = SIZE / 4;

  for (uint64_t at = 0; at < end; at += piece) {
    store_piece (disk, stored, bits, at, at + piece);
    g_thread_yield ();
  }
}

static int
write_intent (gpointer opaque, struct dirty_bits *bits, GError **error)
{
  struct disk *disk = opaque;
  const guint every = atomic_load (&disk->fail);

  if (every && ++disk->intents % every == 0) {
    store_all (disk, disk->stored_intent, bits, SIZE / 2);
    return dirty_fail (error, EIO, "it was told to fail");
  }
  store_all (disk, disk->stored_intent, bits, SIZE);
  return 0;
}

static gpointer
write_at_random (gpointer p)
{
  struct disk *disk = p;
  GRand *rand = g_rand_new ();

  while (!atomic_load (&disk->stop)) {
    const uint64_t offset = g_rand_int_range (rand, 0, SIZE - (4 << 20));
    const uint64_t count = g_rand_int_range (rand, 1, 4 << 20);

    dirty_bits_set (disk->bitmap, offset, count);
    if (dirty_intent_begin_write (disk->intent, offset, count, NULL) == 0) {
      g_mutex_lock (&disk->lock);
      dirty_bits_set (disk->passed, offset, count);
      check_crash (disk);
      g_mutex_unlock (&disk->lock);
    }
    if (g_rand_int (rand) % 8 == 0)
      g_usleep (g_rand_int (rand) % 500);
  }
  g_rand_free (rand);
  return NULL;
}

/* Some stores fail half way, and are given up. */
static void
store_bitmap (struct disk *disk)
{
  struct dirty_bits *copy;
  const gboolean fails = g_random_int () % 4 == 0;

  dirty_intent_begin_store (disk->intent);
  copy = dirty_bits_copy (disk->bitmap);
  store_all (disk, disk->stored_bitmap, copy, fails ? SIZE / 2 : SIZE);
  dirty_bits_free (copy);
  if (!fails)
    dirty_intent_end_store (disk->intent, NULL);
}

static void
run (guint fail)
{
  struct disk disk = {
    .bitmap = dirty_bits_new (SIZE, 16),
    .stored_bitmap = dirty_bits_new (SIZE, 16),
    .stored_intent = dirty_bits_new (SIZE, REGION_BITS),
    .passed = dirty_bits_new (SIZE, 16),
    .fail = fail,
  };
  GThread *threads[WRITERS];

  g_mutex_init (&disk.lock);
  disk.intent = new_intent (write_intent, &disk);
  for (unsigned i = 0; i < WRITERS; ++i)
    threads[i] = g_thread_new ("writer", write_at_random, &disk);
  for (unsigned i = 0; i < STORES; ++i) {
    store_bitmap (&disk);
    g_usleep (g_random_int () % 300);
    /* New bitmaps, or all regions would be stable for ever. */
    if (i % 50 == 49) {
      g_mutex_lock (&disk.lock);
      dirty_bits_clear (disk.passed, 0, SIZE);
      g_mutex_unlock (&disk.lock);
    }
  }
  atomic_store (&disk.stop, true);
  for (unsigned i = 0; i < WRITERS; ++i)
    g_thread_join (threads[i]);
  dirty_intent_free (disk.intent);
  dirty_bits_free (disk.bitmap);
  dirty_bits_free (disk.stored_bitmap);
  dirty_bits_free (disk.stored_intent);
  dirty_bits_free (disk.passed);
  g_mutex_clear (&disk.lock);
}

static void
test_race (void)
{
  run (0);
}

static void
test_failures (void)
{
  run (5);
}

/* Count the intents that a sequence of writes and stores needs. */
static int
count_intent (gpointer opaque, struct dirty_bits *bits, GError **error)
{
  guint *n = opaque;

  ++*n;
  return 0;
}

static void
test_economy (void)
{
  guint n = 0;
  struct dirty_intent *intent = new_intent (count_intent, &n);

  for (unsigned i = 0; i < 100; ++i)
    dirty_intent_begin_write (intent, i * 100, 100, NULL);
  g_assert_cmpuint (n, ==, 1);
  dirty_intent_begin_write (intent, SIZE - 1, 1, NULL);
  g_assert_cmpuint (n, ==, 2);
  dirty_intent_begin_write (intent, SIZE / 2, 0, NULL);
  g_assert_cmpuint (n, ==, 2);

  /* A region that is written to all the time stays stable. */
  dirty_intent_begin_store (intent);
  dirty_intent_begin_write (intent, 0, 100, NULL);
  g_assert_cmpuint (n, ==, 2);
  g_assert_cmpint (dirty_intent_end_store (intent, NULL), ==, 0);
  g_assert_cmpuint (n, ==, 3);
  dirty_intent_begin_write (intent, 0, 100, NULL);
  g_assert_cmpuint (n, ==, 3);
  dirty_intent_begin_write (intent, SIZE - 1, 1, NULL);
  g_assert_cmpuint (n, ==, 4);
  dirty_intent_free (intent);
}

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  g_test_add_func ("/intent/economy", test_economy);
  g_test_add_func ("/intent/race", test_race);
  g_test_add_func ("/intent/failures", test_failures);
  return g_test_run ();
}
