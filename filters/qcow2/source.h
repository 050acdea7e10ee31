/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A source is something that holds bytes: the layer below, a local file,
 * an NBD server.  It is a qcow2_io, and tells more where it can.
 *
 *    layer.c    the nbdkit layer below, one context of it
 *    file.c     a local file
 *    nbd.c      an NBD server, through libnbd
 *    limits.c   what the first and the last have in common
 *
 * All functions may be called from many threads.
 */

#ifndef SOURCE_H
#define SOURCE_H

#include <stdint.h>

#include <glib.h>

#include <nbdkit-filter.h>

#include "qcow2/io.h"

/* Called with consecutive ranges; type is NBDKIT_EXTENT_*.  Returns 0,
 * 1 if no more are wanted, or -1 with error set.
 */
typedef int (*source_add_extent) (void *opaque, uint64_t offset,
                                  uint64_t length, uint32_t type,
                                  GError **error);

struct source {
  struct qcow2_io io;           /* pass this to the qcow2 module */
  char *name;                   /* for messages */

  /* Describe [offset, offset+count), which lies inside the source.
   * Returns what the last call of add did.  NULL: everything is data.
   */
  int (*extents) (struct source *source, uint64_t offset, uint64_t count,
                  source_add_extent add, void *opaque, GError **error);

  /* Read ahead.  NULL: it cannot. */
  int (*prefetch) (struct source *source, uint64_t offset, uint64_t count,
                   GError **error);

  /* Space taken on disk, in bytes, or -1 if not known.  NULL likewise. */
  int64_t (*allocated) (struct source *source);

  /* Free it. */
  void (*close) (struct source *source);
};

static inline struct source *
source_of_io (const struct qcow2_io *io)
{
  return (struct source *) ((char *) io - G_STRUCT_OFFSET (struct source, io));
}

static inline uint64_t
source_size (const struct source *source)
{
  return source->io.get_size (&source->io);
}

/* NULL is allowed. */
static inline void
source_close (struct source *source)
{
  if (source)
    source->close (source);
}

/* What a source that speaks NBD can be asked for. */
struct limits {
  uint64_t size;
  uint32_t minimum;             /* all requests are multiples of this */
  uint32_t maximum;             /* and none is larger than this */
};

/* Set them from the block sizes in an NBD server's answer, which are 0
 * if it has no wishes.
 */
extern void limits_init (struct limits *limits, uint64_t size,
                         uint32_t minimum, uint32_t maximum);

/* Move both ends of a range outwards to multiples of the minimum. */
extern void limits_align (const struct limits *limits, uint64_t *start,
                          uint64_t *end);

/* Read [offset, offset+count), which must lie inside the source, with
 * calls of read_fn that keep to the limits.
 */
typedef int (*limits_read) (struct source *source, void *buf, uint32_t count,
                            uint64_t offset, GError **error);
extern int limits_pread (const struct limits *limits, limits_read read_fn,
                         struct source *source, void *buf, size_t count,
                         uint64_t offset, GError **error);

/* layer.c: one nbdkit context of the layer below. */

struct layer {
  struct source source;
  nbdkit_next *next;
  struct limits limits;
  GMutex *lock;                 /* taken for requests, or NULL */
};

/* next, which is BASE base below us, must have been prepared.  Such a
 * layer is never closed: it ends with the connection, and base must live
 * as long.  Errors were reported by nbdkit.
 */
extern int layer_init (struct layer *layer, nbdkit_next *next,
                       const char *base);

/* Open another export of the layer below, read-only; to be called on a
 * connection's thread.
 */
extern struct source *layer_open_export (nbdkit_backend *backend,
                                         const char *exportname,
                                         GError **error);

/* file.c */

/* Takes over fd, which is a regular file or a block device, else that is
 * an error; it is closed with the source, and on error.
 */
extern struct source *file_open_fd (int fd, const char *name,
                                    GError **error);
extern struct source *file_open (const char *path, GError **error);

/* Open a name from an image, which must not lead out of the directory
 * dir: not by "..", nor by being absolute, nor through symbolic links.
 */
extern struct source *file_open_beneath (const char *dir, const char *path,
                                         GError **error);

/* nbd.c: uri is one that libnbd knows. */
extern struct source *nbd_open (const char *uri, GError **error);

#endif /* SOURCE_H */
