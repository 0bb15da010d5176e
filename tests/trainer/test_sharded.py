"""Two processes that shard the trained weights (FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3) train what one process does, and
save it, evaluate it and go on from it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_run
import torch
from safetensors.torch import load_file

from trl_flow.commands.recipe import ACCELERATE_CONFIGS


pytestmark = pytest.mark.slow
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason='needs pip install -e ".[deepspeed]"'
)
KINDS = ["fsdp2", *(pytest.param(kind, marks=NEEDS_DEEPSPEED) for kind in ("zero2", "zero3"))]
NAMES = ("pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors")
ROOT = Path(__file__).parents[2]


def launched(*command: str, **environment: str) -> None:
    paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-5000:]


def run_sharded(kind: str, folder: Path, *names: str, options: tuple[str, ...] = ()) -> None:
    command = ["-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE_CONFIGS / f"{kind}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", *options]
    launched(*command, sharded_run.__file__, str(folder), *names, EXPECTED=kind)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return next(load_file(folder / name) for name in NAMES if (folder / name).is_file())


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_logs_agree(actual: list[dict], expected: list[dict], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for log, other in zip(actual, expected, strict=True):
        assert log.keys() == other.keys()
        for name, value in other.items():
            is_time = any(part in name for part in ("time", "second", "runtime"))
            if isinstance(value, int | float) and not is_time and not name.startswith("clip_ratio"):
                assert log[name] == pytest.approx(value, rel=tolerance, abs=tolerance * 1e-2), name


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process makes of all scenarios."""
    folder = tmp_path_factory.mktemp("one")
    launched(sharded_run.__file__, str(folder))
    return folder


def assert_trained_alike(two: Path, one: Path, name: str) -> None:
    half = name == "bfloat16"  # other batches are rounded in other places
    of_one, of_two = weights(one / name), weights(two / name)
    moved = distance(weights(one / "begun") if False else of_one, of_two)
    print(f"{name}: {moved:.1e}")
    assert moved < (5e-3 if half else 1e-6)
    if (one / f"{name}, resumed").is_dir():
        assert distance(weights(two / f"{name}, resumed"), of_two) <= (0.0 if not half else 1e-6)
    logs = [json.loads((folder / f"{name}.json").read_text()) for folder in (two, one)]
    for actual, expected in zip(*logs, strict=True):
        assert_logs_agree(actual, expected, 0.05 if half else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(kind, one, tmp_path):
    run_sharded(kind, tmp_path)
    for name in sharded_run.SCENARIOS:
        assert_trained_alike(tmp_path, one, name)


def test_weights_that_stay_gathered_are_not_mistaken_for_their_parts(one, tmp_path):
    run_sharded("fsdp2", tmp_path, "guard", "nft", options=("--fsdp_reshard_after_forward", "false"))
    for name in ("guard", "nft"):
        assert_trained_alike(tmp_path, one, name)
