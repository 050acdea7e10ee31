#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The names of other files that an image carries: what they open, and
that nothing is touched which the parameters do not permit.

Images and what they may name lie in the directory "images"; "outside" is
beside it, and inotify tells if anything there was opened.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import time

import chains
import disks
import images
import qcow2edit as edit
import qf
from qf import KiB, MiB

BACKING_FORMAT, DATA_FILE = 0xe2792aca, 0x44415441

# The two directories, and the parameter that permits the first.
IMAGES = OUTSIDE = DIR = None


# --------------------------------------------------------------- images

def inside(name):
    return os.path.join(IMAGES, name)


def overlay(name, form="raw", path="top.qcow2"):
    """An image with data of its own, and any name for its backing file."""
    path = inside(path)
    name = os.fsencode(name)
    shutil.copyfile(inside("model.qcow2"), path)
    edit.set_extensions(path, [(BACKING_FORMAT, form.encode())]
                        if form else [])
    edit.write_at(path, 4 * KiB, name)
    edit.put(path, "backing_offset", 4 * KiB)
    edit.put(path, "backing_size", len(name))
    return path


def build(tmp):
    global IMAGES, OUTSIDE, DIR
    IMAGES, OUTSIDE = (os.path.join(tmp, name)
                       for name in ("images", "outside"))
    DIR = "qcow2-backing=dir:" + IMAGES
    os.makedirs(inside("sub"))
    os.mkdir(OUTSIDE)
    model = chains.Layer(IMAGES, "model", MiB)
    model.create()
    model.write(128 * KiB, 64 * KiB)
    model.zero(256 * KiB, 64 * KiB)
    model.write(512 * KiB, 128 * KiB)
    model.run()
    for seed, name in enumerate(("base.raw", "sub/deep.raw",
                                 "../outside/secret.raw")):
        chains.write_file(inside(name), images.pattern(seed, MiB))
    qf.qemu_img("convert", "-f", "raw", "-O", "qcow2",
                inside("sub/deep.raw"), inside("base.qcow2"))
    for link, target in (
            ("link", "base.raw"), ("sublink", "sub"),
            ("sub/up", "../base.raw"), ("winding", "sub/../sub/deep.raw"),
            ("leaving", "../outside/secret.raw"), ("twice", "leaving"),
            ("outdir", "../outside"), ("sub/outdir", "../../outside"),
            ("absolute", inside("base.raw")), ("zero", "/dev/zero"),
            ("stdin", "/proc/self/fd/0"), ("round", "round"),
            ("dangling", "gone")):
        os.symlink(target, inside(link))
    os.mkfifo(inside("fifo"))


# -------------------------------------------------- what should be, and is

def oracle_of(path, *options, **other):
    """What QEMU reads; OTHER are options that replace what the image
    says, such as its backing file."""
    source = ["-f", "qcow2", path]
    if other:
        source = ["json:" + json.dumps({
            "driver": "qcow2", **other,
            "file": {"driver": "file", "filename": path}})]
    raw = inside("oracle.raw")
    # It takes names with a protocol as relative to where it runs.
    chains.qemu_img(IMAGES, "convert", *options, *source, "-O", "raw", raw)
    oracle = disks.Oracle(os.path.getsize(raw))
    oracle.add(0, disks.map_file(raw))
    os.unlink(raw)
    return oracle


def instead(name, form="raw"):
    """For oracle_of: this backing file, whatever the image says."""
    return {"backing": {"driver": form, "file": {
        "driver": "file", "filename": inside(name)}}}


def serve(path, *parameters):
    return qf.serve_qcow2(os.path.dirname(IMAGES), path, *parameters)


def opened(what, path, *parameters, **other):
    """It is served, and is what QEMU reads."""
    oracle = oracle_of(path, **other)
    with serve(path, *parameters) as server:
        disks.verify_disk(server, f"{what}, {parameters}", oracle,
                          connections=1)


