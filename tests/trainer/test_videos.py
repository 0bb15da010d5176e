"""Training a model of videos: what rewards get, resuming, and that it learns."""

import math

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_sd3_pipeline
from tiny_training import assert_equal, brightness, distance, prompts, tiny_trainer, trained_weights
from tiny_wan import tiny_wan_experts_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline

from trl_flow import DiffusionNFTConfig
from trl_flow.evaluation.adapters import loaded_adapter, parse_adapters
from trl_flow.evaluation.inputs import DrawingOptions, loaded_backbone
from trl_flow.images import frame_of
from trl_flow.lora import lora_layers
from trl_flow.rewards.checks import check_reward_func


FRAMES = 5


def movement(prompts, images, videos, **kwargs):
    """Mean absolute difference of successive frames, in [0, 1]."""
    stacked = [np.stack([np.asarray(frame, dtype=np.float32) for frame in video]) for video in videos]
    return [float(np.abs(np.diff(frames, axis=0)).mean() / 255) for frames in stacked]


def video_trainer(output_dir, **kwargs):
    pipeline = kwargs.pop("pipeline", None) or tiny_wan_pipeline()
    return tiny_trainer(output_dir, pipeline=pipeline, **{"num_frames": FRAMES, "reward_funcs": movement} | kwargs)


