/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Resolving guest offsets.
 *
 * L1 and L2 tables are both read in slices through one cache, so opening
 * an image or a snapshot reads no table at all, and memory does not grow
 * with the number of snapshots in use.
 *
 * qcow2_map takes steps.  One step looks at one slice and returns the
 * run at the given offset, as far as that slice tells.  If the run
 * reaches to the end of what the slice describes, and the range goes on,
 * the next step may lengthen it.  So a run ends only where the kind of
 * the data, its contiguity, or the range does.
 */

#include <config.h>

#include <inttypes.h>

#include "qcow2/error.h"
#include "qcow2/mapping.h"

/* A slice in use.  entries are as they stand in the file. */
struct slice {
  struct qcow2_cache_ref ref;
  const uint8_t *entries;       /* the one asked for, and those behind it */
  uint64_t count;               /* how many of them are in the slice */
};

/* What to load, for load_slice. */
struct slice_request {
  const struct qcow2_image *image;
  const struct qcow2_io *io;
};

/* Where a step stands. */
struct position {
  struct qcow2_image *image;
  const struct qcow2_io *io;
  uint64_t offset;              /* on the disk */
  uint64_t count;               /* bytes wanted from there */
  uint64_t l2_offset;           /* the L2 table that describes offset */
};

static int
load_slice (void *opaque, uint64_t key, void *data, GError **error)
{
  const struct slice_request *rq = opaque;

  /* A table at the end of the container may not fill its last slice.
   * get_slice does not look at entries beyond the end.
   */
  return qcow2_io_read_padded (rq->io, rq->image->slice_size, data,
                               rq->image->slice_size, key, error);
}

/* Get the slice that has entry index of the table at offset.  what names
 * the table.
 */
static int
get_slice (const struct position *pos, const char *what, uint64_t table,
           uint64_t index, uint32_t entry_size, struct slice *slice,
           GError **error)
{
  struct slice_request rq = { .image = pos->image, .io = pos->io };
  const uint64_t container = pos->io->get_size (pos->io);
  const uint64_t offset = table + index * entry_size;
  const uint64_t start = offset & ~(uint64_t) (pos->image->slice_size - 1);
  const uint64_t end = MIN (start + pos->image->slice_size, container);

  if (offset + entry_size > container)
    return qcow2_fail (error, EIO, "entry %" PRIu64 " of the %s table at "
                       "offset %" PRIu64 " lies beyond the end of the file "
                       "(%" PRIu64 " bytes): the image is truncated or "
                       "damaged", index, what, table, container);
  if (qcow2_cache_get (pos->image->tables, start, load_slice, &rq,
                       &slice->ref, error) == -1)
    return -1;
  slice->entries = (const uint8_t *) slice->ref.data + (offset - start);
  slice->count = (end - offset) / entry_size;
  return 0;
}

static int
damaged_l2 (const struct position *pos, uint64_t entry, const char *why,
            GError **error)
{
  return qcow2_fail (error, EIO, "the L2 entry 0x%016" PRIx64 " for disk "
                     "offset %" PRIu64 " (L2 table at offset %" PRIu64 ") %s",
                     entry, pos->offset, pos->l2_offset, why);
}

static gboolean
has_data_file (const struct position *pos)
{
  return !!(pos->image->header->incompatible & QCOW2_INCOMPAT_DATA_FILE);
}

/* Host offset of a standard cluster, which must be aligned. */
static int
cluster_offset (const struct position *pos, uint64_t entry, uint64_t *offset,
                GError **error)
{
  *offset = entry & QCOW2_ENTRY_OFFSET_MASK;
  if (*offset & (pos->image->cluster_size - 1))
    return damaged_l2 (pos, entry, "has an offset that is not a multiple of "
                       "the cluster size", error);
  return 0;
}

static int
describe_compressed (const struct position *pos, uint64_t entry,
                     struct qcow2_run *run, GError **error)
{
  /* Bits 0 to x-1 are the offset in bytes, bits x to 61 the number of
   * 512-byte sectors beyond the one in which the offset lies.
   */
  const unsigned x = 62 - (pos->image->header->cluster_bits - 8);
  const uint64_t sectors =
    (entry & (QCOW2_L2_COMPRESSED - 1)) >> x;

  if (has_data_file (pos))
    return damaged_l2 (pos, entry, "is for a compressed cluster, which "
                       "cannot be in an external data file", error);
  run->type = QCOW2_RUN_COMPRESSED;
  run->host_offset = entry & ((UINT64_C (1) << x) - 1);
  run->host_length = (sectors + 1) * 512 - (run->host_offset & 511);
  run->descriptor = entry & (QCOW2_L2_COMPRESSED - 1);
  return 0;
}

