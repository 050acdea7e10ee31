/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What QMP clients are told about nodes.
 *
 * QEMU's schema has members which mean nothing here; as strict clients
 * want them they are there, with the values of a plain node.
 */

#include <config.h>

#include <json-glib/json-glib.h>

#include "control/args.h"
#include "control/commands.h"
#include "control/qmp.h"
#include "dirty/node.h"
#include "dirty/persist.h"

static JsonObject *
describe_bitmap (const struct dirty_bitmap *bitmap)
{
  const unsigned bits = dirty_bits_granularity_bits (bitmap->bits);
  /* The name may come from an image. */
  g_autofree char *name = g_utf8_make_valid (bitmap->name, -1);
  JsonObject *object = json_object_new ();

  json_object_set_string_member (object, "name", name);
  json_object_set_int_member (object, "count",
                              dirty_bits_count (bitmap->bits) << bits);
  json_object_set_int_member (object, "granularity", INT64_C (1) << bits);
  json_object_set_boolean_member (object, "recording",
                                  bitmap->recording && !bitmap->inconsistent);
  json_object_set_boolean_member (object, "busy", bitmap->users > 0);
  json_object_set_boolean_member (object, "persistent", bitmap->persistent);
  if (bitmap->inconsistent)
    json_object_set_boolean_member (object, "inconsistent", TRUE);
  return object;
}

/* The newest comes first. */
static JsonArray *
describe_bitmaps (const struct dirty_node *node)
{
  JsonArray *array = json_array_new ();

  for (guint i = node->bitmaps->len; i-- > 0; )
    json_array_add_object_element (
      array, describe_bitmap (g_ptr_array_index (node->bitmaps, i)));
  return array;
}

static JsonObject *
describe_qcow2 (const struct dirty_image *image)
{
  JsonObject *specific = json_object_new (), *data = json_object_new ();

  json_object_set_string_member (data, "compat",
                                 image->version < 3 ? "0.10" : "1.1");
  json_object_set_string_member (data, "compression-type",
                                 image->compression);
  json_object_set_int_member (data, "refcount-bits", image->refcount_bits);
  if (image->version >= 3) {
    json_object_set_boolean_member (data, "lazy-refcounts",
                                    image->lazy_refcounts);
    json_object_set_boolean_member (data, "corrupt", image->corrupt);
    json_object_set_boolean_member (data, "extended-l2", image->extended_l2);
  }
  json_object_set_string_member (specific, "type", "qcow2");
  json_object_set_object_member (specific, "data", data);
  return specific;
}

static JsonObject *
describe_image (const struct dirty_node *node)
{
  const struct dirty_image *image = node->image;
  JsonObject *object = json_object_new ();

  json_object_set_string_member (object, "filename",
                                 image ? image->filename : "");
  json_object_set_string_member (object, "format", image ? "qcow2" : "raw");
  json_object_set_int_member (object, "virtual-size",
                              image ? image->virtual_size : node->size);
  if (image) {
    json_object_set_int_member (object, "actual-size", image->actual_size);
    json_object_set_int_member (object, "cluster-size", image->cluster_size);
    json_object_set_boolean_member (object, "dirty-flag", image->dirty);
    json_object_set_boolean_member (object, "encrypted", image->encrypted);
    json_object_set_object_member (object, "format-specific",
                                   describe_qcow2 (image));
  }
  return object;
}

static JsonObject *
describe_cache (void)
{
  JsonObject *object = json_object_new ();

  json_object_set_boolean_member (object, "writeback", TRUE);
  json_object_set_boolean_member (object, "direct", FALSE);
  json_object_set_boolean_member (object, "no-flush", FALSE);
  return object;
}

/* The qcow2 filter does not write; other filters may, to what lies above
 * it, and then the node has a size.
 */
static gboolean
is_read_only (const struct dirty_node *node)
{
  return node->read_only || !node->sized;
}

