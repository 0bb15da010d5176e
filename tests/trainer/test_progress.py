"""What a person sees of a run, in a file, in a terminal and in a notebook, and how long its parts take."""

import gc
import io
import logging
import re
import sys
import time
import types
import warnings

import pytest
from tiny_training import brightness, darkness, prompts, tiny_trainer
from tqdm import tqdm

from trl_flow.evaluation.run_log import PARTS
from trl_flow.trainer.progress import (
    Clock,
    FlowProgressCallback,
    NotebookTable,
    duration,
    messages_above_the_bar,
    trend,
    watched,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_file_there_is_one_short_line_for_each_log(tmp_path, capsys):
    every = {"eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": False, "max_steps": 4}
    trainer = tiny_trainer(tmp_path, eval_dataset=prompts(2), eval_reward_funcs=darkness, **every)
    trainer.train()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    told = [re.match(r"update (\d)/4  (evaluation|reward|gradient)", line) for line in lines]
    updates = ["1", "2", "3", "4"]
    assert [match[1] for match in told if match and match[2] != "evaluation"] == updates
    assert [match[1] for match in told if match and match[2] == "evaluation"] == ["0", "2", "4"]
    assert all(len(line) < 200 and "{" not in line for line in lines)
    assert "\r" not in captured.out + captured.err and "it/s" not in captured.err
    assert any("left" in line for line in lines)


def test_in_a_terminal_the_bar_says_what_is_going_on(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny_trainer(tmp_path, eval_dataset=prompts(2), disable_tqdm=False, max_steps=2, **every)
    trainer.train()
    shown = terminal.getvalue()
    for words in ("sampling", "decoding", "scoring", "updating", "logging", "saving", "evaluating"):
        assert words in shown
    assert "2/2" in shown


def test_messages_stand_above_the_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("trl_flow.some.module")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with messages_above_the_bar(), tqdm(total=2, desc="Training", file=terminal) as bar:
            logger.warning("a message of ours")
            warnings.warn("a library's", stacklevel=1)
            bar.update()
    for line in ("a message of ours\n", "a library's"):
        before = terminal.getvalue().split(line)[0]
        # The bar's line was blanked, and the message begins where a line does
        assert before.endswith("\r") or before[before.rindex("\r") :].strip().startswith("/")


def test_what_is_printed_stands_above_the_bar_and_a_prompt_at_once(monkeypatch):
    terminal = Terminal()  # for both, as on a screen
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with messages_above_the_bar(), tqdm(total=2, desc="Training", file=terminal):
        print("a reward", 1)
        print("(Pdb) ", end="", flush=True)
        assert terminal.getvalue().endswith("(Pdb) ")
    assert sys.stdout is terminal
    before, _ = terminal.getvalue().split("a reward 1\n")
    assert before.endswith("\r")


def test_a_failure_leaves_the_bar_on_a_line_of_its_own(tmp_path, monkeypatch):
    def broken(prompts, images, **kwargs):
        raise ValueError("no")

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    trainer = tiny_trainer(tmp_path, reward_funcs=broken, disable_tqdm=False)
    with pytest.raises(RuntimeError):
        trainer.train()
    assert terminal.getvalue().rstrip(" ").endswith("\n")
    ended = len(terminal.getvalue())
    del trainer
    gc.collect()
    assert len(terminal.getvalue()) == ended  # the bar is not drawn once more below the error


def test_values_that_are_no_numbers_have_no_trend():
    nan = float("nan")
    history = [{"reward": value} for value in (1.0, 2.0, nan, None, 3.0)]
    assert watched({"reward": nan, "eval_gold/average_std_err": 0.1}, history)["reward"] == "nan"
    logs = {"eval_reward": 1.0, "eval_gold/average": None, "eval_gold/average_std_err": 0.1}
    assert watched(logs) == {"evaluation": "", "reward": "1"}


def test_every_log_has_the_time_by_part(tmp_path):
    def slow(prompts, images, **kwargs):
        time.sleep(0.3)
        return brightness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=slow, max_steps=2, overlap_rewards=False)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "step_time" in log]
    for log in logs:
        parts = {name.removeprefix("time/"): value for name, value in log.items() if name.startswith("time/")}
        assert {"sampling", "scoring", "updating"} <= parts.keys() <= set(PARTS)
        assert 0.3 <= parts["scoring"] <= log["step_time"] <= sum(parts.values()) + 0.1


