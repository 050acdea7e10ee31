/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The cache: bounds, failures, and many threads at once. */

#include <config.h>

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "qcow2/cache.h"
#include "qcow2/error.h"

#define BLOCK 64
#define KEYS 100
#define THREADS 8
#define ROUNDS 20000

struct loader {
  atomic_uint loads;
  int fail;
};

static int
load (void *opaque, uint64_t key, void *data, GError **error)
{
  struct loader *l = opaque;

  atomic_fetch_add (&l->loads, 1);
  if (l->fail)
    return qcow2_fail (error, l->fail, "it was told to fail");
  memset (data, key, BLOCK);
  return 0;
}

static void
check_block (const struct qcow2_cache_ref *ref, uint64_t key)
{
  const uint8_t *p = ref->data;

  for (unsigned i = 0; i < BLOCK; ++i)
    g_assert_cmpuint (p[i], ==, key);
}

static void
get (struct qcow2_cache *cache, struct loader *l, uint64_t key)
{
  struct qcow2_cache_ref ref;
  g_autoptr (GError) error = NULL;

  qcow2_cache_get (cache, key, load, l, &ref, &error);
  g_assert_no_error (error);
  check_block (&ref, key);
  qcow2_cache_put (&ref);
}

static void
test_hit (void)
{
  struct qcow2_cache *cache = qcow2_cache_new (BLOCK, 64 * BLOCK);
  struct qcow2_cache_ref ref;
  struct loader l = { 0 };

  g_assert_false (qcow2_cache_peek (cache, 7, &ref));
  for (unsigned i = 0; i < 10; ++i)
    get (cache, &l, 7);
  g_assert_cmpuint (l.loads, ==, 1);
  g_assert_true (qcow2_cache_peek (cache, 7, &ref));
  check_block (&ref, 7);
  qcow2_cache_put (&ref);
  qcow2_cache_free (cache);
}

static void
test_eviction (gconstpointer data)
{
  const size_t blocks = GPOINTER_TO_SIZE (data);
  struct qcow2_cache *cache = qcow2_cache_new (BLOCK, blocks * BLOCK);
  struct loader l = { 0 };

  for (unsigned round = 0; round < 3; ++round)
    for (uint64_t key = 0; key < KEYS; ++key)
      get (cache, &l, key);
  g_assert_cmpuint (l.loads, >=, KEYS);
  qcow2_cache_free (cache);
}

/* While all blocks are in use, others are private. */
static void
test_all_pinned (void)
{
  struct qcow2_cache *cache = qcow2_cache_new (BLOCK, 4 * BLOCK);
  struct qcow2_cache_ref refs[KEYS];
  struct loader l = { 0 };
  unsigned private = 0;

  for (uint64_t key = 0; key < KEYS; ++key) {
    g_assert_cmpint (qcow2_cache_get (cache, key, load, &l, &refs[key], NULL),
                     ==, 0);
    private += refs[key].entry == NULL;
  }
  g_assert_cmpuint (private, ==, KEYS - 4);
  for (uint64_t key = 0; key < KEYS; ++key) {
    check_block (&refs[key], key);
    qcow2_cache_put (&refs[key]);
  }
  get (cache, &l, 99);
  qcow2_cache_free (cache);
}

static void
test_failure (void)
{
  struct qcow2_cache *cache = qcow2_cache_new (BLOCK, 4 * BLOCK);
  struct loader l = { .fail = EIO };
  struct qcow2_cache_ref ref;
  g_autoptr (GError) error = NULL;

  g_assert_cmpint (qcow2_cache_get (cache, 1, load, &l, &ref, &error), ==,
                   -1);
  g_assert_error (error, QCOW2_ERROR, EIO);
  g_assert_false (qcow2_cache_peek (cache, 1, &ref));
  l.fail = 0;
  get (cache, &l, 1);
  qcow2_cache_free (cache);
}

/* Threads that miss one block together load it once. */

struct slow {
  struct qcow2_cache *cache;
  atomic_uint loads;
};

static int
load_slowly (void *opaque, uint64_t key, void *data, GError **error)
{
  struct slow *s = opaque;

  atomic_fetch_add (&s->loads, 1);
  g_usleep (50000);
  memset (data, key, BLOCK);
  return 0;
}

static gpointer
get_slowly (gpointer opaque)
{
  struct slow *s = opaque;
  struct qcow2_cache_ref ref;

  g_assert_cmpint (qcow2_cache_get (s->cache, 5, load_slowly, s, &ref, NULL),
                   ==, 0);
  check_block (&ref, 5);
  qcow2_cache_put (&ref);
  return NULL;
}

static void
test_load_once (void)
{
  struct slow s = { .cache = qcow2_cache_new (BLOCK, 16 * BLOCK) };
  GThread *threads[THREADS];

  for (unsigned i = 0; i < THREADS; ++i)
    threads[i] = g_thread_new ("get", get_slowly, &s);
  for (unsigned i = 0; i < THREADS; ++i)
    g_thread_join (threads[i]);
  g_assert_cmpuint (s.loads, ==, 1);
  qcow2_cache_free (s.cache);
}

/* Many threads, more keys than blocks, and now and then a failure. */

static int
load_sometimes (void *opaque, uint64_t key, void *data, GError **error)
{
  if (g_random_int_range (0, 20) == 0)
    return qcow2_fail (error, EIO, "bad luck");
  memset (data, key, BLOCK);
  return 0;
}

static gpointer
hammer (gpointer opaque)
{
  struct qcow2_cache *cache = opaque;
  GRand *rand = g_rand_new ();

  for (unsigned i = 0; i < ROUNDS; ++i) {
    const uint64_t key = g_rand_int_range (rand, 0, KEYS);
    struct qcow2_cache_ref ref;

    if (qcow2_cache_get (cache, key, load_sometimes, NULL, &ref, NULL) == 0) {
      check_block (&ref, key);
      qcow2_cache_put (&ref);
    }
  }
  g_rand_free (rand);
  return NULL;
}

static void
test_threads (void)
{
  struct qcow2_cache *cache = qcow2_cache_new (BLOCK, KEYS / 3 * BLOCK);
  GThread *threads[THREADS];

  for (unsigned i = 0; i < THREADS; ++i)
    threads[i] = g_thread_new ("hammer", hammer, cache);
  for (unsigned i = 0; i < THREADS; ++i)
    g_thread_join (threads[i]);
  qcow2_cache_free (cache);
}

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  g_test_add_func ("/cache/hit", test_hit);
  g_test_add_data_func ("/cache/eviction/none", GSIZE_TO_POINTER (0),
                        test_eviction);
  g_test_add_data_func ("/cache/eviction/one", GSIZE_TO_POINTER (1),
                        test_eviction);
  g_test_add_data_func ("/cache/eviction/few", GSIZE_TO_POINTER (20),
                        test_eviction);
  g_test_add_data_func ("/cache/eviction/enough", GSIZE_TO_POINTER (1000),
                        test_eviction);
  g_test_add_func ("/cache/all-pinned", test_all_pinned);
  g_test_add_func ("/cache/failure", test_failure);
  g_test_add_func ("/cache/load-once", test_load_once);
  g_test_add_func ("/cache/threads", test_threads);
  return g_test_run ();
}
