/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What bitmaps hold, and their tables.
 *
 * Content is saved in place, in a bitmap that is marked as in use.  New
 * clusters are written and flushed before the table refers to them, old
 * ones freed when the table that does not refer to them is flushed.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/bitmap-internal.h"
#include "qcow2/error.h"

#define TABLE_SECTOR 64         /* entries of a table in 512 bytes */
#define SECTOR 512              /* content is written in multiples of it */

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

    return qcow2_fail (error, EINVAL, "the table of bitmap \"%s\" has an "
                       "entry 0x%016" PRIx64 ", which is not allowed", name,
                       entry);
  }
  return 0;
}

int
qcow2_bitmap_load_table (struct qcow2_bitmap_store *store,
                         const struct qcow2_io *io,
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

  if (qcow2_bitmap_load_table (store, io, bitmap, &e) == -1) {
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
                      table_clusters (store, bitmap), error);
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

/* Granules whose bits lie in one cluster. */
static uint64_t
bits_per_cluster (const struct qcow2_bitmap_store *store)
{
  return (uint64_t) store->image->cluster_size * 8;
}

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
  if (qcow2_bitmap_load_table (store, io, bitmap, error) == -1)
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

int
qcow2_bitmap_write_content (struct qcow2_bitmap_store *store,
                            const struct qcow2_io *io,
                            struct dirty_bits *content, uint64_t *table,
                            uint64_t entries, GError **error)
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
      if (qcow2_bitmap_allocate (store, io, 1, &offset, error) == -1 ||
          qcow2_io_write (io, buf, cluster_size, offset, error) == -1)
        return -1;
      entry = offset;
    }
    qcow2_put_be64 ((uint8_t *) &table[i], entry);
  }
  return 0;
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
    if (qcow2_bitmap_allocate (s->store, s->io, 1, &offset, error) == -1)
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
      dirty_bits_get (s->bits, offset, NULL) !=
      dirty_bits_get (s->stored, offset, NULL))
    return 0;
  dirty_bits_get (s->bits, offset, &length);
  dirty_bits_get (s->stored, offset, &old_length);
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
    if (qcow2_bitmap_release (s->store, s->io, unused[i], n, error) == -1)
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
  if (qcow2_bitmap_load_table (store, io, bitmap, error) == -1)
    return -1;
  if (save_clusters (&s, error) == -1 ||
      (s.wrote && io->flush (io, error) == -1))
    return qcow2_bitmap_give_back_fresh (store, io);
  qcow2_bitmap_keep_fresh (store);
  if (changed->len == 0)
    return 0;
  if (save_table (&s, error) == -1)
    return -1;
  return free_unused (&s, error);
}
