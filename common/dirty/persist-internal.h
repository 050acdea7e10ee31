/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What the files of persist.h share.
 *
 *    persist.c          loading, storing, giving the container away
 *    persist-state.c    what the container shall have, and how it gets it
 *    persist-write.c    writes, and their intent
 */

#ifndef DIRTY_PERSIST_INTERNAL_H
#define DIRTY_PERSIST_INTERNAL_H

#include <stdatomic.h>

#include "dirty/intent.h"
#include "dirty/persist.h"
#include "qcow2/bitmap-store.h"

struct dirty_persist {
  struct dirty_node *node;
  struct dirty_container *container;
  struct dirty_persist_options options;

  /* These change under dirty_lock and with closed gates. */
  bool active;
  bool loaded;                  /* the node has our bitmaps */

  atomic_uint writers;          /* connections that have written */

  /* The container is ready for writes: whatever they make stale is marked
   * as in use.  Set by a write, under lock; cleared with the gate closed.
   */
  atomic_bool armed;
  struct dirty_intent *intent;  /* NULL if there is none; set before armed */

  GMutex lock;                  /* for the rest */
  const struct qcow2_io *io;    /* NULL: the container is closed */
  struct qcow2_image *image;    /* both NULL: to be read again */
  struct qcow2_bitmap_store *store;
  bool diverged;                /* the container may differ from the node */
  bool flushed;                 /* what was read is stable */
  bool warned;                  /* of what cannot be helped */
  struct dirty_bits *intent_stored; /* its content there; NULL: not known */
};

/* All of these want our lock to be held. */

/* Read the container, if that is to be done (again).  For writing, let it
 * also be what the node says, if it may not be.
 */
extern int persist_read (struct dirty_persist *p, GError **error);
extern int persist_read_to_write (struct dirty_persist *p, GError **error);

/* What is known of the container's content is not to be relied upon. */
extern void persist_drop (struct dirty_persist *p);

/* The content of a bitmap.  NULL with error set. */
extern struct dirty_bits *persist_get_bits (struct dirty_persist *p,
                                            struct qcow2_bitmap *bitmap,
                                            GError **error);

/* Is it one that the node has too, and not only the container? */
extern bool persist_is_ours (const struct qcow2_bitmap *bitmap);

/* Let intent_stored be what the container has, NULL if that is not an
 * intent that can be relied upon.
 */
extern int persist_find_intent (struct dirty_persist *p, GError **error);

/* Save a copy of what a bitmap holds, which is marked as in use in the
 * container.  The copy, which nobody changes any more, is taken over.
 */
extern int persist_save (struct dirty_persist *p, struct dirty_bitmap *bitmap,
                         struct dirty_bits *copy, GError **error);

enum persist_purpose {
  PERSIST_COMMIT,               /* what has changed, all or nothing */
  PERSIST_RECONCILE,            /* the same; look for it everywhere */
  PERSIST_ARM,                  /* let all be ready for writes */
  PERSIST_CLEAN,                /* nobody uses it */
};

/* Let the container have what the node has.  With only_add it keeps
 * bitmaps that the node does not have.
 */
extern int persist_write_state (struct dirty_persist *p,
                                enum persist_purpose purpose, bool only_add,
                                GError **error);

/* Make the intent that writes use, of what intent_stored is. */
extern void persist_begin_intent (struct dirty_persist *p);

/* With the gate closed: the next write has to get all ready again. */
extern void persist_disarm (struct dirty_persist *p);

/* The name of the container before a message. */
extern int persist_fail (const struct dirty_persist *p, GError **error);

#endif /* DIRTY_PERSIST_INTERNAL_H */
