/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Nodes: the disks of this nbdkit, and the bitmaps that belong to them.
 *
 * Most plugins serve one disk whatever the export name is, so there is
 * one node.  Only if the parameters say so is each export a disk, and a
 * node, of its own.  Nodes are made when they are first needed, and stay
 * until the server ends.
 *
 * Locking: dirty_lock protects all members of nodes and bitmaps, and the
 * table.  Who changes bitmaps other than by writes, or stores them, holds
 * dirty_changes_lock as well, and takes it first: so that bitmaps stay as
 * they are for a long time without anybody else being held up.  Functions
 * expect the caller to hold dirty_lock unless they say "takes the lock".
 * Members which writes read are changed only with the gates of the node
 * closed (see transaction.h), so a write needs no lock: it must not take
 * it, for who holds it may be waiting for the write.
 *
 * Errors are of the domain DIRTY_ERROR, their codes errno values; they
 * name the node and the bitmap.
 */

#ifndef DIRTY_NODE_H
#define DIRTY_NODE_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "dirty/bits.h"
#include "dirty/gate.h"

#define DIRTY_DEFAULT_NODE "disk"
#define DIRTY_MAX_NAME 1023     /* bytes in the name of a bitmap */

/* The filters that watch writes, in the order in which writes pass. */
enum dirty_gate_owner {
  DIRTY_GATE_CBW,
  DIRTY_GATE_TRACKING,
  DIRTY_GATE_PERSIST,
  DIRTY_GATES
};

/* What the qcow2 filter knows of the image of a node, for those who ask. */
struct dirty_image {
  char *filename;
  uint64_t virtual_size;        /* of the disk in it, in bytes */
  uint64_t actual_size;         /* of the container */
  uint32_t cluster_size;
  unsigned version;
  const char *compression;
  bool encrypted, dirty, corrupt;
  bool lazy_refcounts, extended_l2;
  unsigned refcount_bits;
};

struct dirty_node {
  char *name;
  struct dirty_gate gates[DIRTY_GATES];
  bool sized;                   /* false until the disk was first opened */
  uint64_t size;                /* in bytes */
  unsigned connections;         /* that have it open */
  bool read_only;               /* as far as connections have shown */
  bool image_writable;          /* bitmaps of a read-only disk are not */
  bool inactive;                /* another program may be using it */
  unsigned granularity_bits;    /* of new bitmaps; 0: as QEMU has it */
  struct dirty_image *image;    /* or NULL */
  struct dirty_container *container; /* the image, for bitmaps, or NULL */
  struct dirty_persist *persist; /* keeps persistent bitmaps, or NULL */
  GPtrArray *bitmaps;           /* of struct dirty_bitmap, oldest first */
  GPtrArray *recording;         /* their sets; for writes */
};

struct dirty_bitmap {
  struct dirty_node *node;
  char *name;
  struct dirty_bits *bits;
  bool recording;
  bool persistent;
  bool inconsistent;            /* it may only be removed */
  unsigned users;               /* it is busy while there are any */

  /* For persist.h, of persistent ones. */
  bool replaced;                /* it is not what was stored last */
  struct dirty_bits *stored;    /* what is stored, NULL if not known */
};

#define DIRTY_ERROR (dirty_error_quark ())

extern GQuark dirty_error_quark (void);

/* Set *error; always returns -1. */
extern int dirty_fail (GError **error, int code, const char *fs, ...)
  G_GNUC_PRINTF (3, 4);

extern void dirty_lock (void);
extern void dirty_unlock (void);
extern void dirty_changes_lock (void);
extern bool dirty_changes_trylock (void);
extern void dirty_changes_unlock (void);

/* Parameters of filters and plugins that tell which nodes there are; each
 * filter of the suite passes on to here all that it sees.  Returns 1 if
 * the parameter is one of the suite's and nobody else's, 0 if it is not,
 * -1 if its value is bad, with error set.
 */
extern int dirty_nodes_config (const char *key, const char *value,
                               GError **error);

/* Is each export a disk of its own? */
extern bool dirty_nodes_each (void);

/* Let a function be called, with the lock held and closed gates, when a
 * node's disk is given to another program.
 */
extern void dirty_nodes_watch (void (*given_away) (struct dirty_node *node));
extern void dirty_node_give_away (struct dirty_node *node);

/* Call the one node something else.  Before there is any. */
extern void dirty_nodes_rename (const char *name);

/* Takes the lock.  The node to which an export belongs; made if need be. */
extern struct dirty_node *dirty_node_of_export (const char *base);

/* The same if it is there already, else NULL. */
extern struct dirty_node *dirty_node_of_known_export (const char *base);

/* By name; NULL with error set. */
extern struct dirty_node *dirty_node_find (const char *name, GError **error);

/* All of them, in the order of their names.  Free the array. */
extern GPtrArray *dirty_nodes_list (void);

/* What a connection shows about its disk. */
enum dirty_access { DIRTY_WRITABLE, DIRTY_READ_ONLY, DIRTY_UNKNOWN };

/* Takes the lock and closes the gates.  A connection has opened the disk,
 * and found it to be of that size.  If the disk has another size than
 * before, and nobody else has it open, its bitmaps are adapted; what it
 * gained is dirty.
 */
extern int dirty_node_open (struct dirty_node *node, uint64_t size,
                            enum dirty_access access, GError **error);

/* With the gates closed.  What the disk gains is dirty in those bitmaps
 * that record.
 */
extern void dirty_node_resize (struct dirty_node *node, uint64_t size);

/* Takes the lock. */
extern void dirty_node_close (struct dirty_node *node);

/* Takes the lock, and the ownership of image. */
extern void dirty_node_set_image (struct dirty_node *node,
                                  struct dirty_image *image);

/* Takes the lock. */
extern void dirty_node_set_granularity (struct dirty_node *node,
                                        unsigned bits);

/* Of new bitmaps if nobody says otherwise, as a power of two. */
extern unsigned dirty_node_granularity_bits (const struct dirty_node *node);

/* A write is about to change a range: mark it in all bitmaps that record.
 * Inside the gate DIRTY_GATE_TRACKING, without the lock.
 */
extern void dirty_node_mark (struct dirty_node *node, uint64_t offset,
                             uint64_t count);

/* By name; NULL with error set. */
extern struct dirty_bitmap *dirty_bitmap_find (const struct dirty_node *node,
                                               const char *name,
                                               GError **error);

/* Frees one that is on no node's list. */
extern void dirty_bitmap_free (gpointer bitmap);

/* Takes the lock.  What a bitmap holds now, for a reader; it is busy until
 * dirty_bitmap_unuse.  Free the set.  NULL with error set.
 */
extern struct dirty_bits *dirty_bitmap_use (struct dirty_node *node,
                                            const char *name,
                                            struct dirty_bitmap **bitmap,
                                            GError **error);

/* Takes the lock. */
extern void dirty_bitmap_unuse (struct dirty_bitmap *bitmap);

/* Free everything, when the server ends. */
extern void dirty_nodes_forget_all (void);

#endif /* DIRTY_NODE_H */
