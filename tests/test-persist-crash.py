#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The bitmap-persist filter when servers are killed.

A server is killed while clients write as fast as they can, while bitmaps
are stored, while they are changed by QMP.  The disk is then compared with
a copy made when the bitmaps began: they have all that has changed, and
nothing outside of where clients wrote.

PERSIST_KILLS says how often (10).
"""

import json
import os
import random
import signal
import subprocess
import threading
import time

import disks
import faults
import nbd
import persist
import qf
import qmp
from persist import our_runs
from qf import KiB, MiB

KILLS = int(os.environ.get("PERSIST_KILLS", "10"))
# Calls at which a server kills itself: each so many.
CALLS = max(1, (20 if qf.SLOW else 3) * 10 // KILLS)

SIZE = 128 * MiB + 512
WINDOW = 8 * MiB                # where the clients of one server write
INTENT = 64 * KiB
BITMAPS = {"b512": 512, "b4k": 4 * KiB, "b64k": 64 * KiB, "b1m": MiB}


def make_disk(path):
    """Without zeroes, so that each kind of write can be seen."""
    with open(path, "wb") as file:
        for at in range(0, SIZE, MiB):
            file.write(b"\x55" * min(MiB, SIZE - at))


def differences(path, old):
    """[(offset, 512)] of where the files differ."""
    ours, theirs = disks.map_file(path), disks.map_file(old)
    for at in range(0, SIZE, 64 * KiB):
        if ours[at:at + 64 * KiB] == theirs[at:at + 64 * KiB]:
            continue
        for sector in range(at, min(at + 64 * KiB, SIZE), 512):
            if ours[sector:sector + 512] != theirs[sector:sector + 512]:
                yield sector, 512


def not_corrupt(path):
    """Clusters may have leaked: returns how many."""
    done = qf.run([qf.tool("qemu-img"), "check", "-f", "qcow2",
                   "--output=json", path], ok=None)
    qf.check(done.returncode in (0, 3), f"{path}: after a kill: "
             f"{done.stdout}{done.stderr}")
    return json.loads(done.stdout).get("leaks", 0)


# ---------------------------------------------------------------- writers

class Fio:
    """One fio with many requests in flight."""

    def __init__(self, server, start, rng):
        self.process = subprocess.Popen(
            [qf.tool("fio"), "--name=w", "--ioengine=nbd",
             "--uri=" + server.uri(), "--rw=randwrite", "--bsrange=512-32k",
             "--bs_unaligned=1", "--iodepth=16", "--norandommap=1",
             f"--offset={start}", f"--size={WINDOW}", "--time_based=1",
             "--runtime=300", f"--randseed={rng.randrange(1 << 30)}",
             "--output=/dev/null", "--eta=never"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd=server.dir)

    def finish(self):
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Threads:
    """Connections with all kinds of requests; what was answered is
    noted."""

    def __init__(self, server, start, rng, number=4):
        self.acknowledged = []
        self.threads = []
        for _ in range(number):
            handle = server.connect()
            seed = rng.randrange(1 << 30)
            self.threads.append(threading.Thread(
                target=self.work, args=(handle, start, random.Random(seed)),
                daemon=True))
        for thread in self.threads:
            thread.start()

    def work(self, handle, start, rng):
        try:
            while True:
                count = rng.choice((1, 512, 4 * KiB, 30000, 128 * KiB))
                at = start + rng.randrange(WINDOW - count)
                kind = rng.randrange(8)
                if kind == 0:
                    handle.zero(count, at)
                elif kind == 1:
                    handle.trim(count, at)
                else:
                    handle.pwrite(bytes([rng.randrange(256)]) * count, at)
                self.acknowledged.append((at, count))
                if rng.random() < 0.02:
                    # A writer that leaves; perhaps it was the last.
                    time.sleep(rng.random() / 50)
        except nbd.Error:
            pass                # the server was killed

    def finish(self):
        for thread in self.threads:
            thread.join(60)


class Changer(threading.Thread):
    """Changes other bitmaps all the time."""

    def __init__(self, server, rng):
        super().__init__(daemon=True)
        self.control, self.rng = server.control, rng
        self.changes = 0
        self.error = None
        self.start()

    def run(self):
        try:
            while True:
                self.change()
                self.changes += 1
        except qmp.Error as error:
            self.error = error
        except (qf.Fail, OSError):
            pass                # the server was killed

    def change(self):
        names = sorted(self.control.bitmaps().keys() - BITMAPS.keys())
        kind = self.rng.choice(("add", "remove", "clear", "enable",
                                "disable", "merge"))
        if kind == "add" and len(names) < 20 or not names:
            self.control("block-dirty-bitmap-add", node="disk",
                         name=f"x{self.rng.randrange(1 << 30)}",
                         granularity=self.rng.choice((512, 65536)),
                         persistent=True)
        elif kind == "merge":
            self.control("block-dirty-bitmap-merge", node="disk",
                         target=self.rng.choice(names),
                         bitmaps=[self.rng.choice(list(BITMAPS))])
        elif kind != "add":
            self.control("block-dirty-bitmap-" + kind, node="disk",
                         name=self.rng.choice(names))


# ------------------------------------------------------------------ kills

class Sidecar:
    """A disk, its sidecar, and a copy of the disk from when the bitmaps
    began."""

    def __init__(self, tmp):
        self.tmp = tmp
        self.disk = os.path.join(tmp, "disk.raw")
        self.old = os.path.join(tmp, "old.raw")
        self.side = os.path.join(tmp, "side.qcow2")
        make_disk(self.disk)
        self.begin([])

    def begin(self, windows):
        qf.run(["cp", "--sparse=never", self.disk, self.old])
        self.windows = windows

    def arguments(self):
        return ["file", self.disk, "bitmap-store=" + self.side,
                "bitmap-sync=1", f"bitmap-intent-granularity={INTENT}"] + [
            f"dirty-bitmap={name},granularity={g},persistent=on"
            for name, g in BITMAPS.items()]

    def check(self, server):
        """The bitmaps have all changes, and nothing that is too far off."""
        changed = list(differences(self.disk, self.old))
        allowed = persist.granules([(start, WINDOW)
                                    for start in self.windows], MiB, SIZE)
        for name, bitmap in server.control.bitmaps().items():
            qf.check(not bitmap.get("inconsistent"), f"{name} is inconsistent")
        for name, g in BITMAPS.items():
            runs = our_runs(server, name)
            persist.within(name, persist.granules(changed, 512, SIZE), runs)
            persist.within(f"too much in {name}", runs, allowed)
            qf.check(len(runs) or not changed, "no bitmap")
        return len(changed)

    def rotate(self, server, clean):
        """All bitmaps begin anew.  What is in the intent from before comes
        back after a kill, unless it is made clean first."""
        if clean:
            for active in (False, True):
                server.control("blockdev-set-active", node_name="disk",
                               active=active)
        server.control.transaction([
            ("block-dirty-bitmap-clear", {"node": "disk", "name": name})
            for name in BITMAPS])
        self.begin(self.windows[:0 if clean else None])


def kill_while_writing(sidecar, rng, kind):
    """Returns how many sectors differ now."""
    server = persist.start(sidecar.tmp, *sidecar.arguments())
    try:
        sidecar.check(server)
        if rng.random() < 0.3:
            sidecar.rotate(server, rng.random() < 0.5)
        start = rng.randrange(0, SIZE - WINDOW, MiB)
        sidecar.windows.append(start)
        writers = (Fio if kind == "fio" and qf.tool("fio") else Threads)(
            server, start, rng)
        changer = Changer(server, rng) if kind == "qmp" else None
        # Stores happen each second.
        time.sleep(rng.choice((0.02, 0.3, 1.0 + rng.random() * 0.1, 1.5)))
        qf.check(server.alive(), f"the server has ended: {server.log()}")
    finally:
        server.kill()
    writers.finish()
    if changer:
        changer.join(60)
        qf.check(not changer.error, f"a change failed: {changer.error}")
        kill_while_writing.changes += changer.changes
    return not_corrupt(sidecar.side)


kill_while_writing.changes = 0


def kill_while_recovering(sidecar, rng):
    """Servers that are killed while they start, or just afterwards."""
    for _ in range(3):
        process = subprocess.Popen(
            [qf.nbdkit(), "-f", "-U", os.path.join(sidecar.tmp, "short"),
             *persist.FILTERS, *sidecar.arguments()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(rng.random() * 0.08)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        not_corrupt(sidecar.side)
        try:
            os.unlink(os.path.join(sidecar.tmp, "short"))
        except FileNotFoundError:
            pass


def test_kills(tmp):
    """Each server recovers what the one before left, and is killed."""
    sidecar = Sidecar(tmp)
    leaks = most = 0
    for number in range(KILLS):
        rng = random.Random(number)
        kind = ("fio", "threads", "qmp")[number % 3]
        leaks = max(leaks, kill_while_writing(sidecar, rng, kind))
        if number % 4 == 3:
            kill_while_recovering(sidecar, rng)
        if number % 4 == 1:     # sometimes one that ends in order
            with persist.serve(tmp, *sidecar.arguments()) as server:
                most = max(most, sidecar.check(server))
    with persist.serve(tmp, *sidecar.arguments()) as server:
        most = max(most, sidecar.check(server))
    print(f"{KILLS} kills, {kill_while_writing.changes} changes by QMP, "
          f"at most {most} sectors changed and {leaks} clusters leaked")
    qf.check(most > 0, "nothing was written")
    # QEMU reads the same.
    with persist.Daemon(tmp, sidecar.side) as daemon:
        theirs = persist.digests(daemon.control, BITMAPS)
    with persist.serve(tmp, *sidecar.arguments()) as server:
        qf.equal("digests", persist.digests(server.control, BITMAPS), theirs)


# ------------------------------------------------- killed by its own call

class Script:
    """What is done with a server that dies at one of its calls, and what
    must then be there: aux bitmaps that QMP has confirmed."""

    def __init__(self, disk):
        self.disk = disk
        self.aux = {}           # name: is it recording?
        self.doubtful = None    # the one that was being changed

    def change(self, kind, name, recording, **arguments):
        self.doubtful = name
        self.disk.control("block-dirty-bitmap-" + kind, node="disk",
                          name=name, **arguments)
        self.aux.pop(name, None)
        if recording is not None:
            self.aux[name] = recording
        self.doubtful = None

    def run(self, number):
        """Returns at the end, if it is reached."""
        new = f"n{number}"
        self.disk.connect()
        self.disk.write()
        self.change("add", new, True, persistent=True, granularity=512)
        self.disk.write()
        self.change("disable", new, False)
        for name in [n for n in self.aux if n != new][:-2]:
            self.change("remove", name, None)
        self.change("enable", new, True)
        self.disk.write()
        self.change("clear", new, True)
        self.disk.write()
        # A store, and all anew.
        for active in (False, True):
            self.disk.control("blockdev-set-active", node_name="disk",
                              active=active)
        self.disk.write()
        self.disk.leave()
        persist.until("stored", self.ended)

    def ended(self):
        return self.disk.is_clean() or not self.disk.server.alive()

    def check(self):
        self.disk.check_complete()
        found = self.disk.control.bitmaps()
        for name, bitmap in found.items():
            qf.check(not bitmap.get("inconsistent"), f"{name} is inconsistent")
            if name in self.aux and name != self.doubtful:
                qf.equal(f"{name}: recording", bitmap["recording"],
                         self.aux[name])
        qf.equal("bitmaps", found.keys() - {self.doubtful},
                 (self.aux.keys() | faults.NAMES.keys()) - {self.doubtful})
        if self.doubtful:
            self.aux.pop(self.doubtful, None)
            if self.doubtful in found:
                self.aux[self.doubtful] = found[self.doubtful]["recording"]
        self.doubtful = None


def test_each_call(tmp):
    """Killed at the first call, at the second, and so on: when it starts
    to record, in QMP commands, in stores, in recovery."""
    disk = faults.Disk(tmp, "calls")
    script = Script(disk)
    for number in range(0, 1000, CALLS):
        with disk:
            disk.server.stop = lambda: None
            script.check()
            disk.faults.set(faults.ANY_WRITE | faults.KILL, number)
            try:
                script.run(number)
            except (nbd.Error, qf.Fail, OSError) as error:
                qf.check(disk.faults.hits(), f"not killed, but {error}")
            if disk.faults.off() == 0:
                break
        faults.no_corruption(disk.side)
    print(f"killed at {number} calls, each {CALLS}th")
    qf.check(number > 20, "so few calls?")


def test_each_call_off(tmp):
    """With bitmap-intent=off a bitmap is complete or inconsistent."""
    complete = lost = 0
    for number in range(0, 1000, CALLS):
        disk = faults.Disk(tmp, f"off{number}", "bitmap-intent=off")
        with disk:
            disk.server.stop = lambda: None
            disk.faults.set(faults.ANY_WRITE | faults.KILL, number)
            try:
                Script(disk).run(number)
            except (nbd.Error, qf.Fail, OSError) as error:
                qf.check(disk.faults.hits(), f"not killed, but {error}")
            if disk.faults.off() == 0:
                break
        faults.no_corruption(disk.side)
        with disk:
            names = [name for name, bitmap in disk.control.bitmaps().items()
                     if name in faults.NAMES and not bitmap.get("inconsistent")]
            disk.check_complete(names)
            complete += len(names)
            lost += len(faults.NAMES) - len(names)
        os.unlink(disk.disk)
    print(f"killed at {number} calls, each {CALLS}th: {complete} "
          f"bitmaps are complete, {lost} inconsistent")
    qf.check(complete and lost, "it is always the same")


def test_image(tmp):
    """The same with bitmaps in the image.  What cow keeps is lost, so that
    the requests which were answered are what must be there."""
    image = os.path.join(tmp, "image.qcow2")
    filters = [*persist.FILTERS, "--filter=cow", "--filter=qcow2"]
    arguments = ["file", image, "bitmap-sync=1"] + [
        f"dirty-bitmap={name},granularity={g},persistent=on"
        for name, g in BITMAPS.items()]
    qf.qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    writes = []
    for number in range(max(KILLS // 3, 1)):
        rng = random.Random(number)
        server = persist.start(tmp, *arguments, filters=filters)
        try:
            check_acknowledged(server, writes)
            writers = Threads(server, rng.randrange(SIZE - WINDOW), rng)
            time.sleep(rng.choice((0.02, 0.3, 1.05)))
        finally:
            server.kill()
        writers.finish()
        writes += writers.acknowledged
        not_corrupt(image)
    with persist.serve(tmp, *arguments, filters=filters) as server:
        check_acknowledged(server, writes)
    print(f"{len(writes)} requests")


def check_acknowledged(server, writes):
    expected = persist.granules(writes, 512, SIZE)
    for name, bitmap in server.control.bitmaps().items():
        qf.check(not bitmap.get("inconsistent"), f"{name} is inconsistent")
        persist.within(name, expected, our_runs(server, name))


# -------------------------------------------------------- foreign writers

SMALL = 32 * MiB
OURS, THEIRS, LATER = [(MiB, 512)], [(9 * MiB, 512)], [(20 * MiB, 512)]


class Pair:
    """A small disk with its sidecar, and servers that are killed."""

    def __init__(self, tmp, name):
        self.tmp = tmp
        self.disk = persist.make_disk(os.path.join(tmp, name + ".raw"), SMALL)
        self.side = os.path.join(tmp, name + ".qcow2")

    def arguments(self, *more):
        return ["file", self.disk, "bitmap-store=" + self.side, *more]

    def crash(self, writes, *more, bitmap="b"):
        server = persist.start(self.tmp, *self.arguments(
            f"dirty-bitmap={bitmap},persistent=on,granularity=4k", *more))
        try:
            handle = server.connect()
            for offset, count in writes:
                handle.pwrite(b"x" * count, offset)
        finally:
            server.kill()

    def qemu_crash(self, writes):
        with persist.Daemon(self.tmp, self.side, writable=True) as daemon:
            handle = nbd.NBD()
            handle.connect_unix(daemon.sock)
            for offset, count in writes:
                handle.pwrite(b"q" * count, offset)
            handle.flush()
            daemon.process.send_signal(signal.SIGKILL)
            daemon.process.wait()

    def check(self, bitmap, writes, others=()):
        """Complete, and not much more than written; others are not."""
        with persist.serve(self.tmp, *self.arguments()) as server:
            found = server.control.bitmaps()[bitmap]
            qf.check(not found.get("inconsistent"), f"{found}")
            runs = our_runs(server, bitmap)
            persist.within(bitmap, persist.granules(writes, 512, SMALL), runs)
            persist.within("too much", runs, persist.granules(
                writes, MiB, SMALL))
        persist.sound(self.side, others)
        qf.equal("QEMU's", persist.qemu_runs(self.tmp, self.side, bitmap),
                 runs)

    def check_inconsistent(self, bitmap, *more):
        with persist.serve(self.tmp, *self.arguments(*more)) as server:
            inconsistent(server, bitmap)


def inconsistent(server, name):
    """It can only be removed."""
    found = server.control.bitmaps()[name]
    qf.equal(f"{name}", [found.get("inconsistent"), found["recording"],
                         found["persistent"]], [True, False, True])
    try:
        server.connect("dirty/" + name)
    except nbd.Error:
        pass
    else:
        raise qf.Fail(f"{name} is shown")
    for command in ("clear", "enable", "disable"):
        qmp.refused(server.control, [name, "nconsistent"],
                    "block-dirty-bitmap-" + command, node="disk", name=name)
    qf.check(name in server.log() and "inconsistent" in server.log(),
             f"nothing in the log: {server.log()}")


def test_qemu_in_between(tmp):
    """QEMU's writes are in what is recovered."""
    pair = Pair(tmp, "between")
    pair.crash(OURS)
    persist.qemu_writes(pair.side, THEIRS)
    persist.qemu_writes(pair.side, LATER)
    pair.check("b", OURS + THEIRS + LATER)
    pair.crash(OURS)
    pair.crash(THEIRS)
    pair.check("b", OURS + THEIRS + LATER)


