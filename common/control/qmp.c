/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What clients send is a stream of JSON objects, with or without white
 * space between them.  It is cut into messages by counting brackets, which
 * also bounds the size and depth of what the JSON parser, which recurses,
 * gets to see.  Input that makes no sense is answered by one error, and
 * skipped up to the end of its line.
 */

#include <config.h>

#include <stdio.h>
#include <string.h>

#include "control/args.h"
#include "control/json.h"
#include "control/qmp.h"

/* The state of the cutting. */
enum state {
  BETWEEN,                      /* messages */
  INSIDE,                       /* one */
  IN_STRING,                    /* of one */
  ESCAPED,                      /* the character behind a backslash */
  SKIPPING,                     /* to the end of a line */
};

struct control_session {
  bool negotiated;              /* qmp_capabilities was sent */
  enum state state;
  unsigned depth;
  GString *message;             /* so far */
};

struct command {
  control_command function;
  gpointer opaque;
};

static GHashTable *commands;    /* name -> struct command */

void
control_register_command (const char *name, control_command function,
                          gpointer opaque)
{
  struct command *command = g_new (struct command, 1);

  command->function = function;
  command->opaque = opaque;
  if (!commands)
    commands = g_hash_table_new_full (g_str_hash, g_str_equal, NULL, g_free);
  g_hash_table_insert (commands, (gpointer) name, command);
}

void
control_forget_commands (void)
{
  g_clear_pointer (&commands, g_hash_table_unref);
}

/* Replies. */

/* Takes the object. */
static void
send_object (GString *output, JsonObject *object)
{
  JsonNode *node = json_node_new (JSON_NODE_OBJECT);
  g_autofree char *text = NULL;

  json_node_take_object (node, object);
  text = json_to_string (node, FALSE);
  g_string_append_printf (output, "%s\r\n", text);
  json_node_unref (node);
}

static void
send_reply (GString *output, const char *kind, JsonNode *value, JsonNode *id)
{
  JsonObject *object = json_object_new ();

  json_object_set_member (object, kind, value);
  if (id)
    json_object_set_member (object, "id", json_node_copy (id));
  send_object (output, object);
}

static void
send_error (GString *output, const char *class, const char *description,
            JsonNode *id)
{
  JsonNode *node = json_node_new (JSON_NODE_OBJECT);
  JsonObject *object = json_object_new ();

  json_object_set_string_member (object, "class", class);
  json_object_set_string_member (object, "desc", description);
  json_node_take_object (node, object);
  send_reply (output, "error", node, id);
}

static JsonNode *
empty_object (void)
{
  JsonNode *node = json_node_new (JSON_NODE_OBJECT);

  json_node_take_object (node, json_object_new ());
  return node;
}

/* Commands of the protocol itself. */

static JsonNode *
version (void)
{
  int major = 0, minor = 0, micro = 0;
  JsonNode *node = json_node_new (JSON_NODE_OBJECT);
  JsonObject *object = json_object_new (), *qemu = json_object_new ();

  sscanf (PACKAGE_VERSION, "%d.%d.%d", &major, &minor, &micro);
  json_object_set_int_member (qemu, "major", major);
  json_object_set_int_member (qemu, "minor", minor);
  json_object_set_int_member (qemu, "micro", micro);
  json_object_set_object_member (object, "qemu", qemu);
  json_object_set_string_member (object, "package",
                                 PACKAGE_NAME "-" PACKAGE_VERSION);
  json_node_take_object (node, object);
  return node;
}

static void
add_command (JsonArray *array, const char *name)
{
  JsonObject *object = json_object_new ();

  json_object_set_string_member (object, "name", name);
  json_array_add_object_element (array, object);
}

static JsonNode *
list_commands (void)
{
  JsonNode *node = json_node_new (JSON_NODE_ARRAY);
  JsonArray *array = json_array_new ();
  GList *names = commands ? g_hash_table_get_keys (commands) : NULL;

  names = g_list_sort (names, (GCompareFunc) strcmp);
  for (const GList *name = names; name; name = name->next)
    add_command (array, name->data);
  g_list_free (names);
  add_command (array, "qmp_capabilities");
  add_command (array, "query-commands");
  add_command (array, "query-version");
  json_node_take_array (node, array);
  return node;
}

/* There are no capabilities to be enabled. */
static int
negotiate (struct control_session *session, JsonObject *args, GError **error)
{
  JsonArray *enable;

  if (control_args_only (args, error, "enable", NULL) == -1)
    return -1;
  if (json_object_has_member (args, "enable")) {
    if (control_args_array (args, "enable", &enable, error) == -1)
      return -1;
    if (json_array_get_length (enable) > 0) {
      control_fail (error, "Parameter 'enable' names a capability that this "
                    "server does not have");
      return -1;
    }
  }
  session->negotiated = true;
  return 0;
}

