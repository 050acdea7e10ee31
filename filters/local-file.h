/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* What parameters of other filters and of the plugin tell about the layer
 * below: whether it may be a local file, and which.
 */

#ifndef LOCAL_FILE_H
#define LOCAL_FILE_H

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <glib.h>

#include <nbdkit-filter.h>

struct local_file {
  char *path;                   /* the last that was given, or NULL */
  unsigned times;               /* it was given */
  bool other_keys;              /* there are parameters of another kind */
  bool moved;                   /* one of them selects a part of the file */
};

/* In .config, for parameters that are not the filter's.  -1 if there was
 * an error, which was reported.
 */
static inline int
local_file_note (struct local_file *file, const char *key, const char *value)
{
  static const char *const moving[] = {
    "offset", "range", "partition", "tar-entry", "ext2file", NULL
  };

  if (strcmp (key, "file") == 0) {
    free (file->path);
    file->path = nbdkit_absolute_path (value);
    file->times++;
    return file->path ? 0 : -1;
  }
  file->other_keys = true;
  file->moved |= g_strv_contains (moving, key);
  return 0;
}

/* The one file of which all may be served, or NULL. */
static inline const char *
local_file_whole (const struct local_file *file)
{
  return file->times == 1 && !file->moved ? file->path : NULL;
}

static inline void
local_file_clear (struct local_file *file)
{
  g_clear_pointer (&file->path, free);
}

#endif /* LOCAL_FILE_H */
