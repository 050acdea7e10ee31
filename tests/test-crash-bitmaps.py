#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Crashes while bitmaps in images are changed (see crash/crash-bitmaps.c).

CRASH_SEEDS is the number of runs for each image, 1 by default.  What the
crashes leave is judged by our own check; a sample also by qemu-img's.
"""

import json
import os
import re

import qf

SEEDS = int(os.environ.get("CRASH_SEEDS", "1"))
OPERATIONS = 40
TRIES = 4
SAMPLE = 60                      # one image of that many

# Options of qemu-img create, size, and what is done to the image then.  The
# containers of "full" and "larger" are nearly as large as the refcount
# table allows, so that it has to grow.
IMAGES = {
    "plain": ("", "64M", []),
    "full": ("cluster_size=512,refcount_bits=64", "8M",
             [("qemu-io", "write -q 0 1940k")]),
    "larger": ("cluster_size=512,refcount_bits=64", "512M",
               [("qemu-io", "write -q 0 1850k")]),
    "bits": ("cluster_size=512,refcount_bits=1", "16M",
             [("qemu-io", "write -q 100k 100k")]),
    "snapshot": ("cluster_size=4k,refcount_bits=8", "64M",
                 [("qemu-io", "write -q 100k 100k"),
                  ("qemu-img", "snapshot", "-c", "s"),
                  ("qemu-io", "write -q 150k 100k")]),
    "qemu": ("cluster_size=1k,refcount_bits=2", "32M",
             [("qemu-img", "bitmap", "--add", "a"),
              ("qemu-img", "bitmap", "--add", "-g", "4096", "z"),
              ("qemu-io", "write -q 0 1M")]),
    "large-clusters": ("cluster_size=2M", "1G", []),
    "extended": ("cluster_size=16k,extended_l2=on,lazy_refcounts=on", "33M",
                 []),
    "overlay": ("cluster_size=4k,backing_file=plain.qcow2,backing_fmt=qcow2",
                "64M", [("qemu-io", "write -q 1M 30k")]),
    "long-name": ("cluster_size=512,backing_fmt=raw,backing_file="
                  + "./" * 9 + "base.raw", "1M", []),
}


def make_image(tmp, name):
    options, size, steps = IMAGES[name]
    path = os.path.join(tmp, name + ".qcow2")
    args = ["-o", options] if options else []
    qf.run([qf.tool("qemu-img"), "create", "-q", "-f", "qcow2", *args, path,
            size], cwd=tmp)
    for program, *words in steps:
        if program == "qemu-io":
            qf.run([qf.tool("qemu-io"), "-c", *words, path], cwd=tmp)
        elif words[0] == "bitmap":
            qf.run([qf.tool("qemu-img"), *words[:-1], path, words[-1]],
                   cwd=tmp)
        else:
            qf.run([qf.tool("qemu-img"), *words, path], cwd=tmp)
    return path


def judge_sample(directory, name):
    """qemu-img finds what we have found, which is in the file's name."""
    corruptions, leaks = map(int, name.split("-")[:2])
    done = qf.run([qf.tool("qemu-img"), "check", "--output=json", name],
                  cwd=directory, ok=None)
    found = json.loads(done.stdout)
    qf.equal(name, [found.get("corruptions", 0), found.get("leaks", 0),
                    found.get("check-errors", 0)], [corruptions, leaks, 0])


def program():
    return os.path.join(os.path.dirname(qf.nbdkit()), "tests",
                        "crash-bitmaps")


def crash(tmp, name, seed):
    samples = os.path.join(tmp, "samples")
    done = qf.run([program(), os.path.join(tmp, name + ".qcow2"), str(seed),
                   str(OPERATIONS), str(TRIES), samples, str(SAMPLE)])
    for sample in os.listdir(samples):
        if re.match(r"\d+-\d+-", sample):
            judge_sample(samples, sample)
            os.unlink(os.path.join(samples, sample))
    return int(re.search(r"(\d+) crashes", done.stdout).group(1))


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    samples = os.path.join(tmp, "samples")
    os.mkdir(samples)
    for directory in (tmp, samples):
        with open(os.path.join(directory, "base.raw"), "wb") as base:
            base.truncate(1 << 20)
    crashes = 0
    for name in IMAGES:
        path = make_image(tmp, name)
        os.link(path, os.path.join(samples, name + ".qcow2"))
        for seed in range(SEEDS):
            crashes += crash(tmp, name, seed)
        print(f"{name}: {crashes} crashes so far")


qf.main(test)
