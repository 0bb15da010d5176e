"""What leaves a training run: weights that stock diffusers loads, a model card, and the upload to the Hub."""

from trl_flow.lora import check_lora_config
from trl_flow.sharing.hub import PushError, prepare_upload, upload, uploaded_files
from trl_flow.sharing.model_card import PAPERS, Paper, create_model_card, papers_behind, training_settings
from trl_flow.sharing.weights import (
    PEFT_FILES,
    hub_model_id,
    load_full,
    save_adapter,
    save_full,
    save_lora,
    weight_files,
)


__all__ = [
    "PAPERS", "PEFT_FILES", "Paper", "PushError", "check_lora_config", "create_model_card", "hub_model_id",
    "load_full", "papers_behind", "prepare_upload", "save_adapter", "save_full", "save_lora", "training_settings",
    "upload", "uploaded_files", "weight_files",
]  # fmt: skip
