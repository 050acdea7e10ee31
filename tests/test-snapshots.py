#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Internal snapshots: their exports, listing, sizes, contents and maps."""

import json
import os
import shutil
import time

import disks
import images
import nbd
import qcow2edit as edit
import qf
from qf import KiB, MiB


def make_image(tmp, name, snapshots, options="cluster_size=4k", size=MiB,
               rounds=8):
    """An image whose content changes before each of its snapshots."""
    b = images.Builder(tmp, name, size, options)
    b.create()
    for snapshot in snapshots:
        b.mix(rounds=rounds)
        qf.qemu_img("snapshot", "-c", snapshot, b.path)
    b.mix(rounds=rounds)
    return b


def listing(server):
    """{export name: description} by nbdinfo --list."""
    out = qf.run([qf.tool("nbdinfo"), "--list", "--no-content", "--json",
                  f"nbd+unix:///?socket={server.sock}"], text=False).stdout
    exports = json.loads(out.decode(errors="replace"))["exports"]
    names = [export["export-name"] for export in exports]
    qf.equal("repeated export names",
             sorted(name for name in set(names) if names.count(name) > 1), [])
    return {export["export-name"]: export.get("description", "")
            for export in exports}


def check_listing(what, server, expected):
    qf.equal(f"{what}: exports", sorted(listing(server)), sorted(expected))


def verify_snapshot(tmp, server, path, export, ident, reads=100):
    """The export holds what QEMU says the snapshot of this ID does."""
    oracle = disks.oracle_of(tmp, path, f"snapshot.id={ident}")
    disks.verify_disk(server, f"{path} export {export!r}", oracle, export,
                   reads=reads, connections=2)


def go_back(tmp, path, name):
    """A copy of the image that went back to the snapshot."""
    copy = os.path.join(tmp, "copy.qcow2")
    shutil.copy(path, copy)
    qf.qemu_img("snapshot", "-a", name, copy)
    return copy


def refused(server, export):
    try:
        server.connect(export)
    except nbd.Error:
        return
    raise qf.Fail(f"{server.args}: export {export!r} should not exist")


def test_contents(tmp):
    """By name and by ID; the listing tells date and size."""
    for options in ("compat=0.10", "cluster_size=1k", "extended_l2=on",
                    "cluster_size=16k,compression_type=zstd"):
        b = make_image(tmp, "contents", ("one", "two", "three"), options)
        qf.qemu_img("snapshot", "-d", "two", b.path)
        with qf.serve_qcow2(tmp, b.path) as server:
            exports = listing(server)
            qf.equal("exports", sorted(exports), ["", "@one", "@three"])
            info = json.loads(qf.qemu_img("info", "--output=json", b.path))
            for snapshot in info["snapshots"]:
                text = exports["@" + snapshot["name"]]
                date = time.strftime("%Y-%m-%d %H:%M:%S",
                                     time.gmtime(snapshot["date-sec"]))
                qf.check(date in text and "1048576" in text,
                         f"no {date} or 1048576 in {text!r}")
            for export, ident in (("@one", 1), ("@three", 3), ("@1", 1),
                                  ("@3", 3)):
                verify_snapshot(tmp, server, b.path, export, ident)
            for export in ("@two", "@2", "@", "@0", "@one ", "@ONE"):
                refused(server, export)
            # A refused export does no harm to the others.
            disks.verify_disk(server, "the disk itself",
                           disks.oracle_of(tmp, b.path), reads=100)


def test_parameter(tmp):
    """qcow2-snapshot= makes a snapshot the default export."""
    b = make_image(tmp, "parameter", ("first", "second"))
    for value, ident in (("first", 1), ("second", 2), ("2", 2)):
        with qf.serve_qcow2(tmp, b.path,
                            f"qcow2-snapshot={value}") as server:
            verify_snapshot(tmp, server, b.path, "", ident)
            qf.check("" in listing(server), "the default export is gone")
    done = qf.run([qf.nbdkit(), "-f", "-r", "--filter=qcow2", "file", b.path,
                   "qcow2-snapshot=third", "--run", "true"], ok=None)
    qf.check(done.returncode != 0 and "third" in done.stderr
             and "snapshot" in done.stderr,
             f"qcow2-snapshot=third: status {done.returncode}, "
             f"message {done.stderr!r}")


def test_sizes(tmp):
    """Snapshots keep the disk size that they were made with."""
    b = make_image(tmp, "sizes", ("small",))
    for name, size in (("large", 3 * MiB + 512), ("medium", 2 * MiB)):
        qf.qemu_img("resize", "-q", "--shrink", b.path, str(size))
        b.size = size
        b.mix(rounds=8)
        qf.qemu_img("snapshot", "-c", name, b.path)
    with qf.serve_qcow2(tmp, b.path) as server:
        exports = listing(server)
        for name, size in (("small", MiB), ("large", 3 * MiB + 512),
                           ("medium", 2 * MiB)):
            # convert -l gives the snapshot the disk's present size.
            oracle = disks.oracle_of(tmp, go_back(tmp, b.path, name))
            qf.equal(f"size of snapshot {name}", oracle.size, size)
            disks.verify_disk(server, f"snapshot {name}", oracle, f"@{name}",
                           reads=200)
        qf.equal("exports", len(exports), 4)


def test_maps(tmp):
    """As qemu-img maps a copy of the image that went back to it."""
    b = make_image(tmp, "maps", ("one", "two"), "cluster_size=1k")
    # Holes in the file, which QEMU may show, are not copied.
    shutil.move(shutil.copy(b.path, b.path + ".dense"), b.path)
    with qf.serve_qcow2(tmp, b.path) as server:
        for name in ("one", "two"):
            disks.compare_maps(
                f"snapshot {name}",
                disks.merged(disks.nbd_map(server.uri("@" + name))),
                disks.expected_map(go_back(tmp, b.path, name)))


