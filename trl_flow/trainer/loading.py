"""Loading of the pipeline: the dtypes of its parts, and quantized weights."""

import inspect
import os
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils import is_bitsandbytes_available
from peft import PeftConfig

from trl_flow.backbones.model_files import loading_hint
from trl_flow.trainer.flow_rl_config import FlowRLConfig


# Keywords of `from_pretrained` that say where to look for a model
_WHERE = ("cache_dir", "local_files_only", "proxies", "revision", "token")


def component_dtypes(args: FlowRLConfig, *, trains_adapter: bool) -> dict[str, torch.dtype]:
    """The dtype in which each part of a pipeline is loaded, by its name; `"default"` is that of all others. `bf16`,
    `fp16` and `model_init_kwargs` decide. Raises `ValueError` for an unknown dtype."""
    kwargs = args.model_init_kwargs or {}
    # `torch_dtype` is diffusers' older name for it
    dtype = kwargs.get("torch_dtype") if kwargs.get("dtype") is None else kwargs["dtype"]
    if isinstance(dtype, dict):
        return {"default": torch.float32} | {name: _as_dtype(value) for name, value in dtype.items()}
    if dtype is not None:
        return {"default": _as_dtype(dtype)}
    frozen = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # The VAE loses accuracy in half precision; weights that are trained need float32
    trained = [args.component] if args.component else ["transformer", "unet"]
    full = ["vae"] if trains_adapter else ["vae", *trained]
    return {"default": frozen} | dict.fromkeys(full, torch.float32)


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    # Text comes from a command line or a YAML file; diffusers would take float32 in its place
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"model_init_kwargs has dtype {dtype!r}, but must be float32, bfloat16 or float16.")
    return found


def quantization_settings(settings: dict[str, Any], compute_dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for diffusers' `BitsAndBytesConfig`, with QLoRA's defaults: NF4, computed in the dtype of the
    other weights. Raises `ValueError` for unknown ones, and unless `load_in_4bit` or `load_in_8bit` is set."""
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"quantization_config has {', '.join(unknown)}, but only {', '.join(known)} are known.")
    if bool(settings.get("load_in_4bit")) == bool(settings.get("load_in_8bit")):
        raise ValueError(f"quantization_config is {settings}, but must have one of load_in_4bit and load_in_8bit.")
    return {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute_dtype} | settings


def _quantization_config(
    model: str,
    given: Any,
    kwargs: dict[str, Any],
    dtypes: dict[str, torch.dtype],
    *,
    trains_adapter: bool,
    trained: str | None,
) -> PipelineQuantizationConfig:
    if not trains_adapter:
        raise ValueError(
            "The base weights are to be quantized (quantization_config, load_in_4bit or load_in_8bit), but "
            "without a peft_config all weights are trained. Train an adapter: pass a peft_config (use_peft in a "
            "recipe), or leave the quantization out."
        )
    if isinstance(given, PipelineQuantizationConfig):
        return given
    if not isinstance(given, dict):
        raise ValueError(
            f"quantization_config is a {type(given).__name__}, but must be a diffusers.PipelineQuantizationConfig, or "
            "a dictionary of settings for bitsandbytes, such as {'load_in_4bit': True}, for the trained part."
        )
    try:
        index = DiffusionPipeline.load_config(model, **{name: kwargs[name] for name in _WHERE if name in kwargs})
    except (OSError, ValueError) as error:
        raise _not_loadable(model, error) from error
    component = "unet" if "unet" in index else "transformer"
    component = trained or component
    settings = quantization_settings(given, dtypes.get(component, dtypes["default"]))
    if not is_bitsandbytes_available():
        raise ValueError("Quantized base weights need bitsandbytes: pip install trl_flow[quantization].")
    if not torch.accelerator.is_available():
        instead = "Leave the quantization out, or see that torch finds the GPU (trl-flow env)."
        raise ValueError(f"Quantized base weights need a GPU, and torch sees none here. {instead}")
    return PipelineQuantizationConfig(quant_mapping={component: BitsAndBytesConfig(**settings)})


def load_pipeline(model: str | os.PathLike, args: FlowRLConfig, peft_config: PeftConfig | None) -> DiffusionPipeline:
    """The pipeline of a hub id or folder, its parts in the dtypes of [`component_dtypes`]. `model_init_kwargs` may
    have a `quantization_config`: a `diffusers.PipelineQuantizationConfig`, or settings of bitsandbytes for the trained
    part (`{"load_in_4bit": True}`). Raises `ValueError` if it cannot be loaded."""
    path, trains_adapter = os.fspath(model), peft_config is not None
    dtypes = component_dtypes(args, trains_adapter=trains_adapter)
    kwargs = {name: value for name, value in (args.model_init_kwargs or {}).items() if name != "torch_dtype"}
    kwargs["dtype"] = dtypes["default"] if len(dtypes) == 1 else dtypes
    if "subfolder" in kwargs:
        what = f"model_init_kwargs has subfolder={kwargs['subfolder']!r}, which diffusers does not read for a pipeline"
        raise ValueError(f"{what}. Give the path of the folder with model_index.json as model.")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "model_index.json")):
        raise ValueError(
            f"The folder {path!r} is not a diffusers pipeline: it has no model_index.json but {os.listdir(path)[:9]}. "
            f"Pass the folder that DiffusionPipeline.save_pretrained wrote, or a hub id.{loading_hint(path)}"
        )
    if (given := kwargs.pop("quantization_config", None)) is not None:
        options = {"trains_adapter": trains_adapter, "trained": args.component}
        kwargs["quantization_config"] = _quantization_config(path, given, kwargs, dtypes, **options)
    try:
        return DiffusionPipeline.from_pretrained(path, **kwargs)
    except (OSError, ValueError, AttributeError) as error:
        raise _not_loadable(path, error) from error


def _not_loadable(model: str, error: Exception) -> ValueError:
    cause = str(error).rstrip(" .")
    return ValueError(
        f"The model {model!r} could not be loaded as a diffusers pipeline: {cause}. Pass a hub id (such as 'stability"
        "ai/stable-diffusion-3.5-medium'; log in with `hf auth login` if it is gated), a folder, or a loaded pipeline."
        f"{loading_hint(model, error)}"
    )


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a module was loaded with quantized weights: it is neither moved nor cast then."""
    return bool(getattr(module, "is_quantized", False))
