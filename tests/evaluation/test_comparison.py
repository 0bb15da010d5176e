import json
import math

import pytest

from trl_flow.evaluation.comparison import compare_scores
from trl_flow.evaluation.tables import markdown, markdown_text, means_table


# Two images for each of two prompts. Means by prompt: quality 2 and 4 (base), 4 and 8 (ours): twice the base's;
# taste 1 and 3 (base), 1 and 1 (ours): half
SCORES = {
    "base": {"proxy": [0, 0, 1, 1], "quality": [1, 3, 4, 4], "taste": [1, 1, 3, 3]},
    "ours": {"proxy": [1, 1, 2, 2], "quality": [4, 4, 8, 8], "taste": [1, 1, 1, 1]},
}


@pytest.fixture
def compared():
    return compare_scores(SCORES, proxy=["proxy"], gold=["quality", "taste"], num_images_per_prompt=2)


def test_comparison_worked_out_by_hand(compared):
    assert compared["num_prompts"] == 2
    assert compared["means"]["base"]["quality"]["mean"] == 3.0
    assert compared["means"]["ours"]["quality"]["mean"] == 6.0
    found = compared["differences"]["ours"]["quality"]
    # Differences 2 and 4: mean 3, s = sqrt(2), error 1, t for one degree of freedom 12.7062
    assert (found["difference"], found["num_pairs"]) == (3.0, 2)
    assert found["standard_error"] == pytest.approx(1.0, rel=1e-12)
    assert found["high"] == pytest.approx(3 + 12.7062, abs=1e-4)
    # Both proxy differences are 1
    assert compared["differences"]["ours"]["proxy"]["standard_error"] == 0.0


def test_gold_average_is_that_of_the_papers_table(compared):
    assert compared["gold"]["base"]["average"] == 1.0
    assert compared["gold"]["base"]["standard_error"] == 0.0
    ours = compared["gold"]["ours"]
    assert ours["relative"] == {"quality": 2.0, "taste": 0.5}
    assert ours["average"] == 1.25


def test_a_row_of_grpo_guards_table_1():
    # SD3.5-M against + Flow-GRPO trained on GenEval: HPSv2 .293 and .236, ImR 1.06 and .85, UniR 3.31 and 3.05;
    # printed 0.84. One prompt: no intervals
    base, tuned = {"hpsv2": 0.293, "imr": 1.06, "unir": 3.31}, {"hpsv2": 0.236, "imr": 0.85, "unir": 3.05}
    scores = {
        "base": {"geneval": [0.63]} | {name: [v] for name, v in base.items()},
        "flow": {"geneval": [0.94]} | {name: [v] for name, v in tuned.items()},
    }
    found = compare_scores(scores, proxy=["geneval"], gold=list(base))
    assert round(found["gold"]["flow"]["average"], 2) == 0.84
    assert found["gold"]["flow"]["low"] is None
    assert means_table(found).splitlines() == [
        "| model | [geneval] | hpsv2 | imr | unir | Average (base = 1) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| base | 0.63 | 0.293 | 1.06 | 3.31 | 1 |",
        "| flow | [0.94] | 0.236 | 0.85 | 3.05 | 0.8429 |",
    ]


def test_everything_can_be_written_as_json(compared):
    assert json.loads(json.dumps(compared, allow_nan=False)) == compared


def test_a_reward_that_never_applies():
    nan = math.nan
    found = compare_scores({"base": {"text": [nan, nan]}, "ours": {"text": [nan, 1.0]}}, gold=["text"])
    assert found["means"]["base"]["text"]["mean"] is None
    assert found["differences"]["ours"]["text"] is None
    assert found["gold"]["ours"]["average"] is None
    assert "| ours | 1 | - |" in means_table(found)


def test_a_gold_mean_that_can_not_be_divided_by_is_told():
    found = compare_scores({"base": {"q": [-1.0, 0.5]}, "ours": {"q": [1.0, 1.0]}}, gold=["q"])
    assert found["gold"] is None
    assert "that of q is -0.25, which is not positive" in found["gold_note"]
    assert "| ours | 1 ± 0 | - |" in means_table(found)


def test_without_rewards_or_adapters_there_are_still_tables():
    found = compare_scores({"base": {}})
    assert means_table(found).splitlines()[-1] == "| base |"
    alone = compare_scores({"base": {"q": [1.0, 3.0]}}, proxy=["q"])
    assert alone["differences"] == {} and "[" not in means_table(alone).splitlines()[-1]


def test_report_has_a_table_for_each_set_and_keeps_hostile_names_as_text(compared):
    name = "a|b <script>*x*`"
    report = markdown(
        {
            "models": {"base": {"path": "p"}, name: {"path": "q|r"}},
            "settings": {"seed": 0, "negative_prompt": None},
            "proxy": ["proxy"],
            "gold": ["quality"],
            "sets": {"first": compared, "second <b>": compared},
            "votes": None,
        }
    )
    assert "## first" in report and "## second \\<b\\>" in report
    assert "<script>" not in report
    assert "* a\\|b \\<script\\>\\*x\\*\\`: q\\|r" in report
    assert "negative_prompt" not in report
    assert report.count("| ours | [1.5 ± 6.4] |") == 2


def test_a_base_model_alone_is_no_comparison():
    alone = compare_scores({"base": {"q": [1.0, 3.0]}})
    report = markdown(
        {"models": {"base": {"path": "p"}}, "settings": {}, "proxy": [], "gold": [], "sets": {"s": alone}}
    )
    assert report.startswith("# Scores of the base model\n")


def test_text_stays_on_one_line():
    assert markdown_text("a\nb\r\n | c") == "a b \\| c"
