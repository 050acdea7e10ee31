# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

# Included by every Makefile.am.

# Ends lists of which each line shall look the same.
NULL =

# Set here, and not by configure, so that it can be added to.
CLEANFILES = *~

AM_CPPFLAGS = \
	-I$(top_builddir) \
	-I$(top_srcdir)/common \
	$(NULL)

AM_CFLAGS = \
	$(WARNINGS_CFLAGS) \
	-pthread \
	$(GLIB_CFLAGS) \
	$(JSON_GLIB_CFLAGS) \
	$(ZLIB_CFLAGS) \
	$(LIBDEFLATE_CFLAGS) \
	$(LIBZSTD_CFLAGS) \
	$(LIBGCRYPT_CFLAGS) \
	$(LIBNBD_CFLAGS) \
	$(NULL)

# What the code in common/ needs.
COMMON_LIBS = \
	$(GLIB_LIBS) \
	$(JSON_GLIB_LIBS) \
	$(ZLIB_LIBS) \
	$(LIBDEFLATE_LIBS) \
	$(LIBZSTD_LIBS) \
	$(LIBGCRYPT_LIBS) \
	$(LIBNBD_LIBS) \
	-lpthread \
	$(NULL)

# nbdkit may unload a filter while one of its threads still runs.
NODELETE = -Wl,-z,nodelete

# A filter.
filter_syms = $(top_srcdir)/filters/filter.syms
filter_compile_flags = $(AM_CFLAGS) $(NBDKIT_HEADERS_CFLAGS)
filter_libs = \
	$(top_builddir)/common/libnbdkit-qcow2-filters.la \
	$(GLIB_LIBS) \
	$(JSON_GLIB_LIBS) \
	-lpthread \
	$(NULL)
filter_link_flags = \
	-module -avoid-version -shared \
	$(NODELETE) \
	-Wl,--version-script=$(filter_syms) \
	$(NULL)

# A manual page from its POD.
POD2MAN_COMMAND = $(POD2MAN) \
	--utf8 \
	--center="nbdkit qcow2 filters" \
	--release="$(PACKAGE)-$(VERSION)" \
	$(NULL)

# The recipe for a filter's page.
MAKE_FILTER_PAGE = $(AM_V_GEN)rm -f $@ $@-t; \
	$(POD2MAN_COMMAND) --section=1 --name=$(@:.1=) $< $@-t && mv $@-t $@

# Tests.  A test that hangs shall not hang the harness: each is given
# TEST_TIMEOUT seconds.
TEST_TIMEOUT = 1800
TEST_RUNNER = $(top_builddir)/run $(TIMEOUT) -k 10 $(TEST_TIMEOUT)
