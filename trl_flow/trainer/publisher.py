"""What the trainer shares: a model card for diffusers users, and uploads to the Hub."""

from collections.abc import Callable
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
from trl_flow.lora.files import loading_options
from trl_flow.sharing.card_facts import name_of
from trl_flow.sharing.samples import read_samples
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.over_optimization import BEST_FOLDER, better_kept


logger = logging.get_logger(__name__)


def chosen_samples(folder: Path) -> list[Path]:
    """The sample images that a run's model card shows where it has none of evaluations, relative to its output folder:
    the latest grid."""
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
        self.eval_dataset_name = name_of(datasets[1]) if len(datasets) > 1 else None
        self.recipe: str | None = None  # of a run by `trl-flow train`
        self.best_step: int | None = None  # of the weights, once those found best are loaded
        # One upload at a time: two commits to one branch at once would be in each other's way
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trl_flow-upload")
        self._uploads: list[Future[CommitInfo]] = []

    def where(self, is_lora: bool, state: TrainerState) -> str:
        """For the end of a run: where its result is, and whether a better one is elsewhere."""
        folder = self.args.output_dir
        options = "".join(f", {name}={value}" for name, value in loading_options(self.backbone.component).items())
        load = f", which pipeline.load_lora_weights({folder!r}{options}) loads" if is_lora else ""
        updates = f"{state.global_step} update{'' if state.global_step == 1 else 's'}"
        said = f"Trained {updates}. The {'adapter' if is_lora else 'model'} is in {folder}{load}."
        return f"{said} {self._of_another_update(state, f'in {Path(folder, BEST_FOLDER)}')}".rstrip()

    def _of_another_update(self, state: TrainerState, where: str) -> str:
        """Of which update the weights in the output folder are, if they are not the best by gold."""
        step = state.global_step
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            step = state.best_global_step
        better = better_kept(self.args.output_dir, step)
        if better is None:
            return ""
        average = f"{better['gold_average']:.4g} (the base model has 1)"
        return (
            f"These are the weights of update {step}. The gold average was highest after update {better['step']}: "
            f"{average}. That model is {where}."
        )

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
        about["note"] = self._of_another_update(state, "not here; it is in the run's folder, in `best_gold`")
        loading = self.args.model_init_kwargs or {}
        about["loading"] = {name: loading[name] for name in ("revision", "variant") if loading.get(name) is not None}
        about["init_adapter"] = self.args.init_adapter
        if self.args.init_adapter is not None:
            settings["reference"] = self.args.reference
        step = state.global_step if self.best_step is None else self.best_step
        logs = [log for log in log_history if log.get("step", 0) <= step]  # of the weights that are there
        run = {"settings": settings, "is_lora": is_lora, "reward_names": self.reward_names, "log_history": logs}
        evaluated = max((log["step"] for log in logs if any(key.startswith("eval_") for key in log)), default=0)
        comparisons = read_samples(folder, evaluated) if evaluated > 0 else []
        samples = [] if comparisons else [(path, None) for path in chosen_samples(folder)]
        run |= {"curves": curves, "samples": samples, "comparisons": comparisons, "recipe": self.recipe}
        run["eval_dataset_name"] = self.eval_dataset_name
        sharing.create_model_card(folder, **about, **run, tags=[tags] if isinstance(tags, str) else list(tags or []))

    def push(
        self, hub_model_id: str, commit_message: str = "End of training", *, blocking: bool = True, include=(), **where
    ) -> CommitInfo | Future[CommitInfo]:
        """Uploads what is shared of the output folder, and what matches the patterns in `include`, after the uploads
        that are still running; unless `blocking`, returns the upload's `Future`. `where` may have `token`, `revision`
        and `private`. Raises `PushError` if the Hub refuses or cannot be reached."""
        self.wait()
        options = self._options(commit_message, **where)
        send = sharing.prepare_upload(self.args.output_dir, hub_model_id, include=include, **options)
        return send() if blocking else self._in_background(send)

    def _options(self, commit_message: str, *, token=None, revision=None, private=None) -> dict[str, Any]:
        """For `sharing.prepare_upload`; what is None is the config's."""
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
        options = self._options(f"Training in progress, step {global_step}")
        whole = {"checkpoint": "last-checkpoint", "all_checkpoints": checkpoint.name}.get(strategy)
        try:
            own = sharing.prepare_upload(self.args.output_dir, hub_model_id, weights_from=checkpoint, **options)
            self._in_background(own)
            if whole is not None:
                self._in_background(sharing.prepare_upload(checkpoint, hub_model_id, checkpoint_as=whole, **options))
        except OSError as error:
            logger.warning(f"The checkpoint {checkpoint} is saved, but not uploaded: {error}")

    def wait(self) -> None:
        """Waits for uploads in the background. A failed one has been warned of, and stops nothing."""
        for upload in self._uploads:
            upload.exception()
        self._uploads = []

    def _in_background(self, send: Callable[[], CommitInfo]) -> Future[CommitInfo]:
        def warn(upload: Future[CommitInfo]) -> None:
            if (error := upload.exception()) is not None:
                logger.warning(str(error))

        self._uploads.append(self._executor.submit(send))
        self._uploads[-1].add_done_callback(warn)
        return self._uploads[-1]
