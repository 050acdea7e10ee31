/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <stdlib.h>

#include "qcow2/tally.h"

/* Clusters with more than UINT16_MAX references are so rare that what is
 * beyond it is kept in a hash table: each of them stands for as many
 * references in the container, so there cannot be many.
 */


struct qcow2_tally *
qcow2_tally_new (uint64_t clusters)
{
  struct qcow2_tally *tally = g_new0 (struct qcow2_tally, 1);

  tally->clusters = clusters;
  tally->large = g_hash_table_new_full (g_int64_hash, g_int64_equal, g_free,
                                        g_free);
  if (clusters <= SIZE_MAX / 2) {
    tally->counts = calloc (clusters, sizeof *tally->counts);
    tally->flags = calloc (clusters, sizeof *tally->flags);
  }
  if (!tally->counts || !tally->flags) {
    qcow2_tally_free (tally);
    return NULL;
  }
  return tally;
}

void
qcow2_tally_free (struct qcow2_tally *tally)
{
  if (!tally)
    return;
  g_hash_table_unref (tally->large);
  free (tally->counts);
  free (tally->flags);
  g_free (tally);
}

static void
add_large (struct qcow2_tally *tally, uint64_t cluster, uint64_t n)
{
  uint64_t *more = g_hash_table_lookup (tally->large, &cluster);

  if (!more) {
    more = g_new0 (uint64_t, 1);
    g_hash_table_insert (tally->large,
                         g_memdup2 (&cluster, sizeof cluster), more);
  }
  *more += n;
}

void
qcow2_tally_add (struct qcow2_tally *tally, uint64_t cluster, uint64_t n)
{
  const uint64_t room = UINT16_MAX - tally->counts[cluster];

  if (n <= room)
    tally->counts[cluster] += n;
  else {
    tally->counts[cluster] = UINT16_MAX;
    add_large (tally, cluster, n - room);
  }
}

uint64_t
qcow2_tally_large (const struct qcow2_tally *tally, uint64_t cluster)
{
  const uint64_t *more = g_hash_table_lookup (tally->large, &cluster);

  return UINT16_MAX + (more ? *more : 0);
}
