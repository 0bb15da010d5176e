"""CLIPScore: how well an image and its prompt agree in CLIP."""

from dataclasses import dataclass

import torch

from trl_flow.rewards.base import Columns, Images, RewardInfo
from trl_flow.rewards.clip import CLIPReward, CLIPScorer


DFN5B = "apple/DFN5B-CLIP-ViT-H-14-378"


@dataclass(eq=False)
class CLIPScoreReward(CLIPReward):
    """
    CLIPScore (Hessel et al., 2021, https://huggingface.co/papers/2104.08718) as text-to-image papers report it and
    torchmetrics computes it: `max(100 cos(E(prompt), E(image)), 0)`.

    The paper itself (equation 1) has a factor of 2.5, puts "A photo depicts" before each text and uses CLIP ViT-B/32;
    others leave the cosine as it is. DanceGRPO and SLAS train on that of Apple's DFN5B ViT-H/14 at 378 pixels, which
    recipes name `clipscore_dfn5b`; its weights are for research only.

    Args:
        model (`str`, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a `CLIPModel`, with its image processor and tokenizer.
        processor (`str`, *optional*): Hub id or folder of the image processor and tokenizer; by default `model`.
        processor_revision (`str`, *optional*):
            Branch, tag or commit of `processor` on the Hub; without `processor`, `revision` is that of both.
        revision, token, device, dtype, batch_size: As in [`HubReward`].
    """

    info = RewardInfo.of("CLIPScoreReward")
    __name__ = "clipscore"

    model: str = "openai/clip-vit-large-patch14"

    def __post_init__(self):
        super().__post_init__()
        # Two models' scores may stand side by side in metrics
        if self.model == DFN5B:
            self.__name__ = "clipscore_dfn5b"

    def _score(self, loaded: CLIPScorer, prompts: list[str], images: Images, columns: Columns) -> torch.Tensor:
        return 100 * loaded.cosines(prompts, images).clamp(min=0)