def refused(what, path, words, *parameters):
    """One line says why, whatever bytes are in the name."""
    chains.refused(f"{what}, {parameters}", path, words, *parameters,
                   forbidden=["\ufffd"])


def refused_later(what, path, words, *parameters):
    """A server is first asked when a client comes."""
    with serve(path, *parameters) as server:
        chains.connection_refused(server, what, words)


@contextlib.contextmanager
def nothing_outside():
    libc = ctypes.CDLL(None)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    watch = libc.inotify_add_watch(fd, os.fsencode(OUTSIDE), 0x20)  # IN_OPEN
    qf.check(watch != -1, "inotify does not work")

    def was_opened():
        with contextlib.suppress(BlockingIOError):
            return os.read(fd, 4096) != b""
        return False

    try:
        os.close(os.open(os.path.join(OUTSIDE, "secret.raw"), os.O_RDONLY))
        qf.check(was_opened(), "inotify does not tell what is opened")
        yield
        qf.check(not was_opened(), "a file outside was opened")
    finally:
        os.close(fd)


def each_refused(cases, form="raw", parameters=None):
    """Names, or (name, words...); if there are no words, the name is one."""
    def one(case):
        name, *words = case if isinstance(case, tuple) else (case, case)
        refused(f"{name!r}", overlay(name, form), words,
                *([DIR] if parameters is None else parameters))

    with nothing_outside():
        qf.each(cases, one)


# ------------------------------------------------------------ refuse, none

def test_refuse(tmp):
    for parameters in ([], ["qcow2-backing=refuse"]):
        each_refused([(name, name, "qcow2-backing=dir:") for name in (
            "base.raw", "../outside/secret.raw", OUTSIDE + "/secret.raw",
            "/dev/zero", "http://localhost/x", "nbd://localhost/x", "json:{",
            "json:[]", "gone", "%s%n%%", " ")],
            parameters=parameters)


def map_alone(path):
    """What the image itself has, by QEMU, in the types of NBD."""
    name = json.dumps({"driver": "qcow2", "backing": None, "file": {
        "driver": "file", "filename": path}})
    return disks.merged(
        (e["start"], e["length"], disks.HOLE if not e["present"] else
         disks.ZERO if e["zero"] else 0) for e in json.loads(
             qf.qemu_img("map", "--output=json", "json:" + name)))


def test_none(tmp):
    """The top layer alone goes on top of its backing file again."""
    path, copy = overlay("base.raw"), inside("copy.qcow2")
    with serve(path, "qcow2-backing=none") as server:
        actual = disks.merged((start, length, kind & disks.ZERO or kind)
                              for start, length, kind
                              in disks.nbd_map(server.uri()))
        disks.compare_maps("none", actual, map_alone(path))
        qf.qemu_img("convert", "-f", "raw", "-O", "qcow2", "-B", "base.raw",
                    "-F", "raw", server.uri(), copy)
    disks.compare_maps("its copy", map_alone(copy), map_alone(path))
    qf.qemu_img("compare", "-f", "qcow2", "-F", "qcow2", path, copy)
    with nothing_outside():
        for name, form in (("../outside/secret.raw", "raw"), ("gone", None),
                           ("http://localhost/x", "vmdk"), ("json:{", "raw"),
                           (b"\xff\x1b", "raw"), ("top.qcow2", "qcow2")):
            opened(f"none, {name!r}", overlay(name, form),
                   "qcow2-backing=none", backing=None)


# --------------------------------------------------------------------- dir

def test_dir(tmp):
    """Names that stay inside, also by way of links."""
    odd = ["./a:b.raw", "a b,c=d.raw", 'back\\slash"quote.raw', "100%n.raw",
           "?x#y@z.raw", "json.raw", "file:file:x.raw", "é.raw",
           b"caf\xe9\x01\n\x1b.raw"]
    for name in odd:
        stored = os.fsencode(name).removeprefix(b"file:")
        shutil.copy(inside("sub/deep.raw"), inside("").encode() + stored)
    with nothing_outside():
        for name in ("base.raw", "./base.raw", "sub/deep.raw",
                     "sub//deep.raw", "sub/../base.raw", "sub/./deep.raw",
                     "link", "sublink/deep.raw", "sublink/../base.raw",
                     "sub/up", "sublink/up", "winding", "file:base.raw",
                     "file:sub/deep.raw", *odd):
            opened(f"{name!r}", overlay(name), DIR)
        opened("base.qcow2", overlay("base.qcow2", "qcow2"), DIR)