def test_the_clock_adds_up_and_begins_anew(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 3.5, 4.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    clock.enter("sampling")  # 0
    clock.enter("updating")  # 1
    clock.enter("sampling")  # 3
    assert clock.read(updates=2) == {"time/sampling": 0.75, "time/updating": 1.0}  # 3.5
    assert clock.read(updates=1) == {"time/sampling": 1.0}  # 4.5: it goes on


@pytest.mark.parametrize(
    "values, word",
    [
        ([1.0, 1.0, 1.0], ""),
        ([0.0, 0.1, 1.0, 1.1], "rising"),
        ([1.0, 1.1, 0.0, 0.1], "falling"),
        ([0.0, 1.0, 0.2, 1.2], "level"),
        # The latest ten alone
        ([9.0] * 10 + [0.0, 0.1, 0.0, 0.1, 0.0, 1.0, 1.1, 1.0, 1.1, 1.0], "rising"),
        ([0.5, 0.5, 0.5, 0.5], "level"),
    ],
)
def test_a_trend_is_more_than_the_noise(values, word):
    assert trend(values) == word


def test_what_is_watched_of_a_log():
    log = {"reward": 0.51234, "rewards/a/mean": 0.5, "rewards/b/mean": 1.0, "rewards/a/std": 0.1, "loss": 0.1}
    log |= {"kl": 0.00123, "clip_ratio/region_mean": 0.034, "step_time": 100.0, "time/sampling": 70.0}
    log |= {"time/updating": 29.0, "time/decoding": 1.0, "time/evaluating": 200.0, "grad_norm": None}
    history = [{"reward": value} for value in (0.1, 0.1, 0.1, 0.5)] + [{}, log]
    assert watched(log, history) == {
        "reward": "0.5123 rising", "a": "0.5", "b": "1", "KL": "0.0012", "clipped": "3%",
        "an update": "2 min (sampling 70 s, updating 29 s) + evaluating 3 min",
    }  # fmt: skip
    log = {"eval_hard_reward": 0.5, "eval_hard_gold/average": 1.05, "eval_hard_gold/average_std_err": 0.01}
    assert watched(log | {"eval_hard_runtime": 7200.0}) == {
        "evaluation": "hard", "reward": "0.5", "gold": "1.05 ± 0.02", "took": "2 h 00 min",
    }  # fmt: skip
    assert watched({"train_loss": 0.1, "train_runtime": 3.0}) == {}


@pytest.mark.parametrize(
    "seconds, text", [(0.26, "0.3 s"), (25.0, "25 s"), (99.9, "100 s"), (150.0, "2 min"), (11_100.0, "3 h 05 min")]
)
def test_a_duration_is_written_as_one_says_it(seconds, text):
    assert duration(seconds) == text


def test_the_table_of_a_notebook_has_a_column_for_all_that_any_log_has():
    table = NotebookTable()
    assert table.html("sampling") == "<p>sampling</p>"
    table.add(1, {"reward": "0.5", "an update": "3 s (sampling 2 s)"})
    table.add(1, {"evaluation": "easy", "<gold>": "1.0"})
    page = table.html("update 1/2")
    assert "<th>update</th><th>reward</th><th>an update</th><th>&lt;gold&gt;</th>" in page
    assert "<tr><td>1</td><td>0.5</td><td>3 s</td><td></td></tr>" in page
    assert "<tr><td>1, evaluation easy</td><td></td><td></td><td>1.0</td></tr>" in page
    for number in range(50):
        table.add(number, {})
    assert table.html("").count("<tr>") == 21


def test_in_a_notebook_the_table_is_shown(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr("trl_flow.trainer.progress.is_in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setattr(NotebookTable, "show", lambda self, status: shown.append(self.html(status)))
    trainer = tiny_trainer(tmp_path, disable_tqdm=False, max_steps=2)
    trainer.train()
    assert any("<p>sampling" in page for page in shown)
    assert "finished after update 2" in shown[-1] and shown[-1].count("<tr>") == 3


def test_the_callback_can_be_removed(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path)
    trainer.remove_callback(FlowProgressCallback)
    trainer.train()
    assert "update 1/2" not in capsys.readouterr().out
