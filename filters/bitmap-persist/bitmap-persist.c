/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* nbdkit-bitmap-persist-filter: keeps dirty bitmaps in qcow2 metadata.
 *
 * How bitmaps survive is in common/dirty/persist.h.  Here it is told when
 * the disk is opened, when somebody writes, and when nobody does any more.
 */

#include <config.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "control/commands.h"
#include "control/control.h"
#include "utils/displayable.h"
#include "utils/export-name.h"
#include "utils/server.h"
#include "utils/suite.h"

#include "bitmap-persist.h"
#include "../local-file.h"

#define DEFAULT_SYNC 30         /* seconds */

static struct {
  char *sidecar;                /* NULL: the image below */
  unsigned sync;
  bool intent;
  unsigned granularity_bits;    /* of the intent; 0: by the disk's size */
  struct local_file file;       /* which may be the disk */
} config = { .sync = DEFAULT_SYNC, .intent = true };

/* Times that the filter stands in the chain. */
static unsigned loaded;

static bool read_only;          /* the server */
static struct dirty_container *sidecar; /* NULL: the image's is used */
static bool requests_only;      /* can it be used */
static struct dirty_persist *persist;

struct handle {
  char *base;
  bool is_read_only;
  struct dirty_node *node;      /* NULL until prepared, and for snapshots */
  atomic_bool wrote;
};

static int
report (const GError *error)
{
  g_autofree char *message = qf_displayable (error->message, 4096);

  nbdkit_error ("bitmap-persist: %s", message);
  return -1;
}

static void
bitmap_persist_load (void)
{
  loaded++;
  qf_suite_load (QF_BITMAP_PERSIST);
}

static void
bitmap_persist_unload (void)
{
  if (--loaded > 0)
    return;
  g_clear_pointer (&sidecar, sidecar_free);
  g_clear_pointer (&config.sidecar, free);
  local_file_clear (&config.file);
}

/* Parameters. */

static int
parse_store (const char *value)
{
  if (!*value) {
    nbdkit_error ("bitmap-store: the name of a file is missing; use "
                  "bitmap-store=FILE or bitmap-store=image");
    return -1;
  }
  free (config.sidecar);
  config.sidecar = NULL;
  if (strcmp (value, "image") == 0)
    return 0;
  config.sidecar = nbdkit_absolute_path (value);
  return config.sidecar ? 0 : -1;
}

static int
parse_intent (const char *value)
{
  if (strcmp (value, "on") != 0 && strcmp (value, "off") != 0) {
    nbdkit_error ("bitmap-intent: \"%s\" is not a known value; use "
                  "bitmap-intent=on or bitmap-intent=off", value);
    return -1;
  }
  config.intent = strcmp (value, "on") == 0;
  return 0;
}

static int
parse_granularity (const char *value)
{
  const int bits = dirty_granularity_bits (nbdkit_parse_size (value));

  if (bits == -1) {
    nbdkit_error ("bitmap-intent-granularity: \"%s\" is not a power of two "
                  "between 512 and 2G", value);
    return -1;
  }
  config.granularity_bits = bits;
  return 0;
}

