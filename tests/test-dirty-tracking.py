#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""The dirty-tracking filter: what bitmaps record, and how it is shown.

Sequences of random requests are marked in a model; the same sequences are
sent to QEMU's storage daemon, whose digests of its bitmaps must be ours.
"""

import os
import random
import threading

import nbd
import qf
import qmp
from qf import KiB, MiB, GiB, TiB

HOLE, ZERO = 1, 2
FLAGS = (0, nbd.CMD_FLAG_FUA)

GRANULARITIES = (512, 4 * KiB, 64 * KiB, MiB, 16 * MiB)


class Model:
    """A set of dirty granules."""

    def __init__(self, size, granularity):
        self.size, self.granularity = size, granularity
        self.dirty = set()

    def mark(self, offset, count):
        if count:
            self.dirty.update(range(offset // self.granularity,
                                    (offset + count - 1) // self.granularity
                                    + 1))

    def count(self):
        return len(self.dirty) * self.granularity

    def runs(self):
        """[(start, end)] in bytes, of what is dirty."""
        runs = []
        for granule in sorted(self.dirty):
            start = granule * self.granularity
            end = min(start + self.granularity, self.size)
            if runs and runs[-1][1] == start:
                runs[-1][1] = end
            else:
                runs.append([start, end])
        return runs


def parameters(granularities, **more):
    return [f"dirty-bitmap=b{g},granularity={g}" for g in granularities] \
        + [f"{key.replace('_', '-')}={value}" for key, value in more.items()]


def random_requests(seed, number, size, align):
    """(kind, offset, count, flags); a few large ones, some at the end."""
    rng = random.Random(seed)
    most = min(size, 8 * MiB)
    for _ in range(number):
        kind = rng.choice(("pwrite", "pwrite", "zero", "trim"))
        count = rng.randint(1, min(most, rng.choice((4 * KiB, 100 * KiB)
                                                    if rng.random() < 0.95
                                                    else (most, most))))
        offset = rng.randrange(size - count + 1)
        if rng.random() < 0.02:
            offset = size - count
        offset -= offset % align
        count = max(count - count % align, align)
        yield kind, offset, min(count, size - offset), rng.choice(FLAGS)


def send(handle, request):
    kind, offset, count, flags = request
    if kind == "pwrite":
        handle.pwrite(b"\xa5" * count, offset, flags)
    elif kind == "zero":
        handle.zero(count, offset, flags | (nbd.CMD_FLAG_NO_HOLE
                                            if offset & 512 else 0))
    else:
        handle.trim(count, offset, flags)


def send_all(server, requests, connections=4):
    """Each connection sends its share, at the same time."""
    errors = []

    def work(share):
        try:
            handle = server.connect()
            for request in share:
                send(handle, request)
            handle.shutdown()
        except nbd.Error as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(requests[i::connections],))
               for i in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    qf.check(not errors, f"{errors}")


def read_map(handle):
    """[[start, end, type]] of the whole disk, neighbours merged."""
    runs = []

    def add(_, offset, entries, __):
        for length, kind in zip(entries[::2], entries[1::2]):
            if runs and runs[-1][1] == offset and runs[-1][2] == kind:
                runs[-1][1] = offset + length
            else:
                runs.append([offset, offset + length, kind])
            offset += length

    size = handle.get_size()
    while not runs or runs[-1][1] < size:
        at = runs[-1][1] if runs else 0
        handle.block_status(min(size - at, 4 * GiB - MiB), at, add)
    return runs


def dirty_runs(handle):
    """What a view's map calls dirty: all but holes that are not zero."""
    runs = []
    for start, end, kind in read_map(handle):
        if kind == HOLE:
            continue
        if runs and runs[-1][1] == start:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    return runs


def verify(server, control, models):
    bitmaps = control.bitmaps()
    for name, model in models.items():
        qf.equal(f"count of {name}", bitmaps[name]["count"], model.count())
        handle = server.connect("dirty/" + name)
        qf.equal(f"map of {name}", dirty_runs(handle), model.runs())
        handle.shutdown()


