import json

import pytest
from PIL import Image
from tiny_comparisons import painted_folder

from trl_flow.evaluation.comparison import compare_scores
from trl_flow.evaluation.intervals import share_interval
from trl_flow.evaluation.tables import vote_markdown
from trl_flow.evaluation.vote_plan import Ballots, VotePair
from trl_flow.evaluation.vote_results import update_votes, vote_bars, vote_results


def ballot(*votes: tuple[int, str], other: str = "ours") -> dict:
    """Votes on (row, outcome), all questions alike but the last, which is a tie."""
    return {
        "voter": "x",
        "votes": [
            {
                "set": "shapes",
                "row": row,
                "reference": "base",
                "other": other,
                "answers": {"quality": outcome, "alignment": outcome, "overall": "tie"},
            }
            for row, outcome in votes
        ],
    }


def test_one_vote_on_each_prompt():
    votes = [(i, "win") for i in range(6)] + [(i, "tie") for i in (6, 7)] + [(i, "lose") for i in (8, 9)]
    (found,) = vote_results([ballot(*votes)])["comparisons"]
    assert (found["num_votes"], found["num_prompts"]) == (10, 10)
    quality = found["questions"]["quality"]
    assert (quality["win"], quality["tie"], quality["lose"]) == (6, 2, 2)
    assert quality["shares"]["win"]["mean"] == pytest.approx(0.6)
    # Wins and half the ties: 0.7, of ten cases; Wilson's interval is 0.397 to 0.892
    preference = quality["preference"]
    assert preference["mean"] == pytest.approx(0.7)
    assert preference["low"] == pytest.approx(0.39677, abs=1e-5)
    assert preference["high"] == pytest.approx(0.89221, abs=1e-5)
    overall = found["questions"]["overall"]
    assert overall["preference"]["mean"] == 0.5 and overall["shares"]["tie"]["mean"] == 1.0


def test_several_votes_on_a_prompt_count_as_one_prompt():
    # Prompt 0: win, win, lose (2/3); prompt 1: win. The mean of the prompts' shares is 5/6, not 3/4 of the votes
    found = vote_results([ballot((0, "win"), (1, "win")), ballot((0, "win")), ballot((0, "lose"))])
    assert found["num_voters"] == 3
    quality = found["comparisons"][0]["questions"]["quality"]
    assert quality["win"] == 3 and quality["lose"] == 1
    assert quality["shares"]["win"]["mean"] == pytest.approx(5 / 6)
    assert quality["preference"]["low"] == pytest.approx(share_interval(5 / 6, 2)[0])
    # A crowd that votes on the same two prompts makes it no surer
    crowd = vote_results([ballot((0, "win"), (1, "win"))] * 50)["comparisons"][0]["questions"]["quality"]
    assert crowd["preference"]["low"] == pytest.approx(share_interval(1.0, 2)[0])


def test_comparisons_are_kept_apart():
    found = vote_results([ballot((0, "win")), ballot((0, "lose"), other="theirs")])
    assert [(c["other"], c["questions"]["quality"]["win"]) for c in found["comparisons"]] == [
        ("ours", 1),
        ("theirs", 0),
    ]
    assert vote_results([]) is None and vote_results([ballot()]) is None


def test_table():
    votes = [(i, "win") for i in range(3)] + [(3, "lose")]
    lines = vote_markdown(vote_results([ballot(*votes)])).splitlines()
    assert (
        "| shapes (4) | ours against base | image quality | 3 (75%) | 0 (0%) | 1 (25%) | 75% | 30% to 95% |" in lines
    )
    assert "Blind votes of 1 person, order and sides at random." in lines


def test_bars_have_the_shares_and_take_any_name(tmp_path):
    votes = [(0, "win"), (1, "win"), (2, "tie"), (3, "lose")]
    results = vote_results([ballot(*votes, other="$a_$" * 20), ballot(*votes), ballot(*votes, other="b")])
    figure = vote_bars(results, tmp_path / "new" / "votes.png")
    axes = [panel for panel in figure.axes if panel.get_visible()]
    assert len(axes) == 3
    widths = [[bar.get_width() for bar in container] for container in axes[0].containers]
    assert widths == [[0.5, 0.5, 0.0], [0.25, 0.25, 1.0], [0.25, 0.25, 0.0]]  # win, tie, lose by question
    starts = [container[0].get_x() for container in axes[0].containers]
    assert starts == [0.0, 0.5, 0.75]
    assert Image.open(tmp_path / "new" / "votes.png").format == "PNG"


def test_votes_come_into_the_report(tmp_path):
    painted_folder(tmp_path, ["a", "b"])
    compared = compare_scores({"base": {"q": [1.0, 2.0]}, "ours": {"q": [2.0, 2.0]}}, proxy=["q"])
    results = {
        "models": {"base": {"path": "b"}, "ours": {"path": "o"}},
        "settings": {"seed": 0},
        "proxy": ["q"],
        "gold": [],
        "sets": {"shapes": compared},
        "votes": None,
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert update_votes(tmp_path) is None
    pair = VotePair("shapes", "a", 0, 0, "base", "ours")
    answers = {"quality": "left", "alignment": "left", "overall": "left"}
    Ballots(tmp_path).add("me", pair, "ours", answers)
    for _ in range(2):  # again is the same
        content = update_votes(tmp_path)
        assert json.loads((tmp_path / "results.json").read_text()) == content
        assert content["sets"] == results["sets"]
        assert content["votes"]["comparisons"][0]["questions"]["overall"]["win"] == 1
        report = (tmp_path / "results.md").read_text(encoding="utf-8")
        assert report.count("## Human comparison") == 1 and "| ours | [2 ± 0] |" in report
        assert (tmp_path / "votes.png").is_file()
