/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <inttypes.h>

#include "qcow2/check-internal.h"
#include "qcow2/error.h"

/* Bytes of an L1 table that are read at once. */
#define PIECE 65536

/* L2 tables that do not begin at a cluster are walked on their own; more
 * than that cannot come from an accident.
 */
#define MAX_UNALIGNED 1000

/* Clusters that are an L2 table and something else; likewise. */
#define MAX_DEFERRED 1000000

struct unaligned {
  uint64_t offset;
  bool active;
};

/* What is counted for the L2 entries of one table. */
struct walk {
  uint64_t times;               /* L1 entries that refer to the table */
  uint64_t active;              /* of these, in the active L1 table */
  uint64_t copied;              /* the same, or 0: do not look at COPIED */
  uint64_t next_offset;         /* behind the last data cluster, or 0 */
};

/* Does the flag COPIED of an active entry agree with the refcount? */
static int
check_copied (struct check *c, const char *what, uint64_t entry,
              uint64_t times, GError **error)
{
  bool is_one, known;

  if (check_refcount_is_one (c, entry & QCOW2_ENTRY_OFFSET_MASK,
                             &is_one, &known, error) == -1)
    return -1;
  if (known && is_one != !!(entry & QCOW2_ENTRY_COPIED))
    check_corrupt (c, times, "the flag COPIED of the %s entry 0x%" PRIx64
                   " does not agree with the refcount", what, entry);
  return 0;
}

static void
check_compressed (struct check *c, struct walk *w, uint64_t entry,
                  uint64_t subclusters)
{
  const uint32_t shift = 62 - (c->image->header->cluster_bits - 8);
  const uint64_t offset = entry & ((UINT64_C (1) << shift) - 1);
  const uint64_t sectors = ((entry & ~(UINT64_C (3) << 62)) >> shift) + 1;

  if (entry & QCOW2_ENTRY_COPIED)
    check_corrupt (c, w->times, "the L2 entry 0x%" PRIx64 " of a compressed "
                   "cluster has the flag COPIED", entry);
  if (c->image->header->incompatible & QCOW2_INCOMPAT_DATA_FILE) {
    check_corrupt (c, w->times, "the L2 entry 0x%" PRIx64 " is of a "
                   "compressed cluster, but there is an external data file",
                   entry);
    return;
  }
  if (subclusters) {
    check_corrupt (c, w->times, "the L2 entry 0x%" PRIx64 " of a compressed "
                   "cluster has subclusters (0x%" PRIx64 ")",
                   entry, subclusters);
    return;
  }
  check_refer (c, "a compressed cluster", offset,
               sectors * 512 - (offset & 511), w->times);
  c->result->allocated_clusters += w->active;
  c->result->compressed_clusters += w->active;
  c->result->fragmented_clusters += w->active;
}

static int
check_allocated (struct check *c, struct walk *w, uint64_t entry,
                 uint64_t subclusters, GError **error)
{
  const uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;
  const bool external =
    c->image->header->incompatible & QCOW2_INCOMPAT_DATA_FILE;

  if ((subclusters >> 32) & subclusters & UINT32_MAX)
    check_corrupt (c, w->times, "the L2 entry 0x%" PRIx64 " has subclusters "
                   "that are both allocated and zero (0x%" PRIx64 ")",
                   entry, subclusters);
  if (offset & (c->image->cluster_size - 1))
    check_corrupt (c, w->times, "the L2 entry 0x%" PRIx64 " has an offset "
                   "that is not a multiple of the cluster size", entry);

  c->result->allocated_clusters += w->active;
  if (w->next_offset && offset != w->next_offset)
    c->result->fragmented_clusters += w->active;
  w->next_offset = offset + c->image->cluster_size;

  if (!external) {
    check_refer (c, "a cluster", offset, c->image->cluster_size, w->times);
    if (w->copied)
      return check_copied (c, "L2", entry, w->copied, error);
  }
  else if (!(entry & QCOW2_ENTRY_COPIED))
    check_corrupt (c, w->copied, "the L2 entry 0x%" PRIx64 " of a cluster in "
                   "an external data file lacks the flag COPIED", entry);
  return 0;
}

