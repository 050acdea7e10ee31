# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The figures of a consistency check: ours, and those of qemu-img check."""

import json
import os

import qf

# qemu-img leaves out members that are 0.
FIGURES = ("corruptions", "leaks", "check-errors", "total-clusters",
           "allocated-clusters", "fragmented-clusters",
           "compressed-clusters", "image-end-offset")


def figures(text):
    found = json.loads(text)
    return {name: found.get(name, 0) for name in FIGURES}


def ours(path):
    """Our figures, or None; and what was found."""
    program = os.path.join(os.path.dirname(qf.nbdkit()), "tests",
                           "qcow2-check")
    done = qf.run([program, path], ok=None)
    qf.check(done.returncode in (0, 1),
             f"{path}: status {done.returncode}: {done.stderr}")
    return figures(done.stdout) if done.returncode == 0 else None, \
        done.stderr


def theirs(path):
    """QEMU's figures, or None if it has none; and what it says."""
    done = qf.run([qf.tool("qemu-img"), "check", "-f", "qcow2",
                   "--output=json", path], ok=None)
    return figures(done.stdout) if done.stdout.startswith("{") else None, \
        done.stderr
