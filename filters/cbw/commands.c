/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* QMP: making, deleting and looking at snapshots. */

#include <config.h>

#include <errno.h>
#include <string.h>

#include <json-glib/json-glib.h>

#include "control/actions.h"
#include "control/args.h"
#include "control/qmp.h"

#include "cbw.h"

/* How long deleting waits for the space to be freed, in seconds.  What
 * takes longer goes on in the background.
 */
#define DELETE_SECONDS 6

/* Create. */

static int
parse_on_error (const char *value, bool *break_snapshot, GError **error)
{
  if (strcmp (value, "break-guest-write") != 0 &&
      strcmp (value, "break-snapshot") != 0)
    return dirty_fail (error, EINVAL, "Parameter 'on-cbw-error' does not "
                       "accept value '%s'", value);
  *break_snapshot = strcmp (value, "break-snapshot") == 0;
  return 0;
}

struct create {
  struct disk *disk;
  struct snapshot *s;
};

/* The disk, its size, and whether there is a snapshot or no such bitmap. */
static struct disk *
find_disk (const char *node_name, const struct snapshot_options *options,
           uint64_t *size, GError **error)
{
  struct dirty_node *node;
  struct disk *disk = NULL;

  dirty_lock ();
  node = dirty_node_find (node_name, error);
  if (node) {
    disk = disk_of_known_node (node);
    if (!disk || !node->sized)
      dirty_fail (error, EINVAL, "Node '%s' has not been opened yet, so the "
                  "size of its disk is not known", node_name);
    else if (disk_find (disk, options->name))
      dirty_fail (error, EEXIST, "Snapshot already exists: '%s' of node '%s'",
                  options->name, node_name);
    else {
      *size = node->size;
      dirty_unlock ();
      return disk;
    }
  }
  dirty_unlock ();
  return NULL;
}

static int
parse_create (JsonObject *args, const char **node,
              struct snapshot_options *options, GError **error)
{
  const char *on_error = NULL;

  if (control_args_only (args, error, "node", "name", "bitmap", "target",
                         "on-cbw-error", "cbw-timeout", NULL) == -1 ||
      control_args_string (args, "node", TRUE, node, error) == -1 ||
      control_args_string (args, "name", TRUE, &options->name, error) == -1 ||
      control_args_string (args, "bitmap", FALSE, &options->bitmap,
                           error) == -1 ||
      control_args_string (args, "target", FALSE, &options->target,
                           error) == -1 ||
      control_args_string (args, "on-cbw-error", FALSE, &on_error,
                           error) == -1 ||
      control_args_uint64 (args, "cbw-timeout", FALSE, &options->timeout,
                           error) == -1)
    return -1;
  if (options->timeout > G_MAXUINT32)
    return dirty_fail (error, EINVAL, "Parameter 'cbw-timeout' must be at "
                       "most %u seconds", G_MAXUINT32);
  if (options->target && !*options->target)
    return dirty_fail (error, EINVAL, "Parameter 'target' must not be empty; "
                       "leave it out for a temporary file");
  if (on_error && parse_on_error (on_error, &options->break_snapshot,
                                  error) == -1)
    return -1;
  return snapshot_check_name (options->name, error);
}

static gpointer
prepare_create (JsonObject *args, GError **error)
{
  struct snapshot_options options = {
    .break_snapshot = config.break_snapshot,
    .timeout = config.timeout,
    .cluster_size = config.cluster_size,
  };
  g_autofree char *target = NULL;
  const char *node;
  struct create create;
  uint64_t size;

  if (parse_create (args, &node, &options, error) == -1)
    return NULL;
  create.disk = find_disk (node, &options, &size, error);
  if (!create.disk)
    return NULL;
  if (options.target)
    options.target = target = target_complete_name (options.target);
  create.s = snapshot_new (create.disk->node, size, &options, error);
  return create.s ? g_memdup2 (&create, sizeof create) : NULL;
}

static int
act_create (struct dirty_transaction *t, gpointer prepared, GError **error)
{
  const struct create *create = prepared;

  return disk_add (t, create->disk, create->s, error);
}

/* If it has not come to pass, this frees the snapshot and its target. */
static void
release_create (gpointer prepared)
{
  struct create *create = prepared;

  snapshot_unref (create->s);
  g_free (create);
}

