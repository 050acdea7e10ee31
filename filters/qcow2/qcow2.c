/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* nbdkit-qcow2-filter: serves the disk inside a qcow2 image.
 *
 * The container is whatever the layer below serves.  The qcow2 module in
 * common/qcow2 understands the format; the other files of this directory
 * connect it to nbdkit (see qcow2-filter.h).
 */

#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "control/control.h"
#include "dirty/node.h"
#include "qcow2/error.h"
#include "utils/suite.h"

#include "qcow2-filter.h"

#define DEFAULT_CACHE_SIZE (UINT64_C (64) << 20)

struct config config = {
  .cache_size = DEFAULT_CACHE_SIZE,
  .backing = { .key = "qcow2-backing", .is_backing = true },
  .data_file = { .key = "qcow2-data-file" },
};

NBDKIT_DLL_PUBLIC int qcow2_debug_verbose;

/* Times that the filter stands in the chain. */
static unsigned loaded;

static int
report (const GError *error)
{
  nbdkit_error ("%s", error->message);
  return -1;
}

static void
wipe_free (gpointer p)
{
  explicit_bzero (p, strlen (p));
  free (p);
}

static void
qcow2_load (void)
{
  qf_suite_load (QF_QCOW2);
  if (loaded++ == 0)
    config.passphrases = g_ptr_array_new_with_free_func (wipe_free);
}

static void
qcow2_unload (void)
{
  if (--loaded > 0)
    return;
  g_clear_pointer (&config.snapshot, g_free);
  local_file_clear (&config.file);
  g_clear_pointer (&config.backing_format, g_free);
  g_clear_pointer (&config.passphrases, g_ptr_array_unref);
  policy_clear (&config.backing);
  policy_clear (&config.data_file);
  keys_forget_all ();
  dirty_nodes_forget_all ();
}

/* Parameters. */

static int
parse_passphrase (const char *value)
{
  char *passphrase;

  if (nbdkit_read_password (value, &passphrase) == -1)
    return -1;
  g_ptr_array_add (config.passphrases, passphrase);
  return 0;
}

static int
parse_backing_format (const char *value)
{
  if (strcmp (value, "raw") != 0 && strcmp (value, "qcow2") != 0) {
    nbdkit_error ("qcow2-backing-format: \"%s\" is not a known value; "
                  "use qcow2-backing-format=raw or "
                  "qcow2-backing-format=qcow2", value);
    return -1;
  }
  g_free (config.backing_format);
  config.backing_format = g_strdup (value);
  return 0;
}

static int
parse_cache_size (const char *value)
{
  const int64_t size = nbdkit_parse_size (value);

  if (size == -1) {
    nbdkit_error ("qcow2-cache-size: \"%s\" is not a size such as 64M",
                  value);
    return -1;
  }
  config.cache_size = size;
  return 0;
}

static int
parse_check (const char *value)
{
  if (strcmp (value, "full") == 0)
    config.check = true;
  else if (strcmp (value, "off") == 0)
    config.check = false;
  else {
    nbdkit_error ("qcow2-check: \"%s\" is not a known value; "
                  "use qcow2-check=off or qcow2-check=full", value);
    return -1;
  }
  return 0;
}

static int
parse_snapshot (const char *value)
{
  if (!*value) {
    nbdkit_error ("qcow2-snapshot: the name or ID of a snapshot is missing");
    return -1;
  }
  g_free (config.snapshot);
  config.snapshot = g_strdup (value);
  return 0;
}

static int
qcow2_config (nbdkit_next_config *next, nbdkit_backend *nxdata,
              const char *key, const char *value)
{
  g_autoptr (GError) error = NULL;
  int r;

  if (strcmp (key, "qcow2-snapshot") == 0)
    return parse_snapshot (value);
  if (strcmp (key, "qcow2-cache-size") == 0)
    return parse_cache_size (value);
  if (strcmp (key, "qcow2-backing") == 0)
    return policy_parse (&config.backing, value);
  if (strcmp (key, "qcow2-backing-format") == 0)
    return parse_backing_format (value);
  if (strcmp (key, "qcow2-data-file") == 0)
    return policy_parse (&config.data_file, value);
  if (strcmp (key, "qcow2-passphrase") == 0)
    return parse_passphrase (value);
  if (strcmp (key, "qcow2-check") == 0)
    return parse_check (value);
  r = control_config (key, value, &error);
  if (r == 0)
    r = dirty_nodes_config (key, value, &error);
  if (r == -1)
    return report (error);
  if (r == 1)
    return 0;

  if (local_file_note (&config.file, key, value) == -1)
    return -1;
  return next (nxdata, key, value);
}

