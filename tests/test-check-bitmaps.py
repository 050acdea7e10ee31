#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Our check of images whose bitmaps are damaged gives qemu-img's figures.

Each field of the extension, of the directory's entries and of the tables
gets bad values, and clusters bad refcounts; then many of them at random.
An image that QEMU does not open must be found bad by ours, too.

PERSIST_DAMAGED says how many are damaged at random (400).
"""

import collections
import os
import random
import shutil
import struct

import qcow2edit as edit
import qf
from figures import ours, theirs
from qf import KiB, MiB

DAMAGED = int(os.environ.get("PERSIST_DAMAGED", "100" if qf.SLOW else "400"))

EXTENSION = 0x23852875
IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4

# (name, options, size)
IMAGES = (
    ("512", "cluster_size=512", 4 * MiB + 512),
    ("4k", "cluster_size=4k,refcount_bits=1", 300 * MiB),
    ("64k", "cluster_size=64k", 3072 * MiB),
)


# Where ours calls an image bad of which QEMU says nothing: the format wants
# it otherwise, and the filters refuse it.
STRICTER = ("there is no bitmaps extension", "a bitmap has no name")


def is_stricter(actual, our_words, expected):
    return actual and actual["corruptions"] > expected["corruptions"] \
        and any(words in our_words for words in STRICTER)


def has_unknown_flag(path):
    """One that the format knows, and QEMU does not."""
    try:
        return any(flags & EXTRA_COMPATIBLE and not flags & ~7 for flags in
                   (struct.unpack(">I", edit.read_at(path, at + 12, 4))[0]
                    for at in Image(path).entries))
    except (struct.error, KeyError, OSError):
        return False


def compare(what, path):
    expected, their_words = theirs(path)
    actual, our_words = ours(path)
    if expected is None:
        if "satisfy the constraints" in their_words and \
           has_unknown_flag(path):
            return "QEMU does not know"
        qf.check(actual is None or actual["corruptions"]
                 or actual["check-errors"],
                 f"{what}: QEMU has no figures ({their_words}), but ours "
                 f"find nothing wrong: {actual}")
        return "QEMU refuses"
    if actual != expected and is_stricter(actual, our_words, expected):
        return "ours is stricter"
    qf.check(actual == expected, f"{what}:\nours {actual}\nQEMU {expected}\n"
             f"{our_words[:2000]}\n--- QEMU:\n{their_words[:2000]}")
    bad = expected["corruptions"] or expected["check-errors"]
    return "corrupt" if bad else "leaks" if expected["leaks"] else "sound"


# ----------------------------------------------------------------- images

def make(tmp, name, options, size):
    """Bitmaps with data, all set, empty, and one that is in use."""
    path = os.path.join(tmp, name + ".qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path,
                str(size))
    granularity = "512" if size < 64 * MiB else "4096"
    for bitmap in ("data", "more data", "used"):
        qf.qemu_img("bitmap", "--add", "-g", granularity, path, bitmap)
    qf.qemu_io(path, [f"write -q {at} 4k" for at in
                      range(0, size - 4 * KiB, size // 7 // 512 * 512)])
    qf.qemu_img("bitmap", "--add", path, "empty")
    qf.qemu_img("bitmap", "--add", "--disable", path, "off")
    image = Image(path)
    image.put_entry(2, "flags", IN_USE | AUTO)
    qf.equal(name, compare(name, path), "sound")
    return path


ENTRY = {"table_offset": (0, "Q"), "table_size": (8, "I"),
         "flags": (12, "I"), "type": (16, "B"), "granularity": (17, "B"),
         "name_size": (18, "H"), "extra_size": (20, "I")}
HEADER = {"count": (0, "I"), "reserved": (4, "I"), "size": (8, "Q"),
          "offset": (16, "Q")}


class Image:
    """Where the structures of bitmaps are."""

    def __init__(self, path):
        self.path = path
        self.cluster = 1 << edit.get(path, "cluster_bits")
        self.end = os.path.getsize(path)
        self.extension_at = self.find_extension()
        extension = dict(edit.extensions(path))[EXTENSION]
        count, _, self.size, self.offset = struct.unpack(">IIQQ", extension)
        self.entries = []       # offsets of them
        at = self.offset
        for _ in range(count):
            self.entries.append(at)
            name, extra = struct.unpack(">HI",
                                        edit.read_at(path, at + 18, 6))
            at += (24 + name + extra + 7) // 8 * 8
        self.tables = [struct.unpack(">QI", edit.read_at(path, at, 12))
                       for at in self.entries]

    def find_extension(self):
        at = edit.get(self.path, "header_length")
        while True:
            kind, length = struct.unpack(">II", edit.read_at(self.path, at,
                                                             8))
            if kind == EXTENSION:
                return at + 8
            at += 8 + (length + 7) // 8 * 8

    def put(self, at, form, value):
        size = struct.calcsize(">" + form)
        edit.write_at(self.path, at,
                      (value % (1 << size * 8)).to_bytes(size, "big"))

    def put_header(self, field, value):
        at, form = HEADER[field]
        self.put(self.extension_at + at, form, value)

    def put_entry(self, number, field, value):
        at, form = ENTRY[field]
        self.put(self.entries[number] + at, form, value)

    def table(self, number):
        """[(where, entry)]"""
        offset, count = self.tables[number]
        return [(offset + 8 * i, entry) for i, (entry,) in enumerate(
            struct.iter_unpack(">Q", edit.read_at(self.path, offset,
                                                  8 * count)))]

    def data_entries(self):
        return [(at, entry) for number in range(len(self.entries))
                for at, entry in self.table(number) if entry > 1]

    def put_refcount(self, offset, value):
        """Of a cluster in the first block."""
        order = edit.get(self.path, "refcount_order")
        table = edit.get(self.path, "refcount_offset")
        cluster = offset // self.cluster
        per_block = self.cluster * 8 >> order
        block, = struct.unpack(">Q", edit.read_at(
            self.path, table + cluster // per_block * 8, 8))
        bit = (cluster % per_block) << order
        at = block + bit // 8
        if order >= 3:
            self.put(at, {3: "B", 4: "H"}[order], value)
        else:
            byte = edit.read_at(self.path, at, 1)[0]
            mask = ((1 << (1 << order)) - 1) << bit % 8
            byte = byte & ~mask | value << bit % 8 & mask
            self.put(at, "B", byte)


# ----------------------------------------------------------------- damage

def offsets(image):
    """Bad ones, and those of something else: {what: value}."""
    path = image.path
    l2 = struct.unpack(">Q", edit.read_at(
        path, edit.get(path, "l1_offset"), 8))[0] & edit.OFFSET_MASK
    refcounts = edit.get(path, "refcount_offset")
    return {
        "0": 0, "header": 0, "unaligned": image.tables[0][0] + 8,
        "odd": image.tables[0][0] + 1,
        "directory": image.offset, "table of another": image.tables[1][0],
        "L1 table": edit.get(path, "l1_offset"), "L2 table": l2,
        "refcount table": refcounts,
        "refcount block": struct.unpack(">Q", edit.read_at(path, refcounts,
                                                           8))[0],
        "data of a bitmap": image.data_entries()[-1][1],
        "end": -(-image.end // image.cluster) * image.cluster,
        "just before the end": (image.end - 1) // image.cluster
        * image.cluster,
        "beyond the end": image.end // image.cluster * image.cluster
        + 1000 * image.cluster,
        "far": 1 << 50, "farther": (1 << 56) - image.cluster,
        "huge": 1 << 62, "negative": 1 << 63, "last": (1 << 64) - 512,
    }


def header_cases(image):
    count = len(image.entries)
    for field, values in (
            ("count", (0, 1, count - 1, count + 1, 65535, 65536, 1 << 31)),
            ("reserved", (1,)),
            ("size", (0, 1, image.size - 8, image.size - 1, image.size + 1,
                      image.size + 8, image.size + 24, image.cluster,
                      image.cluster * 3, image.end, 1 << 26, 1 << 27,
                      1 << 40, 1 << 63))):
        for value in values:
            yield f"extension's {field} {value}", \
                lambda i, f=field, v=value: i.put_header(f, v)
    for what, value in offsets(image).items():
        yield f"directory at {what}", \
            lambda i, v=value: i.put_header("offset", v)
    yield "no autoclear bit", lambda i: edit.put(i.path, "autoclear", 0)
    yield "another autoclear bit", lambda i: edit.put(i.path, "autoclear", 5)
    yield "no extension", lambda i: edit.set_extensions(i.path, [])
    for length in (0, 16, 23, 32):
        yield f"extension of {length} bytes", \
            lambda i, n=length: edit.set_extensions(i.path, [
                (EXTENSION, (dict(edit.extensions(i.path))[EXTENSION]
                             + bytes(8))[:n])])


def entry_cases(image):
    for number in (0, 2, 3):        # with data, in use, empty
        name = ("data", None, "used", "empty")[number]
        entries = image.tables[number][1]
        for field, values in (
                ("table_size", (0, 1, entries - 1, entries + 1, entries * 2,
                                1 << 20, (1 << 29) // image.cluster,
                                (1 << 29) // image.cluster + 1, 1 << 31,
                                (1 << 32) - 1)),
                ("flags", (0, IN_USE, AUTO, IN_USE | AUTO, EXTRA_COMPATIBLE,
                           AUTO | EXTRA_COMPATIBLE, 8, 1 << 31)),
                ("type", (0, 2, 255)),
                ("granularity", (0, 8, 9, 12, 31, 32, 63, 64, 255)),
                ("name_size", (0, 1, 3, 4, 5, 1023, 1024, 65535)),
                ("extra_size", (1, 4, 8, 1000, 1 << 20, (1 << 32) - 1))):
            for value in values:
                yield f"{name}: {field} {value}", \
                    lambda i, n=number, f=field, v=value: i.put_entry(n, f, v)
        for what, value in offsets(image).items():
            yield f"{name}: table at {what}", \
                lambda i, n=number, v=value: i.put_entry(
                    n, "table_offset", v)
    yield "extra data that is compatible", lambda i: (
        i.put_entry(0, "flags", AUTO | EXTRA_COMPATIBLE),
        i.put_entry(0, "name_size", 0), i.put_entry(0, "extra_size", 4))
    yield "the same name twice", lambda i: edit.write_at(
        i.path, i.entries[0] + 24, edit.read_at(i.path, i.entries[2] + 24,
                                                4))
    yield "zeroes in a name", lambda i: edit.write_at(
        i.path, i.entries[0] + 24, bytes(4))
    yield "the same table for all", lambda i: [
        i.put_entry(n, "table_offset", i.tables[0][0])
        for n in range(len(i.entries))]
    yield "everything 0", lambda i: edit.write_at(
        i.path, i.offset, bytes(i.size))
    yield "everything 1", lambda i: edit.write_at(
        i.path, i.offset, b"\xff" * i.size)


def table_cases(image):
    at, entry = image.data_entries()[0]
    empty, _ = image.table(3)[0]
    for bit in range(64):
        yield f"table entry {entry:#x}, bit {bit}", \
            lambda i, b=bit: i.put(at, "Q", entry ^ 1 << b)
    for what, value in offsets(image).items():
        for name, where in (("data", at), ("empty", empty)):
            for ones in (0, 1):
                yield f"{name}: table entry of {what} | {ones}", \
                    lambda i, w=where, v=value | ones: i.put(w, "Q", v)
    for value in (0, 1, 2, 511, 512, 1 << 56, 1 << 63 | 1):
        yield f"table entry {value:#x}", \
            lambda i, v=value: i.put(at, "Q", v)
    yield "all entries the same", lambda i: [
        i.put(w, "Q", entry) for w, _ in i.table(0)]
    yield "two bitmaps share data", lambda i: [
        i.put(w, "Q", e) for (w, _), (_, e) in zip(i.table(1), i.table(0))]
    yield "a table full of ones", lambda i: [
        i.put(w, "Q", (1 << 64) - 1) for w, _ in i.table(0)]


def refcount_cases(image):
    most = (1 << (1 << edit.get(image.path, "refcount_order"))) - 1
    for what, offset in (("directory", image.offset),
                         ("table", image.tables[0][0]),
                         ("empty table", image.tables[3][0]),
                         ("data", image.data_entries()[0][1]),
                         ("the last data", image.data_entries()[-1][1])):
        for value in {0, min(2, most), most}:
            yield f"refcount {value} of {what}", \
                lambda i, o=offset, v=value: i.put_refcount(o, v)
        for cut in (offset, offset + 8, offset + image.cluster // 2,
                    offset + image.cluster):
            yield f"cut at {what}, {cut}", \
                lambda i, c=cut: os.truncate(i.path, c)


def test_named(source, path, step):
    outcomes = collections.Counter()
    image = Image(source)
    cases = dict(case for cases in (header_cases, entry_cases, table_cases,
                                    refcount_cases) for case in cases(image))

    def one(what):
        shutil.copyfile(source, path)
        cases[what](Image(path))
        outcomes[compare(what, path)] += 1

    qf.each(list(cases)[::step], one)
    print(os.path.basename(source), "named:", dict(outcomes), flush=True)


def random_damage(rng, image):
    """Returns what was done."""
    places = [(image.extension_at, 24)] + \
        [(at, 24) for at in image.entries] * 2 + \
        [(offset, count * 8) for offset, count in image.tables] * 2
    at, length = rng.choice(places)
    at += int(length * rng.random() ** 2) & ~7
    old, = struct.unpack(">Q", edit.read_at(image.path, at, 8))
    new = rng.choice((
        0, 1, old ^ 1 << rng.randrange(64), old + image.cluster,
        old ^ 1 << rng.randrange(32), rng.randrange(1 << 64),
        rng.choice(list(offsets(image).values())),
        rng.randrange(image.end // image.cluster) * image.cluster))
    image.put(at, "Q", new)
    return f"{at}: {old:#x} -> {new:#x}"


def test_random(source, path, number):
    outcomes = collections.Counter()

    def one(seed):
        rng = random.Random(f"{source[-10:]} {seed}")
        shutil.copyfile(source, path)
        image = Image(path)
        what = [random_damage(rng, image)
                for _ in range(rng.choice((1, 1, 2, 5)))]
        if rng.random() < 0.1:
            image.put_refcount(rng.choice(
                [image.offset] + [t for t, _ in image.tables]), 0)
        outcomes[compare(f"seed {seed}: {what}", path)] += 1

    qf.each(range(number), one)
    print(os.path.basename(source), "random:", dict(outcomes), flush=True)


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    path = os.path.join(tmp, "damaged.qcow2")
    sources = [make(tmp, *image) for image in IMAGES]
    # All cases with one of them, and many with the others.
    runs = {f"named {source}": lambda s=source: test_named(
        s, path, 1 if s == sources[0] and not qf.SLOW or DAMAGED > 1000 else 3)
        for source in sources}
    runs.update({f"random {source}": lambda s=source: test_random(
        s, path, DAMAGED // len(sources)) for source in sources})
    qf.each(runs, lambda what: runs[what]())


qf.main(test)
