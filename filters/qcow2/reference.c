/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <json-glib/json-glib.h>

#include "qcow2/error.h"

#include "qcow2-filter.h"
#include "reference.h"

/* Policies. */

void
policy_clear (struct policy *policy)
{
  policy->kind = POLICY_REFUSE;
  g_clear_pointer (&policy->value, free);
  g_clear_pointer (&policy->format, g_free);
}

static int
take_path (struct policy *policy, enum policy_kind kind, const char *path)
{
  const char *format =
    policy->is_backing ? g_strrstr (path, ",format=") : NULL;
  g_autofree char *plain =
    format ? g_strndup (path, format - path) : g_strdup (path);

  if (format && strcmp (format, ",format=raw") != 0 &&
      strcmp (format, ",format=qcow2") != 0) {
    nbdkit_error ("%s: \"%s\" is not a known format; use ,format=raw or "
                  ",format=qcow2", policy->key, format + strlen (",format="));
    return -1;
  }
  policy->kind = kind;
  policy->value = nbdkit_absolute_path (plain);
  if (format)
    policy->format = g_strdup (format + strlen (",format="));
  return policy->value ? 0 : -1;
}

static bool
is_nbd_uri (const char *s)
{
  static const char *const schemes[] = {
    "nbd://", "nbds://", "nbd+unix://", "nbds+unix://", "nbd+vsock://", NULL
  };

  for (size_t i = 0; schemes[i]; ++i)
    if (g_str_has_prefix (s, schemes[i]))
      return true;
  return false;
}

int
policy_parse (struct policy *policy, const char *value)
{
  policy_clear (policy);
  if (strcmp (value, "refuse") == 0)
    return 0;
  if (g_str_has_prefix (value, "dir:"))
    return take_path (policy, POLICY_DIR, value + strlen ("dir:"));
  if (g_str_has_prefix (value, "file:"))
    return take_path (policy, POLICY_FILE, value + strlen ("file:"));
  if (is_nbd_uri (value)) {
    policy->kind = POLICY_URI;
    policy->value = strdup (value);
    return policy->value ? 0 : -1;
  }
  if (policy->is_backing && strcmp (value, "none") == 0) {
    policy->kind = POLICY_NONE;
    return 0;
  }
  if (policy->is_backing && strcmp (value, "export") == 0) {
    policy->kind = POLICY_EXPORT;
    return 0;
  }
  nbdkit_error ("%s: \"%s\" is not a known value; use refuse, %sdir:PATH, "
                "file:PATH or an NBD URI (nbd://... or nbd+unix://...)",
                policy->key, value,
                policy->is_backing ? "none, export, " : "");
  return -1;
}

/* Names. */

void
reference_clear (struct reference *ref)
{
  g_clear_pointer (&ref->path, g_free);
  g_clear_pointer (&ref->uri, g_free);
  g_clear_pointer (&ref->format, g_free);
}

static char *
make_uri (const char *socket, const char *host, const char *port,
          const char *exportname)
{
  g_autofree char *export = g_uri_escape_string (exportname, "/", FALSE);
  g_autofree char *path =
    socket ? g_uri_escape_string (socket, "/", FALSE) : NULL;

  if (socket)
    return g_strdup_printf ("nbd+unix:///%s?socket=%s", export, path);
  if (strchr (host, ':') && host[0] != '[') /* IPv6 */
    return g_strdup_printf ("nbd://[%s]:%s/%s", host, port, export);
  return g_strdup_printf ("nbd://%s:%s/%s", host, port, export);
}

/* nbd:HOST:PORT or nbd:unix:PATH, and then maybe :exportname=NAME. */
static char *
old_nbd_name (const char *name)
{
  const char *rest = name + strlen ("nbd:");
  const char *tail = strstr (rest, ":exportname=");
  const char *exportname = tail ? tail + strlen (":exportname=") : "";
  g_autofree char *address =
    tail ? g_strndup (rest, tail - rest) : g_strdup (rest);
  char *colon;

  if (g_str_has_prefix (address, "unix:"))
    return make_uri (address + strlen ("unix:"), NULL, NULL, exportname);
  colon = strrchr (address, ':');
  if (!colon || colon == address || !colon[1])
    return NULL;
  *colon = '\0';
  return make_uri (NULL, address, colon + 1, exportname);
}

/* True if name begins as PROTOCOL: does, with no directory before it. */
static bool
has_protocol (const char *name)
{
  const char *colon = strchr (name, ':');
  const char *slash = strchr (name, '/');

  return colon && colon != name && (!slash || colon < slash);
}

