"""What the servers for browsers on this machine have in common."""

import contextlib
import io
import socket
import time
from http.server import BaseHTTPRequestHandler


class LocalHandler(BaseHTTPRequestHandler):
    """
    Requests that must have arrived, headers and body, within `timeout` seconds; the standard library's handler waits
    so long for each byte. Afterwards these are the seconds for each write of the answer.

    HTTP/1.0, a connection for each request: none is left that goes on being answered after the server is closed.
    """

    server_version, sys_version = "trl_flow", ""
    timeout = 60

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Arriving(self.connection, self.timeout))

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the browser has gone
            super().handle()

    def log_message(self, *arguments) -> None:
        """Not to the terminal, where a line for each request would be in the way."""


class _Arriving(io.RawIOBase):
    """What comes over a connection until `seconds` from now; then reading raises a `TimeoutError`."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection, self._seconds, self._until = connection, seconds, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._connection.settimeout(max(self._until - time.monotonic(), 0.001))
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(self._seconds)
