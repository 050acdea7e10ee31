/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The model of a disk: writes are atomic in sectors of 512 bytes only.  A
 * sector that has been written to several times since the last flush has
 * kept none of these writes, the first, the first two, and so on, whatever
 * other sectors have.  That the container has grown may be lost as well.
 */

#include <config.h>

#include <string.h>

#include "qcow2/error.h"
#include "crash/recorder.h"

#define SECTOR 512
#define CAPACITY (UINT64_C (64) << 20)

enum kind { WRITE, FLUSH, GROW };

struct event {
  enum kind kind;
  uint64_t offset;              /* or the new size */
  GBytes *data;
};

struct recorder {
  struct qcow2_io io;
  uint8_t *initial, *data;
  uint64_t initial_size, size;
  GArray *events;               /* of struct event */
  guint calls_left;             /* until they fail */
};

/* Bytes that a crash has changed, to get back to what is stable. */
struct undo {
  uint64_t offset;
  size_t count;
  uint8_t bytes[SECTOR];
};

static int
allow_call (struct recorder *r, GError **error)
{
  if (r->calls_left == 0)
    return qcow2_fail (error, ENOSPC, "it was told to fail");
  if (r->calls_left != UINT_MAX)
    r->calls_left--;
  return 0;
}

static void
add_event (struct recorder *r, enum kind kind, uint64_t offset,
           const void *buf, size_t count)
{
  const struct event event = {
    kind, offset, buf ? g_bytes_new (buf, count) : NULL
  };

  g_array_append_val (r->events, event);
}

static int
recorder_pread (const struct qcow2_io *io, void *buf, size_t count,
                uint64_t offset, GError **error)
{
  const struct recorder *r = (const struct recorder *) io;

  g_assert_cmpuint (offset + count, <=, r->size);
  memcpy (buf, r->data + offset, count);
  return 0;
}

static uint64_t
recorder_get_size (const struct qcow2_io *io)
{
  return ((const struct recorder *) io)->size;
}

static int
recorder_pwrite (const struct qcow2_io *io, const void *buf, size_t count,
                 uint64_t offset, GError **error)
{
  struct recorder *r = (struct recorder *) io;

  g_assert_cmpuint (offset + count, <=, r->size);
  if (allow_call (r, error) == -1)
    return -1;
  add_event (r, WRITE, offset, buf, count);
  memcpy (r->data + offset, buf, count);
  return 0;
}

static int
recorder_flush (const struct qcow2_io *io, GError **error)
{
  struct recorder *r = (struct recorder *) io;

  if (allow_call (r, error) == -1)
    return -1;
  add_event (r, FLUSH, 0, NULL, 0);
  return 0;
}

static int
recorder_grow (const struct qcow2_io *io, uint64_t size, GError **error)
{
  struct recorder *r = (struct recorder *) io;

  g_assert_cmpuint (size, >, r->size);
  g_assert_cmpuint (size, <=, CAPACITY);
  if (allow_call (r, error) == -1)
    return -1;
  add_event (r, GROW, size, NULL, 0);
  r->size = size;
  return 0;
}

struct recorder *
recorder_new (const void *bytes, uint64_t size)
{
  struct recorder *r = g_new0 (struct recorder, 1);

  g_assert_cmpuint (size, <=, CAPACITY);
  r->io.pread = recorder_pread;
  r->io.get_size = recorder_get_size;
  r->io.pwrite = recorder_pwrite;
  r->io.flush = recorder_flush;
  r->io.grow = recorder_grow;
  r->initial = g_memdup2 (bytes, size);
  r->initial_size = r->size = size;
  r->data = g_malloc0 (CAPACITY);
  memcpy (r->data, bytes, size);
  r->events = g_array_new (FALSE, FALSE, sizeof (struct event));
  r->calls_left = UINT_MAX;
  return r;
}

void
recorder_free (struct recorder *r)
{
  for (guint i = 0; i < r->events->len; ++i)
    g_clear_pointer (&g_array_index (r->events, struct event, i).data,
                     g_bytes_unref);
  g_array_unref (r->events);
  g_free (r->initial);
  g_free (r->data);
  g_free (r);
}