static int
bitmap_persist_config (nbdkit_next_config *next, nbdkit_backend *nxdata,
                       const char *key, const char *value)
{
  g_autoptr (GError) error = NULL;
  int r;

  if (strcmp (key, "bitmap-store") == 0)
    return parse_store (value);
  if (strcmp (key, "bitmap-sync") == 0)
    return nbdkit_parse_unsigned ("bitmap-sync", value, &config.sync);
  if (strcmp (key, "bitmap-intent") == 0)
    return parse_intent (value);
  if (strcmp (key, "bitmap-intent-granularity") == 0)
    return parse_granularity (value);
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

#define bitmap_persist_config_help                                      \
  "bitmap-store=image|FILE     Where bitmaps are kept: in the image that\n" \
  "                            the qcow2 filter serves (default if there\n" \
  "                            is one), or in this file.\n"             \
  "bitmap-sync=SECONDS         Store them that often (default 30); 0: only\n" \
  "                            when the last writer has gone.\n"        \
  "bitmap-intent=on|off        Let bitmaps survive crashes (default on).\n" \
  "bitmap-intent-granularity=SIZE\n"                                    \
  "                            Regions that may be dirty after a crash\n" \
  "                            (default: a 4096th of the disk, 64K to\n" \
  "                            16M).\n"                                 \
  CONTROL_CONFIG_HELP

static int
bitmap_persist_config_complete (nbdkit_next_config_complete *next,
                                nbdkit_backend *nxdata)
{
  if (loaded > 1) {
    nbdkit_error ("the bitmap-persist filter can be used only once in a "
                  "chain");
    return -1;
  }
  if (dirty_nodes_each ()) {
    nbdkit_error ("the bitmap-persist filter keeps the bitmaps of one disk, "
                  "but here each export is a disk of its own");
    return -1;
  }
  if (!config.sidecar && !qf_suite_is_loaded (QF_QCOW2)) {
    nbdkit_error ("there is no image in which bitmaps can be stored: use "
                  "bitmap-store=FILE, or add --filter=qcow2 after "
                  "--filter=bitmap-persist");
    return -1;
  }
  return next (nxdata);
}

/* A file that is likely to be the disk. */
static const char *
disk_file (void)
{
  return qf_suite_is_loaded (QF_QCOW2) ? NULL :
    local_file_whole (&config.file);
}

/* NULL with error set. */
static struct dirty_container *
choose_container (GError **error)
{
  struct dirty_node *node = dirty_node_of_export ("");

  if (config.sidecar) {
    sidecar = sidecar_new (config.sidecar, disk_file (),
                           config.file.other_keys);
    return sidecar;
  }
  if (!node->container && !qf_suite_has (QF_QCOW2))
    dirty_fail (error, EINVAL, "bitmap-store=image: wrong order of filters: "
                "--filter=bitmap-persist must stand before --filter=qcow2");
  else if (!node->container)
    dirty_fail (error, EINVAL, "bitmap-store=image: what the qcow2 filter "
                "serves is not an image's own disk");
  return node->container;
}

/* What happens to bitmaps. */
static void
tell (const char *message)
{
  g_autofree char *shown = qf_displayable (message, 4096);

  nbdkit_error ("bitmap-persist: %s", shown);
}

static int
make_persist (GError **error)
{
  const struct dirty_persist_options options = {
    .writable = !read_only,
    .intent = config.intent,
    .intent_granularity_bits = config.granularity_bits,
    .report = tell,
  };
  struct dirty_container *container = choose_container (error);

  requests_only = container && container->requests_only;
  if (!container ||
      container->check (container, options.writable, error) == -1)
    return -1;
  /* A server that may not make the file has no bitmaps. */
  if (read_only && sidecar && !g_file_test (config.sidecar,
                                            G_FILE_TEST_EXISTS))
    nbdkit_debug ("bitmap-persist: %s does not exist", config.sidecar);
  else
    persist = dirty_persist_new (dirty_node_of_export (""), container,
                                 &options);
  return 0;
}

static int
bitmap_persist_get_ready (int thread_model)
{
  g_autoptr (GError) error = NULL;

  read_only = qf_server_is_read_only ();
  if (qf_suite_add (QF_BITMAP_PERSIST, &error) == -1 ||
      make_persist (&error) == -1)
    return report (error);
  control_register_bitmap_commands ();
  control_register_persist_commands ();
  return control_get_ready (&error) == -1 ? report (error) : 0;
}

/* Connections. */

static bool
tracks (void)
{
  return qf_suite_is_loaded (QF_DIRTY_TRACKING);
}

static enum dirty_access
access_of (const struct handle *h, nbdkit_next *next)
{
  if (read_only)
    return DIRTY_READ_ONLY;
  if (h->is_read_only)
    return DIRTY_UNKNOWN;
  return next->can_write (next) == 1 ? DIRTY_WRITABLE : DIRTY_READ_ONLY;
}

/* Without the dirty-tracking filter nobody else does it. */
static int
open_node (struct handle *h, nbdkit_next *next, struct dirty_node *node,
           GError **error)
{
  const int64_t size = next->get_size (next);

  if (size == -1)
    return -1;
  if (persist && dirty_persist_load (persist, size, error) == -1)
    return -1;
  if (!tracks () &&
      dirty_node_open (node, size, access_of (h, next), error) == -1)
    return -1;
  h->node = node;
  return 0;
}

static void
leave_node (struct handle *h)
{
  if (h->node && !tracks ())
    dirty_node_close (h->node);
  h->node = NULL;
  if (atomic_exchange (&h->wrote, false)) {
    dirty_persist_remove_writer (persist);
    sync_now (persist, false);
  }
}

static void
handle_free (struct handle *h)
{
  g_free (h->base);
  g_free (h);
}

static void *
bitmap_persist_open (nbdkit_next_open *next, nbdkit_context *context,
                     int readonly, const char *exportname, int is_tls)
{
  struct handle *h = g_new0 (struct handle, 1);

  h->base = g_strdup (exportname);
  h->is_read_only = readonly;
  if (next (context, readonly, exportname) == -1) {
    handle_free (h);
    return NULL;
  }
  return h;
}

static int
bitmap_persist_prepare (nbdkit_next *next, void *handle, int readonly)
{
  struct handle *h = handle;
  g_autoptr (GError) error = NULL;

  if (qf_export_name_is_snapshot (h->base) ||
      open_node (h, next, dirty_node_of_export (h->base), &error) == 0)
    return 0;
  return error ? report (error) : -1;
}

static int
bitmap_persist_finalize (nbdkit_next *next, void *handle)
{
  leave_node (handle);
  return 0;
}

static void
bitmap_persist_close (void *handle)
{
  leave_node (handle);
  handle_free (handle);
}

/* Let the one disk be known before a client opens it.  If that is not
 * possible now, it is when a client comes.
 */
static void
open_disk_once (nbdkit_backend *backend)
{
  nbdkit_next *next = nbdkit_next_context_open (backend, 1, "", 1);
  struct handle h = { .is_read_only = true };
  g_autoptr (GError) error = NULL;

  if (!next)
    return;
  if (next->prepare (next) == 0) {
    if (open_node (&h, next, dirty_node_of_export (""), &error) == 0)
      leave_node (&h);
    else if (error)
      report (error);
    next->finalize (next);
  }
  nbdkit_next_context_close (next);
}

static int
bitmap_persist_after_fork (nbdkit_backend *backend)
{
  g_autoptr (GError) error = NULL;

  qf_server_allow_limits ();
  open_disk_once (backend);
  if (persist && !read_only)
    sync_start (persist, config.sync);
  if (control_after_fork (&error) == -1)
    report (error);
  return 0;
}

static void
bitmap_persist_cleanup (nbdkit_backend *backend)
{
  control_cleanup ();
  sync_stop ();
  if (persist) {
    sync_now (persist, true);
    g_clear_pointer (&persist, dirty_persist_free);
  }
}

/* Writes. */

/* -1: the write must not be passed on; *err is set. */
static int
begin_write (struct handle *h, uint32_t count, uint64_t offset, int *err)
{
  struct dirty_node *node = h->node;
  g_autoptr (GError) error = NULL;

  if (!node || !persist)
    return 0;
  dirty_gate_enter (&node->gates[DIRTY_GATE_PERSIST]);
  if (!atomic_load (&h->wrote) && !atomic_exchange (&h->wrote, true))
    dirty_persist_add_writer (persist);
  if (!tracks ())
    dirty_node_mark (node, offset, count);
  if (dirty_persist_begin_write (persist, offset, count, &error) == 0)
    return 0;
  dirty_gate_leave (&node->gates[DIRTY_GATE_PERSIST]);
  /* What has another meaning for clients, or none, is EIO. */
  *err = error->code == 0 || error->code == ENOTSUP ||
    error->code == EOPNOTSUPP ? EIO : error->code;
  return report (error);
}

static void
end_write (const struct handle *h)
{
  if (!h->node || !persist)
    return;
  dirty_gate_leave (&h->node->gates[DIRTY_GATE_PERSIST]);
  if (requests_only)
    sync_sometimes (persist);
}

static int
bitmap_persist_pwrite (nbdkit_next *next, void *handle, const void *buf,
                       uint32_t count, uint64_t offset, uint32_t flags,
                       int *err)
{
  int r;

  if (begin_write (handle, count, offset, err) == -1)
    return -1;
  r = next->pwrite (next, buf, count, offset, flags, err);
  end_write (handle);
  return r;
}

static int
bitmap_persist_trim (nbdkit_next *next, void *handle, uint32_t count,
                     uint64_t offset, uint32_t flags, int *err)
{
  int r;

  if (begin_write (handle, count, offset, err) == -1)
    return -1;
  r = next->trim (next, count, offset, flags, err);
  end_write (handle);
  return r;
}

static int
bitmap_persist_zero (nbdkit_next *next, void *handle, uint32_t count,
                     uint64_t offset, uint32_t flags, int *err)
{
  int r;

  if (begin_write (handle, count, offset, err) == -1)
    return -1;
  r = next->zero (next, count, offset, flags, err);
  end_write (handle);
  return r;
}

static struct nbdkit_filter filter = {
  .name = "bitmap-persist",
  .longname = "nbdkit bitmap-persist filter",
  .description = "Keeps dirty bitmaps in qcow2 metadata.",
  .load = bitmap_persist_load,
  .unload = bitmap_persist_unload,
  .config = bitmap_persist_config,
  .config_complete = bitmap_persist_config_complete,
  .config_help = bitmap_persist_config_help,
  .get_ready = bitmap_persist_get_ready,
  .after_fork = bitmap_persist_after_fork,
  .cleanup = bitmap_persist_cleanup,
  .open = bitmap_persist_open,
  .close = bitmap_persist_close,
  .prepare = bitmap_persist_prepare,
  .finalize = bitmap_persist_finalize,
  .pwrite = bitmap_persist_pwrite,
  .trim = bitmap_persist_trim,
  .zero = bitmap_persist_zero,
};

/* nbdkit-filter.h defines it without a declaration. */
extern struct nbdkit_filter *filter_init (void);

NBDKIT_REGISTER_FILTER (filter)
