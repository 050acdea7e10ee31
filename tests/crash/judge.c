/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "crash/judge.h"
#include "qcow2/check.h"

void
must (int r, const GError *error, const char *what)
{
  if (r == 0 && !error)
    return;
  fprintf (stderr, "%s: %s\n", what, error ? error->message : "failed");
  exit (1);
}

unsigned
number (const char *text)
{
  return g_ascii_strtoull (text, NULL, 10);
}

/* Findings are worth reading if one of them is a corruption. */
static void
report (void *opaque, const char *message)
{
  g_string_append_printf (opaque, "%s\n", message);
}

static int
progress (void *opaque, unsigned percent)
{
  return 0;
}

static void
check (struct qcow2_image *image, const struct qcow2_io *io,
       struct qcow2_check_result *result, GString *findings)
{
  const struct qcow2_check_observer observer = {
    .report = report, .progress = progress, .opaque = findings,
  };
  GError *error = NULL;

  must (qcow2_check (image, io, &observer, result, &error), error, "check");
}

static void
refuse (const struct qcow2_check_result *result, const GString *findings)
{
  if (result->corruptions == 0 && result->check_errors == 0)
    return;
  fprintf (stderr, "%" PRIu64 " corruptions\n%s", result->corruptions,
           findings->str);
  exit (1);
}

static void
write_sample (struct judge *judge, const struct remains *remains,
              const struct qcow2_check_result *result)
{
  g_autofree char *path =
    g_strdup_printf ("%s/%" PRIu64 "-%" PRIu64 "-%u.qcow2",
                     judge->directory, result->corruptions, result->leaks,
                     judge->samples++);
  GError *error = NULL;

  g_file_set_contents (path, (const char *) remains->data, remains->size,
                       &error);
  must (0, error, path);
}

uint64_t
judge_image (struct judge *judge, struct qcow2_image *image,
             const struct remains *remains)
{
  g_autoptr (GString) findings = g_string_new (NULL);
  struct qcow2_check_result result;

  check (image, &remains->io, &result, findings);
  judge->crashes++;
  if ((judge->every && judge->crashes % judge->every == 0) ||
      result.corruptions || result.check_errors)
    write_sample (judge, remains, &result);
  refuse (&result, findings);
  return result.leaks;
}

uint64_t
judge_whole (struct qcow2_image *image, const struct qcow2_io *io)
{
  g_autoptr (GString) findings = g_string_new (NULL);
  struct qcow2_check_result result;

  check (image, io, &result, findings);
  refuse (&result, findings);
  return result.leaks;
}
