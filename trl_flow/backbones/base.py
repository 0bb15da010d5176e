"""What the program needs to know of a pipeline, whatever its family."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from trl_flow.backbones.contract import check_prediction
from trl_flow.backbones.passed_in import device_of, unwrap
from trl_flow.backbones.schedules import DDIMSchedule, Schedule, dynamic_shift
from trl_flow.images import Sample


Tensors = dict[str, Tensor]
# Name of a condition's tensor -> its shape without the batch, and its dtype
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

# Targets of a LoRA: the attention of both streams of a joint transformer
JOINT_ATTENTION = [
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
]

# Settings of the sampling that have these names in most pipelines' calls
SAMPLING_SETTINGS = (
    *("num_inference_steps", "guidance_scale", "negative_prompt"),
    *("height", "width", "num_frames", "max_sequence_length", "guidance_scale_2"),
)
# Settings that a backbone is made with, by the names of its arguments; not every family takes all
BACKBONE_SETTINGS = ("height", "width", "max_sequence_length", "num_frames", "guidance_scale_2", "component")


def padded(embeds: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings `(1, L, D)` filled up to `length` tokens, as pipelines fill up those of a batch, and their mask."""
    missing = length - embeds.shape[1]
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return functional.pad(embeds, (0, 0, 0, missing)), functional.pad(mask, (0, missing))


