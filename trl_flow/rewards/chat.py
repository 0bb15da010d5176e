"""A vision-language model behind an OpenAI-compatible server, such as vLLM, SGLang or OpenAI's own."""

import asyncio
import base64
import copy
import json
import numbers
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from trl_flow.rewards.base import check_whole_number, png_file, require


class JudgeError(RuntimeError):
    """The server of a judge cannot be reached, refuses, or answers with something that cannot be read.

    Example:

    ```pycon
    >>> import asyncio
    >>> from trl_flow.rewards import ChatModel, JudgeError
    >>> try:
    ...     asyncio.run(ChatModel(base_url="http://localhost:9/v1", max_retries=0).check())
    ... except JudgeError as error:
    ...     print("no judge:", "localhost:9" in str(error))
    ...
    no judge: True
    ```
    """


@dataclass
class _Connection:
    client: Any
    slots: asyncio.Semaphore
    asking_for_model: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class ChatModel:
    """
    A vision-language model behind an OpenAI-compatible server: sends texts and images, returns its answers.

    Requests run at the same time. Those that fail for a reason that passes (no connection, no answer in time, status
    408, 409, 429 or 5xx) are sent again after a pause that doubles from half a second to eight, or after what the
    server asks for. One object can be used from several event loops at the same time.

    Args:
        model (`str`, *optional*): name of the model on the server; by default the only one that it serves.
        base_url (`str`, *optional*): such as `http://localhost:8000/v1`; default: the environment's `OPENAI_BASE_URL`.
        api_key (`str`, *optional*): default: the environment's `OPENAI_API_KEY`; your own servers seldom need one.
        max_concurrency (`int`, defaults to 32): requests under way at a time, in each process.
        timeout (`float`, defaults to 120): seconds to wait for one answer.
        max_retries (`int`, defaults to 8): how often a request is sent again. Eight take about 40 seconds of pauses.

    Raises:
        ImportError: if the openai package is missing.
        ValueError: if there is no `base_url`, or a number is out of range.

    Example:

    ```pycon
    >>> import asyncio
    >>> from trl_flow.rewards import ChatModel
    >>> chat = ChatModel(base_url="http://localhost:8001/v1")
    >>> asyncio.run(chat.check())  # the model that the server has
    'judge-7b'
    >>> choice = asyncio.run(chat.answer(["What is 3 + 4?"], max_tokens=16, temperature=0.0))
    >>> choice.message.content
    '7'
    ```
    """

    def __init__(
        self, model: str | None = None, *, base_url: str | None = None, api_key: str | None = None,
        max_concurrency: int = 32, timeout: float = 120.0, max_retries: int = 8,
    ):  # fmt: skip
        require("openai", reward="A judge", extra="judge")
        if not (base_url := base_url or os.environ.get("OPENAI_BASE_URL")):
            raise ValueError(
                "base_url is missing: where the server of the judge is. Start one (vllm serve MODEL) and give "
                'base_url="http://localhost:8000/v1", or set the environment variable OPENAI_BASE_URL.'
            )
        check_whole_number("max_concurrency", max_concurrency, 1)
        check_whole_number("max_retries", max_retries, 0)
        if not isinstance(timeout, numbers.Real) or not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}, but must be a number of seconds above 0.")
        self.model, self.base_url = model, base_url
        self.api_key = api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        self.max_concurrency, self.timeout, self.max_retries = max_concurrency, timeout, max_retries
        self._connections: dict[asyncio.AbstractEventLoop, _Connection] = {}

    async def answer(
        self, content: Sequence[str | Image.Image], *, answer_prefix: str | None = None, **options: Any
    ) -> Any:
        """
        The model's answer to one message, an `openai.types.chat.chat_completion.Choice`.

        Args:
            content (`list[str | PIL.Image.Image]`): texts and images in their order. Images are sent as RGB PNG.
            answer_prefix (`str`, *optional*): what the answer begins with, where the server can continue from there.
            options: further fields of the request, such as `max_tokens` and `temperature`.

        Raises:
            JudgeError: if the server cannot be reached, does not answer in time or with a chat completion, or refuses.
        """
        async with self._connected() as connection, connection.slots:
            parts = []
            for piece in content:
                if isinstance(piece, str):
                    parts.append({"type": "text", "text": piece})
                else:
                    # In a thread, since compressing a large image would hold up the event loop
                    parts.append({"type": "image_url", "image_url": {"url": await asyncio.to_thread(_png_url, piece)}})
            messages = [{"role": "user", "content": parts}]
            if answer_prefix is not None:
                messages.append({"role": "assistant", "content": answer_prefix})
                options["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
            async with connection.asking_for_model:
                self.model = self.model or await self._only_model(connection.client)
            completion = await self._request(
                connection.client.chat.completions.create(model=self.model, messages=messages, **options)
            )
        if not getattr(completion, "choices", None):
            raise self._error(
                f"answered, but not with a chat completion: {str(completion)[:200]!r}. Check that base_url is that of "
                "an OpenAI-compatible server; it mostly ends in /v1."
            )
        return completion.choices[0]

    async def check(self) -> str:
        """The model that will be asked. A `JudgeError` if the server is not there or does not list the model, or it is
        not known which of several is meant. Asks once, and for nothing that costs."""
        probe = copy.copy(self)
        probe.max_retries, probe._connections = 0, {}
        async with probe._connected() as connection:
            if self.model is None:
                return await probe._only_model(connection.client)
            names = await probe._served(connection.client)
        if self.model not in names:
            raise self._error(f"does not serve {self.model}, but {', '.join(names) or 'no model'}. Name one of these.")
        return self.model

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        """
        The connection of the running event loop, shared by all requests that are under way in it. The last one closes
        it: only the loop that opened it can do so, and may end at any time.
        """
        from openai import AsyncOpenAI, Timeout

        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            # A machine that is away should not take as long to notice as an answer takes to write
            timeout = Timeout(self.timeout, connect=min(self.timeout, 10.0))
            server = {"base_url": self.base_url, "api_key": self.api_key}
            client = AsyncOpenAI(**server, timeout=timeout, max_retries=self.max_retries)
            self._connections[loop] = _Connection(client, asyncio.Semaphore(self.max_concurrency))
        connection = self._connections[loop]
        connection.users += 1
        try:
            yield connection
        finally:
            connection.users -= 1
            if connection.users == 0:
                del self._connections[loop]
                await connection.client.close()

    async def _only_model(self, client: Any) -> str:
        names = await self._served(client)
        if len(names) != 1:
            served = ", ".join(names) or "none"
            raise self._error(f"serves {len(names)} models: {served}. Name the judge's: model=...")
        return names[0]

    async def _served(self, client: Any) -> list[str]:
        listed = await self._request(client.models.list())
        return [model.id for model in getattr(listed, "data", None) or []]

    async def _request(self, request: Any) -> Any:
        import openai

        tries = f"{self.max_retries + 1} {'try' if self.max_retries == 0 else 'tries'}"
        try:
            return await request
        except openai.APITimeoutError as error:
            advice = "Look whether it is overloaded: lower max_concurrency, or raise timeout."
            raise self._error(f"gave no answer within {self.timeout:g} seconds, in {tries}. {advice}") from error
        except openai.APIConnectionError as error:
            reason = f"{error.__cause__ or error}. Look whether it runs, and whether base_url is right."
            raise self._error(f"cannot be reached, in {tries}: {reason}") from error
        except openai.APIStatusError as error:
            hint = " Check base_url and model. The former mostly ends in /v1." if error.status_code == 404 else ""
            raise self._error(f"answered with status {error.status_code}: {error.message[:1000]}{hint}") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise self._error(f"gave an answer that cannot be read: {error}") from error

    def _error(self, reason: str) -> JudgeError:
        return JudgeError(f"The server at {self.base_url} {reason}")


def _png_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_file(image)).decode()}"
