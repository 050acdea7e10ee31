/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What readers of a snapshot get; see snapshot.c for why this is right.
 *
 * In extents a cluster that is inaccessible is a clean block: there is
 * nothing to be had.  Those that were copied are data, because zeroes are
 * not copied.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "dirty/view.h"

#include "snapshot.h"

#define HOLE NBDKIT_EXTENT_HOLE
#define ZERO NBDKIT_EXTENT_ZERO

/* A range of the view, in bytes. */
struct range {
  struct snapshot *s;
  const struct below *below;
  uint8_t *buf;
  uint64_t offset, count;
};

/* 0 or an errno value: is all of it to be had? */
static int
check_access (const struct range *r)
{
  const struct snapshot *s = r->s;
  const uint64_t end = ((r->offset + r->count - 1) >> s->cluster_bits) + 1;
  uint64_t c = r->offset >> s->cluster_bits, length;

  if (atomic_load (&s->ended))
    return EIO;
  for (; c < end; c += length)
    if (snapshot_run (s, c, end, &length) == INACCESSIBLE)
      return EPERM;
  return 0;
}

/* The part of the range, at its beginning, that is in one state. */
static enum state
first_part (const struct range *r, struct range *part)
{
  const unsigned bits = r->s->cluster_bits;
  const uint64_t cluster = r->offset >> bits;
  uint64_t length;
  const enum state state =
    snapshot_run (r->s, cluster, ((r->offset + r->count - 1) >> bits) + 1,
                  &length);

  *part = *r;
  part->count = MIN (r->count, ((cluster + length) << bits) - r->offset);
  return state;
}

static void
advance (struct range *r, uint64_t count)
{
  r->offset += count;
  r->count -= count;
  if (r->buf)
    r->buf += count;
}

/* The target may want whole blocks. */
static int
read_copied (const struct range *r)
{
  struct target *target = snapshot_target (r->s);
  uint64_t mask, start, end;
  uint8_t *bounce;
  int error = ENOMEM;

  if (!target)
    return EIO;
  mask = target->minimum - 1;
  start = r->offset & ~mask;
  end = (r->offset + r->count + mask) & ~mask;
  if (start == r->offset && end == r->offset + r->count)
    error = target_read (target, r->buf, r->count, r->offset);
  else {
    bounce = g_try_malloc (end - start);
    if (bounce) {
      error = target_read (target, bounce, end - start, start);
      memcpy (r->buf, bounce + (r->offset - start), r->count);
      g_free (bounce);
    }
  }
  target_unref (target);
  return error;
}

/* What is not, or no longer, on the disk. */
static int
read_elsewhere (const struct range *r, enum state state)
{
  switch (state) {
  case COPIED:
    return read_copied (r);
  case ZEROES:
    memset (r->buf, 0, r->count);
    return 0;
  case INACCESSIBLE:
    return EPERM;
  default:
    return 0;
  }
}

/* Read the disk, then what guests have changed meanwhile from elsewhere. */
static int
read_disk (struct range r)
{
  int error = below_read (r.below, r.buf, r.count, r.offset);
  struct range part;

  for (; !error && r.count > 0; advance (&r, part.count)) {
    const enum state state = first_part (&r, &part);

    if (state != ON_DISK)
      error = read_elsewhere (&part, state);
  }
  return error;
}

static int
read_range (struct range r)
{
  const struct range all = r;
  struct range part;
  int error = check_access (&r);

  for (; !error && r.count > 0; advance (&r, part.count)) {
    const enum state state = first_part (&r, &part);

    error = state == ON_DISK ? read_disk (part) :
      read_elsewhere (&part, state);
  }
  /* It may have ended, or been discarded, while that was read. */
  return error ? error : check_access (&all);
}

