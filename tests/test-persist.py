#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The bitmap-persist filter: bitmaps go from us to QEMU and back.

QEMU says what is in a sidecar or an image, and whether it is sound; what
must be dirty follows from the writes.
"""

import os
import random
import signal
import subprocess
import time

import nbd
import persist
import qf
import qmp
from persist import our_runs, qemu_runs
from qf import KiB, MiB, GiB, TiB

ROUNDS = int(os.environ.get("PERSIST_ROUNDS", "2"))
MANY = 60 if qf.SLOW else 300
STEPS = int(os.environ.get("PERSIST_STEPS", "40" if qf.SLOW else "100"))

GRANULARITIES = [1 << bits for bits in range(9, 32)]


def random_writes(rng, number, size):
    """(offset, count)s, some of them at the end."""
    writes = []
    for _ in range(number):
        count = rng.choice((512, 4 * KiB, 60 * KiB, MiB))
        offset = rng.randrange(0, size - count, 512)
        writes.append((offset, count))
    return writes + [(size - 512, 512)]


def paths(tmp, name, size):
    """A disk and a sidecar that does not exist."""
    return (persist.make_disk(os.path.join(tmp, name + ".raw"), size),
            os.path.join(tmp, name + ".qcow2"))


# ------------------------------------------------------------ round trips

def test_granularities(tmp):
    """Each of us writes in turn; all bitmaps of all granularities record
    it all, in whatever program."""
    size = 5 * GiB + 1536
    disk, side = paths(tmp, "granularities", size)
    names = {f"b{g}": g for g in GRANULARITIES}
    made = list(names)[::2]
    arguments = ["file", disk, "bitmap-store=" + side] + \
        [f"dirty-bitmap={n},granularity={names[n]},persistent=on"
         for n in made]
    rng = random.Random(1)
    writes = []
    for number in range(ROUNDS):
        with persist.serve(tmp, *arguments) as server:
            if number == 0:
                for name in names.keys() - set(made):
                    server.control("block-dirty-bitmap-add", node="disk",
                                   name=name, granularity=names[name],
                                   persistent=True)
            check_ours(server, names, writes, size)
            more = random_writes(rng, 30, size)
            persist.write_some(server, more)
            writes += more
            check_ours(server, names, writes, size)
            sums = persist.digests(server.control, names)
        persist.sound(side)
        qf.equal("qemu-img info", persist.info(side),
                 {name: (g, ["auto"]) for name, g in names.items()})
        check_theirs(tmp, side, names, writes, size)
        qf.equal("digests", persist.qemu_digests(tmp, side, names), sums)
        more = random_writes(rng, 20, size)
        persist.qemu_writes(side, more)
        writes += more
        persist.sound(side)
        check_theirs(tmp, side, rng.sample(sorted(names), 4), writes, size)


def check_ours(server, names, writes, size):
    for name, bitmap in server.control.bitmaps().items():
        g = bitmap["granularity"]
        qf.equal(name, [g, bitmap["persistent"], bitmap["recording"]],
                 [names[name], True, True])
        qf.equal(f"our {name}", our_runs(server, name),
                 persist.granules(writes, g, size))


def check_theirs(tmp, side, names, writes, size):
    for name in names:
        qf.equal(f"QEMU's {name}", qemu_runs(tmp, side, name),
                 persist.granules(writes, int(name[1:]), size))


def test_many(tmp):
    """Many bitmaps, each with its own content; some are removed."""
    size = 40 * MiB
    disk, side = paths(tmp, "many", size)
    arguments = ["file", disk, "bitmap-store=" + side]
    rng = random.Random(2)
    wanted = {}
    with persist.serve(tmp, *arguments) as server:
        control = server.control
        guest = server.connect()
        for number in range(MANY):
            name = f"bitmap {number} \u00e4" + "x" * rng.randrange(900)
            g = rng.choice((512, 4 * KiB, 64 * KiB, MiB))
            control("block-dirty-bitmap-add", node="disk", name=name,
                    granularity=g, persistent=True)
            guest.pwrite(b"1" * 512, rng.randrange(size // 512) * 512)
            if rng.random() < 0.5:
                control("block-dirty-bitmap-disable", node="disk", name=name)
            wanted[name] = g, control.bitmaps()[name]["recording"]
        guest.shutdown()
        sums = persist.digests(control, wanted)
    persist.sound(side)
    check_many(tmp, side, wanted, sums)
    with persist.serve(tmp, *arguments) as server:
        control = server.control
        qf.equal("digests again", persist.digests(control, wanted), sums)
        qf.equal("recording", {name: b["recording"] for name, b
                               in control.bitmaps().items()},
                 {name: r for name, (_, r) in wanted.items()})
        gone = rng.sample(sorted(wanted), MANY // 2)
        control.transaction([("block-dirty-bitmap-remove",
                              {"node": "disk", "name": name})
                             for name in gone])
        for name in gone:
            del wanted[name], sums[name]
        check_many(tmp, side, wanted, None)
    persist.sound(side)
    check_many(tmp, side, wanted, sums)


def check_many(tmp, side, wanted, sums):
    qf.equal("bitmaps", persist.info(side),
             {name: (g, ["auto"] if recording else [])
              for name, (g, recording) in wanted.items()})
    if sums:
        qf.equal("QEMU's digests", persist.qemu_digests(tmp, side, wanted),
                 sums)


def test_limits(tmp):
    """What the format does not allow is refused; the rest works on disks
    of any size, without a data file."""
    side = os.path.join(tmp, "limits.qcow2")
    with persist.serve(tmp, "memory", "3T", "bitmap-store=" + side) as server:
        def add(g):
            server.control("block-dirty-bitmap-add", node="disk",
                           name=f"b{g}", granularity=g, persistent=True)
        for g in (512, 1024 // 2):
            qmp.refused(server.control, ["b512"], "block-dirty-bitmap-add",
                        node="disk", name="b512", granularity=g,
                        persistent=True)
        for g in (1024, 64 * KiB, 2 * GiB):
            add(g)
        writes = [(0, 512), (TiB + 512, MiB), (3 * TiB - 512, 512)]
        persist.write_some(server, writes)
    persist.sound(side)
    for g in (1024, 64 * KiB, 2 * GiB):
        qf.equal(f"{g}", qemu_runs(tmp, side, f"b{g}"),
                 persist.granules(writes, g, 3 * TiB))


# ---------------------------------------------------------------- changes

class Changer:
    """Random changes by QMP, after each of which the file must have what
    QMP says."""

    def __init__(self, tmp, server, path, rng):
        self.tmp, self.path, self.rng = tmp, path, rng
        self.control = server.control
        self.names = []
        self.number = 0

    def new(self):
        self.number += 1
        self.names.append(f"n{self.number}")
        return "block-dirty-bitmap-add", {
            "node": "disk", "name": self.names[-1], "persistent": True,
            "granularity": self.rng.choice((512, 4096, 65536)),
            "disabled": self.rng.random() < 0.3}

    def change(self):
        kind = self.rng.choice(("add", "remove", "clear", "enable",
                                "disable", "merge", "move"))
        if kind == "add" or len(self.names) < 2:
            return self.new()
        name, other = self.rng.sample(self.names, 2)
        arguments = {"node": "disk", "name": name}
        if kind == "remove":
            self.names.remove(name)
        elif kind == "merge":
            arguments = {"node": "disk", "target": name, "bitmaps": [other]}
        elif kind == "move":
            self.number += 1
            arguments.update({"target-node": "disk",
                              "target-name": f"n{self.number}"})
            self.names.remove(name)
            self.names.append(f"n{self.number}")
        return "block-dirty-bitmap-" + kind, arguments

    def step(self):
        if self.rng.random() < 0.3:
            actions = [self.change() for _ in range(self.rng.randrange(1, 6))]
            actions = [a for a in actions if not a[0].endswith("-move")] \
                if not self.moves(actions) else actions[:1]
            names = {b for b in self.control.bitmaps()}
            try:
                self.control.transaction(actions)
            except qmp.Error:
                qf.equal("after a failure", set(self.control.bitmaps()),
                         names)
            self.names = sorted(self.control.bitmaps())
        else:
            self.control.request(*self.change())
        self.check()

    @staticmethod
    def moves(actions):
        return any(kind.endswith("-move") for kind, _ in actions)

    def check(self):
        found = persist.info(self.path)
        found.pop(persist.INTENT, None)
        ours = self.control.bitmaps()
        qf.equal("names", sorted(found), sorted(ours))
        for name, (g, flags) in found.items():
            qf.equal(f"{name}: granularity", g, ours[name]["granularity"])
            qf.equal(f"{name}: auto", "auto" in flags,
                     ours[name]["recording"])
            qf.check("in-use" not in flags or ours[name]["recording"],
                     f"{name} is in use and not auto")

    def check_content(self):
        """Without writers QEMU can read it all at any time, but that new
        bitmaps are in use."""
        persist.checked(self.path)
        copy = persist.snapshot(self.tmp, self.path)
        qf.equal("digests", persist.qemu_digests(self.tmp, copy, self.names),
                 persist.digests(self.control, self.names))


def test_changes(tmp):
    """Nobody writes."""
    disk, side = paths(tmp, "changes", 20 * MiB)
    rng = random.Random(3)
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side) as server:
        changer = Changer(tmp, server, side, rng)
        for number in range(STEPS):
            changer.step()
            if number % 10 == 9:
                changer.check_content()
                persist.write_some(server, random_writes(rng, 3, 20 * MiB))
                persist.until("stored", lambda: persist.INTENT
                              not in persist.info(side))
                changer.check_content()
        names = changer.names
        sums = persist.digests(server.control, names)
    persist.sound(side)
    qf.equal("digests", persist.qemu_digests(tmp, side, names), sums)


def test_changes_while_writing(tmp):
    """A client has written and stays."""
    disk, side = paths(tmp, "changes2", 20 * MiB)
    rng = random.Random(4)
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                       "bitmap-sync=1") as server:
        changer = Changer(tmp, server, side, rng)
        guest = server.connect()
        for _ in range(STEPS):
            guest.pwrite(b"x" * 512, rng.randrange(20 * MiB // 512) * 512)
            changer.step()
            persist.checked(side)
        names = changer.names
        guest.shutdown()
        persist.until("stored", lambda: persist.INTENT
                      not in persist.info(side))
        changer.check_content()
        sums = persist.digests(server.control, names)
    persist.sound(side)
    qf.equal("digests", persist.qemu_digests(tmp, side, names), sums)


def test_flags(tmp):
    """Made, enabled and disabled by QEMU."""
    size = 10 * MiB
    disk, side = paths(tmp, "flags", size)
    arguments = ["file", disk, "bitmap-store=" + side]
    with persist.serve(tmp, *arguments, "dirty-bitmap=on,persistent=on",
                       "dirty-bitmap=off,persistent=on,disabled=on"):
        pass
    expected = {"on": (64 * KiB, ["auto"]), "off": (64 * KiB, [])}
    qf.equal("flags", persist.info(side), expected)
    qf.qemu_img("bitmap", "--add", "--enable", side, "on2")
    qf.qemu_img("bitmap", "--add", "--disable", side, "off2")
    qf.qemu_img("bitmap", "--disable", side, "on")
    qf.qemu_img("bitmap", "--enable", side, "off")
    with persist.serve(tmp, *arguments) as server:
        qf.equal("recording", {n: b["recording"] for n, b
                               in server.control.bitmaps().items()},
                 {"on": False, "on2": True, "off": True, "off2": False})
        persist.write_some(server, [(MiB, 512)])
        runs = [[MiB, MiB + 64 * KiB]]
        for name, what in (("on", []), ("on2", runs), ("off", runs),
                           ("off2", [])):
            qf.equal(name, our_runs(server, name), what)
    persist.sound(side)
    persist.qemu_writes(side, [(3 * MiB, 512)])
    runs += [[3 * MiB, 3 * MiB + 64 * KiB]]
    with persist.serve(tmp, *arguments) as server:
        for name, what in (("on", []), ("on2", runs), ("off", runs),
                           ("off2", [])):
            qf.equal(name, our_runs(server, name), what)
            qf.equal(name, qemu_runs(tmp, persist.snapshot(tmp, side), name),
                     what)


# ----------------------------------------------------------------- stores

def test_sync(tmp):
    """While a client is there; and when the last one has left."""
    disk, side = paths(tmp, "sync", 10 * MiB)
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                       "dirty-bitmap=b,persistent=on", "bitmap-sync=1") \
         as server:
        guests = [server.connect() for _ in range(2)]
        for number, guest in enumerate(guests):
            guest.pwrite(b"x" * 512, number * MiB)
            expected = [[n * MiB, n * MiB + 64 * KiB]
                        for n in range(number + 1)]
            persist.until("a store", lambda: persist.stored_runs(
                tmp, side, "b") == expected)
            qf.equal("flags", persist.info(side)["b"][1],
                     ["auto", "in-use"])
        for left, guest in enumerate(guests):
            guest.shutdown()
            del guest
            time.sleep(0.1 if left == 0 else 0)
            if left == 0:
                qf.equal("flags", persist.info(side)["b"][1],
                         ["auto", "in-use"])
        persist.until("a clean sidecar", lambda: persist.info(side)["b"][1]
                      == ["auto"])
        persist.sound(side)
        qf.equal("stored", qemu_runs(tmp, persist.snapshot(tmp, side), "b"),
                 expected)


def test_no_sync(tmp):
    """With bitmap-sync=0 nothing is stored before the writer leaves."""
    disk, side = paths(tmp, "nosync", 10 * MiB)
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                       "dirty-bitmap=b,persistent=on", "bitmap-sync=0") \
         as server:
        guest = server.connect()
        guest.pwrite(b"x" * 512, 0)
        time.sleep(1.5)
        qf.equal("not stored", persist.stored_runs(tmp, side, "b"), [])
        guest.shutdown()
        persist.until("stored", lambda: persist.info(side)["b"][1]
                      == ["auto"])
        qf.equal("stored", persist.stored_runs(tmp, side, "b"),
                 [[0, 64 * KiB]])


def test_signals(tmp):
    """With a client that has written and stays: nbdkit waits for it, but
    what it wrote is stored at once."""
    for how in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        disk, side = paths(tmp, "signal", 10 * MiB)
        server = persist.start(tmp, "file", disk, "bitmap-store=" + side,
                               "dirty-bitmap=b,persistent=on")
        try:
            guest = server.connect()
            guest.pwrite(b"x" * 512, MiB)
            server.process.send_signal(how)
            persist.until("a store", lambda: persist.stored_runs(
                tmp, side, "b") == [[MiB, MiB + 64 * KiB]], 20)
            guest.shutdown()
            del guest
            server.process.wait(timeout=qf.START_TIMEOUT)
            qf.equal(f"status after {how}", server.process.returncode, 0)
            persist.sound(side)
            qf.equal(f"{how}", qemu_runs(tmp, side, "b"),
                     [[MiB, MiB + 64 * KiB]])
        finally:
            server.kill()
        os.unlink(side)


def test_run(tmp):
    """nbdkit --run, and -s."""
    disk, side = paths(tmp, "run", 10 * MiB)
    command = [qf.nbdkit(), *persist.FILTERS, "file", disk,
               "bitmap-store=" + side, "dirty-bitmap=b,persistent=on"]
    qf.run([*command[:1], "-U", "-", *command[1:], "--run",
            f"{qf.tool('qemu-io')} -f raw -c 'write -q 2M 1k' \"$uri\""])
    persist.sound(side)
    qf.equal("--run", qemu_runs(tmp, side, "b"),
             [[2 * MiB, 2 * MiB + 64 * KiB]])
    guest = nbd.NBD()
    guest.connect_command([*command[:1], "-s", *command[1:]])
    guest.pwrite(b"x" * 512, 5 * MiB)
    guest.shutdown()
    del guest                   # waits for the server
    persist.until("the end of the server", lambda: not locked(side))
    persist.sound(side)
    qf.equal("-s", qemu_runs(tmp, side, "b"),
             [[n * MiB, n * MiB + 64 * KiB] for n in (2, 5)])


def locked(path):
    return qf.run([qf.tool("qemu-io"), "-f", "qcow2", "-c", "length", path],
                  ok=None).returncode != 0


def test_daemon(tmp):
    """A server in the background."""
    disk, side = paths(tmp, "daemon", 10 * MiB)
    pidfile = os.path.join(tmp, "daemon.pid")
    sock = os.path.join(tmp, "daemon.sock")
    subprocess.run([qf.nbdkit(), "-U", sock, "-P", pidfile, *persist.FILTERS,
                    "file", disk, "bitmap-store=" + side,
                    "dirty-bitmap=b,persistent=on"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    persist.until("a pid", lambda: os.path.exists(pidfile)
                  and os.path.getsize(pidfile))
    with open(pidfile) as file:
        pid = int(file.read())
    try:
        guest = nbd.NBD()
        guest.connect_unix(sock)
        guest.pwrite(b"x" * 512, 5 * MiB)
        guest.shutdown()
    finally:
        os.kill(pid, signal.SIGTERM)
    persist.until("its end", lambda: not os.path.exists(f"/proc/{pid}"))
    persist.sound(side)
    qf.equal("stored", qemu_runs(tmp, side, "b"),
             [[5 * MiB, 5 * MiB + 64 * KiB]])


# ------------------------------------------------------------ other kinds

def test_without_tracking(tmp):
    """It also records when nobody shows it."""
    disk, side = paths(tmp, "alone", 10 * MiB)
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                       filters=persist.FILTERS[1:]) as server:
        server.control("block-dirty-bitmap-add", node="disk", name="b",
                       granularity=512, persistent=True)
        handle = server.connect()
        handle.pwrite(b"x" * 1000, 100)
        handle.zero(512, MiB)
        handle.trim(4096, 2 * MiB)
        handle.pread(512, 3 * MiB)
        handle.flush()
        handle.shutdown()
    persist.sound(side)
    qf.equal("alone", qemu_runs(tmp, side, "b"),
             [[0, 1536], [MiB, MiB + 512], [2 * MiB, 2 * MiB + 4096]])


def test_intent_off(tmp):
    """The same without a crash; no intent is ever seen."""
    disk, side = paths(tmp, "off", 10 * MiB)
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                       "bitmap-intent=off", "dirty-bitmap=b,persistent=on") \
         as server:
        guest = server.connect()
        guest.pwrite(b"x" * 512, MiB)
        qf.equal("while writing", persist.info(side),
                 {"b": (64 * KiB, ["auto", "in-use"])})
        guest.shutdown()
    persist.sound(side)
    qf.equal("off", qemu_runs(tmp, side, "b"), [[MiB, MiB + 64 * KiB]])


def test_intent(tmp):
    """QEMU sees the intent while we run, and it covers what we wrote."""
    disk, side = paths(tmp, "intent", 100 * MiB)
    for g in (512, MiB):
        with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                           f"bitmap-intent-granularity={g}",
                           "dirty-bitmap=b,persistent=on") as server:
            guest = server.connect()
            writes = [(10 * MiB, 512), (50 * MiB + 512, MiB), (99 * MiB, 1)]
            for offset, count in writes:
                guest.pwrite(b"x" * count, offset)
            qf.equal("intent", persist.info(side)[persist.INTENT],
                     (g, ["auto"]))
            qf.equal("intent", persist.stored_runs(tmp, side, persist.INTENT),
                     persist.granules(writes, g, 100 * MiB))
            qf.check(persist.INTENT not in server.control.bitmaps(),
                     "QMP shows the intent")
            guest.shutdown()
        persist.sound(side)


def test_intent_granularity(tmp):
    """By default the disk's size / 4096, rounded up to a power of two."""
    for size, expected in ((MiB, 64 * KiB), (256 * MiB, 64 * KiB),
                           (256 * MiB + 512, 128 * KiB), (GiB, 256 * KiB),
                           (GiB - 512, 256 * KiB), (3 * GiB, MiB),
                           (64 * GiB, 16 * MiB), (TiB, 16 * MiB)):
        disk, side = paths(tmp, f"default{size}", size)
        with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                           "dirty-bitmap=b,persistent=on"):
            qf.equal(size, persist.info(side)[persist.INTENT],
                     (expected, ["auto"]))


