# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""Changes to qcow2 files that no tool makes: bits, fields, table entries."""

import struct

# Header fields: offset and struct format (big endian).
FIELDS = {
    "magic": (0, "4s"), "version": (4, "I"),
    "backing_offset": (8, "Q"), "backing_size": (16, "I"),
    "cluster_bits": (20, "I"), "size": (24, "Q"), "crypt": (32, "I"),
    "l1_size": (36, "I"), "l1_offset": (40, "Q"),
    "refcount_offset": (48, "Q"), "refcount_clusters": (56, "I"),
    "nb_snapshots": (60, "I"), "snapshots_offset": (64, "Q"),
    "incompatible": (72, "Q"), "compatible": (80, "Q"),
    "autoclear": (88, "Q"), "refcount_order": (96, "I"),
    "header_length": (100, "I"), "compression": (104, "B"),
}

INCOMPAT_DIRTY = 1 << 0
INCOMPAT_CORRUPT = 1 << 1
INCOMPAT_DATA_FILE = 1 << 2
INCOMPAT_COMPRESSION = 1 << 3
INCOMPAT_EXTENDED_L2 = 1 << 4

FEATURE_NAME_TABLE = 0x6803f857

OFFSET_MASK = 0x00fffffffffffe00
COMPRESSED = 1 << 62


def read_at(path, offset, length):
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def write_at(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def get(path, field):
    offset, form = FIELDS[field]
    form = ">" + form
    return struct.unpack(form, read_at(path, offset,
                                       struct.calcsize(form)))[0]


def put(path, field, value):
    offset, form = FIELDS[field]
    write_at(path, offset, struct.pack(">" + form, value))


def set_bits(path, field, bits):
    put(path, field, get(path, field) | bits)


def append_clusters(path, content):
    """Put content at the file's end, on a cluster; returns its offset.

    The refcounts are left as they are: a reader has no use for them.
    """
    cluster = 1 << get(path, "cluster_bits")
    with open(path, "r+b") as file:
        end = file.seek(0, 2)
        offset = (end + cluster - 1) // cluster * cluster
        file.truncate(offset + (len(content) + cluster - 1)
                      // cluster * cluster)
        file.seek(offset)
        file.write(content)
    return offset


# ----------------------------------------------------------- extensions

def extensions(path):
    """[(type, data)] of the header extensions."""
    at = get(path, "header_length") if get(path, "version") >= 3 else 72
    found = []
    while True:
        kind, length = struct.unpack(">II", read_at(path, at, 8))
        if kind == 0:
            return found
        found.append((kind, read_at(path, at + 8, length)))
        at += 8 + (length + 7) // 8 * 8


def set_extensions(path, wanted):
    """Write the extensions, in an image that has no backing file."""
    at = get(path, "header_length") if get(path, "version") >= 3 else 72
    out = b""
    for kind, data in wanted:
        out += struct.pack(">II", kind, len(data))
        out += data + bytes(-len(data) % 8)
    write_at(path, at, out + bytes(8))


def add_feature_name(path, kind, bit, name):
    """Name a feature bit: kind 0 incompatible, 1 compatible, 2 autoclear."""
    entry = struct.pack("BB46s", kind, bit, name.encode())
    found = dict(extensions(path))
    found[FEATURE_NAME_TABLE] = found.get(FEATURE_NAME_TABLE, b"") + entry
    set_extensions(path, list(found.items()))


# --------------------------------------------------------------- tables

def l2_entries(path):
    """Every L2 entry that is not 0, as (offset in the file, entry)."""
    cluster = 1 << get(path, "cluster_bits")
    extended = get(path, "version") >= 3 \
        and get(path, "incompatible") & INCOMPAT_EXTENDED_L2
    step = 16 if extended else 8
    l1 = read_at(path, get(path, "l1_offset"), get(path, "l1_size") * 8)
    for (l1_entry,) in struct.iter_unpack(">Q", l1):
        table = l1_entry & OFFSET_MASK
        if table == 0:
            continue
        content = read_at(path, table, cluster)
        for at in range(0, cluster, step):
            entry, = struct.unpack_from(">Q", content, at)
            if entry:
                yield table + at, entry


def compressed_extent(path, entry):
    """Where a compressed cluster lies: (offset, number of sectors)."""
    shift = 62 - (get(path, "cluster_bits") - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = ((entry & (COMPRESSED - 1)) >> shift) + 1
    return offset, sectors


# ------------------------------------------------------------ snapshots

def snapshots(path):
    """The snapshot table as a list of dictionaries."""
    at = get(path, "snapshots_offset")
    found = []
    for _ in range(get(path, "nb_snapshots")):
        l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state, \
            extra_size = struct.unpack(">QIHHIIQII", read_at(path, at, 40))
        at += 40
        extra = read_at(path, at, extra_size)
        at += extra_size
        ident = read_at(path, at, id_size)
        name = read_at(path, at + id_size, name_size)
        at = -(-(at + id_size + name_size) // 8) * 8
        found.append({"l1_offset": l1_offset, "l1_size": l1_size, "id": ident,
                      "name": name, "sec": sec, "nsec": nsec, "clock": clock,
                      "state": state, "extra": extra})
    return found


def set_snapshots(path, table):
    """Write a new snapshot table at the end of the file."""
    out = b""
    for s in table:
        out += struct.pack(">QIHHIIQII", s["l1_offset"], s["l1_size"],
                           len(s["id"]), len(s["name"]), s["sec"], s["nsec"],
                           s["clock"], s["state"], len(s["extra"]))
        out += s["extra"] + s["id"] + s["name"]
        out += bytes(-len(out) % 8)
    offset = append_clusters(path, out)
    put(path, "nb_snapshots", len(table))
    put(path, "snapshots_offset", offset)
