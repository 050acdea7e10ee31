/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "qcow2/check.h"
#include "qcow2/error.h"

#include "qcow2-filter.h"

/* How often a check that takes long looks whether the server is to stop,
 * in microseconds.
 */
#define QUIT_INTERVAL 100000

struct progress {
  const char *name;
  char *first;                  /* the first finding, or NULL */
  unsigned tenths;              /* last reported */
  gint64 asked;                 /* when, on the monotonic clock */
};

static void
report (void *opaque, const char *message)
{
  struct progress *p = opaque;

  if (!p->first)
    p->first = g_strdup (message);
  nbdkit_debug ("qcow2-check: %s: %s", p->name, message);
}

static int
progress (void *opaque, unsigned percent)
{
  struct progress *p = opaque;
  const gint64 now = g_get_monotonic_time ();

  if (percent / 10 > p->tenths) {
    p->tenths = percent / 10;
    nbdkit_debug ("qcow2-check: %s: %u%%", p->name, percent);
  }
  if (now - p->asked < QUIT_INTERVAL)
    return 0;
  p->asked = now;
  return nbdkit_nanosleep (0, 1); /* fails if the server is to stop */
}

static int
judge (const struct progress *p, const struct qcow2_check_result *result,
       GError **error)
{
  if (result->corruptions || result->check_errors)
    return qcow2_fail (error, EIO, "%s: qcow2-check=full: the image is "
                       "refused: %" PRIu64 " corruptions, %" PRIu64
                       " clusters that could not be checked, %" PRIu64
                       " leaked clusters; the first: %s; \"qemu-img check "
                       "-r all\" may be able to repair it", p->name,
                       result->corruptions, result->check_errors,
                       result->leaks, p->first);
  /* There is no other way into the log than this. */
  nbdkit_error ("%s: qcow2-check=full: %s: no corruptions, %" PRIu64
                " leaked clusters; %" PRIu64 " of %" PRIu64
                " clusters allocated, %" PRIu64 " fragmented, %" PRIu64
                " compressed; image end offset %" PRIu64, p->name,
                result->leaks ? "usable" : "sound", result->leaks,
                result->allocated_clusters, result->total_clusters,
                result->fragmented_clusters, result->compressed_clusters,
                result->image_end_offset);
  return 0;
}

static int
check_node (const struct node *node, struct source *container,
            GError **error)
{
  struct progress p = {
    .name = container->name,
    .asked = g_get_monotonic_time (),
  };
  const struct qcow2_check_observer observer = {
    .report = report,
    .progress = progress,
    .opaque = &p,
  };
  struct qcow2_check_result result;
  int r;

  nbdkit_debug ("qcow2-check: %s: begins", p.name);
  r = qcow2_check (node->image, &container->io, &observer, &result, error);
  if (r == 0)
    r = judge (&p, &result, error);
  else
    g_prefix_error (error, "%s: qcow2-check=full: ", p.name);
  g_free (p.first);
  return r;
}

int
check_chain (const struct node *top, struct source *source, GError **error)
{
  for (const struct node *node = top; node; node = node->backing)
    if (node->image &&
        check_node (node, chain_container (node, source), error) == -1)
      return -1;
  return 0;
}
