"""The trainer's methods that share, on its publisher."""

from functools import cached_property
from pathlib import Path

from trl_flow.trainer.publisher import Publisher


class PublishingMixin:
    @cached_property
    def publisher(self) -> Publisher:
        return Publisher(self.args, self.backbone, self.model_id, self.reward_func_names)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        if self.is_world_process_zero():
            model, logs = self.accelerator.unwrap_model(self.model), self.state.log_history
            names = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
            self.publisher.write_card(model, logs, self.hub_model_id, **names)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        self.hub_model_id = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if self.is_world_process_zero():
            options = {"blocking": blocking, "token": token, "revision": revision, "private": private}
            return self.publisher.push(self.hub_model_id, commit_message=commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.publisher.push_checkpoint(checkpoint_folder, self.hub_model_id, self.state.global_step)

    def _finish_current_push(self) -> None:
        self.publisher.wait()
