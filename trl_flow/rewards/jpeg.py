"""How well an image compresses: the two simplest rewards of DDPO (Black et al., 2023,
https://huggingface.co/papers/2305.13301, section 5.1). They need neither a model nor data."""

import dataclasses
import io
import math

from PIL import Image

from trl_flow.images import to_rgb
from trl_flow.rewards.base import RewardInfo


class JPEGIncompressibilityReward:
    """
    Size of the image, in RGB, as a JPEG file in kilobytes (1000 bytes, as in DDPO): the more detail, the higher.

    Values go from the size of an empty JPEG file, about 0.6 kB for the smallest image and growing with its area, to
    about 1.2 kB per 1000 pixels, for noise at quality 95.

    Args:
        quality (`int`, defaults to 95): JPEG quality from 1 to 100. 95 is DDPO's.

    Example:

    ```pycon
    >>> from PIL import Image
    >>> from trl_flow.rewards import JPEGIncompressibilityReward
    >>> flat, noise = Image.new("RGB", (64, 64)), Image.effect_noise((64, 64), 100)
    >>> scores = JPEGIncompressibilityReward()(prompts=["a wall", "sand"], images=[flat, noise])
    >>> scores[0] < scores[1]
    True
    ```
    """

    info = RewardInfo.of("JPEGIncompressibilityReward")
    dense = True

    def __init__(self, quality: int = 95):
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"quality={quality!r} is not a JPEG quality: give a whole number from 1 to 100.")
        self.quality = quality
        self.__name__ = "jpeg_incompressibility"

    def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs) -> list[float]:
        sizes = []
        for image in images:
            to_rgb(image).save(file := io.BytesIO(), format="JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        return sizes


class JPEGCompressibilityReward(JPEGIncompressibilityReward):
    """
    `offset` minus the size of the image as a JPEG file in kilobytes: the smoother, the higher.

    Without an offset values are at most about -0.6, as in DDPO. VGPO's value weights are ratios of rewards and ask for
    positive ones: give an offset above the largest size there ([`JPEGIncompressibilityReward`] measures it).

    Args:
        quality (`int`, defaults to 95): JPEG quality from 1 to 100. 95 is DDPO's.
        offset (`float`, defaults to 0.0): Added to every reward, in kilobytes.

    Example:

    ```pycon
    >>> from PIL import Image
    >>> from trl_flow.rewards import JPEGCompressibilityReward
    >>> flat, noise = Image.new("RGB", (64, 64)), Image.effect_noise((64, 64), 100)
    >>> scores = JPEGCompressibilityReward()(prompts=["a wall", "sand"], images=[flat, noise])
    >>> scores[0] > scores[1]
    True
    ```
    """

    info = RewardInfo.of("JPEGCompressibilityReward")

    def __init__(self, quality: int = 95, offset: float = 0.0):
        super().__init__(quality)
        self.offset = offset
        self.info = dataclasses.replace(self.info, range=(-math.inf, offset))
        self.__name__ = "jpeg_compressibility"

    def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs) -> list[float]:
        return [self.offset - size for size in super().__call__(prompts, images)]
