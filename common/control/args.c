/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <string.h>

#include "control/args.h"

G_DEFINE_QUARK (control-error-quark, control_error)

int
control_fail (GError **error, const char *fs, ...)
{
  va_list args;

  va_start (args, fs);
  g_propagate_error (error, g_error_new_valist (CONTROL_ERROR, 0, fs, args));
  va_end (args);
  return -1;
}

static gboolean
is_listed (const char *name, va_list list)
{
  const char *known;

  while ((known = va_arg (list, const char *)) != NULL)
    if (strcmp (name, known) == 0)
      return TRUE;
  return FALSE;
}

int
control_args_only (JsonObject *args, GError **error, ...)
{
  JsonObjectIter iter;
  const char *name;
  int r = 0;

  json_object_iter_init (&iter, args);
  while (r == 0 && json_object_iter_next (&iter, &name, NULL)) {
    va_list list;

    va_start (list, error);
    if (!is_listed (name, list))
      r = control_fail (error, "Parameter '%s' is unexpected", name);
    va_end (list);
  }
  return r;
}

/* The member, or NULL; *r is -1 if that is an error. */
static JsonNode *
get (JsonObject *args, const char *name, gboolean required, int *r,
     GError **error)
{
  JsonNode *node = json_object_get_member (args, name);

  *r = 0;
  if (!node && required)
    *r = control_fail (error, "Parameter '%s' is missing", name);
  return node;
}

static int
wrong_type (const char *name, const char *expected, GError **error)
{
  return control_fail (error, "Invalid parameter type for '%s', expected: %s",
                       name, expected);
}

int
control_args_string (JsonObject *args, const char *name, gboolean required,
                     const char **value, GError **error)
{
  int r;
  JsonNode *node = get (args, name, required, &r, error);

  if (!node)
    return r;
  if (json_node_get_value_type (node) != G_TYPE_STRING)
    return wrong_type (name, "string", error);
  *value = json_node_get_string (node);
  return 0;
}

int
control_args_uint64 (JsonObject *args, const char *name, gboolean required,
                     uint64_t *value, GError **error)
{
  int r;
  JsonNode *node = get (args, name, required, &r, error);

  if (!node)
    return r;
  if (json_node_get_value_type (node) != G_TYPE_INT64)
    return wrong_type (name, "integer", error);
  if (json_node_get_int (node) < 0)
    return control_fail (error, "Parameter '%s' must not be negative", name);
  *value = json_node_get_int (node);
  return 0;
}

int
control_args_boolean (JsonObject *args, const char *name,
                      gboolean default_value, gboolean *value, GError **error)
{
  int r;
  JsonNode *node = get (args, name, FALSE, &r, error);

  *value = default_value;
  if (!node)
    return r;
  if (json_node_get_value_type (node) != G_TYPE_BOOLEAN)
    return wrong_type (name, "boolean", error);
  *value = json_node_get_boolean (node);
  return 0;
}

int
control_args_array (JsonObject *args, const char *name, JsonArray **value,
                    GError **error)
{
  int r;
  JsonNode *node = get (args, name, TRUE, &r, error);

  if (!node)
    return r;
  if (!JSON_NODE_HOLDS_ARRAY (node))
    return wrong_type (name, "array", error);
  *value = json_node_get_array (node);
  return 0;
}

int
control_args_object (JsonObject *args, const char *name, JsonObject **value,
                     GError **error)
{
  int r;
  JsonNode *node = get (args, name, TRUE, &r, error);

  if (!node)
    return r;
  if (!JSON_NODE_HOLDS_OBJECT (node))
    return wrong_type (name, "object", error);
  *value = json_node_get_object (node);
  return 0;
}
