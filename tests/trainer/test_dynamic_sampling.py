"""`dynamic_sample`: other prompts take the places of groups whose rewards have no spread."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_training import PROMPTS, assert_equal, brightness, tiny_config, tiny_trainer, trained_weights

from trl_flow import AWMConfig, DiffusionNFTConfig, FlowGRPOConfig, GuardConfig, VGPOConfig


def but_for(*flat):
    """Brightness, and 0 for all images of these prompts."""

    def reward(prompts, images, **kwargs):
        pairs = zip(prompts, brightness(prompts, images), strict=True)
        return [0.0 if prompt in flat else value for prompt, value in pairs]

    return reward


def phase(folder, reward_funcs, prompts=PROMPTS[:2], **fields):
    """The only micro-batch of a first phase of two groups of four images, and the trainer."""
    trainer = tiny_trainer(folder, reward_funcs=reward_funcs, **{"dynamic_sample": True} | fields)
    (batch,) = trainer._generate_and_score([{"prompt": prompt} for prompt in prompts for _ in range(4)])
    return batch, trainer


def metrics(trainer):
    values = trainer.metrics.flush(trainer.algorithm)
    return [values[f"dynamic_sample/{name}"] for name in ("times", "groups", "frac_zero_std")] + [
        values["frac_reward_zero_std"]
    ]


@pytest.mark.parametrize("cls", [FlowGRPOConfig, DiffusionNFTConfig])
def test_a_group_without_spread_makes_room_for_another_prompt(cls, tmp_path):
    batch, trainer = phase(tmp_path, but_for("a cat"), cls=cls)
    assert metrics(trainer) == [1, 1, 0, 0.5]  # as first drawn, half of the groups had none
    plain, _ = phase(tmp_path / "plain", but_for("a cat"), cls=cls, dynamic_sample=False)
    # The other group and its place are as they were
    assert batch.prompts[4:] == plain.prompts[4:] == ["two dogs"] * 4
    for name, tensor in batch.tensors.items():
        assert torch.equal(tensor[4:], plain.tensors[name][4:])
        assert (tensor[:4] != plain.tensors[name][:4]).any()
    assert len(set(batch.prompts[:4])) == 1 and batch.prompts[0] in PROMPTS[2:]
    assert (plain.advantages[:4] == 0).all() and batch.advantages[:4].abs().min() > 0
    assert batch.samples == plain.samples == tuple(range(8))


def test_what_is_kept_is_what_was_scored(tmp_path):
    """The image, and its reward, belong to the latents that are trained on."""
    scored = {}

    def reward(prompts, images, **kwargs):
        values = but_for("a cat")(prompts, images)
        scored.update(zip((image.tobytes() for image in images), values, strict=True))
        return values

    batch, trainer = phase(
        tmp_path, reward, cls=DiffusionNFTConfig, scale_rewards="none", per_device_train_batch_size=8
    )
    from trl_flow.rollout import decode

    rewards = torch.tensor([scored[image.tobytes()] for image in decode(trainer.backbone, batch.tensors["clean"])])
    centered = rewards.view(2, 4) - rewards.view(2, 4).mean(dim=1, keepdim=True)
    torch.testing.assert_close(batch.advantages, centered.flatten() / trainer.args.advantage_clip, rtol=0, atol=1e-6)


def test_it_ends_after_so_many_times_and_what_is_left_trains_nothing(tmp_path):
    batch, trainer = phase(tmp_path, but_for(*PROMPTS), max_resample_times=2)
    assert metrics(trainer) == [2, 4, 1, 1]
    assert (batch.advantages == 0).all()


def test_nothing_is_sampled_again_where_all_groups_have_spread(tmp_path):
    batch, trainer = phase(tmp_path, brightness)
    plain, _ = phase(tmp_path / "plain", brightness, dynamic_sample=False)
    assert metrics(trainer) == [0, 0, 0, 0]
    assert torch.equal(batch.advantages, plain.advantages) and batch.prompts == plain.prompts


def test_a_prompt_that_no_reward_applies_to_is_replaced(tmp_path):
    def none(prompts, images, **kwargs):
        pairs = zip(prompts, brightness(prompts, images), strict=True)
        return [None if prompt == "two dogs" else value for prompt, value in pairs]

    batch, trainer = phase(tmp_path, none)
    assert "two dogs" not in batch.prompts and batch.advantages.abs().min() > 0


def test_of_several_rewards_that_are_normalized_one_with_spread_is_enough(tmp_path):
    """Of their sum it must be the sum's."""

    def against(prompts, images, **kwargs):
        return [-value for value in brightness(prompts, images)]

    fields = {"reward_weights": [1.0, 1.0], "max_resample_times": 1}
    _, trainer = phase(tmp_path / "sum", [brightness, against], **fields)
    assert metrics(trainer) == [1, 2, 1, 1]
    fields["multi_objective_aggregation"] = "normalize_then_sum"
    _, trainer = phase(tmp_path / "each", [brightness, against], **fields)
    assert metrics(trainer) == [0, 0, 0, 0]


