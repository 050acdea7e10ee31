/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Reading.
 *
 * A request is cut into runs.  Data runs are read straight into the
 * client's buffer, and decrypted there; zeroes are filled in; what an
 * image does not have is read from its backing file, as far as that
 * reaches.
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

/* Encryption works on sectors. */
#define SECTOR UINT64_C (512)

/* An image of the chain as one connection reads it. */
struct reader {
  struct node *node;
  struct source *top;
  const struct qcow2_view *view;
};

struct group {
  struct qcow2_run runs[GROUP_CLUSTERS];
  size_t count;
  uint64_t start, end;          /* in the container */
};

static int
map (const struct reader *rd, uint64_t offset, uint64_t count,
     struct qcow2_run *run, GError **error)
{
  return qcow2_map (rd->node->image, rd->view,
                    &chain_container (rd->node, rd->top)->io,
                    offset, count, run, error);
}

static uint32_t
cluster_size (const struct reader *rd)
{
  return rd->node->image->cluster_size;
}

/* Compressed clusters. */

/* Fetch compressed bytes.  The last sector need not be in the file. */
static uint8_t *
fetch (const struct reader *rd, uint64_t offset, uint32_t length,
       GError **error)
{
  g_autofree uint8_t *buf = g_try_malloc (length);

  if (!buf)
    qcow2_fail (error, ENOMEM, "no memory for %" PRIu32
                " bytes of compressed data", length);
  else if (qcow2_io_read_padded (&chain_container (rd->node, rd->top)->io,
                                 cluster_size (rd), buf, length, offset,
                                 error) == 0)
    return g_steal_pointer (&buf);
  return NULL;
}

static int
decompress (const struct reader *rd, const struct qcow2_run *run,
            const uint8_t *src, void *dst, GError **error)
{
  if (qcow2_codec_decompress (rd->node->image->header->compression, src,
                              run->host_length, dst, cluster_size (rd),
                              error) == 0)
    return 0;
  g_prefix_error (error, "compressed cluster at offset %" PRIu64 " (%" PRIu32
                  " bytes) of the container: ",
                  run->host_offset, run->host_length);
  return -1;
}

struct cluster_request {
  const struct reader *rd;
  const struct qcow2_run *run;
};

static int
load_cluster (void *opaque, uint64_t key, void *data, GError **error)
{
  const struct cluster_request *rq = opaque;
  g_autofree uint8_t *src = fetch (rq->rd, rq->run->host_offset,
                                   rq->run->host_length, error);

  return src ? decompress (rq->rd, rq->run, src, data, error) : -1;
}

static int
get_cluster (const struct reader *rd, const struct qcow2_run *run,
             struct qcow2_cache_ref *ref, GError **error)
{
  struct cluster_request rq = { .rd = rd, .run = run };

  return qcow2_cache_get (rd->node->image->clusters, run->descriptor,
                          load_cluster, &rq, ref, error);
}

/* Copy a part of a cluster, which begins at byte begin of it. */
static int
read_cluster_part (const struct reader *rd, const struct qcow2_run *run,
                   uint8_t *buf, uint32_t begin, GError **error)
{
  struct qcow2_cache_ref ref;

  if (get_cluster (rd, run, &ref, error) == -1)
    return -1;
  memcpy (buf, (const uint8_t *) ref.data + begin, run->length);
  qcow2_cache_put (&ref);
  return 0;
}

