/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Internal snapshots ("Snapshots"). */

#ifndef QCOW2_SNAPSHOT_H
#define QCOW2_SNAPSHOT_H

#include <stdint.h>

#include <glib.h>

#include "qcow2/header.h"
#include "qcow2/io.h"

struct qcow2_snapshot {
  char *id;                     /* unique in an image made by QEMU */
  char *name;                   /* may be empty, may occur twice */
  uint64_t l1_offset;
  uint32_t l1_entries;
  uint64_t disk_size;           /* in bytes, as it stands */
  uint64_t vm_state_size;       /* in bytes */
  uint32_t date_sec, date_nsec; /* since the epoch */
  uint32_t extra_size;          /* bytes of extra data that it has */
};

/* Read the snapshot table.  The snapshots' L1 tables are not looked at:
 * one that is bad need not keep anyone from reading the others.
 * Strings are as they stand in the image: any bytes but NUL.
 *
 * Returns an array (maybe empty) of struct qcow2_snapshot, and in length
 * the bytes that the table takes; or NULL with error set.  Free with
 * g_ptr_array_unref.
 */
extern GPtrArray *qcow2_snapshots_load (const struct qcow2_header *header,
                                        const struct qcow2_io *io,
                                        uint64_t *length, GError **error);

/* The first snapshot of that name; if there is none, the one with that
 * ID; else NULL.
 */
extern const struct qcow2_snapshot *
qcow2_snapshots_find (const GPtrArray *snapshots, const char *name_or_id);

#endif /* QCOW2_SNAPSHOT_H */
