#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""qcow2-check=full: what it serves, what it refuses, what it says.

That its figures are right is shown by test-check-figures.py.
"""

import contextlib
import json
import os
import re
import struct
import threading
import time

import disks
import images
import nbd
import qcow2edit as edit
import qf
from qf import KiB, MiB

CHECK = "qcow2-check=full"

# A check of what is small must not take longer, however it was made, not
# even with a sanitizer.
LIMIT = 60


def image(tmp, name, options="", size=4 * MiB):
    b = images.Builder(tmp, name, size, options)
    b.create()
    b.mix(rounds=12)
    return b.path


def refcount_at(path, cluster):
    """Where the refcount of a cluster stands (16 bits, first block)."""
    table = edit.get(path, "refcount_offset")
    block, = struct.unpack(">Q", edit.read_at(path, table, 8))
    return block + cluster * 2


def leak(path):
    """A cluster more in the file, with a refcount, to which none refers."""
    offset = edit.append_clusters(path, b"x")
    cluster = offset >> edit.get(path, "cluster_bits")
    edit.write_at(path, refcount_at(path, cluster), struct.pack(">H", 1))


def corrupt(path):
    """The first data cluster's refcount says that it is free."""
    offset = next(entry & edit.OFFSET_MASK
                  for _, entry in edit.l2_entries(path)
                  if not entry & edit.COMPRESSED and entry & ~511)
    cluster = offset >> edit.get(path, "cluster_bits")
    edit.write_at(path, refcount_at(path, cluster), struct.pack(">H", 0))


def figures(path):
    done = qf.run([qf.tool("qemu-img"), "check", "--output=json", path],
                  ok=None)
    return json.loads(done.stdout)


def connect_fails(server, words):
    try:
        server.connect().shutdown()
    except nbd.Error:
        log = server.log()
        for word in words:
            qf.check(word in log, f"no {word!r} in {log!r}")
        return
    raise qf.Fail("the connection should have been refused")


def test_sound(tmp):
    path = image(tmp, "sound")
    oracle = disks.oracle_of(tmp, path)
    expected = figures(path)
    with qf.serve_qcow2(tmp, path, CHECK) as server:
        qf.equal("log before", server.log(), "")
        disks.verify_disk(server, "sound", oracle)
        log = server.log()
        for word in ("sound", "no corruptions", "0 leaked",
                     f"{expected['allocated-clusters']} of "
                     f"{expected['total-clusters']} clusters",
                     f"image end offset {expected['image-end-offset']}"):
            qf.check(word in log, f"no {word!r} in {log!r}")
        # Once is enough.
        disks.verify_disk(server, "again", oracle)
        qf.equal("log after", server.log(), log)


def test_leaks(tmp):
    path = image(tmp, "leaks")
    oracle = disks.oracle_of(tmp, path)
    leak(path)
    leak(path)
    qf.equal("qemu-img's leaks", figures(path)["leaks"], 2)
    with qf.serve_qcow2(tmp, path, CHECK) as server:
        disks.verify_disk(server, "leaks", oracle)
        qf.check("2 leaked" in server.log(), server.log())


def test_corruption(tmp):
    path = image(tmp, "corruption")
    oracle = disks.oracle_of(tmp, path)
    corrupt(path)
    expected = figures(path)["corruptions"]
    with qf.serve_qcow2(tmp, path, CHECK) as server:
        for _ in range(2):
            connect_fails(server, [f"{expected} corruptions", path,
                                   "refcount", "qemu-img check"])
        # Once it is repaired it can be served.
        qf.qemu_img("check", "-q", "-r", "all", path)
        disks.verify_disk(server, "repaired", oracle)
    corrupt(path)
    for parameters in (["qcow2-check=off"], []):
        with qf.serve_qcow2(tmp, path, *parameters) as server:
            disks.verify_disk(server, "not checked", oracle)


def test_chain(tmp):
    """A damaged backing file is found, too."""
    base = image(tmp, "base")
    path = os.path.join(tmp, "overlay.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2",
                path)
    policy = f"qcow2-backing=file:{base}"
    oracle = disks.oracle_of(tmp, path)
    with qf.serve_qcow2(tmp, path, CHECK, policy) as server:
        disks.verify_disk(server, "chain", oracle)
        qf.equal("summaries", server.log().count("no corruptions"), 2)
    corrupt(base)
    with qf.serve_qcow2(tmp, path, CHECK, policy) as server:
        connect_fails(server, ["corruptions", base])


def connect_in_vain(server):
    with contextlib.suppress(nbd.Error):
        server.connect()


