/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* QMP commands that change bitmaps.  Each is an action. */

#include <config.h>

#include <errno.h>
#include <string.h>

#include <json-glib/json-glib.h>

#include "control/actions.h"
#include "control/args.h"
#include "control/commands.h"
#include "control/qmp.h"
#include "dirty/transaction.h"

/* The node that an argument names. */
static struct dirty_node *
get_node (JsonObject *args, const char *key, GError **error)
{
  const char *name;

  if (control_args_string (args, key, TRUE, &name, error) == -1)
    return NULL;
  return dirty_node_find (name, error);
}

/* The node and the bitmap's name that all these commands begin with. */
static int
get_target (JsonObject *args, const char *key, struct dirty_node **node,
            const char **name, GError **error)
{
  if (control_args_string (args, key, TRUE, name, error) == -1)
    return -1;
  *node = get_node (args, "node", error);
  return *node ? 0 : -1;
}

static int
act_add (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  struct dirty_node *node;
  const char *name;
  uint64_t granularity = 0;
  gboolean persistent, disabled;

  if (control_args_only (args, error, "node", "name", "granularity",
                         "persistent", "disabled", NULL) == -1 ||
      get_target (args, "name", &node, &name, error) == -1 ||
      control_args_uint64 (args, "granularity", FALSE, &granularity,
                           error) == -1 ||
      control_args_boolean (args, "persistent", FALSE, &persistent,
                            error) == -1 ||
      control_args_boolean (args, "disabled", FALSE, &disabled, error) == -1)
    return -1;
  if (granularity == 0 && json_object_has_member (args, "granularity"))
    granularity = 1;            /* not the default, and not allowed */
  return dirty_bitmap_add (t, node, name, granularity, persistent, !disabled,
                           error);
}

/* Actions that have no more arguments than the bitmap's name. */
static int
get_only_target (JsonObject *args, struct dirty_node **node,
                 const char **name, GError **error)
{
  if (control_args_only (args, error, "node", "name", NULL) == -1)
    return -1;
  return get_target (args, "name", node, name, error);
}

static int
act_remove (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  struct dirty_node *node;
  const char *name;

  if (get_only_target (args, &node, &name, error) == -1)
    return -1;
  return dirty_bitmap_remove (t, node, name, error);
}

static int
act_clear (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  struct dirty_node *node;
  const char *name;

  if (get_only_target (args, &node, &name, error) == -1)
    return -1;
  return dirty_bitmap_clear (t, node, name, error);
}

static int
act_enable (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  struct dirty_node *node;
  const char *name;

  if (get_only_target (args, &node, &name, error) == -1)
    return -1;
  return dirty_bitmap_record (t, node, name, true, error);
}

static int
act_disable (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  struct dirty_node *node;
  const char *name;

  if (get_only_target (args, &node, &name, error) == -1)
    return -1;
  return dirty_bitmap_record (t, node, name, false, error);
}

/* One element of a merge's list: the name of a bitmap of the same node, or
 * an object that names both.
 */
static int
merge_one (struct dirty_transaction *t, struct dirty_node *node,
           const char *target, JsonNode *element, GError **error)
{
  struct dirty_node *source_node = node;
  const char *source;

  if (JSON_NODE_HOLDS_OBJECT (element)) {
    JsonObject *args = json_node_get_object (element);

    if (control_args_only (args, error, "node", "name", NULL) == -1 ||
        get_target (args, "name", &source_node, &source, error) == -1)
      return -1;
  }
  else if (json_node_get_value_type (element) == G_TYPE_STRING)
    source = json_node_get_string (element);
  else
    return dirty_fail (error, EINVAL, "Invalid parameter type for an element "
                       "of 'bitmaps', expected: string or object");
  return dirty_bitmap_merge (t, node, target, source_node, source, error);
}

static int
act_merge (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  struct dirty_node *node;
  const char *target;
  JsonArray *bitmaps;

  if (control_args_only (args, error, "node", "target", "bitmaps",
                         NULL) == -1 ||
      get_target (args, "target", &node, &target, error) == -1 ||
      control_args_array (args, "bitmaps", &bitmaps, error) == -1)
    return -1;
  /* Without sources there is still a target to be checked. */
  if (dirty_bitmap_merge (t, node, target, node, target, error) == -1)
    return -1;
  for (guint i = 0; i < json_array_get_length (bitmaps); ++i)
    if (merge_one (t, node, target, json_array_get_element (bitmaps, i),
                   error) == -1)
      return -1;
  return 0;
}

static int
act_move (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  struct dirty_node *node, *target_node;
  const char *name, *target_name;

  if (control_args_only (args, error, "node", "name", "target-node",
                         "target-name", NULL) == -1 ||
      get_target (args, "name", &node, &name, error) == -1)
    return -1;
  target_name = name;
  if (control_args_string (args, "target-name", FALSE, &target_name,
                           error) == -1)
    return -1;
  target_node = get_node (args, "target-node", error);
  if (!target_node)
    return -1;
  return dirty_bitmap_move (t, node, name, target_node, target_name, error);
}

static const struct control_action actions[] = {
  { .name = "block-dirty-bitmap-add", .act = act_add },
  { .name = "block-dirty-bitmap-remove", .act = act_remove },
  { .name = "block-dirty-bitmap-clear", .act = act_clear },
  { .name = "block-dirty-bitmap-enable", .act = act_enable },
  { .name = "block-dirty-bitmap-disable", .act = act_disable },
  { .name = "block-dirty-bitmap-merge", .act = act_merge },
  { .name = "block-dirty-bitmap-move", .act = act_move },
};

/* A copy of the set of the bitmap that arguments name, or NULL. */
static struct dirty_bits *
copy_target (JsonObject *args, GError **error)
{
  struct dirty_node *node;
  struct dirty_bitmap *bitmap = NULL;
  struct dirty_bits *bits = NULL;
  const char *name;

  dirty_lock ();
  if (get_only_target (args, &node, &name, error) == 0)
    bitmap = dirty_bitmap_find (node, name, error);
  if (bitmap)
    bits = dirty_bits_copy (bitmap->bits);
  dirty_unlock ();
  return bits;
}

static JsonNode *
sha256 (JsonObject *args, gpointer opaque, GError **error)
{
  struct dirty_bits *bits = copy_target (args, error);
  g_autofree char *sum = NULL;
  JsonObject *object;
  JsonNode *result;

  if (!bits)
    return NULL;
  sum = dirty_bits_sha256 (bits); /* which may take long */
  dirty_bits_free (bits);
  object = json_object_new ();
  json_object_set_string_member (object, "sha256", sum);
  result = json_node_new (JSON_NODE_OBJECT);
  json_node_take_object (result, object);
  return result;
}

void
control_register_bitmap_commands (void)
{
  for (size_t i = 0; i < G_N_ELEMENTS (actions); ++i)
    control_register_action (&actions[i]);
  control_register_command ("x-debug-block-dirty-bitmap-sha256", sha256,
                            NULL);
}
