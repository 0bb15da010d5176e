"""What is logged is what can be worked out by hand; what rewards are given is what the documentation says."""

import asyncio
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from tiny_models import tiny_sd3_pipeline
from tiny_training import (
    brightness,
    distance,
    prompts,
    tiny_config,
    tiny_lora,
    tiny_trainer,
    trained_weights,
    warnings_of,
)
from transformers import TrainerState

from trl_flow.algorithms import ClippedPolicyGradient
from trl_flow.backbones import get_backbone
from trl_flow.rewards.scorer import RewardLogs
from trl_flow.rollout import draw_noise, sample_generator
from trl_flow.trainer.metrics import SampleLog
from trl_flow.trainer.prompt_cache import PromptCache


REWARDS = [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0]  # of two groups


def fixed(prompts, images, **kwargs):
    return REWARDS[: len(images)]


def sparse(prompts, images, **kwargs):
    return [None, 2.0, None, None, 4.0, None, None, None]


def trained(tmp_path, **fields):
    trainer = tiny_trainer(tmp_path, **{"max_steps": 1} | fields)
    trainer.train()
    return trainer


def logged(trainer, step: int = 1) -> dict[str, float]:
    return next(logs for logs in trainer.state.log_history if logs["step"] == step)


# ---- Metrics ----


def test_reward_metrics_by_hand(tmp_path):
    logs = logged(trained(tmp_path, reward_funcs=[fixed, sparse], reward_weights=[1.0, 0.5]))
    # 1, 2 + 1, 3, 4, 5 + 2, 5, 5, 5: the weighted sum over the functions that apply
    total = [1.0, 3.0, 3.0, 4.0, 7.0, 5.0, 5.0, 5.0]
    assert logs["reward"] == pytest.approx(np.mean(total))
    assert logs["reward_std"] == pytest.approx(np.std(total, ddof=1))
    assert logs["rewards/fixed/mean"] == pytest.approx(30 / 8)
    assert logs["rewards/fixed/std"] == pytest.approx(np.std(REWARDS, ddof=1))
    assert logs["rewards/sparse/mean"] == pytest.approx(3.0)
    assert logs["rewards/sparse/std"] == pytest.approx(2**0.5)
    assert (logs["rewards/fixed/frac_none"], logs["rewards/sparse/frac_none"]) == (0.0, 0.75)
    assert logs["frac_reward_zero_std"] == 0.0
    assert logs["step_time"] > 0


def test_a_function_that_is_only_watched_gives_no_sample_a_reward(tmp_path):
    logs = logged(trained(tmp_path, reward_funcs=[fixed, sparse], reward_weights=[0.0, 1.0]))
    # `sparse` applies to two samples, the others have no reward at all
    assert logs["reward"] == pytest.approx(3.0)
    assert logs["rewards/fixed/mean"] == pytest.approx(30 / 8)


def test_groups_without_spread_are_counted(tmp_path):
    assert logged(trained(tmp_path, reward_funcs=fixed))["frac_reward_zero_std"] == 0.5


