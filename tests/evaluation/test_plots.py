import json

import matplotlib
import numpy as np
import pytest
from PIL import Image

from trl_flow.evaluation.plots import reward_curves


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
    # No picture had this reward at step 2
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