class Backbone(ABC):
    """
    A pipeline family behind a few methods, each on the pipeline's own code: all that sampling, training, evaluation,
    the memory estimate and the model card know of it. A subclass is one file.

    Conditions are dictionaries of tensors whose first dimension is the batch, so that they can be cached, stacked and
    split without knowing the family.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): a loaded pipeline; its modules are used in place.
        height, width (`int`, *optional*): size of the images in pixels; default: the pipeline's own.
        max_sequence_length (`int`, *optional*): prompt tokens, where the pipeline takes this argument; default: the
            pipeline's own.

    Raises:
        ValueError: if the pipeline cannot draw images of this size or read prompts of this length, a part that
            sampling needs is missing, or one was changed so that it computes something else ([`unwrap`]).

    Example:

    ```pycon
    >>> from trl_flow.backbones import BACKBONES, Backbone, get_backbone
    >>> from trl_flow.shapes import load_pipeline
    >>> backbone: Backbone = get_backbone(load_pipeline(), height=64, width=64)
    >>> backbone.latent_shape(), backbone.component
    ((4, 16, 16), 'transformer')
    >>> type(backbone) is BACKBONES["StableDiffusion3Pipeline"]
    True
    ```
    """

    component = "transformer"  # the pipeline's module that is trained
    lora_target_modules: list[str]  # default targets of a LoRA whose config names none
    takes_image = False  # whether it edits images: `encode_prompt` then gets the one in the row's column `image`
    takes_negative_prompt = True  # whether guidance can lead away from a prompt of the user's choice
    guidance_argument = "guidance_scale"  # what the pipeline's call calls that
    distilled_steps: int | None = None  # steps that the model was distilled for, if its config says that it was
    default_sequence_length = 512  # the pipeline's own default for `max_sequence_length`
    sequence_length_limit: int | None = None  # the longest `max_sequence_length` that the pipeline takes
    fixed_sequence_length: int | None = None  # tokens of every prompt, where the pipeline's call takes no length
    # Of videos: how fast they play, and their frames; `None`: it draws images
    frames_per_second: float | None = None
    num_frames: int | None = None
    guidance_scale_2: float | None = None  # that of the second of two models that take steps in turns, if it has any
    decoded_at_once = 16  # samples: decoding takes far more memory than a step, and gains nothing from a large batch
    settings: tuple[str, ...] = ("height", "width", "max_sequence_length")  # those of `BACKBONE_SETTINGS` it takes
    # Code for the model card that gives `pipeline` the scheduler that training sampled with, if it is not its own
    scheduler_code: str | None = None

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
    ):
        # A pipeline of one's own may do without a VAE
        missing = [name for name in (self.component, "vae", "scheduler") if getattr(pipeline, name, ...) is None]
        if missing:
            raise ValueError(
                f"The pipeline has no {' and no '.join(missing)}, which sampling needs. Load it with all its parts."
            )
        unwrap(pipeline, self.component)
        if height is None or width is None:
            own_height, own_width = self.default_size(pipeline)
            height, width = height or own_height, width or own_width
        length = self.default_sequence_length if max_sequence_length is None else max_sequence_length
        if self.sequence_length_limit is not None and length > self.sequence_length_limit:
            raise ValueError(
                f"max_sequence_length is {length}, but {type(pipeline).__name__} takes {self.sequence_length_limit} "
                "at most. Lower it."
            )
        self.pipeline, self.height, self.width, self.max_sequence_length = pipeline, height, width, length
        self.dtype = self.model.dtype  # read before a LoRA is added, whose weights may have another one
        self.check_size(height, width)

    @property
    def model(self) -> nn.Module:
        """The module that is trained, unwrapped."""
        return getattr(self.pipeline, self.component)

    @property
    def sampled_models(self) -> list[nn.Module]:
        """The modules whose forwards sampling runs: the trained one, and others that take steps in turns with it."""
        return [self.model]

    def compiled_parts(self, model: nn.Module) -> list[nn.Module]:
        """What `torch_compile` compiles of a model of this family, each by itself: the blocks that it repeats, of
        which those of one kind share their code; without any, the model as a whole."""
        names = getattr(model, "_repeated_blocks", None) or ()  # Stable Diffusion 3 names none
        blocks = [part for part in model.modules() if type(part).__name__ in names]
        lists = [part for part in model.children() if isinstance(part, nn.ModuleList)]
        return blocks or [block for blocks in lists for block in blocks] or [model]

    @property
    def device(self) -> torch.device:
        """The device where conditions are computed and images are decoded."""
        return device_of(self.pipeline)

    # ---- Sizes ----

    @classmethod
    def default_size(cls, pipeline: DiffusionPipeline) -> tuple[int, int]:
        """Height and width of the images that the pipeline draws by default."""
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        return side, side

    @abstractmethod
    def check_size(self, height: int, width: int) -> None:
        """Raises `ValueError` if the pipeline cannot draw images of this size."""

    def check_image_size(self, height: int, width: int) -> None:
        """With `takes_image`: raises `ValueError` if an image of this size cannot be edited."""
        return  # any size, unless a family says otherwise

    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents, without the batch; unless a family says otherwise, `(C, H, W)` of the VAE."""
        factor = self.pipeline.vae_scale_factor
        return (self._latent_channels(), self.height // factor, self.width // factor)

    def _latent_channels(self, per_token: int = 1) -> int:
        """Channels of the model's input, which are `per_token` times the VAE's; `ValueError` if it takes more."""
        config, taken = self.pipeline.vae.config, self.model.config.in_channels
        drawn = per_token * (config.get("latent_channels") or config.get("z_dim") or taken // per_token)
        if taken != drawn:
            raise ValueError(
                f"The {self.component} takes {taken} channels, but the VAE's latents have {drawn}: it is made for "
                "inpainting, editing or control, and also takes a mask or an image, which is not supported here. "
                "Load a model that draws from the prompt alone."
            )
        return taken

    # ---- Settings ----

    @property
    def takes_guidance(self) -> bool:
        """Whether `guidance_scale` changes anything."""
        return True

    def call_default(self, name: str) -> Any:
        """What an argument of the pipeline's call is by default; `None` if it has no such argument."""
        parameter = signature(type(self.pipeline).__call__).parameters.get(name)
        return None if parameter is None else parameter.default

    @property
    def token_limit(self) -> int:
        """Tokens of a prompt that are read, counted as [`prompt_tokens`] counts them."""
        return self.max_sequence_length

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int] | None:
        """How many tokens each prompt needs, the special ones and those of a chat template included; `None` if that is
        not known. A longer prompt than [`token_limit`] is cut."""
        return None

    # ---- Sampling ----

    @abstractmethod
    def encode_prompt(self, prompt: str) -> Tensors:
        """The condition of one prompt, batch size 1, on the pipeline's device. With `takes_image` it has a second
        argument, `image`: the image to be edited, RGB, of any size; the condition's shapes must not depend on it."""

    @abstractmethod
    def condition_shapes(self) -> Shapes:
        """Shape, without the batch, and dtype of each tensor of a condition, from the configuration alone: what memory
        is estimated with, where nothing can be encoded. `predict` then gets tensors without data."""

    @abstractmethod
    def schedule(self, num_inference_steps: int) -> Schedule | DDIMSchedule:
        """The noise levels of the pipeline's own scheduler for this number of steps. Its class says what kind
        of transitions the model is sampled with."""

    @abstractmethod
    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        """One forward of `model` (the trained module, possibly wrapped) without guidance, `(B, ...)`, at a `timestep`
        that is a scalar or `(B,)`: the velocity
        `v = x_1 - x_0` of a flow model, or what a U-Net predicts, the noise or v, as the `prediction_type` of its
        [`DDIMSchedule`] says."""

    def decode(self, latents: Tensor) -> list[Sample]:
        """Images of final latents `(B, ...)`, or with `frames_per_second` videos, each the list of its frames; unless
        a family says otherwise, `(B, C, H, W)` scaled and shifted as the VAE's config says. Raises
        `FloatingPointError` if the VAE gives NaN or infinite pixels."""
        config = self.pipeline.vae.config
        return self._decode(latents / config.scaling_factor + (config.get("shift_factor") or 0))

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of latents in the VAE's own scale."""
        vae = self.pipeline.vae
        return self._images(vae.decode(latents.to(vae.dtype), return_dict=False)[0])

    def _images(self, pixels: Tensor) -> list[Image.Image]:
        """Images of the VAE's output, `(B, 3, H, W)`; `FloatingPointError` if it is not finite."""
        if not pixels.is_meta and not pixels.isfinite().all():
            raise FloatingPointError(
                f"The VAE, in {pixels.dtype}, gave NaN or infinite values, of which images would be black. Load it in "
                "float32: model_init_kwargs={'dtype': {'vae': 'float32', 'default': 'bfloat16'}}, or pipeline.vae.to("
                "torch.float32); in trl-flow evaluate, --dtype float32. If it is, its weights are damaged."
            )
        return self._processor.postprocess(pixels.float(), output_type="pil")

    @property
    def _processor(self) -> VaeImageProcessor:
        return self.pipeline.image_processor

    def guided_prediction(
        self,
        model: nn.Module,
        latents: Tensor,
        timestep: Tensor,
        condition: Tensors,
        negative_condition: Tensors | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """
        What `predict` gives, after guidance: a velocity, or a U-Net's noise or v.

        Args:
            model (`torch.nn.Module`): the trained module, possibly wrapped (PEFT, DDP, FSDP).
            latents (`torch.Tensor`): `x_t`, shape `(B, ...)`.
            timestep (`torch.Tensor`): one of the schedule's `timesteps`, a scalar, or `(B,)` with one for each sample.
            condition (`dict[str, torch.Tensor]`): the prompts' conditions, batch `B`.
            negative_condition (`dict[str, torch.Tensor]`, *optional*): the same for the negative prompts. Without it
                there is no guidance. With it both are run as one batch of `2 B`, as the pipelines do.
            guidance_scale (`float`): strength of the guidance.

        Returns:
            `torch.Tensor`: float32, shape `(B, ...)`.
        """
        if negative_condition is not None:
            condition = {key: torch.cat([negative_condition[key], condition[key]]) for key in condition}
            timestep = timestep if timestep.ndim == 0 else torch.cat([timestep, timestep])
            latents = torch.cat([latents, latents])
        prediction = self.predict(model, latents, timestep, condition)
        check_prediction(self, prediction, latents)
        if negative_condition is None:
            return prediction.float()
        unconditional, conditional = prediction.float().chunk(2)
        return self.guide(conditional, unconditional, guidance_scale)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """The pipeline's guidance, from the predictions for the prompts and the negative prompts, both `(B, ...)`."""
        return unconditional + guidance_scale * (conditional - unconditional)

    def uses_guidance(self, guidance_scale: float) -> bool:
        """Whether the pipeline would run its negative prompt at this scale."""
        return guidance_scale > 1

    # ---- Sharing ----

    def call_arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """
        The keyword arguments with which the pipeline's own call draws what sampling settings mean.

        Args:
            settings (`Mapping[str, Any]`): those of `SAMPLING_SETTINGS`. Others, those that are `None` and those that
                the call does not take are left out.
        """
        accepted = signature(type(self.pipeline).__call__).parameters
        # The empty negative prompt is none, as in training: a pipeline may treat it as a prompt of its own
        given = {name: settings[name] for name in SAMPLING_SETTINGS if settings.get(name) not in (None, "")}
        names = {"guidance_scale": self.guidance_argument}
        given = {names.get(name, name): value for name, value in given.items()}
        return {name: value for name, value in given.items() if name in accepted}


class PackedBackbone(Backbone):
    """A [`Backbone`] whose latents are a sequence of tokens, `(L, C)`: row by row, 2 x 2 of the VAE's to each."""

    def check_size(self, height: int, width: int) -> None:
        multiple = self.pipeline.vae_scale_factor * 2
        if height % multiple or width % multiple:
            raise ValueError(
                f"height and width are {height} x {width}, but this model draws multiples of {multiple} pixels. "
                f"Set height={max(1, round(height / multiple)) * multiple} and "
                f"width={max(1, round(width / multiple)) * multiple}."
            )

    def _tokens(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in tokens of an image of this size."""
        multiple = self.pipeline.vae_scale_factor * 2
        return height // multiple, width // multiple

    def _grid(self) -> tuple[int, int]:
        return self._tokens(self.height, self.width)

    def latent_shape(self) -> tuple[int, ...]:
        return (math.prod(self._grid()), self._latent_channels(per_token=4))

    def schedule(self, num_inference_steps: int) -> Schedule:
        scheduler = self.pipeline.scheduler
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        retrieve_timesteps(scheduler, device=self.device, sigmas=sigmas, mu=self._shift(num_inference_steps))
        return Schedule.of(scheduler, self.device)

    def _shift(self, num_inference_steps: int) -> float:
        """By how much the noise levels are moved for images of this size."""
        return dynamic_shift(self.pipeline.scheduler, math.prod(self._grid()))


class EditingBackbone(PackedBackbone):
    """A [`PackedBackbone`] whose transformer reads the tokens of an image to edit after those of the drawn one."""

    takes_image = True

    @abstractmethod
    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the transformer sees an image of this size."""

    def _input_grid(self) -> tuple[int, int]:
        return self._tokens(*self._input_size(self.height, self.width))

    def _image_latents(self, pixels: Tensor) -> Tensor:
        """The tokens `(1, L, C)` of an image to edit, which the pipeline's processor has scaled."""
        channels, vae = self.model.config.in_channels // 4, self.pipeline.vae
        size = (self.height, self.width)
        none = torch.empty(0)  # in place of latents to draw from, which the pipeline would make otherwise
        return self.pipeline.prepare_latents(pixels, 1, channels, *size, vae.dtype, self.device, None, none)[1]

    def condition_shapes(self) -> Shapes:
        tokens = math.prod(self._input_grid())
        return super().condition_shapes() | {"image_latents": ((tokens, self.model.config.in_channels), torch.float32)}

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        both = torch.cat([latents, condition["image_latents"].to(latents.dtype)], dim=1)
        return super().predict(model, both, timestep, condition)[:, : latents.shape[1]]
