"""What of a training run is shared on the Hugging Face Hub, and its upload."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import CommitInfo, HfApi

from trl_flow.sharing.weights import weight_files


CARD = "README.md"
# Begins with an underscore, as all that is being written: no upload takes it
_SNAPSHOT = "_uploading-"
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+\.(?:png|jpe?g|webp|gif))\)", re.IGNORECASE)


class PushError(RuntimeError):
    """An upload to the Hub that did not succeed. Nothing is lost: the message names the local folder.

    Example:

    ```pycon
    >>> from trl_flow.sharing import PushError, upload
    >>> try:
    ...     upload("run", "someone-else/my-model")
    ... except PushError:
    ...     print("not uploaded")
    ...
    not uploaded
    ```
    """


def published(folder: str | os.PathLike, include: Sequence[str] = ()) -> list[Path]:
    """What of a run's folder is shared, relative to it: the card and the images inside the folder that it shows, and
    what `include` (patterns such as `"images/*.png"`) asks for. Weights are `weight_files`. The folder holds more than
    may leave it: prompts, logs, optimizer states, and whatever else the user keeps there."""
    folder = Path(folder)
    card = folder / CARD
    # In code stands a prompt, which may look like a link
    text = _CODE.sub("", card.read_text(encoding="utf-8")) if card.is_file() else ""
    shown = _LINK.findall(text)
    found = [card, *(folder / unquote(link) for link in shown)]
    found += [path for pattern in include for path in folder.glob(pattern)]
    inside = [path for path in found if path.is_file() and path.resolve().is_relative_to(folder.resolve())]
    return list(dict.fromkeys(path.relative_to(folder) for path in inside))


def uploaded_files(
    folder: str | os.PathLike, *, include: Sequence[str] = (), weights_from: str | os.PathLike | None = None
) -> dict[Path, Path]:
    """What an upload of a run's `folder` sends, by its name in the repository: the card and the images that it shows,
    the weights, and what `include` asks for. Arguments are as for [`prepare_upload`]. Nothing is sent.

    Example:

    ```pycon
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_full, uploaded_files
    >>> save_full(load_pipeline().transformer, "run")
    >>> sorted(str(name) for name in uploaded_files("run"))
    ['config.json', 'diffusion_pytorch_model.safetensors']
    ```
    """
    folder = Path(folder)
    files = {name: folder / name for name in published(folder, include)}
    return files | {Path(path.name): path for path in weight_files(weights_from or folder)}


def upload(folder: str | os.PathLike, repo_id: str, **options) -> CommitInfo:
    """[`prepare_upload`], and the upload at once.

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_full, upload
    >>> save_full(load_pipeline().transformer, "run")
    >>> _ = Path("run", "README.md").write_text("# My model")
    >>> commit = upload("run", "my-model", private=True, commit_message="First run")
    >>> commit.commit_message
    'First run'
    ```
    """
    return prepare_upload(folder, repo_id, **options)()


def prepare_upload(
    folder: str | os.PathLike, repo_id: str, *, token: str | None = None, private: bool | None = None,
    revision: str | None = None, commit_message: str = "End of training", include: Sequence[str] = (),
    weights_from: str | os.PathLike | None = None, checkpoint_as: str | None = None,
) -> Callable[[], CommitInfo]:  # fmt: skip
    """
    Takes a snapshot of what is shared of `folder`: its weights, its card, and the images that the card shows. What is
    returned uploads it in one commit, and may do so in another thread while the folder changes.

    Args:
        folder (`str` or `os.PathLike`): a training run's output folder.
        repo_id (`str`): `owner/name`, or `name` in the token's own account. Made if need be.
        token (`str`, *optional*): a token that may write; by default the one of `hf auth login` or `HF_TOKEN`.
        private (`bool`, *optional*): whether a repository made here is private. By default the account's setting.
        revision (`str`, *optional*): branch, made if need be.
        commit_message (`str`): the commit's title.
        weights_from (`str` or `os.PathLike`, *optional*): a checkpoint, whose weights are uploaded in place of the
            folder's own.
        include (`Sequence[str]`): patterns of further files, such as `"images/*.png"`.
        checkpoint_as (`str`, *optional*): `folder` is a checkpoint, all of which is uploaded into this subfolder.

    Raises:
        FileNotFoundError: if `weights_from` holds no weights. What is returned raises `PushError` if the Hub refuses
            or cannot be reached.

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_full, prepare_upload
    >>> save_full(load_pipeline().transformer, "run")
    >>> _ = Path("run", "README.md").write_text("# My model")
    >>> send = prepare_upload("run", "my-model")  # checks, and copies what will be sent
    >>> commit = send()  # may run in a thread while training continues
    >>> commit.commit_message
    'End of training'
    ```
    """
    folder = Path(folder)
    if checkpoint_as is not None:
        files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
        stale, beside = "*", folder.parent  # the checkpoint itself may be removed before it is uploaded
    else:
        files = uploaded_files(folder, include=include, weights_from=weights_from)
        stale, beside = "images/*", folder  # samples of earlier cards
    if weights_from is not None and not any(path.suffix == ".safetensors" for path in files.values()):
        raise FileNotFoundError(f"{weights_from} holds no weights.")
    snapshot = tempfile.mkdtemp(prefix=_SNAPSHOT, dir=beside if os.access(beside, os.W_OK) else None)
    try:
        for name, path in files.items():
            Path(snapshot, name).parent.mkdir(parents=True, exist_ok=True)
            # Weights and checkpoints are replaced, never written over: a link to them stays what it is
            is_fixed = checkpoint_as is not None or path.suffix == ".safetensors"
            (_link if is_fixed else shutil.copy)(path, Path(snapshot, name))
    except OSError:
        shutil.rmtree(snapshot, ignore_errors=True)
        raise

    def send() -> CommitInfo:
        api = HfApi(token=token, library_name="trl_flow")
        where = {"path_in_repo": checkpoint_as, "revision": revision, "commit_message": commit_message}
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(repo_id=repo.repo_id, folder_path=snapshot, delete_patterns=stale, **where)
        except Exception as error:  # whatever the reason, the user has to know that the run is not lost
            raise PushError(
                f"{folder} could not be pushed to {api.endpoint}/{repo_id}: {error}\nNothing is lost: every file is "
                f"still in {folder}. Check the repository's name and that the token may write to it (`hf auth "
                f"whoami`), then push again with `trainer.push_to_hub()`, or, without the trainer, "
                f"`trl_flow.sharing.upload({str(folder)!r}, {repo_id!r})`."
            ) from error
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    return send


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # not all file systems have links
        shutil.copy(path, target)
