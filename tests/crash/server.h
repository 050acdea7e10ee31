/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A server: disks, each with bitmaps that are kept in a container, which
 * is a recorder.
 */

#ifndef SERVER_H
#define SERVER_H

#include <stdatomic.h>
#include <stdbool.h>

#include <glib.h>

#include "crash/model.h"
#include "crash/recorder.h"
#include "dirty/persist.h"

struct server;

struct disk {
  struct qcow2_io io;
  struct dirty_container container;
  struct server *server;
  unsigned number;
  struct recorder *recorder;
  struct dirty_node *node;
  struct dirty_persist *persist;
  atomic_uint writers;
  bool inactive;
};

/* One to a disk, which has written, or not. */
struct connection {
  struct disk *disk;
  bool wrote;
};

struct server {
  GRand *rand;                  /* for the one thread that has operations */
  uint64_t size;                /* of each disk */
  bool verbose;                 /* tell what is done, on stderr */
  bool threads;                 /* others are writing */
  struct disk disks[MODEL_DISKS];
  struct model *model;

  /* Protects the rest, and the model; innermost. */
  GMutex lock;
  GRand *io_rand;
  GByteArray *timeline;         /* the disk of each event */
  guint changes_left, reads_left; /* calls until they fail; UINT_MAX: never */
  bool once;                    /* only one call fails */
  guint failures;               /* so far */
};

/* A server that begins with the bytes that a crash of another has left. */
extern struct server *server_new (GRand *rand, unsigned disks,
                                  struct remains *const *bytes, bool intent);

/* It ends without any order. */
extern void server_stop (struct server *server);

extern void server_free (struct server *server);

/* Let I/O fail soon, or not. */
extern void server_fail_soon (struct server *server);
extern void server_fail_never (struct server *server);

/* Operations.  Those that return -1 have failed because of I/O; if one
 * fails without, or does not do what it must, the program ends.
 */
extern void server_load (struct server *server);
extern void server_write (struct connection *connection, uint64_t offset,
                          uint64_t count);
extern void server_leave (struct connection *connection);
extern int server_store (struct disk *disk, bool last);
extern int server_set_active (struct disk *disk, bool active);

/* A few actions at once. */
extern int server_transaction (struct server *server);

extern void server_tell (const struct server *server, const char *fs, ...)
  G_GNUC_PRINTF (2, 3);

/* Another server, of one disk of that size. */
extern struct dirty_persist *
server_open (struct dirty_node *node, struct dirty_container *container,
             bool writable, bool intent, uint64_t size);

#endif /* SERVER_H */