def test_qemu_looks(tmp):
    """What QEMU's tools do does no harm."""
    pair = Pair(tmp, "looks")
    pair.crash(OURS)
    qf.qemu_img("check", "-q", "-r", "all", pair.side)
    qf.run([qf.tool("qemu-io"), "-f", "qcow2", "-r", "-c", "read -q 0 1M",
            pair.side])
    qf.qemu_img("bitmap", "--add", "-g", "4096", pair.side, "c")
    persist.qemu_writes(pair.side, THEIRS)
    pair.check("b", OURS + THEIRS)
    qf.equal("c", persist.qemu_runs(tmp, pair.side, "c"),
             persist.granules(THEIRS, 4096, SMALL))


def test_qemu_crashes(tmp):
    """After QEMU has crashed as well, nothing is recovered, ever."""
    pair = Pair(tmp, "both")
    pair.crash(OURS)
    pair.qemu_crash(THEIRS)
    # A new bitmap and its intent do not make the old one better.
    for _ in range(3):
        pair.crash(LATER, bitmap="c")
        pair.check_inconsistent("b")
        pair.check("c", LATER, ["b"])
        qf.equal("flags", persist.info(pair.side)["b"][1], ["in-use"])
    persist.qemu_writes(pair.side, THEIRS)
    pair.check_inconsistent("b")
    pair.check("c", LATER + THEIRS, ["b"])
    remove_inconsistent(pair, "b")
    pair.check("c", LATER + THEIRS)