static const struct control_action create_action = {
  .name = "cbw-snapshot-create",
  .prepare = prepare_create,
  .act_prepared = act_create,
  .release = release_create,
};

/* Delete. */

/* Freed by the last of the two who are done with it. */
struct deletion {
  refs refs;
  GMutex lock;
  GCond cond;
  bool done;
};

static void
deletion_unref (struct deletion *deletion)
{
  if (!refs_dec (&deletion->refs))
    return;
  g_mutex_clear (&deletion->lock);
  g_cond_clear (&deletion->cond);
  g_free (deletion);
}

static void
deleted (gpointer opaque, int error)
{
  struct deletion *deletion = opaque;

  g_mutex_lock (&deletion->lock);
  deletion->done = true;
  g_cond_signal (&deletion->cond);
  g_mutex_unlock (&deletion->lock);
  deletion_unref (deletion);
}

static void
delete_and_wait (struct snapshot *s)
{
  struct deletion *deletion = g_new0 (struct deletion, 1);
  const gint64 limit = g_get_monotonic_time () +
    DELETE_SECONDS * G_USEC_PER_SEC;

  refs_init (&deletion->refs, 2);
  g_mutex_init (&deletion->lock);
  g_cond_init (&deletion->cond);
  snapshot_delete (s, "it has been deleted", deleted, deletion);
  g_mutex_lock (&deletion->lock);
  while (!deletion->done &&
         g_cond_wait_until (&deletion->cond, &deletion->lock, limit))
    ;
  g_mutex_unlock (&deletion->lock);
  deletion_unref (deletion);
}

static JsonNode *
delete (JsonObject *args, gpointer opaque, GError **error)
{
  const char *node, *name;
  struct snapshot *s;

  if (control_args_only (args, error, "node", "name", NULL) == -1 ||
      control_args_string (args, "node", TRUE, &node, error) == -1 ||
      control_args_string (args, "name", TRUE, &name, error) == -1)
    return NULL;
  s = disk_remove (node, name, error);
  if (!s)
    return NULL;
  delete_and_wait (s);
  snapshot_unref (s);
  return NULL;
}

/* Query. */

static JsonArray *
describe_bitmaps (const struct snapshot *s)
{
  JsonArray *array = json_array_new ();

  for (guint i = 0; i < s->frozen->len; ++i) {
    const struct frozen *frozen = g_ptr_array_index (s->frozen, i);

    json_array_add_string_element (array, frozen->name);
  }
  return array;
}

static void
describe (struct snapshot *s, gpointer opaque)
{
  JsonObject *object = json_object_new ();

  json_object_set_string_member (object, "node", s->node->name);
  json_object_set_string_member (object, "name", s->name);
  json_object_set_string_member (object, "target", s->target_name);
  if (s->bitmap)
    json_object_set_string_member (object, "bitmap", s->bitmap);
  json_object_set_array_member (object, "dirty-bitmaps",
                                describe_bitmaps (s));
  json_object_set_string_member (object, "on-cbw-error", s->break_snapshot ?
                                 "break-snapshot" : "break-guest-write");
  json_object_set_int_member (object, "cbw-timeout", s->timeout);
  json_object_set_int_member (object, "size", s->size);
  json_object_set_int_member (object, "cluster-size",
                              snapshot_cluster_size (s));
  g_mutex_lock (&s->lock);
  json_object_set_int_member (object, "bytes-copied", s->copied);
  json_object_set_int_member (object, "bytes-accessible",
                              s->reason ? 0 : s->accessible);
  json_object_set_string_member (object, "state",
                                 s->reason ? "broken" : "active");
  if (s->reason)
    json_object_set_string_member (object, "reason", s->reason);
  g_mutex_unlock (&s->lock);
  json_array_add_object_element (opaque, object);
}

static JsonNode *
query (JsonObject *args, gpointer opaque, GError **error)
{
  JsonNode *result;
  JsonArray *array;

  if (control_args_only (args, error, NULL) == -1)
    return NULL;
  array = json_array_new ();
  dirty_lock ();
  disk_foreach_snapshot (describe, array);
  dirty_unlock ();
  result = json_node_new (JSON_NODE_ARRAY);
  json_node_take_array (result, array);
  return result;
}

void
commands_register (void)
{
  control_register_action (&create_action);
  control_register_command ("cbw-snapshot-delete", delete, NULL);
  control_register_command ("query-cbw-snapshots", query, NULL);
}
