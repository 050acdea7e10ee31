/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* All I/O is non-blocking, in a GLib main loop of the thread's own.
 *
 * A client can use a bounded amount of memory: one message (see qmp.h),
 * one buffer of input that waits, and replies.  From as many of these as
 * OUTPUT_LIMIT on nothing more is read from it until it has taken them.
 * Between two messages other clients have their turn.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <glib-unix.h>

#include "control/args.h"
#include "control/qmp.h"
#include "control/server.h"
#include "dirty/persist.h"

#define MAX_CLIENTS 16
#define INPUT_SIZE (64 << 10)
#define OUTPUT_LIMIT (1 << 20)

struct client {
  int fd;
  GSource *source;
  struct control_session *session;
  char input[INPUT_SIZE];
  size_t used, length;          /* of the input */
  GString *output;
  size_t sent;                  /* of the output */
  gboolean finished;            /* it will send no more */
};

static int listener = -1;
static struct stat identity;    /* of the socket that we made */
static char *socket_path;
static GMainContext *context;
static GMainLoop *loop;
static GThread *thread;
static GList *clients;

static gboolean serve_client (gint fd, GIOCondition condition, gpointer data);
static gboolean serve_again (gpointer data);

static void
client_free (struct client *client)
{
  clients = g_list_remove (clients, client);
  g_source_destroy (client->source);
  g_source_unref (client->source);
  control_session_free (client->session);
  g_string_free (client->output, TRUE);
  close (client->fd);
  g_free (client);
}

/* What the client waits for.  Takes the source. */
static void
watch (struct client *client, GSource *source, GSourceFunc function)
{
  if (client->source) {
    g_source_destroy (client->source);
    g_source_unref (client->source);
  }
  client->source = source;
  g_source_set_callback (source, function, client, NULL);
  g_source_attach (source, context);
}

static void
watch_socket (struct client *client, GIOCondition condition)
{
  watch (client, g_unix_fd_source_new (client->fd, condition),
         G_SOURCE_FUNC (serve_client));
}

