/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* QMP commands that change bitmaps.  Each is an action; alone it is a
 * transaction of one.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include <json-glib/json-glib.h>

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

static int
act_abort (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  if (control_args_only (args, error, NULL) == -1)
    return -1;
  return dirty_fail (error, ECANCELED, "The transaction was aborted by its "
                     "abort action");
}

struct action {
  const char *name;
  int (*act) (struct dirty_transaction *t, JsonObject *args, GError **error);
};

static const struct action actions[] = {
  { "block-dirty-bitmap-add", act_add },
  { "block-dirty-bitmap-remove", act_remove },
  { "block-dirty-bitmap-clear", act_clear },
  { "block-dirty-bitmap-enable", act_enable },
  { "block-dirty-bitmap-disable", act_disable },
  { "block-dirty-bitmap-merge", act_merge },
  { "block-dirty-bitmap-move", act_move },
  { "abort", act_abort },       /* the last: it is not a command */
};

#define NR_COMMANDS (G_N_ELEMENTS (actions) - 1)

/* Add the node that a member names, if there is one; what else may be
 * wrong with it is found out later.
 */
static void
collect_node (JsonObject *args, const char *key, GPtrArray *nodes)
{
  JsonNode *member = json_object_get_member (args, key);
  struct dirty_node *node = NULL;

  if (member && json_node_get_value_type (member) == G_TYPE_STRING)
    node = dirty_node_find (json_node_get_string (member), NULL);
  if (node)
    g_ptr_array_add (nodes, node);
}

/* All nodes that an action touches. */
static void
collect_nodes (JsonObject *args, GPtrArray *nodes)
{
  JsonNode *bitmaps = json_object_get_member (args, "bitmaps");

  collect_node (args, "node", nodes);
  collect_node (args, "target-node", nodes);
  if (bitmaps && JSON_NODE_HOLDS_ARRAY (bitmaps)) {
    JsonArray *array = json_node_get_array (bitmaps);

    for (guint i = 0; i < json_array_get_length (array); ++i) {
      JsonNode *element = json_array_get_element (array, i);

      if (JSON_NODE_HOLDS_OBJECT (element))
        collect_node (json_node_get_object (element), "node", nodes);
    }
  }
}

/* What is to be done, in order. */
struct request {
  const struct action *action;
  JsonObject *args;
};

/* All or nothing. */
static int
run (const struct request *requests, size_t n, GError **error)
{
  g_autoptr (GPtrArray) nodes = g_ptr_array_new ();
  struct dirty_transaction *t;
  int r = 0;

  dirty_changes_lock ();
  dirty_lock ();
  for (size_t i = 0; i < n; ++i)
    collect_nodes (requests[i].args, nodes);
  t = dirty_transaction_begin (nodes);
  for (size_t i = 0; i < n && r == 0; ++i)
    r = requests[i].action->act (t, requests[i].args, error);
  if (r == 0)
    r = dirty_transaction_commit (t, error);
  else
    dirty_transaction_abort (t);
  dirty_unlock ();
  dirty_changes_unlock ();
  return r;
}

static JsonNode *
run_command (JsonObject *args, gpointer opaque, GError **error)
{
  const struct request request = { opaque, args };

  run (&request, 1, error);
  return NULL;
}

static int
parse_action (JsonNode *element, struct request *request, GError **error)
{
  JsonObject *object;
  const char *type;

  if (!JSON_NODE_HOLDS_OBJECT (element))
    return dirty_fail (error, EINVAL, "Invalid parameter type for an element "
                       "of 'actions', expected: object");
  object = json_node_get_object (element);
  if (control_args_only (object, error, "type", "data", NULL) == -1 ||
      control_args_string (object, "type", TRUE, &type, error) == -1 ||
      control_args_object (object, "data", &request->args, error) == -1)
    return -1;
  for (size_t i = 0; i < G_N_ELEMENTS (actions); ++i)
    if (strcmp (actions[i].name, type) == 0) {
      request->action = &actions[i];
      return 0;
    }
  return dirty_fail (error, EINVAL, "Parameter 'type' does not accept value "
                     "'%s'", type);
}

/* The only mode there is: actions here are done when they return. */
static int
check_properties (JsonObject *args, GError **error)
{
  JsonObject *properties;
  const char *mode = "individual";

  if (!json_object_has_member (args, "properties"))
    return 0;
  if (control_args_object (args, "properties", &properties, error) == -1 ||
      control_args_only (properties, error, "completion-mode", NULL) == -1 ||
      control_args_string (properties, "completion-mode", FALSE, &mode,
                           error) == -1)
    return -1;
  if (strcmp (mode, "individual") != 0)
    return dirty_fail (error, EINVAL, "Parameter 'completion-mode' does not "
                       "accept value '%s'; use 'individual'", mode);
  return 0;
}

static JsonNode *
transaction (JsonObject *args, gpointer opaque, GError **error)
{
  g_autofree struct request *requests = NULL;
  JsonArray *list;
  guint n;

  if (control_args_only (args, error, "actions", "properties", NULL) == -1 ||
      control_args_array (args, "actions", &list, error) == -1 ||
      check_properties (args, error) == -1)
    return NULL;
  n = json_array_get_length (list);
  requests = g_new (struct request, n);
  for (guint i = 0; i < n; ++i)
    if (parse_action (json_array_get_element (list, i), &requests[i],
                      error) == -1)
      return NULL;
  run (requests, n, error);
  return NULL;
}

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
  for (size_t i = 0; i < NR_COMMANDS; ++i)
    control_register_command (actions[i].name, run_command,
                              (gpointer) &actions[i]);
  control_register_command ("transaction", transaction, NULL);
  control_register_command ("x-debug-block-dirty-bitmap-sha256", sha256,
                            NULL);
}
