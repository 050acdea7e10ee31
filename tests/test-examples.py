#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The examples of the manual pages and of README do what they say.

Each block of commands is run as it stands there, by a shell, in a
directory with the files that the examples name.  What they write under
a name that is in the table "results" is compared with the right content.

Images on web servers: curl's http_proxy leads to a server of ours.
"""

import http.server
import os
import re
import shutil
import signal
import sys
import textwrap
import threading

import images
import qf
from qf import MiB

PAGES = [os.path.join(qf.SRCDIR, "..", "filters", name,
                      f"nbdkit-{name}-filter.pod")
         for name in ("qcow2", "bitmap-persist", "dirty-tracking", "cbw")]
README = os.path.join(qf.SRCDIR, "..", "README")

DISK_SIZE = 32 * MiB
PARTITION_START = 1 * MiB
HOSTNAME = "example.com\n"

# Programs that not every machine has, and nbdkit's own parts.
PROGRAMS = ("nbdcopy", "nbdinfo", "nbdsh", "qemu-img", "qemu-io")
PLUGINS = ("curl", "split")
FILTERS = ("cow", "ext2", "partition", "xz")


# ---------------------------------------------------------- extraction

def verbatim_blocks(lines):
    """Groups of indented lines; single empty lines do not end a group if
    a quote is open in it, as in a script of several commands."""
    blocks, block = [], []
    for line in list(lines) + [""]:
        if line[:1].isspace() and line.strip():
            block.append(line)
        elif block and "".join(block).count("'") % 2 and not line.strip():
            block.append(line)
        elif block:
            blocks.append(textwrap.dedent("\n".join(block)))
            block = []
    return blocks


def page_examples(path):
    """The verbatim paragraphs of the page's section EXAMPLES."""
    with open(path, encoding="utf-8") as page:
        text = page.read()
    section = re.search(r"^=head1 EXAMPLES\n(.*?)^=head1 ", text,
                        re.MULTILINE | re.DOTALL)
    qf.check(section, f"{path} has no section EXAMPLES")
    return verbatim_blocks(section.group(1).splitlines())


def readme_examples():
    """The indented lines of README's section Examples."""
    with open(README, encoding="utf-8") as readme:
        text = readme.read()
    section = re.search(r"^Examples\n-+\n(.*?)^\w[^\n]*\n--+$", text,
                        re.MULTILINE | re.DOTALL)
    qf.check(section, f"{README} has no section Examples")
    return verbatim_blocks(section.group(1).splitlines())


# ------------------------------------------------------------- fixtures