def test_the_names_of_all_metrics(tmp_path):
    logs = logged(trained(tmp_path, reward_funcs=fixed, beta=0.04, diagnostics_steps=1))
    names = {"reward", "reward_std", "frac_reward_zero_std", "rewards/fixed/mean", "rewards/fixed/std", "kl"}
    names |= {f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean")} | {"ratio/mean", "ratio/std"}
    for step in range(3):
        names |= {f"ratio/mean_step_{step}", f"clip_ratio/low_step_{step}", f"clip_ratio/high_step_{step}"}
        names |= {f"grad_norm/step_{step}"}
    names |= {"loss", "grad_norm", "learning_rate", "step_time", "epoch"}
    assert names <= logs.keys()


def test_only_trained_steps_have_metrics(tmp_path):
    trainer = trained(tmp_path, sde_window_size=1, sde_window_range=[1, 2], diagnostics_steps=1)
    steps = {name[-1] for name in logged(trainer) if "step_" in name and name != "step_time"}
    assert steps == {"1"}


def test_without_kl_there_is_no_kl_metric(tmp_path):
    assert "kl" not in logged(trained(tmp_path))


def test_metrics_are_averages_between_two_logs_and_begin_anew(tmp_path):
    values = iter([1.0, 3.0, 10.0, 20.0])

    def rising(prompts, images, **kwargs):
        return [next(values)] * len(images)

    trainer = trained(tmp_path, reward_funcs=rising, max_steps=4, logging_steps=2)
    assert logged(trainer, 2)["reward"] == 2.0
    assert logged(trainer, 4)["reward"] == 15.0


def test_the_gradient_norm_of_one_step_is_that_of_the_update(tmp_path):
    one = logged(trained(tmp_path / "one", sde_window_size=1, sde_window_range=[1, 2], diagnostics_steps=1))
    assert one["grad_norm/step_1"] == pytest.approx(one["grad_norm"], rel=1e-5)
    # of several it is that of the step's own loss, of which the update takes the mean: at most the norms' mean
    three = logged(trained(tmp_path / "three", diagnostics_steps=1))
    norms = [three[f"grad_norm/step_{step}"] for step in range(3)]
    assert max(norms) - sum(norms) + max(norms) <= 3 * three["grad_norm"] <= sum(norms)
    assert three["grad_norm/step_1"] == pytest.approx(one["grad_norm/step_1"], rel=0.5)


def test_gradient_norms_are_measured_every_so_many_updates(tmp_path):
    trainer = trained(tmp_path, max_steps=4, diagnostics_steps=3)
    measured = [step for step in range(1, 5) if "grad_norm/step_0" in logged(trainer, step)]
    assert measured == [1, 4]


def test_measuring_gradient_norms_changes_nothing(tmp_path):
    with_it, without = (trained(tmp_path / str(n), max_steps=2, diagnostics_steps=n) for n in (1, 0))
    assert distance(trained_weights(with_it), trained_weights(without)) < 1e-4  # a step of Adam's is 1e-2


def test_the_loss_is_minus_the_mean_advantage_at_a_ratio_of_1(tmp_path):
    # and that mean is 0 for every group, whatever is divided by
    for scale in ("group", "batch", "none"):
        trainer = trained(tmp_path / scale, reward_funcs=fixed, scale_rewards=scale)
        assert logged(trainer)["loss"] == pytest.approx(0, abs=1e-6)


# ---- Samples without a reward ----


def test_a_sample_without_any_reward_is_left_out_of_its_group(tmp_path):
    def picky(prompts, images, **kwargs):
        return [None, 2.0, 4.0, 6.0, 5.0, 5.0, 6.0, 8.0]

    trainer = tiny_trainer(tmp_path, reward_funcs=picky, scale_rewards="none")
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    expected = torch.tensor([0.0, -2.0, 0.0, 2.0, -1.0, -1.0, 0.0, 2.0])
    torch.testing.assert_close(batch.advantages, expected[:, None].expand(8, 3))
    trainer.train()
    assert logged(trainer)["reward"] == pytest.approx(36 / 7)


@pytest.mark.parametrize("dense_rewards", [False, True])
def test_a_group_without_any_reward_is_not_trained_on(dense_rewards, tmp_path):
    def picky(prompts, images, **kwargs):
        return [None] * 4 + [float(i) for i in range(4)]

    trainer = tiny_trainer(tmp_path, reward_funcs=picky, dense_rewards=dense_rewards)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert (batch.advantages[:4] == 0).all()
    assert batch.advantages.isfinite().all()
    assert (batch.advantages[4:] != 0).any()
    trainer.train()
    assert all(value.isfinite().all() for value in trained_weights(trainer).values())


def test_no_reward_at_all_trains_on_nothing(tmp_path):
    def never(prompts, images, **kwargs):
        return [None] * len(images)

    with warnings_of("trl_flow.trainer.phase_scores") as warnings:
        trainer = trained(tmp_path, reward_funcs=never, optim="sgd", eval_dataset=prompts(2), max_steps=2)
    (warning,) = (text for text in warnings if "first sampling phase" in text)
    assert "for all 8 images of the first sampling phase by never: nothing is trained" in warning
    assert logged(trainer)["grad_norm"] == 0
    assert logged(trainer)["reward"] is None
    assert logged(trainer)["rewards/never/frac_none"] == trainer.evaluate()["eval_rewards/never/frac_none"] == 1
    with warnings_of("trl_flow.trainer.phase_scores") as warnings:
        trained(tmp_path, reward_funcs=[never, fixed, sparse], max_steps=1)
    assert sum("by never: they train nothing" in text for text in warnings) == 1


# ---- What rewards are given ----


def test_rewards_are_given_columns_images_and_the_trainers_state(tmp_path):
    data = prompts(4, target=[{"count": i} for i in range(4)], weight=[0.0, 0.1, 0.2, 0.3])
    seen = []

    def reward(prompts, images, target, weight, trainer_state, **kwargs):
        seen.append((prompts, target, weight, trainer_state.global_step, sorted(kwargs)))
        assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in images)
        assert len(images) == len(prompts) == len(target) == len(weight) == 8
        return brightness(prompts, images)

    trained(tmp_path, reward_funcs=reward, train_dataset=data, max_steps=2)
    rows = {row["prompt"]: row for row in data}
    for texts, targets, weights, _, others in seen:
        assert targets == [rows[text]["target"] for text in texts]
        assert weights == [rows[text]["weight"] for text in texts]
        assert others == ["log_extra", "log_metric"]
        # each group is one prompt's
        assert len(set(texts[:4])) == len(set(texts[4:])) == 1
    assert [step for *_, step, _ in seen] == [0, 1]


