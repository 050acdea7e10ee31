#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Makes the seeds of fuzz-image: small real images, in its folded form.

Usage: ../../run ./make-corpus.py DIRECTORY

Each has one thing that the others do not have.  Plain data is written
as zeroes, because fuzz-image does not look into it and zeroes are not
stored in a folded file.
"""

import os
import random
import struct
import subprocess
import sys
import tempfile
import zlib

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                os.pardir))

import qcow2edit as edit  # noqa: E402
import qf  # noqa: E402

SECTOR = 512
# As in fuzz-image.c.
WHOLE, NO_CACHE = 1, 2
ZSTD_SKIPPABLE = struct.pack("<II", 0x184d2a50, 4) + b"skip"


def fold(path, probe=0, flags=0, fail=0, size=None):
    """The file's sectors that are not zero, and where they lie."""
    with open(path, "rb") as file:
        content = file.read()
    size = len(content) if size is None else size
    content += bytes(-len(content) % SECTOR)
    places = [at // SECTOR for at in range(0, len(content), SECTOR)
              if any(content[at:at + SECTOR])]
    out = [content[p * SECTOR:(p + 1) * SECTOR] for p in places]
    out += [struct.pack(">I", p) for p in places]
    out.append(struct.pack(">QQBBH", size, probe, flags, fail, len(places)))
    return b"".join(out) + b"QFZT"


class Image:
    """An image being made, by qemu-io commands and changes to the file."""

    def __init__(self, tmp, size, options, create=()):
        self.path = os.path.join(tmp, "image")
        self.text = os.path.join(tmp, "text")
        flags = ["-o", options] if options else []
        qf.qemu_img("create", "-q", "-f", "qcow2", *flags, *create,
                    self.path, str(size))

    def io(self, *commands):
        qf.qemu_io(self.path, commands, options=("-d", "unmap"))

    def write_text(self, offset, length, seed=1):
        """Compressed, with data that makes use of all of deflate."""
        rng = random.Random(seed)
        words = [b"%x" % rng.randrange(1 << 20) for _ in range(12)]
        text = b" ".join(rng.choice(words) for _ in range(512))
        text = text.ljust(length, b".")
        with open(self.text, "wb") as file:
            file.write(text[:length])
        self.io(f"write -q -c -s {self.text} {offset} {length}")

    def snapshot(self, name):
        qf.qemu_img("snapshot", "-c", name, self.path)

    def put(self, field, value):
        edit.put(self.path, field, value)

    def replace_compressed(self, stream):
        """Another stream for the first compressed cluster, at the end."""
        bits = edit.get(self.path, "cluster_bits")
        at = next(at for at, entry in edit.l2_entries(self.path)
                  if entry & edit.COMPRESSED)
        offset = edit.append_clusters(self.path, stream)
        sectors = (len(stream) - 1) // SECTOR
        entry = edit.COMPRESSED | sectors << (62 - (bits - 8)) | offset
        edit.write_at(self.path, at, struct.pack(">Q", entry))


def mixed(image, unit, low=0):
    """Data, zeroes of both kinds, and holes between them."""
    def at(units):
        return low + units * unit
    image.io(f"write -q -P 0 {at(0)} {3 * unit}",
             f"write -q -z {at(4)} {2 * unit}",
             f"write -q -P 0 {at(7)} {2 * unit}",
             f"write -q -z {at(7)} {unit}",
             f"write -q -z -u {at(10)} {unit}",
             f"write -q -P 0 {at(40)} {unit}")


def raw_deflate(data):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    return deflate.compress(data) + deflate.flush()


def zstd(data):
    return subprocess.run(["zstd", "-q", "-19"], input=data, check=True,
                          stdout=subprocess.PIPE).stdout


# The seeds.  Each function returns what fold needs beyond the image.

def v3(tmp):
    image = Image(tmp, 48 << 10, "cluster_size=512")
    mixed(image, 512)
    image.write_text(0x4000, 1536)
    return image, {"probe": 0x5000}


def v2(tmp):
    image = Image(tmp, (44 << 10) + 512, "cluster_size=1k,compat=0.10")
    mixed(image, 1024)
    image.write_text(0x8000, 1024)
    return image, {}


def default_clusters(tmp):
    image = Image(tmp, (5 << 20) + 512, "")
    mixed(image, 65536)
    image.write_text(0x200000, 65536)
    return image, {"probe": 0x200000}


