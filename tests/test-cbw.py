#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The cbw filter: parameters, views, targets, QMP; and faults: each time the
guest's data is right, and the view is right or fails.

What a disk should hold is known from what was written to it.
"""

import glob
import os
import random
import re
import resource
import signal
import subprocess
import threading
import time

import cbw
import qf
import qmp
import nbd
from qf import KiB, MiB, GiB

CLUSTER = 64 * KiB
SIZE = 4 * MiB
HOLE, ZERO = cbw.HOLE, cbw.ZERO


def memory(tmp, *parameters, **more):
    return cbw.served(tmp, "memory", str(SIZE), *parameters, **more)


def names(server):
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(server.sock)
    found = []
    handle.opt_list(lambda name, text: found.append(name))
    handle.opt_abort()
    return found


def close(*handles):
    for handle in handles:
        handle.shutdown()


def blocks(path):
    """Bytes that a file takes."""
    return os.stat(path).st_blocks * 512


# ---------------------------------------------------------- parameters

def refused(words, *args):
    done = qf.run([qf.nbdkit(), "-U", "-", *args, "--run", "true"], ok=None)
    qf.check(done.returncode != 0, f"{args} were accepted")
    for word in words:
        qf.check(word in done.stderr, f"no {word!r} in {done.stderr!r}")


def test_parameters(tmp):
    fifo = os.path.join(tmp, "fifo")
    os.mkfifo(fifo)
    for words, parameters in (
            (["cbw-snapshot", "name"], ["cbw-snapshot="]),
            (["cbw-snapshot", "/dirty/"], ["cbw-snapshot=a/dirty/b"]),
            (["cbw-snapshot", "twice"], ["cbw-snapshot=a", "cbw-snapshot=a"]),
            (["cbw-on-error", "maybe"], ["cbw-on-error=maybe"]),
            (["cbw-timeout"], ["cbw-timeout=-1"]),
            (["cbw-timeout"], ["cbw-timeout=soon"]),
            (["cbw-cluster-size", "5000"], ["cbw-cluster-size=5000"]),
            (["cbw-cluster-size", "1G"], ["cbw-cluster-size=1G"]),
            (["cbw-cluster-size", "x"], ["cbw-cluster-size=x"]),
            (["cbw-discard", "maybe"], ["cbw-discard=maybe"]),
            (["cbw-target", "http://x/"], ["cbw-target=http://x/",
                                           "cbw-snapshot=a"]),
            (["cbw-bitmap", "dirty-tracking"], ["cbw-bitmap=b",
                                                "cbw-snapshot=a"]),
            (["cbw-target", "cbw-snapshot"], ["cbw-target=/tmp/x"]),
            (["cbw-bitmap", "cbw-snapshot"], ["cbw-bitmap=b"]),
            (["cbw-target", "share"], ["cbw-target=/tmp/x", "cbw-snapshot=a",
                                       "cbw-snapshot=b"]),
            (["cbw-target", fifo], ["cbw-target=" + fifo, "cbw-snapshot=a"]),
            (["cbw-target", "/nonexistent/x"],
             ["cbw-target=/nonexistent/x", "cbw-snapshot=a"]),
            (["exports"], ["exports=some"])):
        refused(words, "--filter=cbw", "memory", "1M", *parameters)
    refused(["before", "dirty-tracking"], "--filter=dirty-tracking",
            "--filter=cbw", "memory", "1M")
    refused(["once"], "--filter=cbw", "--filter=cbw", "memory", "1M")
    refused(["serialize_connections"], "--filter=cbw", "--filter=noparallel",
            "memory", "1M", "serialize=connections")


def test_small_target(tmp):
    """What is only found out when the disk is known refuses clients."""
    target = os.path.join(tmp, "small")
    with open(target, "wb") as file:
        file.truncate(SIZE - 1)
    with qf.serve(tmp, "--filter=cbw", "memory", str(SIZE),
                  "cbw-snapshot=s", "cbw-target=" + target) as server:
        cbw.fails(server.connect)
        with open(target, "wb") as file:
            file.truncate(SIZE)
        handle = server.connect()
        handle.pwrite(b"x", 0)
        view = server.connect("snapshot/s")
        qf.equal("content", bytes(view.pread(1, 0)), b"\0")
        close(handle, view)


# --------------------------------------------------------------- views

def test_start(tmp):
    """Snapshots that are made at start, without dirty-tracking."""
    with qf.serve(tmp, "--filter=cbw", "memory", str(SIZE), "cbw-snapshot=a",
                  "cbw-snapshot=b/c") as server:
        qf.equal("exports", names(server),
                 ["", "snapshot/a", "snapshot/b/c"])
        guest = server.connect()
        guest.pwrite(b"x" * SIZE, 0)
        for name in ("a", "b/c"):
            view = server.connect("snapshot/" + name)
            qf.equal(name, cbw.read_all(view), bytes(SIZE))
            qf.equal(name, cbw.read_map(view), [[0, SIZE, HOLE | ZERO]])
            qf.check(view.is_read_only(), "a view can be written to")
            qf.check(view.can_multi_conn(), "views have no multi-conn")
            close(view)
        for wrong in ("snapshot/", "snapshot/d", "snapshot/a/dirty/b",
                      "snapshot/a/", "x/snapshot/c"):
            cbw.fails(server.connect, wrong)
        # Of one disk, whatever the export is called.
        view = server.connect("any/snapshot/a")
        close(guest, view)


def test_listing(tmp):
    with memory(tmp, "dirty-bitmap=b0", "dirty-bitmap=old") \
            as (server, control):
        cbw.create(control, "Grüße")
        control("block-dirty-bitmap-remove", node="disk", name="old")
        qf.equal("exports", names(server), [
            "", "dirty/b0", "snapshot/Grüße", "snapshot/Grüße/dirty/b0",
            "snapshot/Grüße/dirty/old"])
        if qf.tool("nbdinfo"):
            said = qf.run([qf.tool("nbdinfo"), "--list", server.uri()]).stdout
            qf.check("point in time" in said, said)


def test_map(tmp):
    """Holes, zeroes and data, from below and from the target."""
    raw = os.path.join(tmp, "map.raw")
    with open(raw, "wb") as file:
        file.write(b"d" * MiB)
        file.truncate(2 * MiB)
        file.seek(2 * MiB)
        file.write(b"e" * MiB)
        file.truncate(SIZE)
    data = b"d" * MiB + bytes(MiB) + b"e" * MiB + bytes(MiB)
    with cbw.served(tmp, "file", raw) as (server, control):
        guest = server.connect()
        cbw.create(control, "s")
        view = server.connect("snapshot/s")
        expected = [[0, MiB, 0], [MiB, 2 * MiB, HOLE | ZERO],
                    [2 * MiB, 3 * MiB, 0], [3 * MiB, SIZE, HOLE | ZERO]]
        qf.equal("map", cbw.read_map(view), expected)
        for action in (lambda: guest.pwrite(b"x" * 3 * MiB, MiB // 2),
                       lambda: guest.trim(MiB, 0),
                       lambda: guest.zero(SIZE, 0)):
            action()
            qf.equal("map", cbw.read_map(view), expected)
            qf.equal("content", cbw.read_all(view), data)
        info = cbw.query(control, "s")
        qf.equal("copied", info["bytes-copied"], 2 * MiB)
        close(guest, view)


def test_map_is_kept(tmp):
    """The layer below is asked once about each GiB, whoever wants to know,
    and about what guests have changed meanwhile not at all."""
    raw, log = os.path.join(tmp, "raw"), os.path.join(tmp, "log")
    with open(raw, "wb") as file:
        for at in (0, 2 * GiB - MiB):
            file.seek(at)
            file.write(b"d" * 2 * MiB)
        file.truncate(3 * GiB + 5000)
    expected = [[0, 2 * MiB, 0], [2 * MiB, 2 * GiB - MiB, HOLE | ZERO],
                [2 * GiB - MiB, 2 * GiB + MiB, 0],
                [2 * GiB + MiB, 3 * GiB + 5000, HOLE | ZERO]]

    def part(start, end):
        """What read_map says of a part."""
        return [[max(a, start), min(b, end), kind] for a, b, kind in expected
                if a < end and b > start]

    with cbw.served(tmp, "--filter=log", "file", raw, "logfile=" + log) as \
            (server, control):
        cbw.create(control, "s")
        guest = server.connect()
        views = [server.connect("snapshot/s") for _ in range(6)]

        def ask(view, rng):
            start = rng.randrange(3 * GiB // 512) * 512
            end = min(start + rng.choice((512, MiB, GiB)), 3 * GiB + 5000)
            qf.equal("map", cbw.read_map(view, start, end), part(start, end))

        load = cbw.Load(1)
        for seed, view in enumerate(views):
            load.start(ask, view, random.Random(seed))
        for at in (0, MiB, 2 * GiB):
            guest.pwrite(b"x" * MiB, at)
        load.finish()
        qf.equal("map", cbw.read_map(views[0]), expected)
        with open(log) as file:
            asked = re.findall(r" Extents .*?offset=(\S+)", file.read())
        qf.equal("questions", sorted(int(at, 0) // GiB for at in asked),
                 [0, 1, 2, 3])
        close(guest, *views)


# One extent in each answer, alternately data and hole.
BRIEF = """
echo "$4" >>"$QF_LOG"
start=$(($4 / 65536 * 65536))
if [ $(($4 / 65536 % 2)) = 0 ]; then echo $start 64K
else echo $start 64K hole,zero; fi
"""


def test_brief_map(tmp):
    """A layer that says less than it is asked for; also when it fails."""
    log, trigger = os.path.join(tmp, "log"), os.path.join(tmp, "fails")
    expected = [[at, at + CLUSTER, HOLE | ZERO if at // CLUSTER % 2 else 0]
                for at in range(0, SIZE, CLUSTER)]
    with cbw.served(tmp, "--filter=error", "eval", f"get_size=echo {SIZE}",
                    "can_extents=exit 0", "can_multi_conn=exit 0",
                    "pread=head -c $3 /dev/zero", "extents=" + BRIEF,
                    "thread_model=echo parallel", "error-extents=EIO",
                    "error-extents-rate=100%", "error-file=" + trigger,
                    env={"QF_LOG": log}) as (server, control):
        cbw.create(control, "s")
        view = server.connect("snapshot/s")
        with open(trigger, "w"):
            pass
        cbw.fails(cbw.read_map, view, errno="EIO")
        os.unlink(trigger)
        qf.equal("map", cbw.read_map(view), expected)
        found = []
        view.block_status(SIZE - 5 * CLUSTER, 5 * CLUSTER,
                          lambda *args: found.append(args[2]),
                          nbd.CMD_FLAG_REQ_ONE)
        qf.equal("one", found, [[CLUSTER, HOLE | ZERO]])
        close(view)


def test_map_hangs(tmp):
    """What one connection waits for, others do not for long."""
    first, over = os.path.join(tmp, "first"), os.path.join(tmp, "over")
    extents = (f"if mkdir {first}; then until test -e {over}; "
               f"do sleep 0.05; done; fi; echo 0 {SIZE}")
    with cbw.served(tmp, "eval", f"get_size=echo {SIZE}",
                    "can_extents=exit 0", "can_multi_conn=exit 0",
                    "pread=head -c $3 /dev/zero", "extents=" + extents,
                    "thread_model=echo parallel") as (server, control):
        cbw.create(control, "s")
        views = [server.connect("snapshot/s") for _ in range(3)]
        maps = []
        stuck = threading.Thread(
            target=lambda: maps.append(cbw.read_map(views[0])))
        stuck.start()
        cbw.wait_until(lambda: os.path.exists(first), "a question")
        for view in views[1:]:
            qf.equal("map", cbw.read_map(view), [[0, SIZE, 0]])
        qf.check(not maps, "it does not hang")
        with open(over, "w"):
            stuck.join()
        qf.equal("map", maps, [[[0, SIZE, 0]]])
        close(*views)


def test_dirty_views(tmp):
    """The bitmap as it was, whatever happens to it; as dirty-clean says."""
    for clean, kind in (("hole", HOLE), ("zero", HOLE | ZERO)):
        with memory(tmp, "dirty-bitmap=b,granularity=64k",
                    "dirty-clean=" + clean) as (server, control):
            guest = server.connect()
            guest.pwrite(b"d" * 2 * CLUSTER, CLUSTER)
            guest.zero(CLUSTER, 8 * CLUSTER)
            cbw.create(control, "s")
            control("block-dirty-bitmap-clear", node="disk", name="b")
            guest.pwrite(b"x" * 16 * CLUSTER, 0)
            control("block-dirty-bitmap-remove", node="disk", name="b")
            view = server.connect("snapshot/s/dirty/b")
            zeroes = HOLE | ZERO if clean == "hole" else 0
            qf.equal("map", cbw.read_map(view), [
                [0, CLUSTER, kind], [CLUSTER, 3 * CLUSTER, 0],
                [3 * CLUSTER, 8 * CLUSTER, kind],
                [8 * CLUSTER, 9 * CLUSTER, zeroes],
                [9 * CLUSTER, SIZE, kind]])
            qf.equal("content", bytes(view.pread(4 * CLUSTER, 0)),
                     bytes(CLUSTER) + b"d" * 2 * CLUSTER + bytes(CLUSTER))
            close(guest, view)


def test_bitmap(tmp):
    """Limited to a bitmap: EPERM outside, nothing copied there."""
    with memory(tmp, "dirty-bitmap=b,granularity=4k", "cbw-discard=on") \
            as (server, control):
        guest = server.connect()
        guest.pwrite(b"d" * MiB, 0)
        control("block-dirty-bitmap-clear", node="disk", name="b")
        guest.pwrite(b"e", 3 * CLUSTER - 1)
        guest.pwrite(b"e", 5 * CLUSTER)
        cbw.create(control, "s", bitmap="b")
        guest.pwrite(b"x" * SIZE, 0)
        view = server.connect("snapshot/s")
        info = cbw.query(control, "s")
        qf.equal("query", [info["bytes-copied"], info["bytes-accessible"]],
                 [2 * CLUSTER, 2 * CLUSTER])
        qf.equal("content", bytes(view.pread(CLUSTER, 2 * CLUSTER)),
                 b"d" * (CLUSTER - 1) + b"e")
        for offset, count in ((0, 1), (2 * CLUSTER - 1, 2),
                              (3 * CLUSTER - 1, 2), (SIZE - 1, 1)):
            cbw.fails(view.pread, count, offset, errno="EPERM")
        qf.equal("map", cbw.read_map(view), [
            [0, 2 * CLUSTER, HOLE], [2 * CLUSTER, 3 * CLUSTER, 0],
            [3 * CLUSTER, 5 * CLUSTER, HOLE], [5 * CLUSTER, 6 * CLUSTER, 0],
            [6 * CLUSTER, SIZE, HOLE]])
        close(guest, view)


def test_discard(tmp):
    target = os.path.join(tmp, "target")
    with memory(tmp, "cbw-discard=on") as (server, control):
        guest = server.connect()
        guest.pwrite(b"d" * SIZE, 0)
        cbw.create(control, "s", target=target)
        view = server.connect("snapshot/s")
        guest.pwrite(b"x" * 2 * MiB, 0)
        before = blocks(target)
        qf.check(before >= 2 * MiB, f"the target takes {before} bytes")
        view.trim(MiB + 1000, 100)
        qf.check(blocks(target) <= before - MiB + 2 * CLUSTER,
                 f"{blocks(target)} of {before} bytes are left")
        cbw.fails(view.pread, 1, CLUSTER, errno="EPERM")
        qf.equal("partial", bytes(view.pread(CLUSTER, 0)), b"d" * CLUSTER)
        view.trim(2 * MiB, 2 * MiB, nbd.CMD_FLAG_FUA)
        copied = cbw.query(control, "s")["bytes-copied"]
        guest.pwrite(b"y" * 2 * MiB, 2 * MiB)
        info = cbw.query(control, "s")
        qf.equal("copied", info["bytes-copied"], copied)
        qf.equal("accessible", info["bytes-accessible"], MiB + CLUSTER)
        cbw.fails(view.pread, 1, SIZE - 1, errno="EPERM")
        cbw.fails(view.pwrite, b"x", 0, errno="EPERM")
        for flags in (0, nbd.CMD_FLAG_FAST_ZERO):
            cbw.fails(view.zero, 512, 0, flags, errno="EPERM")
        qf.equal("guest", cbw.read_all(guest),
                 b"x" * 2 * MiB + b"y" * 2 * MiB)
        cbw.delete(control, "s")
        cbw.fails(view.trim, MiB, 0, errno="EIO")
        close(guest, view)
    qf.check(not os.path.exists(target), "the target that we made is left")


def test_no_discard(tmp):
    with memory(tmp) as (server, control):
        cbw.create(control, "s")
        view = server.connect("snapshot/s")
        view.set_strict_mode(0)
        for action in (lambda: view.pwrite(b"x", 0),
                       lambda: view.zero(512, 0), lambda: view.trim(512, 0)):
            cbw.fails(action, errno="EPERM")
        qf.equal("content", cbw.read_all(view), bytes(SIZE))
        close(view)


def test_odd_sizes(tmp):
    """The disk's end lies within a cluster; the smallest disks."""
    for size in (1, 511, CLUSTER - 1, CLUSTER, 3 * CLUSTER + 1):
        with cbw.served(tmp, "memory", str(size)) as (server, control):
            guest = server.connect()
            guest.pwrite(b"d" * size, 0)
            cbw.create(control, "s")
            guest.pwrite(b"x" * size, 0)
            view = server.connect("snapshot/s")
            qf.equal("size", view.get_size(), size)
            qf.equal("content", cbw.read_all(view), b"d" * size)
            qf.equal("map", cbw.read_map(view), [[0, size, 0]])
            info = cbw.query(control, "s")
            qf.equal("copied", info["bytes-copied"], size)
            close(guest, view)
    with cbw.served(tmp, "memory", "0") as (server, control):
        cbw.create(control, "s")
        view = server.connect("snapshot/s")
        qf.equal("size", view.get_size(), 0)
        close(view)


