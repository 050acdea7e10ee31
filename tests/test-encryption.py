#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Encrypted images: every cipher that qemu-img can make, passphrases,
key slots, and encrypted layers of chains."""

import os
import struct
import time

import chains
import disks
import images
import qcow2edit as edit
import qf
from chains import PASSPHRASE
from qf import KiB, MiB, TiB

LUKS = "encrypt.format=luks"

CRYPTO_EXTENSION = 0x0537be77


def luks(cipher="aes-256", mode="xts", ivgen="plain64", ivhash=None,
         keyhash=None):
    options = [LUKS, f"encrypt.cipher-alg={cipher}",
               f"encrypt.cipher-mode={mode}", f"encrypt.ivgen-alg={ivgen}"]
    if ivgen == "essiv":
        options.append(f"encrypt.ivgen-hash-alg={ivhash or 'sha256'}")
    if keyhash:
        options.append(f"encrypt.hash-alg={keyhash}")
    return ",".join(options)


def ciphers():
    """All that QEMU 7.2 makes; it aborts for 192 bits in other modes."""
    modes = ("xts", "cbc", "ecb", "ctr")
    ivgens = ("plain64", "plain", "essiv")
    for name in ("aes", "serpent", "twofish"):
        for bits in (128, 192, 256):
            for mode in modes if bits != 192 else ("xts",):
                for ivgen in ivgens:
                    yield f"{name}-{bits}", mode, ivgen
        yield f"{name}-128", "cbc", "essiv", "md5"
    for mode in ("cbc", "ecb", "ctr"):
        for ivgen in ("plain64", "plain"):
            yield "cast5-128", mode, ivgen


def some_ciphers():
    """If it takes seconds to make an image: each algorithm and mode."""
    modes = {"aes-128": "cbc", "aes-192": "xts", "aes-256": "ctr",
             "serpent-256": "ecb", "twofish-192": "xts",
             "twofish-256": "xts", "cast5-128": "cbc"}
    return modes.items()


HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")


def make_raw(tmp, size=MiB):
    """What the images of all ciphers hold; with a hole."""
    path = os.path.join(tmp, "plain.raw")
    chains.write_file(path, images.pattern(1, size // 2))
    os.truncate(path, size)
    with open(path, "r+b") as file:
        file.seek(size - 64 * KiB)
        file.write(images.pattern(2, 64 * KiB))
    oracle = disks.Oracle(size)
    oracle.add(0, disks.map_file(path))
    return path, oracle


def convert(tmp, raw, name, options):
    """An encrypted image made from a raw disk."""
    path = os.path.join(tmp, name)
    chains.qemu_img(tmp, "convert", *chains.SECRET, "-f", "raw", "-O",
                    "qcow2", "-o", options + ",encrypt.key-secret=s"
                    + (",encrypt.iter-time=10" if LUKS in options else ""),
                    raw, path)
    return path


def serve(tmp, path, *parameters, passphrases=(PASSPHRASE,)):
    return qf.serve_qcow2(tmp, path, *parameters, *(
        "qcow2-passphrase=" + chains.passphrase_file(tmp, passphrase)
        for passphrase in passphrases))


def verify_cipher(tmp, raw, oracle, cipher):
    path = convert(tmp, raw, "cipher.qcow2",
                   luks(*cipher) + ",cluster_size=4k")
    with serve(tmp, path) as server:
        disks.verify_disk(server, str(cipher), oracle, reads=30,
                          connections=2)


def test_ciphers(tmp):
    raw, oracle = make_raw(tmp)
    chosen = list(ciphers() if chains.compiler() else some_ciphers())
    qf.each(chosen, lambda cipher: verify_cipher(tmp, raw, oracle, cipher))
    print(len(chosen), "ciphers")


def test_hashes(tmp):
    raw, oracle = make_raw(tmp)
    qf.each(HASHES, lambda name: verify_cipher(
        tmp, raw, oracle, ("aes-128", "cbc", "plain64", None, name)))


def test_large_sectors(tmp):
    """Sectors behind 2 TiB, where plain and plain64 differ.  With an
    external data file that is where the guest's data is."""
    for ivgen in ("plain", "plain64", "essiv"):
        layer = chains.Layer(tmp, "large", 3 * TiB, luks(
            "aes-128", "cbc", ivgen) + ",cluster_size=2M,data_file=large.raw")
        layer.create()
        for place in (0, 2 * TiB - 4 * KiB, 2 * TiB + 68 * MiB):
            layer.write(place, 8 * KiB)
        layer.run()
        place = 2 * TiB - MiB
        window = f"driver=raw,offset={place},size={80 * MiB}," + ",".join(
            f"file.{key}={value}" for key, value in
            {"driver": "qcow2", "file.filename": layer.name,
             **layer.open_options()}.items())
        chains.qemu_img(tmp, "convert", *chains.SECRET, "--image-opts",
                        window, "-O", "raw", "window.raw")
        content = disks.map_file(os.path.join(tmp, "window.raw"))
        with chains.serve(layer, f"qcow2-data-file=dir:{tmp}") as server:
            handle = server.connect()
            for at in range(0, len(content), MiB):
                disks.compare(ivgen, place + at,
                              handle.pread(MiB, place + at),
                              content[at:at + MiB])
            handle.shutdown()
        os.unlink(os.path.join(tmp, "large.raw"))


