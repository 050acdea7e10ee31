/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* NBD servers as targets.
 *
 * A thread of ours lets libnbd make progress, and runs what is to be done
 * when a request is complete: outside of libnbd, which does not allow its
 * callbacks to issue requests.
 *
 * A server that hangs cannot hold us: the thread closes the connection
 * when it is told to, after which libnbd touches no buffer any more, and
 * then all requests that are left fail.
 */

#include <config.h>

#include "dirty/node.h"

#include "patience.h"
#include "target.h"

#ifdef HAVE_LIBNBD

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <libnbd.h>

#include "../nbd-events.h"

/* How long a server may take until it can be used, in seconds, and to free
 * the space of what is no longer wanted.
 */
#define CONNECT_SECONDS 10
#define DISCARD_SECONDS 5

/* If the URI says nothing. */
#define NBD_PORT 10809

/* The most that is asked for at once, in bytes. */
#define MAX_REQUEST (UINT32_C (32) << 20)
#define MAX_DISCARD (UINT32_C (1) << 30)

/* And that is discarded in as many requests at the same time. */
#define MAX_DISCARDS 16

struct request;

struct nbd {
  struct target target;
  int wakeup;                   /* eventfd: something changed */
  uint32_t maximum;             /* bytes in a request */
  bool can_trim;
  atomic_bool stop;             /* close the connection */

  GMutex handle_lock;           /* held to issue requests, and to close */
  struct nbd_handle *h;         /* NULL: closed */

  GMutex list_lock;             /* for the rest; inside libnbd's locks */
  struct request *pending, *complete;
  bool orphan;                  /* nobody has a reference */
};

/* Servers that are targets.  Two snapshots in one would destroy each other,
 * also when one of them is only being deleted.
 */
static GMutex uris_lock;
static GHashTable *uris;        /* of what export_of_uri says */

/* A piece of a request. */
struct request {
  struct request *previous, *next; /* in a list of the target's */
  struct nbd *nbd;
  int64_t cookie;               /* libnbd's name of it */
  int error;
  target_done done;
  gpointer opaque;
};

/* Lists. */

static void
list_add (struct request **list, struct request *rq)
{
  rq->previous = NULL;
  rq->next = *list;
  if (rq->next)
    rq->next->previous = rq;
  *list = rq;
}

static void
list_remove (struct request **list, struct request *rq)
{
  if (rq->previous)
    rq->previous->next = rq->next;
  else
    *list = rq->next;
  if (rq->next)
    rq->next->previous = rq->previous;
}

/* libnbd's callback. */
static int
completed (void *opaque, int *err)
{
  struct request *rq = opaque;
  struct nbd *nbd = rq->nbd;

  g_mutex_lock (&nbd->list_lock);
  rq->error = *err;
  list_remove (&nbd->pending, rq);
  list_add (&nbd->complete, rq);
  g_mutex_unlock (&nbd->list_lock);
  return 0;                     /* see nbd-events.h */
}

/* The thread. */

/* Take what is complete.  Whoever issued a request holds the lock of the
 * handle until its cookie is known.
 */
static struct request *
take_complete (struct nbd *nbd)
{
  struct request *list;

  g_mutex_lock (&nbd->handle_lock);
  g_mutex_lock (&nbd->list_lock);
  list = nbd->complete;
  nbd->complete = NULL;
  g_mutex_unlock (&nbd->list_lock);
  for (struct request *rq = list; rq && nbd->h; rq = rq->next)
    if (nbd_aio_command_completed (nbd->h, rq->cookie) == -1 && !rq->error)
      rq->error = EIO;
  g_mutex_unlock (&nbd->handle_lock);
  return list;
}

static void
run_complete (struct nbd *nbd)
{
  struct request *next;

  for (struct request *rq = take_complete (nbd); rq; rq = next) {
    next = rq->next;
    rq->done (rq->opaque, rq->error);
    g_free (rq);
  }
}

