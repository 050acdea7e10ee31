#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Many readers at once, and caches that are much too small for them.

Meant for ThreadSanitizer above all.  All contents are compared.

Usage: test-stress.py [SECONDS for each image]
"""

import os
import random
import sys
import time

import disks
import images
import nbd
import qf
from qf import KiB, MiB

CONNECTIONS = 8
DEPTH = 16

CASES = (
    images.Case("plain-512", 2 * MiB, "cluster_size=512",
                images.fill_plain_mix),
    images.Case("mixed-4k", 8 * MiB, "cluster_size=4k"),
    images.Case("compressed-64k", 8 * MiB, "", images.fill_compressed),
    images.Case("extended-l2", 8 * MiB, "extended_l2=on"),
    images.Case("large-clusters", 24 * MiB, "cluster_size=2M"),
    images.Case("snapshots", 4 * MiB, "cluster_size=1k",
                images.fill_snapshots),
)


class Mixture:
    """Reads for disks.Reader, with commands of other kinds strewn in."""

    def __init__(self, reader, oracle, seconds, rng):
        self.reader = reader
        self.oracle = oracle
        self.end = time.monotonic() + seconds
        self.rng = rng
        self.others = 0
        self.unanswered = {handle: set() for handle in reader.handles}

    def requests(self):
        while time.monotonic() < self.end:
            yield from disks.random_requests(self.rng, 50, self.oracle,
                                             256 * KiB)
            for handle in self.reader.handles:
                self.other_command(handle)

    def other_command(self, handle):
        """block_status or cache on a connection that has reads in flight."""
        # Answers of earlier ones are fetched first.
        self.unanswered[handle] -= {
            cookie for cookie in self.unanswered[handle]
            if handle.aio_command_completed(cookie)}
        offset = self.rng.randrange(self.oracle.size)
        length = self.rng.randrange(1, self.oracle.size - offset + 1)
        if self.rng.random() < 0.5:
            cookie = handle.aio_cache(length, offset)
        else:
            cookie = handle.aio_block_status(length, offset,
                                             lambda *_: 0)
        self.unanswered[handle].add(cookie)
        self.others += 1

    def finish(self):
        for handle, cookies in self.unanswered.items():
            while handle.aio_in_flight():
                handle.poll(-1)
            for cookie in cookies:
                # This raises an error if there was one.
                handle.aio_command_completed(cookie)


def test_case(tmp, case, seconds):
    path = case.make(tmp)
    oracle = case.oracle(tmp, path)
    with qf.serve_qcow2(tmp, path, "qcow2-cache-size=256K") as server:
        reader = disks.Reader(server, "", CONNECTIONS, DEPTH)
        mixture = Mixture(reader, oracle, seconds, random.Random(case.name))
        reads = reader.verify(case.name, mixture.requests(), oracle)
        mixture.finish()
        disks.with_expected_map(path, lambda expected: disks.compare_maps(
            case.name, disks.merged(disks.nbd_map(server.uri())), expected))
        reader.close()
    os.unlink(path)
    print(f"{case.name}: {reads} reads, {mixture.others} other commands",
          flush=True)


def test_first_requests(tmp):
    """All connections ask for the same thing at the very start."""
    case, = images.select(["convert-c-zlib-65536"])
    path = case.make(tmp)
    oracle = case.oracle(tmp, path)
    for _ in range(10):
        with qf.serve_qcow2(tmp, path) as server:
            reader = disks.Reader(server, "", CONNECTIONS, 2)
            reader.verify("first requests",
                          [(0, 64 * KiB)] * (2 * CONNECTIONS), oracle)
            reader.close()


def test_disconnects(tmp):
    """Clients that leave with requests in flight.

    They say so, because nbdkit 1.32 can crash by itself otherwise
    ("raw_send_socket: Assertion `sock >= 0'").
    """
    case, = images.select(["v3-4096"])
    path = case.make(tmp)
    oracle = case.oracle(tmp, path)
    buffer = bytearray(MiB)
    with qf.serve_qcow2(tmp, path, "qcow2-cache-size=256K") as server:
        for _ in range(50):
            handle = server.connect()
            for i in range(4):
                handle.aio_pread(nbd.Buffer.from_buffer(buffer), i * MiB)
            handle.shutdown()
        disks.verify_disk(server, "after disconnects", oracle, reads=100)


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdinfo")
    seconds = float(sys.argv[1]) if sys.argv[1:] else 1.5
    for case in CASES:
        test_case(tmp, case, seconds)
    test_first_requests(tmp)
    test_disconnects(tmp)


qf.main(test)
