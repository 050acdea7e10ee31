# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""The disks that are measured.

Their content is the machine's own files: real data compresses and
decompresses as a user's disk would, which neither zeroes nor random
bytes do.  The same machine always gives the same disk.  Images are made
when they are first asked for.
"""

import dataclasses
import hashlib
import os
import random
import tempfile
from typing import Callable

import tools

ROOT = "/usr"
BLOCK = 4096
FILE_LIMIT = 16 << 20        # so that no single file dominates the disk
CLUSTER = 64 << 10           # what qemu-img makes by default
HUGE = 16 << 40

# Part of every image's name: raise it when what is made here changes, so
# that a directory of kept images is not taken for something it is not.
EDITION = 1


def machine_files():
    """All regular files below ROOT, in a shuffled but fixed order."""
    found = []
    for where, _, names in os.walk(ROOT):
        for name in names:
            path = os.path.join(where, name)
            if os.path.isfile(path) and not os.path.islink(path):
                found.append(path)
    found.sort(key=lambda p: hashlib.sha1(os.fsencode(p)).digest())
    return found


def blocks_of(path):
    """The blocks of one file as a file system stores them, without those
    that are all zero: qemu-img would turn them into holes."""
    try:
        with open(path, "rb") as f:
            data = f.read(FILE_LIMIT)
    except OSError:
        return b""
    data += bytes(-len(data) % BLOCK)
    zero = bytes(BLOCK)
    pieces = (data[i:i + BLOCK] for i in range(0, len(data), BLOCK))
    return b"".join(piece for piece in pieces if piece != zero)


def write_real_data(path, size):
    """Fill PATH with SIZE bytes; a small machine's files are repeated."""
    left = size
    with open(path, "wb") as f:
        while left > 0:
            before = left
            for name in machine_files():
                data = blocks_of(name)[:left]
                f.write(data)
                left -= len(data)
                if left == 0:
                    break
            if left == before:
                raise RuntimeError(f"no readable files in {ROOT}")


def write_scattered(path, source, piece):
    """Spread the bytes of SOURCE in PIECEs over a 16 TiB sparse file."""
    size = os.path.getsize(source)
    places = random.Random(size).sample(range(HUGE // piece), size // piece)
    with open(source, "rb") as data, open(path, "wb") as f:
        f.truncate(HUGE)
        for place in sorted(places):
            f.seek(place * piece)
            f.write(data.read(piece))


def convert(source, target, *options):
    tools.run(tools.program("QEMU_IMG")
              + ["convert", "-f", "raw", "-O", "qcow2", *options,
                 source, target])


@dataclasses.dataclass(frozen=True)
class Image:
    """How one image is made: MAKE (path, library).

    RAW names the raw disk with the same content; SPACE is what it takes
    in units of the benchmark's size."""
    make: Callable
    raw: str
    space: float


def qcow2_of(raw, *options, space=1.1):
    """An image made by qemu-img from the raw disk named RAW."""
    return Image(lambda path, library: convert(library.path(raw), path,
                                               *options),
                 raw=raw, space=space)


def scattered(name, piece):
    return Image(lambda path, library: write_scattered(
        path, library.path("disk"), piece), raw=name, space=1)


COMPRESSED = {
    "deflate": ("-c", "-o", "compression_type=zlib"),
    "zstd": ("-c", "-o", "compression_type=zstd"),
}

IMAGES = {
    "disk": Image(lambda path, library: write_real_data(path, library.size),
                  raw="disk", space=1),
    "plain": qcow2_of("disk"),
    **{name: qcow2_of("disk", *options, space=0.7)
       for name, options in COMPRESSED.items()},
    # Two shapes of a huge, nearly empty disk: files, and the worst case,
    # single clusters, nearly each with an L2 table of its own.
    "disk-16t-files": scattered("disk-16t-files", 1 << 20),
    "16t-files": qcow2_of("disk-16t-files"),
    "disk-16t-clusters": scattered("disk-16t-clusters", CLUSTER),
    "16t-clusters": qcow2_of("disk-16t-clusters", space=2),
}


class Library:
    """The images of one size, made on demand in one directory."""

    def __init__(self, directory, size, say):
        self.directory = directory
        self.size = size
        self.say = say

    def path(self, name):
        """Return the path of image NAME, which is made if need be."""
        path = os.path.join(self.directory,
                            f"{name}-{self.size}-{EDITION}.img")
        if not os.path.exists(path):
            source = IMAGES[name].raw
            if source != name:
                self.path(source)
            self.say(f"making {path}")
            part = path + ".part"
            IMAGES[name].make(part, self)
            os.rename(part, path)
        return path

    def compression(self, name):
        """How much smaller the image NAME is than its raw disk."""
        return (os.path.getsize(self.path(name))
                / os.path.getsize(self.path(IMAGES[name].raw)))

    @staticmethod
    def space(names):
        """Units of the size that the images NAMES take, with theirs."""
        every = {"disk"}
        for name in names:
            every |= {name, IMAGES[name].raw}
        return sum(IMAGES[name].space for name in every)


def choose_directory(space):
    """A new directory where SPACE bytes of images fit, best in memory.

    /dev/shm may promise more than there is memory: what is available
    counts, and the servers and clients need some of it."""
    available = int(tools.file_field("/proc/meminfo",
                                     "MemAvailable").split()[0]) << 10
    shm = "/dev/shm"
    if os.access(shm, os.W_OK):
        stat = os.statvfs(shm)
        free = min(stat.f_bavail * stat.f_frsize, available * 3 // 4)
        if free > space:
            return tempfile.mkdtemp(prefix="bench-", dir=shm)
    return tempfile.mkdtemp(prefix="bench-")


def read_into_page_cache(path):
    """So that a disk below the images does not decide the first run.

    Only for ordinary files: sparse ones are in memory, or slow to read."""
    if tools.filesystem(path) == "tmpfs" or os.path.getsize(path) >= HUGE:
        return
    with open(path, "rb") as f:
        while f.read(1 << 20):
            pass
