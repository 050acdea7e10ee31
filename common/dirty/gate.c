/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A write announces itself, then looks whether the gate is closed; who
 * closes it says so, then looks who is inside.  As both are sequentially
 * consistent, at least one of the two sees the other.
 */

#include <config.h>

#include "dirty/gate.h"

void
dirty_gate_init (struct dirty_gate *gate)
{
  atomic_init (&gate->inside, 0);
  atomic_init (&gate->closed, false);
  g_mutex_init (&gate->lock);
  g_cond_init (&gate->changed);
}

void
dirty_gate_clear (struct dirty_gate *gate)
{
  g_mutex_clear (&gate->lock);
  g_cond_clear (&gate->changed);
}

static void
wait_until_open (struct dirty_gate *gate)
{
  g_mutex_lock (&gate->lock);
  while (atomic_load (&gate->closed))
    g_cond_wait (&gate->changed, &gate->lock);
  g_mutex_unlock (&gate->lock);
}

void
dirty_gate_enter (struct dirty_gate *gate)
{
  for (;;) {
    atomic_fetch_add (&gate->inside, 1);
    if (!atomic_load (&gate->closed))
      return;
    dirty_gate_leave (gate);
    wait_until_open (gate);
  }
}

void
dirty_gate_leave (struct dirty_gate *gate)
{
  if (atomic_fetch_sub (&gate->inside, 1) == 1 &&
      atomic_load (&gate->closed)) {
    g_mutex_lock (&gate->lock);
    g_cond_broadcast (&gate->changed);
    g_mutex_unlock (&gate->lock);
  }
}

void
dirty_gate_close (struct dirty_gate *gate)
{
  g_mutex_lock (&gate->lock);
  atomic_store (&gate->closed, true);
  while (atomic_load (&gate->inside) > 0)
    g_cond_wait (&gate->changed, &gate->lock);
  g_mutex_unlock (&gate->lock);
}

void
dirty_gate_open (struct dirty_gate *gate)
{
  g_mutex_lock (&gate->lock);
  atomic_store (&gate->closed, false);
  g_cond_broadcast (&gate->changed);
  g_mutex_unlock (&gate->lock);
}
