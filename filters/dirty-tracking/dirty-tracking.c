/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* nbdkit-dirty-tracking-filter: records what is written, in bitmaps.
 *
 * Bitmaps, and the nodes that own them, are in common/dirty, where other
 * filters and QMP find them too.  Here writes are marked on their way
 * down: before they are passed on, and also if they fail, as a write that
 * failed may have changed something.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "control/commands.h"
#include "control/control.h"
#include "dirty/view.h"
#include "utils/displayable.h"
#include "utils/export-name.h"
#include "utils/suite.h"

#include "dirty-tracking.h"

struct config config;

/* Times that the filter stands in the chain. */
static unsigned loaded;

/* Names in messages may be a client's. */
static int
report (const GError *error)
{
  g_autofree char *message = qf_displayable (error->message, 4096);

  nbdkit_error ("%s", message);
  return -1;
}

static void
dirty_tracking_load (void)
{
  loaded++;
  qf_suite_load (QF_DIRTY_TRACKING);
}

static void
dirty_tracking_unload (void)
{
  if (--loaded > 0)
    return;
  g_clear_pointer (&config.node, g_free);
  specs_free ();
  dirty_nodes_forget_all ();
}

/* Parameters. */

static int
parse_granularity (const char *value)
{
  const int64_t size = nbdkit_parse_size (value);
  int bits;

  if (size == -1)
    return -1;
  bits = dirty_granularity_bits (size);
  if (bits == -1) {
    nbdkit_error ("dirty-granularity: \"%s\" is not a power of two between "
                  "512 and 2G", value);
    return -1;
  }
  config.granularity_bits = bits;
  return 0;
}

static int
parse_clean (const char *value)
{
  if (strcmp (value, "hole") != 0 && strcmp (value, "zero") != 0) {
    nbdkit_error ("dirty-clean: \"%s\" is not a known value; "
                  "use dirty-clean=hole or dirty-clean=zero", value);
    return -1;
  }
  dirty_view_set_clean_is_zero (strcmp (value, "zero") == 0);
  return 0;
}

static int
parse_node (const char *value)
{
  if (!*value || !g_utf8_validate (value, -1, NULL)) {
    nbdkit_error ("dirty-node: the name of a node must not be empty, and "
                  "must be in UTF-8");
    return -1;
  }
  g_free (config.node);
  config.node = g_strdup (value);
  dirty_nodes_rename (value);
  return 0;
}

static int
dirty_tracking_config (nbdkit_next_config *next, nbdkit_backend *nxdata,
                       const char *key, const char *value)
{
  g_autoptr (GError) error = NULL;
  int r;

  if (strcmp (key, "dirty-bitmap") == 0)
    return specs_parse (value);
  if (strcmp (key, "dirty-granularity") == 0)
    return parse_granularity (value);
  if (strcmp (key, "dirty-clean") == 0)
    return parse_clean (value);
  if (strcmp (key, "dirty-node") == 0)
    return parse_node (value);
  r = control_config (key, value, &error);
  if (r == 0)
    r = dirty_nodes_config (key, value, &error);
  if (r == -1)
    return report (error);
  return r == 1 ? 0 : next (nxdata, key, value);
}

#define dirty_tracking_config_help                                      \
  "dirty-bitmap=NAME[,granularity=SIZE][,persistent=on][,disabled=on]\n" \
  "                  [,node=NODE]\n"                                    \
  "                            Record in this bitmap what is written;\n" \
  "                            can be given more than once.\n"          \
  "dirty-granularity=SIZE      Of bitmaps if nothing else is said\n"    \
  "                            (default 64K, or an image's cluster\n"   \
  "                            size from 4K on).\n"                     \
  "dirty-clean=hole|zero       How clean blocks are shown (default\n"   \
  "                            hole).\n"                                \
  "dirty-node=NAME             Call the disk so (default disk).\n"      \
  "exports=one|each            Whether each export below is a disk of\n" \
  "                            its own (default: as the plugin's dir\n" \
  "                            parameter says).\n"                      \
  CONTROL_CONFIG_HELP

static int
dirty_tracking_config_complete (nbdkit_next_config_complete *next,
                                nbdkit_backend *nxdata)
{
  if (loaded > 1) {
    nbdkit_error ("the dirty-tracking filter can be used only once in a "
                  "chain");
    return -1;
  }
  if (config.node && dirty_nodes_each ()) {
    nbdkit_error ("dirty-node=%s: each export is a node here, and is called "
                  "by its own name", config.node);
    return -1;
  }
  if (specs_check () == -1)
    return -1;
  return next (nxdata);
}

