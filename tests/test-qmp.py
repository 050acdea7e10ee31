#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The QMP server: the protocol, the commands beside QEMU's answers, and
input of all sorts that makes no sense."""

import contextlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import threading
import time

import images
import qf
import qmp
from qf import KiB, MiB


# How long others may have to wait, whatever one client does, and how much
# memory it may cost.
PATIENCE = 20 if qf.SLOW else 2
MEMORY_LIMIT = 64 * MiB
MAX_CLIENTS = 16

MEMORY = ("--filter=dirty-tracking", "memory", "10M", "dirty-bitmap=b0",
          "dirty-bitmap=b1,granularity=512,disabled=on")

# Members that QEMU's schema demands.
NODE = {"file": str, "ro": bool, "drv": str, "backing_file_depth": int,
        "encrypted": bool, "detect_zeroes": str, "bps": int, "bps_rd": int,
        "bps_wr": int, "iops": int, "iops_rd": int, "iops_wr": int,
        "image": dict, "cache": dict, "write_threshold": int,
        "node-name": str}
IMAGE = {"filename": str, "format": str, "virtual-size": int}
CACHE = {"writeback": bool, "direct": bool, "no-flush": bool}
BITMAP = {"name": str, "count": int, "granularity": int, "recording": bool,
          "busy": bool, "persistent": bool}


class Served:
    """A server with a QMP socket, as a context."""

    def __init__(self, tmp, *args):
        self.path = os.path.join(tmp, "qmp")
        self.context = qf.serve(tmp, *(args or MEMORY), "qmp=" + self.path)

    def __enter__(self):
        self.server = self.context.__enter__()
        return self.server, self.path

    def __exit__(self, *args):
        log = self.server.log()
        result = self.context.__exit__(*args)
        qf.check("CRITICAL" not in log and "WARNING" not in log, log)
        return result


def check_members(what, value, members, optional=()):
    for name, kind in members.items():
        qf.check(name in value, f"{what} has no {name}")
        qf.check(type(value[name]) is kind, f"{what}: {name} is no {kind}")
    unknown = set(value) - set(members) - set(optional)
    qf.check(not unknown, f"{what} has {unknown}")


def check_node(node):
    check_members("a node", node, NODE, ["dirty-bitmaps"])
    check_members("cache", node["cache"], CACHE)
    check_members("image", node["image"], IMAGE,
                  ["actual-size", "cluster-size", "dirty-flag", "encrypted",
                   "format-specific"])
    for bitmap in node.get("dirty-bitmaps", []):
        check_members("a bitmap", bitmap, BITMAP)


def test_negotiation(tmp):
    with Served(tmp) as (_, path):
        client = qmp.Client(path, negotiate=False)
        for command, arguments in [("nonsense", {}), *every_command()]:
            qf.equal(command, qmp.refused(
                client, ["qmp_capabilities"], command, **arguments).cls,
                "CommandNotFound")
        qmp.refused(client, ["enable"], "qmp_capabilities", enable=["oob"])
        qmp.refused(client, ["enable"], "qmp_capabilities", enable="oob")
        qmp.refused(client, ["x"], "qmp_capabilities", x=1)
        client("qmp_capabilities", enable=[])
        qf.equal("again", qmp.refused(client, [], "qmp_capabilities").cls,
                 "CommandNotFound")
        version = client("query-version")
        check_members("version", version, {"qemu": dict, "package": str})
        check_members("qemu", version["qemu"],
                      {"major": int, "minor": int, "micro": int})
        qf.equal("bitmaps", list(client.bitmaps()), ["b1", "b0"])
        client.close()


def every_command():
    """With right arguments, in an order in which all of them succeed."""
    new = {"node": "disk", "name": "new"}
    yield "block-dirty-bitmap-add", {**new, "granularity": 4096,
                                     "persistent": False, "disabled": True}
    for kind in ("enable", "disable", "clear"):
        yield "block-dirty-bitmap-" + kind, new
    yield "block-dirty-bitmap-merge", {
        "node": "disk", "target": "new",
        "bitmaps": ["b0", {"node": "disk", "name": "b1"}]}
    yield "x-debug-block-dirty-bitmap-sha256", new
    yield "block-dirty-bitmap-move", {
        **new, "target-node": "disk", "target-name": "moved"}
    yield "transaction", {
        "actions": [{"type": "block-dirty-bitmap-clear",
                     "data": {"node": "disk", "name": "moved"}}],
        "properties": {"completion-mode": "individual"}}
    yield "block-dirty-bitmap-remove", {"node": "disk", "name": "moved"}
    yield "query-named-block-nodes", {"flat": True}
    yield "query-named-block-nodes", {}
    yield "query-commands", {}
    yield "query-version", {}


def test_every_command(tmp):
    """What query-commands lists; no other arguments, none missing."""
    with Served(tmp) as (_, path):
        client = qmp.Client(path)
        commands = list(every_command())
        listed = client("query-commands")
        for entry in listed:
            check_members("a command", entry, {"name": str})
        qf.equal("commands", sorted(entry["name"] for entry in listed),
                 sorted({name for name, _ in commands}
                        | {"qmp_capabilities"}))
        for command, arguments in commands:
            refuse_variants(client, command, arguments)
            result = client.request(command, arguments)
            if command.startswith("block-dirty") or command == "transaction":
                qf.equal(f"result of {command}", result, {})
        qf.equal("bitmaps", list(client.bitmaps()), ["b1", "b0"])
        client.close()


def refuse_variants(client, command, arguments):
    """The command with something wrong in its arguments."""
    optional = {"granularity", "persistent", "disabled", "properties", "flat",
                "target-name"}
    qmp.refused(client, ["bogus"], command, **arguments, bogus=1)
    for name, value in arguments.items():
        for wrong in (None, 5, "x", True, [5], {"x": 5}):
            if type(wrong) is not type(value):
                qmp.refused(client, [name], command,
                            **{**arguments, name: wrong})
        if name not in optional:
            rest = {n: v for n, v in arguments.items() if n != name}
            qmp.refused(client, [name], command, **rest)


def test_nodes(tmp):
    with Served(tmp) as (server, path):
        client = qmp.Client(path)
        nodes = client("query-named-block-nodes", flat=True)
        check_node(nodes[0])
        qf.equal("size", nodes[0]["image"]["virtual-size"], 10 * MiB)
        qf.equal("bitmaps", list(client.bitmaps()), ["b1", "b0"])
        handle = server.connect()
        handle.pwrite(b"x", 10 * MiB - 1)
        handle.shutdown()
        qf.equal("count", client.bitmaps()["b0"]["count"], 64 * KiB)
        client.close()


def test_counts(tmp):
    """The last granule counts as a whole; the newest bitmap is first."""
    size = 10 * MiB + 1
    with Served(tmp, "--filter=dirty-tracking", "memory", str(size)) \
         as (server, path):
        client = qmp.Client(path)
        for bits in range(9, 32):
            client("block-dirty-bitmap-add", node="disk", name=f"b{bits}",
                   granularity=1 << bits)
        handle = server.connect()
        handle.pwrite(b"x", size - 1)
        check_counts(client, lambda granularity: granularity)
        handle.zero(size, 0)
        check_counts(client, lambda granularity:
                     -(-size // granularity) * granularity)
        handle.shutdown()
        client.close()


def check_counts(client, expected):
    check_node(client("query-named-block-nodes")[0])
    bitmaps = client.bitmaps()
    qf.equal("order", list(bitmaps), [f"b{i}" for i in range(31, 8, -1)])
    for name, bitmap in bitmaps.items():
        qf.equal(f"{name}", bitmap, {
            "name": name, "granularity": 1 << int(name[1:]),
            "count": expected(bitmap["granularity"]), "recording": True,
            "busy": False, "persistent": False})


def test_image(tmp):
    for options in ("compat=0.10", "cluster_size=4k,compression_type=zlib",
                    "extended_l2=on,refcount_bits=32", "lazy_refcounts=on"):
        path = os.path.join(tmp, "image.qcow2")
        qf.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "5M")
        info = json.loads(qf.qemu_img("info", "--output=json", path))
        with Served(tmp, "-r", "--filter=qcow2", "file", path) as (_, socket):
            client = qmp.Client(socket)
            node = client("query-named-block-nodes")[0]
            check_node(node)
            qf.equal("drv", node["drv"], "qcow2")
            for name in ("virtual-size", "cluster-size", "format",
                         "dirty-flag", "filename"):
                qf.equal(name, node["image"][name], info[name])
            qf.equal("format-specific",
                     node["image"]["format-specific"]["data"],
                     info["format-specific"]["data"])
            names = [c["name"] for c in client("query-commands")]
            qf.check("transaction" not in names,
                     "bitmaps could be added that nobody marks")
            compare_with_qemu(tmp, node, path)
            client.close()


def compare_with_qemu(tmp, node, path):
    """What QEMU says of a node that it has opened."""
    if not qf.tool("qemu-storage-daemon"):
        return
    with storage_daemon(tmp, "--blockdev", json.dumps({
            "driver": "qcow2", "node-name": "disk", "read-only": True,
            "file": {"driver": "file", "filename": path}})) as qemu:
        expected = [n for n in qemu("query-named-block-nodes")
                    if n["node-name"] == "disk"][0]
    # QEMU counts blocks of the file, and leaves out encrypted=false.
    for image in (node["image"], expected["image"]):
        del image["actual-size"]
        image.setdefault("encrypted", False)
    qf.equal("a node", node, expected)


@contextlib.contextmanager
def storage_daemon(tmp, *args):
    """A qemu-storage-daemon; yields its client."""
    path = os.path.join(tmp, "plain.qmp")
    process = subprocess.Popen([
        qf.tool("qemu-storage-daemon"), *args, "--chardev",
        f"socket,id=qmp,path={path},server=on,wait=off",
        "--monitor", "chardev=qmp"], stdin=subprocess.DEVNULL)
    try:
        client = qmp.Client(path)
        yield client
        client.close()
    finally:
        process.terminate()
        process.wait()


def test_encrypted_image(tmp):
    path = os.path.join(tmp, "encrypted.qcow2")
    images.create_encrypted(path, "luks", "opensesame", MiB)
    with Served(tmp, "-r", "--filter=qcow2", "file", path,
                "qcow2-passphrase=opensesame") as (_, socket):
        client = qmp.Client(socket)
        node = client("query-named-block-nodes")[0]
        check_node(node)
        qf.equal("encrypted", [node["encrypted"],
                               node["image"]["encrypted"]], [True, True])
        client.close()


def bitmap_commands():
    """Commands on node disk, good and bad ones."""
    def command(kind, /, **args):
        return "block-dirty-bitmap-" + kind, {"node": "disk", **args}

    yield command("add", name="x")
    yield command("add", name="x")
    for granularity in (0, 1, 256, 1000, 512, 4096, -1, "4k", 2.5, True,
                        1 << 31, 1 << 32, (1 << 32) + 512, (1 << 63) - 1,
                        -512, 512.0, None):
        yield command("add", name=f"g{granularity}", granularity=granularity)
    yield command("add", name="")
    yield command("add", name="n" * 1023)
    yield command("add", name="n" * 1024)
    yield command("add", name="off", disabled=True)
    yield command("add", name="odd", disabled="yes")
    yield command("add", name=5)
    yield command("add")
    yield command("add", name="more", bogus=1)
    yield command("add", name="p", persistent=True)
    yield "block-dirty-bitmap-add", {"node": "nowhere", "name": "x"}
    yield "block-dirty-bitmap-add", {"name": "x"}
    for action in ("enable", "disable", "clear", "remove"):
        yield command(action, name="missing")
        yield command(action, name="off")
    yield command("merge", target="x", bitmaps=["g512", "g4096"])
    yield command("merge", target="x",
                  bitmaps=[{"node": "disk", "name": "g512"}])
    yield command("merge", target="x", bitmaps=["missing"])
    yield command("merge", target="x", bitmaps=["g512", "missing"])
    yield command("merge", target="g4096", bitmaps=["x", "x", "g4096"])
    yield command("merge", target="x",
                  bitmaps=[{"node": "nowhere", "name": "g512"}])
    yield command("merge", target="x", bitmaps=[{"node": "disk"}])
    yield command("merge", target="x", bitmaps=[{
        "node": "disk", "name": "g512", "bogus": 1}])
    yield command("merge", target="missing", bitmaps=["x"])
    yield command("merge", target="x", bitmaps=[5])
    yield command("merge", target="x", bitmaps="g512")
    yield command("merge", target="x")
    yield "x-debug-block-dirty-bitmap-sha256", {"node": "disk", "name": "x"}
    yield "x-debug-block-dirty-bitmap-sha256", {"node": "disk", "name": "y"}
    yield "no-such-command", {}
    yield "query-version", {"argument": 1}
    yield from transactions()


def transactions():
    def action(kind, /, **args):
        return {"type": "block-dirty-bitmap-" + kind,
                "data": {"node": "disk", **args}}

    abort = {"type": "abort", "data": {}}
    for actions in (
            [], [action("add", name="t1"), action("add", name="t2")],
            [action("add", name="t3"), abort],
            [abort, action("add", name="t3")],
            [action("add", name="t4"), action("clear", name="missing")],
            [action("disable", name="t1"), action("add", name="t1")],
            [action("add", name="t5"), action("disable", name="t5"),
             action("merge", target="t5", bitmaps=["x"])],
            [action("clear", name="x"), action("enable", name="t1"),
             action("add", name="t1")],
            [action("remove", name="t2"), abort],
            [action("remove", name="x"), action("clear", name="x")],
            [action("remove", name="x"), action("remove", name="x")],
            [action("clear", name="x"), action("merge", target="t1",
                                               bitmaps=["x"]), abort],
            [action("merge", target="g512", bitmaps=["x"]),
             action("clear", name="x"), action("merge", target="x",
                                               bitmaps=["missing"])],
            [action("disable", name="x"), action("enable", name="x")],
            [action("move", name="x", bogus=1)], [action("add")],
            [action("add", name="t6"), {"type": "block-dirty-bitmap-add",
                                        "data": {"node": "nowhere",
                                                 "name": "t6"}}],
            [{"type": "abort", "data": {"x": 1}}], [{"data": {}}], [None],
            [{"type": 5, "data": {}}], [{"type": "abort", "data": []}],
            [{"type": "abort", "data": {}, "bogus": 1}],
            [{"type": "no-such-action", "data": {}}],
            [{"type": "abort"}], [5], {"type": "abort", "data": {}}):
        yield "transaction", {"actions": actions}
    yield "transaction", {"actions": [], "properties": {}}
    yield "transaction", {"actions": [], "bogus": 1}
    yield "transaction", {}


def outcome(client, command, arguments):
    try:
        return client.request(command, arguments)
    except qmp.Error as error:
        return error.cls


def digests(client):
    return {name: client("x-debug-block-dirty-bitmap-sha256", node="disk",
                         name=name) for name in client.bitmaps()}


class Pair:
    """QEMU and the filter, which shall do the same."""

    def __init__(self, ours, server, qemu, nbd_path):
        self.ours, self.qemu = ours, qemu
        self.handles = [server.connect(), qf.nbd.NBD()]
        self.handles[1].connect_unix(nbd_path)

    def write(self, count, offset):
        for handle in self.handles:
            handle.pwrite(b"x" * count, offset)

    def command(self, command, arguments):
        """Success, class of error, and what the bitmaps are afterwards."""
        expected, actual = (outcome(client, command, arguments)
                            for client in (self.qemu, self.ours))
        what = f"{command} {arguments}"
        qf.equal(what, actual, expected)
        qf.equal("bitmaps after " + what, list(self.ours.bitmaps().values()),
                 list(self.qemu.bitmaps().values()))
        qf.equal("digests after " + what, digests(self.ours),
                 digests(self.qemu))
        return isinstance(actual, dict)

    def close(self):
        for handle in self.handles:
            handle.shutdown()
        self.ours.close()
        self.qemu.close()


@contextlib.contextmanager
def beside_qemu(tmp):
    qf.need("qemu-storage-daemon")
    process, nbd_path, qemu = qmp.storage_daemon(tmp, 10 * MiB)
    try:
        with Served(tmp, "--filter=dirty-tracking", "memory", "10M") \
             as (server, path):
            pair = Pair(qmp.Client(path), server, qemu, nbd_path)
            yield pair
            pair.close()
    finally:
        process.terminate()
        process.wait()


def test_same_as_qemu(tmp):
    with beside_qemu(tmp) as pair:
        for number, (command, arguments) in enumerate(bitmap_commands()):
            pair.command(command, arguments)
            pair.write(700, 12345 * number)


def random_action(rng):
    """Never a merge of nothing, with which QEMU 7.2 crashes."""
    kind = rng.choice(("add", "add", "remove", "clear", "enable", "disable",
                       "merge", "merge"))
    data = {"node": rng.choice(["disk"] * 30 + ["nowhere"])}
    data["target" if kind == "merge" else "name"] = rng.choice("abcde")
    if kind == "add":
        if rng.random() < 0.7:
            data["granularity"] = 1 << rng.randint(8, 20)
        data["disabled"] = rng.random() < 0.3
    if kind == "merge":
        data["bitmaps"] = rng.choices("abcde", k=rng.randint(1, 2))
    return "block-dirty-bitmap-" + kind, data


def suits_qemu(kind, data, names, removed):
    """QEMU keeps the name of a removed bitmap to the end, we do not; 7.2
    crashes if it cannot enable one."""
    if kind.endswith("add"):
        return data["name"] not in removed
    return not kind.endswith("enable") or (
        data["node"] == "disk" and data["name"] in names - removed)


def random_transaction(rng, names):
    removed = set()
    for _ in range(rng.randint(1, 4)):
        kind, data = random_action(rng)
        if suits_qemu(kind, data, names, removed):
            yield {"type": kind, "data": data}
            if kind.endswith("remove"):
                removed.add(data["name"])
    if rng.random() < 0.1:
        yield {"type": "abort", "data": {}}


def test_random_beside_qemu(tmp):
    rng = random.Random(4)
    done = 0
    with beside_qemu(tmp) as pair:
        for _ in range(100 if qf.SLOW else 600):
            if rng.random() < 0.5:
                command, arguments = random_action(rng)
            else:
                command = "transaction"
                names = set(pair.ours.bitmaps())
                arguments = {"actions": list(random_transaction(rng, names))}
            done += pair.command(command, arguments)
            pair.write(rng.randint(1, 3000), rng.randrange(9 * MiB))
    qf.check(done > 20, f"only {done} commands succeeded")


def test_messages(tmp):
    """They name the bitmap and the node."""
    add, merge = "block-dirty-bitmap-add", "block-dirty-bitmap-merge"
    move = "block-dirty-bitmap-move"
    with Served(tmp) as (_, path):
        client = qmp.Client(path)

        def refused(words, command, **arguments):
            qmp.refused(client, words, command, **{"node": "disk",
                                                   **arguments})

        for kind in ("clear", "remove", "enable", "disable"):
            command = "block-dirty-bitmap-" + kind
            refused(["bx", "disk", "not found"], command, name="bx")
            refused(["sdx"], command, name="b0", node="sdx")
        refused(["b0", "disk", "exists"], add, name="b0")
        refused(["512", "1000"], add, name="bx", granularity=1000)
        refused(["4294967296"], add, name="bx", granularity=1 << 32)
        refused(["bx", "disk", "persistent"], add, name="bx",
                persistent=True)
        refused(["empty"], add, name="")
        refused(["1024", "1023"], add, name="n" * 1024)
        refused(["1024"], add, name="\u00e9" * 512)
        refused(["bx", "disk"], merge, target="b0", bitmaps=["bx"])
        refused(["bx", "disk"], merge, target="bx", bitmaps=["b0"])
        refused(["sdx"], merge, target="b0",
                bitmaps=[{"node": "sdx", "name": "b0"}])
        refused(["b1", "disk", "exists"], move, name="b0",
                target_node="disk", target_name="b1")
        refused(["b0", "exists"], move, name="b0", target_node="disk")
        refused(["sdx"], move, name="b0", target_node="sdx")
        qmp.refused(client, ["no-such"], "no-such")
        qmp.refused(client, ["no-such"], "transaction",
                    actions=[{"type": "no-such", "data": {}}])
        qmp.refused(client, ["grouped"], "transaction", actions=[],
                    properties={"completion-mode": "grouped"})
        client(merge, node="disk", target="b0", bitmaps=[])
        qf.equal("names", list(client.bitmaps()), ["b1", "b0"])
        client.close()


# ---------------------------------------------------- busy and read-only

def changes(name, other):
    """Commands that change a bitmap, or what is in it."""
    target = {"node": "disk", "name": name}
    for kind in ("clear", "remove", "enable", "disable"):
        yield "block-dirty-bitmap-" + kind, target
    yield "block-dirty-bitmap-merge", {"node": "disk", "target": name,
                                       "bitmaps": [other]}
    yield "block-dirty-bitmap-move", {**target, "target-node": "disk",
                                      "target-name": "moved"}


def refuse_changes(client, word, commands):
    """Alone, and as the last action of a transaction."""
    before = client.bitmaps()
    for command, data in commands:
        words = [word, "'b0'", "'disk'"]
        qmp.refused(client, words, command, **data)
        qmp.refused(client, words, "transaction", actions=[
            {"type": "block-dirty-bitmap-enable",
             "data": {"node": "disk", "name": "b1"}},
            {"type": command, "data": data}])
    qf.equal("bitmaps", client.bitmaps(), before)


def test_busy(tmp):
    """As long as an export shows the bitmap, but not longer."""
    with Served(tmp) as (server, path):
        client = qmp.Client(path)
        for number in (1, 2):
            views = [server.connect("dirty/b0") for _ in range(number)]
            while views:
                bitmap = client.bitmaps()["b0"]
                qf.equal("busy", bitmap["busy"], True)
                refuse_changes(client, "busy", changes("b0", "b1"))
                client("block-dirty-bitmap-merge", node="disk", target="b1",
                       bitmaps=["b0"])
                views.pop().shutdown()
            wait_until_free(client)
        for command, data in sorted(changes("b0", "b1"), key=lambda c:
                                    c[0].endswith("remove")):
            if not command.endswith("move"):
                client.request(command, data)
        client("block-dirty-bitmap-remove", node="disk", name="b0")
        client("block-dirty-bitmap-move", node="disk", name="b1",
               target_node="disk", target_name="b0")
        qf.equal("names", list(client.bitmaps()), ["b0"])
        client.close()


def wait_until_free(client):
    limit = time.monotonic() + PATIENCE
    while client.bitmaps()["b0"]["busy"]:
        qf.check(time.monotonic() < limit, "b0 stays busy")
        time.sleep(0.005)


def test_move(tmp):
    """A bitmap keeps what it holds, and goes on recording."""
    with Served(tmp) as (server, path):
        client = qmp.Client(path)
        handle = server.connect()
        handle.pwrite(b"x", 0)
        before = client.bitmaps()["b0"]
        client("block-dirty-bitmap-move", node="disk", name="b0",
               target_node="disk", target_name="moved/\u00e9")
        qf.equal("moved", client.bitmaps()["moved/\u00e9"],
                 {**before, "name": "moved/\u00e9"})
        handle.pwrite(b"x", MiB)
        qf.equal("count", client.bitmaps()["moved/\u00e9"]["count"],
                 128 * KiB)
        handle.shutdown()
        view = server.connect("dirty/moved/\u00e9")
        view.shutdown()
        client.close()


def test_read_only(tmp):
    """The content of bitmaps stays as it is, but not if they record."""
    with Served(tmp, "-r", *MEMORY) as (server, path):
        client = qmp.Client(path)
        handle = server.connect()
        refuse_changes(client, "read-only", [
            c for c in changes("b0", "b1") if "able" not in c[0]])
        qmp.refused(client, ["disk", "read-only"], "block-dirty-bitmap-add",
                    node="disk", name="new")
        for kind, recording in (("disable", False), ("enable", True)):
            client("block-dirty-bitmap-" + kind, node="disk", name="b0")
            qf.equal(kind, client.bitmaps()["b0"]["recording"], recording)
        qf.equal("ro", client("query-named-block-nodes")[0]["ro"], True)
        handle.shutdown()
        client.close()


# -------------------------------------------------- what makes no sense

def answers(client):
    """The connection still works, at least behind a new line."""
    client.send(b"\n")
    client.send(b'{"execute":"query-version","id":"alive"}\n')
    while True:
        reply = client.receive()
        if reply.get("id") == "alive":
            return "return" in reply
        qf.check("error" in reply, f"not an error: {reply}")


def test_framing(tmp):
    with Served(tmp) as (_, path):
        client = qmp.Client(path)
        query = b'{ "execute": "query-version",\n "id": "}{\\"" }'
        client.send(query * 3)
        for _ in range(3):
            client.reply('}{"')
        for i in range(len(query)):
            client.send(query[i:i + 1])
        client.reply('}{"')
        for ident in (None, 0, -1.5, "x", [1, [2]], {"a": {"b": None}}, True):
            client.send(json.dumps({"execute": "query-version",
                                    "id": ident}).encode())
            client.reply(ident)
        client.close()


QUERY = b'{"execute":"query-version"'

# The connection goes on after the next new line.
NONSENSE = (
    b"nonsense", b"}", b"]", b"[]", b"[1]", b"{}", b'"text"', b"5", b"null",
    b"true", b"-", b",", b":", b"[[]]", b"[{}]", b'{"execute"}',
    b'{"execute":}', b'{"execute":5}', b'{"execute":null}',
    b'{"execute":["query-version"]}', b'{"exec":"query-version"}',
    b'{"execute":""}', b'{"EXECUTE":"query-version"}', b'{"id":5}',
    QUERY + b',"x":1}', QUERY + b',"":1}', QUERY + b',"arguments":[]}',
    QUERY + b',"arguments":5}', QUERY + b',"arguments":null}',
    QUERY + b"]", b"[" + QUERY + b"}]", b"[" + QUERY + b"}}",
    QUERY + b',"id":[}]', QUERY + b',"id":{]}', QUERY + b",}",
    QUERY + b' "id":1}', QUERY + b',,"id":1}', QUERY + b',"id"=1}',
    b"{execute:query-version}", b"{,}", b"{:}", b"{1:2}", b"{null:null}",
    # Two members of one name.
    b'{"execute":"query-version","execute":"query-version"}',
    QUERY + b',"id":1,"id":1}', QUERY + b',"\\u0065xecute":"query-commands"}',
    QUERY + b',"id":[{"a":{},"b":1,"a":{}}]}',
    b'{"execute":"query-named-block-nodes",'
    b'"arguments":{"flat":true,"flat":true}}',
    # Numbers that are none, or not ours.
    *(QUERY + b',"id":' + number + b"}" for number in (
        b"99999999999999999999999", b"9223372036854775808",
        b"18446744073709551616", b"-9223372036854775809", b"1e999", b"-1e999",
        b"1" * 5000, b"01", b"00", b"0x10", b"0x", b"$10", b"+1", b"--1",
        b"- 1", b"-", b"1.", b".5", b"1e", b"1e+", b"1.e5", b"1_000", b"1 2",
        b"0b1", b"1f", b"NaN", b"nan", b"Infinity", b"-inf", b"1,2")),
    # Words, strings, bytes.
    *(QUERY + b',"id":' + word + b"}" for word in (
        b"TRUE", b"truefalse", b"tru", b"nul", b"undefined", b"x",
        b"/*x*/1", b"1//x", b"#1", b"`x`", b'"a\tb"', b'"\\x41"', b'"\\u12"',
        b'"\\u00g0"', b'"\\ud800"', b'"\\udc00"', b'"\\ud800\\u0041"',
        b'"\\u0000"', b'"a\\u0000b"', b'"\0"', b"\0", b'"\xff"', b'"\xc0\x80"',
        b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x82"', b"\xff",
        b"\xef\xbb\xbf1", b"\x7f", b"\x1b", b"\x0b1", b"\xc2\xa01",
        b'"a" "b"', b'"a"b')),
    b'{"execute":"query-version\\u0000"}', b'{"execute\\u0000":"x"}',
    b'{"execute":"x\0y"}', b'{"execute":"\xff\xfe"}', b"\0", b"\xff",
    b"\xef\xbb\xbf" + QUERY + b"}", b"\0" + QUERY + b"}",
    b"/* comment */", b"// " + QUERY + b"}", b"'single'", b"\x1b[31m",
    # Deep, long, many.
    b"{" * 10000, b"[" * 100000, b'{"a":' * 5000, b"[" * 10000 + b"]" * 10000,
    QUERY + b',"id":' + b"[" * 10000 + b"]" * 10000 + b"}",
    QUERY + b',"id":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    QUERY + b',"id":' + b"[" * 64 + b"]" * 64 + b"}",
    b'{"execute":"' + b"x" * 100000 + b'"}', b'{"' + b"x" * 100000 + b'":1}',
    QUERY + b',"id":[' + b"0," * 100000 + b"0]}",
)

# What looks like the beginning of a message: the next line belongs to it.
UNFINISHED = (
    b"{", b"[", b"{[", b"{{{", b'{"', b'{"execute', QUERY, QUERY + b',"id":"',
    QUERY + b',"id":"\\', QUERY + b',"id":"\\"}', b'["]', b"{'\"'}",
    QUERY + b',"id":"a\nb', b"[" * 64, b'{"' + b"x" * 100000,
    b"{" + b"\0" * 100,
)


def error_or_nothing(client, seconds):
    """Replies until the server says nothing for a while."""
    client.socket.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        while True:
            reply = client.receive()
            qf.check(list(reply) == ["error"], f"not an error: {reply}")


def test_nonsense(tmp):
    with Served(tmp) as (server, path), bounded_memory(server):
        client = qmp.Client(path)
        before = client.bitmaps()
        for text in NONSENSE:
            client.send(text)
            qf.check(answers(client), f"no answer after {text[:40]}")
        for text in UNFINISHED:
            with contextlib.closing(qmp.Client(path)) as other:
                other.send(text + b"\n" + QUERY + b',"id":""}\n')
                error_or_nothing(other, 0.01)
            qf.check(answers(client), f"no answer beside {text[:40]}")
        qf.equal("bitmaps", client.bitmaps(), before)
        client.close()


def test_random_bytes(tmp):
    """A request with some bytes changed: one reply at most, no crash."""
    rng = random.Random(5)
    request = (b'{"execute":"transaction","arguments":{"actions":[{"type":'
               b'"abort","data":{}}]},"id":[-1.5e3,true,null,"\\u00e9\\n"]}')
    with Served(tmp) as (server, path), bounded_memory(server):
        for _ in range(200 if qf.SLOW else 2000):
            text = bytearray(request)
            for _ in range(rng.randint(1, 3)):
                text[rng.randrange(len(text))] = rng.choice(
                    b'{}[]",:\\\0\xff 0e-.\'' + bytes([rng.randrange(256)]))
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            client.sendall(b'{"execute":"qmp_capabilities"}' + text)
            client.shutdown(socket.SHUT_WR)
            with client, client.makefile("rb") as replies:
                lines = [json.loads(line.decode()) for line in replies]
            qf.equal("greeting", list(lines[0]), ["QMP"])
            qf.equal("negotiation", lines[1], {"return": {}})
            for line in lines[2:]:
                qf.check("error" in line, f"{bytes(text)}: {line}")


# --------------------------------------------- clients that do not behave

def pid_of(server):
    """Of the nbdkit process itself."""
    with open(os.path.join(server.dir, "pid")) as file:
        return file.read().strip()


def peak_memory(server):
    with open(f"/proc/{pid_of(server)}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) * KiB


def cpu_time(server):
    with open(f"/proc/{pid_of(server)}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def bounded_memory(server):
    before = peak_memory(server)
    yield
    more = peak_memory(server) - before
    qf.check(qf.SLOW or more < MEMORY_LIMIT, f"{more // MiB} MiB of memory")


class Bystander(threading.Thread):
    """A client that wants answers all the time, as a context."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path = path
        self.ended = threading.Event()
        self.worst, self.number, self.failure = 0, 0, None
        self.client = qmp.Client(path)

    def ask(self):
        began = time.monotonic()
        self.client("query-named-block-nodes")
        qmp.Client(self.path).close()
        self.worst = max(self.worst, time.monotonic() - began)
        self.number += 1

    def run(self):
        try:
            while not self.ended.wait(0.01):
                self.ask()
        except Exception as failure:
            self.failure = failure

    def __enter__(self):
        self.start()

    def __exit__(self, *_):
        self.ended.set()
        self.join(qmp.SECONDS)
        self.client.close()
        qf.check(not self.failure, f"a bystander: {self.failure}")
        qf.check(self.number and self.worst < PATIENCE,
                 f"a bystander had to wait {self.worst:.1f} s")


