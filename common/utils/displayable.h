/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#ifndef QF_DISPLAYABLE_H
#define QF_DISPLAYABLE_H

#include <glib.h>

/* A string from a stranger, fit to be shown on a terminal: at most max
 * characters, none of which controls anything.  Free it.
 */
extern char *qf_displayable (const char *s, glong max);

#endif /* QF_DISPLAYABLE_H */
