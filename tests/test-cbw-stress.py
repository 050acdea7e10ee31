#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Snapshots under load: every copy of a view is the disk at the instant
when the snapshot was made.

The model is a bytearray, in which writes are done as well.  Writers take
turns only where they overlap; at the instant of a snapshot they pause,
except in the last part, which finds the instant by the order of writes.

QF_STRESS_SECONDS is how long each part runs, QF_STRESS_SEED the first of
the seeds.
"""

import os
import random
import time

import cbw
import qf
import qmp
from qf import KiB, MiB

SECONDS = float(os.environ.get("QF_STRESS_SECONDS", "4"))
SEED = int(os.environ.get("QF_STRESS_SEED", "1"))
WRITERS, READERS = 8, 4
SIZE = 6 * MiB + 1536


def read_view(handle, name, expected, rng):
    """A copy of the whole view, in pieces of any size and order."""
    step = rng.choice((64 * KiB, 100000, 256 * KiB, 2 * MiB))
    pieces = list(range(0, SIZE, step))
    rng.shuffle(pieces)
    for at in pieces:
        count = min(step, SIZE - at)
        cbw.compare(name, handle.pread(count, at), expected[at:at + count], at)


def check_map(handle, name, expected):
    for start, end, kind in cbw.read_map(handle):
        qf.check(kind != cbw.HOLE, f"{name}: {start} - {end} is inaccessible")
        qf.check(not kind & cbw.ZERO or not any(expected[start:end]),
                 f"{name}: {start} - {end} is no zeroes")


def read_some(server, snapshots, rng):
    """What a reader does again and again, with a connection of its own."""
    name, expected = rng.choice(snapshots)
    handle = server.connect("snapshot/" + name)
    if rng.random() < 0.25:
        check_map(handle, name, expected)
    read_view(handle, name, expected, rng)
    handle.shutdown()


def come_and_go(server, path, model, rng):
    """A snapshot that lives but a moment; its reader may be late."""
    control = qmp.Client(path)
    with model.pause() as expected:
        cbw.create(control, "brief")
    handle = server.connect("snapshot/brief")
    late = server.connect("snapshot/brief")
    check_map(handle, "brief", expected)
    read_view(handle, "brief", expected, rng)
    handle.shutdown()
    cbw.delete(control, "brief")
    cbw.fails(late.pread, 512, 0)
    late.shutdown()
    control.close()


def stress(tmp, seed, plugin, targets, cluster):
    rng = random.Random(seed)
    model = cbw.Model(rng, SIZE)
    path = os.path.join(tmp, "qmp")
    snapshots = []
    load = cbw.Load(SECONDS)
    with cbw.served(tmp, *plugin, f"cbw-cluster-size={cluster}") \
            as (server, control):
        guest = server.connect()
        for at in range(0, SIZE, MiB):
            guest.pwrite(model.data[at:at + MiB], at)
        # The holes are holes.
        for at in range(0, SIZE - 2 * MiB, 64 * KiB):
            if not any(model.data[at:at + 64 * KiB]):
                guest.trim(64 * KiB, at)
        handles = [guest] + [server.connect() for _ in range(WRITERS - 1)]
        for number, target in enumerate(targets):
            with model.pause() as expected:
                cbw.create(control, f"s{number}", **target)
                snapshots.append((f"s{number}", expected))
            if number == 0:
                for handle in handles:
                    load.start(cbw.random_write, handle, model,
                               random.Random(rng.random()))
                for _ in range(READERS):
                    load.start(read_some, server, snapshots,
                               random.Random(rng.random()))
                load.start(come_and_go, server, path, model,
                           random.Random(rng.random()))
            time.sleep(SECONDS / 10)
        load.finish()
        cbw.compare("the disk", cbw.read_all(guest), bytes(model.data), 0)
        for name, expected in snapshots:
            view = server.connect("snapshot/" + name)
            check_map(view, name, expected)
            cbw.compare(name, cbw.read_all(view), expected, 0)
            view.shutdown()
        for handle in handles:
            handle.shutdown()
    print(f"seed {seed}, clusters of {cluster}: {load.counts}", flush=True)
    qf.check(load.counts.get("random_write", 0) > 20 and
             load.counts.get("read_some", 0) > 0, "that was no load")


FILES = [{}, {"cbw-timeout": 60}, {"on-cbw-error": "break-snapshot"}]


def files(tmp, cluster):
    return [*FILES[:2], {"target": os.path.join(tmp, f"target{cluster}")}]


def test_memory(tmp):
    stress(tmp, SEED, ["memory", str(SIZE)], files(tmp, 1), "64k")
    stress(tmp, SEED + 1, ["memory", str(SIZE)], FILES, "4k")


def make_file(tmp):
    path = os.path.join(tmp, "disk.raw")
    with open(path, "wb") as file:
        file.truncate(SIZE)
    return path


def test_file(tmp):
    stress(tmp, SEED + 2, ["file", make_file(tmp)], files(tmp, 2), "64k")
    stress(tmp, SEED + 3, ["file", make_file(tmp)], files(tmp, 3), "1M")


def test_slow(tmp):
    """Requests of the disk take their time, and so overlap."""
    below = os.path.join(tmp, "below")
    os.mkdir(below)
    with qf.serve(below, "--filter=delay", "memory", str(SIZE),
                  "delay-read=3ms", "delay-write=2ms", "delay-extents=2ms") \
            as slow:
        stress(tmp, SEED + 4, ["nbd", "socket=" + slow.sock], files(tmp, 4),
               "64k")


def test_servers(tmp):
    """Targets on NBD servers: slow, and of another format."""
    below = os.path.join(tmp, "servers")
    os.mkdir(below)
    with qf.serve(below, "--filter=delay", "memory", str(SIZE),
                  "delay-write=3ms", "delay-read=1ms") as slow, \
            cbw.qemu_nbd(below, 8 * MiB) as qcow2:
        stress(tmp, SEED + 5, ["memory", str(SIZE)],
               [{"target": slow.uri()}, {"target": qcow2, "cbw-timeout": 60},
                {}], "64k")


# ------------------------------------------- the instant, under load

BLOCK = 512
SHARE = 1600                     # blocks of a writer


class Sequence:
    """A writer that notes when each of its writes began and ended."""

    def __init__(self, server, number, load, rng):
        self.handle = server.connect()
        self.base = number * SHARE * BLOCK
        self.rng = rng
        self.load = load
        self.times = []
        self.writes = []
        load.start(self.write)

    def write(self):
        number = len(self.writes) + 1
        first = self.rng.randrange(SHARE)
        n = min(self.rng.choice((1, 3, 300)), SHARE - first)
        self.writes.append((first, n))
        self.times.append([time.monotonic(), float("inf")])
        self.handle.pwrite(number.to_bytes(8, "little") * (BLOCK // 8 * n),
                           self.base + first * BLOCK)
        self.times[-1][1] = time.monotonic()

    def included(self, view):
        """How many of the writes are in the view: exactly the first."""
        data = bytes(view.pread(SHARE * BLOCK, self.base))
        stamps = [int.from_bytes(data[i:i + 8], "little")
                  for i in range(0, len(data), 8)]
        n = max(stamps)
        blocks = [0] * SHARE
        for number, (first, count) in enumerate(self.writes[:n], 1):
            blocks[first:first + count] = [number] * count
        qf.check(stamps == [b for b in blocks for _ in range(BLOCK // 8)],
                 f"the view is not the disk after {n} writes")
        return n


def check_instant(sequences, view, begun, ended):
    """All writes in the view began before all others ended."""
    counts = [s.included(view) for s in sequences]
    last_in = max([s.times[n - 1][0] for s, n in zip(sequences, counts) if n],
                  default=0)
    # A write is not followed by one of the same writer that hides it, as
    # the writer had to wait: so the first that is missing is the next.
    first_out = min([s.times[n][1] for s, n in zip(sequences, counts)
                     if n < len(s.times)], default=float("inf"))
    qf.check(last_in <= first_out, "a write is missing that had ended before "
             "another began that is there")
    qf.check(last_in <= ended, "a write is there that came later")
    qf.check(first_out >= begun, "a write is missing that had ended before")


def instants(tmp, *plugin):
    rng = random.Random(SEED)
    load = cbw.Load(SECONDS)
    made = []
    with cbw.served(tmp, *plugin) as (server, control):
        sequences = [Sequence(server, i, load, random.Random(rng.random()))
                     for i in range(WRITERS)]
        while load.going():
            name = f"i{len(made)}"
            begun = time.monotonic()
            cbw.create(control, name)
            ended = time.monotonic()
            view = server.connect("snapshot/" + name)
            made.append((name, begun, ended, cbw.read_all(view)))
            view.shutdown()
            time.sleep(SECONDS / 20)
        load.finish()
        for name, begun, ended, first in made:
            view = server.connect("snapshot/" + name)
            cbw.compare(name, cbw.read_all(view), first, 0)
            check_instant(sequences, view, begun, ended)
            view.shutdown()
        for sequence in sequences:
            sequence.handle.shutdown()
    print(f"{len(made)} snapshots, {load.counts} writes")


def test_instant(tmp):
    size = str(WRITERS * SHARE * BLOCK)
    instants(tmp, "memory", size)
    # Here most writes are still copying when the next snapshot is made.
    below = os.path.join(tmp, "instant")
    os.mkdir(below)
    with qf.serve(below, "--filter=delay", "memory", size,
                  "delay-read=5ms", "delay-write=20ms") as slow:
        instants(tmp, "nbd", "socket=" + slow.sock)


def test(tmp):
    qf.need("qemu-nbd", "qemu-img")
    qf.need_plugins("nbd")
    qf.parts(tmp, test_memory, test_file, test_slow, test_servers,
             test_instant)


qf.main(test)
