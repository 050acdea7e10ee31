/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Actions: what can be done in a QMP transaction, and alone, as a command
 * of the same name.
 *
 * An action acts with the lock held and the gates of its node closed (see
 * dirty/transaction.h), so that must not take long.  What does, or may
 * wait for somebody else, is prepared before that.
 */

#ifndef CONTROL_ACTIONS_H
#define CONTROL_ACTIONS_H

#include <json-glib/json-glib.h>

#include "dirty/transaction.h"

struct control_action {
  const char *name;

  /* Either this is all there is to it ... */
  int (*act) (struct dirty_transaction *t, JsonObject *args, GError **error);

  /* ... or it is prepared, without the lock, NULL with error set being a
   * failure; acts; and what was prepared is released, without the lock,
   * whether the action came to pass or not.
   */
  gpointer (*prepare) (JsonObject *args, GError **error);
  int (*act_prepared) (struct dirty_transaction *t, gpointer prepared,
                       GError **error);
  void (*release) (gpointer prepared);
};

/* Let there be such an action, a command of its name, and "transaction".
 * The nodes on which it acts are those that its arguments name as "node",
 * "target-node" and in "bitmaps".  The action must stay; again is
 * harmless.
 */
extern void control_register_action (const struct control_action *action);

#endif /* CONTROL_ACTIONS_H */