def run_oracle(tmp, size, granularities, number, seed):
    path = os.path.join(tmp, "qmp")
    requests = list(random_requests(seed, number, size, 1))
    models = {f"b{g}": Model(size, g) for g in granularities}
    with qf.serve(tmp, "--filter=dirty-tracking", "memory", str(size),
                  *parameters(granularities, qmp=path)) as server:
        control = qmp.Client(path)
        send_all(server, requests)
        for _, offset, count, _ in requests:
            for model in models.values():
                model.mark(offset, count)
        verify(server, control, models)
        control.close()


def test_oracle(tmp):
    number = 300 if qf.SLOW else 3000
    for seed, size in enumerate((MiB + 5, 100 * MiB, GiB - 511, 64 * TiB,
                                 64 * TiB - 1, 513)):
        run_oracle(tmp, size, GRANULARITIES, number, seed)
    for granularity in GRANULARITIES:
        run_oracle(tmp, 3 * GiB + 1234, [granularity], number // 2,
                   granularity)


def test_same_as_qemu(tmp):
    """The digests of QEMU's bitmaps after the same requests."""
    qf.need("qemu-storage-daemon")
    path = os.path.join(tmp, "qmp")
    for seed, size in enumerate((MiB, 100 * MiB + 512, 5 * GiB + 1536)):
        requests = list(random_requests(seed, 1000, size, 512))
        process, nbd_path, qemu = qmp.storage_daemon(tmp, size)
        try:
            for g in GRANULARITIES:
                qemu("block-dirty-bitmap-add", node="disk", name=f"b{g}",
                     granularity=g)
            handle = nbd.NBD()
            handle.connect_unix(nbd_path)
            for request in requests:
                send(handle, request)
            handle.shutdown()
            with qf.serve(tmp, "--filter=dirty-tracking", "memory", str(size),
                          *parameters(GRANULARITIES, qmp=path)) as server:
                ours = qmp.Client(path)
                send_all(server, requests)
                compare_digests(ours, qemu)
                ours.close()
        finally:
            process.terminate()
            process.wait()


def compare_digests(ours, qemu):
    for g in GRANULARITIES:
        name = f"b{g}"
        digests = [client("x-debug-block-dirty-bitmap-sha256", node="disk",
                          name=name) for client in (ours, qemu)]
        qf.equal(f"digest of {name}", *digests)
        qf.equal(f"count of {name}", ours.bitmaps()[name]["count"],
                 qemu.bitmaps()[name]["count"])


def test_failed_writes(tmp):
    """Marked all the same; what reads is not marked."""
    path = os.path.join(tmp, "qmp")
    model = Model(MiB, 512)
    with qf.serve(tmp, "--filter=dirty-tracking", "--filter=error", "memory",
                  "1M", "error=EIO", "error-pread-rate=0",
                  *(f"error-{kind}-rate=100%"
                    for kind in ("pwrite", "zero", "trim")),
                  *parameters([512], qmp=path)) as server:
        control = qmp.Client(path)
        handle = server.connect()
        for request in random_requests(1, 100, MiB, 1):
            try:
                send(handle, request)
            except nbd.Error:
                pass
            else:
                raise qf.Fail(f"{request} did not fail")
            model.mark(*request[1:3])
        handle.shutdown()
        verify(server, control, {"b512": model})
        control.close()


def test_reads_mark_nothing(tmp):
    path = os.path.join(tmp, "qmp")
    with qf.serve(tmp, "--filter=dirty-tracking", "memory", "1M",
                  *parameters([512], qmp=path)) as server:
        control = qmp.Client(path)
        control("block-dirty-bitmap-add", node="disk", name="off",
                disabled=True)
        handle = server.connect()
        handle.pread(MiB, 0)
        handle.flush()
        handle.cache(MiB, 0)
        read_map(handle)
        qf.equal("count", control.bitmaps()["b512"]["count"], 0)
        handle.pwrite(b"x", 0)
        qf.equal("disabled", control.bitmaps()["off"]["count"], 0)
        handle.shutdown()
        control.close()


