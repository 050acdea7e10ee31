/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The block cache.
 *
 * A set-associative table: a key can lie in any of the WAYS entries of
 * its set.  Each entry has a counter of pins:
 *
 *    n >= 0       the block is valid, n refs use it
 *    UNAVAILABLE  the entry is empty, or its block is being loaded
 *
 * Hits take no lock.  A reader finds its key, raises pins (only from a
 * value >= 0), then looks at the key again: once pinned, an entry is not
 * given to another key, so if it is still the right one it stays so.
 *
 * Misses take the lock of the set's shard, for long enough to claim an
 * entry: one that is empty, else by CLOCK one that nobody pins, changing
 * pins from 0 to UNAVAILABLE.  The load itself runs without the lock.
 * Other threads that want the key see that it is being loaded and wait
 * for the shard's condition.
 */

#include <config.h>

#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "qcow2/cache.h"
#include "qcow2/error.h"

/* More blocks than that are not kept track of, however large the cache
 * may be: what tracks them takes memory from the start.
 */
#define MAX_BLOCKS (1U << 20)

#define WAYS 8
#define SHARDS 16
#define UNAVAILABLE INT_MIN
#define NO_KEY UINT64_MAX

struct qcow2_cache_entry {
  _Atomic uint64_t key;
  atomic_int pins;
  atomic_bool recent;           /* used since CLOCK last came past */
  void *data;                   /* NULL until first used */
};

struct shard {
  GMutex lock;
  GCond loaded;
};

struct qcow2_cache {
  size_t block_size;
  size_t ways, sets;            /* ways is 0 if there is no block at all */
  struct qcow2_cache_entry *entries;
  unsigned char *hands;         /* of CLOCK, one per set, under the lock */
  struct shard shards[SHARDS];
};

struct qcow2_cache *
qcow2_cache_new (size_t block_size, size_t max_bytes)
{
  struct qcow2_cache *cache = g_new0 (struct qcow2_cache, 1);
  const size_t blocks = MIN (max_bytes / block_size, MAX_BLOCKS);

  cache->block_size = block_size;
  cache->ways = MIN (blocks, WAYS);
  cache->sets = cache->ways ? blocks / cache->ways : 0;
  cache->entries = g_new0 (struct qcow2_cache_entry,
                           cache->ways * cache->sets);
  cache->hands = g_new0 (unsigned char, cache->sets);
  for (size_t i = 0; i < cache->ways * cache->sets; ++i) {
    atomic_init (&cache->entries[i].key, NO_KEY);
    atomic_init (&cache->entries[i].pins, UNAVAILABLE);
  }
  for (size_t i = 0; i < SHARDS; ++i) {
    g_mutex_init (&cache->shards[i].lock);
    g_cond_init (&cache->shards[i].loaded);
  }
  return cache;
}

void
qcow2_cache_free (struct qcow2_cache *cache)
{
  if (!cache)
    return;
  for (size_t i = 0; i < cache->ways * cache->sets; ++i)
    g_free (cache->entries[i].data);
  for (size_t i = 0; i < SHARDS; ++i) {
    g_mutex_clear (&cache->shards[i].lock);
    g_cond_clear (&cache->shards[i].loaded);
  }
  g_free (cache->entries);
  g_free (cache->hands);
  g_free (cache);
}

static size_t
set_of_key (const struct qcow2_cache *cache, uint64_t key)
{
  /* Keys are file offsets; multiply to mix all bits into the high ones. */
  return ((key * UINT64_C (0x9e3779b97f4a7c15)) >> 32) % cache->sets;
}

static bool
try_pin (struct qcow2_cache_entry *entry, uint64_t key)
{
  int pins = atomic_load_explicit (&entry->pins, memory_order_relaxed);

  while (pins >= 0) {
    if (atomic_compare_exchange_weak_explicit (&entry->pins, &pins, pins + 1,
                                               memory_order_acquire,
                                               memory_order_relaxed)) {
      if (atomic_load (&entry->key) == key)
        return true;
      atomic_fetch_sub (&entry->pins, 1);
      return false;
    }
  }
  return false;
}

static bool
find_pinned (struct qcow2_cache *cache, size_t set, uint64_t key,
             struct qcow2_cache_ref *ref)
{
  struct qcow2_cache_entry *entry = &cache->entries[set * cache->ways];

  for (size_t i = 0; i < cache->ways; ++i, ++entry) {
    if (atomic_load_explicit (&entry->key, memory_order_relaxed) == key &&
        try_pin (entry, key)) {
      /* Written only when it changes, to keep the cache line shared. */
      if (!atomic_load_explicit (&entry->recent, memory_order_relaxed))
        atomic_store_explicit (&entry->recent, true, memory_order_relaxed);
      ref->entry = entry;
      ref->data = entry->data;
      return true;
    }
  }
  return false;
}

