/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Sets of granules against a model with a byte for each, and against
 * themselves with many threads at once.
 */

#include <config.h>

#include <stdatomic.h>
#include <string.h>

#include "dirty/bits.h"

/* What bits.h promises, in the simplest way there is. */
struct model {
  uint64_t size, granularity, length;
  uint8_t *dirty;
};

static uint64_t
divide_up (uint64_t n, uint64_t by)
{
  return n / by + (n % by > 0);
}

static void
model_init (struct model *m, uint64_t size, unsigned granularity_bits)
{
  m->size = size;
  m->granularity = UINT64_C (1) << granularity_bits;
  m->length = divide_up (size, m->granularity);
  m->dirty = g_malloc0 (m->length + 1);
}

static void
model_set (struct model *m, uint64_t offset, uint64_t count)
{
  for (uint64_t i = offset / m->granularity;
       count > 0 && i < m->length && i * m->granularity < offset + count; ++i)
    m->dirty[i] = 1;
}

static void
model_clear (struct model *m, uint64_t offset, uint64_t count)
{
  for (uint64_t i = divide_up (offset, m->granularity); i < m->length; ++i)
    if (MIN ((i + 1) * m->granularity, m->size) <= offset + count)
      m->dirty[i] = 0;
}

static void
model_resize (struct model *m, uint64_t size, bool dirty)
{
  const struct model old = *m;

  m->size = size;
  m->length = divide_up (size, m->granularity);
  m->dirty = g_malloc0 (m->length + 1);
  memcpy (m->dirty, old.dirty, MIN (m->length, old.length));
  g_free (old.dirty);
  if (dirty && size > old.size)
    model_set (m, old.size, size - old.size);
}

/* As exported: LSB first. */
static GBytes *
model_export (const struct model *m)
{
  const size_t bytes = divide_up (m->length, 8) + 3;
  uint8_t *buf = g_malloc0 (bytes);

  for (uint64_t i = 0; i < m->length; ++i)
    buf[i / 8] |= m->dirty[i] << i % 8;
  return g_bytes_new_take (buf, bytes);
}

static void
check_runs (struct dirty_bits *bits, const struct model *m)
{
  uint64_t length;

  for (uint64_t at = 0; at < m->size; at += length) {
    const uint64_t begin = at / m->granularity;
    const bool dirty = dirty_bits_get (bits, at, &length);
    uint64_t end = begin;

    g_assert_cmpuint (dirty, ==, m->dirty[begin]);
    while (end < m->length && m->dirty[end] == m->dirty[begin])
      end++;
    g_assert_cmpuint (at + length, ==, MIN (end * m->granularity, m->size));
  }
}

static void
check_export (struct dirty_bits *bits, const struct model *m)
{
  g_autoptr (GBytes) expected = model_export (m);
  const size_t bytes = g_bytes_get_size (expected);
  g_autofree uint8_t *buf = g_malloc (bytes);
  struct dirty_bits *back =
    dirty_bits_new (m->size, dirty_bits_granularity_bits (bits));

  dirty_bits_export (bits, 0, buf, bytes);
  g_assert_cmpmem (buf, bytes, g_bytes_get_data (expected, NULL), bytes);
  dirty_bits_import (back, 0, buf, bytes);
  check_runs (back, m);
  dirty_bits_free (back);
}

/* Ranges of all lengths, from a few places on. */
static void
check_all (struct dirty_bits *bits, const struct model *m)
{
  g_assert_false (dirty_bits_all (bits, m->size, 1));
  g_assert_false (dirty_bits_all (bits, 0, m->size + 1));
  for (unsigned i = 0; i < 20 && m->size > 0; ++i) {
    const uint64_t offset = (((uint64_t) g_random_int () << 32) |
                             g_random_int ()) % m->size;
    uint64_t length = 1;
    const bool dirty = dirty_bits_get (bits, offset, &length);

    g_assert_cmpint (dirty_bits_all (bits, offset, 1), ==, dirty);
    g_assert_cmpint (dirty_bits_all (bits, offset, length), ==, dirty);
    g_assert_cmpint (dirty_bits_all (bits, offset, length / 2 + 1), ==,
                     dirty);
    g_assert_false (dirty_bits_all (bits, offset, length + 1));
  }
}

