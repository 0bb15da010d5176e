"""
Reads an upload that nothing is known of: a multipart form of PNG files and JSON fields.

Everything is bounded while it arrives, nothing is written to disk, and file names are not looked at. What cannot be
accepted is raised as an `HTTPException` of status 4xx that says why.
"""

import asyncio
import contextlib
import io
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, Request
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from trl_flow.serving.limits import Limits


JSON_FIELDS = ("prompts", "columns", "rewards")
IMAGE_FIELD = "images"

# Arguments that reward functions are given beside the columns, or that those with a `__call__` have
_RESERVED = ("self", "prompt", "prompts", "images", "trainer_state", "log_metric", "log_extra")

# Pixels. Encoders and models fail on images that are longer, however few pixels they have in all: a JPEG cannot be
_LONGEST_SIDE = 65_500
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Seconds for which the rest of a refused upload is read and thrown away. A connection that is closed while the client
# still writes is reset, and many clients then never see the answer.
_LINGER = 2.0


@dataclass
class ScoreRequest:
    """
    What a client asks for.

    Attributes:
        prompts (`list[str]`), images (`list[bytes]`): one prompt and one PNG file for each of `N` images.
        columns (`dict[str, list]`): further columns, `N` JSON values each.
        rewards (`list[str]` or `None`): names of reward functions; `None` is all.
    """

    prompts: list[str]
    images: list[bytes]
    columns: dict[str, list]
    rewards: list[str] | None


class ClientGone(Exception):
    """The client has closed the connection: nobody waits for the answer."""


class Body:
    """The body of `request`, which may be read once and has at most `max_bytes` bytes, whatever its headers say."""

    def __init__(self, request: Request, max_bytes: int):
        self._receive = request.receive
        self._max_bytes = max_bytes
        self._length = 0
        self._declared = int(request.headers.get("content-length", 0))
        # Such a client asks before it sends anything, and sees a refusal at once
        self._asks_first = request.headers.get("expect", "").lower() == "100-continue"
        self.complete = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """
        Raises:
            HTTPException: 413 if the body is too long, without reading it if it says so itself.
            ClientGone: if the client goes away.
        """
        if self._declared > self._max_bytes:
            raise self._too_long(f"of {self._declared} bytes")
        while not self.complete:
            yield await self._next()
            if self._length > self._max_bytes:
                raise self._too_long("longer than that")

    async def discard(self) -> None:
        """Reads on for a moment without keeping anything; afterwards `complete` tells whether that was all."""

        async def rest() -> None:
            while not self.complete:
                await self._next()

        if self._length or not self._asks_first:
            with contextlib.suppress(asyncio.TimeoutError, ClientGone):
                await asyncio.wait_for(rest(), _LINGER)

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        data = message.get("body", b"")
        self._length += len(data)
        self.complete = not message.get("more_body", False)
        return data

    def _too_long(self, found: str) -> HTTPException:
        return HTTPException(
            413, f"A request may have {self._max_bytes} bytes, and this one is {found}. Send fewer images at a time."
        )


async def read_score_request(body: Body, content_type: str, limits: Limits) -> ScoreRequest:
    """
    Reads and checks all but the pixels.

    Args:
        body ([`Body`]): of the request.
        content_type (`str`): its header of that name.
        limits ([`Limits`]): what is accepted.

    Raises:
        HTTPException: 400 for what cannot be read, 408 for what does not arrive in time, 413 for too much, 415 for
            something other than PNG files in a multipart form, 422 for parts that do not fit each other.
        ClientGone: if the client goes away.
    """
    try:
        form = await asyncio.wait_for(_read_form(body, content_type, limits), limits.upload_timeout)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"The request had not arrived after {limits.upload_timeout:g} seconds.") from None
    values = {name: _read_json(name, data) for name, data in form.fields.items()}
    request = ScoreRequest(values.get("prompts"), form.images, values.get("columns", {}), values.get("rewards"))
    _check(request)
    for index, image in enumerate(request.images):
        _check_header(image, index, limits.max_pixels)
    return request


def decode_images(images: list[bytes]) -> list[Image.Image]:
    """
    Decodes PNG files whose headers have been checked, each in its own mode.

    Raises:
        HTTPException: 400 if one of them is damaged.
    """
    decoded = []
    for index, data in enumerate(images):
        try:
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            image.load()
        except Exception as error:  # there is no list of what a decoder raises on bytes that were made to break it
            raise HTTPException(400, f"Image {index} is not a sound PNG file: {error}") from error
        decoded.append(image)
    return decoded


# ---- The form ----


@dataclass
class _Part:
    name: str
    data: bytearray = field(default_factory=bytearray)


