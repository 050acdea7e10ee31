# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""Operations on bitmaps of a huge disk, with ours and with QEMU's.

The blocks are marked by writing zeroes, which cost neither server storage.
"""

import json
import random
import socket
import time

import tools
from workloads import SECONDS, Workload, timed

BLOCK = 64 << 10
BLOCKS = (1 << 30) // BLOCK


class Control:
    """As much of a QMP client as is needed."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.lines = self.socket.makefile()
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.socket.sendall(json.dumps(
            {"execute": command, "arguments": arguments}).encode())
        while "event" in (reply := json.loads(self.lines.readline())):
            pass
        if "return" not in reply:
            raise RuntimeError(f"{command}: {reply}")
        return reply["return"]


def bitmaps(control):
    return control("query-named-block-nodes")[0].get("dirty-bitmaps", [])


def connect(server):
    """A control connection to a server with bitmaps b0, which has its
    blocks, and b1, which is empty."""
    import nbd                  # of which not each Python knows
    control = Control(server.qmp)
    if not bitmaps(control):    # QEMU's has no such option
        control("block-dirty-bitmap-add", node="disk", name="b0",
                granularity=BLOCK)
        control("block-dirty-bitmap-add", node="disk", name="b1",
                granularity=BLOCK, disabled=True)
    handle = nbd.NBD()
    handle.connect_uri(server.uri)
    rng = random.Random(1)
    for block in rng.sample(range(handle.get_size() // BLOCK), BLOCKS):
        handle.zero(BLOCK, block * BLOCK)
    handle.shutdown()
    counts = {b["name"]: b["count"] for b in bitmaps(control)}
    if counts != {"b0": BLOCKS * BLOCK, "b1": 0}:
        raise RuntimeError(f"the bitmaps hold {counts}")
    return control


def timed_call(function, *args, **kwargs):
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def count(server, _options):
    return timed_call(bitmaps, connect(server))


def merge(server, _options):
    return timed_call(connect(server), "block-dirty-bitmap-merge",
                      node="disk", target="b1", bitmaps=["b0"])


def map_bitmap(server, _options):
    """As each server shows it: ours as an export, QEMU's as a context."""
    control = connect(server)
    uri = server.uri.replace("///", "///dirty/b0")
    context = "base:allocation"
    if "nbdkit" not in control("query-version")["package"]:
        control("block-export-add", type="nbd", id="b0", name="b0",
                bitmaps=["b0"], writable=True, **{"node-name": "disk"})
        uri = server.uri.replace("///", "///b0")
        context = "qemu:dirty-bitmap:b0"
    return timed(tools.program("NBDINFO") + [f"--map={context}", uri])


BITMAP_COUNT = Workload(count, SECONDS)
BITMAP_MERGE = Workload(merge, SECONDS)
BITMAP_MAP = Workload(map_bitmap, SECONDS)
