#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The bitmap-persist filter beside other programs, and what it refuses."""

import os
import shutil
import struct

import nbd
import persist
import qcow2edit as edit
import qf
import qmp
from persist import our_runs, qemu_runs
from qf import KiB, MiB

SIZE = 10 * MiB
RUNS = [[MiB, MiB + 4096]]


def prepare(tmp, name, size=SIZE):
    """A disk and a sidecar with the bitmaps b, in which RUNS is dirty, and
    off."""
    disk = persist.make_disk(os.path.join(tmp, name + ".raw"), size, 0x55)
    side = os.path.join(tmp, name + ".qcow2")
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side,
                       "dirty-bitmap=b,persistent=on,granularity=4k",
                       "dirty-bitmap=off,persistent=on,disabled=on") as server:
        persist.write_some(server, [(MiB, 512)])
    persist.sound(side)
    return disk, side


def prepare_image(tmp, name):
    image = os.path.join(tmp, name + ".qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    qf.qemu_img("bitmap", "--add", "-g", "4096", image, "b")
    qf.qemu_img("bitmap", "--add", "--disable", image, "off")
    persist.qemu_writes(image, [(MiB, 512)])
    return image


IMAGE_FILTERS = [*persist.FILTERS, "--filter=qcow2"]
COW_FILTERS = [*persist.FILTERS, "--filter=cow", "--filter=qcow2"]


# -------------------------------------------------------------- read-only

CHANGES = (
    ("block-dirty-bitmap-add", {"name": "new", "persistent": True}),
    ("block-dirty-bitmap-remove", {"name": "off"}),
    ("block-dirty-bitmap-clear", {"name": "b"}),
    ("block-dirty-bitmap-merge", {"target": "b", "bitmaps": ["off"]}),
)


def changes_refused(server):
    before = server.control.bitmaps()
    for command, arguments in CHANGES:
        qmp.refused(server.control, [], command, node="disk", **arguments)
    qf.equal("bitmaps", server.control.bitmaps(), before)


def read_only(tmp, files, arguments, filters):
    before = persist.fingerprint(*files)
    with persist.serve(tmp, "-r", *arguments, filters=filters) as server:
        # Nobody has connected yet.
        qf.equal("bitmaps", sorted(server.control.bitmaps()), ["b", "off"])
        changes_refused(server)
        qf.equal("b", our_runs(server, "b"), RUNS)
        qf.equal("off", our_runs(server, "off"), [])
        handle = server.connect()
        qf.check(handle.is_read_only(), "it can be written")
        handle.pread(512, MiB)
        handle.shutdown()
        changes_refused(server)
        out = qf.run([qf.tool("nbdinfo"), "--list", server.uri()]).stdout
        for name in ("dirty/b", "dirty/off"):
            qf.check(f'export="{name}"' in out, out)
        for active in (False, True):
            server.control("blockdev-set-active", node_name="disk",
                           active=active)
        qf.equal("b again", our_runs(server, "b"), RUNS)
        # Another one may look as well.
        with persist.serve(tmp, "-r", *arguments, filters=filters) as second:
            qf.equal("b in two", our_runs(second, "b"), RUNS)
        qf.equal("QEMU's", qemu_runs(tmp, files[0], "b"), RUNS)
    qf.check(persist.fingerprint(*files) == before, "a file has changed")


def test_read_only(tmp):
    disk, side = prepare(tmp, "readonly")
    read_only(tmp, (side, disk), ["file", disk, "bitmap-store=" + side,
                                  "dirty-bitmap=new,persistent=on"],
              persist.FILTERS)


def test_read_only_image(tmp):
    image = prepare_image(tmp, "readonly-image")
    read_only(tmp, (image,), ["file", image], IMAGE_FILTERS)


def test_read_only_file(tmp):
    """The same if the file's mode or owner forbids writing: refused, but
    for root, whom nothing stops; and there is nothing yet."""
    disk = persist.make_disk(os.path.join(tmp, "nothing.raw"), SIZE)
    side = os.path.join(tmp, "nothing.qcow2")
    with persist.serve(tmp, "-r", "file", disk, "bitmap-store=" + side,
                       "dirty-bitmap=t", "dirty-bitmap=p,persistent=on") \
         as server:
        server.connect().shutdown()
        qf.equal("bitmaps", sorted(server.control.bitmaps()), ["t"])
    qf.check(not os.path.exists(side), "it was made")


def test_only_readers(tmp):
    """A writable server to which nobody writes changes nothing either."""
    disk, side = prepare(tmp, "readers")
    before = persist.fingerprint(side, disk)
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side) as server:
        handle = server.connect()
        handle.pread(512, 0)
        handle.flush()
        handle.shutdown()
        qf.equal("b", our_runs(server, "b"), RUNS)
    qf.check(persist.fingerprint(side, disk) == before, "a file has changed")


