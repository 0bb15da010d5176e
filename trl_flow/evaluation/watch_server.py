"""The server of `trl-flow watch`: one page, to this machine alone."""

import html
from http.server import ThreadingHTTPServer
from pathlib import Path

from trl_flow.evaluation.local_handler import LocalHandler
from trl_flow.evaluation.watch import watch_page


# By other names a page of another site could ask for this one
_HOSTS = {"localhost", "127.0.0.1"}


def watch_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Serves the page of the run in `folder`, made anew for each request. Port 0 is any that is free. `ValueError` if
    the port cannot be had."""

    class Handler(LocalHandler):
        def do_GET(self):
            if self.headers.get("Host", "").rpartition(":")[0] not in _HOSTS:
                self._send(403, "Open http://localhost, by this name.")
            elif self.path != "/":
                self._send(404, "There is nothing but /.")
            else:
                try:
                    self._send(200, watch_page(folder)[0])
                except ValueError as error:  # the run's folder was moved away, or is being written to
                    refresh = '<meta http-equiv="refresh" content="10">'
                    self._send(503, f"<!DOCTYPE html>{refresh}<p>{html.escape(str(error))}</p>")

        def _send(self, status: int, page: str) -> None:
            content = page.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}, but must be from 0 (any that is free) to 65535.")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        remedy = f"Choose another one, --port {port % 65535 + 1}, or 0 for any that is free"
        raise ValueError(f"port {port} cannot be had: {error}. {remedy}.") from error
