"""UniGenBench's judge: what it asks, what it reads, and what becomes of it."""

import asyncio
import re

import pytest
from judge_server import JudgeServer
from PIL import Image

from trl_flow.evaluation.inputs import computed_by
from trl_flow.prompt_words import dimension_of
from trl_flow.rewards import JudgeError, UniGenBenchReward
from trl_flow.rewards.checks import check_reward_func
from trl_flow.rewards.judge_prompts import UNIGENBENCH_TESTPOINTS, passed_testpoints
from trl_flow.rewards.scorer import RewardScorer


POINTS = ["Style", "Attribute - Color", "Attribute - Size"]
ABOUT = ["an etching", "a {red} hat", "a huge dog"]


@pytest.fixture(autouse=True)
def no_certificates(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))


def flat(value):
    return Image.new("RGB", (6, 4), (value, 10, 200))


def answered(scores):
    return f'<description>\n<analysis>["It\'s there.", "no, [0]"]</analysis>\n<score>{scores}</score>\n</description>'


def score(server, values, testpoints=None, descriptions=None, logs=None, **settings):
    reward = UniGenBenchReward(base_url=server.base_url, **settings)
    columns = {
        "testpoints": [POINTS] * len(values) if testpoints is None else testpoints,
        "testpoint_descriptions": [ABOUT] * len(values) if descriptions is None else descriptions,
    }
    scored = RewardScorer([reward]).score(["a {prompt} dog"] * len(values), [flat(v) for v in values], columns)
    if logs is not None:
        logs.update(metrics=dict(scored.logs.metrics), columns=dict(scored.logs.columns))
    return [None if v != v else v for v in scored.values[0]]


def test_there_are_27_test_points_of_ten_dimensions():
    assert len(UNIGENBENCH_TESTPOINTS) == 27
    assert list(dict.fromkeys(map(dimension_of, UNIGENBENCH_TESTPOINTS))) == [
        *("Style", "World Knowledge", "Attribute", "Action", "Relationship", "Compound", "Grammar"),
        *("Entity Layout", "Logical Reasoning", "Text Generation"),
    ]
    assert all(UNIGENBENCH_TESTPOINTS.values())


def test_it_asks_once_about_all_test_points_and_gives_the_share_that_is_passed():
    logs = {}
    with JudgeServer(lambda request: answered("[1, 0, 1]")) as server:
        assert score(server, [1], logs=logs, max_tokens=99) == [pytest.approx(2 / 3)]
    (request,) = server.requests
    assert request.kinds == ["image_url", "text"]
    assert request.image.getpixel((0, 0)) == (1, 10, 200)
    assert "Text: [a {prompt} dog]" in request.text and "Test points, 3 of them" in request.text
    assert re.findall(r"^\* (.*?) \(whether .*\), here: (.*)$", request.text, re.MULTILINE) == list(
        zip(POINTS, ABOUT, strict=True)
    )
    assert request.body["max_tokens"] == 99 and request.body["temperature"] == 0
    assert logs["metrics"] == {
        "unigenbench/unreadable": [0.0],
        "unigenbench/Style": [1.0],
        "unigenbench/Attribute": [0.5],
    }
    assert logs["columns"] == {"unigenbench_testpoints": {0: [1, 0, 1]}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (answered("[1, 0, 1]"), [1, 0, 1]),
        (answered("\n[\n1,0,\n1\n]\n"), [1, 0, 1]),
        (answered("['1', \"0\", 1]"), [1, 0, 1]),
        ("<think><score>[0, 0, 0]</score>?</think>" + answered("[1, 1, 1]"), [1, 1, 1]),
        ("<score>[0,0,0]</score>", [0, 0, 0]),
        (answered("[1, 0, 1,]"), [1, 0, 1]),
        (answered("[1.0, 0, 1.0 , ]"), [1, 0, 1]),
        (answered("[1，0， 1]"), [1, 0, 1]),
        (answered("[true, False, True]"), [1, 0, 1]),
        ("<Score>[1, 0, 1]</SCORE>", [1, 0, 1]),
        ("**<score>** **[1, 0, **1**]** </score>", [1, 0, 1]),
        (r"<score>`\[1, 0, 1\]`</score>", [1, 0, 1]),
        ("<score>[1, 0</score> or rather <score>[0, 1, 1]</score>", [0, 1, 1]),
        # Partial answers: which of the test points they are of is not known
        (answered("[1, 0]"), None),
        (answered("[1, 0, 1, 1]"), None),
        (answered("[1, None, 1]"), None),
        (answered("[1, , 1]"), None),
        (answered("[1, 0,, ]"), None),
        (answered("[1, 0, ]"), None),
        (answered("[]"), None),
        # Broken ones
        (answered("[1, 0.5, 1]"), None),
        (answered("[1, 0, 2]"), None),
        (answered("1, 0, 1"), None),
        ("<score>[1, 0, 1", None),
        ("Score: [1, 0, 1]", None),
        ("I cannot judge this.", None),
        ("", None),
    ],
)
def test_answers_are_read(answer, expected):
    assert passed_testpoints(answer, 3) == expected


