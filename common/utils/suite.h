/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The filters of the suite that are in this nbdkit, and their order. */

#ifndef QF_SUITE_H
#define QF_SUITE_H

#include <glib.h>

/* In the order in which a write passes them. */
enum qf_filter {
  QF_CBW,
  QF_DIRTY_TRACKING,
  QF_BITMAP_PERSIST,
  QF_QCOW2,
};

/* Called by each filter in .load, which nbdkit runs for all of them before
 * it does anything else.
 */
extern void qf_suite_load (enum qf_filter filter);

/* Does it stand anywhere in the chain? */
extern gboolean qf_suite_is_loaded (enum qf_filter filter);

/* Called by each filter in .get_ready, which nbdkit runs from the
 * innermost filter to the outermost.  Returns -1, with a message for the
 * user in error, if the filters stand in an order that makes no sense.
 */
extern int qf_suite_add (enum qf_filter filter, GError **error);

/* Does it stand below those that are added later? */
extern gboolean qf_suite_has (enum qf_filter filter);

#endif /* QF_SUITE_H */
