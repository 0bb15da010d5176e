"""What leaves a training run: weights that stock diffusers loads, a model card, and the upload to the Hub."""

from trl_flow.lora import check_lora_config
from trl_flow.sharing.hub import PushError, upload
from trl_flow.sharing.model_card import PAPERS, Paper, create_model_card, papers_behind, training_settings
from trl_flow.sharing.weights import (
    copy_weights,
    hub_model_id,
    load_full,
    save_adapter,
    save_full,
    save_lora,
)


__all__ = [
    "PAPERS", "Paper", "PushError", "check_lora_config", "copy_weights", "create_model_card", "hub_model_id",
    "load_full", "papers_behind", "save_adapter", "save_full", "save_lora", "training_settings", "upload",
]  # fmt: skip
