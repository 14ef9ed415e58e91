"""An S3 server on 127.0.0.1 (moto) and a proxy before it that injects faults.

Plain fsspec finds them through the environment, in this process and in its children.
"""

import http.client
import os
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec

FAULTS = ("503", "reset", "cut", "lost reply", "silent")
SLOW_S = 1.0


@dataclass
class Rule:
    """Requests whose "METHOD path" matches fail so: the first `times` of them."""

    pattern: str
    fault: str
    times: int = 1
    hits: int = field(default=0, init=False)


class FaultProxy:
    """Forwards to the server on `port`, `latency_s` late, except where a rule applies."""

    def __init__(self, port):
        self.rules: list[Rule] = []
        self.latency_s = 0.0
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                time.sleep(proxy.latency_s)
                fault = proxy.fault_for(f"{self.command} {self.path}")
                if fault == "503":
                    return self.answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
                if fault == "silent":
                    return time.sleep(30)
                if fault == "slow":
                    time.sleep(SLOW_S)
                if fault == "reset":
                    return self.reset()
                status, headers, data = forward(port, self.command, self.path, self.headers, body)
                if fault == "lost reply":
                    return self.reset()
                if fault == "cut":
                    self.answer(status, headers, data, data[: len(data) // 2])
                    return self.reset()
                return self.answer(status, headers, data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def answer(self, status, headers, data, sent=None):
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                known = [v for name, v in headers if name.lower() == "content-length"]
                is_head = self.command == "HEAD" and known
                self.send_header("Content-Length", known[0] if is_head else str(len(data)))
                self.end_headers()
                self.wfile.write(data if sent is None else sent)

            def reset(self):
                self.wfile.flush()
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()

            def log_message(self, format, *args):
                pass

            def finish(self):
                if self.connection.fileno() >= 0:
                    super().finish()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fault_for(self, request):
        with self._lock:
            for rule in self.rules:
                if rule.hits < rule.times and re.search(rule.pattern, request):
                    rule.hits += 1
                    return rule.fault
        return None

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


def forward(port, method, path, headers, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, dict(headers.items()))
    response = connection.getresponse()
    found = response.status, response.getheaders(), response.read()
    connection.close()
    return found


@contextmanager
def s3_server(patch):
    """Starts server and proxy, sets the environment; yields the proxy."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    forward(port, "POST", "/moto-api/reset", Message(), b"")  # an earlier server's objects
    proxy = FaultProxy(port)
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        yield proxy
    finally:
        proxy.stop()
        server.stop()
        os.environ.pop("AWS_ENDPOINT_URL", None)
        fsspec.filesystem("file")
