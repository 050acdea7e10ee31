#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""One image over all kinds of plugins and filters: the same disk each time.

The filter needs nothing but reads and a size from the layer below.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time

import disks
import httprange
import images
import nbd
import qf
from qf import KiB, MiB

# Filters that change nothing which matters, but much about how the layer
# below can be used.
TRANSPARENT_FILTERS = (
    "cache", "cacheextents", "cow", "fua", "log", "multi-conn", "nocache",
    "noextents", "nofilter", "noparallel", "nozero", "readahead", "retry",
    "retry-request", "stats")


class Image:
    """The image of all these tests, with its oracle and a snapshot's."""

    def __init__(self, tmp, name="image", size=3 * MiB,
                 options="cluster_size=16k"):
        b = images.Builder(tmp, name, size, options)
        b.create()
        b.mix(rounds=12)
        qf.qemu_img("snapshot", "-c", "snap", b.path)
        b.mix(rounds=24)
        self.path = b.path
        self.file_size = os.path.getsize(b.path)
        self.oracle = disks.oracle_of(tmp, b.path)
        self.snapshot = disks.oracle_of(tmp, b.path, "snapshot.name=snap")
        # QEMU asks the file which parts of data clusters are holes.
        self.holes = [(e["start"], e["length"])
                      for e in disks.qemu_map(b.path)
                      if e["zero"] and e["data"]]
        self.map = disks.as_data(disks.expected_map(b.path), self.holes)

    def verify(self, server, what, reads=200, export="", connections=4):
        disks.verify_disk(server, what, self.oracle, export, reads=reads,
                          connections=connections)

    def verify_map(self, server, what, export=""):
        """As QEMU says, but holes in the file may be data as well: many
        layers cannot tell."""
        actual = disks.merged(disks.nbd_map(server.uri(export)))
        disks.compare_maps(what, disks.as_data(actual, self.holes), self.map)


def over(tmp, image, *below, what=None, reads=200, connections=4,
         **environment):
    """Serve by the filter over these arguments, and verify."""
    what = what or " ".join(below)
    with qf.serve(tmp, "-r", "--filter=qcow2", *below,
                  env=environment or None) as server:
        image.verify(server, what, reads, connections=connections)
        image.verify(server, f"{what}, again", 0, connections=1)
        image.verify_map(server, what)
        disks.verify_disk(server, f"{what}, snapshot", image.snapshot,
                          "@snap", reads=20)


def test_file(tmp):
    image = Image(tmp)
    over(tmp, image, "file", image.path)
    over(tmp, image, "file", f"file={image.path}", "cache=none")
    # A relative path is meant from where the server was started.
    where = os.getcwd()
    os.chdir(os.path.dirname(image.path))
    try:
        over(tmp, image, "file", os.path.basename(image.path))
    finally:
        os.chdir(where)


def test_nbd_and_memory(tmp):
    qf.need("nbdcopy")
    qf.need_plugins("nbd", "memory")
    image = Image(tmp)
    with qf.serve(tmp, "-r", "file", image.path) as lower:
        over(tmp, image, "nbd", f"socket={lower.sock}", what="nbd over file")
    with qf.serve(tmp, "memory", str(image.file_size)) as lower:
        qf.run([qf.tool("nbdcopy"), image.path, lower.uri()])
        over(tmp, image, "nbd", f"socket={lower.sock}", "shared=true",
             what="nbd over memory")


def test_data(tmp):
    qf.need_plugins("data")
    image = Image(tmp)
    over(tmp, image, "data", f" <{image.path} ", what="data")


