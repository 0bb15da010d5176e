"""Two processes and one with the same global batch draw, score and train the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_run
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import assert_equal, distance, tiny_trainer, trained_weights


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder that two processes have written into."""
    folder = tmp_path_factory.mktemp("two")
    alone = tiny_trainer(folder / "alone", per_device_train_batch_size=4, **distributed_run.RESUMED)
    start = trained_weights(alone)
    alone.train()
    save_file(trained_weights(alone), folder / "alone.safetensors")
    save_file(start, folder / "start.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [distributed_run.__file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[:5000]
    return folder


def records(two: Path, name: str) -> list[dict]:
    return [json.loads((two / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of a scenario, once for each."""
    folder = tmp_path_factory.mktemp("one")
    results = {}

    def of(name: str):
        if name not in results:
            results[name] = distributed_run.run(str(folder), name)
        return results[name]

    return of


@pytest.mark.parametrize("name", distributed_run.SCENARIOS)
def test_two_processes_draw_and_score_what_one_does(name, two, one):
    _, expected = one(name)
    ranks = records(two, name)
    for call, (expected_prompts, expected_rewards, _) in enumerate(expected["drawn"]):
        drawn_prompts, rewards = (sum((rank["drawn"][call][i] for rank in ranks), []) for i in (0, 1))
        # In an evaluation of an odd number of images the second process draws one of them twice, and scores it once
        assert drawn_prompts == expected_prompts
        torch.testing.assert_close(rewards, expected_rewards, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", distributed_run.SCENARIOS)
def test_two_processes_train_what_one_does(name, two, one, tmp_path):
    expected, _ = one(name)
    first, second = (load_file(two / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert_equal(first, second)
    start = trained_weights(tiny_trainer(tmp_path, **distributed_run.beginning(str(tmp_path), name)))
    moved = distance(expected, start)
    assert moved > 1e-4
    # A pixel that falls on the other side of 1/2 changes a reward by 1e-3 of the rewards' spread
    assert distance(first, expected) < 5e-3 * moved


@pytest.mark.parametrize("name", distributed_run.SCENARIOS)
def test_two_processes_log_what_one_does(name, two, one):
    _, expected = one(name)
    logged = records(two, name)[0]["log_history"]
    assert len(logged) == len(expected["log_history"])
    for logs, expected_logs in zip(logged, expected["log_history"], strict=True):
        timed = ("time", "per_second", "memory", "flos")
        names = {key for key in expected_logs if not any(part in key for part in timed)}
        assert names == {key for key in logs if not any(part in key for part in timed)}
        for key in {key for key in names if "histogram" in key}:
            # All images once; one near an edge of its bin may fall into the next
            moved = sum(abs(a - b) for a, b in zip(logs[key], expected_logs[key], strict=True))
            assert sum(logs[key]) == sum(expected_logs[key]) and moved <= 2
        for key in {key for key in names if "histogram" not in key} - {"grad_norm", "loss", "train_loss"}:
            assert logs[key] == pytest.approx(expected_logs[key], rel=2e-2, abs=1e-5), key
        if "grad_norm" in names:
            assert logs["grad_norm"] == pytest.approx(expected_logs["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("name", distributed_run.RESAMPLED)
def test_two_processes_replace_the_groups_that_one_does(name, two, tmp_path):
    expected, expected_logs = distributed_run.resampled(str(tmp_path), name)
    first, second = (load_file(two / f"resampled {name}-{rank}.safetensors") for rank in (0, 1))
    assert_equal(first, second)
    moved = distance(expected, trained_weights(tiny_trainer(tmp_path / "start")))
    assert moved > 1e-4 and distance(first, expected) < 5e-3 * moved
    keys = [f"dynamic_sample/{key}" for key in ("times", "groups", "frac_zero_std")]
    logs, expected = ([[log[k] for k in keys] for log in each if keys[0] in log]
                      for each in (records(two, f"resampled {name}")[0], expected_logs))  # fmt: skip
    assert logs == expected and len(logs) == 3 and sum(groups for _, groups, _ in logs) > 2


def test_an_error_in_one_process_ends_both(two):
    first, second = (json.loads((two / f"report-{rank}.json").read_text())["error"] for rank in (0, 1))
    assert "'picky' raised OSError: the scorer is gone" in second
    assert first == f"On another process: {second}"


def test_a_reward_that_compares_gets_whole_groups_or_is_refused(two):
    for rank in (0, 1):
        message, images = json.loads((two / f"report-{rank}.json").read_text())["cut"]
        assert "'win_rate' compares the images of a group" in message and "num_generations=4" in message
        assert images == 12  # of the remedy


def test_overlapped_rewards_are_those_of_the_serial_order_in_both_processes(two):
    # that the weights are equal, they have checked themselves
    for rank in (0, 1):
        in_main = json.loads((two / f"report-{rank}.json").read_text())["overlapped"]
        # two phases of two groups, the first of them without a thread
        assert in_main == [True, True, False, False]


def test_after_a_failure_in_one_process_both_go_on_from_the_checkpoint(two):
    # that this is exact, they have checked themselves
    first, second = (json.loads((two / f"report-{rank}.json").read_text())["failure"] for rank in (0, 1))
    assert "'Failing' raised ConnectionError: the server is gone" in second
    assert first == f"On another process: {second}"
    assert "after update 2" in first and "checkpoint-2" in first


def test_a_reward_that_applies_in_one_process_is_averaged_over_its_own_samples(two):
    logs = json.loads((two / "report-0.json").read_text())["only"][0]
    assert logs["scored"] == 2.0
    assert 0.4 < logs["rewards/partial/mean"] < 0.6
    # half of the samples have twice the reward
    assert logs["reward"] == pytest.approx(
        logs["rewards/brightness/mean"] + logs["rewards/partial/mean"] / 2, rel=1e-4
    )


def test_gradients_are_reduced_with_the_last_step_of_an_update_only(two):
    # two micro-batches of three trained steps each
    assert json.loads((two / "report-0.json").read_text())["reductions"] == [False] * 5 + [True]


def test_the_middle_of_a_phase_is_resumed_by_as_many_processes_only_its_end_by_any_number(two, tmp_path):
    # that two can do both, they have checked themselves
    folder = two / "resume"
    assert len(list((folder / "checkpoint-1").glob("rollouts-*.safetensors"))) == 2
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=4, **distributed_run.RESUMED)
    start = trained_weights(trainer)
    with pytest.raises(ValueError, match="num_processes=2.*num_processes=1.*in the middle of a generation batch"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    expected = load_file(folder / "resumed-0.safetensors")
    average = {name: expected.pop(name) for name in list(expected) if name.startswith("average.")}
    moved = distance(expected, start)
    assert moved > 1e-3
    assert distance(trained_weights(trainer), expected) < 5e-3 * moved
    for i, value in enumerate(trainer.policy.ema.shadow_params):
        torch.testing.assert_close(value, average[f"average.{i}"], rtol=0, atol=5e-3 * moved)
    # and with the same power, which has moved
    power = json.loads((two / "report-0.json").read_text())["power"]
    own = [log["advantage_power"] for log in trainer.state.log_history if "advantage_power" in log]
    assert own == pytest.approx(power, abs=1e-3) and max(power) > 0


def test_two_processes_go_on_from_the_end_of_a_phase_of_one(two):
    # that they refuse its middle, they have checked themselves
    expected, start = load_file(two / "alone.safetensors"), load_file(two / "start.safetensors")
    moved = distance(expected, start)
    for rank in (0, 1):
        assert distance(load_file(two / "resume" / f"of-one-{rank}.safetensors"), expected) < 5e-3 * moved


def test_both_processes_stop_and_save_at_once_when_one_sees_the_gold_score_fall(two):
    first, second = (json.loads((two / f"report-{rank}.json").read_text())["stop"] for rank in (0, 1))
    assert first == second == [1, 3]
    assert json.loads((two / "stop" / "best_gold" / "scores.json").read_text())["step"] == 1
