/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* How what is dirty is shown in extents, in the only words that clients
 * without knowledge of bitmaps understand:
 *
 *    block                    by default         dirty-clean=zero
 *    clean                    HOLE               HOLE | ZERO
 *    dirty, with data         0                  0
 *    dirty, reads as zeroes   as below           0
 *
 * qemu-img convert -B takes a hole that is not zero for what it shall
 * leave to the backing file, nbdcopy --destination-is-zero skips zeroes.
 *
 * The setting is made before the server serves.
 */

#ifndef DIRTY_VIEW_H
#define DIRTY_VIEW_H

#include <stdbool.h>
#include <stdint.h>

/* The bits have the values that they have in NBD and in nbdkit. */
#define DIRTY_VIEW_HOLE UINT32_C (1)
#define DIRTY_VIEW_ZERO UINT32_C (2)

/* Is it dirty-clean=zero? */
extern bool dirty_view_clean_is_zero (void);
extern void dirty_view_set_clean_is_zero (bool zero);

/* What a clean block is. */
extern uint32_t dirty_view_clean_type (void);

/* What a dirty block is if it is type otherwise. */
extern uint32_t dirty_view_dirty_type (uint32_t type);

#endif /* DIRTY_VIEW_H */
