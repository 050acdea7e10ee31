/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crash/judge.h"
#include "crash/server.h"
#include "dirty/transaction.h"
#include "qcow2/error.h"

void
server_tell (const struct server *s, const char *fs, ...)
{
  va_list args;

  if (!s->verbose)
    return;
  fprintf (stderr, "event %u: ", s->timeline->len);
  va_start (args, fs);
  vfprintf (stderr, fs, args);
  va_end (args);
  fputc ('\n', stderr);
}

/* The container. */

static struct disk *
disk_of (const struct qcow2_io *io)
{
  return (struct disk *) io;
}

/* With the lock.  Is this call to fail? */
static int
count_down (struct server *s, guint *left, GError **error)
{
  if (*left == UINT_MAX)
    return 0;
  if (*left > 0) {
    --*left;
    return 0;
  }
  if (s->once)
    *left = UINT_MAX;
  s->failures++;
  return qcow2_fail (error, EIO, "it was told to fail");
}

static int
disk_pread (const struct qcow2_io *io, void *buf, size_t count,
            uint64_t offset, GError **error)
{
  const struct disk *d = disk_of (io);
  const struct qcow2_io *inner = recorder_io (d->recorder);
  int r;

  g_mutex_lock (&d->server->lock);
  r = count_down (d->server, &d->server->reads_left, error);
  if (r == 0)
    r = inner->pread (inner, buf, count, offset, error);
  g_mutex_unlock (&d->server->lock);
  return r;
}

static uint64_t
disk_get_size (const struct qcow2_io *io)
{
  const struct qcow2_io *inner = recorder_io (disk_of (io)->recorder);

  return inner->get_size (inner);
}

static void
add_event (const struct disk *d)
{
  const guint8 number = d->number;

  g_byte_array_append (d->server->timeline, &number, 1);
}

/* A write that fails may have been done up to the end of a sector. */
static size_t
some_sectors (const struct disk *d, uint64_t offset, size_t count)
{
  const uint64_t end = g_rand_int_range (d->server->io_rand, 0, count + 512) +
    offset;

  return MIN (count, MAX (end / 512 * 512, offset) - offset);
}

static int
disk_pwrite (const struct qcow2_io *io, const void *buf, size_t count,
             uint64_t offset, GError **error)
{
  const struct disk *d = disk_of (io);
  const struct qcow2_io *inner = recorder_io (d->recorder);
  int r;

  g_mutex_lock (&d->server->lock);
  r = count_down (d->server, &d->server->changes_left, error);
  if (r == -1)
    count = some_sectors (d, offset, count);
  if (count > 0) {
    must (inner->pwrite (inner, buf, count, offset, NULL), NULL, "pwrite");
    add_event (d);
  }
  g_mutex_unlock (&d->server->lock);
  return r;
}

static int
disk_flush (const struct qcow2_io *io, GError **error)
{
  const struct disk *d = disk_of (io);
  const struct qcow2_io *inner = recorder_io (d->recorder);
  int r;

  g_mutex_lock (&d->server->lock);
  r = count_down (d->server, &d->server->changes_left, error);
  if (r == 0 || g_rand_boolean (d->server->io_rand)) {
    must (inner->flush (inner, NULL), NULL, "flush");
    add_event (d);
  }
  g_mutex_unlock (&d->server->lock);
  return r;
}

static int
disk_grow (const struct qcow2_io *io, uint64_t size, GError **error)
{
  const struct disk *d = disk_of (io);
  const struct qcow2_io *inner = recorder_io (d->recorder);
  int r;

  g_mutex_lock (&d->server->lock);
  r = count_down (d->server, &d->server->changes_left, error);
  if (r == 0 || g_rand_boolean (d->server->io_rand)) {
    must (inner->grow (inner, size, NULL), NULL, "grow");
    add_event (d);
  }
  g_mutex_unlock (&d->server->lock);
  return r;
}

static const struct qcow2_io *
container_open (struct dirty_container *container, uint64_t size,
                bool writable, GError **error)
{
  return &((struct disk *) ((char *) container -
                            offsetof (struct disk, container)))->io;
}

static void
container_close (struct dirty_container *container)
{
}

/* Servers. */

static void
ignore (const char *message)
{
}

