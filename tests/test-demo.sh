#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
#
# tests/demo.sh, which is what ./bootstrap demo runs: it proves what it
# shows by itself, so here it only has to succeed; and with an image of
# the user's it must copy it right, and never overwrite anything.

. ./functions.sh
requires qemu-img qemu-io nbdinfo nbdcopy mkfs.ext4 debugfs

demo=$abs_top_srcdir/tests/demo.sh

# refused MESSAGE IMAGE : the demo fails, and says MESSAGE.
refused ()
{
  if "$demo" "$2" > "$tmp/out" 2>&1; then
    fail "$2: it should have been refused"
  fi
  grep -q -e "$1" "$tmp/out" ||
    fail "$2: the message should contain \"$1\": $(cat "$tmp/out")"
}

"$demo"

# A name with everything that a shell or nbdkit could misunderstand.
image="$tmp/a b=c&d'.qcow2"
"$QEMU_IMG" create -q -f qcow2 "$image" 8M
"$QEMU_IO" -f qcow2 -c 'write -q -P 0x5a 1M 100k' "$image"
"$QEMU_IMG" convert -f qcow2 -O raw "$image" "$tmp/expected"
"$demo" "$image"
cmp "$image.raw" "$tmp/expected"

refused "exists already" "$image"
cmp "$image.raw" "$tmp/expected"

ln -s "$tmp/nowhere" "$tmp/link.raw"
cp "$image" "$tmp/link"
refused "exists already" "$tmp/link"
test ! -e "$tmp/nowhere" || fail "a dangling link was followed"

refused "no such file" "$tmp/missing"
head -c 65536 /dev/urandom > "$tmp/noise"
refused "not a qcow2 image" "$tmp/noise"
test ! -e "$tmp/noise.raw" || fail "a refused image was copied"

"$QEMU_IMG" create -q -f qcow2 -b "$image" -F qcow2 "$tmp/overlay"
refused "backing file" "$tmp/overlay"
test -z "$(find "$tmp" -name '*.partial.*')" || fail "partial copies remain"
