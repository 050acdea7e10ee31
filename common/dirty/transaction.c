/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Actions change nodes and bitmaps at once, and leave behind steps: how
 * to undo them, and what is to be freed when that is no longer needed.  A
 * bitmap whose content changes gets another set, the old one is kept.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "dirty/persist.h"
#include "dirty/transaction.h"

struct step {
  void (*commit) (gpointer opaque);
  void (*undo) (gpointer opaque);
  gpointer opaque;
};

struct dirty_transaction {
  GPtrArray *nodes;             /* each once */
  GArray *steps;                /* of struct step */
  GPtrArray *to_store;          /* nodes with changed persistent bitmaps */
};

void
dirty_gates_close (struct dirty_node **nodes, size_t n)
{
  for (unsigned owner = 0; owner < DIRTY_GATES; ++owner)
    for (size_t i = 0; i < n; ++i)
      dirty_gate_close (&nodes[i]->gates[owner]);
}

/* Let writes mark what has become the content of the bitmaps. */
static void
update_recording (struct dirty_node *node)
{
  g_ptr_array_set_size (node->recording, 0);
  for (guint i = 0; i < node->bitmaps->len; ++i) {
    const struct dirty_bitmap *bitmap = g_ptr_array_index (node->bitmaps, i);

    if (bitmap->recording && !bitmap->inconsistent)
      g_ptr_array_add (node->recording, bitmap->bits);
  }
}

void
dirty_gates_open (struct dirty_node **nodes, size_t n)
{
  for (size_t i = 0; i < n; ++i) {
    update_recording (nodes[i]);
    for (unsigned owner = DIRTY_GATES; owner-- > 0; )
      dirty_gate_open (&nodes[i]->gates[owner]);
  }
}

struct dirty_transaction *
dirty_transaction_begin (const GPtrArray *nodes)
{
  struct dirty_transaction *t = g_new0 (struct dirty_transaction, 1);

  t->nodes = g_ptr_array_new ();
  t->steps = g_array_new (FALSE, FALSE, sizeof (struct step));
  t->to_store = g_ptr_array_new ();
  for (guint i = 0; i < nodes->len; ++i) {
    gpointer node = g_ptr_array_index (nodes, i);

    if (!g_ptr_array_find (t->nodes, node, NULL))
      g_ptr_array_add (t->nodes, node);
  }
  dirty_gates_close ((struct dirty_node **) t->nodes->pdata, t->nodes->len);
  return t;
}

static void
end (struct dirty_transaction *t)
{
  dirty_gates_open ((struct dirty_node **) t->nodes->pdata, t->nodes->len);
  g_ptr_array_unref (t->nodes);
  g_array_unref (t->steps);
  g_ptr_array_unref (t->to_store);
  g_free (t);
}

static int
store_nodes (const struct dirty_transaction *t, bool only_add,
             GError **error)
{
  for (guint i = 0; i < t->to_store->len; ++i) {
    const struct dirty_node *node = g_ptr_array_index (t->to_store, i);

    if (dirty_persist_commit (node->persist, only_add, error) == -1)
      return -1;
  }
  return 0;
}

/* What moves from one node to another is stored there first. */
static int
store (const struct dirty_transaction *t, GError **error)
{
  if (t->to_store->len > 1 && store_nodes (t, true, error) == -1)
    return -1;
  return store_nodes (t, false, error);
}

static void
undo_all (const struct dirty_transaction *t)
{
  for (guint i = t->steps->len; i-- > 0; ) {
    const struct step *step = &g_array_index (t->steps, struct step, i);

    if (step->undo)
      step->undo (step->opaque);
  }
}

int
dirty_transaction_commit (struct dirty_transaction *t, GError **error)
{
  if (store (t, error) == -1) {
    undo_all (t);
    for (guint i = 0; i < t->to_store->len; ++i) {
      const struct dirty_node *node = g_ptr_array_index (t->to_store, i);

      dirty_persist_revert (node->persist);
    }
    end (t);
    return -1;
  }
  for (guint i = 0; i < t->steps->len; ++i) {
    const struct step *step = &g_array_index (t->steps, struct step, i);

    if (step->commit)
      step->commit (step->opaque);
  }
  end (t);
  return 0;
}

