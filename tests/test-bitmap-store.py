#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Bitmaps that the qcow2 module writes, as QEMU reads them, and the other
way round; and new images that it makes."""

import json
import os
import random
import subprocess
import tempfile
import time

import nbd
import qf
from qf import KiB, MiB, GiB, TiB

# (options of qemu-img create, size, granularities)
IMAGES = (
    ("", 64 * MiB, (512, 4 * KiB, 64 * KiB, MiB, 16 * MiB)),
    ("cluster_size=512", 8 * MiB + 512, (512, 64 * KiB, MiB)),
    ("cluster_size=512,refcount_bits=64", 16 * MiB, (512, 1024)),
    ("cluster_size=4k,refcount_bits=1", GiB + 1536, (64 * KiB, 512 * KiB)),
    ("cluster_size=2M", 3 * TiB, (64 * KiB, 2 * GiB)),
    ("extended_l2=on,lazy_refcounts=on", 100 * MiB, (32 * KiB,)),
)


def ours(path, *args):
    program = os.path.join(os.path.dirname(qf.nbdkit()), "tests",
                           "qcow2-bitmap")
    return qf.run([program, path, *map(str, args)]).stdout


def our_runs(path, name):
    return [tuple(map(int, line.split()))
            for line in ours(path, "dump", name).splitlines()]


def new_socket(tmp):
    return os.path.join(tempfile.mkdtemp(dir=tmp), "nbd")


def connect(sock, process, context=None):
    """To a server that is starting."""
    limit = time.monotonic() + 60
    while True:
        handle = nbd.NBD()
        if context:
            handle.add_meta_context(context)
        try:
            handle.connect_unix(sock)
            return handle
        except nbd.Error:
            qf.check(time.monotonic() < limit and process.poll() is None,
                     "qemu-nbd does not start")
            time.sleep(0.005)


def qemu_runs(tmp, path, name):
    """What qemu-nbd -B says is dirty: [(start, length)]."""
    sock = new_socket(tmp)
    runs = []

    def add(_, offset, entries, __):
        for length, flags in zip(entries[::2], entries[1::2]):
            if flags and runs and sum(runs[-1]) == offset:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            elif flags:
                runs.append((offset, length))
            offset += length

    process = subprocess.Popen([qf.tool("qemu-nbd"), "-r", "-f", "qcow2",
                                "-k", sock, "-B", name, path])
    try:
        handle = connect(sock, process, "qemu:dirty-bitmap:" + name)
        size = handle.get_size()
        for at in range(0, size, 2 * GiB):
            handle.block_status(min(2 * GiB, size - at), at, add)
        handle.shutdown()
    finally:
        process.terminate()
        process.wait()
    return runs


def info(path):
    """{name: (granularity, flags)} as qemu-img has it."""
    data = json.loads(qf.qemu_img("info", "--output=json", path))
    bitmaps = data["format-specific"]["data"].get("bitmaps", [])
    return {b["name"]: (b["granularity"], b["flags"]) for b in bitmaps}


def sound(path):
    """qemu-img check finds neither corruptions nor leaks."""
    qf.qemu_img("check", "-q", path)


def make(tmp, options, size):
    path = os.path.join(tmp, "image.qcow2")
    if os.path.exists(path):
        os.unlink(path)
    qf.qemu_img("create", "-q", "-f", "qcow2",
                *(["-o", options] if options else []), path, str(size))
    return path


def mark_randomly(rng, path, name, size):
    for _ in range(rng.choice((1, 5, 20))):
        offset = rng.randrange(size)
        count = rng.choice((1, 5000, MiB, size))
        ours(path, "set", name, offset, count)
        if count == size and rng.random() < 0.5:
            ours(path, "clear", name)


def test_ours_for_qemu(tmp):
    for seed, (options, size, granularities) in enumerate(IMAGES):
        rng = random.Random(seed)
        path = make(tmp, options, size)
        for g in granularities:
            ours(path, "add", f"b{g}", g)
            sound(path)
        qf.equal("info", info(path),
                 {f"b{g}": (g, ["auto"]) for g in granularities})
        for g in granularities:
            name = f"b{g}"
            mark_randomly(rng, path, name, size)
            sound(path)
            qf.equal(f"{options}, {name}", qemu_runs(tmp, path, name),
                     our_runs(path, name))
        for g in rng.sample(granularities, len(granularities)):
            ours(path, "remove", f"b{g}")
            sound(path)
        qf.equal("info", info(path), {})


def write_as_qemu(path, commands):
    """QEMU writes, and its bitmaps record it."""
    qf.qemu_io(path, commands)


def test_qemu_for_us(tmp):
    for options, size, granularities in IMAGES:
        path = make(tmp, options, size)
        for g in granularities:
            qf.qemu_img("bitmap", "--add", "-g", str(g), path, f"b{g}")
        qf.qemu_img("bitmap", "--add", "--disable", path, "off")
        write_as_qemu(path, ["write -q 0 100k", "write -q 5M 1k",
                             f"write -q {size - 512} 512",
                             "write -q 1M 3M"])
        for g in granularities:
            runs = our_runs(path, f"b{g}")
            qf.check(runs, f"b{g} is empty")
            qf.equal(f"{options}, b{g}", runs, qemu_runs(tmp, path, f"b{g}"))
        lines = ours(path, "list").splitlines()
        qf.equal("flags", lines[-1].split()[2], "disabled")
        # Ours beside theirs; and theirs go on.
        ours(path, "add", "mine", granularities[-1])
        ours(path, "set", "mine", 0, size)
        sound(path)
        write_as_qemu(path, ["write -q 6M 1k"])
        sound(path)
        for name in [f"b{g}" for g in granularities] + ["mine"]:
            qf.equal(f"{options}, {name}", our_runs(path, name),
                     qemu_runs(tmp, path, name))


def test_all_ones(tmp):
    """The end of the disk is no multiple of anything."""
    for size in (512, 10 * MiB + 512, 513 * MiB - 512):
        path = make(tmp, "cluster_size=512", size)
        ours(path, "add", "b", 512)
        ours(path, "set", "b", 0, size)
        sound(path)
        qf.equal(f"{size}", qemu_runs(tmp, path, "b"), [(0, size)])
        qf.equal(f"{size}", our_runs(path, "b"), [(0, size)])


def test_overlay(tmp):
    """The header has no room before the name of the backing file."""
    base = os.path.join(tmp, "base.raw")
    with open(base, "wb") as file:
        file.truncate(MiB)
    path = make(tmp, f"backing_file={base},backing_fmt=raw", MiB)
    ours(path, "add", "b", 4096)
    sound(path)
    data = json.loads(qf.qemu_img("info", "--output=json", path))
    qf.equal("backing file", data["backing-filename"], base)
    qf.equal("info", info(path), {"b": (4096, ["auto"])})


def test_create(tmp):
    for number, size in enumerate((0, 512, MiB + 512, 5 * GiB, 20 * TiB)):
        path = os.path.join(tmp, f"new{number}.qcow2")
        ours(path, "create", size)
        sound(path)
        data = json.loads(qf.qemu_img("info", "--output=json", path))
        qf.equal("size", data["virtual-size"], size)
        if size:
            ours(path, "add", "b", 64 * KiB)
            ours(path, "set", "b", size - 1, 1)
            sound(path)


def test_create_data_file(tmp):
    """QEMU sees the raw file through the image, and can write to it."""
    for number, size in enumerate((MiB + 512, 600 * MiB, 300 * GiB)):
        raw = os.path.join(tmp, f"data{number}.raw")
        path = os.path.join(tmp, f"side{number}.qcow2")
        with open(raw, "wb") as file:
            file.truncate(size)
            file.write(b"start")
            file.seek(size - 3)
            file.write(b"end")
        ours(path, "create", size, raw)
        sound(path)
        data = json.loads(qf.qemu_img("info", "--output=json", path))
        specific = data["format-specific"]["data"]
        qf.equal("raw", [specific["data-file"], specific["data-file-raw"]],
                 [raw, True])
        if size < GiB:
            qf.qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
        ours(path, "add", "b", 64 * KiB)
        qf.qemu_io(path, ["write -q -P 0x55 512k 64k"])
        sound(path)
        with open(raw, "rb") as file:
            file.seek(512 * KiB)
            qf.equal("data", file.read(64 * KiB), b"\x55" * 64 * KiB)
        qf.equal("dirty", our_runs(path, "b"), [(512 * KiB, 64 * KiB)])


class Lock:
    """Our lock on a file, as a context."""

    def __init__(self, path, kind):
        program = os.path.join(os.path.dirname(qf.nbdkit()), "tests",
                               "qcow2-bitmap")
        self.process = subprocess.Popen(
            [program, path, "lock", kind], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        qf.equal("lock", self.process.stdout.readline(), "locked\n")

    def __exit__(self, *_):
        self.process.communicate()


def lock_fails(path, kind):
    """Somebody else's locks keep us out."""
    program = os.path.join(os.path.dirname(qf.nbdkit()), "tests",
                           "qcow2-bitmap")
    done = qf.run([program, path, "lock", kind], ok=1)
    qf.check("another program" in done.stderr, done.stderr)