class Weighted:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, prompts, images, **kwargs):
        return [self.factor * value for value in brightness(prompts, images)]


def scaled(prompts, images, factor, **kwargs):
    return [factor * value for value in brightness(prompts, images)]


async def asynchronous(prompts, images, **kwargs):
    await asyncio.sleep(0)
    return brightness(prompts, images)


def test_every_kind_of_callable(tmp_path):
    functions = [brightness, Weighted(2.0), functools.partial(scaled, factor=3.0), asynchronous, Weighted(5.0)]
    logs = logged(trained(tmp_path, reward_funcs=functions, reward_timeout=20.0))
    base = logs["rewards/brightness/mean"]
    factors = {"Weighted": 2, "scaled": 3, "asynchronous": 1, "Weighted_2": 5}
    for name, factor in factors.items():
        assert logs[f"rewards/{name}/mean"] == pytest.approx(factor * base)
    assert logs["reward"] == pytest.approx(12 * base)


def test_log_metric(tmp_path):
    values = iter([1.0, 2.0, 6.0, 8.0])

    def reward(prompts, images, log_metric, **kwargs):
        log_metric("ocr/confidence", next(values))
        log_metric("constant", 0.25)
        return brightness(prompts, images)

    trainer = trained(tmp_path, reward_funcs=reward, max_steps=4, logging_steps=2)
    assert logged(trainer, 2)["ocr/confidence"] == 1.5
    assert logged(trainer, 4)["ocr/confidence"] == 7.0
    assert logged(trainer, 4)["constant"] == 0.25


