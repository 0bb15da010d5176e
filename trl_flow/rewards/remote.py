"""A reward function on a reward server, or the same one on several: see `trl-flow serve-rewards`."""

import asyncio
import io
import itertools
import json
import logging
import math
import os
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from PIL import Image

from trl_flow.rewards.base import RewardInfo, require


# Counted up when what servers and clients say to each other changes
PROTOCOL = 1
TOKEN_VARIABLE = "TRL_FLOW_REWARD_TOKEN"

# Modes that a PNG file keeps as they are. Images of others are sent as RGB
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
# Seconds until a machine that does not react counts as away
_CONNECT_TIMEOUT = 5.0
_LONGEST_REST = 60.0
# Requests to each server at a time: one is scored while the next one is sent
_REQUESTS_PER_SERVER = 2

logger = logging.getLogger(__name__)


class RewardServerError(ConnectionError, RuntimeError):
    """No reward server is left that answers, or one refuses what it is asked. The message names the servers."""


class _Failed(Exception):
    """An attempt failed in a way that may pass, or that another server may not share."""


class _Busy(Exception):
    def __init__(self, seconds: float, reason: str):
        super().__init__(reason)
        self.seconds = seconds


@dataclass
class _Server:
    url: str
    last_used: int
    card: dict | None = None  # None until it has been asked, and again when it may have been replaced by another
    max_images: int | None = None
    running: int = 0
    failures: int = 0  # since it last answered
    rest_until: float = 0.0
    last_error: str = "not asked yet"

    def rest(self, seconds: float) -> None:
        self.rest_until = time.monotonic() + min(seconds, _LONGEST_REST)


