/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The bitmap-persist filter:
 *
 *    bitmap-persist.c   entry points; writes
 *    sidecar.c          an image beside a disk, for its bitmaps
 *    sync.c             storing now and then, and at the end
 */

#ifndef BITMAP_PERSIST_H
#define BITMAP_PERSIST_H

#include <stdbool.h>
#include <stdint.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-filter.h>

#include "dirty/persist.h"

/* sidecar.c */

/* A sidecar with an absolute path.  disk is a local file which may be the
 * disk, or NULL; changes: other filters may give it another size.  Free it
 * with sidecar_free.
 */
extern struct dirty_container *sidecar_new (const char *path,
                                            const char *disk, bool changes);
extern void sidecar_free (struct dirty_container *container);

/* sync.c */

/* Begin to store bitmaps every so many seconds; 0: only when the server
 * ends, or the last writer leaves.
 */
extern int sync_start (struct dirty_persist *persist, unsigned seconds);

/* To be called by writers when they have left our gate, but perhaps not the
 * outer ones, for containers that are for requests only: store if it is time.
 */
extern void sync_sometimes (struct dirty_persist *persist);

/* Store, and say so if that fails. */
extern void sync_now (struct dirty_persist *persist, bool last);

/* After this nobody but the caller uses the persist. */
extern void sync_stop (void);

#endif /* BITMAP_PERSIST_H */
