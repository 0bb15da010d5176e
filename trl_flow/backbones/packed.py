"""What the families have in common whose transformer reads an image's latents packed, 2 x 2 of them in each token."""

from trl_flow.backbones.base import Backbone


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

    def _grid(self) -> tuple[int, int]:
        """Height and width of the image in tokens."""
        multiple = self.pipeline.vae_scale_factor * 2
        return self.height // multiple, self.width // multiple

    def latent_shape(self) -> tuple[int, ...]:
        height, width = self._grid()
        return (height * width, self.model.config.in_channels)