static int
dirty_tracking_get_ready (int thread_model)
{
  g_autoptr (GError) error = NULL;

  if (qf_suite_add (QF_DIRTY_TRACKING, &error) == -1)
    return report (error);
  control_register_bitmap_commands ();
  return control_get_ready (&error) == -1 ? report (error) : 0;
}

/* Nodes. */

static int
open_node (struct dirty_node *node, nbdkit_next *next,
           enum dirty_access access)
{
  const int64_t size = next->get_size (next);
  g_autoptr (GError) error = NULL;

  if (size == -1)
    return -1;
  if (config.granularity_bits)
    dirty_node_set_granularity (node, config.granularity_bits);
  if (dirty_node_open (node, size, access, &error) == -1)
    return report (error);
  if (specs_apply (node) == -1) {
    dirty_node_close (node);
    return -1;
  }
  return 0;
}

/* Let the one disk be known before a client opens it, so that bitmaps can
 * be added.  If that is not possible now, it is when a client comes.
 */
static void
open_disk_once (nbdkit_backend *backend)
{
  nbdkit_next *next = nbdkit_next_context_open (backend, 1, "", 1);
  struct dirty_node *node = dirty_node_of_export ("");

  if (!next)
    return;
  if (next->prepare (next) == 0) {
    if (open_node (node, next, DIRTY_UNKNOWN) == 0)
      dirty_node_close (node);
    next->finalize (next);
  }
  nbdkit_next_context_close (next);
}

static int
dirty_tracking_after_fork (nbdkit_backend *backend)
{
  g_autoptr (GError) error = NULL;

  if (!dirty_nodes_each ())
    open_disk_once (backend);
  if (control_after_fork (&error) == -1)
    report (error);
  return 0;
}

static void
dirty_tracking_cleanup (nbdkit_backend *backend)
{
  control_cleanup ();
}

/* Exports. */

static int
dirty_tracking_list_exports (nbdkit_next_list_exports *next,
                             nbdkit_backend *nxdata, int readonly, int is_tls,
                             struct nbdkit_exports *exports)
{
  struct nbdkit_exports *below = nbdkit_exports_new ();
  int r = -1;

  if (!below)
    return -1;
  if (next (nxdata, readonly, below) == 0)
    r = view_list (below, exports);
  nbdkit_exports_free (below);
  return r;
}

static const char *
dirty_tracking_export_description (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->description ? h->description : next->export_description (next);
}

/* Connections. */

static void
handle_free (struct handle *h)
{
  g_free (h->base);
  g_free (h->view);
  g_free (h->description);
  g_free (h);
}

/* Which disk, and which bitmap?  -1: there is no such view. */
static int
parse_export (struct handle *h, const char *exportname)
{
  const char *kind = qf_export_name_split (exportname, &h->base, &h->view);

  if (!kind) {
    h->base = g_strdup (exportname);
    return 0;
  }
  if (strcmp (kind, "dirty") == 0) {
    h->description = view_describe (h->view);
    return 0;
  }
  /* If there were a cbw filter it would not have come here.  Where each
   * export is a disk this one is not; else there is but one, by any name.
   */
  if (dirty_nodes_each () || strstr (h->view, "/dirty/")) {
    nbdkit_error ("there is no cbw filter that has a snapshot for this "
                  "export");
    return -1;
  }
  g_free (h->base);
  g_clear_pointer (&h->view, g_free);
  h->base = g_strdup (exportname);
  return 0;
}

static void *
dirty_tracking_open (nbdkit_next_open *next, nbdkit_context *context,
                     int readonly, const char *exportname, int is_tls)
{
  struct handle *h = g_new0 (struct handle, 1);

  h->server_is_read_only = readonly;
  if (parse_export (h, exportname) == -1 ||
      next (context, readonly || h->view, h->base) == -1) {
    handle_free (h);
    return NULL;
  }
  return h;
}

/* Give back what prepare took. */
static void
leave_node (struct handle *h)
{
  if (h->bitmap)
    dirty_bitmap_unuse (h->bitmap);
  dirty_bits_free (h->bits);
  if (h->node)
    dirty_node_close (h->node);
  h->bitmap = NULL;
  h->bits = NULL;
  h->node = NULL;
}

static void
dirty_tracking_close (void *handle)
{
  leave_node (handle);
  handle_free (handle);
}

