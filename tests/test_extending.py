"""docs/extending.md is followed to the letter: its code runs and does what the page says."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin, SD3LoraLoaderMixin
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_sd3_pipeline
from tiny_training import brightness, distance, prompts, tiny_config, tiny_lora, tiny_trainer, trained_weights

from trl_flow import FlowGRPOTrainer
from trl_flow.backbones import Backbone, Schedule, get_backbone
from trl_flow.evaluation.adapters import loaded_adapter, parse_adapters
from trl_flow.evaluation.drawing import draw


PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def code_of(title: str) -> str:
    """The Python blocks of a section."""
    section = re.split(r"^#+ ", PAGE, flags=re.MULTILINE)
    (found,) = [part for part in section if part.startswith(title + "\n")]
    return "\n".join(re.findall(r"```python\n(.*?)```", found, flags=re.DOTALL))


def run_training(title: str, folder: Path, scope: dict) -> dict:
    """What is there after the code of a section has run, on a CPU, with what was there before."""
    code, scope = code_of(title), dict(scope)
    fields = 'use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, '
    assert code.count("FlowGRPOConfig(\n") == 1
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.chdir(folder)
        exec(code.replace("FlowGRPOConfig(\n", f"FlowGRPOConfig({fields}\n"), scope)
    return scope


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """What the section on a pipeline of one's own leaves behind."""
    folder = tmp_path_factory.mktemp("extending")
    return run_training("Your own pipeline", folder, {}) | {"folder": folder / "painter"}


def test_a_pipeline_of_ones_own_trains_without_a_change_here(painter):
    logs = [log for log in painter["trainer"].state.log_history if "reward" in log]
    assert len(logs) == 20
    assert logs[0]["ratio/first_update_deviation"] == pytest.approx(0, abs=1e-6)
    first, last = (np.mean([log["reward"] for log in part]) for part in (logs[:5], logs[-5:]))
    assert last > first + 0.05


def test_its_weights_are_saved_where_its_class_finds_them(painter):
    loaded = painter["Painter"].from_pretrained(painter["folder"])
    trained = painter["pipeline"].painter.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    assert load_file(painter["folder"] / "diffusion_pytorch_model.safetensors").keys() == trained.keys()


def test_an_adapter_of_it_is_loaded_back(painter, tmp_path):
    scope = run_training("A LoRA of your own pipeline", tmp_path, painter)
    trainer, again = scope["trainer"], scope["again"]
    backbone = scope["AdaptableBackbone"]

    def images(pipeline):
        images = draw(backbone(pipeline), ["the moon"], seed=0, num_images_per_prompt=4, num_inference_steps=5)
        return np.stack([np.asarray(image, dtype=int) for image in images])

    trained = images(trainer.pipeline)
    assert np.abs(images(again) - trained).max() <= 1
    again.unload_lora_weights()
    untrained = images(again)
    assert np.abs(untrained - trained).max() > 8
    # And evaluation puts it into the pipeline by itself
    (adapter,) = parse_adapters(tmp_path / "painter-lora")
    with loaded_adapter(backbone(again), adapter):
        assert np.abs(images(again) - trained).max() <= 1
    assert np.array_equal(images(again), untrained)


def painter_with(painter, **methods):
    """A backbone of the page's painter with other methods."""
    return type("Mistaken", (painter["PainterBackbone"],), methods)(painter["pipeline"])


MISTAKES = [
    (
        "latent_shape",
        lambda self: torch.zeros(1, 3, 8, 8),
        r"Tensor of shape \(1, 3, 8, 8\).* a tuple of whole numbers",
    ),
    ("schedule", lambda self, number: self.pipeline.scheduler, "FlowMatchEulerDiscreteScheduler, .* a Schedule "),
    ("schedule", lambda self, number: (torch.ones(2), torch.ones(1)), r"tuple of 2 \(Tensor\), .* a Schedule "),
    ("encode_prompt", lambda self, prompt: torch.zeros(1, 26), r"Tensor of shape \(1, 26\), .* a dictionary of ten"),
    (
        "encode_prompt",
        lambda self, prompt: {"letters": torch.zeros(26)},
        r"dict of .*letters.: \(26,\).*batch, of size 1",
    ),
    ("predict", lambda self, model, latents, *_: (latents,), "tuple of 1 .* one tensor of the latents' shape"),
    (
        "predict",
        lambda self, model, latents, *_: latents[:, :1],
        r"Tensor of shape \(2, 1, 8, 8\), .* here \(2, 3, 8, 8\)",
    ),
    (
        "decode",
        lambda self, latents: latents,
        r"Tensor of shape \(2, 3, 8, 8\), .* a list of PIL images, one for each of",
    ),
    ("decode", lambda self, latents: [Image.new("RGB", (8, 8))], r"list of 1 \(Image\), .* one for each of 2 latents"),
    ("decode", lambda self, latents: list(latents), r"list of 2 \(Tensor\), .* PIL images"),
]


@pytest.mark.parametrize(("method", "mistake", "message"), MISTAKES)
def test_a_method_that_returns_something_else_is_named(painter, method, mistake, message):
    backbone = painter_with(painter, **{method: mistake})
    with pytest.raises(TypeError, match=f"Mistaken.{method} returned a {message}"):
        draw(backbone, ["the moon"], seed=0, num_images_per_prompt=2, num_inference_steps=2)


