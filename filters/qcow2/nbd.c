/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* An NBD server as a source.
 *
 * One connection, with as many requests in flight as there are threads
 * that want something.  A thread of ours waits for the socket and lets
 * libnbd make progress; requests are issued by the threads that want
 * them, which then sleep until libnbd's completion callback wakes them.
 *
 * If the connection breaks, requests fail from then on.  The disk is
 * opened afresh, and with it this connection, when the last client has
 * gone and another comes.
 */

#include <config.h>

#include "qcow2/error.h"

#include "source.h"

#ifdef HAVE_LIBNBD

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <libnbd.h>

#include "../nbd-events.h"

#define CONTEXT LIBNBD_CONTEXT_BASE_ALLOCATION

/* Bytes that one request for extents covers. */
#define EXTENTS_STEP (UINT64_C (1) << 30)

struct nbd {
  struct source source;
  struct limits limits;
  struct nbd_handle *h;
  GThread *thread;
  int wakeup;                   /* eventfd: requests were queued, or stop */
  GMutex lock;                  /* for the results of requests */
  atomic_bool stop;
};

/* A request that a thread waits for.  It is that thread's, and gone as
 * soon as the thread sees that it is done; so the lock is not in it.
 */
struct request {
  GMutex *lock;
  GCond cond;
  bool done;
  int error;                    /* errno value */
  GArray *extents;              /* of uint32_t: pairs of length and flags */
};

static struct nbd *
nbd_of_io (const struct qcow2_io *io)
{
  return (struct nbd *) source_of_io (io);
}

static int
fail_libnbd (GError **error, const char *uri)
{
  return qcow2_fail (error, nbd_get_errno () ? nbd_get_errno () : EIO,
                     "%s: %s", uri, nbd_get_error ());
}

/* The thread. */

static void *
progress (void *opaque)
{
  struct nbd *nbd = opaque;

  while (!atomic_load (&nbd->stop))
    nbd_events_wait (nbd->h, nbd->wakeup);
  return NULL;
}

/* Requests. */

static void
request_init (struct request *rq, struct nbd *nbd)
{
  memset (rq, 0, sizeof *rq);
  rq->lock = &nbd->lock;
  g_cond_init (&rq->cond);
}

static void
request_clear (struct request *rq)
{
  g_cond_clear (&rq->cond);
  if (rq->extents)
    g_array_unref (rq->extents);
}

static int
completed (void *opaque, int *err)
{
  struct request *rq = opaque;

  g_mutex_lock (rq->lock);
  rq->done = true;
  rq->error = *err;
  g_cond_signal (&rq->cond);
  g_mutex_unlock (rq->lock);
  return 0;                     /* see nbd-events.h */
}

/* Wait for a request that was issued with this cookie, and retire it. */
static int
request_wait (struct nbd *nbd, struct request *rq, int64_t cookie,
              const char *what, uint64_t offset, GError **error)
{
  if (cookie == -1)
    return fail_libnbd (error, nbd->source.name);
  nbd_events_wake (nbd->wakeup);
  g_mutex_lock (rq->lock);
  while (!rq->done)
    g_cond_wait (&rq->cond, rq->lock);
  g_mutex_unlock (rq->lock);
  if (nbd_aio_command_completed (nbd->h, cookie) == -1 && !rq->error)
    rq->error = EIO;
  if (rq->error)
    return qcow2_fail (error, rq->error, "%s: %s at offset %" PRIu64 ": %s",
                       nbd->source.name, what, offset,
                       g_strerror (rq->error));
  return 0;
}

static int
read_piece (struct source *source, void *buf, uint32_t count,
            uint64_t offset, GError **error)
{
  struct nbd *nbd = (struct nbd *) source;
  struct request rq;
  int64_t cookie;
  int r;

  request_init (&rq, nbd);
  cookie = nbd_aio_pread (nbd->h, buf, count, offset,
                          (nbd_completion_callback) { .callback = completed,
                                                      .user_data = &rq }, 0);
  r = request_wait (nbd, &rq, cookie, "reading", offset, error);
  request_clear (&rq);
  return r;
}

static int
source_pread (const struct qcow2_io *io, void *buf, size_t count,
              uint64_t offset, GError **error)
{
  struct nbd *nbd = nbd_of_io (io);

  return limits_pread (&nbd->limits, read_piece, &nbd->source,
                       buf, count, offset, error);
}

static uint64_t
source_get_size (const struct qcow2_io *io)
{
  return nbd_of_io (io)->limits.size;
}

/* Block status. */

static int
got_extents (void *opaque, const char *context, uint64_t offset,
             uint32_t *entries, size_t count, int *err)
{
  struct request *rq = opaque;

  if (strcmp (context, CONTEXT) == 0 && rq->extents->len == 0)
    g_array_append_vals (rq->extents, entries, count);
  return 0;
}

