#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
#
# check-logs.sh DIR
#
# Read the logs that valgrind or a sanitizer wrote for each nbdkit, print
# those which report an error, and fail if there is one.  Leaks count if
# one of our modules is on the stack of what is leaked directly: nbdkit and
# the libraries below it have harmless ones of their own, and connections
# that nbdkit forgets when it ends have what is ours in them.

set -e
found=0

# Does a report of LeakSanitizer's have a direct leak of ours?
leaks_ours () {
  awk '/^[A-Z]/ { direct = /^Direct leak/ }
       direct && /nbdkit-[a-z0-9-]*-filter\.so|libnbdkit-qcow2-filters/ {
         ours = 1
       }
       END { exit !ours }' "$1"
}

for log in "$1"/*; do
  test -s "$log" || continue
  case "$log" in
    */asan.*)
      if grep -q 'ERROR: LeakSanitizer' "$log" &&
         ! grep -q 'ERROR: AddressSanitizer\|runtime error:' "$log" &&
         ! leaks_ours "$log"
      then
        continue
      fi ;;
    */valgrind.*)
      # It also says which system calls it does not know.
      grep -q '^==' "$log" || continue ;;
  esac
  found=$((found + 1))
  echo "== $log"
  cat "$log"
done

if test "$found" -gt 0; then
  echo "$found reports in $1"
  exit 1
fi
