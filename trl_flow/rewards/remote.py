"""A reward function on a reward server, or the same one on several: see `trl-flow serve-rewards`."""

import asyncio
import inspect
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_flow.rewards.base import Images, RewardInfo, all_at_once, check_whole_number, png_file, require
from trl_flow.rewards.checks import RewardError, check_rewards


# Counted up when what servers and clients say to each other changes
PROTOCOL = 1
TOKEN_VARIABLE = "TRL_FLOW_REWARD_TOKEN"

# Seconds until a machine that does not react counts as away
_CONNECT_TIMEOUT = 5.0
_LONGEST_REST = 60.0

logger = logging.getLogger(__name__)


class RewardServerError(ConnectionError, RuntimeError):
    """No reward server is left that answers, or one refuses what it is asked. The message names the servers.

    Example:

    ```pycon
    >>> from trl_flow.rewards import RemoteReward, RewardServerError
    >>> try:
    ...     RemoteReward("http://localhost:9", timeout=1, retries=0)
    ... except RewardServerError as error:
    ...     print("no server:", "localhost:9" in str(error))
    ...
    no server: True
    ```
    """


class _Failed(Exception):
    """May pass, or not be so elsewhere. `busy`: seconds after which a server that is only busy asks to be asked."""

    def __init__(self, reason: str, busy: float | None = None):
        super().__init__(reason)
        self.busy = busy


@dataclass(eq=False)
class _Server:
    url: str
    last_used: int
    running: int = 0
    failures: int = 0  # since it last answered
    rest_until: float = 0.0
    last_error: str = "not asked yet"

    def rest(self, seconds: float) -> None:
        self.rest_until = time.monotonic() + min(seconds, _LONGEST_REST)

    def note(self, error: Exception) -> str:
        """Keeps what is said of the server's last failure."""
        self.last_error = str(error) if isinstance(error, _Failed) else f"{type(error).__name__}: {error}".rstrip(": ")
        return self.last_error


