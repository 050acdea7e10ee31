#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Every kind of image: the whole disk and random reads of it equal QEMU's.

Usage: test-matrix.py [CASE...]; without names, all of images.CASES.
"""

import os
import sys

import disks
import images
import qf

RANDOM_READS = 2000


def test_case(tmp, case):
    path = case.make(tmp)
    oracle = case.oracle(tmp, path)
    with qf.serve_qcow2(tmp, path) as server:
        reads = disks.verify_disk(server, case.name, oracle,
                               reads=RANDOM_READS, seed=case.name)
    qf.equal(f"{case.name}: random reads", reads,
             RANDOM_READS if oracle.size else 0)
    os.unlink(path)
    return reads


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    cases = images.select(sys.argv[1:])
    reads = qf.each(cases, lambda case: test_case(tmp, case))
    print(f"{len(cases)} images, {sum(reads)} random reads")


qf.main(test)
