"""Human Preference Score v2 and v2.1: how much people would prefer an image for a prompt."""

import html
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch

from trl_flow.rewards.base import Columns, HubReward, Images, RewardInfo, check_choice
from trl_flow.rewards.checkpoints import find_file, read_tensors
from trl_flow.rewards.clip import CLIPScorer, clip_scorer, load_clip_tokenizer
from trl_flow.rewards.open_clip import clip_from_open_clip
from trl_flow.rewards.pixels import fit_and_pad


Version = Literal["v2.0", "v2.1"]

# The file with the weights, and the name in metrics
_VERSIONS = {"v2.0": ("HPS_v2_compressed.pt", "hpsv2"), "v2.1": ("HPS_v2.1_compressed.pt", "hpsv2.1")}
_QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u02bc\u201c\u201d\u201e\u201f", "'''''\"\"\"\"")
# Of the image encoder of open_clip's ViT-H-14; its text encoder has heads of 64
_VISION_HEAD_WIDTH = 80


@dataclass(eq=False)
class HPSv2Reward(HubReward):
    """
    Human Preference Score v2 (Wu et al., 2023, https://huggingface.co/papers/2306.09341): the cosine of image and
    prompt in a CLIP ViT-H/14 tuned on people's rankings. The paper's tables show it times 100.

    Images are scaled until the longer side fits and padded with black, not cropped. In prompts curly quotes and HTML
    entities are resolved. Both are as in the authors' program; what more it repairs in prompts (ligatures, full-width
    letters, wrongly decoded text) is left out.

    Args:
        version (`str`, defaults to `"v2.0"`): `"v2.0"`, or `"v2.1"`, which was trained on better data. They are two
            models: their values cannot be compared.
        model (`str`, defaults to `"xswu/HPSv2"`): Hub id or folder with `HPS_v2_compressed.pt` or
            `HPS_v2.1_compressed.pt`, or the file: a state dict in open_clip's layout.
        tokenizer (`str`, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`): Hub id or folder of the tokenizer.
        tokenizer_revision (`str`, *optional*): Branch, tag or commit of the tokenizer on the Hub.
        revision, token, device, dtype, batch_size: As in [`HubReward`].

    Raises:
        ValueError: if `version` is neither of the two.
    """

    info = RewardInfo.of("HPSv2Reward")

    version: Version = "v2.0"
    model: str = "xswu/HPSv2"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    _: KW_ONLY
    tokenizer_revision: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_choice("version", self.version, Version, "HPSv2")
        self._file, self.__name__ = _VERSIONS[self.version]

    def _load(self, device: torch.device) -> CLIPScorer:
        path = find_file(self.model, self._file, revision=self.revision, token=self.token)
        model = clip_from_open_clip(read_tensors(path), vision_head_width=_VISION_HEAD_WIDTH, source=str(path))
        tokenizer = load_clip_tokenizer(self.tokenizer, model, revision=self.tokenizer_revision, token=self.token)
        size = model.config.vision_config.image_size
        return clip_scorer(
            model, tokenizer, lambda images: torch.stack([fit_and_pad(image, size) for image in images]),
            device=device, dtype=self.dtype,
        )  # fmt: skip

    def _score(self, loaded: CLIPScorer, prompts: list[str], images: Images, columns: Columns) -> torch.Tensor:
        # As open_clip's tokenizer reads them: HTML entities, even those of entities, and curly quotes resolved
        return loaded.cosines([html.unescape(html.unescape(prompt.translate(_QUOTES))) for prompt in prompts], images)
