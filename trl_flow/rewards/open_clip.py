"""CLIP checkpoints in open_clip's layout, as transformers' `CLIPModel`."""

import torch
from transformers import CLIPConfig, CLIPModel

from trl_flow.rewards.checkpoints import build_pretrained, number_of, rename, sizes_read_from


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


def open_clip_to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames an open_clip state dict of a vision transformer to that of transformers' `CLIPModel`.

    The three attention projections, which open_clip keeps in one matrix (query, key and value from top to bottom), are
    taken apart. The two final projections, which it multiplies from the right (`x @ P` for `x @ W.T`), are transposed.
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
    """
    The configuration that an open_clip state dict belongs to. All sizes are read from its shapes; what shapes do not
    tell, the width of the attention heads and the activation, must be given.
    """
    vocab_size, text_width = tensors["token_embedding.weight"].shape
    vision_width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)

    def tower(name: str, width: int, head_width: int) -> dict[str, int | str]:
        return {
            "hidden_size": width,
            "intermediate_size": tensors[f"{name}.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": number_of(rf"{name}\.(\d+)\.", tensors),
            "num_attention_heads": width // head_width,
            "hidden_act": hidden_act,
            "projection_dim": tensors["text_projection"].shape[1],
        }

    return CLIPConfig(
        text_config=tower("transformer.resblocks", text_width, text_head_width)
        | {
            "vocab_size": vocab_size,
            "max_position_embeddings": tensors["positional_embedding"].shape[0],
            # open_clip takes the feature at the highest token of a text, which is the last of its vocabulary
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        vision_config=tower("visual.transformer.resblocks", vision_width, vision_head_width)
        | {"patch_size": patch_size, "image_size": grid * patch_size},
        projection_dim=tensors["text_projection"].shape[1],
    )


def clip_from_open_clip(tensors: dict[str, torch.Tensor], *, vision_head_width: int, source: str) -> CLIPModel:
    """The model of an open_clip state dict, in float32 and evaluation mode. `source` is for errors."""
    with sizes_read_from(tensors, source=source, kind="open_clip checkpoint of a vision transformer", file="the file"):
        config = open_clip_config(tensors, vision_head_width=vision_head_width)
    return build_pretrained(CLIPModel, config, open_clip_to_transformers(tensors), source=source)
