/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What a server has to remember of the bitmaps of its disks, and what may
 * be found of them after a crash.
 *
 * While a transaction goes on, and after one that has failed, the
 * container of a disk may have the bitmaps as the transaction left them,
 * or as they were, all of them.  A bitmap is never missing from all disks
 * because it was being moved from one to another.
 */

#ifndef MODEL_H
#define MODEL_H

#include <stdbool.h>

#include <glib.h>

#include "dirty/node.h"

#define MODEL_DISKS 2

struct model_bitmap {
  unsigned id;                  /* the same for life */
  char *name;
  bool persistent, recording, inconsistent;
  struct dirty_bits *exact;     /* what it holds in memory */
  struct dirty_bits *needed;    /* what it must hold after a crash */

  /* In memory it records, but in this state of the container it does not. */
  bool needs_more;
};

struct model {
  unsigned disks;
  bool intent;
  unsigned last_id;
  GPtrArray *now[MODEL_DISKS];  /* of struct model_bitmap */
  GPtrArray *others[MODEL_DISKS]; /* what else containers may have: lists */
  GHashTable *optional;         /* ids which need not be found */
  bool used[MODEL_DISKS];       /* bitmaps may be marked as in use */
  bool clean[MODEL_DISKS];      /* the container is as if never opened */
  GArray *moments;              /* of struct model_moment */
};

/* What may be found from an event on. */
struct model_moment {
  guint event;
  GPtrArray *states[MODEL_DISKS]; /* lists of bitmaps: one of them */
  GArray *ids;                  /* of bitmaps which must be on any disk */
  bool used[MODEL_DISKS], clean[MODEL_DISKS];
};

extern struct model *model_new (unsigned disks, bool intent);
extern void model_free (struct model *model);

extern struct model_bitmap *model_add (struct model *model, GPtrArray *list,
                                       const char *name, uint64_t size,
                                       unsigned granularity_bits);
extern struct model_bitmap *model_find (const GPtrArray *list,
                                        const char *name);
extern GPtrArray *model_copy (const GPtrArray *list);

/* Learn what bitmaps a disk has when it is opened. */
extern void model_learn (struct model *model, unsigned disk,
                         const struct dirty_node *node);

/* From this event on what has been said is so. */
extern void model_note (struct model *model, guint event);

/* A write marks what it will change; it is passed on, as seen by bitmaps
 * that record.
 */
extern void model_mark (struct model *model, unsigned disk, bool inactive,
                        uint64_t offset, uint64_t count);
extern void model_pass (struct model *model, unsigned disk, uint64_t offset,
                        uint64_t count);

/* A transaction lets bitmaps become these; those of disks that are touched
 * are stored.  It has succeeded, and takes over the lists; or failed, and
 * is being undone.
 */
extern void model_begin (struct model *model, GPtrArray *const *after,
                         const bool *touched);
extern void model_succeed (struct model *model, GPtrArray **after,
                           const bool *touched);

extern void model_fail (struct model *model, GPtrArray *const *after);

/* The container has what memory has. */
extern void model_settle (struct model *model, unsigned disk);

/* Compare with what is in memory.  Ends the program. */
extern void model_compare (const struct model *model, unsigned disk,
                           const struct dirty_node *node, bool inactive);

/* What was loaded after a crash must be one of those that may be.  Ends the
 * program.
 */
extern void model_judge (const struct model *model,
                         const struct model_moment *moment,
                         struct dirty_node *const *nodes);

#endif /* MODEL_H */