/* Offset 0 means that there is no cluster, except in an external data
 * file, where the first cluster is as good as any other: there the
 * copied flag tells.
 */
static gboolean
has_cluster (const struct position *pos, uint64_t entry, uint64_t offset)
{
  return offset || (has_data_file (pos) && (entry & QCOW2_ENTRY_COPIED));
}

/* Classify a standard cluster of which begin is the first byte wanted. */
static int
classify_cluster (const struct position *pos, uint64_t entry, uint64_t begin,
                  struct qcow2_run *run, GError **error)
{
  if (entry & QCOW2_L2_COMPRESSED)
    return describe_compressed (pos, entry, run, error);
  if ((entry & QCOW2_L2_ZERO) && pos->image->header->version < 3)
    return damaged_l2 (pos, entry, "has the zero flag, which version 2 does "
                       "not have", error);
  if (cluster_offset (pos, entry, &run->host_offset, error) == -1)
    return -1;
  if (entry & QCOW2_L2_ZERO)
    run->type =
      run->host_offset ? QCOW2_RUN_ZERO_ALLOCATED : QCOW2_RUN_ZERO;
  else
    run->type = has_cluster (pos, entry, run->host_offset) ?
      QCOW2_RUN_DATA : QCOW2_RUN_UNALLOCATED;
  run->host_offset += begin;
  return 0;
}

/* Classify subcluster number sub of an extended entry. */
static int
classify_subcluster (const struct position *pos, uint64_t entry,
                     uint64_t bitmap, unsigned sub, struct qcow2_run *run,
                     GError **error)
{
  const uint32_t allocated = bitmap, zeroes = bitmap >> 32;

  if (cluster_offset (pos, entry, &run->host_offset, error) == -1)
    return -1;
  if (allocated & zeroes)
    return damaged_l2 (pos, entry, "has a subcluster that is both allocated "
                       "and zero", error);
  if (allocated && !has_cluster (pos, entry, run->host_offset))
    return damaged_l2 (pos, entry, "has allocated subclusters but no offset",
                       error);
  if (allocated & (UINT32_C (1) << sub))
    run->type = QCOW2_RUN_DATA;
  else if (zeroes & (UINT32_C (1) << sub))
    run->type =
      run->host_offset ? QCOW2_RUN_ZERO_ALLOCATED : QCOW2_RUN_ZERO;
  else
    run->type = QCOW2_RUN_UNALLOCATED;
  return 0;
}

/* True if the piece that begins where run ends continues it. */
static gboolean
continues (const struct qcow2_run *run, const struct qcow2_run *piece)
{
  return run->type == piece->type && run->type != QCOW2_RUN_COMPRESSED &&
    (run->type != QCOW2_RUN_DATA ||
     run->host_offset + run->length == piece->host_offset);
}

/* What one standard entry says, from begin to the end of its cluster. */
static int
standard_piece (const struct position *pos, const uint8_t *p, uint32_t begin,
                struct qcow2_run *piece, GError **error)
{
  piece->length = pos->image->cluster_size - begin;
  return classify_cluster (pos, qcow2_be64 (p), begin, piece, error);
}

/* What one extended entry says, from begin to the end of the subclusters
 * of the same kind.
 */
static int
extended_piece (const struct position *pos, const uint8_t *p, uint32_t begin,
                struct qcow2_run *piece, GError **error)
{
  const uint64_t entry = qcow2_be64 (p), bitmap = qcow2_be64 (p + 8);
  const uint32_t sub_size = pos->image->cluster_size / QCOW2_SUBCLUSTERS;
  unsigned sub = begin / sub_size;
  struct qcow2_run next = { 0 };

  if (entry & QCOW2_L2_COMPRESSED) {
    piece->length = pos->image->cluster_size - begin;
    return describe_compressed (pos, entry, piece, error);
  }

  if (classify_subcluster (pos, entry, bitmap, sub, piece, error) == -1)
    return -1;
  while (++sub < QCOW2_SUBCLUSTERS) {
    if (classify_subcluster (pos, entry, bitmap, sub, &next, error) == -1)
      return -1;
    if (next.type != piece->type)
      break;
  }
  piece->length = sub * sub_size - begin;
  piece->host_offset += begin;
  return 0;
}

static int
entry_piece (const struct position *pos, const uint8_t *p, uint32_t begin,
             struct qcow2_run *piece, GError **error)
{
  if (pos->image->header->incompatible & QCOW2_INCOMPAT_EXTENDED_L2)
    return extended_piece (pos, p, begin, piece, error);
  return standard_piece (pos, p, begin, piece, error);
}