static int
ask_extents (struct nbd *nbd, struct request *rq, uint64_t offset,
             uint64_t count, GError **error)
{
  int64_t cookie;

  rq->extents = g_array_new (FALSE, FALSE, sizeof (uint32_t));
  cookie = nbd_aio_block_status (nbd->h, count, offset,
                                 (nbd_extent_callback)
                                 { .callback = got_extents,
                                   .user_data = rq },
                                 (nbd_completion_callback)
                                 { .callback = completed,
                                   .user_data = rq }, 0);
  return request_wait (nbd, rq, cookie, "block status", offset, error);
}

/* Pass on the part of the answer that lies in [*pos, end). */
static int
pass_extents (const struct request *rq, uint64_t start, uint64_t *pos,
              uint64_t end, source_add_extent add, void *opaque,
              GError **error)
{
  int r = 0;

  for (guint i = 0; i + 1 < rq->extents->len && r == 0; i += 2) {
    const uint32_t flags = g_array_index (rq->extents, uint32_t, i + 1);
    uint64_t stop;

    start += g_array_index (rq->extents, uint32_t, i);
    stop = MIN (start, end);
    if (stop > *pos) {
      r = add (opaque, *pos, stop - *pos,
               flags & (NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO), error);
      *pos = stop;
    }
  }
  return r;
}

static int
source_extents (struct source *source, uint64_t offset, uint64_t count,
                source_add_extent add, void *opaque, GError **error)
{
  struct nbd *nbd = (struct nbd *) source;
  const uint64_t end = offset + count;
  uint64_t pos = offset;
  int r = 0;

  while (pos < end && r == 0) {
    const uint64_t before = pos;
    uint64_t start = pos, stop = MIN (end, pos + EXTENTS_STEP);
    struct request rq;

    limits_align (&nbd->limits, &start, &stop);
    request_init (&rq, nbd);
    r = ask_extents (nbd, &rq, start, stop - start, error);
    if (r == 0)
      r = pass_extents (&rq, start, &pos, end, add, opaque, error);
    request_clear (&rq);
    if (r == 0 && pos == before)
      return qcow2_fail (error, EIO, "%s: the server's block status at "
                         "offset %" PRIu64 " is empty", source->name, pos);
  }
  return r;
}

/* Opening and closing. */

static void
nbd_free (struct nbd *nbd)
{
  if (nbd->thread) {
    atomic_store (&nbd->stop, true);
    nbd_events_wake (nbd->wakeup);
    g_thread_join (nbd->thread);
  }
  nbd_close (nbd->h);
  if (nbd->wakeup != -1)
    close (nbd->wakeup);
  g_mutex_clear (&nbd->lock);
  g_free (nbd->source.name);
  g_free (nbd);
}

static void
source_free (struct source *source)
{
  nbd_free ((struct nbd *) source);
}

static int
connect_uri (struct nbd *nbd, const char *uri, GError **error)
{
  int64_t size, minimum, maximum;

  nbd->h = nbd_create ();
  if (!nbd->h ||
      nbd_add_meta_context (nbd->h, CONTEXT) == -1 ||
      nbd_connect_uri (nbd->h, uri) == -1)
    return fail_libnbd (error, uri);
  size = nbd_get_size (nbd->h);
  minimum = nbd_get_block_size (nbd->h, LIBNBD_SIZE_MINIMUM);
  maximum = nbd_get_block_size (nbd->h, LIBNBD_SIZE_MAXIMUM);
  if (size == -1 || minimum == -1 || maximum == -1)
    return fail_libnbd (error, uri);
  limits_init (&nbd->limits, size, minimum, MIN (maximum, UINT32_MAX));
  return 0;
}

struct source *
nbd_open (const char *uri, GError **error)
{
  struct nbd *nbd = g_new0 (struct nbd, 1);

  nbd->source.name = g_strdup (uri);
  g_mutex_init (&nbd->lock);
  nbd->wakeup = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (nbd->wakeup == -1) {
    qcow2_fail (error, errno, "eventfd: %s", g_strerror (errno));
    goto error;
  }
  if (connect_uri (nbd, uri, error) == -1)
    goto error;

  nbd->source.io.pread = source_pread;
  nbd->source.io.get_size = source_get_size;
  nbd->source.extents =
    nbd_can_meta_context (nbd->h, CONTEXT) > 0 ? source_extents : NULL;
  nbd->source.close = source_free;
  nbd->thread = g_thread_try_new ("qcow2-nbd", progress, nbd, error);
  if (nbd->thread)
    return &nbd->source;

 error:
  nbd_free (nbd);
  return NULL;
}

#else /* !HAVE_LIBNBD */

struct source *
nbd_open (const char *uri, GError **error)
{
  qcow2_fail (error, ENOTSUP, "%s: this build has no support for NBD servers "
              "(libnbd)", uri);
  return NULL;
}

#endif