class RemoteReward:
    """
    A reward function that runs on a reward server (`trl-flow serve-rewards`), or the same one on several.

    Images are sent as PNG in RGB, so that scores are those of the function itself. Several servers are used in turn.
    One that fails is left alone for a while, longer each time, and what it was asked is asked again elsewhere: servers
    may be killed, restarted or replaced during training. Its name in metrics, `dense`, `needs_group` and `info` are
    those that the servers tell when the object is made. What the function itself would log is not logged. All frames
    of a video are sent to a function with a parameter `videos`, beside its one image; they count as images of a
    request.

    Args:
        url (`str` or `Sequence[str]`): Address of the server, such as `http://localhost:8000`, or of several. They
            must offer the same function with the same settings.
        reward (`str`, *optional*): Name of the function, if the server offers several.
        columns (`Sequence[str]`, *optional*): Columns of the data set that are sent; default: all. They must fit JSON.
        token (`str`, *optional*): The servers' token; default: the environment variable `TRL_FLOW_REWARD_TOKEN`.
        batch_size (`int`, *optional*): Most images in a request; default: what the servers accept. A batch is spread
            over the servers and their workers in equal parts, between groups where the function compares the images
            of a group.
        timeout (`float`, defaults to 120): Seconds to wait for an answer, and for a server that is busy or loads.
        retries (`int`, defaults to 5): How often each server is asked again about the same images.
        backoff (`float`, defaults to 1.0): Seconds for which a server is left alone after its first failure, doubled
            with each further one up to 60. By default a call fails when none has answered for half a minute.

    Raises:
        ImportError: if the httpx2 package is missing.
        ValueError: if an argument is out of range, no server offers the function, or not all offer the same.
        RewardServerError: if no server answers, or one refuses the token or what it is sent.

    Example:

    ```pycon
    >>> import asyncio
    >>> from PIL import Image
    >>> from trl_flow.rewards import RemoteReward
    >>> reward = RemoteReward("http://localhost:8000")  # trl-flow serve-rewards --rewards jpeg_compressibility
    >>> reward.__name__
    'jpeg_compressibility'
    >>> scores = asyncio.run(reward(prompts=["a wall"], images=[Image.new("RGB", (64, 64))]))
    >>> len(scores)
    1
    ```
    """

    def __init__(
        self, url: str | Sequence[str], *, reward: str | None = None, columns: Sequence[str] | None = None,
        token: str | None = None, batch_size: int | None = None, timeout: float = 120.0, retries: int = 5,
        backoff: float = 1.0,
    ):  # fmt: skip
        self._http = require("httpx2", reward="RemoteReward", extra="remote")
        if isinstance(columns, str):
            raise ValueError(f"columns is {columns!r}, but must be a list of names: [{columns!r}].")
        if batch_size is not None:
            check_whole_number("batch_size", batch_size, 1)
        check_whole_number("retries", retries, 0)
        for name, value in (("timeout", timeout), ("backoff", backoff)):
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, but must be a number of seconds above 0.")
        urls = [_checked_url(one, self._http) for one in ([url] if isinstance(url, str) else url)]
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"url is {url!r}, but must be one or more addresses, all different.")
        # Processes of a distributed run begin with different servers
        first = int(os.environ.get("RANK", 0))
        self._servers = [_Server(one, (index - first) % len(urls)) for index, one in enumerate(urls)]
        self._turns = itertools.count(len(urls))
        token = checked_token(token or os.environ.get(TOKEN_VARIABLE) or None, "The token")
        self._options = {
            "headers": {} if token is None else {"Authorization": f"Bearer {token}"},
            "verify": self._http.create_ssl_context(),  # which takes longer than a request
        }
        self.columns = None if columns is None else list(columns)
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._reward, self._card = reward, None
        self._workers = 1  # of each server
        accepted = self._introduce()
        self.__name__ = self._reward
        self.dense: bool = self._card["dense"]
        self.needs_group: bool = self._card["needs_group"]
        if self._card.get("videos"):  # so that a model of images is refused before training
            own = inspect.signature(self)
            needed = [p.replace(default=p.empty) if p.name == "videos" else p for p in own.parameters.values()]
            self.__signature__ = own.replace(parameters=needed)
        info = self._card["info"]
        self.info: RewardInfo | None = None if info is None else RewardInfo.from_json(info)
        if batch_size is not None and batch_size > accepted:
            limit = f"a server accepts {accepted} images in a request (its --max-images)"
            raise ValueError(f"batch_size is {batch_size}, but {limit}.")
        # Fixed here: models round differently in batches of another size, which may not depend on who is there
        self.batch_size = batch_size or accepted

    async def __call__(
        self, prompts: list[str], images: Images, videos: list[Images] | None = None, **kwargs: Any
    ) -> list[float | None]:
        """
        `N` scores for `N` prompts and images, or videos. Of `kwargs` the lists are sent: the data set's other columns.

        Raises:
            RewardServerError: if no server is left, or one refuses what it is sent.
            TypeError: if a column cannot be written as JSON.
            ValueError: if there are not as many prompts as images, or a video has more frames than a request may have.
        """
        videos = videos if self._card.get("videos") else None
        if len(prompts) != len(images):
            raise ValueError(f"There are {len(prompts)} prompts for {len(images)} images. Give one for each image.")
        sent = kwargs if self.columns is None else [name for name in kwargs if name in self.columns]
        columns = {name: kwargs[name] for name in sent if isinstance(kwargs[name], list | tuple)}
        # While each worker scores one, the next one is sent
        running = asyncio.Semaphore((self._workers + 1) * len(self._servers))
        timeout = self._http.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_TIMEOUT))
        # One for each call: its connections belong to the event loop that opened them
        async with self._http.AsyncClient(timeout=timeout, **self._options) as client:

            async def score(part: slice) -> list[float | None]:
                async with running:
                    own = {name: values[part] for name, values in columns.items()}
                    content = (prompts[part], images[part], own, videos and videos[part])
                    form = await asyncio.to_thread(_form, self._reward, *content)
                    return await self._score(client, form, prompts[part])

            scored = await all_at_once(score(part) for part in self._parts(prompts, self._most(videos)))
        return [value for values in scored for value in values]

    async def _score(self, client: Any, form: list[tuple], prompts: list[str]) -> list[float | None]:
        """Asks one server after another, until one answers."""
        failed = dict.fromkeys(self._servers, 0)
        patient_until = time.monotonic() + self.timeout
        while left := [server for server in self._servers if failed[server] <= self.retries]:
            now = time.monotonic()
            server = min(left, key=lambda server: (max(server.rest_until, now), server.running, server.last_used))
            if server.rest_until > now:
                await asyncio.sleep(server.rest_until - now)
                continue
            server.last_used = next(self._turns)
            server.running += 1
            try:
                response = await client.post(f"{server.url}/score", files=form)
                scores = self._scores(self._read(server, response), prompts)
            except (_Failed, self._http.TransportError) as error:
                server.note(error)
                busy = error.busy if isinstance(error, _Failed) else None
                # One that is busy has not failed: others are being served. But it is not waited for forever either
                failed[server] += busy is None or time.monotonic() > patient_until
                if busy is not None:
                    server.rest(busy)
                # Requests that were under way together fail together, and count as one failure
                elif server.rest_until <= time.monotonic():
                    server.failures += 1
                    server.rest(self.backoff * 2 ** min(server.failures - 1, 16))
                    if server.failures == 1:  # it would be reported once a minute otherwise
                        problem = f"The reward server {server.url} failed ({server.last_error})"
                        logger.warning(f"{problem}. It is left alone for a while and then tried again.")
            else:
                if server.failures:
                    logger.warning(f"The reward server {server.url} answers again.")
                server.failures = 0
                return scores
            finally:
                server.running -= 1
        raise self._none_left(f"answers for {self._reward!r}")

    def _none_left(self, verb: str) -> RewardServerError:
        errors = ", ".join(f"{server.url} ({server.last_error})" for server in self._servers)
        return RewardServerError(f"No reward server {verb}. Asked: {errors}. Start one with `trl-flow serve-rewards`.")

    # ---- What servers say ----

    def _introduce(self) -> int:
        """Asks every server what it offers, and returns how many images all of them accept in a request. How a batch
        is cut may not depend on which of them is asked, so the least of all counts."""
        offers, away = [], []
        with self._http.Client(timeout=min(self.timeout, 2 * _CONNECT_TIMEOUT), **self._options) as client:
            for server in self._servers:
                try:
                    offers.append(self._read_offer(server, client.get(f"{server.url}/rewards")))
                except (_Failed, self._http.TransportError) as error:
                    away.append(f"The reward server {server.url} does not answer ({server.note(error)}).")
        if not offers:
            raise self._none_left("offers its reward functions")
        for sentence in away:
            logger.warning(f"{sentence} The others are used, and it is tried again later.")
        accepted, self._workers = map(min, zip(*offers, strict=True))
        return accepted

    def _read_offer(self, server: _Server, response: Any) -> tuple[int, int]:
        offer = self._read(server, response)
        try:
            if offer["protocol"] != PROTOCOL:
                same = "install the same version of trl_flow on both"
                raise _Failed(f"it speaks protocol {offer['protocol']} and this client {PROTOCOL}: {same}")
            cards = {card["name"]: card for card in offer["rewards"]}
            names, max_images = ", ".join(cards), int(offer["limits"]["max_images"])
            workers = max(int(offer.get("workers", 1)), 1)
        except (KeyError, TypeError, ValueError) as error:
            raise _Failed("it is not a reward server of trl-flow") from error
        if self._reward is None and len(cards) != 1:
            raise ValueError(f"The reward server {server.url} offers {names}. Choose one: reward={[*cards][0]!r}.")
        self._reward = self._reward or names
        if self._reward not in cards:
            raise ValueError(f"The reward server {server.url} does not offer {self._reward!r}, only {names}.")
        card = cards[self._reward]
        self._card = self._card or card
        if card != self._card:
            raise ValueError(f"The reward server {server.url}: {self._other_settings(card)}")
        return max_images, workers

    def _other_settings(self, card: Any) -> str:
        why = "Scores would depend on which server is asked"
        return f"it offers {self._reward!r} with other settings than the rest: {card} instead of {self._card}. {why}"

    def _read(self, server: _Server, response: Any) -> Any:
        """The JSON of an answer, or the exception that its status stands for."""
        status = response.status_code
        try:
            content = response.json()
        except ValueError:
            content = None
        if status == 200 and content is not None:
            return content
        detail = content.get("detail") if isinstance(content, dict) else None
        reason = f"status {status}: {detail or response.text[:300]}".rstrip(": ")
        if status in (429, 503):
            try:
                raise _Failed(reason, busy=max(float(response.headers.get("Retry-After", 1)), 0.1))
            except ValueError:  # a date
                raise _Failed(reason, busy=1.0) from None
        if status == 401:
            advice = f"Set {TOKEN_VARIABLE}, or give token=..., to what the server was started with."
            raise RewardServerError(f"The reward server {server.url} refuses the token. {advice}")
        # What this client asked for is wrong, and would be everywhere else. 408 is a connection that was too slow
        if 400 <= status < 500 and status not in (404, 408):
            raise RewardServerError(f"The reward server {server.url} refuses the request with {reason}")
        raise _Failed(reason)

    def _scores(self, content: Any, prompts: list[str]) -> list[float | None]:
        try:
            values, card = content["rewards"][self._reward], content["cards"][self._reward]
            scores = check_rewards(values, self._reward, prompts)
        except (KeyError, TypeError, RewardError) as error:
            raise _Failed(f"its answer has no scores for {self._reward!r}: {str(content)[:200]}") from error
        # A server may be replaced by another between two requests, without a connection that breaks
        if card != self._card:
            raise _Failed(self._other_settings(card))
        return [None if math.isnan(score) else score for score in scores]

    def _most(self, videos: list[Images] | None) -> int:
        """Samples in a request: of videos those whose frames fit into it, the one that is the image beside all."""
        longest = max(map(len, videos or ()), default=0)
        if not (most := self.batch_size // (1 + longest) if longest else self.batch_size):
            raise ValueError(
                f"A video has {longest} frames, and with its image that is more than the {self.batch_size} images of "
                f"a request. Start the servers with --max-images {1 + longest} or more, or draw fewer frames."
            )
        return most

    def _parts(self, prompts: list[str], most: int) -> list[slice]:
        """Where to cut a batch: into equal parts for all workers, but a function that compares gets whole groups."""
        size = min(most, math.ceil(len(prompts) / (self._workers * len(self._servers))))
        if not self.needs_group:
            return [slice(start, start + size) for start in range(0, len(prompts), size or 1)]
        parts: list[slice] = []
        end = 0
        for prompt, group in itertools.groupby(prompts):
            start, end = end, end + len(list(group))
            if end - start > most:
                raise ValueError(
                    f"{self._reward!r} compares images, and there are {end - start} of {prompt!r} next to each other: "
                    f"more than the {most} of a request. Start the servers with a larger --max-images."
                )
            if parts and end - parts[-1].start <= size:
                start = parts.pop().start
            parts.append(slice(start, end))
        return parts


def _checked_url(url: str, httpx2: Any) -> str:
    expected = "an address such as http://localhost:8000"
    try:
        parsed = httpx2.URL(url)
    except (TypeError, httpx2.InvalidURL) as error:
        raise ValueError(f"url is {url!r}, but must be {expected}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ValueError(f"url is {url!r}, but must be {expected}.")
    if parsed.userinfo:  # which is not shown
        raise ValueError(f"The url of {parsed.host} holds a user or password. Servers take a token: token=...")
    return str(parsed).rstrip("/")


def checked_token(token: str | None, source: str) -> str | None:
    """`token` without white space around it. The error names its `source` and does not show it: it is a secret."""
    if token is not None and not re.fullmatch("[!-~]+", token := token.strip()):
        raise ValueError(f"{source} must be one or more printable ASCII characters without spaces.")
    return token


def _form(
    reward: str, prompts: list[str], images: Images, columns: dict[str, list], videos: list[Images] | None
) -> list[tuple]:
    """The fields of a request: of videos the numbers of frames, and these one after another."""
    for name, values in columns.items():
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            advice = "Columns are sent as JSON. Name those that the reward needs: RemoteReward(..., columns=[...])."
            raise TypeError(f"The column {name!r} cannot be sent to a reward server: {error}. {advice}") from error
    fields = {"rewards": [reward], "prompts": list(prompts), "columns": columns}
    files = {"images": images}
    if videos is not None:
        fields["videos"] = [len(frames) for frames in videos]
        files["frames"] = [frame for frames in videos for frame in frames]
    return [
        *((name, (None, json.dumps(value), "application/json")) for name, value in fields.items()),
        *((name, (f"{i}.png", png_file(f), "image/png")) for name, own in files.items() for i, f in enumerate(own)),
    ]
