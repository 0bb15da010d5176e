"""The log that is written as training goes on is the trainer's own, whatever happens in between."""

import json

import pytest
from tiny_training import prompts, tiny_trainer, warnings_of
from transformers import TrainerCallback

from trl_flow.evaluation.plots import all_plots
from trl_flow.evaluation.run_log import diagnostics_table, read_log_history
from trl_flow.functional.grpo import RATIO_BIN_EDGES


FIELDS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "diagnostics_steps": 1}


def test_the_file_is_the_log(tmp_path):
    seen = []

    class Read(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(len(read_log_history(tmp_path)))

    trainer = tiny_trainer(tmp_path, callbacks=[Read()], eval_dataset=prompts(2), **FIELDS)
    trainer.train()
    trainer.evaluate()
    assert read_log_history(tmp_path) == trainer.state.log_history
    assert seen == [0, 1, 2]  # while it ran
    assert (tmp_path / "diagnostics.md").read_text() == diagnostics_table(trainer.state.log_history)


def test_a_resumed_run_leaves_out_what_it_does_anew(tmp_path):
    tiny_trainer(tmp_path, **FIELDS).train()
    rest = tiny_trainer(tmp_path, **FIELDS)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    logs = read_log_history(tmp_path)
    assert logs == rest.state.log_history
    assert [entry["step"] for entry in logs] == [1, 2, 3, 3]
    # and a run that begins anew leaves out everything
    tiny_trainer(tmp_path, **FIELDS | {"max_steps": 1}).train()
    assert [entry["step"] for entry in read_log_history(tmp_path)] == [1, 1]


def test_histograms_are_in_the_runs_own_log_and_go_to_no_tracker(tmp_path):
    tracked = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            tracked.append(dict(logs))

    fields = FIELDS | {"max_steps": 4, "learning_rate": 0.1, "epsilon": 1e-3}
    tiny_trainer(tmp_path, callbacks=[Tracker()], **fields).train()
    logs = read_log_history(tmp_path)
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert saved == logs[:4]
    assert all(isinstance(value, int | float | None) for log in tracked for value in log.values())
    # The second update of each phase; each has eight images, whose shares outside are those of the metrics
    low, high = RATIO_BIN_EDGES.index(-1.0), RATIO_BIN_EDGES.index(1.0)
    for log, is_second in zip(logs[:4], (False, True, False, True), strict=True):
        steps = [int(key.rsplit("_", 1)[1]) for key in log if key.startswith("ratio/std_step_")]
        assert len(steps) >= 2
        for step in steps:
            counts = log.get(f"ratio/histogram_step_{step}")
            assert (counts is not None) is is_second
            if is_second:
                assert sum(counts) == 8 and all(isinstance(count, int) for count in counts)
                assert sum(counts[: low + 1]) / 8 == pytest.approx(log[f"clip_ratio/low_step_{step}"])
                assert sum(counts[high + 1 :]) / 8 == pytest.approx(log[f"clip_ratio/high_step_{step}"])


def test_a_sample_is_counted_at_its_own_steps_only(tmp_path):
    fields = FIELDS | {"max_steps": 2, "num_inference_steps": 5, "diagnostics_steps": 0}
    tiny_trainer(tmp_path, timestep_fraction=0.5, timestep_fraction_per_sample=True, **fields).train()
    (histograms,) = filter(None, map(histograms_of, read_log_history(tmp_path)))
    # Two of four steps for each of eight images, not the same for all
    assert sum(map(sum, histograms)) == 16 and len(histograms) > 2


def histograms_of(log: dict) -> list[list[int]]:
    return [counts for key, counts in log.items() if key.startswith("ratio/histogram_step_")]


def test_evaluations_without_training_leave_a_finished_runs_log_alone(tmp_path):
    tiny_trainer(tmp_path, **FIELDS).train()
    before = (tmp_path / "log_history.jsonl").read_bytes()
    tiny_trainer(tmp_path, eval_dataset=prompts(2)).evaluate()
    assert (tmp_path / "log_history.jsonl").read_bytes() == before


def test_what_is_not_finite_is_null(tmp_path):
    def refuse(name):
        raise AssertionError(name)

    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.log({"odd": float("nan"), "endless": float("inf")})
    last = (tmp_path / "log_history.jsonl").read_text().splitlines()[-1]
    entry = json.loads(last, parse_constant=refuse)
    assert (entry["odd"], entry["endless"]) == (None, None)


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "log_history.jsonl").mkdir()
    trainer = tiny_trainer(tmp_path, max_steps=2)
    with warnings_of("trl_flow.trainer.callbacks") as messages:
        trainer.train()
    assert trainer.state.global_step == 2
    assert len(messages) == 1 and "log_history.jsonl cannot be written" in messages[0]


@pytest.mark.parametrize("fields, ratios", [({"num_iterations": 2}, True), ({"num_iterations": 1}, False)])
def test_every_figure_of_a_folder(fields, ratios, tmp_path):
    trainer = tiny_trainer(tmp_path, learning_rate=0.1, **{**FIELDS, **fields})
    trainer.train()
    expected = {"reward_curves", "gradient_norms", "reward_std"}
    # With one update for each sampling phase all ratios are 1
    assert set(all_plots(tmp_path)) == expected | (
        {"ratio_distribution", "ratio_histograms", "clip_shares"} if ratios else set()
    )
