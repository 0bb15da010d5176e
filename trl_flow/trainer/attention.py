"""`attention_backend`: which of diffusers' implementations of attention the trained model uses."""

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)

from trl_flow.backbones import Backbone
from trl_flow.trainer.flow_rl_config import FlowRLConfig


def check_attention_backend(backbone: Backbone, args: FlowRLConfig) -> None:
    """Raises `ValueError` unless the model can be trained with `args.attention_backend`: of that a forward and a
    backward pass of one attention are run."""
    name, kind = args.attention_backend, type(backbone.model).__name__
    if name is None:
        return
    names = [each.value for each in AttentionBackendName]
    if name not in names:
        raise ValueError(f"attention_backend is {name!r}, but diffusers has {', '.join(names)}.")
    if not any(map(_dispatches, backbone.model.modules())):
        raise ValueError(
            f"attention_backend is {name!r}, but {kind} does not choose its attention by diffusers' dispatcher (no "
            "U-Net and no Stable Diffusion 3 does): it uses torch's scaled_dot_product_attention, which picks the "
            "fastest kernel by itself. Leave attention_backend out."
        )
    backend, half = AttentionBackendName(name), args.bf16 or args.fp16
    dtype = (torch.bfloat16 if args.bf16 else torch.float16) if half else backbone.dtype
    # Nothing random, which would change the initial weights of an adapter
    query, key, value = torch.zeros(3, 1, 128, 4, 64, device=args.device, dtype=dtype, requires_grad=True).unbind()
    mask = None
    if any("mask" in each for each in backbone.condition_shapes()):
        mask = torch.ones(1, 1, 1, 128, dtype=torch.bool, device=args.device)
    try:
        _check_attention_backend_requirements(backend)
        _maybe_download_kernel_for_backend(backend)
        dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend).float().sum().backward()
    except Exception as error:  # each has its own
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"attention_backend is {name!r}, which does not work for training here ({args.device}, {dtype}"
            f"{'' if mask is None else ', with a mask of the prompts'}): {cause}. Install what it needs, or leave "
            "attention_backend out."
        ) from error


def set_attention_backend(backbone: Backbone, name: str | None) -> None:
    """Of the models that sampling and updates run; that of everything else in the process stays as it was."""
    if name is None:
        return
    active, _ = _AttentionBackendRegistry.get_active_backend()
    for model in backbone.sampled_models:
        model.set_attention_backend(name)
    _AttentionBackendRegistry.set_active_backend(active)


def _dispatches(module: torch.nn.Module) -> bool:
    return hasattr(getattr(module, "processor", None), "_attention_backend")
