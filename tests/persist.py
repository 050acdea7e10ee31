# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""What the tests of bitmap-persist share: servers, and what QEMU reads.

A sidecar, or an image, is called a store here; its bitmaps are compared
as lists of [start, end] in bytes of what is dirty.
"""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time

import qcow2edit as edit
import qf
import qmp
from qf import MiB, GiB

INTENT = "nbdkit-write-intent"
BITMAPS = 0x23852875            # the header extension
IN_USE, AUTO = 1, 2
HOLE = 1

FILTERS = ("--filter=dirty-tracking", "--filter=bitmap-persist")


# -------------------------------------------------------------- servers

def start(tmp, *args, filters=FILTERS, env=None):
    """A server, with a QMP client as its member control."""
    path = os.path.join(tempfile.mkdtemp(prefix="q", dir=tmp), "q")
    server = qf.Server(tmp, [*filters, *args, "qmp=" + path], env)
    server.control = qmp.Client(path)
    return server


@contextlib.contextmanager
def serve(tmp, *args, filters=FILTERS, env=None):
    path = os.path.join(tempfile.mkdtemp(prefix="q", dir=tmp), "q")
    with qf.serve(tmp, *filters, *args, "qmp=" + path, env=env) as server:
        server.control = qmp.Client(path)
        yield server
        server.control.close()


def fails(*args, words, filters=FILTERS):
    """The server does not start, and says why."""
    done = qf.run([qf.nbdkit(), "-U", "-", *filters, *args, "--run", "true"],
                  ok=None)
    qf.check(done.returncode == 1, f"{args}: status {done.returncode}: "
             f"{done.stderr}")
    for word in words:
        qf.check(word in done.stderr, f"{args}: no {word!r} in {done.stderr}")


def until(what, condition, seconds=60):
    """Wait until it is so."""
    limit = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        qf.check(time.monotonic() < limit, f"not so after {seconds} s: "
                 f"{what() if callable(what) else what}")
        time.sleep(0.01)


def write_some(server, writes, byte=b"w"):
    """[(offset, count)], on a connection that then ends."""
    handle = server.connect()
    for offset, count in writes:
        handle.pwrite(byte * count, offset)
    handle.shutdown()


# ----------------------------------------------------------------- sets

def merged(extents):
    """[[start, end]] of dirty (start, length)s in ascending order."""
    runs = []
    for start, length in extents:
        if runs and runs[-1][1] == start:
            runs[-1][1] = start + length
        else:
            runs.append([start, start + length])
    return runs


def our_runs(server, name):
    """As the export dirty/NAME has it."""
    handle = server.connect("dirty/" + name)
    size = handle.get_size()
    dirty = []
    at = 0

    def add(_, offset, entries, __):
        nonlocal at
        for length, kind in zip(entries[::2], entries[1::2]):
            if kind != HOLE:
                dirty.append((offset, length))
            offset += length
        at = offset

    while at < size:
        handle.block_status(min(size - at, 2 * GiB), at, add)
    handle.shutdown()
    return merged(dirty)


def granules(writes, granularity, size):
    """The same of (offset, count)s, as it should be."""
    dirty = set()
    for offset, count in writes:
        dirty.update(range(offset // granularity,
                           (offset + count - 1) // granularity + 1))
    return merged((g * granularity, min(granularity, size - g * granularity))
                  for g in sorted(dirty))


def clipped(runs, size):
    """QEMU's disk may be larger by a part of a sector."""
    return [[start, min(end, size)] for start, end in runs if start < size]


def within(what, runs, larger):
    """All that is dirty in runs is so in the other."""
    position = 0
    for start, end in runs:
        while position < len(larger) and larger[position][1] <= start:
            position += 1
        qf.check(position < len(larger) and larger[position][0] <= start
                 and end <= larger[position][1],
                 f"{what}: [{start}, {end}) is not wholly dirty; there is "
                 f"{larger[max(position - 1, 0):position + 2]}")


# ----------------------------------------------------------------- QEMU

def info(path):
    """{name: (granularity, sorted flags)}, while somebody uses it."""
    data = json.loads(qf.qemu_img("info", "-U", "--output=json", path))
    bitmaps = data["format-specific"]["data"].get("bitmaps", [])
    return {b["name"]: (b["granularity"], sorted(b["flags"]))
            for b in bitmaps}


def checked(path):
    """No corruption, no leak; what somebody changes right now may look
    like one."""
    until(lambda: qf.qemu_img("check", "-U", "-f", "qcow2", path, ok=None),
          lambda: qf.run([qf.tool("qemu-img"), "check", "-U", "-f", "qcow2",
                          path], ok=None).returncode == 0, 10)


def sound(path, inconsistent=()):
    """It is as if nobody had it open: no corruption, no leak, nothing in
    use but those."""
    qf.qemu_img("check", "-q", "-U", "-f", "qcow2", path)
    found = info(path)
    qf.check(INTENT not in found, f"{path}: an intent is left: {found}")
    used = [name for name, (_, flags) in found.items() if "in-use" in flags]
    qf.equal(f"{path}: in use", sorted(used), sorted(inconsistent))


def sound_but_leaks(path):
    """The same after something went wrong, when clusters may leak."""
    done = qf.run([qf.tool("qemu-img"), "check", "-U", "-f", "qcow2", path],
                  ok=None)
    qf.check(done.returncode in (0, 3), f"{path}: {done.stdout}{done.stderr}")
    used = [name for name, (_, flags) in info(path).items()
            if "in-use" in flags or name == INTENT]
    qf.equal(f"{path}: in use", used, [])


