"""A blind comparison of images by people, served to browsers on this machine."""

import contextlib
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trl_flow.evaluation.image_folder import ImageFolder
from trl_flow.evaluation.local_handler import LocalHandler
from trl_flow.evaluation.outputs import locked
from trl_flow.evaluation.page import MEDIA_TYPES, script_json, with_policy
from trl_flow.evaluation.vote_plan import (
    QUESTIONS,
    Ballots,
    VotePair,
    check_voter,
    left_models,
    vote_pairs,
    voting_order,
)
from trl_flow.evaluation.vote_results import update_votes, vote_results


_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LONGEST_BODY = 16_384
# Not an evaluation's lock: models may be added while people vote
_LOCK = ".vote.lock"
_NOTHING = HTTPStatus.NOT_FOUND, "There is nothing here."
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class VoteError(Exception):
    """A request that cannot be followed: the status and what to say."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class VoteServer:
    """
    Asks people which of two images is better, without telling whose they are.

    The server listens on this machine's loopback interface alone, and refuses requests that name another host or come
    from another site's page. Each voter, known by a name, gets the pairs in an order, and each pair's sides in an
    arrangement of their own; every vote is on disk before the next pair is shown. What is sent to the browser holds no
    model's name, until all pairs are voted on and the voter asks for the results.

    `folder` is an evaluation's. The first of the `models` (names; by default all, the base model first) is compared
    with each of the others, on `pairs` prompts of each set. `seed` is of the choice of pairs, their order and their
    sides; port 0 is any that is free. One server asks about a folder at a time. `ValueError` if there is nothing to
    vote on, another server asks about the folder, or the port is taken.

    Example:

    ```pycon
    >>> from trl_flow.evaluation import VoteServer, evaluate_models
    >>> from trl_flow.shapes import load_pipeline, load_prompts, pipeline_path
    >>> load_pipeline().transformer.save_pretrained("run")  # stands for a trained one
    >>> asked = {"prompts": load_prompts("test").select(range(2)), "output_dir": "comparison", "progress": False}
    >>> _ = evaluate_models(pipeline_path(), {"run": "run"}, **asked)
    >>> server = VoteServer("comparison", pairs=2)
    >>> len(server.pairs)  # server.serve_forever() asks at server.url
    2
    >>> server.close()
    ```
    """

    def __init__(self, folder: str | os.PathLike, *, models: Sequence[str] | None = None, pairs=100, seed=0, port=0):
        self.folder = ImageFolder(folder)
        self.seed = seed
        self.pairs = vote_pairs(self.folder, models=models, pairs=pairs, seed=seed)
        self.ballots = Ballots(self.folder.path)
        self.ballots.voters()  # damaged files are found before anyone has voted
        self._resources = contextlib.ExitStack()
        remedy = "let everyone vote on its page"
        held = locked(self.folder.path, "asking for votes on", name=_LOCK, remedy=remedy)
        self._resources.enter_context(held)
        # What images and pairs are called in the browser says nothing, and cannot be worked out
        self._salt = secrets.token_hex(16)
        self._lock, self._report_lock = threading.Lock(), threading.Lock()
        self._serving = self._closed = False
        self.images: dict[str, Path] = {}  # by the path in their addresses
        page = (files("trl_flow.evaluation") / "web" / "vote.html").read_text(encoding="utf-8")
        page = with_policy(page, "img-src 'self' data:", "media-src blob:", "connect-src 'self'")
        first = self.pairs[0]
        is_video = self.folder.shown_path(first.set_name, first.reference, first.index).suffix == ".mp4"
        questions = QUESTIONS | ({"quality": "Video quality"} if is_video else {})
        self.page = page.replace("__DATA__", script_json({"questions": questions})).encode()
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        except (OSError, OverflowError) as error:
            self._resources.close()
            raise ValueError(f"The vote cannot be served on port {port}: {error}. Choose another, or 0.") from error
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """The address of the vote."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def serve_forever(self) -> None:
        """Answers until `close` is called from another thread, or the process is interrupted."""
        with self._lock:
            self._serving = not self._closed
        if self._serving:
            self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        """Ends `serve_forever`, frees the port and brings the report up to date."""
        with self._lock:
            self._closed = True
        if self._serving:  # else `shutdown` would wait forever
            self._server.shutdown()
        self._server.server_close()
        with self._resources:
            self.write_report()

    def write_report(self) -> None:
        """Puts the votes so far into `results.json`, `results.md` and `votes.png`."""
        with self._report_lock:
            update_votes(self.folder.path)

    def answer(self, action: str, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a voter asks (`"next"`, `"vote"`, `"undo"`, `"results"`) and returns their state; `VoteError` if
        it cannot be done. `request` has `voter`, and for a vote `pair` and `answers`."""
        if action not in ("next", "vote", "undo", "results"):
            raise VoteError(*_NOTHING)
        status = HTTPStatus.BAD_REQUEST
        with self._lock:
            try:
                voter = check_voter(request.get("voter"))
                status = HTTPStatus.CONFLICT
                if action == "results":
                    return self._results(voter)
                if action == "vote":
                    self._vote(voter, request)
                elif action == "undo":
                    self.ballots.undo(voter)
            except ValueError as error:
                raise VoteError(status, str(error)) from error
            return self._state(voter)

    def _vote(self, voter: str, request: dict[str, Any]) -> None:
        pair = next((pair for pair in self.pairs if self._token(voter, pair) == request.get("pair")), None)
        if pair is None:
            raise ValueError("This pair is not from this vote: the server has been restarted since.")
        self.ballots.add(voter, pair, self._left(voter, pair), request.get("answers"))

    def _state(self, voter: str) -> dict[str, Any]:
        content = self.ballots.read(voter)
        voted, total = {vote["key"] for vote in content["votes"]}, len(self.pairs)
        missing = [pair for pair in self._order(voter) if pair.key not in voted]
        state = {"voter": voter, "total": total, "done": total - len(missing), "pair": None}
        state["can_undo"] = bool(content["votes"]) and not content["seen"]
        for pair in missing[:1]:
            token, left = self._token(voter, pair), self._left(voter, pair)
            state["pair"] = {"token": token, "prompt": pair.prompt}
            right = pair.other if left == pair.reference else pair.reference
            for side, model in (("left", left), ("right", right)):
                state["pair"][side] = f"/image/{hashlib.sha256(f'{token}{side}'.encode()).hexdigest()[:32]}"
                path = self.folder.shown_path(pair.set_name, model, pair.index)
                self.images[state["pair"][side]] = path
                state["pair"]["video"] = path.suffix == ".mp4"
        return state

    def _results(self, voter: str) -> dict[str, Any]:
        if self._state(voter)["pair"] is not None:
            raise ValueError("The results are shown when all pairs are voted on.")
        self.ballots.mark_seen(voter)
        # Drawing takes longer than anyone should have to wait for
        threading.Thread(target=self.write_report, daemon=True).start()
        return {"results": vote_results([self.ballots.read(voter)])}

    def _token(self, voter: str, pair: VotePair) -> str:
        return hashlib.sha256(f"{self._salt}{voter.casefold()}{pair.key}".encode()).hexdigest()[:32]

    def _order(self, voter: str) -> list[VotePair]:
        return voting_order(self.pairs, voter=voter.casefold(), seed=self.seed)

    def _left(self, voter: str, pair: VotePair) -> str:
        return left_models(self._order(voter), voter=voter.casefold(), seed=self.seed)[pair.key]


def _handler(votes: VoteServer) -> type[LocalHandler]:
    class Handler(LocalHandler):
        def do_GET(self) -> None:
            self._reply(self._get)

        def do_POST(self) -> None:
            self._reply(lambda: (json.dumps(votes.answer(*self._request())).encode(), "application/json"))

        def _get(self) -> tuple[bytes, str]:
            path = urlsplit(self.path).path
            if path == "/":
                return votes.page, "text/html; charset=utf-8"
            if path not in votes.images:
                raise VoteError(*_NOTHING)
            return votes.images[path].read_bytes(), MEDIA_TYPES[votes.images[path].suffix]

        def _request(self) -> tuple[str, dict[str, Any]]:
            origin, length = f"http://{self.headers.get('Host')}", self.headers.get("Content-Length", "")
            # Another site's page may send forms and plain text here, but neither JSON nor this origin
            if self.headers.get("Origin", origin) != origin:
                raise VoteError(HTTPStatus.FORBIDDEN, "The request comes from another site's page.")
            if self.headers.get_content_type() != "application/json":
                raise VoteError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The request must be JSON.")
            if not length.isdecimal():
                raise VoteError(HTTPStatus.LENGTH_REQUIRED, "The request must say how long it is.")
            if int(length) > _LONGEST_BODY:
                raise VoteError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too long.")
            try:
                request = json.loads(self.rfile.read(int(length)))
                return urlsplit(self.path).path.removeprefix("/"), dict(request.items())
            except TimeoutError as error:
                raise VoteError(HTTPStatus.REQUEST_TIMEOUT, "The request has not arrived in time.") from error
            except (ValueError, RecursionError, AttributeError) as error:
                raise VoteError(HTTPStatus.BAD_REQUEST, "The request must be a JSON object.") from error

        def _reply(self, answer: Callable[[], tuple[bytes, str]]) -> None:
            status, kind = HTTPStatus.OK, "application/json"
            try:
                # A name of another site that leads here would make that site's pages ones of this server
                if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in _LOOPBACK:
                    raise VoteError(HTTPStatus.FORBIDDEN, "This server is for this machine: open it as 127.0.0.1.")
                content, kind = answer()
            except (VoteError, ValueError, OSError) as error:
                # A ValueError is of a Host that is no address, an OSError of a disk that is full
                status = getattr(error, "status", HTTPStatus.BAD_REQUEST)
                status = HTTPStatus.INTERNAL_SERVER_ERROR if isinstance(error, OSError) else status
                content = json.dumps({"error": str(error)}).encode()
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **_HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    return Handler
