#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Encrypted images whose headers were made to do harm: the right data, or
an error that says why; soon, without taking much memory, and without
telling secrets.

What QEMU opens must have the data that QEMU reads; what it refuses we may
open if the data are those of the intact image.
"""

import ctypes
import hashlib
import os
import re
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
LIMIT = 60 if qf.SLOW else 8        # seconds
MEMORY = 64 * MiB
SIZE = 256 * KiB

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


def make(tmp, options="encrypt.format=luks"):
    path = os.path.join(tmp, "luks.qcow2")
    raw = os.path.join(tmp, "plain.raw")
    chains.write_file(raw, images.pattern(1, SIZE))
    if "luks" in options:
        options += ",encrypt.iter-time=10"
    chains.qemu_img(tmp, "convert", *chains.SECRET, "-f", "raw", "-O",
                    "qcow2", "-o", options + ",encrypt.key-secret=s",
                    raw, path)
    return path, raw


def qemu_opens(path, out):
    """Convert with QEMU; False if it refuses the image."""
    options = f"driver=qcow2,file.filename={path}"
    if edit.get(path, "crypt"):
        options += ",encrypt.key-secret=s"
    return qf.run([qf.tool("qemu-img"), "convert", *chains.SECRET,
                   "--image-opts", options, "-O", "raw", out],
                  ok=None).returncode == 0


def open_it(tmp, path, raw):
    """Serve and copy the image; True if that was possible."""
    copy = os.path.join(tmp, "copy")
    # Without timeout(1), which also ends what nbdkit has started, a hang
    # would be found, but not where.
    pid = os.path.join(tmp, "pid")
    command = ["timeout", "-s", "KILL", str(LIMIT), qf.nbdkit(), "-U", "-",
               "-P", pid, "-r", "--filter=qcow2", "file", path,
               "qcow2-passphrase=" + open_it.passphrase, "--run",
               f'{qf.tool("nbdcopy")} "$uri" {copy}; status=$?; '
               f'grep VmHWM /proc/$(cat {pid})/status; exit $status']
    began = time.monotonic()
    with open(os.path.join(tmp, "errors"), "w+b") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                   stdout=errors, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        message = errors.read().decode(errors="replace")
    took = time.monotonic() - began
    # Before nbdkit forks, and in the server.
    memory = KiB * max([usage.ru_maxrss, *map(
        int, re.findall(r"VmHWM:\s+(\d+) kB", message))])
    open_it.slowest = max(open_it.slowest, took)
    open_it.largest = max(open_it.largest, memory)
    qf.check(took < LIMIT, f"took {took:.1f} s: {message}")
    qf.check(qf.SLOW or memory < MEMORY, f"took {memory >> 10} KiB")
    qf.check(process.returncode in (0, 1),
             f"exit status {process.returncode}: {message}")
    qf.check(not qf.SANITIZER_REPORT.search(message), message)
    qf.check(chains.PASSPHRASE not in message, message)
    qf.check(all(c.isprintable() or c in "\n\t" for c in message),
             f"control characters in {message!r}")
    if process.returncode == 1:
        qf.check("error: " in message, f"no reason: {message!r}")
        return False
    qf.check("VmHWM" in message, f"the server has gone: {message!r}")
    theirs = os.path.join(tmp, "theirs")
    qf.run(["cmp", theirs if qemu_opens(path, theirs) else raw, copy])
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
    print(f"{opened} of {len(patches)} could be opened; the slowest took "
          f"{open_it.slowest:.1f} s, the largest {open_it.largest >> 20} MiB")
    return opened


def crypto_header(path):
    """Where the extension's data are, and the header they refer to."""
    with open(path, "rb") as file:
        content = file.read(64 * KiB)
    at = content.index(struct.pack(">II", CRYPTO_EXTENSION, 16)) + 8
    return at, struct.unpack(">QQ", content[at:at + 16])[0]


def sample(patches):
    return patches[::12] if qf.SLOW else patches


