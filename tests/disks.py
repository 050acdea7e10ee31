# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Contents and maps of disks: what QEMU says, what a server says.

The oracle is QEMU, never our own code.
"""

import bisect
import json
import mmap
import os
import random
import select

import nbd
from qf import GiB, MiB, RUN_TIMEOUT, Fail, check, equal, qemu_img, run, tool

LARGEST_READ = 2 * MiB


# -------------------------------------------------------------- oracles

class Oracle:
    """The right content of a disk: regions of data, zeroes between them."""

    def __init__(self, size):
        self.size = size
        self.starts = []
        self.regions = []

    def add(self, start, content):
        self.starts.append(start)
        self.regions.append(content)

    def read(self, offset, length):
        i = max(bisect.bisect_right(self.starts, offset) - 1, 0)
        if i < len(self.starts):
            at = offset - self.starts[i]
            if 0 <= at and at + length <= len(self.regions[i]):
                return self.regions[i][at:at + length]
        out = bytearray(length)
        while i < len(self.starts) and self.starts[i] < offset + length:
            start, content = self.starts[i], self.regions[i]
            low = max(offset, start)
            high = min(offset + length, start + len(content))
            if low < high:
                out[low - offset:high - offset] = \
                    content[low - start:high - start]
            i += 1
        return out


def map_file(path):
    """A file's content as a memoryview; it may be removed afterwards."""
    if os.path.getsize(path) == 0:
        return memoryview(b"")
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def oracle_of(tmp, path, snapshot=None):
    """Convert the image to raw with qemu-img, whole."""
    raw = os.path.join(tmp, "oracle.raw")
    select_snapshot = ["-l", snapshot] if snapshot else []
    qemu_img("convert", "-f", "qcow2", "-O", "raw", *select_snapshot,
             path, raw)
    content = map_file(raw)
    os.unlink(raw)
    oracle = Oracle(len(content))
    oracle.add(0, content)
    return oracle


def sparse_oracle_of(tmp, path):
    """For disks too large for a raw file: only what the map calls data."""
    oracle = Oracle(virtual_size(path))
    raw = os.path.join(tmp, "oracle.raw")
    for entry in qemu_map(path):
        if entry["zero"]:
            continue
        start, length = entry["start"], entry["length"]
        window = {"driver": "raw", "offset": start, "size": length,
                  "file": {"driver": "qcow2",
                           "file": {"driver": "file", "filename": path}}}
        qemu_img("convert", "-O", "raw", "json:" + json.dumps(window), raw)
        oracle.add(start, map_file(raw))
        os.unlink(raw)
    return oracle


def virtual_size(path):
    info = qemu_img("info", "--output=json", "-f", "qcow2", path)
    return json.loads(info)["virtual-size"]


def qemu_map(path, form="qcow2"):
    """qemu-img map's entries: start, length, zero, data, present..."""
    return json.loads(qemu_img("map", "--output=json", "-f", form, path))


def nbd_map(uri):
    """[(start, length, type)] as nbdinfo sees the export."""
    out = run([tool("nbdinfo"), "--map", "--json", uri]).stdout
    return [(e["offset"], e["length"], e["type"]) for e in json.loads(out)]


HOLE, ZERO = 1, 2


def merged(extents):
    """Join adjoining (start, length, type) of the same type."""
    out = []
    for start, length, kind in extents:
        if out and out[-1][2] == kind and sum(out[-1][:2]) == start:
            start, length = out[-1][0], out[-1][1] + length
            out.pop()
        if length:
            out.append((start, length, kind))
    return out


def expected_map(path, form="qcow2"):
    """What base:allocation should say, by qemu-img's map of the image.

    Zeroes that are allocated (QEMU gives their place in the file) are
    ZERO, other zeroes are HOLE and ZERO, all the rest is data.
    """
    def kind(entry):
        if not entry["zero"]:
            return 0
        return ZERO if entry["present"] and "offset" in entry \
            else HOLE | ZERO

    return merged((entry["start"], entry["length"], kind(entry))
                  for entry in qemu_map(path, form))


def with_expected_map(path, function):
    """Call function with the map that is expected of the image.

    QEMU shows holes of the file in clusters that are data.  Linux calls
    space that was allocated but not written a hole only until it has been
    read.  So if function fails, and what QEMU says has changed, it is
    called again with that.
    """
    for _ in range(10):
        expected = expected_map(path)
        try:
            return function(expected)
        except Fail:
            if expected_map(path) == expected:
                raise
    raise Fail(f"{path}: QEMU's map of it changes all the time")


def as_data(extents, ranges):
    """Call data what lies in the (start, length)s."""
    out = []
    for start, length, kind in extents:
        for low, count in ranges:
            high = min(low + count, start + length)
            low = max(low, start)
            if low >= high:
                continue
            out += [(start, low - start, kind), (low, high - low, 0)]
            start, length = high, start + length - high
        out.append((start, length, kind))
    return merged(out)


def compare_maps(what, actual, expected):
    """Both merged; says where they first differ."""
    if actual == expected:
        return
    for a, e in zip(actual + [None], expected + [None]):
        if a != e:
            raise Fail(f"{what}: map: expected (start, length, type) "
                       f"{e}, actual {a}")