class RemoteReward:
    """
    A reward function that runs on a reward server (`trl-flow serve-rewards`), or the same one on several.

    Images are sent as PNG, so that scores are those of the function itself. Several servers are used in turn. One
    that fails is left alone for a while, longer each time, and what it was asked is asked again elsewhere: a server
    may be killed, restarted or replaced while training goes on. Its name in metrics, `dense`, `needs_group` and `info`
    are those that the server tells. What the function itself would log is not.

    The servers are asked when the object is made, so that what is wrong is found before training.

    Args:
        url (`str` or `Sequence[str]`):
            Address of the server, such as `http://localhost:8000`, or of several. They must offer the same function
            with the same settings.
        reward (`str`, *optional*):
            Name of the function, if the server offers several.
        columns (`Sequence[str]`, *optional*):
            Columns of the data set that are sent; default: all. They must be such as JSON can hold: name the others'
            if one cannot (images, say).
        token (`str`, *optional*):
            The servers' token; default: the environment variable `TRL_FLOW_REWARD_TOKEN`.
        batch_size (`int`, *optional*):
            Largest number of images in a request; default: what the servers accept. A batch is spread over the
            servers in equal parts, between groups where the function compares the images of a group.
        timeout (`float`, defaults to 120):
            Seconds to wait for the answer to a request, and for a server that is busy or loads its models.
        retries (`int`, defaults to 5):
            How often each server is asked again about the same images before the call fails.
        backoff (`float`, defaults to 1.0):
            Seconds for which a server is left alone after its first failure. They double with each further one, up to
            60. With the defaults a call fails when no server has answered for half a minute.

    Raises:
        ImportError: if the httpx2 package is missing.
        ValueError: if an argument is out of range, no server offers the function, or not all offer the same.
        RewardServerError: if no server answers, or one refuses the token; on a call also if one refuses what it is
            sent.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        reward: str | None = None,
        columns: Sequence[str] | None = None,
        token: str | None = None,
        batch_size: int | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
    ):
        httpx2 = require(lambda: import_module("httpx2"), reward="RemoteReward", extra="remote")
        if isinstance(columns, str):
            raise ValueError(f"columns is {columns!r}, but must be a list of names: [{columns!r}].")
        if batch_size is not None:
            _check_whole("batch_size", batch_size, 1)
        _check_whole("retries", retries, 0)
        _check_seconds("timeout", timeout)
        _check_seconds("backoff", backoff)
        urls = [_checked_url(one, httpx2) for one in ([url] if isinstance(url, str) else url)]
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"url is {url!r}, but must be one or more addresses, all different.")
        # Processes of a distributed run begin with different servers
        first = int(os.environ.get("RANK", 0))
        self._servers = [_Server(one, (index - first) % len(urls)) for index, one in enumerate(urls)]
        self._turns = itertools.count(len(urls))
        self._token = _checked_token(token or os.environ.get(TOKEN_VARIABLE))
        self.columns = None if columns is None else list(columns)
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        # A client's connections belong to the event loop that opened them
        self._clients: dict[asyncio.AbstractEventLoop, Any] = {}
        self._lock = threading.Lock()

        self._reward, self._card = reward, None
        self.check()
        self.__name__ = self._reward
        self.dense: bool = self._card["dense"]
        self.needs_group: bool = self._card["needs_group"]
        self.info: RewardInfo | None = _read_info(self._card["info"])
        accepted = min(server.max_images for server in self._servers if server.max_images is not None)
        if batch_size is not None and batch_size > accepted:
            raise ValueError(
                f"batch_size is {batch_size}, but a server accepts {accepted} images in a request (its --max-images)."
            )
        # Fixed here: the parts in which a batch is sent may not depend on which servers happen to be there, since
        # models round differently in batches of another size
        self.batch_size = batch_size or accepted

    def check(self) -> None:
        """
        Asks every server what it offers. That some do not answer is a warning.

        Raises:
            ValueError: if a server does not offer the function, or not the same as the others.
            RewardServerError: if none answers, or one refuses the token.
        """
        import httpx2

        away = []
        with httpx2.Client(headers=self._headers(), timeout=min(self.timeout, 2 * _CONNECT_TIMEOUT)) as client:
            for server in self._servers:
                try:
                    self._introduce(server, client.get(f"{server.url}/rewards"))
                except (_Failed, _Busy, httpx2.TransportError) as error:
                    server.last_error = _described(error)
                    away.append(server)
        if len(away) == len(self._servers):
            raise RewardServerError(self._none_left("offers its reward functions", away))
        for server in away:
            logger.warning(
                "The reward server %s does not answer (%s). The others are used, and it is tried again later.",
                server.url,
                server.last_error,
            )

    async def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs: Any) -> list[float | None]:
        """
        Scores images.

        Args:
            prompts (`list[str]`), images (`list[PIL.Image.Image]`): `N` of each. Images of a mode that PNG does not
                have are sent as RGB.
            kwargs: the data set's further columns, lists of `N` entries. Whatever is no list is not sent.

        Returns:
            `list[float | None]`: `N` scores.

        Raises:
            RewardServerError: if no server is left, or one refuses what it is sent.
            TypeError: if a column cannot be written as JSON.
            ValueError: if there are not as many prompts as images.
        """
        if len(prompts) != len(images):
            raise ValueError(f"There are {len(prompts)} prompts for {len(images)} images. Give one for each image.")
        columns = {
            name: values
            for name, values in kwargs.items()
            if isinstance(values, list | tuple) and (self.columns is None or name in self.columns)
        }
        running = asyncio.Semaphore(_REQUESTS_PER_SERVER * len(self._servers))

        async def score(part: slice) -> list[float | None]:
            async with running:
                form = await asyncio.to_thread(
                    _form, self._reward, prompts[part], images[part], {k: v[part] for k, v in columns.items()}
                )
                return await self._score(form, len(images[part]))

        tasks = [asyncio.ensure_future(score(part)) for part in self._parts(prompts)]
        try:
            return [value for scores in await asyncio.gather(*tasks) for value in scores]
        finally:
            # After an error, the others need not go on
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Closes the connections to the servers. Another call opens them again."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for loop, client in clients.items():
            # The connections of a loop that has ended have ended with it
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(client.aclose(), loop)

    # ---- One request ----

    async def _score(self, form: list[tuple], number: int) -> list[float | None]:
        """Asks one server after another, until one answers."""
        attempts = dict.fromkeys(range(len(self._servers)), 0)
        patient_until = time.monotonic() + self.timeout
        while left := [self._servers[i] for i, failed in attempts.items() if failed <= self.retries]:
            now = time.monotonic()
            awake = [server for server in left if server.rest_until <= now]
            if not awake:
                await asyncio.sleep(min(server.rest_until for server in left) - now)
                continue
            server = min(awake, key=lambda server: (server.running, server.last_used))
            server.last_used = next(self._turns)
            server.running += 1
            try:
                scores = await self._ask(server, form, number)
            except _Busy as busy:
                server.last_error = str(busy)
                server.rest(busy.seconds)
                # Not a failure: others are being served. But not for ever either
                attempts[self._servers.index(server)] += time.monotonic() > patient_until
            except _Failed as error:
                attempts[self._servers.index(server)] += 1
                self._note_failure(server, error)
            else:
                if server.failures:
                    logger.warning("The reward server %s answers again.", server.url)
                server.failures = 0
                return scores
            finally:
                server.running -= 1
        raise RewardServerError(self._none_left(f"answers for {self._reward!r}", self._servers))

    async def _ask(self, server: _Server, form: list[tuple], number: int) -> list[float | None]:
        import httpx2

        client = self._client()
        try:
            if server.card is None:
                self._introduce(server, await client.get(f"{server.url}/rewards"))
            response = await client.post(f"{server.url}/score", files=form)
        except httpx2.TransportError as error:
            server.card = None  # it may come back as another
            raise _Failed(_described(error)) from error
        except ValueError as error:
            raise _Failed(str(error)) from error
        scores, card = _read_scores(self._read(server, response), self._reward, number)
        # Between two requests a server may be replaced by another without a connection that breaks
        if card != self._card:
            server.card = None
            raise _Failed(self._other_settings(card))
        return scores

    def _introduce(self, server: _Server, response: Any) -> None:
        """Takes down what a server offers."""
        description = self._read(server, response)
        try:
            if description["protocol"] != PROTOCOL:
                raise _Failed(
                    f"it speaks protocol {description['protocol']} and this client {PROTOCOL}: install the same "
                    "version of trl_flow on both"
                )
            cards = {card["name"]: card for card in description["rewards"]}
            max_images = int(description["limits"]["max_images"])
        except (KeyError, TypeError, ValueError) as error:
            raise _Failed("it is not a reward server of trl-flow") from error
        if self._reward is None:
            if len(cards) != 1:
                raise ValueError(
                    f"The reward server {server.url} offers {', '.join(cards)}. Choose one: "
                    f"reward={next(iter(cards))!r}."
                )
            self._reward = next(iter(cards))
        if self._reward not in cards:
            raise ValueError(
                f"The reward server {server.url} does not offer {self._reward!r}, only {', '.join(cards)}."
            )
        card = cards[self._reward]
        if self._card is None:
            self._card = card
        if card != self._card:
            raise ValueError(f"The reward server {server.url}: {self._other_settings(card)}")
        server.card, server.max_images = card, max_images

    def _other_settings(self, card: Any) -> str:
        return (
            f"it offers {self._reward!r} with other settings than the rest: {card} instead of {self._card}. Scores "
            "would depend on which server is asked"
        )

    def _read(self, server: _Server, response: Any) -> Any:
        """The JSON of an answer, or the exception that its status stands for."""
        status = response.status_code
        try:
            content = response.json()
        except ValueError:
            content = None
        if status == 200 and content is not None:
            return content
        told = content.get("detail") if isinstance(content, dict) else None
        reason = f"status {status}: {told or response.text[:300]}".rstrip(": ")
        if status in (429, 503):
            raise _Busy(_retry_after(response), reason)
        if status == 401:
            raise RewardServerError(
                f"The reward server {server.url} refuses the token. Set {TOKEN_VARIABLE}, or give token=..., to what "
                "the server was started with."
            )
        # What this client asked for is wrong, and would be everywhere else. 408 is a connection that was too slow
        if 400 <= status < 500 and status not in (404, 408):
            raise RewardServerError(f"The reward server {server.url} refuses the request with {reason}")
        raise _Failed(reason)

    def _note_failure(self, server: _Server, error: _Failed) -> None:
        server.last_error = str(error)
        # Requests that were under way together fail together, and count as one failure
        if server.rest_until <= time.monotonic():
            server.failures += 1
            server.rest(self.backoff * 2 ** min(server.failures - 1, 16))
            if server.failures == 1:  # it would be told once a minute otherwise
                logger.warning(
                    "The reward server %s failed (%s). It is left alone for a while and then tried again.",
                    server.url,
                    server.last_error,
                )

    def _none_left(self, verb: str, servers: list[_Server]) -> str:
        errors = "; ".join(f"{server.url} ({server.last_error})" for server in servers)
        return f"No reward server {verb}. Asked: {errors}. Start one with `trl-flow serve-rewards`."

    # ---- Connections and parts ----

    def _headers(self) -> dict[str, str]:
        return {} if self._token is None else {"Authorization": f"Bearer {self._token}"}

    def _client(self) -> Any:
        import httpx2

        loop = asyncio.get_running_loop()
        with self._lock:
            for other in [other for other in self._clients if other.is_closed()]:
                del self._clients[other]
            if loop not in self._clients:
                self._clients[loop] = httpx2.AsyncClient(
                    headers=self._headers(),
                    timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_TIMEOUT)),
                )
            return self._clients[loop]

    def _parts(self, prompts: list[str]) -> list[slice]:
        """Where to cut a batch: into equal parts for all servers, but a function that compares gets whole groups."""
        size = min(self.batch_size, math.ceil(len(prompts) / len(self._servers)))
        if not self.needs_group:
            return [slice(start, start + size) for start in range(0, len(prompts), size or 1)]
        parts: list[slice] = []
        end = 0
        for prompt, group in itertools.groupby(prompts):
            start, end = end, end + len(list(group))
            if end - start > self.batch_size:
                raise ValueError(
                    f"{self._reward!r} compares the images of a prompt, and there are {end - start} of {prompt!r} "
                    f"next to each other: more than the {self.batch_size} of a request. Start the servers with a "
                    "larger --max-images."
                )
            if parts and end - parts[-1].start <= size:
                parts[-1] = slice(parts[-1].start, end)
            else:
                parts.append(slice(start, end))
        return parts


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}.")


def _check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, but must be a number of seconds above 0.")


def _checked_url(url: str, httpx2: Any) -> str:
    expected = "an address such as http://localhost:8000"
    try:
        parsed = httpx2.URL(url)
    except (TypeError, httpx2.InvalidURL) as error:
        raise ValueError(f"url is {url!r}, but must be {expected}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ValueError(f"url is {url!r}, but must be {expected}.")
    if parsed.userinfo:
        # Without showing it
        raise ValueError(f"The url of {parsed.host} holds a user or password. Servers take a token: token=...")
    return str(parsed).rstrip("/")


def _checked_token(token: str | None) -> str | None:
    if token is None or not (token := token.strip()):
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        # Without its value: it is a secret, though not a valid one
        raise ValueError("The token must be one or more printable ASCII characters without spaces.")
    return token


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, _Failed | _Busy) else f"{type(error).__name__}: {error}".rstrip(": ")


def _retry_after(response: Any) -> float:
    try:
        return min(max(float(response.headers.get("Retry-After", 1)), 0.1), _LONGEST_REST)
    except ValueError:  # a date
        return 1.0


def _form(reward: str, prompts: list[str], images: list[Image.Image], columns: dict[str, list]) -> list[tuple]:
    """The fields of a request."""
    fields = {"rewards": [reward], "prompts": list(prompts), "columns": columns}
    for name, values in columns.items():
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"The column {name!r} cannot be sent to a reward server: {error}. Columns are sent as JSON. If the "
                "reward does not need it, name those that it does: RemoteReward(..., columns=[...])."
            ) from error
    form: list[tuple] = [(name, (None, json.dumps(value), "application/json")) for name, value in fields.items()]
    return form + [("images", (f"{i}.png", _png(image), "image/png")) for i, image in enumerate(images)]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    # Fast instead of small: a file is sent once, mostly over a fast network. Run lengths suit PNG's filtered rows
    image.save(file, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def _read_scores(content: Any, reward: str, number: int) -> tuple[list[float | None], Any]:
    """The scores in an answer, and the card of the function that gave them."""
    try:
        scores, card = content["rewards"][reward], content["cards"][reward]
    except (KeyError, TypeError) as error:
        raise _Failed(f"its answer has no scores for {reward!r}: {str(content)[:200]}") from error
    if not isinstance(scores, list) or len(scores) != number or not all(map(_is_score, scores)):
        raise _Failed(f"its answer for {number} images is {str(scores)[:200]}, not a number or null for each")
    return scores, card


def _is_score(score: Any) -> bool:
    if score is None:
        return True
    return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)


def _read_info(info: dict | None) -> RewardInfo | None:
    if info is None:
        return None
    low, high = info["range"]
    return RewardInfo(**{**info, "range": (-math.inf if low is None else low, math.inf if high is None else high)})