static int
parse_plain (const char *name, struct reference *ref, GError **error)
{
  if (is_nbd_uri (name))
    ref->uri = g_strdup (name);
  else if (g_str_has_prefix (name, "nbd:"))
    ref->uri = old_nbd_name (name);
  else if (g_str_has_prefix (name, "file:"))
    ref->path = g_strdup (name + strlen ("file:"));
  else if (!has_protocol (name))
    ref->path = g_strdup (name);

  if (!ref->path && !ref->uri) {
    g_autofree char *shown = g_strescape (name, NULL);

    return qcow2_fail (error, ENOTSUP, "the name \"%s\" is of a kind that "
                       "is not supported; plain file names, file:, nbd: and "
                       "NBD URIs are", shown);
  }
  return 0;
}

/* Members of the objects behind json: are strings, and may be nested
 * ("file": {"driver": ...}) or flat ("file.driver": ...).
 */
static const char *
json_member (JsonObject *object, const char *prefix, const char *name)
{
  g_autofree char *flat = g_strconcat (prefix, prefix[0] ? "." : "", name,
                                       NULL);
  g_auto (GStrv) parts = g_strsplit (flat, ".", -1);
  JsonNode *node = json_object_get_member (object, flat);

  for (size_t i = 0; !node && parts[i]; ++i) {
    JsonNode *child = json_object_get_member (object, parts[i]);

    if (!child)
      return NULL;
    if (!parts[i + 1])
      node = child;
    else if (JSON_NODE_HOLDS_OBJECT (child))
      object = json_node_get_object (child);
    else
      return NULL;
  }
  return node && JSON_NODE_HOLDS_VALUE (node) &&
    json_node_get_value_type (node) == G_TYPE_STRING ?
    json_node_get_string (node) : NULL;
}

static int
json_protocol (JsonObject *object, const char *prefix, const char *driver,
               struct reference *ref, GError **error)
{
  const char *filename = json_member (object, prefix, "filename");
  const char *export = json_member (object, prefix, "export");
  const char *path = json_member (object, prefix, "server.path");
  const char *host = json_member (object, prefix, "server.host");
  const char *port = json_member (object, prefix, "server.port");

  if (!path)
    path = json_member (object, prefix, "path");
  if (!host)
    host = json_member (object, prefix, "host");
  if (!port)
    port = json_member (object, prefix, "port");

  if (filename && (!driver || strcmp (driver, "file") == 0)) {
    ref->path = g_strdup (filename);
    return 0;
  }
  if (driver && strcmp (driver, "nbd") == 0 && (path || host)) {
    ref->uri = make_uri (path, host, port ? port : "10809",
                         export ? export : "");
    return 0;
  }
  return qcow2_fail (error, ENOTSUP, "a json: name is only supported for "
                     "the drivers file and nbd");
}

/* Other members could mean other bytes (offset, size, backing), so only
 * those that are used, or that change nothing, are let through.  Prefix
 * is the object's own name and a dot, or empty.
 */
static int
json_check_members (JsonObject *object, const char *prefix, GError **error)
{
  static const char *const known[] = {
    "driver", "filename", "export", "path", "host", "port",
    "server.type", "server.path", "server.host", "server.port",
    "encrypt.format", "encrypt.key-secret", "read-only", "auto-read-only",
    "node-name", "cache.direct", "cache.no-flush", "aio", "locking", NULL
  };
  JsonObjectIter iter;
  const char *name;
  JsonNode *node;

  json_object_iter_init (&iter, object);
  while (json_object_iter_next (&iter, &name, &node)) {
    g_autofree char *flat = g_strconcat (prefix, name, NULL);
    const bool of_file = g_str_has_prefix (flat, "file.");

    if (JSON_NODE_HOLDS_OBJECT (node)) {
      g_autofree char *deeper = g_strconcat (flat, ".", NULL);

      if (json_check_members (json_node_get_object (node), deeper,
                              error) == -1)
        return -1;
    }
    else if (!g_strv_contains (known,
                               flat + (of_file ? strlen ("file.") : 0))) {
      g_autofree char *shown = g_strescape (flat, NULL);

      return qcow2_fail (error, ENOTSUP, "\"%s\" in a json: name is not "
                         "supported", shown);
    }
  }
  return 0;
}

static int
json_image (JsonObject *object, struct reference *ref, GError **error)
{
  const char *driver = json_member (object, "", "driver");
  const bool nested = json_object_has_member (object, "file") ||
    json_object_has_member (object, "file.driver") ||
    json_object_has_member (object, "file.filename");

  if (!nested)
    return json_protocol (object, "", driver, ref, error);
  ref->format = g_strdup (driver);
  return json_protocol (object, "file",
                        json_member (object, "file", "driver"), ref, error);
}

