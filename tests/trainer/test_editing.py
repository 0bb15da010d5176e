"""Training a pipeline that edits images: each prompt comes with one, from the column `image`."""

import ast

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import ExifTags, Image
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline, tiny_kontext_sizes
from tiny_training import assert_equal, brightness, distance, prompts, tiny_trainer, trained_weights
from transformers import TrainerState

from trl_flow.images import to_rgb


SIZE = 32  # of the input images


@pytest.fixture(autouse=True)
def small_images():
    with tiny_kontext_sizes():
        yield


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def edits(number: int = 4, first: int = 0, **columns) -> Dataset:
    return prompts(number, image=[picture(first + i) for i in range(number)], **columns)


def editing_trainer(output_dir, **kwargs):
    kwargs = {"pipeline": tiny_kontext_pipeline(), "train_dataset": edits()} | kwargs
    return tiny_trainer(output_dir, **kwargs)


def trained(output_dir, resume_from_checkpoint=None, **kwargs) -> dict[str, torch.Tensor]:
    trainer = editing_trainer(output_dir, **kwargs)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trained_weights(trainer)


# ---- What is refused before training ----


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        (prompts(4, picture=[picture(i) for i in range(4)]), ["no column 'image'", "'picture'", "rename_column"]),
        (prompts(4, image=["a.png", "b.png", "c.png", "d.png"]), ["PIL images", "cast_column"]),
        (prompts(4, image=[picture(0), picture(1), None, picture(3)]), ["no image in row 2", "filter"]),
        (
            prompts(4, image=[picture(0), picture(1), picture(2), picture(3, size=(24, 72))]),
            ["image in row 3", "72 pixels high and 24 wide", "24 x 8", "must be 16 x 16", "Crop"],
        ),
        (prompts(4, image=[picture(i, size=(3, 40)) for i in range(4)]), ["in row 0", "must have 4 pixels each way"]),
        (
            prompts(4, image=[picture(i).convert("L").convert("F") for i in range(4)]),
            ["image in row 0", "mode 'F'", "16 bits"],
        ),
        (edits().cast_column("image", datasets.Image(decode=False)), ["PIL images"]),
    ],
    ids=["none", "paths", "null", "shape", "small", "floats", "undecoded"],
)
def test_images_that_cannot_be_edited(dataset, parts, tmp_path):
    for name, sets in (
        ("train_dataset", {"train_dataset": dataset}),
        ("eval_dataset", {"eval_dataset": dataset}),
        ("eval_dataset['a']", {"eval_dataset": {"a": dataset}}),
    ):
        with pytest.raises(ValueError) as error:
            editing_trainer(tmp_path / "out", **sets)
        for part in [name, *parts]:
            assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_images_to_evaluate_are_checked_when_they_are_passed(tmp_path):
    trainer = editing_trainer(tmp_path)
    with pytest.raises(ValueError, match="eval_dataset has no column 'image'"):
        trainer.evaluate(prompts())


def test_a_column_image_is_any_column_where_nothing_is_edited(tmp_path):
    seen = []

    def reward(prompts, images, image, **kwargs):
        seen.extend(image)
        return brightness(prompts, images)

    pipeline = tiny_flux_pipeline()
    dataset = prompts(4, image=["a.png", None, "c.png", "d.png"])
    tiny_trainer(tmp_path, pipeline=pipeline, train_dataset=dataset, reward_funcs=reward, max_steps=1).train()
    assert set(seen) <= {"a.png", None, "c.png", "d.png"} and len(seen) == 8


@pytest.mark.parametrize("pipeline", [tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline])
def test_a_negative_prompt_that_would_be_ignored_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="negative_prompt is 'blurred', but Flux.*Pipeline takes none"):
        editing_trainer(tmp_path, pipeline=pipeline(), negative_prompt="blurred")


