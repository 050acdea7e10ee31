/* SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-qcow2-filters authors
 *
 * Tells ThreadSanitizer about GLib's locks.
 *
 * GLib makes GMutex and GCond of futexes and is not instrumented, so the
 * sanitizer sees neither and would call everything that they protect a
 * race.  These functions are found before GLib's, announce what is done
 * and then do it by GLib's own.  (GRecMutex, GRWLock and GThread are made
 * of pthread's, which the sanitizer knows.)
 */

#include <config.h>

#include <dlfcn.h>
#include <stdlib.h>

#include <sanitizer/tsan_interface.h>

#include <glib.h>

/* The next definition of a function behind this library, of the same
 * type as the function itself.
 */
#define REAL(function) \
  ((__typeof__ (&function)) real (&real_##function, #function))

#define DECLARE_REAL(function) static void *real_##function

DECLARE_REAL (g_cond_wait);
DECLARE_REAL (g_cond_wait_until);
DECLARE_REAL (g_mutex_clear);
DECLARE_REAL (g_mutex_lock);
DECLARE_REAL (g_mutex_trylock);
DECLARE_REAL (g_mutex_unlock);

static void *
real (void **cache, const char *name)
{
  void *function = __atomic_load_n (cache, __ATOMIC_ACQUIRE);

  if (!function) {
    function = dlsym (RTLD_NEXT, name);
    if (!function)
      abort ();
    __atomic_store_n (cache, function, __ATOMIC_RELEASE);
  }
  return function;
}

void
g_mutex_lock (GMutex *mutex)
{
  __tsan_mutex_pre_lock (mutex, 0);
  REAL (g_mutex_lock) (mutex);
  __tsan_mutex_post_lock (mutex, 0, 0);
}

gboolean
g_mutex_trylock (GMutex *mutex)
{
  gboolean locked;

  __tsan_mutex_pre_lock (mutex, __tsan_mutex_try_lock);
  locked = REAL (g_mutex_trylock) (mutex);
  __tsan_mutex_post_lock (mutex,
                          locked ? __tsan_mutex_try_lock
                                 : __tsan_mutex_try_lock_failed, 0);
  return locked;
}

void
g_mutex_unlock (GMutex *mutex)
{
  __tsan_mutex_pre_unlock (mutex, 0);
  REAL (g_mutex_unlock) (mutex);
  __tsan_mutex_post_unlock (mutex, 0);
}

void
g_mutex_clear (GMutex *mutex)
{
  __tsan_mutex_destroy (mutex, 0);
  REAL (g_mutex_clear) (mutex);
}

/* GLib's own unlock and lock in here do not come past this file. */
void
g_cond_wait (GCond *cond, GMutex *mutex)
{
  __tsan_mutex_pre_unlock (mutex, 0);
  __tsan_mutex_post_unlock (mutex, 0);
  REAL (g_cond_wait) (cond, mutex);
  __tsan_mutex_pre_lock (mutex, 0);
  __tsan_mutex_post_lock (mutex, 0, 0);
}

gboolean
g_cond_wait_until (GCond *cond, GMutex *mutex, gint64 end_time)
{
  gboolean signalled;

  __tsan_mutex_pre_unlock (mutex, 0);
  __tsan_mutex_post_unlock (mutex, 0);
  signalled = REAL (g_cond_wait_until) (cond, mutex, end_time);
  __tsan_mutex_pre_lock (mutex, 0);
  __tsan_mutex_post_lock (mutex, 0, 0);
  return signalled;
}