def test_odd_names(tmp):
    """A name that would not parse back as an export is listed by its ID."""
    names = ["with space", "\u00fcn\u00efc\u00f6d\u00e9 \u96ea", "plain",
             "mail@host", "a/snapshot/b", "x/dirty/y", "3", "plain",
             "%41 ?#&", "/slash/", "snapshot/", "-dash", "\\n\"'"]
    b = make_image(tmp, "odd", names, rounds=3)
    by_id = {"mail@host", "a/snapshot/b", "x/dirty/y"}
    with qf.serve_qcow2(tmp, b.path) as server:
        expected = {""}
        for i, name in enumerate(names):
            ident = i + 1
            export = f"@{name}"
            if name in by_id or names.index(name) != i:
                export = f"@{ident}"
            if export in ("@3", "@8"):
                # ID 3 is hidden by the name "3"; ID 8 has an earlier
                # snapshot's name.
                continue
            expected.add(export)
            verify_snapshot(tmp, server, b.path, export, ident, reads=10)
        # Names go first: "3" is the seventh snapshot.
        verify_snapshot(tmp, server, b.path, "@3", 7, reads=10)
        verify_snapshot(tmp, server, b.path, "@8", 8, reads=10)
        check_listing("odd names", server, expected | {"@3", "@8"})


def patched_image(tmp, name, change):
    """Two snapshots whose table is then changed by hand."""
    b = make_image(tmp, name, ("one", "two"), rounds=3)
    table = edit.snapshots(b.path)
    change(table)
    edit.set_snapshots(b.path, table)
    return b.path


def test_bad_names(tmp):
    """Names that cannot be sent must not break the listing."""
    for what, bad in (("not UTF-8", b"bad\xff\xfe\xc3"), ("empty", b""),
                      ("control", b"tab\tnewline\n\x1b[0m"),
                      ("NUL", b"nul\0inside"), ("long", b"n" * 5000),
                      ("longest", b"n" * 65535),
                      ("as long as fits", b"n" * 4096),
                      ("1023 bytes", b"m" * 1023)):
        def change(table):
            table[0]["name"] = bad
        path = patched_image(tmp, "bad", change)
        with qf.serve_qcow2(tmp, path) as server:
            exports = listing(server)
            qf.check("" in exports and "@two" in exports
                     and 2 <= len(exports) <= 3,
                     f"{what} name: exports {sorted(exports)[:5]!r}")
            # By its ID it can be had in any case.
            for export, ident in (("@1", 1), ("@two", 2)):
                verify_snapshot(tmp, server, path, export, ident, reads=10)


def test_equal_ids(tmp):
    """What the format forbids is either served or left out, not fatal."""
    def same_id(table):
        table[1]["id"] = table[0]["id"]

    def no_id(table):
        table[0]["id"] = b""

    def text_id(table):
        table[0]["id"] = b"an@ID/dirty/"

    for what, change in (("equal", same_id), ("empty", no_id),
                         ("text", text_id)):
        path = patched_image(tmp, "ids", change)
        with qf.serve_qcow2(tmp, path) as server:
            exports = listing(server)
            qf.check({"", "@one", "@two"} <= set(exports),
                     f"{what} IDs: exports {sorted(exports)}")
            oracle = disks.oracle_of(tmp, path)
            disks.verify_disk(server, f"{what} IDs", oracle)


def test_extra_data(tmp):
    """Extra data of all sizes: none (old images), and more than is known."""
    for length in (0, 8, 16, 24, 1000):
        def change(table):
            for snapshot in table:
                extra = snapshot["extra"] + bytes(1024)
                snapshot["extra"] = extra[:length]
        # QEMU itself reads such a version 2 image.
        b = make_image(tmp, "extra", ("one", "two"),
                       "compat=0.10,cluster_size=4k", rounds=3)
        table = edit.snapshots(b.path)
        change(table)
        edit.set_snapshots(b.path, table)
        with qf.serve_qcow2(tmp, b.path) as server:
            check_listing(f"extra data of {length} bytes", server,
                          ["", "@one", "@two"])
            for export, ident in (("@one", 1), ("@two", 2)):
                verify_snapshot(tmp, server, b.path, export, ident, reads=10)


def test_many(tmp):
    """200 snapshots, and what reading one of them costs: no more than it."""
    b = make_image(tmp, "many", ("base",), rounds=3)
    table = edit.snapshots(b.path)
    for i in range(2, 201):
        table.append({**table[0], "id": str(i).encode(),
                      "name": f"snapshot {i:03}".encode()})
    edit.set_snapshots(b.path, table)
    with qf.serve_qcow2(tmp, b.path) as server:
        check_listing("many", server, ["", "@base"] + [
            f"@snapshot {i:03}" for i in range(2, 201)])
        for i in (2, 100, 200):
            verify_snapshot(tmp, server, b.path, f"@snapshot {i:03}", i,
                            reads=10)
        handles = [server.connect(f"@{i}") for i in range(1, 201)]
        for handle in handles:
            handle.pread(4 * KiB, 0)
        for handle in handles:
            handle.shutdown()


def test(tmp):
    qf.need("qemu-img", "qemu-io", "nbdinfo")
    qf.parts(tmp, test_contents, test_parameter, test_sizes, test_maps,
             test_odd_names, test_bad_names, test_equal_ids,
             test_extra_data, test_many)


qf.main(test)
