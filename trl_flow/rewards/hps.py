"""Human Preference Score v2 and v2.1: how much people would prefer an image for a prompt."""

import html
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from transformers import CLIPConfig, CLIPModel

from trl_flow.rewards.base import Columns, HubReward, Images, RewardInfo, check_choice
from trl_flow.rewards.checkpoints import (
    build_pretrained,
    find_file,
    number_of,
    read_tensors,
    rename,
    sizes_read_from,
)
from trl_flow.rewards.clip import CLIPScorer, clip_scorer, load_clip_tokenizer
from trl_flow.rewards.pixels import fit_and_pad


Version = Literal["v2.0", "v2.1"]

# The file with the weights, and the name in metrics
_VERSIONS = {"v2.0": ("HPS_v2_compressed.pt", "hpsv2"), "v2.1": ("HPS_v2.1_compressed.pt", "hpsv2.1")}
_QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u02bc\u201c\u201d\u201e\u201f", "'''''\"\"\"\"")
# Of the image encoder of open_clip's ViT-H-14; its text encoder has heads of 64
_VISION_HEAD_WIDTH = 80
# Patterns in open_clip's names and what stands in their place in transformers
_RENAMES = {
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",  # transformers' spelling
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.proj$": "visual_projection.weight",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.c_fc\.": ".fc1.",
    r"\.c_proj\.": ".fc2.",
}


@dataclass(eq=False)
class HPSv2Reward(HubReward):
    """
    Human Preference Score v2 (Wu et al., 2023, https://huggingface.co/papers/2306.09341): the cosine of image and
    prompt in a CLIP ViT-H/14 tuned on people's rankings. The paper's tables show it times 100.

    As in the authors' program images are scaled until the longer side fits and padded with black, and in prompts curly
    quotes and HTML entities are resolved; what more it repairs (ligatures, wrongly decoded text) is left out.

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

    Example:

    ```pycon
    >>> from trl_flow.rewards import HPSv2Reward
    >>> reward = HPSv2Reward("v2.1")  # loads its model at the first call
    >>> reward.__name__
    'hpsv2.1'
    ```
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
        prompts = [html.unescape(html.unescape(prompt.translate(_QUOTES))) for prompt in prompts]
        return loaded.cosines(prompts, images, reward=self.__name__)


def open_clip_to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames an open_clip state dict of a vision transformer to that of transformers' `CLIPModel`. The matrix of query,
    key and value is taken apart. The two final projections, multiplied from the right (`x @ P`), are transposed.
    """
    converted = {}
    for name, tensor in tensors.items():
        renamed = rename(name, _RENAMES)
        if name in ("text_projection", "visual.proj"):
            converted[renamed] = tensor.T.contiguous()
        elif "in_proj_" in name:
            for part, projection in zip(tensor.chunk(3), ("q_proj.", "k_proj.", "v_proj."), strict=True):
                converted[renamed.replace("in_proj_", projection)] = part.contiguous()
        else:
            converted[renamed] = tensor
    return converted


def open_clip_config(
    tensors: dict[str, torch.Tensor], *, vision_head_width: int, text_head_width: int = 64, hidden_act: str = "gelu"
) -> CLIPConfig:
    """The configuration of an open_clip state dict; what its shapes do not tell must be given."""
    vocab_size, text_width = tensors["token_embedding.weight"].shape
    vision_width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)

    def tower(name: str, width: int, head_width: int, **others: int) -> dict[str, int | str]:
        return {
            "hidden_size": width,
            "intermediate_size": tensors[f"{name}.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": number_of(rf"{name}\.(\d+)\.", tensors),
            "num_attention_heads": width // head_width,
            "hidden_act": hidden_act,
            "projection_dim": tensors["text_projection"].shape[1],
            **others,
        }

    return CLIPConfig(
        text_config=tower(
            "transformer.resblocks", text_width, text_head_width,
            vocab_size=vocab_size, max_position_embeddings=tensors["positional_embedding"].shape[0],
            # open_clip takes the feature at the highest token of a text, which is the last of its vocabulary
            bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1,
        ),
        vision_config=tower(
            "visual.transformer.resblocks", vision_width, vision_head_width,
            patch_size=patch_size, image_size=grid * patch_size,
        ),
        projection_dim=tensors["text_projection"].shape[1],
    )  # fmt: skip


def clip_from_open_clip(tensors: dict[str, torch.Tensor], *, vision_head_width: int, source: str) -> CLIPModel:
    """The model of an open_clip state dict, in float32 and evaluation mode. `source` is for errors."""
    with sizes_read_from(tensors, source=source, kind="open_clip checkpoint of a vision transformer", file="the file"):
        config = open_clip_config(tensors, vision_head_width=vision_head_width)
    return build_pretrained(CLIPModel, config, open_clip_to_transformers(tensors), source=source)
