/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "qcow2/codec.h"
#include "qcow2/error.h"
#include "qcow2/refcount.h"

#include "chain.h"
#include "qcow2-filter.h"
#include "reference.h"

/* More backing files than that are not opened. */
#define MAX_BACKING_FILES 200

enum preallocated { UNKNOWN, NO, YES };

static void
node_free (struct node *node)
{
  qcow2_image_close (node->image);
  source_close (node->data);
  source_close (node->container);
  g_free (node->path);
  g_free (node);
}

void
chain_close (struct node *top)
{
  while (top) {
    struct node *next = top->backing;

    node_free (top);
    top = next;
  }
}

static void
log_image (const char *name, const struct qcow2_header *header)
{
  if (header->incompatible & QCOW2_INCOMPAT_CORRUPT)
    nbdkit_error ("warning: %s: the image is marked as corrupt: what is read "
                  "from it may be wrong; \"qemu-img check -r all\" may be "
                  "able to repair it", name);
  if (header->size % 512 != 0)
    nbdkit_debug ("qcow2: %s: the disk size %" PRIu64
                  " is rounded down to a multiple of 512",
                  name, header->size);
  if (qcow2_debug_verbose)
    nbdkit_debug ("qcow2: %s: version %" PRIu32 ", %" PRIu64
                  " bytes, cluster_bits %" PRIu32 ", compression %s, "
                  "incompatible 0x%" PRIx64 ", compatible 0x%" PRIx64
                  ", autoclear 0x%" PRIx64 ", L1 entries %" PRIu32
                  ", snapshots %" PRIu32,
                  name, header->version, header->size, header->cluster_bits,
                  qcow2_codec_name (header->compression),
                  header->incompatible, header->compatible,
                  header->autoclear, header->l1_entries,
                  header->nr_snapshots);
}

static bool
can_open_now (const struct policy *policy, nbdkit_backend *backend)
{
  return backend ||
    (policy->kind != POLICY_URI && policy->kind != POLICY_EXPORT);
}

static int
open_data_file (struct node *node, nbdkit_backend *backend, GError **error)
{
  const struct qcow2_header *header = node->image->header;
  const char *name = header->data_file ? header->data_file : "";
  g_autofree char *path = NULL, *format = NULL;

  if (!(header->incompatible & QCOW2_INCOMPAT_DATA_FILE) ||
      !can_open_now (&config.data_file, backend))
    return 0;
  if (!*name && config.data_file.kind == POLICY_DIR)
    return qcow2_fail (error, EINVAL, "the image does not name its external "
                       "data file; use qcow2-data-file=file:PATH");
  node->data = reference_open (&config.data_file, "external data file", name,
                               node->path, backend, &path, &format, error);
  return node->data ? 0 : -1;
}

/* Open the qcow2 image in a node's container. */
static int
open_image (struct node *node, struct source *top, nbdkit_backend *backend,
            GError **error)
{
  struct source *container = chain_container (node, top);

  node->image = qcow2_image_open (&container->io, error);
  if (!node->image)
    return -1;
  log_image (container->name, node->image->header);
  qcow2_image_active_view (node->image, &node->view);
  if (open_data_file (node, backend, error) == -1)
    return -1;
  return keys_get (node->image, &container->io, &node->crypt, error);
}

/* The format of a backing file: never guessed from its contents, as a
 * guest could write a header into a raw one that names any file.  If the
 * header has one and a json: name (own) another, QEMU takes the header's.
 */
static const char *
backing_format (const struct qcow2_header *header, const char *own,
                GError **error)
{
  const bool replaced = config.backing.kind == POLICY_FILE ||
    config.backing.kind == POLICY_URI;
  const char *given = config.backing.format ? config.backing.format :
    config.backing_format;
  const char *format;

  if (replaced && given)
    format = given;
  else
    format = header->backing_format && *header->backing_format ?
      header->backing_format : own ? own : given;

  if (!format) {
    g_autofree char *shown = g_strescape (header->backing_file, NULL);

    qcow2_fail (error, EINVAL, "the image does not say what format its "
                "backing file \"%s\" has, and it is never guessed: add "
                "qcow2-backing-format=raw or qcow2-backing-format=qcow2",
                shown);
    return NULL;
  }
  if (strcmp (format, "raw") != 0 && strcmp (format, "qcow2") != 0) {
    g_autofree char *shown = g_strescape (format, NULL);

    qcow2_fail (error, ENOTSUP, "the backing file has the format \"%s\", "
                "but only raw and qcow2 are supported", shown);
    return NULL;
  }
  return format;
}

