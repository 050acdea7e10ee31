#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Encrypted images whose headers were made to do harm: the right data, or
an error that says why; soon, and without taking much memory."""

import os
import resource
import struct
import subprocess
import time

import chains
import images
import qcow2edit as edit
import qf
from qf import KiB, MiB

CRYPTO_EXTENSION = 0x0537be77
SLOW = os.environ.get("SANITIZER", "none") != "none"
LIMIT = 60 if SLOW else 8        # seconds
MEMORY = 100 * MiB

# Places in the LUKS header, from its start.
SLOT = 208
FIELDS = {
    "magic": (0, 6), "version": (6, 2), "cipher name": (8, 32),
    "cipher mode": (40, 32), "hash": (72, 32), "payload offset": (104, 4),
    "key bytes": (108, 4), "digest": (112, 20), "salt": (132, 32),
    "iterations": (164, 4), "uuid": (168, 40),
    **{f"slot {n} {what}": (SLOT + n * 48 + at, size)
       for n in (0, 1, 7) for what, at, size in
       (("active", 0, 4), ("iterations", 4, 4), ("salt", 8, 32),
        ("offset", 40, 4), ("stripes", 44, 4))},
}
ACTIVE, INACTIVE = 0x00ac71f3, 0x0000dead

NUMBERS = (0, 1, 7, 64, 4000, 0x7fffffff, 0x80000000, 0xfffffff8, 0xffffffff,
           ACTIVE, INACTIVE)
TEXTS = (b"", b"x" * 32, b"aes\0junk", b"xts-plain64:", b"cbc-essiv:none",
         b"xts-essiv:sha256", b"\xff" * 32, b"%s%n%s%n", b"sha512",
         b"cbc-plain64", b"cast5")


def make(tmp):
    path = os.path.join(tmp, "luks.qcow2")
    raw = os.path.join(tmp, "plain.raw")
    chains.write_file(raw, images.pattern(1, 256 * KiB))
    images.create_encrypted(path, "luks", chains.PASSPHRASE, 256 * KiB)
    qf.qemu_img("convert", *chains.SECRET, "-f", "raw", "-n",
                "--target-image-opts", raw, "driver=qcow2,"
                f"encrypt.key-secret=s,file.filename={path}")
    return path, raw


def open_it(tmp, path, raw):
    """Serve and copy the image; True if that was possible."""
    copy = os.path.join(tmp, "copy")
    command = [qf.nbdkit(), "-U", "-", "-r", "--filter=qcow2", "file", path,
               "qcow2-passphrase=" + open_it.passphrase, "--run",
               f'{qf.tool("nbdcopy")} "$uri" {copy}']
    began = time.monotonic()
    with open(os.path.join(tmp, "errors"), "w+b") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                   stdout=errors, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        message = errors.read().decode(errors="replace")
    took = time.monotonic() - began
    qf.check(took < LIMIT, f"took {took:.1f} s: {message}")
    qf.check(SLOW or usage.ru_maxrss * KiB < MEMORY,
             f"took {usage.ru_maxrss} KiB")
    qf.check(process.returncode in (0, 1),
             f"exit status {process.returncode}: {message}")
    qf.check(not qf.SANITIZER_REPORT.search(message), message)
    if process.returncode == 1:
        qf.check("error: " in message, f"no reason: {message!r}")
        return False
    qf.run(["cmp", raw, copy])
    return True


def values(size):
    if size == 4:
        return [struct.pack(">I", n) for n in NUMBERS]
    if size == 2:
        return [struct.pack(">H", n & 0xffff) for n in NUMBERS]
    return [text[:size].ljust(size, b"\0") for text in TEXTS]


def try_patches(tmp, path, raw, patches):
    """(what, offset, bytes): each alone; how many could be opened."""
    opened = 0

    def attempt(patch):
        nonlocal opened
        what, at, value = patch
        before = edit.read_at(path, at, len(value))
        edit.write_at(path, at, value)
        try:
            opened += open_it(tmp, path, raw)
        except qf.Fail as fail:
            raise qf.Fail(f"{what} = {value[:16]!r}: {fail}") from None
        finally:
            edit.write_at(path, at, before)
    qf.each(patches, attempt)
    print(f"{opened} of {len(patches)} could be opened")
    return opened


def crypto_header(path):
    """Where the extension's data are, and the header they refer to."""
    with open(path, "rb") as file:
        content = file.read(64 * KiB)
    at = content.index(struct.pack(">II", CRYPTO_EXTENSION, 16)) + 8
    return at, struct.unpack(">QQ", content[at:at + 16])[0]


def sample(patches):
    return patches[::12] if SLOW else patches


def test_luks_header(tmp):
    path, raw = make(tmp)
    qf.check(open_it(tmp, path, raw), "the image itself cannot be opened")
    _, header = crypto_header(path)
    patches = [(name, header + at, value)
               for name, (at, size) in FIELDS.items()
               for value in values(size)]
    opened = try_patches(tmp, path, raw, sample(patches))
    qf.check(opened > 0, "not one of them could be opened")


def test_two_slots(tmp):
    """Slots that overlap, or all of which are said to be active."""
    path, raw = make(tmp)
    _, header = crypto_header(path)
    first = edit.read_at(path, header + SLOT, 48)
    offset = struct.unpack(">I", first[40:44])[0]
    for shift in (0, 1, -1, 7):
        slot = first[:40] + struct.pack(">I", (offset + shift) & 0xffffffff) \
            + first[44:]
        edit.write_at(path, header + SLOT + 48, slot)
        open_it(tmp, path, raw)
    for iterations in (1000, 0xffffffff):
        for n in range(1, 8):
            at = header + SLOT + n * 48
            edit.write_at(path, at, struct.pack(">II", ACTIVE, iterations))
        open_it(tmp, path, raw)


def test_extension(tmp):
    """Where the header is said to be."""
    path, raw = make(tmp)
    at, header = crypto_header(path)
    size = os.path.getsize(path)
    numbers = (0, 1, 511, 512, header + 1, header + 512, size - 512, size,
               size + 512, 1 << 56, 1 << 63, (1 << 64) - 512, (1 << 64) - 1)
    patches = [("offset", at, struct.pack(">Q", n)) for n in numbers] \
        + [("length", at + 8, struct.pack(">Q", n)) for n in numbers] \
        + [("length of extension", at - 4, struct.pack(">I", n))
           for n in (0, 8, 15, 17, 24, 0xffffffff)] \
        + [("type", at - 8, struct.pack(">I", 0x12345678))] \
        + [("method", 32, struct.pack(">I", n)) for n in (3, 99)]
    try_patches(tmp, path, raw, sample(patches))


def test_truncated(tmp):
    path, raw = make(tmp)
    _, header = crypto_header(path)
    with open(path, "rb") as file:
        content = file.read()
    cuts = [header, header + 1, header + 207, header + 208, header + 591,
            header + 592, header + 4096, header + 8 * 512 + 100,
            header + 100000]
    for cut in cuts:
        with open(path, "wb") as file:
            file.write(content[:cut])
        qf.check(not open_it(tmp, path, raw), f"cut at {cut}: opened")


def test(tmp):
    qf.need("qemu-img", "nbdcopy")
    if os.environ.get("LIBGCRYPT") == "no":
        raise qf.Skip("built without libgcrypt")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    open_it.passphrase = chains.passphrase_file(tmp)
    qf.parts(tmp, test_luks_header, test_two_slots, test_extension,
             test_truncated)


qf.main(test)
