/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>

#include "below.h"

int
below_can_extents (const struct below *below)
{
  int r;

  /* nbdkit remembers the answer, but without a lock. */
  g_mutex_lock (below->probe);
  below_lock (below);
  r = below->next->can_extents (below->next);
  below_unlock (below);
  g_mutex_unlock (below->probe);
  return r;
}

int
below_read (const struct below *below, void *buf, uint64_t count,
            uint64_t offset)
{
  uint8_t *p = buf;

  while (count > 0) {
    const uint32_t n = MIN (count, below->maximum);
    int err = 0, r;

    below_lock (below);
    r = below->next->pread (below->next, p, n, offset, 0, &err);
    below_unlock (below);
    if (r == -1)
      return err ? err : EIO;
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}
