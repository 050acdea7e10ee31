# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""A strict QMP client: it accepts only what the specification allows."""

import json
import os
import socket
import time

import qf

SECONDS = 60
CLASSES = {"GenericError", "CommandNotFound", "DeviceNotFound"}


def unique(pairs):
    """The object with these members."""
    names = [name for name, _ in pairs]
    qf.equal("members of an object", sorted(names), sorted(set(names)))
    return dict(pairs)


def not_json(constant):
    raise qf.Fail(f"{constant} is no JSON")


def check_greeting(greeting):
    """As the specification has it: a version, names of capabilities."""
    qf.equal("greeting", list(greeting), ["QMP"])
    hello = greeting["QMP"]
    qf.equal("greeting", sorted(hello), ["capabilities", "version"])
    qf.check(all(type(name) is str for name in hello["capabilities"]),
             f"capabilities {hello['capabilities']}")
    version = hello["version"]
    qf.equal("version", sorted(version), ["package", "qemu"])
    qf.check(type(version["package"]) is str, "the package is no string")
    qf.equal("version", sorted(version["qemu"]), ["major", "micro", "minor"])
    qf.check(all(type(n) is int for n in version["qemu"].values()),
             f"version {version['qemu']}")


class Error(qf.Fail):
    """The server has refused a command."""

    def __init__(self, error):
        super().__init__(f"{error['class']}: {error['desc']}")
        self.cls = error["class"]
        self.desc = error["desc"]


class Client:
    """A connection, with capabilities negotiated unless told not to."""

    def __init__(self, path, negotiate=True):
        self.number = 0
        self.pending = b""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS)
        self.connect(path)
        check_greeting(self.receive())
        if negotiate:
            self("qmp_capabilities")

    def connect(self, path):
        limit = time.monotonic() + SECONDS
        while True:
            try:
                return self.socket.connect(path)
            except OSError:
                qf.check(time.monotonic() < limit, f"nobody answers on {path}")
                time.sleep(0.01)

    def send(self, data):
        self.socket.sendall(data)

    def receive(self):
        """The next object that the server sends, each on its own line."""
        while b"\n" not in self.pending:
            data = self.socket.recv(1 << 16)
            qf.check(data, "the server has closed the connection")
            self.pending += data
        line, self.pending = self.pending.split(b"\n", 1)
        qf.check(line.endswith(b"\r"), f"a line ends without CR: {line}")
        return json.loads(line.decode(), object_pairs_hook=unique,
                          parse_constant=not_json)

    def reply(self, ident):
        """The value of the reply to the command with this id."""
        reply = self.receive()
        qf.equal("id", reply.pop("id", None), ident)
        if list(reply) == ["return"]:
            return reply["return"]
        qf.equal("members of a reply", list(reply), ["error"])
        error = reply["error"]
        qf.equal("members of an error", sorted(error), ["class", "desc"])
        qf.check(error["class"] in CLASSES, f"class {error['class']}")
        qf.check(isinstance(error["desc"], str) and error["desc"],
                 "an error without description")
        raise Error(error)

    def ask(self, command, arguments):
        """Send a command; the id by which reply knows it."""
        self.number += 1
        ident = [self.number, {"of": command}]
        request = {"execute": command, "id": ident}
        if arguments:
            request["arguments"] = arguments
        self.send(json.dumps(request).encode() + b"\n")
        return ident

    def request(self, command, arguments):
        return self.reply(self.ask(command, arguments))

    def __call__(self, command, **arguments):
        return self.request(command, {
            key.replace("_", "-"): value for key, value in arguments.items()})

    def transaction(self, actions):
        return self("transaction", actions=[
            {"type": kind, "data": data} for kind, data in actions])

    def bitmaps(self, node="disk"):
        """{name: what is known of it}, the newest first."""
        for info in self("query-named-block-nodes"):
            if info["node-name"] == node:
                return {b["name"]: b for b in info.get("dirty-bitmaps", [])}
        raise qf.Fail(f"there is no node {node}")

    def when_free(self, command, **arguments):
        """A command on a bitmap that a client may just be leaving."""
        limit = time.monotonic() + SECONDS
        while True:
            try:
                return self(command, **arguments)
            except Error as error:
                if "busy" not in error.desc or time.monotonic() > limit:
                    raise
                time.sleep(0.005)

    def close(self):
        self.socket.close()


def refused(client, words, command, **arguments):
    """The command fails, with a message that has all of these words."""
    try:
        client(command, **arguments)
    except Error as error:
        for word in words:
            qf.check(word in error.desc,
                     f"{command} {arguments}: no {word!r} in {error}")
        return error
    raise qf.Fail(f"{command} {arguments} was allowed")


def storage_daemon(tmp, size, name="disk"):
    """A qemu-storage-daemon that serves an empty disk: (process, NBD
    socket, Client).  Its discards are marked, too."""
    import subprocess
    nbd_path = os.path.join(tmp, "qsd.nbd")
    qmp_path = os.path.join(tmp, "qsd.qmp")
    raw = os.path.join(tmp, "qsd.raw")
    with open(raw, "wb") as file:
        file.truncate(size)
    process = subprocess.Popen([
        qf.tool("qemu-storage-daemon"),
        "--blockdev", f"driver=file,node-name=file,filename={raw},"
        "discard=unmap",
        "--blockdev", f"driver=raw,node-name={name},file=file,discard=unmap",
        "--nbd-server", f"addr.type=unix,addr.path={nbd_path}",
        "--export", f"nbd,id=disk,node-name={name},name=,writable=on",
        "--chardev", f"socket,id=qmp,path={qmp_path},server=on,wait=off",
        "--monitor", "chardev=qmp"], stdin=subprocess.DEVNULL)
    return process, nbd_path, Client(qmp_path)
