# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Servers whose file cannot be read or written, or which are killed just
when they read or write it; see fault-preload.c."""

import errno
import json
import mmap
import os
import random
import re
import struct

import disks
import persist
import qf
from persist import our_runs
from qf import KiB, MiB

READ, WRITE, SYNC, RESIZE, SHORT, KILL = 1, 2, 4, 8, 16, 32
ANY_WRITE = WRITE | SYNC | RESIZE
FOR_EVER = 1 << 30

SIZE = 64 * MiB
NAMES = {"b": 4 * KiB, "large": 512}


def with_preload(tmp):
    """(nbdkit, environment) to preload fault-preload.so, behind what a
    sanitizer wants to be first."""
    build = os.path.dirname(qf.nbdkit())
    shim = os.path.join(build, "tests", ".libs", "fault-preload.so")
    qf.check(os.path.exists(shim), f"{shim}: not built; run make check")
    with open(qf.nbdkit()) as file:
        script = file.read()
    changed = re.sub(r"(env LD_PRELOAD=\S+)", r"\1:" + shim, script)
    if changed == script:
        return qf.nbdkit(), {"LD_PRELOAD": shim}
    path = os.path.join(tmp, "nbdkit-faults")
    with open(path, "w") as file:
        file.write(changed)
    os.chmod(path, 0o755)
    return path, {}


class Faults:
    """What fails, in servers that are started with the environment env."""

    def __init__(self, tmp, path):
        control = os.path.join(tmp, "faults")
        with open(control, "wb") as file:
            file.truncate(4096)
        with open(control, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 4096)
        self.nbdkit, self.env = with_preload(tmp)
        self.env = {**self.env, "FAULT_CONTROL": control, "FAULT_PATH": path}

    def set(self, calls, skip=0, times=1, error=errno.EIO):
        self.put(0, 0)          # the rest is not seen before it is complete
        for index, value in ((1, error), (2, skip), (3, times), (4, 0)):
            self.put(index, value)
        self.put(0, calls)

    def put(self, index, value):
        struct.pack_into("=i", self.map, index * 4, value)

    def off(self):
        """Returns how often something has failed."""
        self.put(0, 0)
        return struct.unpack_from("=i", self.map, 16)[0]

    def hits(self):
        return struct.unpack_from("=i", self.map, 16)[0]


class Disk:
    """A disk and its sidecar, with faults in a server."""

    def __init__(self, tmp, name, *parameters):
        self.tmp = tmp
        self.parameters = parameters
        self.disk = persist.make_disk(os.path.join(tmp, name + ".raw"), SIZE)
        self.side = os.path.join(tmp, name + ".qcow2")
        self.faults = Faults(tmp, self.side)
        self.rng = random.Random(name)
        self.writes = []
        self.guest = None

    def arguments(self, *more):
        return ["file", self.disk, "bitmap-store=" + self.side,
                *self.parameters, *more]

    def __enter__(self):
        os.environ["NBDKIT"], self.saved = self.faults.nbdkit, qf.nbdkit()
        try:
            self.server = persist.start(
                self.tmp, *self.arguments(
                    "bitmap-sync=0", "bitmap-intent-granularity=64k",
                    "dirty-bitmap=b,persistent=on,granularity=4k",
                    "dirty-bitmap=large,persistent=on,granularity=512"),
                env=self.faults.env)
        finally:
            os.environ["NBDKIT"] = self.saved
        self.control = self.server.control
        return self

    def __exit__(self, kind, *_):
        self.faults.off()
        try:
            if kind is None:
                self.server.stop()
            else:
                print(self.server.log()[-3000:], flush=True)
        finally:
            self.server.kill()

    def write(self, at=None):
        """In a region of its own."""
        if at is None:
            at = self.rng.randrange(SIZE // 512) * 512
        # What is begun may be done, though it fails.
        self.writes.append((at, 512))
        self.guest.pwrite(b"x" * 512, at)

    def connect(self):
        self.guest = self.server.connect()

    def leave(self):
        self.guest.shutdown()
        self.guest = None

    def is_clean(self):
        return persist.INTENT not in persist.info(self.side)

    def state(self):
        bitmaps = self.control.bitmaps()
        return bitmaps, persist.digests(self.control, bitmaps)

    def check_complete(self, names=NAMES):
        """Nothing that has reached the disk is missing."""
        content = disks.map_file(self.disk)
        done = [(at, count) for at, count in self.writes
                if content[at:at + count] != bytes(count)]
        for name in names:
            persist.within(name, persist.granules(done, NAMES[name], SIZE),
                           our_runs(self.server, name))

    def check_file(self):
        """With the server gone, or inactive."""
        found = persist.info(self.side)
        qf.check(persist.INTENT not in found, f"an intent is left: {found}")
        no_corruption(self.side)

    def check_agreed(self, state):
        """The file has what was in memory; and that is right."""
        bitmaps, sums = state
        self.check_file()
        found = persist.info(self.side)
        qf.equal("bitmaps", {n: (g, "auto" in f)
                             for n, (g, f) in found.items()},
                 {n: (b["granularity"], b["recording"])
                  for n, b in bitmaps.items()})
        qf.equal("digests", persist.qemu_digests(self.tmp, self.side,
                                                 bitmaps), sums)
        for name, g in NAMES.items():
            qf.equal(name, persist.qemu_runs(self.tmp, self.side, name),
                     persist.granules(self.writes, g, SIZE))


def no_corruption(path):
    """Clusters may have leaked: returns how many."""
    done = qf.run([qf.tool("qemu-img"), "check", "-U", "-f", "qcow2",
                   "--output=json", path], ok=None)
    qf.check(done.returncode in (0, 3), f"{done.stdout}{done.stderr}")
    return json.loads(done.stdout).get("leaks", 0)
