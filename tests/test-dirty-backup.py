#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Incremental backups with stock clients, and points in time under load."""

import bisect
import os
import random
import re
import threading

import nbd
import qf
import qmp
from qf import KiB, MiB

GENERATIONS = 3 if qf.SLOW else 10
ROTATIONS = 60 if qf.SLOW else 1000
SIZE = 32 * MiB + 512


def write_randomly(handle, rng, number=25):
    size = handle.get_size()
    for _ in range(number):
        count = rng.choice((1, 512, 5000, 64 * KiB, 300 * KiB))
        offset = rng.randrange(size - count + 1)
        kind = rng.randrange(5)
        if kind < 3:
            handle.pwrite(rng.randbytes(count), offset)
        elif kind == 3:
            handle.zero(count, offset)
        else:
            handle.trim(count, offset)


def make_disk(path):
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE - MiB, 3 * MiB):
            file.seek(at)
            file.write(random.Random(at).randbytes(MiB))


def rotate(control, old, new, node="disk"):
    """The old bitmap stops, the new one begins, between two writes."""
    control.transaction([
        ("block-dirty-bitmap-disable", {"node": node, "name": old}),
        ("block-dirty-bitmap-add", {"node": node, "name": new})])


class Backup:
    """A disk being served, and what the flows have in common."""

    def __init__(self, tmp, *parameters):
        self.tmp = tmp
        self.disk = os.path.join(tmp, "disk.raw")
        self.log = os.path.join(tmp, "log")
        self.control_path = os.path.join(tmp, "qmp")
        make_disk(self.disk)
        self.rng = random.Random(7)
        self.context = qf.serve(
            tmp, "--filter=dirty-tracking", "--filter=log", "file", self.disk,
            "dirty-bitmap=b0", "logfile=" + self.log,
            "qmp=" + self.control_path, *parameters)

    def __enter__(self):
        self.server = self.context.__enter__()
        self.control = qmp.Client(self.control_path)
        self.guest = self.server.connect()
        return self

    def __exit__(self, *args):
        self.guest.shutdown()
        self.control.close()
        return self.context.__exit__(*args)

    def dirty_ranges(self, bitmap):
        ranges = []

        def add(_, offset, entries, __):
            for length, kind in zip(entries[::2], entries[1::2]):
                if kind == 0:
                    ranges.append((offset, offset + length))
                offset += length

        view = self.server.connect("dirty/" + bitmap)
        view.block_status(SIZE, 0, add)
        view.shutdown()
        return ranges

    def check_reads(self, position, ranges):
        """Since then only dirty areas were read, but for the probing of
        formats at the beginning of the disk."""
        with open(self.log) as log:
            log.seek(position)
            text = log.read()
        starts = [start for start, _ in ranges]
        read = 0
        for match in re.finditer(r"Read id=\d+ offset=(0x\w+) count=(0x\w+)",
                                 text):
            offset, count = (int(group, 16) for group in match.groups())
            i = bisect.bisect_right(starts, offset) - 1
            qf.check(offset < 64 * KiB or
                     (i >= 0 and offset + count <= ranges[i][1]),
                     f"{count} bytes at {offset} were read, but are clean; "
                     f"dirty there: {ranges[max(i - 1, 0):i + 2]}")
            read += 1
        qf.check(read > 0, f"no reads in the log: {text[:1000]}")


def generations(backup, copy):
    """Write, rotate, copy what is dirty; copy (old, number) compares."""
    for number in range(GENERATIONS):
        write_randomly(backup.guest, backup.rng)
        old, new = f"b{number}", f"b{number + 1}"
        rotate(backup.control, old, new)
        ranges = backup.dirty_ranges(old)
        position = os.path.getsize(backup.log)
        copy(old, number)
        backup.check_reads(position, ranges)
        backup.control.when_free("block-dirty-bitmap-remove", node="disk",
                                 name=old)


def test_qemu_img(tmp):
    """A chain of incremental images, as the default of dirty-clean has
    it.  In the maps of dirty areas holes are zeroes."""
    with Backup(tmp) as backup:
        chain = [os.path.join(tmp, "full.qcow2")]
        qf.qemu_img("convert", "-f", "raw", "-O", "qcow2",
                    backup.server.uri(), chain[0])

        def copy(old, number):
            image = os.path.join(tmp, f"inc{number}.qcow2")
            qf.qemu_img("convert", "-f", "raw", "-O", "qcow2",
                        "-B", chain[-1], "-F", "qcow2",
                        backup.server.uri("dirty/" + old), image)
            chain.append(image)
            qf.qemu_img("compare", "-f", "raw", "-F", "qcow2", backup.disk,
                        image)
        generations(backup, copy)


def test_nbdcopy(tmp):
    """One copy is brought up to date, again and again.  nbdcopy rounds
    what it reads out to its request size."""
    with Backup(tmp, "dirty-clean=zero") as backup:
        target = os.path.join(tmp, "copy.raw")
        qf.run(["cp", backup.disk, target])

        def copy(old, _):
            qf.run([qf.tool("nbdcopy"), "--destination-is-zero", "--sparse=0",
                    "--request-size=65536", backup.server.uri("dirty/" + old), "--", "[",
                    qf.nbdkit(), "file", target, "]"])
            qf.run(["cmp", backup.disk, target])
        generations(backup, copy)


