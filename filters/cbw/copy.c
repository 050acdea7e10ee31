/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What a write does before it changes anything: it copies the clusters
 * that a snapshot does not have yet.
 *
 * The thread of the request reads the old data itself, through its own
 * context of the layer below, so that it sees what it would see if it
 * read, whatever that layer is.  The target is written by others, and the
 * request waits for them: it can give up after the time limit, or when
 * the snapshot ends.  The copy then goes on without it, and counts if it
 * ever succeeds.  All this is outside of the gate, which therefore nobody
 * holds closed or open because of a target.
 *
 * A copy that goes on is on the snapshot's list.  Who wants one of its
 * clusters too waits for it.  If it fails, they try it themselves.
 *
 * A long request is copied in pieces, of which several are under way.
 * Memory for them is limited, for all snapshots and for each, so that one
 * with a target that hangs leaves some to the others.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "patience.h"
#include "snapshot.h"

/* Bytes.  A cluster may be larger than a piece. */
#define MAX_PIECE (1 << 20)
#define MAX_MEMORY (UINT64_C (128) << 20)
#define MAX_MEMORY_EACH (UINT64_C (32) << 20)

/* Pieces of one request that are under way. */
#define DEPTH 8

/* For longer requests the layer below is asked for what is zero, so much at
 * once; for shorter ones reading is faster than asking.
 */
#define LONG_REQUEST (UINT64_C (4) << 20)
#define EXTENTS_STEP (UINT64_C (1) << 30)

struct copy {
  refs refs;         /* the writer's; the target's */
  struct snapshot *s;
  struct target *target;
  uint64_t first, n;            /* clusters */
  uint8_t *buf;
  GCond cond;                   /* done, or the snapshot has ended */
  bool done;                    /* under the snapshot's lock */
  int error;                    /* likewise; errno value */
  atomic_uint writes;           /* one more while they are being issued */
  atomic_int write_error;
  bool zeroes[];                /* for each cluster */
};

/* A write that is being prepared. */
struct save {
  struct snapshot *s;
  const struct below *below;
  gint64 limit;                 /* monotonic time, or 0 */
  bool direct;                  /* this thread may write to the target */
  uint64_t end;                 /* of the request, in clusters */

  /* What the layer below said, up to an offset.  It holds for clusters that
   * are still on the disk, as those have not changed.
   */
  bool is_long;
  struct nbdkit_extents *extents;
  size_t next_extent;           /* the first that may be of use */
  uint64_t extents_end;
  bool disk_failed;             /* as opposed to the target */
  bool gone;                    /* nobody waits for the write any more */
};

/* Memory. */

static GMutex memory_lock;
static GCond memory_changed;
static uint64_t memory_used;

void
copies_wake_for_memory (void)
{
  g_mutex_lock (&memory_lock);
  g_cond_broadcast (&memory_changed);
  g_mutex_unlock (&memory_lock);
}

/* Returns 0, or an errno value, or -1 if the snapshot has ended. */
static int
take_memory (struct save *save, uint64_t bytes)
{
  struct snapshot *s = save->s;
  int error = 0;

  g_mutex_lock (&memory_lock);
  while (!error && (memory_used + bytes > MAX_MEMORY ||
                    s->in_flight + bytes > MAX_MEMORY_EACH)) {
    error = atomic_load (&s->ended) ? -1 :
      patience_wait (&memory_changed, &memory_lock, save->limit);
    save->gone |= error == ESHUTDOWN;
  }
  if (!error) {
    memory_used += bytes;
    s->in_flight += bytes;
  }
  g_mutex_unlock (&memory_lock);
  return error;
}

static void
give_memory (struct snapshot *s, uint64_t bytes)
{
  g_mutex_lock (&memory_lock);
  memory_used -= bytes;
  s->in_flight -= bytes;
  g_cond_broadcast (&memory_changed);
  g_mutex_unlock (&memory_lock);
}

/* Copies. */

static uint64_t
copy_size (const struct copy *copy)
{
  return copy->n << copy->s->cluster_bits;
}

static uint64_t
copy_offset (const struct copy *copy)
{
  return copy->first << copy->s->cluster_bits;
}

