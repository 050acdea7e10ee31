#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Backing chains: contents and maps, compared with QEMU's."""

import json
import random

import chains
import disks
import images
import qf
from qf import KiB, MiB

ODD = 512 * 3001

# What layers are made of.  Version 2 knows neither zstd nor subclusters.
KINDS = (
    "compat=0.10", "compat=0.10,cluster_size=4k", "cluster_size=512",
    "cluster_size=1k", "cluster_size=4k", "cluster_size=4k",
    "cluster_size=64k", "cluster_size=2M", "lazy_refcounts=on",
    "cluster_size=16k,compression_type=zstd", "compression_type=zstd",
    "cluster_size=16k,extended_l2=on", "cluster_size=64k,extended_l2=on",
    "cluster_size=2M,extended_l2=on",
    "cluster_size=64k,preallocation=metadata",
    "cluster_size=32k,extended_l2=on,compression_type=zstd",
)

# One property each: name and (size, options) from the base to the top.
CASES = {
    "over-raw": ((3 * MiB, "raw"), (3 * MiB, "")),
    "over-raw-odd": ((MiB + 77777, "raw"), (3 * MiB, "cluster_size=4k")),
    "over-raw-short": ((MiB, "raw"), (4 * MiB, "cluster_size=512")),
    "over-raw-long": ((4 * MiB, "raw"), (ODD, "cluster_size=1k")),
    "over-raw-tiny": ((1, "raw"), (MiB, "cluster_size=1k")),
    "over-raw-empty": ((0, "raw"), (MiB, "cluster_size=64k")),
    "over-raw-v2": ((2 * MiB, "raw"), (3 * MiB, "compat=0.10")),
    "over-raw-extl2": ((3 * MiB + 4321, "raw"),
                       (4 * MiB, "cluster_size=32k,extended_l2=on")),
    "over-v2": ((2 * MiB, "compat=0.10,cluster_size=512"),
                (2 * MiB, "cluster_size=2M")),
    "v2-over-v3": ((2 * MiB, "cluster_size=1k"),
                   (2 * MiB, "compat=0.10,cluster_size=16k")),
    "zstd-over-deflate": ((3 * MiB, "cluster_size=16k"),
                          (3 * MiB, "cluster_size=4k,compression_type=zstd")),
    "deflate-over-zstd": ((3 * MiB, "cluster_size=64k,compression_type=zstd"),
                          (3 * MiB, "cluster_size=8k")),
    "extl2-over-extl2": ((2 * MiB, "cluster_size=16k,extended_l2=on"),
                         (2 * MiB, "cluster_size=64k,extended_l2=on")),
    "large-subclusters": ((6 * MiB, "cluster_size=4k"),
                          (6 * MiB, "cluster_size=2M,extended_l2=on")),
    "short-base": ((ODD, "cluster_size=1k"), (5 * MiB, "cluster_size=64k")),
    "long-base": ((5 * MiB, "cluster_size=64k"), (ODD, "cluster_size=1k")),
    "short-middle": ((4 * MiB, "cluster_size=4k"),
                     (MiB + 512, "cluster_size=64k"),
                     (3 * MiB, "cluster_size=1k,lazy_refcounts=on")),
    "preallocated-base": ((4 * MiB, "preallocation=metadata"),
                          (4 * MiB, "cluster_size=4k")),
    "preallocated-top": ((MiB, "raw"), (4 * MiB, "cluster_size=64k"),
                         (4 * MiB, "extended_l2=on,cluster_size=16k")),
}


def random_specs(name, depth):
    rng = random.Random(name)
    specs = []
    for i in range(depth):
        size = rng.randrange(MiB, 4 * MiB) // 512 * 512
        kind = rng.choice(KINDS)
        if i < depth - 1 and i == 0 and rng.random() < 0.5:
            size, kind = size + rng.randrange(512), "raw"
        elif "preallocation" in kind and i > 0:
            # QEMU preallocates only what has no backing file.
            kind = "cluster_size=64k"
        specs.append((size, kind))
    return specs


def verify_chain(tmp, name, *specs, rounds=12):
    top = chains.build(tmp, name, *specs, rounds=rounds)
    with chains.serve(top) as server:
        chains.verify(server, f"{name} {specs}", top)


def test_pairs(tmp):
    qf.each(CASES, lambda name: verify_chain(tmp, name, *CASES[name]))


def test_random(tmp):
    """Layers of all kinds over each other."""
    names = [(f"random-{depth}-{i}", depth)
             for depth, count in ((1, 3), (2, 9), (3, 3), (5, 8))
             for i in range(count)]
    qf.each(names, lambda case: verify_chain(
        tmp, case[0], *random_specs(*case)))


def test_converted(tmp):
    """Compressed bases as qemu-img convert -c makes them."""
    for kind in ("zlib", "zstd"):
        base = images.Case(f"converted-{kind}", 4 * MiB + 512,
                           f"cluster_size=32k,compression_type={kind}",
                           images.fill_compressed)
        base.make(tmp)
        below = chains.Layer(tmp, base.name, base.size, base.options)
        top = chains.Layer(tmp, base.name + "-top", 5 * MiB,
                           "cluster_size=4k", below).fill()
        with chains.serve(top) as server:
            chains.verify(server, base.name, top)


