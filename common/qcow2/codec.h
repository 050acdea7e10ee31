/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Compressed clusters ("Compressed Clusters Descriptor" and the
 * compression types of the header).
 */

#ifndef QCOW2_CODEC_H
#define QCOW2_CODEC_H

#include <stdbool.h>
#include <stddef.h>

#include <glib.h>

#include "qcow2/format.h"

/* Whether this build can decompress that type, and its name. */
extern bool qcow2_codec_available (enum qcow2_compression type);
extern const char *qcow2_codec_name (enum qcow2_compression type);

/* Decompress one cluster: fill dst with exactly dst_size bytes.  src may
 * have any bytes behind the compressed data.  Never reads or writes
 * outside the two buffers, takes no memory that src's contents decide,
 * and leaves dst undefined on error.  Safe from many threads.
 */
extern int qcow2_codec_decompress (enum qcow2_compression type,
                                   const void *src, size_t src_size,
                                   void *dst, size_t dst_size,
                                   GError **error);

#endif /* QCOW2_CODEC_H */
