#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Bitmaps that are kept in the image that the qcow2 filter serves: images
of all kinds, behind plugins and filters of all kinds.

Guests cannot write to images, but to a cow filter above them.
"""

import contextlib
import os

import nbd
import persist
import qf
import qmp
from persist import AUTO, IN_USE, MiB, info, qemu_runs, sound

SIZE = 64 * MiB
CHAIN = ("--filter=dirty-tracking", "--filter=bitmap-persist",
         "--filter=cow", "--filter=qcow2")
WRITES = [(0, 1), (MiB - 100, 200), (5 * MiB + 3, 300000), (SIZE - 7, 7)]
GRANULARITY = 65536


def make_image(tmp, *options, size=SIZE, name="i.qcow2"):
    path = os.path.join(tmp, name)
    words = [word for option in options for word in ("-o", option)]
    qf.qemu_img("create", "-q", "-f", "qcow2", *words, path, str(size))
    return path


def fill(path):
    qf.qemu_io(path, ["write -q -P 7 1M 3M", "write -q -P 9 40M 100k"])


def try_writes(tmp, path, *args, check=True):
    """Record writes in a new bitmap and in one of QEMU's; QEMU then finds
    both as they should be."""
    qf.qemu_img("bitmap", "--add", "-g", str(GRANULARITY), path, "theirs")
    expected = persist.granules(WRITES, GRANULARITY, SIZE)
    with persist.serve(tmp, *args, "dirty-bitmap=ours,persistent=on,"
                       f"granularity={GRANULARITY}", filters=CHAIN) as server:
        persist.write_some(server, WRITES)
        for name in ("ours", "theirs"):
            qf.equal(name, persist.our_runs(server, name), expected)
        server.control.when_free("block-dirty-bitmap-add", node="disk",
                                 name="later", persistent=True)
    if check:
        sound(path)
    qf.equal("flags", {name: flags for name, (_, flags)
                       in info(path).items()},
             {"ours": ["auto"], "theirs": ["auto"], "later": ["auto"]})
    for name in ("ours", "theirs"):
        qf.equal(name, qemu_runs(tmp, path, name), expected)
    qf.equal("later", qemu_runs(tmp, path, "later"), [])


def test_kinds(tmp):
    """Cluster sizes, refcounts, tables: metadata in every form."""
    for number, options in enumerate((
            ("cluster_size=512",), ("cluster_size=2M",),
            ("refcount_bits=1",), ("refcount_bits=64",),
            ("extended_l2=on", "cluster_size=16k"), ("lazy_refcounts=on",),
            ("preallocation=metadata",), ("compression_type=zstd",))):
        path = make_image(tmp, *options, name=f"{number}.qcow2")
        fill(path)
        before = qf.qemu_img("map", "--output=json", path)
        try_writes(tmp, path, "file", path)
        qf.equal("map", qf.qemu_img("map", "--output=json", path), before)


def test_snapshots(tmp):
    """Internal snapshots stay what they are, and are shown."""
    path = make_image(tmp)
    fill(path)
    qf.qemu_img("snapshot", "-c", "s", path)
    qf.qemu_io(path, ["write -q -P 3 0 64k"])
    with persist.serve(tmp, "file", path, "dirty-bitmap=b,persistent=on",
                       filters=CHAIN) as server:
        handle = server.connect("@s")
        qf.equal("snapshot", handle.pread(4, MiB), b"\7\7\7\7")
        qf.equal("snapshot", handle.pread(4, 0), bytes(4))
        handle.shutdown()
    sound(path)


def test_backing(tmp):
    """Only the top layer is written to."""
    base = make_image(tmp, name="base.qcow2")
    fill(base)
    before = persist.fingerprint(base)
    path = os.path.join(tmp, "top.qcow2")
    qf.run([qf.tool("qemu-img"), "create", "-q", "-f", "qcow2", "-F", "qcow2",
            "-b", "base.qcow2", path], cwd=tmp)
    try_writes(tmp, path, "file", path, f"qcow2-backing=dir:{tmp}")
    qf.equal("base", persist.fingerprint(base)[0][4], before[0][4])


def test_old_version(tmp):
    """A version 2 image cannot have bitmaps; it says so."""
    path = make_image(tmp, "compat=0.10")
    before = persist.fingerprint(path)
    with persist.serve(tmp, "file", path, filters=CHAIN) as server:
        qmp.refused(server.control, ["version 2"], "block-dirty-bitmap-add",
                    node="disk", name="b", persistent=True)
        persist.write_some(server, WRITES)
    qf.equal("image", persist.fingerprint(path)[0][4], before[0][4])


def test_no_room(tmp):
    """There is no room for the header's extension: nothing changes, however
    often it is tried."""
    name = os.path.join(tmp, "x" * 200)
    with open(name, "wb") as file:
        file.truncate(SIZE)
    path = os.path.join(tmp, "noroom.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512",
                "-b", name, "-F", "raw", path)
    before = persist.fingerprint(path)
    with persist.serve(tmp, "file", path, "qcow2-backing=none",
                       filters=CHAIN) as server:
        for _ in range(3):
            qmp.refused(server.control, ["no room"],
                        "block-dirty-bitmap-add", node="disk", name="b",
                        persistent=True)
    qf.equal("image", persist.fingerprint(path)[0][4], before[0][4])
    qf.qemu_img("check", "-q", path)


def test_damaged(tmp):
    """Where refcounts cannot be relied upon nothing is written."""
    import qcow2edit as edit
    for bit, word in ((1, "dirty"), (2, "corrupt")):
        path = make_image(tmp, name=f"{word}.qcow2")
        edit.write_at(path, 72, bit.to_bytes(8, "big"))
        before = persist.fingerprint(path)
        with persist.serve(tmp, "file", path, filters=CHAIN) as server:
            qmp.refused(server.control, [word, "qemu-img check -r"],
                        "block-dirty-bitmap-add", node="disk", name="b",
                        persistent=True)
        qf.equal(word, persist.fingerprint(path)[0][4], before[0][4])


def test_overlap(tmp):
    """Two bitmaps in the same clusters, as a stranger could make thousands
    of: an error that names one, and neither is loaded."""
    import qcow2edit as edit
    path = make_image(tmp)
    for name in ("a", "b"):
        qf.qemu_img("bitmap", "--add", path, name)
    first, second = (persist.directory(path)[name][0] for name in "ab")
    table = edit.read_at(path, second, 8)
    edit.write_at(path, second, edit.read_at(path, first, 8))
    refuses(tmp, path, ["damaged"])
    # The same by one table, which refers to a cluster twice.
    edit.write_at(path, second, table)
    at = int.from_bytes(table, "big")
    edit.write_at(path, at, table)
    refuses(tmp, path, ["damaged", '"b"'])


def refuses(tmp, path, words):
    """The server does not start, or if the image is another server's nobody
    can open the disk; it says why."""
    before = persist.fingerprint(path)
    persist.fails("file", path, filters=CHAIN, words=[path, *words])
    with behind_nbd(tmp, path) as plugin, qf.serve(tmp, *CHAIN, *plugin) \
            as server:
        try:
            server.connect()
            raise qf.Fail("the image was opened")
        except nbd.Error:
            pass
        for word in words:
            qf.check(word in server.log(), f"no {word!r}: {server.log()}")
    qf.equal("image", persist.fingerprint(path), before)


@contextlib.contextmanager
def behind_nbd(tmp, path):
    """The image in another nbdkit; its container cannot grow."""
    with qf.serve(tmp, "file", path) as server:
        yield "nbd", "socket=" + server.sock


def test_nbd(tmp):
    """Over a network there must be free space in the container."""
    path = make_image(tmp)
    fill(path)
    size = os.path.getsize(path)
    with behind_nbd(tmp, path) as plugin, \
            persist.serve(tmp, *plugin, filters=CHAIN) as server:
        for _ in range(3):
            qmp.refused(server.control, ["become larger"],
                        "block-dirty-bitmap-add", node="disk", name="b",
                        persistent=True)
    sound(path)                          # tried thrice, and nothing leaks
    qf.equal("size", os.path.getsize(path), size)
    os.truncate(path, size + 8 * MiB)
    with behind_nbd(tmp, path) as plugin:
        try_writes(tmp, path, *plugin)


def test_block_size(tmp):
    """Below there are only whole blocks of 4 KiB."""
    path = make_image(tmp, "cluster_size=4k")
    fill(path)
    os.truncate(path, os.path.getsize(path) + 4 * MiB)
    if not qf.plugin_exists("filter", "blocksize-policy"):
        return
    with qf.serve(tmp, "--filter=blocksize-policy", "file", path,
                  "blocksize-minimum=4096", "blocksize-preferred=4096",
                  "blocksize-maximum=64k", "blocksize-error-policy=error"
                  ) as server:
        try_writes(tmp, path, "nbd", "socket=" + server.sock)


def test_serialized(tmp):
    """A plugin that handles one request of all clients at a time."""
    path = make_image(tmp)
    os.truncate(path, os.path.getsize(path) + 4 * MiB)
    plugin = ["eval", f"get_size=stat -c %s {path}",
              f"pread=dd if={path} skip=$4 count=$3 iflag=count_bytes,"
              "skip_bytes status=none",
              f"pwrite=dd of={path} conv=notrunc seek=$4 oflag=seek_bytes "
              "status=none", "can_write=exit 0", "can_flush=exit 0",
              f"flush=sync {path}"]
    with persist.serve(tmp, *plugin, "dirty-bitmap=b,persistent=on",
                       "bitmap-sync=1", filters=CHAIN) as server:
        qmp.refused(server.control, ["one request", "bitmap-store=FILE"],
                    "block-dirty-bitmap-add", node="disk", name="n",
                    persistent=True)
        server.control("block-dirty-bitmap-add", node="disk", name="t")
        persist.write_some(server, WRITES)
        persist.until("clean", lambda: "in-use" not in info(path)["b"][1])
    sound(path)
    qf.equal("b", qemu_runs(tmp, path, "b"),
             persist.granules(WRITES, GRANULARITY, SIZE))


def test_growth_below_cow(tmp):
    """A cow filter below: writes of metadata are temporary as well, and
    what had to grow is only space at the end of the file."""
    path = make_image(tmp)
    fill(path)
    with persist.serve(tmp, "--filter=cow", "file", path, filters=(
            "--filter=dirty-tracking", "--filter=bitmap-persist",
            "--filter=qcow2")) as server:
        server.control("block-dirty-bitmap-add", node="disk", name="gone",
                       persistent=True)
    qf.check("gone" not in info(path), "the cow filter was passed by")
    qf.qemu_img("check", "-q", "-f", "qcow2", path)


def test_connections(tmp):
    """Clients that come later see the image with another header, which has
    grown, and is the same all the same."""
    path = make_image(tmp)
    fill(path)
    with persist.serve(tmp, "file", path, filters=CHAIN) as server:
        first = server.connect()
        for n in range(20):
            server.control("block-dirty-bitmap-add", node="disk",
                           name=f"b{n}", persistent=True)
            handle = server.connect()
            qf.equal("data", handle.pread(4, 2 * MiB), b"\7\7\7\7")
            handle.pwrite(b"x" * 100, n * 1000)
            handle.shutdown()
        qf.equal("data", first.pread(4, 40 * MiB), b"\x09" * 4)
        first.shutdown()
    sound(path)


def test_give_away(tmp):
    """An image is not given away under clients; without them it is, and
    nobody can open it until it is back."""
    path = make_image(tmp)
    with persist.serve(tmp, "file", path, "dirty-bitmap=b,persistent=on",
                       filters=CHAIN) as server:
        handle = server.connect()
        qmp.refused(server.control, ["clients"], "blockdev-set-active",
                    **{"node-name": "disk", "active": False})
        handle.pwrite(b"x", 0)
        handle.shutdown()
        persist.until("given away", lambda: give_away(server))
        sound(path)
        qf.qemu_io(path, ["write -q -P 5 10M 64k"])
        try:
            server.connect()
            raise qf.Fail("a client opened an image that was given away")
        except nbd.Error:
            pass
        server.control("blockdev-set-active", active=True)
        handle = server.connect()
        qf.equal("QEMU's write", handle.pread(4, 10 * MiB), b"\5" * 4)
        handle.shutdown()
        qf.equal("b", persist.our_runs(server, "b"),
                 [[0, GRANULARITY], [10 * MiB, 10 * MiB + GRANULARITY]])
    sound(path)


def give_away(server):
    """False while a client is about to leave."""
    try:
        server.control("blockdev-set-active", active=False)
        return True
    except qmp.Error as error:
        qf.check("clients" in error.desc, str(error))
        return False


def test_locks(tmp):
    """QEMU and we never have the image open for writing together."""
    path = make_image(tmp)
    with persist.serve(tmp, "file", path, filters=CHAIN):
        done = qf.run([qf.tool("qemu-io"), "-f", "qcow2", "-c", "write 0 1",
                       path], ok=None)
        qf.check("lock" in done.stderr + done.stdout, "QEMU opened it")
        persist.fails("file", path, filters=CHAIN, words=[path, "lock"])
    with persist.Daemon(tmp, path, writable=True):
        persist.fails("file", path, filters=CHAIN, words=[path, "lock"])


def test_unknown(tmp):
    """Bitmaps that cannot be recovered, and the flags that nobody knows,
    stay as they are until something is written."""
    path = make_image(tmp)
    for name in ("a", "b"):
        qf.qemu_img("bitmap", "--add", path, name)
    persist.put_flags(path, "a", AUTO | IN_USE)
    with persist.serve(tmp, "file", path, filters=CHAIN) as server:
        known = server.control.bitmaps()
        qf.equal("a", known["a"].get("inconsistent"), True)
        qf.equal("b", known["b"].get("inconsistent", False), False)
        qf.equal("flags", persist.directory(path)["a"][1], AUTO | IN_USE)
        persist.write_some(server, WRITES)
        # It must never be taken for one that the intent makes complete.
        qf.equal("flags", persist.directory(path)["a"][1], IN_USE)
        qmp.refused(server.control, ["inconsistent"],
                    "block-dirty-bitmap-clear", node="disk", name="a")
        server.control("block-dirty-bitmap-remove", node="disk", name="a")
    sound(path)


def test_of_a_snapshot(tmp):
    """Bitmaps are those of the image's own disk."""
    path = make_image(tmp)
    qf.qemu_img("snapshot", "-c", "s", path)
    persist.fails("file", path, "qcow2-snapshot=s", filters=CHAIN,
                  words=["bitmap-store=image"])


def test(tmp):
    qf.need("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon",
            "nbdinfo")
    qf.need_plugins("nbd", "eval")
    qf.parts(tmp, test_kinds, test_snapshots, test_backing, test_old_version,
             test_no_room, test_damaged, test_overlap, test_nbd,
             test_block_size, test_serialized, test_growth_below_cow,
             test_connections, test_give_away, test_locks, test_unknown,
             test_of_a_snapshot)


if __name__ == "__main__":
    qf.main(test)
