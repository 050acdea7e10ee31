#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""A file system in an encrypted overlay of a compressed base, on servers
elsewhere, as programs see it that know file systems."""

import os
import shutil

import chains
import httprange
import qf
from qf import KiB, MiB

SIZE = 64 * MiB


def program(name):
    return shutil.which(name, path=os.environ.get("PATH", "")
                        + ":/usr/sbin:/sbin")


def write_tree(directory, seed):
    """Files of all sizes; returns what they hold."""
    content = {}
    for i in range(40):
        name = f"file{seed}-{i}"
        content[name] = os.urandom(i * i * 111) + bytes(i * 100)
        chains.write_file(os.path.join(directory, name), content[name])
    return content


def make_file_system(tmp):
    tree = os.path.join(tmp, "tree")
    os.mkdir(tree)
    content = write_tree(tree, 1)
    raw = os.path.join(tmp, "fs.raw")
    with open(raw, "wb") as file:
        file.truncate(SIZE)
    qf.run([program("mkfs.ext4"), "-q", "-F", "-d", tree, raw])
    return raw, content


def make_images(tmp):
    """base.qcow2, compressed, and top.qcow2 over it, encrypted, in which
    more files were written.  Returns the content of all."""
    raw, content = make_file_system(tmp)
    base = os.path.join(tmp, "base.qcow2")
    qf.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
    more = os.path.join(tmp, "more")
    os.mkdir(more)
    new = write_tree(more, 2)
    before = os.path.join(tmp, "before.raw")
    shutil.copy(raw, before)
    for name in new:
        qf.run([program("debugfs"), "-w", "-R",
                f"write {os.path.join(more, name)} {name}", raw])
    top = chains.Layer(tmp, "top", SIZE, "encrypt.format=luks",
                       chains.Layer(tmp, "base", SIZE))
    top.create()
    write_difference(top, before, raw)
    return top, {**content, **new}


def write_difference(layer, before, after):
    """Bring into the layer what has changed."""
    with open(before, "rb") as old, open(after, "rb") as new:
        for at in range(0, SIZE, 64 * KiB):
            wanted = new.read(64 * KiB)
            if wanted == old.read(64 * KiB):
                continue
            piece = os.path.join(layer.tmp, f"piece{at}")
            chains.write_file(piece, wanted)
            layer.commands.append(f"write -q -s {piece} {at} 64k")
    layer.run()


def check_files(tmp, server_args, content):
    """The ext2 filter reads each file through our filter."""
    for name in sorted(content)[::7]:
        out = os.path.join(tmp, "out")
        qf.run([qf.nbdkit(), "-U", "-", "-r", "--filter=ext2",
                *server_args, f"ext2file=/{name}",
                "--run", f'{qf.tool("nbdcopy")} "$uri" {out}'])
        with open(out, "rb") as file:
            qf.check(file.read() == content[name], f"{name} is not the same")


def check_disk(tmp, server_args, content):
    """e2fsck and debugfs like what nbdcopy has copied."""
    copy = os.path.join(tmp, "copy.raw")
    qf.run([qf.nbdkit(), "-U", "-", "-r", *server_args,
            "--run", f'{qf.tool("nbdcopy")} "$uri" {copy}'])
    qf.run([program("e2fsck"), "-fn", copy])
    for name, expected in content.items():
        done = qf.run([program("debugfs"), "-R", f"cat {name}", copy],
                      text=False)
        qf.check(done.stdout == expected, f"{name} is not the same")


def parameters(tmp):
    return ["qcow2-passphrase=" + chains.passphrase_file(tmp)]


def test_local(tmp):
    top, content = make_images(tmp)
    args = ["--filter=qcow2", "file", top.path, f"qcow2-backing=dir:{tmp}",
            *parameters(tmp)]
    check_disk(tmp, args, content)
    if qf.plugin_exists("filter", "ext2"):
        check_files(tmp, args, content)


def test_nbd(tmp):
    """Both images are on other servers."""
    qf.need_plugins("nbd")
    if os.environ.get("LIBNBD") == "no":
        raise qf.Skip("built without libnbd")
    top, content = make_images(tmp)
    with chains.nbd_server(tmp, top.path) as overlay, \
         chains.nbd_server(tmp, os.path.join(tmp, "base.qcow2")) as base:
        args = ["--filter=qcow2", "nbd", "uri=" + overlay.uri(),
                "qcow2-backing=" + base.uri(), *parameters(tmp)]
        check_disk(tmp, args, content)
        if qf.plugin_exists("filter", "ext2"):
            check_files(tmp, args, content)


def test_curl(tmp):
    """The overlay is on a web server, its base here."""
    qf.need_plugins("curl")
    top, content = make_images(tmp)
    sock = os.path.join(tmp, "http")
    with httprange.serve(top.path, sock):
        check_disk(tmp, ["--filter=qcow2", "curl", "http://localhost/top",
                         "unix-socket-path=" + sock,
                         "qcow2-backing=file:" + os.path.join(
                             tmp, "base.qcow2"), *parameters(tmp)], content)


def fresh(test):
    """Each test makes its own images."""
    def run(tmp):
        directory = os.path.join(tmp, test.__name__)
        os.mkdir(directory)
        test(directory)
    run.__name__ = test.__name__
    return run


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdcopy")
    if os.environ.get("LIBGCRYPT") == "no":
        raise qf.Skip("built without libgcrypt")
    missing = [name for name in ("mkfs.ext4", "debugfs", "e2fsck")
               if not program(name)]
    if missing:
        raise qf.Skip("not found: " + ", ".join(missing))
    qf.parts(tmp, fresh(test_local), fresh(test_nbd), fresh(test_curl))


qf.main(test)
