/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "control/commands.h"
#include "control/control.h"
#include "control/server.h"
#include "dirty/node.h"

static char *path;

/* Filters which are ready, and which are so after the fork. */
static unsigned ready, running;

int
control_config (const char *key, const char *value, GError **error)
{
  if (strcmp (key, "qmp") != 0)
    return 0;
  if (!*value)
    return dirty_fail (error, EINVAL, "qmp: the name of the socket is "
                       "missing");
  if (path)
    return dirty_fail (error, EINVAL, "qmp: the parameter was given twice");
  /* nbdkit changes to another directory later. */
  path = g_canonicalize_filename (value, NULL);
  return 1;
}

int
control_get_ready (GError **error)
{
  if (!path)
    return 0;
  control_register_node_commands ();
  ready++;
  return control_server_listen (path, error);
}

int
control_after_fork (GError **error)
{
  if (!path || ++running < ready)
    return 0;
  return control_server_start (error);
}

void
control_cleanup (void)
{
  if (path)
    control_server_stop ();
  g_clear_pointer (&path, g_free);
}