# ----------------------------------------------------------------- active

def expect_error(what, function):
    try:
        function()
    except nbd.Error:
        return
    raise qf.Fail(f"{what} should have failed")


def set_active(server, active):
    server.control("blockdev-set-active", node_name="disk", active=active)


def test_active(tmp):
    """QEMU uses and changes the sidecar in between."""
    disk, side = prepare(tmp, "active")
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side) as server:
        guest = server.connect()
        writes = [(MiB, 512)]
        for number in range(3):
            at = (2 + 2 * number) * MiB
            guest.pwrite(b"x" * 512, at)
            writes.append((at, 512))
            set_active(server, False)
            inactive(server, guest)
            persist.sound(side)
            qf.equal("QEMU's", qemu_runs(tmp, side, "b"),
                     persist.granules(writes, 4 * KiB, SIZE))
            persist.qemu_writes(side, [(at + MiB, 512)])
            writes.append((at + MiB, 512))
            qf.qemu_img("bitmap", "--add", side, f"new{number}")
            qf.qemu_img("bitmap", "--remove", side,
                        f"new{number - 1}" if number else "off")
            set_active(server, True)
            qf.equal("bitmaps", sorted(server.control.bitmaps()),
                     ["b", f"new{number}"])
            qf.equal("ours", our_runs(server, "b"),
                     persist.granules(writes, 4 * KiB, SIZE))
        guest.pwrite(b"x" * 512, 0)
        guest.shutdown()
    persist.sound(side)
    qf.equal("QEMU's", qemu_runs(tmp, side, "b"),
             persist.granules(writes + [(0, 512)], 4 * KiB, SIZE))


def inactive(server, guest):
    for request in (lambda: guest.pwrite(b"y" * 512, 0),
                    lambda: guest.zero(512, 0), lambda: guest.trim(512, 0)):
        expect_error("a write to an inactive node", request)
    guest.pread(512, 0)
    qf.equal("bitmaps", server.control.bitmaps(), {})
    qmp.refused(server.control, [], "block-dirty-bitmap-add", node="disk",
                name="c", persistent=True)
    expect_error("a view", lambda: server.connect("dirty/b"))


def test_active_twice(tmp):
    """It is the same again; and it ends well while inactive."""
    disk, side = prepare(tmp, "twice")
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side) as server:
        set_active(server, True)
        set_active(server, False)
        set_active(server, False)
        before = persist.fingerprint(side, disk)
    qf.check(persist.fingerprint(side, disk) == before, "a file has changed")
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side) as server:
        set_active(server, False)
        with persist.Daemon(tmp, side, writable=True):
            qmp.refused(server.control, ["another program"],
                        "blockdev-set-active",
                        **{"node-name": "disk", "active": True})
        set_active(server, True)
        qf.equal("ours", our_runs(server, "b"), RUNS)
        view = server.connect("dirty/b")
        qmp.refused(server.control, ["b", "busy"], "blockdev-set-active",
                    **{"node-name": "disk", "active": False})
        view.shutdown()


def test_active_missing(tmp):
    """A sidecar that has vanished is not made anew, without its bitmaps."""
    disk, side = prepare(tmp, "missing")
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side) as server:
        set_active(server, False)
        os.rename(side, side + ".moved")
        qmp.refused(server.control, [side], "blockdev-set-active",
                    **{"node-name": "disk", "active": True})
        qf.check(not os.path.exists(side), "a sidecar was made")
        os.rename(side + ".moved", side)
        set_active(server, True)
        qf.equal("ours", our_runs(server, "b"), RUNS)


def test_active_damaged(tmp):
    """What came back cannot be used; when it is repaired it can."""
    disk, side = prepare(tmp, "damaged")
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side) as server:
        set_active(server, False)
        size = edit.get(side, "size")
        edit.put(side, "size", size + MiB)
        qmp.refused(server.control, [side], "blockdev-set-active",
                    **{"node-name": "disk", "active": True})
        edit.put(side, "size", size)
        set_active(server, True)
        qf.equal("ours", our_runs(server, "b"), RUNS)
        persist.write_some(server, [(5 * MiB, 512)])
    persist.sound(side)