def test_one_test_point():
    with JudgeServer(lambda request: answered("[1]")) as server:
        assert score(server, [1], [["Style"]], [["an etching"]]) == [1.0]


def test_an_answer_that_cannot_be_read_is_asked_for_once_more():
    def respond(request):
        return answered("[1, 0]") if request.body["temperature"] == 0 else answered("[1, 0, 0]")

    logs = {}
    with JudgeServer(respond) as server:
        assert score(server, [1], logs=logs) == [pytest.approx(1 / 3)]
    assert [request.body["temperature"] for request in server.requests] == [0.0, 0.7]
    assert logs["metrics"]["unigenbench/unreadable"] == [0.0]


def test_an_image_without_an_answer_that_can_be_read_counts_for_nothing(caplog):
    def respond(request):
        return answered("[1]") if request.image.getpixel((0, 0))[0] == 7 else answered("[0, 1, 1]")

    logs = {}
    with JudgeServer(respond) as server:
        assert score(server, [5, 7], logs=logs) == [pytest.approx(2 / 3), None]
    assert "1 of 2 answers to 'unigenbench' cannot be read" in caplog.text
    assert logs["metrics"] == {
        "unigenbench/unreadable": [0.5],
        "unigenbench/Style": [0.0],
        "unigenbench/Attribute": [1.0],
    }
    assert logs["columns"]["unigenbench_testpoints"] == {0: [0, 1, 1], 1: None}


def test_several_images_without_one_answer_that_can_be_read_are_an_error():
    with JudgeServer(lambda request: "No.") as server:
        reward = UniGenBenchReward(base_url=server.base_url)
        arguments = {"testpoints": [POINTS] * 2, "testpoint_descriptions": [ABOUT] * 2}
        with pytest.raises(JudgeError, match="Not one of the 2 answers to 'unigenbench' can be read"):
            asyncio.run(reward(prompts=["p", "p"], images=[flat(1), flat(2)], **arguments))


def test_rows_without_test_points_have_no_score_and_are_not_asked_about():
    with JudgeServer(lambda request: answered("[1, 1, 1]")) as server:
        assert score(server, [1, 2, 3], [None, POINTS, []], [None, ABOUT, []]) == [None, 1.0, None]
    assert len(server.requests) == 1


def test_test_points_in_another_language_are_asked_about_by_their_names():
    with JudgeServer(lambda request: answered("[1]")) as server:
        assert score(server, [1], [["属性-数量"]], [["一只"]]) == [1.0]
    assert "* 属性-数量, here: 一只\n" in server.requests[0].text


@pytest.mark.parametrize(
    ("names", "about"), [(POINTS, ABOUT[:2]), (POINTS, None), ("Style", "etching"), (["Style"], [3])]
)
def test_rows_that_are_no_test_points_are_refused(names, about):
    reward = UniGenBenchReward(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="'p' has test points .*load_unigenbench"):
        asyncio.run(reward(prompts=["p"], images=[flat(1)], testpoints=[names], testpoint_descriptions=[about]))


def test_another_judge_scores_anew():
    """What an evaluation knows a reward by."""
    address = {"base_url": "http://127.0.0.1:9/v1"}
    one, other = (computed_by(UniGenBenchReward(model=model, **address)) for model in ("a", "b"))
    assert one != other and "UniGenBenchReward" in one


def test_sets_without_test_points_are_refused_before_anything_is_asked():
    reward = UniGenBenchReward(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="needs a column 'testpoints'"):
        check_reward_func(reward, ["prompt"])