static void
check_equal (struct dirty_bits *bits, const struct model *m)
{
  uint64_t count = 0;

  g_assert_cmpuint (dirty_bits_size (bits), ==, m->size);
  g_assert_cmpuint (dirty_bits_length (bits), ==, m->length);
  for (uint64_t i = 0; i < m->length; ++i)
    count += m->dirty[i];
  g_assert_cmpuint (dirty_bits_count (bits), ==, count);
  check_runs (bits, m);
  check_all (bits, m);
  check_export (bits, m);
}

/* Small ranges, large ones, and ones with round ends. */
static void
random_range (uint64_t size, uint64_t granularity, uint64_t *offset,
              uint64_t *count)
{
  static const unsigned shifts[] = { 0, 3, 8, 14, 20 };
  const uint64_t unit = granularity << (g_random_int () % 3 ? 0 : 12);
  const uint64_t most = granularity << shifts[g_random_int () % 5];

  *offset = size ? (((uint64_t) g_random_int () << 32) | g_random_int ())
    % size : 0;
  *count = (((uint64_t) g_random_int () << 32) | g_random_int ()) % most + 1;
  if (g_random_boolean ()) {
    *offset -= *offset % unit;
    *count -= *count > unit ? *count % unit : 0;
  }
}

static void
random_operation (struct dirty_bits *bits, struct model *m)
{
  uint64_t offset, count;

  random_range (m->size, m->granularity, &offset, &count);
  switch (g_random_int () % 16) {
  case 0 ... 8:
    dirty_bits_set (bits, offset, count);
    model_set (m, offset, count);
    break;
  case 9 ... 13:
    dirty_bits_clear (bits, offset, count);
    model_clear (m, offset, count);
    break;
  case 14:
    dirty_bits_compact (bits);
    break;
  case 15:
    if (g_random_int () % 8 == 0) {
      const uint64_t size = offset + (g_random_boolean () ? count : 0);
      const bool dirty = g_random_boolean ();

      if (size / m->granularity < 300000) {
        dirty_bits_resize (bits, size, dirty);
        model_resize (m, size, dirty);
      }
    }
    break;
  }
}

static void
test_model (void)
{
  const unsigned rounds = g_test_thorough () ? 20000 : 400;

  for (unsigned i = 0; i < rounds; ++i) {
    const unsigned granularity_bits = g_random_int_range (9, 32);
    const uint64_t granules = g_random_int () %
      (g_random_int () % 4 ? 20000 : 200000);
    struct model m;
    struct dirty_bits *bits;

    model_init (&m, (granules << granularity_bits) +
                (g_random_boolean () ? g_random_int () % 1000 : 0),
                granularity_bits);
    bits = dirty_bits_new (m.size, granularity_bits);
    for (unsigned j = 0; j < 500; ++j) {
      random_operation (bits, &m);
      if (j % 100 == 0)
        check_equal (bits, &m);
    }
    check_equal (bits, &m);
    dirty_bits_free (bits);
    g_free (m.dirty);
  }
}

/* A set includes another if merging changes nothing. */
static void
check_includes (struct dirty_bits *all, struct dirty_bits *part)
{
  struct dirty_bits *both = dirty_bits_copy (all);

  dirty_bits_merge (both, part);
  g_assert_cmpint (dirty_bits_includes (all, part), ==,
                   dirty_bits_count (both) == dirty_bits_count (all));
  dirty_bits_free (both);
}

/* Sets that one has to look at as a whole, but once. */
static void
test_includes_large (void)
{
  const uint64_t size = UINT64_C (1) << 40;
  struct dirty_bits *all = dirty_bits_new (size, 16);
  struct dirty_bits *part = dirty_bits_new (size, 16);

  for (uint64_t at = 0; at < size; at += 1 << 16)
    dirty_bits_set (all, at, 1);
  for (uint64_t at = 0; at < size; at += 1 << 17)
    dirty_bits_set (part, at, 1);
  g_assert_true (dirty_bits_includes (all, part));
  g_assert_false (dirty_bits_includes (part, all));
  dirty_bits_clear (all, size - (1 << 17), 1 << 17);
  g_assert_false (dirty_bits_includes (all, part));
  dirty_bits_free (all);
  dirty_bits_free (part);
}