static void
close_handle (struct nbd *nbd)
{
  g_mutex_lock (&nbd->handle_lock);
  g_clear_pointer (&nbd->h, nbd_close);
  g_mutex_unlock (&nbd->handle_lock);
}

/* The handle is closed. */
static void
fail_pending (struct nbd *nbd)
{
  g_mutex_lock (&nbd->list_lock);
  while (nbd->pending) {
    struct request *rq = nbd->pending;

    rq->error = ESHUTDOWN;
    list_remove (&nbd->pending, rq);
    list_add (&nbd->complete, rq);
  }
  g_mutex_unlock (&nbd->list_lock);
}

/* What tells an export of a server from others, whatever else the URI says;
 * or if it is not understood, the URI itself.
 */
static char *
export_of_uri (const char *uri)
{
  g_autoptr (GUri) parsed = g_uri_parse (uri, G_URI_FLAGS_NONE, NULL);
  const char *query = parsed ? g_uri_get_query (parsed) : NULL;
  g_autoptr (GHashTable) parameters = query ?
    g_uri_parse_params (query, -1, "&", G_URI_PARAMS_NONE, NULL) : NULL;
  const char *socket = parameters ?
    g_hash_table_lookup (parameters, "socket") : NULL;
  const char *path = parsed ? g_uri_get_path (parsed) : uri;
  g_autofree char *host = NULL;
  int port;

  if (!parsed)
    return g_strdup (uri);
  while (*path == '/')
    path++;
  if (socket) {
    host = g_canonicalize_filename (socket, NULL);
    return g_strdup_printf ("%s/%s", host, path);
  }
  port = g_uri_get_port (parsed);
  host = g_ascii_strdown (g_uri_get_host (parsed) ?: "", -1);
  return g_strdup_printf ("%s:%d/%s", host, port == -1 ? NBD_PORT : port,
                          path);
}

/* False if it is taken. */
static bool
take_uri (const char *uri)
{
  g_autofree char *export = export_of_uri (uri);
  bool is_new;

  g_mutex_lock (&uris_lock);
  if (!uris)
    uris = g_hash_table_new_full (g_str_hash, g_str_equal, g_free, NULL);
  is_new = !g_hash_table_contains (uris, export);
  if (is_new)
    g_hash_table_add (uris, g_steal_pointer (&export));
  g_mutex_unlock (&uris_lock);
  return is_new;
}

static void
give_uri_back (const char *uri)
{
  g_autofree char *export = export_of_uri (uri);

  g_mutex_lock (&uris_lock);
  g_hash_table_remove (uris, export);
  g_mutex_unlock (&uris_lock);
}

static void
destroy (struct nbd *nbd)
{
  if (nbd->wakeup != -1)
    close (nbd->wakeup);
  g_mutex_clear (&nbd->handle_lock);
  g_mutex_clear (&nbd->list_lock);
  g_free (nbd->target.name);
  g_free (nbd);
}

static bool
is_orphan (struct nbd *nbd)
{
  bool orphan;

  g_mutex_lock (&nbd->list_lock);
  orphan = nbd->orphan;
  g_mutex_unlock (&nbd->list_lock);
  return orphan;
}

static gpointer
progress (gpointer opaque)
{
  struct nbd *nbd = opaque;
  struct pollfd fd = { .fd = nbd->wakeup, .events = POLLIN };
  uint64_t n;

  while (!atomic_load (&nbd->stop)) {
    nbd_events_wait (nbd->h, nbd->wakeup);
    run_complete (nbd);
  }
  close_handle (nbd);
  fail_pending (nbd);
  run_complete (nbd);
  /* It remains for those who still have a reference to a dead target. */
  while (!is_orphan (nbd))
    if (poll (&fd, 1, -1) == 1 && read (nbd->wakeup, &n, sizeof n) == -1)
      continue;
  destroy (nbd);
  return NULL;
}

