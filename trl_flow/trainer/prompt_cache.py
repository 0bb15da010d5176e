"""Conditions of prompts, each computed once: in memory until that set aside for them is full, and on disk, one
safetensors file each, under a fingerprint of all that they depend on."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from datasets import Dataset
from huggingface_hub import constants
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm
from transformers.utils import logging

from trl_flow.backbones.base import Backbone
from trl_flow.backbones.contract import encoded
from trl_flow.evaluation.outputs import whole_file
from trl_flow.images import to_rgb
from trl_flow.prompts.rows import prompts_of
from trl_flow.quiet import shows_bars
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.loading import is_quantized


logger = logging.get_logger(__name__)


def default_folder() -> Path:
    return Path(constants.HF_HOME) / "trl_flow" / "prompt_embeds"


def encoding_fingerprint(backbone: Backbone) -> str:
    """A hash of everything but the prompt that a condition depends on: class and settings of the backbone, weights of
    all modules that are not trained (with dtypes and device), tokenizers, and versions of the libraries."""
    pipeline, digest = backbone.pipeline, hashlib.sha256()
    config = {key: value for key, value in pipeline.config.items() if not key.startswith("_")}
    settings = {
        "backbone": f"{type(backbone).__module__}.{type(backbone).__qualname__}",
        "pipeline": type(pipeline).__name__,
        "max_sequence_length": backbone.max_sequence_length,
        "size": [backbone.height, backbone.width],
        "device": backbone.device.type,
        "versions": [diffusers.__version__, torch.__version__, transformers.__version__],
        "config": {key: v for key, v in config.items() if isinstance(v, bool | int | float | str | None)},
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, component in sorted(pipeline.components.items()):
        if component is backbone.model:
            continue
        if isinstance(component, torch.nn.Module):
            _add(digest, component.state_dict(), prefix=f"{name}.")
        elif name.startswith(("tokenizer", "processor")) and component is not None:
            with tempfile.TemporaryDirectory() as folder:
                component.save_pretrained(folder)
                for path in sorted(Path(folder).rglob("*")):
                    if path.is_file():
                        digest.update(f"{name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


class PromptEmbedStore:
    """A folder of conditions, with one in it for each [`encoding_fingerprint`], so that several models, and any number
    of processes, can use it at once. Raises `ValueError` if it cannot be made."""

    def __init__(self, folder: str | os.PathLike, fingerprint: str):
        self.folder = Path(folder, fingerprint[:32])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            wrong = f"prompt_embeds_dir {os.fspath(folder)!r} cannot be written to: {error}. Choose another."
            raise ValueError(wrong) from error

    def _path(self, prompt: str, image: str | None) -> Path:
        key = json.dumps([prompt, image])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def __contains__(self, key: tuple[str, str | None]) -> bool:
        """Whether there is a file of full length for a prompt and the fingerprint of its image."""
        try:
            with safe_open(self._path(*key), framework="pt"):  # reads the head, which says how long the file is
                return True
        except (SafetensorError, OSError, ValueError):
            return False

    def load(self, prompt: str, image: str | None) -> dict[str, torch.Tensor] | None:
        """The condition as it was saved, on the CPU; `None` if there is none, or it is not whole."""
        path = self._path(prompt, image)
        try:
            with safe_open(path, framework="pt") as file:
                condition = {name: file.get_tensor(name) for name in file.keys()}
                checksum = (file.metadata() or {}).get("checksum")
            if checksum != _checksum(condition):
                raise ValueError("its checksum does not fit")
            return condition
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning(f"{path} is damaged ({error}): its prompt is encoded anew.")
            return None

    def save(self, prompt: str, image: str | None, condition: dict[str, torch.Tensor]) -> None:
        """Writes a condition, of which others see all or nothing. Raises `OSError` if it cannot be written."""
        condition = {name: tensor.contiguous() for name, tensor in condition.items()}
        try:
            with whole_file(self._path(prompt, image)) as file:
                file.write(save(condition, metadata={"checksum": _checksum(condition), "prompt": prompt}))
        except OSError as error:
            what = f"The embeddings of a prompt could not be written to {self.folder}: {error}"
            raise OSError(f"{what}. Make room there, or set prompt_embeds_dir to another folder.") from error

    def check_space(self, condition: dict[str, torch.Tensor], number: int) -> None:
        """Raises `OSError` if `number` conditions of this size do not fit on the disk."""
        needed, free = number * sum(value.nbytes for value in condition.values()), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The embeddings of {number} prompts take about {needed / 2**30:.1f} GiB, but {self.folder} has "
                f"{free / 2**30:.1f} GiB free. Make room, or set prompt_embeds_dir or precompute_prompt_embeds=False."
            )


def _add(digest: Any, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{prefix}{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _checksum(condition: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    _add(digest, condition)
    return digest.hexdigest()


def image_fingerprint(image: Image.Image) -> str:
    """Equal for images with equal pixels, however they came to be."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _key(prompt: str, image: Image.Image | None) -> tuple[str, str | None]:
    return prompt, None if image is None else image_fingerprint(image)


