"""Tiny Qwen-Image and Z-Image pipelines of stock classes with random weights: everything real but the size."""

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tiny_models import tiny_flow_vae
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


TEXT_WIDTH = 16  # hidden size of the text encoders
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

# scheduler_config.json of Qwen/Qwen-Image
QWEN_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
# ... and of Tongyi-MAI/Z-Image-Turbo
Z_IMAGE_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": False}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen_tokenizer(*templates: str) -> Qwen2Tokenizer:
    """
    A byte-level tokenizer without merges, one token a character.

    The pipelines drop the first tokens of their template by number, counted with the real vocabulary: there, each of
    the template's words is one token, and so it is here.
    """
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    words = set()
    for template in templates:
        for token in SPECIAL_TOKENS:
            template = template.replace(token, "\0")
        for part in template.split("\0"):
            words |= {part[slice(*span)] for _, span in pre_tokenizer.pre_tokenize_str(part)}
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in sorted(words)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two text layers and one vision layer, of two heads of 8."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 1,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_qwen3_config(tokenizer: Qwen2Tokenizer, *, num_hidden_layers: int) -> Qwen3Config:
    """Layers of two heads of 8."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )


def tiny_qwen_transformer(**config) -> QwenImageTransformer2DModel:
    """Two joint blocks of two heads of 16; packed latents of 4 x 4 channels."""
    return QwenImageTransformer2DModel(
        **{
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": (4, 6, 6),
        }
        | config
    ).eval()


def tiny_qwen_vae(halvings: int = 1, **config) -> AutoencoderKLQwenImage:
    """Four latent channels, each with a mean and a spread of its own; by default 16 x 16 pixels from 8 x 8."""
    return AutoencoderKLQwenImage(
        **{
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1] * (1 + halvings),
            "num_res_blocks": 1,
            "temperal_downsample": [False] * halvings,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.5, 0.7, 1.0, 2.0],
        }
        | config
    ).eval()


def tiny_qwen_image_pipeline(seed: int = 0, **transformer_config) -> QwenImagePipeline:
    """
    A complete Qwen-Image pipeline with random float32 weights, in evaluation mode.

    It draws 16 x 16 images from packed latents of shape `(16, 16)`. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"transformer": tiny_qwen_transformer(**transformer_config), "vae": tiny_qwen_vae()}
        pipeline = QwenImagePipeline(
            **parts,
            scheduler=FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER),
            text_encoder=None,
            tokenizer=None,
        )
        tokenizer = tiny_qwen_tokenizer(pipeline.prompt_template_encode.split("{}")[0])
        pipeline.register_modules(tokenizer=tokenizer, text_encoder=tiny_qwen_vl(tokenizer))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def smaller_input_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the editing pipelines scale input images to 128 x 128 pixels instead of the megapixel, which takes a
    second on one core."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        own = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, own=own: own(area / 64, ratio))


class ImageProcessor(Qwen2VLProcessor):
    """The stock processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Qwen2VLImageProcessorPil, tokenizer: Qwen2Tokenizer):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # Past the constructor that takes all three
        super(Qwen2VLProcessor, self).__init__(image_processor, tokenizer)


def tiny_qwen_edit_pipeline(
    cls: type[QwenImageEditPipeline | QwenImageEditPlusPipeline], seed: int = 0, **transformer_config
) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """
    A complete Qwen-Image-Edit pipeline with random float32 weights, in evaluation mode.

    Its VAE halves the megapixel of the input image four times; images of 64 x 64 are drawn from packed latents of
    shape `(4, 16)`. The text encoder sees at most 56 x 56 pixels. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": tiny_qwen_transformer(**transformer_config),
            "vae": tiny_qwen_vae(halvings=4, num_res_blocks=0),
        }
        pipeline = cls(
            **parts,
            scheduler=FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER),
            text_encoder=None,
            tokenizer=None,
            processor=None,
        )
        tokenizer = tiny_qwen_tokenizer(pipeline.prompt_template_encode)
        processor = ImageProcessor(Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56), tokenizer)
        pipeline.register_modules(tokenizer=tokenizer, text_encoder=tiny_qwen_vl(tokenizer), processor=processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    """
    A complete Z-Image pipeline with random float32 weights, in evaluation mode.

    It draws 16 x 16 images from latents of shape `(4, 8, 8)`. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 16, 16],
        ).eval()
        # They fill sequences up to a multiple of 32, and begin at 0
        torch.nn.init.normal_(transformer.x_pad_token)
        torch.nn.init.normal_(transformer.cap_pad_token)
        vae = tiny_flow_vae()
        tokenizer = tiny_qwen_tokenizer()
        text_encoder = Qwen3Model(tiny_qwen3_config(tokenizer, num_hidden_layers=2)).eval()
    pipeline = ZImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(**Z_IMAGE_SCHEDULER),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
