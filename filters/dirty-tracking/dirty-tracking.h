/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The dirty-tracking filter:
 *
 *    dirty-tracking.c  entry points; writes
 *    specs.c           bitmaps that the command line asks for
 *    view.c            exports that show a bitmap
 */

#ifndef DIRTY_TRACKING_H
#define DIRTY_TRACKING_H

#include <stdbool.h>
#include <stdint.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-filter.h>

#include "dirty/node.h"

struct config {
  unsigned granularity_bits;    /* of new bitmaps; 0: the node's default */
  char *node;                   /* what the one node is called, or NULL */
};
extern struct config config;

/* A connection to a disk, or to a view of one of its bitmaps. */
struct handle {
  char *base;                   /* the export below */
  char *view;                   /* name of a bitmap; NULL: the disk */
  char *description;            /* of a view */
  bool server_is_read_only;
  struct dirty_node *node;      /* NULL until prepared, and for snapshots */
  struct dirty_bitmap *bitmap;  /* of a view, which keeps it busy */
  struct dirty_bits *bits;      /* its content when the view was opened */
};

/* specs.c.  Errors were reported. */

extern int specs_parse (const char *value);
extern int specs_check (void);

/* Make the bitmaps that were asked for, if that has not been done yet.
 * The node is open.
 */
extern int specs_apply (struct dirty_node *node);

extern void specs_free (void);

/* view.c */
extern int view_extents (const struct handle *h, nbdkit_next *next,
                         uint32_t count, uint64_t offset, uint32_t flags,
                         struct nbdkit_extents *extents, int *err);

/* What the export of a bitmap is said to be. */
extern char *view_describe (const char *name);

/* Add to exports what is in below, and the views of their bitmaps. */
extern int view_list (const struct nbdkit_exports *below,
                      struct nbdkit_exports *exports);

#endif /* DIRTY_TRACKING_H */