def remove_inconsistent(pair, name):
    with persist.serve(pair.tmp, *pair.arguments()) as server:
        server.control("block-dirty-bitmap-remove", node="disk", name=name)
        qf.check(name not in persist.info(pair.side), "it is still there")
    qf.check(name not in persist.info(pair.side), "it is there again")


def test_only_qemu_crashes(tmp):
    pair = Pair(tmp, "qemu")
    with persist.serve(tmp, *pair.arguments("dirty-bitmap=b,persistent=on")):
        pass
    pair.qemu_crash(THEIRS)
    pair.check_inconsistent("b")
    pair.check_inconsistent("b", "bitmap-intent=off")
    pair.crash(OURS, bitmap="c")
    pair.check_inconsistent("b")
    pair.check("c", OURS, ["b"])
    remove_inconsistent(pair, "b")


def test_intent_off(tmp):
    """As QEMU."""
    pair = Pair(tmp, "off")
    pair.crash(OURS, "bitmap-intent=off")
    pair.check_inconsistent("b")
    pair.crash(OURS, bitmap="c")
    pair.check_inconsistent("b")
    pair.check("c", OURS, ["b"])
    remove_inconsistent(pair, "b")


def test_intent_on_then_off(tmp):
    """What was recorded before it was switched off is recovered."""
    pair = Pair(tmp, "onoff")
    pair.crash(OURS)
    with persist.serve(tmp, *pair.arguments("bitmap-intent=off")) as server:
        runs = our_runs(server, "b")
        persist.within("b", persist.granules(OURS, 512, SMALL), runs)
        persist.write_some(server, THEIRS)
    pair.check("b", OURS + THEIRS)
    pair.crash(OURS)
    pair.crash(THEIRS, "bitmap-intent=off")
    qf.check(persist.INTENT not in persist.info(pair.side),
             "the intent is still there")
    pair.check_inconsistent("b")


