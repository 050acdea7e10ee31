/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The directory, and the clusters of all bitmaps.
 *
 * The directory is never changed in place but for flags, each of which is
 * valid alone.  A new one is written beside it, with tables for what is
 * new, and flushed; then the header's extension switches to it, in one
 * write; then what only the old one referred to is freed.
 *
 * Clusters to which nothing refers yet when something fails are given back
 * if that is possible: what cannot be done is often tried again and again,
 * and should not leak clusters each time.
 *
 * The extension is only looked at if a bit of the header's, autoclear, is
 * set: so the bit is set last when the first bitmap is added, and cleared
 * first when the last one is removed.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/allocator.h"
#include "qcow2/bitmap-internal.h"
#include "qcow2/error.h"
#include "qcow2/header-update.h"

#define ENTRY_FLAGS 12          /* offset of the flags in an entry */

/* Clusters behind each other. */
struct run {
  uint64_t offset, clusters;
};

/* Opening. */

/* Take over the bitmaps of a directory. */
static void
set_bitmaps (struct qcow2_bitmap_store *store, GPtrArray *bitmaps)
{
  g_clear_pointer (&store->by_name, g_hash_table_unref);
  g_clear_pointer (&store->bitmaps, g_ptr_array_unref);
  store->bitmaps = bitmaps;
  store->by_name = g_hash_table_new (g_str_hash, g_str_equal);
  for (guint i = 0; i < bitmaps->len; ++i) {
    struct qcow2_bitmap *bitmap = g_ptr_array_index (bitmaps, i);

    g_hash_table_insert (store->by_name, bitmap->name, bitmap);
  }
}

struct qcow2_bitmap_store *
qcow2_bitmap_store_open (struct qcow2_image *image,
                         const struct qcow2_io *io, GError **error)
{
  struct qcow2_bitmap_store *store = g_new0 (struct qcow2_bitmap_store, 1);
  GPtrArray *bitmaps = NULL;

  store->image = image;
  store->fresh = g_array_new (FALSE, FALSE, sizeof (struct run));
  if (qcow2_bitmaps_find (image->header, &store->place, error) == 0)
    bitmaps = qcow2_bitmaps_load (image->header, &store->place, io, error);
  if (bitmaps)
    set_bitmaps (store, bitmaps);
  else
    g_clear_pointer (&store, qcow2_bitmap_store_close);
  return store;
}

void
qcow2_bitmap_store_close (struct qcow2_bitmap_store *store)
{
  if (!store)
    return;
  qcow2_allocator_free (store->allocator);
  g_clear_pointer (&store->by_name, g_hash_table_unref);
  g_clear_pointer (&store->bitmaps, g_ptr_array_unref);
  g_array_unref (store->fresh);
  g_free (store);
}

const GPtrArray *
qcow2_bitmap_store_list (const struct qcow2_bitmap_store *store)
{
  return store->bitmaps;
}

struct qcow2_bitmap *
qcow2_bitmap_store_find (const struct qcow2_bitmap_store *store,
                         const char *name)
{
  return g_hash_table_lookup (store->by_name, name);
}

/* Clusters. */

static int
need_allocator (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
                GError **error)
{
  if (!store->allocator)
    store->allocator = qcow2_allocator_new (store->image, io, error);
  return store->allocator ? 0 : -1;
}

static bool
overlaps (const struct run *run, uint64_t cluster_size, uint64_t offset,
          uint64_t bytes)
{
  return run->offset < offset + bytes &&
    offset < run->offset + run->clusters * cluster_size;
}

/* The allocator knows what else is in use whatever its refcount says. */
static int
check_free (const struct qcow2_bitmap_store *store, const struct run *run,
            GError **error)
{
  const uint64_t cluster_size = store->image->cluster_size;
  bool used = overlaps (run, cluster_size, store->place.directory_offset,
                        store->place.directory_size);

  for (guint i = 0; i < store->bitmaps->len && !used; ++i) {
    const struct qcow2_bitmap *bitmap = g_ptr_array_index (store->bitmaps, i);

    used = overlaps (run, cluster_size, bitmap->table_offset,
                     table_bytes (bitmap));
  }
  if (!used)
    return 0;
  return qcow2_fail (error, EIO, "the cluster at offset %" PRIu64 " has the "
                     "refcount 0, but a bitmap is there: the image is "
                     "corrupt", run->offset);
}

