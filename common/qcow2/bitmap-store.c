/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The order of writes:
 *
 * Content is saved in place, in a bitmap that is marked as in use.  New
 * clusters are written and flushed before the table refers to them, old
 * ones freed when the table that does not refer to them is flushed.
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
#include "qcow2/bitmap-store.h"
#include "qcow2/error.h"
#include "qcow2/header-update.h"

#define EXTENSION_LENGTH 24
#define TABLE_SECTOR 64         /* entries of a table in 512 bytes */
#define ENTRY_FLAGS 12          /* offset of the flags in an entry */
#define SECTOR 512              /* content is written in multiples of it */

struct qcow2_bitmap_store {
  struct qcow2_image *image;
  struct qcow2_allocator *allocator; /* NULL until it is needed */
  struct qcow2_bitmaps place;   /* of the directory */
  GPtrArray *bitmaps;
  GHashTable *by_name;          /* the same */
  GArray *fresh;                /* struct run, to which nothing refers yet */
  bool cannot_free;             /* the allocator has failed */
};

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

/* Sizes. */

static uint64_t
divide_up (uint64_t n, uint64_t by)
{
  return n / by + (n % by != 0);
}

static uint64_t
clusters_for (const struct qcow2_bitmap_store *store, uint64_t bytes)
{
  return divide_up (bytes, store->image->cluster_size);
}

/* Granules whose bits lie in one cluster. */
static uint64_t
bits_per_cluster (const struct qcow2_bitmap_store *store)
{
  return (uint64_t) store->image->cluster_size * 8;
}

