"""The trainer's own callbacks."""

import time

import torch
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback, TrainerCallback


class FlowProgressCallback(ProgressCallback):
    """
    The training bar, with what is going on beside it (sampling, rewards, updating), and one short line for each log.

    The complete metrics go to the trackers and to `trainer_state.json`.
    """

    # What a person watches; the rest (some forty values a log) would bury it
    SHOWN = ("reward", "reward_std", "kl", "clip_ratio/region_mean", "loss", "grad_norm", "step_time")

    _shown_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", dynamic_ncols=True
            )
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        shown = {name: value for name, value in (logs or {}).items() if self._is_shown(name) and value is not None}
        if shown:
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  {values}")

    def _is_shown(self, name: str) -> bool:
        is_reward = name.endswith("/mean") and "rewards/" in name
        return name in self.SHOWN or is_reward or name.endswith("_reward")

    def show_stage(self, stage: str) -> None:
        if self.training_bar is not None:
            # A small model changes stage far more often than anybody, or a log file, can follow
            now = time.monotonic()
            self.training_bar.set_postfix_str(stage, refresh=now - self._shown_at > 0.2)
            if now - self._shown_at > 0.2:
                self._shown_at = now


class EMACallback(TrainerCallback):
    """Updates the moving average after each optimizer step."""

    def __init__(self, ema: EMAModel, parameters: list[torch.nn.Parameter]):
        self.ema = ema
        self.parameters = parameters

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.ema.step(self.parameters)
