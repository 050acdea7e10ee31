#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The bitmap-persist filter when its file cannot be read or written.

Each call of each operation fails in turn: the error must come out, the
operation must work when it is tried again, and what is then in the file
must be what is in memory, and be all that was written.
"""

import ctypes
import errno
import os
import random
import subprocess
import time

import nbd
import persist
import qf
import qmp
from faults import ANY_WRITE, FOR_EVER, READ, SHORT, SIZE, SYNC, WRITE
from faults import Disk, Faults, no_corruption
from persist import our_runs
from qf import KiB, MiB

# Each call, or each so many of them.
STEP = int(os.environ.get("PERSIST_STEP", "5" if qf.SLOW else "1"))


def open_files(server):
    return sorted(os.readlink(f"/proc/{server.process.pid}/fd/{fd}")
                  for fd in os.listdir(f"/proc/{server.process.pid}/fd"))


def failing(disk, what, function, calls, error=errno.EIO, times=1):
    """Let each call fail in turn; yields after each failure, with whether
    the operation failed.  Ends when there was no call left to fail."""
    for skip in range(0, 1000, STEP):
        disk.faults.set(calls, skip, times, error)
        failed = None
        try:
            function()
        except (qmp.Error, nbd.Error) as e:
            failed = e
        hits = disk.faults.off()
        if hits == 0:
            qf.check(failed is None, f"{what} failed by itself: {failed}")
            return
        yield skip, failed
    raise qf.Fail(f"{what} never ends")


# -------------------------------------------------------------------- QMP

def bitmap_command(disk, kind, **arguments):
    disk.control("block-dirty-bitmap-" + kind, node="disk", **arguments)


def operations(disk):
    """name: (do it, undo it)."""
    def command(kind, **arguments):
        return lambda: bitmap_command(disk, kind, **arguments)

    def both(*functions):
        return lambda: [function() for function in functions]

    def transaction():
        disk.control.transaction([
            ("block-dirty-bitmap-add", {"node": "disk", "name": "t",
                                        "persistent": True}),
            ("block-dirty-bitmap-disable", {"node": "disk", "name": "aux"}),
            ("block-dirty-bitmap-merge", {"node": "disk", "target": "aux2",
                                          "bitmaps": ["b"]})])

    new = {"persistent": True, "granularity": 512}
    return {
        "add": (command("add", name="n", **new), command("remove", name="n")),
        "remove": (command("remove", name="aux"),
                   command("add", name="aux", **new)),
        "clear": (command("clear", name="aux"),
                  command("merge", target="aux", bitmaps=["b"])),
        "merge": (command("merge", target="aux", bitmaps=["b"]),
                  command("clear", name="aux")),
        "disable": (command("disable", name="aux"),
                    command("enable", name="aux")),
        "enable": (both(command("disable", name="aux2"),
                        command("enable", name="aux2")), lambda: None),
        "move": (command("move", name="aux", **{"target-node": "disk",
                                                "target-name": "moved"}),
                 command("move", name="moved", **{"target-node": "disk",
                                                  "target-name": "aux"})),
        "transaction": (transaction, both(
            command("remove", name="t"), command("enable", name="aux"),
            command("clear", name="aux2"))),
    }


def qmp_failures(disk, name, times, error):
    """Returns how many there were."""
    do, undo = operations(disk)[name]
    count = 0
    before = disk.state()
    for skip, failed in failing(disk, name, do, ANY_WRITE, error, times):
        count += 1
        if failed:
            if name != "enable":    # which is two commands
                qf.equal(f"{name}, call {skip}: after {failed}",
                         disk.state(), before)
            qf.check(os.strerror(error) in str(failed), f"{failed}")
            do()
        undo()
        if disk.guest:
            disk.write()
        before = disk.state()
    undo()
    return count


def qmp_commands(tmp, name, writing):
    disk = Disk(tmp, name)
    counts = {}
    with disk:
        for aux in ("aux", "aux2"):
            bitmap_command(disk, "add", name=aux, persistent=True,
                           granularity=512)
        disk.connect()
        disk.write()
        if not writing:
            disk.leave()
            persist.until("stored", disk.is_clean)
        files = open_files(disk.server)
        for operation in operations(disk):
            counts[operation] = [
                qmp_failures(disk, operation, times, error)
                for times, error in ((1, errno.EIO),
                                     (FOR_EVER, errno.ENOSPC))]
        qf.equal("open files", open_files(disk.server), files)
        state = disk.state()
        if writing:
            disk.leave()
    disk.check_agreed(state)
    print(f"failures: {counts}; {no_corruption(disk.side)} clusters leaked")


def test_qmp(tmp):
    """Nobody writes."""
    qmp_commands(tmp, "qmp", False)


def test_qmp_writing(tmp):
    """Somebody does."""
    qmp_commands(tmp, "writing", True)


# ----------------------------------------------------------------- guests

def test_first_write(tmp):
    """What must be stored before a write can not be: the write fails."""
    disk = Disk(tmp, "first")
    failures = 0

    def first_write():
        disk.connect()
        try:
            disk.write()
        except nbd.Error:
            disk.leave()
            raise

    with disk:
        for calls, error in ((ANY_WRITE, errno.EIO),
                             (ANY_WRITE | SHORT, errno.ENOSPC),
                             (SYNC, errno.EIO)):
            for skip, failed in failing(disk, "the first write", first_write,
                                        calls, error, FOR_EVER):
                failures += 1
                qf.check(failed, f"call {skip} failed, but the write did not")
                qf.check(os.strerror(error) in str(failed), f"{failed}")
                # Another one does not.
                first_write()
                disk.leave()
                persist.until("stored", disk.is_clean)
            disk.leave()
            persist.until("stored", disk.is_clean)
        state = disk.state()
    disk.check_agreed(state)
    print(failures, "failures")


def test_later_writes(tmp):
    """A region for the first time."""
    disk = Disk(tmp, "later")
    with disk:
        disk.connect()
        disk.write(0)
        failures = 0
        regions = iter(range(64 * KiB, SIZE, 64 * KiB))
        for calls in (WRITE, SYNC, ANY_WRITE):
            for skip, failed in failing(
                    disk, "a write", lambda: disk.write(next(regions)), calls):
                failures += 1
                qf.check(failed, f"call {skip} failed, but the write did not")
                disk.write(disk.writes[-1][0])
        qf.check(failures >= 2, f"only {failures}")
        # Regions that are there already need nothing.
        disk.faults.set(ANY_WRITE, 0, FOR_EVER)
        disk.write(0)
        qf.equal("hits", disk.faults.off(), 0)
        disk.leave()
        persist.until("stored", disk.is_clean)
        state = disk.state()
    disk.check_agreed(state)


def test_store(tmp):
    """At the close of the last writer: the log says so, bitmaps go on
    recording, and the next one stores them all."""
    disk = Disk(tmp, "store")
    failures = 0
    with disk:
        for times in (1, FOR_EVER):
            for skip in range(0, 1000, STEP):
                if not store_with_fault(disk, skip, times):
                    break
                failures += 1
        state = disk.state()
    disk.check_agreed(state)
    print(f"{failures} failures, {no_corruption(disk.side)} clusters leaked")


def store_with_fault(disk, skip, times):
    """Returns whether something failed."""
    disk.connect()
    for _ in range(3):
        disk.write()
    logged = len(disk.server.log())
    disk.faults.set(ANY_WRITE, skip, times)
    disk.leave()

    def ended():
        return "cannot be stored" in disk.server.log()[logged:] \
            or disk.is_clean()

    persist.until("a store, or an error", ended)
    hits = disk.faults.off()
    if hits:
        qf.check("cannot be stored" in disk.server.log()[logged:],
                 f"call {skip} failed, and nobody says so")
        disk.connect()
        disk.write()
        disk.leave()
        persist.until("stored", disk.is_clean)
    return hits > 0


def test_store_again(tmp):
    """At the end of bitmap-sync it is tried again; and at last."""
    disk = persist.make_disk(os.path.join(tmp, "again.raw"), SIZE)
    side = os.path.join(tmp, "again.qcow2")
    faults = Faults(tmp, side)
    os.environ["NBDKIT"], saved = faults.nbdkit, qf.nbdkit()
    try:
        with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                           "bitmap-sync=1", "dirty-bitmap=b,persistent=on",
                           env=faults.env) as server:
            guest = server.connect()
            guest.pwrite(b"x" * 512, MiB)
            faults.set(ANY_WRITE, 0, FOR_EVER, errno.ENOSPC)
            persist.until("an error", lambda: "cannot be stored"
                          in server.log())
            persist.until("two of them", lambda: server.log().count(
                "cannot be stored") > 1)
            expect_error(lambda: guest.pwrite(b"x" * 512, 5 * MiB))
            guest.pwrite(b"x" * 512, MiB + 512)
            faults.off()
            guest.pwrite(b"x" * 512, 9 * MiB)
            expected = [[n * MiB, n * MiB + 64 * KiB] for n in (1, 5, 9)]
            persist.until("a store", lambda: persist.stored_runs(
                tmp, side, "b") == expected)
            guest.shutdown()
            faults.set(ANY_WRITE, 0, FOR_EVER, errno.ENOSPC)
            guest = server.connect()
            expect_error(lambda: guest.pwrite(b"x" * 512, 20 * MiB))
            guest.shutdown()
            faults.off()
        persist.sound_but_leaks(side)
        runs = persist.qemu_runs(tmp, side, "b")
        persist.within("b", expected, runs)
    finally:
        os.environ["NBDKIT"] = saved


def expect_error(function):
    try:
        function()
    except nbd.Error:
        return
    raise qf.Fail("it should have failed")


def test_end_fails(tmp):
    """The last store fails: the server says so, and the next one recovers
    all."""
    disk = Disk(tmp, "end")
    failures = 0
    for skip in range(0, 100, 3 * STEP):
        with disk:
            disk.check_complete()
            disk.connect()
            for _ in range(3):
                disk.write()
            disk.faults.set(ANY_WRITE, skip, FOR_EVER)
            disk.guest.shutdown()
            disk.server.process.terminate()
            disk.server.process.wait(timeout=qf.START_TIMEOUT)
            hits = disk.faults.off()
            qf.check(not hits or "cannot be stored" in disk.server.log(),
                     f"call {skip}: nothing in the log")
            qf.equal("status", disk.server.process.returncode, 0)
            disk.server.stop = lambda: None
        failures += hits > 0
        no_corruption(disk.side)
        if not hits:
            break
    print(failures, "failures")


def test_fail_and_die(tmp):
    """Something fails, and then the server is killed."""
    disk = Disk(tmp, "die")
    kills = 0
    for skip in range(0, 60, 2 * STEP):
        with disk:
            disk.check_complete()
            disk.connect()
            disk.faults.set(ANY_WRITE, skip, disk.rng.choice((1, FOR_EVER)))
            for number in range(10):
                try:
                    disk.write()
                    if number % 3 == 2:
                        bitmap_command(disk, "add", name=f"n{number}",
                                       persistent=True)
                        bitmap_command(disk, "remove", name=f"n{number}")
                except (nbd.Error, qmp.Error):
                    pass
            if disk.rng.random() < 0.5:
                disk.leave()
                time.sleep(0.02)
            disk.server.kill()
            kills += 1
            disk.server.stop = lambda: None
        remove_aux(disk)
        no_corruption(disk.side)
    with disk:
        state = disk.state()
        disk.check_complete()
    qf.check(not any(b.get("inconsistent") for b in state[0].values()),
             f"{state[0]}")
    print(kills, "kills")


def remove_aux(disk):
    with disk:
        for name in disk.control.bitmaps():
            if name.startswith("n"):
                bitmap_command(disk, "remove", name=name)


def test_load(tmp):
    """Reading fails: the client that comes first is refused, the next one
    is not."""
    disk = Disk(tmp, "load")
    with disk:
        disk.connect()
        disk.write()
        disk.leave()
    failures = 0
    for skip in range(0, 200, STEP):
        disk.faults.set(READ, skip, FOR_EVER)
        try:
            with disk:
                try:
                    disk.connect()
                    failed = None
                except nbd.Error as error:
                    failed = error
                hits = disk.faults.off()
                if failed:
                    qf.check(disk.side in disk.server.log(),
                             f"no name in {disk.server.log()}")
                    disk.connect()
                disk.write()
                disk.leave()
                persist.until("stored", disk.is_clean)
        except qf.Fail as fail:
            # It is found out before the server starts.
            hits = disk.faults.off()
            qf.check(hits and disk.side in str(fail)
                     and "ended with status" in str(fail), f"{fail}")
        if not hits:
            break
        failures += 1
    qf.check(hits == 0, "never ends")
    with disk:
        state = disk.state()
    disk.check_agreed(state)
    print(failures, "failures")


def test_active(tmp):
    """Giving the sidecar away fails: it is not given away."""
    disk = Disk(tmp, "active")
    failures = 0

    def set_active(active):
        disk.control("blockdev-set-active", node_name="disk", active=active)

    with disk:
        disk.connect()
        disk.write()
        for skip, failed in failing(disk, "deactivation",
                                    lambda: set_active(False), ANY_WRITE):
            failures += 1
            qf.check(failed, f"call {skip} failed, and it is inactive")
            disk.write()        # it is still ours
            set_active(False)
            disk.check_file()
            set_active(True)
            disk.write()
        for calls in (READ, ANY_WRITE):
            for skip, failed in failing(disk, "activation",
                                        lambda: set_active(True), calls):
                failures += 1
                qf.check(failed, f"call {skip} failed, and it is active")
                expect_error(disk.write)
                disk.writes.pop()
                set_active(True)
                disk.write()
                set_active(False)
            if calls == READ:
                set_active(False)
        disk.write()
        disk.leave()
        persist.until("stored", disk.is_clean)
        state = disk.state()
    disk.check_agreed(state)
    print(failures, "failures")


def test_create(tmp):
    """A sidecar that cannot be made leaves nothing behind."""
    disk = Disk(tmp, "create")
    directory = os.path.join(tmp, "new")
    os.mkdir(directory)
    disk.side = os.path.join(directory, "side")
    disk.faults = Faults(tmp, disk.side)
    failures = 0
    for skip in range(0, 200, 3 * STEP):
        disk.faults.set(ANY_WRITE, skip, FOR_EVER, errno.ENOSPC)
        with disk:
            failed = False
            try:
                disk.connect()
            except nbd.Error:
                failed = True
            hits = disk.faults.off()
            if failed:
                # All of it or nothing.
                qf.check(os.listdir(directory) in ([], ["side"]),
                         f"files: {os.listdir(directory)}")
                if os.listdir(directory):
                    no_corruption(disk.side)
                qf.check("side" in disk.server.log(), disk.server.log())
                disk.connect()
            disk.write()
            disk.leave()
            persist.until("stored", disk.is_clean)
            state = disk.state()
        disk.check_agreed(state)
        if not hits:
            break
        failures += 1
        os.unlink(disk.side)
        disk.writes = []
    print(failures, "failures")


def test_disk_fails(tmp):
    """Writes to the disk that fail may have changed it: they are marked."""
    path = persist.make_disk(os.path.join(tmp, "bad.raw"), SIZE)
    side = os.path.join(tmp, "bad.qcow2")
    rate = os.path.join(tmp, "rate")
    with persist.serve(tmp, "--filter=error", "file", path,
                       "bitmap-store=" + side, "error-pwrite-rate=1",
                       "error-file=" + rate, "error-pwrite=EIO",
                       "dirty-bitmap=b,persistent=on,granularity=512") \
         as server:
        guest = server.connect()
        guest.pwrite(b"x" * 512, 0)
        with open(rate, "w"):
            pass
        expect_error(lambda: guest.pwrite(b"x" * 512, MiB))
        os.unlink(rate)
        guest.shutdown()
    persist.sound(side)
    qf.equal("b", persist.qemu_runs(tmp, side, "b"),
             [[0, 512], [MiB, MiB + 512]])


# -------------------------------------------------------------- full disk

def mount_small(directory):
    """In a namespace of our own, so that nothing is left behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_ns, rec, private = 0x20000, 0x4000, 1 << 18

    def mount(*args):
        if libc.mount(*args) == -1:
            raise qf.Skip("mount: " + os.strerror(ctypes.get_errno()))

    if libc.unshare(new_ns) == -1:
        raise qf.Skip("unshare: " + os.strerror(ctypes.get_errno()))
    mount(b"none", b"/", None, rec | private, None)
    mount(b"none", directory.encode(), b"tmpfs", 0, b"size=4M")