/* Merges between all pairs of a few granularities, and copies. */
static void
test_merge (void)
{
  for (unsigned i = 0; i < 300; ++i) {
    const uint64_t size = g_random_int () % (64 << 20);
    const unsigned from_bits = g_random_int_range (9, 22);
    const unsigned to_bits = g_random_int_range (9, 22);
    struct dirty_bits *from = dirty_bits_new (size, from_bits);
    struct dirty_bits *to = dirty_bits_new (size, to_bits), *copy;
    struct model m;
    uint64_t length;

    model_init (&m, size, to_bits);
    for (unsigned j = 0; j < 40; ++j) {
      uint64_t offset, count;

      random_range (size, 512, &offset, &count);
      dirty_bits_set (from, offset, count);
      random_range (size, 512, &offset, &count);
      dirty_bits_set (to, offset, count);
      model_set (&m, offset, count);
    }
    for (uint64_t at = 0; at < size; at += length)
      if (dirty_bits_get (from, at, &length))
        model_set (&m, at, length);
    check_includes (to, from);
    dirty_bits_merge (to, from);
    dirty_bits_merge (to, to);
    check_equal (to, &m);
    g_assert_true (dirty_bits_includes (to, from));
    copy = dirty_bits_copy (to);
    for (unsigned j = 0; j < 20; ++j) {
      uint64_t offset, count;

      random_range (size, 512, &offset, &count);
      dirty_bits_clear (to, offset, count);
      check_includes (to, from);
      check_includes (copy, to);
      check_includes (to, copy);
    }
    dirty_bits_clear (to, 0, size);
    check_includes (to, from);
    check_includes (from, to);
    check_equal (copy, &m);
    g_assert_cmpuint (dirty_bits_count (to), ==, 0);
    dirty_bits_free (from);
    dirty_bits_free (to);
    dirty_bits_free (copy);
    g_free (m.dirty);
  }
}

/* The largest disk at the finest granularity: nothing may take long. */
static void
test_huge (void)
{
  struct dirty_bits *bits = dirty_bits_new (INT64_MAX, 9);
  uint64_t length;

  g_assert_cmpuint (dirty_bits_length (bits), ==, UINT64_C (1) << 54);
  dirty_bits_set (bits, INT64_MAX - 1, 1);
  g_assert_false (dirty_bits_get (bits, 0, &length));
  g_assert_cmpuint (length, ==, INT64_MAX - 511);
  g_assert_true (dirty_bits_get (bits, INT64_MAX - 1, &length));
  g_assert_cmpuint (length, ==, 1);
  dirty_bits_set (bits, 0, INT64_MAX);
  g_assert_cmpuint (dirty_bits_count (bits), ==, UINT64_C (1) << 54);
  dirty_bits_clear (bits, UINT64_C (5) << 40, 512);
  g_assert_cmpuint (dirty_bits_count (bits), ==, (UINT64_C (1) << 54) - 1);
  g_assert_false (dirty_bits_get (bits, UINT64_C (5) << 40, &length));
  g_assert_cmpuint (length, ==, 512);
  dirty_bits_free (bits);
}

/* Digests of the words that are written beside them. */
static void
test_sha256 (void)
{
  const struct {
    uint64_t size, offset, count;
    uint64_t words[3];
    size_t n;
  } cases[] = {
    { 0, 0, 0, { 0 }, 1 },
    { 64 << 10, 0, 1, { 1 }, 1 },
    { 64 << 10 << 6, 65 << 10, 1, { 2 }, 1 },
    { (64 << 10 << 6) + 1, 0, UINT32_MAX, { UINT64_MAX, 1 }, 2 },
    { 64 << 10 << 7, 64 << 10 << 6, 3, { 0, 1 }, 2 },
  };

  for (size_t i = 0; i < G_N_ELEMENTS (cases); ++i) {
    struct dirty_bits *bits = dirty_bits_new (cases[i].size, 16);
    uint64_t words[3];
    g_autofree char *sum = NULL, *expected = NULL;

    for (size_t w = 0; w < cases[i].n; ++w)
      words[w] = GUINT64_TO_LE (cases[i].words[w]);
    dirty_bits_set (bits, cases[i].offset, cases[i].count);
    sum = dirty_bits_sha256 (bits);
    expected = g_compute_checksum_for_data (G_CHECKSUM_SHA256,
                                            (const guchar *) words,
                                            cases[i].n * sizeof words[0]);
    g_assert_cmpstr (sum, ==, expected);
    dirty_bits_free (bits);
  }
}