/* Run a command.  NULL with class and error set if it failed. */
static JsonNode *
run (struct control_session *session, const char *name, JsonObject *args,
     const char **class, GError **error)
{
  const struct command *command =
    commands ? g_hash_table_lookup (commands, name) : NULL;
  const bool is_negotiation = strcmp (name, "qmp_capabilities") == 0;
  JsonNode *result = NULL;

  *class = "CommandNotFound";
  if (session->negotiated == is_negotiation) {
    control_fail (error, is_negotiation ?
                  "The capabilities have been negotiated already" :
                  "The first command must be 'qmp_capabilities', which "
                  "negotiates them");
    return NULL;
  }
  *class = "GenericError";
  if (is_negotiation)
    negotiate (session, args, error);
  else if (strcmp (name, "query-version") == 0) {
    if (control_args_only (args, error, NULL) == 0)
      result = version ();
  }
  else if (strcmp (name, "query-commands") == 0) {
    if (control_args_only (args, error, NULL) == 0)
      result = list_commands ();
  }
  else if (command)
    result = command->function (args, command->opaque, error);
  else {
    *class = "CommandNotFound";
    control_fail (error, "The command %s has not been found", name);
  }
  return *error ? NULL : result ? result : empty_object ();
}

/* Messages. */

/* What a request has besides its id.  -1 with error set. */
static int
parse_request (JsonObject *request, const char **name, JsonObject **args,
               GError **error)
{
  JsonNode *execute = json_object_get_member (request, "execute");
  JsonNode *arguments = json_object_get_member (request, "arguments");

  if (control_args_only (request, error, "execute", "arguments", "id",
                         NULL) == -1)
    return -1;
  if (!execute)
    return control_fail (error, "Parameter 'execute' is missing");
  if (json_node_get_value_type (execute) != G_TYPE_STRING)
    return control_fail (error, "Invalid parameter type for 'execute', "
                         "expected: string");
  if (arguments && !JSON_NODE_HOLDS_OBJECT (arguments))
    return control_fail (error, "Invalid parameter type for 'arguments', "
                         "expected: object");
  *name = json_node_get_string (execute);
  *args = arguments ? json_object_ref (json_node_get_object (arguments)) :
    json_object_new ();
  return 0;
}

static void
answer_request (struct control_session *session, JsonObject *request,
                GString *output)
{
  JsonNode *id = json_object_get_member (request, "id"), *result = NULL;
  g_autoptr (GError) error = NULL;
  const char *name = NULL, *class = "GenericError";
  JsonObject *args = NULL;

  if (parse_request (request, &name, &args, &error) == 0) {
    result = run (session, name, args, &class, &error);
    json_object_unref (args);
  }
  if (result)
    send_reply (output, "return", result, id);
  else
    send_error (output, class, error->message, id);
}

static void
answer (struct control_session *session, GString *output)
{
  g_autoptr (GError) error = NULL;
  g_autoptr (JsonNode) root = control_json_parse (session->message, &error);

  if (!root)
    send_error (output, "GenericError", error->message, NULL);
  else if (!JSON_NODE_HOLDS_OBJECT (root))
    send_error (output, "GenericError", "A request must be a JSON object",
                NULL);
  else
    answer_request (session, json_node_get_object (root), output);
}

/* The stream. */

struct control_session *
control_session_new (GString *output)
{
  struct control_session *session = g_new0 (struct control_session, 1);
  JsonObject *greeting = json_object_new (), *qmp = json_object_new ();

  session->message = g_string_new (NULL);
  json_object_set_member (qmp, "version", version ());
  json_object_set_array_member (qmp, "capabilities", json_array_new ());
  json_object_set_object_member (greeting, "QMP", qmp);
  send_object (output, greeting);
  return session;
}

void
control_session_free (struct control_session *session)
{
  g_string_free (session->message, TRUE);
  g_free (session);
}

static void
refuse_input (struct control_session *session, const char *why,
              GString *output)
{
  g_string_set_size (session->message, 0);
  session->state = SKIPPING;
  send_error (output, "GenericError", why, NULL);
}

/* The state behind a character.  A message that is complete, or that
 * cannot become one, is answered.
 */
static enum state
step (struct control_session *session, char c, GString *output)
{
  switch (session->state) {
  case SKIPPING:
    return c == '\n' ? BETWEEN : SKIPPING;
  case ESCAPED:
    return IN_STRING;
  case IN_STRING:
    return c == '"' ? INSIDE : c == '\\' ? ESCAPED : IN_STRING;
  case BETWEEN:
    session->depth = 0;
    if (g_ascii_isspace (c))
      return BETWEEN;
    if (c != '{' && c != '[') {
      refuse_input (session, "JSON parse error: a request must be a JSON "
                    "object", output);
      return c == '\n' ? BETWEEN : SKIPPING;
    }
    /* fallthrough */
  case INSIDE:
    if (c == '"')
      return IN_STRING;
    if ((c == '{' || c == '[') && ++session->depth > CONTROL_MAX_DEPTH) {
      refuse_input (session, "JSON parse error: the request is nested too "
                    "deeply", output);
      return SKIPPING;
    }
    if ((c == '}' || c == ']') && --session->depth == 0) {
      answer (session, output);
      g_string_set_size (session->message, 0);
      return BETWEEN;
    }
    return INSIDE;
  }
  g_assert_not_reached ();
}

size_t
control_session_feed (struct control_session *session, const char *bytes,
                      size_t n, GString *output)
{
  const gsize before = output->len;
  size_t i = 0;

  while (i < n && output->len == before) {
    const char c = bytes[i++];

    if (session->state != SKIPPING &&
        (session->state != BETWEEN || !g_ascii_isspace (c)))
      g_string_append_c (session->message, c);
    session->state = step (session, c, output);
    if (session->message->len > CONTROL_MAX_MESSAGE)
      refuse_input (session, "the request is too long", output);
  }
  return i;
}
