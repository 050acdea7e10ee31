#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""External data files: contents and maps as QEMU has them, and which
files are opened."""

import os
from contextlib import contextmanager

import chains
import disks
import images
import nbd
import qcow2edit as edit
import qf
from qf import KiB, MiB

RAW = "data_file_raw=on,"
DATA_FILE_NAME = 0x44415441
READS = 200

# Name: (size, options).
IMAGES = {
    "plain": (3 * MiB, ""),
    "raw": (3 * MiB, RAW),
    "c512": (MiB + 512, "cluster_size=512"),
    "c512-raw": (MiB, RAW + "cluster_size=512"),
    "c4k": (2 * MiB + 1536, "cluster_size=4k"),
    "c2m": (9 * MiB + 512, "cluster_size=2M"),
    "c2m-raw": (9 * MiB, RAW + "cluster_size=2M"),
    "extended": (5 * MiB, "extended_l2=on,cluster_size=16k"),
    "extended-raw": (5 * MiB, RAW + "extended_l2=on"),
    "prealloc": (2 * MiB, "preallocation=metadata"),
    "prealloc-raw": (2 * MiB, RAW + "preallocation=falloc"),
    "luks": (2 * MiB, "encrypt.format=luks,cluster_size=4k"),
    "luks-xts-128": (2 * MiB, "encrypt.format=luks,"
                     "encrypt.cipher-alg=aes-128,cluster_size=64k"),
    "refcounts": (2 * MiB, RAW + "refcount_bits=1,lazy_refcounts=on"),
    "empty": (0, ""),
}


def make(tmp, name, backing=None):
    size, options = IMAGES[name]
    layer = chains.Layer(tmp, name, size,
                         f"data_file={name}.raw,{options}".rstrip(","),
                         backing)
    if size == 0:
        layer.create()
        return layer
    return layer.fill()


def data_file(layer):
    return os.path.join(layer.tmp, layer.options["data_file"])


def test_contents(tmp):
    def verify(name):
        layer = make(tmp, name)
        with chains.serve(layer, f"qcow2-data-file=dir:{tmp}") as server:
            chains.verify(server, name, layer, reads=READS)
    qf.each(IMAGES, verify)


def has_nbd():
    return qf.plugin_exists("plugin", "nbd") \
        and os.environ.get("LIBNBD") != "no"


@contextmanager
def policies(tmp, path):
    """All values of the parameter that lead to this file in tmp."""
    values = [f"file:{path}", f"dir:{tmp}"]
    if not has_nbd():
        yield values
        return
    with chains.nbd_server(tmp, path) as remote:
        yield [*values, remote.uri()]


def test_policies(tmp):
    """The same disk, whoever opens the data file."""
    layer = make(tmp, "plain")
    data = data_file(layer)
    moved = os.path.join(tmp, "moved")
    os.rename(data, moved)
    os.symlink("moved", data)          # for QEMU; and it stays in tmp
    with policies(tmp, moved) as values:
        for value in values:
            with chains.serve(layer, "qcow2-data-file=" + value) as server:
                chains.verify(server, value, layer, reads=READS)


def test_foreign_data(tmp):
    """What the image does not map reads as zeroes, whatever is there; and
    nothing is read behind the disk's end."""
    def verify(options):
        layer = chains.Layer(tmp, "foreign", 3 * MiB + 512,
                             options + "data_file=foreign.raw")
        layer.create()
        layer.write(0, MiB)
        layer.zero(MiB, 64 * KiB)
        layer.zero(2 * MiB, 64 * KiB, unmap=True)
        layer.discard(64 * KiB, 64 * KiB)
        layer.run()
        with open(data_file(layer), "r+b") as file:
            file.write(images.pattern(9, 5 * MiB))
        with chains.serve(layer, f"qcow2-data-file=dir:{tmp}") as server:
            chains.verify(server, options, layer, reads=READS)
    qf.each(("", RAW, "extended_l2=on,cluster_size=16k,",
             RAW + "cluster_size=512,"), verify)


