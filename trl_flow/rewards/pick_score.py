"""PickScore: how much people would prefer an image for a prompt, learned from their choices."""

from dataclasses import dataclass

import torch

from trl_flow.rewards.base import Columns, Images, RewardInfo
from trl_flow.rewards.clip import CLIPReward, CLIPScorer


@dataclass(eq=False)
class PickScoreReward(CLIPReward):
    """
    PickScore (Kirstain et al., 2023, https://huggingface.co/papers/2305.01569, section 4): `exp(t) cos(E(prompt),
    E(image))` in a CLIP ViT-H/14 tuned on the choices of Pick-a-Pic. Its learned factor `exp(t)` is 100. Values are
    the published ones; some programs divide them by 26 or 100.

    Args:
        model (`str`, defaults to `"yuvalkirstain/PickScore_v1"`): Hub id or folder of a `CLIPModel`.
        processor (`str`, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of its image processor and tokenizer.
        processor_revision (`str`, *optional*): Branch, tag or commit of `processor` on the Hub.
        revision, token, device, dtype, batch_size: As in [`HubReward`].
    """

    info = RewardInfo.of("PickScoreReward")
    __name__ = "pickscore"

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _score(self, loaded: CLIPScorer, prompts: list[str], images: Images, columns: Columns) -> torch.Tensor:
        return loaded.logit_scale * loaded.cosines(prompts, images)
