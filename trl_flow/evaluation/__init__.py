"""What a run is judged by: drawing and scoring, comparison before and after, images, plots, reports and votes.

The names below are loaded when they are first used; everything else is imported from its module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl_flow.evaluation.comparison import compare_scores
    from trl_flow.evaluation.equal_proxy import GoldAtProxy, equal_proxy_table, gold_at_proxy
    from trl_flow.evaluation.evaluate import Comparison, evaluate_models
    from trl_flow.evaluation.inputs import DrawingOptions
    from trl_flow.evaluation.steps import predict_steps, steps_grid
    from trl_flow.evaluation.vote import VoteServer

_MODULES = {
    "Comparison": "evaluate",
    "DrawingOptions": "inputs",
    "GoldAtProxy": "equal_proxy",
    "VoteServer": "vote",
    "compare_scores": "comparison",
    "equal_proxy_table": "equal_proxy",
    "evaluate_models": "evaluate",
    "gold_at_proxy": "equal_proxy",
    "predict_steps": "steps",
    "steps_grid": "steps",
}

__all__ = [
    "Comparison",
    "DrawingOptions",
    "GoldAtProxy",
    "VoteServer",
    "compare_scores",
    "equal_proxy_table",
    "evaluate_models",
    "gold_at_proxy",
    "predict_steps",
    "steps_grid",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
