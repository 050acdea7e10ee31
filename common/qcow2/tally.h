/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* How often each cluster of a container is referred to, for the check.
 *
 * Three bytes for each cluster: a count, and flags that the check may
 * use as it likes.  Memory that is never written to is not taken.
 */

#ifndef QCOW2_TALLY_H
#define QCOW2_TALLY_H

#include <stdint.h>

#include <glib.h>

struct qcow2_tally {
  uint64_t clusters;            /* there are, numbered from 0 */
  uint16_t *counts;             /* UINT16_MAX: there are that many or more */
  uint8_t *flags;
  GHashTable *large;            /* cluster -> how many more than UINT16_MAX */
};

/* Returns NULL if there is not that much memory. */
extern struct qcow2_tally *qcow2_tally_new (uint64_t clusters);

/* NULL is allowed. */
extern void qcow2_tally_free (struct qcow2_tally *tally);

/* Count n more references to a cluster. */
extern void qcow2_tally_add (struct qcow2_tally *tally, uint64_t cluster,
                             uint64_t n);

extern uint64_t qcow2_tally_large (const struct qcow2_tally *tally,
                                   uint64_t cluster);

static inline uint64_t
qcow2_tally_get (const struct qcow2_tally *tally, uint64_t cluster)
{
  const uint16_t count = tally->counts[cluster];

  return count < UINT16_MAX ? count : qcow2_tally_large (tally, cluster);
}

#endif /* QCOW2_TALLY_H */
