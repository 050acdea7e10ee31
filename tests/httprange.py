# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""A web server with range requests for one file, on a Unix socket."""

import contextlib
import http.server
import re
import socketserver
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes, which Nagle's algorithm delays.
    wbufsize = -1

    def log_message(self, *_):
        pass

    def respond(self, with_body):
        content = self.server.content
        first, last = 0, len(content) - 1
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)",
                              self.headers.get("Range", ""))
        if wanted:
            status = 206
            first = int(wanted[1])
            last = min(int(wanted[2] or last), last)
            if first > last:
                self.send_error(416)
                return
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if status == 206:
            self.send_header("Content-Range",
                             f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if with_body:
            self.wfile.write(content[first:last + 1])
        self.wfile.flush()

    def do_GET(self):
        self.respond(True)

    def do_HEAD(self):
        self.respond(False)


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def get_request(self):
        request, _ = super().get_request()
        # Handlers expect an address to have two parts.
        return request, ("local", 0)


@contextlib.contextmanager
def serve(path, sock):
    """Serve the file's content under any name."""
    with UnixServer(sock, Handler) as server:
        with open(path, "rb") as file:
            server.content = file.read()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
