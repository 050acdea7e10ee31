/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Are images free of corruptions?  If not, or if anything else is not as it
 * must be, the program ends with a message.
 */

#ifndef JUDGE_H
#define JUDGE_H

#include <stdint.h>

#include <glib.h>

#include "crash/recorder.h"
#include "qcow2/image.h"

struct judge {
  const char *directory;        /* for samples */
  unsigned every;               /* image is a sample; 0: none */
  guint crashes, samples;
};

/* Check an image that a crash has left, and perhaps write it to the
 * directory, for qemu-img, with a name that begins with the numbers of
 * corruptions and leaks that we found.  Returns the latter.
 */
extern uint64_t judge_image (struct judge *judge, struct qcow2_image *image,
                             const struct remains *remains);

/* The same of an image that no crash has left: io is all there is. */
extern uint64_t judge_whole (struct qcow2_image *image,
                             const struct qcow2_io *io);

extern void must (int r, const GError *error, const char *what);

extern unsigned number (const char *text);

#endif /* JUDGE_H */