static int
check_l2_entry (struct check *c, struct walk *w, uint64_t entry,
                uint64_t subclusters, GError **error)
{
  const struct qcow2_header *header = c->image->header;
  const bool extended = header->incompatible & QCOW2_INCOMPAT_EXTENDED_L2;

  if (entry & QCOW2_L2_COMPRESSED) {
    check_compressed (c, w, entry, subclusters);
    return 0;
  }
  if (entry & QCOW2_L2_RESERVED_MASK)
    check_corrupt (c, w->times, "the L2 entry 0x%" PRIx64 " has reserved "
                   "bits set", entry);
  /* In an external data file the first cluster is at offset 0. */
  if ((entry & QCOW2_ENTRY_OFFSET_MASK) ||
      ((header->incompatible & QCOW2_INCOMPAT_DATA_FILE) &&
       (entry & QCOW2_ENTRY_COPIED) &&
       (extended || !(entry & QCOW2_L2_ZERO))))
    return check_allocated (c, w, entry, subclusters, error);
  if (subclusters & UINT32_MAX)
    check_corrupt (c, w->times, "the L2 entry 0x%" PRIx64 " has allocated "
                   "subclusters (0x%" PRIx64 "), but no cluster",
                   entry, subclusters);
  return 0;
}

/* As in QEMU, the flags in an L2 table are only looked at if the refcount
 * of the table itself can be read.
 */
static int
should_check_copied (struct check *c, uint64_t offset, bool *yes,
                     GError **error)
{
  bool is_one;

  if (check_refcount_is_one (c, offset, &is_one, yes, error) == -1)
    return -1;
  *yes &= offset != 0;
  return 0;
}

static int
walk_l2 (struct check *c, uint64_t offset, struct walk *w, GError **error)
{
  const size_t entry_size = qcow2_header_l2_entry_size (c->image->header);
  bool copied;

  if (should_check_copied (c, offset, &copied, error) == -1)
    return -1;
  w->copied = copied ? w->active : 0;
  if (check_read (c, c->buf, c->image->cluster_size, offset, error) == -1)
    return -1;
  for (size_t i = 0; i < c->image->cluster_size; i += entry_size) {
    const uint64_t entry = qcow2_be64 (c->buf + i);
    const uint64_t subclusters =
      entry_size > 8 ? qcow2_be64 (c->buf + i + 8) : 0;

    if ((entry || subclusters) &&
        check_l2_entry (c, w, entry, subclusters, error) == -1)
      return -1;
  }
  return 0;
}

static uint64_t
lookup (GHashTable *table, uint64_t cluster)
{
  return (uintptr_t) g_hash_table_lookup (table,
                                          (gpointer) (uintptr_t) cluster);
}

static int
walk_all_l2 (struct check *c, GError **error)
{
  const struct qcow2_tally *tally = c->tally;

  c->walking = true;
  for (uint64_t i = 0; i < c->clusters; ++i) {
    struct walk w = { 0 };

    if (!(tally->flags[i] & CLUSTER_L2))
      continue;
    w.times = qcow2_tally_get (tally, i);
    if (tally->flags[i] & CLUSTER_ACTIVE_L2)
      w.active = 1 + lookup (c->active_again, i);
    tally->flags[i] |= CLUSTER_WALKED;
    if (check_progress (c, i * 80 / c->clusters, error) == -1 ||
        walk_l2 (c, i << c->image->header->cluster_bits, &w, error) == -1)
      return -1;
    if (g_hash_table_size (c->deferred) > MAX_DEFERRED)
      return qcow2_fail (error, EIO, "more than %d clusters are both data "
                         "and L2 tables", MAX_DEFERRED);
  }
  c->walking = false;
  return 0;
}

static int
walk_unaligned_l2 (struct check *c, GError **error)
{
  for (guint i = 0; i < c->unaligned->len; ++i) {
    const struct unaligned *u =
      &g_array_index (c->unaligned, struct unaligned, i);
    struct walk w = { .times = 1, .active = u->active };

    check_refer (c, "an L2 table", u->offset, c->image->cluster_size, 1);
    if (walk_l2 (c, u->offset, &w, error) == -1)
      return -1;
  }
  return 0;
}

static void
add_deferred (struct check *c)
{
  GHashTableIter iter;
  gpointer cluster, times;

  g_hash_table_iter_init (&iter, c->deferred);
  while (g_hash_table_iter_next (&iter, &cluster, &times))
    qcow2_tally_add (c->tally, (uintptr_t) cluster, (uintptr_t) times);
}

static void
note_l2_table (struct check *c, uint64_t offset, bool active)
{
  const uint64_t cluster = offset >> c->image->header->cluster_bits;
  uint8_t *flags;

  if (offset >= c->size) {
    check_corrupt (c, 1, "an L2 table at offset %" PRIu64 " lies beyond the "
                   "end of the file (%" PRIu64 " bytes)", offset, c->size);
    return;
  }
  flags = &c->tally->flags[cluster];
  qcow2_tally_add (c->tally, cluster, 1);
  if (active && (*flags & CLUSTER_ACTIVE_L2)) {
    const uintptr_t again = lookup (c->active_again, cluster) + 1;

    g_hash_table_insert (c->active_again, (gpointer) (uintptr_t) cluster,
                         (gpointer) again);
  }
  *flags |= CLUSTER_L2 | (active ? CLUSTER_ACTIVE_L2 : 0);
}

