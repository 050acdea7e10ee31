/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Export names: BASE is the disk, BASE@SNAP one of its snapshots.
 *
 * A name is split at its last '@'.  A snapshot whose name would not
 * survive that, or that cannot travel in the NBD protocol, is listed by
 * its ID; if that does not do either, it is not listed.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "utils/displayable.h"

#include "qcow2-filter.h"

/* The protocol's limit for strings, and nbdkit's for lists. */
#define MAX_STRING 4096
#define MAX_EXPORTS 10000

void
name_split (const char *exportname, char **base, char **snapshot)
{
  const char *at = strrchr (exportname, '@');

  if (at) {
    *base = g_strndup (exportname, at - exportname);
    *snapshot = g_strdup (at + 1);
  }
  else {
    *base = g_strdup (exportname);
    *snapshot = g_strdup (config.snapshot);
  }
}

/* Does BASE@name lead to that snapshot, through all filters of ours? */
static bool
leads_to (const char *base, const char *name, const GPtrArray *snapshots,
          const struct qcow2_snapshot *snapshot)
{
  return *name && !strchr (name, '@') && !strstr (name, "/snapshot/") &&
    !strstr (name, "/dirty/") && g_utf8_validate (name, -1, NULL) &&
    strlen (base) + 1 + strlen (name) <= MAX_STRING &&
    qcow2_snapshots_find (snapshots, name) == snapshot;
}

char *
name_describe (const struct qcow2_snapshot *snapshot)
{
  /* Far below the protocol's limit even if each character is 4 bytes. */
  g_autofree char *name = qf_displayable (snapshot->name, 512);
  g_autofree char *id = qf_displayable (snapshot->id, 64);
  g_autofree char *size =
    g_format_size_full (snapshot->disk_size, G_FORMAT_SIZE_IEC_UNITS);
  g_autoptr (GDateTime) date =
    g_date_time_new_from_unix_utc (snapshot->date_sec);
  g_autofree char *when = g_date_time_format (date, "%Y-%m-%d %H:%M:%S UTC");

  /* GLib puts a no-break space between number and unit. */
  for (char *p; (p = strstr (size, "\xc2\xa0")) != NULL; ) {
    *p = ' ';
    memmove (p + 1, p + 2, strlen (p + 2) + 1);
  }
  return g_strdup_printf ("internal snapshot, made %s, disk size %s "
                          "(%" PRIu64 " bytes), ID %s, name %s", when, size,
                          snapshot->disk_size, id, name);
}

static int
list_snapshots (const char *base, struct nbdkit_exports *exports)
{
  g_autoptr (GPtrArray) snapshots = disk_last_snapshots (base);

  for (guint i = 0; snapshots && i < snapshots->len &&
         nbdkit_exports_count (exports) < MAX_EXPORTS; ++i) {
    const struct qcow2_snapshot *sn = g_ptr_array_index (snapshots, i);
    const char *name =
      leads_to (base, sn->name, snapshots, sn) ? sn->name :
      leads_to (base, sn->id, snapshots, sn) ? sn->id : NULL;

    if (name) {
      g_autofree char *full = g_strdup_printf ("%s@%s", base, name);
      g_autofree char *description = name_describe (sn);

      if (nbdkit_add_export (exports, full, description) == -1)
        return -1;
    }
  }
  return 0;
}

int
name_list (const struct nbdkit_exports *below,
           struct nbdkit_exports *exports)
{
  const size_t n = nbdkit_exports_count (below);

  for (size_t i = 0; i < n; ++i) {
    const struct nbdkit_export e = nbdkit_get_export (below, i);

    if (nbdkit_add_export (exports, e.name, e.description) == -1)
      return -1;
  }
  for (size_t i = 0; i < n; ++i)
    if (list_snapshots (nbdkit_get_export (below, i).name, exports) == -1)
      return -1;
  return 0;
}
