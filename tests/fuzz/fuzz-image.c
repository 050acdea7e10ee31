/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Fuzzing of common/qcow2: open an image, map it, read it, open its
 * encryption, check it.
 *
 * The input is the container, so a small qcow2 file can be given as it
 * is.  That would make inputs large whenever clusters are, so there is
 * also a folded form, which make-corpus.py writes: the 512-byte sectors
 * that are not zero, one after the other, and behind them a tail
 *
 *    be32 place[n]   where each sector lies in the container, in sectors
 *    be64 size       of the container, in bytes
 *    be64 probe      an offset on the disk that is looked at as well
 *    u8   flags      FLAG_*
 *    u8   fail       this read fails, counted from 1; 0: none does
 *    be16 n
 *    "QFZT"
 *
 * The tail is read from the end of the input, so that changes to the
 * sectors' lengths leave it as it is.
 *
 * Apart from what the sanitizers see, answers are compared with those
 * of lookup, which resolves one offset as the specification says it,
 * without a cache, and with zlib.  Work for each input is bounded: what
 * is read is limited by a budget, beyond which reads fail.
 */

#include <config.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>

#include "qcow2/bitmap-store.h"
#include "qcow2/check.h"
#include "qcow2/codec.h"
#include "qcow2/crypt.h"
#include "qcow2/error.h"
#include "qcow2/image.h"
#include "qcow2/mapping.h"
#include "qcow2/refcount.h"

#define SECTOR 512
#define TAIL 24
#define MAX_PIECES 256
#define FLAG_WHOLE 1            /* map the disk in one piece, too */
#define FLAG_NO_CACHE 2

#define READ_BUDGET (256U << 10)
#define REFCOUNT_BUDGET (8U << 10)
#define CRYPT_BUDGET (512U << 10)
#define CHECK_BUDGET (1U << 20)
#define MAX_CHECK_CLUSTERS (64U << 10)
#define MAX_ITERATIONS 16       /* of key derivation */
#define CACHE_SIZE (32U << 10)
#define MAX_STEPS 12            /* runs looked at from one offset on */
#define MAX_COUNT 24            /* clusters mapped at once */
#define MAX_VIEWS 3             /* snapshots looked at */
#define MAX_CLUSTER (64U << 10) /* larger ones are not decompressed */
#define MAX_DATA 4096           /* bytes of a data run that are read */

