/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <string.h>

#include "qcow2/bitmap.h"
#include "qcow2/check-internal.h"
#include "qcow2/error.h"

/* Bytes of a table that are read at once. */
#define PIECE 65536

/* Tables of a sound image do not overlap, so they are not longer in sum
 * than the container.  For the rest there is this much.
 */
#define EXTRA_BUDGET (UINT64_C (64) << 20)

static void
report (struct check *c, const char *fs, va_list args)
{
  g_autofree char *message = NULL;

  if (c->reports >= QCOW2_CHECK_MAX_REPORTS)
    return;
  c->reports++;
  message = g_strdup_vprintf (fs, args);
  c->observer->report (c->observer->opaque, message);
}

void
check_report (struct check *c, const char *fs, ...)
{
  va_list args;

  va_start (args, fs);
  report (c, fs, args);
  va_end (args);
}

void
check_corrupt (struct check *c, uint64_t times, const char *fs, ...)
{
  va_list args;

  if (times == 0)
    return;
  c->result->corruptions += times;
  va_start (args, fs);
  report (c, fs, args);
  va_end (args);
}

int
check_read (struct check *c, void *buf, size_t count, uint64_t offset,
            GError **error)
{
  const size_t inside =
    offset < c->size ? MIN (count, c->size - offset) : 0;

  memset ((char *) buf + inside, 0, count - inside);
  return inside ? c->io->pread (c->io, buf, inside, offset, error) : 0;
}

bool
check_afford (struct check *c, const char *what, uint64_t count)
{
  if (count <= c->budget) {
    c->budget -= count;
    return true;
  }
  check_corrupt (c, 1, "%s is not looked at, as there are more tables than "
                 "the container has space for", what);
  return false;
}

int
check_progress (struct check *c, unsigned percent, GError **error)
{
  if (c->observer->progress (c->observer->opaque, percent) != 0)
    return qcow2_fail (error, ECANCELED, "the check was interrupted");
  return 0;
}

/* An L2 table must be walked with the number of references that L1
 * tables hold, which until then is its tally.
 */
static void
add_references (struct check *c, uint64_t cluster, uint64_t times)
{
  const uint8_t state =
    c->tally->flags[cluster] & (CLUSTER_L2 | CLUSTER_WALKED);
  const gpointer key = (gpointer) (uintptr_t) cluster;

  if (c->walking && state == CLUSTER_L2) {
    const uintptr_t before =
      (uintptr_t) g_hash_table_lookup (c->deferred, key);

    g_hash_table_insert (c->deferred, key, (gpointer) (before + times));
    return;
  }
  qcow2_tally_add (c->tally, cluster, times);
}

void
check_refer (struct check *c, const char *what, uint64_t offset,
             uint64_t length, uint64_t times)
{
  const uint32_t cluster_bits = c->image->header->cluster_bits;
  const uint64_t limit = c->size + c->image->cluster_size; /* excluded */
  uint64_t last;

  if (length == 0 || times == 0)
    return;
  if (length >= limit || offset >= limit - length) {
    check_corrupt (c, times, "%s at offset %" PRIu64 " (%" PRIu64
                   " bytes) lies beyond the end of the file (%" PRIu64
                   " bytes)", what, offset, length, c->size);
    return;
  }
  last = (offset + length - 1) >> cluster_bits;
  for (uint64_t i = offset >> cluster_bits; i <= last; ++i)
    add_references (c, i, times);
  c->end = MAX (c->end, last + 1);
}

static void
check_snapshot_table (struct check *c)
{
  const struct qcow2_header *header = c->image->header;
  const GPtrArray *snapshots = c->image->snapshots;

  check_refer (c, "the snapshot table", header->snapshots_offset,
               c->image->snapshots_length, 1);
  for (guint i = 0; header->version >= 3 && i < snapshots->len; ++i) {
    const struct qcow2_snapshot *sn = g_ptr_array_index (snapshots, i);

    if (sn->extra_size < 16)
      check_corrupt (c, 1, "entry %u of the snapshot table is incomplete: "
                     "it has %" PRIu32 " bytes of extra data, where "
                     "version 3 wants 16", i, sn->extra_size);
  }
}