# --------------------------------------------------- more than one program

def test_second(tmp):
    """Only one writes; in both directions."""
    disk, side = prepare(tmp, "second")
    arguments = ["file", disk, "bitmap-store=" + side]
    with persist.serve(tmp, *arguments) as server:
        for more in ([], ["-r"]):
            persist.fails(*more, *arguments, words=[side, "another program"])
        other = persist.make_disk(os.path.join(tmp, "other.raw"), SIZE)
        persist.fails("file", other, "bitmap-store=" + side,
                      words=[side, "another program"])
        for form, path, writable in (
                ("qcow2", side, True), ("qcow2", side, False),
                ("raw", disk, True)):
            done = qf.run([qf.tool("qemu-io"), "-f", form,
                           *([] if writable else ["-r"]), "-c", "length",
                           path], ok=None)
            qf.check(done.returncode != 0 and "lock" in done.stderr,
                     f"QEMU opens {path}: {done.stderr}")
        persist.write_some(server, [(5 * MiB, 512)])
    for options in ([], ["-r"]):
        with persist.qemu_nbd(tmp, *options, side):
            persist.fails(*arguments, words=[side, "another program"])
    with persist.qemu_nbd(tmp, "-r", side):
        with persist.serve(tmp, "-r", *arguments):
            pass
    persist.sound(side)


def test_second_disk(tmp):
    """The raw disk is in use by another program, or with another
    sidecar."""
    disk, side = prepare(tmp, "seconddisk")
    arguments = ["file", disk, "bitmap-store="]
    with persist.serve(tmp, *arguments[:2], arguments[2] + side):
        refused_later(tmp, *arguments[:2], arguments[2] + side + ".2")
        qf.check(not os.path.exists(side + ".2"), "it was made")


def refused_later(tmp, *arguments):
    """At start, or when the first client comes."""
    try:
        server = qf.Server(tmp, [*persist.FILTERS, *arguments])
    except qf.Fail as fail:
        qf.check("another program" in str(fail), f"{fail}")
        return
    try:
        expect_error("a second sidecar of a disk",
                     lambda: server.connect().shutdown())
        qf.check("another program" in server.log(), server.log())
    finally:
        server.kill()


def test_second_image(tmp):
    image = prepare_image(tmp, "second-image")
    with persist.serve(tmp, "file", image, filters=COW_FILTERS) as server:
        guest = server.connect()
        guest.pwrite(b"x" * 512, 5 * MiB)
        persist.fails("file", image, filters=COW_FILTERS,
                      words=[image, "another program"])
        done = qf.run([qf.tool("qemu-io"), "-f", "qcow2", "-c", "length",
                       image], ok=None)
        qf.check(done.returncode != 0, "QEMU opens it, too")
        guest.shutdown()
    with persist.qemu_nbd(tmp, image):
        persist.fails("file", image, filters=COW_FILTERS,
                      words=[image, "another program"])
    persist.sound(image)


def test_active_image(tmp):
    """An image must not be used by any client meanwhile."""
    image = prepare_image(tmp, "active-image")
    with persist.serve(tmp, "file", image, filters=COW_FILTERS) as server:
        guest = server.connect()
        guest.pwrite(b"x" * 512, 5 * MiB)
        qmp.refused(server.control, [], "blockdev-set-active",
                    **{"node-name": "disk", "active": False})
        guest.shutdown()
        del guest
        persist.until("nobody is there", lambda: gone(server))
        persist.sound(image)
        persist.qemu_writes(image, [(7 * MiB, 512)])
        qf.qemu_img("bitmap", "--add", image, "added")
        set_active(server, True)
        qf.equal("ours", our_runs(server, "b"), persist.granules(
            [(n * MiB, 512) for n in (1, 5, 7)], 4096, SIZE))
        qf.check("added" in server.control.bitmaps(), "not seen")
    persist.sound(image)


def gone(server):
    try:
        set_active(server, False)
        return True
    except qmp.Error:
        return False


# ----------------------------------------------------------- what is wrong

