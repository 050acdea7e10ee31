/* SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-qcow2-filters authors
 *
 * Preloaded into an nbdkit that runs with a sanitizer, behind the
 * sanitizer's runtime.  The linker flag -z initfirst makes the
 * constructor below the first of the process.
 *
 * - It makes the runtime start.  That happens with the first allocation,
 *   which otherwise is one that libc makes while it holds the lock of the
 *   locales (p11-kit has a constructor that calls newlocale).  The
 *   runtime's start takes and releases the same lock, which breaks it,
 *   and much later nbdkit hangs in exit.
 *
 * - It removes LD_PRELOAD from the environment, so that the programs
 *   which nbdkit --run starts run without the sanitizer.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

static void *volatile first;

/* glibc gives the arguments of main to constructors.  Its own environ is
 * set only after this one.
 */
static void __attribute__ ((constructor))
start_sanitizer (int argc, char **argv, char **envp)
{
  static const char name[] = "LD_PRELOAD=";
  char **p;

  first = malloc (1);
  free (first);

  for (p = envp; *p; ++p) {
    while (*p && strncmp (*p, name, sizeof name - 1) == 0)
      memmove (p, p + 1, sizeof *p);
  }
}