/* The run at pos, as far as one slice of an L2 table tells.  *more is
 * set if the next slice may lengthen it.
 */
static int
scan_l2_slice (const struct position *pos, const struct slice *slice,
               struct qcow2_run *run, gboolean *more, GError **error)
{
  const uint32_t entry_size = qcow2_header_l2_entry_size (pos->image->header);
  const uint32_t mask = pos->image->cluster_size - 1;
  struct position at = *pos;
  struct qcow2_run piece;
  const uint8_t *p = slice->entries;
  const uint8_t *end = p + slice->count * entry_size;

  *more = FALSE;
  if (entry_piece (&at, p, at.offset & mask, run, error) == -1)
    return -1;

  for (;;) {
    if (run->type == QCOW2_RUN_COMPRESSED || run->length >= pos->count)
      return 0;
    at.offset = pos->offset + run->length;
    if ((at.offset & mask) == 0)
      p += entry_size;
    if (p == end)
      break;
    /* A damaged entry is the next call's affair. */
    if (entry_piece (&at, p, at.offset & mask, &piece, NULL) == -1 ||
        !continues (run, &piece))
      return 0;
    run->length += piece.length;
  }
  *more = TRUE;
  return 0;
}

/* The run of unallocated L1 entries at pos. */
static void
scan_l1_slice (const struct position *pos, const struct slice *slice,
               unsigned l1_shift, struct qcow2_run *run)
{
  const uint64_t begin = pos->offset & ((UINT64_C (1) << l1_shift) - 1);
  uint64_t i = 1;

  run->type = QCOW2_RUN_UNALLOCATED;
  while (i < slice->count && (i << l1_shift) - begin < pos->count &&
         !(qcow2_be64 (slice->entries + i * 8) & QCOW2_ENTRY_OFFSET_MASK))
    i++;
  run->length = (i << l1_shift) - begin;
}

/* One step: the run at pos as far as one slice tells. */
static int
step (struct position *pos, const struct qcow2_view *view,
      struct qcow2_run *run, gboolean *more, GError **error)
{
  const struct qcow2_header *header = pos->image->header;
  const unsigned l2_bits = qcow2_header_l2_bits (header);
  const unsigned l1_shift = header->cluster_bits + l2_bits;
  const uint64_t l1_index = pos->offset >> l1_shift;
  const uint64_t l2_index = (pos->offset >> header->cluster_bits) &
    ((UINT64_C (1) << l2_bits) - 1);
  struct slice slice;
  int r;

  if (get_slice (pos, "L1", view->l1_offset, l1_index, 8, &slice,
                 error) == -1)
    return -1;
  slice.count = MIN (slice.count, view->l1_entries - l1_index);
  pos->l2_offset = qcow2_be64 (slice.entries) & QCOW2_ENTRY_OFFSET_MASK;
  if (!pos->l2_offset) {
    scan_l1_slice (pos, &slice, l1_shift, run);
    /* An L2 table, too, may begin with unallocated clusters. */
    *more = TRUE;
  }
  qcow2_cache_put (&slice.ref);
  if (!pos->l2_offset)
    return 0;

  if (pos->l2_offset & (pos->image->cluster_size - 1))
    return qcow2_fail (error, EIO, "entry %" PRIu64 " of the L1 table at "
                       "offset %" PRIu64 " has the L2 table offset %" PRIu64
                       ", which is not a multiple of the cluster size",
                       l1_index, view->l1_offset, pos->l2_offset);
  if (get_slice (pos, "L2", pos->l2_offset, l2_index,
                 qcow2_header_l2_entry_size (header), &slice, error) == -1)
    return -1;
  r = scan_l2_slice (pos, &slice, run, more, error);
  qcow2_cache_put (&slice.ref);
  /* A slice ends no later than its table does, as both are aligned. */
  return r;
}

int
qcow2_map (struct qcow2_image *image, const struct qcow2_view *view,
           const struct qcow2_io *io, uint64_t offset, uint64_t count,
           struct qcow2_run *run, GError **error)
{
  struct position pos = {
    .image = image, .io = io, .offset = offset, .count = count,
  };
  struct qcow2_run piece;
  gboolean more;

  if (step (&pos, view, run, &more, error) == -1)
    return -1;
  while (more && run->length < count) {
    pos.offset = offset + run->length;
    pos.count = count - run->length;
    /* What is wrong there is reported when somebody asks for it. */
    if (step (&pos, view, &piece, &more, NULL) == -1 ||
        !continues (run, &piece))
      break;
    run->length += piece.length;
  }
  run->length = MIN (run->length, count);
  return 0;
}
