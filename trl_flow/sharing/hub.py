"""The upload of a training run's folder to the Hugging Face Hub."""

import os

from huggingface_hub import CommitInfo, HfApi


# What a run's folder shares. A list of what may leave, not of what may not: the user may keep other files there, which
# are private. A "*" matches "/" too, so images and curves in subfolders are included.
PUBLISHED = [
    *("README.md", "config.json", "results.json", "*.png", "*.jpg", "*events.out.tfevents.*"),
    *("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"),
    *("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
]

NOT_PUBLISHED = ["_*", "*/_*", "checkpoint-*", ".*", "*/.*"]  # the optimizer's state, and files being written


class PushError(RuntimeError):
    """An upload to the Hub that did not succeed. Nothing is lost: the message names the local folder."""


def upload(
    folder: str | os.PathLike, repo_id: str, *, token: str | None = None, private: bool | None = None,
    revision: str | None = None, commit_message: str = "End of training", path_in_repo: str | None = None,
    everything: bool = False,
) -> CommitInfo:  # fmt: skip
    """
    Uploads weights, model card, curves and sample images of `folder` in one commit; makes the repository if need be.

    Args:
        folder (`str` or `os.PathLike`): a training run's output folder, or one of its checkpoints.
        repo_id (`str`): `owner/name`, or `name` in the token's own account.
        token (`str`, *optional*): a token that may write; by default the one of `hf auth login` or `HF_TOKEN`.
        private (`bool`, *optional*): whether a repository made here is private. By default the account's setting.
        revision, commit_message, path_in_repo (`str`, *optional*): branch, the commit's title, and subfolder.
        everything (`bool`): upload every file, as for a checkpoint, not only those that `PUBLISHED` names.

    Raises:
        PushError: if the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token, library_name="trl_flow")
    patterns = {} if everything else {"allow_patterns": PUBLISHED, "ignore_patterns": NOT_PUBLISHED}
    where = {"path_in_repo": path_in_repo, "revision": revision, "commit_message": commit_message}
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **where, **patterns)
    except Exception as error:  # whatever the reason, the user has to know that the run is not lost
        raise PushError(
            f"{folder} could not be pushed to {api.endpoint}/{repo_id}: {error}\nNothing is lost: every file is still "
            f"in {folder}. Check the repository's name and that the token may write to it (`hf auth whoami`), then "
            f"push again with `trainer.push_to_hub()` or `hf upload {repo_id} {folder}`."
        ) from error
