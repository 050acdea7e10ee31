#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
#
# check-logs.sh DIR
#
# Read the logs that valgrind or a sanitizer wrote for each nbdkit, print
# those which report an error, and fail if there is one.  Leaks count if
# one of our modules is on the stack: nbdkit and the libraries below it
# have harmless ones of their own.

set -e
found=0

for log in "$1"/*; do
  test -s "$log" || continue
  case "$log" in
    */asan.*)
      if grep -q 'ERROR: LeakSanitizer' "$log" &&
         ! grep -q 'ERROR: AddressSanitizer\|runtime error:' "$log" &&
         ! grep -q 'nbdkit-[a-z0-9-]*-filter\.so\|libnbdkit-qcow2-filters' "$log"
      then
        continue
      fi ;;
  esac
  found=$((found + 1))
  echo "== $log"
  cat "$log"
done

if test "$found" -gt 0; then
  echo "$found reports in $1"
  exit 1
fi
