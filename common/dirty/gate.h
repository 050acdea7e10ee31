/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A gate through which writes pass.
 *
 * Whoever closes it waits until no write is inside; until it is opened
 * again none gets in.  What is done meanwhile lies between two writes: a
 * point in time.  Passing an open gate takes no lock.
 */

#ifndef DIRTY_GATE_H
#define DIRTY_GATE_H

#include <stdatomic.h>
#include <stdbool.h>

#include <glib.h>

struct dirty_gate {
  atomic_uint inside;           /* writes, and those about to turn back */
  atomic_bool closed;
  GMutex lock;
  GCond changed;                /* nobody inside, or opened */
};

extern void dirty_gate_init (struct dirty_gate *gate);
extern void dirty_gate_clear (struct dirty_gate *gate);

/* Waits while the gate is closed. */
extern void dirty_gate_enter (struct dirty_gate *gate);
extern void dirty_gate_leave (struct dirty_gate *gate);

/* One thread at a time closes a gate, and the same opens it. */
extern void dirty_gate_close (struct dirty_gate *gate);
extern void dirty_gate_open (struct dirty_gate *gate);

#endif /* DIRTY_GATE_H */
