/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The layer below as a source.
 *
 * Each connection reads through its own context, so the layers below see
 * exactly what their thread model promises them, and no lock of ours is
 * held over I/O.  A context has a fixed size, and nbdkit does not
 * survive requests beyond it, so they are stopped (in limits_pread) even
 * if another connection sees a larger container.
 *
 * An export that is opened as a backing file is shared by connections.
 * nbdkit serialises the requests of connections, but not those on such a
 * context, so there the lock is ours.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "dirty/node.h"
#include "qcow2/error.h"

#include "qcow2-filter.h"

/* The first bytes of a container, to tell one from another. */
#define HEAD 512

struct export {
  struct layer layer;
  GMutex lock;
};

static struct layer *
layer_of_io (const struct qcow2_io *io)
{
  return (struct layer *) source_of_io (io);
}

static void
lock_layer (const struct layer *layer)
{
  if (layer->lock)
    g_mutex_lock (layer->lock);
}

static void
unlock_layer (const struct layer *layer)
{
  if (layer->lock)
    g_mutex_unlock (layer->lock);
}

static int
fail_below (GError **error, int err, const char *what, uint64_t count,
            uint64_t offset)
{
  err = err ? err : EIO;
  return qcow2_fail (error, err, "%s %" PRIu64 " bytes at offset %" PRIu64
                     " of the container: %s", what, count, offset,
                     g_strerror (err));
}

static int
read_below (struct source *source, void *buf, uint32_t count,
            uint64_t offset, GError **error)
{
  const struct layer *layer = (struct layer *) source;
  int err = 0, r;

  lock_layer (layer);
  r = layer->next->pread (layer->next, buf, count, offset, 0, &err);
  unlock_layer (layer);
  return r == -1 ? fail_below (error, err, "reading", count, offset) : 0;
}

static int
layer_pread (const struct qcow2_io *io, void *buf, size_t count,
             uint64_t offset, GError **error)
{
  struct layer *layer = layer_of_io (io);

  return limits_pread (&layer->limits, read_below, &layer->source,
                       buf, count, offset, error);
}

static uint64_t
layer_get_size (const struct qcow2_io *io)
{
  return layer_of_io (io)->limits.size;
}

/* As nbdkit_extents_full, which does not lock, for up to 4 GiB. */
static struct nbdkit_extents *
extents_below (const struct layer *layer, uint32_t count, uint64_t offset,
               GError **error)
{
  struct nbdkit_extents *extents;
  int err = 0;

  lock_layer (layer);
  extents = nbdkit_extents_full (layer->next, count, offset, 0, &err);
  unlock_layer (layer);
  if (!extents)
    fail_below (error, err, "asking for the extents of", count, offset);
  return extents;
}

static int
layer_extents (struct source *source, uint64_t offset, uint64_t count,
               source_add_extent add, void *opaque, GError **error)
{
  const struct layer *layer = (struct layer *) source;
  const uint64_t end = offset + count;
  uint64_t pos = offset, part_start, part_end;
  int r = 0;

  while (pos < end && r == 0) {
    struct nbdkit_extents *extents;

    part_start = pos;
    part_end = MIN (end, pos + (UINT64_C (1) << 30));
    limits_align (&layer->limits, &part_start, &part_end);
    extents = extents_below (layer, part_end - part_start, part_start, error);
    if (!extents)
      return -1;
    for (size_t i = 0; i < nbdkit_extents_count (extents) && r == 0; ++i) {
      const struct nbdkit_extent e = nbdkit_get_extent (extents, i);
      const uint64_t e_end = MIN (e.offset + e.length, end);

      if (e_end > pos) {
        r = add (opaque, pos, e_end - pos, e.type, error);
        pos = e_end;
      }
    }
    nbdkit_extents_free (extents);
  }
  return r;
}

static int
layer_prefetch (struct source *source, uint64_t offset, uint64_t count,
                GError **error)
{
  const struct layer *layer = (struct layer *) source;
  uint64_t start = offset, end = offset + count;
  int err = 0, r;

  limits_align (&layer->limits, &start, &end);
  while (start < end) {
    const uint32_t n = MIN (end - start, layer->limits.maximum);

    lock_layer (layer);
    r = layer->next->cache (layer->next, n, start, 0, &err);
    unlock_layer (layer);
    if (r == -1)
      return fail_below (error, err, "prefetching", n, start);
    start += n;
  }
  return 0;
}

/* The local file, if its size and its first bytes say that it is what
 * the layer serves.
 */
static int64_t
layer_allocated (struct source *source)
{
  const size_t n = MIN (source_size (source), HEAD);
  uint8_t ours[HEAD] = { 0 }, theirs[HEAD] = { 0 };
  struct source *file;
  int64_t result = -1;

  if (!config.file.path || config.file.times != 1)
    return -1;
  file = file_open (config.file.path, NULL);
  if (!file)
    return -1;
  if (source_size (file) == source_size (source) &&
      source->io.pread (&source->io, ours, n, 0, NULL) == 0 &&
      file->io.pread (&file->io, theirs, n, 0, NULL) == 0 &&
      memcmp (ours, theirs, n) == 0)
    result = file->allocated (file);
  source_close (file);
  return result;
}

int
layer_init (struct layer *layer, nbdkit_next *next, const char *base)
{
  const int64_t size = next->get_size (next);
  const int can_extents = next->can_extents (next);
  const int can_cache = next->can_cache (next);
  uint32_t minimum, preferred, maximum;

  if (size == -1 || can_extents == -1 || can_cache == -1 ||
      next->block_size (next, &minimum, &preferred, &maximum) == -1)
    return -1;

  layer->source.name = (char *)
    (dirty_nodes_each () ? base : config.file.path ? config.file.path :
     "the image");
  layer->source.io.pread = layer_pread;
  layer->source.io.get_size = layer_get_size;
  layer->source.extents = can_extents ? layer_extents : NULL;
  layer->source.prefetch =
    can_cache != NBDKIT_CACHE_NONE ? layer_prefetch : NULL;
  layer->source.allocated = layer_allocated;
  layer->next = next;
  limits_init (&layer->limits, size, minimum, maximum);
  return 0;
}

static void
export_close (struct source *source)
{
  struct export *export = (struct export *) source;

  export->layer.next->finalize (export->layer.next);
  nbdkit_next_context_close (export->layer.next);
  g_mutex_clear (&export->lock);
  g_free (source->name);
  g_free (export);
}

struct source *
layer_open_export (nbdkit_backend *backend, const char *exportname,
                   GError **error)
{
  g_autofree char *shown = g_strescape (exportname, NULL);
  nbdkit_next *next = nbdkit_next_context_open (backend, 1, exportname, 1);
  struct export *export = g_new0 (struct export, 1);

  if (!next || next->prepare (next) == -1 ||
      layer_init (&export->layer, next, "") == -1) {
    if (next)
      nbdkit_next_context_close (next);
    g_free (export);
    qcow2_fail (error, EIO, "the layer below cannot open the export \"%s\"",
                shown);
    return NULL;
  }
  g_mutex_init (&export->lock);
  if (config.thread_model != NBDKIT_THREAD_MODEL_PARALLEL)
    export->layer.lock = &export->lock;
  export->layer.source.name = g_strdup_printf ("export \"%s\"", shown);
  export->layer.source.allocated = NULL;
  export->layer.source.close = export_close;
  return &export->layer.source;
}