static void
open_disk (struct server *s, unsigned number, const struct remains *bytes,
           bool intent)
{
  const struct dirty_persist_options options = {
    .writable = true, .intent = intent, .report = ignore,
  };
  struct disk *d = &s->disks[number];
  g_autofree char *name = g_strdup_printf ("disk%u", number);

  d->io.pread = disk_pread;
  d->io.get_size = disk_get_size;
  d->io.pwrite = disk_pwrite;
  d->io.flush = disk_flush;
  d->io.grow = disk_grow;
  d->container.name = "container";
  d->container.open = container_open;
  d->container.close = container_close;
  d->server = s;
  d->number = number;
  d->recorder = recorder_new (bytes->data, bytes->size);
  d->node = dirty_node_of_export (name);
  d->persist = dirty_persist_new (d->node, &d->container, &options);
}

struct server *
server_new (GRand *rand, unsigned disks, struct remains *const *bytes,
            bool intent)
{
  struct server *s = g_new0 (struct server, 1);
  struct qcow2_image *image = qcow2_image_open (&bytes[0]->io, NULL);

  s->rand = rand;
  s->io_rand = g_rand_new_with_seed (g_rand_int (rand));
  s->size = image->header->size;
  qcow2_image_close (image);
  s->model = model_new (disks, intent);
  s->timeline = g_byte_array_new ();
  g_mutex_init (&s->lock);
  server_fail_never (s);
  for (unsigned i = 0; i < disks; ++i)
    open_disk (s, i, bytes[i], intent);
  return s;
}

void
server_stop (struct server *s)
{
  for (unsigned i = 0; i < s->model->disks; ++i)
    dirty_persist_free (s->disks[i].persist);
  dirty_nodes_forget_all ();
}

void
server_free (struct server *s)
{
  for (unsigned i = 0; i < s->model->disks; ++i)
    recorder_free (s->disks[i].recorder);
  model_free (s->model);
  g_byte_array_unref (s->timeline);
  g_rand_free (s->io_rand);
  g_mutex_clear (&s->lock);
  g_free (s);
}

void
server_fail_never (struct server *s)
{
  g_mutex_lock (&s->lock);
  s->changes_left = s->reads_left = UINT_MAX;
  g_mutex_unlock (&s->lock);
}

void
server_fail_soon (struct server *s)
{
  g_mutex_lock (&s->lock);
  s->once = g_rand_boolean (s->io_rand);
  if (g_rand_int_range (s->io_rand, 0, 4) == 0)
    s->reads_left = g_rand_int_range (s->io_rand, 0, 40);
  else
    s->changes_left = g_rand_int_range (s->io_rand, 0, 30);
  g_mutex_unlock (&s->lock);
}

static void
note (struct server *s)
{
  model_note (s->model, s->timeline->len);
}

/* With the lock. */
static void
use (struct disk *d)
{
  d->server->model->used[d->number] = true;
  d->server->model->clean[d->number] = false;
}

/* An operation on the disk begins.  Returns the failures so far. */
static guint
begin (struct disk *d)
{
  guint failures;

  g_mutex_lock (&d->server->lock);
  use (d);
  note (d->server);
  failures = d->server->failures;
  g_mutex_unlock (&d->server->lock);
  return failures;
}

/* Failures have a reason. */
static int
finish (struct server *s, int r, guint failures, const GError *error,
        const char *what)
{
  server_tell (s, "%s: %s", what, error ? error->message : "done");
  if (r == -1 && s->failures == failures)
    must (r, error, what);
  return r;
}

/* Operations. */

void
server_load (struct server *s)
{
  for (unsigned i = 0; i < s->model->disks; ++i) {
    struct disk *d = &s->disks[i];
    g_autoptr (GError) error = NULL;

    while (dirty_persist_load (d->persist, s->size, &error) == -1) {
      if (s->failures == 0)
        must (-1, error, "load");
      g_clear_error (&error);
      server_fail_never (s);
    }
    must (dirty_node_open (d->node, s->size, DIRTY_WRITABLE, NULL), NULL,
          "open");
    model_learn (s->model, i, d->node);
  }
  server_fail_never (s);
  note (s);
}