def test_luks_header(tmp):
    path, raw = make(tmp)
    qf.check(open_it(tmp, path, raw), "the image itself cannot be opened")
    _, header = crypto_header(path)
    patches = [(name, header + at, value)
               for name, (at, size) in FIELDS.items()
               for value in values(size)
               # So many iterations are slow but not forbidden.
               if not (name.endswith("iterations") and
                       value == struct.pack(">I", ACTIVE))]
    opened = try_patches(tmp, path, raw, sample(patches))
    qf.check(opened > 0, "not one of them could be opened")


def read_slot(path, header, number):
    """(state, iterations, salt, sector, stripes)"""
    return struct.unpack(">II32sII", edit.read_at(
        path, header + SLOT + number * 48, 48))


def slot_with(slot, **changes):
    names = ("state", "iterations", "salt", "sector", "stripes")
    return struct.pack(">II32sII", *(
        changes.get(name, old) for name, old in zip(names, slot)))


def test_slots(tmp):
    """Slots that overlap, lie at the ends of things, or are all active."""
    path, raw = make(tmp)
    at, header = crypto_header(path)
    length, = struct.unpack(">Q", edit.read_at(path, at + 8, 8))
    first = read_slot(path, header, 0)
    second = header + SLOT + 48
    sector = first[3]
    material = 64 * 4000 // 512
    inside = length // 512
    beyond = -(-(os.path.getsize(path) - header) // 512)
    sectors = {1, 7, 8, 9, sector - material, sector - 1, sector, sector + 1,
               sector + material - 1, sector + material, inside - material,
               inside - material + 1, inside - 1, inside, inside + 1,
               beyond - material, beyond - 1, beyond, beyond + 1, 1 << 22,
               1 << 23, (1 << 32) - material, (1 << 32) - 1}
    sectors = {n for n in sectors if n >= 0}
    patches = [("slot 0, sector", header + SLOT, slot_with(first, sector=n))
               for n in sorted(sectors)]
    patches += [(f"slot 1 {state:#x}, sector", second,
                 slot_with(first, state=state, sector=n))
                for state in (ACTIVE, INACTIVE) for n in sorted(sectors)]
    # Those that are tried before the right one, and those behind it.
    slots = [read_slot(path, header, n) for n in range(8)]
    for iterations in (0, 1, 1000, 200000, 0x7fffffff, 0xffffffff):
        for right in (0, 7):
            others = [slot_with(slot, state=ACTIVE, iterations=iterations)
                      for slot in slots[1:]]
            mine = slot_with(first, sector=slots[right][3]) \
                if right == 0 else slot_with(first)
            content = [*others, mine] if right else [mine, *others]
            patches.append((f"all active, {iterations} iterations, {right}",
                            header + SLOT, b"".join(content)))
    patches.append(("no slot", header + SLOT, b"".join(
        slot_with(slot, state=INACTIVE) for slot in slots)))
    patches.append(("slots of zeroes", header + SLOT, bytes(8 * 48)))
    opened = try_patches(tmp, path, raw, sample(patches))
    qf.check(opened > 0, "not one of them could be opened")


def test_extension(tmp):
    """Where the header is said to be."""
    path, raw = make(tmp)
    at, header = crypto_header(path)
    size = os.path.getsize(path)
    numbers = (0, 1, 511, 512, header + 1, header + 512, header - 64 * KiB,
               header + 64 * KiB, size - 512, size, size + 512, 1 << 32,
               1 << 56, 1 << 63, (1 << 64) - 512, (1 << 64) - 64 * KiB,
               (1 << 64) - header, (1 << 64) - 1)
    patches = [("offset", at, struct.pack(">Q", n)) for n in numbers] \
        + [("length", at + 8, struct.pack(">Q", n))
           for n in (*numbers, 591, 592, 593, 4096 + 64 * 4000)] \
        + [("both", at, struct.pack(">QQ", n, m))
           for n in (0, size, (1 << 64) - 64 * KiB)
           for m in (0, 64 * KiB, 1 << 63, (1 << 64) - 1)] \
        + [("length of extension", at - 4, struct.pack(">I", n))
           for n in (0, 8, 15, 17, 24, 0x7fffffff, 0xffffffff)]
    try_patches(tmp, path, raw, sample(patches))


def test_method(tmp):
    """The method and the extension must say the same."""
    for compat in ("0.10", "1.1"):
        path, raw = make(tmp, f"encrypt.format=luks,compat={compat}")
        at, _ = crypto_header(path)
        patches = [("method", 32, struct.pack(">I", n))
                   for n in (0, 1, 3, 99, 1 << 31, 0xffffffff)] \
            + [("type of extension", at - 8, struct.pack(">I", 0x12345678)),
               ("no extension", at - 8, bytes(8))]
        qf.equal("opened", try_patches(tmp, path, raw, patches), 0)
        # With nothing that says LUKS the data cannot be right, but they
        # are those that QEMU has.
        edit.write_at(path, at - 8, struct.pack(">I", 0x12345678))
        for method in (0, 1):
            edit.put(path, "crypt", method)
            qf.check(open_it(tmp, path, raw), f"method {method}: refused")
    path, raw = make(tmp, "encrypt.format=aes")
    edit.put(path, "crypt", 2)
    qf.check(not open_it(tmp, path, raw), "AES as LUKS: opened")
    edit.put(path, "crypt", 1)
    qf.check(open_it(tmp, path, raw), "AES: refused")
    found = edit.extensions(path)
    for content in (bytes(16), struct.pack(">QQ", 64 * KiB, 64 * KiB), b""):
        edit.set_extensions(path, [(CRYPTO_EXTENSION, content), *found])
        qf.check(not open_it(tmp, path, raw), f"AES with {content}: opened")


def test_truncated(tmp):
    path, raw = make(tmp)
    _, header = crypto_header(path)
    with open(path, "rb") as file:
        content = file.read()
    cuts = [104, 113, header - 1, header, header + 1, header + 207,
            header + 208, header + 591, header + 592, header + 4096,
            header + 8 * 512 + 100, header + 100000]
    for cut in cuts:
        with open(path, "wb") as file:
            file.write(content[:cut])
        qf.check(not open_it(tmp, path, raw), f"cut at {cut}: opened")


# -------------------------------------------------------------- secrets

def decrypt_xts(key, content):
    """AES-256 in XTS mode, IVs plain64, by libgcrypt."""
    try:
        gcrypt = ctypes.CDLL("libgcrypt.so.20")
    except OSError:
        raise qf.Skip("no libgcrypt.so.20") from None
    gcrypt.gcry_check_version(None)
    handle = ctypes.c_void_p()
    aes256, xts = 9, 13
    results = [gcrypt.gcry_cipher_open(ctypes.byref(handle), aes256, xts, 0),
               gcrypt.gcry_cipher_setkey(handle, key, ctypes.c_size_t(64))]
    out = ctypes.create_string_buffer(512)
    plain = []
    for i in range(len(content) // 512):
        results.append(gcrypt.gcry_cipher_setiv(
            handle, struct.pack("<QQ", i, 0), ctypes.c_size_t(16)))
        results.append(gcrypt.gcry_cipher_decrypt(
            handle, out, ctypes.c_size_t(512),
            content[i * 512:(i + 1) * 512], ctypes.c_size_t(512)))
        plain.append(out.raw)
    gcrypt.gcry_cipher_close(handle)
    qf.check(not any(results), f"libgcrypt: {set(results)}")
    return b"".join(plain)


def find_keys(path):
    """The key of slot 0 and the master key; as the LUKS1 format says."""
    _, header = crypto_header(path)
    _, iterations, salt, sector, _ = read_slot(path, header, 0)
    slot_key = hashlib.pbkdf2_hmac("sha256", chains.PASSPHRASE.encode(),
                                   salt, iterations, 64)
    stripes = decrypt_xts(slot_key, edit.read_at(
        path, header + sector * 512, 64 * 4000))
    key = bytes(64)
    for i in range(4000):
        if i > 0:
            key = b"".join(hashlib.sha256(
                struct.pack(">I", n) + key[n * 32:n * 32 + 32]).digest()
                for n in range(2))
        key = bytes(a ^ b for a, b in zip(key, stripes[i * 64:]))
    digest, salt, iterations = struct.unpack(
        ">20s32sI", edit.read_at(path, header + 112, 56))
    qf.equal("digest of the master key found by the test", hashlib.pbkdf2_hmac(
        "sha256", key, salt, iterations, 20), digest)
    return slot_key, key


def forms(secret):
    """What it would look like in a log, all or a part of it."""
    for part in (secret[:8], secret[-8:], secret[32:40] or secret[:8]):
        yield part
        for separator in ("", " ", ":", ", 0x", "\\x"):
            text = separator.join(f"{byte:02x}" for byte in part)
            yield text.encode()


def test_secrecy(tmp):
    """All messages there are, for good and bad headers."""
    path, raw = make(tmp)
    _, header = crypto_header(path)
    secrets = [chains.PASSPHRASE.encode(), *find_keys(path)]
    verbose = ("-v", "-D", "qcow2.verbose=1", "-D",
               "nbdkit.backend.datapath=1",
               "-D", "nbdkit.backend.controlpath=1")

    def check_log(what, log):
        qf.check("debug:" in log, f"{what}: no debug messages")
        log = log.lower().encode()
        for secret in secrets:
            for form in forms(secret):
                qf.check(form.lower() not in log,
                         f"{what}: {form!r} is in {log!r}")

    parameter = "qcow2-passphrase=" + open_it.passphrase
    with qf.serve_qcow2(tmp, path, *verbose, parameter) as server:
        handle = server.connect()
        handle.pread(SIZE, 0)
        handle.shutdown()
        check_log("intact", server.log())
    for name in ("cipher name", "cipher mode", "hash", "digest", "salt",
                 "iterations", "slot 0 active", "slot 0 salt",
                 "slot 0 iterations", "slot 0 offset", "slot 0 stripes"):
        at, size = FIELDS[name]
        before = edit.read_at(path, header + at, size)
        for value in (b"\xff" * size, before[::-1]):
            edit.write_at(path, header + at, value)
            if value != before:
                check_log(name, chains.start_fails(tmp, path, parameter,
                                                   *verbose))
        edit.write_at(path, header + at, before)


def test_passphrase(tmp):
    """Wrong or not given: one error, however many slots are active."""
    path, _ = make(tmp)
    _, header = crypto_header(path)
    wrong = "qcow2-passphrase=" + chains.passphrase_file(tmp, "sword fish")
    for active in (1, 8, 0):
        for n in range(8):
            edit.write_at(path, header + SLOT + n * 48, slot_with(
                read_slot(path, header, n), iterations=1000,
                state=ACTIVE if n < active else INACTIVE))
        what = f"{active} slots"
        chains.refused(f"{what}, none given", path,
                       ["encrypted (LUKS)", "qcow2-passphrase"])
        chains.refused(f"{what}, a wrong one", path,
                       ["the passphrase does not open"], wrong,
                       forbidden=["sword fish"])
        chains.refused(f"{what}, three wrong ones", path,
                       ["the passphrase does not open"], wrong, wrong, wrong,
                       forbidden=["sword fish"])


def test(tmp):
    qf.need("qemu-img", "nbdcopy")
    if os.environ.get("LIBGCRYPT") == "no":
        raise qf.Skip("built without libgcrypt")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    open_it.passphrase = chains.passphrase_file(tmp)
    open_it.slowest = open_it.largest = 0
    qf.parts(tmp, test_luks_header, test_slots, test_extension, test_method,
             test_truncated, test_secrecy, test_passphrase)


qf.main(test)
