/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Errors of the qcow2 module.
 *
 * Every GError of this module has the domain QCOW2_ERROR, and its code
 * is an errno value fit to be given to an NBD client:
 *
 *   EINVAL   a field of the header or of a table read at open is bad
 *   ENOTSUP  valid, but something this build cannot read
 *   EIO      the layer below failed, or metadata met while reading is bad
 *   ENOENT   no such snapshot
 *   EACCES   the passphrase does not open the image
 *   ENOSPC   there is no room for what shall be written
 *   ENOMEM   a size taken from the image asks for more than there is
 *
 * Messages name the field, its value and what is allowed.  They do not
 * name the file: who opened the image knows it and prepends it.
 */

#ifndef QCOW2_ERROR_H
#define QCOW2_ERROR_H

#include <errno.h>

#include <glib.h>

#define QCOW2_ERROR (qcow2_error_quark ())

extern GQuark qcow2_error_quark (void);

/* Set *error; always returns -1, so that callers can return its result. */
extern int qcow2_fail (GError **error, int code, const char *fs, ...)
  G_GNUC_PRINTF (3, 4);

#endif /* QCOW2_ERROR_H */
