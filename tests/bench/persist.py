# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""What it costs to keep bitmaps, in a sidecar on a real disk."""

import os
import random
import signal
import time

from workloads import RANDOM_WRITE, RATE, SECONDS, Workload

# At least as small as regions of the write intent.
REGION = 64 << 10
PIECE = 4096
DEPTH = 16


def connect(server):
    import nbd                  # of which not each Python knows
    handle = nbd.NBD()
    handle.connect_uri(server.uri)
    return handle


def write_everywhere(handle):
    """Write a little to each region, in any order.  Returns how many
    there are."""
    import nbd
    offsets = list(range(0, handle.get_size(), REGION))
    random.Random(1).shuffle(offsets)
    for offset in offsets:
        while handle.aio_in_flight() >= DEPTH:
            handle.poll(-1)
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(PIECE)), offset,
                          completion=lambda *_: 1)
    while handle.aio_in_flight():
        handle.poll(-1)
    return len(offsets)


def cold(server, _options):
    handle = connect(server)
    start = time.perf_counter()
    number = write_everywhere(handle)
    seconds = time.perf_counter() - start
    handle.shutdown()
    return number / seconds


def warm(server, options):
    """Who has written stays: all is stored, and cold again, when the last
    of them goes."""
    handle = connect(server)
    write_everywhere(handle)
    rate = RANDOM_WRITE.run(server, options)
    handle.shutdown()
    return rate


def wait_for_end(pid):
    """Until the process is gone, or only waits to be reaped."""
    while True:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
                if f.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.001)


def make_dirty(server):
    handle = connect(server)
    rng = random.Random(1)
    for _ in range(20000):
        handle.zero(PIECE, rng.randrange(handle.get_size() // PIECE) * PIECE)
    return handle


def end(server, _options):
    """Seconds from the moment when the client goes to the server's end."""
    handle = make_dirty(server)
    start = time.perf_counter()
    handle.shutdown()
    os.kill(server.pid, signal.SIGTERM)
    wait_for_end(server.pid)
    return time.perf_counter() - start


COLD = Workload(cold, RATE)
WARM = Workload(warm, RATE)
END = Workload(end, SECONDS)
