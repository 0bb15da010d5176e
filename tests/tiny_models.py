"""Tiny pipelines of stock classes with random weights: everything real but the size."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel
from transformers import T5TokenizerFast as T5Tokenizer


CLIP_TOKENS = 16  # most tokens of a prompt that a CLIP encoder reads
CLIP_WIDTH = 16  # hidden size of each of the two
POOLED_WIDTH = 8  # projection size of each of the two
JOINT_WIDTH = 2 * CLIP_WIDTH  # width of the transformer's text input, and of the T5 encoder


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """A byte-level tokenizer without merges: one token a character."""
    bytes_ = sorted(ByteLevel.alphabet())
    # The end token's id must not be 2: `CLIPTextModel` then takes an old path to the pooled state.
    tokens = ["<|startoftext|>", "<|endoftext|>", *bytes_, *(f"{byte}</w>" for byte in bytes_)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer of the printable ASCII characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Two layers of two heads of 8."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=POOLED_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(tiny_clip_config(tokenizer))


def tiny_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """One layer of two heads of 8."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=JOINT_WIDTH,
            d_kv=8,
            d_ff=2 * JOINT_WIDTH,
            num_layers=1,
            num_heads=2,
        )
    ).eval()


def tiny_vae_config(levels: int = 2) -> dict:
    """Four latent channels, of images `2 ** (levels - 1)` times smaller."""
    return {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }


def tiny_flow_vae(levels: int = 2, *, scaling_factor: float = 0.3611, shift_factor: float = 0.1159) -> AutoencoderKL:
    """As the flow models have them; the default factors are those of FLUX.1 and Z-Image."""
    return AutoencoderKL(
        **tiny_vae_config(levels),
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def tiny_sd3_transformer(seed: int = 0) -> SD3Transformer2DModel:
    """Two joint blocks of two heads of 8; latents of 4 channels, 8 x 8; `latents`-sized output."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * POOLED_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return transformer.eval()


def tiny_sd3_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """
    A complete Stable Diffusion 3 pipeline with three text encoders and random float32 weights, in evaluation mode.

    It draws 16 x 16 images from latents of shape `(4, 8, 8)`. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        transformer = tiny_sd3_transformer(seed)
        tokenizer, tokenizer_3 = tiny_clip_tokenizer(), tiny_t5_tokenizer()
        text_encoder, text_encoder_2 = tiny_clip(tokenizer), tiny_clip(tokenizer)
        text_encoder_3 = tiny_t5(tokenizer_3)
        vae = tiny_flow_vae(scaling_factor=1.5, shift_factor=0.05)
    for module in (text_encoder, text_encoder_2):
        module.eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tiny_clip_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