def partition_table():
    """An MBR with one Linux partition, up to the end of the disk."""
    sector = bytearray(512)
    start = PARTITION_START // 512
    entry = bytes([0, 0, 2, 0, 0x83, 0xff, 0xff, 0xff])
    entry += start.to_bytes(4, "little")
    entry += (DISK_SIZE // 512 - start).to_bytes(4, "little")
    sector[446:462] = entry
    sector[510:] = b"\x55\xaa"
    return sector


def make_raw(tmp):
    """A disk with a partition, in it (if possible) a file system."""
    disk = os.path.join(tmp, "source.raw")
    with open(disk, "wb") as file:
        file.write(partition_table())
        file.truncate(DISK_SIZE)
    mkfs = os.environ.get("MKFS_EXT4") or shutil.which(
        "mkfs.ext4", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not mkfs:
        return disk, False
    content = os.path.join(tmp, "content")
    os.mkdir(content)
    with open(os.path.join(content, "hostname"), "w") as file:
        file.write(HOSTNAME)
    qf.run([mkfs, "-q", "-F", "-d", content,
            "-E", f"offset={PARTITION_START}", disk,
            f"{(DISK_SIZE - PARTITION_START) // 1024}k"])
    return disk, True


def convert(image, raw, *options):
    qf.qemu_img("convert", "-f", "qcow2", "-O", "raw", *options, image, raw)
    with open(raw, "rb") as file:
        return file.read()


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


class Fixtures:
    """The files that the examples name, and the right results."""

    def __init__(self, tmp):
        self.dir = os.path.join(tmp, "fixtures")
        os.makedirs(os.path.join(self.dir, "images"))
        raw, self.has_ext4 = make_raw(tmp)
        shutil.copy(raw, self.path("guest.img"))
        image = self.path("disk.qcow2")
        qf.qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", raw, image)
        qf.qemu_img("snapshot", "-c", "before-upgrade", image)
        qf.qemu_io(image, ["write -q -P 0x5a 24M 256k"])
        shutil.copy(image, self.path("images/disk.qcow2"))
        overlay = self.path("overlay.qcow2")
        qf.run([qf.tool("qemu-img"), "create", "-q", "-f", "qcow2",
                "-b", "disk.qcow2", "-F", "qcow2", overlay], cwd=self.dir)
        qf.qemu_io(overlay, ["write -q -P 0xa5 1M 64k"])
        self.encrypt(raw)
        self.split(image)
        if qf.tool("xz"):
            qf.run([qf.tool("xz"), "-k", "-0", "--block-size=16MiB", image])
        self.results = {
            "disk.raw": convert(image, os.path.join(tmp, "disk")),
            "snapshot.raw": convert(image, os.path.join(tmp, "snapshot"),
                                    "-l", "before-upgrade"),
            "overlay.raw": convert(overlay, os.path.join(tmp, "overlay")),
            "secret.raw": read_file(raw),
            "hostname": HOSTNAME.encode(),
        }
        qf.check(self.results["disk.raw"] != self.results["snapshot.raw"],
                 "the disk and its snapshot are the same")

    def path(self, name):
        return os.path.join(self.dir, name)

    def encrypt(self, raw):
        with open(self.path("passphrase.txt"), "w") as file:
            file.write("open sesame")
        image = self.path("secret.qcow2")
        images.create_encrypted(image, "luks", "open sesame", DISK_SIZE)
        target = f"driver=qcow2,encrypt.key-secret=s,file.filename={image}"
        qf.qemu_img("convert", "--object", "secret,id=s,data=open sesame",
                    "-f", "raw", "-n", "--target-image-opts", raw, target)

    def split(self, image):
        content = read_file(image)
        half = len(content) // 2
        for name, part in (("part1", content[:half]),
                           ("part2", content[half:])):
            with open(f"{image}.{name}", "wb") as file:
                file.write(part)


class Proxy(http.server.BaseHTTPRequestHandler):
    """Answers for every web server, from one directory, with ranges."""

    protocol_version = "HTTP/1.1"
    root = None

    def content(self):
        name = re.sub(r"^http://[^/]*/", "", self.path)
        try:
            return read_file(os.path.join(self.root, name))
        except OSError:
            return None

    def answer(self, send_body):
        content = self.content()
        if content is None:
            self.send_error(404)
            return
        status, start, end = 200, 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)",
                              self.headers.get("Range", ""))
        if wanted:
            status = 206
            start = int(wanted.group(1))
            end = min(int(wanted.group(2)) + 1, len(content))
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if wanted:
            self.send_header("Content-Range",
                             f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if send_body:
            self.wfile.write(content[start:end])

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def log_message(self, *_):
        pass


def start_proxy(root):
    Proxy.root = root
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


# -------------------------------------------------------------- running

def missing(example, fixtures):
    """What this machine lacks for the example, or None."""
    words = set(re.findall(r"[\w.-]+", example))
    for name in PROGRAMS:
        if name in words and not qf.tool(name):
            return name
    for name in PLUGINS:
        if re.search(rf"qcow2\s+{name} ", example) and \
           not qf.plugin_exists("plugin", name):
            return f"nbdkit's {name} plugin"
    for name in FILTERS:
        if f"--filter={name}" in example and \
           not qf.plugin_exists("filter", name):
            return f"nbdkit's {name} filter"
    if "ext2file" in words and not fixtures.has_ext4:
        return "mkfs.ext4"
    if "qcow2-passphrase=" in example \
       and os.environ.get("LIBGCRYPT") == "no":
        return "libgcrypt"
    if "disk.qcow2.xz" in words and not qf.tool("xz"):
        return "xz"
    return None


def make_programs(tmp):
    """A directory for PATH with the programs under test."""
    programs = os.path.join(tmp, "bin")
    os.mkdir(programs)
    os.symlink(qf.nbdkit(), os.path.join(programs, "nbdkit"))
    # nbdsh runs the first python3 in PATH: let it be one with libnbd.
    os.symlink(sys.executable, os.path.join(programs, "python3"))
    for name in PROGRAMS:
        if qf.tool(name):
            os.symlink(qf.tool(name), os.path.join(programs, name))
    return programs


def kill_left_servers(directory):
    """An example that failed did not stop the server it had started."""
    for name in os.listdir(directory):
        if name.endswith(".pid"):
            try:
                os.kill(int(read_file(os.path.join(directory, name))),
                        signal.SIGTERM)
            except (ProcessLookupError, ValueError):
                pass


def run_example(directory, example, fixtures, environment):
    """Run one example in a new directory and judge what it leaves."""
    shutil.copytree(fixtures.dir, directory)
    os.symlink(shutil.which("nbdkit", path=environment["PATH"]),
               os.path.join(directory, "nbdkit"))
    try:
        done = qf.run(["bash", "-e", "-o", "pipefail", "-c", example],
                      cwd=directory, env=environment)
    finally:
        kill_left_servers(directory)
    written = 0
    for name, content in fixtures.results.items():
        path = os.path.join(directory, name)
        if os.path.exists(path):
            qf.check(read_file(path) == content,
                     f"{example}\n{name} has the wrong content")
            written += 1
    qf.check(written or done.stdout.strip(),
             f"{example}\nneither says anything nor writes a known file")
    print(done.stdout, end="")


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    fixtures = Fixtures(tmp)
    environment = {
        **os.environ,
        "PATH": make_programs(tmp) + ":" + os.environ["PATH"],
        "http_proxy": start_proxy(fixtures.dir),
        "no_proxy": "",
    }
    examples = sum(map(page_examples, PAGES), []) + readme_examples()
    qf.check(len(examples) >= 15, f"only {len(examples)} examples found")
    ran = 0
    for number, example in enumerate(examples):
        print(example)
        lack = missing(example, fixtures)
        if lack:
            print(f"-- not run: there is no {lack}")
            continue
        run_example(os.path.join(tmp, f"e{number}"), example, fixtures,
                    environment)
        ran += 1
    print(f"{ran} of {len(examples)} examples were run")


qf.main(test)