/* Requests. */

enum kind { WRITE, READ, TRIM };

static int64_t
issue (struct nbd *nbd, struct request *rq, enum kind kind, void *buf,
       uint32_t count, uint64_t offset)
{
  const nbd_completion_callback cb = { .callback = completed,
                                       .user_data = rq };

  switch (kind) {
  case WRITE: return nbd_aio_pwrite (nbd->h, buf, count, offset, cb, 0);
  case READ: return nbd_aio_pread (nbd->h, buf, count, offset, cb, 0);
  default: return nbd_aio_trim (nbd->h, count, offset, cb, 0);
  }
}

/* done is called later, or here if the request cannot be issued. */
static void
request (struct nbd *nbd, enum kind kind, void *buf, uint32_t count,
         uint64_t offset, target_done done, gpointer opaque)
{
  struct request *rq = g_new0 (struct request, 1);
  int64_t cookie = -1;

  rq->nbd = nbd;
  rq->done = done;
  rq->opaque = opaque;
  g_mutex_lock (&nbd->handle_lock);
  if (nbd->h) {
    g_mutex_lock (&nbd->list_lock);
    list_add (&nbd->pending, rq);
    g_mutex_unlock (&nbd->list_lock);
    cookie = rq->cookie = issue (nbd, rq, kind, buf, count, offset);
    if (cookie == -1) {
      g_mutex_lock (&nbd->list_lock);
      list_remove (&nbd->pending, rq);
      g_mutex_unlock (&nbd->list_lock);
    }
  }
  g_mutex_unlock (&nbd->handle_lock);
  if (cookie != -1)
    nbd_events_wake (nbd->wakeup);
  else {
    done (opaque, EIO);
    g_free (rq);
  }
}

/* A request in pieces. */
struct pieces {
  atomic_uint left;             /* one more while they are being issued */
  atomic_int error;
  target_done done;
  gpointer opaque;
};

static void
piece_done (gpointer opaque, int error)
{
  struct pieces *pieces = opaque;

  if (error)
    atomic_store (&pieces->error, error);
  if (atomic_fetch_sub (&pieces->left, 1) == 1) {
    pieces->done (pieces->opaque, atomic_load (&pieces->error));
    g_free (pieces);
  }
}

static void
request_pieces (struct nbd *nbd, enum kind kind, void *buf, uint64_t count,
                uint64_t offset, target_done done, gpointer opaque)
{
  const uint32_t most = kind == TRIM ? MAX_DISCARD & ~(nbd->maximum - 1) :
    nbd->maximum;
  struct pieces *pieces;

  if (count <= most) {
    request (nbd, kind, buf, count, offset, done, opaque);
    return;
  }
  pieces = g_new0 (struct pieces, 1);
  atomic_init (&pieces->left, 1);
  pieces->done = done;
  pieces->opaque = opaque;
  while (count > 0) {
    const uint32_t n = MIN (count, most);

    atomic_fetch_add (&pieces->left, 1);
    request (nbd, kind, buf, n, offset, piece_done, pieces);
    if (buf)
      buf = (uint8_t *) buf + n;
    offset += n;
    count -= n;
  }
  piece_done (pieces, 0);
}

/* Waiting for a request.  It may be given up, so the buffer is its own; it
 * is freed by the last of the two who see that the request is done.
 */
struct wait {
  refs refs;
  GMutex lock;
  GCond cond;
  bool done;
  int error;
  uint8_t buf[];
};

static struct wait *
wait_new (size_t buf_size)
{
  struct wait *w = g_try_malloc (sizeof *w + buf_size);

  if (!w)
    return NULL;
  refs_init (&w->refs, 2);
  g_mutex_init (&w->lock);
  g_cond_init (&w->cond);
  w->done = false;
  w->error = 0;
  return w;
}

