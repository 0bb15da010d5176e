"""Runs are compared where the proxy first reaches a level: interpolation, intervals and refusals by hand."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from trl_flow.cli import main
from trl_flow.evaluation import equal_proxy_table, gold_at_proxy
from trl_flow.evaluation.equal_proxy import value_at_proxy


def evaluated(step, reward, gold, error=None, name=""):
    metrics = {"reward": reward, "gold/average": gold, "gold/average_std_err": error}
    return {"step": step, **{f"eval_{name}{key}": value for key, value in metrics.items()}}


# The proxy of the first turns back between 10 and 20, that of the second gets less far
FLOW = [
    evaluated(0, 0.0, 1.0, 0.0),
    {"step": 5, "reward": 9.0},
    evaluated(10, 1.0, 0.8, 0.04),
    evaluated(20, 0.5, 0.9, 0.5),
    evaluated(30, 2.0, 0.4, 0.08),
]
GUARD = [evaluated(0, 0.0, 1.0, 0.0), evaluated(10, 0.5, 1.0, 0.02), evaluated(40, 1.25, 0.94, 0.02)]


def test_values_where_the_proxy_first_reaches_a_level():
    proxy, values = [0.0, 1.0, 0.5, 2.0], [1.0, 0.8, 0.9, 0.4]
    # A quarter of the way up the first climb, and half of the way up the second one
    assert value_at_proxy(proxy, values, 0.25) == pytest.approx(0.95)
    assert value_at_proxy(proxy, values, 1.25) == pytest.approx(0.65)
    assert value_at_proxy(proxy, values, 1.0) == 0.8
    # It starts there
    assert value_at_proxy(proxy, values, 0.0) == value_at_proxy(proxy, values, -1.0) == 1.0
    assert math.isnan(value_at_proxy(proxy, values, 2.5))


def test_gold_at_equal_proxy_by_hand():
    points = gold_at_proxy({"flow": FLOW, "guard": GUARD}, [0.5, 1.0, 1.5])
    found = [(p.run, p.level, p.update, p.gold, p.standard_error) for p in points]
    expected = [
        ("flow", 0.5, 5.0, 0.9, 0.02),
        ("guard", 0.5, 10.0, 1.0, 0.02),
        ("flow", 1.0, 10.0, 0.8, 0.04),
        ("guard", 1.0, 30.0, 0.96, 0.02),  # two thirds of the way from 0.5 to 1.25
        ("flow", 1.5, 20 + 10 * 2 / 3, 0.9 - 0.5 * 2 / 3, 0.5 - 0.42 * 2 / 3),
        ("guard", 1.5, math.nan, math.nan, math.nan),
    ]
    for row, hand in zip(found, expected, strict=True):
        assert row[:2] == hand[:2] and row[2:] == pytest.approx(hand[2:], nan_ok=True)
    assert points[0].half_width == pytest.approx(1.959964 * 0.02)
    assert points[-1].highest == 1.25


def test_the_table_by_hand():
    lines = equal_proxy_table(gold_at_proxy({"a|b": FLOW, "guard": GUARD}, [1.0, 1.5])).splitlines()
    assert lines[0] == "| proxy | run | update | gold | difference to a\\|b |"
    # 1.96 * 0.04 = 0.078; 1.96 * 0.02 = 0.039; sqrt(0.078^2 + 0.039^2) = 0.088
    assert lines[2] == "| 1 | a\\|b | 10 | 0.800 ± 0.078 | – |"
    assert lines[3] == "| 1 | guard | 30 | 0.960 ± 0.039 | +0.160 ± 0.088 |"
    assert lines[5] == "| 1.5 | guard | not reached (highest 1.25) | – | – |"
    # The other way round there is nothing to be compared with
    assert equal_proxy_table(gold_at_proxy({"guard": GUARD, "flow": FLOW}, [1.5])).splitlines()[3].endswith("| – |")


def test_the_levels_are_the_highest_common_one_and_half_of_the_way():
    points = gold_at_proxy({"flow": FLOW, "guard": GUARD})
    assert [point.level for point in points] == [0.625, 0.625, 1.25, 1.25]


def test_errors_that_were_not_logged_are_no_interval():
    bare = [{key: value for key, value in log.items() if "std_err" not in key} for log in GUARD]
    points = gold_at_proxy({"flow": FLOW, "guard": bare}, [1.0])
    assert math.isnan(points[1].half_width)
    assert equal_proxy_table(points).splitlines()[3] == "| 1 | guard | 30 | 0.960 | +0.160 |"


def test_what_cannot_be_compared_is_refused():
    runs = {"flow": FLOW, "guard": GUARD}
    with pytest.raises(ValueError, match="There are 1 runs"):
        gold_at_proxy({"flow": FLOW})
    with pytest.raises(ValueError, match="level 2.5 is reached by no run: the highest proxies are flow 2, guard 1.25"):
        gold_at_proxy(runs, [0.5, 2.5])
    with pytest.raises(ValueError, match="level nan"):
        gold_at_proxy(runs, [math.nan])
    with pytest.raises(ValueError, match=r"no proxy above the start \(0\).*highest are flow 2, low -1"):
        gold_at_proxy({"flow": FLOW, "low": [evaluated(0, -1.0, 1.0)]})
    with pytest.raises(ValueError, match="log of 'blind' has no gold scores.*eval_reward_funcs"):
        gold_at_proxy({"flow": FLOW, "blind": [{"step": 1, "eval_reward": 1.0}]})
    with pytest.raises(ValueError, match="'flow' has no gold scores of an evaluation set 'far'"):
        gold_at_proxy(runs, eval_name="far")


def of_two_rewards(rows, gold):
    metrics = ("reward", "rewards/a/mean", "rewards/b/mean", "gold/average")
    names = {f"eval_gold/{name}": 0.5 for name in gold}
    return [{"step": s, **{f"eval_{n}": v for n, v in zip(metrics, row, strict=True)}, **names} for s, *row in rows]


def test_one_of_several_rewards_can_be_the_proxy():
    one = of_two_rewards([(0, 0.0, 1.0, 0.0, 1.0), (10, 5.0, 3.0, 2.0, 0.5)], ["x"])
    # The same reward with other weights
    other = of_two_rewards([(0, -90.0, 1.0, 0.0, 1.0), (10, -80.0, 2.0, 2.0, 0.75)], ["x"])
    with pytest.raises(ValueError, match="no proxy above the start .*name a reward that all have: --proxy NAME"):
        gold_at_proxy({"one": one, "other": other})
    points = gold_at_proxy({"one": one, "other": other}, proxy="a")
    expected = [(1.5, 0.875), (1.5, 0.875), (2.0, 0.75), (2.0, 0.75)]
    assert [(point.level, point.gold) for point in points] == expected
    with pytest.raises(ValueError, match=r"'one' has no evaluation with both the reward 'c' \(there are a, b\) and"):
        gold_at_proxy({"one": one, "other": other}, proxy="c")


def test_gold_by_other_functions_is_not_compared():
    rows = [(0, 0.0, 1.0, 0.0, 1.0), (10, 5.0, 3.0, 2.0, 0.5)]
    runs = {"one": of_two_rewards(rows, ["y", "x"]), "other": of_two_rewards(rows, ["x"])}
    with pytest.raises(ValueError, match="gold of 'one' is the average of x, y, that of 'other' of x: these cannot"):
        gold_at_proxy(runs)


def written(folder, history):
    folder.mkdir()
    (folder / "log_history.jsonl").write_text("".join(json.dumps(log) + "\n" for log in history))
    return str(folder)


def test_from_folders_to_table_and_plot(tmp_path, capsys):
    flow, guard, out = written(tmp_path / "flow", FLOW), written(tmp_path / "guard", GUARD), tmp_path / "out"
    command = ["compare-runs", flow, f"ours={guard}", "--levels", "-0.5", "1", "--output_dir", str(out)]
    assert main(command) == 0
    table = (out / "equal_proxy.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    # Where a run begins there is nothing that training has done
    assert "| -0.5 | ours | 0 (start) | 1.000 ± 0.000 | +0.000 ± 0.000 |" in table
    assert "| 1 | ours | 30 | 0.960 ± 0.039 | +0.160 ± 0.088 |" in table
    with Image.open(out / "equal_proxy.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{flow}"], "There are 1 runs"),
        (["{flow}", "{flow}"], "two runs are called 'flow'"),
        (["{flow}", "nowhere"], "cannot be read"),
        (["{flow}", "b={flow}", "--levels", "7"], "reached by no run"),
        (["{flow}", "b={flow}", "--proxy", "ocr"], "no evaluation with both the reward 'ocr' (there are none)"),
        (["{flow}", "b={flow}", "--level", "7"], "Did you mean --levels?"),
        (["{flow}", "b={flow}", "--levels", "high"], "invalid float value"),
    ],
)
def test_mistakes_on_the_command_line_write_nothing(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow = written(tmp_path / "flow", FLOW)
    try:
        code = main(["compare-runs", *(argument.format(flow=flow) for argument in arguments)])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["flow"]
