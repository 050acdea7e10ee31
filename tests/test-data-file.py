#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""External data files: contents and maps as QEMU has them, and which
files are opened."""

import os
import struct

import chains
import disks
import nbd
import qcow2edit as edit
import qf
from qf import KiB, MiB

RAW = "data_file_raw=on,"

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
            chains.verify(server, name, layer, reads=200)
    qf.each(IMAGES, verify)


def test_policies(tmp):
    """The same disk, whoever opens the data file."""
    layer = make(tmp, "plain")
    data = data_file(layer)
    moved = os.path.join(tmp, "moved")
    os.rename(data, moved)
    os.symlink("moved", data)          # for QEMU; and it stays in tmp
    for policy in (f"file:{moved}", f"dir:{tmp}"):
        with chains.serve(layer, "qcow2-data-file=" + policy) as server:
            chains.verify(server, policy, layer)
    if qf.plugin_exists("plugin", "nbd") and "no" != os.environ.get("LIBNBD"):
        with chains.nbd_server(tmp, moved) as remote, \
             chains.serve(layer, "qcow2-data-file=" + remote.uri()) as server:
            disks.verify_disk(server, "URI", chains.oracle_of(layer))


def test_chains(tmp):
    """A data file below an overlay, and over a base."""
    bases = {
        "below": lambda: chains.Layer(tmp, "top1", 4 * MiB, "cluster_size=4k",
                                      make(tmp, "c4k")).fill(),
        "below, raw": lambda: chains.Layer(tmp, "top2", 4 * MiB, "",
                                           make(tmp, "raw")).fill(),
        "above": lambda: make(tmp, "plain", chains.Layer(
            tmp, "base", 4 * MiB, "cluster_size=8k").fill()),
        "above raw": lambda: make(tmp, "c4k", chains.Raw(tmp, "b", MiB)),
    }

    def verify(name):
        layer = bases[name]()
        with chains.serve(layer, f"qcow2-data-file=dir:{tmp}") as server:
            chains.verify(server, name, layer)
    qf.each(bases, verify)


def test_short(tmp):
    """What a data file that is too short does not have: as QEMU reads it,
    or an error that says so, but never anything else."""
    for name in ("plain", "raw", "c512"):
        layer = make(tmp, name)
        os.truncate(data_file(layer), layer.size // 3 + 100)
        oracle = chains.oracle_of(layer)
        with chains.serve(layer, f"qcow2-data-file=dir:{tmp}") as server:
            handle = server.connect()
            for at in range(0, layer.size, 64 * KiB):
                count = min(64 * KiB, layer.size - at)
                try:
                    got = handle.pread(count, at)
                except nbd.Error as error:
                    qf.check(error.errno == "EIO", f"{error}")
                    qf.check(at + count > layer.size // 3 + 100,
                             f"{name}: {error} at {at}")
                    continue
                disks.compare(name, at, got, oracle.read(at, count))
            handle.shutdown()


def set_name(path, name):
    """Give the image another name of the same length for its data file."""
    with open(path, "r+b") as file:
        content = file.read(64 * KiB)
        old = b"plain.raw"
        qf.equal("lengths", len(name), len(old))
        file.seek(content.index(old))
        file.write(name)


def test_refused(tmp):
    layer = make(tmp, "plain")
    path = layer.path
    inside = os.path.join(tmp, "inside")
    os.mkdir(inside)
    chains.refused("refuse", path, ["plain.raw", "qcow2-data-file"])
    chains.refused("missing", path, ["missing"],
                   f"qcow2-data-file=file:{tmp}/missing")
    chains.refused("not there", path, ["plain.raw"],
                   f"qcow2-data-file=dir:{inside}")
    chains.refused("no such value", path, ["qcow2-data-file"],
                   "qcow2-data-file=maybe")
    names = {"leaves": b"../secret", "is absolute": b"/dev/zero",
             "is a link": b"sym-link1", "is a fifo": b"fifo-1234",
             "is a directory": b"directory", "has NUL": b"pl\0in.raw"}
    secret = os.path.join(tmp, "secret")
    chains.write_file(secret, b"s" * 4 * MiB)
    os.symlink(secret, os.path.join(inside, "sym-link1"))
    os.mkfifo(os.path.join(inside, "fifo-1234"))
    os.mkdir(os.path.join(inside, "directory"))
    for what, name in names.items():
        set_name(path, name)
        words = [] if b"\0" in name else [name.decode()]
        chains.refused(what, path, words, f"qcow2-data-file=dir:{inside}")
        set_back(path, name)


def set_back(path, name):
    with open(path, "r+b") as file:
        content = file.read(64 * KiB)
        file.seek(content.index(name))
        file.write(b"plain.raw")


def test_no_name(tmp):
    """Without the extension the parameter must tell."""
    layer = make(tmp, "plain")
    with open(layer.path, "r+b") as file:
        content = file.read(64 * KiB)
        at = content.index(struct.pack(">I", 0x44415441))
        file.seek(at)
        file.write(struct.pack(">I", 0x12345678))
    chains.refused("no name", layer.path, ["data file"],
                   f"qcow2-data-file=dir:{tmp}")
    with chains.serve(layer, f"qcow2-data-file=file:{data_file(layer)}") \
         as server:
        handle = server.connect()
        qf.equal("size", handle.get_size(), edit.get(layer.path, "size"))
        handle.pread(MiB, 0)
        handle.shutdown()


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdinfo")
    if os.environ.get("LIBGCRYPT") == "no":
        for name in [n for n in IMAGES if n.startswith("luks")]:
            del IMAGES[name]
    qf.parts(tmp, test_contents, test_policies, test_chains, test_short,
             test_refused, test_no_name)


qf.main(test)
