"""Bad input is refused before anything is written, and says what to do; what goes wrong later corrupts nothing."""

import hashlib
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoHaConfig, LoraConfig
from tiny_flux import tiny_flux_pipeline
from tiny_models import tiny_sd3_pipeline
from tiny_training import assert_equal, brightness, prompts, tiny_config, tiny_lora, tiny_trainer, train, warnings_of
from tiny_unets import tiny_sd_pipeline

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, GuardConfig
from trl_flow.rewards.checks import RewardError


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_refused(tmp_path, error, *parts, **kwargs) -> None:
    """The constructor raises `error` with all of `parts` in its message, and no file or folder is new."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as raised:
        tiny_trainer(tmp_path / "out", **kwargs)
    for part in parts:
        assert part in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


# ---- Data ----


@pytest.mark.parametrize(
    ("dataset", "error", "parts"),
    [
        (Dataset.from_dict({"text": ["a cat"]}), ValueError, ["no column 'prompt'", "['text']", "rename_column"]),
        (Dataset.from_dict({"prompt": []}), ValueError, ["is empty"]),
        (Dataset.from_dict({"prompt": ["a cat", ""]}), ValueError, ["prompt '' in row 1", "non-empty"]),
        (Dataset.from_dict({"prompt": ["a cat", " \n"]}), ValueError, ["in row 1"]),
        (Dataset.from_dict({"prompt": ["a cat", None]}), ValueError, ["prompt None in row 1"]),
        (Dataset.from_dict({"prompt": [1, 2]}), ValueError, ["prompt 1 in row 0"]),
        (Dataset.from_dict({"prompt": [["a", "cat"]]}), ValueError, ["['a', 'cat'] in row 0"]),
        (DatasetDict(train=prompts(4)), TypeError, ["DatasetDict", "['train']", "[split]"]),
        (["a cat"], TypeError, ["list", "datasets.Dataset"]),
        (prompts(4).to_iterable_dataset(), TypeError, ["IterableDataset", "without streaming"]),
        (prompts(4, images=[1, 2, 3, 4]), ValueError, ["'images'", "Rename"]),
        (prompts(4, trainer_state=[1, 2, 3, 4]), ValueError, ["'trainer_state'"]),
    ],
    ids=lambda value: None if not isinstance(value, list) else value[0],
)
def test_a_data_set_that_cannot_be_trained_on(dataset, error, parts, tmp_path):
    assert_refused(tmp_path, error, "train_dataset", *parts, train_dataset=dataset)
    if not isinstance(dataset, DatasetDict):  # a dictionary of data sets is fine for evaluation
        assert_refused(tmp_path, error, "eval_dataset", *parts, eval_dataset=dataset)
        assert_refused(tmp_path, error, "eval_dataset['b']", *parts, eval_dataset={"a": prompts(2), "b": dataset})


def test_an_evaluation_set_without_a_column_that_a_reward_needs(tmp_path):
    fields = {"reward_funcs": needs_a_column, "train_dataset": prompts(objects=[1] * 4)}
    parts = ["eval_dataset['held out']", "'needs_a_column'", "'objects'"]
    assert_refused(tmp_path, ValueError, *parts, eval_dataset={"held out": prompts()}, **fields)


def test_no_data_set(tmp_path):
    with pytest.raises(TypeError, match="train_dataset is missing"):
        FlowGRPOTrainer(tiny_sd3_pipeline(), brightness, tiny_config(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- Sizes ----


@pytest.mark.parametrize(("height", "width"), [(17, 16), (16, 18), (16, 36), (16, 512)])
def test_sizes_that_the_vae_or_the_transformer_cannot_do(height, width, tmp_path):
    parts = [f"{height} x {width}", "multiples of 4 ", " 32", "Set height=16 and width=16"]
    assert_refused(tmp_path, ValueError, *parts, height=height, width=width)


def test_a_set_smaller_than_a_sampling_phase_is_repeated_with_a_warning(tmp_path):
    # TRL's sampler would drop the incomplete batch, and training would end at once having done nothing
    drawn = []

    def reward(prompts, images, **kwargs):
        drawn.append(prompts)
        return brightness(prompts, images)

    with warnings_of("trl_flow") as warnings:
        tiny_trainer(tmp_path / "out", train_dataset=prompts(1), reward_funcs=reward, max_steps=1).train()
    assert drawn == [["a cat"] * 8]
    assert any("1 prompts" in message and "repeated 2 times" in message for message in warnings)


# ---- Model ----


def test_a_folder_that_is_no_pipeline(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").touch()
    parts = ["not a diffusers pipeline", "model_index.json", "weights.bin"]
    assert_refused(tmp_path, ValueError, *parts, pipeline=str(tmp_path / "model"))


def test_a_folder_with_a_broken_pipeline(tmp_path, tiny_sd3_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    assert_refused(tmp_path, ValueError, "could not be loaded", "NoSuchPipeline", pipeline=str(tmp_path / "model"))


def test_a_model_that_is_nowhere(tmp_path):
    assert_refused(tmp_path, ValueError, "no/such-model", "could not be loaded", pipeline="no/such-model")


class OtherPipeline(DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


def test_an_unsupported_pipeline(tmp_path):
    pipeline = OtherPipeline(FlowMatchEulerDiscreteScheduler())
    parts = ["OtherPipeline is not supported", "Supported pipelines: ", "StableDiffusion3Pipeline"]
    assert_refused(tmp_path, ValueError, *parts, pipeline=pipeline)


@pytest.mark.parametrize("model", [3, torch.nn.Linear(2, 2), tiny_sd3_pipeline])
def test_a_model_of_the_wrong_type(model, tmp_path):
    assert_refused(tmp_path, TypeError, "model is a ", "pipeline", pipeline=model)


def test_a_model_of_the_wrong_type_and_no_args():
    with pytest.raises(TypeError, match="model is a int"):
        FlowGRPOTrainer(3, brightness, train_dataset=prompts(4))


@pytest.mark.parametrize("part", ["vae", "transformer", "scheduler"])
def test_a_pipeline_without_a_part_that_sampling_needs(part, tmp_path, tiny_sd3):
    setattr(tiny_sd3, part, None)
    assert_refused(tmp_path, ValueError, f"has no {part}", "all its parts", pipeline=tiny_sd3)


def test_a_pipeline_on_the_meta_device(tmp_path, tiny_sd3):
    tiny_sd3.transformer.to("meta")
    assert_refused(tmp_path, ValueError, "transformer has weights on the meta device", pipeline=tiny_sd3)


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_a_pipeline_that_is_offloaded_trains_as_another(offload, tmp_path):
    pipeline = tiny_sd3_pipeline()
    getattr(pipeline, offload)(device="cpu")
    assert_equal(train(tmp_path / "offloaded", pipeline=pipeline), train(tmp_path / "plain"))


def test_an_evaluation_set_that_is_not_there(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset={"animals": prompts(2)})
    with pytest.raises(ValueError, match=r"'plants'.*\['animals'\]"):
        trainer.evaluate("plants")


def test_a_pipeline_that_has_a_lora(tmp_path, tiny_sd3):
    tiny_sd3.transformer.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name="style")
    assert_refused(tmp_path, ValueError, "already has adapters (style)", "unload_lora_weights", pipeline=tiny_sd3)


def test_an_adapter_that_diffusers_cannot_load(tmp_path):
    assert_refused(tmp_path, ValueError, "LoHa", lora=LoHaConfig(target_modules=["to_q"]))


def test_args_that_are_no_config_of_ours(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(tmp_path / "out", use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match="args is a TrainingArguments, but must be a FlowGRPOConfig"):
        FlowGRPOTrainer(tiny_sd3_pipeline(), brightness, args, prompts())


# ---- Rewards ----


def positional(prompts, images):
    return [0.0] * len(images)


def needs_a_column(prompts, images, objects, **kwargs):
    return [0.0] * len(images)


@pytest.mark.parametrize(
    ("reward_funcs", "error", "parts"),
    [
        ([], ValueError, ["reward_funcs is empty"]),
        ("brightness", ValueError, ["there is no reward function", "'brightness'"]),
        ([brightness, 3], TypeError, ["callable", "int"]),
        (positional, TypeError, ["'positional'", "**kwargs"]),
        (needs_a_column, ValueError, ["'needs_a_column'", "'objects'", "column"]),
    ],
)
def test_reward_functions_that_could_not_be_called(reward_funcs, error, parts, tmp_path):
    assert_refused(tmp_path, error, *parts, reward_funcs=reward_funcs)


@pytest.mark.parametrize("weights", [[], [1.0, 2.0]])
def test_a_wrong_number_of_reward_weights(weights, tmp_path):
    parts = [
        f"reward_weights has length {len(weights)}",
        "reward_funcs has length 1: brightness",
        "Without reward_weights",
    ]
    assert_refused(tmp_path, ValueError, *parts, reward_weights=weights)


# ---- The output folder ----


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    assert_refused(tmp_path, ValueError, "output_dir", "not a folder")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="not a folder"):
        tiny_trainer(tmp_path / "file" / "a" / "b")


def test_an_unwritable_output_folder(tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.geteuid() == 0:
        # the administrator may write everywhere: answer as the system answers others
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and access(path, mode))
    with pytest.raises(ValueError, match="cannot be written to.*read-only for this user"):
        tiny_trainer(locked / "out")
    assert not list(locked.iterdir())


def test_an_output_folder_without_room_for_a_checkpoint(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=2**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / "out").mkdir()
    assert_refused(tmp_path, ValueError, "0 MiB left", "Make room", save_strategy="steps")
    tiny_trainer(tmp_path / "out", save_strategy="no")


def test_a_dtype_that_is_none(tmp_path, tiny_sd3_path):
    parts = ["dtype 'half32'", "float32, bfloat16 or float16"]
    kwargs = {"model_init_kwargs": {"dtype": "half32"}, "pipeline": tiny_sd3_path}
    assert_refused(tmp_path, ValueError, *parts, **kwargs)


def test_an_output_folder_with_other_files_keeps_them(tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "mine.png").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    assert_refused(tmp_path, ValueError, "is empty", train_dataset=Dataset.from_dict({"prompt": []}))
    train(tmp_path / "out", save_strategy="steps", save_steps=1, log_images=True)
    assert before.items() <= contents(tmp_path).items()


# ---- The config, before there is a trainer ----


@pytest.mark.parametrize("cls", [FlowGRPOConfig, GuardConfig])
def test_a_misspelt_option(cls, tmp_path):
    with pytest.raises(TypeError, match="num_generation"):
        tiny_config(tmp_path / "out", cls=cls, num_generation=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"num_generations": 3}, ["generation_batch_size is 8", "not divisible by num_generations (3)", "Change"]),
        ({"num_generations": 16}, ["not divisible by num_generations (16)"]),
        ({"generation_batch_size": 12}, ["generation_batch_size (12)", "multiple of"]),
        ({"sde_window_size": 4}, ["sde_window_size is 4", "[0, 3]", "has 3"]),
        ({"sde_window_size": 1, "sde_window_range": [0, 4]}, ["[0, 4]", "num_inference_steps (4)"]),
    ],
)
def test_groups_batches_and_windows_that_do_not_fit(fields, parts, tmp_path):
    assert_refused(tmp_path, ValueError, *parts, **fields)


# ---- While training ----


def raising(prompts, images, **kwargs):
    raise KeyError("no such color")


def nan(prompts, images, **kwargs):
    return [float("nan")] * len(images)


def text(prompts, images, **kwargs):
    return ["good"] * len(images)


def too_few(prompts, images, **kwargs):
    return [1.0]


def hanging(prompts, images, **kwargs):
    time.sleep(60)


@pytest.mark.parametrize(
    ("reward", "parts"),
    [
        (raising, ["raised KeyError", "no such color"]),
        (nan, ["nan", "prompt 'a "]),
        (text, ["'good'", "str"]),
        (too_few, ["1 rewards for 8 images"]),
        (hanging, ["0.2 seconds", "reward_timeout"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_reward_that_fails_ends_training_and_leaves_checkpoints_alone(reward, parts, tmp_path):
    calls = []
    out = tmp_path / "out"
    before = {}

    def fails_at_the_second_call(prompts, images, **kwargs):
        calls.append(len(prompts))
        if len(calls) == 1:
            return brightness(prompts, images)
        before.update(contents(out))
        return reward(prompts, images)

    fields = {"reward_timeout": 0.2 if reward is hanging else None, "save_strategy": "steps", "save_steps": 1}
    start = time.monotonic()
    with pytest.raises(RewardError) as raised:
        tiny_trainer(out, reward_funcs=fails_at_the_second_call, **fields).train()
    assert time.monotonic() - start < 30
    for part in ["'fails_at_the_second_call'", *parts]:
        assert part in str(raised.value)
    assert any(name.startswith("checkpoint-1/") for name in before)
    assert contents(out) == before
    # with the cause removed, training goes on
    whole = train(tmp_path / "whole", save_strategy="steps", save_steps=1)
    trainer = tiny_trainer(out, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert_equal({n: p for n, p in trainer.model.named_parameters() if p.requires_grad}, whole)


def test_a_sampling_setting_without_effect_is_refused_and_a_default_is_not(tmp_path):
    unguided = {"negative_prompt": "blurred", "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="negative_prompt is 'blurred', but has no effect: with guidance_scale 1"):
        tiny_trainer(tmp_path, **unguided)
    assert not any(tmp_path.iterdir())
    tiny_trainer(tmp_path, **unguided, eval_guidance_scale=4.0)  # evaluations are guided
    schnell = partial(tiny_flux_pipeline, guidance_embeds=False)
    with pytest.raises(ValueError, match="eval_guidance_scale is 3, but has no effect: this FluxPipeline"):
        tiny_trainer(tmp_path, pipeline=schnell(), guidance_scale=1.0, eval_guidance_scale=3.0)
    size = {"height": 32, "width": 32}
    with pytest.raises(ValueError, match="max_sequence_length is 64, but StableDiffusionPipeline does not take it"):
        tiny_trainer(tmp_path, pipeline=tiny_sd_pipeline(), max_sequence_length=64, **size)
    known = FlowGRPOConfig.__dataclass_fields__
    defaults = {name: known[name].default for name in ("guidance_scale", "max_sequence_length")}
    tiny_trainer(tmp_path, pipeline=tiny_sd_pipeline(), **size, **defaults)
    trainer = tiny_trainer(tmp_path, pipeline=schnell(), **defaults, eval_num_inference_steps=None)
    # A distilled model is evaluated as it is trained, others in the pipeline's steps
    assert trainer.args.eval_num_inference_steps == trainer.args.num_inference_steps == 4
    assert tiny_trainer(tmp_path, eval_num_inference_steps=None).args.eval_num_inference_steps == 28


def test_prompts_that_are_cut_are_counted_for_each_set(tmp_path):
    long = Dataset.from_dict({"prompt": ["a cat", "two dogs " * 9]})
    with warnings_of("trl_flow") as said:
        trainer = tiny_trainer(tmp_path, train_dataset=long, eval_dataset=prompts(2))
        trainer.evaluate()
    said = [message for message in said if "longer than" in message]
    assert len(said) == 1 and "1 of 2 different prompts of train_dataset are longer than the 16 tokens" in said[0]
    with warnings_of("trl_flow") as said:
        trainer.evaluate(long)
    assert sum("1 of 2 different prompts of eval_dataset" in message for message in said) == 1


def test_a_lora_without_targets_is_given_the_backbones_and_is_not_changed_itself(tmp_path):
    lora = tiny_lora()
    trainer = tiny_trainer(tmp_path, lora=lora)
    assert lora.target_modules is None
    targets = trainer.model.peft_config["default"].target_modules
    assert set(targets) == set(trainer.backbone.lora_target_modules)


def test_latents_that_are_not_finite_end_training_with_the_cause(tmp_path):
    trainer = tiny_trainer(tmp_path, noise_level=1e30)
    with pytest.raises(FloatingPointError, match="NaN or infinite latents for the prompts .*noise_level.*learning"):
        trainer.train()
