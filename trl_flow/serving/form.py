"""
Reads an upload that nothing is known of: a multipart form of PNG files and JSON fields, bounded while it arrives and
never written to disk. What cannot be accepted is raised as an `HTTPException` of status 4xx that says why.
"""

import asyncio
import contextlib
import io
import json
import math
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from PIL import Image, UnidentifiedImageError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from trl_flow.images import to_rgb
from trl_flow.rewards.checks import RESERVED_COLUMNS
from trl_flow.serving.limits import Limits


JSON_FIELDS = ("prompts", "columns", "rewards", "videos")
IMAGE_FIELD, FRAME_FIELD = "images", "frames"

# The characters that a boundary may have (RFC 2046, section 5.1.1)
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{1,70}")
# Pixels. Encoders and models fail on images that are longer, however few pixels they have in all: a JPEG cannot be
_LONGEST_SIDE = 65_500
# Seconds for which the rest of a refused upload is read and thrown away. A connection that is closed while the client
# still writes is reset, and many clients then never see the answer
_LINGER = 2.0


@dataclass
class ScoreRequest:
    """What a client asks for: `N` prompts and PNG files, columns of `N` values, names of rewards, None for all. Of
    videos also how many frames each has, `N` numbers, and the PNG files of these, one video after another."""

    prompts: list[str]
    images: list[bytes]
    columns: dict[str, list]
    rewards: list[str] | None
    videos: list[int] | None
    frames: list[bytes]


def refuse(condition: Any, status: int, reason: str) -> None:
    if condition:
        raise HTTPException(status, reason)


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

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """What arrives, up to the limit; a body that says itself that it is too long is not read."""
        while not self.complete:
            too_long = f"A request may have {self._max_bytes} bytes, and this one has more. Send fewer images."
            refuse(max(self._declared, self._length) > self._max_bytes, 413, too_long)
            yield await self._next()

    async def discard(self) -> None:
        """Reads on for a moment without keeping anything; afterwards `complete` tells whether that was all."""

        async def rest() -> None:
            while not self.complete:
                await self._next()

        if self._length or not self._asks_first:
            with contextlib.suppress(asyncio.TimeoutError, ClientDisconnect):
                await asyncio.wait_for(rest(), _LINGER)

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        data = message.get("body", b"")
        self._length += len(data)
        self.complete = not message.get("more_body", False)
        return data


async def read_score_request(body: Body, content_type: str, limits: Limits) -> ScoreRequest:
    """
    Reads and checks all but the images. Status 400 for what cannot be read, 408 for what does not arrive in time, 413
    for too much, 415 for something other than PNG files in a multipart form, 422 for parts that do not fit each other.
    """
    try:
        items = await asyncio.wait_for(_read_form(body, content_type, limits), limits.upload_timeout)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"The request had not arrived after {limits.upload_timeout:g} seconds.") from None
    files: dict[str, list[bytes]] = {IMAGE_FIELD: [], FRAME_FIELD: []}
    values: dict[str, Any] = {}
    for name, value in items:
        if name in files and isinstance(value, UploadFile):
            which = "Image" if name == IMAGE_FIELD else "Frame"
            image, kind, most = f"{which} {len(files[name])}", value.content_type, limits.max_image_bytes
            refuse(kind != "image/png", 415, f"{image} is sent as {kind!r}. Send PNG files, as image/png.")
            refuse(value.size > most, 413, f"{image} has more than {most} bytes, which is the limit.")
            files[name].append(await value.read())
            await value.close()
            continue
        refuse(name in values, 400, f"The form has two fields {name!r}. Give it once.")
        expected = f"There are files {IMAGE_FIELD} and {FRAME_FIELD}, and {', '.join(JSON_FIELDS)}."
        known = name in JSON_FIELDS and isinstance(value, str)
        refuse(not known, 400, f"The form has a field {name[:80]!r}. {expected}")
        values[name] = _read_json(name, value.encode("latin-1"))
    own = (values.get("prompts"), files[IMAGE_FIELD], values.get("columns", {}), values.get("rewards"))
    request = ScoreRequest(*own, values.get("videos"), files[FRAME_FIELD])
    _check(request)
    return request


