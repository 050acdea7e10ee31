# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""Guests that write, and backups that read, while there is a snapshot:
with ours, and with qemu-storage-daemon's copy-before-write.

Both keep the old data in a file of their own in the same directory.
"""

import contextlib
import functools
import json
import os
import subprocess
import tempfile
import time

import tools
from bitmaps import Control
from workloads import RATE, SECONDS, Unit, Workload, need_fio, timed

CLUSTER = 64 << 10
DEPTH = 16

# Requests to cold clusters, as a share of the disk's clusters: the disk
# must not get warm while it is measured.
COLD_SHARE = 0.25

# What the guest wants to write while the view is read, each second.  Who
# cannot do all of it has less to copy.
GUEST_RATE = 8000

MICROSECONDS = Unit("us", "{:,.0f} us", True)


def export_uri(server, name):
    return server.uri.replace("///", f"///{name}")


def begin_ours(control, target):
    control("cbw-snapshot-create", node="disk", name="s", target=target)
    return "", "snapshot/s"


def begin_qemu(control, target):
    control("block-export-del", id="disk")
    control("blockdev-add", driver="raw", **{"node-name": "target"},
            file={"driver": "file", "filename": target})
    control("blockdev-add", driver="copy-before-write", file="disk",
            target="target", **{"node-name": "cbw"})
    control("blockdev-add", driver="snapshot-access", file="cbw",
            **{"node-name": "access"})
    for node, name, writable in (("cbw", "guest", True),
                                 ("access", "view", False)):
        control("block-export-add", type="nbd", id=name, name=name,
                writable=writable, **{"node-name": node})
    return "guest", "view"


@contextlib.contextmanager
def snapshot(server):
    """URIs of the guest's disk and of the view, and the file with the old
    data; where there is no QMP there is no snapshot."""
    if not os.path.exists(server.qmp):
        yield server.uri, None, None
        return
    control = Control(server.qmp)
    ours = "nbdkit" in control("query-version")["package"]
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.NamedTemporaryFile(dir=where) as target:
        target.truncate(int(tools.run(tools.program("NBDINFO")
                                      + ["--size", server.uri])))
        begin = begin_ours if ours else begin_qemu
        guest, view = begin(control, target.name)
        yield export_uri(server, guest), export_uri(server, view), target
        if ours:
            control("cbw-snapshot-delete", node="disk", name="s")


def fio_words(uri, pattern, size, *more):
    need_fio()
    return tools.program("FIO") + [
        "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}",
        f"--bs={size}", "--numjobs=1", f"--iodepth={DEPTH}", "--randseed=1",
        "--norandommap", "--output-format=json", *more]


def fio(*args):
    """The job's figures about writes."""
    said = tools.run(fio_words(*args))
    return json.loads(said[said.index("{"):])["jobs"][0]["write"]


def disk_size(server):
    return int(tools.run(tools.program("NBDINFO") + ["--size", server.uri]))


def cold(size, figure, server, _options):
    number = int(disk_size(server) // CLUSTER * COLD_SHARE)
    with snapshot(server) as (guest, *_):
        return figure(fio(guest, "randwrite", size, f"--number_ios={number}",
                          f"--blockalign={CLUSTER}"))


def rate(write):
    return write["iops"]


def p99(write):
    return write["clat_ns"]["percentile"]["99.000000"] / 1000


def warm(server, options):
    """All clusters have been copied already."""
    with snapshot(server) as (guest, *_):
        fio(guest, "write", "1M")
        return rate(fio(guest, "randwrite", "4k", "--time_based",
                        f"--runtime={options.seconds}"))


def idle(server, options):
    """There is no snapshot."""
    return rate(fio(server.uri, "randwrite", "4k", "--time_based",
                    f"--runtime={options.seconds}", "--ramp_time=0.5"))


def wait_for_guest(writing, target):
    """Until the first old data has been copied."""
    while os.fstat(target.fileno()).st_blocks == 0:
        if writing.poll() is not None:
            raise RuntimeError("fio does not write")
        time.sleep(0.001)


def read(server, _options):
    """Seconds for the whole view, while the guest writes."""
    with snapshot(server) as (guest, view, target):
        words = fio_words(guest, "randwrite", "4k", "--time_based",
                          "--runtime=1000", f"--rate_iops={GUEST_RATE}")
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as writing:
            try:
                wait_for_guest(writing, target)
                return timed(tools.program("NBDCOPY") + [view, "null:"])
            finally:
                writing.terminate()


COLD_4K = Workload(functools.partial(cold, "4k", rate), RATE)
COLD_64K = Workload(functools.partial(cold, "64k", rate), RATE)
COLD_P99 = Workload(functools.partial(cold, "4k", p99), MICROSECONDS)
WARM = Workload(warm, RATE)
IDLE = Workload(idle, RATE)
READ = Workload(read, SECONDS)
