/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* JSON-GLib takes more than JSON, and means something else by it: 010 is
 * 8, integers are taken modulo 2^64, strings end at \u0000, the later of
 * two members of one name counts.  And each value costs hundreds of bytes.
 * So the tokens are looked at first; their order is JSON-GLib's business.
 *
 * As in QEMU, strings may be in single quotes, for those who type them
 * into a shell.
 */

#include <config.h>

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "control/args.h"
#include "control/json.h"

/* These return the end of the token, or NULL if it is none.  The text ends
 * with a NUL, which is in no token.
 */

static const char *
scan_escape (const char *p)
{
  unsigned code = 0;

  if (*p != 'u')
    return *p && strchr ("\"\\/bfnrt", *p) ? p + 1 : NULL;
  for (unsigned i = 1; i <= 4; ++i) {
    if (!g_ascii_isxdigit (p[i]))
      return NULL;
    code = code << 4 | g_ascii_xdigit_value (p[i]);
  }
  return code ? p + 5 : NULL;
}

static const char *
scan_string (const char *p)
{
  const char quote = *p++;

  while (p && *p != quote) {
    if ((unsigned char) *p < ' ')
      return NULL;
    if (*p != '\\')
      p++;
    else
      p = quote == '"' ? scan_escape (p + 1) : NULL;
  }
  return p ? p + 1 : NULL;
}

static const char *
scan_digits (const char *p)
{
  if (!g_ascii_isdigit (*p))
    return NULL;
  while (g_ascii_isdigit (*p))
    p++;
  return p;
}

static bool
is_in_range (const char *number, bool is_integer)
{
  if (!is_integer)
    return isfinite (g_ascii_strtod (number, NULL));
  errno = 0;
  g_ascii_strtoll (number, NULL, 10);
  return errno == 0;
}

static const char *
scan_number (const char *start)
{
  const char *p = start + (*start == '-');
  bool is_integer = true;

  p = *p == '0' ? p + 1 : scan_digits (p);
  if (p && *p == '.') {
    is_integer = false;
    p = scan_digits (p + 1);
  }
  if (p && (*p == 'e' || *p == 'E')) {
    is_integer = false;
    p++;
    p = scan_digits (p + (*p == '-' || *p == '+'));
  }
  if (!p || g_ascii_isalnum (*p) || !is_in_range (start, is_integer))
    return NULL;
  return p;
}

static const char *
scan_word (const char *p)
{
  static const char *const words[] = { "true", "false", "null" };

  for (size_t i = 0; i < G_N_ELEMENTS (words); ++i) {
    const size_t n = strlen (words[i]);

    if (strncmp (p, words[i], n) == 0 && !g_ascii_isalnum (p[n]))
      return p + n;
  }
  return NULL;
}

static const char *
scan_token (const char *p)
{
  if (*p == '"' || *p == '\'')
    return scan_string (p);
  if (*p == '-' || g_ascii_isdigit (*p))
    return scan_number (p);
  if (*p && strchr ("{}[]:, \t\r\n", *p))
    return p + 1;
  return scan_word (p);
}

static int
check_tokens (const GString *text, GError **error)
{
  const char *const end = text->str + text->len;
  unsigned values = 0;

  for (const char *p = text->str; p != end; ) {
    if (*p == '{' || *p == '[' || *p == ',')
      values++;
    p = scan_token (p);
    if (!p)
      return control_fail (error, "JSON parse error: there is a string, "
                           "number or other token that is not valid, or not "
                           "supported");
  }
  if (values > CONTROL_MAX_VALUES)
    return control_fail (error, "JSON parse error: the request has more than "
                         "%d values", CONTROL_MAX_VALUES);
  return 0;
}

/* Objects are found to have fewer members than there were in the text. */
struct members {
  GArray *counts;               /* of the object being parsed, and around */
  bool twice;
};

static void
begin_object (JsonParser *parser, gpointer opaque)
{
  struct members *members = opaque;
  const guint none = 0;

  g_array_append_val (members->counts, none);
}

static void
count_member (JsonParser *parser, JsonObject *object, const char *name,
              gpointer opaque)
{
  struct members *members = opaque;

  g_array_index (members->counts, guint, members->counts->len - 1)++;
}

static void
end_object (JsonParser *parser, JsonObject *object, gpointer opaque)
{
  struct members *members = opaque;
  const guint last = members->counts->len - 1;

  if (g_array_index (members->counts, guint, last) !=
      json_object_get_size (object))
    members->twice = true;
  g_array_set_size (members->counts, last);
}

static JsonNode *
parse (const GString *text, struct members *members, GError **error)
{
  g_autoptr (JsonParser) parser = json_parser_new ();
  JsonNode *root = NULL;

  g_signal_connect (parser, "object-start", G_CALLBACK (begin_object),
                    members);
  g_signal_connect (parser, "object-member", G_CALLBACK (count_member),
                    members);
  g_signal_connect (parser, "object-end", G_CALLBACK (end_object), members);
  if (json_parser_load_from_data (parser, text->str, text->len, NULL))
    root = json_parser_steal_root (parser);
  if (!root)
    control_fail (error, "JSON parse error: this is not valid JSON");
  else if (members->twice) {
    g_clear_pointer (&root, json_node_unref);
    control_fail (error, "JSON parse error: an object has two members of one "
                  "name");
  }
  return root;
}

JsonNode *
control_json_parse (const GString *text, GError **error)
{
  struct members members = { NULL, false };
  JsonNode *root;

  if (!g_utf8_validate (text->str, text->len, NULL)) {
    control_fail (error, "JSON parse error: this is not valid UTF-8");
    return NULL;
  }
  if (check_tokens (text, error) == -1)
    return NULL;
  members.counts = g_array_new (FALSE, FALSE, sizeof (guint));
  root = parse (text, &members, error);
  g_array_unref (members.counts);
  return root;
}
