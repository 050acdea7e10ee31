/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The layer below as a qcow2_io.
 *
 * Each connection reads through its own context, so the layers below see
 * exactly what their thread model promises them, and no lock of ours is
 * held over I/O.  A context has a fixed size, and nbdkit does not
 * survive requests beyond it, so they are stopped here even if another
 * connection sees a larger container.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "qcow2/error.h"

#include "qcow2-filter.h"

/* nbdkit's own limit for one request is 64 MiB. */
#define MAX_REQUEST (UINT32_C (32) << 20)

static const struct layer *
layer_of_io (const struct qcow2_io *io)
{
  return (const struct layer *) ((const char *) io -
                                 G_STRUCT_OFFSET (struct layer, io));
}

static int
read_below (const struct layer *layer, uint8_t *buf, size_t count,
            uint64_t offset, GError **error)
{
  while (count > 0) {
    const uint32_t n = MIN (count, layer->maximum);
    int err = EIO;

    if (layer->next->pread (layer->next, buf, n, offset, 0, &err) == -1)
      return qcow2_fail (error, err ? err : EIO,
                         "reading %" PRIu32 " bytes at offset %" PRIu64
                         " of the container: %s",
                         n, offset, g_strerror (err ? err : EIO));
    buf += n;
    offset += n;
    count -= n;
  }
  return 0;
}

/* Read with both ends moved outwards to multiples of the minimum. */
static int
read_unaligned (const struct layer *layer, void *buf, size_t count,
                uint64_t offset, GError **error)
{
  const uint64_t mask = layer->minimum - 1;
  const uint64_t start = offset & ~mask;
  const uint64_t end = MIN ((offset + count + mask) & ~mask, layer->size);
  g_autofree uint8_t *bounce = g_try_malloc (end - start);

  if (!bounce)
    return qcow2_fail (error, ENOMEM, "no memory for a read of %" PRIu64
                       " bytes", end - start);
  if (read_below (layer, bounce, end - start, start, error) == -1)
    return -1;
  memcpy (buf, bounce + (offset - start), count);
  return 0;
}

static int
layer_pread (const struct qcow2_io *io, void *buf, size_t count,
             uint64_t offset, GError **error)
{
  const struct layer *layer = layer_of_io (io);

  if (offset > layer->size || count > layer->size - offset)
    return qcow2_fail (error, EIO, "%zu bytes at offset %" PRIu64
                       " lie beyond the end of the container (%" PRIu64
                       " bytes)", count, offset, layer->size);
  if (((offset | count) & (layer->minimum - 1)) != 0)
    return read_unaligned (layer, buf, count, offset, error);
  return read_below (layer, buf, count, offset, error);
}

static uint64_t
layer_get_size (const struct qcow2_io *io)
{
  return layer_of_io (io)->size;
}

int
layer_init (struct layer *layer, nbdkit_next *next)
{
  const int64_t size = next->get_size (next);
  const int can_extents = next->can_extents (next);
  const int can_cache = next->can_cache (next);
  uint32_t minimum, preferred, maximum;

  if (size == -1 || can_extents == -1 || can_cache == -1 ||
      next->block_size (next, &minimum, &preferred, &maximum) == -1)
    return -1;

  layer->io.pread = layer_pread;
  layer->io.get_size = layer_get_size;
  layer->next = next;
  layer->size = size;
  /* All three are 0 if the layer has no wishes. */
  layer->minimum = MAX (minimum, 1);
  layer->maximum = maximum ? MIN (maximum, MAX_REQUEST) : MAX_REQUEST;
  layer->maximum = MAX (layer->maximum & ~(layer->minimum - 1),
                        layer->minimum);
  layer->can_extents = can_extents;
  layer->can_cache = can_cache != NBDKIT_CACHE_NONE;
  return 0;
}
