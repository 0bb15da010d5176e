"""Win rates are shares of comparisons won, within groups and whatever the order of the pictures."""

import asyncio
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import JudgeServer
from PIL import Image

from trl_flow.rewards import JudgeError, UnifiedRewardComparer, UnreadableAnswer, VLMComparer, WinRateReward
from trl_flow.rewards.checks import check_reward_func, is_dense, reward_name
from trl_flow.rewards.judge_prompts import preferred_image
from trl_flow.rewards.scorer import RewardScorer


@pytest.fixture
def no_certificates(tmp_path, monkeypatch):
    """The servers speak plain HTTP, and reading the machine's certificates would take most of the tests' time."""
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))


def picture(value):
    return Image.new("RGB", (2, 2), (value, 0, 0))


def value(image):
    return image.getpixel((0, 0))[0]


def brighter(prompt, image_a, image_b):
    a, b = value(image_a), value(image_b)
    return "tie" if a == b else "a" if a > b else "b"


def win_rates(reward, prompts, images, **columns):
    return asyncio.run(reward(prompts=prompts, images=images, **columns))


def of_one_group(reward, values):
    return win_rates(reward, ["p"] * len(values), [picture(v) for v in values])


# --- values ---


def test_a_hand_computed_group():
    # 9 beats 5, 5 and 1; the two 5s tie and beat 1
    assert of_one_group(WinRateReward(brighter), [5, 9, 1, 5]) == [1.5 / 3, 3 / 3, 0 / 3, 1.5 / 3]


@pytest.mark.parametrize("both_orders", [False, True])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_perfect_order_gives_equal_steps_from_0_to_1(size, both_orders):
    ranks = [(5 * i) % size if size != 3 else i for i in range(size)]
    rates = of_one_group(WinRateReward(brighter, both_orders=both_orders), [10 * rank for rank in ranks])
    assert rates == pytest.approx([rank / (size - 1) for rank in ranks])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(2, 7), both_orders=st.booleans())
def test_rates_of_a_group_add_up_to_half_its_size_and_follow_the_pictures(data, size, both_orders):
    outcomes = st.sampled_from(["a", "b", "tie"]) | st.floats(0, 1)
    table = {pair: data.draw(outcomes) for pair in itertools.combinations(range(size), 2)}

    def comparer(prompt, image_a, image_b):
        a, b = value(image_a), value(image_b)
        if a < b:
            return table[a, b]
        outcome = table[b, a]
        return {"a": "b", "b": "a", "tie": "tie"}[outcome] if isinstance(outcome, str) else 1 - outcome

    reward = WinRateReward(comparer, both_orders=both_orders)
    rates = of_one_group(reward, range(size))
    assert sum(rates) == pytest.approx(size / 2)
    assert all(0 <= rate <= 1 for rate in rates)
    order = data.draw(st.permutations(range(size)))
    assert of_one_group(reward, order) == pytest.approx([rates[i] for i in order])


def test_both_orders_even_out_a_judge_that_prefers_the_first_picture():
    def first(prompt, image_a, image_b):
        return "a"

    assert of_one_group(WinRateReward(first), [1, 2, 3]) == [1.0, 0.5, 0.0]
    assert of_one_group(WinRateReward(first, both_orders=True), [1, 2, 3]) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("wrap", [float, np.float32, torch.tensor, lambda p: np.array(p)])
def test_a_comparer_may_give_probabilities(wrap):
    rates = of_one_group(WinRateReward(lambda prompt, a, b: wrap(0.25)), [1, 2, 3])
    # The first loses 3/4 of both, the second wins 3/4 and 1/4, the third 3/4 of both
    assert rates == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("outcome", ["A", "c", "", None, 1.5, -0.1, float("nan"), [1], np.array([0.5, 0.5])])
def test_anything_else_is_refused_with_the_prompt(outcome):
    with pytest.raises(ValueError, match="for two images of 'a red cat'. It must return 'a', 'b', 'tie'"):
        win_rates(WinRateReward(lambda *pair: outcome), ["a red cat"] * 2, [picture(1), picture(2)])


# --- which pictures are compared ---


