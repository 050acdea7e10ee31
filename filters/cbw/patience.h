/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Waiting for something that may never happen. */

#ifndef CBW_PATIENCE_H
#define CBW_PATIENCE_H

#include <glib.h>

/* With the lock held, wait on cond for a while, at most until limit, which
 * is a monotonic time, or 0 if there is none.  Returns 0; or ETIMEDOUT; or
 * ESHUTDOWN if waiting makes no sense any more because the client has gone
 * or the server shall end: nbdkit waits for the requests that are being
 * handled.  The caller looks itself whether what it waits for has happened.
 */
extern int patience_wait (GCond *cond, GMutex *lock, gint64 limit);

/* Does waiting make no sense any more? */
extern gboolean patience_is_over (void);

#endif /* CBW_PATIENCE_H */
