"""Conditions of prompts, each computed once and kept until the memory set aside for them is full."""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from trl_flow.backbones.base import Backbone
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.loading import is_quantized
from trl_flow.trainer.prompt_embed_store import PromptEmbedStore, default_folder, encoding_fingerprint


def image_fingerprint(image: Image.Image) -> str:
    """Equal for images with equal pixels, however they came to be."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _key(prompt: str, image: Image.Image | None) -> tuple[str, str | None]:
    return prompt, None if image is None else image_fingerprint(image)


class PromptCache:
    """
    The conditions of prompts on the CPU, the least recently used forgotten first: the default 2 GiB hold about 1,200
    prompts of Stable Diffusion 3.5. With a `store` they are kept on disk too, and the text encoders are held on the
    CPU, but for the time in which something is encoded that is not on disk.

    Each prompt, with its image where the backbone takes one, is encoded by itself, never in a batch: its condition
    then does not depend on which prompts it was drawn with, nor on the number of processes.
    """

    def __init__(self, backbone: Backbone, max_bytes: int = 2 * 2**30, store: PromptEmbedStore | None = None):
        self.backbone = backbone
        self.max_bytes = max_bytes
        self.store = store
        self._bytes = 0
        self._conditions: OrderedDict[tuple[str, str | None], dict[str, torch.Tensor]] = OrderedDict()
        self._at_hand = store is None
        if store is not None:
            self._move_encoders(torch.device("cpu"))

    @classmethod
    def of(cls, backbone: Backbone, args: FlowRLConfig) -> "PromptCache":
        """As `precompute_prompt_embeds` and `prompt_embeds_dir` say."""
        if not args.precompute_prompt_embeds:
            return cls(backbone)
        if getattr(backbone.pipeline, "vae", None) is not None:
            backbone.pipeline.vae.to(args.device)  # where the backbone encodes, too
        folder = default_folder() if args.prompt_embeds_dir is None else args.prompt_embeds_dir
        return cls(backbone, store=PromptEmbedStore(folder, encoding_fingerprint(backbone)))

    def _move_encoders(self, device: torch.device) -> None:
        for name, module in self.backbone.pipeline.components.items():
            is_encoder = name.startswith("text_encoder") and isinstance(module, torch.nn.Module)
            if is_encoder and not is_quantized(module):
                module.to(device)

    @contextlib.contextmanager
    def _encoders(self) -> Iterator[None]:
        """The text encoders on the device, where they are held off it."""
        if self._at_hand:
            yield
            return
        self._move_encoders(self.backbone.device)
        self._at_hand = True
        try:
            yield
        finally:
            self._move_encoders(torch.device("cpu"))
            self._at_hand = False
            if self.backbone.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def _encode(self, prompt: str, image: Image.Image | None) -> dict[str, torch.Tensor]:
        with self._encoders():
            encoded = self.backbone.encode_prompt(prompt, *([] if image is None else [image]))
            return {name: value.cpu() for name, value in encoded.items()}

    def _get(self, prompt: str, image: Image.Image | None) -> dict[str, torch.Tensor]:
        key = _key(prompt, image)
        if key not in self._conditions:
            condition = None if self.store is None else self.store.load(*key)
            if condition is None:
                condition = self._encode(prompt, image)
                if self.store is not None:
                    self.store.save(*key, condition)
            self._conditions[key] = condition
            self._bytes += sum(value.nbytes for value in condition.values())
        self._conditions.move_to_end(key)
        return self._conditions[key]

    def write(
        self, pairs: Callable[[], Iterable], *, rank: int = 0, num_processes: int = 1, progress: bool = False
    ) -> None:
        """Encodes to disk what is not there yet of `pairs()`, prompts with their images; of that every
        `num_processes`-th from the `rank`-th on. Raises `OSError` if it does not fit on the disk."""
        keys = list(dict.fromkeys(_key(*pair) for pair in pairs()))
        missing = {key for key in keys[rank::num_processes] if key not in self.store}
        if not missing:
            return
        with self._encoders(), tqdm(desc="Encoding prompts", total=len(missing), disable=not progress) as bar:
            for prompt, image in pairs():
                key = _key(prompt, image)
                if key not in missing:
                    continue
                condition = self._encode(prompt, image)
                if bar.n == 0:
                    self.store.check_space(condition, len(missing))
                self.store.save(*key, condition)
                missing.remove(key)
                bar.update()

    def encode_ahead(self, args: FlowRLConfig, datasets: list[Dataset]) -> None:
        """Writes all prompts of `datasets` that are not there yet, and the negative one, if there is a store. The
        processes share the work."""
        if self.store is None:
            return
        scales = [args.guidance_scale, args.eval_guidance_scale]
        guided = any(scale is not None and self.backbone.uses_guidance(scale) for scale in scales)
        negative = [args.negative_prompt or ""] if guided else []

        def pairs() -> Iterator[tuple[str, Image.Image | None]]:
            for dataset in datasets:
                if not self.backbone.takes_image:
                    yield from ((prompt, None) for prompt in [*negative, *dataset["prompt"]])
                else:
                    for row in dataset:
                        image = row["image"].convert("RGB")
                        yield from ((prompt, image) for prompt in [*negative, row["prompt"]])

        progress = args.local_process_index == 0 and not args.disable_tqdm
        self.write(pairs, rank=args.process_index, num_processes=args.world_size, progress=progress)
        if args.world_size > 1:
            # Those of the other processes too, should each machine have a folder of its own
            args.distributed_state.wait_for_everyone()
            self.write(pairs, progress=progress)

    def __call__(self, prompts: list[str], images: list[Image.Image] | None = None) -> dict[str, torch.Tensor]:
        """Conditions of `prompts`, and of the images to be edited with them, stacked along the batch, on the
        backbone's device."""
        pairs = zip(prompts, [None] * len(prompts) if images is None else images, strict=True)
        conditions = [self._get(prompt, image) for prompt, image in pairs]
        while self._bytes > self.max_bytes and len(self._conditions) > 1:
            _, condition = self._conditions.popitem(last=False)
            self._bytes -= sum(value.nbytes for value in condition.values())
        return {
            key: torch.cat([condition[key] for condition in conditions]).to(self.backbone.device)
            for key in conditions[0]
        }
