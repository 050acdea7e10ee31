# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""What the tests of the cbw filter share."""

import contextlib
import os
import subprocess
import threading
import time

import qf                       # first: it skips where there is no nbd
import qmp
import nbd
from qf import KiB, MiB

HOLE, ZERO = 1, 2


@contextlib.contextmanager
def served(tmp, *args, before=(), **more):
    """A server with cbw above dirty-tracking, and a QMP client of it.
    args: the plugin and parameters; before: options of nbdkit's."""
    control_path = os.path.join(tmp, "qmp")
    with qf.serve(tmp, *before, "--filter=cbw", "--filter=dirty-tracking",
                  *args, "qmp=" + control_path, **more) as server:
        control = qmp.Client(control_path)
        try:
            yield server, control
        finally:
            control.close()


def create(control, name, node="disk", **arguments):
    return control("cbw-snapshot-create", node=node, name=name, **arguments)


def delete(control, name, node="disk"):
    return control("cbw-snapshot-delete", node=node, name=name)


def query(control, name, node="disk"):
    for info in control("query-cbw-snapshots"):
        if info["name"] == name and info["node"] == node:
            return info
    raise qf.Fail(f"there is no snapshot {name} of {node}")


def read_all(handle, step=1 << 20):
    size = handle.get_size()
    return b"".join(bytes(handle.pread(min(step, size - at), at))
                    for at in range(0, size, step))


def read_map(handle, offset=0, end=None):
    """[[start, end, type]], adjacent ones of one type together."""
    end = handle.get_size() if end is None else end
    runs = []

    def add(_, at, entries, __):
        for length, kind in zip(entries[::2], entries[1::2]):
            if runs and runs[-1][2] == kind and runs[-1][1] == at:
                runs[-1][1] += length
            else:
                runs.append([at, at + length, kind])
            at += length

    while offset < end:
        handle.block_status(min(end - offset, 1 << 30), offset, add)
        offset = runs[-1][1]
    return runs


def fails(function, *args, errno=None):
    """The request fails, with this error."""
    try:
        function(*args)
    except nbd.Error as error:
        qf.check(errno is None or error.errno == errno,
                 f"{function.__name__} {args[1:]}: {error}, not {errno}")
        return error
    raise qf.Fail(f"{function.__name__} {args[1:]} did not fail")


def wait_until(condition, what, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        qf.check(time.monotonic() < limit, f"{what}: not after {seconds} s")
        time.sleep(0.01)


@contextlib.contextmanager
def qemu_nbd(tmp, size):
    """A target whose format is qcow2: its URI."""
    image = os.path.join(tmp, "target.qcow2")
    sock = os.path.join(tmp, "target.sock")
    qf.qemu_img("create", "-q", "-f", "qcow2", image, str(size))
    process = subprocess.Popen([
        qf.tool("qemu-nbd"), "-t", "-e", "8", "-f", "qcow2",
        "--discard=unmap", "-k", sock, image])
    try:
        wait_until(lambda: os.path.exists(sock), "qemu-nbd")
        yield f"nbd+unix:///?socket={sock}"
    finally:
        process.terminate()
        process.wait()
        os.unlink(image)


# ---------------------------------------------------------------- load

class Model:
    """What the disk holds; ranges are locked while they are written."""

    def __init__(self, rng, size):
        self.data = bytearray(size)
        self.changed = threading.Condition()
        self.busy = []
        self.paused = False
        for at in range(0, size - MiB, MiB + 64 * KiB):
            self.data[at:at + MiB // 2] = rng.randbytes(MiB // 2)

    @contextlib.contextmanager
    def writing(self, offset, count, data):
        key = (offset, offset + count)
        with self.changed:
            while self.paused or any(a < key[1] and key[0] < b
                                     for a, b in self.busy):
                self.changed.wait()
            self.busy.append(key)
        yield
        with self.changed:
            self.data[offset:offset + count] = data
            self.busy.remove(key)
            self.changed.notify_all()

    @contextlib.contextmanager
    def pause(self):
        """Nobody writes; gives what is on the disk."""
        with self.changed:
            while self.paused:
                self.changed.wait()
            self.paused = True
            while self.busy:
                self.changed.wait()
        yield bytes(self.data)
        with self.changed:
            self.paused = False
            self.changed.notify_all()


class Load:
    """Threads that run until the time is over or one of them fails."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds
        self.failures = []
        self.threads = []
        self.counts = {}

    def going(self):
        return not self.failures and time.monotonic() < self.end

    def start(self, function, *args):
        def run():
            try:
                while self.going():
                    name = function.__name__
                    function(*args)
                    self.counts[name] = self.counts.get(name, 0) + 1
            except (qf.Fail, nbd.Error, OSError) as failure:
                self.failures.append(failure)
        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def finish(self):
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


def random_write(handle, model, rng):
    """One write, zero or trim, of odd sizes; some of them are large."""
    size = len(model.data)
    count = rng.choice((1, 512, 4 * KiB, 10000, 64 * KiB, 200 * KiB))
    if rng.random() < 0.02:
        count = rng.randrange(1, 3 * MiB)
    offset = rng.choice((rng.randrange(size - count + 1), size - count,
                         rng.randrange(size - count + 1) // 4096 * 4096))
    kind = rng.randrange(6)
    data = bytes(count) if kind >= 3 else rng.randbytes(count)
    with model.writing(offset, count, data):
        if kind < 3:
            handle.pwrite(data, offset)
        elif kind == 3:
            handle.zero(count, offset)
        elif kind == 4:
            handle.zero(count, offset, nbd.CMD_FLAG_NO_HOLE)
        else:
            # As all plugins here do, trims make zeroes.
            handle.trim(count, offset)


def compare(what, data, expected, offset):
    if data != expected:
        at = next(i for i, (a, b) in enumerate(zip(data, expected)) if a != b)
        raise qf.Fail(f"{what} differs at offset {offset + at}")