int
qcow2_bitmap_allocate (struct qcow2_bitmap_store *store,
                       const struct qcow2_io *io, uint64_t clusters,
                       uint64_t *offset, GError **error)
{
  struct run run = { .clusters = clusters };

  if (need_allocator (store, io, error) == -1 ||
      qcow2_allocate (store->allocator, io, clusters, &run.offset,
                      error) == -1 ||
      check_free (store, &run, error) == -1) {
    store->cannot_free = true;
    return -1;
  }
  g_array_append_val (store->fresh, run);
  *offset = run.offset;
  return 0;
}

int
qcow2_bitmap_release (struct qcow2_bitmap_store *store,
                      const struct qcow2_io *io, uint64_t offset,
                      uint64_t clusters, GError **error)
{
  if (need_allocator (store, io, error) == -1)
    return -1;
  return qcow2_free (store->allocator, io, offset, clusters, error);
}

void
qcow2_bitmap_keep_fresh (struct qcow2_bitmap_store *store)
{
  g_array_set_size (store->fresh, 0);
}

int
qcow2_bitmap_give_back_fresh (struct qcow2_bitmap_store *store,
                              const struct qcow2_io *io)
{
  for (guint i = 0; i < store->fresh->len && !store->cannot_free; ++i) {
    const struct run *run = &g_array_index (store->fresh, struct run, i);

    store->cannot_free =
      qcow2_bitmap_release (store, io, run->offset, run->clusters, NULL) == -1;
  }
  qcow2_bitmap_keep_fresh (store);
  return -1;
}

/* The directory. */

bool
qcow2_bitmap_store_fits (const struct qcow2_bitmap_store *store,
                         const struct qcow2_bitmap *bitmap)
{
  return bitmap->table_entries ==
    qcow2_bitmap_entries (store->image->header, bitmap->granularity_bits);
}

int
qcow2_bitmap_store_set_flags (struct qcow2_bitmap_store *store,
                              const struct qcow2_io *io,
                              struct qcow2_bitmap *bitmap, uint32_t flags,
                              GError **error)
{
  uint8_t field[4];

  if (flags == bitmap->flags)
    return 0;
  qcow2_put_be32 (field, flags);
  if (qcow2_io_write (io, field, sizeof field,
                      store->place.directory_offset + bitmap->entry +
                      ENTRY_FLAGS, error) == -1)
    return -1;
  bitmap->flags = flags;
  return 0;
}

static struct qcow2_bitmap *
copy_bitmap (const struct qcow2_bitmap *bitmap)
{
  struct qcow2_bitmap *copy = g_new (struct qcow2_bitmap, 1);

  *copy = *bitmap;
  copy->name = g_strdup (bitmap->name);
  copy->table = NULL;
  return copy;
}

/* Names as a set. */
static GHashTable *
set_of_names (const GPtrArray *names)
{
  GHashTable *set = g_hash_table_new (g_str_hash, g_str_equal);

  for (guint i = 0; names && i < names->len; ++i)
    g_hash_table_add (set, g_ptr_array_index (names, i));
  return set;
}

