/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* crash-persist IMAGE SEED OPERATIONS TRIES DIRECTORY EVERY [OPTION...]
 *
 * Lets a server that keeps bitmaps in an image, in memory, do random
 * operations, and looks at what a crash between any two of its writes
 * might leave, as crash-bitmaps does.  Each time the image must be free of
 * corruptions, and what another server loads from it must be what the first
 * had to remember.  Then a server begins with what one of the crashes has
 * left, and so on.
 *
 *    intent=on|off|mixed    do the servers keep an intent (on)
 *    disks=1|2              number of disks, each with such an image (1)
 *    lives=N                number of servers (4)
 *    threads=N              that write at the same time as all else (0)
 *    verbose=0|1            tell what is done (0)
 *
 * I/O may fail; then operations must fail, and leave all as it was.
 */

#include <config.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crash/judge.h"
#include "crash/server.h"
#include "qcow2/bitmap-store.h"
#include "qcow2/format.h"

#define CONNECTIONS 3
#define THREAD_WRITES 40
#define EXTRA_CLUSTERS 256
#define RECOVERIES 16           /* one crash of that many is recovered from */

struct run {
  GRand *rand;
  struct judge judge;
  unsigned operations, tries;
  const char *intent;
  bool verbose;
  unsigned disks, lives, threads;
  guint events, failures, recoveries;

  struct server *server;
  struct connection connections[MODEL_DISKS][CONNECTIONS];
  struct recorder *first[MODEL_DISKS]; /* what the first one begins with */
  struct remains *remains[MODEL_DISKS];
};

static unsigned
below (struct run *run, unsigned n)
{
  return g_rand_int_range (run->rand, 0, n);
}

static void
fail (const char *what)
{
  must (-1, NULL, what);
}

/* Operations. */

static void
write_somewhere (struct connection *c, GRand *rand)
{
  const uint64_t size = c->disk->server->size;
  const uint64_t hot = g_rand_boolean (rand) ? MIN (size, 3 << 20) : size;
  uint64_t offset = g_rand_double (rand) * hot;
  uint64_t count = g_rand_int_range (rand, 1, 100000);

  offset = MIN (offset, size - 1);
  if (g_rand_int_range (rand, 0, 12) == 0) {
    offset /= 2;
    count = g_rand_double (rand) * size;
  }
  server_write (c, offset, CLAMP (count, 1, size - offset));
}

static void
store (struct run *run, struct disk *d, bool last)
{
  server_store (d, last);
  if (last)
    return;
  /* Sooner or later it has to succeed. */
  if (d->server->model->others[d->number]->len > 6) {
    server_fail_never (run->server);
    must (server_store (d, true), NULL, "store");
  }
}

static void
leave_all (struct run *run, struct disk *d)
{
  for (unsigned i = 0; i < CONNECTIONS; ++i)
    server_leave (&run->connections[d->number][i]);
}

static void
operate (struct run *run)
{
  struct disk *d = &run->server->disks[below (run, run->disks)];
  const unsigned i = below (run, CONNECTIONS);

  if (d->inactive && below (run, 3) == 0) {
    server_set_active (d, true);
    return;
  }
  switch (below (run, 16)) {
  case 0 ... 5:
    write_somewhere (&run->connections[d->number][i], run->rand);
    return;
  case 6 ... 7:
    store (run, d, false);
    return;
  case 8:
    leave_all (run, d);
    store (run, d, false);
    return;
  case 9:
    server_leave (&run->connections[d->number][i]);
    store (run, d, below (run, 4) == 0);
    return;
  case 10:
    if (!d->inactive)
      server_set_active (d, false);
    return;
  default:
    server_transaction (run->server);
  }
}

static void
compare (const struct run *run)
{
  for (unsigned i = 0; i < run->disks; ++i)
    model_compare (run->server->model, i, run->server->disks[i].node,
                   run->server->disks[i].inactive);
}

/* Threads that write while all else goes on. */

struct writer {
  GThread *thread;
  struct connection connection;
  guint32 seed;
  atomic_uint *running;
};

static gpointer
write_much (gpointer opaque)
{
  struct writer *w = opaque;
  GRand *rand = g_rand_new_with_seed (w->seed);

  for (unsigned i = 0; i < THREAD_WRITES; ++i)
    write_somewhere (&w->connection, rand);
  g_rand_free (rand);
  atomic_fetch_sub (w->running, 1);
  return NULL;
}

