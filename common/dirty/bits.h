/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A set of granules of a disk: one bit for each.
 *
 * Offsets, counts and sizes are in bytes of the disk.  A granule is
 * 1 << granularity_bits bytes, the last one may be shorter.  Ranges that
 * are set are rounded out to granules, and end where the disk ends.
 *
 * Locking: all functions may run at the same time in any threads, without
 * locks, except those that say "exclusive": while one of them runs,
 * nothing else may use the set.  What a reading function says of granules
 * which are being changed meanwhile may be their state before or after.
 *
 * Memory: areas that are clean, or dirty as a whole, take none.  Where
 * there is no memory to be had the area around is set instead: a set
 * never lacks a granule, and marking never fails.
 */

#ifndef DIRTY_BITS_H
#define DIRTY_BITS_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#define DIRTY_MIN_GRANULARITY_BITS 9
#define DIRTY_MAX_GRANULARITY_BITS 31

/* A size in bytes as a power of two; -1 if it cannot be a granularity. */
static inline int
dirty_granularity_bits (uint64_t size)
{
  if (size < UINT64_C (1) << DIRTY_MIN_GRANULARITY_BITS ||
      size > UINT64_C (1) << DIRTY_MAX_GRANULARITY_BITS ||
      (size & (size - 1)) != 0)
    return -1;
  return __builtin_ctzll (size);
}

/* Pieces in which sets are exported, in bits. */
#define DIRTY_EXPORT_BITS 4096

struct dirty_bits;

/* An empty set; aborts if there is no memory for these few bytes. */
extern struct dirty_bits *dirty_bits_new (uint64_t size,
                                          unsigned granularity_bits);

/* Exclusive.  NULL is allowed. */
extern void dirty_bits_free (struct dirty_bits *bits);

/* A set with the same granules, those being set meanwhile perhaps not. */
extern struct dirty_bits *dirty_bits_copy (struct dirty_bits *bits);

extern uint64_t dirty_bits_size (const struct dirty_bits *bits);
extern unsigned dirty_bits_granularity_bits (const struct dirty_bits *bits);

/* In granules. */
extern uint64_t dirty_bits_length (const struct dirty_bits *bits);

/* Add all granules that the range touches.  Sequentially consistent: what
 * the caller does next is seen by nobody who does not see the bits.
 */
extern void dirty_bits_set (struct dirty_bits *bits, uint64_t offset,
                            uint64_t count);

/* Remove the granules that lie in the range whole; the disk's end counts
 * as the end of its last granule.
 */
extern void dirty_bits_clear (struct dirty_bits *bits, uint64_t offset,
                              uint64_t count);

/* Is the byte in a dirty granule?  If length is not NULL it is set to the
 * number of bytes from there on, to the end of the disk at most, of which
 * the same can be said.  offset is on the disk.
 */
extern bool dirty_bits_get (struct dirty_bits *bits, uint64_t offset,
                            uint64_t *length);

/* Is each byte of the range, which is on the disk, in a dirty granule?
 * Quicker than dirty_bits_get if what is dirty goes on behind it.
 */
extern bool dirty_bits_all (struct dirty_bits *bits, uint64_t offset,
                            uint64_t count);

/* The number of dirty granules. */
extern uint64_t dirty_bits_count (struct dirty_bits *bits);

/* Add to target what source has, of a disk of any size and at any
 * granularity.  The two may be the same.
 */
extern void dirty_bits_merge (struct dirty_bits *target,
                              struct dirty_bits *source);

/* Is all that part has, of the same disk at any granularity, in all? */
extern bool dirty_bits_includes (struct dirty_bits *all,
                                 struct dirty_bits *part);

/* Exclusive.  What the disk has gained is dirty or clean. */
extern void dirty_bits_resize (struct dirty_bits *bits, uint64_t size,
                               bool dirty);

/* Exclusive.  Give back the memory of what has become uniform. */
extern void dirty_bits_compact (struct dirty_bits *bits);

/* The bits of granules, from first on, in the order of qcow2's bitmaps:
 * granule N is bit N % 8 of byte N / 8, counted from the lowest.  first is
 * a multiple of DIRTY_EXPORT_BITS.  Behind the last granule are zeroes.
 */
extern void dirty_bits_export (struct dirty_bits *bits, uint64_t first,
                               void *buf, size_t bytes);

/* Add the granules whose bits are set, in the same order; first as above.
 * Bits behind the last granule are not looked at.
 */
extern void dirty_bits_import (struct dirty_bits *bits, uint64_t first,
                               const void *buf, size_t bytes);

/* The digest that QEMU's x-debug-block-dirty-bitmap-sha256 gives: of all
 * bits as little-endian words of 64 bits, at least one.
 */
extern char *dirty_bits_sha256 (struct dirty_bits *bits);

#endif /* DIRTY_BITS_H */
