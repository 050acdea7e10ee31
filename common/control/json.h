/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#ifndef CONTROL_JSON_H
#define CONTROL_JSON_H

#include <json-glib/json-glib.h>

/* What a request may hold: members, elements, objects and arrays. */
#define CONTROL_MAX_VALUES (1 << 16)

/* Parse a request; NULL with error set.  The caller frees the node. */
extern JsonNode *control_json_parse (const GString *text, GError **error);

#endif /* CONTROL_JSON_H */
