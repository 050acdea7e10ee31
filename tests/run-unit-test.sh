#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
#
# run-unit-test.sh PROGRAM
#
# Start a unit test as the harness wants it: speaking TAP, and under
# valgrind or with the options of a sanitizer if those are in use.  The
# environment is that of ./run.

if test "$NBDKIT_VALGRIND" = 1; then
  G_SLICE=always-malloc
  export G_SLICE
  set -- "$VALGRIND" --quiet --vgdb=no --leak-check=full \
      --show-leak-kinds=definite --errors-for-leak-kinds=definite \
      --error-exitcode=119 --num-callers=40 \
      --suppressions="$abs_top_srcdir/tests/valgrind.supp" "$@"
fi

case "$SANITIZER" in
  address)
    # Absurd sizes in images must be refused by us, not by the allocator.
    ASAN_OPTIONS="allocator_may_return_null=1:$ASAN_OPTIONS"
    LSAN_OPTIONS="print_suppressions=0:suppressions=$abs_top_srcdir/tests/lsan.supp:$LSAN_OPTIONS"
    UBSAN_OPTIONS="print_stacktrace=1:$UBSAN_OPTIONS"
    G_SLICE=always-malloc
    export ASAN_OPTIONS LSAN_OPTIONS UBSAN_OPTIONS G_SLICE ;;
  thread)
    TSAN_OPTIONS="ignore_noninstrumented_modules=1:suppressions=$abs_top_srcdir/tests/tsan.supp:$TSAN_OPTIONS"
    export TSAN_OPTIONS ;;
esac

# Several words, or none.
exec $SANITIZER_LAUNCH "$@" --tap
