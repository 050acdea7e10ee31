/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Where a snapshot keeps the old data: a file, a block device or an NBD
 * server.  What lies where is known to the snapshot; a target is read
 * only where it was written.
 *
 *    target.c        what they have in common; which one is it?
 *    target-file.c   files and block devices
 *    target-nbd.c    NBD servers, through libnbd
 *
 * Locking: all functions may be called by any threads.
 */

#ifndef CBW_TARGET_H
#define CBW_TARGET_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include "refs.h"

struct target;

/* error is an errno value, or 0. */
typedef void (*target_done) (gpointer opaque, int error);

struct target_ops {
  void (*write) (struct target *target, const void *buf, uint32_t count,
                 uint64_t offset, bool direct, target_done done,
                 gpointer opaque);
  int (*read) (struct target *target, void *buf, uint32_t count,
               uint64_t offset);
  void (*discard) (struct target *target, uint64_t offset, uint64_t count);
  void (*purge) (struct target *target);
  void (*cancel) (struct target *target);
  void (*free) (struct target *target);
};

struct target {
  const struct target_ops *ops;
  refs refs;
  char *name;                   /* for messages and queries */
  uint64_t size;                /* in bytes, at least the disk's */
  uint64_t used;                /* the disk's */
  uint32_t minimum;             /* writes and reads are multiples of this */
  uint32_t preferred;           /* a power of two */
};

/* Names are taken from this directory, in which we were started; it stays. */
extern void target_set_directory (const char *directory);

/* Complete a name: that of a file becomes absolute. */
extern char *target_complete_name (const char *name);

/* This file, or those in this directory, are served, or are a part of what
 * is: they are no targets.
 */
extern void target_forbid_file (const char *path);
extern void target_forbid_directory (const char *path);
extern void target_allow_all (void);

/* Open what name says for a disk of this size; NULL: an unlinked file in
 * $TMPDIR.  This may take long.  Free it with target_unref.
 */
extern struct target *target_open (const char *name, uint64_t size,
                                   GError **error);

/* Does the name look like a URI? */
extern bool target_is_uri (const char *name);

extern struct target *target_ref (struct target *target);
extern void target_unref (struct target *target);

/* Write, and call done when that is over, from any thread, with no lock
 * held, and perhaps before this returns.  direct: the caller may do it, as
 * it would wait anyway.  buf must stay until then.
 */
extern void target_write (struct target *target, const void *buf,
                          uint32_t count, uint64_t offset, bool direct,
                          target_done done, gpointer opaque);

/* Returns 0 or an errno value. */
extern int target_read (struct target *target, void *buf, uint32_t count,
                        uint64_t offset);

/* Free the space of a range, if that is possible. */
extern void target_discard (struct target *target, uint64_t offset,
                            uint64_t count);

/* The same later, in another thread. */
extern void target_discard_later (struct target *target, uint64_t offset,
                                  uint64_t count);

/* The target is no longer wanted: free its space and forget the caller's
 * reference, in another thread.  hangs: don't ask it for anything; what it
 * was asked for fails, if that can be helped.  done, unless NULL, is called
 * at the end.
 */
extern void target_retire (struct target *target, bool hangs,
                           target_done done, gpointer opaque);

/* The same for one that was never written to: it is left as it was. */
extern void target_drop (struct target *target);

/* Wait, but not for ever, until that has happened for all of them. */
extern void target_wait_for_retired (void);

/* target-file.c, target-nbd.c; of these three each returns NULL with error
 * set.
 */
extern struct target *target_open_temporary (uint64_t size, GError **error);
extern struct target *target_open_file (const char *path, uint64_t size,
                                        GError **error);
extern struct target *target_open_nbd (const char *uri, uint64_t size,
                                       GError **error);

/* Is this what could be opened by target_open_file?  To be called early. */
extern int target_check_file (const char *path, GError **error);

/* No target can be larger than this for the disk, else -1. */
extern int target_check_size (const struct target *target, uint64_t size,
                              GError **error);

#endif /* CBW_TARGET_H */
