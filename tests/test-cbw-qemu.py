#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The same requests to qemu-storage-daemon with its filter copy-before-write
and a node snapshot-access, and to ours: the views are the same.

The first patterns are those of QEMU's test image-fleecing; random ones
follow.  QEMU 7.2 dies on unaligned discards of a snapshot, and its maps of
clusters that were copied are coarser, so of maps only what they say of
access is compared; EACCES is EPERM for us.
"""

import json
import os
import random
import socket
import subprocess

import cbw
import nbd
import qf
from qf import KiB, MiB

SIZE = 64 * MiB
CLUSTER = 64 * KiB
ROUNDS = int(os.environ.get("QF_QEMU_ROUNDS", "6"))

# (pattern, offset, count), as in QEMU's tests/qemu-iotests/tests/image-fleecing
PATTERNS = [(0x5d, 0, 64 * KiB), (0xd5, MiB, 64 * KiB),
            (0xdc, 32 * MiB, 64 * KiB), (0xcd, 0x3ff0000, 64 * KiB)]
OVERWRITE = [(0xab, 0, 64 * KiB),            # full overwrite
             (0xad, 0x00f8000, 64 * KiB),    # partial, left (1M - 32K)
             (0x1d, 0x2008000, 64 * KiB),    # partial, right (32M + 32K)
             (0xea, 0x3fe0000, 64 * KiB)]    # adjacent, left (64M - 128K)
ZEROES = [(0, 0x00f8000, 32 * KiB), (0, 0x2010000, 32 * KiB),
          (0, 0x3fe0000, 64 * KiB)]


def pattern(byte, offset, count):
    return ("pwrite", offset, bytes([byte]) * count)


class Daemon:
    """A qemu-storage-daemon with a disk, and another for the target."""

    def __init__(self, tmp):
        self.dir = os.path.join(tmp, "qsd")
        os.makedirs(self.dir, exist_ok=True)
        self.sock = os.path.join(self.dir, "nbd")
        qmp_path = os.path.join(self.dir, "qmp")
        nodes = []
        for name in ("disk", "target"):
            raw = os.path.join(self.dir, name)
            with open(raw, "wb") as file:
                file.truncate(SIZE)
            nodes += ["--blockdev", f"driver=file,node-name={name}-file,"
                      f"filename={raw},discard=unmap", "--blockdev",
                      f"driver=raw,node-name={name},file={name}-file,"
                      "discard=unmap"]
        self.process = subprocess.Popen(
            [qf.tool("qemu-storage-daemon"), *nodes,
             "--nbd-server", f"addr.type=unix,addr.path={self.sock},"
             "max-connections=100",
             "--chardev", f"socket,id=qmp,path={qmp_path},server=on,wait=off",
             "--monitor", "chardev=qmp"], stdin=subprocess.DEVNULL)
        self.socket = socket.socket(socket.AF_UNIX)
        cbw.wait_until(lambda: self.socket.connect_ex(qmp_path) == 0,
                       "the daemon")
        self.lines = self.socket.makefile()
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.socket.sendall(json.dumps(
            {"execute": command, "arguments": arguments}).encode())
        while True:
            reply = json.loads(self.lines.readline())
            if "event" not in reply:
                break
        qf.check("return" in reply, f"{command}: {reply}")
        return reply["return"]

    def export(self, node, name, writable):
        self("block-export-add", type="nbd", id=name,
             **{"node-name": node}, name=name, writable=writable)

    def connect(self, name):
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.set_export_name(name)
        handle.connect_unix(self.sock)
        return handle

    def stop(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait()


def send(handle, request):
    kind, offset, what = request
    if kind == "pwrite":
        handle.pwrite(what, offset)
    elif kind == "zero":
        handle.zero(what, offset)
    else:
        handle.trim(what, offset)


def access(handle):
    """For each cluster: its content, or that it is not accessible."""
    result = []
    for at in range(0, SIZE, CLUSTER):
        try:
            result.append(bytes(handle.pread(CLUSTER, at)))
        except nbd.Error as error:
            qf.check(error.errno in ("EPERM", "EACCES", "EINVAL"),
                     f"at {at}: {error}")
            result.append(None)
    return result


def run_qemu(tmp, before, after, discards, bitmap):
    daemon = Daemon(tmp)
    try:
        daemon.export("disk", "plain", True)
        handle = daemon.connect("plain")
        for request in before:
            if request == "bitmap":
                daemon("block-dirty-bitmap-add", node="disk", name="b",
                       granularity=CLUSTER)
            else:
                send(handle, request)
        handle.shutdown()
        daemon("block-export-del", id="plain", mode="hard")
        options = {"bitmap": {"node": "disk", "name": "b"}} if bitmap else {}
        daemon("blockdev-add", driver="copy-before-write", file="disk",
               target="target", discard="unmap", **{"node-name": "cbw"},
               **options)
        daemon("blockdev-add", driver="snapshot-access", file="cbw",
               discard="unmap", **{"node-name": "access"})
        daemon.export("cbw", "guest", True)
        daemon.export("access", "view", True)
        guest, view = daemon.connect("guest"), daemon.connect("view")
        for request in after:
            send(guest, request)
        for offset, count in discards:
            view.trim(count, offset)
        return access(view)
    finally:
        daemon.stop()


def run_ours(tmp, before, after, discards, bitmap):
    with cbw.served(tmp, "memory", str(SIZE), "cbw-discard=on") \
            as (server, control):
        guest = server.connect()
        for request in before:
            if request == "bitmap":
                control("block-dirty-bitmap-add", node="disk", name="b",
                        granularity=CLUSTER)
            else:
                send(guest, request)
        cbw.create(control, "s", **({"bitmap": "b"} if bitmap else {}))
        view = server.connect("snapshot/s")
        for request in after:
            send(guest, request)
        for offset, count in discards:
            view.trim(count, offset)
        result = access(view)
        readable = sum(c is not None for c in result) * CLUSTER
        qf.equal("accessible", cbw.query(control, "s")["bytes-accessible"],
                 readable)
        for start, end, kind in cbw.read_map(view):
            inside = result[start // CLUSTER:(end + CLUSTER - 1) // CLUSTER]
            qf.check(all((c is None) == (kind == cbw.HOLE) for c in inside),
                     f"the map says {kind} of {start} - {end}")
        guest.shutdown()
        view.shutdown()
        return result


def compare(tmp, what, before, after, discards=(), bitmap=False):
    qemu = run_qemu(tmp, before, after, discards, bitmap)
    ours = run_ours(tmp, before, after, discards, bitmap)
    wrong = [i for i in range(SIZE // CLUSTER) if qemu[i] != ours[i]]
    qf.check(not wrong, f"{what}: clusters {wrong[:20]} are not as QEMU's")
    print(f"{what}: {sum(c is not None for c in ours)} clusters accessible, "
          f"{sum(c is not None and any(c) for c in ours)} not zeroes")


def test_fleecing(tmp):
    first = [pattern(*p) for p in PATTERNS]
    writes = [pattern(*p) for p in OVERWRITE]
    zeroes = [("zero", offset, count) for _, offset, count in ZEROES]
    compare(tmp, "patterns", first, writes + zeroes)
    compare(tmp, "with a bitmap", ["bitmap", *first], writes + zeroes,
            bitmap=True)
    compare(tmp, "some of it dirty", [first[0], "bitmap", *first[1:3]],
            writes + zeroes, bitmap=True)
    compare(tmp, "with discards", ["bitmap", *first], writes + zeroes,
            [(MiB, CLUSTER), (32 * MiB, 2 * CLUSTER)], bitmap=True)


def random_requests(rng, number):
    for _ in range(number):
        count = rng.choice((512, 4 * KiB, 60 * KiB, 64 * KiB, 200 * KiB))
        offset = rng.randrange((SIZE - count) // 512 + 1) * 512
        kind = rng.choice(("pwrite", "pwrite", "zero", "trim"))
        yield (kind, offset, rng.randbytes(count) if kind == "pwrite"
               else count)


def test_random(tmp):
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        before = [*random_requests(rng, 60), "bitmap",
                  *random_requests(rng, 60)]
        after = list(random_requests(rng, 150))
        # Of whole clusters only: QEMU's trims are exact in clusters.
        discards = [(rng.randrange(SIZE // CLUSTER - 8) * CLUSTER,
                     rng.randrange(1, 8) * CLUSTER)
                    for _ in range(seed % 2 * 8)]
        compare(tmp, f"seed {seed}", before, after, discards,
                bitmap=seed % 3 != 0)


def test(tmp):
    qf.need("qemu-storage-daemon")
    qf.parts(tmp, test_fleecing, test_random)


qf.main(test)