def test_parameters(tmp):
    disk = persist.make_disk(os.path.join(tmp, "parameters.raw"), SIZE)
    side = "bitmap-store=" + os.path.join(tmp, "parameters.qcow2")
    good = ["file", disk, side]
    for parameter, words in (
            ("bitmap-store=", ["bitmap-store"]),
            ("bitmap-sync=x", ["bitmap-sync"]),
            ("bitmap-sync=-1", ["bitmap-sync"]),
            ("bitmap-intent=maybe", ["bitmap-intent", "maybe"]),
            ("bitmap-intent=", ["bitmap-intent"]),
            ("bitmap-intent-granularity=1000", ["bitmap-intent-granularity"]),
            ("bitmap-intent-granularity=256", ["bitmap-intent-granularity"]),
            ("bitmap-intent-granularity=4G", ["bitmap-intent-granularity"]),
            ("bitmap-intent-granularity=0", ["bitmap-intent-granularity"]),
            ("dirty-bitmap=b,persistent=maybe", ["persistent", "maybe"]),
            ("bitmap-nonsense=1", ["bitmap-nonsense"])):
        persist.fails(*good, parameter, words=words)
    persist.fails("file", disk, words=["bitmap-store=FILE"])
    persist.fails("file", disk, "bitmap-store=image",
                  words=["--filter=qcow2"])
    persist.fails("file", disk, "dirty-bitmap=b,persistent=on",
                  filters=["--filter=dirty-tracking"],
                  words=["--filter=bitmap-persist"])
    qf.check(not os.path.exists(os.path.join(tmp, "parameters.qcow2")),
             "a sidecar was made")


def test_order(tmp):
    image = prepare_image(tmp, "order")
    disk = persist.make_disk(os.path.join(tmp, "order.raw"), SIZE)
    store = "bitmap-store=" + os.path.join(tmp, "order-side.qcow2")
    tracking, keep = persist.FILTERS
    persist.fails("file", disk, store, filters=[keep, tracking],
                  words=["bitmap-persist", "dirty-tracking"])
    persist.fails("file", disk, store, filters=[tracking, keep, keep],
                  words=["bitmap-persist", "once"])
    persist.fails("file", image, filters=["--filter=qcow2", tracking, keep],
                  words=["qcow2", "bitmap-persist"])
    persist.fails("file", image, filters=[keep, "--filter=qcow2", tracking],
                  words=["qcow2"])
    for between in ([], ["--filter=cow"]):
        persist.fails("file", image, words=["wrong order", "bitmap-persist"],
                      filters=["--filter=qcow2", *between, keep])
    directory = os.path.join(tmp, "dir")
    os.mkdir(directory)
    shutil.copy(disk, directory)
    persist.fails("file", "dir=" + directory, store,
                  words=["bitmap-persist", "disk"])
    qf.check(not os.path.exists(os.path.join(tmp, "order-side.qcow2")),
             "a sidecar was made")