def test_dir_chain(tmp):
    """Names are relative to the file that names them."""
    top = overlay("sub/middle.qcow2", "qcow2")
    for name in ("deep.raw", "../base.raw", "../sub/../link", "up"):
        overlay(name, path="sub/middle.qcow2")
        opened(f"sub/middle.qcow2 over {name}", top, DIR)
    with nothing_outside():
        for name in ("../../outside/secret.raw", "outdir/secret.raw",
                     OUTSIDE + "/secret.raw", "../sub/gone"):
            overlay(name, path="sub/middle.qcow2")
            refused(f"sub/middle.qcow2 over {name}", top, [name], DIR)
            refused(f"sub/middle.qcow2 over {name}", top, [name],
                    f"qcow2-backing=dir:{IMAGES}/sublink/..")


def test_dir_elsewhere(tmp):
    """The directory is what the user says, not where the image is."""
    top = overlay("deep.raw")
    for name in ("sub", "sublink"):
        opened(name, top, f"{DIR}/{name}", **instead("sub/deep.raw"))
    top = overlay("base.raw", path="sub/top.qcow2")
    opened("an image below it", top, DIR, **instead("base.raw"))
    refused("an image above it", overlay("sub/deep.raw"), ["sub/deep.raw"],
            DIR + "/sub")


def test_dir_refused(tmp):
    outside = OUTSIDE + "/secret.raw"
    each_refused([(name, name.removeprefix("file:"), word) for word, names in (
        ("leads out", (
            "../outside/secret.raw", "sub/../../outside/secret.raw",
            "../images/base.raw", "..", "sub/../..",
            "leaving", "twice", "outdir/secret.raw",
            "sub/outdir/secret.raw", "sublink/outdir/secret.raw",
            "outdir/../images/base.raw", "absolute", "zero", "stdin",
            "round", "file:../outside/secret.raw")),
        ("absolute", (outside, "file:" + outside, "file://" + outside,
                      inside("base.raw"), "/dev/zero", "//", "/")),
        ("not a regular file", ("fifo", "sub", "sub/", ".", "sublink/..")),
        ("no such file", ("gone", "sub/gone", "dangling", "no/dir")),
        ("not a directory", ("base.raw/", "base.raw/x", "fifo/x")))
        for name in names])
    with contextlib.suppress(PermissionError):
        os.mknod(inside("node"), 0o20600, os.makedev(1, 5))  # /dev/zero
        each_refused(["node"])


def test_dir_itself(tmp):
    path = overlay("base.raw")
    for value, words in (("dir:", []), (f"dir:{IMAGES}/gone", ["gone"]),
                         (f"dir:{IMAGES}/base.raw", ["not a directory"]),
                         (f"dir:{IMAGES}/fifo", ["not a directory"]),
                         ("dir", ["qcow2-backing", "dir:PATH"]),
                         ("file:", []), ("", ["qcow2-backing"]),
                         ("http://localhost/x", ["qcow2-backing"])):
        refused(value, path, words, "qcow2-backing=" + value)


# ----------------------------------------------------------------- formats

def test_format(tmp):
    for name, form, other in (("base.raw", "raw", "qcow2"),
                              ("base.qcow2", "qcow2", "raw"),
                              ("base.qcow2", "raw", "qcow2")):
        # The parameter is for images that do not say it.
        path = overlay(name, form)
        opened(name, path, DIR)
        opened(name, path, DIR, f"qcow2-backing-format={other}")
        opened(name, path, f"{DIR},format={other}")
        path = overlay(name, None)
        refused(f"{name}, no format", path, [
            name, "qcow2-backing-format=raw", "qcow2-backing-format=qcow2"],
            DIR)
        opened(name, path, f"{DIR},format={form}", **instead(name, form))
        opened(name, path, DIR, f"qcow2-backing-format={form}",
               **instead(name, form))


