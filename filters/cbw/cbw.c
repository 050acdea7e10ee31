/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* nbdkit-cbw-filter: copy-before-write snapshots.
 *
 * A snapshot is the disk as it was when the snapshot was made.  What has
 * not been written since then is still on the disk; of the rest, the old
 * data was copied to the snapshot's target before it was overwritten.
 *
 * All reading of the disk happens on threads of connections, through their
 * own contexts: a guest's write reads what it is about to change, and the
 * reader of a view what is unchanged.  So the filter asks nothing special
 * of the layers below, except that there can be two connections.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "control/commands.h"
#include "control/control.h"
#include "utils/displayable.h"
#include "utils/export-name.h"
#include "utils/server.h"
#include "utils/suite.h"

#include "cbw.h"

/* Times that the filter stands in the chain. */
static unsigned loaded;

/* A connection to a disk, or to a view of one of its snapshots. */
struct handle {
  char *base;                   /* the export below */
  char *snapshot, *bitmap;      /* names, of a view; or NULL */
  struct snapshot *s;           /* of a view; NULL: the disk */
  struct dirty_bits *bits;      /* of a view of what is dirty; of s */
  char *description;            /* of a view */
  bool server_is_read_only;
  struct disk *disk;            /* NULL until prepared, or if it is none */
  bool node_is_open;
  struct below below;           /* once prepared */
  GMutex lock, probe;           /* below has pointers to them */
  struct guest guest;           /* where disk_settle has to know it */
  bool is_guest;
};

/* Names in messages may be a client's. */
static int
report (const GError *error)
{
  g_autofree char *message = qf_displayable (error->message, 4096);

  nbdkit_error ("%s", message);
  return -1;
}

static void
cbw_load (void)
{
  loaded++;
  qf_suite_load (QF_CBW);
  config_load ();
}

static void
cbw_unload (void)
{
  if (--loaded > 0)
    return;
  config_unload ();
  disks_forget_all ();
  dirty_nodes_forget_all ();
}

/* Parameters. */

static int
cbw_config (nbdkit_next_config *next, nbdkit_backend *nxdata,
            const char *key, const char *value)
{
  g_autoptr (GError) error = NULL;
  int r = config_parse (key, value);

  if (r != 0)
    return r == 1 ? 0 : -1;
  r = control_config (key, value, &error);
  if (r == 0)
    r = dirty_nodes_config (key, value, &error);
  if (r == -1)
    return report (error);
  return r == 1 ? 0 : next (nxdata, key, value);
}

#define cbw_config_help                                                 \
  CONFIG_HELP                                                           \
  "exports=one|each            Whether each export below is a disk of\n" \
  "                            its own (default: as the plugin's dir\n" \
  "                            parameter says).\n"                      \
  CONTROL_CONFIG_HELP

static int
cbw_config_complete (nbdkit_next_config_complete *next,
                     nbdkit_backend *nxdata)
{
  if (loaded > 1) {
    nbdkit_error ("the cbw filter can be used only once in a chain");
    return -1;
  }
  return config_check () == -1 ? -1 : next (nxdata);
}

static int
cbw_get_ready (int thread_model)
{
  g_autoptr (GError) error = NULL;

  if (thread_model == NBDKIT_THREAD_MODEL_SERIALIZE_CONNECTIONS) {
    nbdkit_error ("cbw: the plugin or another filter serves one client at a "
                  "time (thread model serialize_connections), so that nobody "
                  "could read a snapshot while the disk is in use");
    return -1;
  }
  if (config.target && !target_is_uri (config.target) &&
      target_check_file (config.target, &error) == -1) {
    nbdkit_error ("cbw-target: %s", error->message);
    return -1;
  }
  config.thread_model = thread_model;
  if (qf_suite_add (QF_CBW, &error) == -1)
    return report (error);
  disks_watch ();
  commands_register ();
  return control_get_ready (&error) == -1 ? report (error) : 0;
}

