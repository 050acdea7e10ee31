/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Actions are kept in a table, to which filters add theirs.  A command is
 * a transaction of one.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "control/actions.h"
#include "control/args.h"
#include "control/qmp.h"

static GPtrArray *actions;      /* of const struct control_action */

static int
act_abort (struct dirty_transaction *t, JsonObject *args, GError **error)
{
  if (control_args_only (args, error, NULL) == -1)
    return -1;
  return dirty_fail (error, ECANCELED, "The transaction was aborted by its "
                     "abort action");
}

/* It is no command. */
static const struct control_action abort_action = {
  .name = "abort", .act = act_abort
};

static const struct control_action *
find_action (const char *name)
{
  for (guint i = 0; i < actions->len; ++i) {
    const struct control_action *action = g_ptr_array_index (actions, i);

    if (strcmp (action->name, name) == 0)
      return action;
  }
  return NULL;
}

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
  const struct control_action *action;
  JsonObject *args;
  gpointer prepared;
};

static int
prepare (struct request *requests, size_t n, GError **error)
{
  for (size_t i = 0; i < n; ++i) {
    struct request *request = &requests[i];

    if (request->action->prepare) {
      request->prepared = request->action->prepare (request->args, error);
      if (!request->prepared)
        return -1;
    }
  }
  return 0;
}

static void
release (struct request *requests, size_t n)
{
  for (size_t i = 0; i < n; ++i)
    if (requests[i].prepared)
      requests[i].action->release (requests[i].prepared);
}

static int
act (struct dirty_transaction *t, const struct request *request,
     GError **error)
{
  const struct control_action *action = request->action;

  return action->act ? action->act (t, request->args, error) :
    action->act_prepared (t, request->prepared, error);
}

/* All or nothing. */
static int
run_prepared (const struct request *requests, size_t n, GError **error)
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
    r = act (t, &requests[i], error);
  r = dirty_transaction_end (t, r, error);
  dirty_unlock ();
  dirty_changes_unlock ();
  return r;
}

static int
run (struct request *requests, size_t n, GError **error)
{
  int r = prepare (requests, n, error);

  if (r == 0)
    r = run_prepared (requests, n, error);
  release (requests, n);
  return r;
}

static JsonNode *
run_command (JsonObject *args, gpointer opaque, GError **error)
{
  struct request request = { .action = opaque, .args = args };

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
  request->action = find_action (type);
  if (!request->action)
    return dirty_fail (error, EINVAL, "Parameter 'type' does not accept value "
                       "'%s'", type);
  return 0;
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
  requests = g_new0 (struct request, n);
  for (guint i = 0; i < n; ++i)
    if (parse_action (json_array_get_element (list, i), &requests[i],
                      error) == -1)
      return NULL;
  run (requests, n, error);
  return NULL;
}

void
control_register_action (const struct control_action *action)
{
  if (!actions) {
    actions = g_ptr_array_new ();
    g_ptr_array_add (actions, (gpointer) &abort_action);
    control_register_command ("transaction", transaction, NULL);
  }
  if (!find_action (action->name))
    g_ptr_array_add (actions, (gpointer) action);
  control_register_command (action->name, run_command, (gpointer) action);
}
