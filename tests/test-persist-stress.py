#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Everything at once: clients that come, write and go, stores, QMP commands
that change bitmaps, and the sidecar given away and taken back.  In the end
the bitmap that was there all the time has each write that succeeded, and
no more.

PERSIST_SECONDS is how long it goes on, 4 by default.
"""

import os
import random
import sys
import threading
import time

import nbd
import persist
import qf
import qmp
from persist import MiB

SECONDS = float(os.environ.get("PERSIST_SECONDS", "4"))
SIZE = 64 * MiB
GRANULARITY = 4096
WRITERS = 4
NAMES = ["n0", "n1", "n2", "n3"]


class Load:
    """Threads, and what went wrong in them."""

    def __init__(self, server):
        self.server = server
        self.end = time.monotonic() + SECONDS
        self.writes = []                # that succeeded
        self.failed = []                # that may have marked something
        self.errors = []
        self.commands = 0

    def goes_on(self):
        return time.monotonic() < self.end and not self.errors

    def guarded(self, function, *args):
        try:
            function(*args)
        except Exception as error:      # any, to be told by the main thread
            self.errors.append(f"{function.__name__}: {error!r}")

    def write(self, seed):
        rng = random.Random(seed)
        while self.goes_on():
            handle = self.server.connect()
            for _ in range(rng.randrange(100)):
                count = rng.choice((1, 512, 5000, 70000))
                offset = rng.randrange(SIZE - count)
                try:
                    handle.pwrite(bytes([seed]) * count, offset)
                    self.writes.append((offset, count))
                except nbd.Error as error:
                    # While the sidecar is given away.
                    qf.equal("errno", error.errno, "EPERM")
                    self.failed.append((offset, count))
            handle.shutdown()

    def change(self):
        rng = random.Random(9)
        control = self.server.control
        while self.goes_on():
            kind = rng.choice(("add", "add", "remove", "clear", "enable",
                               "disable", "merge"))
            arguments = {"node": "disk", "name": rng.choice(NAMES)}
            if kind == "add":
                arguments["persistent"] = rng.random() < 0.8
            if kind == "merge":
                arguments = {"node": "disk", "target": rng.choice(NAMES),
                             "bitmaps": [rng.choice(NAMES + ["b"])]}
            try:
                control.request("block-dirty-bitmap-" + kind, arguments)
            except qmp.Error as error:
                qf.check("not found" in error.desc or
                         "already exists" in error.desc, str(error))
            self.commands += 1
            if rng.random() < 0.02:
                control("blockdev-set-active", active=False)
                control("blockdev-set-active", active=True)
            time.sleep(0.002)


def run(load):
    threads = [threading.Thread(target=load.guarded, args=(load.write, seed))
               for seed in range(1, WRITERS + 1)]
    threads.append(threading.Thread(target=load.guarded, args=(load.change,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    qf.check(not load.errors, "; ".join(load.errors))


def test(tmp):
    qf.need("qemu-img", "qemu-nbd", "nbdinfo")
    disk = persist.make_disk(os.path.join(tmp, "disk"), SIZE)
    side = os.path.join(tmp, "side")
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                       f"dirty-bitmap=b,persistent=on,"
                       f"granularity={GRANULARITY}",
                       "bitmap-sync=1") as server:
        load = Load(server)
        run(load)
        ours = persist.our_runs(server, "b")
    print(f"{len(load.writes)} writes, {len(load.failed)} refused, "
          f"{load.commands} commands")
    qf.check(len(load.writes) > 100, "hardly any writes")
    persist.sound(side)
    qf.equal("QEMU's", persist.qemu_runs(tmp, side, "b"), ours)
    persist.within("writes", persist.granules(load.writes, GRANULARITY, SIZE),
                   ours)
    persist.within("bitmap", ours,
                   persist.granules(load.writes + load.failed, GRANULARITY,
                                    SIZE))


sys.dont_write_bytecode = True
qf.main(test)
