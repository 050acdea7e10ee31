/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* qmp=SOCKET, which each filter of the suite takes: the QMP server in the
 * life of nbdkit.  Each filter calls all of these functions at their time;
 * the server, of which there is one, listens from the first .get_ready on
 * and answers when the last filter is ready.
 */

#ifndef CONTROL_CONTROL_H
#define CONTROL_CONTROL_H

#include <glib.h>

#define CONTROL_CONFIG_HELP                                             \
  "qmp=SOCKET                  Answer QMP commands on this Unix socket."

/* Returns 1 if it is our parameter, 0 if not, -1 with error set if it is
 * and is wrong.
 */
extern int control_config (const char *key, const char *value,
                           GError **error);

/* .get_ready: after the filter has registered its own commands. */
extern int control_get_ready (GError **error);

/* .after_fork: on failure there is no server. */
extern int control_after_fork (GError **error);

/* .cleanup: no command runs, or will run, when the first call returns. */
extern void control_cleanup (void);

#endif /* CONTROL_CONTROL_H */
