/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <stdarg.h>

#include <glib.h>

#include "qcow2/error.h"

G_DEFINE_QUARK (qcow2-error-quark, qcow2_error)

int
qcow2_fail (GError **error, int code, const char *fs, ...)
{
  va_list args;

  if (error) {
    va_start (args, fs);
    g_propagate_error (error,
                       g_error_new_valist (QCOW2_ERROR, code, fs, args));
    va_end (args);
  }
  return -1;
}
