# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""What the integration tests share: tools, servers, parts, clean-up.

A test is a script that ends with qf.main (function); the function gets
a fresh temporary directory and raises Fail to say what went wrong.

Contents and maps of disks are compared in disks.py.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from urllib.parse import quote

SKIP = 77

try:
    import nbd
except ImportError:
    print("skipped: this Python has no libnbd bindings (nbd)")
    sys.exit(SKIP)

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

SRCDIR = os.path.dirname(os.path.abspath(__file__))

# Sanitizers and valgrind make everything slower and larger, not wrong: no
# limit in the tests is meant as a measure of speed.
SLOW = (os.environ.get("SANITIZER", "none") != "none"
        or os.environ.get("NBDKIT_VALGRIND") == "1")
START_TIMEOUT = 120
RUN_TIMEOUT = 300


class Fail(Exception):
    """What was tested is not as it should be."""


class Skip(Exception):
    """It cannot be tested, because configure did not find something."""


def check(condition, message):
    if not condition:
        raise Fail(message)


def equal(what, actual, expected):
    check(actual == expected,
          f"{what}: expected {expected!r}, but it is {actual!r}")


def each(items, function):
    """Call function for each item, go on after failures; the results."""
    results = []
    failed = []
    for item in items:
        try:
            results.append(function(item))
        except (Fail, nbd.Error) as error:
            print(f"FAILED: {item}: {error}", flush=True)
            failed.append(str(item))
    check(not failed, f"{len(failed)} of {len(items)}: {' '.join(failed)}")
    return results


def parts(tmp, *functions):
    """The parts of a test, each of which takes the temporary directory."""
    def call(function):
        began = time.monotonic()
        try:
            function(tmp)
        except Skip as skip:
            print(f"{function.__name__}: skipped: {skip}")
            return
        print(f"{function.__name__}: {time.monotonic() - began:.1f} s",
              flush=True)

    by_name = {function.__name__: function for function in functions}
    each([name for name in by_name
          if not sys.argv[1:] or name in sys.argv[1:]],
         lambda name: call(by_name[name]))


# ---------------------------------------------------------------- tools

TOOL_VARIABLES = {
    "qemu-img": "QEMU_IMG", "qemu-io": "QEMU_IO", "qemu-nbd": "QEMU_NBD",
    "qemu-storage-daemon": "QSD", "nbdinfo": "NBDINFO", "nbdcopy": "NBDCOPY",
    "nbdsh": "NBDSH", "fio": "FIO", "curl": "CURL", "xz": "XZ",
    "gzip": "GZIP_PROG", "sshd": "SSHD",
}


def tool(name):
    """The path of a tool, or None: configure's answer, else PATH's."""
    found = os.environ.get(TOOL_VARIABLES[name])
    if found is None or found == "":
        found = shutil.which(name)
    return found


def need(*names):
    missing = [name for name in names if not tool(name)]
    if missing:
        raise Skip("not found: " + ", ".join(missing))


def nbdkit():
    """The wrapper of the build tree, which finds our filters."""
    path = os.environ.get("NBDKIT")
    if not path:
        top = os.environ.get("abs_top_builddir", os.path.dirname(SRCDIR))
        path = os.path.join(top, "nbdkit")
    check(os.access(path, os.X_OK), f"{path}: no nbdkit wrapper; run make")
    return path


def plugin_exists(kind, name):
    """Is this plugin or filter of nbdkit's own installed?"""
    return run([nbdkit(), f"--{kind}={name}", "null", "--version"]
               if kind == "filter" else [nbdkit(), name, "--version"],
               ok=None).returncode == 0


def need_plugins(*names):
    missing = [name for name in names if not plugin_exists("plugin", name)]
    if missing:
        raise Skip("nbdkit has no plugin " + ", ".join(missing))


def run(command, ok=0, timeout=RUN_TIMEOUT, text=True, **kwargs):
    """Run a command; fail with its output unless it exits with OK."""
    kwargs.setdefault("stdin", subprocess.DEVNULL)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=timeout,
                              text=text, errors="replace" if text else None,
                              **kwargs)
    except subprocess.TimeoutExpired:
        raise Fail(f"{command}: still running after {timeout} s") from None
    if ok is not None and done.returncode != ok:
        raise Fail(f"{command}: exit status {done.returncode}, not {ok}\n"
                   f"{done.stdout}\n{done.stderr}")
    return done


def qemu_img(*args, ok=0):
    return run([tool("qemu-img"), *args], ok=ok).stdout


def qemu_io(path, commands, options=()):
    """Commands for qemu-io, all of which must succeed."""
    command = [tool("qemu-io"), "-f", "qcow2", *options, path]
    done = run(command, input="\n".join(commands) + "\n", stdin=None,
               ok=None)
    check(done.returncode == 0,
          f"{command}: {done.stdout.replace('qemu-io> ', '')}{done.stderr}")


# -------------------------------------------------------------- servers

SANITIZER_REPORT = re.compile(
    r"ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error:"
    r"|Assertion .* failed|stack smashing")


