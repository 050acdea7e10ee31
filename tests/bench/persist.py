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


def write_everywhere(server):
    """Write a little to each region, in any order.  Returns how many
    there are."""
    import nbd                  # of which not each Python knows
    handle = nbd.NBD()
    handle.connect_uri(server.uri)
    offsets = list(range(0, handle.get_size(), REGION))
    random.Random(1).shuffle(offsets)
    for offset in offsets:
        while handle.aio_in_flight() >= DEPTH:
            handle.poll(-1)
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(PIECE)), offset,
                          completion=lambda *_: 1)
    while handle.aio_in_flight():
        handle.poll(-1)
    handle.shutdown()
    return len(offsets)


def cold(server, _options):
    start = time.perf_counter()
    number = write_everywhere(server)
    return number / (time.perf_counter() - start)


def warm(server, options):
    write_everywhere(server)
    return RANDOM_WRITE.run(server, options)


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
    import nbd
    handle = nbd.NBD()
    handle.connect_uri(server.uri)
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
