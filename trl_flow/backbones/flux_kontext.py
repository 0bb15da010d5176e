"""FLUX.1 Kontext, which edits pictures."""

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image

from trl_flow.backbones.flux import FluxBackbone


class FluxKontextBackbone(FluxBackbone):
    """
    [`~diffusers.FluxKontextPipeline`]: [`FluxBackbone`] with a picture to edit, whose latents stand beside those that
    are drawn.

    As in the pipeline, the picture is brought to that of the model's sizes, of about a megapixel, whose aspect ratio
    is closest to its own. The transformer takes batches of one shape only, so all pictures must lead to the same size
    as the drawn images would. `height` and `width` are those of the drawn images; the pipeline draws them at
    `max_area=height * width`.
    """

    takes_image = True

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the model sees a picture of this size."""
        # Rounded down to whole tokens before and after, as in the pipeline
        processor = self.pipeline.image_processor
        height, width = processor.get_default_height_width(None, height, width)
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return processor.get_default_height_width(None, height, width)

    def check_image_size(self, height: int, width: int) -> None:
        least = self.pipeline.vae_scale_factor * 2
        if min(height, width) < least:
            raise ValueError(f"It is {height} pixels high and {width} wide, but must have {least} pixels each way.")
        own, expected = self._input_size(height, width), self._input_size(self.height, self.width)
        if own != expected:
            raise ValueError(
                f"It is {height} pixels high and {width} wide, and this model sees it at {own[0]} x {own[1]}, but for "
                f"drawn images of {self.height} x {self.width} it must be {expected[0]} x {expected[1]}: a batch "
                "holds one shape only. Crop the pictures, or set height and width to their aspect ratio."
            )

    def encode_prompt(self, prompt: str, image: Image.Image) -> dict[str, torch.Tensor]:
        """
        The condition of one prompt and the picture to edit, batch size 1, on the pipeline's device.

        Raises:
            ValueError: if the picture has an aspect ratio too far from the drawn images'.
        """
        self.check_image_size(image.height, image.width)
        height, width = self._input_size(self.height, self.width)
        processor = self.pipeline.image_processor
        _, image_latents, _, _ = self.pipeline.prepare_latents(
            processor.preprocess(processor.resize(image, height, width), height, width),
            batch_size=1,
            num_channels_latents=self.model.config.in_channels // 4,
            height=self.height,
            width=self.width,
            dtype=self.pipeline.vae.dtype,
            device=self.device,
            latents=torch.empty(0),  # else the pipeline would draw some
        )
        return super().encode_prompt(prompt) | {"image_latents": image_latents}

    def _image_ids(self, device: torch.device) -> torch.Tensor:
        own = super()._image_ids(device)
        grid = (pixels // (self.pipeline.vae_scale_factor * 2) for pixels in self._input_size(self.height, self.width))
        image_ids = self.pipeline._prepare_latent_image_ids(1, *grid, device, self.dtype)
        # As in the pipeline's `prepare_latents`: the picture is told from the drawn latents by its first number
        image_ids[:, 0] = 1
        return torch.cat([own, image_ids])

    def predict(
        self, model: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        both = torch.cat([latents, condition["image_latents"].to(latents.dtype)], dim=1)
        return super().predict(model, both, timestep, condition)[:, : latents.shape[1]]
