/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A bounded cache of blocks of one size, each loaded once.
 *
 * It holds slices of L1 and L2 tables, and decompressed clusters.
 * Readers of cached blocks do not wait for each other or for loads of
 * other blocks; of several threads that miss the same block, one loads
 * it and the others wait for that load.
 */

#ifndef QCOW2_CACHE_H
#define QCOW2_CACHE_H

#include <stddef.h>
#include <stdint.h>

#include <glib.h>

struct qcow2_cache;

/* A block in use.  data stays valid and unchanged until
 * qcow2_cache_put.
 */
struct qcow2_cache_ref {
  const void *data;
  struct qcow2_cache_entry *entry; /* NULL: data is private to this ref */
};

/* Fill data, the block_size bytes of block key.  Returns 0, or -1 with
 * error set; then nothing is cached.
 */
typedef int (*qcow2_cache_load) (void *opaque, uint64_t key, void *data,
                                 GError **error);

/* A cache of at most max_bytes / block_size blocks, and a million.  Their
 * memory is taken when they are first used.  A cache of no blocks is
 * allowed.
 */
extern struct qcow2_cache *qcow2_cache_new (size_t block_size,
                                            size_t max_bytes);

/* No block may be in use. */
extern void qcow2_cache_free (struct qcow2_cache *cache);

/* Get block key (any value but UINT64_MAX), loading it if it is not
 * there.  If every block that could make room is in use, ref gets a
 * private copy.  Returns 0, or -1 with error set and no ref.
 */
extern int qcow2_cache_get (struct qcow2_cache *cache, uint64_t key,
                            qcow2_cache_load load, void *opaque,
                            struct qcow2_cache_ref *ref, GError **error);

/* Get block key if it is there, without waiting. */
extern gboolean qcow2_cache_peek (struct qcow2_cache *cache, uint64_t key,
                                  struct qcow2_cache_ref *ref);

extern void qcow2_cache_put (struct qcow2_cache_ref *ref);

#endif /* QCOW2_CACHE_H */
