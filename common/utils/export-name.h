/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Export names of views: BASE/KIND/NAME, without the first slash if BASE
 * is empty.  The kinds are "snapshot" and "dirty".
 */

#ifndef QF_EXPORT_NAME_H
#define QF_EXPORT_NAME_H

#include <stddef.h>

#include <glib.h>

/* nbdkit's limits for lists of exports. */
#define QF_MAX_EXPORT_NAME 4096
#define QF_MAX_EXPORTS 10000

/* Split a name where a kind is first mentioned.  Returns the kind, with
 * base and name to be freed, or NULL if it is not the name of a view.
 */
extern const char *qf_export_name_split (const char *export, char **base,
                                         char **name);

/* The name of a view; NULL if it would not be understood as such, or
 * cannot be listed.
 */
extern char *qf_export_name_join (const char *base, const char *kind,
                                  const char *name);

/* Is it the name of a snapshot in an image?  That is another disk than the
 * image's, to which nobody writes.
 */
extern gboolean qf_export_name_is_snapshot (const char *name);

#endif /* QF_EXPORT_NAME_H */
