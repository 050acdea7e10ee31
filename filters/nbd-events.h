/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* The loop of a thread that lets libnbd make progress while other threads
 * issue requests.
 *
 * Completion callbacks must not retire their command (they return 0): the
 * connection may die while libnbd 1.14 is sending a request, and then it
 * looks at the command once more after the callback.  So commands are
 * retired with nbd_aio_command_completed, after the call that issued them
 * has returned.  It may fail where the callback was told of no error: if
 * there was no data in the reply to a read.
 */

#ifndef NBD_EVENTS_H
#define NBD_EVENTS_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

#include <libnbd.h>

/* Let nbd_events_wait return in the thread that waits with this eventfd,
 * which does not block: something was issued, or there is something else
 * to see.
 */
static inline void
nbd_events_wake (int wakeup)
{
  const uint64_t one = 1;

  /* Fails only if the counter is full, and then it wakes as well. */
  if (write (wakeup, &one, sizeof one) == -1)
    return;
}

/* Wait until the server or another thread has something, and do what can
 * be done then.  If the connection is broken this completes all requests
 * with an error, and from then on waits for other threads only.
 */
static inline void
nbd_events_wait (struct nbd_handle *h, int wakeup)
{
  const unsigned dir = nbd_aio_get_direction (h);
  const bool alive = !nbd_aio_is_dead (h) && !nbd_aio_is_closed (h);
  struct pollfd fds[2] = {
    { .fd = wakeup, .events = POLLIN },
    { .fd = alive ? nbd_aio_get_fd (h) : -1 },
  };
  uint64_t n;

  if (dir & LIBNBD_AIO_DIRECTION_READ)
    fds[1].events |= POLLIN;
  if (dir & LIBNBD_AIO_DIRECTION_WRITE)
    fds[1].events |= POLLOUT;
  if (poll (fds, 2, -1) == -1)
    return;
  if (fds[0].revents && read (wakeup, &n, sizeof n) == -1)
    return;
  if ((dir & LIBNBD_AIO_DIRECTION_READ) &&
      (fds[1].revents & (POLLIN | POLLHUP | POLLERR)))
    nbd_aio_notify_read (h);
  else if ((dir & LIBNBD_AIO_DIRECTION_WRITE) &&
           (fds[1].revents & (POLLOUT | POLLHUP | POLLERR)))
    nbd_aio_notify_write (h);
}

#endif /* NBD_EVENTS_H */