def test_unknown_format(tmp):
    for form in ("vmdk", "RAW", "raw ", "rawx", "host_device", "file"):
        path = overlay("base.raw", form)
        refused(f"format {form}", path, [f'"{form}"', "raw", "qcow2"], DIR)
        for parameters in ([f"{DIR},format={form}"],
                           [DIR, f"qcow2-backing-format={form}"],
                           [f"qcow2-backing=file:{path},format={form}"]):
            for header in ("raw", None):
                refused(f"format {form}", overlay("base.raw", header),
                        [f'"{form}"', "raw", "qcow2"], *parameters)
    refused("control characters", overlay("base.raw", "\x1b[31m\n\u202e"),
            [r"\033[31m\n"], DIR)


def test_no_probing(tmp):
    """What a guest wrote into a raw disk does not open files."""
    shutil.copy(overlay("../outside/secret.raw"), inside("lure"))
    with nothing_outside():
        opened("lure", overlay("lure"), DIR)
        refused("lure", overlay("lure", None), ["lure", "never guessed"], DIR)
        opened("lure", overlay("gone", None),
               f"qcow2-backing=file:{inside('lure')},format=raw",
               **instead("lure"))


# ------------------------------------------------------------ file and URI

@contextlib.contextmanager
def qemu_nbd(name, form, export=""):
    """QEMU's server; yields its socket."""
    sock, pidfile = inside("q.sock"), inside("q.pid")
    with subprocess.Popen(
            [qf.tool("qemu-nbd"), "-r", "-t", "-e", "9", "-f", form, "-x",
             export, "-k", sock, "--pid-file", pidfile, inside(name)],
            stdin=subprocess.DEVNULL) as process:
        try:
            while not os.path.exists(pidfile):
                qf.check(process.poll() is None, "qemu-nbd has ended")
                time.sleep(0.005)
            yield sock
        finally:
            process.terminate()
            process.wait()
            for path in (sock, pidfile):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


def test_file(tmp):
    """The name in the image does not matter, nor does its format."""
    param = "qcow2-backing=file:"
    for name in ("gone", "http://localhost/x", "json:{", b"\xff\n"):
        path = overlay(name)
        opened(f"{name!r}", path, param + inside("base.raw"),
               **instead("base.raw"))
        opened(f"{name!r}", path, param + inside("base.qcow2"),
               "qcow2-backing-format=qcow2", **instead("base.qcow2", "qcow2"))
        opened(f"{name!r}", path, param + inside("absolute") + ",format=raw",
               **instead("base.raw"))
    refused("no format", overlay("gone", None), ["qcow2-backing-format"],
            param + inside("base.raw"))
    for name, word in (("gone", "no such file"), ("fifo", "not a regular"),
                       ("sub", "not a regular"), ("zero", "not a regular"),
                       ("base.raw", "not a qcow2 image")):
        refused(name, overlay("x", "qcow2"), [name, word],
                param + inside(name))
    second = overlay("base.raw", path="second.qcow2")
    refused("a chain", overlay("x", "qcow2"), ["base.raw", "only one"],
            param + second)


def test_uri(tmp):
    for form in ("raw", "qcow2"):
        name = "base." + form
        other = instead(name, form)
        path = overlay("http://localhost/x", None)
        with chains.nbd_server(tmp, inside(name)) as server:
            uri = "qcow2-backing=" + server.uri()
            refused_later("no format", path, ["qcow2-backing-format"], uri)
            opened("nbdkit", path, uri, "qcow2-backing-format=" + form,
                   **other)
            opened("nbdkit", overlay("gone", form), uri, **other)
        with qemu_nbd(name, "raw", "an export") as sock:
            uri = f"qcow2-backing=nbd+unix:///an%20export?socket={sock}"
            opened("qemu-nbd", overlay("gone", form), uri, **other)
            refused_later("no such export", overlay("gone", form), ["other"],
                          uri.replace("an%20export", "other"))
        refused_later("no server", overlay("gone", form), [sock], uri)
    second = overlay("base.raw", path="second.qcow2")
    with chains.nbd_server(tmp, second) as server:
        refused_later("a chain", overlay("x", "qcow2"),
                      ["base.raw", "only one"],
                      "qcow2-backing=" + server.uri())