/* A bitmap of the whole disk, not yet in any directory. */
static int
make_bitmap (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
             struct qcow2_bitmap *bitmap, struct dirty_bits *content,
             GError **error)
{
  const uint64_t entries = qcow2_bitmap_entries (store->image->header,
                                                 bitmap->granularity_bits);
  uint64_t clusters;
  g_autofree uint64_t *table = NULL;

  if (store->image->header->size == 0)
    return qcow2_fail (error, EINVAL, "a disk of 0 bytes cannot have "
                       "bitmaps that are kept");
  if (entries * store->image->cluster_size > QCOW2_MAX_BITMAP_BYTES)
    return qcow2_fail (error, EINVAL, "bitmap \"%s\" would have %" PRIu64
                       " bytes, but at most %" PRIu64 " are allowed: choose "
                       "a larger granularity", bitmap->name,
                       entries * store->image->cluster_size,
                       QCOW2_MAX_BITMAP_BYTES);
  bitmap->table_entries = entries;
  clusters = table_clusters (store, bitmap);
  table = g_try_malloc0 (clusters * store->image->cluster_size);
  if (!table)
    return qcow2_fail (error, ENOMEM, "no memory for the table of a bitmap");
  if (content &&
      qcow2_bitmap_write_content (store, io, content, table, entries,
                                  error) == -1)
    return -1;
  if (qcow2_bitmap_allocate (store, io, clusters, &bitmap->table_offset,
                             error) == -1)
    return -1;
  return qcow2_io_write (io, table, clusters * store->image->cluster_size,
                         bitmap->table_offset, error);
}

/* Set new flags of a list's bitmaps. */
static void
change_flags (const GPtrArray *list, const GArray *flags)
{
  g_autoptr (GHashTable) by_name = g_hash_table_new (g_str_hash,
                                                     g_str_equal);

  for (guint i = 0; flags && i < flags->len; ++i) {
    const struct qcow2_bitmap_new_flags *new =
      &g_array_index (flags, struct qcow2_bitmap_new_flags, i);

    g_hash_table_insert (by_name, (gpointer) new->name, (gpointer) new);
  }
  for (guint i = 0; i < list->len; ++i) {
    struct qcow2_bitmap *bitmap = g_ptr_array_index (list, i);
    const struct qcow2_bitmap_new_flags *new =
      g_hash_table_lookup (by_name, bitmap->name);

    if (new)
      bitmap->flags = new->flags;
  }
}

static int
add_new (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
         GPtrArray *list, const struct qcow2_bitmap_new *new, GError **error)
{
  struct qcow2_bitmap *bitmap = g_new0 (struct qcow2_bitmap, 1);

  bitmap->name = g_strdup (new->name);
  bitmap->granularity_bits = new->granularity_bits;
  bitmap->flags = new->flags;
  g_ptr_array_add (list, bitmap);
  return make_bitmap (store, io, bitmap, new->content, error);
}

/* The bitmaps of the new directory.  NULL with error set. */
static GPtrArray *
make_list (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
           const struct qcow2_bitmap_changes *changes, GError **error)
{
  const GPtrArray *add = changes->add;
  g_autoptr (GHashTable) remove = set_of_names (changes->remove);
  g_autoptr (GPtrArray) list =
    g_ptr_array_new_with_free_func (qcow2_bitmap_free);

  for (guint i = 0; i < store->bitmaps->len; ++i) {
    const struct qcow2_bitmap *bitmap = g_ptr_array_index (store->bitmaps, i);

    if (!g_hash_table_contains (remove, bitmap->name))
      g_ptr_array_add (list, copy_bitmap (bitmap));
  }
  change_flags (list, changes->flags);
  if (list->len + (add ? add->len : 0) > QCOW2_MAX_BITMAPS) {
    qcow2_fail (error, EINVAL, "an image has at most %d bitmaps",
                QCOW2_MAX_BITMAPS);
    return NULL;
  }
  for (guint i = 0; add && i < add->len; ++i)
    if (add_new (store, io, list, g_ptr_array_index (add, i), error) == -1)
      return NULL;
  return g_steal_pointer (&list);
}

static size_t
entry_length (const struct qcow2_bitmap *bitmap)
{
  return (QCOW2_BITMAP_ENTRY_LENGTH + strlen (bitmap->name) + 7) &
    ~(size_t) 7;
}

