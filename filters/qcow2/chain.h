/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* A chain of images: the one in the container below us, its backing
 * file, that one's backing file, and so on.
 *
 * It is immutable once open.
 */

#ifndef CHAIN_H
#define CHAIN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include <nbdkit-filter.h>

#include "qcow2/crypt.h"
#include "qcow2/image.h"

#include "source.h"

struct node {
  struct source *container;     /* NULL for the top: each connection reads
                                   it through its own layer */
  struct source *data;          /* external data file, or NULL */
  struct qcow2_image *image;    /* NULL if the format is raw */
  struct qcow2_crypt *crypt;    /* NULL if it is not encrypted */
  struct qcow2_view view;       /* of a raw one only the size is set */
  struct node *backing;         /* NULL: unallocated clusters are zeroes */
  bool ignored_backing;         /* there is one, but qcow2-backing=none */
  char *path;                   /* beneath the policy's directory, or NULL */
  atomic_int preallocated;      /* see chain_is_preallocated */
};

/* Open the image in top and all that it refers to.  backend is the layer
 * below, or NULL before the server has started: then references that
 * cannot be opened yet (NBD servers, exports) are left out.
 * Returns NULL with error set.
 */
extern struct node *chain_open (struct source *top, nbdkit_backend *backend,
                                GError **error);

/* NULL is allowed. */
extern void chain_close (struct node *top);

/* Where the tables and compressed clusters of a node are, and where its
 * other data is, if top is the layer that this connection reads.
 */
static inline struct source *
chain_container (const struct node *node, struct source *top)
{
  return node->container ? node->container : top;
}

static inline struct source *
chain_data (const struct node *node, struct source *top)
{
  return node->data ? node->data : chain_container (node, top);
}

/* True if most of the container's clusters were only reserved when it
 * was made (preallocation=metadata), so that it is worth asking it which
 * data clusters are holes.  Found out when first asked.  Never true of an
 * encrypted image, where a hole is decrypted to something else than zeroes.
 */
extern bool chain_is_preallocated (struct node *node, struct source *top);

/* keys.c: the keys of encrypted images.  Deriving one takes seconds, so
 * they are kept until the server ends, and found again by the encryption
 * header that they belong to.
 */
extern int keys_get (const struct qcow2_image *image,
                     const struct qcow2_io *io,
                     struct qcow2_crypt **crypt, GError **error);
extern void keys_forget_all (void);

#endif /* CHAIN_H */