def test_hiding(tmp):
    """What hides the data of a backing file, and what does not."""
    base = chains.Raw(tmp, "hidden", 2 * MiB, data=((0, 1),))
    for options in ("", "cluster_size=4k", "extended_l2=on"):
        top = chains.Layer(tmp, "hiding", 2 * MiB, options, base)
        top.create()
        top.zero(0, 64 * KiB)
        top.zero(192 * KiB, 64 * KiB, unmap=True)
        top.write(320 * KiB, 128 * KiB)
        top.zero(320 * KiB, 64 * KiB)
        top.discard(384 * KiB, 64 * KiB)
        top.discard(576 * KiB, 64 * KiB)
        # Parts of a cluster: QEMU copies the rest, or has subclusters.
        top.write(MiB + 5 * 512, 512)
        top.zero(MiB + 128 * KiB + 10 * KiB, 4 * KiB)
        top.run()
        with chains.serve(top) as server:
            chains.verify(server, f"hiding {options}", top)


def test_snapshots(tmp):
    """They read through the backing file; some are of another size."""
    for name, base, options in (
            ("short", (MiB, "raw"), "cluster_size=4k"),
            ("long", (5 * MiB, "cluster_size=16k"), "extended_l2=on"),
            ("v2", (2 * MiB, "cluster_size=1k"), "compat=0.10")):
        top = chains.build(tmp, "sn-" + name, base, (2 * MiB, options))
        top.snapshot("-c", "one")
        if name != "v2":
            top.size = 3 * MiB + 512
            qf.qemu_img("resize", "-q", top.path, str(top.size))
        top.mix(rounds=8, compress=name != "v2")
        top.snapshot("-c", "two")
        top.mix(rounds=8, compress=name != "v2")
        with chains.serve(top) as server:
            chains.verify(server, name, top, reads=40)
            for snapshot in ("one", "two"):
                chains.verify_snapshot(server, name, top, snapshot)
        with chains.serve(top, "qcow2-snapshot=one") as server:
            oracle = chains.oracle_of(top, top.copy_at_snapshot("one"))
            disks.verify_disk(server, name, oracle)


def map_alone(top):
    """What the top layer itself has, by QEMU, in the types of NBD."""
    name = json.dumps({"driver": "qcow2", "backing": None,
                       "file": {"driver": "file", "filename": top.path}})
    entries = json.loads(qf.qemu_img("map", "--output=json", "json:" + name))
    return disks.merged(
        (e["start"], e["length"],
         disks.HOLE if not e["present"] else disks.ZERO if e["zero"] else 0)
        for e in entries)


def clusters_of(extents, size=64 * KiB):
    """The clusters in which there is something."""
    return {cluster for start, length, kind in extents if kind != disks.HOLE
            for cluster in range(start // size,
                                 (start + length - 1) // size + 1)}


def test_none(tmp):
    """Only the top layer: the rest is a hole that may hold anything, so
    that qemu-img puts that layer on a backing file again."""
    for name, options in (("plain", ""), ("extl2", "extended_l2=on"),
                          ("v2", "compat=0.10,cluster_size=4k")):
        top = chains.build(tmp, "none-" + name, (3 * MiB, "cluster_size=4k"),
                           (4 * MiB, options), rounds=6)
        with chains.serve(top, "qcow2-backing=none") as server:
            chains.verify_same_map(
                f"{name}: the layer alone", lambda: map_alone(top),
                lambda: disks.merged(
                    (start, length, kind & disks.ZERO or kind) for
                    start, length, kind in disks.nbd_map(server.uri())))
            chains.qemu_img(tmp, "convert", "-f", "raw", "-O", "qcow2",
                            "-B", top.backing.name, "-F", "qcow2",
                            server.uri(), "again.qcow2")
        again = chains.Layer(tmp, "again", top.size, "", top.backing)
        chains.qemu_img(tmp, "compare", top.name, again.name)
        more = clusters_of(map_alone(again)) - clusters_of(map_alone(top))
        qf.equal(f"{name}: clusters that should have stayed in the base",
                 more, set())


def test_long(tmp):
    """50 and 201 images: the last has 200 backing files."""
    for count in (50, 201):
        top = chains.long_chain(tmp, f"long{count}-", count)
        with chains.serve(top) as server:
            chains.verify(server, f"{count} images", top, reads=200)
    for count in (202, 203, 300):
        top = chains.long_chain(tmp, f"long{count}-", count)
        chains.refused(f"{count} images", top.path, ["200", "backing"],
                       f"qcow2-backing=dir:{tmp}")


def test_many_connections(tmp):
    """They share one chain, which is opened and closed with them."""
    top = chains.build(tmp, "many", (3 * MiB + 100, "raw"),
                       (3 * MiB, "cluster_size=4k"),
                       (4 * MiB, "extended_l2=on"))
    oracle = chains.oracle_of(top)
    with chains.serve(top, "qcow2-cache-size=1M") as server:
        for seed in range(3):
            disks.verify_disk(server, "many", oracle, reads=300,
                                     seed=seed, connections=8)


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdinfo")
    qf.parts(tmp, test_pairs, test_random, test_converted, test_hiding,
             test_snapshots, test_none, test_long, test_many_connections)


qf.main(test)