static int
parse_json (const char *text, struct reference *ref, GError **error)
{
  g_autoptr (JsonParser) parser = json_parser_new ();
  g_autoptr (GError) why = NULL;
  JsonNode *root;

  /* JSON-GLib would end the string there. */
  if (strstr (text, "\\u0000"))
    return qcow2_fail (error, EINVAL, "a json: name that contains a NUL");
  if (!json_parser_load_from_data (parser, text, -1, &why)) {
    g_autofree char *shown = g_strescape (why->message, NULL);

    return qcow2_fail (error, EINVAL, "a json: name that is no JSON: %s",
                       shown);
  }
  root = json_parser_get_root (parser);
  if (!root || !JSON_NODE_HOLDS_OBJECT (root))
    return qcow2_fail (error, EINVAL, "a json: name that is no object");
  if (json_image (json_node_get_object (root), ref, error) == -1)
    return -1;
  return json_check_members (json_node_get_object (root), "", error);
}

int
reference_parse (const char *name, struct reference *ref, GError **error)
{
  int r;

  memset (ref, 0, sizeof *ref);
  r = g_str_has_prefix (name, "json:") ?
    parse_json (name + strlen ("json:"), ref, error) :
    parse_plain (name, ref, error);
  if (r == -1)
    reference_clear (ref);
  return r;
}

/* Opening. */

static int
refused (const struct policy *policy, const char *what, const char *name,
         GError **error)
{
  g_autofree char *shown = g_strescape (name, NULL);

  return qcow2_fail (error, EPERM, "the image has the %s \"%s\", which is "
                     "not opened because of %s=refuse (the default); "
                     "%s=dir:DIRECTORY permits files beneath a directory, "
                     "and the manual has more choices",
                     what, shown, policy->key, policy->key);
}

/* The policy names one file, for the image itself, but a backing file
 * wants one too.
 */
static int
only_first (const struct policy *policy, const char *what, const char *name,
            GError **error)
{
  g_autofree char *shown = g_strescape (name, NULL);

  return qcow2_fail (error, EPERM, "the backing file has itself the %s "
                     "\"%s\", but %s=%s permits only one; dir: permits a "
                     "chain", what, shown, policy->key, policy->value);
}

/* The directory, from that of a policy, to which names in a file are
 * relative.  A file that the user named (from_path is absolute, or a URI)
 * can be anywhere; its names are looked up like those of the image itself.
 */
static char *
names_directory (const char *from_path)
{
  return from_path && !g_path_is_absolute (from_path) &&
    !is_nbd_uri (from_path) ?
    g_path_get_dirname (from_path) : g_strdup (".");
}

static struct source *
open_in_dir (const struct policy *policy, const char *what, const char *name,
             const char *from_path, char **path, char **format,
             GError **error)
{
  struct reference ref;
  struct source *source = NULL;
  g_autofree char *dir = names_directory (from_path);

  if (reference_parse (name, &ref, error) == -1)
    return NULL;
  if (ref.uri) {
    g_autofree char *shown = g_strescape (ref.uri, NULL);

    qcow2_fail (error, EPERM, "the %s is the NBD server %s, which "
                "%s=dir: does not permit; %s=%s would",
                what, shown, policy->key, policy->key, shown);
  }
  else {
    /* An absolute name must not become a relative one by joining. */
    *path = g_path_is_absolute (ref.path) ? g_strdup (ref.path) :
      g_build_filename (dir, ref.path, NULL);
    *format = g_steal_pointer (&ref.format);
    source = file_open_beneath (policy->value, *path, error);
  }
  reference_clear (&ref);
  return source;
}

struct source *
reference_open (const struct policy *policy, const char *what,
                const char *name, const char *from_path,
                nbdkit_backend *backend, char **path, char **format,
                GError **error)
{
  *path = NULL;
  *format = NULL;
  switch (policy->kind) {
  case POLICY_DIR:
    return open_in_dir (policy, what, name, from_path, path, format, error);
  case POLICY_EXPORT:
    return layer_open_export (backend, name, error);
  case POLICY_FILE:
  case POLICY_URI:
    if (from_path) {
      only_first (policy, what, name, error);
      return NULL;
    }
    *path = g_strdup (policy->value);
    return policy->kind == POLICY_FILE ? file_open (policy->value, error) :
      nbd_open (policy->value, error);
  default:
    refused (policy, what, name, error);
    return NULL;
  }
}
