#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The figures of our check are those of qemu-img check.

On every image of images.py as it is, and on images whose metadata is
damaged at random.  An image that QEMU does not open or gives up on has
no figures there; ours must find it bad, too.
"""

import collections
import os
import random
import shutil
import struct

import images
import qcow2edit as edit
import qf
from figures import ours, theirs

DAMAGED = 300


def compare(what, path):
    """Returns "equal", or who refuses."""
    expected, their_words = theirs(path)
    actual, our_words = ours(path)
    if expected is None:
        if actual is None:
            return "both refuse"
        qf.check(actual["corruptions"] or actual["check-errors"],
                 f"{what}: QEMU has no figures ({their_words}), "
                 f"but ours find nothing wrong: {actual}")
        return "QEMU refuses"
    if actual is None:
        # QEMU takes what lies beyond the end of the file for zeroes, also
        # in the snapshot table; we do not open such an image.
        qf.check("runs beyond the end" in our_words
                 and expected["corruptions"],
                 f"{what}: ours refuses: {our_words}\nQEMU: {expected}\n"
                 f"{their_words}")
        return "ours refuses"
    qf.check(actual == expected, f"{what}:\nours {actual}\nQEMU {expected}\n"
             f"{our_words[:3000]}\n--- QEMU:\n{their_words[:3000]}")
    return "equal"


def test_whole(tmp):
    def one(case):
        path = case.make(tmp)
        compare(case.name, path)
        os.unlink(path)
    qf.each(images.select([]), one)


# -------------------------------------------------------------- damage

class Victim:
    """An image, and where its structures are."""

    def __init__(self, path):
        self.path = path
        self.cluster = 1 << edit.get(path, "cluster_bits")
        self.size = os.path.getsize(path)
        self.extended = edit.get(path, "version") >= 3 and \
            edit.get(path, "incompatible") & edit.INCOMPAT_EXTENDED_L2
        self.tables = []
        self.find_mapping()
        self.find_refcounts()
        self.find_bitmaps()

    def entries(self, offset, count):
        return [entry for entry, in struct.iter_unpack(
            ">Q", edit.read_at(self.path, offset, count * 8))]

    def find_mapping(self):
        tables = [(edit.get(self.path, "l1_offset"),
                   edit.get(self.path, "l1_size"))]
        tables += [(s["l1_offset"], s["l1_size"])
                   for s in edit.snapshots(self.path)]
        l2 = set()
        for offset, count in tables:
            self.tables.append(("L1", offset, count * 8))
            l2.update(entry & edit.OFFSET_MASK
                      for entry in self.entries(offset, count))
        self.tables += [("L2", offset, self.cluster)
                        for offset in sorted(l2 - {0})]

    def find_refcounts(self):
        offset = edit.get(self.path, "refcount_offset")
        length = edit.get(self.path, "refcount_clusters") * self.cluster
        self.tables.append(("refcount table", offset, length))
        self.tables += [("refcount block", entry, self.cluster)
                        for entry in self.entries(offset, length // 8)
                        if entry]

    def find_bitmaps(self):
        extension = dict(edit.extensions(self.path)).get(0x23852875)
        if not extension:
            return
        count, _, length, offset = struct.unpack(">IIQQ", extension)
        for _ in range(count):
            table, entries, _, _, _, name, extra = struct.unpack(
                ">QIIBBHI", edit.read_at(self.path, offset, 24))
            self.tables.append(("bitmap table", table, entries * 8))
            offset += (24 + name + extra + 7) // 8 * 8

    def damage(self, rng):
        """Change one entry of a table; returns a description."""
        kind = rng.choice(self.kinds())
        _, offset, length = rng.choice(
            [table for table in self.tables if table[0] == kind])
        # The first entries are those in use, for the most part.
        at = offset + rng.randrange(max(int(length * rng.random() ** 3), 8)
                                    // 8) * 8
        old, = struct.unpack(">Q", edit.read_at(self.path, at, 8))
        new = self.bad_value(rng, old) % (1 << 64)
        edit.write_at(self.path, at, struct.pack(">Q", new))
        return f"{kind} at {at}: {old:#x} -> {new:#x}"

    def kinds(self):
        return sorted({kind for kind, _, _ in self.tables})

    def bad_value(self, rng, old):
        some = rng.choice(self.tables)[1]
        return rng.choice((
            0,
            old ^ 1 << rng.randrange(64),
            old ^ 1 << 63,
            old ^ 1,
            old ^ 1 << rng.randrange(9, 16),
            old + self.cluster,
            some | 1 << 63,
            some,
            rng.randrange(self.size // self.cluster) * self.cluster,
            rng.randrange(self.size // self.cluster) * self.cluster | 1 << 63,
            self.size // self.cluster * self.cluster,
            (self.size + 100 * self.cluster) // self.cluster * self.cluster,
            rng.randrange(1 << 64),
            1 << 62 | rng.randrange(self.size),
        ))


def victims(tmp):
    names = ("v2-4096", "v3-512", "v3-65536", "extl2-16384", "snapshots-v3",
             "snapshots-v2", "refcount-1", "refcount-4", "refcount-64",
             "bitmaps", "convert-c-zlib-4096", "prealloc-metadata-4096",
             "scattered-512")
    cases = {case.name: case for case in images.CASES}
    return [cases[name].make(tmp) for name in names]


def test_damaged(tmp):
    outcomes = collections.Counter()
    pristine = victims(tmp)
    path = os.path.join(tmp, "damaged.qcow2")

    def one(seed):
        rng = random.Random(seed)
        source = pristine[seed % len(pristine)]
        shutil.copyfile(source, path)
        victim = Victim(path)
        what = [victim.damage(rng)
                for _ in range(rng.choice((1, 1, 1, 2, 5, 20)))]
        if rng.random() < 0.1:
            cut = rng.randrange(victim.size // 2, victim.size)
            os.truncate(path, cut)
            what.append(f"cut at {cut}")
        outcomes[compare(f"{os.path.basename(source)}, seed {seed}: {what}",
                         path)] += 1

    qf.each(range(DAMAGED), one)
    print(dict(outcomes))
    qf.check(outcomes["equal"] >= 200, f"too few with figures: {outcomes}")


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    qf.parts(tmp, test_whole, test_damaged)


qf.main(test)
