/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Arguments of QMP commands.  All functions return -1 with error set if an
 * argument is not what the command expects, else 0.
 */

#ifndef CONTROL_ARGS_H
#define CONTROL_ARGS_H

#include <stdint.h>

#include <json-glib/json-glib.h>

#define CONTROL_ERROR (control_error_quark ())

extern GQuark control_error_quark (void);

/* Set *error; always returns -1. */
extern int control_fail (GError **error, const char *fs, ...)
  G_GNUC_PRINTF (2, 3);

/* There may be these arguments, whose list ends with NULL, and no others. */
extern int control_args_only (JsonObject *args, GError **error, ...)
  G_GNUC_NULL_TERMINATED;

/* If an argument is not there and not required its value is left alone.
 * Strings and other values belong to args.
 */
extern int control_args_string (JsonObject *args, const char *name,
                                gboolean required, const char **value,
                                GError **error);
extern int control_args_uint64 (JsonObject *args, const char *name,
                                gboolean required, uint64_t *value,
                                GError **error);

/* Not required. */
extern int control_args_boolean (JsonObject *args, const char *name,
                                 gboolean default_value, gboolean *value,
                                 GError **error);

/* Required. */
extern int control_args_array (JsonObject *args, const char *name,
                               JsonArray **value, GError **error);
extern int control_args_object (JsonObject *args, const char *name,
                                JsonObject **value, GError **error);

#endif /* CONTROL_ARGS_H */
