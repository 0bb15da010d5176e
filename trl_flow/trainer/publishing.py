"""The part of the trainer that shares: model card and Hub."""

from pathlib import Path

from peft import PeftModel
from transformers.utils import logging

from trl_flow import sharing


logger = logging.get_logger(__name__)


class PublishingMixin:
    """`create_model_card` and `push_to_hub` for diffusers users, in place of those for language models."""

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Writes `README.md` for diffusers users: how to load the model, the rewards' curve, the latest pictures, the
        settings and the papers.

        Args:
            model_name (`str`, *optional*): title; default: the repository's or the folder's name.
            dataset_name (`str`, *optional*): Hub id of the prompts.
            tags (`str` or `list[str]`, *optional*): further tags.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        curves = None
        if any("reward" in entry for entry in self.state.log_history):
            from trl_flow.evaluation.plots import reward_curves  # matplotlib takes a second to import

            curves = "rewards.png"
            reward_curves(self.state.log_history, folder / curves)
        grids = sorted(folder.glob("images/*.png"), key=lambda path: path.stat().st_mtime)
        model = self.accelerator.unwrap_model(self.model)
        settings = sharing.training_settings(self.args)
        if isinstance(model, PeftModel):
            lora = model.peft_config["default"]
            settings |= {"lora_r": lora.r, "lora_alpha": lora.lora_alpha}
        sharing.create_model_card(
            folder,
            pipeline_class=type(self.pipeline),
            base_model=self.model_id,
            settings=settings,
            is_lora=isinstance(model, PeftModel),
            component=self.backbone.component,
            component_class=type(self.backbone.model).__name__,
            ddim=self.dynamics.is_ddim,
            takes_image=self.backbone.takes_image,
            repo_id=self.hub_model_id,
            model_name=model_name,
            reward_names=self.reward_func_names,
            dataset_name=dataset_name,
            tags=[tags] if isinstance(tags, str) else list(tags or []),
            curves=curves,
            samples=[(grid.relative_to(folder), None) for grid in grids[-1:]],
        )

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Saves the model, writes its card and uploads both, with curves and pictures, to `args.hub_model_id` (default:
        the name of `output_dir`).

        Args:
            commit_message (`str`): title of the commit.
            blocking (`bool`): whether to wait for the upload.
            token, revision, private: default to `hub_token`, `hub_revision` and `hub_private_repo` of the config.
            kwargs: for `create_model_card`.

        Raises:
            PushError: if the Hub refuses or can not be reached. Nothing local is lost.
        """
        if self.hub_model_id is None:
            self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return sharing.upload(
            self.args.output_dir,
            self.hub_model_id,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            blocking=blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a new checkpoint's weights in the background, as `hub_strategy` says."""
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        if any(not upload.done() for upload in self._uploads) and not self.args.hub_always_push:
            return
        checkpoint, folder = Path(checkpoint_folder), Path(self.args.output_dir)
        try:
            sharing.copy_weights(checkpoint, folder)
        except OSError as error:
            # The checkpoint itself is complete: an upload that can not be prepared is no reason to stop
            logger.warning(f"The checkpoint {checkpoint} is saved, but not uploaded: {error}")
            return
        common = {
            "token": self.args.hub_token,
            "private": self.args.hub_private_repo,
            "revision": self.args.hub_revision,
            "commit_message": f"Training in progress, step {self.state.global_step}",
            "blocking": False,
        }
        self._uploads.append(sharing.upload(folder, self.hub_model_id, **common))
        if self.args.hub_strategy in ("checkpoint", "all_checkpoints"):
            name = "last-checkpoint" if self.args.hub_strategy == "checkpoint" else checkpoint.name
            self._uploads.append(
                sharing.upload(checkpoint, self.hub_model_id, path_in_repo=name, everything=True, **common)
            )

    def _finish_current_push(self) -> None:
        """Waits for uploads in the background. A failed one has been warned of, and stops nothing."""
        for upload in self._uploads:
            upload.exception()
        self._uploads = []
