# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""What the tests of the cbw filter share."""

import contextlib
import os
import subprocess
import time

import qf                       # first: it skips where there is no nbd
import qmp
import nbd

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