void
dirty_transaction_abort (struct dirty_transaction *t)
{
  undo_all (t);
  end (t);
}

int
dirty_transaction_end (struct dirty_transaction *t, int r, GError **error)
{
  if (r == 0)
    return dirty_transaction_commit (t, error);
  dirty_transaction_abort (t);
  return r;
}

void
dirty_transaction_push (struct dirty_transaction *t,
                        void (*commit) (gpointer opaque),
                        void (*undo) (gpointer opaque), gpointer opaque)
{
  const struct step step = { commit, undo, opaque };

  g_array_append_val (t->steps, step);
}

/* A persistent bitmap of the node is being changed. */
static void
touch (struct dirty_transaction *t, const struct dirty_bitmap *bitmap)
{
  struct dirty_node *node = bitmap->node;

  if (bitmap->persistent && dirty_persist_is_writable (node->persist) &&
      !g_ptr_array_find (t->to_store, node, NULL))
    g_ptr_array_add (t->to_store, node);
}

/* What is remembered of a bitmap. */
struct before {
  struct dirty_bitmap *bitmap;
  struct dirty_bitmap state;
  guint index;                  /* in its node's list */
};

static struct before *
remember (struct dirty_bitmap *bitmap)
{
  struct before *before = g_new0 (struct before, 1);

  before->bitmap = bitmap;
  before->state = *bitmap;
  g_ptr_array_find (bitmap->node->bitmaps, bitmap, &before->index);
  return before;
}

/* Take a bitmap off its node's list without freeing it. */
static void
unlist (struct dirty_bitmap *bitmap)
{
  guint index;

  if (g_ptr_array_find (bitmap->node->bitmaps, bitmap, &index))
    g_ptr_array_steal_index (bitmap->node->bitmaps, index);
}

/* Checks. */

enum { ALLOW_BUSY = 1, ALLOW_READ_ONLY = 2, ALLOW_INCONSISTENT = 4 };

static int
check_active (const struct dirty_node *node, GError **error)
{
  if (node->inactive)
    return dirty_fail (error, EROFS, "Node '%s' is inactive: use "
                       "blockdev-set-active to take it back", node->name);
  return 0;
}

/* Can a persistent bitmap of the node be changed? */
static int
check_persist (const struct dirty_node *node, const char *name,
               GError **error)
{
  if (!node->persist)
    return dirty_fail (error, ENOTSUP, "Bitmap '%s' cannot be persistent: "
                       "node '%s' has no place to store it; the "
                       "bitmap-persist filter is one", name, node->name);
  return dirty_persist_check (node->persist, error);
}

static struct dirty_bitmap *
find_usable (struct dirty_node *node, const char *name, unsigned allow,
             GError **error)
{
  struct dirty_bitmap *bitmap = dirty_bitmap_find (node, name, error);

  if (!bitmap || check_active (node, error) == -1)
    return NULL;
  if (bitmap->users && !(allow & ALLOW_BUSY))
    dirty_fail (error, EBUSY, "Bitmap '%s' of node '%s' is busy: a client "
                "or another operation is using it", name, node->name);
  else if (node->read_only && !(allow & ALLOW_READ_ONLY))
    dirty_fail (error, EROFS, "Bitmap '%s' of node '%s' is read-only, as is "
                "its disk, and cannot be modified", name, node->name);
  else if (bitmap->inconsistent && !(allow & ALLOW_INCONSISTENT))
    dirty_fail (error, EINVAL, "Bitmap '%s' of node '%s' is inconsistent and "
                "cannot be used; it can only be removed", name, node->name);
  else if (!bitmap->persistent ||
           (allow & ALLOW_READ_ONLY &&
            !dirty_persist_is_writable (node->persist)) ||
           check_persist (node, name, error) == 0)
    return bitmap;
  return NULL;
}

static int
check_new_name (const struct dirty_node *node, const char *name,
                GError **error)
{
  if (!*name)
    return dirty_fail (error, EINVAL, "The name of a bitmap cannot be empty");
  if (strlen (name) > DIRTY_MAX_NAME)
    return dirty_fail (error, EINVAL, "The name of the bitmap is too long: "
                       "%zu bytes, of at most %d", strlen (name),
                       DIRTY_MAX_NAME);
  if (strcmp (name, DIRTY_INTENT_NAME) == 0)
    return dirty_fail (error, EINVAL, "The name '%s' is reserved for what "
                       "the bitmap-persist filter stores", name);
  if (dirty_bitmap_find (node, name, NULL))
    return dirty_fail (error, EEXIST, "Bitmap already exists: '%s' of node "
                       "'%s'", name, node->name);
  return 0;
}

