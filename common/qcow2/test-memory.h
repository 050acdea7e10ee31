/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A container in memory, for unit tests. */

#ifndef QCOW2_TEST_MEMORY_H
#define QCOW2_TEST_MEMORY_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/io.h"

struct memory {
  struct qcow2_io io;
  uint8_t data[1 << 16];
  uint64_t size;
  unsigned reads;               /* counted by pread */
};

/* An empty version 3 image with 512-byte clusters: header in the first
 * cluster, an L1 table of 8 entries in the second, the refcount table in
 * the third.  A disk of 8 * 64 clusters.
 */
extern struct memory *memory_new (void);

extern void memory_put32 (struct memory *m, uint64_t offset, uint32_t value);
extern void memory_put64 (struct memory *m, uint64_t offset, uint64_t value);

#define MEMORY_CLUSTER 512
#define MEMORY_L1 512
#define MEMORY_DISK (8 * 64 * 512)

#endif /* QCOW2_TEST_MEMORY_H */