def test_huge(tmp):
    """8 TiB, of which little is written; a trim of 3 GiB."""
    with cbw.served(tmp, "memory", "8T") as (server, control):
        guest = server.connect()
        guest.pwrite(b"d" * CLUSTER, 1 << 40)
        cbw.create(control, "s")
        guest.trim(3 << 30, (1 << 40) - (1 << 30))
        guest.zero(CLUSTER, (8 << 40) - CLUSTER)
        view = server.connect("snapshot/s")
        qf.equal("data", bytes(view.pread(2 * CLUSTER, (1 << 40) - CLUSTER)),
                 bytes(CLUSTER) + b"d" * CLUSTER)
        qf.equal("copied", cbw.query(control, "s")["bytes-copied"], CLUSTER)
        close(guest, view)


def test_large_zero(tmp):
    """A request for the whole disk copies in pieces, with little memory."""
    size = 192 * MiB
    piece = os.urandom(MiB)
    raw = os.path.join(tmp, "large.raw")
    with open(raw, "wb") as file:
        for _ in range(size // MiB):
            file.write(piece)
    with cbw.served(tmp, "file", raw) as (server, control):
        guest = server.connect()
        for number, arguments in enumerate(({}, {"cbw_timeout": 600})):
            cbw.create(control, f"s{number}", **arguments)
        guest.zero(size, 0)
        for number in range(2):
            view = server.connect(f"snapshot/s{number}")
            for at in range(0, size, MiB):
                qf.check(bytes(view.pread(MiB, at)) == piece,
                         f"the view differs behind {at}")
            close(view)
        with open(f"/proc/{server_pid(server)}/status") as status:
            peak = int(re.search(r"VmHWM:\s+(\d+)", status.read()).group(1))
        print(f"peak memory {peak} KiB")
        if not qf.SLOW:
            qf.check(peak < 256 << 10, f"{peak} KiB of memory were used")
        close(guest)
    os.unlink(raw)


def server_pid(server):
    with open(os.path.join(server.dir, "pid")) as file:
        return int(file.read())


# ----------------------------------------------------------------- QMP

def test_qmp(tmp):
    with memory(tmp, "dirty-bitmap=b") as (server, control):
        for words, arguments in (
                (["node"], {"name": "s"}),
                (["name"], {"node": "disk"}),
                (["disc"], {"node": "disc", "name": "s"}),
                (["name"], {"node": "disk", "name": ""}),
                (["name"], {"node": "disk", "name": "a/dirty/b"}),
                (["none"], {"node": "disk", "name": "s", "bitmap": "none"}),
                (["on-cbw-error", "x"], {"node": "disk", "name": "s",
                                         "on-cbw-error": "x"}),
                (["cbw-timeout"], {"node": "disk", "name": "s",
                                   "cbw-timeout": "1"}),
                (["cbw-timeout"], {"node": "disk", "name": "s",
                                   "cbw-timeout": 1 << 40}),
                (["target"], {"node": "disk", "name": "s", "target": ""}),
                (["target"], {"node": "disk", "name": "s", "target": 1}),
                (["/nonexistent/x"], {"node": "disk", "name": "s",
                                      "target": "/nonexistent/x"}),
                (["nbd://"], {"node": "disk", "name": "s",
                              "target": "nbd://[::1]:1/"}),
                (["unexpected"], {"node": "disk", "name": "s", "x": 1})):
            qmp.refused(control, words, "cbw-snapshot-create", **arguments)
        qf.equal("snapshots", control("query-cbw-snapshots"), [])
        target = os.path.join(tmp, "target")
        cbw.create(control, "s", target=target, bitmap="b", cbw_timeout=7,
                   on_cbw_error="break-snapshot")
        info = cbw.query(control, "s")
        for key, value in (("node", "disk"), ("state", "active"),
                           ("target", target), ("bitmap", "b"),
                           ("bytes-copied", 0), ("bytes-accessible", 0),
                           ("size", SIZE), ("cluster-size", CLUSTER),
                           ("cbw-timeout", 7), ("dirty-bitmaps", ["b"]),
                           ("on-cbw-error", "break-snapshot")):
            qf.equal(key, info[key], value)
        qmp.refused(control, ["exists", "s"], "cbw-snapshot-create",
                    node="disk", name="s")
        qmp.refused(control, ["in use"], "cbw-snapshot-create", node="disk",
                    name="t", target=target)
        qmp.refused(control, ["t"], "cbw-snapshot-delete", node="disk",
                    name="t")
        cbw.delete(control, "s")
        qf.check(not os.path.exists(target), "the target is left")
        qmp.refused(control, ["s"], "cbw-snapshot-delete", node="disk",
                    name="s")
        commands = [c["name"] for c in control("query-commands")]
        qf.check("transaction" in commands and
                 "cbw-snapshot-create" in commands, f"{commands}")


def test_relative_target(tmp):
    """A target's name is taken from where the server was started."""
    with memory(tmp) as (_, control):
        name = os.path.relpath(os.path.join(tmp, "relative"))
        cbw.create(control, "s", target=name)
        qf.check(os.path.exists(name), f"{name} does not exist")
        cbw.delete(control, "s")


def test_many_disks(tmp):
    """With dir= each export has its own snapshots."""
    directory = os.path.join(tmp, "dir")
    os.mkdir(directory)
    for name in ("one", "two"):
        with open(os.path.join(directory, name), "wb") as file:
            file.write(name.encode() * MiB)
    with cbw.served(tmp, "file", "dir=" + directory, "cbw-snapshot=start") \
            as (server, control):
        qmp.refused(control, ["one"], "cbw-snapshot-create", node="one",
                    name="s")
        # A view can be the first that is opened of a disk.
        early = server.connect("two/snapshot/start")
        qf.equal("view", cbw.read_all(early), b"two" * MiB)
        one, two = server.connect("one"), server.connect("two")
        control.transaction([("cbw-snapshot-create",
                              {"node": node, "name": "s"})
                             for node in ("one", "two")])
        for guest in (one, two):
            guest.pwrite(b"x" * MiB, 0)
        for node in ("one", "two"):
            for name in ("s", "start"):
                view = server.connect(f"{node}/snapshot/{name}")
                qf.equal(node, cbw.read_all(view), node.encode() * MiB)
                close(view)
        qf.check("two/snapshot/s" in names(server), f"{names(server)}")
        cbw.delete(control, "s", node="one")
        cbw.fails(server.connect, "one/snapshot/s")
        close(early, one, two, server.connect("two/snapshot/s"))


def test_no_such_view(tmp):
    """Where any name is an export, that of a view is none all the same."""
    with memory(tmp, "exports=each", "cbw-snapshot=start") as \
            (server, control):
        guest = server.connect("one")
        cbw.create(control, "s", node="one")
        cbw.delete(control, "s", node="one")
        for view in ("s", "typo", "s/dirty/b", "start/dirty/b"):
            cbw.fails(server.connect, "one/snapshot/" + view)
        qf.equal("nodes", [node["node-name"] for node in
                           control("query-named-block-nodes")], ["one"])
        close(guest)
    with qf.serve(tmp, "--filter=dirty-tracking", "memory", "1M",
                  "exports=each") as server:
        cbw.fails(server.connect, "one/snapshot/s")


def test_over_qcow2(tmp):
    image = os.path.join(tmp, "disk.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    qf.qemu_io(image, ["write -q -P 0x64 0 1M"])
    qf.qemu_img("snapshot", "-c", "inside", image)
    path = os.path.join(tmp, "qmp")
    with qf.serve(tmp, "--filter=cbw", "--filter=dirty-tracking",
                  "--filter=cow", "--filter=qcow2", "file", image,
                  "cbw-snapshot=s", "qmp=" + path) as server:
        guest = server.connect()
        guest.pwrite(b"x" * 2 * MiB, 0)
        view, inside = server.connect("snapshot/s"), server.connect("@inside")
        qf.equal("content", cbw.read_all(view), b"d" * MiB + bytes(3 * MiB))
        # To cow all exports are one disk; so it is not looked into.
        qf.equal("size", inside.get_size(), SIZE)
        cbw.fails(server.connect, "@inside/snapshot/s")
        close(guest, view, inside)


def test_flags_pass(tmp):
    qf.check_flags_pass(tmp, "cbw")


def test_thread_models(tmp):
    for model in ("requests", "all-requests"):
        with cbw.served(tmp, "--filter=noparallel", "memory", str(SIZE),
                        f"serialize={model}") as (server, control):
            guest = server.connect()
            guest.pwrite(b"d" * SIZE, 0)
            for number in range(2):
                cbw.create(control, f"s{number}",
                           cbw_timeout=number * 60)
            guest.pwrite(b"x" * SIZE, 0)
            for number in range(2):
                view = server.connect(f"snapshot/s{number}")
                qf.equal("content", cbw.read_all(view), b"d" * SIZE)
                close(view)
            close(guest)


def test_incoherent(tmp):
    """Where connections may have caches of their own, the guest's is
    flushed before the disk is read for a snapshot: once."""
    log = os.path.join(tmp, "log")
    for model in ("requests", "all-requests", None):
        with cbw.served(tmp, "--filter=log", "--filter=multi-conn",
                        *(["--filter=noparallel"] if model else []),
                        "memory", str(SIZE),
                        *([f"serialize={model}"] if model else []),
                        "multi-conn-mode=disable", "logfile=" + log) \
                as (server, control):
            guest, other = server.connect(), server.connect()
            guest.pwrite(b"d" * SIZE, 0)
            for number in range(2):
                cbw.create(control, f"s{number}")
                view = server.connect(f"snapshot/s{number}")
                if number == 0:
                    qf.equal("view", cbw.read_all(view), b"d" * SIZE)
                other.pwrite(b"x" * CLUSTER, number * CLUSTER)
                qf.equal("view", bytes(view.pread(CLUSTER, CLUSTER)),
                         b"d" * CLUSTER)
                close(view)
            close(guest, other)
        with open(log) as file:
            text = file.read()
        os.unlink(log)
        # The second time it is the other one that has written.
        found = re.findall(r"connection=(\d+) Flush id", text)
        qf.equal("flushes", len(found), 2)
        qf.check(found[0] != found[1], f"{found}")
        qf.check(text.index(" Flush ") < text.index(" Read "),
                 "the disk was read before it was flushed")


def test_own_file(tmp):
    """The disk itself is no target."""
    disk = os.path.join(tmp, "disk.raw")
    with open(disk, "wb") as file:
        file.truncate(SIZE)
    refused(["cbw-target", disk], "--filter=cbw", "file", disk,
            "cbw-snapshot=s", "cbw-target=" + disk)
    link = os.path.join(tmp, "link")
    os.symlink(disk, link)
    with cbw.served(tmp, "file", disk) as (server, control):
        qmp.refused(control, [link], "cbw-snapshot-create", node="disk",
                    name="s", target=link)
    image = os.path.join(tmp, "over.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw",
                image)
    for arguments in (["file", "dir=" + tmp],
                      ["--filter=qcow2", "file", image,
                       "qcow2-backing=file:" + disk],
                      ["--filter=qcow2", "file", image,
                       "qcow2-backing=dir:" + tmp]):
        refused(["cbw-target", disk], "--filter=cbw", *arguments,
                "exports=one", "cbw-snapshot=s", "cbw-target=" + disk)


def test_limit_of_files(tmp):
    """A target that cannot grow because of ulimit -f."""
    for policy in ("break-guest-write", "break-snapshot"):
        with open(os.path.join(tmp, "target"), "wb") as file:
            file.truncate(SIZE)
        with memory(tmp) as (server, control):
            resource.prlimit(int(server_pid(server)), resource.RLIMIT_FSIZE,
                             (MiB, MiB))
            guest = server.connect()
            guest.pwrite(b"d" * SIZE, 0)
            qmp.refused(control, ["large"], "cbw-snapshot-create",
                        node="disk", name="s")
            cbw.create(control, "s", target=file.name, on_cbw_error=policy)
            guest.pwrite(b"x" * MiB, 0)
            if policy == "break-snapshot":
                guest.pwrite(b"x", 2 * MiB)
            else:
                cbw.fails(guest.pwrite, b"x", 2 * MiB, errno="ENOSPC")
                view = server.connect("snapshot/s")
                qf.equal("view", cbw.read_all(view), b"d" * SIZE)
                close(view)
            close(guest)


def test_progress(tmp):
    """-v tells of each tenth."""
    with memory(tmp, before=["-v"]) as (server, control):
        guest = server.connect()
        guest.pwrite(b"d" * SIZE, 0)
        cbw.create(control, "s")
        for at in range(0, SIZE, CLUSTER):
            guest.pwrite(b"x", at)
        found = re.findall(r"snapshot s: (\d+)% ", server.log())
        qf.equal("progress", found, [str(n) for n in range(10, 101, 10)])
        close(guest)


# -------------------------------------------------------------- faults

def check_guest_and_view(server, guest, written, view_data, what):
    """The guest has what it wrote; the view is right or broken."""
    qf.check(cbw.read_all(guest) == bytes(written), f"{what}: the guest's "
             "data is wrong")
    if view_data is None:
        cbw.fails(server.connect, "snapshot/s")
        return
    view = server.connect("snapshot/s")
    qf.check(cbw.read_all(view) == view_data, f"{what}: the view is wrong")
    close(view)


def write_all(guest, written):
    """Write each cluster; what failed is not there.  The number of
    failures."""
    failed = 0
    for at in range(0, SIZE, CLUSTER):
        try:
            guest.pwrite(b"x" * 1000, at + 500)
            written[at + 500:at + 1500] = b"x" * 1000
        except nbd.Error:
            failed += 1
    return failed


def fault(tmp, what, target, policy, errno=None, env=None, **arguments):
    """With a target that fails some time."""
    old = b"d" * SIZE
    if target:
        arguments["target"] = target
    with memory(tmp, env=env) as (server, control):
        guest = server.connect()
        guest.pwrite(old, 0)
        cbw.create(control, "s", on_cbw_error=policy, **arguments)
        late = server.connect("snapshot/s")
        written = bytearray(old)
        failed = write_all(guest, written)
        info = cbw.query(control, "s")
        if policy == "break-guest-write":
            qf.check(failed > 0, f"{what}: no write failed")
            qf.equal(what, info["state"], "active")
            if errno:
                at = (SIZE // CLUSTER - 1) * CLUSTER
                cbw.fails(guest.pwrite, b"y", at, errno=errno)
        else:
            qf.equal(f"{what}: failed writes", failed, 0)
            qf.equal(what, info["state"], "broken")
            qf.check(info["reason"], "there is no reason")
            cbw.fails(late.pread, 512, 0)
            cbw.fails(cbw.read_map, late)
        check_guest_and_view(server, guest, written, old if policy ==
                             "break-guest-write" else None, what)
        cbw.delete(control, "s")
        cbw.fails(late.pread, 512, 0)
        close(guest, late)


def test_target_full(tmp):
    for policy in ("break-guest-write", "break-snapshot"):
        below = os.path.join(tmp, policy)
        os.mkdir(below)
        with qf.serve(below, "full", str(SIZE)) as full:
            fault(tmp, "full", full.uri(), policy, "ENOSPC")
            fault(tmp, "full", full.uri(), policy, "ENOSPC", cbw_timeout=60)


def test_file_full(tmp):
    """No space is left for a temporary file."""
    small = os.path.join(tmp, "small-fs")
    os.mkdir(small)
    if qf.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small],
              ok=None).returncode:
        raise qf.Skip("no file system can be mounted here")
    try:
        for policy in ("break-guest-write", "break-snapshot"):
            for seconds in (0, 60):
                fault(tmp, "small", None, policy, "ENOSPC",
                      env={"TMPDIR": small}, cbw_timeout=seconds)
                stat = os.statvfs(small)
                qf.equal("blocks left", stat.f_bfree, stat.f_blocks)
    finally:
        qf.run(["umount", small])


def test_target_eio(tmp):
    """After a while."""
    for policy in ("break-guest-write", "break-snapshot"):
        below = os.path.join(tmp, "eio" + policy)
        trigger = os.path.join(tmp, "trigger" + policy)
        os.mkdir(below)
        with qf.serve(below, "--filter=error", "memory", str(SIZE),
                      "error-pwrite=EIO", "error-pwrite-rate=50%",
                      "error-file=" + trigger) as server:
            with open(trigger, "w"):
                pass
            fault(tmp, "EIO", server.uri(), policy)


def test_file_too_large(tmp):
    """A file that cannot grow: the copies fail, nothing else does."""
    target = os.path.join(tmp, "fixed")
    with open(target, "wb") as file:
        file.truncate(SIZE)
    os.chmod(target, 0o600)
    old = b"d" * SIZE
    with memory(tmp) as (server, control):
        guest = server.connect()
        guest.pwrite(old, 0)
        cbw.create(control, "s", target=target)
        guest.pwrite(b"x" * SIZE, 0)
        check_guest_and_view(server, guest, b"x" * SIZE, old, "fixed")
        used = blocks(target)
        qf.check(used >= SIZE, f"the target takes {used} bytes")
        cbw.delete(control, "s")
        qf.check(blocks(target) < used // 4, "the space was not freed")
        qf.equal("size", os.path.getsize(target), SIZE)
        close(guest)


def test_target_gone(tmp):
    """The target's server is killed."""
    for policy in ("break-guest-write", "break-snapshot"):
        old = b"d" * SIZE
        below = os.path.join(tmp, "gone" + policy)
        os.mkdir(below)
        target = qf.Server(below, ["memory", str(SIZE)])
        with memory(tmp) as (server, control):
            guest = server.connect()
            guest.pwrite(old, 0)
            cbw.create(control, "s", target=target.uri(), on_cbw_error=policy)
            guest.pwrite(b"x" * CLUSTER, 0)
            view = server.connect("snapshot/s")
            uri = target.uri()
            target.kill()
            cbw.fails(view.pread, 1, 0)
            qf.equal("on the disk", bytes(view.pread(1, CLUSTER)), b"d")
            written = bytearray(b"x" * CLUSTER + old[CLUSTER:])
            failed = write_all(guest, written)
            qf.equal(f"{uri}: failed", failed, SIZE // CLUSTER - 1
                     if policy == "break-guest-write" else 0)
            qf.check(cbw.read_all(guest) == bytes(written), "guest's data")
            cbw.delete(control, "s")
            guest.pwrite(b"z" * SIZE, 0)
            close(guest, view)


class Hanging:
    """A target whose server can be stopped."""

    def __init__(self, tmp):
        self.dir = os.path.join(tmp, f"hang{time.monotonic()}")
        os.mkdir(self.dir)
        self.server = qf.Server(self.dir, ["memory", str(SIZE)])
        self.pid = server_pid(self.server)

    def uri(self):
        return self.server.uri()

    def hang(self):
        """When this returns none of its threads runs."""
        os.kill(self.pid, signal.SIGSTOP)
        cbw.wait_until(lambda: set(self.states()) == {"T"}, "the stop")

    def states(self):
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            with open(f"/proc/{self.pid}/task/{thread}/stat") as stat:
                yield stat.read().rpartition(")")[2].split()[0]

    def go_on(self):
        os.kill(self.pid, signal.SIGCONT)

    def kill(self):
        self.go_on()
        self.server.kill()


def timed(function, *args):
    began = time.monotonic()
    function(*args)
    return time.monotonic() - began


def test_hang_break_snapshot(tmp):
    target = Hanging(tmp)
    old = b"d" * SIZE
    with memory(tmp) as (server, control):
        guest = server.connect()
        guest.pwrite(old, 0)
        cbw.create(control, "s", target=target.uri(), cbw_timeout=1,
                   on_cbw_error="break-snapshot")
        view, other = server.connect("snapshot/s"), server.connect()
        guest.pwrite(b"x" * CLUSTER, 0)
        target.hang()
        stuck = threading.Thread(target=cbw.fails,
                                 args=(view.pread, CLUSTER, 0))
        stuck.start()
        took = timed(guest.pwrite, b"x" * MiB, CLUSTER)
        qf.check(0.9 < took < 10, f"the write took {took} s")
        took = timed(other.pwrite, b"x" * MiB, MiB + CLUSTER)
        qf.check(took < 1, f"the next write took {took} s")
        stuck.join()
        info = cbw.query(control, "s")
        qf.equal("state", info["state"], "broken")
        qf.check("1 second" in info["reason"], info["reason"])
        qf.check(cbw.read_all(guest) == b"x" * (2 * MiB + CLUSTER)
                 + old[2 * MiB + CLUSTER:], "the guest's data is wrong")
        took = timed(cbw.delete, control, "s")
        qf.check(took < 5, f"deleting took {took} s")
        close(guest, view, other)
    target.kill()


def test_hang_break_guest_write(tmp):
    """Writes fail after the time limit, reads go on; when the target comes
    back all is well, as what was being copied was old."""
    target = Hanging(tmp)
    old = b"d" * SIZE
    with memory(tmp) as (server, control):
        guest, reader = server.connect(), server.connect()
        guest.pwrite(old, 0)
        cbw.create(control, "s", target=target.uri(), cbw_timeout=1)
        view = server.connect("snapshot/s")
        target.hang()
        took = timed(cbw.fails, guest.pwrite, b"x" * CLUSTER, 0)
        qf.check(0.9 < took < 10, f"the write took {took} s")
        took = timed(reader.pread, SIZE, 0)
        qf.check(took < 1, f"reading took {took} s")
        qf.equal("view", cbw.read_all(view), old)
        target.go_on()
        guest.pwrite(b"x" * MiB, 0)
        qf.equal("view", cbw.read_all(view), old)
        qf.equal("guest", cbw.read_all(guest), b"x" * MiB + old[MiB:])
        qf.equal("state", cbw.query(control, "s")["state"], "active")
        close(guest, view, reader)
    target.kill()


def test_hang_and_delete(tmp):
    """Without a time limit, deleting the snapshot lets writes go on."""
    target = Hanging(tmp)
    with memory(tmp) as (server, control):
        guest = server.connect()
        guest.pwrite(b"d" * SIZE, 0)
        cbw.create(control, "s", target=target.uri())
        target.hang()
        took = []
        writer = threading.Thread(target=lambda: took.append(
            timed(guest.pwrite, b"x" * CLUSTER, 0)))
        writer.start()
        time.sleep(0.5)
        qf.equal("took", took, [])
        cbw.create(control, "t")         # the gate can be closed
        cbw.delete(control, "s")
        writer.join()
        view = server.connect("snapshot/t")
        qf.equal("t", cbw.read_all(view), b"d" * SIZE)
        qf.equal("guest", bytes(guest.pread(CLUSTER, 0)), b"x" * CLUSTER)
        close(guest, view)
    target.kill()


def test_hang_and_stop(tmp):
    """Neither a guest's write nor a reader keeps the server from ending."""
    target = Hanging(tmp)
    with memory(tmp) as (server, control):
        guest = server.connect()
        guest.pwrite(b"d" * SIZE, 0)
        cbw.create(control, "s", target=target.uri())
        view = server.connect("snapshot/s")
        guest.pwrite(b"x" * CLUSTER, 0)
        target.hang()
        guest.aio_pwrite(b"x" * CLUSTER, CLUSTER)
        view.aio_pread(nbd.Buffer(512), 0)
        time.sleep(0.5)
        began = time.monotonic()
        server.process.terminate()
        del guest, view         # nbdkit waits for clients that stay
        try:
            server.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            raise qf.Fail("the server does not end") from None
        took = time.monotonic() - began
        qf.check(took < 10, f"stopping took {took} s")
        qf.equal("status", server.process.returncode, 0)
        server.stop = lambda: None
    target.kill()


def test_client_gone(tmp):
    """A guest that goes in the middle of a write; a reader is killed."""
    target = Hanging(tmp)
    old = b"d" * SIZE
    with memory(tmp) as (server, control):
        guest, other = server.connect(), server.connect()
        guest.pwrite(old, 0)
        cbw.create(control, "s", target=target.uri())
        target.hang()
        lost = server.connect()
        lost.aio_pwrite(b"x" * CLUSTER, 0)
        del lost
        reader = subprocess.Popen(
            [qf.tool("nbdcopy"), server.uri("snapshot/s"), "null:"])
        time.sleep(0.5)
        reader.kill()
        reader.wait()
        target.go_on()
        other.pwrite(b"y" * CLUSTER, CLUSTER)
        view = server.connect("snapshot/s")
        qf.equal("view", cbw.read_all(view), old)
        data = cbw.read_all(other)
        qf.check(data[:CLUSTER] in (b"x" * CLUSTER, old[:CLUSTER]) and
                 data[CLUSTER:] == b"y" * CLUSTER + old[2 * CLUSTER:],
                 "the guest's data is wrong")
        close(guest, other, view)
    target.kill()


def test_source_fails(tmp):
    """The disk cannot be read when it should be copied."""
    for policy in ("break-guest-write", "break-snapshot"):
        trigger = os.path.join(tmp, "reads fail")
        below = os.path.join(tmp, "source" + policy)
        os.mkdir(below)
        with qf.serve(below, "--filter=error", "memory", str(SIZE),
                      "error-pread=EIO", "error-pread-rate=100%",
                      "error-file=" + trigger) as source, \
                cbw.served(tmp, "nbd", "socket=" + source.sock) \
                as (server, control):
            guest = server.connect()
            guest.pwrite(b"d" * SIZE, 0)
            cbw.create(control, "s", on_cbw_error=policy)
            with open(trigger, "w"):
                pass
            if policy == "break-guest-write":
                cbw.fails(guest.pwrite, b"x", 0, errno="EIO")
            else:
                guest.pwrite(b"x", 0)
            os.unlink(trigger)
            if policy == "break-guest-write":
                view = server.connect("snapshot/s")
                qf.equal("view", cbw.read_all(view), b"d" * SIZE)
                close(view)
                guest.pwrite(b"x", 0)
            else:
                cbw.fails(server.connect, "snapshot/s")
            qf.equal("guest", bytes(guest.pread(2, 0)), b"xd")
            close(guest)


def open_files(pid):
    """What the server has open, but sockets and the like."""
    found = []
    for link in glob.glob(f"/proc/{pid}/fd/*"):
        try:
            found.append(os.readlink(link))
        except OSError:
            pass
    return sorted(f for f in found if f.startswith("/"))


def test_nothing_left(tmp):
    """Neither files nor threads nor memory of snapshots that are gone."""
    with memory(tmp, env={"TMPDIR": tmp}) as (server, control):
        guest = server.connect()
        pid = server_pid(server)
        before = open_files(pid)
        target = Hanging(tmp)

        def threads():
            return len(os.listdir(f"/proc/{pid}/task"))

        cbw.create(control, "warm")
        cbw.delete(control, "warm")
        count = threads()
        for number in range(20):
            guest.pwrite(b"d" * SIZE, 0)
            arguments = ({}, {"cbw_timeout": 60},
                         {"target": os.path.join(tmp, "t")},
                         {"target": target.uri()})[number % 4]
            cbw.create(control, "s", **arguments)
            temporary = [f for f in open_files(pid) if f not in before]
            qf.equal("open", len(temporary), 0 if number % 4 == 3 else 1)
            view = server.connect("snapshot/s")
            guest.pwrite(b"x" * SIZE, 0)
            cbw.delete(control, "s")    # under a reader
            cbw.fails(view.pread, 512, 0)
            cbw.fails(view.pread, 512, SIZE - 512)
            # Its space is free at once; a thread may still be closing it.
            cbw.wait_until(lambda: open_files(pid) == before, "closed files")
            close(view)
        cbw.wait_until(lambda: threads() <= count + 20, "threads")
        qf.check(not glob.glob(os.path.join(tmp, "cbw.*")), "files are left")
        close(guest)
        target.kill()


def test_read_only(tmp):
    path = os.path.join(tmp, "qmp")
    with qf.serve(tmp, "-r", "--filter=cbw", "--filter=dirty-tracking",
                  "memory", str(SIZE), "cbw-snapshot=s", "cbw-discard=on",
                  "qmp=" + path) as server:
        view = server.connect("snapshot/s")
        qf.check(view.is_read_only(), "a view can be written to")
        qf.equal("content", cbw.read_all(view), bytes(SIZE))
        close(view)


def test_formats(tmp):
    """The target is a qcow2 behind qemu-nbd."""
    old = os.urandom(SIZE)
    with cbw.qemu_nbd(tmp, SIZE) as uri, memory(tmp) as (server, control):
        guest = server.connect()
        guest.pwrite(old, 0)
        cbw.create(control, "s", target=uri)
        for same in (uri, uri + "&", uri.replace("///", "////")):
            qmp.refused(control, ["in use"], "cbw-snapshot-create",
                        node="disk", name="t", target=same)
        guest.pwrite(bytes(SIZE), 0)
        view = server.connect("snapshot/s")
        qf.equal("view", cbw.read_all(view), old)
        close(guest, view)
        cbw.delete(control, "s")


# In the order in which they stand here.
PARTS = [value for name, value in list(globals().items())
         if name.startswith("test_")]


def test(tmp):
    qf.need("qemu-img", "qemu-io", "qemu-nbd", "nbdcopy")
    qf.need_plugins("full", "nbd")
    qf.parts(tmp, *PARTS)


qf.main(test)