/* Can bitmaps of this node be made? */
static int
check_node (const struct dirty_node *node, GError **error)
{
  if (!node->sized)
    return dirty_fail (error, EINVAL, "Node '%s' has not been opened yet, so "
                       "the size of its disk is not known", node->name);
  if (node->read_only)
    return dirty_fail (error, EROFS, "Node '%s' is read-only", node->name);
  return check_active (node, error);
}

/* As a power of two; 0 stands for the node's own.  -1 with error set. */
static int
choose_granularity (const struct dirty_node *node, uint64_t granularity,
                    GError **error)
{
  const int bits = granularity ? dirty_granularity_bits (granularity) :
    (int) dirty_node_granularity_bits (node);

  if (bits == -1)
    return dirty_fail (error, EINVAL, "Granularity must be a power of 2, at "
                       "least %" PRIu64 " and at most %" PRIu64 ", not %"
                       PRIu64, UINT64_C (1) << DIRTY_MIN_GRANULARITY_BITS,
                       UINT64_C (1) << DIRTY_MAX_GRANULARITY_BITS,
                       granularity);
  return bits;
}

/* Actions. */

static void
undo_add (gpointer opaque)
{
  unlist (opaque);
  dirty_bitmap_free (opaque);
}

int
dirty_bitmap_add (struct dirty_transaction *t, struct dirty_node *node,
                  const char *name, uint64_t granularity, bool persistent,
                  bool recording, GError **error)
{
  struct dirty_bitmap *bitmap;
  int bits;

  if (check_node (node, error) == -1 ||
      check_new_name (node, name, error) == -1)
    return -1;
  bits = choose_granularity (node, granularity, error);
  if (bits == -1)
    return -1;
  if (persistent && check_persist (node, name, error) == -1)
    return -1;
  bitmap = g_new0 (struct dirty_bitmap, 1);
  bitmap->node = node;
  bitmap->name = g_strdup (name);
  bitmap->bits = dirty_bits_new (node->size, bits);
  bitmap->recording = recording;
  bitmap->persistent = bitmap->replaced = persistent;
  g_ptr_array_add (node->bitmaps, bitmap);
  dirty_transaction_push (t, NULL, undo_add, bitmap);
  touch (t, bitmap);
  return 0;
}

static void
commit_remove (gpointer opaque)
{
  struct before *before = opaque;

  dirty_bitmap_free (before->bitmap);
  g_free (before);
}

static void
undo_remove (gpointer opaque)
{
  struct before *before = opaque;

  g_ptr_array_insert (before->bitmap->node->bitmaps, before->index,
                      before->bitmap);
  g_free (before);
}

int
dirty_bitmap_remove (struct dirty_transaction *t, struct dirty_node *node,
                     const char *name, GError **error)
{
  struct dirty_bitmap *bitmap = find_usable (node, name, ALLOW_INCONSISTENT,
                                             error);

  if (!bitmap)
    return -1;
  dirty_transaction_push (t, commit_remove, undo_remove, remember (bitmap));
  touch (t, bitmap);
  unlist (bitmap);
  return 0;
}

static void
commit_content (gpointer opaque)
{
  struct before *before = opaque;

  dirty_bits_free (before->state.bits);
  g_free (before);
}

static void
undo_content (gpointer opaque)
{
  struct before *before = opaque;

  dirty_bits_free (before->bitmap->bits);
  before->bitmap->bits = before->state.bits;
  before->bitmap->replaced = before->state.replaced;
  g_free (before);
}

/* Let a bitmap have another content, until the transaction is aborted. */
static void
set_content (struct dirty_transaction *t, struct dirty_bitmap *bitmap,
             struct dirty_bits *bits)
{
  dirty_transaction_push (t, commit_content, undo_content,
                          remember (bitmap));
  touch (t, bitmap);
  bitmap->bits = bits;
  bitmap->replaced = true;
}