def largest_clusters(tmp):
    image = Image(tmp, 1 << 40, "cluster_size=2M")
    image.io("write -q -P 0 0 4M", "write -q -P 0 512G 2M",
             "write -q -z 1023G 4M")
    return image, {"probe": 512 << 30, "flags": WHOLE}


def l1_holes(tmp):
    """More L1 entries than a slice has, most of them empty."""
    image = Image(tmp, 9 << 20, "cluster_size=512")
    image.io("write -q -P 0 5M 512", "write -q -P 0 0x8ffe00 512")
    return image, {"probe": 5 << 20, "flags": WHOLE}


def contiguous(tmp):
    """A run over the border of two L2 tables."""
    image = Image(tmp, 128 << 10, "cluster_size=512,preallocation=metadata")
    return image, {"probe": 32 << 10, "flags": WHOLE}


def extended(tmp):
    image = Image(tmp, 2 << 20, "cluster_size=16k,extended_l2=on")
    mixed(image, 512, low=16384 - 1024)
    mixed(image, 16384, low=131072)
    image.write_text(0x10000, 16384)
    return image, {"probe": 16384}


def extended_large(tmp):
    image = Image(tmp, 1 << 30, "cluster_size=128k,extended_l2=on")
    mixed(image, 4096, low=512 << 20)
    return image, {"probe": 512 << 20}


def zstd_clusters(tmp):
    image = Image(tmp, 32 << 10, "cluster_size=4k,compression_type=zstd")
    image.write_text(0, 4096)
    image.write_text(8192, 4096, seed=2)
    return image, {}


def zstd_frames(tmp):
    """One cluster out of two frames, with a skippable one between."""
    image, extra = zstd_clusters(tmp)
    text = edit.read_at(image.text, 0, 4096)
    image.replace_compressed(zstd(text[:1000]) + ZSTD_SKIPPABLE
                             + zstd(text[1000:]) + b"next")
    return image, extra


def deflate_long(tmp):
    """A stream that goes on behind the end of its cluster."""
    image = Image(tmp, 16 << 10, "cluster_size=4k")
    image.write_text(0, 4096)
    text = edit.read_at(image.text, 0, 4096)
    image.replace_compressed(raw_deflate(text + text))
    return image, {}


def deflate_stored(tmp):
    image = Image(tmp, 16 << 10, "cluster_size=512")
    image.write_text(0, 512)
    text = edit.read_at(image.text, 0, 512)
    deflate = zlib.compressobj(0, zlib.DEFLATED, -12)
    image.replace_compressed(deflate.compress(text) + deflate.flush()
                             + b"garbage")
    return image, {}


def snapshots(tmp):
    image = Image(tmp, 40 << 10, "cluster_size=512")
    mixed(image, 512)
    image.snapshot("first")
    image.io("write -q -P 0 32k 1k", "discard -q 0 1k")
    image.snapshot("second")
    qf.qemu_img("resize", "-q", image.path, "48k")
    return image, {"probe": 32 << 10}


def snapshots_extra(tmp):
    """Tables that QEMU does not write: no extra data, and more of it."""
    image, extra = snapshots(tmp)
    table = edit.snapshots(image.path)
    table[0]["extra"] = b""
    table[0]["state"] = 4096
    table[1]["extra"] += bytes(range(40))
    table.append({**table[0], "id": b"7", "name": b"",
                  "extra": struct.pack(">Q", 1 << 33)})
    edit.set_snapshots(image.path, table)
    return image, extra


def snapshots_v2(tmp):
    image = Image(tmp, 32 << 10, "cluster_size=512,compat=0.10")
    mixed(image, 512, low=4096)
    image.snapshot("old")
    return image, {}


def backing(tmp):
    image = Image(tmp, 64 << 10, "cluster_size=4k",
                  create=("-u", "-b", "base.qcow2", "-F", "qcow2"))
    return image, {}


def backing_nameless_format(tmp):
    image = Image(tmp, 64 << 10, "cluster_size=512,compat=0.10",
                  create=("-u", "-b", "nbd:unix:/tmp/s", "-F", "raw"))
    return image, {}


def data_file(tmp):
    image = Image(tmp, 64 << 10, "cluster_size=4k,data_file="
                  + os.path.join(tmp, "data"))
    image.io("write -q -P 0 0 12k")
    # The temporary directory's name shall not be in the seed.
    edit.set_extensions(image.path, [
        (kind, b"data.raw" if kind == 0x44415441 else data)
        for kind, data in edit.extensions(image.path)])
    return image, {}


