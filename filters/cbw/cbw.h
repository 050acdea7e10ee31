/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The cbw filter:
 *
 *    cbw.c        connections and their requests
 *    config.c     parameters
 *    exports.c    names of exports
 *    disk.c       disks and the snapshots that they have
 *    commands.c   QMP
 *    snapshot.h   one snapshot
 *    target.h     where it keeps what was on the disk
 */

#ifndef CBW_H
#define CBW_H

#include "snapshot.h"

struct config {
  GPtrArray *snapshots;         /* names of those made at start, or NULL */
  char *target;                 /* of the one made at start, or NULL */
  char *bitmap;                 /* of those made at start, or NULL */
  bool break_snapshot;
  uint64_t timeout;             /* seconds */
  uint32_t cluster_size;        /* bytes, 0: choose */
  bool discard;
  char *directory;              /* in which we were started */
  int thread_model;
};
extern struct config config;

/* config.c */

extern void config_load (void);
extern void config_unload (void);

/* 1: it was one of ours; 0: it was not; -1: it was wrong, which has been
 * reported.
 */
extern int config_parse (const char *key, const char *value);

/* Is a snapshot of this name made of each disk? */
extern bool config_makes_snapshot (const char *name);

/* Do the parameters make sense together?  -1 as above. */
extern int config_check (void);

#define CONFIG_HELP                                                     \
  "cbw-snapshot=NAME           Make this snapshot at start; can be given\n" \
  "                            more than once.\n"                       \
  "cbw-target=PATH|URI         Where it keeps the old data (default: a\n" \
  "                            temporary file in $TMPDIR).\n"           \
  "cbw-bitmap=NAME             Limit it to what is dirty there.\n"      \
  "cbw-on-error=break-guest-write|break-snapshot\n"                     \
  "                            What happens if old data cannot be saved\n" \
  "                            (default break-guest-write).\n"          \
  "cbw-timeout=SECONDS         How long saving it may take (default: for\n" \
  "                            ever).\n"                                \
  "cbw-cluster-size=SIZE       What is copied at once (default 64K, or\n" \
  "                            what the target prefers).\n"             \
  "cbw-discard=on|off          Let readers discard (default off).\n"

/* A list of snapshots which is never changed, only replaced. */
typedef GPtrArray snapshot_list;

struct disk {
  struct dirty_node *node;
  /* Replaced with the lock of dirty/node.h held and the gates closed; so
   * it is right for who holds the lock, or is inside the gate.
   */
  snapshot_list *snapshots;
  bool started;                 /* those made at start are there */

  GMutex guests_lock;
  GPtrArray *guests;            /* of struct guest */
};

/* A connection that may write to a disk whose connections do not all see
 * the same at once.
 */
struct guest {
  struct below *below;
  atomic_bool wrote;            /* since it was last asked to flush */
};

/* disk.c */

/* Takes the lock.  The disk of a node, made if need be. */
extern struct disk *disk_of_node (struct dirty_node *node);

/* The same if there is one already, with the lock held; else NULL. */
extern struct disk *disk_of_known_node (const struct dirty_node *node);

/* With the lock held; NULL if there is none of this name. */
extern struct snapshot *disk_find (const struct disk *disk,
                                   const char *name);

/* In a transaction: from now on the snapshot, made of this node, is there.
 * The disk takes a reference of its own.
 */
struct dirty_transaction;
extern int disk_add (struct dirty_transaction *t, struct disk *disk,
                     struct snapshot *s, GError **error);

/* Takes the lock.  Take it off the list; the list's reference becomes the
 * caller's.  NULL with error set.
 */
extern struct snapshot *disk_remove (const char *node, const char *name,
                                     GError **error);

/* Takes the lock.  Make the snapshots that the command line asks for, if
 * that has not been done; the size of the disk is known.
 */
extern int disk_start (struct disk *disk, GError **error);

/* Let everybody see what was written before the snapshot was made.  Needed,
 * before the disk is read for it, unless the layer below is coherent.
 * Returns -1 with *err set.
 */
extern int disk_settle (struct disk *disk, struct snapshot *s, int *err);

extern void disk_add_guest (struct disk *disk, struct guest *guest);
extern void disk_remove_guest (struct disk *disk, struct guest *guest);

/* Takes the lock.  The disk has become this small. */
extern void disk_check_size (struct disk *disk, uint64_t size);

/* With the lock held. */
extern void disk_foreach_snapshot (void (*call) (struct snapshot *s,
                                                 gpointer opaque),
                                   gpointer opaque);

/* Let snapshots break that cannot see all writes any more. */
extern void disks_watch (void);

/* No more waiting: all snapshots end, as the server does. */
extern void disks_end_all (void);
extern void disks_forget_all (void);

/* A write is let in when all snapshots have what it will change.  Returns
 * -1 with *err set if it must fail; else disk_end_write follows.
 */
extern int disk_begin_write (struct disk *disk, const struct below *below,
                             uint64_t offset, uint32_t count, int *err);
extern void disk_end_write (struct disk *disk);

/* exports.c */

/* Can the export be a disk of which there are snapshots? */
extern bool export_is_disk (const char *name);

/* Takes the lock.  A snapshot of the disk, to be unref'ed, or NULL. */
extern struct snapshot *export_find_snapshot (const char *base,
                                              const char *name);

/* For lists, of a snapshot, or what was dirty in a bitmap unless NULL. */
extern char *export_describe_view (const char *snapshot, const char *bitmap);

/* Takes the lock.  Add what is below, and all that there is of it.  Returns
 * -1 if there was an error, which was reported.
 */
extern int exports_list (const struct nbdkit_exports *below,
                         struct nbdkit_exports *exports);

/* commands.c */
extern void commands_register (void);

#endif /* CBW_H */