def test_chains(tmp):
    """A data file below an overlay, and over a base, and both."""
    def overlay(name, base, options=""):
        return chains.Layer(tmp, name, 4 * MiB, options, base).fill()

    bases = {
        "below": lambda: overlay("top1", make(tmp, "c4k"),
                                 "cluster_size=4k"),
        "below, raw": lambda: overlay("top2", make(tmp, "raw")),
        "above": lambda: make(tmp, "plain", chains.Layer(
            tmp, "base", 4 * MiB, "cluster_size=8k").fill()),
        "above raw": lambda: make(tmp, "c4k", chains.Raw(tmp, "b", MiB)),
        "above and below": lambda: make(tmp, "c512", make(tmp, "c2m-raw")),
        "between": lambda: overlay("top3", make(
            tmp, "extended", chains.Raw(tmp, "b", 6 * MiB))),
    }

    def verify(name):
        layer = bases[name]()
        with chains.serve(layer, f"qcow2-data-file=dir:{tmp}") as server:
            chains.verify(server, name, layer, reads=READS)
    qf.each(bases, verify)


def test_policies_in_chains(tmp):
    """One file or URI is for the image itself; a directory for them all,
    also if its user has named the backing file."""
    below = make(tmp, "raw")
    top = chains.Layer(tmp, "top", 3 * MiB, "", below).fill()
    with chains.serve(top, f"qcow2-backing=file:{below.path}",
                      f"qcow2-data-file=dir:{tmp}") as server:
        chains.verify(server, "a backing file with a name", top)
    permit = f"qcow2-backing=dir:{tmp}"
    chains.refused("refuse, below", top.path,
                   ["raw.qcow2", "raw.raw", "qcow2-data-file"], permit)
    chains.refused("one file, below", top.path,
                   ["the backing file has", "raw.raw", "qcow2-data-file",
                    "only one"], permit,
                   f"qcow2-data-file=file:{data_file(below)}")
    above = make(tmp, "plain", chains.Raw(tmp, "b", 4 * MiB))
    with chains.serve(
            above, f"qcow2-data-file=file:{data_file(above)}") as server:
        chains.verify(server, "one file, above", above)


def verify_short(server, what, layer, oracle, end):
    """QEMU reads zeroes behind the data file's end.  So do we in the
    cluster in which it ends; what should be further behind is missing,
    and like QEMU's zeroes an error is right."""
    handle = server.connect()
    missing = 0
    for at in range(0, layer.size, 64 * KiB):
        count = min(64 * KiB, layer.size - at)
        try:
            got = handle.pread(count, at)
        except nbd.Error as error:
            qf.equal(f"{what}: at {at}: {error}", error.errno, "EIO")
            qf.check(at + count - end >= layer.cluster,
                     f"{what}: {error} at {at}")
            missing += 1
            continue
        disks.compare(what, at, got, oracle.read(at, count))
    handle.shutdown()
    qf.equal(f"{what}: lines in the log about what is missing",
             server.log().count("beyond the end of the file"), missing)