@pytest.mark.parametrize(
    ("fields", "calls", "images"),
    [
        ({"max_steps": 4}, 4, 8),
        ({"max_steps": 4, "num_iterations": 2}, 2, 8),
        # for each part that is sampled, whose groups are complete
        ({"max_steps": 4, "steps_per_generation": 2, "per_device_train_batch_size": 4}, 4, 4),
        ({"max_steps": 4, "steps_per_generation": 2, "num_iterations": 2}, 2, 8),
        ({"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 4, 4),
        ({"max_steps": 1, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}, 1, 4),
        ({"max_steps": 1, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}, 2, 4),
        ({"max_steps": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1}, 4, 8),
        ({"max_steps": 1, "dense_rewards": True}, 4, 8),  # after each of four steps
        ({"max_steps": 1, "dense_rewards": True, "sde_window_size": 1, "sde_window_range": [2, 3]}, 4, 8),
    ],
    ids=str,
)
def test_how_often_rewards_are_called(fields, calls, images, tmp_path):
    sizes = []

    def reward(prompts, images, **kwargs):
        sizes.append(len(images))
        return brightness(prompts, images)

    trained(tmp_path, reward_funcs=reward, **fields)
    assert sizes == [images] * calls


# ---- Prompts ----


@pytest.mark.parametrize(("guidance_scale", "negative"), [(2.0, 1), (1.0, 0)])
def test_each_prompt_is_encoded_once(guidance_scale, negative, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=4, guidance_scale=guidance_scale, eval_dataset=prompts(4))
    encoded = []
    encode = trainer.backbone.encode_prompt
    trainer.backbone.encode_prompt = lambda prompt: encoded.append(prompt) or encode(prompt)
    trainer.train()
    trainer.evaluate()
    assert len(encoded) == len(set(encoded)) == 4 + negative


def test_the_prompt_caches_memory_is_bounded():
    backbone = get_backbone(tiny_sd3_pipeline(), height=16, width=16, max_sequence_length=16)
    size = sum(value.nbytes for value in backbone.encode_prompt("a").values())
    cache = PromptCache(backbone, max_bytes=2 * size)
    for text in "abcabc":
        condition = cache([text])
        expected = backbone.encode_prompt(text)
        torch.testing.assert_close(condition["pooled_projections"], expected["pooled_projections"])
        assert cache._bytes <= 2 * size
    # one batch may be larger than the memory: it is complete all the same
    assert cache(list("abcd"))["pooled_projections"].shape[0] == 4
    assert cache._bytes <= 2 * size


# ---- Images ----


def test_a_grid_of_images_at_each_log(tmp_path):
    trainer = trained(tmp_path, log_images=True, max_steps=4, logging_steps=2, eval_dataset=prompts(2))
    trainer.evaluate()
    names = sorted(path.name for path in (tmp_path / "images").glob("*.png"))
    assert names == ["eval-000004.png", "step-000002.png", "step-000004.png"]
    for name in names:
        with Image.open(tmp_path / "images" / name) as grid:
            assert len(grid.convert("RGB").getcolors(2**24)) > 16


def test_no_grid_when_switched_off(tmp_path):
    trained(tmp_path, log_images=False, eval_dataset=prompts(2)).evaluate()
    assert not (tmp_path / "images").exists()


def test_captions_say_prompt_rewards_and_what_the_reward_adds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "trl_flow.trainer.metrics.image_grid", lambda images, texts: drawn.append((images, texts)) or images[0]
    )
    log = SampleLog(tiny_config(tmp_path, log_images=True, num_images_to_log=3), ["reward"])
    rows = [{"prompt": text} for text in ["a cat"] * 4 + ["two dogs"] * 4]
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(8)]
    logs = RewardLogs()
    logs.log_extra("reading", [f"text {i}" for i in range(8)])
    log.take(rows, images, torch.tensor(REWARDS)[:, None], logs)
    for _ in range(2):  # what has been shown is not shown again
        log.flush(TrainerState(global_step=1), SimpleNamespace(callbacks=[]))
    # both groups are shown, with the rewards of their own samples: indices 0, 1 and 4
    ((shown, captions),) = drawn
    assert shown == [images[i] for i in (0, 1, 4)]
    expected = [f"{rows[i]['prompt']}\nreward {REWARDS[i]:.3g}\nreading text {i}" for i in (0, 1, 4)]
    assert captions == expected


def test_images_and_metrics_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, log_images=True, report_to="tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert "images/step" in accumulator.Tags()["images"]
    assert "train/reward" in accumulator.Tags()["scalars"]


# ---- Evaluation ----


def test_evaluation_by_hand(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=prompts(3), eval_num_inference_steps=2, eval_guidance_scale=1.5)
    metrics = trainer.evaluate()
    noise = draw_noise((4, 8, 8), [sample_generator(42, 4, place) for place in range(3)], torch.device("cpu"))
    images = trainer.pipeline(
        prompts(3)["prompt"][:],
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=1.5,
        max_sequence_length=16,
        latents=noise,
    ).images
    values = brightness(None, images)
    assert metrics["eval_reward"] == pytest.approx(np.mean(values), abs=2e-5)
    assert metrics["eval_reward_std"] == pytest.approx(np.std(values, ddof=1), abs=2e-5)
    assert metrics["eval_rewards/brightness/mean"] == metrics["eval_reward"]


def test_several_images_and_several_data_sets(tmp_path):
    seen = []

    def reward(prompts, images, **kwargs):
        seen.append(prompts)
        return brightness(prompts, images)

    data = {"seen": prompts(2), "held_out": Dataset.from_dict({"prompt": ["a moth"]})}
    trainer = tiny_trainer(tmp_path, reward_funcs=reward, eval_dataset=data, num_generations_eval=2)
    metrics = trainer.evaluate()
    assert seen == [["a cat", "a cat", "two dogs", "two dogs"], ["a moth", "a moth"]]
    assert {"eval_seen_reward", "eval_held_out_reward"} <= metrics.keys()
    # two images of one prompt are two images
    assert metrics["eval_held_out_reward_std"] > 0