#define THREADS 4
#define SHARE (UINT64_C (1) << 30)

struct race {
  struct dirty_bits *bits;
  struct dirty_bits *model;     /* of the same, under the lock */
  GMutex lock;
  atomic_uint next, running;
};

/* Each writer has a part of the disk for itself, in which it marks and
 * clears; all mark the part behind it.
 */
static gpointer
write_share (gpointer p)
{
  struct race *race = p;
  const uint64_t begin = atomic_fetch_add (&race->next, 1) * SHARE;
  GRand *rand = g_rand_new_with_seed (begin >> 30);

  for (unsigned i = 0; i < 20000; ++i) {
    const uint64_t at = begin + g_rand_int (rand) % SHARE;
    const uint64_t count = g_rand_int (rand) %
      (g_rand_int (rand) % 8 ? 100000 : 100 << 20);
    const uint64_t length = MIN (count, begin + SHARE - at);

    if (g_rand_int (rand) % 3) {
      dirty_bits_set (race->bits, at, length);
      g_mutex_lock (&race->lock);
      dirty_bits_set (race->model, at, length);
      g_mutex_unlock (&race->lock);
    }
    else {
      dirty_bits_clear (race->bits, at, length);
      g_mutex_lock (&race->lock);
      dirty_bits_clear (race->model, at, length);
      g_mutex_unlock (&race->lock);
    }
    dirty_bits_set (race->bits, THREADS * SHARE +
                    g_rand_int (rand) % SHARE, count);
  }
  g_rand_free (rand);
  atomic_fetch_sub (&race->running, 1);
  return NULL;
}

static void
read_all (struct race *race)
{
  struct dirty_bits *copy = dirty_bits_copy (race->bits);
  struct dirty_bits *other =
    dirty_bits_new (dirty_bits_size (copy), 20);
  g_autofree char *sum = dirty_bits_sha256 (race->bits);
  uint64_t length;

  dirty_bits_merge (other, race->bits);
  g_assert_cmpuint (dirty_bits_count (race->bits), <=,
                    dirty_bits_length (race->bits));
  for (uint64_t at = 0; at < dirty_bits_size (race->bits); at += length) {
    dirty_bits_get (race->bits, at, &length);
    g_assert_cmpuint (length, >, 0);
  }
  dirty_bits_free (copy);
  dirty_bits_free (other);
}

static void
test_threads (void)
{
  struct race race = {
    .bits = dirty_bits_new ((THREADS + 1) * SHARE, 12),
    .model = dirty_bits_new ((THREADS + 1) * SHARE, 12),
    .running = THREADS,
  };
  GThread *threads[THREADS];
  uint8_t got[DIRTY_EXPORT_BITS / 8], expected[DIRTY_EXPORT_BITS / 8];

  g_mutex_init (&race.lock);
  for (unsigned i = 0; i < THREADS; ++i)
    threads[i] = g_thread_new ("writer", write_share, &race);
  while (atomic_load (&race.running) > 0)
    read_all (&race);
  for (unsigned i = 0; i < THREADS; ++i)
    g_thread_join (threads[i]);
  for (uint64_t bit = 0; bit < THREADS * SHARE >> 12;
       bit += DIRTY_EXPORT_BITS) {
    dirty_bits_export (race.bits, bit, got, sizeof got);
    dirty_bits_export (race.model, bit, expected, sizeof expected);
    g_assert_cmpmem (got, sizeof got, expected, sizeof expected);
  }
  dirty_bits_free (race.bits);
  dirty_bits_free (race.model);
  g_mutex_clear (&race.lock);
}

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  g_test_add_func ("/bits/model", test_model);
  g_test_add_func ("/bits/merge", test_merge);
  g_test_add_func ("/bits/includes-large", test_includes_large);
  g_test_add_func ("/bits/huge", test_huge);
  g_test_add_func ("/bits/sha256", test_sha256);
  g_test_add_func ("/bits/threads", test_threads);
  return g_test_run ();
}