class PromptCache:
    """The conditions of prompts on the CPU, the least recently used forgotten first: 2 GiB hold about 1,200 prompts of
    Stable Diffusion 3.5. With a `store` they are kept on disk too, and the text encoders are held on the CPU but while
    they encode. Each prompt, with its image where the backbone takes one, is encoded by itself: its condition then
    does not depend on which prompts it was drawn with, nor on the number of processes."""

    def __init__(self, backbone: Backbone, max_bytes: int = 2 * 2**30, store: PromptEmbedStore | None = None):
        self.backbone, self.max_bytes, self.store = backbone, max_bytes, store
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
            if name.startswith("text_encoder") and isinstance(module, torch.nn.Module) and not is_quantized(module):
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
            condition = encoded(self.backbone, prompt, *([] if image is None else [image]))
            return {name: value.cpu() for name, value in condition.items()}

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

    def write(self, pairs: Callable[[], Iterable], *, rank: int = 0, num_processes: int = 1, progress=False) -> None:
        """Encodes to disk what is not there yet of `pairs()`, prompts with their images; of that every
        `num_processes`-th from the `rank`-th on. Raises `OSError` if it does not fit on the disk."""
        keys = list(dict.fromkeys(_key(*pair) for pair in pairs()))
        missing = {key for key in keys[rank::num_processes] if key not in self.store}
        if not missing:
            return
        with (
            self._encoders(),
            tqdm(desc="Encoding prompts", total=len(missing), disable=not (progress and shows_bars())) as bar,
        ):
            for prompt, image in pairs():
                if (key := _key(prompt, image)) in missing:
                    condition = self._encode(prompt, image)
                    if bar.n == 0:
                        self.store.check_space(condition, len(missing))
                    self.store.save(*key, condition)
                    missing.remove(key)
                    bar.update()

    def encode_ahead(self, args: FlowRLConfig, datasets: list[Dataset]) -> None:
        """Writes all prompts of `datasets`, and the negative one, to the store, if any; processes share the work."""
        if self.store is None:
            return
        scales = {args.guidance_scale, args.eval_guidance_scale} - {None}
        negative = [args.negative_prompt or ""] if any(map(self.backbone.uses_guidance, scales)) else []

        def pairs() -> Iterator[tuple[str, Image.Image | None]]:
            for dataset in datasets:
                if not self.backbone.takes_image:
                    yield from ((prompt, None) for prompt in [*negative, *prompts_of(dataset)])
                else:
                    for row in dataset:
                        image = to_rgb(row["image"])
                        yield from ((prompt, image) for prompt in [*negative, row["prompt"]])

        progress = args.local_process_index == 0 and not args.disable_tqdm
        self.write(pairs, rank=args.process_index, num_processes=args.world_size, progress=progress)
        if args.world_size > 1:
            # Those of the other processes too, should each machine have a folder of its own
            args.distributed_state.wait_for_everyone()
            self.write(pairs, progress=progress)

    def __call__(self, prompts: list[str], images: list[Image.Image] | None = None) -> dict[str, torch.Tensor]:
        """Conditions of `prompts`, and of the images to be edited, along the batch, on the backbone's device."""
        pairs = zip(prompts, [None] * len(prompts) if images is None else images, strict=True)
        conditions = [self._get(prompt, image) for prompt, image in pairs]
        while self._bytes > self.max_bytes and len(self._conditions) > 1:
            _, condition = self._conditions.popitem(last=False)
            self._bytes -= sum(value.nbytes for value in condition.values())
        device = self.backbone.device
        return {key: torch.cat([each[key] for each in conditions]).to(device) for key in conditions[0]}
