#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The map of every kind of image equals qemu-img's, is coarse and cheap.

Usage: test-map.py [CASE...]; without names, all of images.CASES.
"""

import os
import random
import re
import sys

import disks
import images
import qf
from qf import GiB, TiB

LARGEST_REQUEST = 4 * GiB - 64 * 1024
RANDOM_REQUESTS = 100


def block_status(handle, offset, length):
    """The extents of one reply as (start, length, type)."""
    found = []

    def collect(context, at, entries, error):
        for i in range(0, len(entries), 2):
            found.append((at, entries[i], entries[i + 1]))
            at += entries[i]

    handle.block_status(length, offset, collect)
    return found


def test_coarseness(what, handle):
    """Entries of one type adjoin only where a request ended."""
    size = handle.get_size()
    offset = 0
    last = None
    while offset < size:
        length = min(LARGEST_REQUEST, size - offset)
        for start, count, kind in block_status(handle, offset, length):
            qf.check(kind != last, f"{what}: the extents of type {kind} "
                     f"before and after {start} are not merged")
            last = kind
            end = start + count
        if end >= offset + length:
            last = None
        offset = end


def clip(extents, offset, length):
    """The part of the extents in a range."""
    clipped = []
    for start, count, kind in extents:
        low, high = max(start, offset), min(start + count, offset + length)
        if low < high:
            clipped.append((low, high - low, kind))
    return clipped


def test_random_requests(what, handle, expected):
    """Any range may be asked for; what is answered must be right."""
    size = handle.get_size()
    rng = random.Random(what)
    for _ in range(RANDOM_REQUESTS if size else 0):
        length = min(int(2 ** (32 * rng.random())), size)
        offset = rng.randrange(size - length + 1)
        answer = block_status(handle, offset, length)
        qf.equal(f"{what}: start of the answer at {offset}",
                 answer[0][0], offset)
        # The last extent may reach further than was asked.
        covered = min(sum(answer[-1][:2]) - offset, length)
        disks.compare_maps(f"{what}: {length} bytes at {offset}",
                        disks.merged(clip(answer, offset, covered)),
                        clip(expected, offset, covered))


def test_server(server, what, expected):
    disks.compare_maps(what, disks.merged(disks.nbd_map(server.uri())),
                       expected)
    handle = server.connect()
    test_coarseness(what, handle)
    test_random_requests(what, handle, expected)
    handle.shutdown()
    return len(expected)


def test_file(tmp, path, what):
    with qf.serve_qcow2(tmp, path) as server:
        return disks.with_expected_map(
            path, lambda expected: test_server(server, what, expected))


def test_case(tmp, case):
    path = case.make(tmp)
    count = test_file(tmp, path, case.name)
    if "preallocation" in case.options:
        # Once more with holes in the file wherever there are zeroes.
        copy = path + ".sparse"
        qf.run(["cp", "--sparse=always", path, copy])
        count += test_file(tmp, copy, f"{case.name} with holes")
        os.unlink(copy)
    os.unlink(path)
    return count


def test_io(tmp):
    """What no L2 table describes costs no I/O."""
    builder = images.Builder(tmp, "sparse", 16 * TiB, "")
    builder.create()
    tables = 24
    for i in range(tables):
        # Each in an L2 table of its own, which reaches over 512 MiB.
        builder.write(i * 600 * GiB, 300 * 1024)
    builder.run()
    logfile = os.path.join(tmp, "io.log")
    with qf.serve(tmp, "-r", "--filter=qcow2", "--filter=log", "file",
                  builder.path, f"logfile={logfile}") as server:
        handle = server.connect()
        opened = os.path.getsize(logfile)
        disks.compare_maps("sparse", disks.merged(disks.nbd_map(server.uri())),
                        disks.expected_map(builder.path))
        handle.shutdown()
    with open(logfile) as log:
        log.seek(opened)
        reads = [int(count, 16) for count in
                 re.findall(r" Read .*count=(0x[0-9a-f]+)", log.read())]
    # The L1 table and each L2 table, in whatever pieces, and some room for
    # what each connection may look at again.
    limit = 16 * TiB // 2 ** 29 * 8 + (tables + 8) * builder.cluster
    print(f"16 TiB with {tables} L2 tables: {len(reads)} reads, "
          f"{sum(reads)} bytes")
    qf.check(len(reads) <= 16 * tables + 64, f"{len(reads)} reads for a map")
    qf.check(sum(reads) <= limit, f"{sum(reads)} bytes read for a map")


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdinfo")
    cases = images.select(sys.argv[1:])
    extents = qf.each(cases, lambda case: test_case(tmp, case))
    print(f"{len(cases)} images, {sum(extents)} extents")
    if not sys.argv[1:]:
        test_io(tmp)


qf.main(test)