def test_other_size(tmp):
    """Filters below can make the disk another than the file."""
    disk = persist.make_disk(os.path.join(tmp, "other.raw"), SIZE)
    for size in (SIZE // 2, 2 * SIZE):
        side = os.path.join(tmp, f"other{size}.qcow2")
        for number in (1, 2):
            with persist.serve(tmp, "file", disk, f"truncate={size}",
                               "bitmap-store=" + side,
                               "dirty-bitmap=b,persistent=on,granularity=4k",
                               filters=[*persist.FILTERS, "--filter=truncate"]
                               ) as server:
                persist.write_some(server, [(number * MiB, 512)])
        persist.sound(side)
        qf.equal("size", edit.get(side, "size"), size)
        qf.equal("QEMU's", qemu_runs(tmp, side, "b"),
                 [[n * MiB, n * MiB + 4096] for n in (1, 2)])
    # The disk itself must be as its own sidecar says.
    disk, side = prepare(tmp, "own")
    edit.put(side, "size", SIZE + MiB)
    for more in ([], ["truncate=" + str(SIZE + MiB)]):
        persist.fails("file", disk, "bitmap-store=" + side, *more,
                      words=[side, str(SIZE)],
                      filters=[*persist.FILTERS,
                               *["--filter=truncate" for _ in more]])


def test_no_bytes(tmp):
    """QEMU would not open a sidecar with bitmaps of such a disk."""
    disk = persist.make_disk(os.path.join(tmp, "empty.raw"), 0)
    side = os.path.join(tmp, "empty.qcow2")
    with persist.serve(tmp, "file", disk, "bitmap-store=" + side) as server:
        server.connect().shutdown()
        qmp.refused(server.control, ["0 bytes"], "block-dirty-bitmap-add",
                    node="disk", name="b", persistent=True)
    persist.sound(side)


def test_wrong_files(tmp):
    disk, side = prepare(tmp, "wrong")
    larger = persist.make_disk(os.path.join(tmp, "larger.raw"), SIZE + 512)
    persist.fails("file", larger, "bitmap-store=" + side,
                  words=[side, str(SIZE), str(SIZE + 512)])
    persist.fails("file", disk, "bitmap-store=" + disk,
                  words=[disk])
    missing = os.path.join(tmp, "missing")
    persist.fails("file", disk, f"bitmap-store={missing}/side.qcow2",
                  words=[missing, "No such file"])
    persist.fails("file", disk, "bitmap-store=" + tmp, words=[tmp])
    persist.fails("file", disk, "bitmap-store=/dev/null/x",
                  words=["/dev/null"])
    for name, content in (("empty", b""), ("text", b"some text\n" * 100),
                          ("short", edit.read_at(side, 0, 60))):
        path = os.path.join(tmp, name)
        with open(path, "wb") as file:
            file.write(content)
        persist.fails("file", disk, "bitmap-store=" + path, words=[path])
        with open(path, "rb") as file:
            qf.equal("content", file.read(), content)
    fifo = os.path.join(tmp, "fifo")
    os.mkfifo(fifo)
    persist.fails("file", disk, "bitmap-store=" + fifo, words=[fifo])


def test_wrong_image(tmp):
    """A version 2 image cannot have bitmaps."""
    image = os.path.join(tmp, "v2.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", image,
                str(SIZE))
    with persist.serve(tmp, "file", image, filters=COW_FILTERS) as server:
        server.connect().shutdown()
        qmp.refused(server.control, ["version"], "block-dirty-bitmap-add",
                    node="disk", name="b", persistent=True)
        server.control("block-dirty-bitmap-add", node="disk", name="b")
        persist.write_some(server, [(0, 512)])
    qf.qemu_img("check", "-q", image)


def broken(tmp, side, change):
    """A copy of a sidecar with a change."""
    path = os.path.join(tmp, "broken.qcow2")
    shutil.copyfile(side, path)
    change(path)
    return path


def test_broken(tmp):
    disk, side = prepare(tmp, "broken-one")
    at, flags = persist.directory(side)["b"]
    extension = dict(edit.extensions(side))[persist.BITMAPS]

    def replace(path, new):
        edit.set_extensions(path, [
            (kind, new if kind == persist.BITMAPS else data)
            for kind, data in edit.extensions(path)])

    for what, change in (
            ("magic", lambda p: edit.put(p, "magic", b"QFI!")),
            ("version", lambda p: edit.put(p, "version", 7)),
            ("size", lambda p: edit.put(p, "size", SIZE * 2)),
            ("feature", lambda p: edit.set_bits(p, "incompatible", 1 << 60)),
            ("refcount table", lambda p: edit.put(p, "refcount_offset", 7)),
            ("type", lambda p: edit.write_at(p, at + 16, b"\7")),
            ("granularity", lambda p: edit.write_at(p, at + 17, b"\x40")),
            ("table size", lambda p: edit.write_at(p, at + 8, b"\xff" * 4)),
            ("table offset", lambda p: edit.write_at(p, at, b"\7" * 8)),
            ("directory's offset", lambda p: replace(
                p, extension[:16] + b"\x7f" * 8)),
            ("directory's size", lambda p: replace(
                p, extension[:8] + b"\x7f" * 8 + extension[16:])),
            ("count", lambda p: replace(p, b"\xff" * 4 + extension[4:])),
    ):
        path = broken(tmp, side, change)
        before = persist.fingerprint(path)
        arguments = ["file", disk, "bitmap-store=" + path]
        try:
            server = qf.Server(tmp, [*persist.FILTERS, *arguments])
        except qf.Fail as fail:
            qf.check(path in str(fail), f"{what}: {fail}")
        else:
            try:
                expect_error(what, lambda: server.connect().shutdown())
                qf.check(path in server.log(), f"{what}: {server.log()}")
            finally:
                server.kill()
        qf.check(persist.fingerprint(path) == before, f"{what}: changed")
    qf.equal("flags", flags, persist.AUTO)
    # These are found at start.
    for what, change in (
            ("dirty", lambda p: edit.set_bits(p, "incompatible", 1)),
            ("corrupt", lambda p: edit.set_bits(p, "incompatible", 2)),
            ("end of the file", lambda p: edit.write_at(
                p, at, struct.pack(">Q", 1 << 30)))):
        path = broken(tmp, side, change)
        before = persist.fingerprint(path)
        persist.fails("file", disk, "bitmap-store=" + path,
                      words=[path, what])
        qf.check(persist.fingerprint(path) == before, f"{what}: changed")


def test_start_not_later(tmp):
    """A broken directory of bitmaps is found before the server starts."""
    disk, side = prepare(tmp, "notlater")
    at, _ = persist.directory(side)["b"]
    edit.write_at(side, at + 17, b"\x40")
    persist.fails("file", disk, "bitmap-store=" + side, words=[side])


# ----------------------------------------------------------- inconsistent

def test_inconsistent(tmp):
    """In use, and not to be recovered: QEMU and we think the same."""
    disk, side = prepare(tmp, "inconsistent")
    arguments = ["file", disk, "bitmap-store=" + side]
    persist.put_flags(side, "b", persist.IN_USE | persist.AUTO)
    persist.put_flags(side, "off", persist.IN_USE)
    with persist.serve(tmp, *arguments) as server:
        server.connect().shutdown()
        for name in ("b", "off"):
            only_removable(server, name)
        server.control("block-dirty-bitmap-add", node="disk", name="c",
                       persistent=True, granularity=4096)
        persist.write_some(server, [(MiB, 512)])
        server.control("block-dirty-bitmap-remove", node="disk", name="b")
    found = persist.info(side)
    qf.equal("left", {n: f for n, (_, f) in found.items()},
             {"off": ["in-use"], "c": ["auto"]})
    qf.equal("c", qemu_runs(tmp, side, "c"), RUNS)
    qf.qemu_img("check", "-q", side)
    with persist.serve(tmp, *arguments) as server:
        only_removable(server, "off")
        server.control.transaction([("block-dirty-bitmap-remove",
                                     {"node": "disk", "name": "off"})])
    persist.sound(side)


def only_removable(server, name):
    qf.equal(name, server.control.bitmaps()[name]["inconsistent"], True)
    expect_error("a view", lambda: server.connect("dirty/" + name))
    for command, arguments in (
            ("clear", {"name": name}), ("enable", {"name": name}),
            ("disable", {"name": name}),
            ("merge", {"target": name, "bitmaps": []}),
            ("move", {"name": name, "target-node": "disk",
                      "target-name": "other"})):
        qmp.refused(server.control, [name, "inconsistent"],
                    "block-dirty-bitmap-" + command, node="disk",
                    **arguments)
    server.control("block-dirty-bitmap-add", node="disk", name="tmp")
    qmp.refused(server.control, [name, "inconsistent"],
                "block-dirty-bitmap-merge", node="disk", target="tmp",
                bitmaps=[name])
    server.control("block-dirty-bitmap-remove", node="disk", name="tmp")


def test_name_of_intent(tmp):
    """The name is taken."""
    disk, side = prepare(tmp, "intentname")
    arguments = ["file", disk, "bitmap-store=" + side]
    with persist.serve(tmp, *arguments) as server:
        qmp.refused(server.control, [persist.INTENT],
                    "block-dirty-bitmap-add", node="disk",
                    name=persist.INTENT, persistent=True)
        for name in ("", "x" * 1024):
            qmp.refused(server.control, [], "block-dirty-bitmap-add",
                        node="disk", name=name, persistent=True)
        server.control("block-dirty-bitmap-add", node="disk",
                       name="y" * 1023, persistent=True)
    persist.sound(side)
    persist.fails(*arguments, f"dirty-bitmap={persist.INTENT},persistent=on",
                  words=[persist.INTENT])


def test(tmp):
    qf.need("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon",
            "nbdinfo")
    qf.parts(tmp, test_read_only, test_read_only_image, test_read_only_file,
             test_only_readers, test_active, test_active_twice,
             test_active_damaged, test_active_missing, test_other_size,
             test_no_bytes, test_second, test_second_disk, test_second_image,
             test_active_image, test_parameters, test_order,
             test_wrong_files, test_wrong_image, test_broken,
             test_start_not_later, test_inconsistent, test_name_of_intent)


qf.main(test)
