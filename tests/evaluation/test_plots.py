import json

import matplotlib
import numpy as np
import pytest
from PIL import Image

from trl_flow.evaluation.plots import (
    all_plots,
    clip_shares,
    equal_proxy,
    gradient_norms,
    proxy_against_gold,
    ratio_distribution,
    ratio_histograms,
    reward_curves,
    reward_std,
)


LOG = [
    {"step": 1, "reward": 0.4, "rewards/color/mean": 0.25, "rewards/color/std": 0.5, "rewards/a/b/mean": 3.0},
    {"step": 1, "eval_reward": 0.5, "eval_rewards/color/mean": 0.75, "eval_far_away_rewards/color/mean": 0.1},
    {"step": 2, "reward": 0.5, "rewards/color/mean": 0.5, "rewards/color/std": None, "rewards/a/b/mean": None},
    {"step": 3, "rewards/color/mean": 0.75, "rewards/color/std": 0.25, "rewards/a/b/mean": 5.0},
    {"step": 3, "train_runtime": 12.0},
]


def points(line) -> list[tuple[float, float]]:
    return list(zip(*(np.asarray(data).tolist() for data in line.get_data()), strict=True))


def test_one_panel_for_each_function_with_the_logged_values():
    color, nested = reward_curves(LOG).axes
    assert (color.get_title(), nested.get_title()) == ("color", "a/b")
    assert {line.get_label(): points(line) for line in color.lines} == {
        "training": [(1, 0.25), (2, 0.5), (3, 0.75)],
        "evaluation": [(1, 0.75)],
        "evaluation far_away": [(1, 0.1)],
    }
    # No image had this reward at step 2
    assert [points(line) for line in nested.lines] == [[(1, 3.0), (3, 5.0)]]


def test_the_band_is_one_standard_deviation():
    (band,) = reward_curves(LOG).axes[0].collections
    corners = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(1, -0.25), (1, 0.75), (3, 0.5), (3, 1.0)}
    assert len(reward_curves(LOG).axes[1].collections) == 0  # no std was logged


