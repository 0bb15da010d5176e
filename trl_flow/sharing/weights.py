"""Trained weights on disk: LoRA in diffusers' format, full weights as diffusers saves a model."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from trl_flow.lora import LORA_WEIGHT_NAME, PEFT_FILES, check_lora_config, write_diffusers_file


_FULL_STEM = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")  # diffusers' name of a model's weights
_ADAPTER = "default"  # the adapter's name in PEFT
_STAGING = "_saving-"


def hub_model_id(name_or_path: str | os.PathLike | None) -> str | None:
    """The id `owner/name` if `name_or_path` is one and no local file or folder, else `None`.

    Example:

    ```pycon
    >>> from trl_flow.sharing import hub_model_id
    >>> hub_model_id("stabilityai/stable-diffusion-3.5-medium")
    'stabilityai/stable-diffusion-3.5-medium'
    >>> hub_model_id("./my-model") is None
    True
    ```
    """
    name = "" if name_or_path is None else os.fspath(name_or_path)
    with suppress(HFValidationError):
        validate_repo_id(name)
        return name if "/" in name and not os.path.exists(name) else None
    return None


def save_lora(
    pipeline_class: type[DiffusionPipeline], model: PeftModel, output_dir: str | os.PathLike, *,
    component: str = "transformer", state_dict: dict[str, torch.Tensor] | None = None,
    base_model: str | os.PathLike | None = None, revision: str | None = None,
) -> Path:  # fmt: skip
    """
    Writes an adapter so that `pipeline.load_lora_weights(output_dir)` draws the images that `model` draws.

    Beside the file for diffusers, which `load_lora_weights` prefers, stand PEFT's own two (see `save_adapter`). Files
    of an earlier save are replaced only when all the new ones are complete. To be called on the main process.

    Args:
        pipeline_class (`type[DiffusionPipeline]`): of the pipeline that `model` is from; it writes the file.
        model ([`~peft.PeftModel`]): the trained module as `get_peft_model` wrapped it.
        output_dir (`str` or `os.PathLike`): folder to write to; made if need be.
        component (`str`): name of the module in the pipeline, `"transformer"` or `"unet"`.
        state_dict (`dict[str, torch.Tensor]`, *optional*): the whole one where the model holds shards (FSDP, ZeRO-3).
        base_model (`str` or `os.PathLike`, *optional*): its origin, for `adapter_config.json` if it is a Hub id.
        revision (`str`, *optional*): that one's branch, tag or commit, for the same file.

    Returns:
        `Path`: the file for diffusers.

    Raises:
        ValueError: if the adapter is one that `check_lora_config` refuses.
        RuntimeError: if there are no LoRA weights, or only empty shards of them.
        OSError: if the folder cannot be written, or the disk is full.

    Example:

    ```pycon
    >>> from peft import LoraConfig, get_peft_model
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_lora
    >>> pipeline = load_pipeline()
    >>> model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    >>> save_lora(type(pipeline), model, "adapter").name  # for pipeline.load_lora_weights("adapter")
    'pytorch_lora_weights.safetensors'
    ```
    """
    config = model.peft_config[_ADAPTER]
    check_lora_config(config)
    named = _adapter_weights(model, state_dict).items()
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in named}
    with _staged(Path(output_dir)) as staging:
        write_diffusers_file(pipeline_class, staging, config, weights, component)
        _write_peft_files(model, staging, state_dict, base_model, revision)
    return Path(output_dir) / LORA_WEIGHT_NAME


def save_adapter(
    model: PeftModel, output_dir: str | os.PathLike, *,
    state_dict: dict[str, torch.Tensor] | None = None, base_model: str | os.PathLike | None = None,
    revision: str | None = None,
) -> None:  # fmt: skip
    """
    Writes PEFT's own two files, `adapter_model.safetensors` and `adapter_config.json`, from which training continues,
    without the card of `PeftModel.save_pretrained`. `save_lora` writes them too; alone they are for weights that are
    not shared, when an average of them is. Arguments and errors are those of `save_lora`.

    Example:

    ```pycon
    >>> from peft import LoraConfig, get_peft_model
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_adapter, weight_files
    >>> pipeline = load_pipeline()
    >>> model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    >>> save_adapter(model, "adapter")
    >>> [file.name for file in weight_files("adapter")]
    ['adapter_model.safetensors', 'adapter_config.json']
    ```
    """
    _adapter_weights(model, state_dict)
    with _staged(Path(output_dir)) as staging:
        _write_peft_files(model, staging, state_dict, base_model, revision)


def _write_peft_files(
    model: PeftModel,
    staging: Path,
    state_dict: Mapping | None,
    base_model: str | os.PathLike | None,
    revision: str | None,
) -> None:
    config = model.peft_config[_ADAPTER]
    config.base_model_name_or_path = hub_model_id(base_model)
    config.revision = None if config.base_model_name_or_path is None else revision
    # By default PEFT asks the Hub for the base model's vocabulary
    model.save_pretrained(
        staging / "peft", state_dict=state_dict, selected_adapters=[_ADAPTER], save_embedding_layers=False
    )
    # PEFT's model card stays behind, and goes with the staging folder
    for name in PEFT_FILES:
        os.replace(staging / "peft" / name, staging / name)


def _adapter_weights(model: PeftModel, state_dict: Mapping | None) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU and contiguous, as safetensors wants them."""
    weights = get_peft_model_state_dict(model, state_dict, _ADAPTER, save_embedding_layers=False)
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    if empty or not weights:
        raise RuntimeError(
            f"The adapter '{_ADAPTER}' has {f'empty weights ({empty[0]}, …)' if empty else 'no weights'}. When the "
            "model is sharded (FSDP, ZeRO-3), pass the gathered ones, state_dict=accelerator.get_state_dict(model)."
        )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def save_full(
    model: ModelMixin, output_dir: str | os.PathLike, *, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """
    Writes a fully fine-tuned transformer or U-Net so that `type(model).from_pretrained(output_dir)` loads it:
    `config.json` and `diffusion_pytorch_model.safetensors` (in shards of 10 GB with an index, when it is larger).

    Files of an earlier save are replaced only when all the new ones are complete. To be called on the main process,
    with the module unwrapped; `output_dir` and `state_dict` are as for `save_lora`.

    Raises:
        RuntimeError: if `state_dict` has other names than the model's weights.
        OSError: if the folder cannot be written, or the disk is full.

    Example:

    ```pycon
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_full, weight_files
    >>> save_full(load_pipeline().transformer, "run")
    >>> [file.name for file in weight_files("run")]
    ['config.json', 'diffusion_pytorch_model.safetensors']
    ```
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    if wrong := sorted(model.state_dict().keys() ^ state_dict.keys()):
        raise RuntimeError(
            f"{len(wrong)} names are not in both the state dict and the {type(model).__name__}, such as {wrong[0]}. "
            "When the model is sharded, pass state_dict=accelerator.get_state_dict(model)."
        )
    with _staged(Path(output_dir)) as staging:
        model.save_config(staging)
        pattern = _FULL_STEM + "{suffix}.safetensors"
        save_torch_state_dict(state_dict, staging, filename_pattern=pattern, max_shard_size="10GB")


def load_full(model: ModelMixin, folder: str | os.PathLike) -> None:
    """Loads what `save_full` wrote into `model`, in place, to train it further. `FileNotFoundError` if the folder
    holds no such weights, `RuntimeError` if they are not this model's.

    Example:

    ```pycon
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import load_full, save_full
    >>> pipeline = load_pipeline()
    >>> save_full(pipeline.transformer, "run")
    >>> load_full(pipeline.transformer, "run")
    ```
    """
    single = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    files = [single] if single.is_file() else sorted(Path(folder).glob(f"{_FULL_STEM}-*-of-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}, nor shards of one.")
    model.load_state_dict({name: tensor for file in files for name, tensor in load_file(file).items()})


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The files in `folder` that `save_lora` or `save_full` wrote.

    Example:

    ```pycon
    >>> from peft import LoraConfig, get_peft_model
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_lora, weight_files
    >>> pipeline = load_pipeline()
    >>> model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    >>> _ = save_lora(type(pipeline), model, "adapter")
    >>> [file.name for file in weight_files("adapter")]
    ['pytorch_lora_weights.safetensors', 'adapter_model.safetensors', 'adapter_config.json']
    ```
    """
    names = (LORA_WEIGHT_NAME, *PEFT_FILES, "config.json", f"{_FULL_STEM}*.safetensors", f"{_FULL_STEM}*.index.json")
    return [file for name in names for file in sorted(Path(folder).glob(name))]


@contextmanager
def _staged(output_dir: Path) -> Iterator[Path]:
    """A folder to write to, whose files are moved to `output_dir` once the block is through. It lies inside, as moving
    is atomic on one file system only, and its name begins with an underscore: uploads leave it out."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for left in output_dir.glob(f"{_STAGING}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=output_dir) as staging:
            yield Path(staging)
            for file in sorted(Path(staging).iterdir()):
                if file.is_file():
                    os.replace(file, output_dir / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The weights could not be written to {output_dir}: {error}. What was saved there before is unchanged. "
            "Is there space left on the disk, and may this user write there?"
        ) from error
