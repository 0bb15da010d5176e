"""Whether the text that a prompt asks for can be read in the image."""

from typing import Any

import torch
from PIL import Image

from trl_flow.images import to_rgb
from trl_flow.prompt_words import quoted_text
from trl_flow.rewards.base import Columns, Images, ModelReward, RewardInfo, check_whole_number, require


def text_score(recognized: str, target: str) -> float:
    """
    Flow-GRPO's score of what was `recognized` in an image where `target` should stand, in `[0, 1]`.

    Both in lower case and without white space, it is `1 - min(d, n) / n`, with `d` the edit distance (Levenshtein)
    between them and `n` the length of the target, and 1 where the target is part of the text read. A `ValueError` if
    `target` is empty or white space.
    """
    from rapidfuzz.distance import Levenshtein

    recognized, target = ("".join(text.split()).lower() for text in (recognized, target))
    if not target:
        raise ValueError("The text to look for is empty. Give at least one character that is not white space.")
    if target in recognized:
        return 1.0
    distance = Levenshtein.distance(recognized, target)
    return 1.0 - min(distance, len(target)) / len(target)


class OCRReward(ModelReward):
    """
    How well the text that a prompt quotes can be read in its image, in `[0, 1]`: Flow-GRPO's reward for text
    rendering (https://huggingface.co/papers/2505.05470), [`text_score`] of what RapidOCR reads.

    The text is the entry of the column `text` where the data set has one, else the first one in quotation marks in the
    prompt ([`quoted_text`]). Where that column holds `None` the reward is `None`.

    RapidOCR runs PP-OCRv6 (Latin and Chinese letters, digits) on ONNX, on the CPU. Its models come with the package.
    As in Flow-GRPO, which reads with PaddleOCR, images are taken at their own size up to 960 pixels, text must be
    upright, and lines are put together from top to bottom.

    Args:
        num_threads (`int`, *optional*): CPU threads of one inference; default: as many as PyTorch uses, which are all
            cores, or `OMP_NUM_THREADS` where processes share them.

    Raises:
        ImportError: if RapidOCR, ONNX Runtime or rapidfuzz is missing.
        ValueError: if `num_threads` is below 1, and on a call if a prompt has no quoted text.
        TypeError: on a call, if an entry of the column `text` is neither a text nor None.

    Example:

    ```pycon
    >>> from PIL import Image, ImageDraw
    >>> from trl_flow.rewards import OCRReward
    >>> image = Image.new("RGB", (256, 64), "white")
    >>> ImageDraw.Draw(image).text((20, 15), "OPEN", fill="black", font_size=32)
    >>> OCRReward()(prompts=["a sign"], images=[image], text=["OPEN"])
    [1.0]
    ```
    """

    info = RewardInfo.of("OCRReward")
    # Unreadable text scores 0, and what can be read early is finished early
    dense = True

    def __init__(self, num_threads: int | None = None):
        if num_threads is not None:
            check_whole_number("num_threads", num_threads, 1)
        require("onnxruntime", "rapidfuzz", "rapidocr", reward="OCRReward", extra="ocr")
        super().__init__(device="cpu")
        self.num_threads = num_threads
        self.__name__ = "ocr"

    def read(self, image: Image.Image) -> str:
        """All text in an image, line by line from top to bottom."""
        with self._lock:
            self.load()
            return _read(self._loaded, to_rgb(image))

    def _load(self, device: torch.device) -> Any:
        from rapidocr import RapidOCR

        # Its own bounds enlarge small images, and fail on long and narrow ones
        settings: dict[str, Any] = {"Global.use_preprocess_img": False, "Det.limit_type": "max"}
        # At other levels it logs a line for every image without text
        settings |= {"Det.limit_side_len": 960, "Global.use_cls": False, "Global.log_level": "error"}
        settings["EngineConfig.onnxruntime.intra_op_num_threads"] = self.num_threads or torch.get_num_threads()
        return RapidOCR(params=settings)

    def _score(self, loaded: Any, prompts: list[str], images: Images, columns: Columns) -> list[float | None]:
        targets = columns["text"] if "text" in columns else [quoted_text(prompt) for prompt in prompts]
        for prompt, target in zip(prompts, targets, strict=True):
            if target is not None and not isinstance(target, str):
                held = f"{target!r} of type {type(target).__name__} for the prompt {prompt!r}"
                raise TypeError(f"The column `text` holds {held}. Give the text that its image should show, or None.")
        return [
            None if target is None else text_score(_read(loaded, image), target)
            for image, target in zip(images, targets, strict=True)
        ]


def _read(ocr: Any, image: Image.Image) -> str:
    return "\n".join(ocr(image).txts or ())