def test_flags_pass(tmp):
    qf.check_flags_pass(tmp, "dirty-tracking")


def test_view_is_frozen(tmp):
    with qf.serve(tmp, "--filter=dirty-tracking", "memory", "1M",
                  "dirty-bitmap=b,granularity=4k") as server:
        handle = server.connect()
        handle.pwrite(b"x", 0)
        early = server.connect("dirty/b")
        handle.pwrite(b"y" * 100, 10000)
        late = server.connect("dirty/b")
        qf.equal("early", dirty_runs(early), [[0, 4096]])
        qf.equal("late", dirty_runs(late), [[0, 4096], [8192, 12288]])
        qf.check(early.is_read_only(), "a view can be written to")
        qf.equal("content", bytes(early.pread(100, 10000)), b"y" * 100)
        for h in (handle, early, late):
            h.shutdown()


def test_map_types(tmp):
    """The table of the manual page, over a file with holes."""
    raw = os.path.join(tmp, "map.raw")
    with open(raw, "wb") as file:
        file.truncate(4 * MiB)
        file.write(b"d" * (MiB // 2))
        file.seek(2 * MiB)
        file.write(b"d" * (MiB // 2))
    expected = {
        "hole": [[0, 2 * MiB, HOLE], [2 * MiB, 2 * MiB + MiB // 2, 0],
                 [2 * MiB + MiB // 2, 4 * MiB, HOLE | ZERO]],
        "zero": [[0, 2 * MiB, HOLE | ZERO], [2 * MiB, 4 * MiB, 0]],
    }
    for clean, wanted in expected.items():
        with qf.serve(tmp, "--filter=dirty-tracking", "file", raw,
                      "dirty-bitmap=b", f"dirty-clean={clean}") as server:
            handle = server.connect()
            handle.trim(2 * MiB - MiB // 2, 2 * MiB + MiB // 2)
            handle.pwrite(b"d" * (MiB // 2), 2 * MiB)
            handle.shutdown()
            view = server.connect("dirty/b")
            qf.equal(clean, read_map(view), wanted)
            view.shutdown()


def test_listing(tmp):
    names = ["b0", "with/slash", "Grüße", "a dirty/b"]
    with qf.serve(tmp, "--filter=dirty-tracking", "memory", "1M",
                  *("dirty-bitmap=" + name for name in names)) as server:
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.connect_unix(server.sock)
        found = []
        handle.opt_list(lambda name, text: found.append(name))
        handle.opt_abort()
        qf.equal("exports", found, [""] + ["dirty/" + n for n in names])
        for name in names:
            view = server.connect("dirty/" + name)
            qf.equal(name, dirty_runs(view), [])
            view.shutdown()
        for missing in ("dirty/", "dirty/b1", "x/dirty/B0",
                        "snapshot/s/dirty/b0"):
            try:
                server.connect(missing)
            except nbd.Error:
                continue
            raise qf.Fail(f"export {missing!r} should not exist")


def test_many_disks(tmp):
    """With dir= each export is a node."""
    directory = os.path.join(tmp, "dir")
    path = os.path.join(tmp, "qmp")
    os.mkdir(directory)
    for name, size in (("one", MiB), ("two", 2 * MiB)):
        with open(os.path.join(directory, name), "wb") as file:
            file.truncate(size)
    with qf.serve(tmp, "--filter=dirty-tracking", "file", "dir=" + directory,
                  "dirty-bitmap=all,granularity=4k",
                  "dirty-bitmap=only,granularity=512,node=two",
                  "qmp=" + path) as server:
        control = qmp.Client(path)
        qf.equal("nodes", control("query-named-block-nodes"), [])
        one, two = server.connect("one"), server.connect("two")
        one.pwrite(b"x", 5000)
        two.pwrite(b"x", 2 * MiB - 1)
        qf.equal("one", {n: b["count"] for n, b in
                         control.bitmaps("one").items()}, {"all": 4096})
        qf.equal("two", {n: b["count"] for n, b in
                         control.bitmaps("two").items()},
                 {"all": 4096, "only": 512})
        view = server.connect("two/dirty/only")
        qf.equal("map", dirty_runs(view), [[2 * MiB - 512, 2 * MiB]])
        view.shutdown()
        qmp.refused(control, ["all", "one", "two", "sizes"],
                    "block-dirty-bitmap-move", node="one", name="all",
                    target_node="two", target_name="moved")
        for handle in (one, two):
            handle.shutdown()
        control.close()


def test_read_only(tmp):
    path = os.path.join(tmp, "qmp")
    with qf.serve(tmp, "-r", "--filter=dirty-tracking", "memory", "1M",
                  "dirty-bitmap=b", "qmp=" + path) as server:
        control = qmp.Client(path)
        handle = server.connect()
        view = server.connect("dirty/b")
        qf.equal("map", dirty_runs(view), [])
        view.shutdown()
        for command in ("clear", "remove"):
            qmp.refused(control, ["b", "disk"],
                        "block-dirty-bitmap-" + command, node="disk",
                        name="b")
        qmp.refused(control, ["disk", "read-only"], "block-dirty-bitmap-add",
                    node="disk", name="c")
        handle.shutdown()
        control.close()


def test_order(tmp):
    image = os.path.join(tmp, "order.qcow2")
    qf.qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    for words, args in (
            (["dirty-tracking", "before", "qcow2"],
             ["--filter=qcow2", "--filter=dirty-tracking", "file", image]),
            (["once"], ["--filter=dirty-tracking", "--filter=dirty-tracking",
                        "memory", "1M"]),
            (["granularity", "1000"], ["--filter=dirty-tracking", "memory",
                                       "1M", "dirty-bitmap=b,granularity=1000"
                                       ]),
            (["dirty-bitmap", "speed"], ["--filter=dirty-tracking", "memory",
                                         "1M", "dirty-bitmap=b,speed=1"]),
            (["persistent"], ["--filter=dirty-tracking", "memory", "1M",
                              "dirty-bitmap=b,persistent=on"]),
            (["twice"], ["--filter=dirty-tracking", "memory", "1M",
                         "dirty-bitmap=b", "dirty-bitmap=b"]),
            (["node", "sdx"], ["--filter=dirty-tracking", "memory", "1M",
                               "dirty-bitmap=b,node=sdx"]),
            (["dirty-clean"], ["--filter=dirty-tracking", "memory", "1M",
                               "dirty-clean=maybe"]),
            (["exports"], ["--filter=dirty-tracking", "memory", "1M",
                           "exports=some"])):
        done = qf.run([qf.nbdkit(), "-U", "-", *args, "--run", "true"],
                      ok=None)
        qf.check(done.returncode != 0, f"{args} were accepted")
        for word in words:
            qf.check(word in done.stderr, f"no {word!r} in {done.stderr!r}")


def test_over_qcow2(tmp):
    """Names pass through, the granularity is that of the clusters."""
    image = os.path.join(tmp, "disk.qcow2")
    path = os.path.join(tmp, "qmp")
    qf.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", image,
                "1M")
    qf.qemu_img("snapshot", "-c", "s", image)
    with qf.serve(tmp, "--filter=dirty-tracking", "--filter=cow",
                  "--filter=qcow2", "file", image, "dirty-bitmap=b",
                  "qmp=" + path) as server:
        control = qmp.Client(path)
        snapshot, handle = server.connect("@s"), server.connect()
        handle.pwrite(b"x", 0)
        bitmap = control.bitmaps()["b"]
        qf.equal("bitmap", [bitmap["granularity"], bitmap["count"]],
                 [8192, 8192])
        qf.equal("snapshot", snapshot.get_size(), MiB)
        for h in (snapshot, handle):
            h.shutdown()
        control.close()


def test(tmp):
    qf.need("qemu-img")
    qf.parts(tmp, test_oracle, test_same_as_qemu, test_failed_writes,
             test_reads_mark_nothing, test_flags_pass, test_view_is_frozen,
             test_map_types, test_listing, test_many_disks, test_read_only,
             test_order, test_over_qcow2)


qf.main(test)
