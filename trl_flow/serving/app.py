"""The web application of a reward server."""

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST

from trl_flow.rewards.base import ModelReward
from trl_flow.rewards.calling import (
    RewardError,
    RewardFunc,
    call_reward_func,
    check_reward_func,
    is_dense,
    reward_names,
)
from trl_flow.rewards.remote import PROTOCOL
from trl_flow.serving.limits import Limits
from trl_flow.serving.metrics import Metrics
from trl_flow.serving.upload import Body, ClientGone, ScoreRequest, decode_images, read_score_request
from trl_flow.serving.worker import ScoringThread


_RETRY_AFTER = "1"
# What proxies report for a client that went away. It never gets to see it
_CLIENT_CLOSED_REQUEST = 499
# Seconds that a reward function is waited for once the server has been told to end and its requests are answered
_STOP = 1.0

logger = logging.getLogger(__name__)


def create_app(
    rewards: Sequence[RewardFunc],
    *,
    limits: Limits | None = None,
    token: str | None = None,
    on_ready: Callable[[], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """
    An application that scores images with `rewards`.

    | endpoint | answer |
    | --- | --- |
    | `POST /score` | a multipart form: PNG files `images`, and as JSON `prompts`, `columns` and `rewards` (optional). Answer: `{"rewards": {name: [score or null, ...]}, "cards": {name: card}}` |
    | `GET /rewards` | names and cards of the reward functions, and the limits |
    | `GET /metrics` | counters in Prometheus' text format |
    | `GET /health` | 200 when it can score, 503 while models are loaded; the only one without a token |

    Reward functions run in one thread, one request after another. Models are loaded when the application starts, and
    freed when it ends.

    Args:
        rewards (`Sequence[Callable]`): reward functions, called by their names as in metrics.
        limits ([`Limits`], *optional*): what is accepted.
        token (`str`, *optional*): what clients must send as `Authorization: Bearer ...`. `None` lets everyone in.
        on_ready (`Callable`, *optional*): called, in the scoring thread, once the models are loaded.
        on_failure (`Callable`, *optional*): called there instead with the exception, if loading fails.

    Raises:
        TypeError: if one of `rewards` is not a reward function.
        ValueError: if there is none.
    """  # noqa: E501
    service = _Service(rewards, limits or Limits(), token)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start(on_ready, on_failure)
        yield
        await run_in_threadpool(service.stop)

    # Without the pages that describe an API: they load scripts from elsewhere
    app = FastAPI(title="trl-flow reward server", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/rewards")
    async def cards(request: Request) -> JSONResponse:
        service.authorize(request)
        return JSONResponse(service.description)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.authorize(request)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/score")
    async def score(request: Request) -> Response:
        status, body = 500, Body(request, service.limits.max_body_bytes)
        try:
            answer = await service.answer(request, body)
            status = 200
            return JSONResponse(answer)
        except HTTPException as error:
            status = error.status_code
            await body.discard()
            if not body.complete:
                # Nothing else can come on this connection, where the rest of the upload would be in its way
                error.headers = {**(error.headers or {}), "Connection": "close"}
            raise
        except ClientGone:
            status = _CLIENT_CLOSED_REQUEST
            return Response(status_code=status)
        finally:
            service.metrics.answered(status)

    return app


class _Service:
    """The reward functions of a server, and what stands between them and the requests."""

    def __init__(self, rewards: Sequence[RewardFunc], limits: Limits, token: str | None):
        if not rewards:
            raise ValueError("There is no reward function to serve. Give at least one.")
        self.rewards = dict(zip(reward_names(rewards), rewards, strict=True))
        for name, func in self.rewards.items():
            if not callable(func) or isinstance(func, type):
                raise TypeError(f"The reward {name!r} is {func!r}, but must be a function or an object with __call__.")
        self.limits = limits
        self.ready = False
        self._cards = {name: _card(name, func) for name, func in self.rewards.items()}
        self.description = {
            "protocol": PROTOCOL,
            "rewards": list(self._cards.values()),
            "limits": dataclasses.asdict(limits),
        }
        self._authorization = None if token is None else f"Bearer {token}".encode()
        self._inside = 0
        self.metrics = Metrics(lambda: self._inside)
        # One request is scored while the images of the next are decoded; more would only take memory
        self._decoded = asyncio.Semaphore(2)
        self._thread: ScoringThread | None = None

    # ---- Start and end ----

    def start(self, on_ready: Callable[[], None] | None, on_failure: Callable[[Exception], None] | None) -> None:
        def load() -> None:
            try:
                for func in self.rewards.values():
                    if isinstance(func, ModelReward):
                        func.load()
            except Exception as error:
                logger.error("The reward functions could not be loaded.", exc_info=error)
                if on_failure is not None:
                    on_failure(error)
                return
            self.ready = True
            if on_ready is not None:
                on_ready()

        self._thread = ScoringThread()
        self._thread.submit(load)

    def stop(self) -> None:
        self.ready = False
        if not self._thread.stop(_STOP):
            return  # what hangs is left behind with its model, which ends with the process
        for func in self.rewards.values():
            if isinstance(func, ModelReward):
                func.close()

    # ---- Requests ----

    def authorize(self, request: Request) -> None:
        """
        Raises:
            HTTPException: 401 without the token.
        """
        if self._authorization is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        # Takes as long for a token that is nearly right as for one that is not
        if not hmac.compare_digest(given, self._authorization):
            raise HTTPException(
                401,
                "This server asks for a token: send it as 'Authorization: Bearer TOKEN'.",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def answer(self, request: Request, body: Body) -> dict[str, dict[str, Any]]:
        """
        The scores that `request` asks for and the cards of what gave them, both by the names of the reward functions:
        a client sees by these that a server has been replaced by another one since it asked.

        Raises:
            HTTPException: 4xx for what cannot be accepted, 500 if a reward function fails, 503 if there are too many
                requests or models are being loaded.
            ClientGone: if the client goes away.
        """
        started = time.perf_counter()
        self.authorize(request)
        if not self.ready:
            raise _unavailable("The models of this server are being loaded")
        # Before anything of the upload is read: this is what bounds the memory
        if self._inside >= self.limits.max_waiting:
            raise _unavailable(f"{self._inside} requests are waiting, which is the limit")
        self._inside += 1
        try:
            asked = await read_score_request(body, request.headers.get("content-type", ""), self.limits)
            names = self._names(asked)
            async with self._decoded:
                images = await run_in_threadpool(decode_images, asked.images)
                scores = await self._scored(request, names, asked, images)
        finally:
            self._inside -= 1
        self.metrics.scored(len(images), time.perf_counter() - started)
        return {"rewards": scores, "cards": {name: self._cards[name] for name in names}}

    def _names(self, asked: ScoreRequest) -> list[str]:
        # Each once: a field of a megabyte may hold a name very often
        names = list(self.rewards if asked.rewards is None else dict.fromkeys(asked.rewards))
        for name in names:
            if name not in self.rewards:
                # Not what is wrong with the request: another server may have it
                raise HTTPException(
                    404, f"There is no reward {name[:80]!r} on this server, only {', '.join(self.rewards)}."
                )
            try:
                check_reward_func(self.rewards[name], asked.columns)
            except (TypeError, ValueError) as error:
                raise HTTPException(422, str(error)) from error
        return names

    async def _scored(
        self, request: Request, names: list[str], asked: ScoreRequest, images: list[Image.Image]
    ) -> dict[str, list[float | None]]:
        future = self._thread.submit(lambda: self._score(names, asked.prompts, images, asked.columns))
        scores, gone = asyncio.wrap_future(future), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([scores, gone], return_when=asyncio.FIRST_COMPLETED)
            if not scores.done():
                raise ClientGone  # a client that waits no longer has asked elsewhere
            return await scores
        except RewardError as error:
            logger.error("%s", error, exc_info=error.__cause__ or error)
            raise HTTPException(500, _told(error)) from error
        finally:
            gone.cancel()
            scores.cancel()

    def _score(
        self, names: list[str], prompts: list[str], images: list[Image.Image], columns: dict[str, list]
    ) -> dict[str, list[float | None]]:
        kwargs = {**columns, "trainer_state": None, "log_metric": _ignore, "log_extra": _ignore}
        scores = {}
        for name in names:
            started = time.perf_counter()
            try:
                with torch.no_grad():
                    values = call_reward_func(self.rewards[name], name, prompts, images, kwargs, timeout=None)
            except BaseException as error:
                self.metrics.failed(name)
                if isinstance(error, RewardError):
                    raise
                raise RewardError(f"The reward function {name!r} raised {type(error).__name__}: {error}") from error
            finally:
                self.metrics.ran(name, time.perf_counter() - started)
            scores[name] = [None if math.isnan(value) else value for value in values]
        return scores


def _card(name: str, func: RewardFunc) -> dict[str, Any]:
    """What a client should know of a reward function, as JSON: infinite ends of its range are null."""
    info = getattr(func, "info", None)
    if info is not None:
        info = dataclasses.asdict(info)
        info["range"] = [end if math.isfinite(end) else None for end in info["range"]]
    dtype = str(func.dtype).removeprefix("torch.") if isinstance(func, ModelReward) else None
    needs_group = bool(getattr(func, "needs_group", False))
    return {"name": name, "dense": is_dense(func), "needs_group": needs_group, "dtype": dtype, "info": info}


def _unavailable(reason: str) -> HTTPException:
    return HTTPException(503, f"{reason}. Try again.", headers={"Retry-After": _RETRY_AFTER})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _told(error: RewardError) -> str:
    """The error for those who do not see the server's log."""
    cause = error.__cause__
    if cause is None:
        message = str(error)
    else:
        message = f"{str(error).split(' raised ')[0]} raised {type(cause).__name__}: {cause}"
        message = f"{message[:2000]}. The server's log has the traceback."
    return message[:3000].encode("utf-8", "backslashreplace").decode()


def _ignore(*arguments: Any) -> None:
    """In the place of the trainer's logs, which a server does not have."""
