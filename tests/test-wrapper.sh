#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
#
# ./nbdkit finds the filters of the build tree, and only those, in all
# the ways in which a filter can be named, and leaves the rest alone.

. ./functions.sh

# A stand-in for nbdkit which prints its arguments, one per line.
cat > "$tmp/show" <<'END'
#!/bin/sh
printf '%s\n' "$@"
END
chmod +x "$tmp/show"
sed "s|^set -- '$SYSTEM_NBDKIT'|set -- '$tmp/show'|" "$NBDKIT" > "$tmp/wrapper"
chmod +x "$tmp/wrapper"

ours=$abs_top_builddir/filters/qcow2/.libs/nbdkit-qcow2-filter.so

expect_args ()
{
  local expected=$1
  shift
  local actual
  actual=$(env -u NBDKIT_VALGRIND "$tmp/wrapper" "$@" </dev/null)
  test "$actual" = "$expected" ||
    fail "wrapper $*: expected: $expected: but it is: $actual"
}

# A sanitizer's dynamic linker does not start scripts.
if test "$SANITIZER" = none; then
  expect_args "--filter=$ours" --filter=qcow2
  expect_args "--filter=$ours" --filter qcow2
  expect_args "--filter=cow"$'\n'"--filter=$ours"$'\n'"file" \
      --filter cow --filter=qcow2 file
  expect_args "--filter=/else/where.so" --filter=/else/where.so
  expect_args "--filter" --filter
  expect_args "--"$'\n'"null"$'\n'"--filter=qcow2" -- null --filter=qcow2
  expect_args "a b"$'\n'"c*" "a b" "c*"
fi

# The filter that is loaded is ours, from any directory.
cd /
"$NBDKIT" --filter=qcow2 null --dump-plugin >/dev/null
"$NBDKIT" --filter=qcow2 --help null | grep -q qcow2- ||
  fail "the filter's parameters are not in --help"
