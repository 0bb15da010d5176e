"""ImageReward's network, a BLIP text encoder that looks at the image and a head, with checkpoints in BLIP's layout."""

import torch
from torch import nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from trl_flow.rewards.checkpoints import build_pretrained, fill, number_of, rename, sizes_read_from
from trl_flow.rewards.score_head import ScoreHead


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
        self.vision = vision
        self.text = text
        self.head = head

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        """
        From normalized pixels `(N, 3, H, W)` in the encoders' dtype, token ids `(N, L)` and 1 where there is one, to
        `(N,)` in the head's dtype, before it is standardized.
        """
        patches = self.vision(pixel_values=pixel_values).last_hidden_state
        states = self.text(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=patches
        ).last_hidden_state
        return self.head(states[:, 0].to(self.head.layers[0].weight.dtype)).squeeze(-1)


def blip_vision_to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the state dict of BLIP's image encoder to that of `BlipVisionModel`."""
    return {rename(name, _VISION_RENAMES): tensor for name, tensor in tensors.items()}


def image_reward_model(tensors: dict[str, torch.Tensor], *, source: str) -> ImageRewardModel:
    """
    The network of an ImageReward checkpoint, in float32 and evaluation mode. All sizes are read from its shapes.
    `source` is for errors.
    """
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