static bool
is_cached (const struct reader *rd, const struct qcow2_run *run)
{
  struct qcow2_cache_ref ref;

  if (!qcow2_cache_peek (rd->node->image->clusters, run->descriptor, &ref))
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
group_fill (const struct reader *rd, struct group *g,
            const struct qcow2_run *first, uint64_t count, uint64_t offset)
{
  struct qcow2_run run = *first;

  g->count = 0;
  g->end = 0;
  while (group_add (g, &run)) {
    offset += cluster_size (rd);
    count -= cluster_size (rd);
    /* An error here is met again when the next group begins there. */
    if (count < cluster_size (rd) ||
        map (rd, offset, count, &run, NULL) == -1 ||
        run.type != QCOW2_RUN_COMPRESSED || is_cached (rd, &run))
      break;
  }
}

/* Read whole clusters beginning with first.  *done is how many bytes. */
static int
read_whole_clusters (const struct reader *rd, const struct qcow2_run *first,
                     uint8_t *buf, uint64_t count, uint64_t offset,
                     uint64_t *done, GError **error)
{
  g_autofree uint8_t *src = NULL;
  struct group g;

  group_fill (rd, &g, first, count, offset);
  src = fetch (rd, g.start, g.end - g.start, error);
  if (!src)
    return -1;
  for (size_t i = 0; i < g.count; ++i)
    if (decompress (rd, &g.runs[i], src + (g.runs[i].host_offset - g.start),
                    buf + i * cluster_size (rd), error) == -1)
      return -1;
  *done = (uint64_t) g.count * cluster_size (rd);
  return 0;
}

static int
read_compressed (const struct reader *rd, const struct qcow2_run *run,
                 uint8_t *buf, uint64_t count, uint64_t offset,
                 uint64_t *done, GError **error)
{
  if (run->length == cluster_size (rd) && !is_cached (rd, run))
    return read_whole_clusters (rd, run, buf, count, offset, done, error);
  *done = run->length;
  return read_cluster_part (rd, run, buf, offset & (cluster_size (rd) - 1),
                            error);
}

/* Data as it is stored. */

static int
read_plain (const struct reader *rd, uint64_t host_offset, uint8_t *buf,
            uint64_t count, GError **error)
{
  return qcow2_io_read_padded (&chain_data (rd->node, rd->top)->io,
                               cluster_size (rd), buf, count, host_offset,
                               error);
}

/* Whole sectors, which are decrypted where they are wanted. */
static int
read_sectors (const struct reader *rd, uint64_t host_offset, uint8_t *buf,
              uint64_t count, uint64_t offset, GError **error)
{
  if (read_plain (rd, host_offset, buf, count, error) == -1)
    return -1;
  return qcow2_crypt_decrypt (rd->node->crypt, buf, count, offset,
                              host_offset, error);
}

/* A part of the sector that offset lies in.  *done is its length. */
static int
read_part_of_sector (const struct reader *rd, uint64_t host_offset,
                     uint8_t *buf, uint64_t count, uint64_t offset,
                     uint64_t *done, GError **error)
{
  const uint64_t begin = offset % SECTOR;
  uint8_t sector[SECTOR];

  *done = MIN (count, SECTOR - begin);
  if (read_sectors (rd, host_offset - begin, sector, SECTOR, offset - begin,
                    error) == -1)
    return -1;
  memcpy (buf, sector + begin, *done);
  return 0;
}

static int
read_encrypted (const struct reader *rd, uint64_t host_offset, uint8_t *buf,
                uint64_t count, uint64_t offset, GError **error)
{
  uint64_t done;
  int r;

  while (count > 0) {
    if (offset % SECTOR == 0 && count >= SECTOR) {
      done = count - count % SECTOR;
      r = read_sectors (rd, host_offset, buf, done, offset, error);
    }
    else
      r = read_part_of_sector (rd, host_offset, buf, count, offset, &done,
                               error);
    if (r == -1)
      return -1;
    host_offset += done;
    buf += done;
    offset += done;
    count -= done;
  }
  return 0;
}

/* The chain. */

static int read_node (const struct reader *rd, uint8_t *buf, uint64_t count,
                      uint64_t offset, GError **error);

/* What an image does not have. */
static int
read_backing (const struct reader *rd, uint8_t *buf, uint64_t count,
              uint64_t offset, GError **error)
{
  struct node *backing = rd->node->backing;
  uint64_t inside = 0;

  if (backing && offset < backing->view.size) {
    const struct reader below = {
      .node = backing, .top = rd->top, .view = &backing->view,
    };

    inside = MIN (count, backing->view.size - offset);
    if (read_node (&below, buf, inside, offset, error) == -1)
      return -1;
  }
  memset (buf + inside, 0, count - inside);
  return 0;
}

/* One run.  *done is how many bytes were read, at least that. */
static int
read_run (const struct reader *rd, const struct qcow2_run *run, uint8_t *buf,
          uint64_t count, uint64_t offset, uint64_t *done, GError **error)
{
  *done = run->length;
  switch (run->type) {
  case QCOW2_RUN_UNALLOCATED:
    return read_backing (rd, buf, run->length, offset, error);
  case QCOW2_RUN_DATA:
    if (rd->node->crypt)
      return read_encrypted (rd, run->host_offset, buf, run->length, offset,
                             error);
    return read_plain (rd, run->host_offset, buf, run->length, error);
  case QCOW2_RUN_COMPRESSED:
    return read_compressed (rd, run, buf, count, offset, done, error);
  default:
    memset (buf, 0, run->length);
    return 0;
  }
}

/* Read from an image, or a raw file, that reaches at least so far. */
static int
read_node (const struct reader *rd, uint8_t *buf, uint64_t count,
           uint64_t offset, GError **error)
{
  struct qcow2_run run;
  uint64_t done;

  if (!rd->node->image)
    return rd->node->container->io.pread (&rd->node->container->io, buf,
                                          count, offset, error);
  while (count > 0) {
    if (map (rd, offset, count, &run, error) == -1 ||
        read_run (rd, &run, buf, count, offset, &done, error) == -1)
      return -1;
    buf += done;
    offset += done;
    count -= done;
  }
  return 0;
}

static struct reader
reader_of_handle (struct handle *h)
{
  return (struct reader) {
    .node = disk_top (h->disk), .top = &h->layer.source, .view = &h->view,
  };
}

int
read_range (struct handle *h, void *buf, uint32_t count, uint64_t offset,
            GError **error)
{
  const struct reader rd = reader_of_handle (h);

  return read_node (&rd, buf, count, offset, error);
}

/* Prefetching. */

/* It is a hint: a source may not know it, and is not asked for what lies
 * beyond its end.
 */
static int
prefetch_source (struct source *source, uint64_t offset, uint64_t count,
                 GError **error)
{
  const uint64_t size = source_size (source);

  if (!source->prefetch || offset >= size)
    return 0;
  return source->prefetch (source, offset, MIN (count, size - offset), error);
}

static int prefetch_node (const struct reader *rd, uint64_t count,
                          uint64_t offset, GError **error);

static int
prefetch_backing (const struct reader *rd, uint64_t count, uint64_t offset,
                  GError **error)
{
  struct node *backing = rd->node->backing;
  const struct reader below = {
    .node = backing, .top = rd->top, .view = &backing->view,
  };

  if (offset >= backing->view.size)
    return 0;
  return prefetch_node (&below, MIN (count, backing->view.size - offset),
                        offset, error);
}

static int
prefetch_run (const struct reader *rd, const struct qcow2_run *run,
              uint64_t offset, GError **error)
{
  struct qcow2_cache_ref ref;

  switch (run->type) {
  case QCOW2_RUN_UNALLOCATED:
    if (rd->node->backing)
      return prefetch_backing (rd, run->length, offset, error);
    return 0;
  case QCOW2_RUN_DATA:
    return prefetch_source (chain_data (rd->node, rd->top),
                            run->host_offset, run->length, error);
  case QCOW2_RUN_COMPRESSED:
    if (get_cluster (rd, run, &ref, error) == -1)
      return -1;
    qcow2_cache_put (&ref);
    return 0;
  default:
    return 0;
  }
}

static int
prefetch_node (const struct reader *rd, uint64_t count, uint64_t offset,
               GError **error)
{
  struct qcow2_run run;

  if (!rd->node->image)
    return prefetch_source (rd->node->container, offset, count, error);
  while (count > 0) {
    if (map (rd, offset, count, &run, error) == -1 ||
        prefetch_run (rd, &run, offset, error) == -1)
      return -1;
    offset += run.length;
    count -= run.length;
  }
  return 0;
}

int
prefetch_range (struct handle *h, uint32_t count, uint64_t offset,
                GError **error)
{
  const struct reader rd = reader_of_handle (h);

  return prefetch_node (&rd, count, offset, error);
}
