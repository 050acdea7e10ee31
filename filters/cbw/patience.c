/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-filter.h>

#include "patience.h"

/* How often we look around. */
#define PERIOD (G_USEC_PER_SEC / 4)

gboolean
patience_is_over (void)
{
  return nbdkit_nanosleep (0, 1) == -1;
}

int
patience_wait (GCond *cond, GMutex *lock, gint64 limit)
{
  const gint64 period_end = g_get_monotonic_time () + PERIOD;
  gboolean over;

  if (limit && limit <= period_end)
    return g_cond_wait_until (cond, lock, limit) ? 0 : ETIMEDOUT;
  if (g_cond_wait_until (cond, lock, period_end))
    return 0;
  g_mutex_unlock (lock);
  over = patience_is_over ();
  g_mutex_lock (lock);
  return over ? ESHUTDOWN : 0;
}
