"""[`RunFolder`]: an output folder belongs to one run. What another one left there is moved, never written over."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from trl_flow.evaluation.outputs import half_written, locked
from trl_flow.evaluation.run_log import LOG_NAME, PROGRESS_NAME
from trl_flow.sharing import weight_files
from trl_flow.trainer.checkpoints import STATE_FILE, complete_checkpoints, missing_in, step_of
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.over_optimization import BEST_FOLDER


logger = logging.get_logger(__name__)

PREVIOUS = "previous"
# What a run writes besides checkpoints and weights
_OF_A_RUN = (
    *("README.md", "rewards.png", "training_args.json", STATE_FILE, LOG_NAME, "diagnostics.md"),
    PROGRESS_NAME,
    *("images", "plots", BEST_FOLDER),
)


class RunFolder:
    """`output_dir` of one trainer. All methods but `locked` are for the process that writes."""

    def __init__(self, args: FlowRLConfig):
        self.path, self._writes = Path(args.output_dir), args.should_save
        self._is_own = False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training into it; `ValueError` if one does."""
        with locked(self.path, "training into") if self._writes else contextlib.nullcontext():
            yield

    def begin(self, checkpoint: str | None) -> None:
        """Before a run. Unless it goes on from a `checkpoint` in this folder, what another run left here, be it of the
        same trainer, is moved to `previous-1` (or -2 ...); if it does, checkpoints of later updates are. Both are
        warned of."""
        goes_on = checkpoint is not None and Path(checkpoint).parent.resolve() == self.path.resolve()
        if goes_on and self._writes:
            self._move_later_than(checkpoint)
            (self.path / STATE_FILE).unlink(missing_ok=True)  # it stands for a run that has ended
        elif self._writes:
            self._move_another_run()
        if self._writes:
            # Not in other folders, where another process may be writing
            for folder in (self.path, self.path / BEST_FOLDER, *self.path.glob("checkpoint-*")):
                for left in half_written(folder):
                    left.unlink()
        self._is_own = True

    def claim(self) -> None:
        """Before a model or a card is written outside of training: as for a run, unless one of this trainer's has
        been here."""
        if not self._is_own:
            self.begin(None)

    def _move_another_run(self) -> None:
        weights = weight_files(self.path)
        checkpoints = [path for path in self.path.glob("checkpoint-*") if path.is_dir()]
        log = self.path / LOG_NAME
        has_log = log.is_file() and log.stat().st_size > 0
        if not (has_log or checkpoints or any(path.suffix == ".safetensors" for path in weights)):
            return
        to = move_aside(self.path, [*_OF_A_RUN, *(path.name for path in [*weights, *checkpoints])])
        last = list(complete_checkpoints(to).values())[-1:]
        go_on = f" To resume it: resume_from_checkpoint={str(last[0])!r}." if last else ""
        logger.warning(f"{self.path} held another run, which is moved to {to}: a new run starts.{go_on}")

    def _move_later_than(self, checkpoint: str) -> None:
        steps = {path: path.name.rsplit("-", 1)[1] for path in self.path.glob("checkpoint-*")}
        later = [path for path, step in steps.items() if step.isdecimal() and int(step) > step_of(checkpoint)]
        # One whose writing was interrupted is written over
        if later := sorted(path.name for path in later if missing_in(path, 0) is None):
            to = move_aside(self.path, later)
            what = f"Later checkpoints than {checkpoint}, from which this run resumes, are moved to {to}"
            logger.warning(f"{what}: {', '.join(later)}.")


def is_aside(path: Path) -> bool:
    """Whether `move_aside` has made this folder."""
    return path.name.removeprefix(f"{PREVIOUS}-").isdecimal()


def move_aside(folder: Path, names: list[str]) -> Path:
    """Moves what there is of `names` in `folder` to a new folder in it, which is returned."""
    number = 1
    while (to := folder / f"{PREVIOUS}-{number}").exists():
        number += 1
    to.mkdir()
    for name in dict.fromkeys(names):
        if (folder / name).exists():
            (folder / name).rename(to / name)
    return to
