# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Images of every kind, made by qemu-img and qemu-io.

CASES is the list; Case.make writes one.  The contents are derived from
the name, so that a failure can be repeated.
"""

import os
import random
import struct
import zlib

import disks
import qcow2edit as edit
import qf
from qf import GiB, KiB, MiB, TiB

NOISE = random.Random(0).randbytes(1 << 20)


def pattern(seed, length):
    """Data that differs in every sector and compresses more or less well."""
    rng = random.Random(seed)
    out = []
    noise = 0
    for at in range(0, length, 512):
        if at % 16384 == 0:
            noise = rng.choice((0, 16, 200, 480))
        start = rng.randrange(len(NOISE) - 480)
        out.append(struct.pack(">QQ", seed, at))
        out.append(NOISE[start:start + noise])
        out.append(bytes([(seed + at // 512) % 255 + 1]) * (496 - noise))
    return b"".join(out)[:length]


class Builder:
    """An image being made; operations are collected for one qemu-io."""

    def __init__(self, tmp, name, size, options):
        self.tmp = tmp
        self.path = os.path.join(tmp, name + ".qcow2")
        self.rng = random.Random(name)
        self.seed = zlib.crc32(name.encode())
        self.options = dict(pair.split("=") for pair in options.split(",")
                            if pair)
        if self.options.get("compression_type") == "zstd" \
           and os.environ.get("LIBZSTD") == "no":
            self.options["compression_type"] = "zlib"
        self.size = size
        self.cluster = parse_size(self.options.get("cluster_size", "64k"))
        self.unit = self.cluster
        if self.options.get("extended_l2") == "on":
            self.unit = self.cluster // 32
        # Clusters that may be allocated and not compressed (what does not
        # get smaller is stored plain).  QEMU refuses to compress over them.
        self.plain = set()
        self.commands = []
        self.sources = []

    def create(self):
        option = []
        for key, value in self.options.items():
            option += ["-o", f"{key}={value}"]
        qf.qemu_img("create", "-q", "-f", "qcow2", *option, self.path,
                    str(self.size))
        # QEMU rounds sizes up to 512 here.
        self.size = disks.virtual_size(self.path)
        if self.options.get("preallocation", "off") != "off":
            self.plain.update(self.clusters(0, self.size))

    def clusters(self, offset, length):
        return range(offset // self.cluster,
                     (offset + length - 1) // self.cluster + 1)

    def write(self, offset, length, compressed=False):
        self.seed += 1
        clusters = self.clusters(offset, length)
        if compressed and not self.plain.isdisjoint(clusters):
            self.discard(offset, length)
        self.plain.update(clusters)
        if compressed:
            self.reopen()
        source = os.path.join(self.tmp, f"source.{self.seed}")
        with open(source, "wb") as file:
            file.write(pattern(self.seed, length))
        self.sources.append(source)
        flag = "-c" if compressed else ""
        self.commands.append(f"write -q {flag} -s {source} {offset} {length}")

    def reopen(self):
        """Before compressed writes: QEMU 7.2 goes on behind the last one,
        even if a discard has freed that cluster meanwhile, and so makes a
        corrupt image."""
        if self.commands:
            self.commands += [
                "close", f"open -o driver=qcow2 -d unmap {self.path}"]

    def zero(self, offset, length, unmap=False):
        flag = "-u" if unmap else ""
        self.plain.update(self.clusters(offset, length))
        self.commands.append(f"write -q -z {flag} {offset} {length}")

    def discard(self, offset, length):
        end = offset + length
        if end < self.size:
            end -= end % self.cluster
        if offset % self.cluster == 0 and end > offset:
            self.plain.difference_update(self.clusters(offset, end - offset))
        self.commands.append(f"discard -q {offset} {length}")

    def run(self, options=("-d", "unmap")):
        qf.qemu_io(self.path, self.commands, options)
        self.forget()

    def forget(self):
        self.commands = []
        for source in self.sources:
            os.unlink(source)
        self.sources = []

    def random_range(self, align, limit=None):
        """An aligned range; only the disk's end may cut it."""
        limit = limit or max(self.size // 8, 2 * align)
        units = (self.size + align - 1) // align
        most = max(min(limit // align, units), 1)
        count = int(most ** self.rng.random() + 0.5)
        start = self.rng.randrange(max(units - count, 0) + 1)
        offset = start * align
        return offset, max(min(count * align, self.size - offset), 1)

    def mix(self, rounds=None, compress=True):
        """Every state of a cluster, over and over each other."""
        rounds = rounds or (80 if self.size < 8 * MiB else 32)
        kinds = "wwwwssszzzuudccc"
        if self.unit < self.cluster:
            # Within clusters only, if compressed ones do not cover all.
            kinds = "wwwwssszzzzuudc"
        for _ in range(rounds):
            kind = self.rng.choice(kinds)
            if kind == "c" and not compress:
                kind = "w"
            align = {"s": 512, "c": self.cluster}.get(kind, self.unit)
            offset, length = self.random_range(align)
            if kind in "ws":
                self.write(offset, length)
            elif kind == "c":
                self.write(offset, length, compressed=True)
            elif kind == "d":
                self.discard(offset, length)
            else:
                self.zero(offset, length, unmap=kind == "u")
        self.run()


def parse_size(text):
    factor = {"k": KiB, "M": MiB, "G": GiB, "T": TiB}.get(text[-1], 1)
    return int(text.rstrip("kMGT")) * factor


# How an image is filled: functions of a Builder.

def fill_mix(b):
    b.create()
    b.mix()


def fill_plain_mix(b):
    b.create()
    b.mix(compress=False)


def fill_nothing(b):
    b.create()


def fill_converted(b, *flags):
    """As qemu-img convert leaves it, from a raw disk with holes."""
    raw = b.path + ".raw"
    with open(raw, "wb") as file:
        file.truncate(b.size)
        for _ in range(6):
            offset, length = b.random_range(4 * KiB, b.size // 3)
            b.seed += 1
            file.seek(offset)
            file.write(pattern(b.seed, length))
    options = ",".join(f"{key}={value}" for key, value in b.options.items())
    qf.qemu_img("convert", "-f", "raw", "-O", "qcow2", *flags,
                *(["-o", options] if options else []), raw, b.path)
    os.unlink(raw)


def fill_compressed(b):
    fill_converted(b, "-c")


def fill_few(b):
    """Some writes in the preallocated: the rest stays as it was made."""
    b.create()
    for _ in range(5):
        b.write(*b.random_range(b.unit))
    b.run()


def fill_preallocated_mix(b):
    b.create()
    b.mix(rounds=16)


def fill_scattered(b):
    """Each cluster by itself, in random order, so that no two adjoin."""
    b.create()
    clusters = list(range(b.size // b.cluster))
    b.rng.shuffle(clusters)
    for cluster in clusters[:500]:
        b.write(cluster * b.cluster, b.cluster)
    b.run()


def fill_backwards(b):
    b.create()
    for cluster in reversed(range(b.size // b.cluster)):
        b.write(cluster * b.cluster, b.cluster,
                compressed=cluster % 3 == 0)
    b.run()


def fill_dirty(b):
    """End without a close: the dirty bit stays, refcounts are stale."""
    b.create()
    b.mix()
    for _ in range(4):
        b.write(*b.random_range(b.cluster))
    b.commands += ["flush", "abort"]
    qf.run([qf.tool("qemu-io"), "-f", "qcow2", b.path], ok=-6, stdin=None,
           input="\n".join(b.commands) + "\n")
    b.forget()
    qf.check(edit.get(b.path, "incompatible") & edit.INCOMPAT_DIRTY,
             f"{b.path}: was to be dirty")


def fill_with_bits(field, bits):
    def fill(b):
        fill_mix(b)
        edit.set_bits(b.path, field, bits)
    return fill


def fill_bitmaps(b):
    b.create()
    b.mix(rounds=16)
    for name, granularity in (("b0", "64k"), ("b1", "4k"), ("off", "1M")):
        qf.qemu_img("bitmap", "--add", "-g", granularity, b.path, name)
    qf.qemu_img("bitmap", "--disable", b.path, "off")
    b.mix(rounds=16)


def fill_snapshots(b):
    b.create()
    for name in ("one", "two", "three"):
        b.mix(rounds=16)
        qf.qemu_img("snapshot", "-c", name, b.path)
    b.mix(rounds=16)
    qf.qemu_img("snapshot", "-d", "two", b.path)


def fill_short_header(b):
    """As QEMU wrote version 3 before there were compression types, with
    an extension that nobody knows."""
    fill_mix(b)
    found = edit.extensions(b.path)
    edit.put(b.path, "header_length", 104)
    edit.set_extensions(b.path, [(0x6e6f6e65, b"thirteen byte")] + found)


def fill_odd_header_size(by):
    """A disk size that is no multiple of 512, which only others write."""
    def fill(b):
        fill_mix(b)
        edit.put(b.path, "size", edit.get(b.path, "size") + by)
    return fill


def fill_ends(b):
    """A huge disk with data at its ends and in a few other places."""
    b.create()
    for offset in (0, b.size // 3, b.size - b.size % b.cluster - b.cluster):
        b.write(offset, min(3 * b.cluster // 2, b.size - offset))
    for _ in range(5):
        b.write(b.rng.randrange(b.size // 512 - 256) * 512, 128 * KiB)
    offset = b.rng.randrange(b.size // b.cluster - 1) * b.cluster
    b.write(offset, b.cluster, compressed=True)
    if b.options.get("compat") != "0.10":
        b.zero(b.size // 2, 1000 * b.cluster)
        b.zero(b.size - 512, 512)
    b.run()


def fill_grown(b):
    b.create()
    b.mix(rounds=16)
    qf.qemu_img("resize", "-q", b.path, str(b.size * 3 + 512))
    b.size = b.size * 3 + 512
    b.mix(rounds=16)


def fill_shrunk(b):
    """The L1 table stays longer than the disk needs."""
    b.create()
    b.mix(rounds=24)
    # No less than one L2 table's reach is dropped from the end.
    b.size = (b.size // 3 + 511) // 512 * 512
    qf.qemu_img("resize", "-q", "--shrink", b.path, str(b.size))
    b.mix(rounds=8)


def fill_truncated_sector(b):
    """The file ends with the last compressed byte, not with its sector."""
    fill_compressed(b)
    last = max((edit.compressed_extent(b.path, entry) for _, entry
                in edit.l2_entries(b.path) if entry & edit.COMPRESSED),
               key=lambda extent: extent[0])
    offset, sectors = last
    end = (offset // 512 + sectors) * 512
    content = edit.read_at(b.path, offset, end - offset)
    stream = zlib.decompressobj(-12)
    stream.decompress(content)
    qf.check(stream.eof, f"{b.path}: the last compressed cluster has no end")
    # Tables may lie behind it, which must be kept.
    if os.path.getsize(b.path) <= (end + b.cluster - 1) \
            // b.cluster * b.cluster:
        os.truncate(b.path, offset + len(content) - len(stream.unused_data))


def create_encrypted(path, form, passphrase, size):
    """An empty image encrypted with form luks or aes."""
    option = f"encrypt.format={form},encrypt.key-secret=s"
    if form == "luks":
        option += ",encrypt.iter-time=50"
    # QEMU 7.2 sometimes fails to measure how fast it makes a key.
    for _ in range(20):
        done = qf.run([qf.tool("qemu-img"), "create", "-q", "--object",
                       f"secret,id=s,data={passphrase}", "-f", "qcow2",
                       "-o", option, path, str(size)], ok=None)
        if "accurate CPU usage" not in done.stderr:
            break
    qf.equal(f"qemu-img create: {done.stderr}", done.returncode, 0)


class Case:
    """One image: how it is made and what is special about it."""

    def __init__(self, name, size, options="", fill=fill_mix, clean=True,
                 huge=False):
        self.name = name
        self.size = size
        self.options = options
        self.fill = fill
        # Would qemu-img check find nothing wrong?
        self.clean = clean
        # Too large to be converted to raw.
        self.huge = huge

    def __str__(self):
        return self.name

    def make(self, tmp):
        builder = Builder(tmp, self.name, self.size, self.options)
        self.fill(builder)
        if self.clean:
            qf.qemu_img("check", "-q", "-f", "qcow2", builder.path)
        return builder.path

    def oracle(self, tmp, path):
        if self.huge:
            return disks.sparse_oracle_of(tmp, path)
        return disks.oracle_of(tmp, path)


def disk_size(cluster):
    """Small, yet with several L2 tables or at least several clusters."""
    return {512: MiB, KiB: 2 * MiB, 2 * KiB: 3 * MiB}.get(
        cluster, min(max(96 * cluster, 6 * MiB), 24 * MiB)) + 7 * 512


def standard_cases():
    cases = []
    for bits in (9, 12, 16, 18, 21):
        cluster = 1 << bits
        cases.append(Case(f"v2-{cluster}", disk_size(cluster),
                          f"compat=0.10,cluster_size={cluster}"))
    for bits in range(9, 22):
        cluster = 1 << bits
        cases.append(Case(f"v3-{cluster}", disk_size(cluster),
                          f"cluster_size={cluster}"))
    for bits in (9, 12, 14, 16, 18, 21):
        cluster = 1 << bits
        cases.append(Case(f"zstd-{cluster}", disk_size(cluster),
                          f"cluster_size={cluster},compression_type=zstd"))
    for bits in range(14, 22):
        cluster = 1 << bits
        cases.append(Case(f"extl2-{cluster}", disk_size(cluster),
                          f"cluster_size={cluster},extended_l2=on"))
    cases.append(Case("extl2-plain", 6 * MiB, "extended_l2=on",
                      fill_plain_mix))
    cases.append(Case("extl2-zstd", 6 * MiB,
                      "extended_l2=on,compression_type=zstd"))
    return cases


def converted_cases():
    cases = []
    for kind in ("zlib", "zstd"):
        for cluster in (512, 4 * KiB, 64 * KiB, 2 * MiB):
            cases.append(Case(
                f"convert-c-{kind}-{cluster}", disk_size(cluster),
                f"cluster_size={cluster},compression_type={kind}",
                fill_compressed))
    cases.append(Case("convert-c-v2", 8 * MiB, "compat=0.10",
                      fill_compressed))
    for cluster in (512, 64 * KiB, 2 * MiB):
        cases.append(Case(f"convert-{cluster}", disk_size(cluster),
                          f"cluster_size={cluster}", fill_converted))
    return cases


def preallocation_cases():
    cases = []
    for mode in ("metadata", "falloc", "full"):
        for cluster in (4 * KiB, 64 * KiB, 2 * MiB):
            cases.append(Case(
                f"prealloc-{mode}-{cluster}", disk_size(cluster),
                f"cluster_size={cluster},preallocation={mode}", fill_few))
        cases.append(Case(f"prealloc-{mode}-mix", 6 * MiB,
                          f"preallocation={mode}", fill_preallocated_mix))
    cases.append(Case("prealloc-metadata-v2", 6 * MiB,
                      "compat=0.10,preallocation=metadata", fill_few))
    cases.append(Case("prealloc-metadata-extl2", 6 * MiB,
                      "extended_l2=on,preallocation=metadata", fill_few))
    return cases


def feature_cases():
    lazy = "lazy_refcounts=on"
    cases = [Case(f"refcount-{bits}", 4 * MiB,
                  f"refcount_bits={bits},cluster_size=4k")
             for bits in (1, 2, 4, 8, 32, 64)]
    return cases + [
        Case("lazy", 6 * MiB, lazy),
        Case("lazy-dirty", 6 * MiB, lazy, fill_dirty, clean=False),
        Case("dirty-bit", 6 * MiB, "",
             fill_with_bits("incompatible", edit.INCOMPAT_DIRTY),
             clean=False),
        Case("corrupt-bit", 6 * MiB, "",
             fill_with_bits("incompatible", edit.INCOMPAT_CORRUPT),
             clean=False),
        Case("compatible-bits", 6 * MiB, "",
             fill_with_bits("compatible", 0xf0f0 << 32)),
        Case("autoclear-bits", 6 * MiB, "",
             fill_with_bits("autoclear", 0xf0f0 << 32)),
        Case("bitmaps", 6 * MiB, "", fill_bitmaps),
        Case("bitmaps-extl2", 6 * MiB, "extended_l2=on", fill_bitmaps),
        Case("snapshots-v2", 6 * MiB, "compat=0.10", fill_snapshots),
        Case("snapshots-v3", 2 * MiB, "cluster_size=1k", fill_snapshots),
        Case("short-header", 6 * MiB, "", fill_short_header),
        Case("truncated-sector", 6 * MiB, "", fill_truncated_sector,
             clean=False),
        Case("scattered-512", 256 * KiB, "cluster_size=512",
             fill_scattered),
        Case("scattered-64k", 16 * MiB, "", fill_scattered),
        Case("backwards-4k", MiB, "cluster_size=4k", fill_backwards),
        Case("backwards-64k", 8 * MiB, "", fill_backwards),
    ]


def size_cases():
    return [
        Case("size-0", 0, "", fill_nothing),
        Case("size-0-v2", 0, "compat=0.10", fill_nothing),
        Case("size-512", 512, ""),
        Case("size-512-in-512", 512, "cluster_size=512"),
        Case("size-513", 513, ""),
        Case("size-cluster", 64 * KiB, ""),
        Case("size-cluster-minus", 64 * KiB - 512, ""),
        Case("size-cluster-plus", 64 * KiB + 512, ""),
        Case("size-in-2M", 2 * MiB + 512, "cluster_size=2M"),
        Case("size-in-extl2", 2 * MiB + 512,
             "cluster_size=128k,extended_l2=on"),
        Case("size-odd", MiB + 512, "", fill_odd_header_size(300)),
        Case("size-odd-4k", MiB, "cluster_size=4k",
             fill_odd_header_size(-1)),
        Case("size-below-512", 512, "", fill_odd_header_size(-212)),
        Case("grown", 3 * MiB, "cluster_size=4k", fill_grown),
        Case("shrunk", 6 * MiB, "cluster_size=1k", fill_shrunk),
        Case("shrunk-512", MiB, "cluster_size=512", fill_shrunk),
        Case("huge-16T", 16 * TiB, "", fill_ends, huge=True),
        Case("huge-16T-v2", 16 * TiB - 512, "compat=0.10", fill_ends,
             huge=True),
        Case("huge-64T", 64 * TiB, "cluster_size=2M", fill_ends, huge=True),
        Case("huge-16T-extl2", 16 * TiB, "cluster_size=128k,extended_l2=on",
             fill_ends, huge=True),
        Case("huge-8G-in-512", 8 * GiB, "cluster_size=512", fill_ends,
             huge=True),
    ]


CASES = (standard_cases() + converted_cases() + preallocation_cases()
         + feature_cases() + size_cases())


def select(names):
    """The cases of these names, or all; less what was not compiled in."""
    unknown = set(names) - {case.name for case in CASES}
    qf.check(not unknown, f"no such images: {', '.join(unknown)}")
    zstd = os.environ.get("LIBZSTD") != "no"
    return [case for case in CASES if not names or case.name in names
            if zstd or "zstd" not in case.options]
