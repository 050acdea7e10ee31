/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* One snapshot: which clusters it has, where, and how they get there.
 *
 *    snapshot.c   states of clusters; the end of a snapshot
 *    copy.c       what a guest's write does before it changes anything
 *    view.c       what the snapshot's readers do
 *    status.h     where the disk has data
 */

#ifndef CBW_SNAPSHOT_H
#define CBW_SNAPSHOT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "dirty/node.h"

#include "below.h"
#include "status.h"
#include "target.h"

#define MIN_CLUSTER_SIZE 4096
#define MAX_CLUSTER_SIZE (1 << 24)
#define DEFAULT_CLUSTER_SIZE (1 << 16)

/* What a snapshot is made from. */
struct snapshot_options {
  const char *name;
  const char *bitmap;           /* which limits it, or NULL */
  const char *target;           /* absolute name, URI or NULL */
  bool break_snapshot;          /* if a copy fails, else the write fails */
  uint64_t timeout;             /* of copies, in seconds; 0: none */
  uint32_t cluster_size;        /* 0: choose */
};

/* States of clusters.  Each goes only to a higher one. */
enum state {
  ON_DISK,                      /* not changed yet */
  COPIED,                       /* to the target */
  ZEROES,                       /* all of it, and nowhere else */
  INACCESSIBLE,                 /* not covered, or discarded */
};

/* A bitmap of the disk, as it was when the snapshot was made. */
struct frozen {
  char *name;
  struct dirty_bits *bits;
};

struct copy;

struct snapshot {
  refs refs;
  struct dirty_node *node;
  char *name;
  char *bitmap;                 /* which limits it, or NULL */
  char *target_name;
  bool break_snapshot;
  unsigned timeout;             /* seconds */
  uint64_t size;                /* of the disk, in bytes */
  unsigned cluster_bits;
  uint64_t clusters;
  GPtrArray *frozen;            /* of struct frozen, since its creation */

  /* Two bits for each cluster.  Changed with the lock held. */
  _Atomic uint64_t *states;

  /* 0: it is active; else why not, an errno value.  Set once, with the
   * lock held, after reason.
   */
  atomic_int ended;

  atomic_bool settled;          /* see disk_settle */
  struct status_cache status;

  GMutex lock;                  /* for the rest; never held over I/O */
  char *reason;                 /* for the user */
  struct target *target;        /* NULL once it has ended */
  GQueue copies;                /* of struct copy, those that go on */
  uint64_t copied, accessible;  /* bytes */
  unsigned tenths;              /* of the disk, copied and reported */

  size_t in_flight;             /* bytes; under the lock of copy.c */
};

/* snapshot.c */

/* Make one of a disk whose size is known, and open its target.  It becomes
 * a snapshot only when snapshot_freeze is called, with the gates closed
 * and the lock of dirty/node.h held.
 */
extern struct snapshot *snapshot_new (struct dirty_node *node, uint64_t size,
                                      const struct snapshot_options *options,
                                      GError **error);
extern int snapshot_freeze (struct snapshot *s, GError **error);

/* Is it a name under which it can be exported? */
extern int snapshot_check_name (const char *name, GError **error);

extern struct snapshot *snapshot_ref (struct snapshot *s);
extern void snapshot_unref (struct snapshot *s);

static inline uint64_t
snapshot_cluster_size (const struct snapshot *s)
{
  return UINT64_C (1) << s->cluster_bits;
}

/* The state of a cluster, and how many from there on have the same, up to
 * end.  Without the lock the states may change meanwhile.
 */
extern enum state snapshot_run (const struct snapshot *s, uint64_t cluster,
                                uint64_t end, uint64_t *length);

/* With the lock held. */
extern void snapshot_set_state (struct snapshot *s, uint64_t cluster,
                                enum state state);

/* Where a range of clusters begins and how much of the disk is in it. */
extern uint64_t snapshot_bytes (const struct snapshot *s, uint64_t cluster,
                                uint64_t n);

/* Need not be copied any more before a guest changes this range. */
extern bool snapshot_is_saved (const struct snapshot *s, uint64_t offset,
                               uint64_t count);

/* The target, to be unref'ed; NULL if the snapshot has ended. */
extern struct target *snapshot_target (struct snapshot *s);

/* It cannot be completed: reads of it will fail, writes wait no longer.
 * hangs: its target does not answer.
 */
extern void snapshot_break (struct snapshot *s, int error, bool hangs,
                            const char *fs, ...) G_GNUC_PRINTF (4, 5);

/* It is about to be deleted: from now on nobody reads it, and writes do not
 * wait for it.  With the gates closed, as the next write may not copy.
 */
extern void snapshot_stop (struct snapshot *s, const char *reason);

/* It is not wanted any more.  Called when it is on no list; done, unless
 * NULL, is called when its space has been freed.
 */
extern void snapshot_delete (struct snapshot *s, const char *reason,
                             target_done done, gpointer opaque);

/* The bitmap that it has kept, or NULL. */
extern struct dirty_bits *snapshot_frozen (const struct snapshot *s,
                                           const char *name);

/* A reader does not want these bytes any more; whole clusters count.
 * Returns -1 with *err set if the snapshot has ended.
 */
extern int snapshot_discard (struct snapshot *s, uint64_t offset,
                             uint64_t count, int *err);

/* copy.c */

/* A guest wants to change this range of the disk, whose present content is
 * read through below.  Returns 0 if that is saved, or nobody will want it,
 * -1 with *err set if the write must fail.  Called outside of the gate.
 */
extern int snapshot_save (struct snapshot *s, const struct below *below,
                          uint64_t offset, uint64_t count, int *err);

/* The snapshot has ended: wake those who wait for its copies.  With its
 * lock held.
 */
extern void copies_wake (struct snapshot *s);

/* And those who wait for memory, without it. */
extern void copies_wake_for_memory (void);

/* view.c: for readers.  Return -1 with *err set. */

extern int snapshot_read (struct snapshot *s, const struct below *below,
                          void *buf, uint32_t count, uint64_t offset,
                          int *err);

/* bits, unless NULL: what is dirty. */
extern int snapshot_extents (struct snapshot *s, const struct below *below,
                             struct dirty_bits *bits, uint32_t count,
                             uint64_t offset, uint32_t flags,
                             struct nbdkit_extents *extents, int *err);

#endif /* CBW_SNAPSHOT_H */
