/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What the files of the qcow2 filter share.
 *
 *    qcow2.c      parameters and callbacks
 *    start.c      the check of a local image before the server starts
 *    disk.c       the images that are open, one chain for each disk below
 *    chain.c      an image and its backing files
 *    check.c      qcow2-check=full
 *    container.c  bitmaps that are kept in the image
 *    announce.c   what others can learn about an image
 *    keys.c       the keys of encrypted images
 *    reference.c  names of other files in an image, and who permits them
 *    names.c      export names
 *    read.c       reading and prefetching data
 *    extents.c    block status
 *    layer.c, file.c, nbd.c: see source.h
 */

#ifndef QCOW2_FILTER_H
#define QCOW2_FILTER_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include <nbdkit-filter.h>

#include "../local-file.h"
#include "chain.h"
#include "reference.h"
#include "source.h"

/* Parameters, constant from .get_ready on. */
struct config {
  char *snapshot;               /* serve this one as BASE, or NULL */
  uint64_t cache_size;
  struct policy backing, data_file;
  char *backing_format;         /* if neither the image nor backing tells */
  GPtrArray *passphrases;       /* wiped when freed */
  bool check;                   /* before a disk is first served */
  struct local_file file;       /* which may be the container */
  int thread_model;
};
extern struct config config;

/* disk.c */

/* A container below us.  One chain of images serves all connections that
 * use it at the same time.  When the last of them goes it is closed, and
 * opened afresh for the next, which so sees what others did to it.
 */
struct disk;

/* Use the image in layer, which is BASE base below us.  On failure
 * returns NULL with error set.
 */
extern struct disk *disk_open (const char *base, struct layer *layer,
                               nbdkit_backend *backend, GError **error);
extern void disk_close (struct disk *disk);

/* The image itself.  Valid until disk_close. */
extern struct node *disk_top (const struct disk *disk);

/* The snapshots of a disk when it was last opened, or NULL.  Unref the
 * result.
 */
extern GPtrArray *disk_last_snapshots (const char *base);

/* Forget all disks. */
extern void disk_forget_all (void);

/* Another program may change the image: nobody can use the disk until it
 * is taken back.  An error if somebody does.
 */
extern int disk_give_away (const char *base, GError **error);
extern void disk_take_back (const char *base);

/* container.c */

/* Let bitmaps be kept in the image, if the bitmap-persist filter wants it.
 * In .get_ready.
 */
extern void container_offer (void);

/* In .after_fork, and .cleanup. */
extern void container_start (nbdkit_backend *backend);
extern void container_stop (void);

/* Is anything written to the image's metadata? */
extern bool container_is_written (void);

/* announce.c.  base is an export below. */
extern void announce_image (const char *base,
                            const struct qcow2_header *header,
                            const struct source *container);

/* check.c: check all images of the chain; those that are damaged are
 * refused.  source is what top is read from.
 */
extern int check_chain (const struct node *top, struct source *source,
                        GError **error);

/* start.c: check a local image as far as that is possible before the
 * server starts.  On failure the reason was reported.
 */
extern int start_check (void);

/* names.c */
extern void name_split (const char *exportname, char **base,
                        char **snapshot);
extern char *name_describe (const struct qcow2_snapshot *snapshot);

/* Add the snapshots of all exports in below to exports. */
extern int name_list (const struct nbdkit_exports *below,
                      struct nbdkit_exports *exports);

/* A connection. */
struct handle {
  char *base, *snapshot;        /* parts of the export name; the 2nd or NULL */
  char *description;            /* of a snapshot */
  nbdkit_backend *backend;
  struct layer layer;
  struct disk *disk;
  struct qcow2_view view;
};

/* read.c.  Errors are in error, and not yet reported. */
extern int read_range (struct handle *h, void *buf, uint32_t count,
                       uint64_t offset, GError **error);
extern int prefetch_range (struct handle *h, uint32_t count, uint64_t offset,
                           GError **error);

/* extents.c, likewise. */
extern int extents_range (struct handle *h, uint32_t count, uint64_t offset,
                          bool only_one, struct nbdkit_extents *extents,
                          GError **error);

/* qcow2.c: -D qcow2.verbose=1 */
extern int qcow2_debug_verbose;

#endif /* QCOW2_FILTER_H */
