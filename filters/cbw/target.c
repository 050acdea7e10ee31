/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "dirty/node.h"

#include "helpers.h"
#include "target.h"

/* Threads for what may take long and nobody waits for. */
#define LATER_THREADS 16

/* How long the end of the server may be delayed by targets. */
#define RETIRE_SECONDS 3

/* Targets that are being retired. */
static GMutex retiring_lock;
static GCond retiring_changed;
static unsigned retiring;

static const char *start_directory;

void
target_set_directory (const char *directory)
{
  start_directory = directory;
}

char *
target_complete_name (const char *name)
{
  return target_is_uri (name) ? g_strdup (name) :
    g_canonicalize_filename (name, start_directory);
}

static struct helpers *
later (void)
{
  static gsize helpers;

  if (g_once_init_enter (&helpers))
    g_once_init_leave (&helpers, (gsize) helpers_new (LATER_THREADS));
  return (struct helpers *) helpers;
}

bool
target_is_uri (const char *name)
{
  const char *end = strstr (name, "://");

  for (const char *p = name; end && p < end; ++p)
    if (!g_ascii_isalnum (*p) && !strchr ("+-.", *p))
      return false;
  return end && end > name;
}

struct target *
target_open (const char *name, uint64_t size, GError **error)
{
  struct target *target;

  if (!name)
    target = target_open_temporary (size, error);
  else
    target = target_is_uri (name) ? target_open_nbd (name, size, error) :
      target_open_file (name, size, error);
  if (target)
    target->used = size;
  return target;
}

int
target_check_size (const struct target *target, uint64_t size,
                   GError **error)
{
  if (target->size >= size)
    return 0;
  return dirty_fail (error, EINVAL, "target %s has %" PRIu64 " bytes, but the "
                     "disk has %" PRIu64 ": make it at least as large",
                     target->name, target->size, size);
}

struct target *
target_ref (struct target *target)
{
  refs_inc (&target->refs);
  return target;
}

void
target_unref (struct target *target)
{
  if (target && refs_dec (&target->refs))
    target->ops->free (target);
}

void
target_write (struct target *target, const void *buf, uint32_t count,
              uint64_t offset, bool direct, target_done done,
              gpointer opaque)
{
  target->ops->write (target, buf, count, offset, direct, done, opaque);
}

int
target_read (struct target *target, void *buf, uint32_t count,
             uint64_t offset)
{
  return target->ops->read (target, buf, count, offset);
}

void
target_discard (struct target *target, uint64_t offset, uint64_t count)
{
  target->ops->discard (target, offset, count);
}

/* What another thread shall do. */
struct errand {
  struct target *target;
  uint64_t offset, count;
  bool hangs;
  target_done done;
  gpointer opaque;
};

static void
discard_now (gpointer opaque)
{
  struct errand *errand = opaque;

  target_discard (errand->target, errand->offset, errand->count);
  target_unref (errand->target);
  g_free (errand);
}

void
target_discard_later (struct target *target, uint64_t offset, uint64_t count)
{
  struct errand *errand = g_new0 (struct errand, 1);

  errand->target = target_ref (target);
  errand->offset = offset;
  errand->count = count;
  helpers_run (later (), discard_now, errand);
}

static void
retire_now (gpointer opaque)
{
  struct errand *errand = opaque;

  if (!errand->hangs)
    errand->target->ops->purge (errand->target);
  /* Others may still be waiting for it. */
  errand->target->ops->cancel (errand->target);
  target_unref (errand->target);
  if (errand->done)
    errand->done (errand->opaque, 0);
  g_free (errand);
  g_mutex_lock (&retiring_lock);
  retiring--;
  g_cond_broadcast (&retiring_changed);
  g_mutex_unlock (&retiring_lock);
}

void
target_retire (struct target *target, bool hangs, target_done done,
               gpointer opaque)
{
  struct errand *errand = g_new0 (struct errand, 1);

  errand->target = target;
  errand->hangs = hangs;
  errand->done = done;
  errand->opaque = opaque;
  if (hangs)
    target->ops->cancel (target);
  g_mutex_lock (&retiring_lock);
  retiring++;
  g_mutex_unlock (&retiring_lock);
  helpers_run (later (), retire_now, errand);
}

void
target_drop (struct target *target)
{
  target->ops->cancel (target);
  target_unref (target);
}

void
target_wait_for_retired (void)
{
  const gint64 limit = g_get_monotonic_time () +
    RETIRE_SECONDS * G_USEC_PER_SEC;

  g_mutex_lock (&retiring_lock);
  while (retiring > 0 &&
         g_cond_wait_until (&retiring_changed, &retiring_lock, limit))
    ;
  g_mutex_unlock (&retiring_lock);
}
