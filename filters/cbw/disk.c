/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Disks and their snapshots.
 *
 * A write goes through the gate of its node, and looks there whether all
 * snapshots of the disk have what it will change: if so it is passed down,
 * inside the gate.  If not it leaves, copies, and comes again; meanwhile
 * another snapshot may have come.  So whoever closes the gate, to make or
 * delete a snapshot, waits for writes of the disk only, not for targets.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "dirty/transaction.h"

#include "cbw.h"

static GHashTable *disks;       /* struct dirty_node -> struct disk */

static void
disk_free (gpointer p)
{
  struct disk *disk = p;

  g_ptr_array_unref (disk->snapshots);
  g_ptr_array_unref (disk->guests);
  g_mutex_clear (&disk->guests_lock);
  g_free (disk);
}

static snapshot_list *
list_new (void)
{
  return g_ptr_array_new_with_free_func ((GDestroyNotify) snapshot_unref);
}

/* All of the list but one, which may be NULL. */
static snapshot_list *
list_copy (const snapshot_list *list, const struct snapshot *without)
{
  snapshot_list *copy = list_new ();

  for (guint i = 0; i < list->len; ++i) {
    struct snapshot *s = g_ptr_array_index (list, i);

    if (s != without)
      g_ptr_array_add (copy, snapshot_ref (s));
  }
  return copy;
}

struct disk *
disk_of_known_node (const struct dirty_node *node)
{
  return disks ? g_hash_table_lookup (disks, node) : NULL;
}

struct disk *
disk_of_node (struct dirty_node *node)
{
  struct disk *disk;

  dirty_lock ();
  if (!disks)
    disks = g_hash_table_new_full (NULL, NULL, NULL, disk_free);
  disk = disk_of_known_node (node);
  if (!disk) {
    disk = g_new0 (struct disk, 1);
    disk->node = node;
    disk->snapshots = list_new ();
    disk->guests = g_ptr_array_new ();
    g_mutex_init (&disk->guests_lock);
    g_hash_table_insert (disks, node, disk);
  }
  dirty_unlock ();
  return disk;
}

struct snapshot *
disk_find (const struct disk *disk, const char *name)
{
  for (guint i = 0; i < disk->snapshots->len; ++i) {
    struct snapshot *s = g_ptr_array_index (disk->snapshots, i);

    if (strcmp (s->name, name) == 0)
      return s;
  }
  return NULL;
}

void
disk_foreach_snapshot (void (*call) (struct snapshot *s, gpointer opaque),
                       gpointer opaque)
{
  g_autoptr (GPtrArray) nodes = dirty_nodes_list ();

  for (guint i = 0; i < nodes->len; ++i) {
    struct disk *disk = disk_of_known_node (g_ptr_array_index (nodes, i));

    if (disk)
      g_ptr_array_foreach (disk->snapshots, (GFunc) call, opaque);
  }
}

/* Adding. */

struct change {
  struct disk *disk;
  snapshot_list *before;
};

static void
commit_change (gpointer opaque)
{
  struct change *change = opaque;

  g_ptr_array_unref (change->before);
  g_free (change);
}

static void
undo_change (gpointer opaque)
{
  struct change *change = opaque;

  g_ptr_array_unref (change->disk->snapshots);
  change->disk->snapshots = change->before;
  g_free (change);
}

int
disk_add (struct dirty_transaction *t, struct disk *disk,
          struct snapshot *s, GError **error)
{
  struct change *change;

  if (disk_find (disk, s->name))
    return dirty_fail (error, EEXIST, "Snapshot already exists: '%s' of node "
                       "'%s'", s->name, disk->node->name);
  if (snapshot_freeze (s, error) == -1)
    return -1;
  change = g_new (struct change, 1);
  change->disk = disk;
  change->before = disk->snapshots;
  disk->snapshots = list_copy (change->before, NULL);
  g_ptr_array_add (disk->snapshots, snapshot_ref (s));
  dirty_transaction_push (t, commit_change, undo_change, change);
  return 0;
}

struct snapshot *
disk_remove (const char *node_name, const char *name, GError **error)
{
  struct dirty_node *node;
  struct disk *disk;
  struct snapshot *s = NULL;

  dirty_lock ();
  node = dirty_node_find (node_name, error);
  disk = node ? disk_of_known_node (node) : NULL;
  if (disk)
    s = disk_find (disk, name);
  if (node && !s)
    dirty_fail (error, ENOENT, "Snapshot '%s' not found in node '%s'", name,
                node_name);
  if (s) {
    snapshot_list *before = disk->snapshots;

    snapshot_ref (s);
    dirty_gates_close (&node, 1);
    disk->snapshots = list_copy (before, s);
    snapshot_stop (s, "it has been deleted");
    dirty_gates_open (&node, 1);
    g_ptr_array_unref (before);
  }
  dirty_unlock ();
  return s;
}

/* Those of the command line. */

static struct snapshot *
make (const struct disk *disk, uint64_t size, const char *name,
      GError **error)
{
  const struct snapshot_options options = {
    .name = name,
    .bitmap = config.bitmap,
    .target = config.target,
    .break_snapshot = config.break_snapshot,
    .timeout = config.timeout,
    .cluster_size = config.cluster_size,
  };

  return snapshot_new (disk->node, size, &options, error);
}

/* All of them at one point in time. */
static int
start (struct disk *disk, const snapshot_list *list, GError **error)
{
  g_autoptr (GPtrArray) nodes = g_ptr_array_new ();
  struct dirty_transaction *t;
  int r = 0;

  g_ptr_array_add (nodes, disk->node);
  dirty_changes_lock ();
  dirty_lock ();
  t = dirty_transaction_begin (nodes);
  for (guint i = 0; i < list->len && r == 0; ++i)
    r = disk_add (t, disk, g_ptr_array_index (list, i), error);
  r = dirty_transaction_end (t, r, error);
  dirty_unlock ();
  dirty_changes_unlock ();
  return r;
}

