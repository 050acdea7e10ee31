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
PASSPHRASE = "a passphrase that everybody knows"

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


def write_share(path, source, number, of, piece=256 << 10):
    """A sparse file with those pieces of SOURCE that are the share of
    layer NUMBER in a chain of OF layers."""
    size = os.path.getsize(source)
    rng = random.Random(size)
    with open(source, "rb") as data, open(path, "wb") as f:
        f.truncate(size)
        for place in range(0, size, piece):
            if rng.randrange(of) == number:
                data.seek(place)
                f.seek(place)
                f.write(data.read(piece))


def make_chain(path, library, layers=5):
    """An image over LAYERS - 1 others, which lie beside it; each holds
    an equal share of the disk."""
    raw = library.path("disk")
    with tempfile.NamedTemporaryFile(dir=library.directory) as share:
        for number in range(layers):
            last = number == layers - 1
            layer = path if last else f"{path}.{number}"
            base = ["-b", f"{os.path.basename(path)}.{number - 1}",
                    "-F", "qcow2"] if number else []
            tools.run(tools.program("QEMU_IMG")
                      + ["create", "-f", "qcow2", *base, layer,
                         str(library.size)])
            write_share(share.name, raw, number, layers)
            # Holes stay unallocated, although there is a backing file.
            tools.run(tools.program("QEMU_IMG")
                      + ["convert", "-n", "--target-is-zero", "-f", "raw",
                         "-O", "qcow2", share.name, layer])


def make_encrypted(path, library):
    # It sometimes cannot measure how fast the machine derives keys.
    for attempt in range(5):
        try:
            convert(library.path("disk"), path, "--object",
                    f"secret,id=s,data={PASSPHRASE}", "-o",
                    "encrypt.format=luks,encrypt.key-secret=s,"
                    "encrypt.iter-time=10")
            return
        except RuntimeError:
            if attempt == 4:
                raise


def make_preallocated(path, cluster_size):
    tools.run(tools.program("QEMU_IMG")
              + ["create", "-f", "qcow2", "-o", "preallocation=metadata,"
                 f"cluster_size={cluster_size}", path, str(1 << 40)])


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
    "chain": Image(make_chain, raw="disk", space=1.1),
    "luks": Image(make_encrypted, raw="disk", space=1.1),
    # What is written to; a file with all blocks.
    "scratch": Image(lambda path, library: write_real_data(path,
                                                           library.size),
                     raw="scratch", space=1),
    # Only metadata: clusters that were reserved and never written.
    "1m-clusters": Image(lambda path, library: make_preallocated(path, "1M"),
                         raw="1m-clusters", space=0.05),
    "16m-clusters": Image(
        lambda path, library: make_preallocated(path, "64k"),
        raw="16m-clusters", space=0.2),
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
            self.make(name, path)
        return path

    def make(self, name, path):
        """Make it whole or not at all."""
        with tempfile.TemporaryDirectory(dir=self.directory) as part:
            made = os.path.join(part, os.path.basename(path))
            IMAGES[name].make(made, self)
            # The image itself last, after those that it refers to.
            for file in sorted(os.listdir(part), key=len, reverse=True):
                os.rename(os.path.join(part, file),
                          os.path.join(self.directory, file))

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
