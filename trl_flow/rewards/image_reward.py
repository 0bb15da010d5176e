"""ImageReward: how much people would prefer an image for a prompt, learned from experts' rankings."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)

from trl_flow.rewards.aesthetic import ScoreHead
from trl_flow.rewards.base import CheckpointError, Columns, HubReward, Images, RewardInfo
from trl_flow.rewards.checkpoints import (
    build_pretrained,
    fill,
    find_file,
    load_pretrained,
    number_of,
    read_tensors,
    rename,
    sizes_read_from,
)
from trl_flow.rewards.pixels import fill_and_crop
from trl_flow.rewards.text_length import warn_of_cut_prompts


# Of the scores on the authors' training set, which they are standardized by
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_MAX_TOKENS = 35
# Width of all attention heads in BLIP's base and large encoders
_HEAD_WIDTH = 64
# BLIP's image encoder has timm's names. Patterns and what stands in their place in transformers
_VISION_RENAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.attn\.": ".self_attn.",
}


class ImageRewardModel(nn.Module):
    """
    ImageReward's network (Xu et al., 2023, https://huggingface.co/papers/2304.05977, section 2.3): `text` reads the
    prompt, with cross-attention to the image's patches from `vision` in every layer; `head` makes a number of the
    state of the prompt's first token.
    """

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: ScoreHead):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        """From pixels `(N, 3, H, W)` in the encoders' dtype, `(N, L)` token ids and mask to `(N,)` in the head's."""
        patches = self.vision(pixel_values=pixel_values).last_hidden_state
        read = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=patches)
        return self.head(read.last_hidden_state[:, 0].to(self.head.layers[0].weight.dtype)).squeeze(-1)


_Loaded = tuple[ImageRewardModel, PreTrainedTokenizerBase]


@dataclass(eq=False)
class ImageReward(HubReward):
    """
    ImageReward (Xu et al., 2023, https://huggingface.co/papers/2304.05977): a BLIP (ViT-L/16 and a BERT with
    cross-attention) tuned on experts' rankings, standardized to mean 0 and variance 1 on its training set. Prompts are
    cut to 35 tokens.

    Args:
        model (`str`, defaults to `"zai-org/ImageReward"`): Hub id or folder with `ImageReward.pt`, or the file.
        tokenizer (`str`, defaults to `"google-bert/bert-base-uncased"`): Hub id or folder of the tokenizer.
        tokenizer_revision (`str`, *optional*): Branch, tag or commit of the tokenizer on the Hub.
        revision, token, device, dtype, batch_size: As in [`HubReward`].

    Example:

    ```pycon
    >>> from trl_flow.rewards import ImageReward
    >>> reward = ImageReward(batch_size=16)  # loads its model at the first call
    >>> reward.info.paper
    'https://huggingface.co/papers/2304.05977'
    ```
    """

    info = RewardInfo.of("ImageReward")
    __name__ = "imagereward"

    model: str = "zai-org/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"
    _: KW_ONLY
    tokenizer_revision: str | None = None

    def _load(self, device: torch.device) -> _Loaded:
        path = find_file(self.model, "ImageReward.pt", revision=self.revision, token=self.token)
        model = image_reward_model(read_tensors(path), source=str(path))
        tokenizer = load_pretrained(BertTokenizer, self.tokenizer, revision=self.tokenizer_revision, token=self.token)
        # The two that BLIP adds to BERT's; scoring needs them only for the rare prompt that has them in its text
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        vocab_size = model.text.config.vocab_size
        if len(tokenizer) != vocab_size:
            raise CheckpointError(
                f"the tokenizer of {self.tokenizer} has {len(tokenizer)} tokens with BLIP's two, the model "
                f"{vocab_size}. Give the tokenizer that the model was trained with, bert-base-uncased."
            )
        model.vision.to(device, self.dtype)
        model.text.to(device, self.dtype)
        model.head.to(device)  # and float32: in bfloat16 its steps would be of a few hundredths
        return model, tokenizer

    def _score(self, loaded: _Loaded, prompts: list[str], images: Images, columns: Columns) -> torch.Tensor:
        model, tokenizer = loaded
        device, size = model.vision.device, model.vision.config.image_size
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        warn_of_cut_prompts(self.__name__, tokenizer, prompts, tokens, _MAX_TOKENS)
        pixels = torch.stack([fill_and_crop(image, size) for image in images]).to(device, self.dtype)
        raw = model(pixels, tokens.input_ids.to(device), tokens.attention_mask.to(device))
        return (raw - _MEAN) / _STD


def blip_vision_to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the state dict of BLIP's image encoder to that of `BlipVisionModel`."""
    return {rename(name, _VISION_RENAMES): tensor for name, tensor in tensors.items()}


def image_reward_model(tensors: dict[str, torch.Tensor], *, source: str) -> ImageRewardModel:
    """The network of an ImageReward checkpoint, in float32 and evaluation mode. `source` is for errors."""
    vision = _below("blip.visual_encoder.", tensors)
    # transformers has BLIP's own names here, but not the constant that BERT keeps among its weights
    text = _below("blip.text_encoder.", tensors)
    text.pop("embeddings.position_ids", None)
    head = _below("mlp.", tensors)
    with sizes_read_from(tensors, source=source, kind="ImageReward checkpoint", file="the file ImageReward.pt"):
        vision_config, text_config = _vision_config(vision), _text_config(text)
    return ImageRewardModel(
        build_pretrained(BlipVisionModel, vision_config, blip_vision_to_transformers(vision), source=source),
        build_pretrained(BlipTextModel, text_config, text, add_pooling_layer=False, source=source),
        fill(ScoreHead(text_config.hidden_size), head, source=source),
    ).eval()


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _vision_config(tensors: dict[str, torch.Tensor]) -> BlipVisionConfig:
    width, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    grid = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=number_of(r"blocks\.(\d+)\.", tensors),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=grid * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def _text_config(tensors: dict[str, torch.Tensor]) -> BlipTextConfig:
    vocab_size, width = tensors["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        encoder_hidden_size=tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=number_of(r"encoder\.layer\.(\d+)\.", tensors),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=tensors["embeddings.position_embeddings.weight"].shape[0],
    )
