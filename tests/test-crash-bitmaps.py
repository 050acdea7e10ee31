#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Crashes while bitmaps in images are changed (see crash/crash-bitmaps.c).

CRASH_SEEDS is the number of runs for each image, 1 by default.  What the
crashes leave is judged by our own check; a sample also by qemu-img's.
"""

import os
import re

import crashes
import qf

SEEDS = int(os.environ.get("CRASH_SEEDS", "1"))
OPERATIONS = 40
TRIES = 4
SAMPLE = 60                      # one image of that many


def program():
    return os.path.join(os.path.dirname(qf.nbdkit()), "tests",
                        "crash-bitmaps")


def crash(tmp, name, seed):
    samples = os.path.join(tmp, "samples")
    done = qf.run([program(), os.path.join(tmp, name + ".qcow2"), str(seed),
                   str(OPERATIONS), str(TRIES), samples, str(SAMPLE)])
    crashes.judge_samples(samples)
    return int(re.search(r"(\d+) crashes", done.stdout).group(1))


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    total = 0
    for name in crashes.images(tmp):
        for seed in range(SEEDS):
            total += crash(tmp, name, seed)
        print(f"{name}: {total} crashes so far")


qf.main(test)