const struct qcow2_io *
recorder_io (struct recorder *r)
{
  return &r->io;
}

guint
recorder_events (const struct recorder *r)
{
  return r->events->len;
}

void
recorder_fail_after (struct recorder *r, guint calls)
{
  r->calls_left = calls;
}

/* Remains. */

static int
remains_pread (const struct qcow2_io *io, void *buf, size_t count,
               uint64_t offset, GError **error)
{
  const struct remains *m = (const struct remains *) io;

  g_assert_cmpuint (offset + count, <=, m->size);
  memcpy (buf, m->data + offset, count);
  return 0;
}

static uint64_t
remains_get_size (const struct qcow2_io *io)
{
  return ((const struct remains *) io)->size;
}

struct remains *
remains_new (struct recorder *r)
{
  struct remains *m = g_new0 (struct remains, 1);

  m->io.pread = remains_pread;
  m->io.get_size = remains_get_size;
  m->recorder = r;
  m->data = g_malloc0 (CAPACITY);
  memcpy (m->data, r->initial, r->initial_size);
  m->size = m->stable_size = r->initial_size;
  m->undo = g_array_new (FALSE, FALSE, sizeof (struct undo));
  return m;
}

void
remains_free (struct remains *m)
{
  g_array_unref (m->undo);
  g_free (m->data);
  g_free (m);
}

static void
undo_crash (struct remains *m)
{
  for (guint i = m->undo->len; i-- > 0; ) {
    const struct undo *undo = &g_array_index (m->undo, struct undo, i);

    memcpy (m->data + undo->offset, undo->bytes, undo->count);
  }
  g_array_set_size (m->undo, 0);
  m->size = m->stable_size;
}

/* What was flushed before the crash is there. */
static void
advance (struct remains *m, guint events)
{
  const GArray *all = m->recorder->events;
  guint last = m->flushed;

  for (guint i = m->flushed; i < events; ++i)
    if (g_array_index (all, struct event, i).kind == FLUSH)
      last = i + 1;
  for (; m->flushed < last; m->flushed++) {
    const struct event *e = &g_array_index (all, struct event, m->flushed);
    gsize count;
    const void *bytes = e->data ? g_bytes_get_data (e->data, &count) : NULL;

    if (e->kind == WRITE)
      memcpy (m->data + e->offset, bytes, count);
    else if (e->kind == GROW)
      m->stable_size = e->offset;
  }
  m->size = m->stable_size;
}

/* Apply what of a write was kept. */
static void
apply_write (struct remains *m, const struct event *e, unsigned keep,
             GHashTable *lost, GRand *rand)
{
  gsize count;
  const uint8_t *bytes = g_bytes_get_data (e->data, &count);

  for (gsize done = 0, n; done < count; done += n) {
    const uint64_t offset = e->offset + done;
    gpointer sector = GSIZE_TO_POINTER (offset / SECTOR + 1);
    struct undo undo = { .offset = offset };

    n = MIN (count - done, SECTOR - offset % SECTOR);
    if (offset + n > m->size ||
        (keep < 100 && (guint32) g_rand_int_range (rand, 0, 100) >= keep))
      g_hash_table_add (lost, sector);
    if (g_hash_table_contains (lost, sector))
      continue;
    undo.count = n;
    memcpy (undo.bytes, m->data + offset, n);
    g_array_append_val (m->undo, undo);
    memcpy (m->data + offset, bytes + done, n);
  }
}

void
remains_crash (struct remains *m, guint events, unsigned keep, GRand *rand)
{
  const GArray *all = m->recorder->events;
  g_autoptr (GHashTable) lost = g_hash_table_new (NULL, NULL);

  undo_crash (m);
  advance (m, events);
  for (guint i = m->flushed; i < events; ++i) {
    const struct event *e = &g_array_index (all, struct event, i);

    if (e->kind == WRITE)
      apply_write (m, e, keep, lost, rand);
    else if (e->kind == GROW &&
             (keep == 100 || g_rand_int_range (rand, 0, 100) < 80))
      m->size = e->offset;
  }
}