class _Parser(MultiPartParser):
    """Starlette's, which also tells whether the closing boundary has come."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _read_form(body: Body, content_type: str, limits: Limits) -> list[tuple[str, str | UploadFile]]:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"").decode("latin-1")
    fields = f"PNG files as {IMAGE_FIELD!r}, and JSON as {', '.join(map(repr, JSON_FIELDS))}"
    other = f"The request is of type {content_type[:80]!r}. Send multipart/form-data with a boundary: {fields}."
    refuse(kind != b"multipart/form-data" or not _BOUNDARY.fullmatch(boundary), 415, other)
    # Latin-1 keeps the bytes of fields as they are, for a strict decoder. What a client names may be slow, or none
    headers = Headers({"content-type": f'multipart/form-data; boundary="{boundary}"; charset=latin-1'})
    most = {"max_files": limits.max_images, "max_fields": len(JSON_FIELDS), "max_part_size": limits.max_json_bytes}
    parser = _Parser(headers, body.chunks(), **most)
    parser.spool_max_size = limits.max_body_bytes  # from which it would write files to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"The form cannot be accepted: {error.message}") from error
    refuse(not parser.ended, 400, "The form ends before its closing boundary.")
    return form.multi_items()


def _read_json(name: str, data: bytes) -> Any:
    def constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:40]} is beyond the range of numbers")
        return value

    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=constant, parse_float=finite)
        if "\\u" in text:  # JSON can spell halves of characters, which no text may hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200].encode("utf-8", "backslashreplace").decode()
        raise HTTPException(400, f"The field {name!r} is not valid JSON in UTF-8: {reason}") from error


def _check(request: ScoreRequest) -> None:
    """Whether the parts have the types that they should, and fit each other."""
    prompts, columns, number = request.prompts, request.columns, len(request.images)
    refuse(not _are_strings(prompts), 422, "The field 'prompts' must be a list of strings.")
    counts = f"There are {len(prompts)} prompts and {number} images. Send one prompt for each."
    refuse(not number or len(prompts) != number, 422, counts)
    refuse(not isinstance(columns, dict), 422, "The field 'columns' must be an object of lists.")
    for name, values in columns.items():
        taken = f"A column cannot be called {name[:80]!r}: reward functions are given that anyway."
        refuse(name in ("self", "prompt", *RESERVED_COLUMNS), 422, taken)
        fits = isinstance(values, list) and len(values) == number
        refuse(not fits, 422, f"The column {name[:80]!r} must be a list of {number} values, one for each image.")
    lengths = request.videos
    fits = isinstance(lengths, list) and len(lengths) == number and all(type(n) is int and n > 0 for n in lengths)
    numbers = f"The field 'videos' must be a list of {number} numbers of frames, one for each image."
    refuse(lengths is not None and not fits, 422, numbers)
    counts = f"There are {len(request.frames)} frames, but must be {sum(lengths or ())}, as the field 'videos' says."
    refuse(len(request.frames) != sum(lengths or ()), 422, counts)
    names = request.rewards
    asks = names is None or (names and _are_strings(names))
    refuse(not asks, 422, "The field 'rewards' must be a list of names. Leave it out for all.")


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def decode_images(files: list[bytes], max_pixels: int) -> list[Image.Image]:
    """
    Decodes PNG files, to RGB. The size is read from the header first: a few kilobytes can unpack to
    gigabytes. Status 413 if one of them is too large, 415 if one is not a PNG file, 400 if one is damaged.
    """
    images = []
    for index, data in enumerate(files):
        try:
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            width, height = image.size
            limit = f"The limit is {max_pixels} in all, and {_LONGEST_SIDE} on a side."
            too_large = width * height > max_pixels or max(width, height) > _LONGEST_SIDE
            refuse(too_large, 413, f"Image {index} has {width} x {height} pixels. {limit}")
            images.append(to_rgb(image))
        except HTTPException:
            raise
        except Image.DecompressionBombError as error:
            raise HTTPException(413, f"Image {index} has too many pixels. The limit is {max_pixels}.") from error
        except UnidentifiedImageError as error:
            raise HTTPException(415, f"Image {index} is not a PNG file that can be read.") from error
        except Exception as error:  # there is no list of what a decoder raises on bytes that were made to break it
            raise HTTPException(400, f"Image {index} is not a sound PNG file: {error}") from error
    return images
