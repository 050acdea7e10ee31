/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The QMP server: one Unix domain socket, one thread, several clients.
 *
 * Locking: its functions are called by one thread.
 */

#ifndef CONTROL_SERVER_H
#define CONTROL_SERVER_H

#include <glib.h>

/* Listen on a socket with this absolute name, which only its owner may
 * use.  A socket on which nobody answers any more is replaced, anything
 * else that has the name is an error.  Again: nothing happens.
 */
extern int control_server_listen (const char *path, GError **error);

/* Start the thread; -1 with error set.  Again: nothing happens. */
extern int control_server_start (GError **error);

/* Wait for the command that is running, close all connections, and remove
 * the socket.
 */
extern void control_server_stop (void);

#endif /* CONTROL_SERVER_H */
