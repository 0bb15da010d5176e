import json

import numpy as np
import pytest
from tiny_comparisons import painted_folder

from trl_flow.evaluation.vote_plan import Ballots, VotePair, check_voter, left_models, vote_pairs, voting_order


PROMPTS = [f"prompt {i}" for i in range(30)]
PAIR = VotePair("shapes", "prompt 3", 7, 3, "base", "ours")
LEFT = {"quality": "left", "alignment": "tie", "overall": "right"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return painted_folder(tmp_path_factory.mktemp("run"), PROMPTS, models=("base", "flow", "guard"), number=2)


def test_pairs_are_a_random_choice_that_only_grows(folder):
    few, more = vote_pairs(folder, pairs=5), vote_pairs(folder, pairs=12)
    assert len(few) == 10 and few == more[:10]
    # Both adapters are asked about on the same prompts and images
    assert [(p.row, p.index) for p in few[::2]] == [(p.row, p.index) for p in few[1::2]]
    assert {(p.reference, p.other) for p in few} == {("base", "flow"), ("base", "guard")}
    assert all(p.index // 2 == p.row and p.prompt == PROMPTS[p.row] for p in more)
    assert {p.index % 2 for p in more} == {0, 1}
    assert len({p.row for p in more}) == 12
    assert vote_pairs(folder, pairs=5, seed=1) != few
    assert len(vote_pairs(folder, pairs=1000)) == 60


def test_models_can_be_chosen(folder):
    pairs = vote_pairs(folder, models=["flow", "guard"], pairs=3)
    assert {(p.reference, p.other) for p in pairs} == {("flow", "guard")}
    with pytest.raises(ValueError, match="no model 'gard', only base, flow, guard"):
        vote_pairs(folder, models=["flow", "gard"])
    for models in (["flow"], ["flow", "flow"], []):
        with pytest.raises(ValueError, match="two different models"):
            vote_pairs(folder, models=models)
    for pairs in (0, True, 2.5):
        with pytest.raises(ValueError, match="number of pairs"):
            vote_pairs(folder, pairs=pairs)


def test_missing_images_are_found_at_once(tmp_path):
    folder = painted_folder(tmp_path, ["a", "b"])
    folder.image_path("shapes", "ours", 1).unlink()
    with pytest.raises(ValueError, match=r"ours/000001\.png is missing"):
        vote_pairs(folder)


def test_each_voter_has_an_order_and_sides_of_their_own(folder):
    pairs = vote_pairs(folder)
    anna, bert = (voting_order(pairs, voter=name, seed=0) for name in ("anna", "bert"))
    assert anna != bert and anna != pairs and sorted(map(hash, anna)) == sorted(map(hash, pairs))
    assert anna == voting_order(pairs[::-1], voter="anna", seed=0)
    assert anna != voting_order(pairs, voter="anna", seed=1)
    assert left_models(anna, voter="anna", seed=0) != left_models(bert, voter="bert", seed=0)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 60])
def test_whoever_always_takes_one_side_favors_no_model(number):
    # Two comparisons with one reference: each is balanced by itself, at every point of the vote
    pairs = [VotePair("s", "p", i, i, "base", other) for i in range(number) for other in ("ours", "theirs")]
    for voter in map(str, range(5)):
        order = voting_order(pairs, voter=voter, seed=0)
        left = left_models(order, voter=voter, seed=0)
        for other in ("ours", "theirs"):
            wins = np.cumsum([1 if left[pair.key] == other else -1 for pair in order if pair.other == other])
            assert abs(wins).max() <= 1 and all(wins[1::2] == 0)


def test_sides_tell_nothing_about_order(folder):
    pairs = [VotePair("s", "p", i, i, "base", "ours") for i in range(2000)]
    order = voting_order(pairs, voter="x", seed=0)
    sides = left_models(order, voter="x", seed=0)
    left = np.array([sides[pair.key] == "base" for pair in order], dtype=float)
    assert abs(left.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)
    assert abs(np.corrcoef(left, np.arange(2000))[0, 1]) < 4 / np.sqrt(2000)


# ---- ballots ----


@pytest.mark.parametrize(
    "left, expected",
    [
        ("base", {"quality": "lose", "alignment": "tie", "overall": "win"}),
        ("ours", {"quality": "win", "alignment": "tie", "overall": "lose"}),
    ],
)
def test_votes_are_kept_in_terms_of_the_models(left, expected, tmp_path):
    ballots = Ballots(tmp_path)
    ballots.add("Zoë", PAIR, left, LEFT)
    (vote,) = Ballots(tmp_path).read("Zoë")["votes"]
    assert vote["answers"] == expected
    assert (vote["prompt"], vote["row"], vote["index"], vote["left"]) == ("prompt 3", 3, 7, left)
    (file,) = (tmp_path / "votes").iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["voter"] == "Zoë"


def test_a_pair_is_voted_on_once_by_each(tmp_path):
    ballots = Ballots(tmp_path)
    ballots.add("a", PAIR, "base", LEFT)
    with pytest.raises(ValueError, match="already"):
        ballots.add("a", PAIR, "base", LEFT)
    ballots.add("b", PAIR, "base", LEFT)
    assert [len(ballot["votes"]) for ballot in ballots.voters()] == [1, 1]
    # One person, whatever the case
    assert len(ballots.read("A")["votes"]) == 1


def test_undo_takes_the_last_until_the_results_are_seen(tmp_path):
    ballots = Ballots(tmp_path)
    with pytest.raises(ValueError, match="no vote"):
        ballots.undo("a")
    other = VotePair("shapes", "prompt 4", 8, 4, "base", "ours")
    ballots.add("a", PAIR, "base", LEFT)
    ballots.add("a", other, "base", LEFT)
    ballots.undo("a")
    assert [vote["key"] for vote in ballots.read("a")["votes"]] == [PAIR.key]
    ballots.mark_seen("a")
    with pytest.raises(ValueError, match="stay as they are"):
        ballots.undo("a")


@pytest.mark.parametrize(
    "answers",
    [
        None,
        {},
        {"quality": "left"},
        {**LEFT, "overall": "best"},
        {**LEFT, "more": "tie"},
        {**LEFT, "overall": ["tie"]},
    ],
)
def test_incomplete_answers_are_refused(answers, tmp_path):
    with pytest.raises(ValueError, match="answers"):
        Ballots(tmp_path).add("a", PAIR, "base", answers)
    assert list(tmp_path.iterdir()) == []


def test_damaged_votes_are_named_and_left(tmp_path):
    ballots = Ballots(tmp_path)
    ballots.add("a", PAIR, "base", LEFT)
    (file,) = (tmp_path / "votes").iterdir()
    file.write_text('{"votes": 3}')
    for call in (ballots.voters, lambda: ballots.read("a"), lambda: ballots.undo("a")):
        with pytest.raises(ValueError, match="cannot be read"):
            call()
    assert file.read_text() == '{"votes": 3}'


def test_names():
    assert check_voter("  Zoe\u0308   K. ") == "Zoë K."
    for name in ("", "   ", None, 7, "x" * 81, "a\0b", "a\u202eb", "\udc80"):
        with pytest.raises(ValueError, match="name"):
            check_voter(name)