def test_progress(tmp):
    """In the debug log; and a check that takes long can be ended."""
    path = image(tmp, "progress", "cluster_size=512", MiB)
    with qf.serve(tmp, "-v", "-r", "--filter=qcow2", "file", path,
                  CHECK) as server:
        server.connect().shutdown()
        steps = re.findall(r"qcow2-check: .*: (\d+)%", server.log())
        qf.check(len(steps) > 3 and steps[-1] == "100", f"steps: {steps}")
    below = qf.Server(tmp, ["-r", "--filter=delay", "file", path,
                            "delay-read=200ms"])
    try:
        with qf.serve(tmp, "-r", "--filter=qcow2", "nbd", below.uri(),
                      CHECK) as server:
            client = threading.Thread(target=connect_in_vain,
                                      args=[server], daemon=True)
            client.start()
            # In the midst of it.
            time.sleep(3)
            qf.check("no corruptions" not in server.log(), "too fast")
            began = time.monotonic()
        qf.check(time.monotonic() - began < LIMIT, "does not end")
        client.join()
    finally:
        below.kill()


def test_parameter(tmp):
    path = image(tmp, "parameter")
    done = qf.run([qf.nbdkit(), "--filter=qcow2", "file", path,
                   "qcow2-check=some", "--run", "true"], ok=1)
    qf.check("qcow2-check=full" in done.stderr, done.stderr)


# -------------------------------------------------- made to take for ever

def bounded(what, path):
    """It ends soon and finds the image bad."""
    program = os.path.join(os.path.dirname(qf.nbdkit()), "tests",
                           "qcow2-check")
    began = time.monotonic()
    done = qf.run([program, path], ok=0)
    took = time.monotonic() - began
    qf.check(took < LIMIT, f"{what}: took {took:.1f} s")
    qf.check(json.loads(done.stdout)["corruptions"], f"{what}: not found")


def test_many_l1_entries(tmp):
    """All entries of the largest L1 table name one and the same L2."""
    path = os.path.join(tmp, "bomb.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M",
                path, "1M")
    l2 = edit.append_clusters(path, bytes(8) + struct.pack(
        ">Q", 1 << 63 | 4 * MiB) * (2 * MiB // 8 - 1))
    count = 32 * MiB // 8
    l1 = edit.append_clusters(path, struct.pack(">Q", 1 << 63 | l2) * count)
    edit.put(path, "l1_offset", l1)
    edit.put(path, "l1_size", count)
    bounded("one L2 table", path)
    edit.write_at(path, l1, b"".join(
        struct.pack(">Q", l2 + 512 * i) for i in range(count // 64)))
    bounded("L2 tables that are not aligned", path)


def test_many_snapshots(tmp):
    """L1 tables of snapshots that are all in one place."""
    path = os.path.join(tmp, "snapshots.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512",
                path, "1M")
    l1 = edit.append_clusters(path, struct.pack(">Q", 512) * (MiB // 8))
    edit.set_snapshots(path, [
        {"l1_offset": l1 + 512 * (i % 100), "l1_size": 4 * MiB,
         "id": str(i).encode(), "name": b"", "sec": 0, "nsec": 0,
         "clock": 0, "state": 0, "extra": bytes(16)}
        for i in range(60000)])
    bounded("L1 tables", path)


def test_bitmaps(tmp):
    """Bitmap tables that overlap, directories that are not right."""
    path = os.path.join(tmp, "bitmaps.qcow2")

    def make(what, directory, count, length=None):
        qf.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512",
                    path, "1M")
        offset = edit.append_clusters(path, directory)
        edit.set_extensions(path, [(0x23852875, struct.pack(
            ">IIQQ", count, 0, length or len(directory), offset))])
        edit.put(path, "autoclear", 1)
        bounded(what, path)

    def entry(name, table=4096, size=MiB, flags=2, kind=1, bits=16,
              extra=0):
        out = struct.pack(">QIIBBHI", table, size, flags, kind, bits,
                          len(name), extra) + name
        return out + bytes(-len(out) % 8)

    make("tables", b"".join(entry(b"b%d" % i) for i in range(60000)), 60000)
    make("count", entry(b"b"), 2)
    make("size", entry(b"b"), 1, 1 << 40)
    make("size, short", entry(b"b"), 1, 20)
    make("no name", entry(b""), 1)
    make("name", entry(b"n" * 1024), 1)
    make("type", entry(b"b", kind=2), 1)
    make("flags", entry(b"b", flags=8), 1)
    make("granularity", entry(b"b", bits=8), 1)
    make("extra data", entry(b"b", extra=0xfffffff0), 1)
    make("table offset", entry(b"b", table=4097), 1)
    make("table size", entry(b"b", size=0xffffffff), 1)
    make("nothing", bytes(KiB), 1)


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    qf.parts(tmp, test_sound, test_leaks, test_corruption, test_chain,
             test_progress, test_parameter, test_many_l1_entries,
             test_many_snapshots, test_bitmaps)


qf.main(test)