gboolean
qcow2_cache_peek (struct qcow2_cache *cache, uint64_t key,
                  struct qcow2_cache_ref *ref)
{
  return cache->ways && find_pinned (cache, set_of_key (cache, key), key, ref);
}

void
qcow2_cache_put (struct qcow2_cache_ref *ref)
{
  if (ref->entry)
    atomic_fetch_sub_explicit (&ref->entry->pins, 1, memory_order_release);
  else
    g_free ((void *) ref->data);
  ref->data = NULL;
  ref->entry = NULL;
}

/* The functions from here to claim run under the shard's lock. */

static bool
is_loading (struct qcow2_cache *cache, size_t set, uint64_t key)
{
  const struct qcow2_cache_entry *entry = &cache->entries[set * cache->ways];

  for (size_t i = 0; i < cache->ways; ++i, ++entry)
    if (atomic_load (&entry->key) == key &&
        atomic_load (&entry->pins) == UNAVAILABLE)
      return true;
  return false;
}

static bool
try_evict (struct qcow2_cache_entry *entry)
{
  int zero = 0;

  if (atomic_load (&entry->key) == NO_KEY)
    return true;
  if (atomic_load (&entry->pins) == UNAVAILABLE)
    return false;
  if (atomic_exchange (&entry->recent, false))
    return false;
  return atomic_compare_exchange_strong (&entry->pins, &zero, UNAVAILABLE);
}

static struct qcow2_cache_entry *
claim (struct qcow2_cache *cache, size_t set, uint64_t key)
{
  struct qcow2_cache_entry *entries = &cache->entries[set * cache->ways];

  /* Twice round: the first round may only find recent ones. */
  for (size_t i = 0; i < 2 * cache->ways; ++i) {
    struct qcow2_cache_entry *entry = &entries[cache->hands[set]];

    cache->hands[set] = (cache->hands[set] + 1) % cache->ways;
    if (try_evict (entry)) {
      atomic_store (&entry->key, key);
      return entry;
    }
  }
  return NULL;
}

static void *
block_alloc (const struct qcow2_cache *cache, GError **error)
{
  void *data = g_try_malloc (cache->block_size);

  if (!data)
    qcow2_fail (error, ENOMEM, "no memory for a block of %zu bytes",
                cache->block_size);
  return data;
}

static int
load_private (struct qcow2_cache *cache, uint64_t key, qcow2_cache_load load,
              void *opaque, struct qcow2_cache_ref *ref, GError **error)
{
  void *data = block_alloc (cache, error);

  if (!data)
    return -1;
  if (load (opaque, key, data, error) == -1) {
    g_free (data);
    return -1;
  }
  ref->entry = NULL;
  ref->data = data;
  return 0;
}

static int
load_entry (struct qcow2_cache *cache, struct shard *shard,
            struct qcow2_cache_entry *entry, uint64_t key,
            qcow2_cache_load load, void *opaque, struct qcow2_cache_ref *ref,
            GError **error)
{
  int r = -1;

  if (!entry->data)
    entry->data = block_alloc (cache, error);
  if (entry->data)
    r = load (opaque, key, entry->data, error);

  g_mutex_lock (&shard->lock);
  if (r == 0) {
    ref->entry = entry;
    ref->data = entry->data;
    atomic_store (&entry->recent, true);
    atomic_store (&entry->pins, 1);
  }
  else
    atomic_store (&entry->key, NO_KEY);
  g_cond_broadcast (&shard->loaded);
  g_mutex_unlock (&shard->lock);
  return r;
}

int
qcow2_cache_get (struct qcow2_cache *cache, uint64_t key,
                 qcow2_cache_load load, void *opaque,
                 struct qcow2_cache_ref *ref, GError **error)
{
  struct qcow2_cache_entry *entry;
  struct shard *shard;
  size_t set;

  if (!cache->ways)
    return load_private (cache, key, load, opaque, ref, error);

  set = set_of_key (cache, key);
  if (find_pinned (cache, set, key, ref))
    return 0;

  shard = &cache->shards[set % SHARDS];
  g_mutex_lock (&shard->lock);
  while (is_loading (cache, set, key))
    g_cond_wait (&shard->loaded, &shard->lock);
  if (find_pinned (cache, set, key, ref)) {
    g_mutex_unlock (&shard->lock);
    return 0;
  }
  entry = claim (cache, set, key);
  g_mutex_unlock (&shard->lock);

  if (!entry)
    return load_private (cache, key, load, opaque, ref, error);
  return load_entry (cache, shard, entry, key, load, opaque, ref, error);
}