def test_data_file(tmp):
    """QEMU sees the disk through its sidecar."""
    for size in (512, 10 * MiB, 10 * MiB + 512, 10 * MiB + 100, 100):
        disk, side = paths(tmp, f"data{size}", size)
        persist.make_disk(disk, size, 0x33)
        with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                           "dirty-bitmap=b,persistent=on,granularity=512") \
             as server:
            handle = server.connect()
            handle.pwrite(b"e", size - 1)
            handle.pwrite(b"s", 0)
            handle.shutdown()
            expected = persist.granules([(0, 1), (size - 1, 1)], 512, size)
            qf.equal("ours", our_runs(server, "b"), expected)
        persist.sound(side)
        qf.qemu_img("compare", "-f", "qcow2", "-F", "raw", side, disk)
        qf.equal(f"QEMU's, {size}", persist.clipped(
            qemu_runs(tmp, side, "b"), size), expected)
        qf.equal("size", os.path.getsize(disk), size)


def test_memory(tmp):
    """There is no file to which the sidecar could refer."""
    size = 10 * MiB + 100
    side = os.path.join(tmp, "memory.qcow2")
    with persist.serve(tmp, "memory", str(size), "bitmap-store=" + side,
                       "dirty-bitmap=b,persistent=on,granularity=512") \
         as server:
        persist.write_some(server, [(0, 1), (size - 1, 1)])
        expected = our_runs(server, "b")
        qf.equal("ours", expected,
                 persist.granules([(0, 1), (size - 1, 1)], 512, size))
    persist.sound(side)
    qf.check("data-file" not in qf.qemu_img("info", "--output=json", side),
             "there is a data file")
    qf.equal("QEMU's", persist.clipped(qemu_runs(tmp, side, "b"), size),
             expected)
    with persist.serve(tmp, "memory", str(size), "bitmap-store=" + side) \
         as server:
        qf.equal("again", our_runs(server, "b"), expected)