#define qcow2_config_help                                               \
  "qcow2-snapshot=NAME         Serve this internal snapshot.\n"         \
  "qcow2-backing=refuse|none|dir:PATH|file:PATH|URI|export\n"           \
  "                            What to do with backing files (default\n" \
  "                            refuse).\n"                              \
  "qcow2-backing-format=raw|qcow2\n"                                    \
  "                            Format of a backing file if the image\n" \
  "                            does not say it.\n"                      \
  "qcow2-data-file=refuse|dir:PATH|file:PATH|URI\n"                     \
  "                            What to do with an external data file\n" \
  "                            (default refuse).\n"                     \
  "qcow2-passphrase=-|+FILE|-FD|PASSPHRASE\n"                           \
  "                            Opens encrypted images.\n"               \
  "qcow2-cache-size=SIZE       Memory for caches (default 64M).\n"      \
  "qcow2-check=off|full        Check the image before it is served.\n"  \
  "exports=one|each            Whether each export below is an image\n" \
  "                            of its own (default: as the plugin's\n"  \
  "                            dir parameter says).\n"                  \
  CONTROL_CONFIG_HELP

static int
qcow2_config_complete (nbdkit_next_config_complete *next,
                       nbdkit_backend *nxdata)
{
  if (loaded > 1) {
    nbdkit_error ("the qcow2 filter can be used only once in a chain");
    return -1;
  }
#ifndef HAVE_NAMED_CONTEXTS
  if (config.backing.kind == POLICY_EXPORT) {
    nbdkit_error ("qcow2-backing=export: this version of nbdkit cannot open "
                  "a second export for a filter; nbdkit 1.44 can");
    return -1;
  }
#endif
  return next (nxdata);
}

static int
qcow2_get_ready (int thread_model)
{
  g_autoptr (GError) error = NULL;

  config.thread_model = thread_model;
  if (!config.snapshot && !dirty_nodes_each ())
    container_offer ();
  if (qf_suite_add (QF_QCOW2, &error) == -1 ||
      control_get_ready (&error) == -1)
    return report (error);
  return start_check ();
}

/* Read the list of snapshots of an export below, so that it can be shown
 * although no client has opened it.  Returns -1 with error set if that
 * was not possible; whoever opens it will see the same error.
 */
static int
read_snapshots (nbdkit_backend *backend, const char *base, GError **error)
{
  nbdkit_next *next = nbdkit_next_context_open (backend, 1, base, 1);
  struct layer layer = { 0 };
  struct disk *disk = NULL;

  if (next && next->prepare (next) == 0) {
    if (layer_init (&layer, next, base) == 0)
      disk = disk_open (base, &layer, NULL, error);
    next->finalize (next);
  }
  if (disk)
    disk_close (disk);
  if (next)
    nbdkit_next_context_close (next);
  return disk ? 0 : -1;
}

static int
qcow2_after_fork (nbdkit_backend *backend)
{
  g_autoptr (GError) error = NULL;

  /* With several disks there is none to be opened without a name, and
   * some versions of nbdkit do not allow to open one with a name here.
   */
  if (!dirty_nodes_each () && read_snapshots (backend, "", &error) == -1 &&
      error)
    report (error);
  g_clear_error (&error);
  container_start (backend);
  if (control_after_fork (&error) == -1)
    report (error);
  return 0;
}

static void
qcow2_cleanup (nbdkit_backend *backend)
{
  control_cleanup ();
  container_stop ();
  disk_forget_all ();
}

/* Exports. */

/* Where each export is a disk, those that nobody has opened yet. */
static void
read_all_snapshots (nbdkit_backend *backend,
                    const struct nbdkit_exports *below)
{
#ifdef HAVE_NAMED_CONTEXTS
  for (size_t i = 0; dirty_nodes_each () && i < nbdkit_exports_count (below);
       ++i) {
    const char *name = nbdkit_get_export (below, i).name;
    g_autoptr (GPtrArray) known = disk_last_snapshots (name);
    g_autoptr (GError) error = NULL;

    if (!known && read_snapshots (backend, name, &error) == -1 && error)
      nbdkit_debug ("qcow2: %s", error->message);
  }
#endif
}

static int
qcow2_list_exports (nbdkit_next_list_exports *next, nbdkit_backend *nxdata,
                    int readonly, int is_tls, struct nbdkit_exports *exports)
{
  struct nbdkit_exports *below = nbdkit_exports_new ();
  int r = -1;

  if (!below)
    return -1;
  if (next (nxdata, 1, below) == 0) {
    read_all_snapshots (nxdata, below);
    r = name_list (below, exports);
  }
  nbdkit_exports_free (below);
  return r;
}

static const char *
qcow2_export_description (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->description ? h->description : next->export_description (next);
}

/* Connections. */

static void *
qcow2_open (nbdkit_next_open *next, nbdkit_context *context, int readonly,
            const char *exportname, int is_tls)
{
  struct handle *h = g_new0 (struct handle, 1);

  name_split (exportname, &h->base, &h->snapshot);
  h->backend = nbdkit_context_get_backend (context);
  if (next (context, 1, h->base) == -1) {
    g_free (h->base);
    g_free (h->snapshot);
    g_free (h);
    return NULL;
  }
  return h;
}

static void
qcow2_close (void *handle)
{
  struct handle *h = handle;

  if (h->disk)
    disk_close (h->disk);
  g_free (h->description);
  g_free (h->base);
  g_free (h->snapshot);
  g_free (h);
}

