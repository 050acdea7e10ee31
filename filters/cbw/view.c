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

  /* First what was read, then the states. */
  atomic_thread_fence (memory_order_seq_cst);

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
  atomic_thread_fence (memory_order_seq_cst);
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

/* A question for extents that is being answered. */
struct answer {
  struct range r;               /* what remains of it */
  struct dirty_bits *bits;      /* or NULL */
  uint32_t flags;
  struct nbdkit_extents *extents;

  /* What the layer below says, to be used as long as the clusters still are
   * on the disk; or NULL.
   */
  struct status *status;
  size_t next;                  /* the first extent that may be of use */
};

/* Has the client what it wants? */
static bool
is_enough (const struct answer *a)
{
  return (a->flags & NBDKIT_FLAG_REQ_ONE) &&
    nbdkit_extents_count (a->extents) > 1;
}

/* Returns -1 with *err set. */
static int
add (struct answer *a, uint64_t count, uint32_t type, int *err)
{
  const int r = nbdkit_add_extent (a->extents, a->r.offset, count, type);

  *err = ENOMEM;
  advance (&a->r, count);
  return r;
}

static int
ask_below (struct answer *a, int *err)
{
  const uint64_t offset = a->r.offset;

  status_unref (a->status);
  a->status = status_ask (&a->r.s->status, a->r.below, offset,
                          offset + a->r.count, a->flags, err);
  if (!a->status)
    return -1;
  a->next = status_find (a->status, offset);
  return 0;
}

/* Add a part that still is on the disk now, and so was when the layer below
 * was asked; at most as much as it said.
 */
static int
add_below (struct answer *a, const struct range *part, int *err)
{
  const uint64_t end = MIN (part->offset + part->count, a->status->end);

  while (a->r.offset < end && !is_enough (a)) {
    const struct nbdkit_extent e = nbdkit_get_extent (a->status->extents,
                                                       a->next);
    const uint64_t stop = MIN (e.offset + e.length, end);

    if (stop > a->r.offset &&
        add (a, stop - a->r.offset,
             a->bits ? dirty_view_dirty_type (e.type) : e.type, err) == -1)
      return -1;
    if (stop < end)
      a->next++;
  }
  return 0;
}

/* Add the beginning of what remains, or ask for what it is. */
static int
add_part (struct answer *a, const struct range *limits, int *err)
{
  struct range part;
  const enum state state = first_part (limits, &part);
  const bool as_data = a->bits && dirty_view_clean_is_zero ();

  if (state == ON_DISK && !as_data)
    return a->status && part.offset < a->status->end ?
      add_below (a, &part, err) : ask_below (a, err);
  return add (a, part.count, state == INACCESSIBLE ? dirty_view_clean_type () :
              state == ZEROES && !as_data ? HOLE | ZERO : 0, err);
}

static int
answer (struct answer *a, int *err)
{
  int r = 0;

  while (r == 0 && a->r.count > 0 && !is_enough (a)) {
    struct range part = a->r;
    uint64_t length;
    bool dirty = true;

    if (a->bits) {
      dirty = dirty_bits_get (a->bits, part.offset, &length);
      part.count = MIN (part.count, length);
    }
    r = dirty ? add_part (a, &part, err) :
      add (a, part.count, dirty_view_clean_type (), err);
  }
  return r;
}

int
snapshot_extents (struct snapshot *s, const struct below *below,
                  struct dirty_bits *bits, uint32_t count, uint64_t offset,
                  uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  struct answer a = {
    .r = { s, below, NULL, offset, count },
    .bits = bits,
    .flags = flags,
    .extents = extents,
  };
  int r = answer (&a, err);

  status_unref (a.status);
  if (r == 0 && atomic_load (&s->ended)) {
    *err = EIO;
    r = -1;
  }
  return r;
}
