#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
#
# A few images, each of them to bring in different code, for where all of
# test-matrix.py and test-map.py takes too long: under valgrind.

. ./functions.sh

images="v2-4096 extl2-16384 convert-c-zlib-65536 convert-c-zstd-4096
        snapshots-v3 scattered-512 size-0 size-513 huge-16T-extl2 corrupt-bit"

"$PYTHON" "$abs_top_srcdir/tests/test-matrix.py" $images
"$PYTHON" "$abs_top_srcdir/tests/test-map.py" $images
