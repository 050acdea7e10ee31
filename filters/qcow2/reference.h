/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* References from an image to other files, and what the user permits.
 *
 * A file name inside an image is a string from a stranger.  The policy
 * given by qcow2-backing= or qcow2-data-file= says what is done with it.
 */

#ifndef REFERENCE_H
#define REFERENCE_H

#include <glib.h>

#include <nbdkit-filter.h>

#include "source.h"

enum policy_kind {
  POLICY_REFUSE,                /* there must be no such reference */
  POLICY_NONE,                  /* ignore it */
  POLICY_DIR,                   /* names beneath the directory value */
  POLICY_FILE,                  /* the file value, whatever the name says */
  POLICY_URI,                   /* the NBD server value, likewise */
  POLICY_EXPORT,                /* the name is an export of the layer below */
};

struct policy {
  const char *key;              /* the parameter that sets it */
  gboolean is_backing;          /* none and export are possible */
  enum policy_kind kind;
  char *value;
  char *format;                 /* format= behind the value, or NULL */
};

/* Set policy from the parameter's value.  On failure the reason was
 * reported.
 */
extern int policy_parse (struct policy *policy, const char *value);
extern void policy_clear (struct policy *policy);

/* A name as it stands in an image, taken apart. */
struct reference {
  char *path;                   /* a file's, as it stands, or NULL */
  char *uri;                    /* an NBD server's, or NULL */
  char *format;                 /* if the name itself tells, or NULL */
};

/* Understands plain names, file:, nbd: and NBD URIs, and json: with
 * these in it.  On failure there is nothing to clear.
 */
extern int reference_parse (const char *name, struct reference *ref,
                            GError **error);
extern void reference_clear (struct reference *ref);

/* Open what name, found in the image from, refers to, as far as the
 * policy permits that.  what says what it is ("backing file").
 *
 * from_path is where the image from lies relative to the policy's
 * directory, or NULL if that is not known; *path is set to the same for
 * what was opened, or NULL.  *format is set to the format that the name
 * itself tells, or NULL.
 */
extern struct source *reference_open (const struct policy *policy,
                                      const char *what, const char *name,
                                      const char *from_path,
                                      nbdkit_backend *backend,
                                      char **path, char **format,
                                      GError **error);

#endif /* REFERENCE_H */