def unknown_feature(tmp):
    image = Image(tmp, 64 << 10, "cluster_size=4k")
    edit.add_feature_name(image.path, 0, 9, "an unknown feature")
    edit.set_bits(image.path, "incompatible", 1 << 9 | 1 << 40)
    return image, {}


def unknown_extension(tmp):
    image = Image(tmp, 64 << 10, "cluster_size=4k")
    edit.set_extensions(image.path, edit.extensions(image.path) + [
        (0x12345678, b"odd length"), (0x12345679, b"")])
    edit.set_bits(image.path, "compatible", 1)
    edit.set_bits(image.path, "incompatible", 3)
    return image, {}


def many_extensions(tmp):
    image = Image(tmp, 64 << 10, "cluster_size=16k")
    edit.set_extensions(image.path, [(0xabcd0000, b"")] * 1025)
    return image, {}


def bitmaps(tmp):
    image = Image(tmp, 64 << 10, "cluster_size=512")
    qf.qemu_img("bitmap", "--add", "-g", "512", image.path, "b0")
    image.io("write -q -P 0 0 1k")
    return image, {}


def luks_header(mode, key_bytes):
    """Key slots with little work to try; their material is zeroes."""
    sectors = (key_bytes * 4000 + 511) // 512
    head = struct.pack(">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1,
                       b"aes", mode, b"sha1", 4096, key_bytes, b"d" * 20,
                       b"s" * 32, 1, b"uuid")
    slots = [struct.pack(">II32sII", 0xac71f3 if i < 2 else 0xdead, 1,
                         b"t" * 32, 8 + i * (sectors + 7) // 8 * 8, 4000)
             for i in range(8)]
    return head + b"".join(slots)


def encrypted(tmp, mode=b"cbc-essiv:sha256", key_bytes=16):
    image = Image(tmp, 64 << 10, "cluster_size=512")
    header = luks_header(mode, key_bytes)
    length = 4096 + 8 * (key_bytes * 4000 + 4096)
    offset = edit.append_clusters(image.path, header + bytes(length))
    image.put("crypt", 2)
    edit.set_extensions(image.path, [(0x0537be77,
                                      struct.pack(">QQ", offset, length))])
    return image, {}


def encrypted_xts(tmp):
    return encrypted(tmp, b"xts-plain64", 64)


def encrypted_aes(tmp):
    image = Image(tmp, 64 << 10, "cluster_size=512")
    image.put("crypt", 1)
    return image, {"probe": 4096}


def narrow_refcounts(tmp):
    image = Image(tmp, 32 << 10, "cluster_size=512,refcount_bits=1")
    mixed(image, 512, low=1024)
    return image, {}


def wide_refcounts(tmp):
    image = Image(tmp, 32 << 10, "cluster_size=512,refcount_bits=64")
    mixed(image, 512, low=2048)
    return image, {"flags": NO_CACHE}


def empty(tmp):
    return Image(tmp, 0, "cluster_size=512"), {}


def short(tmp):
    """Cut inside of the last L2 table."""
    image = Image(tmp, 256 << 10, "cluster_size=2k")
    image.io("write -q -P 0 0 2k")
    at = max(at for at, _ in edit.l2_entries(image.path))
    return image, {"size": at + 100, "probe": 6000}


def beyond(tmp):
    """A container with more behind the image, and a read that fails."""
    image = Image(tmp, 48 << 10, "cluster_size=512")
    mixed(image, 512)
    return image, {"size": 1 << 45, "fail": 4}


SEEDS = (v3, v2, default_clusters, largest_clusters, l1_holes, contiguous,
         extended, extended_large, zstd_clusters, zstd_frames, deflate_long,
         deflate_stored, snapshots, snapshots_extra, snapshots_v2, backing,
         backing_nameless_format, data_file, unknown_feature,
         unknown_extension, many_extensions, bitmaps, encrypted,
         encrypted_xts, encrypted_aes, narrow_refcounts, wide_refcounts, empty, short, beyond)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    total = 0
    for seed in SEEDS:
        with tempfile.TemporaryDirectory(prefix="qf.") as tmp:
            image, extra = seed(tmp)
            folded = fold(image.path, **extra)
        name = seed.__name__.replace("_", "-")
        with open(os.path.join(sys.argv[1], name), "wb") as file:
            file.write(folded)
        total += len(folded)
        print(f"{name}: {len(folded)} bytes")
    print(f"{len(SEEDS)} seeds, {total} bytes")


main()