def test_full_disk(tmp):
    """A real one: the sidecar finds no space, and then there is some."""
    small = os.path.join(tmp, "small")
    os.mkdir(small)
    mount_small(small)
    try:
        full_disk(tmp, small)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def full_disk(tmp, small):
    size = 256 * MiB
    disk = persist.make_disk(os.path.join(tmp, "full.raw"), size)
    side = os.path.join(small, "side.qcow2")
    filler = os.path.join(small, "filler")
    names = [f"b{n}" for n in range(10)]
    rng = random.Random(9)
    writes = []
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                       "bitmap-sync=1",
                       *[f"dirty-bitmap={n},persistent=on,granularity=512"
                         for n in names]) as server:
        guest = server.connect()

        def write():
            writes.append((rng.randrange(size // 512) * 512, 512))
            guest.pwrite(b"x" * 512, writes[-1][0])

        write()
        fill(filler)
        errors = set()
        for _ in range(200):
            try:
                write()
            except nbd.Error as error:
                errors.add(error.errno)
        qf.check(errors <= {"ENOSPC"}, f"{errors}")
        persist.until("an error", lambda: "cannot be stored" in server.log())
        qf.check(os.strerror(errno.ENOSPC) in server.log(), server.log())
        before = server.control.bitmaps()
        qmp.refused(server.control, [os.strerror(errno.ENOSPC)],
                    "block-dirty-bitmap-add", node="disk", name="new",
                    persistent=True)
        qf.equal("bitmaps", server.control.bitmaps(), before)
        for name in names[:3]:
            server.control.when_free("block-dirty-bitmap-add", node="disk",
                                     name="t" + name)
        qf.equal("b0", our_runs(server, "b0"),
                 persist.granules(writes, 512, size))
        # Some space comes back: not enough for all.
        os.truncate(filler, os.path.getsize(filler) - 128 * KiB)
        time.sleep(1.2)
        with open(filler, "wb"):
            pass
        server.control("block-dirty-bitmap-remove", node="disk",
                       name=names.pop())
        write()
        guest.shutdown()
        persist.until("stored", lambda: persist.INTENT
                      not in persist.info(side))
        sums = persist.digests(server.control, names)
    persist.sound_but_leaks(side)
    qf.equal("digests", persist.qemu_digests(tmp, side, names), sums)
    for name in names[:2]:
        qf.equal(name, persist.qemu_runs(tmp, side, name),
                 persist.granules(writes, 512, size))


def fill(path):
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            qf.equal("error", error.errno, errno.ENOSPC)


def test(tmp):
    qf.need("qemu-img", "qemu-nbd", "qemu-storage-daemon", "nbdinfo")
    qf.parts(tmp, test_qmp, test_qmp_writing, test_first_write,
             test_later_writes, test_store, test_store_again, test_end_fails,
             test_fail_and_die, test_load, test_active, test_create,
             test_disk_fails, test_full_disk)


qf.main(test)
