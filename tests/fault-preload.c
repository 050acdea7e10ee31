/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Preloaded into nbdkit: calls fail, or kill the server, on files whose
 * name begins with $FAULT_PATH, as the struct in the file $FAULT_CONTROL
 * says, which the test (faults.py) maps as well and changes at any time.
 */

#include <config.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { READ = 1, WRITE = 2, SYNC = 4, RESIZE = 8, SHORT = 16, KILL = 32 };

struct control {
  _Atomic (int32_t) calls;      /* which of them fail */
  _Atomic (int32_t) error;      /* with this errno */
  _Atomic (int32_t) skip;       /* after so many that do not */
  _Atomic (int32_t) times;      /* and so many times */
  _Atomic (int32_t) hits;       /* have failed */
};

static struct control *control; /* NULL: nothing fails */
static const char *path;

static void __attribute__ ((constructor))
begin (void)
{
  const char *name = getenv ("FAULT_CONTROL");
  int fd;

  path = getenv ("FAULT_PATH");
  if (!name || !path)
    return;
  fd = open (name, O_RDWR | O_CLOEXEC);
  if (fd == -1)
    return;
  control = mmap (NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED,
                  fd, 0);
  close (fd);
  if (control == MAP_FAILED)
    abort ();
}

static int
is_ours (int fd)
{
  char link[64], name[4096];
  ssize_t n;

  snprintf (link, sizeof link, "/proc/self/fd/%d", fd);
  n = readlink (link, name, sizeof name - 1);
  if (n <= 0)
    return 0;
  name[n] = '\0';
  return strncmp (name, path, strlen (path)) == 0;
}

/* Does this call fail?  Then errno is set. */
static int
fails (int call, int fd)
{
  if (!control || !(atomic_load (&control->calls) & call) || !is_ours (fd))
    return 0;
  if (atomic_fetch_sub (&control->skip, 1) > 0 ||
      atomic_fetch_sub (&control->times, 1) <= 0)
    return 0;
  atomic_fetch_add (&control->hits, 1);
  if (atomic_load (&control->calls) & KILL)
    kill (getpid (), SIGKILL);
  errno = atomic_load (&control->error);
  return 1;
}

/* The function behind ours, which has another name where offsets are
 * larger than long.
 */
#define REAL(type, name, ...)                                   \
  type (*real) (__VA_ARGS__) = (type (*) (__VA_ARGS__))         \
    dlsym (RTLD_NEXT, name)
#define WIDE(name) (sizeof (off_t) > sizeof (long) ? name "64" : name)

ssize_t
pread (int fd, void *buf, size_t count, off_t offset)
{
  REAL (ssize_t, WIDE ("pread"), int, void *, size_t, off_t);

  return fails (READ, fd) ? -1 : real (fd, buf, count, offset);
}

/* A disk that gets full in the midst of a write takes a part of it. */
ssize_t
pwrite (int fd, const void *buf, size_t count, off_t offset)
{
  REAL (ssize_t, WIDE ("pwrite"), int, const void *, size_t, off_t);

  if (!fails (WRITE, fd))
    return real (fd, buf, count, offset);
  if (atomic_load (&control->calls) & SHORT && count > 512) {
    const int error = errno;

    real (fd, buf, count / 2, offset);
    errno = error;
  }
  return -1;
}

int
ftruncate (int fd, off_t size)
{
  REAL (int, WIDE ("ftruncate"), int, off_t);

  return fails (RESIZE, fd) ? -1 : real (fd, size);
}

int
fdatasync (int fd)
{
  REAL (int, "fdatasync", int);

  return fails (SYNC, fd) ? -1 : real (fd);
}

int
fsync (int fd)
{
  REAL (int, "fsync", int);

  return fails (SYNC, fd) ? -1 : real (fd);
}
