/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The protocol of QEMU's monitor, without the transport: commands, and the
 * conversation with one client.
 *
 * Locking: commands are registered before the server starts; after that
 * everything here is used by the server's thread only.  Commands run one
 * at a time, and other clients wait for them.
 */

#ifndef CONTROL_QMP_H
#define CONTROL_QMP_H

#include <stdbool.h>

#include <json-glib/json-glib.h>

/* Limits for what clients send. */
#define CONTROL_MAX_MESSAGE (1 << 20) /* bytes */
#define CONTROL_MAX_DEPTH 64          /* of objects and arrays in others */

/* Returns what the command returns, which the caller frees, or NULL for an
 * empty object.  On failure error is set and the result does not matter.
 */
typedef JsonNode *(*control_command) (JsonObject *args, gpointer opaque,
                                      GError **error);

/* The later of two registrations of a name counts.  name must stay. */
extern void control_register_command (const char *name,
                                      control_command command,
                                      gpointer opaque);

/* Forget all commands. */
extern void control_forget_commands (void);

struct control_session;

/* A client has come: its greeting is added to output. */
extern struct control_session *control_session_new (GString *output);
extern void control_session_free (struct control_session *session);

/* The client has sent some bytes.  They are taken up to the end of the
 * first message, which is answered to output.  Returns how many were
 * taken.
 */
extern size_t control_session_feed (struct control_session *session,
                                    const char *bytes, size_t n,
                                    GString *output);

#endif /* CONTROL_QMP_H */
