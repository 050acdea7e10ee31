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
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qcow2/codec.h"
#include "qcow2/error.h"
#include "qcow2/refcount.h"

#include "qcow2-filter.h"

enum preallocated { UNKNOWN, NO, YES };

struct disk {
  char *base;                   /* key in disks */
  unsigned refs;                /* under disks_lock; 0: may be forgotten */

  GMutex lock;                  /* for the rest; held while opening */
  unsigned users;               /* connections that use image */
  struct qcow2_image *image;
  uint8_t head[DISK_HEAD];
  uint64_t size;                /* of the container */
  enum preallocated preallocated;
  GPtrArray *snapshots;         /* NULL until first opened */
};

static GMutex disks_lock;
static GHashTable *disks;       /* base -> struct disk */

static void
disk_free (gpointer p)
{
  struct disk *disk = p;

  qcow2_image_close (disk->image);
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
  return config.each_export ? base : "";
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
  if (--disk->refs == 0 && !disk->snapshots)
    g_hash_table_remove (disks, disk->base);
  g_mutex_unlock (&disks_lock);
}

void
disk_forget_all (void)
{
  g_clear_pointer (&disks, g_hash_table_unref);
}

/* A string from an image, fit for a message. */
static char *
printable (const char *s)
{
  return s ? g_strescape (s, NULL) : g_strdup ("(no name given)");
}

int
disk_check_permitted (const struct qcow2_header *header, GError **error)
{
  if (header->crypt_method != QCOW2_CRYPT_NONE)
    return qcow2_fail (error, ENOTSUP, "the image is encrypted (%s), and "
                       "there is no qcow2-passphrase to read it with",
                       header->crypt_method == QCOW2_CRYPT_LUKS ?
                       "LUKS" : "legacy AES");
  if (header->incompatible & QCOW2_INCOMPAT_DATA_FILE) {
    g_autofree char *name = printable (header->data_file);

    return qcow2_fail (error, EPERM, "the image keeps its data in the "
                       "external data file \"%s\", which is not opened "
                       "because of qcow2-data-file=refuse (the default)",
                       name);
  }
  if (header->backing_file) {
    g_autofree char *name = printable (header->backing_file);

    return qcow2_fail (error, EPERM, "the image has the backing file \"%s\", "
                       "which is not opened because of "
                       "qcow2-backing=refuse (the default)", name);
  }
  return 0;
}

static int
read_head (const struct layer *layer, uint8_t *head, GError **error)
{
  const size_t n = MIN (layer->size, DISK_HEAD);

  memset (head, 0, DISK_HEAD);
  return n ? layer->io.pread (&layer->io, head, n, 0, error) : 0;
}

static void
log_image (const struct disk *disk, const struct qcow2_header *header)
{
  if (header->incompatible & QCOW2_INCOMPAT_CORRUPT)
    nbdkit_error ("warning: the image is marked as corrupt: what is read "
                  "from it may be wrong.  \"qemu-img check -r all\" may be "
                  "able to repair it");
  if (header->size % 512 != 0)
    nbdkit_debug ("qcow2: the disk size %" PRIu64
                  " is rounded down to a multiple of 512", header->size);
  if (qcow2_debug_verbose)
    nbdkit_debug ("qcow2: \"%s\": version %" PRIu32 ", %" PRIu64
                  " bytes, cluster_bits %" PRIu32 ", compression %s, "
                  "incompatible 0x%" PRIx64 ", compatible 0x%" PRIx64
                  ", autoclear 0x%" PRIx64 ", L1 entries %" PRIu32
                  ", snapshots %" PRIu32,
                  disk->base, header->version, header->size,
                  header->cluster_bits,
                  qcow2_codec_name (header->compression),
                  header->incompatible, header->compatible,
                  header->autoclear, header->l1_entries,
                  header->nr_snapshots);
}

