"""What a reward server accepts."""

import math
from dataclasses import dataclass, field


def _limit(default: float, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """
    Bounds on what one request may cost, each refused with a 4xx, and on how many there are at a time. The server holds
    at most `max_waiting * max_body_bytes` bytes of uploads, and the decoded images of two requests. A `ValueError` if
    one of them is not above 0, or is not a whole number and should be.
    """

    max_images: int = _limit(32, "images in a request")
    max_image_bytes: int = _limit(16 * 2**20, "bytes of a PNG file")
    max_pixels: int = _limit(2048**2, "width x height of an image, read from its header before anything is decoded")
    max_json_bytes: int = _limit(2**20, "bytes of each JSON field: the prompts, the columns")
    max_body_bytes: int = _limit(256 * 2**20, "bytes of a request, counted while they arrive")
    max_waiting: int = _limit(32, "requests that are uploading, waiting or being scored; more are told to come again")
    upload_timeout: float = _limit(60.0, "seconds in which a request's headers must arrive, and then its body")

    def __post_init__(self):
        for name, value in vars(self).items():
            kinds, kind = ((int, float), "number of seconds") if name == "upload_timeout" else (int, "whole number")
            if not isinstance(value, kinds) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, but must be a {kind} above 0.")
