/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <string.h>

#include "qcow2/error.h"
#include "qcow2/test-memory.h"

static int
memory_pread (const struct qcow2_io *io, void *buf, size_t count,
              uint64_t offset, GError **error)
{
  struct memory *m = (struct memory *) io;

  g_assert_cmpuint (offset + count, <=, m->size);
  memcpy (buf, m->data + offset, count);
  m->reads++;
  return 0;
}

static uint64_t
memory_get_size (const struct qcow2_io *io)
{
  return ((const struct memory *) io)->size;
}

void
memory_put32 (struct memory *m, uint64_t offset, uint32_t value)
{
  value = GUINT32_TO_BE (value);
  memcpy (m->data + offset, &value, sizeof value);
}

void
memory_put64 (struct memory *m, uint64_t offset, uint64_t value)
{
  value = GUINT64_TO_BE (value);
  memcpy (m->data + offset, &value, sizeof value);
}

struct memory *
memory_new (void)
{
  struct memory *m = g_new0 (struct memory, 1);

  m->io.pread = memory_pread;
  m->io.get_size = memory_get_size;
  m->size = sizeof m->data;
  memory_put32 (m, 0, 0x514649fb);
  memory_put32 (m, 4, 3);       /* version */
  memory_put32 (m, 20, 9);      /* cluster_bits */
  memory_put64 (m, 24, MEMORY_DISK);
  memory_put32 (m, 36, 8);      /* l1_size */
  memory_put64 (m, 40, MEMORY_L1);
  memory_put64 (m, 48, 1024);   /* refcount_table_offset */
  memory_put32 (m, 56, 1);      /* refcount_table_clusters */
  memory_put32 (m, 96, 4);      /* refcount_order */
  memory_put32 (m, 100, 104);   /* header_length */
  return m;
}