def test_split(tmp):
    qf.need_plugins("split")
    image = Image(tmp)
    with open(image.path, "rb") as file:
        content = file.read()
    cuts = [0, 70001, image.file_size // 2, image.file_size]
    parts = []
    for i, (low, high) in enumerate(zip(cuts, cuts[1:])):
        parts.append(os.path.join(tmp, f"part{i}"))
        with open(parts[-1], "wb") as file:
            file.write(content[low:high])
    over(tmp, image, "split", *parts, what="split")


def test_curl(tmp):
    """An image on a web server."""
    qf.need_plugins("curl")
    image = Image(tmp)
    sock = os.path.join(tmp, "http")
    with httprange.serve(image.path, sock):
        over(tmp, image, "curl", "http://localhost/disk.qcow2",
             f"unix-socket-path={sock}", what="curl")


def test_ssh(tmp):
    qf.need("sshd")
    qf.need_plugins("ssh")
    keygen = shutil.which("ssh-keygen")
    if not keygen:
        raise qf.Skip("no ssh-keygen")
    image = Image(tmp)
    with ssh_server(tmp, keygen) as parameters:
        over(tmp, image, "ssh", image.path, *parameters, what="ssh")


@contextlib.contextmanager
def ssh_server(tmp, keygen):
    """An sshd of our own for the present user; yields parameters."""
    for name in ("host", "user"):
        qf.run([keygen, "-q", "-t", "ed25519", "-N", "",
                "-f", os.path.join(tmp, name)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = os.path.join(tmp, "sshd_config")
    with open(config, "w") as file:
        file.write(f"Port {port}\nListenAddress 127.0.0.1\n"
                   f"HostKey {tmp}/host\nAuthorizedKeysFile {tmp}/user.pub\n"
                   f"PidFile none\nStrictModes no\nUsePAM no\n"
                   f"PermitRootLogin yes\nSubsystem sftp internal-sftp\n")
    if os.getuid() == 0:
        # Where it separates its privileges; made at boot otherwise.
        os.makedirs("/run/sshd", exist_ok=True)
    log = open(os.path.join(tmp, "sshd.log"), "wb")
    sshd = subprocess.Popen([qf.tool("sshd"), "-D", "-e", "-f", config],
                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for_port(port, sshd)
        yield ["host=127.0.0.1", f"port={port}",
               f"user={getpass.getuser()}", f"identity={tmp}/user",
               "verify-remote-host=false", "config=/dev/null"]
    finally:
        sshd.terminate()
        sshd.wait()
        log.close()


def wait_for_port(port, process):
    for _ in range(1000):
        if process.poll() is not None:
            raise qf.Skip("sshd cannot be run here")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise qf.Fail("sshd does not listen")


def test_compressed_containers(tmp):
    image = Image(tmp)
    if qf.tool("xz") and qf.plugin_exists("filter", "xz"):
        qf.run([qf.tool("xz"), "-k", "-1", "--block-size=256KiB",
                image.path])
        over(tmp, image, "--filter=xz", "file", image.path + ".xz",
             what="xz")
    if qf.tool("gzip") and qf.plugin_exists("filter", "gzip"):
        qf.run([qf.tool("gzip"), "-k", "-1", image.path])
        over(tmp, image, "--filter=gzip", "file", image.path + ".gz",
             what="gzip")


def test_minimum_block_size(tmp):
    """A layer below that fails whatever is not aligned."""
    for cluster in ("512", "4k", "64k"):
        image = Image(tmp, "aligned" + cluster, MiB,
                      f"cluster_size={cluster}")
        os.truncate(image.path, -(-image.file_size // 65536) * 65536)
        for minimum in ("512", "4096", "65536"):
            with qf.serve(tmp, "-r", "--filter=qcow2",
                          "--filter=blocksize-policy", "file", image.path,
                          f"blocksize-minimum={minimum}",
                          "blocksize-preferred=65536",
                          "blocksize-maximum=32M",
                          "blocksize-error-policy=error") as server:
                what = f"minimum block size {minimum} below {cluster}"
                image.verify(server, what)
                handle = server.connect()
                qf.equal(f"{what}: minimum above",
                         handle.get_block_size(nbd.SIZE_MINIMUM), 1)
                handle.shutdown()


def test_thread_models(tmp):
    """Plugins that can do less at a time."""
    qf.need_plugins("eval")
    image = Image(tmp, size=512 * KiB, options="cluster_size=64k")
    for model in ("parallel", "serialize_requests",
                  "serialize_all_requests", "serialize_connections"):
        # The last allows a single connection.
        connections = 1 if model == "serialize_connections" else 3
        with qf.serve(
                tmp, "-r", "--filter=qcow2", "eval",
                f"thread_model=echo {model}",
                f"get_size=stat -L -c %s {image.path}",
                f"pread=dd if={image.path} skip=$4 count=$3 bs=64k"
                " iflag=count_bytes,skip_bytes status=none") as server:
            image.verify(server, f"thread model {model}", 60,
                         connections=connections)
        with qf.serve(tmp, "-r", "--filter=qcow2", "--filter=noparallel",
                      "file", image.path,
                      f"serialize={model.removeprefix('serialize_')}"
                      .replace("=parallel", "=requests")
                      .replace("_", "-")) as server:
            image.verify(server, f"noparallel {model}", 500,
                         connections=connections)


def test_directory(tmp):
    """dir=: each export is an image of its own, with its snapshots."""
    directory = os.path.join(tmp, "images")
    os.mkdir(directory)
    a = Image(directory, "a")
    b = Image(directory, "b", MiB, "compat=0.10")
    with open(os.path.join(directory, "raw"), "wb") as file:
        file.write(bytes(MiB))
    os.mkdir(os.path.join(directory, "subdirectory"))
    with qf.serve(tmp, "-r", "--filter=qcow2", "file",
                  f"dir={directory}") as server:
        for _ in range(2):
            for image, name in ((a, "a.qcow2"), (b, "b.qcow2")):
                image.verify(server, name, export=name)
                image.verify_map(server, name, export=name)
                disks.verify_disk(server, name + "@snap", image.snapshot,
                                  name + "@snap", reads=100)
        for missing in ("raw", "c.qcow2", "a.qcow2@none", "raw@snap",
                        "../a.qcow2", "subdirectory"):
            with contextlib.suppress(nbd.Error):
                server.connect(missing)
                raise qf.Fail(f"export {missing!r} could be opened")
        out = qf.run([qf.tool("nbdinfo"), "--list", "--json", "--no-content",
                      server.uri()], ok=None).stdout
        qf.check("a.qcow2" in out and "b.qcow2" in out,
                 f"the images are not listed: {out}")
        # Both at once, on one server.
        first, second = (disks.Reader(server, name)
                         for name in ("a.qcow2", "b.qcow2@snap"))
        first.verify("a at once", disks.whole_disk(a.oracle.size), a.oracle)
        second.verify("b at once", disks.whole_disk(b.snapshot.size),
                      b.snapshot)
        first.close()
        second.close()


def test_offset(tmp):
    """An image that lies somewhere in a larger file."""
    image = Image(tmp)
    path = os.path.join(tmp, "larger")
    for offset in (MiB, 12345):
        with open(path, "wb") as larger, open(image.path, "rb") as file:
            larger.write(images.NOISE[:offset])
            larger.write(file.read())
            larger.write(images.NOISE)
        over(tmp, image, "--filter=offset", "file", path,
             f"offset={offset}", f"range={image.file_size}",
             what=f"offset {offset}")


def test_filters_below(tmp):
    image = Image(tmp)
    for name in TRANSPARENT_FILTERS:
        if not qf.plugin_exists("filter", name):
            continue
        parameters = {"log": [f"logfile={tmp}/log"],
                      "stats": [f"statsfile={tmp}/stats"]}.get(name, [])
        with qf.serve(tmp, "-r", "--filter=qcow2", f"--filter={name}",
                      "file", image.path, *parameters) as server:
            image.verify(server, f"filter {name} below")


def test_filters_above(tmp):
    """What other filters make of the disk, among them a writable one."""
    image = Image(tmp)
    for name in TRANSPARENT_FILTERS:
        if not qf.plugin_exists("filter", name):
            continue
        parameters = {"log": [f"logfile={tmp}/log"],
                      "stats": [f"statsfile={tmp}/stats"]}.get(name, [])
        with qf.serve(tmp, f"--filter={name}", "--filter=qcow2",
                      "file", image.path, *parameters) as server:
            image.verify(server, f"filter {name} above")
    with qf.serve(tmp, "--filter=cow", "--filter=qcow2", "file",
                  image.path) as server:
        handle = server.connect()
        handle.pwrite(b"w" * 70000, 12345)
        expected = bytearray(image.oracle.read(0, MiB))
        expected[12345:12345 + 70000] = b"w" * 70000
        disks.compare("cow above", 0, handle.pread(MiB, 0), expected)
        handle.shutdown()


def test_delay(tmp):
    """A slow layer below: many requests wait for the same tables."""
    image = Image(tmp)
    with qf.serve(tmp, "-r", "--filter=delay", "file", image.path,
                  "rdelay=20ms") as lower:
        over(tmp, image, "nbd", f"socket={lower.sock}", what="delay",
             reads=100)


def expect_error(what, call):
    """The client is told of an error, and which."""
    try:
        call()
    except nbd.Error as error:
        qf.check(error.errnum, f"{what}: {error} has no number")
        return
    raise qf.Fail(f"{what}: no error")


def test_errors(tmp):
    """Errors below reach the client, and leave nothing behind."""
    image = Image(tmp)
    trigger = os.path.join(tmp, "trigger")
    for error in ("EIO", "ENOMEM", "ENOSPC"):
        with qf.serve(tmp, "-r", "--filter=qcow2", "--filter=error", "file",
                      image.path, f"error={error}", "error-rate=100%",
                      f"error-file={trigger}") as server:
            open(trigger, "w").close()
            expect_error(f"{error} at the first open", server.connect)
            os.unlink(trigger)
            handle = server.connect()
            open(trigger, "w").close()
            for _ in range(3):
                expect_error(f"{error} at a read",
                             lambda: handle.pread(64 * KiB, 0))
            expect_error(f"{error} for a snapshot",
                         lambda: server.connect("@snap").pread(MiB, 0))
            os.unlink(trigger)
            disks.compare(f"read after {error}", 0,
                          handle.pread(MiB, 0), image.oracle.read(0, MiB))
            handle.shutdown()
            image.verify(server, f"new connections after {error}")
            image.verify_map(server, f"map after {error}")
            # What is in the caches needs no layer below; the rest does.
            reader = server.connect()
            open(trigger, "w").close()
            for offset, length in disks.whole_disk(image.oracle.size,
                                                   64 * KiB):
                with contextlib.suppress(nbd.Error):
                    disks.compare(f"read in spite of {error}", offset,
                                  reader.pread(length, offset),
                                  image.oracle.read(offset, length))
            os.unlink(trigger)
            reader.shutdown()


def test_random_errors(tmp):
    """One call in four fails: whatever does not fail is right."""
    image = Image(tmp, options="cluster_size=4k")
    with qf.serve(tmp, "-r", "--filter=qcow2", "--filter=error", "file",
                  image.path, "error=EIO", "error-pread-rate=25%",
                  "error-extents-rate=25%", "qcow2-cache-size=1M") as server:
        handle = None
        failures = 0
        while handle is None:
            with contextlib.suppress(nbd.Error):
                handle = server.connect()
        for offset, length in disks.whole_disk(image.oracle.size, 16 * KiB):
            for _ in range(1000):
                try:
                    content = handle.pread(length, offset)
                    break
                except nbd.Error:
                    failures += 1
            else:
                raise qf.Fail(f"a read at {offset} fails 1000 times")
            disks.compare("read among errors", offset, content,
                          image.oracle.read(offset, length))
        qf.check(failures > 0, "no read failed, though one in four should")
        handle.shutdown()


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdinfo")
    qf.parts(tmp, test_file, test_nbd_and_memory, test_data, test_split,
             test_curl, test_ssh, test_compressed_containers,
             test_minimum_block_size, test_thread_models, test_directory,
             test_offset, test_filters_below, test_filters_above,
             test_delay, test_errors, test_random_errors)


qf.main(test)
