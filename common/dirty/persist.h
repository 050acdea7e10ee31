/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Keeping a node's persistent bitmaps in a qcow2 container, so that they
 * survive the end of the server, in order or not.
 *
 * Locking: in this order, and no other
 *
 *    dirty_changes_lock   by who changes bitmaps, or stores them
 *    dirty_lock           see node.h
 *    gates                see gate.h; writes are inside
 *    ours                 for one who reads or writes the container
 *
 * Errors are of the domains DIRTY_ERROR and QCOW2_ERROR, their codes errno
 * values; they name the container.
 */

#ifndef DIRTY_PERSIST_H
#define DIRTY_PERSIST_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "dirty/node.h"
#include "qcow2/image.h"

/* The bitmap that says where writes have been since bitmaps were stored. */
#define DIRTY_INTENT_NAME "nbdkit-write-intent"

/* What bitmaps are kept in. */
struct dirty_container {
  const char *name;             /* for messages */
  bool is_image;                /* of the disk itself */
  bool requests_only;           /* no thread of ours may use it */

  /* Open it for a disk of that size, so that no other program uses it at
   * the same time.  The result is valid until close; NULL with error set.
   * It may turn out to be read-only.
   */
  const struct qcow2_io *(*open) (struct dirty_container *container,
                                  uint64_t size, bool writable,
                                  GError **error);
  void (*close) (struct dirty_container *container);

  /* Before it is closed to be given to another program: an error if it is
   * being used in other ways, which it cannot be until it is taken back,
   * when it was opened again.  Both may be NULL.
   */
  int (*release) (struct dirty_container *container, GError **error);
  void (*take_back) (struct dirty_container *container);

  /* Before the server starts: what can be seen already to be wrong.  -1
   * with error set.
   */
  int (*check) (struct dirty_container *container, bool writable,
                GError **error);
};

struct dirty_persist_options {
  bool writable;                /* the container may be changed */
  bool intent;                  /* keep one */
  unsigned intent_granularity_bits; /* 0: by the size of the disk */

  /* Something that the user should know. */
  void (*report) (const char *message);
};

/* Keep the bitmaps of node in container, which stays the caller's.  Never
 * again for the same node.
 */
extern struct dirty_persist *
dirty_persist_new (struct dirty_node *node,
                   struct dirty_container *container,
                   const struct dirty_persist_options *options);

/* Look if an image can keep bitmaps, and those that it has make sense as
 * far as their directory and their tables go.  Close the image; NULL with
 * error set.
 */
extern struct qcow2_image *dirty_persist_probe (const struct qcow2_io *io,
                                                GError **error);

/* The calling thread is one of ours, and not one on which nbdkit has called
 * us: it cannot use containers that are for requests only.
 */
extern void dirty_persist_outside (void);

/* When nobody uses the node any more: the container is closed as it is. */
extern void dirty_persist_free (struct dirty_persist *persist);

/* Takes locks.  The disk was opened, and has that size: the first time its
 * bitmaps are loaded.
 */
extern int dirty_persist_load (struct dirty_persist *persist, uint64_t size,
                               GError **error);

/* A connection writes for the first time, which must be inside the gate
 * DIRTY_GATE_PERSIST; and it has ended.
 */
extern void dirty_persist_add_writer (struct dirty_persist *persist);
extern void dirty_persist_remove_writer (struct dirty_persist *persist);

/* Inside the gate DIRTY_GATE_PERSIST: a write has been marked in the
 * bitmaps, and may be passed on if this returns 0.
 */
extern int dirty_persist_begin_write (struct dirty_persist *persist,
                                      uint64_t offset, uint64_t count,
                                      GError **error);

/* Takes locks.  Store what has changed.  If there are no writers, or if it
 * is for the last time, the container becomes as if nobody had it open.
 * A thread that cannot use the container does nothing.
 */
extern int dirty_persist_store (struct dirty_persist *persist, bool last,
                                GError **error);

/* For a writer that is still inside the outer gates, where it must not wait
 * for anybody: store what has changed, if nobody else is doing things to
 * bitmaps.
 */
extern int dirty_persist_try_store (struct dirty_persist *persist,
                                    GError **error);

/* Takes locks.  Give the container to another program, or take it back. */
extern int dirty_persist_set_active (struct dirty_persist *persist,
                                     bool active, GError **error);

/* For transactions, which hold both locks, with closed gates. */

/* May the container be changed? */
extern bool dirty_persist_is_writable (const struct dirty_persist *persist);

/* Can persistent bitmaps be changed now?  Before any is changed: the
 * container becomes what they are, if it may not be.
 */
extern int dirty_persist_check (struct dirty_persist *persist,
                                GError **error);

/* Has the container a bitmap of this name, though the node may not have it
 * any more?  After dirty_persist_check.
 */
extern bool dirty_persist_has (struct dirty_persist *persist,
                               const char *name);

/* Let the container have the persistent bitmaps of the node as they are
 * now.  With only_add it only gets those of which it has none of the name.
 */
extern int dirty_persist_commit (struct dirty_persist *persist,
                                 bool only_add, GError **error);

/* The node's bitmaps are again as they were before. */
extern void dirty_persist_revert (struct dirty_persist *persist);

#endif /* DIRTY_PERSIST_H */
