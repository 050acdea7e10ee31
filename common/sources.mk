# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

# The sources of the library, for common/ itself and for tests/fuzz,
# which compiles them once more, instrumented.

common_sources = \
	control/actions.c \
	control/args.c \
	control/bitmap-commands.c \
	control/control.c \
	control/json.c \
	control/node-commands.c \
	control/qmp.c \
	control/server.c \
	dirty/bits.c \
	dirty/gate.c \
	dirty/intent.c \
	dirty/node.c \
	dirty/persist.c \
	dirty/persist-state.c \
	dirty/persist-write.c \
	dirty/transaction.c \
	dirty/view.c \
	qcow2/allocator.c \
	qcow2/bitmap.c \
	qcow2/bitmap-content.c \
	qcow2/bitmap-store.c \
	qcow2/cache.c \
	qcow2/check.c \
	qcow2/check-mapping.c \
	qcow2/check-refcounts.c \
	qcow2/cipher.c \
	qcow2/codec.c \
	qcow2/create.c \
	qcow2/crypt.c \
	qcow2/error.c \
	qcow2/file.c \
	qcow2/header.c \
	qcow2/header-update.c \
	qcow2/image.c \
	qcow2/io.c \
	qcow2/lock.c \
	qcow2/luks.c \
	qcow2/mapping.c \
	qcow2/refcount.c \
	qcow2/snapshot.c \
	qcow2/tally.c \
	qcow2/twofish.c \
	utils/displayable.c \
	utils/export-name.c \
	utils/server.c \
	utils/suite.c \
	$(NULL)

common_headers = \
	control/actions.h \
	control/args.h \
	control/commands.h \
	control/control.h \
	control/json.h \
	control/qmp.h \
	control/server.h \
	dirty/bits.h \
	dirty/gate.h \
	dirty/intent.h \
	dirty/node.h \
	dirty/persist.h \
	dirty/persist-internal.h \
	dirty/transaction.h \
	dirty/view.h \
	qcow2/allocator.h \
	qcow2/bitmap.h \
	qcow2/bitmap-internal.h \
	qcow2/bitmap-store.h \
	qcow2/cache.h \
	qcow2/check.h \
	qcow2/check-internal.h \
	qcow2/cipher.h \
	qcow2/codec.h \
	qcow2/create.h \
	qcow2/crypt.h \
	qcow2/error.h \
	qcow2/file.h \
	qcow2/format.h \
	qcow2/header.h \
	qcow2/header-update.h \
	qcow2/image.h \
	qcow2/io.h \
	qcow2/lock.h \
	qcow2/luks.h \
	qcow2/mapping.h \
	qcow2/refcount.h \
	qcow2/snapshot.h \
	qcow2/tally.h \
	qcow2/twofish.h \
	utils/displayable.h \
	utils/export-name.h \
	utils/server.h \
	utils/suite.h \
	$(NULL)
