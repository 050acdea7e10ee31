# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""What the clients do, and how the answer is checked.

A workload runs one client against a URI and returns its figure: seconds,
or requests per second.  A check proves before anything is measured that
a contender serves the right thing: a fast wrong answer is worth nothing.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shlex
import subprocess
import time
from typing import Callable

import tools


def timed(argv):
    start = time.perf_counter()
    tools.run(argv)
    return time.perf_counter() - start


def copy(server, _options):
    """Seconds to read the whole disk."""
    return timed(tools.program("NBDCOPY") + [server.uri, "null:"])


def map_all(server, _options):
    """Seconds to ask for all extents of the disk."""
    return timed(tools.program("NBDINFO") + ["--map", server.uri])


@functools.lru_cache(maxsize=None)
def need_fio():
    if "nbd" not in tools.run(tools.program("FIO") + ["--enghelp"]).split():
        raise tools.Unavailable("this fio has no nbd engine")


def fio(pattern, size, depth, server, options):
    """Requests per second over a fixed time."""
    need_fio()
    said = tools.run(tools.program("FIO")
                     + ["--name=bench", "--ioengine=nbd", f"--uri={server.uri}",
                        f"--rw={pattern}", f"--bs={size}", "--numjobs=1",
                        f"--iodepth={depth}", "--randseed=1",
                        "--norandommap", "--time_based",
                        f"--runtime={options.seconds}", "--ramp_time=0.5",
                        "--output-format=json"])
    job = json.loads(said[said.index("{"):])["jobs"][0]
    return job["read"]["iops"] + job["write"]["iops"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a workload's figure means."""
    name: str
    form: str
    lower_is_better: bool

    def show(self, value):
        return self.form.format(value)


SECONDS = Unit("s", "{:.3f} s", True)
RATE = Unit("requests/s", "{:,.0f}/s", False)


def digest_of_file(path):
    with open(path, "rb") as f:
        return digest(f)


def digest(stream):
    total = hashlib.sha256()
    while data := stream.read(1 << 20):
        total.update(data)
    return total.hexdigest()


def check_bytes(server, raw):
    """The whole disk that SERVER serves equals the file RAW."""
    argv = tools.program("NBDCOPY") + [server.uri, "-"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as copying:
        got = digest(copying.stdout)
    if copying.returncode != 0 or got != digest_of_file(raw):
        raise RuntimeError("serves something else than the raw disk holds")


def check_map(server, raw):
    """SERVER reports as data exactly as much as RAW has allocated."""
    said = tools.run(tools.program("NBDINFO")
                     + ["--json", "--map", "--totals", server.uri])
    got = sum(e["size"] for e in json.loads(said) if e["type"] & 1 == 0)
    allocated = os.stat(raw).st_blocks * 512
    if got != allocated:
        raise RuntimeError(f"reports {got} bytes as data, not {allocated}")


@dataclasses.dataclass(frozen=True)
class Workload:
    """RUN (server, options) returns the figure; CHECK (server, raw) raises
    if the server does not serve what the raw disk holds.

    Or, without clients: PROGRAMS, what each contender runs on an image,
    and the figure is how long that takes."""
    run: Callable
    unit: Unit
    check: Callable = check_bytes
    needs_extents: bool = False
    programs: dict = dataclasses.field(default_factory=dict)


def check_ours(path):
    """The server checks the image when the first client comes."""
    client = shlex.join(tools.program("NBDINFO")) + ' --size "$uri"'
    return (tools.program("NBDKIT")
            + ["-r", "-U", "-", "--filter=qcow2", "file", path,
               "qcow2-check=full", "--run", client])


def check_qemu(path):
    return tools.program("QEMU_IMG") + ["check", "-f", "qcow2", path]


CHECK = Workload(None, SECONDS,
                 programs={"ours": check_ours, "qemu-img": check_qemu})
COPY = Workload(copy, SECONDS)
MAP = Workload(map_all, SECONDS, check=check_map, needs_extents=True)
RANDOM_4K = Workload(functools.partial(fio, "randread", "4k", 16), RATE)
SEQUENTIAL_4K = Workload(functools.partial(fio, "read", "4k", 1), RATE)
RANDOM_WRITE = Workload(functools.partial(fio, "randwrite", "4k", 16), RATE)
SEQUENTIAL_WRITE = Workload(functools.partial(fio, "write", "1M", 4), RATE)