@contextlib.contextmanager
def qemu_nbd(tmp, *args):
    """A qemu-nbd; the result is its socket."""
    directory = tempfile.mkdtemp(prefix="n", dir=tmp)
    sock = os.path.join(directory, "s")
    pid = os.path.join(directory, "pid")
    with open(os.path.join(directory, "log"), "w+") as log:
        process = subprocess.Popen(
            [qf.tool("qemu-nbd"), "-f", "qcow2", "-t", "-k", sock,
             "--pid-file", pid, *args], stdin=subprocess.DEVNULL, stderr=log)

        def ready():
            log.seek(0)
            qf.check(process.poll() is None, f"qemu-nbd {args}: {log.read()}")
            return os.path.exists(pid) and os.path.getsize(pid)

        try:
            until("qemu-nbd's start", ready)
            yield sock
        finally:
            process.terminate()
            process.wait()


def qemu_runs(tmp, path, name):
    """What QEMU exports as the dirty bitmap of that name."""
    context = "qemu:dirty-bitmap:" + name
    with qemu_nbd(tmp, "-r", "-B", name, path) as sock:
        out = qf.run([qf.tool("nbdinfo"), "--map=" + context, "--json",
                      f"nbd+unix:///?socket={sock}"]).stdout
    return merged((e["offset"], e["length"]) for e in json.loads(out)
                  if e["type"])


class QemuClient(qmp.Client):
    """QEMU also sends events."""

    def receive(self):
        while True:
            message = super().receive()
            if "event" not in message:
                qf.check("error" not in message or "id" in message,
                         f"{message}")
                return message


class Daemon:
    """A qemu-storage-daemon that has the store open, as a context."""

    def __init__(self, tmp, path, writable=False):
        self.dir = tempfile.mkdtemp(prefix="d", dir=tmp)
        self.sock = os.path.join(self.dir, "s")
        self.qmp = os.path.join(self.dir, "q")
        only = "read-only=" + ("off" if writable else "on")
        args = [qf.tool("qemu-storage-daemon"),
                "--blockdev", f"driver=file,node-name=file,filename={path},"
                + only,
                "--blockdev", f"driver=qcow2,node-name=disk,file=file,{only}",
                "--nbd-server", f"addr.type=unix,addr.path={self.sock}",
                "--export", "nbd,id=e,node-name=disk,name=,writable="
                + ("on" if writable else "off"),
                "--chardev", f"socket,id=c,path={self.qmp},server=on,"
                "wait=off", "--monitor", "chardev=c"]
        with open(os.path.join(self.dir, "log"), "w") as log:
            self.process = subprocess.Popen(args, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)
        try:
            until(self.log, self.listens)
            self.control = QemuClient(self.qmp)
        except qf.Fail:
            self.process.kill()
            self.process.wait()
            raise

    def log(self):
        with open(os.path.join(self.dir, "log")) as log:
            return "qemu-storage-daemon: " + log.read()

    def listens(self):
        qf.check(self.process.poll() is None, self.log())
        return os.path.exists(self.qmp)

    def uri(self):
        return f"nbd+unix:///?socket={self.sock}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end(signal.SIGTERM)

    def end(self, how):
        self.control.close()
        self.process.send_signal(how)
        self.process.wait()


def digests(control, names):
    return {name: control("x-debug-block-dirty-bitmap-sha256", node="disk",
                          name=name)["sha256"] for name in names}


def qemu_digests(tmp, path, names):
    with Daemon(tmp, path) as daemon:
        return digests(daemon.control, names)


def qemu_writes(path, writes, byte=0x71):
    qf.qemu_io(path, [f"write -q -P {byte} {offset} {count}"
                      for offset, count in writes])


# --------------------------------------------------------------- editing

def directory(path):
    """{name: (offset of its entry, flags)} as it is in the file."""
    extension = dict(edit.extensions(path)).get(BITMAPS)
    if not extension:
        return {}
    count, _, _, at = struct.unpack(">IIQQ", extension)
    found = {}
    for _ in range(count):
        _, _, flags, _, _, name, extra = struct.unpack(
            ">QIIBBHI", edit.read_at(path, at, 24))
        found[edit.read_at(path, at + 24 + extra, name).decode()] = at, flags
        at += (24 + name + extra + 7) // 8 * 8
    return found


def put_flags(path, name, flags):
    at, _ = directory(path)[name]
    edit.write_at(path, at + 12, struct.pack(">I", flags))


def snapshot(tmp, path):
    """A copy that QEMU can read though bitmaps were in use."""
    copy = os.path.join(tempfile.mkdtemp(prefix="c", dir=tmp), "copy")
    shutil.copyfile(path, copy)
    for name, (_, flags) in directory(copy).items():
        put_flags(copy, name, flags & ~IN_USE)
    return copy


def stored_runs(tmp, path, name):
    """What the file has of a bitmap at the moment."""
    return qemu_runs(tmp, snapshot(tmp, path), name)


# ----------------------------------------------------------------- files

def make_disk(path, size, seed=None):
    with open(path, "wb") as file:
        file.truncate(size)
        if seed is not None:
            for at in range(0, size, 4 * MiB):
                file.seek(at)
                file.write(bytes([seed]) * min(MiB, size - at))
    return path


def fingerprint(*paths):
    """Content and times of files, to be compared later."""
    found = []
    for path in paths:
        stat = os.stat(path)
        with open(path, "rb") as file:
            found.append((path, stat.st_mtime_ns, stat.st_ctime_ns,
                          stat.st_size, file.read()))
    return found
