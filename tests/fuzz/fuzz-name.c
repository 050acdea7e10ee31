/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Fuzzing of what an image can say about other files: the input is the
 * name of a backing file or data file.
 *
 * It is taken apart, and then opened with qcow2-backing=dir: and an empty
 * directory, beneath which no name can lead to a file.
 */

#include <config.h>

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "qcow2/error.h"

#include "../../filters/qcow2/reference.h"

#define MAX_NAME 1023

#define require(condition)                                              \
  do {                                                                  \
    if (!(condition)) {                                                 \
      fprintf (stderr, "%s:%d: must be true: %s\n",                     \
               __FILE__, __LINE__, #condition);                         \
      abort ();                                                         \
    }                                                                   \
  } while (0)

extern int LLVMFuzzerTestOneInput (const uint8_t *data, size_t length);

/* What reference.c wants of nbdkit and of its neighbours.  Nothing but
 * the directory is permitted here, so these are not to be reached.
 */

void
nbdkit_error (const char *fs, ...)
{
  abort ();
}

char *
nbdkit_absolute_path (const char *path)
{
  abort ();
}

struct source *
nbd_open (const char *uri, GError **error)
{
  abort ();
}

struct source *
layer_open_export (nbdkit_backend *backend, const char *exportname,
                   GError **error)
{
  abort ();
}

static void
check_error (GError **error)
{
  require (*error != NULL);
  require ((*error)->domain == QCOW2_ERROR);
  require ((*error)->code > 0);
  require (*(*error)->message && g_utf8_validate ((*error)->message, -1,
                                                  NULL));
  for (const char *p = (*error)->message; *p; ++p)
    require ((unsigned char) *p >= ' ');
  g_clear_error (error);
}

static void
take_apart (const char *name)
{
  g_autoptr (GError) error = NULL;
  struct reference ref;

  if (reference_parse (name, &ref, &error) == -1) {
    check_error (&error);
    require (!ref.path && !ref.uri);
  }
  else {
    require (!ref.path != !ref.uri);
    require (!ref.uri || g_str_has_prefix (ref.uri, "nbd"));
  }
  reference_clear (&ref);
}

static char *directory;

static void
remove_directory (void)
{
  rmdir (directory);
}

static void
open_beneath (const char *name, const char *from)
{
  const struct policy policy = {
    .key = "qcow2-backing",
    .is_backing = true,
    .kind = POLICY_DIR,
    .value = directory,
  };
  g_autofree char *path = NULL, *format = NULL;
  g_autoptr (GError) error = NULL;

  require (!reference_open (&policy, "backing file", name, from, NULL,
                            &path, &format, &error));
  check_error (&error);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t length)
{
  char name[MAX_NAME + 1];

  if (!directory) {
    directory = g_dir_make_tmp ("qf.XXXXXX", NULL);
    require (directory != NULL);
    atexit (remove_directory);
  }
  length = MIN (length, MAX_NAME);
  memcpy (name, data, length);
  name[length] = '\0';
  take_apart (name);
  open_beneath (name, NULL);
  open_beneath (name, "a/b.qcow2");
  return 0;
}