/* With the snapshot's lock held; it is put on the list. */
static struct copy *
copy_new (struct snapshot *s, uint64_t first, uint64_t n)
{
  struct copy *copy = g_malloc0 (sizeof *copy + n * sizeof copy->zeroes[0]);

  refs_init (&copy->refs, 1);
  copy->s = snapshot_ref (s);
  copy->target = target_ref (s->target);
  copy->first = first;
  copy->n = n;
  g_cond_init (&copy->cond);
  atomic_init (&copy->writes, 1);
  g_queue_push_tail (&s->copies, copy);
  return copy;
}

static void
copy_unref (struct copy *copy)
{
  if (!refs_dec (&copy->refs))
    return;
  g_cond_clear (&copy->cond);
  target_unref (copy->target);
  snapshot_unref (copy->s);
  g_free (copy);
}

/* With the lock held: which tenth of the snapshot has been copied, if that
 * is news?
 */
static unsigned
new_tenth (struct snapshot *s)
{
  const unsigned tenths = (double) s->copied * 10 / s->size;

  if (tenths <= s->tenths)
    return 0;
  s->tenths = tenths;
  return tenths;
}

/* With the lock held: count what has been copied.  A cluster that a reader
 * has discarded meanwhile stays so; the space is freed again.
 */
static void
publish (struct copy *copy)
{
  struct snapshot *s = copy->s;
  uint64_t length;

  for (uint64_t i = 0; i < copy->n; ++i) {
    const uint64_t cluster = copy->first + i;
    const uint64_t bytes = snapshot_bytes (s, cluster, 1);

    if (snapshot_run (s, cluster, cluster + 1, &length) == ON_DISK) {
      snapshot_set_state (s, cluster, copy->zeroes[i] ? ZEROES : COPIED);
      s->copied += copy->zeroes[i] ? 0 : bytes;
    }
    else if (!copy->zeroes[i])
      target_discard_later (copy->target, cluster << s->cluster_bits, bytes);
  }
}

/* It is over, in whatever way. */
static void
copy_finish (struct copy *copy, int error)
{
  struct snapshot *s = copy->s;
  unsigned tenth;

  g_mutex_lock (&s->lock);
  if (!error)
    publish (copy);
  copy->done = true;
  copy->error = error;
  g_queue_remove (&s->copies, copy);
  g_cond_broadcast (&copy->cond);
  tenth = new_tenth (s);
  g_mutex_unlock (&s->lock);

  if (tenth)
    nbdkit_debug ("cbw: snapshot %s: %u%% of the disk copied", s->name,
                  tenth * 10);
  if (copy->buf) {
    g_free (copy->buf);
    give_memory (s, copy_size (copy));
  }
  copy_unref (copy);
}

void
copies_wake (struct snapshot *s)
{
  for (GList *l = s->copies.head; l; l = l->next)
    g_cond_broadcast (&((struct copy *) l->data)->cond);
}

/* Reading. */

static bool
is_zero (const uint8_t *buf, size_t count)
{
  return count == 0 || (*buf == 0 && memcmp (buf, buf + 1, count - 1) == 0);
}

/* Ask for the extents from offset on.  That it fails does no harm. */
static void
ask_below (struct save *save, uint64_t offset)
{
  const struct below *below = save->below;
  const uint64_t end = MIN (save->end << save->s->cluster_bits,
                            save->s->size);
  const uint64_t bytes = MIN (end - offset, EXTENTS_STEP);
  int err = 0;

  nbdkit_extents_free (save->extents);
  below_lock (below);
  save->extents = nbdkit_extents_full (below->next, bytes, offset, 0, &err);
  below_unlock (below);
  save->extents_end = offset + bytes;
  save->next_extent = 0;
}

/* Mark the clusters of which the layer below knows without being read that
 * they are zeroes.
 */
static void
mark_zeroes (struct copy *copy, struct save *save)
{
  const struct snapshot *s = copy->s;
  const uint64_t offset = copy_offset (copy), size = snapshot_cluster_size (s);
  const uint64_t bytes = snapshot_bytes (s, copy->first, copy->n);

  if (offset + bytes > save->extents_end)
    ask_below (save, offset);
  for (size_t i = save->next_extent;
       save->extents && i < nbdkit_extents_count (save->extents); ++i) {
    const struct nbdkit_extent e = nbdkit_get_extent (save->extents, i);
    const uint64_t end = e.offset + e.length;
    uint64_t c = e.offset > offset ? (e.offset - offset + size - 1) / size : 0;

    for (; (e.type & NBDKIT_EXTENT_ZERO) && c < copy->n &&
           offset + c * size + snapshot_bytes (s, copy->first + c, 1) <= end;
         ++c)
      copy->zeroes[c] = true;
    if (end >= offset + bytes)
      break;
    save->next_extent = i + 1;
  }
}

