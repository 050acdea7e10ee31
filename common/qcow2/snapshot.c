/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Reading the snapshot table.
 *
 * Entries have variable lengths, so the table can only be read from its
 * beginning, and the header does not say how long it is.  It is read in
 * pieces through a small window; the strings, which are all that is kept
 * of it, are limited in sum.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/error.h"
#include "qcow2/snapshot.h"

#define ENTRY_LENGTH 40         /* of the fixed part */
#define EXTRA_LENGTH 16         /* of the extra data that we know */
#define WINDOW 16384
#define MAX_STRINGS (16U << 20)

struct reader {
  const struct qcow2_io *io;
  uint64_t start, offset;       /* of the table, of the next byte */
  uint64_t window_offset;
  size_t window_length;
  uint8_t window[WINDOW];
  uint64_t strings;             /* bytes of strings read until now */
};

static void
snapshot_free (gpointer p)
{
  struct qcow2_snapshot *sn = p;

  g_free (sn->id);
  g_free (sn->name);
  g_free (sn);
}

static int
fill_window (struct reader *r, GError **error)
{
  const uint64_t size = r->io->get_size (r->io);

  if (r->offset >= size)
    return qcow2_fail (error, EINVAL, "the snapshot table at offset %" PRIu64
                       " runs beyond the end of the file (%" PRIu64
                       " bytes)", r->start, size);
  r->window_offset = r->offset;
  r->window_length = MIN (WINDOW, size - r->offset);
  return r->io->pread (r->io, r->window, r->window_length, r->offset, error);
}

/* Copy the next count bytes to buf. */
static int
take (struct reader *r, void *buf, size_t count, GError **error)
{
  uint8_t *out = buf;

  while (count > 0) {
    const uint64_t skip = r->offset - r->window_offset;
    size_t n;

    if (skip >= r->window_length) {
      if (fill_window (r, error) == -1)
        return -1;
      continue;
    }
    n = MIN (count, r->window_length - skip);
    memcpy (out, r->window + skip, n);
    out += n;
    r->offset += n;
    count -= n;
  }
  return 0;
}

static int
take_string (struct reader *r, size_t length, char **result, GError **error)
{
  r->strings += length + 1;
  if (r->strings > MAX_STRINGS)
    return qcow2_fail (error, EINVAL, "the names in the snapshot table have "
                       "more than %u bytes in sum", MAX_STRINGS);
  *result = g_malloc (length + 1);
  (*result)[length] = '\0';
  return take (r, *result, length, error);
}

static int
take_extra (struct reader *r, uint32_t length, struct qcow2_snapshot *sn,
            GError **error)
{
  uint8_t extra[EXTRA_LENGTH];
  const uint32_t known = MIN (length, EXTRA_LENGTH);

  if (length > QCOW2_MAX_SNAPSHOT_EXTRA)
    return qcow2_fail (error, EINVAL, "extra_data_size of the snapshot at "
                       "offset %" PRIu64 " is %" PRIu32
                       ", but must be at most %d",
                       r->offset - ENTRY_LENGTH, length,
                       QCOW2_MAX_SNAPSHOT_EXTRA);
  if (take (r, extra, known, error) == -1)
    return -1;
  r->offset += length - known;
  sn->extra_size = length;
  if (known >= 8)
    sn->vm_state_size = qcow2_be64 (extra);
  if (known >= 16)
    sn->disk_size = qcow2_be64 (extra + 8);
  return 0;
}

static int
take_snapshot (struct reader *r, struct qcow2_snapshot *sn, GError **error)
{
  uint8_t buf[ENTRY_LENGTH];

  if (take (r, buf, sizeof buf, error) == -1)
    return -1;
  sn->l1_offset = qcow2_be64 (buf);
  sn->l1_entries = qcow2_be32 (buf + 8);
  sn->date_sec = qcow2_be32 (buf + 16);
  sn->date_nsec = qcow2_be32 (buf + 20);
  sn->vm_state_size = qcow2_be32 (buf + 32);
  if (take_extra (r, qcow2_be32 (buf + 36), sn, error) == -1 ||
      take_string (r, qcow2_be16 (buf + 12), &sn->id, error) == -1 ||
      take_string (r, qcow2_be16 (buf + 14), &sn->name, error) == -1)
    return -1;
  r->offset = (r->offset + 7) & ~UINT64_C (7);
  if (r->offset - r->start > QCOW2_MAX_SNAPSHOT_TABLE_BYTES)
    return qcow2_fail (error, EINVAL, "the snapshot table is longer than %"
                       PRIu64 " bytes", QCOW2_MAX_SNAPSHOT_TABLE_BYTES);
  return 0;
}

GPtrArray *
qcow2_snapshots_load (const struct qcow2_header *header,
                      const struct qcow2_io *io, uint64_t *length,
                      GError **error)
{
  g_autoptr (GPtrArray) snapshots =
    g_ptr_array_new_with_free_func (snapshot_free);
  g_autofree struct reader *r = g_new0 (struct reader, 1);

  r->io = io;
  r->start = r->offset = header->snapshots_offset;
  for (uint32_t i = 0; i < header->nr_snapshots; ++i) {
    struct qcow2_snapshot *sn = g_new0 (struct qcow2_snapshot, 1);

    g_ptr_array_add (snapshots, sn);
    sn->disk_size = header->size;
    if (take_snapshot (r, sn, error) == -1)
      return NULL;
  }
  *length = r->offset - r->start;
  return g_steal_pointer (&snapshots);
}

const struct qcow2_snapshot *
qcow2_snapshots_find (const GPtrArray *snapshots, const char *name_or_id)
{
  const struct qcow2_snapshot *by_id = NULL;

  for (guint i = 0; i < snapshots->len; ++i) {
    const struct qcow2_snapshot *sn = g_ptr_array_index (snapshots, i);

    if (strcmp (sn->name, name_or_id) == 0)
      return sn;
    if (!by_id && strcmp (sn->id, name_or_id) == 0)
      by_id = sn;
  }
  return by_id;
}
