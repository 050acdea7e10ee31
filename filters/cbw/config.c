/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Parameters. */

#include <config.h>

#include <string.h>

#include "utils/suite.h"

#include "cbw.h"

struct config config;

void
config_load (void)
{
  if (!config.directory)
    config.directory = g_get_current_dir ();
  target_set_directory (config.directory);
}

void
config_unload (void)
{
  g_clear_pointer (&config.snapshots, g_ptr_array_unref);
  g_clear_pointer (&config.target, g_free);
  g_clear_pointer (&config.bitmap, g_free);
  g_clear_pointer (&config.directory, g_free);
  target_allow_all ();
}

static int
parse_snapshot (const char *value)
{
  g_autoptr (GError) error = NULL;

  if (snapshot_check_name (value, &error) == -1) {
    nbdkit_error ("cbw-snapshot: %s", error->message);
    return -1;
  }
  if (!config.snapshots)
    config.snapshots = g_ptr_array_new_with_free_func (g_free);
  if (config_makes_snapshot (value)) {
    nbdkit_error ("cbw-snapshot: \"%s\" was given twice", value);
    return -1;
  }
  g_ptr_array_add (config.snapshots, g_strdup (value));
  return 0;
}

/* A string that is given once. */
static int
parse_once (const char *key, const char *value, char **where)
{
  if (!*value) {
    nbdkit_error ("%s: the value is missing", key);
    return -1;
  }
  if (*where) {
    nbdkit_error ("%s: the parameter was given twice", key);
    return -1;
  }
  *where = g_strdup (value);
  return 0;
}

static int
parse_target (const char *value)
{
  if (parse_once ("cbw-target", value, &config.target) == -1)
    return -1;
  g_free (config.target);
  config.target = target_complete_name (value);
  return 0;
}

static int
parse_bitmap (const char *value)
{
  return parse_once ("cbw-bitmap", value, &config.bitmap);
}

static int
parse_on_error (const char *value)
{
  if (strcmp (value, "break-guest-write") != 0 &&
      strcmp (value, "break-snapshot") != 0) {
    nbdkit_error ("cbw-on-error: \"%s\" is not a known value; use "
                  "cbw-on-error=break-guest-write or "
                  "cbw-on-error=break-snapshot", value);
    return -1;
  }
  config.break_snapshot = strcmp (value, "break-snapshot") == 0;
  return 0;
}

static int
parse_timeout (const char *value)
{
  uint32_t seconds;

  if (nbdkit_parse_uint32_t ("cbw-timeout", value, &seconds) == -1)
    return -1;
  config.timeout = seconds;
  return 0;
}

static int
parse_cluster_size (const char *value)
{
  const int64_t size = nbdkit_parse_size (value);

  if (size < MIN_CLUSTER_SIZE || size > MAX_CLUSTER_SIZE ||
      (size & (size - 1)) != 0) {
    nbdkit_error ("cbw-cluster-size: \"%s\" is not a power of two between "
                  "4K and 16M", value);
    return -1;
  }
  config.cluster_size = size;
  return 0;
}

static int
parse_discard (const char *value)
{
  const int on = nbdkit_parse_bool (value);

  if (on == -1) {
    nbdkit_error ("cbw-discard: \"%s\" is neither on nor off", value);
    return -1;
  }
  config.discard = on;
  return 0;
}

/* What others take for disks is no target. */
static void
note_files (const char *key, const char *value)
{
  const bool is_source = strcmp (key, "qcow2-backing") == 0 ||
    strcmp (key, "qcow2-data-file") == 0;

  if (strcmp (key, "file") == 0)
    target_forbid_file (value);
  else if (strcmp (key, "dir") == 0 || strcmp (key, "directory") == 0)
    target_forbid_directory (value);
  else if (is_source && g_str_has_prefix (value, "file:"))
    target_forbid_file (value + strlen ("file:"));
  else if (is_source && g_str_has_prefix (value, "dir:"))
    target_forbid_directory (value + strlen ("dir:"));
}

int
config_parse (const char *key, const char *value)
{
  static const struct {
    const char *key;
    int (*parse) (const char *value);
  } parameters[] = {
    { "cbw-snapshot", parse_snapshot },
    { "cbw-target", parse_target },
    { "cbw-bitmap", parse_bitmap },
    { "cbw-on-error", parse_on_error },
    { "cbw-timeout", parse_timeout },
    { "cbw-cluster-size", parse_cluster_size },
    { "cbw-discard", parse_discard },
  };

  note_files (key, value);
  for (size_t i = 0; i < G_N_ELEMENTS (parameters); ++i)
    if (strcmp (key, parameters[i].key) == 0)
      return parameters[i].parse (value) == -1 ? -1 : 1;
  return 0;
}

bool
config_makes_snapshot (const char *name)
{
  return config.snapshots &&
    g_ptr_array_find_with_equal_func (config.snapshots, name, g_str_equal,
                                      NULL);
}

int
config_check (void)
{
  if (config.target && target_is_uri (config.target) &&
      !g_str_has_prefix (config.target, "nbd"))
    nbdkit_error ("cbw-target: \"%s\" is neither a file nor the URI of an NBD "
                  "server", config.target);
  else if (config.target && !config.snapshots)
    nbdkit_error ("cbw-target: there is no cbw-snapshot for which it could "
                  "be; for a snapshot that is made at run time, give it to "
                  "cbw-snapshot-create");
  else if (config.bitmap && !config.snapshots)
    nbdkit_error ("cbw-bitmap: there is no cbw-snapshot for which it could "
                  "be; for a snapshot that is made at run time, give it to "
                  "cbw-snapshot-create");
  else if (config.target && config.snapshots->len > 1)
    nbdkit_error ("cbw-target: several snapshots cannot share a target; "
                  "leave it out, or give cbw-snapshot once");
  else if (config.target && dirty_nodes_each ())
    nbdkit_error ("cbw-target: each export is a disk here, whose snapshots "
                  "cannot share a target; leave it out");
  else if (config.bitmap && !qf_suite_is_loaded (QF_DIRTY_TRACKING) &&
           !qf_suite_is_loaded (QF_BITMAP_PERSIST))
    nbdkit_error ("cbw-bitmap: there are no bitmaps: use "
                  "--filter=dirty-tracking, behind --filter=cbw");
  else
    return 0;
  return -1;
}
