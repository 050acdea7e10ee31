/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* dirty-bitmap=NAME[,granularity=SIZE][,persistent=on][,disabled=on]
 *                  [,node=NODE]
 *
 * A bitmap needs to know the size of its disk, so it is made when the
 * disk is first opened; that is once for each node, so that one which a
 * QMP client has removed does not come back with the next connection.
 */

#include <config.h>

#include <string.h>

#include "dirty/persist.h"
#include "dirty/transaction.h"
#include "utils/server.h"
#include "utils/suite.h"

#include "dirty-tracking.h"

struct spec {
  char *name, *node;
  uint64_t granularity;         /* in bytes; 0: default */
  bool persistent, disabled;
};

static GPtrArray *specs;        /* of struct spec */
static GHashTable *applied;     /* nodes that have them; under the lock */

static void
spec_free (gpointer p)
{
  struct spec *spec = p;

  g_free (spec->name);
  g_free (spec->node);
  g_free (spec);
}

static int
parse_bool (const char *option, const char *value, bool *result)
{
  if (strcmp (value, "on") != 0 && strcmp (value, "off") != 0) {
    nbdkit_error ("dirty-bitmap: %s: \"%s\" is not a known value; "
                  "use %s=on or %s=off", option, value, option, option);
    return -1;
  }
  *result = strcmp (value, "on") == 0;
  return 0;
}

static int
parse_granularity (const char *value, uint64_t *result)
{
  const int64_t size = nbdkit_parse_size (value);

  if (dirty_granularity_bits (size) == -1) {
    nbdkit_error ("dirty-bitmap: granularity: \"%s\" is not a power of two "
                  "between 512 and 2G", value);
    return -1;
  }
  *result = size;
  return 0;
}

static int
parse_option (struct spec *spec, const char *option)
{
  const char *value = strchr (option, '=');
  g_autofree char *key = NULL;

  if (value) {
    key = g_strndup (option, value++ - option);
    if (strcmp (key, "granularity") == 0)
      return parse_granularity (value, &spec->granularity);
    if (strcmp (key, "persistent") == 0)
      return parse_bool (key, value, &spec->persistent);
    if (strcmp (key, "disabled") == 0)
      return parse_bool (key, value, &spec->disabled);
    if (strcmp (key, "node") == 0) {
      g_free (spec->node);
      spec->node = g_strdup (value);
      return 0;
    }
  }
  nbdkit_error ("dirty-bitmap: \"%s\" is not a known option; there are "
                "granularity=SIZE, persistent=on, disabled=on and node=NODE",
                option);
  return -1;
}

static int
check_name (const char *name)
{
  if (!*name) {
    nbdkit_error ("dirty-bitmap: the name of the bitmap is missing; "
                  "use dirty-bitmap=NAME");
    return -1;
  }
  if (strcmp (name, DIRTY_INTENT_NAME) == 0) {
    nbdkit_error ("dirty-bitmap: the name \"%s\" is reserved for what the "
                  "bitmap-persist filter stores", name);
    return -1;
  }
  if (strlen (name) > DIRTY_MAX_NAME || !g_utf8_validate (name, -1, NULL)) {
    nbdkit_error ("dirty-bitmap: the name of a bitmap has at most %d bytes, "
                  "in UTF-8", DIRTY_MAX_NAME);
    return -1;
  }
  return 0;
}

static bool
is_repeated (const struct spec *spec)
{
  for (guint i = 0; i < specs->len; ++i) {
    const struct spec *other = g_ptr_array_index (specs, i);

    if (strcmp (spec->name, other->name) == 0 &&
        g_strcmp0 (spec->node, other->node) == 0)
      return true;
  }
  return false;
}

int
specs_parse (const char *value)
{
  g_auto (GStrv) words = g_strsplit (value, ",", -1);
  struct spec *spec = g_new0 (struct spec, 1);

  if (!specs)
    specs = g_ptr_array_new_with_free_func (spec_free);
  spec->name = g_strdup (words[0] ? words[0] : "");
  if (check_name (spec->name) == -1)
    goto fail;
  for (size_t i = 1; words[i]; ++i)
    if (parse_option (spec, words[i]) == -1)
      goto fail;
  if (is_repeated (spec)) {
    nbdkit_error ("dirty-bitmap: \"%s\" was given twice", spec->name);
    goto fail;
  }
  g_ptr_array_add (specs, spec);
  return 0;

 fail:
  spec_free (spec);
  return -1;
}

static int
check_spec (const struct spec *spec, const char *only_node)
{
  if (spec->persistent && !qf_suite_is_loaded (QF_BITMAP_PERSIST)) {
    nbdkit_error ("dirty-bitmap=%s,persistent=on: there is no filter in the "
                  "chain that stores bitmaps: add --filter=bitmap-persist "
                  "after --filter=dirty-tracking", spec->name);
    return -1;
  }
  if (spec->node && !dirty_nodes_each () &&
      strcmp (spec->node, only_node) != 0) {
    nbdkit_error ("dirty-bitmap=%s,node=%s: the only node is called \"%s\"; "
                  "dirty-node=%s renames it, exports=each makes each export "
                  "a node", spec->name, spec->node, only_node, spec->node);
    return -1;
  }
  return 0;
}

int
specs_check (void)
{
  const char *only_node = config.node ? config.node : DIRTY_DEFAULT_NODE;

  for (guint i = 0; specs && i < specs->len; ++i)
    if (check_spec (g_ptr_array_index (specs, i), only_node) == -1)
      return -1;
  return 0;
}

/* Is it to be made now?  A server that is read-only stores nothing. */
static bool
is_wanted (const struct spec *spec, const struct dirty_node *node)
{
  if ((spec->node && strcmp (spec->node, node->name) != 0) ||
      dirty_bitmap_find (node, spec->name, NULL))
    return false;
  if (!spec->persistent || !qf_server_is_read_only ())
    return true;
  nbdkit_debug ("dirty-bitmap: \"%s\" is not made, as the server is "
                "read-only", spec->name);
  return false;
}

/* In a transaction: make what is wanted of this node. */
static int
apply (struct dirty_transaction *t, struct dirty_node *node, GError **error)
{
  for (guint i = 0; i < specs->len; ++i) {
    const struct spec *spec = g_ptr_array_index (specs, i);

    if (is_wanted (spec, node) &&
        dirty_bitmap_add (t, node, spec->name, spec->granularity,
                          spec->persistent, !spec->disabled, error) == -1)
      return -1;
  }
  return 0;
}

int
specs_apply (struct dirty_node *node)
{
  g_autoptr (GPtrArray) nodes = g_ptr_array_new ();
  g_autoptr (GError) error = NULL;
  struct dirty_transaction *t;
  int r = 0;

  if (!specs)
    return 0;
  g_ptr_array_add (nodes, node);
  dirty_changes_lock ();
  dirty_lock ();
  if (!applied)
    applied = g_hash_table_new (NULL, NULL);
  if (node->read_only)
    nbdkit_debug ("dirty-bitmap: node '%s' is read-only: there is nothing to "
                  "record", node->name);
  else if (g_hash_table_add (applied, node)) {
    t = dirty_transaction_begin (nodes);
    r = dirty_transaction_end (t, apply (t, node, &error), &error);
    if (r == -1)
      g_hash_table_remove (applied, node);
  }
  dirty_unlock ();
  dirty_changes_unlock ();
  if (r == -1)
    nbdkit_error ("dirty-bitmap: %s", error->message);
  return r;
}

void
specs_free (void)
{
  g_clear_pointer (&applied, g_hash_table_unref);
  g_clear_pointer (&specs, g_ptr_array_unref);
}
