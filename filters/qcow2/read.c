/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Reading.
 *
 * A request is cut into runs.  Data runs are read straight into the
 * client's buffer; zeroes are filled in.
 *
 * Compressed clusters that are wanted whole are decompressed straight
 * into the client's buffer too, and not cached, because whoever reads
 * them so (a copy) will not come back.  Neighbours usually lie behind
 * each other in the container, so one read fetches several of them.
 * Clusters that are wanted in part go through the cache.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "qcow2/codec.h"
#include "qcow2/error.h"
#include "qcow2/mapping.h"

#include "qcow2-filter.h"

/* Compressed clusters that are fetched together, and bytes of them. */
#define GROUP_CLUSTERS 32
#define GROUP_BYTES (512U << 10)

struct group {
  struct qcow2_run runs[GROUP_CLUSTERS];
  size_t count;
  uint64_t start, end;          /* in the container */
};

static int
map (struct handle *h, uint64_t offset, uint64_t count,
     struct qcow2_run *run, GError **error)
{
  return qcow2_map (disk_image (h->disk), &h->view, &h->layer.io,
                    offset, count, run, error);
}

/* Fetch compressed bytes.  The last sector need not be in the file. */
static uint8_t *
fetch (struct handle *h, uint64_t offset, uint32_t length, GError **error)
{
  g_autofree uint8_t *buf = g_try_malloc (length);

  if (!buf)
    qcow2_fail (error, ENOMEM, "no memory for %" PRIu32
                " bytes of compressed data", length);
  else if (qcow2_io_read_padded (&h->layer.io, disk_image (h->disk)->
                                 cluster_size, buf, length, offset,
                                 error) == 0)
    return g_steal_pointer (&buf);
  return NULL;
}

static int
decompress (struct handle *h, const struct qcow2_run *run,
            const uint8_t *src, void *dst, GError **error)
{
  const struct qcow2_image *image = disk_image (h->disk);

  if (qcow2_codec_decompress (image->header->compression, src,
                              run->host_length, dst, image->cluster_size,
                              error) == 0)
    return 0;
  g_prefix_error (error, "compressed cluster at offset %" PRIu64 " (%" PRIu32
                  " bytes) of the container: ",
                  run->host_offset, run->host_length);
  return -1;
}

struct cluster_request {
  struct handle *h;
  const struct qcow2_run *run;
};

static int
load_cluster (void *opaque, uint64_t key, void *data, GError **error)
{
  const struct cluster_request *rq = opaque;
  g_autofree uint8_t *src = fetch (rq->h, rq->run->host_offset,
                                   rq->run->host_length, error);

  return src ? decompress (rq->h, rq->run, src, data, error) : -1;
}

static int
get_cluster (struct handle *h, const struct qcow2_run *run,
             struct qcow2_cache_ref *ref, GError **error)
{
  struct cluster_request rq = { .h = h, .run = run };

  return qcow2_cache_get (disk_image (h->disk)->clusters, run->descriptor,
                          load_cluster, &rq, ref, error);
}

/* Copy a part of a cluster, which begins at byte begin of it. */
static int
read_cluster_part (struct handle *h, const struct qcow2_run *run,
                   uint8_t *buf, uint32_t begin, GError **error)
{
  struct qcow2_cache_ref ref;

  if (get_cluster (h, run, &ref, error) == -1)
    return -1;
  memcpy (buf, (const uint8_t *) ref.data + begin, run->length);
  qcow2_cache_put (&ref);
  return 0;
}

static bool
is_cached (struct handle *h, const struct qcow2_run *run)
{
  struct qcow2_cache_ref ref;

  if (!qcow2_cache_peek (disk_image (h->disk)->clusters, run->descriptor,
                         &ref))
    return false;
  qcow2_cache_put (&ref);
  return true;
}

/* Take run into the group if one read can serve both. */
static bool
group_add (struct group *g, const struct qcow2_run *run)
{
  const uint64_t run_end = run->host_offset + run->host_length;

  if (g->count == GROUP_CLUSTERS)
    return false;
  if (g->count > 0 &&
      (run->host_offset < g->start || run->host_offset > g->end ||
       run_end - g->start > GROUP_BYTES))
    return false;
  if (g->count == 0)
    g->start = run->host_offset;
  g->end = MAX (g->end, run_end);
  g->runs[g->count++] = *run;
  return true;
}