void
server_write (struct connection *c, uint64_t offset, uint64_t count)
{
  struct disk *d = c->disk;
  struct server *s = d->server;
  struct dirty_gate *const gates = d->node->gates;
  const guint failures = begin (d);
  g_autoptr (GError) error = NULL;
  int r;

  server_tell (s, "disk %u: write %" PRIu64 " + %" PRIu64, d->number, offset,
               count);
  dirty_gate_enter (&gates[DIRTY_GATE_TRACKING]);
  dirty_node_mark (d->node, offset, count);
  g_mutex_lock (&s->lock);
  model_mark (s->model, d->number, d->inactive, offset, count);
  g_mutex_unlock (&s->lock);
  dirty_gate_enter (&gates[DIRTY_GATE_PERSIST]);
  if (!c->wrote) {
    atomic_fetch_add (&d->writers, 1);
    dirty_persist_add_writer (d->persist);
  }
  c->wrote = true;
  r = dirty_persist_begin_write (d->persist, offset, count, &error);
  if (r == 0) {
    g_mutex_lock (&s->lock);
    model_pass (s->model, d->number, offset, count);
    note (s);
    g_mutex_unlock (&s->lock);
  }
  dirty_gate_leave (&gates[DIRTY_GATE_PERSIST]);
  dirty_gate_leave (&gates[DIRTY_GATE_TRACKING]);
  if (d->inactive)
    g_assert (r == -1 && error->code == EPERM);
  else
    finish (s, r, failures, error, "write");
}

void
server_leave (struct connection *c)
{
  if (c->wrote) {
    atomic_fetch_sub (&c->disk->writers, 1);
    dirty_persist_remove_writer (c->disk->persist);
  }
  c->wrote = false;
}

/* The container is as memory is, and nobody seems to use it. */
static void
note_clean (struct disk *d)
{
  struct model *m = d->server->model;

  model_settle (m, d->number);
  m->used[d->number] = false;
  m->clean[d->number] = true;
  note (d->server);
}

int
server_store (struct disk *d, bool last)
{
  struct server *s = d->server;
  const guint failures = begin (d);
  g_autoptr (GError) error = NULL;
  int r;

  server_tell (s, "disk %u, %u writers: store, last %d", d->number,
               atomic_load (&d->writers), last);
  r = dirty_persist_store (d->persist, last, &error);
  if (r == 0 && !d->inactive && !s->threads &&
      (last || atomic_load (&d->writers) == 0)) {
    g_mutex_lock (&s->lock);
    note_clean (d);
    g_mutex_unlock (&s->lock);
  }
  return finish (s, r, failures, error, "store");
}

int
server_set_active (struct disk *d, bool active)
{
  struct server *s = d->server;
  const guint failures = s->failures;
  g_autoptr (GError) error = NULL;
  int r;

  if (!active)
    begin (d);
  server_tell (s, "disk %u: active %d", d->number, active);
  r = dirty_persist_set_active (d->persist, active, &error);
  if (r == 0) {
    d->inactive = !active;
    if (!active) {
      g_mutex_lock (&s->lock);
      note_clean (d);
      g_mutex_unlock (&s->lock);
    }
  }
  return finish (s, r, failures, error, "set-active");
}

/* Transactions. */

#define NAMES 6

static const char *
some_name (GRand *rand)
{
  static const char *const names[NAMES] = {
    "a", "b", "c", "a name of some length", "z", "qemu"
  };

  return names[g_rand_int_range (rand, 0, NAMES)];
}

/* Mostly of one that is there. */
static const char *
known_name (GRand *rand, const GPtrArray *list)
{
  const struct model_bitmap *bitmap;

  if (list->len == 0 || g_rand_int_range (rand, 0, 6) == 0)
    return some_name (rand);
  bitmap = g_ptr_array_index (list, g_rand_int_range (rand, 0, list->len));
  return bitmap->name;
}

/* A transaction that goes on, and what it lets bitmaps become. */
struct change {
  struct server *s;
  struct dirty_transaction *t;
  GPtrArray *after[MODEL_DISKS];
  bool touched[MODEL_DISKS];
};

static struct model_bitmap *
usable (const struct change *c, unsigned disk, const char *name)
{
  struct model_bitmap *bitmap = model_find (c->after[disk], name);

  return bitmap && !bitmap->inconsistent &&
    !(bitmap->persistent && c->s->disks[disk].inactive) ? bitmap : NULL;
}

static void
touch (struct change *c, unsigned disk, const struct model_bitmap *bitmap)
{
  c->touched[disk] |= bitmap->persistent;
}

