/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What the files of the bitmap store share.
 *
 *    bitmap-store.c     the directory, and clusters
 *    bitmap-content.c   tables and content
 */

#ifndef QCOW2_BITMAP_INTERNAL_H
#define QCOW2_BITMAP_INTERNAL_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "qcow2/allocator.h"
#include "qcow2/bitmap-store.h"

struct qcow2_bitmap_store {
  struct qcow2_image *image;
  struct qcow2_allocator *allocator; /* NULL until it is needed */
  struct qcow2_bitmaps place;   /* of the directory */
  GPtrArray *bitmaps;
  GHashTable *by_name;          /* the same */
  GArray *fresh;                /* struct run, to which nothing refers yet */
  bool cannot_free;             /* the allocator has failed */
};

/* Clusters that are needed for so many bytes. */
static inline uint64_t
clusters_for (const struct qcow2_bitmap_store *store, uint64_t bytes)
{
  return (bytes >> store->image->header->cluster_bits) +
    ((bytes & (store->image->cluster_size - 1)) != 0);
}

static inline uint64_t
table_bytes (const struct qcow2_bitmap *bitmap)
{
  return (uint64_t) bitmap->table_entries * 8;
}

static inline uint64_t
table_clusters (const struct qcow2_bitmap_store *store,
                const struct qcow2_bitmap *bitmap)
{
  return clusters_for (store, table_bytes (bitmap));
}

/* bitmap-store.c */

/* Clusters behind each other, to which nothing refers yet. */
extern int qcow2_bitmap_allocate (struct qcow2_bitmap_store *store,
                                  const struct qcow2_io *io,
                                  uint64_t clusters, uint64_t *offset,
                                  GError **error);

/* Something refers to all that were allocated. */
extern void qcow2_bitmap_keep_fresh (struct qcow2_bitmap_store *store);

/* Nothing ever will.  Returns -1. */
extern int qcow2_bitmap_give_back_fresh (struct qcow2_bitmap_store *store,
                                         const struct qcow2_io *io);

/* Nothing refers to these any more. */
extern int qcow2_bitmap_release (struct qcow2_bitmap_store *store,
                                 const struct qcow2_io *io, uint64_t offset,
                                 uint64_t clusters, GError **error);

/* bitmap-content.c */

/* EINVAL: there are entries that are not allowed. */
extern int qcow2_bitmap_load_table (struct qcow2_bitmap_store *store,
                                    const struct qcow2_io *io,
                                    struct qcow2_bitmap *bitmap,
                                    GError **error);

/* Write content to new clusters; their offsets go to the table, which is
 * all zeroes, as the format has them.
 */
extern int qcow2_bitmap_write_content (struct qcow2_bitmap_store *store,
                                       const struct qcow2_io *io,
                                       struct dirty_bits *content,
                                       uint64_t *table, uint64_t entries,
                                       GError **error);

#endif /* QCOW2_BITMAP_INTERNAL_H */