/* Collect the whole compressed clusters that follow first. */
static void
group_fill (struct handle *h, struct group *g, const struct qcow2_run *first,
            uint32_t count, uint64_t offset)
{
  const uint32_t cluster_size = disk_image (h->disk)->cluster_size;
  struct qcow2_run run = *first;

  g->count = 0;
  g->end = 0;
  while (group_add (g, &run)) {
    offset += cluster_size;
    count -= cluster_size;
    /* An error here is met again when the next group begins there. */
    if (count < cluster_size || map (h, offset, count, &run, NULL) == -1 ||
        run.type != QCOW2_RUN_COMPRESSED || is_cached (h, &run))
      break;
  }
}

/* Read whole clusters beginning with first.  *done is how many bytes. */
static int
read_whole_clusters (struct handle *h, const struct qcow2_run *first,
                     uint8_t *buf, uint32_t count, uint64_t offset,
                     uint32_t *done, GError **error)
{
  const uint32_t cluster_size = disk_image (h->disk)->cluster_size;
  g_autofree uint8_t *src = NULL;
  struct group g;

  group_fill (h, &g, first, count, offset);
  src = fetch (h, g.start, g.end - g.start, error);
  if (!src)
    return -1;
  for (size_t i = 0; i < g.count; ++i)
    if (decompress (h, &g.runs[i], src + (g.runs[i].host_offset - g.start),
                    buf + i * cluster_size, error) == -1)
      return -1;
  *done = g.count * cluster_size;
  return 0;
}

static int
read_compressed (struct handle *h, const struct qcow2_run *run,
                 uint8_t *buf, uint32_t count, uint64_t offset,
                 uint32_t *done, GError **error)
{
  const uint32_t cluster_size = disk_image (h->disk)->cluster_size;

  if (run->length == cluster_size && !is_cached (h, run))
    return read_whole_clusters (h, run, buf, count, offset, done, error);
  *done = run->length;
  return read_cluster_part (h, run, buf, offset & (cluster_size - 1), error);
}

int
read_range (struct handle *h, void *buf, uint32_t count, uint64_t offset,
            GError **error)
{
  uint8_t *out = buf;
  struct qcow2_run run;
  uint32_t done;
  int r;

  while (count > 0) {
    if (map (h, offset, count, &run, error) == -1)
      return -1;
    done = run.length;
    switch (run.type) {
    case QCOW2_RUN_DATA:
      r = qcow2_io_read_padded (&h->layer.io,
                                disk_image (h->disk)->cluster_size,
                                out, done, run.host_offset, error);
      break;
    case QCOW2_RUN_COMPRESSED:
      r = read_compressed (h, &run, out, count, offset, &done, error);
      break;
    default:
      memset (out, 0, done);
      r = 0;
    }
    if (r == -1)
      return -1;
    out += done;
    offset += done;
    count -= done;
  }
  return 0;
}

/* Prefetching is a hint: the layer below may decline it, and need not be
 * asked for what lies beyond its end.
 */
static int
prefetch_data (struct handle *h, const struct qcow2_run *run, GError **error)
{
  const struct layer *layer = &h->layer;
  const uint64_t mask = layer->minimum - 1;
  const uint64_t start = run->host_offset & ~mask;
  const uint64_t end = MIN ((run->host_offset + run->length + mask) & ~mask,
                            layer->size);
  int err = EIO;

  if (!layer->can_cache || start >= end)
    return 0;
  if (layer->next->cache (layer->next, end - start, start, 0, &err) == -1)
    return qcow2_fail (error, err ? err : EIO,
                       "prefetching at offset %" PRIu64 " of the container: "
                       "%s", start, g_strerror (err ? err : EIO));
  return 0;
}

int
prefetch_range (struct handle *h, uint32_t count, uint64_t offset,
                GError **error)
{
  struct qcow2_cache_ref ref;
  struct qcow2_run run;

  while (count > 0) {
    if (map (h, offset, count, &run, error) == -1)
      return -1;
    if (run.type == QCOW2_RUN_DATA) {
      run.length = MIN (run.length, h->layer.maximum);
      if (prefetch_data (h, &run, error) == -1)
        return -1;
    }
    else if (run.type == QCOW2_RUN_COMPRESSED) {
      if (get_cluster (h, &run, &ref, error) == -1)
        return -1;
      qcow2_cache_put (&ref);
    }
    offset += run.length;
    count -= run.length;
  }
  return 0;
}