static uint64_t
table_bytes (const struct qcow2_bitmap *bitmap)
{
  return (uint64_t) bitmap->table_entries * 8;
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

static int
allocate (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
          uint64_t clusters, uint64_t *offset, GError **error)
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

static int
release (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
         uint64_t offset, uint64_t clusters, GError **error)
{
  if (need_allocator (store, io, error) == -1)
    return -1;
  return qcow2_free (store->allocator, io, offset, clusters, error);
}

/* Something refers to the clusters that were allocated. */
static void
keep_fresh (struct qcow2_bitmap_store *store)
{
  g_array_set_size (store->fresh, 0);
}

/* Nothing ever will.  Returns -1. */
static int
give_back_fresh (struct qcow2_bitmap_store *store, const struct qcow2_io *io)
{
  for (guint i = 0; i < store->fresh->len && !store->cannot_free; ++i) {
    const struct run *run = &g_array_index (store->fresh, struct run, i);

    store->cannot_free =
      release (store, io, run->offset, run->clusters, NULL) == -1;
  }
  keep_fresh (store);
  return -1;
}

/* Tables. */

static int
check_entry (const struct qcow2_bitmap_store *store, uint64_t entry,
             const struct qcow2_bitmap *bitmap, GError **error)
{
  const uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;

  if (entry & QCOW2_BITMAP_ENTRY_RESERVED_MASK ||
      (offset && entry & QCOW2_BITMAP_ENTRY_ONES) ||
      offset & (store->image->cluster_size - 1)) {
    g_autofree char *name = g_strescape (bitmap->name, NULL);

    return qcow2_fail (error, EINVAL, "the table of bitmap \"%s\" has an entry "
                       "0x%016" PRIx64 ", which is not allowed", name, entry);
  }
  return 0;
}

static int
load_table (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
            struct qcow2_bitmap *bitmap, GError **error)
{
  g_autofree uint64_t *table = NULL;

  if (bitmap->table)
    return 0;
  table = g_try_malloc (table_bytes (bitmap));
  if (!table)
    return qcow2_fail (error, ENOMEM, "no memory for the table of a bitmap");
  if (qcow2_io_read_exact (io, "the table of a bitmap", table,
                           table_bytes (bitmap), bitmap->table_offset,
                           error) == -1)
    return -1;
  for (uint32_t i = 0; i < bitmap->table_entries; ++i) {
    table[i] = qcow2_be64 (&table[i]);
    if (check_entry (store, table[i], bitmap, error) == -1)
      return -1;
  }
  bitmap->table = g_steal_pointer (&table);
  return 0;
}

/* Tables are kept once they are needed to be changed, not before. */
static void
forget_table (struct qcow2_bitmap *bitmap)
{
  g_clear_pointer (&bitmap->table, g_free);
}

/* Add clusters to those that are in use. */
static int
use_clusters (const struct qcow2_bitmap_store *store,
              struct dirty_bits *used, const struct qcow2_bitmap *bitmap,
              uint64_t offset, uint64_t clusters, GError **error)
{
  const uint64_t size = dirty_bits_size (used);
  const uint64_t bytes = clusters * store->image->cluster_size;
  g_autofree char *name = NULL;
  uint64_t length;

  if (offset < size && bytes <= size - offset &&
      !dirty_bits_get (used, offset, &length) && length >= bytes) {
    dirty_bits_set (used, offset, bytes);
    return 0;
  }
  name = g_strescape (bitmap->name, NULL);
  return qcow2_fail (error, EIO, "bitmap \"%s\" refers to %" PRIu64 " bytes "
                     "at offset %" PRIu64 ", which lie beyond the end of the "
                     "file, or belong to a bitmap already: the image is "
                     "damaged", name, bytes, offset);
}

/* A table with bad entries can be one of a bitmap that is not used. */
static int
use_content (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
             struct dirty_bits *used, struct qcow2_bitmap *bitmap,
             GError **error)
{
  GError *e = NULL;

  if (load_table (store, io, bitmap, &e) == -1) {
    if (e->code != EINVAL) {
      g_propagate_error (error, e);
      return -1;
    }
    g_error_free (e);
    return 0;
  }
  for (uint32_t i = 0; i < bitmap->table_entries; ++i) {
    const uint64_t offset = bitmap->table[i] & QCOW2_ENTRY_OFFSET_MASK;

    if (offset &&
        use_clusters (store, used, bitmap, offset, 1, error) == -1)
      return -1;
  }
  return 0;
}

int
qcow2_bitmap_store_check (struct qcow2_bitmap_store *store,
                          const struct qcow2_io *io, GError **error)
{
  /* A file may end within its last cluster. */
  struct dirty_bits *used =
    dirty_bits_new (clusters_for (store, io->get_size (io)) *
                    store->image->cluster_size,
                    store->image->header->cluster_bits);
  int r = 0;

  for (guint i = 0; i < store->bitmaps->len && r == 0; ++i) {
    struct qcow2_bitmap *bitmap = g_ptr_array_index (store->bitmaps, i);

    r = use_clusters (store, used, bitmap, bitmap->table_offset,
                      clusters_for (store, table_bytes (bitmap)), error);
    if (r == 0)
      r = use_content (store, io, used, bitmap, error);
    forget_table (bitmap);
  }
  dirty_bits_free (used);
  return r;
}

/* Write the part of a table, with all that shares its sectors. */
static int
write_table (const struct qcow2_io *io, const struct qcow2_bitmap *bitmap,
             uint32_t begin, uint32_t end, GError **error)
{
  g_autofree uint8_t *buf = g_malloc ((uint64_t) (end - begin) * 8);

  for (uint32_t i = begin; i < end; ++i)
    qcow2_put_be64 (buf + (uint64_t) (i - begin) * 8, bitmap->table[i]);
  return qcow2_io_write (io, buf, (uint64_t) (end - begin) * 8,
                         bitmap->table_offset + (uint64_t) begin * 8, error);
}

/* Content. */

int
qcow2_bitmap_store_load (struct qcow2_bitmap_store *store,
                         const struct qcow2_io *io,
                         struct qcow2_bitmap *bitmap, struct dirty_bits *bits,
                         GError **error)
{
  const uint32_t cluster_size = store->image->cluster_size;
  const uint64_t step = bits_per_cluster (store);
  const uint64_t length = dirty_bits_length (bits);
  const bool was_loaded = bitmap->table != NULL;
  g_autofree uint8_t *buf = g_try_malloc (cluster_size);

  if (!buf)
    return qcow2_fail (error, ENOMEM, "no memory for a cluster");
  if (load_table (store, io, bitmap, error) == -1)
    return -1;
  for (uint32_t i = 0; i < bitmap->table_entries && i * step < length; ++i) {
    const uint64_t entry = bitmap->table[i];
    const uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;

    if (entry == 0)
      continue;
    if (!offset)
      dirty_bits_set (bits, i * step << bitmap->granularity_bits,
                      step << bitmap->granularity_bits);
    else if (qcow2_io_read_padded (io, cluster_size, buf, cluster_size,
                                   offset, error) == -1)
      return -1;
    else
      dirty_bits_import (bits, i * step, buf, cluster_size);
  }
  if (!was_loaded)
    forget_table (bitmap);
  return 0;
}

/* What a cluster of bits can be in the table without being stored, 0 or
 * QCOW2_BITMAP_ENTRY_ONES; or else UINT64_MAX.  Ones that reach behind the
 * end of the bitmap must be stored.
 */
static uint64_t
uniform_entry (const uint8_t *buf, size_t size, bool whole)
{
  const uint8_t first = buf[0];

  if ((first != 0 && first != 0xff) || memcmp (buf, buf + 1, size - 1) != 0)
    return UINT64_MAX;
  return first == 0 ? 0 : whole ? QCOW2_BITMAP_ENTRY_ONES : UINT64_MAX;
}

/* A save that goes on. */
struct save {
  struct qcow2_bitmap_store *store;
  const struct qcow2_io *io;
  struct qcow2_bitmap *bitmap;
  struct dirty_bits *bits, *stored;
  uint8_t *buf, *old;           /* a cluster of bits */
  GArray *changed;              /* numbers of entries */
  GArray *unused;               /* offsets of clusters to be freed */
  bool wrote;
};

static bool
differs (const struct save *s, uint32_t pos)
{
  return memcmp (s->buf + pos, s->old + pos, SECTOR) != 0;
}

/* Write what differs from what a cluster has. */
static int
write_differences (struct save *s, uint64_t offset, GError **error)
{
  const uint32_t cluster_size = s->store->image->cluster_size;
  uint32_t pos = 0;

  while (pos < cluster_size) {
    const uint32_t begin = pos;

    while (pos < cluster_size && differs (s, pos))
      pos += SECTOR;
    if (pos == begin)
      pos += SECTOR;
    else if (qcow2_io_write (s->io, s->buf + begin, pos - begin,
                             offset + begin, error) == -1)
      return -1;
  }
  return 0;
}

/* Bring one cluster of bits up to date; its entry only in memory. */
static int
save_cluster (struct save *s, uint32_t i, bool whole, GError **error)
{
  const uint32_t cluster_size = s->store->image->cluster_size;
  const uint64_t entry = s->bitmap->table[i];
  const uint64_t uniform = uniform_entry (s->buf, cluster_size, whole);
  uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;

  if (uniform != UINT64_MAX) {
    if (entry == uniform)
      return 0;
    if (offset)
      g_array_append_val (s->unused, offset);
    s->bitmap->table[i] = uniform;
    g_array_append_val (s->changed, i);
    return 0;
  }
  s->wrote = true;
  if (offset && s->stored)
    return write_differences (s, offset, error);
  if (!offset) {
    if (allocate (s->store, s->io, 1, &offset, error) == -1)
      return -1;
    s->bitmap->table[i] = offset;
    g_array_append_val (s->changed, i);
  }
  return qcow2_io_write (s->io, s->buf, cluster_size, offset, error);
}

/* The number of clusters, from the ith on, in which both sets are uniform
 * and agree.
 */
static uint64_t
count_same (const struct save *s, uint64_t i)
{
  const unsigned granularity_bits = s->bitmap->granularity_bits;
  const uint64_t step = bits_per_cluster (s->store) << granularity_bits;
  const uint64_t size = dirty_bits_size (s->bits);
  const uint64_t offset = i * step;
  uint64_t length, old_length;

  if (!s->stored || offset >= size ||
      dirty_bits_get (s->bits, offset, &length) !=
      dirty_bits_get (s->stored, offset, &old_length))
    return 0;
  length = MIN (length, old_length);
  return offset + length == size ? UINT64_MAX : length / step;
}

static int
save_clusters (struct save *s, GError **error)
{
  const uint32_t cluster_size = s->store->image->cluster_size;
  const uint64_t step = bits_per_cluster (s->store);
  const uint64_t length = dirty_bits_length (s->bits);
  const uint64_t entries = s->bitmap->table_entries;

  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t same = count_same (s, i);

    if (same >= entries - i)
      return 0;
    i += same;
    dirty_bits_export (s->bits, i * step, s->buf, cluster_size);
    if (s->stored) {
      dirty_bits_export (s->stored, i * step, s->old, cluster_size);
      if (memcmp (s->buf, s->old, cluster_size) == 0)
        continue;
    }
    if (save_cluster (s, i, (i + 1) * step <= length, error) == -1)
      return -1;
  }
  return 0;
}