class _Form:
    """The parts of a multipart form, collected as the parser finds them."""

    def __init__(self, limits: Limits):
        self.fields: dict[str, bytes] = {}
        self.images: list[bytes] = []
        self.ended = False
        self._limits = limits
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._part: _Part | None = None

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._header_name_data,
            "on_header_value": self._header_value_data,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._part_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._headers, self._header_name, self._header_value = {}, b"", b""

    def _header_name_data(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value_data(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "backslashreplace")
        if name == IMAGE_FIELD:
            if len(self.images) == self._limits.max_images:
                raise HTTPException(
                    413, f"A request may have {self._limits.max_images} images, and this one has more. Send several."
                )
            kind, _ = parse_options_header(self._headers.get(b"content-type"))
            if kind != b"image/png":
                raise HTTPException(
                    415,
                    f"Image {len(self.images)} is sent as {kind.decode('utf-8', 'backslashreplace')!r}. Send PNG "
                    "files, as image/png.",
                )
        elif name not in JSON_FIELDS:
            known = ", ".join([IMAGE_FIELD, *JSON_FIELDS])
            raise HTTPException(400, f"The form has a field {name[:80]!r}. There are {known}.")
        elif name in self.fields:
            raise HTTPException(400, f"The form has two fields {name!r}. Give it once.")
        self._part = _Part(name)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        part, limits = self._part, self._limits
        part.data += memoryview(data)[start:end]
        limit = limits.max_image_bytes if part.name == IMAGE_FIELD else limits.max_json_bytes
        if len(part.data) > limit:
            what = f"Image {len(self.images)}" if part.name == IMAGE_FIELD else f"The field {part.name!r}"
            raise HTTPException(413, f"{what} has more than {limit} bytes, which is the limit.")

    def _end_part(self) -> None:
        if self._part.name == IMAGE_FIELD:
            self.images.append(bytes(self._part.data))
        else:
            self.fields[self._part.name] = bytes(self._part.data)
        self._part = None

    def _end(self) -> None:
        self.ended = True


async def _read_form(body: Body, content_type: str, limits: Limits) -> _Form:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise HTTPException(
            415,
            f"The request is of type {content_type[:80]!r}. Send multipart/form-data with a boundary: PNG files as "
            f"{IMAGE_FIELD!r}, and JSON as {', '.join(map(repr, JSON_FIELDS))}.",
        )
    form = _Form(limits)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        async for chunk in body.chunks():
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise HTTPException(400, f"The form cannot be read: {error}") from error
    if not form.ended:
        raise HTTPException(400, "The form ends before its closing boundary.")
    return form


# ---- JSON ----


def _read_json(name: str, data: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:40]} is beyond the range of numbers")
        return value

    try:
        # Encoded again, because JSON can spell halves of characters, which no text may hold
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The field {name!r} is not valid JSON in UTF-8: {_printable(error)}") from error


def _printable(error: Exception) -> str:
    return str(error)[:200].encode("utf-8", "backslashreplace").decode()


def _check(request: ScoreRequest) -> None:
    """Whether the parts have the types that they should, and fit each other."""
    prompts, columns, number = request.prompts, request.columns, len(request.images)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise HTTPException(422, "The field 'prompts' must be a list of strings.")
    if not number or len(prompts) != number:
        raise HTTPException(422, f"There are {len(prompts)} prompts and {number} images. Send one prompt for each.")
    if not isinstance(columns, dict):
        raise HTTPException(422, "The field 'columns' must be an object of lists.")
    for name, values in columns.items():
        if name in _RESERVED:
            raise HTTPException(422, f"A column cannot be called {name!r}: reward functions are given that anyway.")
        if not isinstance(values, list) or len(values) != number:
            raise HTTPException(
                422, f"The column {name[:80]!r} must be a list of {number} values, one for each image."
            )
    names = request.rewards
    if names is not None and not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise HTTPException(422, "The field 'rewards' must be a list of names. Leave it out for all.")


# ---- PNG ----


def _check_header(data: bytes, index: int, max_pixels: int) -> None:
    """
    Refuses what is no PNG file or would be too large when decoded: a few kilobytes can unpack to gigabytes.

    The first chunk of a PNG file is IHDR (PNG specification, section 11.2.1): 4 bytes of length, the name, and the
    width and height as 4 bytes each.
    """
    if not data.startswith(_PNG_SIGNATURE):
        raise HTTPException(415, f"Image {index} is not a PNG file, whatever its type says.")
    if len(data) < 33 or data[8:16] != b"\x00\x00\x00\rIHDR":
        raise HTTPException(400, f"Image {index} is not a sound PNG file: it does not start with its header.")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if width * height > max_pixels:
        raise HTTPException(413, f"Image {index} has {width} x {height} pixels, and {max_pixels} in all is the limit.")
    if max(width, height) > _LONGEST_SIDE:
        raise HTTPException(
            413, f"Image {index} has {width} x {height} pixels, and no side may have over {_LONGEST_SIDE}."
        )