static void
note_unaligned (struct check *c, uint64_t offset, bool active)
{
  const struct unaligned u = { offset, active };

  check_corrupt (c, 1, "an L1 entry has the offset %" PRIu64 ", which is "
                 "not a multiple of the cluster size", offset);
  if (c->unaligned->len < MAX_UNALIGNED)
    g_array_append_val (c->unaligned, u);
}

static int
check_l1_entry (struct check *c, uint64_t entry, bool active, GError **error)
{
  const uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;

  if (active && offset && check_copied (c, "L1", entry, 1, error) == -1)
    return -1;
  if (entry & QCOW2_L1_RESERVED_MASK)
    check_corrupt (c, 1, "the L1 entry 0x%" PRIx64 " has reserved bits set",
                   entry);
  if (offset & (c->image->cluster_size - 1))
    note_unaligned (c, offset, active);
  else
    note_l2_table (c, offset, active);
  return 0;
}

static int
read_l1 (struct check *c, const char *what, uint64_t offset,
         uint32_t entries, bool active, GError **error)
{
  const uint64_t bytes = (uint64_t) entries * 8;
  uint8_t piece[PIECE];

  if (!check_afford (c, what, bytes))
    return 0;
  for (uint64_t done = 0; done < bytes && offset + done < c->size;
       done += sizeof piece) {
    const size_t n = MIN (sizeof piece, bytes - done);

    if (check_read (c, piece, n, offset + done, error) == -1)
      return -1;
    for (size_t i = 0; i < n; i += 8) {
      const uint64_t entry = qcow2_be64 (piece + i);

      if (entry && check_l1_entry (c, entry, active, error) == -1)
        return -1;
    }
  }
  return 0;
}

static bool
snapshot_l1_is_sane (const struct check *c, const struct qcow2_snapshot *sn)
{
  return (sn->l1_offset & (c->image->cluster_size - 1)) == 0 &&
    (uint64_t) sn->l1_entries * 8 <= QCOW2_MAX_L1_BYTES;
}

static int
read_snapshot_l1 (struct check *c, const struct qcow2_snapshot *sn,
                  GError **error)
{
  g_autofree char *id = g_strescape (sn->id, NULL);
  g_autofree char *what = g_strdup_printf ("the L1 table of snapshot \"%s\"",
                                           id);

  if (!snapshot_l1_is_sane (c, sn)) {
    check_corrupt (c, 1, "%s has the offset %" PRIu64 " and %" PRIu32
                   " entries", what, sn->l1_offset, sn->l1_entries);
    return 0;
  }
  return read_l1 (c, what, sn->l1_offset, sn->l1_entries, false, error);
}

static int
read_all_l1 (struct check *c, GError **error)
{
  const struct qcow2_header *header = c->image->header;
  const GPtrArray *snapshots = c->image->snapshots;

  if (read_l1 (c, "the active L1 table", header->l1_offset,
               header->l1_entries, true, error) == -1)
    return -1;
  for (guint i = 0; i < snapshots->len; ++i)
    if (read_snapshot_l1 (c, g_ptr_array_index (snapshots, i), error) == -1)
      return -1;
  return 0;
}

/* The space that L1 tables take themselves. */
static void
refer_to_l1 (struct check *c)
{
  const struct qcow2_header *header = c->image->header;
  const GPtrArray *snapshots = c->image->snapshots;

  check_refer (c, "the active L1 table", header->l1_offset,
               (uint64_t) header->l1_entries * 8, 1);
  for (guint i = 0; i < snapshots->len; ++i) {
    const struct qcow2_snapshot *sn = g_ptr_array_index (snapshots, i);

    if (snapshot_l1_is_sane (c, sn) &&
        check_afford (c, "a snapshot's L1 table",
                      (uint64_t) sn->l1_entries * 8))
      check_refer (c, "a snapshot's L1 table", sn->l1_offset,
                   (uint64_t) sn->l1_entries * 8, 1);
  }
}

int
check_mapping (struct check *c, GError **error)
{
  int r;

  c->unaligned = g_array_new (FALSE, FALSE, sizeof (struct unaligned));
  c->active_again = g_hash_table_new (NULL, NULL);
  c->deferred = g_hash_table_new (NULL, NULL);
  r = read_all_l1 (c, error);
  if (r == 0)
    r = walk_all_l2 (c, error);
  if (r == 0)
    r = walk_unaligned_l2 (c, error);
  if (r == 0) {
    add_deferred (c);
    refer_to_l1 (c);
  }
  g_hash_table_unref (c->deferred);
  g_hash_table_unref (c->active_again);
  g_array_unref (c->unaligned);
  return r;
}