LAYERS = (
    luks(), luks() + ",compat=0.10", luks() + ",cluster_size=512",
    luks("serpent-128", "cbc", "essiv") + ",cluster_size=4k",
    luks("twofish-256", "ctr") + ",cluster_size=2M",
    luks() + ",extended_l2=on", luks() + ",compression_type=zstd",
    "encrypt.format=aes", "encrypt.format=aes,compat=0.10",
    "encrypt.format=aes,cluster_size=512",
    "encrypt.format=aes,extended_l2=on,cluster_size=16k",
)


def test_layers(tmp):
    """All states of clusters, compressed ones too, which nobody encrypts,
    in images encrypted with LUKS or with legacy AES."""
    def verify(options):
        layer = chains.Layer(tmp, "layer", 2 * MiB + 512, options).fill()
        with chains.serve(layer) as server:
            chains.verify(server, options, layer)
    qf.each(LAYERS, verify)


def test_preallocated(tmp):
    """Encrypted holes do not read as zeroes, so the map must not say so."""
    def verify(options):
        layer = chains.Layer(tmp, "prealloc", 3 * MiB, options)
        layer.create()
        layer.write(MiB, 64 * KiB)
        layer.zero(2 * MiB, 64 * KiB)
        layer.run()
        with chains.serve(layer) as server:
            chains.verify(server, options, layer, reads=30)
    qf.each([f"{form},preallocation={mode}" for form in
             (LUKS, "encrypt.format=aes") for mode in
             ("metadata", "falloc", "full")], verify)


def test_chains(tmp):
    aes = "encrypt.format=aes"
    cases = {
        "over raw": ((2 * MiB + 100, "raw"), (2 * MiB, luks())),
        "plain over encrypted": ((2 * MiB, luks()), (3 * MiB, "")),
        "encrypted over plain": ((3 * MiB, "cluster_size=4k"),
                                 (2 * MiB, luks())),
        "all": ((2 * MiB, luks()), (3 * MiB, luks("serpent-256", "cbc")),
                (MiB, "compat=0.10," + aes),
                (2 * MiB, aes + ",cluster_size=4k"),
                (3 * MiB, luks() + ",extended_l2=on")),
        "some": ((MiB + 5, "raw"), (3 * MiB, luks("twofish-128", "xts")),
                 (3 * MiB, "compression_type=zstd,cluster_size=4k"),
                 (2 * MiB, aes), (2 * MiB, "extended_l2=on")),
    }

    def verify(name):
        top = chains.build(tmp, name.replace(" ", "-"), *cases[name])
        with chains.serve(top) as server:
            chains.verify(server, name, top)
    qf.each(cases, verify)


def test_snapshots(tmp):
    for form in (luks(), "encrypt.format=aes"):
        layer = chains.Layer(tmp, "snapshots", MiB, form).fill(rounds=6)
        layer.snapshot("-c", "one")
        layer.mix(rounds=6)
        with chains.serve(layer) as server:
            chains.verify(server, form, layer, reads=20)
            chains.verify_snapshot(server, form, layer, "one")


def amend(tmp, name, passphrase, *options, new="", more=""):
    """Change key slots; passphrase is one that opens the image."""
    chains.qemu_img(tmp, "amend", *chains.SECRET,
                    "--object", f"secret,id=old,data={passphrase}",
                    "--object", f"secret,id=new,data={new}", "--image-opts",
                    "driver=qcow2,encrypt.key-secret=old,"
                    f"file.filename={name}{more}", "-o", ",".join(options))


