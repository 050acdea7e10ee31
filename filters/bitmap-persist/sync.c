/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A thread that sleeps most of the time.  When the server is told to end
 * it wakes up and stores at once: clients that are idle may keep the
 * server from ending for as long as they like.
 */

#include <config.h>

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "bitmap-persist.h"

#define LONG 3600               /* seconds to sleep if nothing is to be done */

static struct dirty_persist *persist; /* NULL when stopped; under the lock */
static unsigned interval;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

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

/* Returns false when there is nothing more to be done. */
static bool
store (void)
{
  bool again;

  pthread_mutex_lock (&lock);
  again = persist != NULL;
  if (again)
    sync_now (persist, false);
  pthread_mutex_unlock (&lock);
  return again;
}

static void *
run (void *opaque)
{
  bool ending = false;

  dirty_persist_outside ();
  do
    ending = nbdkit_nanosleep (interval ? interval : LONG, 0) == -1;
  while ((ending || interval == 0 || store ()) && !ending);
  if (ending)
    store ();
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
  pthread_attr_t attr;
  pthread_t thread;
  int r;

  persist = p;
  interval = seconds;
  pthread_attr_init (&attr);
  /* Not every way in which a server ends wakes it up. */
  pthread_attr_setdetachstate (&attr, PTHREAD_CREATE_DETACHED);
  r = pthread_create (&thread, &attr, run, NULL);
  pthread_attr_destroy (&attr);
  if (r != 0) {
    nbdkit_error ("bitmap-persist: pthread_create: %s", strerror (r));
    return -1;
  }
  return 0;
}

void
sync_stop (void)
{
  pthread_mutex_lock (&lock);
  persist = NULL;
  pthread_mutex_unlock (&lock);
}
