dnl SPDX-License-Identifier: BSD-3-Clause
dnl Copyright the nbdkit-qcow2-filters authors

dnl QF_OPTIONAL_LIBRARY([NAME], [PKG-CONFIG MODULE], [PURPOSE])
dnl
dnl Use a library if it is there, unless --without-NAME; insist on it if
dnl --with-NAME.  Sets and substitutes NAME=yes|no, NAME_CFLAGS and
dnl NAME_LIBS, where NAME is in capitals, and defines HAVE_NAME.
AC_DEFUN([QF_OPTIONAL_LIBRARY], [
    m4_pushdef([qf_upper], m4_toupper(m4_translit([$1], [-], [_])))
    AC_ARG_WITH([$1],
        [AS_HELP_STRING([--without-$1], [do not use $2 ($3)])],
        [], [with_[]m4_translit([$1], [-], [_])=check])
    qf_upper=no
    AS_IF([test "x$with_[]m4_translit([$1], [-], [_])" != xno], [
        PKG_CHECK_MODULES(qf_upper, [$2], [
            qf_upper=yes
            AC_DEFINE([HAVE_]qf_upper, [1], [Define to 1 to use $2 ($3).])
        ], [
            AS_IF([test "x$with_[]m4_translit([$1], [-], [_])" = xyes],
                  [AC_MSG_ERROR([--with-$1 was given, but pkg-config does not find $2])])
        ])
    ])
    AC_SUBST(qf_upper)
    m4_popdef([qf_upper])
])
