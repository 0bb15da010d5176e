"""A client that sends its request a few bytes at a time, and never ends."""

import contextlib
import socket
import time


def slow_request(address: tuple[str, int], begin: bytes, drip: bytes) -> bytes:
    """Sends `begin` at once and then `drip` again and again, more often than any server waits. Returns the first line
    of the answer, empty if the connection is closed without one; an `AssertionError` if it stays open."""
    until = time.monotonic() + 30
    with socket.create_connection(address) as connection:
        connection.settimeout(0.1)
        connection.sendall(begin)
        while time.monotonic() < until:
            with contextlib.suppress(ConnectionError):  # closed: what was answered can still be read
                connection.sendall(drip)
            try:
                return connection.recv(4096).split(b"\r\n")[0]
            except TimeoutError:
                continue
            except ConnectionError:
                return b""
    raise AssertionError("The server still waits for the rest of the request.")