static int
save_table (const struct save *s, GError **error)
{
  for (guint n = 0; n < s->changed->len; ) {
    const uint32_t begin = g_array_index (s->changed, uint32_t, n) /
      TABLE_SECTOR * TABLE_SECTOR;
    const uint32_t end = MIN (begin + TABLE_SECTOR,
                              s->bitmap->table_entries);

    if (write_table (s->io, s->bitmap, begin, end, error) == -1)
      return -1;
    while (n < s->changed->len &&
           g_array_index (s->changed, uint32_t, n) < end)
      n++;
  }
  return s->io->flush (s->io, error);
}

static int
free_unused (const struct save *s, GError **error)
{
  const uint32_t cluster_size = s->store->image->cluster_size;
  const uint64_t *unused = (const uint64_t *) s->unused->data;

  for (guint i = 0, n; i < s->unused->len; i += n) {
    for (n = 1; i + n < s->unused->len &&
           unused[i + n] == unused[i] + (uint64_t) n * cluster_size; ++n)
      ;
    if (release (s->store, s->io, unused[i], n, error) == -1)
      return -1;
  }
  return 0;
}

int
qcow2_bitmap_store_save (struct qcow2_bitmap_store *store,
                         const struct qcow2_io *io,
                         struct qcow2_bitmap *bitmap, struct dirty_bits *bits,
                         struct dirty_bits *stored, GError **error)
{
  const uint32_t cluster_size = store->image->cluster_size;
  g_autofree uint8_t *buf = g_try_malloc (cluster_size);
  g_autofree uint8_t *old = g_try_malloc (cluster_size);
  g_autoptr (GArray) changed = g_array_new (FALSE, FALSE, sizeof (uint32_t));
  g_autoptr (GArray) unused = g_array_new (FALSE, FALSE, sizeof (uint64_t));
  struct save s = {
    store, io, bitmap, bits, stored, buf, old, changed, unused, false
  };

