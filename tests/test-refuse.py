#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""What is refused, at start and with the reason on stderr.

Messages are matched by their key words only.
"""

import os
import time

import disks
import images
import qcow2edit as edit
import qf
from qf import KiB, MiB

# Nobody waits longer for "no", not even with a sanitizer on a busy machine.
LIMIT = 20


def start(tmp, path, *parameters, how="-f", filters=("qcow2",)):
    """Start nbdkit in one of its three ways; its exit status and stderr."""
    sock = os.path.join(tmp, "sock")
    pidfile = os.path.join(tmp, "pid")
    command = [qf.nbdkit(), "-r"]
    command += [f"--filter={name}" for name in filters]
    if how != "run":
        command += ["-U", sock, "-P", pidfile]
    if how == "-f":
        command += ["-f"]
    command += ["file", path, *parameters]
    if how == "run":
        # It must not come so far as to run this.
        command += ["--run", f"touch {pidfile}"]
    began = time.monotonic()
    done = qf.run(command, ok=None, timeout=60)
    took = time.monotonic() - began
    qf.check(took < LIMIT, f"{command}: took {took:.1f} s")
    for leftover in (sock, pidfile):
        qf.check(not os.path.exists(leftover), f"{command}: left {leftover}")
    return done.returncode, done.stderr


def refused(tmp, what, path, words, *parameters, filters=("qcow2",)):
    """Exits non-zero, and all WORDS are in what it says."""
    for how in ("-f", "background", "run"):
        status, message = start(tmp, path, *parameters, how=how,
                                filters=filters)
        what_and_how = f"{what}, {how}"
        qf.check(status in (1, 2), f"{what_and_how}: exit status {status}, "
                 f"stderr {message!r}")
        for word in words:
            qf.check(word.lower() in message.lower(),
                     f"{what_and_how}: no {word!r} in {message!r}")
        qf.check(not qf.SANITIZER_REPORT.search(message), message)


def plain_image(tmp, name="plain", options="", rounds=4):
    b = images.Builder(tmp, name, MiB, options)
    b.create()
    b.mix(rounds=rounds)
    return b.path


def test_not_qcow2(tmp):
    path = os.path.join(tmp, "other")
    for what, content in (
            ("random data", images.NOISE[:64 * KiB]),
            ("zeroes", bytes(MiB)), ("empty", b""), ("one byte", b"Q"),
            ("qcow1", b"QFI\xfb\0\0\0\1" + bytes(4096)),
            ("text", b"hello\n" * 1000),
            ("qed", b"QED\0" + bytes(4096))):
        with open(path, "wb") as file:
            file.write(content)
        # Version 1 has the magic; its message is about the version.
        words = ["version", "1"] if what == "qcow1" else ["not a qcow2 image"]
        refused(tmp, what, path, words)
    with open(path, "wb") as file:
        file.write(b"QFI\xfb\0\0\0\3" + bytes(40))
    refused(tmp, "nothing behind the magic", path, [])


def test_backing_file(tmp):
    base = os.path.join(tmp, "the base.raw")
    path = os.path.join(tmp, "overlay.qcow2")
    with open(base, "wb") as file:
        file.write(b"b" * MiB)
    for name, word in ((base, base), ("the base.raw", "the base.raw"),
                       ('json:{"driver":"null-co"}', "null-co"),
                       ("nbd://localhost/x", "nbd://localhost/x")):
        qf.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F",
                    "raw", path, "1M")
        refused(tmp, f"backing file {name}", path,
                [word, "qcow2-backing"])
        refused(tmp, f"backing file {name}", path,
                [word, "qcow2-backing"], "qcow2-backing=refuse")


def test_data_file(tmp):
    data = os.path.join(tmp, "the data.raw")
    path = os.path.join(tmp, "external.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}",
                path, "1M")
    refused(tmp, "external data file", path, ["the data.raw",
                                              "qcow2-data-file"])
    refused(tmp, "external data file", path,
            ["the data.raw", "qcow2-data-file"], "qcow2-data-file=refuse")


def test_encryption(tmp):
    for form in ("luks", "aes"):
        path = os.path.join(tmp, form + ".qcow2")
        images.create_encrypted(path, form, "opensesame", MiB)
        refused(tmp, f"{form} encryption", path, ["qcow2-passphrase",
                                                  "encrypt"])


def test_incompatible_features(tmp):
    path = plain_image(tmp, "features")
    edit.add_feature_name(path, 0, 41, "Quantum clusters")
    # The same bit of another kind must not lend its name.
    edit.add_feature_name(path, 1, 42, "Harmless")
    edit.set_bits(path, "incompatible", 1 << 41)
    refused(tmp, "bit 41, named", path, ["Quantum clusters"])
    edit.put(path, "incompatible", 1 << 42)
    refused(tmp, "bit 42, not named", path, ["42", "feature"])
    status, message = start(tmp, path)
    qf.check("Harmless" not in message, f"a compatible bit's name: {message}")
    edit.put(path, "incompatible", 1 << 41 | 1 << 63)
    refused(tmp, "bits 41 and 63", path, ["Quantum clusters", "63"])


def test_compression_type(tmp):
    path = plain_image(tmp, "compression", "compression_type=zstd")
    edit.put(path, "compression", 7)
    refused(tmp, "compression type 7", path, ["compression", "7"])


def test_version(tmp):
    path = plain_image(tmp, "version")
    for version in (0, 1, 4, 0xffffffff):
        edit.put(path, "version", version)
        refused(tmp, f"version {version}", path, ["version", str(version)])


def test_parameters(tmp):
    path = plain_image(tmp, "parameters")
    for parameter, word in (("qcow2-cache-size=lots", "size"),
                            ("qcow2-cache-size=-1", "size"),
                            ("qcow2-backing=perhaps", "qcow2-backing"),
                            ("qcow2-data-file=perhaps", "qcow2-data-file"),
                            ("qcow2-snapshot=missing", "missing"),
                            ("qcow2-no-such-thing=1", "no-such-thing")):
        refused(tmp, parameter, path, [word], parameter)


def test_twice(tmp):
    path = plain_image(tmp, "twice")
    refused(tmp, "the filter twice", path, ["qcow2"],
            filters=("qcow2", "qcow2"))
    refused(tmp, "the filter twice, another between", path, ["qcow2"],
            filters=("qcow2", "nozero", "qcow2"))


def test_broken(tmp):
    """What cannot be served is found out at start."""
    good = plain_image(tmp, "good", rounds=8)
    with open(good, "rb") as file:
        content = file.read()
    path = os.path.join(tmp, "broken.qcow2")

    def breaking(what, words, **fields):
        with open(path, "wb") as file:
            file.write(content)
        for field, value in fields.items():
            edit.put(path, field, value)
        refused(tmp, what, path, words)

    breaking("cluster bits", ["cluster"], cluster_bits=8)
    breaking("cluster bits", ["cluster"], cluster_bits=22)
    breaking("L1 table not aligned", ["L1"], l1_offset=0x30001)
    breaking("L1 table too small", ["L1"], l1_size=0)
    breaking("disk size", ["size"], size=1 << 63)
    breaking("encryption method", ["crypt"], crypt=3)
    breaking("header length", ["header"], header_length=72)
    breaking("refcount width", ["refcount"], refcount_order=7)
    breaking("backing file name beyond", ["backing"],
             backing_offset=1 << 30, backing_size=10)


def test_missing_file(tmp):
    refused(tmp, "a file that does not exist", os.path.join(tmp, "nowhere"),
            ["nowhere"])


def test_warning(tmp):
    """A corrupt image is served, with a warning; others without a word."""
    path = plain_image(tmp, "marked")
    oracle = disks.oracle_of(tmp, path)
    for bit, word in ((edit.INCOMPAT_CORRUPT, "corrupt"),
                      (edit.INCOMPAT_DIRTY, None), (0, None)):
        edit.put(path, "incompatible", bit)
        with qf.serve_qcow2(tmp, path) as server:
            disks.verify_disk(server, f"feature bits {bit}", oracle)
            log = server.log()
        qf.check(word in log if word else log == "",
                 f"feature bits {bit}: stderr is {log!r}")


def test(tmp):
    qf.need("qemu-img", "qemu-io")
    qf.parts(tmp, test_not_qcow2, test_backing_file, test_data_file,
             test_encryption, test_incompatible_features,
             test_compression_type, test_version, test_parameters,
             test_twice, test_broken, test_missing_file, test_warning)


qf.main(test)