def test_dense_rewards_have_spread_if_any_step_has(tmp_path):
    def unfinished(prompts, images, trainer_state=None, **kwargs):
        calls.append(len(images))
        return [0.5] * len(images) if len(calls) <= 2 else brightness(prompts, images)

    calls = []
    fields = {"cls": VGPOConfig, "value_scale": 0.0, "overlap_rewards": False, "per_device_train_batch_size": 8}
    _, trainer = phase(tmp_path, unfinished, **fields)
    values = metrics(trainer)
    assert values[-1] == 1 and values[:3] == [0, 0, 0]  # the finished images of the phase all got 0.5


@pytest.mark.parametrize("fields", [
    {"sde_window_size": 1, "sde_window_range": [1, 3], "share_initial_noise": True},
    {"cls": VGPOConfig, "value_scale": 0.0},
    {"timestep_fraction": 0.7, "timestep_fraction_per_sample": True},
    {"cls": GuardConfig, "num_generations_trained": 2},
    {"cls": DiffusionNFTConfig, "num_generations_trained": 2},
    {"cls": AWMConfig},
    {"per_device_train_batch_size": 2, "steps_per_generation": 4},
], ids=lambda fields: ", ".join(fields))  # fmt: skip
def test_equal_seeds_give_equal_runs_however_they_are_cut(fields, tmp_path):
    """And a resumed one goes on from the middle of a phase, with each method."""
    batch = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
    fields = batch | {"dynamic_sample": True, "reward_funcs": but_for("a cat", "a bird"), "max_steps": 4} | fields
    saved = {"save_strategy": "steps", "save_steps": 1}
    whole = tiny_trainer(tmp_path / "whole", **fields | saved)
    whole.train()
    assert any(log.get("dynamic_sample/groups", 0) > 0 for log in whole.state.log_history)
    resumed = tiny_trainer(tmp_path / "resumed", **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_equal(*map(trained_weights, (whole, resumed)))


def test_prompts_without_shuffling_are_those_that_follow(tmp_path):
    rows = Dataset.from_dict({"prompt": [f"number {i}" for i in range(10)], "place": list(range(10))})

    def reward(prompts, images, place, **kwargs):
        return [0.0 if i < 3 else value for i, value in zip(place, brightness(prompts, images), strict=True)]

    trainer = tiny_trainer(
        tmp_path, reward_funcs=reward, train_dataset=rows, shuffle_dataset=False, dynamic_sample=True
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    # 2 is without spread as well, and 4 follows on the 3 that was drawn at the same time
    assert batch.prompts == ["number 4"] * 4 + ["number 3"] * 4


def test_columns_that_rewards_are_not_given_stay_away(tmp_path):
    rows = Dataset.from_dict({"prompt": PROMPTS, "secret": PROMPTS})

    def reward(prompts, images, **kwargs):
        assert "secret" not in kwargs
        return but_for("a cat", "a bird")(prompts, images)

    tiny_trainer(
        tmp_path, reward_funcs=reward, train_dataset=rows, dynamic_sample=True, remove_unused_columns=True
    ).train()


def test_one_prompt_with_an_image_each_is_not_read_to_the_end(tmp_path):
    """As models that edit have it: the instruction is the same, and the rows are many."""
    read = []

    def transform(batch):
        read.extend(batch["number"])
        return {"prompt": ["a cat"] * len(batch["number"])}

    rows = Dataset.from_dict({"number": list(range(1000)), "prompt": ["a cat"] * 1000}).with_transform(transform)
    trainer = tiny_trainer(tmp_path, reward_funcs=but_for("a cat"), train_dataset=rows, dynamic_sample=True)
    read.clear()
    trainer._generate_and_score([{"prompt": "a cat"}] * 8)
    assert len(read) < 20


def test_the_logged_images_and_columns_are_those_of_the_samples_at_hand(tmp_path):
    def reward(prompts, images, log_metric, log_extra, **kwargs):
        log_metric("own", len(images))
        log_extra("said", [f"of {prompt}" for prompt in prompts])
        return but_for("a cat")(prompts, images)

    batch, trainer = phase(tmp_path, reward, log_images=True)
    captions = [caption.split("\n") for caption in trainer.sample_log._captions]
    assert [lines[0] for lines in captions] == batch.prompts
    assert all(lines[-1] == f"said of {lines[0]}" for lines in captions)
    assert all(isinstance(image, Image.Image) for image in trainer.sample_log._images)
    assert np.isfinite(metrics(trainer)).all()


def test_a_column_that_only_the_new_samples_have_is_theirs(tmp_path):
    def reward(prompts, images, log_extra, **kwargs):
        if set(prompts) <= set(PROMPTS[2:]):
            log_extra("new", prompts)
        return but_for("a cat", "two dogs")(prompts, images)

    batch, trainer = phase(tmp_path, reward, log_images=True, overlap_rewards=False)
    lines = [caption.split("\n") for caption in trainer.sample_log._captions]
    assert all(each[-1] == f"new {prompt}" for each, prompt in zip(lines, batch.prompts, strict=True))


def test_what_is_logged_is_of_the_samples_that_were_drawn_first(tmp_path):
    def reward(prompts, images, log_metric, **kwargs):
        log_metric("cats", prompts.count("a cat"))
        return but_for("a cat")(prompts, images)

    logs = []
    for dynamic in (True, False):
        _, trainer = phase(tmp_path / str(dynamic), reward, dynamic_sample=dynamic)
        logs.append(trainer.metrics.flush(trainer.algorithm))
    assert logs[0]["dynamic_sample/groups"] == 1 and logs[1]["cats"] > 0
    for name in ("reward", "cats", "diversity"):
        assert logs[0][name] == logs[1][name]


@pytest.mark.parametrize(("cls", "fields", "parts"), [
    (FlowGRPOConfig, {"max_resample_times": 2}, ["max_resample_times is 2", "Set dynamic_sample=True"]),
    (AWMConfig, {"dynamic_sample": True, "max_resample_times": 0}, ["max_resample_times is 0", "at least 1"]),
    (VGPOConfig, {"dynamic_sample": True}, ["value_scale=0.05", "Set value_scale=0"]),
])  # fmt: skip
def test_what_is_refused(cls, fields, parts, tmp_path):
    with pytest.raises(ValueError) as raised:
        tiny_config(tmp_path, cls, **fields)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_groups_that_are_split_over_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(FlowGRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="dynamic_sample is True, with num_generations=4.*a multiple of 4"):
        tiny_config(tmp_path, per_device_train_batch_size=2, dynamic_sample=True)
    assert tiny_config(tmp_path, per_device_train_batch_size=4, dynamic_sample=True).max_resample_times == 3
