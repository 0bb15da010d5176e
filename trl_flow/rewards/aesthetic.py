"""LAION's aesthetic predictor: how much people like an image, whatever the prompt."""

from collections import OrderedDict
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModelWithProjection

from trl_flow.rewards.base import Columns, HubReward, Images, RewardInfo
from trl_flow.rewards.checkpoints import fill, find_file, load_pretrained, read_tensors
from trl_flow.rewards.pixels import fill_and_crop


class ScoreHead(nn.Module):
    """
    Five linear layers, without anything non-linear between them, from features of shape `(N, width)` to `(N, 1)`:
    the head of LAION's aesthetic predictor and of ImageReward.
    """

    def __init__(self, width: int):
        super().__init__()
        # By the layers' numbers in the authors' state dicts: dropout, which scoring does not have, took those between
        sizes = zip((0, 2, 4, 6, 7), (width, 1024, 128, 64, 16), (1024, 128, 64, 16, 1), strict=True)
        self.layers = nn.Sequential(OrderedDict((str(number), nn.Linear(a, b)) for number, a, b in sizes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


_Loaded = tuple[CLIPVisionModelWithProjection, ScoreHead]


@dataclass(eq=False)
class AestheticReward(HubReward):
    """
    LAION's improved aesthetic predictor (Schuhmann, 2022,
    https://github.com/christophschuhmann/improved-aesthetic-predictor): five linear layers on the normalized image
    features of CLIP ViT-L/14, fitted to people's ratings from 1 to 10. Prompts are not looked at.

    Args:
        model (`str`, defaults to `"trl-lib/ddpo-aesthetic-predictor"`): Hub id or folder with `aesthetic-model.pth`,
            or the file: the layers' state dict, which the author calls `sac+logos+ava1-l14-linearMSE.pth`.
        clip (`str`, defaults to `"openai/clip-vit-large-patch14"`): Hub id or folder of the CLIP model.
        clip_revision (`str`, *optional*): Branch, tag or commit of CLIP on the Hub.
        revision, token, device, dtype, batch_size: As in [`HubReward`].

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.rewards import AestheticReward
    >>> reward = AestheticReward(dtype=torch.bfloat16, batch_size=32)  # loads its model at the first call
    >>> reward.info.typical
    '4 to 7, on a scale from 1 to 10'
    ```
    """

    info = RewardInfo.of("AestheticReward")
    __name__ = "aesthetic"

    model: str = "trl-lib/ddpo-aesthetic-predictor"
    clip: str = "openai/clip-vit-large-patch14"
    _: KW_ONLY
    clip_revision: str | None = None

    def _load(self, device: torch.device) -> _Loaded:
        path = find_file(self.model, "aesthetic-model.pth", revision=self.revision, token=self.token)
        tensors = read_tensors(path)
        options = {"revision": self.clip_revision, "token": self.token}
        encoder = load_pretrained(CLIPVisionModelWithProjection, self.clip, **options)
        head = fill(ScoreHead(encoder.config.projection_dim), tensors, source=str(path))
        # The head stays in float32: in bfloat16 its steps would be of a few hundredths
        return encoder.to(device, self.dtype), head.to(device)

    def _score(self, loaded: _Loaded, prompts: list[str], images: Images, columns: Columns) -> torch.Tensor:
        encoder, head = loaded
        pixels = torch.stack([fill_and_crop(image, encoder.config.image_size) for image in images])
        features = encoder(pixel_values=pixels.to(encoder.device, self.dtype)).image_embeds.float()
        return head(F.normalize(features, dim=-1)).squeeze(-1)