static int
choose_view (struct handle *h, GError **error)
{
  const struct qcow2_image *image = disk_top (h->disk)->image;
  const struct qcow2_snapshot *sn;

  if (!h->snapshot) {
    qcow2_image_active_view (image, &h->view);
    return 0;
  }
  sn = qcow2_snapshots_find (image->snapshots, h->snapshot);
  if (!sn) {
    g_autofree char *name = g_strescape (h->snapshot, NULL);

    return qcow2_fail (error, ENOENT, "%s: the image has no snapshot with "
                       "the name or ID \"%s\"", h->layer.source.name, name);
  }
  h->description = name_describe (sn);
  return qcow2_image_snapshot_view (image, sn, &h->view, error);
}

static int
qcow2_prepare (nbdkit_next *next, void *handle, int readonly)
{
  struct handle *h = handle;
  g_autoptr (GError) error = NULL;

  if (layer_init (&h->layer, next, h->base) == -1)
    return -1;
  h->disk = disk_open (h->base, &h->layer, h->backend, &error);
  if (!h->disk || choose_view (h, &error) == -1) {
    nbdkit_error ("%s", error->message);
    return -1;
  }
  return 0;
}

static int64_t
qcow2_get_size (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->view.size;
}

static int
qcow2_block_size (nbdkit_next *next, void *handle, uint32_t *minimum,
                  uint32_t *preferred, uint32_t *maximum)
{
  const struct handle *h = handle;

  *minimum = 1;
  *preferred = disk_top (h->disk)->image->cluster_size;
  *maximum = UINT32_MAX;
  return 0;
}

/* Images are only read. */
static int
qcow2_no (nbdkit_next *next, void *handle)
{
  return 0;
}

/* Nothing that one connection does is visible to another, and we answer
 * for extents whatever the layer below can.
 */
static int
qcow2_yes (nbdkit_next *next, void *handle)
{
  return 1;
}

static int
qcow2_can_cache (nbdkit_next *next, void *handle)
{
  return NBDKIT_CACHE_NATIVE;
}

/* Requests. */

static int
fail_request (const GError *error, int *err)
{
  nbdkit_error ("%s", error->message);
  *err = error->code;
  return -1;
}

static int
qcow2_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count,
             uint64_t offset, uint32_t flags, int *err)
{
  g_autoptr (GError) error = NULL;

  if (read_range (handle, buf, count, offset, &error) == -1)
    return fail_request (error, err);
  return 0;
}

static int
qcow2_extents (nbdkit_next *next, void *handle, uint32_t count,
               uint64_t offset, uint32_t flags,
               struct nbdkit_extents *extents, int *err)
{
  g_autoptr (GError) error = NULL;

  if (extents_range (handle, count, offset, flags & NBDKIT_FLAG_REQ_ONE,
                     extents, &error) == -1)
    return fail_request (error, err);
  return 0;
}

static int
qcow2_cache_range (nbdkit_next *next, void *handle, uint32_t count,
                   uint64_t offset, uint32_t flags, int *err)
{
  g_autoptr (GError) error = NULL;

  if (prefetch_range (handle, count, offset, &error) == -1)
    return fail_request (error, err);
  return 0;
}

#ifdef HAVE_FILTER_DUMP_PLUGIN
static void
qcow2_dump_plugin (void)
{
#ifdef HAVE_LIBDEFLATE
  printf ("qcow2_libdeflate=yes\n");
#endif
#ifdef HAVE_LIBZSTD
  printf ("qcow2_zstd=yes\n");
#endif
}
#endif

static struct nbdkit_filter filter = {
  .name = "qcow2",
  .longname = "nbdkit qcow2 filter",
  .description = "Serves the disk inside a qcow2 image.",
  .load = qcow2_load,
  .unload = qcow2_unload,
  .config = qcow2_config,
  .config_complete = qcow2_config_complete,
  .config_help = qcow2_config_help,
#ifdef HAVE_FILTER_DUMP_PLUGIN
  .dump_plugin = qcow2_dump_plugin,
#endif
  .get_ready = qcow2_get_ready,
  .after_fork = qcow2_after_fork,
  .cleanup = qcow2_cleanup,
  .list_exports = qcow2_list_exports,
  .open = qcow2_open,
  .close = qcow2_close,
  .prepare = qcow2_prepare,
  .get_size = qcow2_get_size,
  .export_description = qcow2_export_description,
  .block_size = qcow2_block_size,
  .can_write = qcow2_no,
  .can_flush = qcow2_no,
  .can_trim = qcow2_no,
  .can_zero = qcow2_no,
  .can_fast_zero = qcow2_no,
  .can_fua = qcow2_no,
  .can_extents = qcow2_yes,
  .can_multi_conn = qcow2_yes,
  .can_cache = qcow2_can_cache,
  .pread = qcow2_pread,
  .extents = qcow2_extents,
  .cache = qcow2_cache_range,
};

/* nbdkit-filter.h defines it without a declaration. */
extern struct nbdkit_filter *filter_init (void);

NBDKIT_REGISTER_FILTER (filter)