static void
put_entry (uint8_t *p, const struct qcow2_bitmap *bitmap)
{
  const size_t length = strlen (bitmap->name);

  qcow2_put_be64 (p, bitmap->table_offset);
  qcow2_put_be32 (p + 8, bitmap->table_entries);
  qcow2_put_be32 (p + ENTRY_FLAGS, bitmap->flags);
  p[16] = QCOW2_BITMAP_TYPE_DIRTY;
  p[17] = bitmap->granularity_bits;
  qcow2_put_be16 (p + 18, length);
  memcpy (p + QCOW2_BITMAP_ENTRY_LENGTH, bitmap->name, length);
}

/* Write the directory of a list to clusters of its own. */
static int
write_directory (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
                 const GPtrArray *list, struct qcow2_bitmaps *place,
                 GError **error)
{
  uint64_t bytes;
  g_autofree uint8_t *buf = NULL;

  memset (place, 0, sizeof *place);
  place->nr = list->len;
  for (guint i = 0; i < list->len; ++i) {
    struct qcow2_bitmap *bitmap = g_ptr_array_index (list, i);

    bitmap->entry = place->directory_size;
    place->directory_size += entry_length (bitmap);
  }
  bytes = clusters_for (store, place->directory_size) *
    store->image->cluster_size;
  buf = g_try_malloc0 (bytes);
  if (!buf)
    return qcow2_fail (error, ENOMEM, "no memory for the bitmap directory");
  for (guint i = 0; i < list->len; ++i) {
    const struct qcow2_bitmap *bitmap = g_ptr_array_index (list, i);

    put_entry (buf + bitmap->entry, bitmap);
  }
  if (qcow2_bitmap_allocate (store, io, bytes / store->image->cluster_size,
                &place->directory_offset, error) == -1 ||
      qcow2_io_write (io, buf, bytes, place->directory_offset, error) == -1)
    return -1;
  return io->flush (io, error);
}

static void
put_extension (uint8_t *data, const struct qcow2_bitmaps *place)
{
  memset (data, 0, QCOW2_EXT_BITMAPS_LENGTH);
  qcow2_put_be32 (data, place->nr);
  qcow2_put_be64 (data + 8, place->directory_size);
  qcow2_put_be64 (data + 16, place->directory_offset);
}

static int
set_valid (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
           bool valid, GError **error)
{
  struct qcow2_header *header = store->image->header;
  const uint64_t others = header->autoclear & ~QCOW2_AUTOCLEAR_BITMAPS;

  if (qcow2_header_set_autoclear (header, io, valid ?
                                  others | QCOW2_AUTOCLEAR_BITMAPS : others,
                                  error) == -1)
    return -1;
  return io->flush (io, error);
}

/* Can there be an extension?  Before anything is changed. */
static int
check_extension (const struct qcow2_header *header, GError **error)
{
  GBytes *old = qcow2_header_find_extension (header, QCOW2_EXT_BITMAPS);

  if (!old)
    return qcow2_header_check_room (header, QCOW2_EXT_BITMAPS_LENGTH,
                                    error);
  if (g_bytes_get_size (old) == QCOW2_EXT_BITMAPS_LENGTH)
    return 0;
  return qcow2_fail (error, ENOTSUP, "the header has a bitmaps extension of "
                     "%zu bytes, which cannot be replaced",
                     g_bytes_get_size (old));
}

/* Let the extension, which exists, refer to another directory. */
static int
replace_extension (struct qcow2_bitmap_store *store,
                   const struct qcow2_io *io, const uint8_t *data,
                   bool resized, GError **error)
{
  struct qcow2_header *header = store->image->header;
  const bool tears = resized &&
    qcow2_header_extension_can_tear (header, QCOW2_EXT_BITMAPS);

  if (tears && header->autoclear & QCOW2_AUTOCLEAR_BITMAPS &&
      set_valid (store, io, false, error) == -1)
    return -1;
  if (qcow2_header_put_extension (header, io, QCOW2_EXT_BITMAPS, data,
                                  QCOW2_EXT_BITMAPS_LENGTH, error) == -1)
    return -1;
  return io->flush (io, error);
}

