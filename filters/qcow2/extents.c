/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Block status.
 *
 * What no image of the chain holds is a hole; zeroes for which one holds
 * space are no hole.  Data clusters are data, even if the container is a
 * sparse file, because that is also what qemu-img says; only in an image
 * made with preallocation=metadata, where most are holes below, the
 * container is asked which of them read as zeroes.
 *
 * Ranges are found from the beginning to the end and joined as far as
 * they are of one type, whichever image of the chain they come from.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "qcow2/error.h"
#include "qcow2/mapping.h"

#include "qcow2-filter.h"

#define HOLE NBDKIT_EXTENT_HOLE
#define ZERO NBDKIT_EXTENT_ZERO

/* Where the ranges go. */
struct collector {
  struct nbdkit_extents *extents;
  bool only_one;                /* the client wants the first only */
  uint64_t offset, length;      /* of the range that is not yet added */
  uint32_t type;
};

static int
collector_flush (struct collector *c, GError **error)
{
  if (c->length > 0 &&
      nbdkit_add_extent (c->extents, c->offset, c->length, c->type) == -1)
    return qcow2_fail (error, ENOMEM, "the list of extents cannot grow");
  c->length = 0;
  return 0;
}

/* Returns 0, 1 if that was enough, or -1 with error set. */
static int
collect (struct collector *c, uint64_t offset, uint64_t length,
         uint32_t type, GError **error)
{
  if (c->length > 0 && c->type == type) {
    c->length += length;
    return 0;
  }
  if (c->length > 0 && c->only_one)
    return 1;
  if (collector_flush (c, error) == -1)
    return -1;
  c->offset = offset;
  c->length = length;
  c->type = type;
  return 0;
}

/* Ranges of a source, which lie elsewhere on the disk. */
struct shifted {
  struct collector *collector;
  uint64_t offset;              /* on the disk ... */
  uint64_t source_offset;       /* ... of this place in the source */
  uint32_t mask;                /* what is taken over of their types */
};

static int
collect_shifted (void *opaque, uint64_t offset, uint64_t length,
                 uint32_t type, GError **error)
{
  const struct shifted *s = opaque;

  return collect (s->collector, offset - s->source_offset + s->offset,
                  length, type & s->mask, error);
}

/* What a source says of count bytes; what lies beyond its end is data. */
static int
source_range (struct collector *c, struct source *source,
              uint64_t source_offset, uint64_t count, uint64_t offset,
              uint32_t mask, GError **error)
{
  const uint64_t size = source_size (source);
  const uint64_t inside =
    source_offset < size ? MIN (count, size - source_offset) : 0;
  struct shifted shifted = {
    .collector = c, .offset = offset, .source_offset = source_offset,
    .mask = mask,
  };
  int r = 0;

  if (inside > 0)
    r = source->extents ?
      source->extents (source, source_offset, inside, collect_shifted,
                       &shifted, error) :
      collect (c, offset, inside, 0, error);
  if (r == 0 && inside < count)
    r = collect (c, offset + inside, count - inside, 0, error);
  return r;
}

static int node_range (struct collector *c, struct node *node,
                       struct source *top, const struct qcow2_view *view,
                       uint64_t count, uint64_t offset, GError **error);

static int
backing_range (struct collector *c, struct node *node, struct source *top,
               uint64_t count, uint64_t offset, GError **error)
{
  struct node *backing = node->backing;
  uint64_t inside = 0;
  int r = 0;

  if (node->ignored_backing)
    return collect (c, offset, count, HOLE, error);
  if (backing && offset < backing->view.size) {
    inside = MIN (count, backing->view.size - offset);
    r = node_range (c, backing, top, &backing->view, inside, offset, error);
  }
  if (r == 0 && inside < count)
    r = collect (c, offset + inside, count - inside, HOLE | ZERO, error);
  return r;
}

static int
run_range (struct collector *c, struct node *node, struct source *top,
           const struct qcow2_run *run, uint64_t offset, GError **error)
{
  switch (run->type) {
  case QCOW2_RUN_UNALLOCATED:
    return backing_range (c, node, top, run->length, offset, error);
  case QCOW2_RUN_ZERO:
    return collect (c, offset, run->length, HOLE | ZERO, error);
  case QCOW2_RUN_ZERO_ALLOCATED:
    return collect (c, offset, run->length, ZERO, error);
  case QCOW2_RUN_DATA:
    if (chain_is_preallocated (node, top))
      return source_range (c, chain_container (node, top), run->host_offset,
                           run->length, offset, ZERO, error);
    break;
  case QCOW2_RUN_COMPRESSED:
    break;
  }
  return collect (c, offset, run->length, 0, error);
}

static int
node_range (struct collector *c, struct node *node, struct source *top,
            const struct qcow2_view *view, uint64_t count, uint64_t offset,
            GError **error)
{
  struct qcow2_run run;
  int r = 0;

  if (!node->image)
    return source_range (c, node->container, offset, count, offset,
                         HOLE | ZERO, error);
  while (count > 0 && r == 0) {
    if (qcow2_map (node->image, view, &chain_container (node, top)->io,
                   offset, count, &run, error) == -1)
      return -1;
    r = run_range (c, node, top, &run, offset, error);
    offset += run.length;
    count -= run.length;
  }
  return r;
}

int
extents_range (struct handle *h, uint32_t count, uint64_t offset,
               bool only_one, struct nbdkit_extents *extents, GError **error)
{
  struct collector c = { .extents = extents, .only_one = only_one };

  if (node_range (&c, disk_top (h->disk), &h->layer.source, &h->view, count,
                  offset, error) == -1)
    return -1;
  return collector_flush (&c, error);
}