@pytest.mark.parametrize("content", [None, b"no image"], ids=["missing", "broken"])
def test_a_file_that_is_no_image_is_named_by_its_row(content, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    paths[2].unlink()
    if content is not None:
        paths[2].write_bytes(content)
    dataset = prompts(4, image=[str(path) for path in paths]).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="train_dataset has an image in row 2 that cannot be read: .*2.png"):
        editing_trainer(tmp_path / "out", train_dataset=dataset)


@pytest.mark.parametrize("format", ["torch", "numpy"])
def test_a_format_that_makes_arrays_of_images_is_refused(format, tmp_path):
    with pytest.raises(ValueError, match=rf"has the format '{format}'.*with_format\(None\)"):
        editing_trainer(tmp_path, train_dataset=edits().with_format(format))


def test_a_photo_has_the_size_at_which_it_is_shown(tmp_path):
    # Stored lying, with the note that the camera was turned: `datasets` gives it upright, 24 x 8 and not 8 x 24
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for i in range(4):
        picture(i, size=(72, 24)).save(tmp_path / f"{i}.jpg", exif=exif)
    dataset = prompts(4, image=[str(tmp_path / f"{i}.jpg") for i in range(4)]).cast_column("image", datasets.Image())
    assert dataset[0]["image"].size == (24, 72)
    editing_trainer(tmp_path / "upright", train_dataset=dataset, height=24, width=8, max_steps=1).train()
    with pytest.raises(ValueError, match="in row 0 that cannot be edited: It is 72 pixels high and 24 wide"):
        editing_trainer(tmp_path / "lying", train_dataset=dataset, height=8, width=24)


# ---- What is trained ----


def test_every_sample_is_drawn_from_and_trained_on_its_rows_own_image(tmp_path):
    given = []

    def reward(prompts, images, image, **kwargs):
        given.extend(zip(prompts, image, strict=True))
        return brightness(prompts, images)

    dataset = edits()
    own = {row["prompt"]: row["image"].tobytes() for row in dataset}
    trainer = editing_trainer(tmp_path, train_dataset=dataset, reward_funcs=reward)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert len(given) == 8
    assert all(image.tobytes() == own[prompt] for prompt, image in given)
    assert [image.tobytes() for image in batch.images] == [own[prompt] for prompt in batch.prompts]
    condition = trainer.policy.condition(batch.prompts, batch.images).positive
    for i, (prompt, image) in enumerate(zip(batch.prompts, batch.images, strict=True)):
        expected = trainer.backbone.encode_prompt(prompt, image)
        assert condition.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(condition[key][i], expected[key][0])


def test_the_cache_tells_images_apart_by_their_pixels(tmp_path):
    cache = editing_trainer(tmp_path).policy.conditions
    one, other = cache(["a cat", "a cat"], [picture(0), picture(1)])["image_latents"]
    assert (one - other).abs().max() > 1e-3
    cache.backbone.encode_prompt = None  # nothing is encoded twice
    again = cache(["a cat", "a cat"], [picture(1), picture(0)])["image_latents"]
    assert torch.equal(again, torch.stack([other, one]))


def test_other_images_give_another_training(tmp_path):
    first = trained(tmp_path / "first")
    assert_equal(trained(tmp_path / "again"), first)
    assert distance(trained(tmp_path / "other", train_dataset=edits(first=10)), first) > 1e-4


