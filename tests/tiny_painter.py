"""A family that the package does not know: a pipeline of another library's class, and a backbone of ten lines."""

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image

from trl_flow.backbones import Backbone, Schedule


SIZE = 8


class Painter(ModelMixin, ConfigMixin):
    """A multilayer perceptron on pixels."""

    @register_to_config
    def __init__(self, width: int = 16):
        super().__init__()
        self.inner = torch.nn.Linear(3 * SIZE**2 + 1, width)
        self.outer = torch.nn.Linear(width, 3 * SIZE**2)

    def forward(self, pixels, letters):
        inputs = torch.cat([pixels.flatten(1), letters], dim=1)
        return self.outer(torch.nn.functional.silu(self.inner(inputs))).view_as(pixels)


class PainterPipeline(DiffusionPipeline):
    """It has neither a VAE nor a text encoder."""

    def __init__(self, painter: Painter, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(painter=painter, scheduler=scheduler)

    def __call__(self, prompt, num_inference_steps=10, strength=1.0):
        raise NotImplementedError


class PainterBackbone(Backbone):
    """Its guidance scale is the pipeline's `strength`."""

    component = "painter"
    lora_target_modules = ["inner", "outer"]
    scheduler_code = "from painting import Brush\npipeline.scheduler = Brush()"

    @property
    def device(self):
        return self.model.device

    @classmethod
    def default_size(cls, pipeline):
        return SIZE, SIZE

    def check_size(self, height, width):
        assert (height, width) == (SIZE, SIZE)

    def latent_shape(self):
        return (3, SIZE, SIZE)

    def condition_shapes(self):
        return {"letters": ((1,), torch.float32)}

    def encode_prompt(self, prompt):
        return {"letters": torch.tensor([[float(len(prompt))]], device=self.device)}

    def schedule(self, num_inference_steps):
        self.pipeline.scheduler.set_timesteps(num_inference_steps, device=self.device)
        return Schedule.of(self.pipeline.scheduler, self.device)

    def predict(self, model, latents, timestep, condition):
        return model(latents, condition["letters"])

    def decode(self, latents):
        pixels = ((latents / 2 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in pixels]

    def call_arguments(self, settings):
        return super().call_arguments(settings) | {"strength": settings.get("guidance_scale", 1.0)}


def tiny_painter_backbone() -> PainterBackbone:
    """One with random weights."""
    return PainterBackbone(PainterPipeline(Painter(), FlowMatchEulerDiscreteScheduler()))
