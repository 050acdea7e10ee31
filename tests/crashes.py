# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Images for programs that simulate crashes, and what these leave."""

import json
import os
import re

import qf

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


def judge_samples(directory):
    """Those that a program has left in the directory go away."""
    for sample in os.listdir(directory):
        if re.match(r"\d+-\d+-", sample):
            judge_sample(directory, sample)
            os.unlink(os.path.join(directory, sample))


def images(tmp):
    """The names of images, which are made, in a directory "samples" too."""
    samples = os.path.join(tmp, "samples")
    os.mkdir(samples)
    for directory in (tmp, samples):
        with open(os.path.join(directory, "base.raw"), "wb") as base:
            base.truncate(1 << 20)
    for name in IMAGES:
        path = make_image(tmp, name)
        os.link(path, os.path.join(samples, name + ".qcow2"))
        yield name
