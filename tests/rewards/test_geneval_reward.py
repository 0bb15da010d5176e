import shutil
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tiny_geneval import save_tiny_clip, save_tiny_mask2former

from trl_flow.prompts import generate_geneval_prompts, geneval_benchmark
from trl_flow.rewards import GenEvalReward
from trl_flow.rewards.base import CheckpointError
from trl_flow.rewards.checks import check_reward_func, reward_name
from trl_flow.rewards.geneval import COLORS, Detection, crop_object


# A world that simple code can look at: each object is a rectangle in one color on grey. Its class shows in its shape
SHAPES = {"bus": (24, 8), "clock": (12, 12), "bottle": (6, 24)}
PAINT = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0), "yellow": (255, 255, 0), "black": (0, 0, 0)}
GREY = (0x99, 0x99, 0x99)


def draw(*objects, mode="RGB"):
    """A picture of objects, each `(class, color, x, y)` with the centre's place in a picture of 100 x 100."""
    image = Image.new("RGB", (100, 100), GREY)
    for name, color, x, y in objects:
        width, height = SHAPES[name]
        ImageDraw.Draw(image).rectangle(
            (x - width // 2, y - height // 2, x + width // 2 - 1, y + height // 2 - 1), fill=PAINT[color]
        )
    return image.convert(mode)


def find_blobs(images):
    """A detector: connected regions of one color that is not the background's."""
    found = []
    for image in images:
        assert image.mode == "RGB"
        pixels = np.asarray(image)
        left = (pixels != GREY).any(axis=2)
        found.append([])
        while left.any():
            start = tuple(np.argwhere(left)[0])
            region, edge = np.zeros_like(left), [start]
            while edge:
                y, x = edge.pop()
                if 0 <= y < left.shape[0] and 0 <= x < left.shape[1] and left[y, x]:
                    if (pixels[y, x] == pixels[start]).all():
                        region[y, x], left[y, x] = True, False
                        edge += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            (top, x0), (bottom, x1) = np.argwhere(region).min(0), np.argwhere(region).max(0) + 1
            name = min(SHAPES, key=lambda n: abs(SHAPES[n][0] - (x1 - x0)) + abs(SHAPES[n][1] - (bottom - top)))
            found[-1].append(Detection(name, 0.95, (float(x0), float(top), float(x1), float(bottom)), region))
    return found


def mean_color(crops, names):
    """A color classifier: the paint nearest to the mean of all that is not background."""
    colors = []
    for crop, name in zip(crops, names, strict=True):
        assert name in SHAPES
        pixels = np.asarray(crop).reshape(-1, 3).astype(float)
        mean = pixels[(pixels != GREY).any(axis=1)].mean(axis=0)
        colors.append(min(PAINT, key=lambda color: np.abs(mean - PAINT[color]).sum()))
    return colors


def reward(score="partial", **options):
    return GenEvalReward(score, **{"detector": find_blobs, "color_classifier": mean_color, **options})


ROWS = {
    "single": {"tag": "single_object", "include": [{"class": "bus", "count": 1}]},
    "two": {"tag": "two_object", "include": [{"class": "bus", "count": 1}, {"class": "clock", "count": 1}]},
    "count": {
        "tag": "counting",
        "include": [{"class": "clock", "count": 3}],
        "exclude": [{"class": "clock", "count": 4}],
    },
    "color": {"tag": "colors", "include": [{"class": "bottle", "count": 1, "color": "blue"}]},
    "position": {
        "tag": "position",
        "include": [{"class": "bus", "count": 1}, {"class": "clock", "count": 1, "position": ["above", 0]}],
    },
    "attributes": {
        "tag": "color_attr",
        "include": [
            {"class": "bus", "count": 1, "color": "red"},
            {"class": "clock", "count": 1, "color": "yellow"},
        ],
    },
}
RED_BUS, BLUE_CLOCK = ("bus", "red", 30, 70), ("clock", "blue", 30, 20)
CLOCKS = [("clock", color, x, 50) for color, x in (("red", 15), ("blue", 35), ("red", 55), ("black", 80))]
# Row, picture, and the scores `correct`, `strict` and `partial` that it deserves
CASES = [
    ("single", draw(RED_BUS), 1, 1, 1.0),
    ("single", draw(BLUE_CLOCK), 0, 0, 0.0),
    ("single", draw(RED_BUS, ("bus", "blue", 70, 20)), 1, 0, 0.0),
    ("two", draw(RED_BUS, BLUE_CLOCK), 1, 1, 1.0),
    ("two", draw(RED_BUS), 0, 0, 0.5),
    ("count", draw(*CLOCKS[:3]), 1, 1, 1.0),
    ("count", draw(*CLOCKS), 0, 0, 2 / 3),
    ("count", draw(*CLOCKS[:2]), 0, 0, 2 / 3),
    ("color", draw(("bottle", "blue", 50, 50)), 1, 1, 1.0),
    ("color", draw(("bottle", "red", 50, 50)), 0, 0, 0.5),
    ("position", draw(RED_BUS, BLUE_CLOCK), 1, 1, 1.0),
    ("position", draw(("bus", "red", 30, 20), ("clock", "blue", 30, 70)), 0, 0, 0.75),
    ("attributes", draw(RED_BUS, ("clock", "yellow", 70, 20)), 1, 1, 1.0),
    ("attributes", draw(("bus", "yellow", 30, 70), ("clock", "red", 70, 20)), 0, 0, 0.5),
]
ALL = {
    "prompts": [f"{name} {i}" for i, (name, *_) in enumerate(CASES)],
    "images": [image for _, image, *_ in CASES],
    **{key: [ROWS[name].get(key) for name, *_ in CASES] for key in ("tag", "include", "exclude")},
}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("score", ["correct", "strict", "partial", "nonnegative"])
def test_right_and_wrong_pictures_are_told_apart(score, batch_size):
    scores = [dict(zip(("correct", "strict", "partial"), values, strict=True)) for _, _, *values in CASES]
    expected = [(one | {"nonnegative": max(one["partial"], 0)})[score] for one in scores]
    assert reward(score, batch_size=batch_size)(**ALL) == pytest.approx(expected)


@pytest.mark.parametrize("score, expected", [("partial", -1.0), ("nonnegative", 0.0)])
def test_too_many_objects_are_worth_less_than_nothing_or_nothing(score, expected):
    image = draw(*(("bus", "red", x, 50) for x in (15, 45, 80)))
    assert reward(score)(["three"], [image], **{name: [ROWS["single"].get(name)] for name in ("tag", "include")}) == [
        expected
    ]


def test_every_task_is_scored_right_and_wrong():
    assert {(ROWS[name]["tag"], correct) for name, _, correct, *_ in CASES} == {
        (row["tag"], correct) for row in ROWS.values() for correct in (0, 1)
    }


def test_results_say_what_was_found():
    results = reward().results(**ALL)
    assert results[6].found == {"clock": 4}
    assert (results[6].correct, results[6].strict, results[6].partial) == (0.0, 0.0, pytest.approx(2 / 3))


@pytest.mark.parametrize("score", ["partial", "strict"])
def test_accuracy_of_each_task_is_logged(score):
    logged = defaultdict(list)
    reward(score, batch_size=4)(**ALL, log_metric=lambda name, value: logged[name].append(value), trainer_state=None)
    # GenEval's own score, whatever is trained on
    assert logged == {
        "geneval/single_object": [2 / 3],
        "geneval/two_object": [0.5],
        "geneval/counting": [1 / 3],
        "geneval/colors": [0.5],
        "geneval/position": [0.5],
        "geneval/color_attr": [0.5],
    }


def test_colors_are_asked_for_once_a_batch_and_only_where_needed():
    asked = []

    def classifier(crops, names):
        asked.append(names)
        return mean_color(crops, names)

    reward(color_classifier=classifier)(**ALL)
    assert asked == [["bottle", "bottle", "bus", "clock", "bus", "clock"]]


def test_counting_needs_more_confidence():
    def unsure(images):
        return [[Detection(one.label, 0.8, one.box, one.mask) for one in found] for found in find_blobs(images)]

    assert reward("correct", detector=unsure)(**ALL)[3:6] == [1.0, 0.0, 0.0]
    assert reward("correct", detector=unsure, counting_threshold=0.7)(**ALL)[3:6] == [1.0, 0.0, 1.0]
    assert reward("correct", detector=unsure, threshold=0.85)(**ALL)[3:6] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK"])
def test_pictures_of_other_modes_are_read(mode):
    image = draw(("bottle", "blue", 50, 50), mode=mode)
    detections = []

    def detector(images):
        detections.extend(images)
        mask = np.zeros((100, 100), dtype=bool)
        mask[40:60, 48:52] = True
        return [[Detection("bottle", 0.9, (48.0, 40.0, 52.0, 60.0), mask)]]

    assert reward(detector=detector)(["p"], [image], **{k: [v] for k, v in ROWS["color"].items()}) == [1.0]
    assert detections[0].mode == "RGB"


def test_metadata_from_files_and_from_the_generator_is_read(tmp_path):
    # With JSON and with Arrow in between, where absent keys may come back as None
    rows = generate_geneval_prompts(40, tasks=["position", "color_attr", "counting"])
    rows.to_json(tmp_path / "rows.jsonl")
    loaded = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
    for dataset in (rows, loaded, geneval_benchmark().select(range(0, 553, 40))):
        columns = {name: dataset[name][:] for name in ("tag", "include", "exclude")}
        results = reward().results(dataset["prompt"][:], [draw(RED_BUS)] * len(dataset), **columns)
        assert len(results) == len(dataset)


def test_trainer_takes_it():
    check_reward_func(reward(), geneval_benchmark().column_names)
    with pytest.raises(ValueError, match="'geneval' needs a column 'tag', which the data set does not have"):
        check_reward_func(reward(), ["prompt", "include"])
    assert [reward_name(reward(score)) for score in ("partial", "strict", "correct")] == [
        "geneval",
        "geneval_strict",
        "geneval_correct",
    ]
    assert GenEvalReward.dense is True
    assert GenEvalReward.info.range == (2 - 16, 1)


def test_several_threads_get_their_own_scores():
    one, got = reward(batch_size=2), {}

    def score(first):
        part = {key: value[first:] for key, value in ALL.items()}
        got[first] = one(**part)

    threads = [threading.Thread(target=score, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = reward()(**ALL)
    assert got == {first: whole[first:] for first in range(6)}


def test_nothing_gives_nothing():
    assert reward()(prompts=[], images=[], tag=[], include=[], exclude=[]) == []


def test_rows_without_metadata_have_no_score_and_are_not_looked_at():
    looked_at = []

    def detector(images):
        looked_at.extend(images)
        return find_blobs(images)

    mixed = {key: [] for key in ALL}
    for place in range(len(CASES)):
        for key, column in ALL.items():
            mixed[key] += [column[place], draw() if key == "images" else "a sign" if key == "prompts" else None]
    logged = {}
    own = reward("strict", detector=detector, batch_size=3)
    scores = own(**mixed, log_metric=logged.__setitem__)
    assert scores[1::2] == [None] * len(CASES) and len(looked_at) == len(CASES)
    alone = {}
    assert scores[::2] == reward("strict")(**ALL, log_metric=alone.__setitem__)
    assert logged == alone
    assert own(["a sign"], [draw()], tag=[None], include=[None]) == [None] and len(looked_at) == len(CASES)


def test_one_object_for_two_pictures_has_the_color_of_each():
    box = Detection("bottle", 0.95, (40.0, 30.0, 60.0, 70.0))
    own = reward("correct", detector=lambda images: [[box] for _ in images])
    images = [draw(("bottle", color, 50, 50)) for color in ("blue", "red")]
    row = [{"class": "bottle", "count": 1, "color": "blue"}]
    assert own(["a bottle"] * 2, images, tag=["colors"] * 2, include=[row] * 2) == [1.0, 0.0]


def one_row(**changes):
    row = {"prompts": ["a bus"], "images": [draw(RED_BUS)], "tag": ["single_object"]}
    return {**row, "include": [[{"class": "bus", "count": 1}]], **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tag": ["a", "b"]}, "1 prompts, 2 tags"),
        ({"include": [["bus"]]}, "The prompt 'a bus' cannot be scored by 'geneval': .*not GenEval's metadata"),
        ({"tag": [["bus"]]}, "The prompt 'a bus'"),
        ({"images": []}, "1 prompts for 0 images"),
        ({"prompts": ["a", "b"]}, "2 prompts, 1 tags"),
        ({"exclude": []}, "0 exclude lists"),
    ],
)
def test_other_rows_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        reward()(**one_row(**changes))


def test_what_the_models_do_not_know_is_refused():
    with pytest.raises(ValueError, match="'a bus' cannot be scored .*asks for 'dragon', but the classes are airplane"):
        GenEvalReward()(**one_row(include=[[{"class": "dragon", "count": 1}]]))
    with pytest.raises(ValueError, match="asks for 'teal', but the colors are black"):
        GenEvalReward()(**one_row(include=[[{"class": "bus", "count": 1, "color": "teal"}]]))
    # Other detectors may know more
    assert reward()(**one_row(include=[[{"class": "dragon", "count": 1}]])) == [0.0]


@pytest.mark.parametrize(
    "returned, message",
    [
        ([], "0 lists of detections for 1 images"),
        ([[("bus", 0.9)]], "returned .'bus', 0.9., but must return objects of"),
        ([[Detection("bus", 0.9, (0.0, 0.0, 5.0, 5.0), np.ones((3, 3), dtype=bool))]], "mask .* has the shape .3, 3."),
    ],
)
def test_faulty_detectors_are_named(returned, message):
    colored = [[{"class": "bus", "count": 1, "color": "red"}]]
    with pytest.raises(ValueError, match=message):
        reward(detector=lambda images: returned)(**one_row(include=colored))


def test_faulty_color_classifiers_are_named():
    colored = [[{"class": "bus", "count": 1, "color": "red"}]]
    with pytest.raises(ValueError, match="0 colors for 1 objects"):
        reward(color_classifier=lambda crops, names: [])(**one_row(include=colored))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"score": "soft"}, ValueError, "score='soft' is not a score of GenEval"),
        ({"detector": 3}, TypeError, "detector is 3"),
        ({"color_classifier": dict}, TypeError, "color_classifier is <class 'dict'>"),
        ({"threshold": 1.5}, ValueError, "threshold=1.5 is not between 0 and 1"),
        ({"nms_threshold": -0.1}, ValueError, "nms_threshold=-0.1"),
        ({"position_threshold": -1}, ValueError, "position_threshold=-1 is negative"),
        ({"max_objects": 0}, ValueError, "max_objects=0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        GenEvalReward(**options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_mask2former(folder / "mask2former")
    save_tiny_clip(folder / "clip")
    return {"model": str(folder / "mask2former"), "clip_model": str(folder / "clip"), "device": "cpu"}


# Narrow, so that it is not scaled to 800 x 800
STRIP = draw(RED_BUS).resize((400, 32))


def test_loads_its_own_models_at_the_first_call_and_again_after_closing(models):
    # The tiny model takes all for dogs, more or less: only one of them is looked at
    with GenEvalReward("correct", **models, max_objects=1, batch_size=1) as own:
        assert own._loaded is None  # a constructor must not take a GPU's memory
        own.load()
        # Whatever the random CLIP takes for the color of the dog must be what counts
        detector, classifier = own._loaded
        dog = next(one for one in detector([STRIP])[0] if one.label == "dog")
        color = classifier([crop_object(STRIP, dog)], ["dog"])[0]
        other = next(name for name in COLORS if name != color)
        rows = {
            "prompts": ["a dog"] * 2,
            "images": [STRIP] * 2,
            "tag": ["colors"] * 2,
            "include": [[{"class": "dog", "count": 1, "color": name}] for name in (color, other)],
        }
        assert own(**rows) == [1.0, 0.0]
        own.close()
        assert own._loaded is None
        assert own(**rows) == [1.0, 0.0]
        assert own._loaded[1] is not classifier
    assert own._loaded is None


def test_all_models_are_there_after_the_first_call(models):
    with GenEvalReward(**models) as own:
        assert own(["a sign"], [STRIP], tag=[None], include=[None]) == [None]
        assert [type(part).__name__ for part in own._loaded] == ["Mask2FormerDetector", "CLIPColorClassifier"]


@pytest.mark.parametrize("kind, name", [("model", "class_predictor.bias"), ("clip_model", "text_projection.weight")])
def test_weights_that_are_not_there_are_never_random(kind, name, models, tmp_path):
    shutil.copytree(models[kind], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"geneval: {tmp_path} does not have the layout .* it misses {name}"):
        GenEvalReward(**{**models, kind: str(tmp_path)})(**one_row(images=[STRIP]))


def test_a_clip_without_its_tokenizer_is_refused(models, tmp_path):
    # transformers makes an empty one up
    shutil.copytree(models["clip_model"], tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"geneval: the tokenizer of {tmp_path} has . tokens"):
        GenEvalReward(**{**models, "clip_model": str(tmp_path)})(**one_row(images=[STRIP]))


def test_models_are_of_the_type_asked_for(models):
    own = GenEvalReward(**models, dtype=torch.bfloat16)
    own.load()
    assert [part._model.dtype for part in own._loaded] == [torch.bfloat16, torch.bfloat16]
    assert all(np.isfinite(own(**one_row(images=[STRIP]))))
