/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "dirty/node.h"
#include "dirty/transaction.h"

/* Granularities of bitmaps of images follow their clusters, as in QEMU. */
#define DEFAULT_GRANULARITY_BITS 16
#define SMALLEST_DEFAULT_BITS 12

static GMutex lock, changes_lock;

/* The table, sorted by name. */
static GTree *nodes;            /* name -> struct dirty_node */

static char *only_name;         /* of the one node, or NULL */
static bool each_export;
static void (*watcher) (struct dirty_node *node);

G_DEFINE_QUARK (dirty-error-quark, dirty_error)

int
dirty_fail (GError **error, int code, const char *fs, ...)
{
  va_list args;

  if (error) {
    va_start (args, fs);
    g_propagate_error (error,
                       g_error_new_valist (DIRTY_ERROR, code, fs, args));
    va_end (args);
  }
  return -1;
}

void
dirty_lock (void)
{
  g_mutex_lock (&lock);
}

void
dirty_unlock (void)
{
  g_mutex_unlock (&lock);
}

void
dirty_changes_lock (void)
{
  g_mutex_lock (&changes_lock);
}

bool
dirty_changes_trylock (void)
{
  return g_mutex_trylock (&changes_lock);
}

void
dirty_changes_unlock (void)
{
  g_mutex_unlock (&changes_lock);
}

void
dirty_bitmap_free (gpointer p)
{
  struct dirty_bitmap *bitmap = p;

  dirty_bits_free (bitmap->bits);
  dirty_bits_free (bitmap->stored);
  g_free (bitmap->name);
  g_free (bitmap);
}

static void
image_free (struct dirty_image *image)
{
  if (image)
    g_free (image->filename);
  g_free (image);
}

static struct dirty_node *
node_new (const char *name)
{
  struct dirty_node *node = g_new0 (struct dirty_node, 1);

  node->name = g_strdup (name);
  node->bitmaps = g_ptr_array_new_with_free_func (dirty_bitmap_free);
  node->recording = g_ptr_array_new ();
  for (unsigned i = 0; i < DIRTY_GATES; ++i)
    dirty_gate_init (&node->gates[i]);
  return node;
}

static void
node_free (gpointer p)
{
  struct dirty_node *node = p;

  g_ptr_array_unref (node->recording);
  g_ptr_array_unref (node->bitmaps);
  for (unsigned i = 0; i < DIRTY_GATES; ++i)
    dirty_gate_clear (&node->gates[i]);
  image_free (node->image);
  g_free (node->name);
  g_free (node);
}

/* Configuration. */

int
dirty_nodes_config (const char *key, const char *value, GError **error)
{
  static const char *const several[] = { "dir", "directory", "dirfd", NULL };

  each_export |= g_strv_contains (several, key);
  if (strcmp (key, "exports") != 0)
    return 0;
  if (strcmp (value, "each") != 0 && strcmp (value, "one") != 0)
    return dirty_fail (error, EINVAL, "exports: \"%s\" is not a known value; "
                       "use exports=one or exports=each", value);
  each_export = strcmp (value, "each") == 0;
  return 1;
}

bool
dirty_nodes_each (void)
{
  return each_export;
}

void
dirty_nodes_watch (void (*given_away) (struct dirty_node *node))
{
  watcher = given_away;
}

void
dirty_node_give_away (struct dirty_node *node)
{
  node->inactive = true;
  if (watcher)
    watcher (node);
}

void
dirty_nodes_rename (const char *name)
{
  g_free (only_name);
  only_name = g_strdup (name);
}

/* Nodes. */

static int
compare_names (gconstpointer a, gconstpointer b, gpointer data)
{
  return strcmp (a, b);
}

static const char *
name_of_export (const char *base)
{
  return each_export ? base : only_name ? only_name : DIRTY_DEFAULT_NODE;
}

struct dirty_node *
dirty_node_of_known_export (const char *base)
{
  return nodes ? g_tree_lookup (nodes, name_of_export (base)) : NULL;
}

struct dirty_node *
dirty_node_of_export (const char *base)
{
  struct dirty_node *node;

  dirty_lock ();
  if (!nodes)
    nodes = g_tree_new_full (compare_names, NULL, NULL, node_free);
  node = dirty_node_of_known_export (base);
  if (!node) {
    node = node_new (name_of_export (base));
    g_tree_insert (nodes, node->name, node);
  }
  dirty_unlock ();
  return node;
}