@pytest.mark.parametrize(("method", "mistake", "message"), MISTAKES[:3])
def test_and_what_is_sampled_before_training_begins(painter, method, mistake, message, tmp_path):
    with pytest.raises(TypeError, match=f"Mistaken.{method} returned a {message}"):
        FlowGRPOTrainer(
            model=painter["pipeline"],
            reward_funcs=painter["brightness"],
            args=tiny_config(tmp_path / "out"),
            train_dataset=painter["trainer"].train_dataset,
            backbone=painter_with(painter, **{method: mistake}),
        )
    assert not (tmp_path / "out").exists()


def test_a_schedule_of_wrong_shapes():
    with pytest.raises(ValueError, match=r"sigmas of shape \(3,\) and timesteps of shape \(3,\)"):
        Schedule(sigmas=torch.ones(3), timesteps=torch.ones(3))


def test_a_lora_that_could_not_be_loaded_again_is_refused(painter, tmp_path):
    Painter, scheduler = painter["Painter"], FlowMatchEulerDiscreteScheduler()

    class Adaptable(Painter, PeftAdapterMixin):
        pass

    class Pipeline(DiffusionPipeline, SanaLoraLoaderMixin):
        def __init__(self, scheduler, painter=None, transformer=None):
            super().__init__()
            parts = {"painter": painter, "transformer": transformer}
            self.register_modules(scheduler=scheduler, **{k: v for k, v in parts.items() if v is not None})

    class WithEncoders(DiffusionPipeline, SD3LoraLoaderMixin):
        def __init__(self, scheduler, transformer):
            super().__init__()
            self.register_modules(scheduler=scheduler, transformer=transformer)

    def refused(pipeline, component, message):
        with pytest.raises(ValueError, match=message):
            FlowGRPOTrainer(
                model=pipeline,
                reward_funcs=painter["brightness"],
                args=tiny_config(tmp_path / "out"),
                train_dataset=painter["trainer"].train_dataset,
                backbone=type("Own", (painter["PainterBackbone"],), {"component": component})(pipeline),
                peft_config=tiny_lora(),
            )
        assert not (tmp_path / "out").exists()

    refused(Pipeline(scheduler, painter=Adaptable()), "painter", "adapters of its transformer,.* called 'painter'")
    refused(Pipeline(scheduler, transformer=Painter()), "transformer", "no load_lora_adapter.*PeftAdapterMixin")
    encoders = "has no text_encoder and no text_encoder_2.*such as SanaLoraLoaderMixin"
    refused(WithEncoders(scheduler, Adaptable()), "transformer", encoders)


@pytest.mark.parametrize(
    ("fields", "lora", "message"),
    [
        ({}, tiny_lora(), "PainterPipeline has no save_lora_weights"),
        ({"gradient_checkpointing": True}, None, "Painter does not support. Set gradient_checkpointing=False"),
        ({"negative_prompt": "night"}, None, "'night', but PainterPipeline takes none"),
    ],
    ids=["lora", "checkpointing", "negative"],
)
def test_what_it_cannot_do_is_refused(painter, fields, lora, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FlowGRPOTrainer(
            model=painter["pipeline"],
            reward_funcs=painter["brightness"],
            args=tiny_config(tmp_path / "out", **fields),
            train_dataset=painter["trainer"].train_dataset,
            peft_config=lora,
            backbone=painter["trainer"].backbone,
        )
    assert not (tmp_path / "out").exists()


def test_the_table_of_members_is_complete():
    table = PAGE.split("## A backbone")[1].split("###")[0]
    members = {name for name in vars(Backbone) if not name.startswith("_")} | set(Backbone.__annotations__)
    # What it is made with, and what it is called with for editing alone
    members -= {"model", "check_image_size"}
    assert [name for name in sorted(members) if not re.search(rf"`{name}[`(]", table)] == []


def test_an_object_that_is_no_backbone_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(TypeError, match="backbone is a SimpleNamespace, but must be"):
        FlowGRPOTrainer(
            model=trainer.pipeline,
            reward_funcs=lambda prompts, images, **kwargs: [0.0] * len(images),
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            backbone=SimpleNamespace(pipeline=trainer.pipeline),
        )


def test_an_algorithm_of_ones_own_learns_and_resumes(tmp_path):
    scope = {}
    exec(code_of("An algorithm"), scope)

    def trainer(folder, **fields):
        torch.manual_seed(0)
        # A learning rate of Adam's that moves every weight by more than rounding
        args = tiny_config(folder, cls=scope["FlowRLConfig"], learning_rate=1e-2, max_steps=3, **fields)
        return scope["ReinforceTrainer"](
            model=tiny_sd3_pipeline(),
            reward_funcs=brightness,
            args=args,
            train_dataset=prompts(),
            peft_config=tiny_lora(),
        )

    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    before = trained_weights(whole)
    whole.train()
    assert distance(trained_weights(whole), before) > 1e-3
    (first, *_) = whole.state.log_history
    assert first["grad_norm"] > 0 and "log_prob" in first

    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert distance(trained_weights(resumed), trained_weights(whole)) < 1e-5


def test_a_backbone_of_another_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="backbone was made for another pipeline than model.*model=backbone.pipeline"):
        FlowGRPOTrainer(
            model=tiny_sd3_pipeline(),
            reward_funcs=lambda prompts, images, **kwargs: [0.0] * len(images),
            args=tiny_config(tmp_path / "out"),
            train_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog"]}),
            backbone=get_backbone(tiny_sd3_pipeline(), height=16, width=16, max_sequence_length=16),
        )
    assert not (tmp_path / "out").exists()


def test_the_reward_of_edited_images():
    scope = {}
    exec(code_of("Editing images"), scope)
    black, gray = (Image.new("RGB", (16, 16), (level,) * 3) for level in (0, 51))
    assert scope["keeps_the_image"]([""] * 2, [black, gray], image=[black, black]) == pytest.approx([1.0, 0.8])
