import json
import math

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from tiny_comparisons import assert_same_images, random_lora

from trl_flow.evaluation import DrawingOptions, evaluate_models
from trl_flow.evaluation.drawing import draw, draw_images
from trl_flow.rewards.checks import RewardError


PROMPTS = ["a red circle", "two blue squares", "three green triangles"]
DATASET = Dataset.from_dict({"prompt": PROMPTS, "weight": [1.0, 2.0, 3.0]})
SAMPLING = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 16}
OPTIONS = DrawingOptions(num_images_per_prompt=2, batch_size=4, **SAMPLING)


def brightness(prompts, images, **kwargs):
    return [float(np.asarray(image).mean()) for image in images]


def weighted(prompts, images, weight, **kwargs):
    red = [float(np.asarray(image)[..., 0].mean()) for image in images]
    return [None if w == 2.0 else w * r for r, w in zip(red, weight, strict=True)]


@pytest.fixture(scope="module")
def lora(tiny_sd3_path, tmp_path_factory):
    return random_lora(tiny_sd3_path, tmp_path_factory.mktemp("adapters") / "ours", seed=1)


@pytest.fixture(scope="module")
def compared(tiny_sd3_path, lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "comparison"
    arguments = {"prompts": {"shapes": DATASET}, "proxy": brightness, "gold": [weighted], "options": OPTIONS}
    return evaluate_models(tiny_sd3_path, [lora], output_dir=folder, progress=False, **arguments)


def test_images_are_those_that_draw_gives(compared, tiny_sd3, lora):
    folder = compared.folder / "images" / "shapes"
    for model in ("base", "ours"):
        if model == "ours":
            tiny_sd3.load_lora_weights(lora)
        drawn = draw(tiny_sd3, PROMPTS, seed=0, num_images_per_prompt=2, batch_size=4, **SAMPLING)
        saved = [Image.open(path) for path in sorted((folder / model).iterdir())]
        assert len(saved) == len(drawn) == 6
        assert_same_images(saved, drawn)
    assert (folder / "base" / "000000.png").read_bytes() != (folder / "ours" / "000000.png").read_bytes()


def test_scores_are_those_of_the_saved_images(compared):
    for model in ("base", "ours"):
        paths = sorted((compared.folder / "images" / "shapes" / model).iterdir())
        images = [Image.open(path) for path in paths]
        scores = compared.scores["shapes"][model]
        # Scores pass through float32
        np.testing.assert_allclose(scores["brightness"], brightness([], images), rtol=1e-6)
        expected = weighted([], images, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
        np.testing.assert_allclose(scores["weighted"], [math.nan if e is None else e for e in expected], rtol=1e-6)
    table = compared.results["sets"]["shapes"]
    assert table["means"]["ours"]["brightness"]["mean"] == pytest.approx(
        compared.scores["shapes"]["ours"]["brightness"].mean(), rel=1e-12
    )
    assert table["differences"]["ours"]["weighted"]["num_pairs"] == 2  # it applies to two prompts of three


def test_what_is_written(compared):
    names = {path.name for path in compared.folder.iterdir()}
    assert names - {".lock"} == {
        *("settings.json", "scores.json", "results.json", "results.md", "comparison.html", "grid-shapes.png"),
        "images",
    }
    assert json.loads((compared.folder / "results.json").read_text()) == compared.results
    assert (compared.folder / "results.md").read_text(encoding="utf-8") == compared.markdown
    assert "| ours | [" in compared.markdown
    assert compared.grids == {"shapes": compared.folder / "grid-shapes.png"}
    with Image.open(compared.grids["shapes"]) as grid:
        # Two columns of 16 x 16 images enlarged 16 times
        assert grid.width == 2 * 128 + 3 * 6


def test_a_killed_run_goes_on_and_ends_with_the_same_images(compared, tiny_sd3_path, lora, tmp_path, monkeypatch):
    calls = []

    def killed(backbone, prompts, **options):
        calls.append(options["first_index"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw_images(backbone, prompts, **options)

    arguments = {"prompts": {"shapes": DATASET}, "proxy": brightness, "options": OPTIONS, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr("trl_flow.evaluation.evaluate.draw_images", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_models(tiny_sd3_path, [lora], output_dir=tmp_path, **arguments)
        # The base's two batches and the adapter's first are there; one image gets lost
        assert len(list(tmp_path.rglob("*.png"))) == 10
        (tmp_path / "images" / "shapes" / "base" / "000001.png").unlink()
        calls = [0] * 10
        evaluate_models(tiny_sd3_path, [lora], output_dir=tmp_path, **arguments)
    assert calls[10:] == [0, 4]  # the batch of the lost one, and the adapter's second
    drawn, whole = (sorted((folder / "images").rglob("*.png")) for folder in (tmp_path, compared.folder))
    assert [path.parts[-3:] for path in drawn] == [path.parts[-3:] for path in whole]
    assert_same_images(map(Image.open, drawn), map(Image.open, whole))


def test_kept_scores_are_used_until_images_change(tiny_sd3_path, lora, tmp_path):
    seen = []

    def counted(prompts, images, **kwargs):
        seen.append(len(images))
        return [1.0] * len(images)

    arguments = {"prompts": DATASET, "proxy": counted, "options": OPTIONS, "output_dir": tmp_path, "progress": False}
    evaluate_models(tiny_sd3_path, **arguments)
    assert seen == [6]
    evaluate_models(tiny_sd3_path, **arguments)
    assert seen == [6]
    # One more model and one more reward: only what is new
    found = evaluate_models(tiny_sd3_path, [lora], **{**arguments, "gold": brightness})
    assert seen == [6, 6]
    assert list(found.results["models"]) == ["base", "ours"]
    (tmp_path / "images" / "prompts" / "ours" / "000000.png").unlink()
    evaluate_models(tiny_sd3_path, [lora], **arguments)
    assert seen == [6, 6, 6]
    evaluate_models(tiny_sd3_path, [lora], **arguments, rescore=True)
    assert seen == [6, 6, 6, 6, 6]


def test_scores_of_another_function_of_the_same_name_are_not_used(tiny_sd3_path, tmp_path):
    class Constant:
        def __init__(self, value):
            self.value = value

        def __call__(self, prompts, images, **kwargs):
            return [self.value] * len(images)

    arguments = {"prompts": DATASET, "options": OPTIONS, "output_dir": tmp_path, "progress": False}

    def means(**rewards):
        found = evaluate_models(tiny_sd3_path, **arguments, **rewards).results["sets"]["prompts"]["means"]["base"]
        return {name: content["mean"] for name, content in found.items()}

    assert means(proxy=Constant(1.0), gold=brightness).keys() == {"Constant", "brightness"}
    assert means(proxy=Constant(2.0)) == {"Constant": 2.0}
    assert means(proxy=[Constant(3.0), Constant(2.0)]) == {"Constant": 3.0, "Constant_2": 2.0}
    # Computing one anew leaves the others
    assert means(proxy=Constant(3.0), rescore=True) == {"Constant": 3.0}
    kept = json.loads((tmp_path / "scores.json").read_text())["scores"]["prompts"]["base"]
    assert kept.keys() == {"brightness", "Constant", "Constant_2"}


def test_changed_columns_are_scored_anew(tiny_sd3_path, tmp_path):
    def the_weight(prompts, images, weight, **kwargs):
        return weight

    arguments = {"proxy": the_weight, "options": OPTIONS, "output_dir": tmp_path, "progress": False}
    for weights in ([1.0, 2.0, 3.0], [1.0, 2.0, 6.0]):
        dataset = Dataset.from_dict({"prompt": PROMPTS, "weight": weights})
        found = evaluate_models(tiny_sd3_path, prompts=dataset, **arguments)
        assert found.results["sets"]["prompts"]["means"]["base"]["the_weight"]["mean"] == sum(weights) / 3


def test_rewards_are_closed_and_failures_keep_the_images(tiny_sd3_path, tmp_path):
    class Closing:
        closed = 0

        def __call__(self, prompts, images, **kwargs):
            return [0.5] * len(images)

        def close(self):
            self.closed += 1

    def broken(prompts, images, **kwargs):
        raise ZeroDivisionError

    reward = Closing()
    arguments = {"prompts": DATASET, "options": OPTIONS, "output_dir": tmp_path, "progress": False}
    with pytest.raises(RewardError, match="broken"):
        evaluate_models(tiny_sd3_path, proxy=reward, gold=broken, **arguments)
    assert reward.closed == 1
    assert len(list(tmp_path.rglob("*.png"))) == 6
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["prompts"]["base"]["Closing"] == [0.5] * 6


def test_a_loaded_pipeline_is_used_as_it_is(tiny_sd3, tmp_path):
    found = evaluate_models(tiny_sd3, prompts=DATASET, output_dir=tmp_path, options=OPTIONS, progress=False)
    assert found.results["settings"]["dtype"] == "float32"
    assert found.results["sets"]["prompts"]["means"] == {"base": {}}
    with pytest.raises(ValueError, match="move it yourself"):
        evaluate_models(tiny_sd3, prompts=DATASET, output_dir=tmp_path, options=DrawingOptions(device="cpu"))


def needs_depth(prompts, images, depth, **kwargs):
    return [0.0] * len(images)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"adapters": ["nowhere"]}, "neither a file"),
        ({"prompts": {}}, "no prompts"),
        ({"prompts": {"a": ["text"]}}, "'a' is a list"),
        ({"prompts": DATASET.select([])}, "empty"),
        ({"prompts": DATASET.rename_column("prompt", "caption")}, "no column `prompt`"),
        ({"prompts": Dataset.from_dict({"prompt": ["a", None]})}, "row 1"),
        ({"gold": needs_depth}, "depth"),
        ({"gold": ["pickscor"]}, "there is no reward function 'pickscor'"),
        ({"model": "{tmp}"}, "model_index.json"),
        ({"model": "no/model-of-this-name"}, "could not be loaded"),
        ({"model": 7}, "is a int"),
        ({"options": DrawingOptions(device="warp")}, "warp"),
        ({"grid_prompts": 0}, "grid_prompts"),
        ({"page_megabytes": 0}, "page_megabytes"),
        ({"output_dir": "{tmp}/file"}, "is a file"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(changes, message, tiny_sd3_path, tmp_path):
    (tmp_path / "file").touch()
    arguments = {
        "model": tiny_sd3_path,
        "prompts": DATASET,
        "options": OPTIONS,
        "output_dir": tmp_path / "out",
        **changes,
    }
    for name in ("model", "output_dir"):
        if isinstance(arguments[name], str):
            arguments[name] = arguments[name].format(tmp=tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate_models(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1},
        {"seed": True},
        {"num_images_per_prompt": 0},
        {"num_inference_steps": 1.5},
        {"batch_size": 0},
        {"height": 0},
        {"guidance_scale": math.nan},
        {"guidance_scale": "4"},
        {"dtype": "int8"},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DrawingOptions(**options)