/* From cluster i on, how many are (not) zeroes, as far as is known? */
static uint64_t
run_length (const struct copy *copy, uint64_t i)
{
  const uint64_t first = i;

  while (i < copy->n && copy->zeroes[i] == copy->zeroes[first])
    i++;
  return i - first;
}

static int
read_old (struct copy *copy, struct save *save)
{
  const struct snapshot *s = copy->s;
  const unsigned bits = s->cluster_bits;
  uint64_t n;
  int error;

  if (save->is_long && below_can_extents (save->below) == 1)
    mark_zeroes (copy, save);
  for (uint64_t i = 0; i < copy->n; i += n) {
    n = run_length (copy, i);
    if (copy->zeroes[i])
      continue;
    error = below_read (save->below, copy->buf + (i << bits),
                        snapshot_bytes (s, copy->first + i, n),
                        (copy->first + i) << bits);
    if (error)
      return error;
  }
  for (uint64_t i = 0; i < copy->n; ++i)
    if (!copy->zeroes[i])
      copy->zeroes[i] = is_zero (copy->buf + (i << bits),
                                 snapshot_bytes (s, copy->first + i, 1));
  return 0;
}

/* Writing. */

static void
write_done (gpointer opaque, int error)
{
  struct copy *copy = opaque;

  if (error)
    atomic_store (&copy->write_error, error);
  if (atomic_fetch_sub (&copy->writes, 1) == 1)
    copy_finish (copy, atomic_load (&copy->write_error));
}

/* The reference that is given away is copy_finish's. */
static void
write_old (struct copy *copy, bool direct)
{
  struct snapshot *s = copy->s;
  const uint64_t mask = copy->target->minimum - 1;
  uint64_t n;

  for (uint64_t i = 0; i < copy->n; i += n) {
    n = run_length (copy, i);
    if (copy->zeroes[i])
      continue;
    atomic_fetch_add (&copy->writes, 1);
    /* What is behind the end of the disk is zeroes. */
    target_write (copy->target, copy->buf + (i << s->cluster_bits),
                  (snapshot_bytes (s, copy->first + i, n) + mask) & ~mask,
                  (copy->first + i) << s->cluster_bits, direct,
                  write_done, copy);
  }
  write_done (copy, 0);
}

static bool
is_late (const struct save *save)
{
  return save->limit && g_get_monotonic_time () >= save->limit;
}

/* Begin it.  The caller has a reference, and gives one away. */
static void
copy_start (struct copy *copy, struct save *save)
{
  int error = take_memory (save, copy_size (copy));
  const uint64_t bytes = snapshot_bytes (copy->s, copy->first, copy->n);

  if (!error) {
    copy->buf = g_try_malloc (copy_size (copy));
    if (!copy->buf) {
      give_memory (copy->s, copy_size (copy));
      error = ENOMEM;
    }
  }
  if (!error) {
    if (bytes < copy_size (copy))
      memset (copy->buf + bytes, 0, copy_size (copy) - bytes);
    error = read_old (copy, save);
    save->disk_failed = error != 0;
  }
  if (!error && is_late (save))
    error = ETIMEDOUT;
  if (error)
    copy_finish (copy, error);
  else
    write_old (copy, save->direct);
}

/* Returns what came of it; or why it was not waited for; or 0 if the
 * snapshot has ended.  The reference is given back.
 */
static int
copy_wait (struct copy *copy, struct save *save)
{
  struct snapshot *s = save->s;
  int error = 0;

  g_mutex_lock (&s->lock);
  while (!error && !copy->done && !atomic_load (&s->ended))
    error = patience_wait (&copy->cond, &s->lock, save->limit);
  if (copy->done)
    error = copy->error;
  else
    save->gone |= error == ESHUTDOWN;
  if (atomic_load (&s->ended))
    error = 0;
  g_mutex_unlock (&s->lock);
  copy_unref (copy);
  return error;
}

/* Requests. */

/* With the lock held: the copy that has this cluster, or NULL; then end is
 * reduced to where the next one begins.
 */
static struct copy *
find_copy (struct snapshot *s, uint64_t cluster, uint64_t *end)
{
  for (GList *l = s->copies.head; l; l = l->next) {
    struct copy *copy = l->data;

    if (cluster >= copy->first && cluster < copy->first + copy->n)
      return copy;
    if (copy->first > cluster)
      *end = MIN (*end, copy->first);
  }
  return NULL;
}