class Server:
    """An nbdkit on a Unix socket; stop() expects it to end in order."""

    running = set()

    def __init__(self, tmp, args, env=None):
        # Short names, because a socket's path has 108 bytes.
        self.dir = tempfile.mkdtemp(prefix="s", dir=tmp)
        self.sock = os.path.join(self.dir, "s")
        self.logfile = os.path.join(self.dir, "log")
        pidfile = os.path.join(self.dir, "pid")
        self.args = [nbdkit(), "-f", "--exit-with-parent",
                     "-U", self.sock, "-P", pidfile, *args]
        with open(self.logfile, "wb") as log:
            self.process = subprocess.Popen(
                self.args, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
                env={**os.environ, **env} if env else None)
        Server.running.add(self)
        limit = time.monotonic() + START_TIMEOUT
        try:
            # The file appears when nbdkit is ready to serve.
            while not (os.path.exists(pidfile) and os.path.getsize(pidfile)):
                check(self.process.poll() is None,
                      f"{self.args}: ended with status "
                      f"{self.process.returncode}:\n{self.log()}")
                check(time.monotonic() < limit,
                      f"{self.args}: not ready after {START_TIMEOUT} s")
                time.sleep(0.005)
        except Fail:
            self.kill()
            raise

    def log(self):
        with open(self.logfile, errors="replace") as log:
            return log.read()

    def uri(self, export=""):
        return f"nbd+unix:///{quote(export, safe='')}?socket={self.sock}"

    def connect(self, export="", structured=True):
        handle = nbd.NBD()
        handle.set_request_structured_replies(structured)
        handle.add_meta_context("base:allocation")
        handle.set_export_name(export)
        handle.connect_unix(self.sock)
        return handle

    def alive(self):
        return self.process.poll() is None

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        Server.running.discard(self)
        shutil.rmtree(self.dir, ignore_errors=True)

    def stop(self):
        """End the server as a user would; a crash anywhere is a failure."""
        check(self.alive(), f"{self.args}: died with status "
              f"{self.process.returncode}:\n{self.log()[-4000:]}")
        self.process.terminate()
        try:
            self.process.wait(timeout=START_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Fail(f"{self.args}: does not end when told to") from None
        log = self.log()
        check(self.process.returncode == 0,
              f"{self.args}: ended with status {self.process.returncode}:\n"
              f"{log[-4000:]}")
        check(not SANITIZER_REPORT.search(log), f"{self.args}:\n{log}")


@contextlib.contextmanager
def serve(tmp, *args, env=None):
    server = Server(tmp, args, env)
    try:
        yield server
        server.stop()
    except (Fail, nbd.Error):
        status = server.process.poll()
        print("The server " + ("was running" if status is None
                               else f"had ended with status {status}")
              + f":\n{server.log()[-4000:]}", flush=True)
        raise
    finally:
        server.kill()


def serve_qcow2(tmp, path, *parameters):
    """The plain case: our filter over a local file."""
    return serve(tmp, "-r", "--filter=qcow2", "file", path, *parameters)


def check_flags_pass(tmp, name):
    """This filter changes nothing of what the plugin can do."""
    need_plugins("data", "full", "null")

    def flags(*args):
        with serve(tmp, *args) as server:
            handle = server.connect()
            values = [getattr(handle, name)() for name in (
                "is_read_only", "can_flush", "can_fua", "can_trim",
                "can_zero", "can_fast_zero", "can_multi_conn", "can_cache",
                "is_rotational", "get_size")]
            values += [handle.get_block_size(i) for i in range(3)]
            handle.shutdown()
            return values

    for args in (["memory", "1M"], ["null", "1M"], ["-r", "memory", "1M"],
                 ["full", "1M"], ["--filter=nozero", "memory", "1M"],
                 ["--filter=fua", "memory", "1M", "fuamode=force"],
                 ["--filter=blocksize-policy", "memory", "1M",
                  "blocksize-preferred=4096", "blocksize-minimum=512"],
                 ["data", "1 2 3"]):
        equal(args, flags("--filter=" + name, *args), flags(*args))


# ----------------------------------------------------------------- main

def watchdog(limit):
    """End a test that hangs, with the place where it does."""
    def bark():
        print(f"FAILED: not finished after {limit} s", flush=True)
        for frame in sys._current_frames().values():
            traceback.print_stack(frame, file=sys.stdout)
        sys.stdout.flush()
        # A handler only runs once libnbd returns from waiting for these.
        for server in list(Server.running):
            server.process.kill()
        os.kill(os.getpid(), signal.SIGTERM)
    timer = threading.Timer(limit, bark)
    timer.daemon = True
    timer.start()


def main(test, limit=1500):
    """Run test (temporary directory) and exit as automake expects."""
    # SIGTERM unwinds the stack, so that servers and files go away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    watchdog(limit)
    base = tempfile.gettempdir()
    if len(base) > 40:
        base = "/tmp"
    status = 0
    with tempfile.TemporaryDirectory(prefix="qf.", dir=base) as tmp:
        began = time.monotonic()
        try:
            nbdkit()
            test(tmp)
        except Skip as skip:
            print(f"skipped: {skip}")
            status = SKIP
        except Fail as fail:
            print(f"FAILED: {fail}")
            traceback.print_tb(fail.__traceback__, file=sys.stdout)
            status = 1
        except nbd.Error as error:
            print(f"FAILED: {error}")
            traceback.print_exc(file=sys.stdout)
            status = 1
        print(f"{os.path.basename(sys.argv[0])}: "
              f"{time.monotonic() - began:.1f} s")
    sys.exit(status)