/* Disks. */

/* A snapshot of the command line's cannot be made. */
static void
report_start (const GError *error)
{
  g_autofree char *message = qf_displayable (error->message, 4096);

  nbdkit_error ("cbw-snapshot%s%s%s%s: %s",
                config.target ? ", cbw-target=" : "",
                config.target ? config.target : "",
                config.bitmap ? ", cbw-bitmap=" : "",
                config.bitmap ? config.bitmap : "", message);
}

/* A view, or a guest, has opened the disk. */
static int
open_disk (struct disk *disk, nbdkit_next *next, enum dirty_access access)
{
  const int64_t size = next->get_size (next);
  g_autoptr (GError) error = NULL;

  if (size == -1)
    return -1;
  if (dirty_node_open (disk->node, size, access, &error) == -1)
    return report (error);
  disk_check_size (disk, size);
  if (disk_start (disk, &error) == -1) {
    dirty_node_close (disk->node);
    report_start (error);
    return -1;
  }
  return 0;
}

/* The layers below know it; they take a context of ours, which must be
 * read-only, for a sign that the server is.
 */
static void
start_known_disk (struct disk *disk)
{
  g_autoptr (GError) error = NULL;
  bool sized;

  dirty_lock ();
  sized = disk->node->sized;
  dirty_unlock ();
  if (sized && disk_start (disk, &error) == -1)
    report_start (error);
}

static void
open_disk_once (nbdkit_backend *backend, struct disk *disk)
{
  nbdkit_next *next = nbdkit_next_context_open (backend, 1, "", 1);

  if (!next)
    return;
  if (next->prepare (next) == 0) {
    if (open_disk (disk, next, DIRTY_UNKNOWN) == 0)
      dirty_node_close (disk->node);
    next->finalize (next);
  }
  nbdkit_next_context_close (next);
}

/* Let the one disk be known, and have its snapshots, before a client opens
 * it.  If that is not possible now, it is tried when a client comes.
 */
static void
start_disk (nbdkit_backend *backend)
{
  struct disk *disk = disk_of_node (dirty_node_of_export (""));

  if (qf_suite_has (QF_DIRTY_TRACKING))
    start_known_disk (disk);
  else
    open_disk_once (backend, disk);
}

static int
cbw_after_fork (nbdkit_backend *backend)
{
  g_autoptr (GError) error = NULL;

  qf_server_allow_limits ();
  if (!dirty_nodes_each ())
    start_disk (backend);
  if (control_after_fork (&error) == -1)
    report (error);
  return 0;
}

static void
cbw_cleanup (nbdkit_backend *backend)
{
  control_cleanup ();
  disks_end_all ();
  target_wait_for_retired ();
}

/* Exports. */

static int
cbw_list_exports (nbdkit_next_list_exports *next, nbdkit_backend *nxdata,
                  int readonly, int is_tls, struct nbdkit_exports *exports)
{
  struct nbdkit_exports *below = nbdkit_exports_new ();
  int r = -1;

  if (!below)
    return -1;
  if (next (nxdata, readonly, below) == 0)
    r = exports_list (below, exports);
  nbdkit_exports_free (below);
  return r;
}

static const char *
cbw_export_description (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->description ? h->description : next->export_description (next);
}

/* Connections. */

static void
handle_free (struct handle *h)
{
  snapshot_unref (h->s);
  g_mutex_clear (&h->lock);
  g_mutex_clear (&h->probe);
  g_free (h->base);
  g_free (h->snapshot);
  g_free (h->bitmap);
  g_free (h->description);
  g_free (h);
}

static int
fail_open (const char *fs, const char *name)
{
  g_autofree char *shown = qf_displayable (name, 512);

  nbdkit_error (fs, shown);
  return -1;
}

