"""Two processes that shard the trained weights (FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3) train what one process does, and
save it, evaluate it and go on from it."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
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
    is_half = name == "bfloat16"  # a smaller batch is rounded in other places
    of_two = weights(two / name)
    assert distance(of_two, weights(one / name)) < (5e-3 if is_half else 1e-5)
    if (one / f"{name}, resumed").is_dir():
        assert distance(of_two, weights(two / f"{name}, resumed")) == 0.0
    logs = [json.loads((folder / f"{name}.json").read_text()) for folder in (two, one)]
    if is_half:  # sampling and training round alike
        assert [logs[0][0][update]["ratio/std"] for update in (0, 2)] == [0.0, 0.0]
        return
    for actual, expected in zip(*logs, strict=True):
        assert_logs_agree(actual, expected, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(kind, one, tmp_path):
    run_sharded(kind, tmp_path)
    for name in sharded_run.SCENARIOS:
        if (name, kind) != ("compiled", "zero3"):
            assert_trained_alike(tmp_path, one, name)
    said = (tmp_path / "refused-0.txt").read_text()
    assert ("diagnostics_steps" in said) == (kind != "zero2") and ("torch_compile" in said) == (kind == "zero3")
    assert said.count("--accelerate_config multi_gpu") == {"fsdp2": 1, "zero2": 0, "zero3": 2}[kind]


def test_weights_that_stay_gathered_are_not_mistaken_for_their_parts(one, tmp_path):
    run_sharded("fsdp2", tmp_path, "guard", "nft", options=("--fsdp_reshard_after_forward", "false"))
    for name in ("guard", "nft"):
        assert_trained_alike(tmp_path, one, name)


@pytest.fixture(scope="module")
def trained_by_command(tiny_sd3_path, tmp_path_factory):
    """What `trl-flow train` makes of the tiny pipeline with further options."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\na bird\nthree red fish\n")
    recipe = f"""
        model_name_or_path: {tiny_sd3_path}
        dataset_name: {folder / "prompts.txt"}
        reward_funcs: [jpeg_compressibility]
        method: guard
        use_cpu: true
        use_peft: true
        lora_r: 4
        num_generations: 4
        num_inference_steps: 4
        height: 16
        width: 16
        max_sequence_length: 16
        learning_rate: 1.0e-3
        adam_epsilon: 1.0e-6
        max_steps: 2
        report_to: none
        gradient_checkpointing: false
    """
    (folder / "recipe.yaml").write_text(textwrap.dedent(recipe))

    def run(name: str, *options: str) -> dict[str, torch.Tensor]:
        command = ["-m", "trl_flow", "train", "--config", str(folder / "recipe.yaml")]
        launched(*command, "--output_dir", str(folder / name), *options)
        return weights(folder / name)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_shards_on_cpus(kind, trained_by_command):
    expected = trained_by_command("one", "--per_device_train_batch_size", "8")
    options = ["--accelerate_config", kind, "--main_process_port", "0", "--per_device_train_batch_size", "4"]
    actual = trained_by_command(kind, *options)
    assert distance(actual, expected) < 1e-6
    assert max(weight.abs().max().item() for name, weight in actual.items() if "lora_B" in name) > 1e-4
