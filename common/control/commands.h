/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The QMP commands of the suite.  Registered before the server starts, by
 * filters that have what the commands act on; again is harmless.
 */

#ifndef CONTROL_COMMANDS_H
#define CONTROL_COMMANDS_H

/* query-named-block-nodes. */
extern void control_register_node_commands (void);

/* block-dirty-bitmap-*, and their digests. */
extern void control_register_bitmap_commands (void);

/* blockdev-set-active. */
extern void control_register_persist_commands (void);

#endif /* CONTROL_COMMANDS_H */
