#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Damaged and hostile images: right data or a clear error, nothing else.

Every field of every structure is set to bad values, one at a time, and
files are cut off.  For each image the server must survive, answer soon,
take little memory, and give for each piece of the disk either an error,
with a reason in the log, or the right data: what qemu-img reads from the
same damaged image.  Where qemu-img refuses the image as a whole, the data
must be that of the undamaged one, or of the field's new meaning as
explained in EXPLAINED.

Usage: test-hostile.py [CASE...]; a case is named BASE:FIELD=VALUE.
"""

import concurrent.futures
import os
import re
import struct
import sys

import nbd

import images
import qcow2edit as edit
import qf
from qf import KiB, MiB

PIECE = 64 * KiB
# A disk may become as large as 8 EiB: then only some of it is read.
READ_AT_MOST = 8 * MiB
# Beyond an intact image's; the caches are bounded by the parameter.
MEMORY_LIMIT = 64 * MiB
CACHE = 1 * MiB

# Sanitizers make each server slow to start, and take memory themselves:
# with them, every so many images.
SAMPLE = 25 if qf.SLOW else 1

# Fields for which we may read what qemu-img refuses, and the data need not
# be that of the intact image: the field is allowed to say something else.
EXPLAINED = {
    # QEMU reads no image whose snapshots are bad; the active disk does not
    # depend on them.
    r"snapshot\d\.(l1_offset|l1_size|extra|date|id|name)",
    # QEMU checks what only a writer needs, and in 7.2 looks for overlaps.
    r"refcount\w*",
}


# ------------------------------------------------------------ the images

def base_plain(tmp):
    """Version 3: all kinds of clusters, two snapshots, small clusters."""
    b = images.Builder(tmp, "plain", 640 * KiB, "cluster_size=4k")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k",
                b.path, "640k")
    qf.qemu_io(b.path, ["write -q -P 1 0 64k", "write -q -c -P 2 64k 4k",
                        "write -q -c -P 3 68k 4k", "write -q -P 4 80k 5000",
                        "write -q -z 100k 8k", "write -q -z -u 0 4k",
                        "write -q -P 5 600k 40k"])
    qf.qemu_img("snapshot", "-c", "one", b.path)
    qf.qemu_io(b.path, ["write -q -P 6 16k 9k", "write -q -P 7 300k 4k"])
    qf.qemu_img("snapshot", "-c", "two", b.path)
    qf.qemu_io(b.path, ["write -q -P 8 20k 4k"])
    return b.path


def base_extended(tmp):
    """Extended L2 entries and zstd."""
    path = os.path.join(tmp, "extended.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o",
                "cluster_size=16k,extended_l2=on,compression_type=zstd",
                path, "1M")
    qf.qemu_io(path, ["write -q -P 1 0 3k", "write -q -P 2 8k 40k",
                      "write -q -c -P 3 64k 16k", "write -q -z 20k 4k",
                      "write -q -P 4 1000k 24k"])
    return path


def base_old(tmp):
    """Version 2 with the smallest clusters."""
    path = os.path.join(tmp, "old.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o",
                "compat=0.10,cluster_size=512", path, "256k")
    qf.qemu_io(path, ["write -q -P 1 0 20k", "write -q -c -P 2 40k 512",
                      "write -q -P 3 250k 3k"])
    qf.qemu_img("snapshot", "-c", "one", path)
    qf.qemu_io(path, ["write -q -P 4 1k 1k"])
    return path


BASES = {"plain": base_plain, "extended": base_extended, "old": base_old}


# ------------------------------------------------------------ the damage

def header_fields(path):
    version = edit.get(path, "version")
    for name, (offset, form) in edit.FIELDS.items():
        if version >= 3 or offset < 72:
            yield name, offset, struct.calcsize(">" + form)


def extension_fields(path):
    at = edit.get(path, "header_length") \
        if edit.get(path, "version") >= 3 else 72
    for i, (_, data) in enumerate(edit.extensions(path) + [(0, b"")]):
        yield f"ext{i}.type", at, 4
        yield f"ext{i}.length", at + 4, 4
        at += 8 + (len(data) + 7) // 8 * 8


def snapshot_fields(path):
    at = edit.get(path, "snapshots_offset")
    for i, snap in enumerate(edit.snapshots(path)):
        for name, offset, width in (
                ("l1_offset", 0, 8), ("l1_size", 8, 4), ("id_size", 12, 2),
                ("name_size", 14, 2), ("date", 16, 4), ("state", 32, 4),
                ("extra_size", 36, 4)):
            yield f"snapshot{i}.{name}", at + offset, width
        if len(snap["extra"]) >= 16:
            yield f"snapshot{i}.extra_disk_size", at + 48, 8
        at += -(-(40 + len(snap["extra"]) + len(snap["id"])
                  + len(snap["name"])) // 8) * 8


def table_fields(path):
    """Entries of the tables: the first ones of every kind."""
    l1 = edit.get(path, "l1_offset")
    for i in range(min(2, edit.get(path, "l1_size"))):
        yield f"l1[{i}]", l1 + 8 * i, 8
    extended = edit.get(path, "version") >= 3 and \
        edit.get(path, "incompatible") & edit.INCOMPAT_EXTENDED_L2
    kinds = {}
    for at, entry in edit.l2_entries(path):
        kind = (bool(entry & edit.COMPRESSED), entry & 1)
        kinds.setdefault(kind, []).append(at)
    for (compressed, zero), places in kinds.items():
        for at in (places[0], places[-1]):
            name = "compressed" if compressed else "zero" if zero else "data"
            yield f"l2.{name}@{at}", at, 8
            if extended:
                yield f"l2.{name}.bitmap@{at}", at + 8, 8
    for i, snap in enumerate(edit.snapshots(path)
                             if edit.get(path, "nb_snapshots") else []):
        yield f"snapshot{i}.l1[0]", snap["l1_offset"], 8
    table = edit.get(path, "refcount_offset")
    yield "refcount_table[0]", table, 8
    block, = struct.unpack(">Q", edit.read_at(path, table, 8))
    yield "refcount_block[0..3]", block, 8


def values_for(path, at, width):
    """Bad values for a field, by name."""
    old = int.from_bytes(edit.read_at(path, at, width), "big")
    top = (1 << 8 * width) - 1
    cluster = 1 << edit.get(path, "cluster_bits")
    size = os.path.getsize(path)
    l1 = edit.get(path, "l1_offset")
    values = {
        "0": 0, "1": 1, "max": top, "half": top // 2, "high": 1 << 8 * width - 1,
        "plus1": old + 1, "minus1": old - 1, "plus512": old + 512,
        "double": old * 2, "swapped": int.from_bytes(
            edit.read_at(path, at, width), "little"),
        "beyond": (size + cluster - 1) // cluster * cluster + 16 * cluster,
        "last": (size - 1) // cluster * cluster, "512": 512,
        "cluster": cluster, "self": at // cluster * cluster, "l1": l1,
        "compressed": old | edit.COMPRESSED, "zero": old | 1,
        "copied-l1": 1 << 63 | l1, "huge-offset": 0x00fffffffffffe00,
    }
    seen = {old}
    for name, value in values.items():
        if 0 <= value <= top and value not in seen:
            seen.add(value)
            yield name, value


class Case:
    def __init__(self, base, name, at=None, content=b"", cut=None):
        self.base, self.name = base, name
        self.at, self.content, self.cut = at, content, cut

    def __str__(self):
        return f"{self.base.name}:{self.name}"

    def make(self, tmp):
        path = os.path.join(tmp, "image")
        content = bytearray(self.base.content)
        if self.at is not None:
            content[self.at:self.at + len(self.content)] = self.content
        with open(path, "wb") as file:
            file.write(content if self.cut is None else content[:self.cut])
        return path


class Base:
    """An intact image, and what is in it."""

    def __init__(self, tmp, name):
        self.name = name
        self.path = BASES[name](tmp)
        with open(self.path, "rb") as file:
            self.content = file.read()
        self.exports = [""]
        if edit.get(self.path, "nb_snapshots"):
            self.exports += ["@" + s["id"].decode()
                             for s in edit.snapshots(self.path)]
        self.disks = {export: qemu_content(tmp, self.path, export)
                      for export in self.exports}

    def cases(self):
        for fields in (header_fields, extension_fields, table_fields,
                       snapshot_fields):
            if fields is snapshot_fields and len(self.exports) == 1:
                continue
            for name, at, width in fields(self.path):
                for label, value in values_for(self.path, at, width):
                    yield Case(self, f"{name}={label}", at,
                               value.to_bytes(width, "big"))
        yield from self.bad_streams()
        yield from self.cuts()

    def bad_streams(self):
        """Other bytes where compressed clusters are."""
        seen = set()
        for _, entry in edit.l2_entries(self.path):
            if not entry & edit.COMPRESSED:
                continue
            at, sectors = edit.compressed_extent(self.path, entry)
            if at in seen:
                continue
            seen.add(at)
            length = min(sectors * 512 - at % 512, len(self.content) - at)
            for name, content in streams(length):
                yield Case(self, f"stream@{at}={name}", at, content[:length])

    def cuts(self):
        step = 512 if len(self.content) < 256 * KiB else 4 * KiB
        for cut in [*range(0, min(len(self.content), 64 * KiB), 512),
                    *range(64 * KiB, len(self.content), step)]:
            yield Case(self, f"cut={cut}", cut=cut)


def streams(length):
    yield "zeroes", bytes(length)
    yield "ones", b"\xff" * length
    yield "noise", images.NOISE[:length]
    # Deflate: a stored block that goes on for ever; a bomb.
    yield "stored", b"\x01\xff\xff\x00\x00" + bytes(length)
    yield "deflate-bomb", b"\xec\xc1\x01\x01\x00\x00\x00\x80\x90\xfe\xaf\xee" \
        + b"\x08\x0a\x00" * length
    # zstd: a frame said to hold 8 EiB; a run of 128 KiB over and over; one
    # with a window of gigabytes.
    yield "zstd-size", b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + bytes(length)
    yield "zstd-bomb", b"\x28\xb5\x2f\xfd\x00\x58" \
        + b"\x02\x00\x10\x41" * (length // 4)
    yield "zstd-window", b"\x28\xb5\x2f\xfd\x00\xf8\x02\x00\x10\x41"
    yield "zstd-skip", b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + bytes(length)


# ----------------------------------------------------------- the verdict

def qemu_content(tmp, path, export):
    """The disk as qemu-img reads it, or None if it does not."""
    out = os.path.join(tmp, "oracle")
    options = ["-l", "snapshot.id=" + export[1:]] if export else []
    done = qf.run([qf.tool("qemu-img"), "convert", "-f", "qcow2",
                   "-O", "raw", *options, path, out], ok=None)
    if done.returncode != 0:
        return None
    with open(out, "rb") as file:
        return file.read()


def read_disk(handle):
    """{offset: data, or None if there was an error}."""
    size = handle.get_size()
    if size <= READ_AT_MOST:
        offsets = range(0, size, PIECE)
    else:
        offsets = [*range(0, 2 * MiB, PIECE), size // 2 // PIECE * PIECE,
                   (size - 1) // PIECE * PIECE]
    found = {}
    for offset in offsets:
        try:
            found[offset] = bytes(handle.pread(min(PIECE, size - offset),
                                               offset))
        except nbd.Error:
            found[offset] = None
    try:
        if size:
            handle.block_status(min(size, 1 << 31), 0, lambda *args: 0)
    except nbd.Error:
        pass
    return found


def peak_memory(server):
    with open(f"/proc/{server.process.pid}/status") as file:
        kib, = re.findall(r"VmHWM:\s+(\d+) kB", file.read())
    return int(kib) * KiB


def fits(piece, offset, disk):
    """Is this what the disk has there, as far as both reach?"""
    part = disk[offset:offset + len(piece)]
    return piece[:len(part)] == part and not any(piece[len(part):])


def is_cut_off(case, piece, offset, disk):
    """Data is missing, but less than a cluster at any place: QEMU, too,
    reads zeroes where a file ends inside its last cluster.
    """
    part = disk[offset:offset + len(piece)]
    return case.cut is not None and \
        all(mine in (0, theirs) for mine, theirs in zip(piece, part))


def judge(case, export, found, oracle):
    """Errors are allowed; data must be right."""
    intact = case.base.disks[export]
    explained = any(re.fullmatch(pattern + r"(\W.*)?=.*", case.name)
                    for pattern in EXPLAINED)
    for offset, piece in found.items():
        if piece is None:
            continue
        if oracle is not None and fits(piece, offset, oracle):
            continue
        # qemu-img gives each snapshot the size that the disk has now.
        if (oracle is None or export) and fits(piece, offset, intact):
            continue
        if oracle is None and (explained or not any(piece) or
                               is_cut_off(case, piece, offset, intact)):
            continue
        qf.check(False, f"{export!r}: wrong data at {offset}")


def test_case(tmp, case):
    path = case.make(tmp)
    # A part of a file is served, so the check at start does not see it.
    with qf.serve(tmp, "-r", "--filter=qcow2", "--filter=offset", "file",
                  path, "offset=0", f"qcow2-cache-size={CACHE}") as server:
        failed = False
        for export in case.base.exports:
            try:
                handle = server.connect(export)
            except nbd.Error:
                failed = True
                continue
            found = read_disk(handle)
            failed |= None in found.values()
            if any(piece is not None for piece in found.values()):
                small = handle.get_size() <= READ_AT_MOST
                judge(case, export, found,
                      qemu_content(tmp, path, export) if small else None)
            handle.shutdown()
        memory = peak_memory(server)
        qf.check(memory < MEMORY_LIMIT or qf.SLOW,
                 f"{memory // MiB} MiB of memory")
        if failed:
            qf.check("error: " in server.log(), "no reason in the log")
    return failed


def test_start(tmp, case):
    """Over a file the server may also refuse to start, with a reason."""
    path = case.make(tmp)
    done = qf.run([qf.nbdkit(), "-r", "-U", "-", "--filter=qcow2", "file",
                   path, "--run", "exit 0"], ok=None, timeout=30)
    qf.check(done.returncode in (0, 1),
             f"at start: status {done.returncode}: {done.stderr}")
    qf.check(done.returncode == 0 or re.search(r"error: .*image: \w",
                                               done.stderr),
             f"at start: no reason: {done.stderr}")


def run_case(tmp, number, case):
    own = os.path.join(tmp, f"c{number}")
    os.mkdir(own)
    try:
        if number % 4 == 0:
            test_start(own, case)
        return test_case(own, case), None
    except (qf.Fail, nbd.Error) as error:
        return None, f"FAILED: {case}: {error}"
    finally:
        qf.run(["rm", "-rf", own])


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    cases = [case for name in BASES for case in Base(tmp, name).cases()
             if not sys.argv[1:] or f"{name}:{case.name}" in sys.argv[1:]]
    if not sys.argv[1:]:
        cases = cases[::SAMPLE]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda item: run_case(tmp, *item),
                                enumerate(cases)))
    complaints = [why for _, why in results if why]
    for why in complaints:
        print(why)
    errors = sum(failed is True for failed, _ in results)
    print(f"{len(cases)} images, of which {errors} lead to errors")
    qf.check(not complaints, f"{len(complaints)} of {len(cases)} failed")


qf.main(test)