def test_key_slots(tmp):
    raw, oracle = make_raw(tmp)
    path = convert(tmp, raw, "slots.qcow2", luks())
    slots = {slot: f"number {slot}" for slot in range(1, 8)}
    for slot, passphrase in slots.items():
        amend(tmp, path, PASSPHRASE, "encrypt.state=active",
              "encrypt.new-secret=new", f"encrypt.keyslot={slot}",
              "encrypt.iter-time=10", new=passphrase)
    slots[0] = PASSPHRASE
    for slot, passphrase in slots.items():
        with serve(tmp, path, passphrases=[passphrase]) as server:
            disks.verify_disk(server, f"slot {slot}", oracle, connections=1)
    amend(tmp, path, PASSPHRASE, "encrypt.state=inactive",
          "encrypt.keyslot=3")
    amend(tmp, path, PASSPHRASE, "encrypt.state=inactive",
          "encrypt.keyslot=0")
    for slot in (0, 3):
        chains.refused(f"slot {slot}", path, ["passphrase"],
                       "qcow2-passphrase="
                       + chains.passphrase_file(tmp, slots[slot]))
    with serve(tmp, path, passphrases=[slots[7]]) as server:
        disks.verify_disk(server, "slot 7 of six", oracle, connections=1)


def test_passphrases(tmp):
    """All kinds of them, and all ways to give them."""
    raw, oracle = make_raw(tmp)
    for passphrase in ("x", " spaces ", "-", "-7", "+file", "a=b,c:d",
                       "Grüße %s %n", "long" * 60):
        path = os.path.join(tmp, "odd.qcow2")
        secret = os.path.join(tmp, "secret")
        chains.write_file(secret, passphrase.encode())
        chains.qemu_img(
            tmp, "convert", "--object", f"secret,id=s,file={secret}", "-f",
            "raw", "-O", "qcow2", "-o", LUKS + ",encrypt.key-secret=s,"
            "encrypt.iter-time=10", raw, path)
        with serve(tmp, path, passphrases=[passphrase]) as server:
            disks.verify_disk(server, passphrase, oracle, connections=1)

    # Left in the last image: the longest.
    with open(secret, encoding="utf-8") as file:
        copy_with_descriptor(tmp, path, file.fileno(), raw)
    with qf.serve_qcow2(tmp, path,
                        f"qcow2-passphrase={passphrase}") as server:
        disks.verify_disk(server, "on the command line", oracle)


def copy_with_descriptor(tmp, path, fd, raw):
    copy = os.path.join(tmp, "copy.raw")
    qf.run([qf.nbdkit(), "-U", "-", "-r", "--filter=qcow2", "file", path,
            f"qcow2-passphrase=-{fd}",
            "--run", f"{qf.tool('nbdcopy')} \"$uri\" {copy}"], pass_fds=[fd])
    qf.run(["cmp", raw, copy])


def test_several_passphrases(tmp):
    """Layers with different ones; the order does not matter."""
    base = chains.Layer(tmp, "first", MiB, luks())
    base.create()
    base.write(0, 512 * KiB)
    base.run()
    oracle = chains.oracle_of(base)
    top = chains.Layer(tmp, "second", MiB, luks(), base)
    top.create()
    below = ",backing.encrypt.key-secret=s"
    amend(tmp, top.name, PASSPHRASE, "encrypt.state=active",
          "encrypt.new-secret=new", "encrypt.iter-time=10", new="another",
          more=below)
    amend(tmp, top.name, "another", "encrypt.state=inactive",
          "encrypt.keyslot=0", more=below)
    for order in ((PASSPHRASE, "another"), ("another", PASSPHRASE),
                  ("neither", "another", PASSPHRASE)):
        with serve(tmp, top.path, f"qcow2-backing=dir:{tmp}",
                   passphrases=order) as server:
            disks.verify_disk(server, f"passphrases {order}", oracle)
    for missing in (PASSPHRASE, "another"):
        chains.refused(f"only {missing}", top.path, ["passphrase"],
                       f"qcow2-backing=dir:{tmp}", "qcow2-passphrase="
                       + chains.passphrase_file(tmp, missing),
                       forbidden=[missing])


