"""What holds for every reward with a model of its own, on tiny models of the true architectures, loaded from disk."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_reward_models import NAMES, make_reward, picture, save_reward_models

from trl_flow.rewards.checks import RewardError, check_reward_func, is_dense, reward_name
from trl_flow.rewards.named import named_reward
from trl_flow.rewards.scorer import RewardScorer


PROMPTS = ["a cat", "two dogs on a hill", "a cat", "", "ünï 漢字 \N{GRINNING FACE}"]
WITH_TEXT = [name for name in NAMES if name != "aesthetic"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reward_models(tmp_path_factory.mktemp("rewards"))


@pytest.fixture(scope="module")
def reward_of(folder):
    """Each reward, loaded once for the tests that change nothing."""
    rewards = {}

    def get(name):
        return rewards.setdefault(name, make_reward(name, folder))

    return get


def parts(reward):
    """What a reward has loaded."""
    return reward._loaded if isinstance(reward._loaded, tuple) else vars(reward._loaded).values()


def pictures():
    return [picture(0), picture(1, 64, 28), picture(2, 30, 90), picture(3, 28, 28), picture(4)]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_metrics_and_on_the_command_line_are_the_same(name, folder):
    reward = make_reward(name, folder)
    assert reward_name(reward) == name
    named = named_reward(name)
    assert type(named) is type(reward) and reward_name(named) == name
    check_reward_func(named, ["prompt", "target"])


@pytest.mark.parametrize("name", NAMES)
def test_scores_lie_in_the_stated_range_and_can_be_had_of_unfinished_pictures(name, reward_of):
    reward = reward_of(name)
    low, high = reward.info.range
    scores = reward(prompts=PROMPTS, images=pictures(), trainer_state=None)
    assert len(scores) == len(PROMPTS) and all(low <= score <= high for score in scores)
    assert is_dense(reward) and reward.info.higher_is_better


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_has_its_score_in_whatever_company(name, folder, reward_of):
    images = pictures()
    scores = reward_of(name)(PROMPTS, images)
    assert make_reward(name, folder, batch_size=2)(PROMPTS, images) == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert reward_of(name)(PROMPTS[::-1], images[::-1]) == pytest.approx(scores[::-1], rel=1e-4, abs=1e-5)
    alone = [reward_of(name)([prompt], [image])[0] for prompt, image in zip(PROMPTS, images, strict=True)]
    assert alone == pytest.approx(scores, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_matter_and_so_do_prompts_where_they_are_read(name, reward_of):
    reward = reward_of(name)
    first, second = reward(["a cat"] * 2, [picture(0), picture(1)])
    assert abs(first - second) > 1e-3
    first, second = reward(["a cat", "a dog"], [picture(0)] * 2)
    assert abs(first - second) > 1e-3 if name in WITH_TEXT else first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_long_prompts_are_cut_to_what_the_model_reads(name, reward_of):
    # One token a letter: 10 between the ends of CLIP's tiny context, 33 of ImageReward's 35
    read = 33 if name == "imagereward" else 10
    letters = [chr(ord("a") + number % 26) for number in range(400)]
    long, cut, shorter = " ".join(letters), " ".join(letters[:read]), " ".join(letters[: read - 1])
    scores = reward_of(name)([long, cut, shorter], [picture(0)] * 3)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert abs(scores[1] - scores[2]) > 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_other_modes_are_judged_as_rgb_and_left_as_they_were(name, mode, reward_of):
    image = picture(0).convert(mode)
    before = image.tobytes()
    expected = reward_of(name)(["a cat"], [image.convert("RGB")])
    assert reward_of(name)(["a cat"], [image]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert image.mode == mode and image.tobytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_what_is_under_alpha_and_16_bits_do_not_count(name, reward_of):
    gray = picture(0).convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    cut_outs = [Image.new("RGBA", gray.size, (*color, 0)) for color in ((0, 0, 0), (0, 255, 0))]
    for image in cut_outs:
        image.paste(picture(1).resize((9, 9)), (3, 3))
    scores = reward_of(name)(["a cat"] * 4, [gray, deep, *cut_outs])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4) and scores[2] == pytest.approx(scores[3], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (200, 2), (600, 500)])
def test_pictures_of_any_size_have_a_score(name, size, reward_of):
    # A picture of one color keeps it in every size
    flat = Image.new("RGB", size, (200, 100, 50))
    score = reward_of(name)(["a cat"], [flat])[0]
    square = reward_of(name)(["a cat"], [Image.new("RGB", (28, 28), (200, 100, 50))])[0]
    if name.startswith("hpsv2") and size[0] != size[1]:
        assert abs(score - square) > 1e-3  # it has black bands
    else:
        assert score == pytest.approx(square, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["clipscore", "imagereward"])
def test_of_a_long_strip_only_the_middle_is_scaled(name, folder, monkeypatch):
    reward = make_reward(name, folder)
    strip = Image.new("RGB", (3, 3000))
    strip.paste(picture(0, 3, 200), (0, 1400))
    # Its middle, of as many pixels as fit on both sides
    expected = reward(["a cat"], [strip.crop((0, 1404, 3, 1596))])
    areas = []
    resize = Image.Image.resize

    def noted(image, size, *arguments, **options):
        areas.append(size[0] * size[1])
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    assert reward(["a cat"], [strip]) == pytest.approx(expected, rel=1e-5)
    # Whole, it would be 28 x 28,000
    assert areas and max(areas) <= 28 * 28 * 65


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(name, folder):
    reward = make_reward(name, folder / "not there", device="cuda")
    with pytest.raises(ValueError, match=f"{name} is to run on cuda, which cannot be used here"):
        reward(["a cat"], [picture(0)])


@pytest.mark.parametrize("name", NAMES)
def test_no_pictures_have_no_scores_and_load_nothing(name, folder):
    reward = make_reward(name, folder / "not there")
    assert reward([], []) == []


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_rounds_and_no_more(name, folder, reward_of):
    scores = reward_of(name)(PROMPTS, pictures())
    rounded = make_reward(name, folder, dtype=torch.bfloat16)(PROMPTS, pictures())
    spread = max(abs(score) for score in scores)
    differences = np.abs(np.array(scores) - rounded)
    assert 0 < differences.max() < 0.1 * spread


@pytest.mark.parametrize("name", NAMES)
def test_close_frees_the_model_and_another_call_loads_it_again(name, folder):
    with make_reward(name, folder) as reward:
        assert reward._loaded is None  # not loaded before it is needed
        scores = reward(PROMPTS, pictures())
        model = weakref.ref(next(part for part in parts(reward) if isinstance(part, torch.nn.Module)))
        parameter = weakref.ref(next(model().parameters()))
        reward.close()
        assert model() is None and parameter() is None
        assert reward(PROMPTS, pictures()) == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert reward._loaded is None
    reward.close()


@pytest.mark.parametrize("name", NAMES)
def test_threads_share_one_model(name, folder):
    reward = make_reward(name, folder)
    loads = []
    load = reward._load
    reward._load = lambda device: loads.append(device) or load(device)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: reward(PROMPTS, pictures()), range(4)))
    assert len(loads) == 1
    assert all(result == pytest.approx(results[0], rel=1e-4, abs=1e-5) for result in results)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradients_are_kept_and_the_callers_mode_stays(name, reward_of):
    reward_of(name)(PROMPTS, pictures())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_gives_nan_stops_training(name, folder):
    reward = make_reward(name, folder)
    reward.load()
    for part in parts(reward):
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                parameter.data.fill_(torch.nan)
    with pytest.raises(RewardError, match=f"'{name}' returned nan for image 0, prompt 'a cat'.*float32"):
        RewardScorer([reward]).score(["a cat"], [picture(0)], {})


def test_prompts_and_images_that_do_not_match_in_number_are_refused(folder):
    with pytest.raises(ValueError, match="1 prompts for 0 images"):
        make_reward("pickscore", folder)(["a cat"], [])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options, error",
    [({"batch_size": 0}, ValueError), ({"batch_size": True}, ValueError), ({"dtype": "bf16"}, TypeError)],
)
def test_options_that_make_no_sense_are_refused_at_once(name, options, error, folder):
    with pytest.raises(error, match=next(iter(options))):
        make_reward(name, folder, **options)
