/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */


/* Byte 100 + N of the file is locked by who does N, byte 200 + N by who
 * does not want others to do N.  What N stands for:
 *
 *    0 reading what must be consistent      1 writing
 *    3 changing the size
 *
 * All are read locks, which do not exclude each other: whether somebody
 * has one is found out by asking if a write lock would be possible.  So a
 * lock is set first, and then the opposite ones are looked for; of two who
 * begin at the same time at least one sees the other.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "qcow2/error.h"
#include "qcow2/lock.h"

struct rule {
  unsigned char set[6], test[6]; /* bytes of the file; 0 ends the list */
};

static const struct rule rules[] = {
  [QCOW2_LOCK_READER] = { { 100, 201, 203 }, { 200, 101, 103 } },
  [QCOW2_LOCK_WRITER] =
    { { 100, 101, 103, 201, 203 }, { 200, 201, 203, 101, 103 } },
  [QCOW2_LOCK_RAW_WRITER] =
    { { 100, 101, 201, 203 }, { 200, 201, 101, 103 } },
};

static int
control (int fd, int command, short type, unsigned byte, short *found)
{
  struct flock lock = {
    .l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1,
  };
  const int r = fcntl (fd, command, &lock);

  *found = lock.l_type;
  return r;
}

static void
undo (int fd, const struct rule *rule)
{
  short ignored;

  for (const unsigned char *p = rule->set; *p; ++p)
    control (fd, F_OFD_SETLK, F_UNLCK, *p, &ignored);
}

static int
fail (GError **error)
{
  return qcow2_fail (error, errno, "the file cannot be locked: %s",
                     strerror (errno));
}

static int
set (int fd, const struct rule *rule, GError **error)
{
  short ignored;

  for (const unsigned char *p = rule->set; *p; ++p)
    if (control (fd, F_OFD_SETLK, F_RDLCK, *p, &ignored) == -1)
      return fail (error);
  return 0;
}

static int
test (int fd, const struct rule *rule, GError **error)
{
  short found;

  for (const unsigned char *p = rule->test; *p; ++p) {
    if (control (fd, F_OFD_GETLK, F_WRLCK, *p, &found) == -1)
      return fail (error);
    if (found != F_UNLCK)
      return qcow2_fail (error, EBUSY, "another program, which may be QEMU, "
                         "is using the file (lock byte %d)", *p);
  }
  return 0;
}

int
qcow2_lock_file (int fd, enum qcow2_lock lock, GError **error)
{
  const struct rule *rule = &rules[lock];

  if (set (fd, rule, error) == -1 || test (fd, rule, error) == -1) {
    undo (fd, rule);
    return -1;
  }
  return 0;
}