static int
act_add (struct change *c, unsigned disk, const char *name, GError **error,
         bool *expected)
{
  struct server *s = c->s;
  const unsigned bits = g_rand_int_range (s->rand, 9, 17);
  const bool persistent = g_rand_int_range (s->rand, 0, 5) > 0;
  const bool recording = g_rand_int_range (s->rand, 0, 4) > 0;
  const bool inactive = s->disks[disk].inactive;
  struct model_bitmap *bitmap;

  *expected = !inactive && !model_find (c->after[disk], name);
  if (*expected) {
    bitmap = model_add (s->model, c->after[disk], name, s->size, bits);
    bitmap->persistent = persistent;
    bitmap->recording = recording;
    touch (c, disk, bitmap);
  }
  return dirty_bitmap_add (c->t, s->disks[disk].node, name,
                           UINT64_C (1) << bits, persistent, recording,
                           error);
}

static int
act_remove (struct change *c, unsigned disk, const char *name,
            GError **error, bool *expected)
{
  struct model_bitmap *bitmap = model_find (c->after[disk], name);

  *expected = bitmap && !c->s->disks[disk].inactive;
  if (*expected) {
    touch (c, disk, bitmap);
    g_ptr_array_remove (c->after[disk], bitmap);
  }
  return dirty_bitmap_remove (c->t, c->s->disks[disk].node, name, error);
}

static int
act_clear (struct change *c, unsigned disk, const char *name, GError **error,
           bool *expected)
{
  struct model_bitmap *bitmap = usable (c, disk, name);

  *expected = bitmap && !c->s->disks[disk].inactive;
  if (*expected) {
    touch (c, disk, bitmap);
    dirty_bits_clear (bitmap->exact, 0, c->s->size);
    dirty_bits_clear (bitmap->needed, 0, c->s->size);
  }
  return dirty_bitmap_clear (c->t, c->s->disks[disk].node, name, error);
}

static int
act_record (struct change *c, unsigned disk, const char *name,
            GError **error, bool *expected)
{
  struct model_bitmap *bitmap = usable (c, disk, name);
  const bool recording = g_rand_boolean (c->s->rand);

  *expected = bitmap && !c->s->disks[disk].inactive;
  if (*expected) {
    touch (c, disk, bitmap);
    /* A disabled one is complete in the container. */
    if (bitmap->recording != recording)
      dirty_bits_merge (bitmap->needed, bitmap->exact);
    bitmap->recording = recording;
  }
  return dirty_bitmap_record (c->t, c->s->disks[disk].node, name, recording,
                              error);
}

static int
act_merge (struct change *c, unsigned disk, const char *name, GError **error,
           bool *expected)
{
  const unsigned from = g_rand_int_range (c->s->rand, 0, c->s->model->disks);
  g_autofree char *source = g_strdup (known_name (c->s->rand,
                                                  c->after[from]));
  struct model_bitmap *to = usable (c, disk, name);
  struct model_bitmap *bitmap = usable (c, from, source);

  *expected = to && bitmap && !c->s->disks[disk].inactive &&
    !c->s->disks[from].inactive;
  if (*expected) {
    touch (c, disk, to);
    dirty_bits_merge (to->exact, bitmap->exact);
    dirty_bits_merge (to->needed, bitmap->exact);
  }
  return dirty_bitmap_merge (c->t, c->s->disks[disk].node, name,
                             c->s->disks[from].node, source, error);
}

static int
act_move (struct change *c, unsigned disk, const char *name, GError **error,
          bool *expected)
{
  const unsigned to = g_rand_int_range (c->s->rand, 0, c->s->model->disks);
  const char *target = some_name (c->s->rand);
  struct model_bitmap *bitmap = usable (c, disk, name);
  guint index;

  /* A name that becomes free on another disk is not taken at once: the
   * bitmap could not be stored there before it is removed here.
   */
  if (to != disk && model_find (c->s->model->now[to], target))
    target = "moved";
  *expected = bitmap && !model_find (c->after[to], target) &&
    !c->s->disks[disk].inactive && !c->s->disks[to].inactive;
  if (*expected) {
    touch (c, disk, bitmap);
    touch (c, to, bitmap);
    g_ptr_array_find (c->after[disk], bitmap, &index);
    g_ptr_array_steal_index (c->after[disk], index);
    g_ptr_array_add (c->after[to], bitmap);
    g_free (bitmap->name);
    bitmap->name = g_strdup (target);
  }
  return dirty_bitmap_move (c->t, c->s->disks[disk].node, name,
                            c->s->disks[to].node, target, error);
}