/* Make the node for the backing file of node, if it has one that is
 * wanted; its image is not yet opened.
 */
static int
open_backing (struct node *node, nbdkit_backend *backend, bool *is_qcow2,
              GError **error)
{
  const struct qcow2_header *header = node->image->header;
  g_autofree char *path = NULL, *own_format = NULL;
  struct source *source;
  struct node *backing;
  const char *format;

  if (!header->backing_file || !can_open_now (&config.backing, backend))
    return 0;
  if (config.backing.kind == POLICY_NONE) {
    node->ignored_backing = true;
    return 0;
  }
  source = reference_open (&config.backing, "backing file",
                           header->backing_file, node->path, backend,
                           &path, &own_format, error);
  if (!source)
    return -1;
  format = backing_format (header, own_format, error);
  if (!format) {
    source_close (source);
    return -1;
  }

  backing = g_new0 (struct node, 1);
  backing->container = source;
  backing->path = g_steal_pointer (&path);
  backing->view.size = source_size (source);
  node->backing = backing;
  *is_qcow2 = strcmp (format, "qcow2") == 0;
  return 0;
}

/* All images share one bound of memory. */
static void
divide_cache (struct node *top, size_t images)
{
  for (struct node *node = top; node; node = node->backing)
    if (node->image)
      qcow2_image_set_cache_size (node->image, config.cache_size / images);
}

/* Two references to one file in a row of backing files is a loop. */
static int
check_loop (const struct node *top, const struct node *last, GError **error)
{
  for (const struct node *node = top; node && node != last;
       node = node->backing) {
    if (node->container &&
        strcmp (node->container->name, last->container->name) == 0)
      return qcow2_fail (error, EINVAL, "%s is its own backing file",
                         last->container->name);
  }
  return 0;
}

static int
open_nodes (struct node *top, struct source *source, nbdkit_backend *backend,
            GError **error)
{
  struct node *node = top;
  bool is_qcow2 = true;
  size_t images = 0;

  for (;;) {
    if (is_qcow2) {
      images++;
      if (open_image (node, source, backend, error) == -1 ||
          open_backing (node, backend, &is_qcow2, error) == -1)
        break;
    }
    node = node->image ? node->backing : NULL;
    if (!node) {
      divide_cache (top, images);
      return 0;
    }
    if (check_loop (top, node, error) == -1)
      break;
    if (images > MAX_BACKING_FILES)
      return qcow2_fail (error, EINVAL, "the image has a chain of more than "
                         "%d backing files", MAX_BACKING_FILES);
  }
  g_prefix_error (error, "%s: ", chain_container (node, source)->name);
  return -1;
}

struct node *
chain_open (struct source *source, nbdkit_backend *backend, GError **error)
{
  struct node *top = g_new0 (struct node, 1);

  if (open_nodes (top, source, backend, error) == 0)
    return top;
  chain_close (top);
  return NULL;
}

/* QEMU's rule, so that the map is the one that qemu-img shows: of the
 * clusters in use, far more than the file has space for.
 */
static bool
detect_preallocated (struct node *node, struct source *container)
{
  const uint64_t cluster_size = node->image->cluster_size;
  const uint64_t clusters = source_size (container) / cluster_size + 1;
  uint64_t present, limit, used;
  int64_t allocated;

  if (!container->extents || !container->allocated)
    return false;
  allocated = container->allocated (container);
  if (allocated == -1)
    return false;
  present = allocated / cluster_size;
  limit = MAX (present * 10 / 9, present + 2);
  return clusters >= limit &&
    qcow2_refcount_count_used (node->image, &container->io, limit, &used,
                               NULL) == 0 &&
    used >= limit;
}

bool
chain_is_preallocated (struct node *node, struct source *top)
{
  int state = atomic_load_explicit (&node->preallocated,
                                    memory_order_relaxed);

  /* Threads that meet here at first find out the same. */
  if (state == UNKNOWN) {
    state = !node->data && !node->crypt &&
      detect_preallocated (node, chain_container (node, top)) ? YES : NO;
    atomic_store_explicit (&node->preallocated, state, memory_order_relaxed);
  }
  return state == YES;
}
