/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>

#include "dirty/node.h"
#include "utils/suite.h"

static const char *const names[] = {
  [QF_CBW] = "cbw",
  [QF_DIRTY_TRACKING] = "dirty-tracking",
  [QF_BITMAP_PERSIST] = "bitmap-persist",
  [QF_QCOW2] = "qcow2",
};

static gboolean loaded[G_N_ELEMENTS (names)];
static gboolean present[G_N_ELEMENTS (names)];

void
qf_suite_load (enum qf_filter filter)
{
  loaded[filter] = TRUE;
}

gboolean
qf_suite_is_loaded (enum qf_filter filter)
{
  return loaded[filter];
}

int
qf_suite_add (enum qf_filter filter, GError **error)
{
  for (guint other = 0; other < filter; ++other)
    if (present[other])
      return dirty_fail (error, EINVAL, "wrong order of filters: "
                         "--filter=%s must stand before --filter=%s",
                         names[other], names[filter]);
  present[filter] = TRUE;
  return 0;
}

gboolean
qf_suite_has (enum qf_filter filter)
{
  return present[filter];
}