def test_intent_tampered(tmp):
    """If the intent does not have all writes nothing is recovered."""
    for number, options in enumerate((["--remove"], ["--disable"])):
        pair = Pair(tmp, f"tampered{number}")
        pair.crash(OURS)
        qf.qemu_img("bitmap", *options, pair.side, persist.INTENT)
        persist.qemu_writes(pair.side, THEIRS)
        pair.check_inconsistent("b")
        pair.crash(OURS, bitmap="c")
        pair.check_inconsistent("b")


def test_disabled(tmp):
    """A bitmap that was disabled is complete, crash or not."""
    pair = Pair(tmp, "disabled")
    server = persist.start(tmp, *pair.arguments(
        "dirty-bitmap=b,persistent=on,granularity=4k"))
    try:
        handle = server.connect()
        handle.pwrite(b"x" * 512, MiB)
        server.control("block-dirty-bitmap-disable", node="disk", name="b")
        handle.pwrite(b"x" * 512, 2 * MiB)
    finally:
        server.kill()
    qf.equal("flags", persist.info(pair.side)["b"], (4096, []))
    with persist.serve(tmp, *pair.arguments("bitmap-intent=off")) as server:
        qf.equal("b", our_runs(server, "b"), [[MiB, MiB + 4096]])


def test_read_only_after_crash(tmp):
    """It shows what would be recovered and changes nothing."""
    pair = Pair(tmp, "readonly")
    pair.crash(OURS)
    before = persist.fingerprint(pair.side, pair.disk)
    with persist.serve(tmp, "-r", *pair.arguments()) as server:
        runs = our_runs(server, "b")
        persist.within("b", persist.granules(OURS, 512, SMALL), runs)
    qf.equal("changed", before == persist.fingerprint(pair.side, pair.disk),
             True)
    pair.check("b", OURS)


def test_while_inactive(tmp):
    """Killed while QEMU has the sidecar: nothing is missing."""
    pair = Pair(tmp, "inactive")
    server = persist.start(tmp, *pair.arguments(
        "dirty-bitmap=b,persistent=on,granularity=4k"))
    try:
        handle = server.connect()
        handle.pwrite(b"x" * 512, MiB)
        server.control("blockdev-set-active", node_name="disk", active=False)
        persist.sound(pair.side)
        persist.qemu_writes(pair.side, THEIRS)
    finally:
        server.kill()
    pair.check("b", OURS + THEIRS)


def test(tmp):
    qf.need("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon",
            "nbdinfo")
    qf.parts(tmp, test_kills, test_each_call, test_each_call_off, test_image,
             test_qemu_in_between, test_qemu_looks, test_qemu_crashes,
             test_only_qemu_crashes, test_intent_off, test_intent_on_then_off,
             test_intent_tampered, test_disabled, test_read_only_after_crash,
             test_while_inactive)


qf.main(test, 1500 + 10 * KILLS)