def test_evaluation_uses_the_average_and_gives_the_weights_back(tmp_path):
    fields = {"eval_dataset": prompts(2), "eval_num_inference_steps": 2}
    averaged = tiny_trainer(tmp_path / "averaged", use_ema=True, **fields)
    plain = tiny_trainer(tmp_path / "plain", **fields)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for average, parameter in zip(averaged.policy.ema.shadow_params, plain.policy.trained_parameters, strict=True):
            average.copy_(torch.randn(average.shape, generator=generator))
            parameter.copy_(average)
    before = trained_weights(averaged)
    reward = averaged.evaluate()["eval_reward"]
    assert distance(trained_weights(averaged), before) == 0
    # the plain trainer has the average for weights
    assert reward == pytest.approx(plain.evaluate()["eval_reward"], abs=2e-5)
    averaged.policy.ema.copy_to(averaged.policy.trained_parameters)
    averaged.policy.ema.shadow_params = list(before.values())
    assert abs(averaged.evaluate()["eval_reward"] - reward) > 1e-3


def test_the_moving_average_by_hand(tmp_path):
    policy = tiny_trainer(tmp_path, use_ema=True, ema_decay=0.5).policy
    average = [p.detach().clone() for p in policy.trained_parameters]
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in policy.trained_parameters:
                parameter += torch.randn_like(parameter)
        policy.after_update()
        # diffusers' warm-up: the decay of update n is at most (1 + m) / (10 + m), m = n - 1 updates later, 0 at first
        decay = 0.0 if step == 1 else min(0.5, step / (9 + step))
        weights = policy.trained_parameters
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, weights, strict=True)]
    torch.testing.assert_close(policy.ema.shadow_params, average)


def test_the_average_follows_every_update(tmp_path):
    trainer = trained(tmp_path, max_steps=3, use_ema=True, ema_decay=0.5, gradient_accumulation_steps=2)
    assert trainer.policy.ema.optimization_step == 3
    # and begins at the weights that another training begins with
    trainer.run_state.reset()
    torch.testing.assert_close(trainer.policy.ema.shadow_params, list(trained_weights(trainer).values()))


# ---- Sampling ----


def starts(trainer) -> torch.Tensor:
    """`x_1` of the next micro-batch."""
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))).tensors["latents"][:, 0]


def test_every_sample_has_noise_of_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path)
    first = starts(trainer)
    trainer.run_state.generation, trainer.run_state.micro_batches = 1, None  # the next sampling phase
    both = torch.cat([first, starts(trainer)]).flatten(1)
    for i in range(16):
        assert (both[i] != both[torch.arange(16) != i]).any(1).all()
    other = starts(tiny_trainer(tmp_path / "other", seed=43)).flatten(1)
    assert not torch.isin(other, both).all(1).any()


def test_a_group_may_share_its_noise(tmp_path):
    trainer = tiny_trainer(tmp_path, share_initial_noise=True)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    groups = batch.tensors["latents"][:, 0].view(2, 4, -1)
    assert (groups == groups[:, :1]).all()
    assert not torch.equal(groups[0, 0], groups[1, 0])
    # what follows is each sample's own
    following = batch.tensors["next_latents"][:, 0].view(2, 4, -1)
    assert (following[:, 1:] != following[:, :1]).any(2).all()


def algorithm(tmp_path, **fields) -> ClippedPolicyGradient:
    backbone = get_backbone(tiny_sd3_pipeline(), height=16, width=16, max_sequence_length=16)
    return ClippedPolicyGradient(tiny_config(tmp_path, **fields), backbone, torch.ones(1))


def test_the_window_moves_and_stays_in_its_range(tmp_path):
    chooser = algorithm(tmp_path, num_inference_steps=8, sde_window_size=2, sde_window_range=[1, 6])
    plans = [chooser.plan(generation) for generation in range(100)]
    assert all(plan.stochastic == plan.kept for plan in plans)
    assert {plan.stochastic for plan in plans} == {(1, 2), (2, 3), (3, 4), (4, 5)}


