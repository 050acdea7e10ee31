/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The names under which snapshots are exported. */

#include <config.h>

#include <string.h>

#include "utils/displayable.h"
#include "utils/export-name.h"

#include "cbw.h"

char *
export_describe_view (const char *snapshot, const char *bitmap)
{
  g_autofree char *shown = qf_displayable (snapshot, 512);
  g_autofree char *shown_bitmap = bitmap ? qf_displayable (bitmap, 512) : NULL;

  return bitmap ?
    g_strdup_printf ("what was dirty in bitmap %s in snapshot %s",
                     shown_bitmap, shown) :
    g_strdup_printf ("the disk at one point in time, snapshot %s", shown);
}

static int
list_view (const char *base, const char *name, const char *bitmap,
           struct nbdkit_exports *exports)
{
  g_autofree char *both = bitmap ? g_strdup_printf ("%s/dirty/%s", name,
                                                    bitmap) : NULL;
  g_autofree char *export = qf_export_name_join (base, "snapshot",
                                                 both ? both : name);
  g_autofree char *description = export_describe_view (name, bitmap);

  if (!export || nbdkit_exports_count (exports) >= QF_MAX_EXPORTS)
    return 0;
  return nbdkit_add_export (exports, export, description);
}

static int
list_snapshot (const char *base, const struct snapshot *s,
               struct nbdkit_exports *exports)
{
  int r = list_view (base, s->name, NULL, exports);

  for (guint i = 0; i < s->frozen->len && r == 0; ++i) {
    const struct frozen *frozen = g_ptr_array_index (s->frozen, i);

    r = list_view (base, s->name, frozen->name, exports);
  }
  return r;
}

bool
export_is_disk (const char *name)
{
  g_autofree char *base = NULL, *view = NULL;

  return !qf_export_name_split (name, &base, &view) &&
    !qf_export_name_is_snapshot (name);
}

static GPtrArray *
snapshots_of_export (const char *base)
{
  GPtrArray *list = g_ptr_array_new_with_free_func ((GDestroyNotify)
                                                    snapshot_unref);
  const struct dirty_node *node;
  const struct disk *disk;

  dirty_lock ();
  node = dirty_node_of_known_export (base);
  disk = node ? disk_of_known_node (node) : NULL;
  for (guint i = 0; disk && i < disk->snapshots->len; ++i)
    g_ptr_array_add (list, snapshot_ref (g_ptr_array_index (disk->snapshots,
                                                            i)));
  dirty_unlock ();
  return list;
}

int
exports_list (const struct nbdkit_exports *below,
              struct nbdkit_exports *exports)
{
  const size_t n = nbdkit_exports_count (below);
  int r = 0;

  for (size_t i = 0; i < n && r == 0; ++i) {
    const struct nbdkit_export e = nbdkit_get_export (below, i);

    r = nbdkit_add_export (exports, e.name, e.description);
  }
  for (size_t i = 0; i < n && r == 0; ++i) {
    const char *base = nbdkit_get_export (below, i).name;
    g_autoptr (GPtrArray) list = NULL;

    if (!export_is_disk (base))
      continue;
    list = snapshots_of_export (base);
    for (guint j = 0; j < list->len && r == 0; ++j)
      r = list_snapshot (base, g_ptr_array_index (list, j), exports);
  }
  return r;
}

struct snapshot *
export_find_snapshot (const char *base, const char *name)
{
  g_autoptr (GPtrArray) list = snapshots_of_export (base);

  for (guint i = 0; i < list->len; ++i) {
    struct snapshot *s = g_ptr_array_index (list, i);

    if (strcmp (s->name, name) == 0)
      return snapshot_ref (s);
  }
  return NULL;
}