/* A view: "NAME" or "NAME/dirty/BITMAP". */
static void
parse_view (struct handle *h, const char *view)
{
  const char *slash = strstr (view, "/dirty/");

  h->snapshot = slash ? g_strndup (view, slash - view) : g_strdup (view);
  h->bitmap = slash ? g_strdup (slash + strlen ("/dirty/")) : NULL;
  h->description = export_describe_view (h->snapshot, h->bitmap);
}

/* Is it about a snapshot, and if so which? */
static void
parse_export (struct handle *h, const char *exportname)
{
  g_autofree char *base = NULL, *view = NULL;
  const char *kind = qf_export_name_split (exportname, &base, &view);

  if (kind && strcmp (kind, "snapshot") == 0 && export_is_disk (base)) {
    h->base = g_strdup (base);
    parse_view (h, view);
  }
  else
    h->base = g_strdup (exportname);
}

static int
find_view (struct handle *h)
{
  h->s = export_find_snapshot (h->base, h->snapshot);
  if (!h->s)
    return fail_open ("there is no snapshot with the name \"%s\"",
                      h->snapshot);
  h->bits = h->bitmap ? snapshot_frozen (h->s, h->bitmap) : NULL;
  if (h->bitmap && !h->bits)
    return fail_open ("there was no bitmap with the name \"%s\" when the "
                      "snapshot was made", h->bitmap);
  return 0;
}

/* Find it now, or if it may only be made when the disk is known, then. */
static int
find_early_view (struct handle *h)
{
  if (!h->snapshot || config_makes_snapshot (h->snapshot))
    return 0;
  return find_view (h);
}

static int
find_late_view (struct handle *h, nbdkit_next *next)
{
  struct disk *disk;

  if (!h->snapshot || h->s)
    return 0;
  disk = disk_of_node (dirty_node_of_export (h->base));
  if (open_disk (disk, next, DIRTY_UNKNOWN) == -1)
    return -1;
  dirty_node_close (disk->node);
  return find_view (h);
}

static void *
cbw_open (nbdkit_next_open *next, nbdkit_context *context, int readonly,
          const char *exportname, int is_tls)
{
  struct handle *h = g_new0 (struct handle, 1);

  g_mutex_init (&h->lock);
  g_mutex_init (&h->probe);
  h->below.probe = &h->probe;
  h->server_is_read_only = readonly;
  /* A view does not write either, but only the whole server is read-only:
   * that is what the layers below shall conclude from it.
   */
  parse_export (h, exportname);
  if (find_early_view (h) == -1 ||
      next (context, readonly, h->base) == -1) {
    handle_free (h);
    return NULL;
  }
  return h;
}

static void
leave_disk (struct handle *h)
{
  if (h->is_guest)
    disk_remove_guest (h->disk, &h->guest);
  h->is_guest = false;
  if (h->node_is_open)
    dirty_node_close (h->disk->node);
  h->node_is_open = false;
  h->disk = NULL;
}

static void
cbw_close (void *handle)
{
  leave_disk (handle);
  handle_free (handle);
}

static int
prepare_below (struct below *below, nbdkit_next *next)
{
  const int can_multi_conn = next->can_multi_conn (next);
  uint32_t minimum, preferred, maximum;

  if (can_multi_conn == -1 ||
      next->block_size (next, &minimum, &preferred, &maximum) == -1)
    return -1;
  if (config.cluster_size && config.cluster_size < minimum) {
    nbdkit_error ("cbw-cluster-size: clusters must have at least the %u bytes "
                  "that the layers below can read", minimum);
    return -1;
  }
  below->next = next;
  below->coherent = can_multi_conn;
  below->maximum = maximum ? MIN (maximum, MAX_CLUSTER_SIZE) :
    MAX_CLUSTER_SIZE;
  return 0;
}

