#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The clients that people have, against images served by the filter."""

import contextlib
import json
import os
import sys

import disks
import images
import nbd
import qf
from qf import KiB, MiB

# What the clients get to see.
CASES = ("v2-65536", "v3-4096", "zstd-65536", "extl2-131072",
         "convert-c-zlib-65536", "prealloc-metadata-mix", "size-512",
         "size-0", "size-cluster-plus", "shrunk")


@contextlib.contextmanager
def served(tmp, name):
    """A case's image with its oracle, served."""
    case, = images.select([name])
    path = case.make(tmp)
    oracle = case.oracle(tmp, path)
    with qf.serve_qcow2(tmp, path) as server:
        yield server, oracle, path
    os.unlink(path)


def whole(oracle):
    return oracle.read(0, oracle.size)


def check_file(what, path, oracle):
    with open(path, "rb") as file:
        disks.compare(what, 0, file.read(), whole(oracle))


def test_nbdcopy(tmp):
    qf.need("nbdcopy")
    raw = os.path.join(tmp, "copy.raw")
    for name in cases():
        with served(tmp, name) as (server, oracle, _):
            for options in ([], ["--synchronous"], ["--no-extents"],
                            ["--connections=1", "--requests=1"],
                            ["--request-size=65536", "--sparse=0"]):
                qf.run([qf.tool("nbdcopy"), *options, server.uri(), raw])
                check_file(f"nbdcopy {options} of {name}", raw, oracle)
                os.unlink(raw)


def test_nbdinfo(tmp):
    qf.need("nbdinfo")
    for name, minimum, preferred in (("v3-4096", 1, 4 * KiB),
                                     ("v2-65536", 1, 64 * KiB),
                                     ("v3-512", 1, 512),
                                     ("v3-2097152", 1, 2 * MiB)):
        with served(tmp, name) as (server, oracle, _):
            out = qf.run([qf.tool("nbdinfo"), "--json", server.uri()]).stdout
            info = json.loads(out)["exports"][0]
            for key, value in (("export-size", oracle.size),
                               ("is_read_only", True),
                               ("can_cache", True),
                               ("can_multi_conn", True),
                               ("can_zero", False), ("can_trim", False),
                               ("block_size_minimum", minimum),
                               ("block_size_preferred", preferred)):
                qf.equal(f"{name}: {key}", info.get(key), value)


def test_nbdsh(tmp):
    qf.need("nbdsh")
    with served(tmp, "v3-4096") as (server, oracle, _):
        at = 12345
        program = f"print(h.get_size(), h.pread(16, {at}).hex())"
        # It runs the first python3 in the path, which must have libnbd.
        path = os.path.dirname(sys.executable) + ":" + os.environ["PATH"]
        out = qf.run([qf.tool("nbdsh"), "-u", server.uri(), "-c", program],
                     env={**os.environ, "PATH": path}).stdout
        qf.equal("nbdsh", out.split(),
                 [str(oracle.size), bytes(oracle.read(at, 16)).hex()])


def test_qemu_img(tmp):
    """convert to raw and to qcow2, compare, map, info."""
    raw = os.path.join(tmp, "convert.raw")
    again = os.path.join(tmp, "again.qcow2")
    for name in cases():
        with served(tmp, name) as (server, oracle, path):
            qf.qemu_img("convert", "-f", "raw", "-O", "raw", server.uri(),
                        raw)
            check_file(f"qemu-img convert of {name}", raw, oracle)
            if oracle.size:
                qf.qemu_img("convert", "-W", "-m", "8", "-f", "raw", "-O",
                            "qcow2", server.uri(), again)
                qf.qemu_img("compare", "-f", "qcow2", "-F", "raw", again,
                            server.uri())
                os.unlink(again)
            qf.qemu_img("compare", "-f", "qcow2", "-F", "raw", path,
                        server.uri())
            info = json.loads(qf.qemu_img("info", "--output=json",
                                          server.uri()))
            qf.equal(f"qemu-img info of {name}: size",
                     info["virtual-size"], oracle.size)
            disks.with_expected_map(path, lambda expected: qf.equal(
                f"qemu-img map of {name}: zeroes",
                zeroes(disks.expected_map(server.uri(), "raw")),
                zeroes(expected)))


def zeroes(extents):
    """Which ranges read as zeroes."""
    return disks.merged((start, length, kind & disks.ZERO)
                        for start, length, kind in extents)


def test_qemu_io(tmp):
    """Reads through QEMU's block layer, compared by its own pattern."""
    path = os.path.join(tmp, "pattern.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qf.qemu_io(path, ["write -P 0x5a 64k 1M", "write -z 512k 64k",
                      "write -c -P 0xa5 2M 128k"])
    with qf.serve_qcow2(tmp, path) as server:
        for command in ("read -P 0x5a 64k 448k", "read -P 0 512k 64k",
                        "read -P 0x5a 576k 512k", "read -P 0xa5 2M 128k",
                        "read -P 0 0 64k", "read -P 0xa5 2098177 777",
                        "read -P 0 4194303 1",
                        "aio_read -P 0x5a 100k 100k\naio_flush"):
            out = qf.run([qf.tool("qemu-io"), "-r", "-f", "raw",
                          server.uri()], input=command + "\n", stdin=None)
            qf.check("verification failed" not in out.stdout + out.stderr,
                     f"qemu-io {command}: {out.stdout}")