struct dirty_node *
dirty_node_find (const char *name, GError **error)
{
  struct dirty_node *node = nodes ? g_tree_lookup (nodes, name) : NULL;

  if (!node)
    dirty_fail (error, ENOENT, "Cannot find a node with the name '%s'%s",
                name, each_export ?
                "; each export is one from the time it was first opened" :
                "");
  return node;
}

static gboolean
list_node (gpointer key, gpointer value, gpointer list)
{
  g_ptr_array_add (list, value);
  return FALSE;
}

GPtrArray *
dirty_nodes_list (void)
{
  GPtrArray *list = g_ptr_array_new ();

  if (nodes)
    g_tree_foreach (nodes, list_node, list);
  return list;
}

void
dirty_node_resize (struct dirty_node *node, uint64_t size)
{
  for (guint i = 0; i < node->bitmaps->len; ++i) {
    struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);

    dirty_bits_resize (bitmap->bits, size, bitmap->recording);
  }
  node->size = size;
  node->sized = true;
}

int
dirty_node_open (struct dirty_node *node, uint64_t size,
                 enum dirty_access access, GError **error)
{
  int r = 0;

  dirty_lock ();
  if (!node->sized || (node->size != size && node->connections == 0)) {
    dirty_gates_close (&node, 1);
    dirty_node_resize (node, size);
    dirty_gates_open (&node, 1);
  }
  else if (node->size != size)
    r = dirty_fail (error, EINVAL, "this disk has %" PRIu64 " bytes, but "
                    "node '%s' is open with %" PRIu64 ": if each export is a "
                    "disk of its own, add exports=each", size, node->name,
                    node->size);
  if (r == 0) {
    if (access == DIRTY_WRITABLE)
      node->read_only = false;
    else if (access == DIRTY_READ_ONLY && node->connections == 0)
      node->read_only = !node->image_writable;
    node->connections++;
  }
  dirty_unlock ();
  return r;
}

void
dirty_node_close (struct dirty_node *node)
{
  dirty_lock ();
  node->connections--;
  dirty_unlock ();
}

void
dirty_node_set_image (struct dirty_node *node, struct dirty_image *image)
{
  dirty_lock ();
  image_free (node->image);
  node->image = image;
  dirty_unlock ();
}

void
dirty_node_set_granularity (struct dirty_node *node, unsigned bits)
{
  dirty_lock ();
  node->granularity_bits = bits;
  dirty_unlock ();
}

unsigned
dirty_node_granularity_bits (const struct dirty_node *node)
{
  if (node->granularity_bits)
    return node->granularity_bits;
  if (!node->image)
    return DEFAULT_GRANULARITY_BITS;
  return CLAMP (g_bit_storage (node->image->cluster_size) - 1,
                SMALLEST_DEFAULT_BITS, DEFAULT_GRANULARITY_BITS);
}

void
dirty_node_mark (struct dirty_node *node, uint64_t offset, uint64_t count)
{
  const GPtrArray *sets = node->recording;

  for (guint i = 0; i < sets->len; ++i)
    dirty_bits_set (g_ptr_array_index (sets, i), offset, count);
}

void
dirty_nodes_forget_all (void)
{
  dirty_lock ();
  g_clear_pointer (&nodes, g_tree_unref);
  g_clear_pointer (&only_name, g_free);
  dirty_unlock ();
}

/* Bitmaps. */

struct dirty_bitmap *
dirty_bitmap_find (const struct dirty_node *node, const char *name,
                   GError **error)
{
  for (guint i = 0; i < node->bitmaps->len; ++i) {
    struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);

    if (strcmp (bitmap->name, name) == 0)
      return bitmap;
  }
  dirty_fail (error, ENOENT, "Dirty bitmap '%s' not found in node '%s'",
              name, node->name);
  return NULL;
}

struct dirty_bits *
dirty_bitmap_use (struct dirty_node *node, const char *name,
                  struct dirty_bitmap **bitmap, GError **error)
{
  struct dirty_bits *bits = NULL;
  struct dirty_bitmap *found;

  dirty_lock ();
  *bitmap = NULL;
  found = dirty_bitmap_find (node, name, error);
  if (found && found->inconsistent)
    dirty_fail (error, EINVAL, "Bitmap '%s' of node '%s' is inconsistent and "
                "cannot be used; it can only be removed", name, node->name);
  else if (found) {
    bits = dirty_bits_copy (found->bits);
    found->users++;
    *bitmap = found;
  }
  dirty_unlock ();
  return bits;
}

void
dirty_bitmap_unuse (struct dirty_bitmap *bitmap)
{
  dirty_lock ();
  bitmap->users--;
  dirty_unlock ();
}
