# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""The programs that the benchmark runs, and facts about this machine.

The build system names the programs in the environment; where it does
not (bench.py run by hand) they are looked up in PATH.
"""

import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import time

PROGRAMS = {
    "NBDKIT": "nbdkit",
    "NBDCOPY": "nbdcopy",
    "NBDINFO": "nbdinfo",
    "QEMU_IMG": "qemu-img",
    "QEMU_NBD": "qemu-nbd",
    "QEMU_SD": "qemu-storage-daemon",
    "FIO": "fio",
}


class Unavailable(Exception):
    """Something a case or a contender needs isn't on this machine."""


@functools.lru_cache(maxsize=None)
def program(name):
    """Return the words that run program NAME ("NBDKIT", "FIO" ...)."""
    words = shlex.split(os.environ.get(name, "")) or [PROGRAMS[name]]
    found = shutil.which(words[0])
    if found is None:
        raise Unavailable(f"{words[0]} is not installed")
    return [found] + words[1:]


def run(argv):
    """Run ARGV quietly; if it fails, raise with what it said."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(argv)}\nfailed: {done.stderr}")
    return done.stdout


def measure(argv):
    """Run ARGV: its seconds, CPU seconds, and peak memory in bytes."""
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL,
                                   stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{shlex.join(argv)}\nfailed: {said.read()}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10


def first_line(argv):
    """The first line ARGV prints (for --version), or why there is none."""
    try:
        return run(argv).splitlines()[0]
    except (OSError, RuntimeError, IndexError):
        return f"{argv[0]}: version unknown"


@functools.lru_cache(maxsize=None)
def nbdkit_config(key):
    """One value of nbdkit --dump-config."""
    for line in run(program("NBDKIT") + ["--dump-config"]).splitlines():
        if line.startswith(key + "="):
            return line[len(key) + 1:]
    return ""


def filesystem(path):
    """The type of the file system that PATH lies on."""
    return run(["stat", "-f", "-c", "%T", path]).strip()


def file_field(path, field):
    """The value behind "FIELD:" in a file such as /proc/meminfo."""
    with open(path, encoding="utf-8") as f:
        for line in f:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def machine():
    """One line that says what was measured on."""
    cpu = file_field("/proc/cpuinfo", "model name") or os.uname().machine
    memory = int(file_field("/proc/meminfo", "MemTotal").split()[0]) >> 20
    return (f"{cpu}, {os.cpu_count()} CPUs, {memory} GiB RAM, "
            f"Linux {os.uname().release}")


class Bystanders:
    """How much CPU time other programs took while we measured: where it
    is not next to nothing, the figures are worth little."""

    def __init__(self):
        self.start = self.now()

    @staticmethod
    def now():
        """Seconds of the machine, busy and in all, and of our children."""
        with open("/proc/stat", encoding="utf-8") as f:
            fields = [int(field) for field in f.readline().split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        ours = os.times()
        return ((sum(fields) - idle) / ticks, sum(fields) / ticks,
                sum(ours[:4]))

    def share(self):
        """Since the start, of the time that all CPUs had."""
        busy, total, ours = (b - a for a, b in zip(self.start, self.now()))
        return max(busy - ours, 0) / max(total, 0.01)


def versions():
    """The versions of everything that takes part."""
    return [first_line(program(name) + ["--version"])
            for name in ("NBDKIT", "QEMU_NBD", "NBDCOPY", "FIO")]