static void
operate_meanwhile (struct run *run)
{
  struct disk *d = &run->server->disks[below (run, run->disks)];

  if (below (run, 4) == 0)
    server_fail_soon (run->server);
  if (below (run, 3))
    store (run, d, false);
  else
    server_transaction (run->server);
  server_fail_never (run->server);
}

static void
operate_with_threads (struct run *run)
{
  g_autofree struct writer *writers = g_new0 (struct writer, run->threads);
  atomic_uint running = run->threads;

  server_fail_never (run->server);
  for (unsigned i = 0; i < run->disks; ++i)
    if (run->server->disks[i].inactive)
      must (server_set_active (&run->server->disks[i], true), NULL,
            "activate");
  run->server->threads = true;
  for (unsigned i = 0; i < run->threads; ++i) {
    struct writer *w = &writers[i];

    w->connection.disk = &run->server->disks[i % run->disks];
    w->seed = g_rand_int (run->rand);
    w->running = &running;
    w->thread = g_thread_new ("writer", write_much, w);
  }
  while (atomic_load (&running) > 0)
    operate_meanwhile (run);
  for (unsigned i = 0; i < run->threads; ++i) {
    g_thread_join (writers[i].thread);
    server_leave (&writers[i].connection);
  }
  run->server->threads = false;
}

/* Judging. */

/* A container that is there already. */
struct container {
  struct dirty_container container;
  const struct qcow2_io *io;
};

static const struct qcow2_io *
container_open (struct dirty_container *container, uint64_t size,
                bool writable, GError **error)
{
  return ((struct container *) container)->io;
}

static void
container_close (struct dirty_container *container)
{
}

static void
container_init (struct container *c, const struct qcow2_io *io)
{
  *c = (struct container) {
    .container = {
      .name = "container",
      .open = container_open,
      .close = container_close,
    },
    .io = io,
  };
}

/* Does the container look as if nobody used it?  Inconsistent bitmaps stay
 * as they are.
 */
static void
check_unused (struct qcow2_image *image, const struct qcow2_io *io,
              const struct dirty_node *node)
{
  GError *error = NULL;
  struct qcow2_bitmap_store *store = qcow2_bitmap_store_open (image, io,
                                                              &error);
  const GPtrArray *list;

  must (0, error, "bitmaps");
  list = qcow2_bitmap_store_list (store);
  for (guint i = 0; i < list->len; ++i) {
    const struct qcow2_bitmap *bitmap = g_ptr_array_index (list, i);
    const struct dirty_bitmap *found =
      dirty_bitmap_find (node, bitmap->name, NULL);

    if (!found)
      fail ("there still is an intent");
    if (bitmap->flags & QCOW2_BITMAP_IN_USE && !found->inconsistent)
      fail ("a bitmap still is in use");
  }
  qcow2_bitmap_store_close (store);
}

/* Clusters behind the end that have a refcount are leaks as well: a crash
 * has made the container smaller.
 */
static uint64_t
count_leaks (struct remains *remains)
{
  const uint64_t size = remains->size;
  struct qcow2_image *image;
  uint64_t leaks;

  image = qcow2_image_open (&remains->io, NULL);
  remains->size = size / image->cluster_size * image->cluster_size +
    EXTRA_CLUSTERS * (uint64_t) image->cluster_size;
  leaks = judge_whole (image, &remains->io);
  remains->size = size;
  qcow2_image_close (image);
  return leaks;
}

/* Another server makes use of what a crash has left, and ends in order. */
static void
recover (struct run *run, struct remains *remains)
{
  const uint64_t leaks = count_leaks (remains);
  struct recorder *recorder = recorder_new (remains->data, remains->size);
  struct dirty_node *node = dirty_node_of_export ("recovered");
  struct container container;
  struct dirty_persist *persist;
  struct qcow2_image *image;
  GError *error = NULL;

  container_init (&container, recorder_io (recorder));
  persist = server_open (node, &container.container, true,
                         below (run, 4) > 0, run->server->size);
  dirty_gate_enter (&node->gates[DIRTY_GATE_PERSIST]);
  dirty_node_mark (node, 0, 5000);
  dirty_persist_add_writer (persist);
  must (dirty_persist_begin_write (persist, 0, 5000, &error), error,
        "write after a crash");
  dirty_gate_leave (&node->gates[DIRTY_GATE_PERSIST]);
  must (dirty_persist_store (persist, false, &error), error, "store");
  dirty_persist_remove_writer (persist);
  must (dirty_persist_store (persist, below (run, 2), &error), error,
        "close");
  image = qcow2_image_open (recorder_io (recorder), &error);
  must (0, error, "open after recovery");
  if (judge_whole (image, recorder_io (recorder)) > leaks)
    fail ("there are more leaks than before");
  check_unused (image, recorder_io (recorder), node);
  qcow2_image_close (image);
  dirty_persist_free (persist);
  recorder_free (recorder);
  run->recoveries++;
}