static void
wait_unref (struct wait *w)
{
  if (!refs_dec (&w->refs))
    return;
  g_mutex_clear (&w->lock);
  g_cond_clear (&w->cond);
  g_free (w);
}

static void
wait_done (gpointer opaque, int error)
{
  struct wait *w = opaque;

  g_mutex_lock (&w->lock);
  w->done = true;
  w->error = error;
  g_cond_signal (&w->cond);
  g_mutex_unlock (&w->lock);
  wait_unref (w);
}

/* limit as in patience.h. */
static int
wait_until (struct wait *w, gint64 limit)
{
  int error = 0;

  g_mutex_lock (&w->lock);
  while (!w->done && !error)
    error = patience_wait (&w->cond, &w->lock, limit);
  if (w->done)
    error = w->error;
  g_mutex_unlock (&w->lock);
  return error;
}

static void
target_nbd_write (struct target *target, const void *buf, uint32_t count,
                  uint64_t offset, bool direct, target_done done,
                  gpointer opaque)
{
  request_pieces ((struct nbd *) target, WRITE, (void *) buf, count, offset,
                  done, opaque);
}

static int
target_nbd_read (struct target *target, void *buf, uint32_t count,
                 uint64_t offset)
{
  struct wait *w = wait_new (count);
  int error;

  if (!w)
    return ENOMEM;
  request_pieces ((struct nbd *) target, READ, w->buf, count, offset,
                  wait_done, w);
  error = wait_until (w, 0);
  if (!error)
    memcpy (buf, w->buf, count);
  wait_unref (w);
  return error;
}

/* That it fails does no harm: the space stays taken. */
static void
target_nbd_discard (struct target *target, uint64_t offset, uint64_t count)
{
  struct nbd *nbd = (struct nbd *) target;
  const gint64 limit = g_get_monotonic_time () +
    DISCARD_SECONDS * G_USEC_PER_SEC;
  int error = nbd->can_trim ? 0 : ENOTSUP;

  count &= -(uint64_t) target->minimum;
  while (!error && count > 0) {
    const uint64_t n = MIN (count, (uint64_t) MAX_DISCARDS * MAX_DISCARD);
    struct wait *w = wait_new (0);

    if (!w)
      return;
    request_pieces (nbd, TRIM, NULL, n, offset, wait_done, w);
    error = wait_until (w, limit);
    wait_unref (w);
    offset += n;
    count -= n;
  }
}

static void
target_nbd_purge (struct target *target)
{
  const uint64_t mask = target->minimum - 1;

  target_nbd_discard (target, 0, MIN ((target->used + mask) & ~mask,
                                      target->size));
}

static void
target_nbd_cancel (struct target *target)
{
  struct nbd *nbd = (struct nbd *) target;

  atomic_store (&nbd->stop, true);
  nbd_events_wake (nbd->wakeup);
}

/* The thread does it, and only then closes the descriptor. */
static void
target_nbd_free (struct target *target)
{
  struct nbd *nbd = (struct nbd *) target;

  give_uri_back (target->name);
  g_mutex_lock (&nbd->list_lock);
  atomic_store (&nbd->stop, true);
  nbd->orphan = true;
  nbd_events_wake (nbd->wakeup);
  g_mutex_unlock (&nbd->list_lock);
}

static const struct target_ops ops = {
  .write = target_nbd_write,
  .read = target_nbd_read,
  .discard = target_nbd_discard,
  .purge = target_nbd_purge,
  .cancel = target_nbd_cancel,
  .free = target_nbd_free,
};

/* Opening. */

static int
fail_libnbd (GError **error, const char *uri)
{
  const int code = nbd_get_errno ();

  return dirty_fail (error, code ? code : EIO, "target %s: %s", uri,
                     nbd_get_error ());
}

