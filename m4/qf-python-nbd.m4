dnl SPDX-License-Identifier: BSD-3-Clause
dnl Copyright the nbdkit-qcow2-filters authors

dnl QF_PYTHON_NBD
dnl
dnl Set PYTHON to a Python 3 that can import libnbd's bindings.  The
dnl first python3 on $PATH may be a private one which cannot, while the
dnl distribution's can, so several are tried.  Without such a Python the
dnl best other one is used, the integration tests skip, and
dnl HAVE_PYTHON_NBD is "no".
AC_DEFUN([QF_PYTHON_NBD], [
    AC_ARG_VAR([PYTHON], [a Python 3 that has libnbd's module nbd])
    AC_MSG_CHECKING([for a Python 3 with the module nbd])
    HAVE_PYTHON_NBD=no
    qf_any_python=
    for qf_python in "$PYTHON" python3 /usr/bin/python3 /usr/local/bin/python3
    do
        qf_python=$(command -v "$qf_python" 2>/dev/null) || continue
        "$qf_python" -c 'import sys; sys.exit (sys.version_info < (3, 6))' \
            >/dev/null 2>&1 || continue
        test -n "$qf_any_python" || qf_any_python=$qf_python
        AS_IF(["$qf_python" -c 'import nbd' >/dev/null 2>&1], [
            HAVE_PYTHON_NBD=yes
            PYTHON=$qf_python
            break
        ])
    done
    AS_IF([test $HAVE_PYTHON_NBD = yes], [
        AC_MSG_RESULT([$PYTHON])
    ], [
        PYTHON=${qf_any_python:-python3}
        AC_MSG_RESULT([no])
    ])
    AC_SUBST([HAVE_PYTHON_NBD])
])
