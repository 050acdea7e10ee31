/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The disks below us and their open images.
 *
 * Most plugins serve one disk whatever the export name is, so all names
 * share one image.  Only if the parameters say so is each export a disk
 * of its own.  As that is an assumption about the layers below, every
 * further connection is checked to be looking at the same container.
 */

#include <config.h>

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "dirty/node.h"
#include "qcow2/error.h"

#include "qcow2-filter.h"

/* The first bytes of a container, to tell one from another. */
#define HEAD 512

struct disk {
  char *base;                   /* key in disks */
  unsigned refs;                /* under disks_lock; 0: may be forgotten */

  GMutex lock;                  /* for the rest; held while opening */
  unsigned users;               /* connections that use top */
  struct node *top;
  uint8_t head[HEAD];
  uint64_t size;                /* of the container */
  GPtrArray *snapshots;         /* NULL until first opened */
  bool checked;                 /* qcow2-check=full was done */
  atomic_bool given_away;
};

static GMutex disks_lock;
static GHashTable *disks;       /* base -> struct disk */

static void
disk_free (gpointer p)
{
  struct disk *disk = p;

  chain_close (disk->top);
  if (disk->snapshots)
    g_ptr_array_unref (disk->snapshots);
  g_mutex_clear (&disk->lock);
  g_free (disk->base);
  g_free (disk);
}

/* The name under which BASE base is kept. */
static const char *
disk_key (const char *base)
{
  return dirty_nodes_each () ? base : "";
}

static struct disk *
disk_ref (const char *base)
{
  const char *key = disk_key (base);
  struct disk *disk;

  g_mutex_lock (&disks_lock);
  if (!disks)
    disks = g_hash_table_new_full (g_str_hash, g_str_equal, NULL, disk_free);
  disk = g_hash_table_lookup (disks, key);
  if (!disk) {
    disk = g_new0 (struct disk, 1);
    disk->base = g_strdup (key);
    g_mutex_init (&disk->lock);
    g_hash_table_insert (disks, disk->base, disk);
  }
  disk->refs++;
  g_mutex_unlock (&disks_lock);
  return disk;
}

/* Clients choose export names, so those that never led to an image are
 * forgotten; the others are kept for their list of snapshots.
 */
static void
disk_unref (struct disk *disk)
{
  g_mutex_lock (&disks_lock);
  if (--disk->refs == 0 && !disk->snapshots &&
      !atomic_load (&disk->given_away))
    g_hash_table_remove (disks, disk->base);
  g_mutex_unlock (&disks_lock);
}

void
disk_forget_all (void)
{
  g_clear_pointer (&disks, g_hash_table_unref);
}

static int
read_head (const struct layer *layer, uint8_t *head, GError **error)
{
  const struct qcow2_io *io = &layer->source.io;
  const size_t n = MIN (layer->limits.size, HEAD);

  memset (head, 0, HEAD);
  return n ? io->pread (io, head, n, 0, error) : 0;
}

/* The first client to come lets the images be checked. */
static int
check_once (struct disk *disk, struct layer *layer, GError **error)
{
  if (disk->checked || !config.check)
    return 0;
  if (check_chain (disk->top, &layer->source, error) == -1)
    return -1;
  disk->checked = true;
  return 0;
}

/* The first user opens the chain. */
static int
open_chain (struct disk *disk, const char *base, struct layer *layer,
            nbdkit_backend *backend, GError **error)
{
  if (read_head (layer, disk->head, error) == -1)
    return -1;
  disk->top = chain_open (&layer->source, backend, error);
  if (!disk->top)
    return -1;
  if (backend && check_once (disk, layer, error) == -1) {
    g_clear_pointer (&disk->top, chain_close);
    return -1;
  }
  disk->size = layer->limits.size;
  if (disk->snapshots)
    g_ptr_array_unref (disk->snapshots);
  disk->snapshots = g_ptr_array_ref (disk->top->image->snapshots);
  return 0;
}

/* Fields of the header that storing bitmaps does not change. */
static const struct { size_t offset, length; } constant[] = {
  { 0, 8 },                     /* magic, version */
  { 20, 28 },                   /* clusters, size, encryption, L1 table */
  { 60, 12 },                   /* snapshots */
};

/* Does a connection see the container that others see? */
static bool
is_same (const struct disk *disk, const uint8_t *head, uint64_t size)
{
  if (!container_is_written ())
    return size == disk->size && memcmp (head, disk->head, HEAD) == 0;
  for (size_t i = 0; i < G_N_ELEMENTS (constant); ++i)
    if (memcmp (head + constant[i].offset, disk->head + constant[i].offset,
                constant[i].length) != 0)
      return false;
  return size >= disk->size;
}

/* The others share it. */
static int
check_same (const struct disk *disk, const struct layer *layer,
            GError **error)
{
  uint8_t head[HEAD];

  if (read_head (layer, head, error) == -1)
    return -1;
  if (!is_same (disk, head, layer->limits.size))
    return qcow2_fail (error, EINVAL, "this connection does not see the "
                       "image that others are using: either the image was "
                       "replaced, or the plugin serves another one for each "
                       "export name, which needs exports=each");
  return 0;
}

struct disk *
disk_open (const char *base, struct layer *layer, nbdkit_backend *backend,
           GError **error)
{
  struct disk *disk = disk_ref (base);
  bool first;
  int r;

  g_mutex_lock (&disk->lock);
  first = disk->users == 0;
  if (atomic_load (&disk->given_away))
    r = qcow2_fail (error, EBUSY, "%s: another program may be using the "
                    "image; \"blockdev-set-active\" takes it back",
                    layer->source.name);
  else
    r = first ? open_chain (disk, base, layer, backend, error) :
      check_same (disk, layer, error);
  if (r == 0)
    disk->users++;
  g_mutex_unlock (&disk->lock);

  if (r == -1) {
    disk_unref (disk);
    return NULL;
  }
  /* Without the lock, for which who has the lock of nodes may wait. */
  if (first)
    announce_image (base, disk->top->image->header, &layer->source);
  return disk;
}

void
disk_close (struct disk *disk)
{
  g_mutex_lock (&disk->lock);
  if (--disk->users == 0)
    g_clear_pointer (&disk->top, chain_close);
  g_mutex_unlock (&disk->lock);
  disk_unref (disk);
}

struct node *
disk_top (const struct disk *disk)
{
  return disk->top;
}

GPtrArray *
disk_last_snapshots (const char *base)
{
  GPtrArray *result = NULL;
  struct disk *disk = disk_ref (base);

  g_mutex_lock (&disk->lock);
  if (disk->snapshots)
    result = g_ptr_array_ref (disk->snapshots);
  g_mutex_unlock (&disk->lock);
  disk_unref (disk);
  return result;
}

int
disk_give_away (const char *base, GError **error)
{
  struct disk *disk = disk_ref (base);
  const bool locked = g_mutex_trylock (&disk->lock);
  int r = 0;

  /* Who opens it may take long. */
  if (!locked || disk->users > 0)
    r = qcow2_fail (error, EBUSY, "clients are connected to the image's "
                    "disk, so it cannot be given to another program");
  else
    atomic_store (&disk->given_away, true);
  if (locked)
    g_mutex_unlock (&disk->lock);
  disk_unref (disk);
  return r;
}

void
disk_take_back (const char *base)
{
  struct disk *disk = disk_ref (base);

  atomic_store (&disk->given_away, false);
  disk_unref (disk);
}
