/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The layer below is asked for a whole region, however little a client
 * wants to know of it, and once: who wants to know about the same waits a
 * while, as he would for an answer of his own.
 *
 * If the layer fails, or says less than it was asked for, there is nothing
 * to be gained: then questions are passed on as they are.  So is that of
 * who has waited long enough, as it may only be that connection which hangs.
 *
 * Guests that write ask for themselves (copy.c), as they do not wait for
 * readers.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "patience.h"
#include "status.h"

/* Bytes. */
#define REGION (UINT64_C (1) << 30)

/* What is kept at most; an extent takes up to 36 bytes. */
#define MAX_ANSWERS 256
#define MAX_EXTENTS (1 << 19)

#define WAIT_SECONDS 1

void
status_cache_init (struct status_cache *cache, uint64_t size)
{
  memset (cache, 0, sizeof *cache);
  cache->size = size;
  g_mutex_init (&cache->lock);
  g_cond_init (&cache->changed);
  g_queue_init (&cache->answers);
  g_queue_init (&cache->asking);
}

void
status_cache_clear (struct status_cache *cache)
{
  g_queue_clear_full (&cache->answers, (GDestroyNotify) status_unref);
  g_mutex_clear (&cache->lock);
  g_cond_clear (&cache->changed);
}

void
status_unref (struct status *status)
{
  if (!status || !refs_dec (&status->refs))
    return;
  nbdkit_extents_free (status->extents);
  g_free (status);
}

static size_t
count (const struct status *status)
{
  return nbdkit_extents_count (status->extents);
}

size_t
status_find (const struct status *status, uint64_t offset)
{
  size_t first = 0, end = count (status);

  while (end - first > 1) {
    const size_t middle = first + (end - first) / 2;

    if (nbdkit_get_extent (status->extents, middle).offset <= offset)
      first = middle;
    else
      end = middle;
  }
  return first;
}

/* Asking.  Returns NULL with *err set.  For layers that cannot tell nbdkit
 * says that all is data.
 */
static struct status *
ask (const struct below *below, uint64_t offset, uint64_t end,
     uint32_t flags, int *err)
{
  struct nbdkit_extents *extents;
  struct nbdkit_extent last;
  struct status *status;
  size_t n = 0;

  if (below_can_extents (below) == -1) {
    *err = EIO;
    return NULL;
  }
  extents = nbdkit_extents_new (offset, end);
  if (!extents) {
    *err = ENOMEM;
    return NULL;
  }
  *err = 0;
  below_lock (below);
  if (below->next->extents (below->next, end - offset, offset, flags,
                            extents, err) == 0)
    n = nbdkit_extents_count (extents);
  below_unlock (below);
  if (n == 0) {
    *err = *err ? *err : EIO;
    nbdkit_extents_free (extents);
    return NULL;
  }
  last = nbdkit_get_extent (extents, n - 1);
  status = g_new (struct status, 1);
  refs_init (&status->refs, 1);
  status->start = offset;
  status->end = last.offset + last.length;
  status->extents = extents;
  return status;
}

/* Keeping.  All with the lock held. */

static struct status *
find_answer (struct status_cache *cache, uint64_t region)
{
  for (GList *l = cache->answers.head; l; l = l->next) {
    struct status *status = l->data;

    if (status->start / REGION == region) {
      g_queue_unlink (&cache->answers, l);
      g_queue_push_head_link (&cache->answers, l);
      refs_inc (&status->refs);
      return status;
    }
  }
  return NULL;
}

static bool
is_asking (const struct status_cache *cache, uint64_t region)
{
  for (const GList *l = cache->asking.head; l; l = l->next)
    if (*(const uint64_t *) l->data == region)
      return true;
  return false;
}

static void
keep_answer (struct status_cache *cache, struct status *status)
{
  struct status *oldest;

  refs_inc (&status->refs);
  g_queue_push_head (&cache->answers, status);
  cache->n_extents += count (status);
  while (cache->answers.length > 1 &&
         (cache->answers.length > MAX_ANSWERS ||
          cache->n_extents > MAX_EXTENTS)) {
    oldest = g_queue_pop_tail (&cache->answers);
    cache->n_extents -= count (oldest);
    status_unref (oldest);
  }
}

/* Without the lock while the layer below is asked.  NULL if that was of no
 * use.
 */
static struct status *
ask_and_keep (struct status_cache *cache, const struct below *below,
              uint64_t region)
{
  const uint64_t start = region * REGION;
  const uint64_t end = MIN (start + REGION, cache->size);
  struct status *status;
  int err;

  g_queue_push_tail (&cache->asking, &region);
  g_mutex_unlock (&cache->lock);
  status = ask (below, start, end, 0, &err);
  g_mutex_lock (&cache->lock);
  g_queue_remove (&cache->asking, &region);
  g_cond_broadcast (&cache->changed);
  if (status && status->end == end)
    keep_answer (cache, status);
  else {
    cache->useless = true;
    g_clear_pointer (&status, status_unref);
  }
  return status;
}

struct status *
status_ask (struct status_cache *cache, const struct below *below,
            uint64_t offset, uint64_t end, uint32_t flags, int *err)
{
  const gint64 limit = g_get_monotonic_time () +
    WAIT_SECONDS * G_USEC_PER_SEC;
  const uint64_t region = offset / REGION;
  struct status *status;
  int error = 0;

  g_mutex_lock (&cache->lock);
  while ((status = find_answer (cache, region)) == NULL && !error &&
         !cache->useless && is_asking (cache, region))
    error = patience_wait (&cache->changed, &cache->lock, limit);
  if (!status && !error && !cache->useless)
    status = ask_and_keep (cache, below, region);
  g_mutex_unlock (&cache->lock);
  return status ? status : ask (below, offset, end, flags, err);
}