def test_an_image_of_any_mode_is_edited_as_what_it_shows(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    cut_outs = [Image.new("RGBA", (SIZE, SIZE), (*color, 0)) for color in ((0, 0, 0), (0, 255, 0))]
    for image in cut_outs:
        image.paste(picture(1), (8, 8))
    images = [Image.fromarray(gray), Image.fromarray(gray.astype(np.uint16) * 257), *cut_outs]
    dataset = prompts(4, image=images)
    assert [row["image"].mode for row in dataset] == ["L", "I;16", "RGBA", "RGBA"]
    trainer = editing_trainer(tmp_path, train_dataset=dataset)
    rows = [{"prompt": "a cat", "image": row["image"]} for row in dataset]
    one, same, other, as_other = trainer.policy.condition(
        ["a cat"] * 4, trainer.sampler.images_to_edit(rows)
    ).positive["image_latents"]  # fmt: skip
    assert torch.equal(one, same) and torch.equal(other, as_other)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("stop", [1, 2])
def test_resuming_in_the_middle_of_a_generation_batch(stop, tmp_path):
    fields = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "num_iterations": 1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": stop,
    }
    whole = trained(tmp_path, **fields)
    assert_equal(trained(tmp_path, str(tmp_path / f"checkpoint-{stop}"), **fields), whole)


def test_evaluation_draws_from_each_rows_own_image(tmp_path, monkeypatch):
    trainer = editing_trainer(tmp_path, per_device_eval_batch_size=2, num_generations_eval=2)
    given, condition = [], trainer.policy.condition

    def recorded(prompts, images, guidance_scale):
        given.extend(zip(prompts, images, strict=True))
        return condition(prompts, images, guidance_scale)

    monkeypatch.setattr(trainer.policy, "condition", recorded)
    dataset = edits(3)
    trainer.evaluator.evaluate(dataset, TrainerState())
    expected = [(row["prompt"], row["image"]) for row in dataset for _ in range(2)]
    assert [(prompt, image.tobytes()) for prompt, image in given] == [(p, image.tobytes()) for p, image in expected]


def test_gold_scores_of_other_images_are_not_compared(tmp_path):
    evaluator = editing_trainer(tmp_path).evaluator
    keys = [evaluator.evaluate(edits(2, first), TrainerState()).key for first in (0, 0, 10)]
    assert keys[0] == keys[1] != keys[2]


# ---- What is shared ----


def test_the_cards_code_edits_an_image_as_training_did(tmp_path):
    base = tmp_path / "base"
    tiny_kontext_pipeline().save_pretrained(base)
    trainer = editing_trainer(tmp_path / "out", pipeline=str(base), height=16, width=16, save_strategy="steps")
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card
    code = card.split("```python\n")[1].split("\n```")[0]
    ast.parse(code)
    cut_out = picture(3, "RGBA")
    cut_out.save(tmp_path / "image.png")
    for name, path in (("base", base), ("out", tmp_path / "out"), ("image.png", tmp_path / "image.png")):
        code = code.replace(f"path/to/{name}", str(path))
    scope = {}
    torch.manual_seed(5)
    exec(code, scope)
    assert scope["image"].size == (16, 16)
    torch.manual_seed(5)
    pipeline = trainer.pipeline
    expected = pipeline(
        image=to_rgb(cut_out),
        prompt=trainer.publisher.prompt,
        height=16,
        width=16,
        max_area=256,
        num_inference_steps=2,  # as evaluations draw
        guidance_scale=2.0,
        max_sequence_length=16,
    ).images[0]
    assert abs(np.asarray(scope["image"]).astype(int) - np.asarray(expected)).max() <= 1


def test_a_transform_may_open_the_images(tmp_path):
    """Each is opened once for its group; something else than an image is refused."""
    opened = []

    def transform(batch):
        opened.append(batch["seed"])
        return {"prompt": batch["prompt"], "image": [picture(seed) for seed in batch["seed"]]}

    dataset = prompts(4, seed=[0, 1, 2, 3])
    trainer = editing_trainer(tmp_path / "out", train_dataset=dataset.with_transform(transform), max_steps=1)
    trainer.train()
    assert all(len(seeds) == len(set(seeds)) for seeds in opened)
    paths = dataset.with_transform(lambda batch: {"prompt": batch["prompt"], "image": ["a.png"] * len(batch["seed"])})
    with pytest.raises(ValueError, match="its transform makes str of the first row's"):
        editing_trainer(tmp_path / "refused", train_dataset=paths)