int
snapshot_read (struct snapshot *s, const struct below *below, void *buf,
               uint32_t count, uint64_t offset, int *err)
{
  const struct range r = { s, below, buf, offset, count };
  const int error = read_range (r);

  *err = error == EPERM || error == ENOMEM ? error : EIO;
  return error ? -1 : 0;
}

/* Extents. */

/* Has the client what it wants? */
static bool
is_enough (const struct nbdkit_extents *extents, uint32_t flags)
{
  return (flags & NBDKIT_FLAG_REQ_ONE) && nbdkit_extents_count (extents) > 1;
}

/* Add what the layer below says, as long as it is about the snapshot.
 * Returns the number of bytes, or -1 with *err set.
 */
static int64_t
add_from (const struct range *r, const struct nbdkit_extents *below,
          struct dirty_bits *bits, struct nbdkit_extents *extents, int *err)
{
  struct range part;
  uint64_t done = r->offset, end;

  /* What is still on the disk now was so when we asked. */
  if (first_part (r, &part) != ON_DISK)
    return 0;
  end = part.offset + part.count;
  for (size_t i = 0; i < nbdkit_extents_count (below) && done < end; ++i) {
    const struct nbdkit_extent e = nbdkit_get_extent (below, i);
    const uint64_t stop = MIN (e.offset + e.length, end);

    if (nbdkit_add_extent (extents, done, stop - done,
                           bits ? dirty_view_dirty_type (e.type) :
                           e.type) == -1) {
      *err = errno;
      return -1;
    }
    done = stop;
  }
  return done - r->offset;
}

/* For clusters that were on the disk. */
static int64_t
add_disk (const struct range *r, struct dirty_bits *bits, uint32_t flags,
          struct nbdkit_extents *extents, int *err)
{
  nbdkit_next *next = r->below->next;
  struct nbdkit_extents *below;
  int64_t done = -1;

  below = nbdkit_extents_new (r->offset, r->offset + r->count);
  if (!below) {
    *err = ENOMEM;
    return -1;
  }
  *err = EIO;
  if (next->extents (next, r->count, r->offset, flags, below, err) == 0)
    done = add_from (r, below, bits, extents, err);
  nbdkit_extents_free (below);
  return done;
}

/* Add the beginning of the range, all of it dirty if that is asked for. */
static int64_t
add_part (const struct range *r, struct dirty_bits *bits, uint32_t flags,
          struct nbdkit_extents *extents, int *err)
{
  struct range part;
  const enum state state = first_part (r, &part);
  const bool as_data = bits && dirty_view_clean_is_zero ();
  uint32_t type = 0;

  if (state == ON_DISK && r->below->can_extents && !as_data)
    return add_disk (&part, bits, flags, extents, err);
  if (state == INACCESSIBLE)
    type = dirty_view_clean_type ();
  else if (state == ZEROES && !as_data)
    type = HOLE | ZERO;
  *err = ENOMEM;
  return nbdkit_add_extent (extents, part.offset, part.count, type) == -1 ?
    -1 : (int64_t) part.count;
}

int
snapshot_extents (struct snapshot *s, const struct below *below,
                  struct dirty_bits *bits, uint32_t count, uint64_t offset,
                  uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  struct range r = { s, below, NULL, offset, count }, part;
  uint64_t length;
  int64_t n;

  while (r.count > 0 && !is_enough (extents, flags)) {
    part = r;
    if (bits) {
      const bool dirty = dirty_bits_get (bits, r.offset, &length);

      part.count = n = MIN (length, r.count);
      if (!dirty && nbdkit_add_extent (extents, r.offset, n,
                                       dirty_view_clean_type ()) == -1) {
        *err = ENOMEM;
        return -1;
      }
      if (!dirty) {
        advance (&r, n);
        continue;
      }
    }
    n = add_part (&part, bits, flags, extents, err);
    if (n == -1)
      return -1;
    advance (&r, n);
  }
  if (atomic_load (&s->ended)) {
    *err = EIO;
    return -1;
  }
  return 0;
}
