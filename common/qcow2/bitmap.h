/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Dirty bitmaps ("Bitmaps"): the bitmap directory. */

#ifndef QCOW2_BITMAP_H
#define QCOW2_BITMAP_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/header.h"
#include "qcow2/io.h"

/* The bitmaps extension of the header. */
struct qcow2_bitmaps {
  uint32_t nr;                  /* 0: there is no (valid) extension */
  uint64_t directory_offset;
  uint64_t directory_size;      /* in bytes */
};

/* An entry of the directory. */
struct qcow2_bitmap {
  char *name;                   /* any bytes but NUL */
  uint64_t entry;               /* offset of its entry in the directory */
  uint64_t table_offset;
  uint32_t table_entries;       /* each stands for one cluster of bits */
  uint32_t flags;               /* QCOW2_BITMAP_* */
  uint32_t granularity_bits;    /* a bit stands for 1 << that many bytes */
  uint64_t *table;              /* in host order; NULL if not loaded */
};

extern void qcow2_bitmap_free (gpointer bitmap);

/* The number of entries in the table of a bitmap of the whole disk. */
extern uint64_t qcow2_bitmap_entries (const struct qcow2_header *header,
                                      uint32_t granularity_bits);

/* The extension, if the autoclear bit says that it is valid.  Fails if
 * its fields cannot be right.
 */
extern int qcow2_bitmaps_find (const struct qcow2_header *header,
                               struct qcow2_bitmaps *bitmaps,
                               GError **error);

/* Read the directory.  Bitmaps that QEMU would refuse the image for are
 * an error.  Their tables are not looked at.
 *
 * Returns an array of struct qcow2_bitmap, or NULL with error set.  Free
 * with g_ptr_array_unref.
 */
extern GPtrArray *qcow2_bitmaps_load (const struct qcow2_header *header,
                                      const struct qcow2_bitmaps *bitmaps,
                                      const struct qcow2_io *io,
                                      GError **error);

#endif /* QCOW2_BITMAP_H */
