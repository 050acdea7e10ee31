/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include "utils/displayable.h"

char *
qf_displayable (const char *s, glong max)
{
  g_autofree char *valid = g_utf8_make_valid (s, -1);
  GString *result = g_string_new (NULL);

  for (const char *p = valid; *p && max > 0; p = g_utf8_next_char (p), --max) {
    const gunichar c = g_utf8_get_char (p);

    g_string_append_unichar (result, g_unichar_isprint (c) ? c : 0xfffd);
  }
  return g_string_free (result, FALSE);
}