def nbd_json(**server):
    return "json:" + json.dumps({"driver": "raw", "file": {
        "driver": "nbd", "export": "x y", **server}})


def test_nbd_names(tmp):
    """dir: does not go to a server; the parameter that it names does."""
    def suggestion(path):
        message = chains.start_fails(tmp, path, DIR)
        chains.check_message(path, message, ["NBD server"])
        return re.search(r"(qcow2-backing=\S+) would", message).group(1)

    with qemu_nbd("base.raw", "raw", "x y") as sock:
        for name in (
                f"nbd+unix:///x%20y?socket={sock}",
                f"nbd:unix:{sock}:exportname=x y",
                nbd_json(server={"type": "unix", "path": sock}),
                'json:{"driver": "raw", "file.driver": "nbd", "file.export":'
                f' "x y", "file.path": "{sock}"}}',
                nbd_json(path=sock)):
            path = overlay(name)
            opened(name, path, suggestion(path))
    each_refused([(name, "qcow2-backing=" + uri) for name, uri in (
        ("nbd:localhost:1:exportname=x y", "nbd://localhost:1/x%20y would"),
        ("nbd:[::1]:10", "nbd://[::1]:10/ would"),
        ("nbd://localhost", "nbd://localhost would"),
        ("nbds://localhost:1/\x1b", r"nbds://localhost:1/\033 would"),
        (nbd_json(server={"type": "inet", "host": "::1", "port": "7"}),
         "nbd://[::1]:7/x%20y would"),
        (nbd_json(host="localhost"), "nbd://localhost:10809/x%20y would"))])
    each_refused([(name, "not supported") for name in (
        "nbd:", "nbd:x", "nbd::", "nbd::1", "nbd:x:")])


# -------------------------------------------------------------------- json

def test_json(tmp):
    """Files; if the header names a format, that counts."""
    odd = 'we"ird \\ \né\u20ac.raw'
    shutil.copy(inside("sub/deep.raw"), inside(odd))
    def nested(driver, filename):
        return {"driver": driver,
                "file": {"driver": "file", "filename": filename}}

    for value, form in (
            (nested("raw", "base.raw"), None), (nested("raw", odd), None),
            (nested("raw", "./sub/../link"), None),
            (nested("qcow2", "base.qcow2"), None),
            (nested("qcow2", "base.qcow2"), "raw"),
            (nested("raw", "base.qcow2"), "qcow2"),
            ({"file": {"driver": "file", "filename": "base.raw"}}, "raw"),
            ({"file.filename": "sub/deep.raw", "driver": "raw"}, None),
            ({"file.driver": "file", "file.filename": "base.raw",
              "driver": "raw", "read-only": True}, None)):
        for ascii_only in (True, False):
            name = "json:" + json.dumps(value, ensure_ascii=ascii_only)
            opened(f"{name}, {form}", overlay(name, form), DIR)


