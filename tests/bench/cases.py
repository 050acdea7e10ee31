# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""The table of what is measured, and how good it has to be.

To add a row: add the image to images.IMAGES if there is none like it,
the client to workloads if it is of a new kind, and a Case here.
"""

import dataclasses

from bitmaps import BITMAP_COUNT, BITMAP_MAP, BITMAP_MERGE
from images import PASSPHRASE
from persist import COLD, END, WARM as WARM_INTENT
from snapshots import COLD_4K, COLD_64K, COLD_P99, IDLE, READ, WARM
from workloads import (CHECK, COPY, MAP, RANDOM_4K, RANDOM_WRITE,
                       SEQUENTIAL_4K, SEQUENTIAL_WRITE, Workload)


@dataclasses.dataclass(frozen=True)
class Target:
    """The project's promise: OURS is at most (or for rates at least)
    FACTOR times the figure of the contender AGAINST; or FACTOR itself,
    in the workload's unit, where AGAINST is None."""
    factor: float
    against: str = None


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    title: str
    image: str
    workload: Workload
    targets: tuple = ()
    # Of our filters; {directory} is where the images are, {socket} a
    # name that is the server's alone.
    parameters: tuple = ()
    encrypted: bool = False
    # Our filters; if they are not qcow2, "raw" is the same without them.
    filter: str = "qcow2"
    # Instead of an image in the file plugin; the disk is written to.
    plugin: tuple = ()
    writable: bool = False
    contenders: tuple = ("raw", "ours", "qemu-nbd", "qcow2dec")


# Who can read images of more than one file, or encrypted ones.
COMPLETE = ("raw", "ours", "qemu-nbd")
CHAIN = ("qcow2-backing=dir:{directory}",)



def dirty_cases():
    """Writes that 1 or 8 bitmaps record."""
    plugins = {"mem": ("memory", "1G"), "file": ()}
    for number in (1, 8):
        for name, plugin in plugins.items():
            for kind, title, workload in (
                    ("rand", "random 4 KiB writes, depth 16", RANDOM_WRITE),
                    ("seq", "sequential 1 MiB writes", SEQUENTIAL_WRITE)):
                yield Case(f"dirty-{kind}-{name}-{number}",
                           f"{title}, {number} bitmaps, "
                           f"{plugin[0] if plugin else 'file'} plugin",
                           "scratch", workload, (Target(0.95, "raw"),),
                           tuple(f"dirty-bitmap=b{i}" for i in range(number)),
                           filter="dirty-tracking", plugin=plugin,
                           writable=True, contenders=("raw", "ours"))


def bitmap_case(name, title, workload):
    return Case(name, f"{title}, 64 TiB disk, 1 GiB dirty in blocks of "
                "64 KiB", "scratch", workload, (),
                ("dirty-bitmap=b0", "dirty-bitmap=b1,disabled=on"),
                filter="dirty-tracking", plugin=("memory", "64T"),
                writable=True, contenders=("ours", "qemu-sd"))


def persist_case(name, title, workload, targets=(), bitmaps=1, **kwargs):
    """With bitmaps that are kept, and with the same if they are not."""
    return Case(f"persist-{name}", title, "scratch", workload, targets,
                ("bitmap-store={socket}.qcow2",
                 *(f"dirty-bitmap=b{i},persistent=on"
                   for i in range(bitmaps))),
                filter="dirty-tracking,bitmap-persist", writable=True,
                **kwargs)


PERSIST_CASES = [
    persist_case("warm", "random 4 KiB writes, depth 16, to regions that "
                 "have been written to", WARM_INTENT,
                 (Target(0.95, "tracking"),),
                 contenders=("tracking", "ours")),
    persist_case("cold", "4 KiB written to each region, depth 16", COLD,
                 contenders=("tracking", "ours")),
    persist_case("end", "clean end, 16 bitmaps of 16 TiB, 20,000 blocks "
                 "changed", END, (Target(2.00),), 16,
                 plugin=("memory", "16T"), contenders=("ours",)),
]


