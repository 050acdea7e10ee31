# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""The contenders: programs that serve an image on a Unix socket.

Every measurement starts its own server, so that none inherits another's
caches or memory, and all are started and warmed up in one way.
"""

import contextlib
import dataclasses
import functools
import os
import shlex
import signal
import subprocess
import tempfile
import time
from typing import Callable

import tools
from images import IMAGES, PASSPHRASE

START_SECONDS = 30

# Of nbdkit's, for each connection, instead of 16: as many as make sense where
# the disk is in memory and the machine has few CPUs.
FEW_THREADS = 4


@dataclasses.dataclass
class Server:
    """A running server."""
    uri: str
    pid: int
    qmp: str                     # socket, of those who have it

    def cpu_seconds(self):
        """CPU time of all its threads so far, finished ones included."""
        with open(f"/proc/{self.pid}/stat", encoding="utf-8") as f:
            fields = f.read().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def peak_memory(self):
        """The most memory it ever had resident, in bytes; of a server that
        has ended nobody knows."""
        value = tools.file_field(f"/proc/{self.pid}/status", "VmHWM")
        return int(value.split()[0]) << 10 if value else 0


def qmp_socket(socket):
    return socket + ".qmp"


def nbdkit_argv(words, case, socket, pidfile):
    read_only = [] if case.writable else ["-r"]
    return (tools.program("NBDKIT")
            + ["-f", *read_only, "-U", socket, "-P", pidfile] + words)


def plugin_words(case, path):
    return list(case.plugin) or ["file", path]


def raw_argv(library, case, socket, pidfile):
    raw = library.path(IMAGES[case.image].raw)
    return nbdkit_argv(plugin_words(case, raw), case, socket, pidfile)


def our_argv(library, case, socket, pidfile):
    words = [*(f"--filter={name}" for name in case.filter.split(",")),
             *plugin_words(case, library.path(case.image)),
             *(word.format(directory=library.directory, socket=socket)
               for word in case.parameters)]
    if case.filter != "qcow2":
        words.append(f"qmp={qmp_socket(socket)}")
    return nbdkit_argv(words, case, socket, pidfile)


def few_threads_argv(library, case, socket, pidfile):
    nbdkit, *words = our_argv(library, case, socket, pidfile)
    return [nbdkit, f"--threads={FEW_THREADS}", *words]


def tracking_argv(library, case, socket, pidfile):
    """The same bitmaps, which nobody keeps."""
    words = ["--filter=dirty-tracking",
             *plugin_words(case, library.path(case.image)),
             *(word.replace(",persistent=on", "")
               for word in case.parameters if word.startswith("dirty-"))]
    return nbdkit_argv(words, case, socket, pidfile)


def qcow2dec_argv(library, case, socket, pidfile):
    return nbdkit_argv(["--filter=qcow2dec", "file",
                        library.path(case.image)], case, socket, pidfile)


def storage_daemon_argv(aio, library, case, socket, pidfile):
    """QEMU's, with the image, or a disk of the same size as in the plugin
    that has no content."""
    return (tools.program("QEMU_SD")
            + ["--pidfile", pidfile, "--blockdev",
               daemon_disk(aio, library, case),
               "--nbd-server", f"addr.type=unix,addr.path={socket}",
               "--export", "nbd,id=disk,node-name=disk,name=,writable=on",
               "--chardev", f"socket,id=qmp,path={qmp_socket(socket)},"
               "server=on,wait=off", "--monitor", "chardev=qmp"])


def daemon_disk(aio, library, case):
    if case.plugin:
        return (f"driver=null-co,node-name=disk,size={parse_size(case.plugin[1])},"
                "read-zeroes=on,discard=unmap")
    return (f"driver=raw,node-name=disk,discard=unmap,file.driver=file,"
            f"file.aio={aio},file.discard=unmap,"
            f"file.filename={library.path(case.image)}")


def parse_size(text):
    return int(text[:-1]) << {"G": 30, "T": 40}[text[-1]]


def qemu_argv(aio, library, case, socket, pidfile):
    return (tools.program("QEMU_NBD")
            + ["-r", "-t", "-e", "16", "--cache=writeback", f"--aio={aio}",
               "-k", socket, "--pid-file", pidfile]
            + qemu_image(library.path(case.image), case.encrypted))


def qemu_image(path, encrypted):
    if not encrypted:
        return ["-f", "qcow2", path]
    return ["--object", f"secret,id=s,data={PASSPHRASE}", "--image-opts",
            f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"]


def have_nbdkit_filter(name):
    directory = tools.nbdkit_config("filterdir")
    path = os.path.join(directory, f"nbdkit-{name}-filter.so")
    if not os.path.exists(path):
        raise tools.Unavailable(f"this nbdkit has no {name} filter")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to serve an image.

    VARIANTS maps a name to ARGV (library, case, socket, pidfile).  Where
    there are several, each case uses the one that does best in it.
    NEED raises if this machine doesn't have it; a contender without
    EXTENTS says that all is data, so that its map means nothing."""
    variants: dict
    need: Callable = lambda: None
    extents: bool = True


CONTENDERS = {
    "raw": Contender({"": raw_argv}),
    "ours": Contender({"": our_argv}),
    # Only in the cases that are about snapshots.
    "ours-few": Contender({f"--threads={FEW_THREADS}": few_threads_argv}),
    # Only in the cases that are about keeping bitmaps.
    "tracking": Contender({"": tracking_argv}),
    "qemu-nbd": Contender(
        {f"--aio={aio}": functools.partial(qemu_argv, aio)
         for aio in ("threads", "io_uring")},
        need=lambda: tools.program("QEMU_NBD")),
    "qcow2dec": Contender(
        {"": qcow2dec_argv},
        need=lambda: have_nbdkit_filter("qcow2dec"), extents=False),
    # Only in the cases that are about bitmaps and snapshots.
    "qemu-sd": Contender(
        {f"aio={aio}": functools.partial(storage_daemon_argv, aio)
         for aio in ("threads", "io_uring")},
        need=lambda: tools.program("QEMU_SD")),
    # Only in the cases where it is a program that is measured.
    "qemu-img": Contender({}, need=lambda: tools.program("QEMU_IMG")),
}


def wait_for_pidfile(process, pidfile, errors):
    """The servers write their pid when they are ready to be connected
    to.  It is the server's even if a wrapper script started it."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, ValueError):
            with open(pidfile, encoding="utf-8") as f:
                return int(f.read())
        time.sleep(0.005)
    errors.seek(0)
    raise RuntimeError(f"{shlex.join(process.args)}\n"
                       f"did not start: {errors.read()}")


@contextlib.contextmanager
def serve(argv_for: Callable, library, case):
    """Run the server that ARGV_FOR describes, warm, while in context."""
    with tempfile.TemporaryDirectory() as directory, \
            tempfile.TemporaryFile("w+") as errors:
        socket = os.path.join(directory, "socket")
        pidfile = os.path.join(directory, "pid")
        argv = argv_for(library, case, socket, pidfile)
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL,
                                   stdout=errors, stderr=errors)
        try:
            pid = wait_for_pidfile(process, pidfile, errors)
            uri = f"nbd+unix:///?socket={socket}"
            tools.run(tools.program("NBDINFO") + ["--size", uri])
            yield Server(uri, pid, qmp_socket(socket))
        finally:
            stop(process)


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
