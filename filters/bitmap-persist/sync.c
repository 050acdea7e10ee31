/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A thread that sleeps most of the time.  When the server is told to end
 * it wakes up and stores at once: clients that are idle may keep the
 * server from ending for as long as they like.
 *
 * A server can end without being told to, which nothing wakes it up for; so
 * it looks now and then.
 */

#include <config.h>

#include <stdatomic.h>

#include "bitmap-persist.h"

#define NAP 500                 /* milliseconds of sleep */

static GThread *thread;
static struct dirty_persist *persist;
static unsigned interval;       /* seconds; 0: none */
static atomic_bool stopped;

static void
complain (const GError *error, bool last)
{
  nbdkit_error ("bitmap-persist: bitmaps cannot be stored%s: %s",
                last ? "" : ", which will be tried again", error->message);
}

void
sync_now (struct dirty_persist *p, bool last)
{
  g_autoptr (GError) error = NULL;

  if (dirty_persist_store (p, last, &error) == -1)
    complain (error, last);
}

/* Sleep until it is time.  Returns false if that time never comes. */
static bool
sleep_long (void)
{
  const gint64 end = g_get_monotonic_time () + interval * G_USEC_PER_SEC;

  while (interval == 0 || g_get_monotonic_time () < end)
    if (nbdkit_nanosleep (0, NAP * 1000000) == -1 || atomic_load (&stopped))
      return false;
  return true;
}

static gpointer
run (gpointer opaque)
{
  dirty_persist_outside ();
  while (sleep_long ())
    sync_now (persist, false);
  if (!atomic_load (&stopped))
    sync_now (persist, false);
  return NULL;
}

/* Where that thread can do nothing writers do it. */
void
sync_sometimes (struct dirty_persist *p)
{
  static atomic_llong last;
  const long long now = g_get_monotonic_time ();
  long long before = atomic_load (&last);
  g_autoptr (GError) error = NULL;

  if (interval > 0 && now - before >= interval * G_USEC_PER_SEC &&
      atomic_compare_exchange_strong (&last, &before, now) && before != 0 &&
      dirty_persist_try_store (p, &error) == -1)
    complain (error, false);
}

int
sync_start (struct dirty_persist *p, unsigned seconds)
{
  g_autoptr (GError) error = NULL;

  persist = p;
  interval = seconds;
  thread = g_thread_try_new ("bitmap-sync", run, NULL, &error);
  if (!thread) {
    nbdkit_error ("bitmap-persist: %s", error->message);
    return -1;
  }
  return 0;
}

void
sync_stop (void)
{
  atomic_store (&stopped, true);
  if (thread)
    g_thread_join (thread);
  thread = NULL;
}
