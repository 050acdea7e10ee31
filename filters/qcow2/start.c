/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The check at start.
 *
 * A filter cannot read from the layer below before connections are
 * accepted, but an image that is broken should keep the server from
 * starting.  The file plugin's parameter goes past us, so we look at the
 * file ourselves.
 *
 * It need not be what the layer below serves: other plugins use that
 * parameter too, and filters (xz, offset, ...) may change what is in it.
 * A file that begins as a qcow2 image does is taken for one unless a
 * parameter tells that only a part of it is served.  One that does not
 * is an error only if nothing hints at another use.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "qcow2/error.h"

#include "qcow2-filter.h"

/* Enough to recognise a file. */
#define HEAD 512

/* Contents that a filter between the file and us turns into an image. */
static bool
is_wrapped (const uint8_t *head)
{
  static const struct { size_t offset, length; const char *bytes; } magic[] = {
    { 0, 6, "\xfd" "7zXZ\0" },
    { 0, 2, "\x1f\x8b" },       /* gzip */
    { 0, 3, "BZh" },
    { 0, 4, "\x28\xb5\x2f\xfd" }, /* zstd */
    { 0, 4, "LZIP" },
    { 0, 6, "LUKS\xba\xbe" },
    { 257, 5, "ustar" },
  };

  for (size_t i = 0; i < G_N_ELEMENTS (magic); ++i)
    if (memcmp (head + magic[i].offset, magic[i].bytes, magic[i].length) == 0)
      return true;
  return false;
}

static bool
should_check (const struct source *file)
{
  uint8_t head[HEAD] = { 0 };
  const size_t n = MIN (source_size (file), sizeof head);

  if (n && file->io.pread (&file->io, head, n, 0, NULL) == -1)
    return false;               /* the plugin will meet that too */
  return qcow2_header_probe (head, n) ||
    (!config.file.other_keys && !is_wrapped (head));
}

static int
check_snapshot (const struct qcow2_image *image, GError **error)
{
  const struct qcow2_snapshot *sn;
  struct qcow2_view view;

  if (!config.snapshot)
    return 0;
  sn = qcow2_snapshots_find (image->snapshots, config.snapshot);
  if (!sn)
    return qcow2_fail (error, ENOENT, "%s: qcow2-snapshot: the image has no "
                       "snapshot with the name or ID \"%s\"",
                       config.file.path, config.snapshot);
  return qcow2_image_snapshot_view (image, sn, &view, error);
}

static int
check_image (struct source *file, GError **error)
{
  struct node *top = chain_open (file, NULL, error);
  int r = top ? check_snapshot (top->image, error) : -1;

  chain_close (top);
  return r;
}

int
start_check (void)
{
  const char *path = local_file_whole (&config.file);
  g_autoptr (GError) error = NULL;
  struct source *file;
  int r = 0;

  if (!path)
    return 0;
  file = file_open (path, NULL);
  if (!file)
    return 0;                   /* the plugin says what is wrong */
  if (should_check (file))
    r = check_image (file, &error);
  source_close (file);
  if (r == -1)
    nbdkit_error ("%s", error->message);
  return r;
}