static gboolean
would_block (void)
{
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

/* FALSE if the connection is broken. */
static gboolean
send_output (struct client *client)
{
  GString *output = client->output;

  while (client->sent < output->len) {
    const ssize_t n = send (client->fd, output->str + client->sent,
                            output->len - client->sent, MSG_NOSIGNAL);

    if (n == -1)
      return would_block ();
    client->sent += n;
  }
  g_string_set_size (output, 0);
  client->sent = 0;
  return TRUE;
}

static gboolean
receive_input (struct client *client)
{
  const ssize_t n = recv (client->fd, client->input, INPUT_SIZE, 0);

  if (n == -1)
    return would_block ();
  client->used = 0;
  client->length = n;
  client->finished = n == 0;
  return TRUE;
}

static gboolean
has_input (const struct client *client)
{
  return client->used < client->length;
}

/* What is next: the next message after the other clients had their turn,
 * more of the client's input, that it takes its replies; or FALSE if there
 * is nothing left to be done.
 */
static gboolean
wait_for_client (struct client *client)
{
  const gboolean full = client->output->len >= OUTPUT_LIMIT;
  GIOCondition condition = 0;

  if (client->finished && client->output->len == 0)
    return FALSE;
  if (has_input (client) && !full) {
    watch (client, g_idle_source_new (), serve_again);
    return TRUE;
  }
  if (client->output->len > 0)
    condition |= G_IO_OUT;
  if (!client->finished && !full)
    condition |= G_IO_IN;
  watch_socket (client, condition);
  return TRUE;
}

/* A client can send or be sent something.  One message is answered. */
static gboolean
serve_client (gint fd, GIOCondition condition, gpointer data)
{
  struct client *client = data;
  gboolean alive = !(condition & (G_IO_ERR | G_IO_NVAL));

  if (alive && (condition & (G_IO_IN | G_IO_HUP)) && !has_input (client) &&
      client->output->len < OUTPUT_LIMIT)
    alive = receive_input (client);
  if (alive && has_input (client) && client->output->len < OUTPUT_LIMIT)
    client->used += control_session_feed (client->session,
                                          client->input + client->used,
                                          client->length - client->used,
                                          client->output);
  if (alive)
    alive = send_output (client);
  if (!alive || !wait_for_client (client))
    client_free (client);
  return G_SOURCE_REMOVE;
}

static gboolean
serve_again (gpointer data)
{
  struct client *client = data;

  return serve_client (client->fd, 0, client);
}

static gboolean
accept_client (gint fd, GIOCondition condition, gpointer data)
{
  const int client_fd = accept4 (fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  struct client *client;

  if (client_fd == -1)
    return G_SOURCE_CONTINUE;
  if (g_list_length (clients) >= MAX_CLIENTS) {
    close (client_fd);
    return G_SOURCE_CONTINUE;
  }
  client = g_new0 (struct client, 1);
  client->fd = client_fd;
  client->output = g_string_new (NULL);
  client->session = control_session_new (client->output);
  clients = g_list_prepend (clients, client);
  watch_socket (client, G_IO_IN | G_IO_OUT);
  return G_SOURCE_CONTINUE;
}

static gpointer
run (gpointer data)
{
  GSource *source = g_unix_fd_source_new (listener, G_IO_IN);

  dirty_persist_outside ();
  g_source_set_callback (source, G_SOURCE_FUNC (accept_client), NULL, NULL);
  g_source_attach (source, context);
  g_main_loop_run (loop);
  g_source_destroy (source);
  g_source_unref (source);
  while (clients)
    client_free (clients->data);
  return NULL;
}

/* Connect, to find out if anybody answers.  Returns 0 or an errno. */
static int
try_to_connect (const struct sockaddr_un *address)
{
  const int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int r = 0;

  if (fd == -1 ||
      connect (fd, (const struct sockaddr *) address, sizeof *address) == -1)
    r = errno;
  if (fd != -1)
    close (fd);
  return r;
}

/* Remove a socket that another server has left behind. */
static int
remove_stale (const struct sockaddr_un *address, GError **error)
{
  struct stat st;
  int r;

  if (lstat (address->sun_path, &st) == -1)
    return 0;
  if (!S_ISSOCK (st.st_mode))
    return control_fail (error, "qmp=%s: there is a file of that name, which "
                         "is not a socket", address->sun_path);
  r = try_to_connect (address);
  if (r == 0)
    return control_fail (error, "qmp=%s: another program answers on this "
                         "socket; use another name", address->sun_path);
  if (r == ECONNREFUSED)
    unlink (address->sun_path);
  return 0;                     /* bind says what is wrong */
}

static int
bind_private (int fd, const struct sockaddr_un *address)
{
  const mode_t mask = umask (0177);
  const int r = bind (fd, (const struct sockaddr *) address, sizeof *address);
  const int err = errno;

  umask (mask);
  errno = err;
  return r;
}

int
control_server_listen (const char *path, GError **error)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  int fd;

  if (listener != -1)
    return 0;
  if (strlen (path) >= sizeof address.sun_path)
    return control_fail (error, "qmp=%s: the name of a socket has at most "
                         "%zu bytes", path, sizeof address.sun_path - 1);
  strcpy (address.sun_path, path);
  if (remove_stale (&address, error) == -1)
    return -1;
  fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd == -1 || bind_private (fd, &address) == -1 ||
      listen (fd, MAX_CLIENTS) == -1 || lstat (path, &identity) == -1) {
    control_fail (error, "qmp=%s: %s", path, g_strerror (errno));
    if (fd != -1)
      close (fd);
    return -1;
  }
  listener = fd;
  socket_path = g_strdup (path);
  return 0;
}

int
control_server_start (GError **error)
{
  if (thread)
    return 0;
  context = g_main_context_new ();
  loop = g_main_loop_new (context, FALSE);
  thread = g_thread_try_new ("qmp", run, NULL, error);
  return thread ? 0 : -1;
}

/* In the thread: as the loop may not have begun when it is told to end. */
static gboolean
quit (gpointer data)
{
  g_main_loop_quit (loop);
  return G_SOURCE_REMOVE;
}

static void
stop_thread (void)
{
  GSource *source = g_idle_source_new ();

  g_source_set_priority (source, G_PRIORITY_HIGH);
  g_source_set_callback (source, quit, NULL, NULL);
  g_source_attach (source, context);
  g_source_unref (source);
  g_thread_join (thread);
  thread = NULL;
}

void
control_server_stop (void)
{
  struct stat st;

  if (thread)
    stop_thread ();
  g_clear_pointer (&loop, g_main_loop_unref);
  g_clear_pointer (&context, g_main_context_unref);
  if (listener == -1)
    return;
  close (listener);
  listener = -1;
  if (lstat (socket_path, &st) == 0 && st.st_dev == identity.st_dev &&
      st.st_ino == identity.st_ino)
    unlink (socket_path);
  g_clear_pointer (&socket_path, g_free);
  control_forget_commands ();
}