class Counting:
    """Remembers the prompts and the values of the pictures that it is asked about."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompt, image_a, image_b):
        self.asked.append((prompt, value(image_a), value(image_b)))
        return brighter(prompt, image_a, image_b)


@pytest.mark.parametrize("both_orders", [False, True])
def test_every_two_pictures_of_a_group_are_compared_once_or_in_both_orders(both_orders):
    comparer = Counting()
    prompts = ["p"] * 5 + ["q"] * 3
    win_rates(WinRateReward(comparer, both_orders=both_orders), prompts, [picture(v) for v in range(8)])
    pairs = [("p", a, b) for a, b in itertools.combinations(range(5), 2)]
    pairs += [("q", a, b) for a, b in itertools.combinations(range(5, 8), 2)]
    if both_orders:
        pairs += [(prompt, b, a) for prompt, a, b in pairs]
    assert sorted(comparer.asked) == sorted(pairs)
    assert len(pairs) == (10 + 3) * (2 if both_orders else 1)


def test_pictures_are_compared_within_their_group_only():
    # 1 wins its group although it is darker than all of the other
    rates = win_rates(WinRateReward(brighter), ["p", "p", "q", "q"], [picture(v) for v in (1, 0, 9, 8)])
    assert rates == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "column",
    [
        ["x", "x", "y", "y"],
        [1.5, 1.5, None, None],
        [{"a": [1]}, {"a": [1]}, {"a": [2]}, {"a": [2]}],
        [np.array([1, 2]), np.array([1, 2]), np.array([1, 2, 3]), np.array([1, 2, 3])],
        [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([2.0])],
        [picture(1), picture(1), picture(2), picture(2)],
        [float("nan"), float("nan"), 1.0, 1.0],
    ],
    ids=["text", "None", "dict", "array", "tensor", "picture", "nan"],
)
def test_equal_prompts_with_different_columns_are_different_groups(column):
    images = [picture(v) for v in (1, 0, 9, 8)]
    rates = win_rates(WinRateReward(brighter), ["p"] * 4, images, target=column, same=["s"] * 4)
    assert rates == [1.0, 0.0, 1.0, 0.0]


def test_what_is_no_column_does_not_matter():
    arguments = {"trainer_state": object(), "log_extra": [1, 2], "note": "ab", "short": [1]}
    assert win_rates(WinRateReward(brighter), ["p"] * 2, [picture(1), picture(0)], **arguments) == [1.0, 0.0]


def test_a_prompt_that_comes_back_later_is_a_group_of_its_own():
    rates = win_rates(WinRateReward(brighter), ["p", "p", "q", "p"], [picture(v) for v in (1, 0, 5, 9)])
    assert rates == [1.0, 0.0, None, None]


def test_a_picture_without_others_gets_none_and_no_pictures_get_nothing():
    logged = []
    reward = WinRateReward(Counting())
    assert win_rates(reward, ["p"], [picture(1)], log_metric=lambda *item: logged.append(item)) == [None]
    assert win_rates(reward, [], []) == []
    assert reward.comparer.asked == [] and logged == []


def test_prompts_and_images_that_do_not_match_in_number_are_refused():
    for number in (1, 3):
        with pytest.raises(ValueError):
            win_rates(WinRateReward(brighter), ["p", "p"], [picture(1)] * number)


# --- comparers ---


def test_asynchronous_comparisons_run_at_the_same_time():
    async def call():
        everyone = asyncio.Event()
        asked = []

        async def comparer(prompt, image_a, image_b):
            asked.append(1)
            if len(asked) == 6:
                everyone.set()
            await asyncio.wait_for(everyone.wait(), 10)
            return brighter(prompt, image_a, image_b)

        return await WinRateReward(comparer)(prompts=["p"] * 4, images=[picture(v) for v in range(4)])

    assert asyncio.run(call()) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_failing_comparison_ends_the_others():
    async def call():
        ended = []

        async def comparer(prompt, image_a, image_b):
            if value(image_a) == 0 and value(image_b) == 1:
                raise ConnectionError("gone")
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(1)

        with pytest.raises(ConnectionError, match="gone"):
            await WinRateReward(comparer)(prompts=["p"] * 4, images=[picture(v) for v in range(4)])
        await asyncio.sleep(0)
        return len(ended)

    assert asyncio.run(call()) == 5


def test_unreadable_answers_are_ties_and_counted(caplog):
    def comparer(prompt, image_a, image_b):
        if value(image_a) == 0:
            raise UnreadableAnswer("no idea")
        return brighter(prompt, image_a, image_b)

    logged = []
    with caplog.at_level(logging.WARNING):
        rates = win_rates(
            WinRateReward(comparer),
            ["p"] * 3,
            [picture(v) for v in (0, 1, 2)],
            log_metric=lambda *item: logged.append(item),
        )
    assert rates == [0.5, 0.25, 0.75]
    assert logged == [("win_rate/unreadable", 2 / 3)]
    assert "2 of 3 answers to 'win_rate' cannot be read. The first begins 'no idea'" in caplog.text


def test_answers_of_which_none_can_be_read_are_an_error():
    def comparer(prompt, image_a, image_b):
        raise UnreadableAnswer("no idea")

    with pytest.raises(JudgeError, match="Not one of the 3 answers to 'win_rate'.*no idea"):
        of_one_group(WinRateReward(comparer), [1, 2, 3])


def test_the_trainers_way_of_calling_gives_the_same():
    reward = WinRateReward(brighter)
    check_reward_func(reward, ["prompt", "text"])
    scores = RewardScorer([reward]).score(["p"] * 3, [picture(v) for v in (0, 1, 2)], {"text": ["t"] * 3})
    assert scores.rewards.tolist() == [[0], [0.5], [1]]


def test_what_the_trainer_needs_to_know_of_it():
    reward = WinRateReward(brighter)
    assert reward_name(reward) == "win_rate"
    assert is_dense(reward) is False
    assert reward.needs_group is True


@pytest.mark.parametrize("comparer", ["judge", 1, Counting])
def test_a_comparer_that_cannot_be_called_is_refused(comparer):
    with pytest.raises(TypeError, match="must be a function"):
        WinRateReward(comparer)


def test_a_comparer_and_a_server_are_one_too_many():
    with pytest.raises(TypeError, match="both a comparer and base_url, model"):
        WinRateReward(brighter, base_url="http://localhost:1/v1", model="m")


def test_without_a_comparer_a_server_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="base_url is missing"):
        WinRateReward()


# --- a model that compares ---


def judged(request):
    a, b = (value(image) for image in request.images)
    return f"<think>Image 1: {a}/10, Image 2: {b}/10</think>\n<answer>Image {1 if a > b else 2} is better</answer>"


@pytest.mark.usefixtures("no_certificates")
def test_pref_grpo_from_end_to_end():
    with JudgeServer(judged) as server:
        reward = WinRateReward(base_url=server.base_url, max_concurrency=4)
        rates = RewardScorer([reward]).score(["a {cat}"] * 4, [picture(v) for v in (3, 0, 200, 7)], {}).rewards
    assert rates[:, 0].tolist() == pytest.approx([1 / 3, 0, 1, 2 / 3])
    assert len(server.requests) == 6
    assert server.most_at_once <= 4
    for request in server.requests:
        assert request.kinds == ["image_url", "image_url", "text"]
        assert "enclose all your detailed reasoning within <think>" in request.text
        assert request.text.endswith("Text Caption: [a {cat}]")
        assert request.body["max_tokens"] == 4096 and request.body["temperature"] == 0


@pytest.mark.usefixtures("no_certificates")
def test_without_thinking_the_other_prompt_is_used_and_ties_are_possible():
    with JudgeServer(lambda request: "Both images are equally good.") as server:
        comparer = UnifiedRewardComparer(think=False, base_url=server.base_url)
        assert of_one_group(WinRateReward(comparer), [1, 2]) == [0.5, 0.5]
    assert '"Both images are equally good."' in server.requests[0].text
    assert "<think>" not in server.requests[0].text


@pytest.mark.usefixtures("no_certificates")
def test_an_unreadable_comparison_is_asked_for_again_less_greedily():
    def respond(request):
        return "<think>...and so on" if request.body["temperature"] == 0 else "<answer>Image 1 is better</answer>"

    with JudgeServer(respond) as server:
        reward = WinRateReward(VLMComparer("{prompt}?", preferred_image, base_url=server.base_url))
        assert of_one_group(reward, [1, 2]) == [1.0, 0.0]
    assert [request.body["temperature"] for request in server.requests] == [0.0, 0.7]


@pytest.mark.usefixtures("no_certificates")
def test_a_comparison_that_stays_unreadable_is_a_tie():
    with JudgeServer(lambda request: "?") as server:
        reward = WinRateReward(VLMComparer("{prompt}?", preferred_image, base_url=server.base_url))
        assert of_one_group(reward, [1, 2]) == [0.5, 0.5]
    assert len(server.requests) == 2