/* Let the header refer to this directory. */
static int
switch_directory (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
                  const struct qcow2_bitmaps *place, GError **error)
{
  struct qcow2_header *header = store->image->header;
  const bool resized = place->nr != store->place.nr ||
    place->directory_size != store->place.directory_size;
  uint8_t data[QCOW2_EXT_BITMAPS_LENGTH];

  put_extension (data, place);
  if ((qcow2_header_find_extension (header, QCOW2_EXT_BITMAPS) ?
       replace_extension (store, io, data, resized, error) :
       qcow2_header_add_extension (header, io, QCOW2_EXT_BITMAPS, data,
                                   QCOW2_EXT_BITMAPS_LENGTH, error)) == -1)
    return -1;
  if (header->autoclear & QCOW2_AUTOCLEAR_BITMAPS)
    return 0;
  return set_valid (store, io, true, error);
}

/* There are no bitmaps any more. */
static int
drop_directory (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
                GError **error)
{
  if (set_valid (store, io, false, error) == -1 ||
      qcow2_header_drop_extension (store->image->header, io,
                                   QCOW2_EXT_BITMAPS, error) == -1)
    return -1;
  return io->flush (io, error);
}

static int
free_bitmap (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
             struct qcow2_bitmap *bitmap, GError **error)
{
  /* What a damaged table refers to is leaked rather than freed. */
  if (qcow2_bitmap_load_table (store, io, bitmap, NULL) == 0)
    for (uint32_t i = 0; i < bitmap->table_entries; ++i) {
      const uint64_t offset = bitmap->table[i] & QCOW2_ENTRY_OFFSET_MASK;

      if (offset && qcow2_bitmap_release (store, io, offset, 1, error) == -1)
        return -1;
    }
  return qcow2_bitmap_release (store, io, bitmap->table_offset,
                  table_clusters (store, bitmap), error);
}

/* Free the old directory, and the bitmaps that were removed. */
static int
free_old (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
          const GPtrArray *names, GError **error)
{
  g_autoptr (GHashTable) remove = set_of_names (names);

  for (guint i = 0; i < store->bitmaps->len; ++i) {
    struct qcow2_bitmap *bitmap = g_ptr_array_index (store->bitmaps, i);

    if (g_hash_table_contains (remove, bitmap->name) &&
        free_bitmap (store, io, bitmap, error) == -1)
      return -1;
  }
  if (store->place.nr == 0)
    return 0;
  return qcow2_bitmap_release (store, io, store->place.directory_offset,
                  clusters_for (store, store->place.directory_size), error);
}

int
qcow2_bitmap_store_change (struct qcow2_bitmap_store *store,
                           const struct qcow2_io *io,
                           const struct qcow2_bitmap_changes *changes,
                           GError **error)
{
  g_autoptr (GPtrArray) list = NULL;
  struct qcow2_bitmaps place = { 0 };

  if (store->image->header->version < 3)
    return qcow2_fail (error, ENOTSUP, "a version 2 image cannot have "
                       "bitmaps; \"qemu-img amend -o compat=1.1\" makes it "
                       "version 3");
  if (changes->add && changes->add->len > 0 &&
      check_extension (store->image->header, error) == -1)
    return -1;
  list = make_list (store, io, changes, error);
  if (!list ||
      (list->len > 0 &&
       write_directory (store, io, list, &place, error) == -1))
    return qcow2_bitmap_give_back_fresh (store, io);
  qcow2_bitmap_keep_fresh (store);
  if (list->len > 0) {
    if (switch_directory (store, io, &place, error) == -1)
      return -1;
  }
  else if (store->place.nr > 0 && drop_directory (store, io, error) == -1)
    return -1;
  if (free_old (store, io, changes->remove, error) == -1)
    return -1;
  set_bitmaps (store, g_steal_pointer (&list));
  store->place = place;
  return io->flush (io, error);
}