/* Step over clusters from *cluster on: those that need nothing (then NULL is
 * returned), those that somebody copies, or those for which a copy was made
 * that the caller must start.
 */
static struct copy *
step (struct snapshot *s, uint64_t *cluster, uint64_t end, bool *mine)
{
  struct copy *copy = NULL;
  uint64_t length, stop = end;

  *mine = false;
  g_mutex_lock (&s->lock);
  if (!s->target)
    *cluster = end;             /* it has ended */
  else if (snapshot_run (s, *cluster, end, &length) != ON_DISK)
    *cluster += length;
  else if ((copy = find_copy (s, *cluster, &stop)) != NULL) {
    refs_inc (&copy->refs);
    *cluster = copy->first + copy->n;
  }
  else {
    length = MIN (length, stop - *cluster);
    length = MIN (length, MAX (MAX_PIECE >> s->cluster_bits, 1));
    copy = copy_new (s, *cluster, length);
    refs_inc (&copy->refs);
    *cluster += length;
    *mine = true;
  }
  g_mutex_unlock (&s->lock);
  return copy;
}

/* Copy what nobody else copies; what is the first that somebody does? */
static int
save_mine (struct save *save, uint64_t cluster, uint64_t end,
           struct copy **others)
{
  GQueue mine = G_QUEUE_INIT;
  struct copy *copy;
  int error = 0;
  bool is_mine;

  *others = NULL;
  while (!error && cluster < end) {
    copy = step (save->s, &cluster, end, &is_mine);
    if (is_mine) {
      copy_start (copy, save);
      g_queue_push_tail (&mine, copy);
      if (mine.length >= DEPTH)
        error = copy_wait (g_queue_pop_head (&mine), save);
    }
    else if (copy && !*others)
      *others = copy;
    else if (copy)
      copy_unref (copy);
  }
  while ((copy = g_queue_pop_head (&mine)) != NULL)
    if (error)
      copy_unref (copy);
    else
      error = copy_wait (copy, save);
  return error;
}

static int
save_range (struct save *save, uint64_t first, uint64_t end)
{
  struct copy *others;
  int error;

  do {
    error = save_mine (save, first, end, &others);
    if (others && error)
      copy_unref (others);
    /* That it failed for another is no reason not to try. */
    else if (others) {
      copy_wait (others, save);
      error = save->gone ? ESHUTDOWN : is_late (save) ? ETIMEDOUT : 0;
    }
  } while (others && !error);
  return error;
}

/* What a guest can be told; others would become EINVAL. */
static int
guest_error (int error)
{
  return error == ENOSPC || error == ENOMEM || error == EDQUOT ||
    error == EFBIG ? error : EIO;
}

static char *
explain (const struct save *save, int error)
{
  if (error == ETIMEDOUT && is_late (save))
    return g_strdup_printf ("copying to %s took longer than %u seconds",
                            save->s->target_name, save->s->timeout);
  return g_strdup_printf ("%s: %s", save->disk_failed ? "reading the disk" :
                          save->s->target_name, g_strerror (error));
}

int
snapshot_save (struct snapshot *s, const struct below *below,
               uint64_t offset, uint64_t count, int *err)
{
  const uint64_t last = MIN (offset + count, s->size) - 1;
  const uint64_t first = offset >> s->cluster_bits;
  const uint64_t end = (last >> s->cluster_bits) + 1;
  struct save save = { .s = s, .below = below, .end = end };
  g_autofree char *reason = NULL;
  int error;

  if (s->timeout)
    save.limit = g_get_monotonic_time () +
      (gint64) s->timeout * G_USEC_PER_SEC;
  save.direct = !s->timeout && (end - first) << s->cluster_bits <= MAX_PIECE;
  save.is_long = count > LONG_REQUEST;
  error = save_range (&save, first, end);
  nbdkit_extents_free (save.extents);
  if (!error || atomic_load (&s->ended))
    return 0;
  if (save.gone) {
    *err = ESHUTDOWN;
    return -1;
  }
  reason = explain (&save, error);
  if (s->break_snapshot) {
    snapshot_break (s, error, error == ETIMEDOUT, "%s", reason);
    return 0;
  }
  nbdkit_error ("snapshot %s of node %s: a write fails, as the old data "
                "cannot be saved: %s", s->name, s->node->name, reason);
  *err = guest_error (error);
  return -1;
}