/* Whether it was possible. */
static bool
act (struct change *c)
{
  static int (*const actions[]) (struct change *c, unsigned disk,
                                 const char *name, GError **error,
                                 bool *expected) = {
    act_add, act_add, act_add, act_remove, act_clear, act_record, act_merge,
    act_move,
  };
  GRand *rand = c->s->rand;
  const unsigned n = g_rand_int_range (rand, 0, G_N_ELEMENTS (actions));
  const unsigned disk = g_rand_int_range (rand, 0, c->s->model->disks);
  g_autofree char *name =
    g_strdup (actions[n] == act_add ? some_name (rand) :
              known_name (rand, c->after[disk]));
  const guint failures = c->s->failures;
  g_autoptr (GError) error = NULL;
  bool expected;
  const int r = actions[n] (c, disk, name, &error, &expected);

  server_tell (c->s, "disk %u, bitmap %s, action %u: %s", disk, name, n,
               error ? error->message : "done");
  if (r == -1 && c->s->failures > failures)
    return false;
  if (expected != (r == 0)) {
    fprintf (stderr, "action %u on bitmap %s: %s\n", n, name,
             error ? error->message : "succeeded");
    exit (1);
  }
  return expected;
}

/* What the transaction does last, while the gates are closed. */

static void
commit_change (gpointer opaque)
{
  struct change *c = opaque;

  g_mutex_lock (&c->s->lock);
  model_succeed (c->s->model, c->after, c->touched);
  note (c->s);
  g_mutex_unlock (&c->s->lock);
}

static void
undo_change (gpointer opaque)
{
  struct change *c = opaque;

  g_mutex_lock (&c->s->lock);
  model_fail (c->s->model, c->after);
  note (c->s);
  g_mutex_unlock (&c->s->lock);
}

static int
commit (struct change *c)
{
  struct server *s = c->s;
  g_autoptr (GError) error = NULL;
  guint failures;
  int r;

  g_mutex_lock (&s->lock);
  for (unsigned i = 0; i < s->model->disks; ++i)
    if (c->touched[i])
      use (&s->disks[i]);
  model_begin (s->model, c->after, c->touched);
  note (s);
  failures = s->failures;
  g_mutex_unlock (&s->lock);
  dirty_transaction_push (c->t, commit_change, undo_change, c);
  r = dirty_transaction_commit (c->t, &error);
  return finish (s, r, failures, error, "transaction");
}

int
server_transaction (struct server *s)
{
  g_autoptr (GPtrArray) nodes = g_ptr_array_new ();
  struct change c = { .s = s };
  unsigned actions = g_rand_int_range (s->rand, 1, 5);
  bool possible = true;
  int r = 0;

  for (unsigned i = 0; i < s->model->disks; ++i)
    g_ptr_array_add (nodes, s->disks[i].node);
  dirty_changes_lock ();
  dirty_lock ();
  c.t = dirty_transaction_begin (nodes);
  for (unsigned i = 0; i < MODEL_DISKS; ++i)
    c.after[i] = model_copy (s->model->now[i]);
  while (possible && actions-- > 0)
    possible = act (&c);
  if (possible && g_rand_int_range (s->rand, 0, 8))
    r = commit (&c);
  else
    dirty_transaction_abort (c.t);
  dirty_unlock ();
  dirty_changes_unlock ();
  for (unsigned i = 0; i < MODEL_DISKS; ++i)
    g_clear_pointer (&c.after[i], g_ptr_array_unref);
  return r;
}

struct dirty_persist *
server_open (struct dirty_node *node, struct dirty_container *container,
             bool writable, bool intent, uint64_t size)
{
  const struct dirty_persist_options options = {
    .writable = writable, .intent = intent, .report = ignore,
  };
  struct dirty_persist *persist = dirty_persist_new (node, container,
                                                     &options);
  GError *error = NULL;

  must (dirty_persist_load (persist, size, &error), error, "load");
  must (dirty_node_open (node, size, DIRTY_WRITABLE, &error), error, "open");
  return persist;
}