static int
check_view (const struct handle *h, nbdkit_next *next)
{
  const int64_t size = next->get_size (next);
  int r = 0;

  if (size == -1)
    return -1;
  if ((uint64_t) size < h->s->size)
    snapshot_break (h->s, EIO, false, "the disk has become smaller");
  g_mutex_lock (&h->s->lock);
  if (h->s->reason) {
    nbdkit_error ("snapshot %s cannot be read: %s", h->s->name,
                  h->s->reason);
    r = -1;
  }
  g_mutex_unlock (&h->s->lock);
  return r;
}

static enum dirty_access
access_of (const struct handle *h, nbdkit_next *next)
{
  if (h->server_is_read_only)
    return DIRTY_READ_ONLY;
  return next->can_write (next) == 1 ? DIRTY_WRITABLE : DIRTY_READ_ONLY;
}

/* If connections may have caches, let this one's be flushed by others; then
 * nbdkit's thread model does not protect it any more.
 */
static void
prepare_guest (struct handle *h, nbdkit_next *next)
{
  if (h->below.coherent || next->can_write (next) != 1 ||
      next->can_flush (next) != 1)
    return;
  if (config.thread_model == NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS)
    h->below.lock = &h->lock;
  h->guest.below = &h->below;
  h->is_guest = true;
  disk_add_guest (h->disk, &h->guest);
}

static int
cbw_prepare (nbdkit_next *next, void *handle, int readonly)
{
  struct handle *h = handle;

  if (prepare_below (&h->below, next) == -1 ||
      find_late_view (h, next) == -1)
    return -1;
  if (h->s) {
    h->disk = disk_of_node (h->s->node);
    return check_view (h, next);
  }
  if (!export_is_disk (h->base))
    return 0;
  h->disk = disk_of_node (dirty_node_of_export (h->base));
  if (open_disk (h->disk, next, access_of (h, next)) == -1) {
    h->disk = NULL;
    return -1;
  }
  h->node_is_open = true;
  prepare_guest (h, next);
  return 0;
}

static int
cbw_finalize (nbdkit_next *next, void *handle)
{
  leave_disk (handle);
  return 0;
}

/* What can be done with a disk or a view. */

static int64_t
cbw_get_size (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? (int64_t) h->s->size : next->get_size (next);
}

/* Writing to a view is only permitted for nbdkit to let trims through. */
static int
cbw_can_write (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? config.discard : next->can_write (next);
}

static int
cbw_can_trim (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? config.discard : next->can_trim (next);
}

static int
cbw_can_zero (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? NBDKIT_ZERO_NATIVE : next->can_zero (next);
}

static int
cbw_can_fast_zero (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  /* It fails at once: nothing is faster. */
  return h->s ? 1 : next->can_fast_zero (next);
}

static int
cbw_can_flush (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? 1 : next->can_flush (next);
}

static int
cbw_can_fua (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? NBDKIT_FUA_NATIVE : next->can_fua (next);
}

static int
cbw_can_multi_conn (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? 1 : next->can_multi_conn (next);
}

static int
cbw_can_extents (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? 1 : next->can_extents (next);
}

static int
cbw_can_cache (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->s ? NBDKIT_CACHE_NONE : next->can_cache (next);
}

/* Requests. */

/* What the snapshot needs of the disk can be read; -1 with *err set. */
static int
settle (const struct handle *h, int *err)
{
  return h->below.coherent ? 0 : disk_settle (h->disk, h->s, err);
}

static int
cbw_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count,
           uint64_t offset, uint32_t flags, int *err)
{
  const struct handle *h = handle;
  int r;

  if (h->s)
    return settle (h, err) == -1 ? -1 :
      snapshot_read (h->s, &h->below, buf, count, offset, err);
  below_lock (&h->below);
  r = next->pread (next, buf, count, offset, flags, err);
  below_unlock (&h->below);
  return r;
}

/* Let a write in; -1 with *err set if it is not. */
static int
begin_write (struct handle *h, uint32_t count, uint64_t offset, int *err)
{
  if (h->s) {
    *err = EPERM;
    return -1;
  }
  if (h->disk && disk_begin_write (h->disk, &h->below, offset, count,
                                   err) == -1)
    return -1;
  below_lock (&h->below);
  return 0;
}