/* nbd_connect_uri waits for ever for a server that says nothing. */
static int
connect_uri (struct nbd *nbd, const char *uri, GError **error)
{
  const gint64 limit = g_get_monotonic_time () +
    CONNECT_SECONDS * G_USEC_PER_SEC;

  nbd->h = nbd_create ();
  if (!nbd->h || nbd_aio_connect_uri (nbd->h, uri) == -1)
    return fail_libnbd (error, uri);
  while (nbd_aio_is_connecting (nbd->h)) {
    if (g_get_monotonic_time () > limit)
      return dirty_fail (error, ETIMEDOUT, "target %s: the server did not "
                         "answer within %d seconds", uri, CONNECT_SECONDS);
    if (patience_is_over ())
      return dirty_fail (error, ESHUTDOWN, "target %s: the server is shutting "
                         "down", uri);
    if (nbd_poll (nbd->h, 250) == -1)
      return fail_libnbd (error, uri);
  }
  return nbd_aio_is_ready (nbd->h) ? 0 : fail_libnbd (error, uri);
}

static int
inspect (struct nbd *nbd, const char *uri, GError **error)
{
  const int64_t size = nbd_get_size (nbd->h);
  const int64_t minimum = nbd_get_block_size (nbd->h, LIBNBD_SIZE_MINIMUM);
  const int64_t preferred = nbd_get_block_size (nbd->h,
                                                LIBNBD_SIZE_PREFERRED);
  const int64_t maximum = nbd_get_block_size (nbd->h, LIBNBD_SIZE_MAXIMUM);
  const int read_only = nbd_is_read_only (nbd->h);
  const int can_trim = nbd_can_trim (nbd->h);

  if (size == -1 || minimum == -1 || preferred == -1 || maximum == -1 ||
      read_only == -1 || can_trim == -1)
    return fail_libnbd (error, uri);
  if (read_only)
    return dirty_fail (error, EROFS, "target %s: the export is read-only",
                       uri);
  nbd->target.minimum = MAX (minimum, 1);
  nbd->target.preferred = MAX (preferred, 1);
  nbd->target.size = size & -(uint64_t) nbd->target.minimum;
  nbd->maximum = maximum ? MIN (maximum, MAX_REQUEST) : MAX_REQUEST;
  nbd->maximum = MAX (nbd->maximum & -nbd->target.minimum,
                      nbd->target.minimum);
  nbd->can_trim = can_trim;
  return 0;
}

struct target *
target_open_nbd (const char *uri, uint64_t size, GError **error)
{
  struct nbd *nbd;
  GThread *thread;

  if (!take_uri (uri)) {
    dirty_fail (error, EBUSY, "target %s is in use by another snapshot, or "
                "one that has just been deleted", uri);
    return NULL;
  }
  nbd = g_new0 (struct nbd, 1);
  nbd->target.ops = &ops;
  refs_init (&nbd->target.refs, 1);
  nbd->target.name = g_strdup (uri);
  g_mutex_init (&nbd->handle_lock);
  g_mutex_init (&nbd->list_lock);
  nbd->wakeup = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (nbd->wakeup == -1) {
    dirty_fail (error, errno, "eventfd: %s", g_strerror (errno));
    goto error;
  }
  if (connect_uri (nbd, uri, error) == -1 ||
      inspect (nbd, uri, error) == -1 ||
      target_check_size (&nbd->target, size, error) == -1)
    goto error;
  thread = g_thread_try_new ("cbw-nbd", progress, nbd, error);
  if (!thread)
    goto error;
  g_thread_unref (thread);
  return &nbd->target;

 error:
  give_uri_back (uri);
  nbd_close (nbd->h);
  nbd->h = NULL;
  destroy (nbd);
  return NULL;
}

#else /* !HAVE_LIBNBD */

#include <errno.h>

struct target *
target_open_nbd (const char *uri, uint64_t size, GError **error)
{
  dirty_fail (error, ENOTSUP, "target %s: this build has no support for NBD "
              "servers (libnbd)", uri);
  return NULL;
}

#endif
