"""Online reinforcement learning for text-to-image flow and diffusion models, in TRL's and diffusers' own objects.

The names below are loaded when they are first used: `import trl_flow` alone imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_flow.quiet import leave_out_hints


if TYPE_CHECKING:
    from trl_flow.trainer import (
        AWMConfig,
        AWMTrainer,
        DiffusionNFTConfig,
        DiffusionNFTTrainer,
        FlowGRPOConfig,
        FlowGRPOTrainer,
        FlowRLConfig,
        FlowRLTrainer,
        GuardConfig,
        OverOptimizationCallback,
        SLASConfig,
        VGPOConfig,
    )

__all__ = [
    "AWMConfig",
    "AWMTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "FlowRLConfig",
    "FlowRLTrainer",
    "GuardConfig",
]
__all__ += ["OverOptimizationCallback", "SLASConfig", "VGPOConfig"]

leave_out_hints()


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("trl_flow.trainer"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
