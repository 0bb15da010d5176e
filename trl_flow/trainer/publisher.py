"""What the trainer shares: a model card for diffusers users, and uploads to the Hub."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import PeftModel
from transformers import TrainerState
from transformers.utils import logging

from trl_flow import sharing
from trl_flow.backbones import Backbone
from trl_flow.sharing.card_facts import name_of
from trl_flow.trainer.flow_rl_config import FlowRLConfig


logger = logging.get_logger(__name__)


def chosen_samples(folder: Path) -> list[Path]:
    """The sample images that a run's model card shows, relative to its output folder: the latest grid."""
    grids = sorted(folder.glob("images/*.png"), key=lambda path: path.stat().st_mtime)
    return [grid.relative_to(folder) for grid in grids[-1:]]


class Publisher:
    """Writes a run's model card and uploads its output folder. To be used on the main process."""

    def __init__(
        self, args: FlowRLConfig, backbone: Backbone, model_id: str | None, reward_names: list[str],
        datasets: list[Dataset],
    ):  # fmt: skip
        """`datasets` are that of training and those of evaluation."""
        self.args, self.backbone, self.model_id, self.reward_names = args, backbone, model_id, reward_names
        self.dataset_name, self.prompt = name_of(datasets[0]), datasets[min(1, len(datasets) - 1)][0]["prompt"]
        self.best_step: int | None = None  # of the weights, once those found best are loaded
        # One upload at a time: two commits to one branch at once would be in each other's way
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trl_flow-upload")
        self._uploads: list[Future[CommitInfo]] = []

    def write_card(
        self, model: torch.nn.Module, state: TrainerState, hub_model_id: str | None, *, model_name: str | None = None,
        dataset_name: str | None = None, tags: str | list[str] | None = None,
    ) -> None:  # fmt: skip
        """Writes `README.md` to the output folder, for `model` as it was trained, unwrapped, and the run as it stands.
        What follows is as for [`FlowRLTrainer.create_model_card`]."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        curves, log_history = None, state.log_history
        if any("reward" in entry for entry in log_history):
            from trl_flow.evaluation.plots import reward_curves  # matplotlib takes a second to import

            curves = "rewards.png"
            reward_curves(log_history, folder / curves)
        settings, is_lora = sharing.training_settings(self.args), isinstance(model, PeftModel)
        planned = f" of {state.max_steps}" if state.global_step < state.max_steps else ""
        settings["updates"] = f"{state.global_step}{planned}"
        if is_lora:
            lora = model.peft_config["default"]
            settings |= {"lora_r": lora.r, "lora_alpha": lora.lora_alpha}
        about = {"backbone": self.backbone, "base_model": self.model_id, "repo_id": hub_model_id}
        about |= {"model_name": model_name, "dataset_name": dataset_name or self.dataset_name, "prompt": self.prompt}
        loading = self.args.model_init_kwargs or {}
        about["loading"] = {name: loading[name] for name in ("revision", "variant") if loading.get(name) is not None}
        about["init_adapter"] = self.args.init_adapter
        if self.args.init_adapter is not None:
            settings["reference"] = self.args.reference
        step = state.global_step if self.best_step is None else self.best_step
        logs = [log for log in log_history if log.get("step", 0) <= step]  # of the weights that are there
        run = {"settings": settings, "is_lora": is_lora, "reward_names": self.reward_names, "log_history": logs}
        run |= {"curves": curves, "samples": [(path, None) for path in chosen_samples(folder)]}
        sharing.create_model_card(folder, **about, **run, tags=[tags] if isinstance(tags, str) else list(tags or []))

    def push(
        self, hub_model_id: str, commit_message: str = "End of training", *, blocking: bool = True, **where
    ) -> CommitInfo | Future[CommitInfo]:
        """Uploads the output folder, after the uploads that are still running; unless `blocking`, returns the upload's
        `Future`. `where` may have `token`, `revision` and `private`. Raises `PushError` if the Hub refuses or cannot
        be reached."""
        self.wait()
        upload = sharing.upload if blocking else self._in_background
        return upload(self.args.output_dir, hub_model_id, **self._options(commit_message, **where))

    def _options(self, commit_message: str, *, token=None, revision=None, private=None) -> dict[str, Any]:
        """For `sharing.upload`; what is None is the config's."""
        return {
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "private": self.args.hub_private_repo if private is None else private,
            "commit_message": commit_message,
        }

    def push_checkpoint(self, checkpoint_folder: str, hub_model_id: str, global_step: int) -> None:
        """Uploads a new checkpoint's weights in the background, as `hub_strategy` says."""
        strategy, uploading = self.args.hub_strategy, any(not upload.done() for upload in self._uploads)
        if strategy == "end" or (uploading and not self.args.hub_always_push):
            return
        checkpoint = Path(checkpoint_folder)
        try:
            sharing.copy_weights(checkpoint, self.args.output_dir)
        except OSError as error:
            logger.warning(f"The checkpoint {checkpoint} is saved, but not uploaded: {error}")
            return
        options = self._options(f"Training in progress, step {global_step}")
        self._in_background(self.args.output_dir, hub_model_id, **options)
        if strategy in ("checkpoint", "all_checkpoints"):
            name = "last-checkpoint" if strategy == "checkpoint" else checkpoint.name
            self._in_background(checkpoint, hub_model_id, path_in_repo=name, everything=True, **options)

    def wait(self) -> None:
        """Waits for uploads in the background. A failed one has been warned of, and stops nothing."""
        for upload in self._uploads:
            upload.exception()
        self._uploads = []

    def _in_background(self, *args: Any, **kwargs: Any) -> Future[CommitInfo]:
        def warn(upload: Future[CommitInfo]) -> None:
            if (error := upload.exception()) is not None:
                logger.warning(str(error))

        self._uploads.append(self._executor.submit(sharing.upload, *args, **kwargs))
        self._uploads[-1].add_done_callback(warn)
        return self._uploads[-1]