def test_failed_backup(tmp):
    """What a backup that failed did not copy is merged into the next."""
    with Backup(tmp) as backup:
        full = os.path.join(tmp, "full.qcow2")
        qf.qemu_img("convert", "-f", "raw", "-O", "qcow2",
                    backup.server.uri(), full)
        write_randomly(backup.guest, backup.rng)
        rotate(backup.control, "b0", "b1")
        lost = backup.server.connect("dirty/b0")
        lost.pread(512, 0)
        del lost                # without any farewell
        write_randomly(backup.guest, backup.rng)
        backup.control("block-dirty-bitmap-merge", node="disk", target="b1",
                       bitmaps=["b0"])
        backup.control.when_free("block-dirty-bitmap-remove", node="disk",
                                 name="b0")
        rotate(backup.control, "b1", "b2")
        image = os.path.join(tmp, "inc.qcow2")
        qf.qemu_img("convert", "-f", "raw", "-O", "qcow2", "-B", full,
                    "-F", "qcow2", backup.server.uri("dirty/b1"), image)
        qf.qemu_img("compare", "-f", "raw", "-F", "qcow2", backup.disk, image)


# -------------------------------------------------- points in time

BLOCK = 512
DISK_BLOCKS = 1 << 16


class Writer(threading.Thread):
    """Writes each block of its share once, in random order, and notes
    between which transactions it did so: after the one that had ended
    before the request, before the one that had begun at the reply."""

    def __init__(self, server, disk, share, clock):
        super().__init__()
        self.handle = server.connect(disk)
        self.disk = disk
        self.clock = clock
        self.blocks = share
        self.notes = []         # (block, ended, begun)
        self.error = None

    def run(self):
        try:
            for block in self.blocks:
                if self.clock.stopped:
                    break
                ended = self.clock.ended
                self.handle.pwrite(b"w" * BLOCK, block * BLOCK)
                self.notes.append((block, ended, self.clock.begun))
            self.handle.shutdown()
        except nbd.Error as error:
            self.error = error


class Clock:
    begun = ended = 0            # transactions
    stopped = False


def rotate_all(control, clock):
    """Rotate the bitmaps of both disks, many times; some transactions
    fail, and change nothing."""
    for number in range(ROTATIONS):
        old, new = f"g{number}", f"g{number + 1}"
        actions = []
        for node in ("one", "two"):
            actions += [
                ("block-dirty-bitmap-disable", {"node": node, "name": old}),
                ("block-dirty-bitmap-add",
                 {"node": node, "name": new, "granularity": BLOCK})]
        if number % 10 == 0:
            bad = [("abort", {})] if number % 20 else \
                [("block-dirty-bitmap-clear", {"node": "two", "name": "no"})]
            try:
                control.transaction(actions + bad)
            except qmp.Error:
                pass
            else:
                raise qf.Fail("a transaction with a bad action succeeded")
            for node in ("one", "two"):
                bitmaps = control.bitmaps(node)
                qf.check(new not in bitmaps, f"{new} was added")
                qf.check(bitmaps[old]["recording"], f"{old} was disabled")
        clock.begun = number + 1
        control.transaction(actions)
        clock.ended = number + 1
    clock.stopped = True


def blocks_of(server, disk, bitmap):
    blocks = set()

    def add(_, offset, entries, __):
        for length, kind in zip(entries[::2], entries[1::2]):
            if kind != nbd.STATE_HOLE:
                blocks.update(range(offset // BLOCK,
                                    (offset + length) // BLOCK))
            offset += length

    view = server.connect(f"{disk}/dirty/{bitmap}")
    view.block_status(DISK_BLOCKS * BLOCK, 0, add)
    view.shutdown()
    return blocks


def verify_generations(server, writers):
    """Each write is in one bitmap, on the right side of each point."""
    where = {"one": {}, "two": {}}
    for disk, found in where.items():
        for number in range(ROTATIONS + 1):
            for block in blocks_of(server, disk, f"g{number}"):
                qf.check(block not in found,
                         f"block {block} is in g{found.get(block)} and "
                         f"g{number}")
                found[block] = number
    for writer in writers:
        found = where[writer.disk]
        for block, ended, begun in writer.notes:
            qf.check(block in found, f"block {block} is in no bitmap")
            qf.check(ended <= found.pop(block) <= begun,
                     f"block {block} is in the wrong bitmap")
    qf.equal("blocks that nobody wrote", [len(f) for f in where.values()],
             [0, 0])


def test_transactions(tmp):
    directory = os.path.join(tmp, "dir")
    path = os.path.join(tmp, "qmp")
    os.mkdir(directory)
    for name in ("one", "two"):
        with open(os.path.join(directory, name), "wb") as file:
            file.truncate(DISK_BLOCKS * BLOCK)
    with qf.serve(tmp, "--filter=dirty-tracking", "file", "dir=" + directory,
                  f"dirty-bitmap=g0,granularity={BLOCK}", "qmp=" + path) \
         as server:
        clock = Clock()
        rng = random.Random(3)
        writers = []
        for name in ("one", "two"):
            blocks = rng.sample(range(DISK_BLOCKS), DISK_BLOCKS)
            writers += [Writer(server, name, blocks[i::4], clock)
                        for i in range(4)]
        control = qmp.Client(path)
        for writer in writers:
            writer.start()
        try:
            rotate_all(control, clock)
        finally:
            clock.stopped = True
            for writer in writers:
                writer.join()
        for writer in writers:
            qf.check(not writer.error, f"{writer.error}")
        total = sum(len(writer.notes) for writer in writers)
        last = max(note[1] for w in writers for note in w.notes)
        print(f"{total} writes, {ROTATIONS} transactions, {last} of them "
              "before the last write")
        qf.check(total > ROTATIONS, f"only {total} writes")
        verify_generations(server, writers)
        control.close()


def test(tmp):
    qf.need("qemu-img", "nbdcopy")
    qf.parts(tmp, test_qemu_img, test_nbdcopy, test_failed_backup,
             test_transactions)


qf.main(test)