static enum dirty_access
access_of (const struct handle *h, nbdkit_next *next)
{
  if (h->server_is_read_only)
    return DIRTY_READ_ONLY;
  if (h->view)
    return DIRTY_UNKNOWN;
  return next->can_write (next) == 1 ? DIRTY_WRITABLE : DIRTY_READ_ONLY;
}

static int
dirty_tracking_prepare (nbdkit_next *next, void *handle, int readonly)
{
  struct handle *h = handle;
  struct dirty_node *node = dirty_node_of_export (h->base);
  g_autoptr (GError) error = NULL;

  if (qf_export_name_is_snapshot (h->base)) {
    if (!h->view)
      return 0;
    nbdkit_error ("snapshots of the image have no bitmaps");
    return -1;
  }
  if (open_node (node, next, access_of (h, next)) == -1)
    return -1;
  h->node = node;
  if (h->view) {
    h->bits = dirty_bitmap_use (node, h->view, &h->bitmap, &error);
    if (!h->bits) {
      leave_node (h);
      return report (error);
    }
  }
  return 0;
}

static int
dirty_tracking_finalize (nbdkit_next *next, void *handle)
{
  leave_node (handle);
  return 0;
}

static int
dirty_tracking_can_write (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->view ? 0 : next->can_write (next);
}

static int
dirty_tracking_can_extents (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->view ? 1 : next->can_extents (next);
}

/* Requests. */

/* A write is let in, and marked. */
static void
begin_write (const struct handle *h, uint32_t count, uint64_t offset)
{
  if (!h->node)
    return;
  dirty_gate_enter (&h->node->gates[DIRTY_GATE_TRACKING]);
  dirty_node_mark (h->node, offset, count);
}

static void
end_write (const struct handle *h)
{
  if (h->node)
    dirty_gate_leave (&h->node->gates[DIRTY_GATE_TRACKING]);
}

static int
dirty_tracking_pwrite (nbdkit_next *next, void *handle, const void *buf,
                       uint32_t count, uint64_t offset, uint32_t flags,
                       int *err)
{
  int r;

  begin_write (handle, count, offset);
  r = next->pwrite (next, buf, count, offset, flags, err);
  end_write (handle);
  return r;
}

static int
dirty_tracking_trim (nbdkit_next *next, void *handle, uint32_t count,
                     uint64_t offset, uint32_t flags, int *err)
{
  int r;

  begin_write (handle, count, offset);
  r = next->trim (next, count, offset, flags, err);
  end_write (handle);
  return r;
}

static int
dirty_tracking_zero (nbdkit_next *next, void *handle, uint32_t count,
                     uint64_t offset, uint32_t flags, int *err)
{
  int r;

  begin_write (handle, count, offset);
  r = next->zero (next, count, offset, flags, err);
  end_write (handle);
  return r;
}

static int
dirty_tracking_extents (nbdkit_next *next, void *handle, uint32_t count,
                        uint64_t offset, uint32_t flags,
                        struct nbdkit_extents *extents, int *err)
{
  const struct handle *h = handle;

  if (h->view)
    return view_extents (h, next, count, offset, flags, extents, err);
  return next->extents (next, count, offset, flags, extents, err);
}

static struct nbdkit_filter filter = {
  .name = "dirty-tracking",
  .longname = "nbdkit dirty-tracking filter",
  .description = "Records what is written, in named bitmaps.",
  .load = dirty_tracking_load,
  .unload = dirty_tracking_unload,
  .config = dirty_tracking_config,
  .config_complete = dirty_tracking_config_complete,
  .config_help = dirty_tracking_config_help,
  .get_ready = dirty_tracking_get_ready,
  .after_fork = dirty_tracking_after_fork,
  .cleanup = dirty_tracking_cleanup,
  .list_exports = dirty_tracking_list_exports,
  .export_description = dirty_tracking_export_description,
  .open = dirty_tracking_open,
  .close = dirty_tracking_close,
  .prepare = dirty_tracking_prepare,
  .finalize = dirty_tracking_finalize,
  .can_write = dirty_tracking_can_write,
  .can_extents = dirty_tracking_can_extents,
  .pwrite = dirty_tracking_pwrite,
  .trim = dirty_tracking_trim,
  .zero = dirty_tracking_zero,
  .extents = dirty_tracking_extents,
};

/* nbdkit-filter.h defines it without a declaration. */
extern struct nbdkit_filter *filter_init (void);

NBDKIT_REGISTER_FILTER (filter)
