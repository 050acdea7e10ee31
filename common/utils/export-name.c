/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <string.h>

#include "utils/export-name.h"
#include "utils/suite.h"

static const char *const kinds[] = { "snapshot", "dirty" };

/* Does a kind, and a slash behind it, begin here? */
static const char *
kind_at (const char *p)
{
  for (size_t i = 0; i < G_N_ELEMENTS (kinds); ++i)
    if (g_str_has_prefix (p, kinds[i]) && p[strlen (kinds[i])] == '/')
      return kinds[i];
  return NULL;
}

const char *
qf_export_name_split (const char *export, char **base, char **name)
{
  const char *at = export, *slash = export, *kind = kind_at (export);

  while (!kind && (slash = strchr (at, '/')) != NULL) {
    at = slash + 1;
    kind = kind_at (at);
  }
  if (!kind)
    return NULL;
  *base = g_strndup (export, at == export ? 0 : slash - export);
  *name = g_strdup (at + strlen (kind) + 1);
  return kind;
}

char *
qf_export_name_join (const char *base, const char *kind, const char *name)
{
  char *export = g_strdup_printf ("%s%s%s/%s", base, *base ? "/" : "", kind,
                                  name);
  g_autofree char *base_again = NULL, *name_again = NULL;
  const char *kind_again = qf_export_name_split (export, &base_again,
                                                 &name_again);

  if (kind_again && strcmp (kind, kind_again) == 0 &&
      strcmp (base, base_again) == 0 && strcmp (name, name_again) == 0 &&
      strlen (export) <= QF_MAX_EXPORT_NAME &&
      g_utf8_validate (export, -1, NULL))
    return export;
  g_free (export);
  return NULL;
}

gboolean
qf_export_name_is_snapshot (const char *name)
{
  return qf_suite_has (QF_QCOW2) && strchr (name, '@');
}