static void
judge_content (struct run *run, const struct model_moment *moment)
{
  struct container containers[MODEL_DISKS];
  struct dirty_persist *persists[MODEL_DISKS];
  struct dirty_node *nodes[MODEL_DISKS];

  for (unsigned d = 0; d < run->disks; ++d) {
    g_autofree char *name = g_strdup_printf ("judged%u", d);

    nodes[d] = dirty_node_of_export (name);
    container_init (&containers[d], &run->remains[d]->io);
    persists[d] = server_open (nodes[d], &containers[d].container, false,
                               true, run->server->size);
  }
  model_judge (run->server->model, moment, nodes);
  for (unsigned d = 0; d < run->disks; ++d) {
    if (moment->clean[d]) {
      struct qcow2_image *image = qcow2_image_open (&run->remains[d]->io,
                                                    NULL);

      check_unused (image, &run->remains[d]->io, nodes[d]);
      qcow2_image_close (image);
    }
    dirty_persist_free (persists[d]);
  }
}

/* The last event was that of this disk. */
static void
examine (struct run *run, const struct model_moment *moment, unsigned disk)
{
  struct remains *remains = run->remains[disk];
  GError *error = NULL;
  struct qcow2_image *image = qcow2_image_open (&remains->io, &error);

  must (0, error, "open after a crash");
  judge_image (&run->judge, image, remains);
  qcow2_image_close (image);
  judge_content (run, moment);
  if (below (run, RECOVERIES) == 0)
    recover (run, remains);
  dirty_nodes_forget_all ();
}

static void
crash_everywhere (struct run *run)
{
  static const unsigned keeps[] = { 100, 50, 0, 90, 10, 75, 25 };
  const struct server *s = run->server;
  const GArray *moments = s->model->moments;
  guint next = 0, counts[MODEL_DISKS] = { 0 };

  for (guint events = 0; events <= s->timeline->len; ++events) {
    const unsigned disk = events ? s->timeline->data[events - 1] : 0;

    counts[disk] += events > 0;
    while (next + 1 < moments->len &&
           g_array_index (moments, struct model_moment, next + 1).event <=
           events)
      next++;
    for (unsigned i = 0; i <= run->tries; ++i) {
      for (unsigned d = 0; d < run->disks; ++d)
        remains_crash (run->remains[d], counts[d],
                       keeps[(i + d * (i & 1)) % G_N_ELEMENTS (keeps)],
                       run->rand);
      examine (run, &g_array_index (moments, struct model_moment, next),
               disk);
    }
  }
}

/* What the next server begins with: the end, or a crash at any time. */
static void
crash_once (struct run *run, bool ended)
{
  const struct server *s = run->server;
  const guint events = ended ? s->timeline->len :
    below (run, s->timeline->len + 1);
  const unsigned keep = ended ? 100 : below (run, 101);
  guint counts[MODEL_DISKS] = { 0 };

  for (guint i = 0; i < events; ++i)
    counts[s->timeline->data[i]]++;
  for (unsigned d = 0; d < run->disks; ++d) {
    remains_free (run->remains[d]);
    run->remains[d] = remains_new (s->disks[d].recorder);
    remains_crash (run->remains[d], counts[d], keep, run->rand);
  }
}

/* Servers. */

static uint64_t
count_all_leaks (const struct run *run)
{
  uint64_t leaks = 0;

  for (unsigned d = 0; d < run->disks; ++d)
    leaks += count_leaks (run->remains[d]);
  return leaks;
}