# ------------------------------------------------------------ comparing

def compare(what, offset, actual, expected):
    if actual == expected:
        return
    actual, expected = bytes(actual), bytes(expected)
    check(len(actual) == len(expected),
          f"{what}: at {offset}: {len(actual)} bytes, not {len(expected)}")
    at = next(i for i, (a, e) in enumerate(zip(actual, expected)) if a != e)
    raise Fail(f"{what}: read of {len(actual)} bytes at {offset}: "
               f"the byte at {offset + at} differs: "
               f"expected {expected[at:at + 16].hex()} "
               f"actual {actual[at:at + 16].hex()}")


def whole_disk(size, piece=MiB):
    """Requests that read everything."""
    return [(at, min(piece, size - at)) for at in range(0, size, piece)]


def random_requests(rng, count, oracle, largest=LARGEST_READ):
    """Reads of 1 byte to LARGEST anywhere, small ones more often.

    In a sparse disk half of them touch the regions that hold data.
    """
    if oracle.size == 0:
        return
    bits = largest.bit_length() - 1
    sparse = sum(map(len, oracle.regions)) * 4 < oracle.size
    for _ in range(count):
        length = min(int(2 ** (bits * rng.random() ** 1.5)), oracle.size)
        offset = rng.randrange(oracle.size - length + 1)
        if sparse and oracle.regions and rng.random() < 0.5:
            i = rng.randrange(len(oracle.regions))
            offset = oracle.starts[i] - length + \
                rng.randrange(len(oracle.regions[i]) + length)
            offset = min(max(offset, 0), oracle.size - length)
        yield offset, length


class Reader:
    """Reads with many requests in flight on several connections."""

    # libnbd 1.14 never releases a buffer, so they are used again.
    buffers = []

    def __init__(self, server, export="", connections=4, depth=8):
        self.handles = [server.connect(export) for _ in range(connections)]
        self.depth = depth
        self.poll = select.poll()
        self.events = {}
        for handle in self.handles:
            self.poll.register(handle.aio_get_fd(), 0)
            self.events[handle.aio_get_fd()] = (handle, 0)

    def close(self):
        for handle in self.handles:
            handle.shutdown()

    def verify(self, what, requests, oracle):
        """Read all REQUESTS and compare; returns how many there were."""
        requests = iter(requests)
        in_flight = {handle: [] for handle in self.handles}
        count = 0
        more = True
        while more or any(in_flight.values()):
            for handle, pending in in_flight.items():
                while more and len(pending) < self.depth:
                    request = next(requests, None)
                    if request is None:
                        more = False
                        break
                    pending.append(self.start(handle, *request))
                    count += 1
            if any(in_flight.values()):
                self.wait()
            for handle, pending in in_flight.items():
                for entry in list(pending):
                    if self.completed(what, handle, entry):
                        pending.remove(entry)
                        _, offset, length, buffer = entry
                        compare(what, offset, buffer[:length],
                                oracle.read(offset, length))
                        self.buffers.append(buffer)
        return count

    def start(self, handle, offset, length):
        buffer = self.buffers.pop() if self.buffers \
            else bytearray(LARGEST_READ)
        cookie = handle.aio_pread(
            nbd.Buffer.from_buffer(memoryview(buffer)[:length]), offset)
        return cookie, offset, length, buffer

    @staticmethod
    def completed(what, handle, entry):
        cookie, offset, length, _ = entry
        try:
            return handle.aio_command_completed(cookie)
        except nbd.Error as error:
            raise Fail(f"{what}: read of {length} bytes at {offset} "
                       f"failed: {error}") from None

    def wait(self):
        # libnbd's directions, 1 read and 2 write, as poll's events.
        for fd, (handle, old) in self.events.items():
            direction = handle.aio_get_direction()
            new = (select.POLLIN if direction & 1 else 0) \
                | (select.POLLOUT if direction & 2 else 0)
            if new != old:
                self.poll.modify(fd, new)
                self.events[fd] = (handle, new)
        ready = self.poll.poll(RUN_TIMEOUT * 1000)
        check(ready, f"no answer in {RUN_TIMEOUT} s")
        for fd, events in ready:
            handle = self.events[fd][0]
            if events & select.POLLOUT and handle.aio_get_direction() & 2:
                handle.aio_notify_write()
            elif events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                handle.aio_notify_read()


def verify_disk(server, what, oracle, export="", reads=0, seed=0,
                connections=4):
    """Size, whole content and READS random reads equal the oracle's."""
    reader = Reader(server, export, connections)
    equal(f"{what}: size", reader.handles[0].get_size(), oracle.size)
    if oracle.size <= GiB:
        reader.verify(what, whole_disk(oracle.size), oracle)
    else:
        for start, content in zip(oracle.starts, oracle.regions):
            before = max(start - MiB, 0)
            after = min(start + len(content) + MiB, oracle.size)
            reader.verify(what, ((before + at, length) for at, length
                                 in whole_disk(after - before)), oracle)
    count = reader.verify(
        what, random_requests(random.Random(seed), reads, oracle), oracle)
    reader.close()
    return count
