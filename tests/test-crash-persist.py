#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Crashes of servers that keep bitmaps (see crash/crash-persist.c).

CRASH_SEEDS is the number of runs for each image and way to use it, 1 by
default.  What the crashes leave is judged by our own check; a sample also
by qemu-img's.
"""

import os
import re

import crashes
import qf

SEEDS = int(os.environ.get("CRASH_SEEDS", "1"))
FIRST = int(os.environ.get("CRASH_FIRST", "0"))
OPERATIONS = 20
TRIES = 1
SAMPLE = int(os.environ.get("CRASH_SAMPLE", "100"))

WAYS = [[], ["intent=off"], ["intent=mixed"], ["disks=2"], ["threads=3"]]


def program():
    return os.path.join(os.path.dirname(qf.nbdkit()), "tests",
                        "crash-persist")


def crash(tmp, name, seed, way):
    samples = os.path.join(tmp, "samples")
    args = [program(), os.path.join(tmp, name + ".qcow2"), str(seed),
            str(OPERATIONS), str(TRIES), samples, str(SAMPLE), "lives=2",
            *way]
    print(" ".join(args))
    done = qf.run(args)
    crashes.judge_samples(samples)
    return [int(n) for n in
            re.search(r"(\d+) failures, (\d+) recoveries, (\d+) crashes",
                      done.stdout).groups()]


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    total = [0, 0, 0]
    for number, name in enumerate(crashes.images(tmp)):
        for seed in range(FIRST, FIRST + SEEDS):
            for way in WAYS:
                found = crash(tmp, name, 1000 * number + seed, way)
                total = [a + b for a, b in zip(total, found)]
        print(f"{name}: {total[0]} failures, {total[1]} recoveries, "
              f"{total[2]} crashes so far")


qf.main(test)