static JsonObject *
describe_node (const struct dirty_node *node)
{
  static const char *const zeroes[] = {
    "backing_file_depth", "bps", "bps_rd", "bps_wr", "iops", "iops_rd",
    "iops_wr", "write_threshold",
  };
  const struct dirty_image *image = node->image;
  JsonObject *object = json_object_new ();

  json_object_set_string_member (object, "node-name", node->name);
  json_object_set_string_member (object, "file",
                                 image ? image->filename : "");
  json_object_set_string_member (object, "drv", image ? "qcow2" : "raw");
  json_object_set_boolean_member (object, "ro", is_read_only (node));
  if (node->persist)
    json_object_set_boolean_member (object, "active", !node->inactive);
  json_object_set_boolean_member (object, "encrypted",
                                  image && image->encrypted);
  json_object_set_string_member (object, "detect_zeroes", "off");
  for (size_t i = 0; i < G_N_ELEMENTS (zeroes); ++i)
    json_object_set_int_member (object, zeroes[i], 0);
  json_object_set_object_member (object, "cache", describe_cache ());
  json_object_set_object_member (object, "image", describe_image (node));
  if (node->bitmaps->len > 0)
    json_object_set_array_member (object, "dirty-bitmaps",
                                  describe_bitmaps (node));
  return object;
}

static JsonNode *
query_named_block_nodes (JsonObject *args, gpointer opaque, GError **error)
{
  JsonNode *result;
  JsonArray *array;
  gboolean flat;

  if (control_args_only (args, error, "flat", NULL) == -1 ||
      control_args_boolean (args, "flat", FALSE, &flat, error) == -1)
    return NULL;
  array = json_array_new ();
  dirty_lock ();
  {
    g_autoptr (GPtrArray) nodes = dirty_nodes_list ();

    for (guint i = 0; i < nodes->len; ++i)
      json_array_add_object_element (
        array, describe_node (g_ptr_array_index (nodes, i)));
  }
  dirty_unlock ();
  result = json_node_new (JSON_NODE_ARRAY);
  json_node_take_array (result, array);
  return result;
}

/* The nodes whose images can be given away: the one of this name, or all.
 * None with error set.  They are not changed under the lock, which is for
 * looking only.
 */
static GPtrArray *
list_persistent (const char *name, GError **error)
{
  g_autoptr (GPtrArray) all = NULL;
  GPtrArray *list = g_ptr_array_new ();
  struct dirty_node *only = NULL;

  dirty_lock ();
  all = dirty_nodes_list ();
  if (name)
    only = dirty_node_find (name, error);
  for (guint i = 0; i < all->len; ++i) {
    struct dirty_node *node = g_ptr_array_index (all, i);

    if (node->persist && (!name || node == only))
      g_ptr_array_add (list, node->persist);
  }
  dirty_unlock ();
  if (list->len > 0 || (name && !only))
    return list;
  control_fail (error, "There is no bitmap-persist filter, so no image is "
                "being written to that could be given away");
  return list;
}

static JsonNode *
blockdev_set_active (JsonObject *args, gpointer opaque, GError **error)
{
  g_autoptr (GPtrArray) list = NULL;
  const char *name = NULL;
  gboolean active;

  if (control_args_only (args, error, "node-name", "active", NULL) == -1 ||
      control_args_string (args, "node-name", FALSE, &name, error) == -1 ||
      control_args_boolean (args, "active", FALSE, &active, error) == -1)
    return NULL;
  if (!json_object_has_member (args, "active")) {
    control_fail (error, "Parameter 'active' is missing");
    return NULL;
  }
  list = list_persistent (name, error);
  for (guint i = 0; i < list->len; ++i)
    if (dirty_persist_set_active (g_ptr_array_index (list, i), active,
                                  error) == -1)
      break;
  return NULL;
}

void
control_register_persist_commands (void)
{
  control_register_command ("blockdev-set-active", blockdev_set_active,
                            NULL);
}

void
control_register_node_commands (void)
{
  control_register_command ("query-named-block-nodes",
                            query_named_block_nodes, NULL);
}