def test_json_refused(tmp):
    def of_file(filename, driver="raw", **more):
        return json.dumps({"driver": driver, **more, "file": {
            "driver": "file", "filename": filename}})

    secret = "../outside/secret.raw"
    cases = {
        "no JSON": ("{", "x", "{]", '{"a": 1 \x1b\n}', "[" * 1000,
                    '{"a":' * 200),
        "json": ("", '{"\udcff\udcfe": 1}'),
        "no object": ("null", "[]", '"x"'),
        "drivers file and nbd": (
            "{}", '{"driver": "raw"}', '{"driver": "raw", "file": "link"}',
            '{"driver": "raw", "file": {}}', '{"driver": "null-co"}',
            '{"driver": "host_device", "filename": "/dev/zero"}',
            '{"driver": "file", "filename": 7}',
            '{"driver": "raw", "file": {"driver": "nbd"}}',
            '{"driver": "raw", "file": {"driver": "https", "url": "x"}}',
            '{"driver": "raw", "file": ' + of_file("base.raw") + "}"),
        "leads out": (of_file(secret),),
        "absolute": (of_file(OUTSIDE + "/secret.raw"),),
        "file:base.raw: no such file": (of_file("file:base.raw"),),
        r"gone\033\n": (of_file("gone\x1b\n\u202e"),),
        "NUL": (of_file("base.raw\0x"),),
        # These would mean other bytes than the file's.
        '"offset"': (of_file("base.raw", offset=64 * KiB),),
        '"size"': (of_file("base.raw", size="4096"),),
        '"backing"': (of_file("base.qcow2", backing=None),),
        '"backing.driver"': (of_file("base.qcow2",
                                     backing={"driver": "null-co"}),),
        '"vmdk"': (of_file("base.raw", driver="vmdk"),),
    }
    each_refused([("json:" + value, word) for word, values in cases.items()
                  for value in values], form=None)


def test_protocols(tmp):
    each_refused([(name, f'"{name}"', "not supported") for name in (
        "http://localhost/x", "https://localhost/x", "ssh://localhost/x",
        "ssh:x", "ftp://x/y", "fat:sub", "host_device:/dev/zero", "x:y",
        "JSON:{}", "File:base.raw", "null-co://", "blkdebug::base.raw",
        "fd:0", "nbd+ssh://x/")])


# ------------------------------------------------------------- odd strings

