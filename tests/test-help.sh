#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
#
# What nbdkit says about the filter without serving anything.

. ./functions.sh

help=$("$NBDKIT" --filter=qcow2 null --help)
for word in "filter: qcow2" qcow2-snapshot= qcow2-cache-size= \
            qcow2-backing= qcow2-data-file=; do
  grep -qF -- "$word" <<<"$help" || fail "--help: no $word in: $help"
done

help=$("$NBDKIT" --filter=dirty-tracking null --help)
for word in "filter: dirty-tracking" dirty-bitmap= dirty-granularity= \
            dirty-clean= dirty-node= exports= qmp=; do
  grep -qF -- "$word" <<<"$help" || fail "--help: no $word in: $help"
done

help=$("$NBDKIT" --filter=bitmap-persist null --help)
for word in "filter: bitmap-persist" bitmap-store= bitmap-sync= \
            bitmap-intent= bitmap-intent-granularity= qmp=; do
  grep -qF -- "$word" <<<"$help" || fail "--help: no $word in: $help"
done

help=$("$NBDKIT" --filter=cbw null --help)
for word in "filter: cbw" cbw-snapshot= cbw-target= cbw-bitmap= \
            cbw-on-error= cbw-timeout= cbw-cluster-size= cbw-discard= \
            exports= qmp=; do
  grep -qF -- "$word" <<<"$help" || fail "--help: no $word in: $help"
done

# The plugin's answer goes through all filters.
dump=$("$NBDKIT" --filter=qcow2 null --dump-plugin)
grep -qx 'name=null' <<<"$dump" || fail "--dump-plugin: no name=null in: $dump"

version=$("$NBDKIT" --filter=qcow2 null --version)
for word in nbdkit "null" "qcow2"; do
  grep -q "$word" <<<"$version" || fail "--version: no $word in: $version"
done
