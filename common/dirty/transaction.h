/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Changes to bitmaps, all or nothing, at one point in time.
 *
 * A transaction holds the lock (see node.h), and keeps the gates of its
 * nodes closed: all its changes lie between the same two writes, whatever
 * the number of nodes.  Actions take effect one after the other, each
 * sees what those before it did, and all are undone if one of them fails.
 *
 * What may be done to which bitmap: a busy one cannot be changed; one of a
 * read-only disk can only be enabled or disabled; an inconsistent one can
 * only be removed.  Any but an inconsistent one can be the source of a
 * merge.
 *
 * Persistent bitmaps are stored, with what has become of them, when the
 * transaction ends; that may fail, and then all is as it was before.
 *
 * Actions return -1 with error set; the transaction must then be ended
 * with dirty_transaction_abort.
 */

#ifndef DIRTY_TRANSACTION_H
#define DIRTY_TRANSACTION_H

#include "dirty/node.h"

struct dirty_transaction;

/* The outermost gates of all nodes first, then the next; each node once.
 * For transactions, and others who hold the lock.
 */
extern void dirty_gates_close (struct dirty_node **nodes, size_t n);
extern void dirty_gates_open (struct dirty_node **nodes, size_t n);

/* Begin with both locks held (see node.h), on these nodes; a node may be
 * named twice.  The actions must not touch any other.
 */
extern struct dirty_transaction *
dirty_transaction_begin (const GPtrArray *nodes);

/* End it, with the changes, or without; it also ends, without, if commit
 * returns -1 with error set.  The locks are still held.
 */
extern int dirty_transaction_commit (struct dirty_transaction *t,
                                     GError **error);
extern void dirty_transaction_abort (struct dirty_transaction *t);

/* End it with the changes if r, which the actions returned, is 0, else
 * without.  Returns what has come of it.
 */
extern int dirty_transaction_end (struct dirty_transaction *t, int r,
                                  GError **error);

/* What another action wants to be done at the end; either may be NULL. */
extern void dirty_transaction_push (struct dirty_transaction *t,
                                    void (*commit) (gpointer opaque),
                                    void (*undo) (gpointer opaque),
                                    gpointer opaque);

/* A new, empty bitmap.  granularity in bytes; 0 is the node's default. */
extern int dirty_bitmap_add (struct dirty_transaction *t,
                             struct dirty_node *node, const char *name,
                             uint64_t granularity, bool persistent,
                             bool recording, GError **error);

extern int dirty_bitmap_remove (struct dirty_transaction *t,
                                struct dirty_node *node, const char *name,
                                GError **error);

extern int dirty_bitmap_clear (struct dirty_transaction *t,
                               struct dirty_node *node, const char *name,
                               GError **error);

/* Let it record, or not. */
extern int dirty_bitmap_record (struct dirty_transaction *t,
                                struct dirty_node *node, const char *name,
                                bool recording, GError **error);

/* Add what another bitmap has, of a disk of the same size. */
extern int dirty_bitmap_merge (struct dirty_transaction *t,
                               struct dirty_node *node, const char *target,
                               struct dirty_node *source_node,
                               const char *source, GError **error);

/* Give it to another node of the same size, by another name perhaps. */
extern int dirty_bitmap_move (struct dirty_transaction *t,
                              struct dirty_node *node, const char *name,
                              struct dirty_node *target_node,
                              const char *target_name, GError **error);

#endif /* DIRTY_TRANSACTION_H */