static void
end_write (struct handle *h)
{
  below_unlock (&h->below);
  if (h->is_guest)
    atomic_store (&h->guest.wrote, true);
  if (h->disk)
    disk_end_write (h->disk);
}

static int
cbw_pwrite (nbdkit_next *next, void *handle, const void *buf, uint32_t count,
            uint64_t offset, uint32_t flags, int *err)
{
  int r = begin_write (handle, count, offset, err);

  if (r == 0) {
    r = next->pwrite (next, buf, count, offset, flags, err);
    end_write (handle);
  }
  return r;
}

static int
cbw_zero (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
          uint32_t flags, int *err)
{
  int r = begin_write (handle, count, offset, err);

  if (r == 0) {
    r = next->zero (next, count, offset, flags, err);
    end_write (handle);
  }
  return r;
}

static int
cbw_trim (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
          uint32_t flags, int *err)
{
  struct handle *h = handle;
  int r;

  if (h->s)
    return snapshot_discard (h->s, offset, count, err);
  r = begin_write (h, count, offset, err);
  if (r == 0) {
    r = next->trim (next, count, offset, flags, err);
    end_write (h);
  }
  return r;
}

static int
cbw_flush (nbdkit_next *next, void *handle, uint32_t flags, int *err)
{
  const struct handle *h = handle;
  int r;

  if (h->s)
    return 0;
  below_lock (&h->below);
  r = next->flush (next, flags, err);
  below_unlock (&h->below);
  return r;
}

static int
cbw_extents (nbdkit_next *next, void *handle, uint32_t count,
             uint64_t offset, uint32_t flags, struct nbdkit_extents *extents,
             int *err)
{
  const struct handle *h = handle;
  int r;

  if (h->s)
    return settle (h, err) == -1 ? -1 :
      snapshot_extents (h->s, &h->below, h->bits, count, offset, flags,
                        extents, err);
  below_lock (&h->below);
  r = next->extents (next, count, offset, flags, extents, err);
  below_unlock (&h->below);
  return r;
}

static int
cbw_cache (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
           uint32_t flags, int *err)
{
  const struct handle *h = handle;
  int r;

  below_lock (&h->below);
  r = next->cache (next, count, offset, flags, err);
  below_unlock (&h->below);
  return r;
}

static struct nbdkit_filter filter = {
  .name = "cbw",
  .longname = "nbdkit cbw filter",
  .description = "Shows the disk as it was at points in time, while it is "
                 "being written.",
  .load = cbw_load,
  .unload = cbw_unload,
  .config = cbw_config,
  .config_complete = cbw_config_complete,
  .config_help = cbw_config_help,
  .get_ready = cbw_get_ready,
  .after_fork = cbw_after_fork,
  .cleanup = cbw_cleanup,
  .list_exports = cbw_list_exports,
  .export_description = cbw_export_description,
  .open = cbw_open,
  .close = cbw_close,
  .prepare = cbw_prepare,
  .finalize = cbw_finalize,
  .get_size = cbw_get_size,
  .can_write = cbw_can_write,
  .can_trim = cbw_can_trim,
  .can_zero = cbw_can_zero,
  .can_fast_zero = cbw_can_fast_zero,
  .can_flush = cbw_can_flush,
  .can_fua = cbw_can_fua,
  .can_multi_conn = cbw_can_multi_conn,
  .can_extents = cbw_can_extents,
  .can_cache = cbw_can_cache,
  .pread = cbw_pread,
  .pwrite = cbw_pwrite,
  .zero = cbw_zero,
  .trim = cbw_trim,
  .flush = cbw_flush,
  .extents = cbw_extents,
  .cache = cbw_cache,
};

/* nbdkit-filter.h defines it without a declaration. */
extern struct nbdkit_filter *filter_init (void);

NBDKIT_REGISTER_FILTER (filter)
