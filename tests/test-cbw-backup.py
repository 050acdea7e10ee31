#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Incremental backups of one point in time each, of a disk that is written
all the time: one transaction makes a snapshot, starts a new bitmap and
stops the old one, then qemu-img copies snapshot/NAME/dirty/OLD.

QF_GENERATIONS is the number of generations in a chain.
"""

import os
import random

import cbw
import qf
from qf import KiB, MiB

GENERATIONS = int(os.environ.get("QF_GENERATIONS", "4" if qf.SLOW else "20"))
SIZE = 16 * MiB
WRITERS = 4


class Disk:
    """A disk under load, and its backups."""

    def __init__(self, tmp, server, control):
        self.tmp, self.server, self.control = tmp, server, control
        self.rng = random.Random(5)
        self.model = cbw.Model(self.rng, SIZE)
        self.handles = [server.connect() for _ in range(WRITERS)]
        for at in range(0, SIZE, MiB):
            self.handles[0].pwrite(self.model.data[at:at + MiB], at)
        self.load = cbw.Load(300)

    def start(self):
        for handle in self.handles:
            self.load.start(self.write_slowly, handle,
                            random.Random(self.rng.random()))

    def write_slowly(self, handle, rng):
        cbw.random_write(handle, self.model, rng)

    def stop(self):
        self.load.end = 0
        self.load.finish()
        for handle in self.handles:
            handle.shutdown()

    def begin(self, number):
        """What is on the disk when snapshot s is made."""
        with self.model.pause() as expected:
            self.control.transaction([
                ("cbw-snapshot-create", {"node": "disk", "name": "s"}),
                ("block-dirty-bitmap-add",
                 {"node": "disk", "name": f"b{number + 1}"}),
                ("block-dirty-bitmap-disable",
                 {"node": "disk", "name": f"b{number}"})])
        return expected

    def image(self, name):
        return os.path.join(self.tmp, name + ".qcow2")

    def copy(self, export, image, backing=None):
        qf.qemu_img("convert", "-f", "raw", "-O", "qcow2",
                    *(["-B", backing, "-F", "qcow2"] if backing else []),
                    self.server.uri(export), image)

    def compare(self, image, expected):
        raw = os.path.join(self.tmp, "expected.raw")
        with open(raw, "wb") as file:
            file.write(expected)
        qf.qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)

    def full(self):
        """The first generation is a copy of all of it."""
        expected = self.begin(-1)
        self.copy("snapshot/s", self.image("full"))
        self.compare(self.image("full"), expected)
        self.end(-1)

    def end(self, number):
        cbw.delete(self.control, "s")
        self.control.when_free("block-dirty-bitmap-remove", node="disk",
                               name=f"b{number}")


def served(tmp, *parameters):
    return cbw.served(tmp, "memory", str(SIZE), "dirty-bitmap=b-1",
                      "dirty-granularity=32k", *parameters)


def test_generations(tmp):
    with served(tmp) as (server, control):
        disk = Disk(tmp, server, control)
        disk.start()
        disk.full()
        below = disk.image("full")
        for number in range(GENERATIONS):
            expected = disk.begin(number)
            image = disk.image(f"inc{number}")
            disk.copy(f"snapshot/s/dirty/b{number}", image, below)
            disk.compare(image, expected)
            disk.end(number)
            below = image
        print(f"{GENERATIONS} generations, {disk.load.counts}")
        disk.stop()


def test_failed_backup(tmp):
    """A client that goes away in the middle: what its bitmap has is merged
    into the new one, and the next backup is complete."""
    with served(tmp) as (server, control):
        disk = Disk(tmp, server, control)
        disk.start()
        disk.full()
        for number in range(0, 6, 2):
            disk.begin(number)
            lost = server.connect(f"snapshot/s/dirty/b{number}")
            lost.pread(MiB, 0)
            del lost            # without any farewell
            control("block-dirty-bitmap-merge", node="disk",
                    target=f"b{number + 1}", bitmaps=[f"b{number}"])
            disk.end(number)
            expected = disk.begin(number + 1)
            image = disk.image(f"next{number}")
            below = disk.image(f"next{number - 2}" if number else "full")
            disk.copy(f"snapshot/s/dirty/b{number + 1}", image, below)
            disk.compare(image, expected)
            disk.end(number + 1)
        disk.stop()


def test_bitmap_limited(tmp):
    """A snapshot that covers only what is dirty copies less, and serves
    the same backup."""
    with served(tmp) as (server, control):
        disk = Disk(tmp, server, control)
        disk.full()
        for at in range(0, 4 * MiB, MiB):
            disk.handles[0].pwrite(b"d" * 64 * KiB, at)
            disk.model.data[at:at + 64 * KiB] = b"d" * 64 * KiB
        expected = bytes(disk.model.data)
        control.transaction([
            ("cbw-snapshot-create", {"node": "disk", "name": "s",
                                     "bitmap": "b0"}),
            ("block-dirty-bitmap-add", {"node": "disk", "name": "b1"}),
            ("block-dirty-bitmap-disable", {"node": "disk", "name": "b0"})])
        disk.handles[0].pwrite(b"e" * 8 * MiB, 0)
        info = cbw.query(control, "s")
        qf.equal("copied", info["bytes-copied"], 4 * 64 * KiB)
        qf.equal("accessible", info["bytes-accessible"], 4 * 64 * KiB)
        image = disk.image("limited")
        disk.copy("snapshot/s/dirty/b0", image, disk.image("full"))
        disk.compare(image, expected)
        disk.stop()


def test_transactions(tmp):
    """All or nothing, also where the snapshot is what fails."""
    with served(tmp) as (server, control):
        good = ("cbw-snapshot-create", {"node": "disk", "name": "s"})
        add = ("block-dirty-bitmap-add", {"node": "disk", "name": "x"})
        for actions in ([good, add, ("abort", {})],
                        [add, good, good],
                        [add, ("cbw-snapshot-create",
                               {"node": "disk", "name": "s",
                                "bitmap": "none"})],
                        [add, ("cbw-snapshot-create",
                               {"node": "disk", "name": "s",
                                "target": "/nonexistent/target"})]):
            try:
                control.transaction(actions)
            except qf.Fail:
                pass
            else:
                raise qf.Fail(f"{actions} came to pass")
            qf.equal("snapshots", control("query-cbw-snapshots"), [])
            qf.check("x" not in control.bitmaps(), "x was added")
        # Each action sees what those before it did.
        control.transaction([add, good, (
            "block-dirty-bitmap-remove", {"node": "disk", "name": "x"})])
        server.connect("snapshot/s/dirty/x").shutdown()
        qf.check("x" not in control.bitmaps(), "x is still there")


def test(tmp):
    qf.need("qemu-img")
    qf.parts(tmp, test_generations, test_failed_backup, test_bitmap_limited,
             test_transactions)


qf.main(test)
