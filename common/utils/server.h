/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#ifndef QF_SERVER_H
#define QF_SERVER_H

#include <glib.h>

/* Was nbdkit told to let clients only read (-r)?  Filters learn it when a
 * client connects, which for some decisions is too late; so this looks at
 * the command line of the process.  If that cannot be read the answer is
 * no.
 */
extern gboolean qf_server_is_read_only (void);

/* A file that cannot grow because of a limit (ulimit -f) is an error, not
 * the end of the process, unless somebody wants its signal.  To be called
 * in .after_fork, where commands of --run have been started.
 */
extern void qf_server_allow_limits (void);

#endif /* QF_SERVER_H */
