/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Block status.
 *
 * What the image does not hold is a hole; zeroes for which it holds
 * space are no hole.  Data clusters are data, even if the container is a
 * sparse file, because that is also what qemu-img says; only in an image
 * made with preallocation=metadata, where most are holes below, the
 * layer below is asked which of them read as zeroes.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "qcow2/error.h"
#include "qcow2/mapping.h"

#include "qcow2-filter.h"

static uint32_t
run_extent_type (const struct qcow2_run *run)
{
  switch (run->type) {
  case QCOW2_RUN_UNALLOCATED:
  case QCOW2_RUN_ZERO:
    return NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO;
  case QCOW2_RUN_ZERO_ALLOCATED:
    return NBDKIT_EXTENT_ZERO;
  default:
    return 0;
  }
}

static int
add (struct nbdkit_extents *extents, uint64_t offset, uint64_t length,
     uint32_t type, GError **error)
{
  if (nbdkit_add_extent (extents, offset, length, type) == -1)
    return qcow2_fail (error, errno ? errno : ENOMEM,
                       "the list of extents cannot grow");
  return 0;
}

/* Add those of the layer below for a data run, which begins at offset. */
static int
add_from_below (struct handle *h, const struct qcow2_run *run,
                uint64_t offset, struct nbdkit_extents *extents,
                GError **error)
{
  nbdkit_next *next = h->layer.next;
  const uint64_t inside =
    MIN (run->length, h->layer.size - MIN (h->layer.size, run->host_offset));
  struct nbdkit_extents *below;
  int err = EIO, r = 0;

  if (inside) {
    below = nbdkit_extents_full (next, inside, run->host_offset, 0, &err);
    if (!below)
      return qcow2_fail (error, err ? err : EIO, "asking for the extents at "
                         "offset %" PRIu64 " of the container: %s",
                         run->host_offset, g_strerror (err ? err : EIO));
    for (size_t i = 0; i < nbdkit_extents_count (below) && r == 0; ++i) {
      const struct nbdkit_extent e = nbdkit_get_extent (below, i);

      r = add (extents, offset + (e.offset - run->host_offset), e.length,
               e.type & NBDKIT_EXTENT_ZERO, error);
    }
    nbdkit_extents_free (below);
  }
  if (r == 0 && inside < run->length)
    r = add (extents, offset + inside, run->length - inside, 0, error);
  return r;
}

int
extents_range (struct handle *h, uint32_t count, uint64_t offset,
               bool only_one, struct nbdkit_extents *extents, GError **error)
{
  const bool look_below = disk_is_preallocated (h->disk, &h->layer);
  struct qcow2_run run;
  int r;

  while (count > 0) {
    if (qcow2_map (disk_image (h->disk), &h->view, &h->layer.io, offset,
                   count, &run, error) == -1)
      return -1;
    if (look_below && run.type == QCOW2_RUN_DATA)
      r = add_from_below (h, &run, offset, extents, error);
    else
      r = add (extents, offset, run.length, run_extent_type (&run), error);
    if (r == -1)
      return -1;
    if (only_one)
      break;
    offset += run.length;
    count -= run.length;
  }
  return 0;
}