@contextlib.contextmanager
def others_are_served(tmp, *args):
    """Whatever happens here, memory is bounded, and it is over then."""
    with Served(tmp, *args) as (server, path):
        before = files_at_rest(server, path)
        with bounded_memory(server), Bystander(path):
            yield server, path
        wait_for_files(server, before)


def open_files(server):
    return len(os.listdir(f"/proc/{pid_of(server)}/fd"))


def files_at_rest(server, path):
    """Open files without clients.  nbdkit says that it has started before
    the thread that serves QMP has opened its own."""
    with contextlib.closing(qmp.Client(path)):
        number = open_files(server) - 1
    wait_for_files(server, number)
    return number


def wait_for_files(server, expected):
    limit = time.monotonic() + PATIENCE
    while open_files(server) > expected:
        qf.check(time.monotonic() < limit, "connections are not closed")
        time.sleep(0.01)


def test_long_messages(tmp):
    """100 MiB in one line, of all sorts; afterwards it goes on."""
    with others_are_served(tmp) as (_, path):
        client = qmp.Client(path)
        for begin, more in ((b"", b"x"), (b'{"execute":"', b"x"),
                            (b"{", b" "), (QUERY + b',"id":[0', b",0"),
                            (b"", b"{}"), (b"", b'{"":')):
            client.send(begin)
            send_and_read(client, more * (100 * KiB // len(more)),
                          1 if more == b"{}" else 1000)
            qf.check(answers(client), f"no answer after {begin}{more}...")
        client.close()


def send_and_read(client, data, times):
    """Replies are taken, as far as there are any."""
    def read():
        while not ended.is_set():
            error_or_nothing(client, 0.05)

    ended = threading.Event()
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    sender = client.socket.dup()
    sender.settimeout(qmp.SECONDS)
    with sender:
        for _ in range(times):
            sender.sendall(data)
    ended.set()
    reader.join()
    client.socket.settimeout(qmp.SECONDS)


def test_many_values(tmp):
    """Each value costs much more memory than the bytes it has."""
    with others_are_served(tmp) as (_, path):
        client = qmp.Client(path)
        for value in (b"[]", b"{}", b"0", b'""', b'{"":{}}', b"[[[[[]]]]]"):
            for n in (15000, 30000, 60000, MiB // len(value) // 2):
                client.send(QUERY + b',"id":[' + b",".join([value] * n)
                            + b"]}\n")
                reply = client.receive()
                qf.check("error" in reply or len(reply["id"]) == n,
                         f"{n} times {value}")
        client.close()


def flood(path, data, seconds):
    """Send without reading, as long as the server takes it."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.setblocking(False)
    client.send(b'{"execute":"qmp_capabilities"}')
    limit = time.monotonic() + seconds
    sent = 0
    while time.monotonic() < limit and sent < 100 * MiB:
        try:
            sent += client.send(data[sent % len(data):])
        except BlockingIOError:
            time.sleep(0.01)
    return client


FLOODS = (b'{"execute":"query-named-block-nodes"}', b"x\n", b"{}",
          QUERY + b',"id":"' + b"x" * 500000 + b'"}')


def test_floods(tmp):
    """Nor does the server work when there is nothing that it could do."""
    with others_are_served(tmp) as (_, path):
        for command in FLOODS:
            client = flood(path, command * (MiB // len(command) + 1), 1)
            qf.check(client.recv(100).startswith(b'{"QMP"'), "no greeting")
            client.close()
    with Served(tmp) as (server, path):
        clients = [flood(path, command * (MiB // len(command) + 1), 0.3)
                   for command in FLOODS]
        before = cpu_time(server)
        time.sleep(1)
        qf.check(cpu_time(server) - before < 0.3, "the server is busy")
        with contextlib.closing(qmp.Client(path)) as other:
            other("query-version")
        # It ends all the same.
    for client in clients:
        client.close()


def test_stalled(tmp):
    """Silent, in the middle of a message, or half closed."""
    with others_are_served(tmp) as (server, path):
        clients = []
        for text in (b"", b"{", b'{"execute": "query-ver', b"x" * 1000,
                     b'{"execute":"qmp_capabilities"}{"', b'{"id":"\\'):
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            client.send(text)
            clients.append(client)
        before = cpu_time(server)
        time.sleep(0.5)
        qf.check(qf.SLOW or cpu_time(server) - before < 0.4,
                 "the server is busy")
        for client in clients:
            client.close()
        for _ in range(5):
            check_half_closed(path)


def check_half_closed(path):
    """All replies come to a client that sends no more."""
    client = qmp.Client(path)
    idents = [client.ask("query-named-block-nodes", {}) for _ in range(50)]
    client.socket.shutdown(socket.SHUT_WR)
    for ident in idents:
        client.reply(ident)
    qf.equal("end", client.socket.recv(1), b"")
    client.close()


def test_vanishing(tmp):
    """In all states, also with replies that they have not read."""
    with others_are_served(tmp) as (_, path):
        for number in range(400):
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            client.send((b"", b"{", b'{"execute":"qmp_capabilities"}' * 2,
                         FLOODS[0] * 500, FLOODS[3])[number % 5])
            if number % 2:
                client.shutdown(socket.SHUT_RD)
            client.close()


def test_order_of_replies(tmp):
    """Several clients at once, each with many commands under way."""
    def many(client):
        idents = [client.ask(command, {}) for command in
                  ("query-version", "x", "query-named-block-nodes") * 20]
        for ident in idents:
            with contextlib.suppress(qmp.Error):
                client.reply(ident)
        client.close()

    with Served(tmp) as (_, path):
        clients = [qmp.Client(path) for _ in range(MAX_CLIENTS)]
        threads = [threading.Thread(target=many, args=[client])
                   for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        qf.check(all(client.number == 61 and client.pending == b""
                     for client in clients), "replies are missing")


def test_too_many_clients(tmp):
    """One too many is sent away, until another one leaves."""
    with Served(tmp) as (server, path):
        before = files_at_rest(server, path)
        clients = [qmp.Client(path) for _ in range(MAX_CLIENTS)]
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                client.connect(path)
                qf.equal("sent to one too many", client.recv(1), b"")
        for client in clients:
            client("query-version")
        clients.pop().close()
        wait_for_files(server, before + len(clients))
        clients.append(qmp.Client(path))
        for client in clients:
            client("query-version")
            client.close()
        wait_for_files(server, before)


def test_many_connections(tmp):
    with Served(tmp) as (server, path):
        before = files_at_rest(server, path)
        for _ in range(100):
            clients = [qmp.Client(path) for _ in range(MAX_CLIENTS // 2)]
            for client in clients:
                client("query-named-block-nodes")
            for client in clients:
                client.close()
            wait_for_files(server, before)


# ---------------------------------------------------------- the socket

def start_fails(*args):
    done = qf.run([qf.nbdkit(), "-U", "-", *args, "--run", "true"], ok=None)
    qf.check(done.returncode != 0, f"{args} were accepted")
    return done.stderr


def test_socket_names(tmp):
    """The longest one, one that is relative; removed if it is ours."""
    with Served(tmp) as (_, path):
        start_fails(*MEMORY, "qmp=" + path)
        qmp.Client(path).close()
        os.unlink(path)
        other = socket.socket(socket.AF_UNIX)
        other.bind(path)
    qf.check(os.path.exists(path), "the socket of another program is gone")
    other.close()
    os.unlink(path)
    longest = os.path.join(tmp, "").ljust(107, "x")
    for name, made in ((longest, longest), ("relative", "relative")):
        qf.run([qf.nbdkit(), "-U", "-", *MEMORY, "qmp=" + name, "--run",
                f"test -S {made}"], cwd=tmp)
        qf.check(not os.path.exists(os.path.join(tmp, made)),
                 f"{made} was left behind")


def test_end(tmp):
    """At once, whatever clients are doing, and in the background, too."""
    path, pidfile = os.path.join(tmp, "qmp"), os.path.join(tmp, "pid")
    qf.run([qf.nbdkit(), "-U", os.path.join(tmp, "nbd"), "-P", pidfile,
            *MEMORY, "qmp=" + path])
    # The parent has gone before the server writes the file.
    limit = time.monotonic() + PATIENCE
    while not (os.path.exists(pidfile) and os.path.getsize(pidfile)):
        qf.check(time.monotonic() < limit, "there is no pid file")
        time.sleep(0.01)
    with open(pidfile) as file:
        pid = int(file.read())
    idle, busy = qmp.Client(path), flood(path, FLOODS[0] * 1000, 0.2)
    os.kill(pid, signal.SIGTERM)
    limit = time.monotonic() + PATIENCE
    while os.path.exists(path):
        qf.check(time.monotonic() < limit, "the server's socket stays")
        time.sleep(0.01)
    qf.equal("end", idle.socket.recv(1), b"")
    idle.close()
    busy.close()


def test_socket(tmp):
    path = os.path.join(tmp, "qmp")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    with Served(tmp):
        mode = os.stat(path).st_mode
        qf.check(stat.S_ISSOCK(mode), "it is no socket")
        qf.equal("mode", stat.S_IMODE(mode), 0o600)
        message = start_fails(*MEMORY, "qmp=" + path)
        qf.check(path in message and "another" in message, message)
    qf.check(not os.path.exists(path), "the socket was left behind")
    with open(path, "w"):
        pass
    message = start_fails(*MEMORY, "qmp=" + path)
    qf.check(path in message and "not a socket" in message, message)
    os.unlink(path)
    for wrong in ("", "x" * 200, os.path.join(tmp, "missing", "qmp"),
                  path.ljust(108, "x"), tmp):
        message = start_fails(*MEMORY, "qmp=" + wrong)
        qf.check("qmp" in message and wrong in message, message)
    qf.check("twice" in start_fails(*MEMORY, "qmp=" + path, "qmp=" + path),
             "qmp= was accepted twice")
    image = os.path.join(tmp, "chain.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with Served(tmp, "--filter=dirty-tracking", "--filter=qcow2", "file",
                image):
        client = qmp.Client(path)
        qf.equal("drv", client("query-named-block-nodes")[0]["drv"], "qcow2")
        client.close()


def test(tmp):
    qf.need("qemu-img")
    qf.parts(tmp, test_negotiation, test_every_command, test_nodes,
             test_counts, test_image, test_encrypted_image,
             test_same_as_qemu, test_random_beside_qemu, test_messages,
             test_busy, test_move, test_read_only, test_framing, test_nonsense,
             test_random_bytes, test_long_messages, test_many_values,
             test_floods, test_stalled, test_vanishing,
             test_order_of_replies, test_too_many_clients,
             test_many_connections, test_socket, test_socket_names, test_end)


qf.main(test)