def snapshot_case(name, title, workload, targets,
                  contenders=("ours", "ours-few", "qemu-sd")):
    return Case(f"cbw-{name}", title, "scratch", workload, targets,
                filter="cbw", writable=True, contenders=contenders)


QEMU_RATE = (Target(1.30, "qemu-sd"),)
OUR_RATE = ("raw", "ours")

SNAPSHOT_CASES = [
    snapshot_case("cold-4k", "random 4 KiB writes, depth 16, 7 of 8 of "
                  "which copy 64 KiB", COLD_4K, QEMU_RATE),
    snapshot_case("cold-64k", "random 64 KiB writes, depth 16, 7 of 8 of "
                  "which copy", COLD_64K, QEMU_RATE),
    snapshot_case("cold-p99", "99 % of the writes of cbw-cold-4k are faster",
                  COLD_P99, (Target(0.80, "qemu-sd"),)),
    snapshot_case("warm", "random 4 KiB writes, depth 16, to what has been "
                  "copied", WARM, (Target(0.95, "raw"),), OUR_RATE),
    snapshot_case("read", "sequential copy of a snapshot while a guest "
                  "writes", READ, (Target(0.77, "qemu-sd"),)),
    snapshot_case("idle", "random 4 KiB writes, depth 16, no snapshot", IDLE,
                  (Target(0.98, "raw"),), OUR_RATE),
]


CASES = [
    Case("seq-plain", "sequential copy, plain image", "plain", COPY,
         (Target(1.10, "raw"), Target(0.80, "qemu-nbd"))),
    Case("seq-deflate", "sequential copy, deflate image", "deflate", COPY,
         (Target(0.50, "qemu-nbd"),)),
    Case("seq-zstd", "sequential copy, zstd image", "zstd", COPY,
         (Target(0.65, "qemu-nbd"),)),
    Case("rand-plain", "random 4 KiB reads, depth 16, plain image",
         "plain", RANDOM_4K,
         (Target(0.85, "raw"), Target(1.50, "qemu-nbd"))),
    Case("rand-deflate", "random 4 KiB reads, depth 16, deflate image",
         "deflate", RANDOM_4K, (Target(2.00, "qemu-nbd"),)),
    Case("small-deflate", "consecutive 4 KiB reads, depth 1, deflate image",
         "deflate", SEQUENTIAL_4K),
    Case("map-files", "map of a 16 TiB disk, its data in pieces of 1 MiB",
         "16t-files", MAP, (Target(1.00), Target(1.00, "qemu-nbd"))),
    Case("map-clusters", "map of a 16 TiB disk, its data in single clusters",
         "16t-clusters", MAP, (Target(1.00), Target(1.00, "qemu-nbd"))),
    Case("seq-chain", "sequential copy, chain of 5 images", "chain", COPY,
         (Target(0.90, "qemu-nbd"),), CHAIN, contenders=COMPLETE),
    Case("rand-chain", "random 4 KiB reads, depth 16, chain of 5 images",
         "chain", RANDOM_4K, (Target(1.20, "qemu-nbd"),), CHAIN,
         contenders=COMPLETE),
    Case("seq-luks", "sequential copy, LUKS aes-256-xts", "luks", COPY,
         (Target(0.90, "qemu-nbd"),), (f"qcow2-passphrase={PASSPHRASE}",),
         encrypted=True, contenders=COMPLETE),
    Case("check-1m", "check of 1 TiB with a million clusters of 1 MiB",
         "1m-clusters", CHECK, (Target(1.00, "qemu-img"),),
         contenders=("ours", "qemu-img")),
    Case("check-16m", "check of 1 TiB with 16 million clusters of 64 KiB",
         "16m-clusters", CHECK, (Target(1.00, "qemu-img"),),
         contenders=("ours", "qemu-img")),
    *dirty_cases(),
    bitmap_case("bitmap-count", "count what is dirty", BITMAP_COUNT),
    bitmap_case("bitmap-merge", "merge two bitmaps", BITMAP_MERGE),
    bitmap_case("bitmap-map", "map of a bitmap", BITMAP_MAP),
    *PERSIST_CASES,
    *SNAPSHOT_CASES,
]