static void
check_encryption_header (struct check *c)
{
  GBytes *bytes = qcow2_header_find_extension (c->image->header,
                                               QCOW2_EXT_CRYPTO);
  const uint8_t *data;
  gsize length;

  if (!bytes)
    return;
  data = g_bytes_get_data (bytes, &length);
  if (length >= 16)
    check_refer (c, "the encryption header", qcow2_be64 (data),
                 qcow2_be64 (data + 8), 1);
}

static void
check_bitmap_entry (struct check *c, uint64_t entry)
{
  const uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;

  if ((entry & QCOW2_BITMAP_ENTRY_RESERVED_MASK) ||
      offset & (c->image->cluster_size - 1) ||
      (offset && (entry & QCOW2_BITMAP_ENTRY_ONES)))
    check_corrupt (c, 1, "a bitmap's table has the entry 0x%" PRIx64
                   ", which is not valid", entry);
  else if (offset)
    check_refer (c, "a cluster of a bitmap", offset, c->image->cluster_size,
                 1);
}

static int
check_bitmap (struct check *c, const struct qcow2_bitmap *bitmap,
              GError **error)
{
  const uint64_t bytes = (uint64_t) bitmap->table_entries * 8;
  uint8_t piece[PIECE];

  if (!check_afford (c, "the table of a bitmap", bytes))
    return 0;
  check_refer (c, "the table of a bitmap", bitmap->table_offset, bytes, 1);
  for (uint64_t done = 0; done < bytes; done += sizeof piece) {
    const size_t n = MIN (sizeof piece, bytes - done);

    if (check_read (c, piece, n, bitmap->table_offset + done, error) == -1)
      return -1;
    for (size_t i = 0; i < n; i += 8)
      check_bitmap_entry (c, qcow2_be64 (piece + i));
  }
  return 0;
}

static int
check_bitmaps (struct check *c, GError **error)
{
  g_autoptr (GError) bad = NULL;
  g_autoptr (GPtrArray) array = NULL;
  struct qcow2_bitmaps bitmaps;

  if (qcow2_bitmaps_find (c->image->header, &bitmaps, &bad) == 0) {
    check_refer (c, "the bitmap directory", bitmaps.directory_offset,
                 bitmaps.directory_size, 1);
    array = qcow2_bitmaps_load (c->image->header, &bitmaps, c->io, &bad);
  }
  if (!array) {
    check_corrupt (c, 1, "%s", bad->message);
    return 0;
  }
  for (guint i = 0; i < array->len; ++i)
    if (check_bitmap (c, g_ptr_array_index (array, i), error) == -1)
      return -1;
  return 0;
}

static int
run (struct check *c, GError **error)
{
  if (check_refcounts_load (c, error) == -1 ||
      check_mapping (c, error) == -1)
    return -1;
  check_refer (c, "the header", 0, c->image->cluster_size, 1);
  check_snapshot_table (c);
  check_encryption_header (c);
  if (check_bitmaps (c, error) == -1)
    return -1;
  check_refcounts_refer (c);
  return check_refcounts_compare (c, error);
}

int
qcow2_check (const struct qcow2_image *image, const struct qcow2_io *io,
             const struct qcow2_check_observer *observer,
             struct qcow2_check_result *result, GError **error)
{
  struct check c = {
    .image = image,
    .io = io,
    .observer = observer,
    .result = result,
    .size = io->get_size (io),
  };
  struct qcow2_view view;
  int r;

  memset (result, 0, sizeof *result);
  qcow2_image_active_view (image, &view);
  result->total_clusters = view.size / image->cluster_size +
    (view.size % image->cluster_size != 0);
  c.clusters = c.end = c.size / image->cluster_size +
    (c.size % image->cluster_size != 0);
  c.budget = c.size + EXTRA_BUDGET;
  /* An unaligned reference may reach into one cluster more. */
  c.tally = qcow2_tally_new (c.clusters + 1);
  c.buf = g_try_malloc (image->cluster_size);
  if (c.tally && c.buf)
    r = run (&c, error);
  else
    r = qcow2_fail (error, ENOMEM, "no memory for counting the references "
                    "to %" PRIu64 " clusters", c.clusters);
  g_free (c.refcount_table);
  g_free (c.buf);
  qcow2_tally_free (c.tally);
  return r;
}