int
dirty_bitmap_clear (struct dirty_transaction *t, struct dirty_node *node,
                    const char *name, GError **error)
{
  struct dirty_bitmap *bitmap = find_usable (node, name, 0, error);

  if (!bitmap)
    return -1;
  set_content (t, bitmap,
               dirty_bits_new (node->size,
                               dirty_bits_granularity_bits (bitmap->bits)));
  return 0;
}

static void
undo_record (gpointer opaque)
{
  struct before *before = opaque;

  before->bitmap->recording = before->state.recording;
  g_free (before);
}

int
dirty_bitmap_record (struct dirty_transaction *t, struct dirty_node *node,
                     const char *name, bool recording, GError **error)
{
  struct dirty_bitmap *bitmap = find_usable (node, name, ALLOW_READ_ONLY,
                                             error);

  if (!bitmap)
    return -1;
  dirty_transaction_push (t, g_free, undo_record, remember (bitmap));
  touch (t, bitmap);
  bitmap->recording = recording;
  return 0;
}

int
dirty_bitmap_merge (struct dirty_transaction *t, struct dirty_node *node,
                    const char *target, struct dirty_node *source_node,
                    const char *source, GError **error)
{
  struct dirty_bitmap *to = find_usable (node, target, 0, error), *from;
  struct dirty_bits *bits;

  if (!to)
    return -1;
  from = find_usable (source_node, source, ALLOW_BUSY | ALLOW_READ_ONLY,
                      error);
  if (!from)
    return -1;
  if (node->size != source_node->size)
    return dirty_fail (error, EINVAL, "Bitmap '%s' of node '%s' cannot be "
                       "merged into '%s' of node '%s': their disks have "
                       "different sizes", source, source_node->name, target,
                       node->name);
  bits = dirty_bits_copy (to->bits);
  dirty_bits_merge (bits, from->bits);
  dirty_bits_compact (bits);
  set_content (t, to, bits);
  return 0;
}

static void
commit_move (gpointer opaque)
{
  struct before *before = opaque;

  g_free (before->state.name);
  g_free (before);
}

static void
undo_move (gpointer opaque)
{
  struct before *before = opaque;

  unlist (before->bitmap);
  g_free (before->bitmap->name);
  before->bitmap->node = before->state.node;
  before->bitmap->name = before->state.name;
  before->bitmap->replaced = before->state.replaced;
  g_ptr_array_insert (before->bitmap->node->bitmaps, before->index,
                      before->bitmap);
  g_free (before);
}

/* A bitmap is stored in another container before it is removed from its
 * own, so the name must be free there already.
 */
static int
check_move (const struct dirty_node *node,
            const struct dirty_node *target_node, const char *target_name,
            GError **error)
{
  if (check_persist (target_node, target_name, error) == -1)
    return -1;
  if (node == target_node ||
      !dirty_persist_has (target_node->persist, target_name))
    return 0;
  return dirty_fail (error, EEXIST, "Bitmap '%s' of node '%s' is removed by "
                     "the same transaction: move another one there in the "
                     "next", target_name, target_node->name);
}

int
dirty_bitmap_move (struct dirty_transaction *t, struct dirty_node *node,
                   const char *name, struct dirty_node *target_node,
                   const char *target_name, GError **error)
{
  struct dirty_bitmap *bitmap = find_usable (node, name, 0, error);

  if (!bitmap || check_node (target_node, error) == -1 ||
      check_new_name (target_node, target_name, error) == -1)
    return -1;
  if (node->size != target_node->size)
    return dirty_fail (error, EINVAL, "Bitmap '%s' of node '%s' cannot be "
                       "moved to node '%s': their disks have different "
                       "sizes", name, node->name, target_node->name);
  if (bitmap->persistent &&
      check_move (node, target_node, target_name, error) == -1)
    return -1;
  dirty_transaction_push (t, commit_move, undo_move, remember (bitmap));
  touch (t, bitmap);
  unlist (bitmap);
  bitmap->node = target_node;
  bitmap->name = g_strdup (target_name);
  bitmap->replaced = true;
  g_ptr_array_add (target_node->bitmaps, bitmap);
  touch (t, bitmap);
  return 0;
}
