# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Images that consist of several files: backing chains, encrypted layers,
external data files; and how they are compared with what QEMU says.

All files of a chain lie in one directory and are named without one, so
QEMU runs in that directory.
"""

import json
import os
import shutil
import struct
import tempfile
import time
from contextlib import contextmanager

import disks
import images
import nbd
import qcow2edit as edit
import qf
from qf import KiB

PASSPHRASE = "open sesame"
SECRET = ("--object", f"secret,id=s,data={PASSPHRASE}")

# Nobody waits longer for "no", not even with a sanitizer on a busy machine.
LIMIT = 20


# ----------------------------------------------------------------- QEMU

def compiler():
    """A C compiler, or None."""
    name = os.environ.get("CC", "cc").split()[0]
    return shutil.which(name) or shutil.which("gcc") or shutil.which("clang")


_preload = {}


def fast_keys(tmp):
    """The environment in which qemu-img makes LUKS keys at once.

    See cpu-time.c.  Without a compiler it takes two seconds for each key.
    """
    if tmp not in _preload and compiler():
        shim = os.path.join(tmp, "cpu-time.so")
        qf.run([compiler(), "-shared", "-fPIC", "-o", shim,
                os.path.join(qf.SRCDIR, "cpu-time.c")])
        _preload[tmp] = {"LD_PRELOAD": shim}
    return {**os.environ, **_preload.get(tmp, {})}


def qemu_img(tmp, *args, ok=0):
    """qemu-img in the directory of the images, without its weakness."""
    for _ in range(20):
        done = qf.run([qf.tool("qemu-img"), *args], ok=None, cwd=tmp,
                      env=fast_keys(tmp))
        if "accurate CPU usage" not in done.stderr:
            break
    if ok is not None:
        qf.equal(f"qemu-img {args}: {done.stderr}", done.returncode, ok)
    return done.stdout


def write_file(path, content):
    with open(path, "wb") as file:
        file.write(content)


# --------------------------------------------------------------- layers

class Raw:
    """A raw base: pieces of data with holes between them."""

    form = "raw"

    def __init__(self, tmp, name, size, data=((0.0, 0.3), (0.5, 0.6))):
        self.name = name + ".raw"
        self.path = os.path.join(tmp, self.name)
        with open(self.path, "wb") as file:
            file.truncate(size)
            for begin, end in data:
                # Beginning and end are in odd places on purpose.
                begin, end = int(begin * size), int(end * size)
                file.seek(begin)
                file.write(images.pattern(end, end - begin))

    @staticmethod
    def open_options():
        return {}


class Layer(images.Builder):
    """A qcow2 image, maybe over another layer, maybe encrypted.

    Options are those of qemu-img create.
    """

    form = "qcow2"

    def __init__(self, tmp, name, size, options="", backing=None):
        super().__init__(tmp, name, size, options)
        self.name = os.path.basename(self.path)
        self.backing = backing

    def is_encrypted(self):
        return "encrypt.format" in self.options

    def create(self):
        options = dict(self.options)
        if self.is_encrypted():
            options["encrypt.key-secret"] = "s"
        if options.get("encrypt.format") == "luks":
            options.setdefault("encrypt.iter-time", "10")
        args = []
        for key, value in options.items():
            args += ["-o", f"{key}={value}"]
        if self.backing:
            # -u: not opened, so that it need not be decrypted here.
            args += ["-u", "-b", self.backing.name, "-F", self.backing.form]
        qemu_img(self.tmp, "create", "-q", *SECRET, "-f", "qcow2", *args,
                 self.name, str(self.size))
        self.size = edit.get(self.path, "size")
        if self.options.get("preallocation", "off") != "off":
            self.plain.update(self.clusters(0, self.size))

    def open_options(self):
        """What QEMU must be told to open the layer and those below."""
        own = {}
        if self.is_encrypted():
            own["encrypt.key-secret"] = "s"
        if self.backing:
            own.update({"backing." + key: value for key, value
                        in self.backing.open_options().items()})
        return own

    def option_string(self, **more):
        options = {"driver": "qcow2", **self.open_options(), **more}
        return ",".join(f"{key}={value}" for key, value in options.items())

    def image_opts(self, name=None):
        return ["--image-opts",
                self.option_string(**{"file.filename": name or self.name})]

    def open_command(self):
        return f"open -o {self.option_string()} -d unmap {self.name}"

    def reopen(self):
        if self.commands:
            self.commands += ["close", self.open_command()]

    def run(self, options=()):
        commands = [self.open_command(), *self.commands]
        done = qf.run([qf.tool("qemu-io"), *SECRET, *options], ok=None,
                      input="\n".join(commands) + "\n", stdin=None,
                      cwd=self.tmp)
        qf.equal(f"{self.name}: {done.stdout}{done.stderr}",
                 done.returncode, 0)
        self.forget()

    def fill(self, rounds=12):
        """Make it, and all states that a cluster can have in it."""
        self.create()
        # QEMU cannot discard where that would show old backing data, nor
        # compress over what could so not be discarded.
        old = self.options.get("compat") == "0.10"
        self.mix(rounds=rounds, compress=not old
                 and "data_file" not in self.options)
        return self

    def snapshot(self, flag, name, path=None):
        qemu_img(self.tmp, "snapshot", *SECRET, flag, name,
                 *self.image_opts(path))

    def copy_at_snapshot(self, name):
        """A copy of the file that went back to the snapshot."""
        copy = "copy." + self.name
        shutil.copy(self.path, os.path.join(self.tmp, copy))
        self.snapshot("-a", name, copy)
        return copy


def build(tmp, name, *specs, rounds=12):
    """A chain from its base to its top, which is returned.

    Each spec is (size, options); options are "raw" for a raw base.
    """
    layer = None
    for i, (size, options) in enumerate(specs):
        layer_name = f"{name}-{i}"
        if options == "raw":
            layer = Raw(tmp, layer_name, size)
        else:
            layer = Layer(tmp, layer_name, size, options, layer)
            layer.fill(rounds)
    return layer


# -------------------------------------------------------------- oracles

def oracle_of(layer, name=None):
    """The disk in the layer, or in another file that is like it."""
    raw = os.path.join(layer.tmp, "oracle.raw")
    qemu_img(layer.tmp, "convert", *SECRET, *layer.image_opts(name),
             "-O", "raw", raw)
    content = disks.map_file(raw)
    os.unlink(raw)
    oracle = disks.Oracle(len(content))
    oracle.add(0, content)
    return oracle


def qemu_zeroes(layer, name=None):
    """What QEMU says reads as zeroes, as a map of ZERO and data."""
    entries = json.loads(qemu_img(
        layer.tmp, "map", *SECRET, *layer.image_opts(name),
        "--output=json"))
    return disks.merged((e["start"], e["length"],
                         disks.ZERO if e["zero"] else 0) for e in entries)


def our_zeroes(what, uri):
    extents = disks.nbd_map(uri)
    odd = [e for e in extents if e[2] == disks.HOLE]
    qf.equal(f"{what}: holes that may hold anything", odd, [])
    return disks.merged((start, length, kind & disks.ZERO)
                        for start, length, kind in extents)


def verify_same_map(what, expected, actual):
    """Compare what two functions return.

    Linux changes its mind about what is a hole of a file when something
    near it is read; so they are asked again.
    """
    for attempt in range(5):
        wanted, found = expected(), actual()
        if wanted == found:
            return
        time.sleep(attempt)
    disks.compare_maps(what, found, wanted)


def verify_map(server, what, layer, export="", name=None):
    """zero/data as qemu-img says."""
    if edit.get(layer.path, "size") > 0:
        verify_same_map(what, lambda: qemu_zeroes(layer, name),
                        lambda: our_zeroes(what, server.uri(export)))


def verify(server, what, layer, reads=100):
    """Whole disk, random reads on several connections, and the map."""
    disks.verify_disk(server, what, oracle_of(layer), reads=reads)
    verify_map(server, what, layer)


def verify_snapshot(server, what, layer, name):
    """Only going back to a snapshot makes QEMU show the size it had."""
    export = "@" + name
    copy = layer.copy_at_snapshot(name)
    disks.verify_disk(server, f"{what}, {export}", oracle_of(layer, copy),
                      export, reads=40, connections=2)
    verify_map(server, f"{what}, {export}", layer, export, copy)
    os.unlink(os.path.join(layer.tmp, copy))


def passphrase_file(tmp, passphrase=PASSPHRASE):
    """A value for qcow2-passphrase."""
    fd, path = tempfile.mkstemp(prefix="pw", dir=tmp)
    with os.fdopen(fd, "w") as file:
        file.write(passphrase + "\n")
    return "+" + path


def serve(layer, *parameters):
    """The filter over a layer whose files all are in its directory."""
    encrypted = any(isinstance(one, Layer) and one.is_encrypted()
                    for one in stack(layer))
    more = ["qcow2-passphrase=" + passphrase_file(layer.tmp)] \
        if encrypted else []
    if not any(p.startswith("qcow2-backing=") for p in parameters):
        more.append(f"qcow2-backing=dir:{layer.tmp}")
    return qf.serve_qcow2(layer.tmp, layer.path, *more, *parameters)


def stack(layer):
    """The layer and all below it."""
    while layer:
        yield layer
        layer = getattr(layer, "backing", None)


# ------------------------------------------------------------- refusals

def error_lines(message):
    return [line for line in message.splitlines() if "error" in line]


def check_message(what, message, words, forbidden=()):
    """One line says why, fit for a terminal, with all WORDS in it."""
    lines = error_lines(message)
    qf.equal(f"{what}: lines of errors in {message!r}", len(lines), 1)
    for word in words:
        qf.check(word.lower() in message.lower(),
                 f"{what}: no {word!r} in {message!r}")
    for word in forbidden:
        qf.check(word not in message, f"{what}: {word!r} in {message!r}")
    qf.check(all(c.isprintable() or c == "\n" for c in message),
             f"{what}: control characters in {message!r}")
    qf.check(not qf.SANITIZER_REPORT.search(message), message)


def start_fails(tmp, path, *parameters):
    """nbdkit does not start, and soon; returns what it printed."""
    command = [qf.nbdkit(), "-U", "-", "-r", "--filter=qcow2", "file", path,
               *parameters, "--run", "echo started"]
    began = time.monotonic()
    done = qf.run(command, ok=None, timeout=60)
    took = time.monotonic() - began
    qf.check(took < LIMIT, f"{command}: took {took:.1f} s")
    qf.check("started" not in done.stdout, f"{command}: started")
    qf.check(done.returncode == 1, f"{command}: exit status "
             f"{done.returncode}: {done.stderr}")
    return done.stderr


def refused(what, path, words, *parameters, forbidden=()):
    """Refused when nbdkit starts."""
    message = start_fails(os.path.dirname(path), path, *parameters)
    check_message(what, message, words, forbidden)


def connection_refused(server, what, words, export=""):
    """nbdkit runs, but a client cannot open the disk; the log says why."""
    before = len(server.log())
    began = time.monotonic()
    try:
        server.connect(export)
    except nbd.Error:
        pass
    else:
        raise qf.Fail(f"{what}: the disk was opened")
    took = time.monotonic() - began
    qf.check(took < LIMIT, f"{what}: refused after {took:.1f} s only")
    message = server.log()[before:]
    for word in words:
        qf.check(word.lower() in message.lower(),
                 f"{what}: no {word!r} in {message!r}")


@contextmanager
def nbd_server(tmp, path, *args, filters=()):
    """Another nbdkit, which serves a file as it is; NBD URI of it."""
    with qf.serve(tmp, "-r", *(f"--filter={name}" for name in filters),
                  "file", path, *args) as server:
        yield server


# ----------------------------------------------------------- long chains

def long_chain(tmp, name, count, cluster=4 * KiB):
    """A chain of COUNT images; each has one cluster that no other has.

    They are copies of one that qemu-img made, changed by hand, because
    making hundreds with it takes long.
    """
    def file_name(i):
        return f"{name}{i:04}.qcow2"

    size = max(count + 2, 64) * cluster
    base = Layer(tmp, f"{name}{0:04}", size)
    base.create()
    model = Layer(tmp, name + "-model", size, f"cluster_size={cluster}", base)
    model.create()
    model.commands.append(f"write -q -P 1 0 {cluster}")
    model.run()
    (at, entry), = edit.l2_entries(model.path)
    with open(model.path, "rb") as file:
        content = bytearray(file.read())
    name_at = edit.get(model.path, "backing_offset")
    data_at = entry & edit.OFFSET_MASK
    content[at:at + 8] = bytes(8)

    layer = None
    for i in range(count):
        mine = bytearray(content)
        mine[at + 8 * i:at + 8 * i + 8] = struct.pack(">Q", entry)
        mine[data_at:data_at + cluster] = images.pattern(i, cluster)
        if i == 0:
            mine[8:20] = bytes(12)      # no backing file
        else:
            below = file_name(i - 1).encode()
            mine[name_at:name_at + len(below)] = below
        write_file(os.path.join(tmp, file_name(i)), mine)
        layer = Layer(tmp, f"{name}{i:04}", size, "", layer)
    return layer
