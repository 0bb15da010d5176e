"""The web application of a reward server."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from trl_flow.rewards.base import RewardInfo, check_callable, model_of
from trl_flow.rewards.checks import RewardFunc, check_reward_func, is_dense, needs_group, takes_videos
from trl_flow.rewards.named import as_rewards
from trl_flow.rewards.remote import PROTOCOL
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.serving.form import Body, ScoreRequest, read_score_request, refuse
from trl_flow.serving.limits import Limits
from trl_flow.serving.scoring import Scored, decoded
from trl_flow.serving.workers import OwnProcess, ScoringProcess, WorkerDied, Workers


# What proxies report for a client that went away. It never gets to see it
_CLIENT_CLOSED_REQUEST = 499
# Bounds of the latencies that are counted
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Pool = Sequence[Callable[[], ScoringProcess]]


def create_app(
    rewards: Sequence[RewardFunc | str], *, limits: Limits | None = None, token: str | None = None,
    pool: Pool = (), on_ready: Callable[[], None] | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:  # fmt: skip
    """
    An application that scores images with `rewards`.

    | endpoint | answer |
    | --- | --- |
    | `POST /score` | a multipart form: PNG files `images`, and as JSON `prompts`, `columns` and `rewards` (optional); of videos also PNG files `frames`, and as JSON `videos`, how many each has. Answer: `{"rewards": {name: [score or null, ...]}, "cards": {name: card}}` |
    | `GET /rewards` | names and cards of the reward functions, and the limits |
    | `GET /metrics` | counters in Prometheus' text format |
    | `GET /health` | 200 when it can score, 503 while models are loaded; the only one without a token |

    Reward functions run in one thread, one request after another, or in the processes of a `pool`. Models are loaded
    when it starts, freed at the end.

    Args:
        rewards (`Sequence[Callable | str]`): reward functions or names of them, called as in metrics.
        limits ([`Limits`], *optional*): what is accepted.
        token (`str`, *optional*): what clients must send as `Authorization: Bearer ...`. `None` lets everyone in.
        pool (`Sequence[Callable]`, *optional*): what starts each process, see [`trl_flow.serving.workers.pool`].
        on_ready (`Callable`, *optional*): called, in a scoring thread, once all models are loaded.
        on_failure (`Callable`, *optional*): called there instead with the exception, if loading fails.

    Raises:
        TypeError, ValueError: if one of `rewards` is not a reward function, or there is none.
    """  # noqa: E501
    service = _Service(as_rewards(rewards), limits or Limits(), token, pool)

    # Without the pages that describe an API: they load scripts from elsewhere
    pages = dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
    app = FastAPI(title="trl-flow reward server", lifespan=lambda _: service.running(on_ready, on_failure), **pages)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"ready": service.up > 0}, 200 if service.up else 503)

    @app.get("/rewards")
    async def cards(request: Request) -> JSONResponse:
        service.authorize(request)
        return JSONResponse(service.description)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.authorize(request)
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

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
        except ClientDisconnect:
            status = _CLIENT_CLOSED_REQUEST
            return Response(status_code=status)
        finally:
            service.requests.labels(str(status)).inc()

    return app


class _Service:
    """The reward functions of a server, and what stands between them and the requests."""

    def __init__(self, rewards: Sequence[RewardFunc], limits: Limits, token: str | None, pool: Pool):
        if not rewards:
            raise ValueError("There is no reward function to serve. Give at least one.")
        self.scorer = RewardScorer(rewards)
        self.rewards = dict(zip(self.scorer.names, rewards, strict=True))
        for name, func in self.rewards.items():
            check_callable(f"The reward {name!r}", func, "")
        self.limits = limits
        self._pool = pool
        self._workers: Workers | None = None
        self._cards = {name: _card(name, func) for name, func in self.rewards.items()}
        own = {"rewards": [*self._cards.values()], "limits": dataclasses.asdict(limits)}
        self.description = {"protocol": PROTOCOL, "workers": len(pool) or 1, **own}
        self._authorization = None if token is None else f"Bearer {token}".encode()
        self._inside = 0
        # Not the process's default registry: a process may have several servers, as tests do
        self.registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self.registry)
        status = "Requests for scores by the status of their answers; 499 are those whose clients went away."
        self.requests = counter("trl_flow_requests", status, ["status"])
        self._images = counter("trl_flow_images", "Images that were scored.")
        self._errors = counter("trl_flow_reward_errors", "Calls in which a reward function failed.", ["reward"])
        self._scoring = counter("trl_flow_scoring_seconds", "Seconds spent in a reward function.", ["reward"])
        latency = "Seconds from a request's headers to its answer with scores."
        self._latency = Histogram("trl_flow_request_seconds", latency, buckets=_SECONDS, registry=self.registry)
        inside = "Requests that are uploading, waiting or being scored."
        gauge = functools.partial(Gauge, registry=self.registry)
        gauge("trl_flow_waiting", inside).set_function(lambda: self._inside)
        gauge("trl_flow_workers", "Threads or processes that can score.").set_function(lambda: self.up)
        # One request is scored while the images of the next are decoded; more would only take memory. A process of a
        # pool decodes by itself
        self._decoded = asyncio.Semaphore(2)

    @property
    def up(self) -> int:
        """How many workers can score now."""
        return 0 if self._workers is None else self._workers.up

    def _alone(self) -> OwnProcess:
        return OwnProcess(self.scorer)

    @contextlib.asynccontextmanager
    async def running(
        self, on_ready: Callable[[], None] | None, on_failure: Callable[[BaseException], None] | None
    ) -> AsyncIterator[None]:
        """Loads the models; at the end it frees them, unless a function hangs, which is left behind with its model."""
        self._workers = Workers(self._pool or [self._alone], on_ready, on_failure)
        self._workers.start()
        yield
        await run_in_threadpool(self._workers.stop)

    def authorize(self, request: Request) -> None:
        """Answers 401 without the token."""
        given = request.headers.get("authorization", "").encode("latin-1")
        # Takes as long for a token that is nearly right as for one that is not
        if self._authorization is not None and not hmac.compare_digest(given, self._authorization):
            reason = "This server asks for a token: send it as 'Authorization: Bearer TOKEN'."
            raise HTTPException(401, reason, headers={"WWW-Authenticate": "Bearer"})

    async def answer(self, request: Request, body: Body) -> dict[str, dict[str, Any]]:
        """
        The scores that `request` asks for and the cards of what gave them, by which a client sees that a server has
        been replaced. 4xx for what is not accepted, 500 if a function fails, 503 if it is full or loads models.
        """
        started = time.perf_counter()
        self.authorize(request)
        # Before anything of the upload is read: this is what bounds the memory
        if not self.up or self._inside >= self.limits.max_waiting:
            full = f"{self._inside} requests are waiting, which is the limit."
            reason = full if self.up else "The models of this server are being loaded."
            raise HTTPException(503, f"{reason} Try again.", headers={"Retry-After": "1"})
        self._inside += 1
        try:
            asked = await read_score_request(body, request.headers.get("content-type", ""), self.limits)
            names = self._names(asked)
            async with contextlib.nullcontext() if self._pool else self._decoded:
                if not self._pool:
                    asked = await run_in_threadpool(decoded, asked, self.limits.max_pixels)
                scored = await self._scored(request, names, asked)
        finally:
            self._inside -= 1
        for name, seconds in scored.seconds.items():
            self._scoring.labels(name).inc(seconds)
        if scored.failure is not None:
            name, reason = scored.failure
            self._errors.labels(name).inc()
            raise HTTPException(500, reason)
        self._images.inc(len(asked.prompts))
        self._latency.observe(time.perf_counter() - started)
        return {"rewards": scored.scores, "cards": {name: self._cards[name] for name in names}}

    def _names(self, asked: ScoreRequest) -> list[str]:
        # Each once: a field of a megabyte may hold a name very often
        names = list(self.rewards if asked.rewards is None else dict.fromkeys(asked.rewards))
        for name in names:
            # Not what is wrong with the request: another server may have it
            missing = f"There is no reward {name[:80]!r} on this server, only {', '.join(self.rewards)}."
            refuse(name not in self.rewards, 404, missing)
            try:
                check_reward_func(self.rewards[name], asked.columns, videos=asked.videos is not None)
            except (TypeError, ValueError) as error:
                raise HTTPException(422, str(error)) from error
        return names

    async def _scored(self, request: Request, names: list[str], asked: ScoreRequest) -> Scored:
        scored = asyncio.wrap_future(self._workers.submit(names, asked))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([scored, gone], return_when=asyncio.FIRST_COMPLETED)
            if not scored.done():
                raise ClientDisconnect  # a client that waits no longer has asked elsewhere
            return await scored
        except WorkerDied as error:
            raise HTTPException(500, f"{error} Another one is started. Ask again.") from error
        finally:
            gone.cancel()
            scored.cancel()


def _card(name: str, func: RewardFunc) -> dict[str, Any]:
    """What a client should know of a reward function, as JSON: infinite ends of its range are null."""
    info = getattr(func, "info", None)
    return {
        "name": name,
        "dense": is_dense(func),
        "needs_group": needs_group(func),
        "videos": takes_videos(func),
        "dtype": str(func.dtype).removeprefix("torch.") if model_of(func) else None,
        "info": None if info is None else RewardInfo.to_json(info),
    }


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
