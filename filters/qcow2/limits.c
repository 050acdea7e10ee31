/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "qcow2/error.h"

#include "source.h"

/* nbdkit's own limit for one request is 64 MiB, that of many NBD servers
 * is 32 MiB.
 */
#define MAX_REQUEST (UINT32_C (32) << 20)

void
limits_init (struct limits *limits, uint64_t size, uint32_t minimum,
             uint32_t maximum)
{
  limits->size = size;
  limits->minimum = MAX (minimum, 1);
  limits->maximum = maximum ? MIN (maximum, MAX_REQUEST) : MAX_REQUEST;
  limits->maximum = MAX (limits->maximum & ~(limits->minimum - 1),
                         limits->minimum);
}

void
limits_align (const struct limits *limits, uint64_t *start, uint64_t *end)
{
  const uint64_t mask = limits->minimum - 1;

  *start &= ~mask;
  *end = MIN ((*end + mask) & ~mask, limits->size);
}

static int
read_pieces (const struct limits *limits, limits_read read_fn,
             struct source *source, uint8_t *buf, size_t count,
             uint64_t offset, GError **error)
{
  while (count > 0) {
    const uint32_t n = MIN (count, limits->maximum);

    if (read_fn (source, buf, n, offset, error) == -1)
      return -1;
    buf += n;
    offset += n;
    count -= n;
  }
  return 0;
}

int
limits_pread (const struct limits *limits, limits_read read_fn,
              struct source *source, void *buf, size_t count,
              uint64_t offset, GError **error)
{
  uint64_t start = offset, end = offset + count;
  g_autofree uint8_t *bounce = NULL;

  if (offset > limits->size || count > limits->size - offset)
    return qcow2_fail (error, EIO, "%zu bytes at offset %" PRIu64
                       " lie beyond the end of the container (%" PRIu64
                       " bytes)", count, offset, limits->size);

  limits_align (limits, &start, &end);
  if (start == offset && end == offset + count)
    return read_pieces (limits, read_fn, source, buf, count, offset, error);

  bounce = g_try_malloc (end - start);
  if (!bounce)
    return qcow2_fail (error, ENOMEM, "no memory for a read of %" PRIu64
                       " bytes", end - start);
  if (read_pieces (limits, read_fn, source, bounce, end - start, start,
                   error) == -1)
    return -1;
  memcpy (buf, bounce + (offset - start), count);
  return 0;
}
