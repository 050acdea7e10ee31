/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What the files of the consistency check share.
 *
 *    check.c            the order of things, and the smaller structures
 *    check-mapping.c    L1 and L2 tables
 *    check-refcounts.c  refcounts: reading them, comparing them
 *
 * A check must end soon even if the image was made to prevent that.  Many
 * L1 entries may name one L2 table (those of snapshots do), so L1 tables
 * are read first, and then each L2 table once, for all who refer to it,
 * in the order in which they lie in the container.  Tables that overlap
 * could still be many more than would fit into the container, so there is
 * a budget for reading them.
 */

#ifndef QCOW2_CHECK_INTERNAL_H
#define QCOW2_CHECK_INTERNAL_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "qcow2/check.h"
#include "qcow2/tally.h"

/* Flags of a cluster in the tally. */
enum {
  CLUSTER_IS_ONE = 1,           /* its refcount is 1 */
  CLUSTER_UNKNOWN = 2,          /* its refcount cannot be read */
  CLUSTER_L2 = 4,               /* an L1 entry refers to it */
  CLUSTER_ACTIVE_L2 = 8,        /* one of the active L1 table does */
  CLUSTER_WALKED = 16,          /* this L2 table was dealt with */
};

struct check {
  const struct qcow2_image *image;
  const struct qcow2_io *io;
  const struct qcow2_check_observer *observer;
  struct qcow2_check_result *result;

  uint64_t size;                /* of the container, in bytes */
  uint64_t clusters;            /* in the container */
  uint64_t end;                 /* and referred to beyond its end */
  struct qcow2_tally *tally;
  uint8_t *buf;                 /* a cluster */
  uint8_t *refcount_table;
  uint64_t refcount_table_entries;

  uint64_t budget;              /* bytes of tables that may yet be read */
  unsigned reports;

  /* check-mapping.c */
  GArray *unaligned;            /* L2 tables that are not at a cluster */
  GHashTable *active_again;     /* L2 cluster -> further active entries */
  GHashTable *deferred;         /* L2 cluster -> references to add later */
  bool walking;
};

/* Count and report something wrong, found times times. */
extern void check_corrupt (struct check *c, uint64_t times,
                           const char *fs, ...) G_GNUC_PRINTF (3, 4);
extern void check_report (struct check *c, const char *fs, ...)
  G_GNUC_PRINTF (2, 3);

/* Read count bytes; what lies beyond the end reads as zeroes. */
extern int check_read (struct check *c, void *buf, size_t count,
                       uint64_t offset, GError **error);

/* Take count bytes from the budget.  If it is spent, that is reported as
 * a corruption; then the table called what must not be read.
 */
extern bool check_afford (struct check *c, const char *what, uint64_t count);

/* There are times references to the clusters in [offset, offset+length). */
extern void check_refer (struct check *c, const char *what, uint64_t offset,
                         uint64_t length, uint64_t times);

extern int check_progress (struct check *c, unsigned percent,
                           GError **error);

/* check-mapping.c: all L1 tables, and the L2 tables with all that they
 * refer to.
 */
extern int check_mapping (struct check *c, GError **error);

/* check-refcounts.c */

/* Read the refcount table; note which clusters have a refcount of 1. */
extern int check_refcounts_load (struct check *c, GError **error);

/* Is the refcount of the cluster at a host offset 1?  false also if that
 * cannot be told, which clears known.
 */
extern int check_refcount_is_one (struct check *c, uint64_t offset,
                                  bool *is_one, bool *known,
                                  GError **error);

/* Count the references of the refcount structures; these must come
 * after all others.
 */
extern void check_refcounts_refer (struct check *c);

/* Compare the tally with the refcounts. */
extern int check_refcounts_compare (struct check *c, GError **error);

#endif /* QCOW2_CHECK_INTERNAL_H */