def test_the_trainers_file_gives_the_same_as_its_log(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": LOG}))
    reward_curves(path, tmp_path / "file.png")
    reward_curves(LOG, tmp_path / "new" / "log.png")
    with Image.open(tmp_path / "file.png") as first, Image.open(tmp_path / "new" / "log.png") as second:
        assert first.format == "PNG"
        assert np.array_equal(np.asarray(first), np.asarray(second))
        colors = first.convert("RGB").getcolors(maxcolors=2**24)
    assert len(colors) > 20, "an empty sheet"


def test_nothing_global_is_touched(tmp_path):
    import matplotlib.pyplot as plt

    settings, figures = dict(matplotlib.rcParams), plt.get_fignums()
    reward_curves(LOG, tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == figures


def test_a_log_without_rewards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rewards"):
        reward_curves([{"step": 1, "loss": 0.0}], tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


# ---- Single steps ----

STEPS = [
    {"step": 1, "ratio/mean_step_0": 1.0, "ratio/std_step_0": 0.0, "clip_ratio/low_step_0": 0.0},
    {"step": 1, "clip_ratio/high_step_0": 0.0, "grad_norm/step_0": 0.25},
    {
        "step": 2,
        **{"ratio/mean_step_0": 0.96875, "ratio/std_step_0": 0.0625, "ratio/mean_step_2": 1.25},
        **{"ratio/std_step_2": 0.5, "clip_ratio/low_step_0": 0.5, "clip_ratio/high_step_0": 0.25},
        **{"clip_ratio/low_step_2": 0.125, "clip_ratio/high_step_2": 0.0, "grad_norm/step_0": 0.75},
        "grad_norm/step_2": 2.0,
    },
]
# of step 0: the mean of the two variances, and the variance of the two means
STD_0 = ((0 + 0.0625**2) / 2 + (0.03125 / 2) ** 2) ** 0.5


def test_ratios_of_single_steps():
    mean, std = ratio_distribution({"a": STEPS, "b": STEPS}).axes
    assert [text.get_text() for text in mean.get_legend().get_texts()] == ["a", "b"]
    lines = [container.lines[0] for container in mean.containers]
    for line, shift in zip(lines, (-0.06, 0.06), strict=True):
        assert points(line) == [(pytest.approx(shift), -0.015625), (pytest.approx(2 + shift), 0.25)]
    bars = mean.containers[0].lines[2][0].get_segments()
    assert bars[1][:, 1].tolist() == [-0.25, 0.75]
    assert [points(line) for line in std.lines] == [[(0, pytest.approx(STD_0)), (2, 0.5)]] * 2
    assert f"a (max/min {0.5 / STD_0:.3g})" in [text.get_text() for text in std.get_legend().get_texts()]


def test_gradient_norms_and_their_largest_over_the_smallest():
    (axes,) = gradient_norms(STEPS).axes
    assert [points(line) for line in axes.lines] == [[(0, 0.5), (2, 2.0)]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["max/min 4"]


def test_clip_shares_below_and_above():
    low, high = clip_shares(STEPS).axes
    bars = [[(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches] for axes in (low, high)]
    assert bars == [[(0, 0.25), (2, 0.125)], [(0, 0.125), (2, 0.0)]]


def test_only_the_latest_logs():
    (axes,) = gradient_norms(STEPS, last=1).axes
    assert [points(line) for line in axes.lines] == [[(0, 0.75), (2, 2.0)]]


@pytest.mark.parametrize("draw", [ratio_distribution, clip_shares])
def test_ratios_that_are_1_by_definition_are_no_distribution(draw):
    with pytest.raises(ValueError, match="of exactly 1 only.*steps_per_generation.*num_iterations"):
        draw(STEPS[:1])


def test_histograms_of_single_steps():
    counts = [0] * 47
    # Two of eight ratios beyond, one at -1 .. -7/9 and five around 1
    counts[0], counts[19], counts[23], counts[46] = 1, 1, 5, 1
    history = [{"step": 1, "ratio/histogram_step_0": counts}, {"step": 2, "ratio/histogram_step_2": counts}]
    first, second, _ = ratio_histograms({"a": history, "b": history[:1]}).axes
    assert (first.get_title(), second.get_title()) == ("a", "b")
    inside, beyond = first.lines[:2]
    shares = {round(9 * x): share for x, share in points(inside) if share}
    assert shares == {-8: 1 / 8, 0: 5 / 8}
    assert points(beyond) == [(-5.5, 1 / 8), (5.5, 1 / 8)]
    clipping = [line.get_xdata()[0] for line in first.lines[4:]]
    assert (len(first.lines), len(second.lines), clipping) == (6, 4, [-1, 1])
    with pytest.raises(ValueError, match="'b' has no histograms.*num_iterations"):
        ratio_histograms({"a": history, "b": STEPS})


# ---- Over training ----


def test_the_spread_of_rewards_and_its_running_mean():
    short = [{"step": 2 * i, "reward_std": float(i)} for i in range(1, 4)]
    (axes,) = reward_std(short).axes
    assert [points(line) for line in axes.lines] == [[(2, 1), (4, 2), (6, 3)]]
    long = [{"step": i, "reward_std": float(i % 2)} for i in range(40)]
    raw, mean = reward_std(long).axes[0].lines
    assert len(points(raw)) == 40
    assert points(mean) == [(i, 0.5) for i in range(1, 40)]


def evaluated(step, reward, gold, error=0.0, name=""):
    metrics = {"reward": reward, "gold/average": gold, "gold/average_std_err": error}
    return {"step": step, **{f"eval_{name}{key}": value for key, value in metrics.items()}}


GOLD = [evaluated(0, 0.25, 1.0), {"step": 1, "reward": 9.0}, evaluated(2, 0.5, 1.25, 0.125), evaluated(4, 0.75, 0.5)]


def test_proxy_and_gold_over_training_and_against_each_other():
    proxy, gold, both = proxy_against_gold({"run": GOLD, "other": GOLD[:1]}).axes
    assert points(proxy.lines[0]) == [(0, 0.25), (2, 0.5), (4, 0.75)]
    assert points(gold.containers[0].lines[0]) == [(0, 1.0), (2, 1.25), (4, 0.5)]
    assert gold.containers[0].lines[2][0].get_segments()[1][:, 1].tolist() == [1.125, 1.375]
    assert points(both.lines[0]) == [(0.25, 1.0), (0.5, 1.25), (0.75, 0.5)]
    assert points(both.lines[1]) == [(0.75, 0.5)]  # where it stands


def test_gold_at_equal_proxy_is_marked():
    other = [evaluated(0, 0.25, 1.0, 0.0), evaluated(2, 0.75, 0.5, 0.25)]
    (axes,) = equal_proxy({"run": GOLD, "other": other}, levels=[0.5, 0.25]).axes
    curves = {line.get_label(): points(line) for line in axes.lines if not line.get_label().startswith("_")}
    assert curves == {"run": [(0.25, 1.0), (0.5, 1.25), (0.75, 0.5)], "other": [(0.25, 1.0), (0.75, 0.5)]}
    marks = [points(container.lines[0]) for container in axes.containers]
    # Side by side, by 1.2% of the range of 0.5
    for mark, gold, shift in zip(marks, (1.25, 0.75), (-0.003, 0.003), strict=True):
        assert mark == [pytest.approx((0.5 + shift, gold)), pytest.approx((0.25 + shift, 1.0))]
    bar = axes.containers[1].lines[2][0].get_segments()[0][:, 1]
    assert bar == pytest.approx([0.75 - 1.959964 * 0.125, 0.75 + 1.959964 * 0.125])


def test_one_of_several_evaluation_sets():
    history = [evaluated(0, 0.1, 1.0, name="seen_"), evaluated(0, 0.9, 1.0, name="far_away_")]
    assert points(proxy_against_gold(history).axes[0].lines[0]) == [(0, 0.1)]
    assert points(proxy_against_gold(history, eval_name="far_away").axes[0].lines[0]) == [(0, 0.9)]
    with pytest.raises(ValueError, match=r"evaluation set 'near', but of \['seen', 'far_away'\]"):
        proxy_against_gold(history, eval_name="near")


@pytest.mark.parametrize(
    "draw, field",
    [
        (ratio_distribution, "nothing was trained"),
        (clip_shares, "nothing was trained"),
        (ratio_histograms, "num_iterations"),
        (gradient_norms, "diagnostics_steps=1"),
        (reward_std, "nothing was trained"),
        (proxy_against_gold, "eval_reward_funcs"),
    ],
)
def test_what_was_not_logged_is_said_with_its_remedy(draw, field, tmp_path):
    with pytest.raises(ValueError, match=f"The log has no .*{field}"):
        draw([{"step": 1, "loss": 0.0}], tmp_path / "new" / "figure.png")
    with pytest.raises(ValueError, match=f"The log of 'guard' has no .*{field}"):
        draw({"guard": [{"step": 1, "loss": 0.0}]})
    with pytest.raises(ValueError, match="no run"):
        draw({})
    assert list(tmp_path.iterdir()) == []


def test_all_figures_of_a_folder_that_can_be_drawn(tmp_path):
    with (tmp_path / "log_history.jsonl").open("w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in [*LOG, *STEPS])
    drawn = all_plots(tmp_path)
    assert list(drawn) == ["reward_curves", "ratio_distribution", "gradient_norms", "clip_shares"]
    for name, path in drawn.items():
        assert path == tmp_path / "plots" / f"{name}.png"
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 20
    assert set(all_plots(GOLD, tmp_path / "gold")) == {"proxy_against_gold"}
    with pytest.raises(ValueError, match="folder is missing"):
        all_plots(GOLD)
