"""benchmarks/time_to_score.py: what it makes of runs; and its recommendation is the recipe's."""

import json
import sys

import pytest
from test_examples import ROOT, load_program
from test_recipes import parsed


@pytest.fixture(scope="module")
def program():
    path = list(sys.path)
    yield load_program("benchmarks/time_to_score.py")
    sys.path[:] = path


def written(folder, program, **scores):
    """A file of runs of 10 s an update, evaluated after every second one; `published_0` is seed 0 of an arm."""
    lines = []
    for name, rewards in scores.items():
        arm, seed = name.split("_")
        keys = zip(("arm", "rate"), program.NAMES[arm], strict=True)
        rows = [
            {"update": 2 * i, "seconds": 20 * i + i % 2, "wall": 30 * i, "reward": reward}
            for i, reward in enumerate(rewards)
        ]
        lines.append(json.dumps({**dict(keys), "seed": int(seed), "reward": "score", "evaluations": rows}))
    path = folder / "runs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_line_says_when_the_score_was_reached_and_how_many_times_longer_the_other_takes(program, tmp_path, capsys):
    # The means of two evaluations are 0.9, 0.95, 1.05 and 1.15; the least seconds an update are 9.5
    reached = {"recommended_0": [0.9, 1.0, 1.1, 1.2], "published_0": [0.8, 0.8, 0.8, 0.8, 0.8]}
    path = written(tmp_path, program, **reached)
    program.main(["--output", str(path), "--seeds", "0", "--target", "1.1"])  # nothing is left to run
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recommended"]["updates"] == {"0": 5.0} and result["recommended"]["wall_seconds"] == {"0": 90}
    assert result["recommended"]["processor_seconds"] == {"0": 47.5}
    assert result["published"]["updates"] == result["published"]["wall_seconds"] == {"0": None}
    assert result["published_over_recommended_at_least"] == 1.6  # 8 updates against 5


def test_no_number_of_times_is_claimed_where_the_recommendation_has_not_reached_the_score(program, tmp_path, capsys):
    path = written(tmp_path, program, recommended_0=[0.9, 0.9], published_0=[0.8, 0.8, 0.8])
    program.main(["--output", str(path), "--seeds", "0", "--target", "1.1"])
    assert "published_over_recommended_at_least" not in capsys.readouterr().out


def test_the_table_says_above_what_a_mean_is_of_which_not_all_came_there(program, tmp_path, capsys):
    path = written(tmp_path, program, recommended_0=[0.9, 1.0, 1.1, 1.2], recommended_1=[0.9, 0.9, 0.9])
    program.main(["--table", str(path), "--target", "1.1"])
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert row[1:] == ["2", "9.50", "5 (1 of 2 seeds)", "above 43", "1.02 ± 0.12"]


def test_the_recommendation_is_the_recipe(program):
    (name, rate), recipe = program.NAMES["recommended"], parsed("shapes_nft_fast")[1].to_dict()
    arm = program.ALL[name]
    size = {"per_device_train_batch_size": 144, "num_generations": 12, "steps_per_generation": 1}
    wanted = {"learning_rate": rate, **size, **arm.fields}
    assert {key: recipe[key] for key in wanted} == wanted
    script, model = parsed("shapes_nft_fast")[::2]
    assert (script.reward_funcs, model.lora_r, model.lora_alpha) == (["shapes_soft", "shapes_fidelity"], 32, 64)
    assert recipe["reward_weights"] == [1.0, 0.5]


def test_the_runs_of_the_page_are_of_arms_that_the_program_has(program):
    kept = ROOT / "benchmarks" / "time_to_score.jsonl"
    for line in kept.read_text().splitlines():
        row = json.loads(line)
        assert row["arm"] in program.ALL and row["evaluations"]