int
disk_start (struct disk *disk, GError **error)
{
  static GMutex one_at_a_time;
  g_autoptr (GPtrArray) list = list_new ();
  uint64_t size;
  int r = 0;

  if (!config.snapshots)
    return 0;
  g_mutex_lock (&one_at_a_time);
  dirty_lock ();
  size = disk->node->size;
  dirty_unlock ();
  if (!disk->started) {
    for (guint i = 0; i < config.snapshots->len && r == 0; ++i) {
      struct snapshot *s =
        make (disk, size, g_ptr_array_index (config.snapshots, i), error);

      if (s)
        g_ptr_array_add (list, s);
      else
        r = -1;
    }
    if (r == 0)
      r = start (disk, list, error);
    disk->started = r == 0;
  }
  g_mutex_unlock (&one_at_a_time);
  return r;
}

void
disk_check_size (struct disk *disk, uint64_t size)
{
  dirty_lock ();
  for (guint i = 0; i < disk->snapshots->len; ++i) {
    struct snapshot *s = g_ptr_array_index (disk->snapshots, i);

    if (size < s->size)
      snapshot_break (s, EIO, false, "the disk has become smaller");
  }
  dirty_unlock ();
}

/* Another program may write to it, and we do not see what. */
static void
break_all (struct dirty_node *node)
{
  const struct disk *disk = disk_of_known_node (node);

  for (guint i = 0; disk && i < disk->snapshots->len; ++i)
    snapshot_break (g_ptr_array_index (disk->snapshots, i), EIO, false,
                    "the disk was given to another program");
}

void
disks_watch (void)
{
  dirty_nodes_watch (break_all);
}

/* The end. */

static void
end_one (struct snapshot *s, gpointer opaque)
{
  snapshot_delete (s, "the server is shutting down", NULL, NULL);
}

void
disks_end_all (void)
{
  dirty_lock ();
  disk_foreach_snapshot (end_one, NULL);
  dirty_unlock ();
}

void
disks_forget_all (void)
{
  dirty_lock ();
  g_clear_pointer (&disks, g_hash_table_unref);
  dirty_unlock ();
}

/* Layers whose connections may have caches of their own. */

void
disk_add_guest (struct disk *disk, struct guest *guest)
{
  g_mutex_lock (&disk->guests_lock);
  g_ptr_array_add (disk->guests, guest);
  g_mutex_unlock (&disk->guests_lock);
}

void
disk_remove_guest (struct disk *disk, struct guest *guest)
{
  g_mutex_lock (&disk->guests_lock);
  g_ptr_array_remove (disk->guests, guest);
  g_mutex_unlock (&disk->guests_lock);
}

static int
flush_guest (struct guest *guest, int *err)
{
  nbdkit_next *next = guest->below->next;
  int r;

  if (!atomic_exchange (&guest->wrote, false))
    return 0;
  below_lock (guest->below);
  r = next->flush (next, 0, err);
  below_unlock (guest->below);
  if (r == -1) {
    *err = *err ? *err : EIO;
    atomic_store (&guest->wrote, true);
  }
  return r;
}

int
disk_settle (struct disk *disk, struct snapshot *s, int *err)
{
  int r = 0;

  if (atomic_load (&s->settled))
    return 0;
  g_mutex_lock (&disk->guests_lock);
  for (guint i = 0; i < disk->guests->len && r == 0; ++i)
    r = flush_guest (g_ptr_array_index (disk->guests, i), err);
  if (r == 0)
    atomic_store (&s->settled, true);
  g_mutex_unlock (&disk->guests_lock);
  return r;
}

/* Writes. */

static int
save (struct disk *disk, struct snapshot *s, const struct below *below,
      uint64_t offset, uint32_t count, int *err)
{
  if (below->coherent || disk_settle (disk, s, err) == 0)
    return snapshot_save (s, below, offset, count, err);
  if (!s->break_snapshot)
    return -1;
  snapshot_break (s, EIO, false, "flushing the disk: %s", g_strerror (*err));
  return 0;
}

/* Those snapshots which must copy first, or NULL. */
static snapshot_list *
list_unsaved (const snapshot_list *list, uint64_t offset, uint64_t count)
{
  snapshot_list *unsaved = NULL;

  for (guint i = 0; i < list->len; ++i) {
    struct snapshot *s = g_ptr_array_index (list, i);

    if (snapshot_is_saved (s, offset, count))
      continue;
    if (!unsaved)
      unsaved = list_new ();
    g_ptr_array_add (unsaved, snapshot_ref (s));
  }
  return unsaved;
}

int
disk_begin_write (struct disk *disk, const struct below *below,
                  uint64_t offset, uint32_t count, int *err)
{
  struct dirty_gate *gate = &disk->node->gates[DIRTY_GATE_CBW];
  snapshot_list *unsaved;
  int r = 0;

  do {
    dirty_gate_enter (gate);
    unsaved = list_unsaved (disk->snapshots, offset, count);
    if (!unsaved)
      return 0;
    dirty_gate_leave (gate);
    for (guint i = 0; i < unsaved->len && r == 0; ++i)
      r = save (disk, g_ptr_array_index (unsaved, i), below, offset, count,
                err);
    g_ptr_array_unref (unsaved);
  } while (r == 0);
  return -1;
}

void
disk_end_write (struct disk *disk)
{
  dirty_gate_leave (&disk->node->gates[DIRTY_GATE_CBW]);
}