  if (!buf || !old)
    return qcow2_fail (error, ENOMEM, "no memory for a cluster");
  if (load_table (store, io, bitmap, error) == -1)
    return -1;
  if (save_clusters (&s, error) == -1 ||
      (s.wrote && io->flush (io, error) == -1))
    return give_back_fresh (store, io);
  keep_fresh (store);
  if (changed->len == 0)
    return 0;
  if (save_table (&s, error) == -1)
    return -1;
  return free_unused (&s, error);
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

/* The directory. */

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

bool
qcow2_bitmap_store_fits (const struct qcow2_bitmap_store *store,
                         const struct qcow2_bitmap *bitmap)
{
  return bitmap->table_entries ==
    qcow2_bitmap_entries (store->image->header, bitmap->granularity_bits);
}

/* Write content to new clusters; their offsets go to the table. */
static int
make_content (struct qcow2_bitmap_store *store, const struct qcow2_io *io,
              struct dirty_bits *content, uint64_t *table, uint64_t entries,
              GError **error)
{
  const uint32_t cluster_size = store->image->cluster_size;
  const uint64_t step = bits_per_cluster (store);
  const uint64_t length = dirty_bits_length (content);
  g_autofree uint8_t *buf = g_try_malloc (cluster_size);

  if (!buf)
    return qcow2_fail (error, ENOMEM, "no memory for a cluster");
  for (uint64_t i = 0; i < entries && i * step < length; ++i) {
    uint64_t entry, offset;

    dirty_bits_export (content, i * step, buf, cluster_size);
    entry = uniform_entry (buf, cluster_size, (i + 1) * step <= length);
    if (entry == UINT64_MAX) {
      if (allocate (store, io, 1, &offset, error) == -1 ||
          qcow2_io_write (io, buf, cluster_size, offset, error) == -1)
        return -1;
      entry = offset;
    }
    qcow2_put_be64 ((uint8_t *) &table[i], entry);
  }
  return 0;
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

  if (entries * store->image->cluster_size > QCOW2_MAX_BITMAP_BYTES)
    return qcow2_fail (error, EINVAL, "bitmap \"%s\" would have %" PRIu64
                       " bytes, but at most %" PRIu64 " are allowed: choose "
                       "a larger granularity", bitmap->name,
                       entries * store->image->cluster_size,
                       QCOW2_MAX_BITMAP_BYTES);
  bitmap->table_entries = entries;
  clusters = clusters_for (store, table_bytes (bitmap));
  table = g_try_malloc0 (clusters * store->image->cluster_size);
  if (!table)
    return qcow2_fail (error, ENOMEM, "no memory for the table of a bitmap");
  if (content &&
      make_content (store, io, content, table, entries, error) == -1)
    return -1;
  if (allocate (store, io, clusters, &bitmap->table_offset, error) == -1)
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
  if (allocate (store, io, bytes / store->image->cluster_size,
                &place->directory_offset, error) == -1 ||
      qcow2_io_write (io, buf, bytes, place->directory_offset, error) == -1)
    return -1;
  return io->flush (io, error);
}

static void
put_extension (uint8_t *data, const struct qcow2_bitmaps *place)
{
  memset (data, 0, EXTENSION_LENGTH);
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

/* Let the extension, which exists, refer to another directory. */
static int
replace_extension (struct qcow2_bitmap_store *store,
                   const struct qcow2_io *io, const uint8_t *data,
                   bool resized, GError **error)
{
  struct qcow2_header *header = store->image->header;
  const bool tears = resized &&
    qcow2_header_extension_can_tear (header, QCOW2_EXT_BITMAPS);
  GBytes *old = qcow2_header_find_extension (header, QCOW2_EXT_BITMAPS);

  if (g_bytes_get_size (old) != EXTENSION_LENGTH)
    return qcow2_fail (error, ENOTSUP, "the header has a bitmaps extension of "
                       "%zu bytes, which cannot be replaced",
                       g_bytes_get_size (old));
  if (tears && header->autoclear & QCOW2_AUTOCLEAR_BITMAPS &&
      set_valid (store, io, false, error) == -1)
    return -1;
  if (qcow2_header_put_extension (header, io, QCOW2_EXT_BITMAPS, data,
                                  EXTENSION_LENGTH, error) == -1)
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
  uint8_t data[EXTENSION_LENGTH];

  put_extension (data, place);
  if ((qcow2_header_find_extension (header, QCOW2_EXT_BITMAPS) ?
       replace_extension (store, io, data, resized, error) :
       qcow2_header_add_extension (header, io, QCOW2_EXT_BITMAPS, data,
                                   EXTENSION_LENGTH, error)) == -1)
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
  if (load_table (store, io, bitmap, NULL) == 0)
    for (uint32_t i = 0; i < bitmap->table_entries; ++i) {
      const uint64_t offset = bitmap->table[i] & QCOW2_ENTRY_OFFSET_MASK;

      if (offset && release (store, io, offset, 1, error) == -1)
        return -1;
    }
  return release (store, io, bitmap->table_offset,
                  clusters_for (store, table_bytes (bitmap)), error);
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
  return release (store, io, store->place.directory_offset,
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
  list = make_list (store, io, changes, error);
  if (!list ||
      (list->len > 0 &&
       write_directory (store, io, list, &place, error) == -1))
    return give_back_fresh (store, io);
  keep_fresh (store);
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
