/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Threads that do what a request must be able to walk away from.
 *
 * They are started when they are needed, up to a limit, and nobody ever
 * joins them: one that hangs is left alone.
 *
 * Locking: all functions may be called by any threads.
 */

#ifndef CBW_HELPERS_H
#define CBW_HELPERS_H

#include <glib.h>

struct helpers;

extern struct helpers *helpers_new (unsigned max_threads);

/* Let a thread call job.  If there is none, and none can be started, the
 * caller does it.
 */
extern void helpers_run (struct helpers *helpers,
                         void (*job) (gpointer opaque), gpointer opaque);

/* No more jobs will be given to them; those there are will be done. */
extern void helpers_free (struct helpers *helpers);

#endif /* CBW_HELPERS_H */