def test_image(tmp):
    """Bitmaps in the image itself, whose disk is written through cow."""
    image = os.path.join(tmp, "image.qcow2")
    size = 20 * MiB
    filters = [*persist.FILTERS, "--filter=cow", "--filter=qcow2"]
    rng = random.Random(5)
    for options in ("cluster_size=64k", "cluster_size=512",
                    "cluster_size=4k,refcount_bits=1", "extended_l2=on"):
        qf.qemu_img("create", "-q", "-f", "qcow2", "-o", options, image,
                    str(size))
        qf.qemu_img("bitmap", "--add", "-g", "4096", image, "theirs")
        persist.qemu_writes(image, [(MiB, 4096), (3 * MiB, MiB)])
        writes = [(MiB, 4096), (3 * MiB, MiB)]
        with persist.serve(tmp, "file", image,
                           "dirty-bitmap=ours,persistent=on,granularity=512",
                           filters=filters) as server:
            qf.equal("theirs", our_runs(server, "theirs"),
                     persist.granules(writes, 4096, size))
            more = random_writes(rng, 20, size)
            persist.write_some(server, more)
            changer = Changer(tmp, server, image, rng)
            changer.names = ["ours", "theirs"]
            changer.check()
            changer.names = []
            changer.number = 100
            for _ in range(5):
                changer.control.request(*changer.new())
                changer.check()
            for name in changer.names:
                server.control("block-dirty-bitmap-remove", node="disk",
                               name=name)
        writes += more
        persist.sound(image)
        qf.equal("theirs", qemu_runs(tmp, image, "theirs"),
                 persist.granules(writes, 4096, size))
        qf.equal("ours", qemu_runs(tmp, image, "ours"),
                 persist.granules(more, 512, size))


def test(tmp):
    qf.need("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon",
            "nbdinfo")
    qf.parts(tmp, test_granularities, test_many, test_limits, test_changes,
             test_changes_while_writing, test_flags, test_sync, test_no_sync,
             test_signals, test_run, test_daemon, test_without_tracking,
             test_intent_off, test_intent,
             test_intent_granularity, test_data_file, test_memory,
             test_image)


qf.main(test)
