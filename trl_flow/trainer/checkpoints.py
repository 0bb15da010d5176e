"""Checkpoints on disk: which one a run goes on from, whether it is whole, and how one is written."""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from trl_flow.sharing.weights import LORA_WEIGHT_NAME, weight_files
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.run_state import STATE_NAME, TENSORS_NAME


logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"
# For a scheduler, which starts a run and goes on with it by one command
AUTO = "auto"


class RunIsCompleteError(ValueError):
    """There is nothing to go on with: the last update is made, and the result is written."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint that could not be written: it is removed, and earlier ones are untouched."""


def missing_in(checkpoint: str | os.PathLike, rank: int) -> str | None:
    """Why process `rank` cannot go on from a checkpoint, in words, `None` if it can. All that resuming reads is looked
    at: that it is there, and not cut off."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "it is not a folder"
    for path in folder.iterdir():
        if path.is_file() and not _is_whole(path):
            return f"{path.name} is damaged or cut off"
    names = {path.name for path in folder.iterdir()}
    if wanted := {STATE_FILE, STATE_NAME, TENSORS_NAME} - names:
        return f"{min(wanted)} is missing"
    state = json.loads((folder / STATE_NAME).read_text())
    is_sharded = any(name.startswith(("global_step", "pytorch_model_fsdp")) for name in names)
    # The file for diffusers is not read: it may hold an average
    weights = {path.name for path in weight_files(folder)} - {LORA_WEIGHT_NAME}
    if not is_sharded and not any(name.endswith(".safetensors") for name in weights):
        return "the weights are missing"
    for index in (name for name in weights if name.endswith(".index.json")):
        if missing := set(json.loads((folder / index).read_text())["weight_map"].values()) - weights:
            return f"{min(missing)} is missing"
    if not any(name.startswith(("optimizer", "global_step")) for name in names):
        return (
            "it holds the model alone (save_only_model=True), not the optimizer's state, which resuming needs. "
            "Train without save_only_model, or begin a new run from these weights (of an adapter: init_adapter)"
        )
    wanted = set() if "latest" in names else {"scheduler.pt"}  # DeepSpeed may hold it in a file of its own
    saved_by = state["settings"]["num_processes"]
    if rank < saved_by:
        wanted.add("rng_state.pth" if saved_by == 1 else f"rng_state_{rank}.pth")
        if state["update"] > 0:
            wanted |= {f"rollouts-{rank}.safetensors", f"rollouts-{rank}.json", f"sampling_weights-{rank}.safetensors"}
    return f"{min(wanted - names)} is missing" if wanted - names else None


def _is_whole(path: Path) -> bool:
    """Whether a file ends where its format says that it does."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def step_of(checkpoint: str | os.PathLike) -> int:
    return json.loads(Path(checkpoint, STATE_FILE).read_text())["global_step"]


def complete_checkpoints(output_dir: str | os.PathLike, rank: int = 0) -> dict[int, Path]:
    """Those in `output_dir` that process `rank` can go on from, by their steps, in order. Others are warned of."""
    named = [(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), path) for path in Path(output_dir).glob("*")]
    found = {}
    for step, path in sorted((int(step), path) for step, path in named if step.isdecimal() and path.name != step):
        if (why := missing_in(path, rank)) is None:
            found[step] = path
        else:
            logger.warning(f"{path} is passed over: {why}.")
    return found


def checkpoint_to_resume(given: str | os.PathLike | bool | None, args: FlowRLConfig) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint=given)` means; `ValueError` without one to go on from, but for
    `"auto"`, which then means a new run, and `RunIsCompleteError` if the run has come to its end. To be called on all
    processes, which agree on one."""
    if not given:
        return None
    if given == AUTO:
        end = _end(Path(args.output_dir))
        stopped, wanted = max(gather_object([(end.get("global_step", 0), end.get("max_steps", 0))]))
        if stopped < wanted:
            raise RunIsCompleteError(
                f"The run in {args.output_dir!r} was stopped by a callback at update {stopped} of {wanted}: it is "
                "complete. To go on all the same, resume with True."
            )
    if given is True or given == AUTO:
        found = complete_checkpoints(args.output_dir, args.process_index)
        everywhere = set.intersection(*map(set, gather_object([list(found)])))
        if not everywhere and given == AUTO:
            return None
        if not everywhere:
            raise ValueError(
                f"resume_from_checkpoint=True, but {args.output_dir!r} has no complete checkpoint. Train from the "
                "start (resume_from_checkpoint=None)."
            )
        checkpoint = str(found[max(everywhere)])
    else:
        checkpoint = os.fspath(given)
        if (why := missing_in(checkpoint, args.process_index)) is not None:
            what = (
                f"is not a complete checkpoint of this trainer: {why}. Pass True to resume from the last complete one"
            )
            raise ValueError(f"{checkpoint!r} {what} in output_dir.")
    step, end = step_of(checkpoint), _end(Path(checkpoint).parent)
    limit = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    has_ended = end.get("global_step") == step
    has_ended &= step == args.max_steps or (args.max_steps <= 0 and args.num_train_epochs <= end.get("epoch", 0))
    if 0 < args.max_steps < step or has_ended:
        ended = f"{limit} is {getattr(args, limit)}: the run is complete. Raise {limit} to continue it."
        raise RunIsCompleteError(f"{checkpoint!r} is at update {step}, and {ended}")
    return checkpoint


def _end(output_dir: Path) -> dict[str, Any]:
    """The state of a run that has written all that it leaves, of which this file is the last; empty if none has."""
    path = output_dir / STATE_FILE
    return json.loads(path.read_text()) if path.is_file() and _is_whole(path) else {}


@contextlib.contextmanager
def writing_checkpoint(folder: Path, args: FlowRLConfig, resume_hint: str) -> Iterator[None]:
    """Around the writing of a checkpoint, on all processes: a failed one is removed, and a `CheckpointWriteError`
    raised, which says how to resume."""
    is_main = args.process_index == 0
    try:
        # A folder left by a process that was killed while writing it would mix with this one
        if is_main and folder.exists():
            shutil.rmtree(folder)
        args.distributed_state.wait_for_everyone()
        yield
    except Exception as error:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(Path(args.output_dir)).free / 2**20
        raise CheckpointWriteError(
            f"The checkpoint {folder} could not be written ({type(error).__name__}: {error}); {free:.0f} MiB are free "
            f"there. It is removed, and earlier checkpoints are untouched. Make room and resume with {resume_hint}."
        ) from error