class Recorded:
    """Keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, images, **kwargs):
        self.calls.append({"images": images, **kwargs})
        return brightness(prompts, images)


# ---- Rewards ----


@pytest.mark.parametrize("frame", ["first", "middle", "last"])
def test_rewards_get_all_frames_and_the_chosen_one_as_the_image(frame, tmp_path):
    training, gold = Recorded(), Recorded()
    fields = {"eval_reward_funcs": gold, "eval_dataset": prompts(2), "num_generations_eval": 2}
    trainer = video_trainer(tmp_path, reward_funcs=training, reward_frame=frame, max_steps=1, **fields)
    trainer.train()
    for call in training.calls + gold.calls:
        assert len(call["images"]) == len(call["videos"]) > 0
        for image, video in zip(call["images"], call["videos"], strict=True):
            assert len(video) == FRAMES and all(isinstance(each, Image.Image) for each in video)
            assert image.tobytes() == frame_of(video, frame).tobytes()
    assert {"eval_gold/average", "eval_diversity"} <= set().union(*trainer.state.log_history)


def test_each_function_gets_frames_of_its_own(tmp_path):
    def paints(prompts, images, videos, **kwargs):
        for picture in [*images, *(each for video in videos for each in video)]:
            picture.paste("red", (0, 0, *picture.size))
        videos.clear()
        return [0.0, 1.0] * (len(images) // 2)

    recorded = Recorded()
    video_trainer(tmp_path, reward_funcs=[paints, recorded], max_steps=1).train()
    assert all(each.getcolors(1) is None for call in recorded.calls for video in call["videos"] for each in video)


def test_unfinished_videos_are_scored_as_videos(tmp_path):
    recorded = Recorded()
    fields = {"dense_rewards": True, "value_discount": 0.5, "value_scale": 0.2, "num_inference_steps": 3}
    fields["train_last_step"] = True  # else the last step follows the prediction before it
    video_trainer(tmp_path, reward_funcs=recorded, max_steps=1, **fields).train()
    # The finished ones by groups, then all after each of the first two steps
    assert [len(call["videos"]) for call in recorded.calls] == [8, 8, 8]
    first, second, third = ([video[-1].tobytes() for video in call["videos"]] for call in recorded.calls)
    assert first != second != third != first


def test_images_have_no_videos(tmp_path):
    recorded = Recorded()
    tiny_trainer(tmp_path, reward_funcs=recorded, max_steps=1).train()
    assert all("videos" not in call for call in recorded.calls)


def test_a_reward_of_videos_is_refused_where_images_are_drawn(tmp_path):
    what = "'movement' needs videos, but this model draws images.*take a model that draws videos"
    with pytest.raises(ValueError, match=what):
        tiny_trainer(tmp_path / "out", reward_funcs=movement)
    with pytest.raises(ValueError, match=f"eval_dataset: .*{what}"):
        tiny_trainer(tmp_path / "out", eval_reward_funcs=movement, eval_dataset=prompts(2))
    assert not (tmp_path / "out").exists()

    def either(prompts, images, videos=None, **kwargs):
        return brightness(prompts, images)

    tiny_trainer(tmp_path, reward_funcs=either)


def test_what_is_not_known_yet_is_not_refused():
    def without_kwargs(prompts, images, trainer_state, log_metric, log_extra): ...

    for func in (movement, without_kwargs):
        check_reward_func(func, [])
    check_reward_func(without_kwargs, [], videos=False)
    with pytest.raises(TypeError, match=r"does not accept \['videos'\], .*End its parameters with \*\*kwargs"):
        check_reward_func(without_kwargs, [], videos=True)


def test_a_column_of_this_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset has columns \['videos'\].*Rename them"):
        video_trainer(tmp_path, train_dataset=prompts(videos=["a.mp4"] * 4))


# ---- Settings ----


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (tiny_sd3_pipeline, {"num_frames": 5}, "num_frames is 5, but StableDiffusion3Pipeline takes none. Leave"),
        (tiny_wan_pipeline, {"num_frames": 0}, "num_frames is 0, but must be at least 1"),
        (tiny_wan_pipeline, {"num_frames": 4}, "Set num_frames=1 or 5"),
        (tiny_wan_pipeline, {"component": "transformer_2"}, "component is 'transformer_2'"),
        (tiny_wan_pipeline, {"reward_frame": "third"}, "reward_frame is 'third', but must be one of first, middle"),
        (tiny_wan_experts_pipeline, {"guidance_scale_2": -1.0}, "guidance_scale_2 is -1.0, but must be 0 or more"),
        (
            tiny_wan_experts_pipeline,
            {"guidance_scale_2": 3.0, "guidance_scale": 1.0},
            "guidance_scale_2 is 3, but has no effect: .* Raise guidance_scale above 1, or leave guidance_scale_2 out",
        ),
        (
            tiny_wan_experts_pipeline,
            {"num_inference_steps": 3, "component": "transformer_2"},
            "no step but the last .* that the transformer_2 takes .* Use more steps, or set train_last_step=True",
        ),
        (
            tiny_wan_experts_pipeline,
            {"sde_window_size": 2, "component": "transformer_2"},
            "the transformer_2 takes 1 steps that can be trained",
        ),
        (
            tiny_wan_experts_pipeline,
            {"cls": DiffusionNFTConfig, "timestep_range": [0, 2], "component": "transformer_2"},
            r"timestep_range is \[0, 2\], but the transformer_2 takes none of these steps",
        ),
    ],
)
def test_what_cannot_be_drawn_or_trained_is_refused(make, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "out", pipeline=make(), **fields)
    assert not list(tmp_path.glob("out/*"))


# ---- Training ----


@pytest.mark.parametrize("stop", [1, 2])
def test_resuming_in_the_middle_of_a_generation_batch(stop, tmp_path):
    columns = {"image": [Image.new("RGB", (20, 20), (60 * i, 100, 50)) for i in range(4)]}
    fields = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 4, "save_steps": stop}
    fields |= {"save_strategy": "steps", "train_dataset": prompts(**columns)}

    def trained(folder, checkpoint=None):
        trainer = video_trainer(folder, pipeline=tiny_wan_i2v_pipeline(), **fields)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trained_weights(trainer)

    whole = trained(tmp_path)
    assert_equal(trained(tmp_path, str(tmp_path / f"checkpoint-{stop}")), whole)


def test_the_second_expert_is_trained_saved_evaluated_and_gone_on_from(tmp_path):
    tiny_wan_experts_pipeline().save_pretrained(tmp_path / "base")
    fields = {"pipeline": str(tmp_path / "base"), "component": "transformer_2", "height": 16, "width": 32}
    trainer = video_trainer(tmp_path / "run", save_strategy="steps", log_images=True, **fields)
    trainer.train()
    assert not getattr(trainer.pipeline.transformer, "peft_config", None)
    saved = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.blocks.") for name in saved)  # as diffusers reads both
    assert list((tmp_path / "run" / "images").glob("*.png"))
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "load_into_transformer_2=True" in card and "fps=16" in card and "pipeline_tag: text-to-video" in card
    # Evaluations load it into the second expert by themselves, and draw as the run evaluated
    adapters = parse_adapters([str(tmp_path / "run")])
    backbone, options, notes = loaded_backbone(str(tmp_path / "base"), DrawingOptions(), None, adapters, {})
    assert backbone.component == "transformer_2" and notes == []
    assert (options.num_frames, options.height, options.width) == (FRAMES, 16, 32)
    with loaded_adapter(backbone, adapters[0]):
        layers = [name for name, _ in lora_layers(backbone.pipeline)]
    assert layers and all(name.startswith("transformer_2.") for name in layers)
    # And a second run goes on with it
    again = video_trainer(tmp_path / "on", init_adapter=str(tmp_path / "run"), lora=None, **fields)
    assert distance(trained_weights(again), trained_weights(trainer)) < 1e-6


@pytest.mark.parametrize(
    ("reward", "fields"),
    [(movement, {}), pytest.param(brightness, {"reward_frame": "last"}, marks=pytest.mark.slow)],
    ids=["motion", "brightness of the last frame"],
)
def test_it_learns(reward, fields, tmp_path):
    """The reward of the same sixteen videos rises by more than three standard errors of their mean."""
    fields |= {"per_device_train_batch_size": 16, "generation_batch_size": 32, "num_generations": 8}
    fields |= {"learning_rate": 0.02, "max_steps": 8, "num_generations_eval": 4, "eval_dataset": prompts()}
    fields |= {"guidance_scale": 1.0, "num_inference_steps": 3}
    trainer = video_trainer(tmp_path, lora=None, reward_funcs=reward, **fields)
    before = trainer.evaluate()
    trainer.train()
    noise = before[f"eval_rewards/{reward.__name__}/std"] / math.sqrt(16)
    assert trainer.evaluate()["eval_reward"] > before["eval_reward"] + 3 * noise
