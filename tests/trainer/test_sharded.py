"""Two processes that shard the trained weights (FSDP2) train what one process does: the ratio's probe and the old
policy, which put other weights in place of the trained ones, included."""

import os
import subprocess
import sys

import pytest
import sharded_run
import torch
from safetensors.torch import load_file


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
NAME = "pytorch_lora_weights.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "reshard"), [("guard", "true"), ("guard", "false"), ("nft", "true"), ("nft", "false"), ("awm", "true")]
)
def test_sharded_weights_are_trained_as_whole_ones_are(method, reshard, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        sharded_run.__file__,
        str(tmp_path / "two"),
        method,
    ]
    environment = os.environ | FSDP2 | {"OMP_NUM_THREADS": "1", "FSDP_RESHARD_AFTER_FORWARD": reshard}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-5000:]
    logs = sharded_run.run(str(tmp_path / "one"), method)
    shown = {"guard": "ratio/probe_scale", "nft": "old/decay", "awm": "old/decay"}[method]
    assert any(shown in log for log in logs)
    for folder in (".", "resumed"):
        two, one = (load_file(tmp_path / processes / folder / NAME) for processes in ("two", "one"))
        # Adam makes a whole step of a gradient that is 0 but for rounding
        assert one.keys() == two.keys()
        different = torch.cat([((two[name] - weights).abs() > 1e-5).flatten() for name, weights in one.items()])
        assert different.float().mean() < 0.01
        assert max(weights.abs().max().item() for name, weights in one.items() if "lora_B" in name) > 1e-3
