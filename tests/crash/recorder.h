/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A container in memory that remembers everything that was written to it,
 * and can tell what a crash at any time might have left.
 */

#ifndef RECORDER_H
#define RECORDER_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "qcow2/io.h"

struct recorder;

/* Begin with these bytes, which are copied. */
extern struct recorder *recorder_new (const void *bytes, uint64_t size);
extern void recorder_free (struct recorder *recorder);

/* The container as its user sees it. */
extern const struct qcow2_io *recorder_io (struct recorder *recorder);

/* The number of events (writes, flushes, growth) so far. */
extern guint recorder_events (const struct recorder *recorder);

/* Let the calls of the io that write, after this many from now on, fail
 * with ENOSPC; UINT_MAX: never.
 */
extern void recorder_fail_after (struct recorder *recorder, guint calls);

/* What a crash may have left. */
struct remains {
  struct qcow2_io io;           /* to read them */
  uint8_t *data;
  uint64_t size;

  /* Private. */
  struct recorder *recorder;
  GArray *undo;
  uint64_t stable_size;
  guint flushed;                /* events that are in data for good */
};

/* Begin with nothing having happened. */
extern struct remains *remains_new (struct recorder *recorder);
extern void remains_free (struct remains *remains);

/* Let a crash happen after this many events, not fewer than the time
 * before.  Of what was not flushed, each sector has kept some of the writes
 * to it, in order, and lost the others: each is kept with a probability of
 * keep percent; with 100 all are.
 */
extern void remains_crash (struct remains *remains, guint events,
                           unsigned keep, GRand *rand);

#endif /* RECORDER_H */
