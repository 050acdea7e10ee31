/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Exports that show a bitmap: BASE/dirty/BITMAP.
 *
 * Their data is the disk's.  Their extents say what is dirty, in the words
 * of common/dirty/view.h.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "dirty/view.h"
#include "utils/displayable.h"
#include "utils/export-name.h"

#include "dirty-tracking.h"

/* Has the client what it wants? */
static bool
is_enough (const struct nbdkit_extents *extents, uint32_t flags)
{
  return (flags & NBDKIT_FLAG_REQ_ONE) && nbdkit_extents_count (extents) > 1;
}

/* Add what the layer below says of the beginning of a dirty range.
 * Returns the number of bytes, or 0 with *err set.
 */
static uint32_t
add_below (nbdkit_next *next, uint32_t count, uint64_t offset,
           uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  struct nbdkit_extents *below = nbdkit_extents_new (offset, offset + count);
  uint64_t done = 0;

  *err = ENOMEM;
  if (!below)
    return 0;
  if (next->extents (next, count, offset, flags, below, err) == 0)
    for (size_t i = 0; i < nbdkit_extents_count (below); ++i) {
      const struct nbdkit_extent e = nbdkit_get_extent (below, i);

      if (nbdkit_add_extent (extents, e.offset, e.length,
                             dirty_view_dirty_type (e.type)) == -1) {
        done = 0;
        break;
      }
      done += e.length;
    }
  nbdkit_extents_free (below);
  return MIN (done, count);
}

/* Add a dirty range; -1 with *err set. */
static int
add_dirty (nbdkit_next *next, uint32_t count, uint64_t offset,
           uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  const int know = dirty_view_clean_is_zero () ? 0 : next->can_extents (next);

  if (know == 0)
    return nbdkit_add_extent (extents, offset, count, 0);
  while (know == 1 && count > 0 && !is_enough (extents, flags)) {
    const uint32_t n = add_below (next, count, offset, flags, extents, err);

    if (n == 0)
      return -1;
    offset += n;
    count -= n;
  }
  return know == 1 ? 0 : -1;
}

int
view_extents (const struct handle *h, nbdkit_next *next, uint32_t count,
              uint64_t offset, uint32_t flags,
              struct nbdkit_extents *extents, int *err)
{
  const uint32_t clean = dirty_view_clean_type ();

  while (count > 0 && !is_enough (extents, flags)) {
    uint64_t length;
    const bool dirty = dirty_bits_get (h->bits, offset, &length);
    const uint32_t n = MIN (length, count);
    const int r = dirty ?
      add_dirty (next, n, offset, flags, extents, err) :
      nbdkit_add_extent (extents, offset, n, clean);

    if (r == -1) {
      *err = *err ? *err : EIO;
      return -1;
    }
    offset += n;
    count -= n;
  }
  return 0;
}

/* Is the name one of a snapshot of another export of the list? */
static bool
is_snapshot (const struct nbdkit_exports *exports, const char *name)
{
  const char *at = strrchr (name, '@');

  for (size_t i = 0; at && i < nbdkit_exports_count (exports); ++i) {
    const char *other = nbdkit_get_export (exports, i).name;

    if (strlen (other) == (size_t) (at - name) &&
        strncmp (other, name, at - name) == 0)
      return true;
  }
  return false;
}

/* The names of the node's bitmaps, if it is known. */
static GPtrArray *
bitmap_names (const char *base)
{
  GPtrArray *names = g_ptr_array_new_with_free_func (g_free);
  const struct dirty_node *node;

  dirty_lock ();
  node = dirty_node_of_known_export (base);
  for (guint i = 0; node && i < node->bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);

    if (!bitmap->inconsistent)
      g_ptr_array_add (names, g_strdup (bitmap->name));
  }
  dirty_unlock ();
  return names;
}

char *
view_describe (const char *name)
{
  g_autofree char *shown = qf_displayable (name, 512);

  return g_strdup_printf ("what is dirty in bitmap %s", shown);
}

static int
list_views (const char *base, struct nbdkit_exports *exports)
{
  g_autoptr (GPtrArray) names = bitmap_names (base);

  for (guint i = 0; i < names->len &&
         nbdkit_exports_count (exports) < QF_MAX_EXPORTS; ++i) {
    const char *name = g_ptr_array_index (names, i);
    g_autofree char *export = qf_export_name_join (base, "dirty", name);
    g_autofree char *description = view_describe (name);

    if (export && nbdkit_add_export (exports, export, description) == -1)
      return -1;
  }
  return 0;
}

int
view_list (const struct nbdkit_exports *below, struct nbdkit_exports *exports)
{
  const size_t n = nbdkit_exports_count (below);

  for (size_t i = 0; i < n; ++i) {
    const struct nbdkit_export e = nbdkit_get_export (below, i);

    if (nbdkit_add_export (exports, e.name, e.description) == -1)
      return -1;
  }
  for (size_t i = 0; i < n; ++i) {
    const char *base = nbdkit_get_export (below, i).name;

    if (!is_snapshot (below, base) && list_views (base, exports) == -1)
      return -1;
  }
  return 0;
}
