/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <stdbool.h>

#include "helpers.h"

struct job {
  void (*run) (gpointer opaque);
  gpointer opaque;
};

struct helpers {
  GMutex lock;                  /* for all members */
  GCond changed;                /* a job has come, or closed */
  GQueue jobs;                  /* of struct job */
  unsigned max_threads, threads, idle;
  bool closed;
};

struct helpers *
helpers_new (unsigned max_threads)
{
  struct helpers *helpers = g_new0 (struct helpers, 1);

  g_mutex_init (&helpers->lock);
  g_cond_init (&helpers->changed);
  g_queue_init (&helpers->jobs);
  helpers->max_threads = max_threads;
  return helpers;
}

static void
destroy (struct helpers *helpers)
{
  g_mutex_clear (&helpers->lock);
  g_cond_clear (&helpers->changed);
  g_free (helpers);
}

/* Wait for a job; NULL when there will be no more. */
static struct job *
next_job (struct helpers *helpers)
{
  struct job *job;

  while (!(job = g_queue_pop_head (&helpers->jobs)) && !helpers->closed) {
    helpers->idle++;
    g_cond_wait (&helpers->changed, &helpers->lock);
    helpers->idle--;
  }
  return job;
}

static gpointer
work (gpointer opaque)
{
  struct helpers *helpers = opaque;
  struct job *job;
  bool last;

  g_mutex_lock (&helpers->lock);
  while ((job = next_job (helpers)) != NULL) {
    g_mutex_unlock (&helpers->lock);
    job->run (job->opaque);
    g_free (job);
    g_mutex_lock (&helpers->lock);
  }
  last = --helpers->threads == 0;
  g_mutex_unlock (&helpers->lock);
  if (last)
    destroy (helpers);
  return NULL;
}

/* With the lock held; false if there is no thread at all. */
static bool
have_thread (struct helpers *helpers)
{
  GThread *thread;

  if (helpers->idle <= g_queue_get_length (&helpers->jobs) &&
      helpers->threads < helpers->max_threads) {
    thread = g_thread_try_new ("cbw", work, helpers, NULL);
    if (thread) {
      helpers->threads++;
      g_thread_unref (thread);
    }
  }
  return helpers->threads > 0;
}

void
helpers_run (struct helpers *helpers, void (*run) (gpointer opaque),
             gpointer opaque)
{
  struct job *job;
  bool queued;

  g_mutex_lock (&helpers->lock);
  queued = have_thread (helpers);
  if (queued) {
    job = g_new (struct job, 1);
    job->run = run;
    job->opaque = opaque;
    g_queue_push_tail (&helpers->jobs, job);
    g_cond_signal (&helpers->changed);
  }
  g_mutex_unlock (&helpers->lock);
  if (!queued)
    run (opaque);
}

void
helpers_free (struct helpers *helpers)
{
  bool none;

  g_mutex_lock (&helpers->lock);
  helpers->closed = true;
  none = helpers->threads == 0;
  g_cond_broadcast (&helpers->changed);
  g_mutex_unlock (&helpers->lock);
  if (none)
    destroy (helpers);
}
