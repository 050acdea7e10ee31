/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Dirty bitmaps in an image ("Bitmaps"): their content, and changes to the
 * directory.
 *
 * A crash at any time leaves an image without corruptions, at worst with
 * clusters that are leaked, and each bitmap as it was before or after, or
 * if it is marked as in use, with any mixture of its old and new content.
 *
 * Locking: one thread at a time, which is the only one that writes to the
 * container's metadata.  After any failure of a function that changes
 * something the object does not know what is in the container: it must be
 * closed, together with the image, and both opened again.
 */

#ifndef QCOW2_BITMAP_STORE_H
#define QCOW2_BITMAP_STORE_H

#include <stdbool.h>

#include "dirty/bits.h"
#include "qcow2/bitmap.h"
#include "qcow2/image.h"

struct qcow2_bitmap_store;

/* Read the directory.  The image must stay as long as the store.  Its
 * container is written to only by the functions that say so.  NULL with
 * error set.
 */
extern struct qcow2_bitmap_store *
qcow2_bitmap_store_open (struct qcow2_image *image,
                         const struct qcow2_io *io, GError **error);

/* NULL is allowed. */
extern void qcow2_bitmap_store_close (struct qcow2_bitmap_store *store);

/* The bitmaps, of struct qcow2_bitmap, in the order of the directory.
 * Valid until the directory is changed.
 */
extern const GPtrArray *
qcow2_bitmap_store_list (const struct qcow2_bitmap_store *store);

/* By name, or NULL. */
extern struct qcow2_bitmap *
qcow2_bitmap_store_find (const struct qcow2_bitmap_store *store,
                         const char *name);

/* A bitmap that is to be made. */
struct qcow2_bitmap_new {
  const char *name;
  uint32_t granularity_bits;
  uint32_t flags;               /* QCOW2_BITMAP_* */
  struct dirty_bits *content;   /* NULL: it is empty */
};

/* Flags that a bitmap is to have. */
struct qcow2_bitmap_new_flags {
  const char *name;
  uint32_t flags;
};

/* What is to become of the directory.  Each member may be NULL. */
struct qcow2_bitmap_changes {
  const GPtrArray *remove;      /* names; first */
  const GPtrArray *add;         /* struct qcow2_bitmap_new */
  const GArray *flags;          /* struct qcow2_bitmap_new_flags */
};

/* Change the directory, all at once: a crash leaves all as it was, or as it
 * shall be.  Flushed; so is all that was saved before.
 */
extern int
qcow2_bitmap_store_change (struct qcow2_bitmap_store *store,
                           const struct qcow2_io *io,
                           const struct qcow2_bitmap_changes *changes,
                           GError **error);

/* Set the flags of a bitmap.  Not flushed: what has to be safe before must
 * be flushed before, and what the flags allow must wait for a flush.
 */
extern int qcow2_bitmap_store_set_flags (struct qcow2_bitmap_store *store,
                                         const struct qcow2_io *io,
                                         struct qcow2_bitmap *bitmap,
                                         uint32_t flags, GError **error);

/* Add to bits, a set of the same granularity, what a bitmap holds. */
extern int qcow2_bitmap_store_load (struct qcow2_bitmap_store *store,
                                    const struct qcow2_io *io,
                                    struct qcow2_bitmap *bitmap,
                                    struct dirty_bits *bits, GError **error);

/* Does each cluster belong to one table, or is a part of one bitmap's
 * content?  If not the image is damaged, or was made to exhaust the memory
 * of who loads it: nothing should be loaded, let alone changed.
 */
extern int qcow2_bitmap_store_check (struct qcow2_bitmap_store *store,
                                     const struct qcow2_io *io,
                                     GError **error);

/* Is its table as long as the disk wants it?  One that is in use need not
 * be, if the disk was resized since.
 */
extern bool qcow2_bitmap_store_fits (const struct qcow2_bitmap_store *store,
                                     const struct qcow2_bitmap *bitmap);

/* Let a bitmap, which is marked as in use, hold what bits does.  stored is
 * what it holds already, as far as the caller knows, or NULL: only what
 * differs is written.  Flushed.
 */
extern int qcow2_bitmap_store_save (struct qcow2_bitmap_store *store,
                                    const struct qcow2_io *io,
                                    struct qcow2_bitmap *bitmap,
                                    struct dirty_bits *bits,
                                    struct dirty_bits *stored,
                                    GError **error);

#endif /* QCOW2_BITMAP_STORE_H */
