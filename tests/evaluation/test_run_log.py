"""Logs are found where a run leaves them, and what they say of each step is what a pooled sample would say."""

import json

import numpy as np
import pytest

from trl_flow.evaluation.run_log import diagnostics_table, read_log_history, step_histograms, step_statistics


def log(step: int) -> list[dict]:
    return [{"step": step}]


def write_state(folder, step: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log(step)}))


def test_the_freshest_log_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="nothing has been logged"):
        read_log_history(tmp_path)
    for step in (90, 100):
        write_state(tmp_path / f"checkpoint-{step}", step)
        (tmp_path / "checkpoint-200").mkdir(exist_ok=True)  # is being written
        (tmp_path / "checkpoint-best").mkdir(exist_ok=True)
        assert read_log_history(tmp_path) == log(step)
    assert read_log_history(tmp_path / "checkpoint-90") == log(90)
    write_state(tmp_path, 110)
    assert read_log_history(str(tmp_path)) == log(110)
    (tmp_path / "log_history.jsonl").write_text('{"step": 119}\n{"step": 120}\n{"st')  # a line is being written
    assert read_log_history(tmp_path) == log(119) + log(120)
    assert read_log_history(tmp_path / "trainer_state.json") == log(110)
    assert read_log_history(log(7)) == log(7)


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}"])
def test_a_file_that_is_no_log_is_refused(content, tmp_path):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a log of a training run"):
        read_log_history(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_log_history(tmp_path / "absent.json")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00bad\n", b"[1, 2]\n", b"null\n", b'{"reward_std": 1.0}\n'])
def test_lines_that_are_no_logs_are_refused(content, tmp_path):
    (tmp_path / "log_history.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="is not a log of a training run"):
        read_log_history(tmp_path)


def test_less_than_one_log_is_refused():
    with pytest.raises(ValueError, match="last is 0"):
        step_statistics([{"step": 1, "ratio/mean_step_0": 1.0}], last=0)


def test_several_logs_are_pooled():
    """Mean and spread over all samples of two logs are those of the samples put together."""
    rng = np.random.default_rng(0)
    samples = 1 + 1e-4 * rng.standard_normal((2, 50)) + [[1e-4], [-3e-4]]
    history = [
        {"step": i, "ratio/mean_step_3": part.mean(), "ratio/std_step_3": part.std()} for i, part in enumerate(samples)
    ]
    (row,) = step_statistics(history)
    assert row.step == 3
    assert row.ratio_mean - 1 == pytest.approx(samples.mean() - 1, rel=1e-9)
    assert row.ratio_std == pytest.approx(samples.std(), rel=1e-9)
    assert row.grad_norm is row.clip_low is None


def test_the_table_by_hand():
    history = [
        {"step": 1, "ratio/mean_step_10": 0.999, "ratio/std_step_10": 0.002, "clip_ratio/low_step_10": 0.25},
        {"step": 1, "eval_reward": 1.0},
        {"step": 2, "clip_ratio/low_step_10": 0.75, "clip_ratio/high_step_10": 0.0, "grad_norm/step_9": 0.123456},
    ]
    lines = diagnostics_table(history).splitlines()
    assert lines[0] == "Means over the 2 latest logs, of updates up to 2. Step 0 is the noisiest."
    assert lines[4] == "| 9 | - | - | - | - | 0.123 |"
    assert lines[5] == "| 10 | -1.00e-03 | 2.00e-03 | 50.0% | 0.0% | - |"
    assert len(lines) == 6
    assert "diagnostics_steps=1" in diagnostics_table(history[:1])
    assert diagnostics_table([{"step": 1, "loss": 0.0}]) is None
    assert diagnostics_table([]) is None


def test_the_table_is_of_the_latest_logs():
    history = [{"step": i, "grad_norm/step_0": float(i >= 50)} for i in range(100)]
    assert diagnostics_table(history).splitlines()[-1] == "| 0 | - | - | - | - | 1 |"


def test_histograms_of_several_logs_are_added_up():
    history = [
        {"step": 1, "ratio/histogram_step_10": [1, 0, 2], "ratio/histogram_step_2": [0, 3, 0]},
        {"step": 2, "loss": 0.5},
        {"step": 3, "ratio/histogram_step_10": [4, 4, 0]},
    ]
    assert list(step_histograms(history).items()) == [(2, [0, 3, 0]), (10, [5, 4, 2])]
    assert step_histograms(history, last=1) == {10: [4, 4, 0]}
    assert step_histograms(history[1:2]) == {}
    with pytest.raises(ValueError, match="last is 0"):
        step_histograms(history, last=0)
