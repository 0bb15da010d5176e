"""How much device memory a training run will need, from the model's configuration files alone."""

from trl_flow.memory.estimate import Estimate, Plan, empty_pipeline, estimate, fetch_configs
from trl_flow.memory.report import CARDS, GIB, as_json, as_text, fits, savings


__all__ = [
    "CARDS", "GIB", "Estimate", "Plan", "as_json", "as_text", "empty_pipeline", "estimate", "fetch_configs",
    "fits", "savings",
]  # fmt: skip