def qemu_can(path, form, *options):
    """Can qemu-io open it so?"""
    return qf.run([qf.tool("qemu-io"), "-f", form, *options, "-c", "length",
                   path], ok=None).returncode == 0


def test_locks(tmp):
    """QEMU and we never open an image for writing together."""
    path = make(tmp, "", MiB)
    raw = os.path.join(tmp, "locked.raw")
    with open(raw, "wb") as file:
        file.truncate(MiB)
    for kind, can_write, can_read in (("writer", False, False),
                                      ("reader", False, True)):
        with Lock(path, kind):
            qf.equal(f"{kind}, QEMU writes", qemu_can(path, "qcow2"),
                     can_write)
            qf.equal(f"{kind}, QEMU reads", qemu_can(path, "qcow2", "-r"),
                     can_read)
            lock_fails(path, "writer")
    with Lock(raw, "raw"):
        qf.equal("raw, QEMU writes", qemu_can(raw, "raw"), False)
        lock_fails(raw, "raw")
    qf.equal("QEMU writes", qemu_can(path, "qcow2"), True)
    with Lock(path, "reader"), Lock(path, "reader"):
        pass
    for options, refused, allowed in (
            ([], ["reader", "writer"], []),
            (["-r"], ["writer"], ["reader"])):
        sock = new_socket(tmp)
        process = subprocess.Popen([qf.tool("qemu-nbd"), *options, "-t", "-f",
                                    "qcow2", "-k", sock, path])
        try:
            connect(sock, process).shutdown()
            for kind in refused:
                lock_fails(path, kind)
            for kind in allowed:
                with Lock(path, kind):
                    pass
        finally:
            process.terminate()
            process.wait()


def test(tmp):
    qf.need("qemu-img", "qemu-io", "qemu-nbd")
    qf.parts(tmp, test_ours_for_qemu, test_qemu_for_us, test_all_ones,
             test_overlay, test_create, test_create_data_file, test_locks)


qf.main(test)
