"""Judges ask a model server what they should, read its answers, and say what is wrong when it fails."""

import asyncio
import gc
import hashlib
import inspect
import json
import logging
import math
import socket
import sys
import threading
import time

import numpy as np
import pytest
from judge_server import JudgeServer
from PIL import Image

from trl_flow.rewards import DeQAReward, JudgeError, UnifiedReward, VLMComparer, VLMJudgeReward, judge_prompts
from trl_flow.rewards.checks import RewardError, check_reward_func, is_dense
from trl_flow.rewards.judge_prompts import axis_score, final_score, preferred_image
from trl_flow.rewards.scorer import RewardScorer


AT_ONCE = {"retry-after-ms": "1"}  # asks the client not to wait before it tries again


@pytest.fixture(autouse=True)
def no_certificates(tmp_path, monkeypatch):
    """These servers speak plain HTTP, and reading the machine's certificates would take most of the tests' time."""
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))


def flat(value, size=(6, 4)):
    return Image.new("RGB", size, (value, 10, 200))


def noise(seed=0, size=(23, 17)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def red(request):
    """The red of a flat picture, as an answer."""
    return f"Final Score: {request.image.getpixel((0, 0))[0]}"


def judge(server, template="Rate this: {prompt}", parse=final_score, **settings):
    return VLMJudgeReward(template, parse, **{"base_url": server.base_url, **settings})


def score(reward, prompts, images, **kwargs):
    return asyncio.run(reward(prompts=prompts, images=images, **kwargs))


# --- the request ---


def test_a_request_holds_the_model_the_pixels_and_the_prompt():
    picture = noise()
    with JudgeServer(lambda request: "Final Score: 4.5") as server:
        reward = judge(server, "{prompt}? {x} 100% {prompt}", model="my-judge", api_key="secret", max_tokens=77)
        assert score(reward, ['a {cat} "meows" – ünïcødé 猫\n'], [picture]) == [4.5]
    (request,) = server.requests
    assert request.text == 'a {cat} "meows" – ünïcødé 猫\n? {x} 100% a {cat} "meows" – ünïcødé 猫\n'
    assert request.image.mode == "RGB"
    assert np.array_equal(np.asarray(request.image), np.asarray(picture))
    assert request.kinds == ["image_url", "text"]
    assert request.api_key == "secret"
    assert {key: request.body[key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "my-judge",
        "max_tokens": 77,
        "temperature": 0.0,
    }
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16", "LA"])
def test_pictures_of_every_mode_arrive_as_their_rgb_pixels(mode):
    gray = np.asarray(noise().convert("L"))
    picture = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else noise().convert(mode)
    with JudgeServer(lambda request: "Final Score: 1") as server:
        score(judge(server), ["p"], [picture])
    expected = np.stack([gray] * 3, axis=-1) if mode == "I;16" else np.asarray(picture.convert("RGB"))
    assert np.array_equal(np.asarray(server.requests[0].image), expected)


def test_a_tiny_and_a_large_picture_arrive_whole():
    pictures = [noise(size=(1, 1)), noise(size=(1600, 1200))]
    with JudgeServer(lambda request: f"Final Score: {request.image.width}") as server:
        assert score(judge(server), ["p", "p"], pictures) == [1.0, 1600.0]
    large = max((request.image for request in server.requests), key=lambda image: image.width)
    assert np.array_equal(np.asarray(large), np.asarray(pictures[1]))


def test_the_only_model_of_the_server_is_asked_for_once():
    with JudgeServer(red, models=("the-only-one",)) as server:
        reward = judge(server)
        score(reward, ["p"] * 8, [flat(1)] * 8)
        score(reward, ["p"], [flat(1)])
    assert {request.body["model"] for request in server.requests} == {"the-only-one"}
    assert server.paths.count("/v1/models") == 1


@pytest.mark.parametrize(("models", "listed"), [(("a-7b", "b-7b"), "2 models: a-7b, b-7b"), ((), "0 models: none")])
def test_without_one_model_the_name_is_asked_for(models, listed):
    with JudgeServer(red, models=models) as server, pytest.raises(JudgeError, match=f"{listed}.*model=") as raised:
        score(judge(server), ["p"], [flat(1)])
    assert server.base_url in str(raised.value)


def test_url_and_key_come_from_the_environment_unless_given(monkeypatch):
    with JudgeServer(lambda request: "Final Score: 2") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
        score(VLMJudgeReward("{prompt}", final_score), ["p"], [flat(1)])
        monkeypatch.delenv("OPENAI_API_KEY")
        score(VLMJudgeReward("{prompt}", final_score), ["p"], [flat(1)])
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
        score(judge(server, api_key="given"), ["p"], [flat(1)])
    assert [request.api_key for request in server.requests] == ["from-environment", "EMPTY", "given"]


# --- scores ---


def test_scores_come_back_in_the_order_of_the_pictures_whatever_the_order_of_the_answers():
    def respond(request):
        time.sleep(0.05 if request.image.getpixel((0, 0))[0] % 2 else 0)
        return red(request)

    values = list(range(12))
    with JudgeServer(respond) as server:
        assert score(judge(server), [f"p{i}" for i in values], [flat(i) for i in values]) == values
    assert sorted(request.text for request in server.requests) == sorted(f"Rate this: p{i}" for i in values)


def test_requests_run_at_the_same_time_up_to_the_limit():
    three_at_once = threading.Barrier(3)

    def respond(request):
        three_at_once.wait(10)  # broken, and the request fails, unless three are under way
        return "Final Score: 1"

    with JudgeServer(respond) as server:
        reward = judge(server, max_concurrency=3, timeout=20, max_retries=0, model="m")
        assert score(reward, ["p"] * 9, [flat(1)] * 9) == [1.0] * 9
    assert server.most_at_once == 3


def test_an_unreadable_answer_is_asked_for_again_less_greedily():
    def respond(request):
        return "Hard to say." if request.body["temperature"] == 0 else "Final Score: 3"

    with JudgeServer(respond) as server:
        assert score(judge(server), ["p"], [flat(1)]) == [3.0]
    assert [request.body["temperature"] for request in server.requests] == [0.0, 0.7]


def test_an_answer_that_stays_unreadable_gives_none_a_warning_and_a_metric(caplog):
    def respond(request):
        return "I cannot judge this." if request.image.getpixel((0, 0))[0] == 7 else "Final Score: 5"

    logged = []
    with JudgeServer(respond) as server, caplog.at_level(logging.WARNING):
        reward = judge(server, name="my_judge")
        scores = score(
            reward, list("abcd"), [flat(1), flat(7), flat(1), flat(1)], log_metric=lambda *item: logged.append(item)
        )
    assert scores == [5.0, None, 5.0, 5.0]
    assert logged == [("my_judge/unreadable", 0.25)]
    assert "1 of 4 answers to 'my_judge' cannot be read. The first begins 'I cannot judge this.'" in caplog.text
    assert len(server.requests) == 5


def test_answers_of_which_none_can_be_read_are_an_error_that_shows_one():
    with JudgeServer(lambda request: "Sorry, " + "x" * 1000) as server:
        with pytest.raises(JudgeError, match="Not one of the 2 answers.*'Sorry, xxx.*max_tokens") as raised:
            score(judge(server), ["p", "q"], [flat(1), flat(2)])
        assert len(str(raised.value)) < 700
        assert score(judge(server), ["p"], [flat(1)]) == [None]  # one picture may be a strange one


@pytest.mark.parametrize(("answer", "expected"), [("0", None), ("1", 1.0), ("5", 5.0), ("5.1", None), ("45", None)])
def test_a_score_beyond_the_range_is_none(answer, expected):
    with JudgeServer(lambda request: f"Final Score: {answer}") as server:
        assert score(judge(server, range=(1, 5)), ["p"], [flat(1)]) == [expected]


def test_an_answer_without_text_is_unreadable():
    with JudgeServer(lambda request: {"message": {"role": "assistant", "content": None}}) as server:
        assert score(judge(server), ["p"], [flat(1)]) == [None]


def test_nothing_is_asked_for_no_pictures():
    logged = []
    with JudgeServer(red) as server:
        assert score(judge(server), [], [], log_metric=lambda *item: logged.append(item)) == []
    assert server.paths == [] and logged == []


def test_prompts_and_images_that_do_not_match_in_number_are_refused():
    with JudgeServer(red) as server, pytest.raises(ValueError):
        score(judge(server), ["p", "q"], [flat(1)])


def test_an_error_in_parse_is_not_hidden():
    def parse(answer):
        raise ZeroDivisionError("mine")

    with JudgeServer(red) as server, pytest.raises(ZeroDivisionError, match="mine"):
        score(judge(server, parse=parse), ["p"], [flat(1)])


# --- failures of the server ---


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_failures_that_pass_are_tried_again(status):
    with JudgeServer(red) as server:
        server.failures = [(status, AT_ONCE, "{}")] * 3
        assert score(judge(server, max_retries=3, model="m"), ["p"], [flat(9)]) == [9.0]
    assert len(server.paths) == 4


def test_the_client_waits_as_long_as_the_server_asks():
    with JudgeServer(red) as server:
        server.failures = [(429, {"Retry-After": "1"}, "{}")]
        start = time.monotonic()
        score(judge(server, model="m"), ["p"], [flat(9)])
    assert time.monotonic() - start >= 1


def test_failures_that_stay_end_in_an_error_with_the_servers_message():
    with JudgeServer(red) as server:
        server.failures = [(503, AT_ONCE, json.dumps({"error": {"message": "the model is loading"}}))] * 9
        with pytest.raises(JudgeError, match="status 503.*the model is loading") as raised:
            score(judge(server, max_retries=2, model="m"), ["p"], [flat(9)])
    assert server.base_url in str(raised.value)
    assert len(server.paths) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_tried_again_and_ends_the_other_requests(status):
    with JudgeServer(red) as server:
        server.failures = [(status, {}, json.dumps({"error": {"message": "you sent nonsense"}}))] * 99
        with pytest.raises(JudgeError, match=f"status {status}.*you sent nonsense"):
            score(judge(server, max_concurrency=1, model="m"), ["p"] * 50, [flat(9)] * 50)
        time.sleep(0.05)
    assert len(server.paths) < 5


def test_a_wrong_path_is_explained():
    with JudgeServer(red) as server:
        server.failures = [(404, {}, "Not Found")]
        with pytest.raises(JudgeError, match="status 404.*mostly ends in /v1"):
            score(judge(server, model="m", base_url=server.base_url.removesuffix("/v1")), ["p"], [flat(9)])


@pytest.mark.parametrize(
    ("content_type", "text"),
    [
        ("text/html", "<html>Welcome</html>"),
        ("application/json", "{}"),
        ("application/json", '{"choices": []}'),
        ("application/json", "[]"),
        ("application/json", "{not json"),
        ("application/json", ""),
    ],
)
def test_something_other_than_a_chat_completion_is_an_error_that_names_the_server(content_type, text):
    with JudgeServer(red) as server:
        server.failures = [(200, {"Content-Type": content_type}, text)] * 20
        with pytest.raises(JudgeError) as raised:
            score(judge(server, model="m", max_retries=0), ["p"], [flat(9)])
    assert server.base_url in str(raised.value)


def test_a_server_that_hangs_is_named():
    release = threading.Event()
    with JudgeServer(lambda request: release.wait(20) and "") as server:
        with pytest.raises(JudgeError, match="no answer within 0.2 seconds, in 2 tries") as raised:
            score(judge(server, timeout=0.2, max_retries=1, model="m"), ["p"], [flat(9)])
        release.set()
    assert server.base_url in str(raised.value)
    assert len(server.paths) == 2


@pytest.fixture
def nobody():
    """A URL at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}/v1"


def test_a_server_that_is_away_is_named(nobody):
    reward = VLMJudgeReward("{prompt}", final_score, base_url=nobody, max_retries=1)
    with pytest.raises(JudgeError, match="cannot be reached, in 2 tries.*Look whether it runs") as raised:
        score(reward, ["p"], [flat(9)])
    assert nobody in str(raised.value)


def test_in_a_trainer_the_error_names_the_reward_and_the_server(nobody):
    reward = VLMJudgeReward("{prompt}", final_score, base_url=nobody, max_retries=0, name="my_judge")
    with pytest.raises(RewardError, match="'my_judge' raised JudgeError") as raised:
        RewardScorer([reward]).score(["p"], [flat(9)], {})
    assert nobody in str(raised.value)


def test_a_server_that_is_restarted_is_used_again():
    server = JudgeServer(red)
    with server:
        reward = judge(server, model="m", max_retries=0)
        assert RewardScorer([reward]).score(["p"], [flat(1)], {}).rewards.tolist() == [[1.0]]
    with pytest.raises(RewardError, match="cannot be reached"):
        RewardScorer([reward]).score(["p"], [flat(1)], {})
    with server:
        assert RewardScorer([reward]).score(["p"], [flat(3)], {}).rewards.tolist() == [[3.0]]


# --- event loops, threads, closing ---


def test_the_trainers_loop_another_loop_and_a_running_loop_can_take_turns():
    with JudgeServer(red) as server:
        reward = judge(server)
        check_reward_func(reward, ["prompt", "text"])
        for value in (1, 2):
            arguments = ["p"], [flat(value)], {"text": ["t"]}
            assert RewardScorer([reward]).score(*arguments).rewards.tolist() == [[value]]
            assert score(reward, ["p"], [flat(value)]) == [value]

            async def notebook_cell(value=value):
                return await reward(prompts=["p"], images=[flat(value)])

            assert asyncio.run(notebook_cell()) == [value]


def test_several_threads_can_ask_at_the_same_time():
    results = {}
    with JudgeServer(red) as server:
        reward = judge(server)
        threads = [
            threading.Thread(target=lambda i=i: results.update({i: score(reward, ["p"] * 5, [flat(i)] * 5)}))
            for i in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert results == {i: [float(i)] * 5 for i in range(6)}


def test_the_pictures_of_a_call_share_few_connections_and_none_is_left_open():
    with JudgeServer(red) as server:
        reward = judge(server, max_concurrency=2, model="m")
        score(reward, ["p"] * 12, [flat(1)] * 12)
        assert len(server.requests) == 12
        assert server.connections <= 2
        assert reward.chat._connections == {}


def test_loops_that_end_leave_no_errors_behind():
    """What a client left open would complain when it is collected, in whichever loop runs by then."""
    complaints = []

    async def call(reward):
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        await reward(prompts=["p"], images=[flat(1)])
        gc.collect()
        await asyncio.sleep(0.01)

    with JudgeServer(red) as server:
        reward = judge(server)
        for _ in range(4):
            asyncio.run(call(reward))
    assert complaints == []


def test_cancelling_a_call_ends_its_requests():
    release = threading.Event()

    def respond(request):
        release.wait(20)
        return "Final Score: 1"

    async def give_up(reward):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(reward(prompts=["p"] * 20, images=[flat(1)] * 20), 0.3)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    with JudgeServer(respond) as server:
        left = asyncio.run(give_up(judge(server, max_concurrency=2, model="m")))
        release.set()
    assert left == []
    assert len(server.requests) <= 2


# --- construction ---


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    for build in (lambda: VLMJudgeReward("", final_score, base_url="http://x"), UnifiedReward, DeQAReward):
        with pytest.raises(ImportError, match=r'pip install "trl_flow\[judge\]"'):
            build()


def test_without_a_url_the_constructor_says_how_to_give_one(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for build in (UnifiedReward, DeQAReward, lambda: VLMJudgeReward("", final_score)):
        with pytest.raises(ValueError, match="base_url is missing.*OPENAI_BASE_URL"):
            build()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_concurrency": 0}, "max_concurrency is 0"),
        ({"max_concurrency": True}, "max_concurrency is True"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"max_retries": 1.5}, "max_retries is 1.5"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": math.nan}, "timeout is nan"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"range": (5, 1)}, r"range is \(5, 1\)"),
    ],
)
def test_bad_settings_are_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        VLMJudgeReward("{prompt}", final_score, base_url="http://localhost:1/v1", **setting)


@pytest.mark.parametrize(("template", "parse"), [(3, final_score), ("{prompt}", None), (None, final_score)])
def test_a_question_that_cannot_be_asked_or_read_is_refused(template, parse):
    for judge_class in (VLMJudgeReward, VLMComparer):
        with pytest.raises(TypeError, match="A judge needs a text and a function"):
            judge_class(template, parse, base_url="http://localhost:1/v1")


def test_a_misspelt_setting_is_refused():
    with pytest.raises(TypeError, match="base_ulr"):
        UnifiedReward(base_ulr="http://localhost:1/v1")


def test_a_judge_is_asynchronous_and_not_for_intermediate_pictures():
    reward = VLMJudgeReward("{prompt}", final_score, base_url="http://localhost:1/v1", range=(0, 10), name="mine")
    assert inspect.iscoroutinefunction(type(reward).__call__)
    assert is_dense(reward) is False
    assert reward.__name__ == "mine" and reward.info.range == (0, 10)
    assert VLMJudgeReward.info.range == (-math.inf, math.inf)


# --- UnifiedReward ---


@pytest.mark.parametrize(
    ("kind", "name", "asks_for", "answer", "expected"),
    [
        ("overall", "unifiedreward", "assign a score from 1 to 5 after 'Final Score:'", "Final Score: 3.25", 3.25),
        ("overall_with_elements", "unifiedreward_overall_with_elements", "Extract key", "cat: 1\nFinal Score: 4", 4.0),
        ("alignment", "unifiedreward_alignment", "Coherence Score (1-5): Y", "all", 2.5),
        ("coherence", "unifiedreward_coherence", "Coherence Score (1-5): Y", "all", 3.5),
        ("style", "unifiedreward_style", "Coherence Score (1-5): Y", "all", 4.5),
    ],
)
def test_unified_reward_asks_by_its_prompt_and_reads_its_score(kind, name, asks_for, answer, expected):
    axes = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 4.5\n"
    with JudgeServer(lambda request: axes if answer == "all" else answer) as server:
        reward = UnifiedReward(kind, base_url=server.base_url)
        assert score(reward, ["two {red} cats"], [noise()]) == [expected]
    (request,) = server.requests
    assert request.kinds == ["image_url", "text"]
    assert asks_for in request.text
    assert request.text.endswith("Text Caption: [two {red} cats]")
    assert reward.__name__ == name


def test_unified_reward_is_1_to_5():
    with JudgeServer(lambda request: "Final Score: 6") as server:
        reward = UnifiedReward(base_url=server.base_url)
        assert score(reward, ["p"], [flat(1)]) == [None]
    assert reward.info.range == (1.0, 5.0)


def test_an_unknown_score_of_unified_reward_is_refused():
    with pytest.raises(ValueError, match="score='quality'.*alignment"):
        UnifiedReward("quality", base_url="http://localhost:1/v1")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Final Score: 4", 4.0),
        ("Final Score:3.75\n", 3.75),
        ("cat (animal): 1\nhat (object): 0\nFinal Score: 2.5.", 2.5),
        ("**Final Score:** **3**", 3.0),
        ("**Final Score**: 3", 3.0),
        ("final score: 1/5", 1.0),
        ("Final Score:\n\n5", 5.0),
        ("Final Score: 2 ... Final Score: 4", 2.0),
        ("Final Score: [4]", 4.0),
        ("**Final Score: [3.5]**", 3.5),
        ("Final Score：4", 4.0),
        ("Final Score (1-5): 4", 4.0),
        ('{"Final Score": 4}', 4.0),
        ("Final Score: [1-5]", None),
        ("Final Score: good", None),
        ("Score: 4", None),
        ("after 'Final Score:'", None),
        ("", None),
    ],
)
def test_final_scores_are_read(answer, expected):
    assert final_score(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Alignment Score (1-5): 2.694700002670288\nStyle Score (1-5): 2.8", 2.694700002670288),
        ("Style Score (1-5): 2.8", None),
        ("Alignment Score: 3", 3.0),
        ("Alignment Score(1-5): 4", 4.0),
        ("Alignment Score (1-5) : 4", 4.0),
        ("**Alignment Score** (1–5): **4.5**", 4.5),
        ("alignment score（1-5）：2", 2.0),
        ("Alignment Score：2", 2.0),
        ("Alignment Score (1-5): [2]", 2.0),
        ("Alignment Score (1-5): X\nAlignment Score (1-5): 3", 3.0),
        ("Alignment Score (1-10): 8", None),
        ("Alignment: 4", None),
        ("__Alignment Score__ [1 - 5]: `4`", 4.0),
        ("Alignment Score (1-5): 1-5", None),  # the template again
    ],
)
def test_axis_scores_are_read(answer, expected):
    assert axis_score(answer, "alignment") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>Image 2 is better in color.</think>\n<answer>Image 1 is better</answer>", "a"),
        ("<think>...</think><answer>\nImage 2 is better\n</answer>", "b"),
        ("Image 1 is better than Image 2.", "a"),
        ("**Image 2** is\nbetter.", "b"),
        ("After all, image 2 is better.", "b"),
        ("Both images are equally good.", "tie"),
        ("Image 1 is better. Image 2 is better.", None),
        ("<answer></answer> Image 1 is better", None),
        ("<think>Image 1 is better", "a"),
        ("", None),
    ],
)
def test_preferences_are_read(answer, expected):
    assert preferred_image(answer) == expected


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("UNIFIED_REWARD_SCORE", "bb5823f33a1fda4c"),
        ("UNIFIED_REWARD_SCORE_WITH_ELEMENTS", "f56f919ce3bc6aab"),
        ("UNIFIED_REWARD_PAIR", "0fd2f5c43a065165"),
        ("UNIFIED_REWARD_THINK_PAIR", "342f6a4bd0efdae0"),
        ("UNIFIED_REWARD_AXES", "75d52d3ae771f89b"),
    ],
)
def test_prompts_are_the_published_ones_to_the_letter(name, sha256):
    """The hashes are those of the prompts in the authors' scripts, with `{prompt}` in the place of the caption."""
    assert hashlib.sha256(getattr(judge_prompts, name).encode()).hexdigest().startswith(sha256)


# --- DeQA ---


def levels(probabilities, text="good"):
    """A choice whose first token has these probabilities."""
    top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in probabilities.items()]
    first = {"token": "x", "logprob": 0.0, "bytes": None, "top_logprobs": top}
    return {"message": {"role": "assistant", "content": text}, "logprobs": {"content": [first], "refusal": None}}


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({"excellent": 1.0}, 5.0),
        ({"bad": 1e-9}, 1.0),
        # 0.5 x 5 + 0.25 x 4 + 0.125 x 3 + 0.0625 x 2 + 0.0625 x 1
        ({" excellent": 0.5, " good": 0.25, " fair": 0.125, " poor": 0.0625, " bad": 0.0625}, 4.0625),
        # Only the five words count, and only against each other: (0.3 x 4 + 0.1 x 3) / 0.4
        ({" good": 0.3, " fair": 0.1, " nice": 0.6}, 3.75),
        # The same word in other spellings: (0.2 + 0.2 + 0.2) good against 0.2 bad
        ({"Good": 0.2, "▁good": 0.2, "Ġgood": 0.2, " bad": 0.2}, 3.25),
        ({" very": 0.6, " fairly": 0.4}, 4.0),  # none of the five: the word of the answer
    ],
)
def test_deqa_is_the_mean_level(probabilities, expected):
    with JudgeServer(lambda request: levels(probabilities)) as server:
        (value,) = score(DeQAReward(base_url=server.base_url), ["p"], [flat(1)])
    assert value == pytest.approx(expected, rel=1e-12)


def test_deqa_asks_as_its_authors_do():
    with JudgeServer(lambda request: levels({" poor": 1.0})) as server:
        assert score(DeQAReward(base_url=server.base_url), ["the prompt"], [noise()]) == [2.0]
    (request,) = server.requests
    assert request.kinds == ["text", "image_url"]
    assert request.text == "How would you rate the quality of this image?"
    assert request.body["messages"][1] == {"role": "assistant", "content": "The quality of the image is"}
    assert request.body["continue_final_message"] is True and request.body["add_generation_prompt"] is False
    assert request.body["logprobs"] is True and request.body["top_logprobs"] == 20


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" excellent.", 5.0),
        ("Bad", 1.0),
        ("The quality of the image is fair.", 3.0),
        ("very good", None),
        ("", None),
    ],
)
def test_deqa_reads_the_word_where_there_are_no_probabilities(answer, expected):
    with JudgeServer(lambda request: answer) as server:
        assert score(DeQAReward(base_url=server.base_url), ["p"], [flat(1)]) == [expected]
    assert len(server.requests) == 1
