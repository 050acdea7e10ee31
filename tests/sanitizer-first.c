/* SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-qcow2-filters authors
 *
 * Loaded into an nbdkit that runs with a sanitizer, to make the
 * sanitizer's runtime start before anything else.
 *
 * It starts with the first allocation.  Left to itself that may be one
 * which libc makes while it holds the lock of the locales (p11-kit has a
 * constructor that calls newlocale).  The runtime's start takes and
 * releases the same lock, which breaks it, and much later nbdkit hangs
 * in exit.  The linker flag -z initfirst makes the constructor below the
 * first of all.
 */

#include <config.h>

#include <stdlib.h>

static void *volatile first;

static void __attribute__ ((constructor))
start_sanitizer (void)
{
  first = malloc (1);
  free (first);
}