def test_wrong(tmp):
    raw, _ = make_raw(tmp)
    wrong = "swordfish"
    parameter = "qcow2-passphrase=" + chains.passphrase_file(tmp, wrong)
    path = convert(tmp, raw, "wrong.qcow2", luks())
    chains.refused("no passphrase", path, ["encrypted", "qcow2-passphrase"])
    chains.refused("wrong passphrase", path,
                   ["passphrase", "does not open"], parameter,
                   forbidden=[wrong])
    for what, value in (("no file", "+" + tmp + "/missing"),
                        ("no such descriptor", "-99"), ("a tty", "-")):
        message = chains.start_fails(tmp, path, "qcow2-passphrase=" + value)
        qf.check(message, what)
    old = convert(tmp, raw, "aes.qcow2", "encrypt.format=aes")
    chains.refused("no passphrase, AES", old, ["encrypted",
                                               "qcow2-passphrase"])

    if qf.plugin_exists("plugin", "nbd"):
        with chains.nbd_server(tmp, path) as remote, \
             qf.serve(tmp, "-r", "--filter=qcow2", "nbd",
                      f"uri={remote.uri()}", parameter) as server:
            for _ in range(2):
                chains.connection_refused(server, "wrong, remote",
                                          ["passphrase", "does not open"])
            qf.check(wrong not in server.log(), server.log())


def test_secrecy(tmp):
    """Nothing of the passphrase in the debug messages."""
    raw, oracle = make_raw(tmp)
    secret = PASSPHRASE.encode()
    for options in (luks(), "encrypt.format=aes"):
        path = convert(tmp, raw, "debug.qcow2", options)
        with serve(tmp, path, "-v", "-D", "qcow2.verbose=1", "-D",
                   "nbdkit.backend.datapath=1") as server:
            disks.verify_disk(server, options, oracle, reads=20)
            log = server.log().lower()
        qf.check("debug" in log, "no debug messages")
        for form in (secret.decode(), secret.hex(), secret.hex(" "),
                     secret[:8].hex(), secret[:8].decode()):
            qf.check(form.lower() not in log, f"{form!r} in the log")


def test_key_is_kept(tmp):
    """A key that takes a second to find is looked for once."""
    if not chains.compiler():
        raise qf.Skip("no C compiler to make the image fast")
    raw, oracle = make_raw(tmp)
    path = os.path.join(tmp, "slow.qcow2")
    chains.qemu_img(tmp, "convert", *chains.SECRET, "-f", "raw", "-O",
                    "qcow2", "-o", LUKS + ",encrypt.key-secret=s,"
                    "encrypt.iter-time=60000", raw, path)
    began = time.monotonic()
    with serve(tmp, path) as server:
        first = time.monotonic() - began
        disks.verify_disk(server, "slow key", oracle, connections=4)
        times = []
        for _ in range(5):
            began = time.monotonic()
            server.connect().shutdown()
            times.append(time.monotonic() - began)
    print(f"the key took {first:.2f} s, connections {times}")
    qf.check(min(times) < first / 4, f"start {first} s, then {times}")


def test_absurd_iterations(tmp):
    """Refused without trying."""
    raw, _ = make_raw(tmp)
    path = convert(tmp, raw, "absurd.qcow2", luks())
    header = struct.unpack(">Q", dict(edit.extensions(path))[
        CRYPTO_EXTENSION][:8])[0]
    parameter = "qcow2-passphrase=" + chains.passphrase_file(tmp)
    for what, at in (("master key", 164), ("key slot", 208 + 4)):
        before = edit.read_at(path, header + at, 4)
        edit.write_at(path, header + at, b"\xff" * 4)
        chains.refused(f"{what}: iterations", path,
                       ["iterations", "4294967295"], parameter)
        edit.write_at(path, header + at, before)


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdinfo", "nbdcopy")
    if os.environ.get("LIBGCRYPT") == "no":
        raise qf.Skip("built without libgcrypt")
    qf.parts(tmp, test_ciphers, test_hashes, test_large_sectors, test_layers,
             test_preallocated, test_chains, test_snapshots, test_key_slots,
             test_passphrases, test_several_passphrases, test_wrong,
             test_secrecy, test_key_is_kept, test_absurd_iterations)


qf.main(test)
