dnl SPDX-License-Identifier: BSD-3-Clause
dnl Copyright the nbdkit-qcow2-filters authors

dnl QF_APPEND_CFLAG([VARIABLE], [FLAG])
dnl Append FLAG to VARIABLE if the compiler takes it.  -Werror because
dnl clang only warns about flags that it does not know.
AC_DEFUN([QF_APPEND_CFLAG], [
    AC_MSG_CHECKING([whether $CC accepts $2])
    qf_save_CFLAGS=$CFLAGS
    CFLAGS="$CFLAGS $$1 -Werror $2"
    AC_COMPILE_IFELSE([AC_LANG_PROGRAM], [
        AC_MSG_RESULT([yes])
        AS_VAR_APPEND([$1], [" $2"])
    ], [
        AC_MSG_RESULT([no])
    ])
    CFLAGS=$qf_save_CFLAGS
])
