/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Counts of references.  GLib's have the same purpose, but the thread
 * sanitizer does not see what is inside of GLib.
 */

#ifndef CBW_REFS_H
#define CBW_REFS_H

#include <stdatomic.h>
#include <stdbool.h>

typedef atomic_uint refs;

static inline void
refs_init (refs *r, unsigned n)
{
  atomic_init (r, n);
}

static inline void
refs_inc (refs *r)
{
  atomic_fetch_add (r, 1);
}

/* Was that the last one? */
static inline bool
refs_dec (refs *r)
{
  return atomic_fetch_sub (r, 1) == 1;
}

#endif /* CBW_REFS_H */
