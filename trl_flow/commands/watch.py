"""`trl-flow watch`: a page on a running or finished run, in a browser or as a file."""

import argparse
import time
from pathlib import Path


DESCRIPTION = """\
Show a running or finished training: where it stands, its curves, its latest images and values, on one page that
refreshes itself while the run goes on. Nothing is trained or changed.

  trl-flow watch runs/guard
  trl-flow watch runs/guard --output guard.html

The first serves the page to this machine. For a run on another machine, forward its port to yours:
ssh -L 8010:localhost:8010 HOST. The second writes one file with everything in it, anew every ten seconds until
the run ends.
"""

_EVERY = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the run's output_dir")
    parser.add_argument("--port", type=int, default=8010, help="where to serve the page on this machine (8010)")
    what = "write the page to a file, and serve nothing"
    parser.add_argument("--output", type=Path, metavar="FILE", help=what)


def run(arguments: argparse.Namespace) -> None:
    """Serves or writes the page until it is interrupted, or, written, until the run ends. `ValueError` if there is no
    run, or the port or file cannot be had."""
    from trl_flow.evaluation.watch import watch_page

    watch_page(arguments.folder)  # whatever is wrong with the folder is said now
    if arguments.output is None:
        _serve(arguments.folder, arguments.port)
    else:
        _write(arguments.folder, arguments.output)


def _serve(folder: Path, port: int) -> None:
    from trl_flow.evaluation.watch_server import watch_server

    with watch_server(folder, port) as server:
        print(f"{folder} is shown at http://localhost:{server.server_address[1]} (Ctrl-C ends this).", flush=True)
        server.serve_forever()


def _write(folder: Path, output: Path) -> None:
    from trl_flow.evaluation.outputs import whole_file
    from trl_flow.evaluation.watch import watch_page

    page, standing = watch_page(folder)
    while True:
        try:
            with whole_file(output) as file:
                file.write(page.encode())
        except OSError as error:
            remedy = "Name a file in a folder that exists and can be written."
            raise ValueError(f"--output {output} cannot be written: {error.strerror or error}. {remedy}") from error
        if standing.state != "running":
            print(f"{output} shows {folder}: {standing.text}.")
            return
        print(f"{output} shows {folder}: {standing.text} (Ctrl-C ends this).", flush=True)
        time.sleep(_EVERY)
        page, standing = watch_page(folder)