/* The first user opens the image. */
static int
open_image (struct disk *disk, const struct layer *layer, GError **error)
{
  struct qcow2_image *image;

  if (read_head (layer, disk->head, error) == -1)
    return -1;
  image = qcow2_image_open (&layer->io, error);
  if (!image)
    return -1;
  if (disk_check_permitted (image->header, error) == -1) {
    qcow2_image_close (image);
    return -1;
  }

  qcow2_image_set_cache_size (image, config.cache_size);
  log_image (disk, image->header);
  disk->image = image;
  disk->size = layer->size;
  disk->preallocated = UNKNOWN;
  if (disk->snapshots)
    g_ptr_array_unref (disk->snapshots);
  disk->snapshots = g_ptr_array_ref (image->snapshots);
  return 0;
}

/* The others share it. */
static int
check_same (const struct disk *disk, const struct layer *layer,
            GError **error)
{
  uint8_t head[DISK_HEAD];

  if (read_head (layer, head, error) == -1)
    return -1;
  if (layer->size != disk->size || memcmp (head, disk->head, DISK_HEAD) != 0)
    return qcow2_fail (error, EINVAL, "this connection does not see the "
                       "image that others are using: either the image was "
                       "replaced, or the plugin serves another one for each "
                       "export name, which needs exports=each");
  return 0;
}

struct disk *
disk_open (const char *base, const struct layer *layer, GError **error)
{
  struct disk *disk = disk_ref (base);
  int r;

  g_mutex_lock (&disk->lock);
  r = disk->users == 0 ? open_image (disk, layer, error) :
    check_same (disk, layer, error);
  if (r == 0)
    disk->users++;
  g_mutex_unlock (&disk->lock);

  if (r == -1) {
    disk_unref (disk);
    return NULL;
  }
  return disk;
}

void
disk_close (struct disk *disk)
{
  g_mutex_lock (&disk->lock);
  if (--disk->users == 0)
    g_clear_pointer (&disk->image, qcow2_image_close);
  g_mutex_unlock (&disk->lock);
  disk_unref (disk);
}

struct qcow2_image *
disk_image (const struct disk *disk)
{
  return disk->image;
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

/* Space that the local file takes, if it is the container: its size and
 * its first bytes tell.  False if it is not, or there is no such file.
 */
static bool
local_allocation (const struct disk *disk, uint64_t *bytes)
{
  uint8_t head[DISK_HEAD] = { 0 };
  struct stat st;
  int fd;
  bool same;

  if (!config.file || config.files != 1)
    return false;
  fd = open (config.file, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd == -1)
    return false;
  same = fstat (fd, &st) == 0 && S_ISREG (st.st_mode) &&
    (uint64_t) st.st_size == disk->size &&
    pread (fd, head, DISK_HEAD, 0) >= 0 &&
    memcmp (head, disk->head, DISK_HEAD) == 0;
  close (fd);
  *bytes = same ? (uint64_t) st.st_blocks * 512 : 0;
  return same;
}

/* QEMU's rule, so that the map is the one that qemu-img shows: of the
 * clusters in use, far more than the file has space for.
 */
static bool
detect_preallocated (const struct disk *disk, const struct layer *layer)
{
  const uint64_t cluster_size = disk->image->cluster_size;
  const uint64_t clusters = disk->size / cluster_size + 1;
  uint64_t allocation, present, limit, used;

  if (!layer->can_extents || !local_allocation (disk, &allocation))
    return false;
  present = allocation / cluster_size;
  limit = MAX (present * 10 / 9, present + 2);
  return clusters >= limit &&
    qcow2_refcount_count_used (disk->image, &layer->io, limit, &used,
                               NULL) == 0 &&
    used >= limit;
}

bool
disk_is_preallocated (struct disk *disk, const struct layer *layer)
{
  bool result;

  g_mutex_lock (&disk->lock);
  if (disk->preallocated == UNKNOWN)
    disk->preallocated = detect_preallocated (disk, layer) ? YES : NO;
  result = disk->preallocated == YES;
  g_mutex_unlock (&disk->lock);
  return result;
}