#define require(condition)                                              \
  do {                                                                  \
    if (!(condition)) {                                                 \
      fprintf (stderr, "%s:%d: must be true: %s\n",                     \
               __FILE__, __LINE__, #condition);                         \
      abort ();                                                         \
    }                                                                   \
  } while (0)

extern int LLVMFuzzerTestOneInput (const uint8_t *data, size_t length);

struct container {
  struct qcow2_io io;
  const uint8_t *data;
  const uint8_t *places;        /* NULL: the input is the container */
  unsigned pieces;
  size_t length;                /* of data */
  uint64_t size;
  uint64_t probe;
  unsigned flags, fail, reads;
  size_t budget;
  bool failed;                  /* a read failed that need not have */
};

/* What is looked at. */
struct target {
  struct container *c;
  struct qcow2_image *image;
  struct qcow2_view view;
};

static const struct container *
container_of_io (const struct qcow2_io *io)
{
  return (const struct container *) ((const char *) io -
                                     G_STRUCT_OFFSET (struct container, io));
}

/* Copy the part of a piece at place that lies in [offset, offset+count). */
static void
overlay (uint8_t *buf, size_t count, uint64_t offset,
         const uint8_t *piece, size_t length, uint64_t place)
{
  const uint64_t start = MAX (offset, place);
  const uint64_t end = MIN (offset + count, place + length);

  if (start < end)
    memcpy (buf + (start - offset), piece + (start - place), end - start);
}

static void
contents (const struct container *c, void *buf, size_t count,
          uint64_t offset)
{
  memset (buf, 0, count);
  if (!c->places)
    overlay (buf, count, offset, c->data, c->length, 0);
  for (unsigned i = 0; i < c->pieces; ++i)
    overlay (buf, count, offset, c->data + i * SECTOR, SECTOR,
             (uint64_t) qcow2_be32 (c->places + i * 4) * SECTOR);
}

static int
container_pread (const struct qcow2_io *io, void *buf, size_t count,
                 uint64_t offset, GError **error)
{
  struct container *c = (struct container *) container_of_io (io);

  require (offset <= c->size && count <= c->size - offset);
  if (++c->reads == c->fail || count > c->budget) {
    c->failed = true;
    return qcow2_fail (error, EIO, "this read was made to fail");
  }
  c->budget -= count;
  contents (c, buf, count, offset);
  return 0;
}

static uint64_t
container_get_size (const struct qcow2_io *io)
{
  return container_of_io (io)->size;
}

static void
unfold (struct container *c, const uint8_t *data, size_t length)
{
  const uint8_t *tail = data + length - TAIL;

  memset (c, 0, sizeof *c);
  c->io.pread = container_pread;
  c->io.get_size = container_get_size;
  c->budget = READ_BUDGET;
  c->data = data;
  c->length = c->size = length;
  if (length < TAIL || memcmp (tail + TAIL - 4, "QFZT", 4) != 0)
    return;

  c->size = qcow2_be64 (tail) & INT64_MAX;
  c->probe = qcow2_be64 (tail + 8);
  c->flags = tail[16];
  c->fail = tail[17];
  c->pieces = MIN (qcow2_be16 (tail + 18),
                   (length - TAIL) / (SECTOR + 4));
  c->pieces = MIN (c->pieces, MAX_PIECES);
  c->places = tail - c->pieces * 4;
}

/* Every error has a code for the client and a message for the log. */
static void
check_error (GError **error)
{
  require (*error != NULL);
  require ((*error)->domain == QCOW2_ERROR);
  require ((*error)->code > 0);
  require (*(*error)->message && g_str_is_ascii ((*error)->message));
  g_clear_error (error);
}

/* What lookup found. */
struct answer {
  bool damaged;
  enum qcow2_run_type type;
  uint64_t host_offset;         /* DATA */
  uint64_t descriptor;          /* COMPRESSED */
};

static uint64_t
content_be64 (const struct container *c, uint64_t offset)
{
  uint8_t buf[8];

  contents (c, buf, sizeof buf, offset);
  return qcow2_be64 (buf);
}

static bool
has_data_file (const struct target *t)
{
  return t->image->header->incompatible & QCOW2_INCOMPAT_DATA_FILE;
}

/* Offset 0 is a cluster like the others in an external data file. */
static bool
has_cluster (const struct target *t, uint64_t entry)
{
  return (entry & QCOW2_ENTRY_OFFSET_MASK) ||
    (has_data_file (t) && (entry & QCOW2_ENTRY_COPIED));
}

static struct answer
answer_of_type (enum qcow2_run_type type, uint64_t host_offset)
{
  return (struct answer) { .type = type, .host_offset = host_offset };
}

static struct answer
lookup_standard (const struct target *t, uint64_t entry, uint32_t within)
{
  const uint64_t host = entry & QCOW2_ENTRY_OFFSET_MASK;

  if (host % t->image->cluster_size != 0 ||
      ((entry & 1) && t->image->header->version == 2))
    return (struct answer) { .damaged = true };
  if (entry & 1)
    return answer_of_type (host ? QCOW2_RUN_ZERO_ALLOCATED :
                           QCOW2_RUN_ZERO, 0);
  return answer_of_type (has_cluster (t, entry) ? QCOW2_RUN_DATA :
                         QCOW2_RUN_UNALLOCATED, host + within);
}

static struct answer
lookup_extended (const struct target *t, uint64_t entry, uint64_t bitmap,
                 uint32_t within)
{
  const uint64_t host = entry & QCOW2_ENTRY_OFFSET_MASK;
  const unsigned sub = within / (t->image->cluster_size / 32);

  if (host % t->image->cluster_size != 0 ||
      (bitmap & (bitmap >> 32) & UINT32_MAX) ||
      ((bitmap & UINT32_MAX) && !has_cluster (t, entry)))
    return (struct answer) { .damaged = true };
  if (bitmap >> sub & 1)
    return answer_of_type (QCOW2_RUN_DATA, host + within);
  if (bitmap >> sub >> 32 & 1)
    return answer_of_type (host ? QCOW2_RUN_ZERO_ALLOCATED :
                           QCOW2_RUN_ZERO, 0);
  return answer_of_type (QCOW2_RUN_UNALLOCATED, 0);
}

/* What is at offset, by the letter of the specification. */
static struct answer
lookup (const struct target *t, uint64_t offset)
{
  const uint64_t cluster_size = t->image->cluster_size;
  const bool extended =
    t->image->header->incompatible & QCOW2_INCOMPAT_EXTENDED_L2;
  const uint64_t entry_size = extended ? 16 : 8;
  const uint64_t l2_entries = cluster_size / entry_size;
  const uint64_t cluster = offset / cluster_size;
  const uint64_t l1_place = t->view.l1_offset + cluster / l2_entries * 8;
  uint64_t table, place, entry;

  require (cluster / l2_entries < t->view.l1_entries);
  if (l1_place + 8 > t->c->size)
    return (struct answer) { .damaged = true };
  table = content_be64 (t->c, l1_place) & QCOW2_ENTRY_OFFSET_MASK;
  if (!table)
    return answer_of_type (QCOW2_RUN_UNALLOCATED, 0);

  place = table + cluster % l2_entries * entry_size;
  if (table % cluster_size != 0 || place + entry_size > t->c->size)
    return (struct answer) { .damaged = true };
  entry = content_be64 (t->c, place);
  if (entry & QCOW2_L2_COMPRESSED)
    return (struct answer) {
      .damaged = has_data_file (t),
      .type = QCOW2_RUN_COMPRESSED,
      .descriptor = entry & (QCOW2_L2_COMPRESSED - 1),
    };
  if (extended)
    return lookup_extended (t, entry, content_be64 (t->c, place + 8),
                            offset % cluster_size);
  return lookup_standard (t, entry, offset % cluster_size);
}

static int
map (const struct target *t, uint64_t offset, uint64_t count,
     struct qcow2_run *run)
{
  g_autoptr (GError) error = NULL;

  require (count > 0 && offset < t->view.size &&
           count <= t->view.size - offset);
  if (qcow2_map (t->image, &t->view, &t->c->io, offset, count, run,
                 &error) == -1) {
    check_error (&error);
    return -1;
  }
  require (error == NULL);
  require (run->length >= 1 && run->length <= count);
  return 0;
}

/* The run at offset is right about the byte that lies at byte at of it. */
static void
check_byte (const struct target *t, uint64_t offset,
            const struct qcow2_run *run, uint64_t at)
{
  const struct answer a = lookup (t, offset + at);

  require (!a.damaged);
  require (a.type == run->type);
  if (a.type == QCOW2_RUN_DATA)
    require (a.host_offset == run->host_offset + at);
  if (a.type == QCOW2_RUN_COMPRESSED)
    require (a.descriptor == run->descriptor);
}

/* A range inside of the run is mapped in the same way. */
static void
check_part (const struct target *t, uint64_t offset,
            const struct qcow2_run *run, uint64_t at, uint64_t count)
{
  struct qcow2_run part;

  check_byte (t, offset, run, at);
  if (map (t, offset + at, count, &part) == -1) {
    require (t->c->failed);
    return;
  }
  check_byte (t, offset + at, &part, 0);
  check_byte (t, offset + at, &part, part.length - 1);
  require (part.length == count || t->c->failed);
}

/* If not by the count asked for, the run ends where the kind does. */
static void
check_longest (const struct target *t, uint64_t offset, uint64_t count,
               const struct qcow2_run *run)
{
  struct answer a;

  if (run->length == count || t->c->failed)
    return;
  a = lookup (t, offset + run->length);
  require (a.damaged || a.type != run->type ||
           a.type == QCOW2_RUN_COMPRESSED ||
           (a.type == QCOW2_RUN_DATA &&
            a.host_offset != run->host_offset + run->length));
}

static void
check_run (const struct target *t, uint64_t offset, uint64_t count,
           const struct qcow2_run *run)
{
  const uint64_t length = run->length, middle = length / 2;
  const uint64_t cluster_size = t->image->cluster_size;

  check_part (t, offset, run, 0, 1);
  check_part (t, offset, run, middle, MIN (length - middle, cluster_size));
  check_part (t, offset, run, length - 1, 1);
  check_longest (t, offset, count, run);
  if (run->type == QCOW2_RUN_DATA) {
    require (run->host_offset >= cluster_size || has_data_file (t));
    require ((run->host_offset ^ offset) % cluster_size == 0);
  }
  if (run->type == QCOW2_RUN_COMPRESSED) {
    require (offset % cluster_size + length <= cluster_size);
    require (run->host_length >= 1 && run->host_length <= 2 * cluster_size);
    require ((run->host_offset + run->host_length) % 512 == 0);
  }
}

static void
read_data (const struct target *t, const struct qcow2_run *run)
{
  g_autoptr (GError) error = NULL;
  uint8_t buf[MAX_DATA], expected[MAX_DATA];
  const size_t count = MIN (run->length, MAX_DATA);

  if (qcow2_io_read_padded (&t->c->io, t->image->cluster_size, buf, count,
                            run->host_offset, &error) == -1) {
    check_error (&error);
    require (t->c->failed ||
             run->host_offset + count >= t->c->size + t->image->cluster_size);
    return;
  }
  contents (t->c, expected, count, run->host_offset);
  for (size_t i = 0; i < count; ++i)
    require (buf[i] ==
             (run->host_offset + i < t->c->size ? expected[i] : 0));
}

/* zlib's answer to the same question. */
static bool
inflate_plainly (const uint8_t *src, size_t src_size, uint8_t *dst,
                 size_t dst_size)
{
  z_stream strm = {
    .next_in = (void *) src, .avail_in = src_size,
    .next_out = dst, .avail_out = dst_size,
  };
  int r;

  require (inflateInit2 (&strm, -15) == Z_OK);
  r = inflate (&strm, Z_FINISH);
  inflateEnd (&strm);
  return (r == Z_STREAM_END || r == Z_BUF_ERROR) && strm.avail_out == 0;
}

/* What libdeflate takes and zlib does not is no harm; that they disagree
 * about the contents, or that zlib takes what we refuse, would be.
 */
static void
compare_with_zlib (const struct target *t, const uint8_t *src,
                   size_t src_size, const uint8_t *dst, bool good)
{
  const uint32_t size = t->image->cluster_size;
  g_autofree uint8_t *plain = NULL;

  if (t->image->header->compression != QCOW2_COMPRESSION_DEFLATE)
    return;
  plain = g_malloc (size);
  if (inflate_plainly (src, src_size, plain, size)) {
    require (good);
    require (memcmp (plain, dst, size) == 0);
  }
}

struct load_request {
  const struct target *t;
  const struct qcow2_run *run;
};

static int
load_cluster (void *opaque, uint64_t key, void *data, GError **error)
{
  const struct load_request *rq = opaque;
  const struct target *t = rq->t;
  const uint32_t length = rq->run->host_length;
  g_autofree uint8_t *src = g_malloc (length);
  int r;

  if (qcow2_io_read_padded (&t->c->io, t->image->cluster_size, src, length,
                            rq->run->host_offset, error) == -1)
    return -1;
  r = qcow2_codec_decompress (t->image->header->compression, src, length,
                              data, t->image->cluster_size, error);
  compare_with_zlib (t, src, length, data, r == 0);
  return r;
}

static void
read_compressed (const struct target *t, const struct qcow2_run *run)
{
  struct load_request rq = { .t = t, .run = run };
  g_autoptr (GError) error = NULL;
  struct qcow2_cache_ref ref;

  if (t->image->cluster_size > MAX_CLUSTER)
    return;
  if (qcow2_cache_get (t->image->clusters, run->descriptor, load_cluster,
                       &rq, &ref, &error) == -1) {
    check_error (&error);
    require (!qcow2_cache_peek (t->image->clusters, run->descriptor, &ref));
    return;
  }
  require (ref.data != NULL);
  qcow2_cache_put (&ref);
}

/* Look at the runs from offset on, first asking for count bytes. */
static void
walk (const struct target *t, uint64_t offset, uint64_t count)
{
  const uint64_t cluster_size = t->image->cluster_size;
  struct qcow2_run run;

  for (unsigned i = 0; i < MAX_STEPS && offset < t->view.size; ++i) {
    count = MIN (count, t->view.size - offset);
    if (map (t, offset, count, &run) == -1) {
      require (t->c->failed || lookup (t, offset).damaged);
      offset += cluster_size - offset % cluster_size;
      continue;
    }
    check_run (t, offset, count, &run);
    if (run.type == QCOW2_RUN_DATA && !has_data_file (t))
      read_data (t, &run);
    else if (run.type == QCOW2_RUN_COMPRESSED)
      read_compressed (t, &run);
    offset += run.length;
    count = MAX_COUNT * cluster_size;
  }
}

static void
walk_view (const struct target *t)
{
  const uint64_t size = t->view.size;
  const uint64_t some = (uint64_t) MAX_COUNT * t->image->cluster_size;
  const uint64_t back = UINT64_C (3) * t->image->cluster_size;

  require (size % 512 == 0 && size <= INT64_MAX);
  if (size == 0)
    return;
  walk (t, 0, t->c->flags & FLAG_WHOLE ? size : some);
  walk (t, t->c->probe % size, some);
  walk (t, size / 2, some);
  walk (t, size - MIN (size, back), some);
}

static void
check_header (const struct qcow2_header *h)
{
  uint64_t bytes = 0;

  require (h->version == 2 || h->version == 3);
  require (h->cluster_bits >= 9 && h->cluster_bits <= 21);
  require (h->refcount_order <= 6);
  require (h->l1_entries >= qcow2_header_l1_needed (h, h->size));
  require (!(h->incompatible & ~QCOW2_INCOMPAT_KNOWN));
  require (h->refcount_table_clusters > 0);
  require (!h->backing_file || *h->backing_file);
  for (guint i = 0; i < h->extensions->len; ++i) {
    const struct qcow2_extension *ext = g_ptr_array_index (h->extensions, i);

    require (ext->type != QCOW2_EXT_END);
    require (qcow2_header_find_extension (h, ext->type) != NULL);
    bytes += 8 + g_bytes_get_size (ext->data);
  }
  require (h->header_length + bytes <= UINT64_C (1) << h->cluster_bits);
}

static void
check_snapshots (struct target *t)
{
  const GPtrArray *snapshots = t->image->snapshots;
  unsigned walked = 0;

  require (snapshots->len == t->image->header->nr_snapshots);
  for (guint i = 0; i < snapshots->len && walked < MAX_VIEWS; ++i) {
    const struct qcow2_snapshot *sn = g_ptr_array_index (snapshots, i);
    const struct qcow2_snapshot *named =
      qcow2_snapshots_find (snapshots, sn->name);
    const struct qcow2_snapshot *identified =
      qcow2_snapshots_find (snapshots, sn->id);
    g_autoptr (GError) error = NULL;

    require (named && strcmp (named->name, sn->name) == 0);
    require (identified && (strcmp (identified->id, sn->id) == 0 ||
                            strcmp (identified->name, sn->id) == 0));
    if (qcow2_image_snapshot_view (t->image, sn, &t->view, &error) == -1)
      check_error (&error);
    else {
      walk_view (t);
      walked++;
    }
  }
}

static void
count_used (const struct target *t)
{
  g_autoptr (GError) error = NULL;
  uint64_t used;

  t->c->budget = MIN (t->c->budget, REFCOUNT_BUDGET);
  if (qcow2_refcount_count_used (t->image, &t->c->io, 1000, &used,
                                 &error) == -1)
    check_error (&error);
  else
    require (used <= t->c->size / t->image->cluster_size + 1);
}

/* Key derivations take as long as the header says. */
static bool
is_quick_luks (const struct target *t)
{
  GBytes *bytes = qcow2_header_find_extension (t->image->header,
                                               QCOW2_EXT_CRYPTO);
  uint8_t luks[592];

  if (!bytes || g_bytes_get_size (bytes) < 8)
    return true;                /* it does not come to that */
  contents (t->c, luks, sizeof luks,
            qcow2_be64 (g_bytes_get_data (bytes, NULL)) & INT64_MAX);
  for (unsigned slot = 0; slot < 8; ++slot)
    if (qcow2_be32 (luks + 212 + slot * 48) > MAX_ITERATIONS)
      return false;
  return qcow2_be32 (luks + 164) <= MAX_ITERATIONS;
}

static void
decrypt (const struct target *t)
{
  const struct qcow2_header *header = t->image->header;
  g_autoptr (GError) error = NULL;
  struct qcow2_crypt *crypt;
  uint8_t buf[1024] = { 0 };

  if (header->crypt_method == QCOW2_CRYPT_NONE ||
      (header->crypt_method == QCOW2_CRYPT_LUKS && !is_quick_luks (t)))
    return;
  t->c->budget = CRYPT_BUDGET;
  crypt = qcow2_crypt_open (header, &t->c->io, "secret", 6, &error);
  if (!crypt) {
    check_error (&error);
    return;
  }
  if (qcow2_crypt_decrypt (crypt, buf, sizeof buf,
                           t->c->probe & ~UINT64_C (511),
                           t->c->probe & ~UINT64_C (511), &error) == -1)
    check_error (&error);
  qcow2_crypt_close (crypt);
}

static void
on_report (void *opaque, const char *message)
{
  unsigned *reports = opaque;

  require (*message && g_str_is_ascii (message));
  require (++*reports <= QCOW2_CHECK_MAX_REPORTS);
}

static int
on_progress (void *opaque, unsigned percent)
{
  require (percent <= 100);
  return 0;
}

static void
check_consistency (const struct target *t)
{
  unsigned reports = 0;
  const struct qcow2_check_observer observer = {
    .report = on_report, .progress = on_progress, .opaque = &reports,
  };
  struct qcow2_check_result r;
  g_autoptr (GError) error = NULL;

  if (t->c->size / t->image->cluster_size > MAX_CHECK_CLUSTERS)
    return;
  t->c->budget = CHECK_BUDGET;
  if (qcow2_check (t->image, &t->c->io, &observer, &r, &error) == -1) {
    check_error (&error);
    return;
  }
  require ((r.corruptions || r.leaks || r.check_errors) == (reports > 0));
  require (r.fragmented_clusters <= r.allocated_clusters);
  require (r.compressed_clusters <= r.allocated_clusters);
  require (r.image_end_offset <=
           t->c->size + UINT64_C (2) * t->image->cluster_size);
}

/* As the bitmap-persist filter does it. */
static void
load_bitmaps (const struct target *t)
{
  g_autoptr (GError) error = NULL;
  struct qcow2_bitmap_store *store;
  const GPtrArray *list;

  t->c->budget = CHECK_BUDGET;
  store = qcow2_bitmap_store_open (t->image, &t->c->io, &error);
  if (!store || qcow2_bitmap_store_check (store, &t->c->io, &error) == -1) {
    check_error (&error);
    qcow2_bitmap_store_close (store);
    return;
  }
  list = qcow2_bitmap_store_list (store);
  for (guint i = 0; i < list->len; ++i) {
    struct qcow2_bitmap *bitmap = g_ptr_array_index (list, i);
    struct dirty_bits *bits = dirty_bits_new (t->image->header->size,
                                              bitmap->granularity_bits);

    if (qcow2_bitmap_store_load (store, &t->c->io, bitmap, bits,
                                 &error) == -1)
      check_error (&error);
    require (dirty_bits_count (bits) <= dirty_bits_length (bits));
    dirty_bits_free (bits);
  }
  qcow2_bitmap_store_close (store);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t length)
{
  g_autoptr (GError) error = NULL;
  struct container c;
  struct target t = { .c = &c };

  unfold (&c, data, length);
  t.image = qcow2_image_open (&c.io, &error);
  if (!t.image) {
    check_error (&error);
    return 0;
  }
  if (!(c.flags & FLAG_NO_CACHE))
    qcow2_image_set_cache_size (t.image, CACHE_SIZE);
  check_header (t.image->header);
  qcow2_image_active_view (t.image, &t.view);
  walk_view (&t);
  check_snapshots (&t);
  count_used (&t);
  decrypt (&t);
  check_consistency (&t);
  load_bitmaps (&t);
  qcow2_image_close (t.image);
  return 0;
}
