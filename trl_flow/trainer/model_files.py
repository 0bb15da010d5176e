"""[`ModelFilesTrainer`]: the trained model's files, in `output_dir`, in checkpoints, and on the Hub."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from trl_flow.trainer.saving import SavingTrainer


class ModelFilesTrainer(SavingTrainer):
    """How the model is written, read again, and shared. Its weights are those of `policy`."""

    # ---- Saving and resuming ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            if Path(output_dir).resolve() == self.run_folder.path.resolve():
                self.run_folder.claim()
            os.makedirs(output_dir, exist_ok=True)
        self.policy.save(output_dir, base_model=self.model_id, state_dict=state_dict)
        if self.args.should_save:
            Path(output_dir, "training_args.json").write_text(self.args.shown())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, or the model, with the weights that evaluations use."""
        with self.optimizer_modes.evaluating():
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call=_internal_call)
                return
            # transformers would save nothing where checkpoints are in shards
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.run_state.load(Path(checkpoint), self.accelerator.device)

    def _load_best_model(self) -> None:
        self.optimizer_modes.eval()  # which would change the weights that are loaded
        self._is_training = False
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        # The average is what was found best, and what will be saved
        self.run_state.load_part("policy", Path(self.state.best_model_checkpoint))
        self.publisher.best_step = self.state.best_global_step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.is_deepspeed_enabled:
            strict = not self.policy.is_adapter
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=strict)
        else:
            self.policy.load(resume_from_checkpoint)

    # ---- Sharing ----

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes `README.md` for diffusers users: how to load the result, scores, the reward curve, sample images,
        settings, and papers. `model_name` is the title. `dataset_name` is the Hub id or name of the prompts, by
        default what they were loaded from."""
        if self.is_world_process_zero():
            self.run_folder.claim()
            names = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
            self.publisher.write_card(self.policy.module, self.state, self.hub_model_id, **names)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        include: Sequence[str] = (),
        **kwargs,
    ):
        """Saves the model, writes its card (which gets `kwargs`) and uploads both, with the images that the card shows
        and nothing else but what matches `include` (patterns in `output_dir`, such as `["images/*.png"]`), to
        `args.hub_model_id`, by default the name of `output_dir`. `token`, `revision` and `private` default to the
        `hub_` fields of the config. Raises `PushError` if the Hub refuses or cannot be reached; nothing is lost."""
        if self.hub_model_id is None:
            self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        where = {"token": token, "revision": revision, "private": private, "include": include}
        return self.publisher.push(self.hub_model_id, commit_message=commit_message, blocking=blocking, **where)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.publisher.push_checkpoint(checkpoint_folder, self.hub_model_id, self.state.global_step)

    def _finish_current_push(self) -> None:
        self.publisher.wait()