def test_a_fraction_of_the_steps_is_trained(tmp_path):
    chooser = algorithm(tmp_path, num_inference_steps=10, timestep_fraction=0.7)  # 6.3 of nine
    counts = np.zeros(9)
    for generation in range(200):
        plan = chooser.plan(generation)
        assert plan.stochastic == tuple(range(9))
        assert len(plan.kept) == len(set(plan.kept)) == 6
        assert plan.kept == tuple(sorted(plan.kept))
        counts[list(plan.kept)] += 1
    # each step in 2 / 3 of 200 phases; a binomial's standard deviation is 6.7
    assert (abs(counts - 400 / 3) < 5 * 6.7).all()


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps"])
def test_the_last_step_is_not_trained(sde_type, tmp_path):
    plan = algorithm(tmp_path, sde_type=sde_type, num_inference_steps=4).plan(0)
    assert plan.stochastic == plan.kept == (0, 1, 2)


def test_the_last_step_is_trained_where_it_is_asked_for(tmp_path):
    plan = algorithm(tmp_path, num_inference_steps=4, train_last_step=True).plan(0)
    assert plan.stochastic == plan.kept == (0, 1, 2, 3)


# ---- What is left behind ----


def test_a_model_by_its_path_trains_as_the_loaded_one(tmp_path, tiny_sd3_path, tiny_sd3):
    by_path = trained(tmp_path / "path", pipeline=tiny_sd3_path)
    loaded = trained(tmp_path / "loaded", pipeline=tiny_sd3)
    assert distance(trained_weights(by_path), trained_weights(loaded)) < 1e-4
    assert by_path.model_id == tiny_sd3_path


@pytest.mark.parametrize("lora", [tiny_lora(lora_alpha=7), None], ids=["lora", "all weights"])
def test_what_is_saved_draws_the_trainers_own_images(lora, tmp_path, tiny_sd3_path):
    trainer = trained(
        tmp_path, pipeline=tiny_sd3_path, lora=lora, learning_rate=0.03, save_strategy="steps", max_steps=2
    )

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 3, "max_sequence_length": 16, "generator": generator, "output_type": "np"}
        return pipeline(["a cat", "a moth"], height=16, width=16, **settings).images

    own = draw(trainer.pipeline)
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_path)
    untrained = draw(stock)
    if lora is None:
        stock.transformer = SD3Transformer2DModel.from_pretrained(tmp_path)
    else:
        stock.load_lora_weights(str(tmp_path))
    np.testing.assert_allclose(draw(stock), own, atol=1e-5)
    assert abs(own - untrained).max() > 1e-3
    # a checkpoint in the folder draws the same
    if lora is not None:
        stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_path)
        (checkpoint,) = Path(tmp_path).glob("checkpoint-*")
        stock.load_lora_weights(str(checkpoint))
        np.testing.assert_allclose(draw(stock), own, atol=1e-5)


def test_the_history_is_on_disk(tmp_path):
    trainer = trained(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [logs["reward"] for logs in state["log_history"][:2]] == [logged(trainer, s)["reward"] for s in (1, 2)]


def test_nothing_is_sent_to_trl(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("telemetry")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    trained(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_dtype_of_a_loaded_model(key, dtype, tmp_path, tiny_sd3_path):
    # a string is what a command line or a YAML file can hold
    trainer = tiny_trainer(tmp_path, pipeline=tiny_sd3_path, model_init_kwargs={key: dtype}, bf16=True)
    assert trainer.pipeline.text_encoder.dtype == trainer.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()


def test_with_bf16_frozen_weights_are_loaded_in_it_but_for_the_vae(tmp_path, tiny_sd3_path):
    trainer = tiny_trainer(tmp_path, pipeline=tiny_sd3_path, bf16=True)
    assert trainer.pipeline.text_encoder.dtype == trainer.backbone.dtype == torch.bfloat16
    assert trainer.pipeline.vae.dtype == torch.float32
    full = tiny_trainer(tmp_path, pipeline=tiny_sd3_path, bf16=True, lora=None)
    assert full.backbone.dtype == torch.float32
    assert full.pipeline.text_encoder.dtype == torch.bfloat16