def test_short(tmp):
    def verify(name):
        layer = make(tmp, name)
        for end in (layer.size - 1, layer.size // 3 + 100, 0):
            os.truncate(data_file(layer), end)
            oracle = chains.oracle_of(layer)
            with policies(tmp, data_file(layer)) as values:
                for value in values:
                    what = f"{name}, {end} bytes, {value}"
                    with chains.serve(layer,
                                      "qcow2-data-file=" + value) as server:
                        verify_short(server, what, layer, oracle, end)
                        chains.verify_map(server, what, layer)
    qf.each(("plain", "raw", "c512", "c2m"), verify)


def set_name(path, name):
    """Give the image another name, or none, for its data file."""
    found = [(kind, content) for kind, content in edit.extensions(path)
             if kind != DATA_FILE_NAME]
    edit.set_extensions(path, found if name is None else
                        [(DATA_FILE_NAME, name), *found])


def test_refused(tmp):
    layer = make(tmp, "plain")
    path = layer.path
    inside = os.path.join(tmp, "inside")
    os.mkdir(inside)
    for values in ([], ["qcow2-data-file=refuse"]):
        chains.refused("refuse", path, ["plain.raw", "qcow2-data-file"],
                       *values)
    chains.refused("missing", path, ["missing"],
                   f"qcow2-data-file=file:{tmp}/missing")
    chains.refused("not there", path, ["plain.raw"],
                   f"qcow2-data-file=dir:{inside}")
    chains.refused("no such directory", path, [tmp + "/none"],
                   f"qcow2-data-file=dir:{tmp}/none")
    for value in ("maybe", "none", "export", ""):
        chains.refused(f"the value {value!r}", path, ["qcow2-data-file"],
                       "qcow2-data-file=" + value)
    if has_nbd():
        # Not at start, when nobody may wait for a server.
        with chains.serve(layer, "qcow2-data-file=nbd+unix:///?socket="
                          + tmp + "/none") as server:
            chains.connection_refused(server, "no such server",
                                      ["nbd+unix", tmp + "/none"])

    secret = os.path.join(tmp, "secret")
    chains.write_file(secret, b"secret" * MiB)
    os.symlink(secret, os.path.join(inside, "link"))
    os.symlink("../secret", os.path.join(inside, "relative-link"))
    os.symlink(tmp, os.path.join(inside, "link-to-dir"))
    os.symlink("loop", os.path.join(inside, "loop"))
    os.mkfifo(os.path.join(inside, "fifo"))
    os.mkdir(os.path.join(inside, "directory"))
    chains.write_file(os.path.join(inside, "good"), b"good" * MiB)
    names = ("../secret", "directory/../../secret", "link-to-dir/secret",
             "./link", "relative-link", "loop", secret,
             os.path.join(inside, "good"), "/dev/zero", "/proc/self/fd/0",
             "fifo", "directory", "directory/", ".", "..", "good/",
             "ftp://host/file", "nbd://localhost:1/x", "fat:/",
             "json:{\"driver\": \"null-co\"}", "\x1b[31mred\n\x07",
             "x" * 1000)

    def refuse(name):
        set_name(path, name.encode())
        start = "" if "{" in name or "\x1b" in name else name[:100]
        chains.refused(name, path, [start],
                       f"qcow2-data-file=dir:{inside}", forbidden=["\x1b"])
    qf.each(names, refuse)
    set_name(path, b"good\0/../../secret")
    chains.refused("NUL", path, ["data file", "NUL"],
                   f"qcow2-data-file=dir:{inside}")

    # Whatever the name, the user's own choice is opened, and nothing else.
    set_name(path, b"plain.raw")
    oracle = chains.oracle_of(layer)
    for name in ("../secret", "/dev/zero", "missing"):
        set_name(path, name.encode())
        with chains.serve(
                layer, f"qcow2-data-file=file:{data_file(layer)}") as server:
            disks.verify_disk(server, name, oracle)


def test_no_name(tmp):
    """Without the extension the parameter must tell."""
    for name in ("plain", "raw"):
        layer = make(tmp, name)
        oracle = chains.oracle_of(layer)
        zeroes = chains.qemu_zeroes(layer)
        for absent in (None, b""):
            set_name(layer.path, absent)
            for values in ([], [f"qcow2-data-file=dir:{tmp}"]):
                chains.refused(f"{name}: no name", layer.path,
                               ["data file", "qcow2-data-file"], *values)
            with policies(tmp, data_file(layer)) as values:
                for value in values[:1] + values[2:]:
                    with chains.serve(layer,
                                      "qcow2-data-file=" + value) as server:
                        disks.verify_disk(server, value, oracle, reads=READS)
                        qf.equal(f"{name}: map", chains.our_zeroes(
                            value, server.uri()), zeroes)


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdinfo")
    if os.environ.get("LIBGCRYPT") == "no":
        for name in [n for n in IMAGES if n.startswith("luks")]:
            del IMAGES[name]
    qf.parts(tmp, test_contents, test_policies, test_foreign_data,
             test_chains, test_policies_in_chains, test_short, test_refused,
             test_no_name)


qf.main(test)