/* Returns whether it ended in order. */
static bool
live (struct run *run)
{
  struct server *s = run->server;

  if (below (run, 6) == 0)
    server_fail_soon (s);
  server_load (s);
  compare (run);
  for (unsigned i = 0; i < run->operations; ++i) {
    if (i == run->operations / 2 && run->threads)
      operate_with_threads (run);
    if (below (run, 4) == 0)
      server_fail_soon (s);
    else if (below (run, 4))
      server_fail_never (s);
    operate (run);
    compare (run);
  }
  server_fail_never (s);
  if (below (run, 2))
    return false;
  for (unsigned i = 0; i < run->disks; ++i)
    must (server_store (&s->disks[i], true), NULL, "close");
  compare (run);
  return true;
}

static void
start (struct run *run)
{
  const bool intent = strcmp (run->intent, "on") == 0 ||
    (strcmp (run->intent, "mixed") == 0 && below (run, 2));

  run->server = server_new (run->rand, run->disks, run->remains, intent);
  run->server->verbose = run->verbose;
  memset (run->connections, 0, sizeof run->connections);
  for (unsigned d = 0; d < run->disks; ++d)
    for (unsigned i = 0; i < CONNECTIONS; ++i)
      run->connections[d][i].disk = &run->server->disks[d];
}

static void
live_and_die (struct run *run)
{
  const uint64_t leaks = count_all_leaks (run);
  struct server *before = run->server;
  bool ended;

  start (run);
  for (unsigned d = 0; d < run->disks; ++d) {
    remains_free (run->remains[d]);
    run->remains[d] = remains_new (run->server->disks[d].recorder);
  }
  if (before)
    server_free (before);
  ended = live (run);
  server_stop (run->server);
  run->events += run->server->timeline->len;
  run->failures += run->server->failures;
  crash_everywhere (run);
  crash_once (run, ended);
  if (ended && run->server->failures == 0 && count_all_leaks (run) > leaks)
    fail ("there are leaks without a failure");
}

static void
parse_option (struct run *run, const char *option)
{
  const char *value = strchr (option, '=');

  if (!value)
    fail (option);
  value++;
  if (g_str_has_prefix (option, "intent="))
    run->intent = value;
  else if (g_str_has_prefix (option, "disks="))
    run->disks = CLAMP (number (value), 1, MODEL_DISKS);
  else if (g_str_has_prefix (option, "lives="))
    run->lives = number (value);
  else if (g_str_has_prefix (option, "verbose="))
    run->verbose = number (value);
  else if (g_str_has_prefix (option, "threads="))
    run->threads = number (value);
  else
    fail (option);
}

/* The first server begins with the image. */
static void
read_image (struct run *run, const char *path)
{
  GError *error = NULL;
  char *bytes;
  gsize size;

  g_file_get_contents (path, &bytes, &size, &error);
  must (0, error, path);
  for (unsigned d = 0; d < run->disks; ++d) {
    run->first[d] = recorder_new (bytes, size);
    run->remains[d] = remains_new (run->first[d]);
  }
  g_free (bytes);
}

static void
free_run (struct run *run)
{
  for (unsigned d = 0; d < run->disks; ++d) {
    remains_free (run->remains[d]);
    recorder_free (run->first[d]);
  }
  if (run->server)
    server_free (run->server);
  g_rand_free (run->rand);
}

int
main (int argc, char *argv[])
{
  struct run run = { .intent = "on", .disks = 1, .lives = 4 };

  if (argc < 7) {
    fprintf (stderr, "usage: crash-persist IMAGE SEED OPERATIONS TRIES "
             "DIRECTORY EVERY [OPTION...]\n");
    return 2;
  }
  for (int i = 7; i < argc; ++i)
    parse_option (&run, argv[i]);
  must (dirty_nodes_config ("exports", "each", NULL) - 1, NULL, "exports");
  run.rand = g_rand_new_with_seed (number (argv[2]));
  run.operations = number (argv[3]);
  run.tries = number (argv[4]);
  run.judge.directory = argv[5];
  run.judge.every = number (argv[6]);
  read_image (&run, argv[1]);
  for (unsigned i = 0; i < run.lives; ++i)
    live_and_die (&run);
  printf ("%u events, %u failures, %u recoveries, %u crashes\n", run.events,
          run.failures, run.recoveries, run.judge.crashes);
  free_run (&run);
  return 0;
}
