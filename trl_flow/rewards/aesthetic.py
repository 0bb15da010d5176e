"""LAION's aesthetic predictor: how much people like an image, whatever the prompt."""

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from trl_flow.rewards.base import HubReward, RewardInfo
from trl_flow.rewards.checkpoints import fill, find_file, load_pretrained, read_tensors
from trl_flow.rewards.pixels import fill_and_crop
from trl_flow.rewards.score_head import ScoreHead


_FILE = "aesthetic-model.pth"


@dataclass(frozen=True)
class _Loaded:
    encoder: CLIPVisionModelWithProjection
    head: ScoreHead


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
    """

    info = RewardInfo(
        range=(-float("inf"), float("inf")),
        typical="4 to 7, on a scale from 1 to 10",
        license="Apache-2.0; not stated with CLIP's weights, OpenAI's code for them: MIT",
        paper="https://huggingface.co/papers/2210.08402",
    )
    __name__ = "aesthetic"

    model: str = "trl-lib/ddpo-aesthetic-predictor"
    clip: str = "openai/clip-vit-large-patch14"
    _: KW_ONLY
    clip_revision: str | None = None

    def _load(self, device: torch.device) -> _Loaded:
        path = find_file(self.model, _FILE, revision=self.revision, token=self.token)
        tensors = read_tensors(path)
        encoder = load_pretrained(
            CLIPVisionModelWithProjection, self.clip, revision=self.clip_revision, token=self.token
        )
        head = fill(ScoreHead(encoder.config.projection_dim), tensors, source=str(path))
        # The head stays in float32: in bfloat16 its steps would be of a few hundredths
        return _Loaded(encoder.to(device, self.dtype), head.to(device))

    def _score(
        self, loaded: _Loaded, prompts: list[str], images: list[Image.Image], columns: dict[str, list]
    ) -> torch.Tensor:
        size = loaded.encoder.config.image_size
        pixels = torch.stack([fill_and_crop(image, size) for image in images]).to(loaded.encoder.device, self.dtype)
        features = loaded.encoder(pixel_values=pixels).image_embeds.float()
        return loaded.head(F.normalize(features, dim=-1)).squeeze(-1)