def test_fio(tmp):
    """fio writes its checksums into a raw disk; they are verified through
    the filter after qemu-img made an image of it."""
    qf.need("fio")
    raw = os.path.join(tmp, "fio.raw")
    path = os.path.join(tmp, "fio.qcow2")
    with open(raw, "wb") as file:
        file.truncate(8 * MiB)
    job = ["--name=verify", "--bs=4k", "--size=8M", "--verify=crc32c",
           "--verify_fatal=1", "--randseed=1", "--thread"]
    qf.run([qf.tool("fio"), *job, "--rw=write", "--ioengine=psync",
            "--do_verify=0", f"--filename={raw}"], cwd=tmp)
    for options in ((), ("-c",), ("-c", "-o", "compression_type=zstd"),
                    ("-o", "extended_l2=on")):
        if "compression_type=zstd" in options \
                and os.environ.get("LIBZSTD") == "no":
            continue
        qf.qemu_img("convert", *options, "-f", "raw", "-O", "qcow2", raw,
                    path)
        with qf.serve_qcow2(tmp, path) as server:
            done = qf.run([qf.tool("fio"), *job, "--rw=read",
                           "--ioengine=nbd", "--iodepth=16",
                           f"--uri={server.uri()}", "--output-format=json"],
                          cwd=tmp, ok=None)
            if "engine nbd" in done.stderr and "not" in done.stderr:
                print("fio has no nbd engine")
                return
            qf.equal(f"fio's exit status ({done.stdout}{done.stderr})",
                     done.returncode, 0)
            result = json.loads(done.stdout[done.stdout.index("{"):])
            job_result = result["jobs"][0]
            qf.equal("fio: bytes read", job_result["read"]["io_bytes"],
                     8 * MiB)
            qf.equal("fio: errors", job_result["error"], 0)


def test_multi_conn(tmp):
    """16 connections at once read the same as one."""
    with served(tmp, "v3-65536") as (server, oracle, _):
        handle = server.connect()
        qf.equal("can_multi_conn", handle.can_multi_conn(), True)
        handle.shutdown()
        disks.verify_disk(server, "16 connections", oracle, reads=2000,
                       connections=16)


def test_cache(tmp):
    """NBD's cache command over any range, then reads."""
    for name in ("v3-4096", "extl2-131072", "convert-c-zlib-65536",
                 "size-512"):
        with served(tmp, name) as (server, oracle, _):
            handle = server.connect()
            qf.equal(f"{name}: can_cache", handle.can_cache(), True)
            for offset, length in ((0, oracle.size), (0, 1),
                                   (oracle.size - 1, 1),
                                   (oracle.size // 3, oracle.size // 2)):
                handle.cache(length, offset)
                disks.compare(f"{name} after cache", offset,
                           handle.pread(length, offset),
                           oracle.read(offset, length))
            handle.shutdown()


def test_read_only(tmp):
    """Nothing writes, whatever the client tries."""
    with served(tmp, "v3-4096") as (server, _, path):
        with open(path, "rb") as file:
            before = file.read()
        handle = server.connect()
        qf.equal("is_read_only", handle.is_read_only(), True)
        # Let libnbd send what it knows to be in vain.
        handle.set_strict_mode(0)
        for what, call in (
                ("pwrite", lambda: handle.pwrite(b"x" * 512, 0)),
                ("zero", lambda: handle.zero(512, 0)),
                ("trim", lambda: handle.trim(512, 0))):
            try:
                call()
            except nbd.Error:
                continue
            raise qf.Fail(f"{what} on a read-only export did not fail")
        handle.shutdown()
        with open(path, "rb") as file:
            qf.check(file.read() == before, "the image was changed")


def test_writable_server(tmp):
    """Without -r, and with the file opened for writing: still read-only."""
    case, = images.select(["v3-4096"])
    path = case.make(tmp)
    with qf.serve(tmp, "--filter=qcow2", "file", path) as server:
        handle = server.connect()
        qf.equal("is_read_only", handle.is_read_only(), True)
        handle.shutdown()
        disks.verify_disk(server, "without -r", case.oracle(tmp, path))


def test_simple_replies(tmp):
    """Clients that know neither structured replies nor block status."""
    with served(tmp, "v3-65536") as (server, oracle, _):
        handle = server.connect(structured=False)
        for offset, length in disks.whole_disk(oracle.size):
            disks.compare("simple replies", offset,
                       handle.pread(length, offset),
                       oracle.read(offset, length))
        handle.shutdown()


def test_out_of_range(tmp):
    """Requests beyond the end fail and leave the connection usable."""
    with served(tmp, "size-cluster-plus") as (server, oracle, _):
        handle = server.connect()
        handle.set_strict_mode(0)
        for offset, length in ((oracle.size, 1), (oracle.size - 1, 2),
                               (2 ** 62, 512)):
            try:
                handle.pread(length, offset)
            except nbd.Error:
                continue
            raise qf.Fail(f"{length} bytes at {offset} could be read")
        disks.compare("after errors", 0, handle.pread(oracle.size, 0),
                   whole(oracle))
        handle.shutdown()


def cases():
    return [case.name for case in images.select(CASES)]


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    qf.parts(tmp, test_nbdcopy, test_nbdinfo, test_nbdsh, test_qemu_img,
             test_qemu_io, test_fio, test_multi_conn, test_cache,
             test_read_only, test_writable_server, test_simple_replies,
             test_out_of_range)


qf.main(test)