def test_lengths(tmp):
    """The format allows 1023 bytes."""
    longest = "./" * ((1023 - len("/base.raw")) // 2) + "/base.raw"
    qf.equal("length", len(longest), 1023)
    opened("1023 bytes", overlay(longest), DIR)
    each_refused([("./" * 509 + "gone!", "gone!", "no such file"),
                  ("x" * 1023, "x" * 1023, "too long"),
                  ("\x1b" * 1023, r"\033" * 1023),
                  ("./" + longest, "1023"), ("x" * 1024, "1023")])
    path = overlay("x" * 1024)
    chains.qemu_img(IMAGES, "info", path, ok=1)
    edit.put(path, "backing_size", 0xffffffff)
    refused("4 GiB", path, ["1023"], DIR)
    for field in ("backing_size", "backing_offset"):
        path = overlay("../outside/secret.raw")
        edit.put(path, field, 0)
        with nothing_outside():
            opened(f"{field} 0", path)


def test_bytes(tmp):
    """Nothing controls a terminal, or splits a line of the log."""
    each_refused([("base.raw\0", "NUL"), ("\0", "NUL"), ("a\0b", "NUL")])
    for parameters in ([DIR], ["qcow2-backing=refuse"]):
        each_refused([
            ("\x1b[31mred\x07", r"\033[31mred\007"), ("two\nlines", r"two\n"),
            (b"\xff\xfe\x80", r"\377\376\200"), ("\u202eé", r"\342\200\256"),
            ('"\\', r"\"\\"), ("%s%n%1$s", "%s%n%1$s"),
            ("\x7f\t", r"\177\t")], parameters=parameters)
    each_refused([("\x1b:x", r"\033:x", "not supported"),
                  ("/\x1b\xff", r"/\033", "absolute")])


def test_loops(tmp):
    def loop(what, words, *rest):
        for path, name in rest:
            overlay(name, "qcow2", path)
        refused(what, inside(rest[0][0]), words, DIR)

    own = ["its own backing file"]
    os.symlink("a.qcow2", inside("a-link"))
    loop("itself", own, ("a.qcow2", "a.qcow2"))
    loop("itself, by a link", own, ("a.qcow2", "a-link"))
    loop("itself, by json", own, (
        "a.qcow2", 'json:{"file.filename": "a.qcow2"}'))
    loop("two", own, ("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2"))
    loop("three", ["200"], ("a.qcow2", "sub/b.qcow2"),
         ("sub/b.qcow2", "../b.qcow2"), ("b.qcow2", "./a.qcow2"))
    loop("names that grow", ["200"], ("a.qcow2", "sub/../a.qcow2"))
    loop("names that grow fast", ["too long"],
         ("a.qcow2", "./" * 450 + "sub/../a.qcow2"))
    path = overlay("a.qcow2", "qcow2", "a.qcow2")
    refused("file:, itself", path, ["a.qcow2"], "qcow2-backing=file:" + path)


# ------------------------------------------------------------------ others

def test_export(tmp):
    path = overlay("base.raw")
    with contextlib.suppress(qf.Fail):
        with serve(path, "qcow2-backing=export"):
            raise qf.Skip("this nbdkit can open other exports")
    refused("export", path, ["qcow2-backing=export", "nbdkit"],
            "qcow2-backing=export")


def test_not_local(tmp):
    """An image that is not a file is first looked at when a client comes."""
    qf.need_plugins("nbd")

    @contextlib.contextmanager
    def serve_remote(name, *parameters):
        with chains.nbd_server(tmp, overlay(name)) as below, \
             qf.serve(tmp, "-r", "--filter=qcow2", "nbd", "uri="
                      + below.uri(), *parameters) as server:
            yield server

    with nothing_outside():
        for name in ("../outside/secret.raw", "leaving", "fifo", "http:x",
                     OUTSIDE + "/secret.raw"):
            with serve_remote(name) as server:
                chains.connection_refused(server, name, [
                    name, "qcow2-backing=dir:"])
            with serve_remote(name, DIR) as server:
                chains.connection_refused(server, name, [name])
    with serve_remote("sub/deep.raw", DIR) as server:
        disks.verify_disk(server, "sub/deep.raw",
                          oracle_of(inside("top.qcow2")))


def test_data_file(tmp):
    """The same for external data files."""
    permit = "qcow2-data-file=dir:" + IMAGES
    image = chains.Layer(IMAGES, "external", MiB, "data_file=sub/data.raw")
    image.create()
    image.write(64 * KiB, 128 * KiB)
    image.run()
    path = image.path
    opened("data file", path, permit)
    with nothing_outside():
        for name, word in (("../outside/secret.raw", "leads out"),
                           ("leaving", "leads out"), ("fifo", "not a regular"),
                           ("absolute", "leads out"), ("gone", "no such"),
                           (OUTSIDE + "/secret.raw", "absolute"),
                           ("http://localhost/x", "not supported")):
            edit.set_extensions(path, [(DATA_FILE, name.encode())])
            refused(name, path, [name, word], permit)
            refused(name, path, [name, "qcow2-data-file=dir:"], DIR)


def test_snapshots(tmp):
    """They read through to the backing file."""
    for name, form in (("base.raw", "raw"), ("base.qcow2", "qcow2")):
        path = overlay(name, form)
        qf.qemu_img("snapshot", "-c", "one", path)
        qf.qemu_io(path, ["write -q -P 7 0 256k", "write -q -z 512k 64k"])
        with serve(path, DIR) as server:
            for export, option in (("", []), ("@one", ["-l", "one"])):
                disks.verify_disk(server, f"{name}, {export!r}",
                                  oracle_of(path, *option), export)


def test(tmp):
    qf.need("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
    build(tmp)
    qf.parts(tmp, test_refuse, test_none, test_dir, test_dir_chain,
             test_dir_elsewhere, test_dir_refused, test_dir_itself,
             test_format, test_unknown_format, test_no_probing, test_file,
             test_uri, test_nbd_names, test_json, test_json_refused,
             test_protocols, test_lengths, test_bytes, test_loops,
             test_export, test_not_local, test_data_file, test_snapshots)


qf.main(test)
