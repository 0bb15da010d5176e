"""What a reward server accepts."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """
    Bounds on what one request may cost, each refused with a 4xx, and on how many there are at a time.

    The server holds at most `max_waiting * max_body_bytes` bytes of uploads, and the decoded images of two requests.

    Attributes:
        max_images (`int`): images in a request.
        max_image_bytes (`int`): bytes of a PNG file.
        max_pixels (`int`): width times height of an image, read from its header before anything is decoded.
        max_json_bytes (`int`): bytes of each JSON field.
        max_body_bytes (`int`): bytes of a whole request, counted while they arrive.
        max_waiting (`int`): requests that are uploading, waiting or being scored. More are answered 503.
        upload_timeout (`float`): seconds within which a request must have arrived.

    Raises:
        ValueError: if one of them is not above 0, or is not a whole number and should be.
    """

    max_images: int = 32
    max_image_bytes: int = 16 * 2**20
    max_pixels: int = 2048**2
    max_json_bytes: int = 2**20
    max_body_bytes: int = 256 * 2**20
    max_waiting: int = 32
    upload_timeout: float = 60.0

    def __post_init__(self):
        for field in fields(self):
            value, is_time = getattr(self, field.name), field.name == "upload_timeout"
            if not isinstance(value, (int, float) if is_time else int) or not 0 < value < math.inf:
                kind = "number of seconds" if is_time else "whole number"
                raise ValueError(f"{field.name} is {value!r}, but must be a {kind} above 0.")
