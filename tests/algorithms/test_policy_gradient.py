"""Ratios, clipping, KL and gradients of the clipped policy gradient, worked out here by other means."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_sd3_pipeline
from tiny_training import tiny_lora, tiny_stages

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig
from trl_flow.trainer.metrics import Metrics


REWARDS = [0.1, 0.5, 0.2, 0.9, 0.4, 0.3, 0.8, 0.7]  # two groups of four
RATIOS = ["standard", "mean_revised", "ratio_norm"]


def prediction(stages, batch, index: int, model=None, step: int | None = None) -> torch.Tensor:
    """After guidance, from two forwards that know nothing of each other."""
    backbone, step = stages.backbone, batch.steps[index] if step is None else step

    def forward(texts):
        encoded = [backbone.encode_prompt(text) for text in texts]
        condition = {key: torch.cat([one[key] for one in encoded]) for key in encoded[0]}
        timestep = stages.algorithm.dynamics.schedule.timesteps[step]
        model_ = stages.module if model is None else model
        return backbone.predict(model_, batch.tensors["latents"][:, index], timestep, condition)

    away, towards = forward([""] * len(batch.prompts)), forward(batch.prompts)
    return away + stages.args.guidance_scale * (towards - away)


def flow_mean_and_std(stages, batch, index: int, model=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow-SDE (equations of Flow-GRPO), written out."""
    sigmas = stages.algorithm.dynamics.schedule.sigmas
    t, t_next = sigmas[batch.steps[index]], sigmas[batch.steps[index] + 1]
    dt = t - t_next
    diffusion = stages.args.noise_level * (t / (1 - (t if t < 1 else sigmas[1]))).sqrt()
    x, v = batch.tensors["latents"][:, index], prediction(stages, batch, index, model)
    mean = x - (v + diffusion**2 / (2 * t) * (x + (1 - t) * v)) * dt
    return mean, diffusion * dt.sqrt()


def log_prob(mean, std, batch, index: int) -> torch.Tensor:
    """log N(x'; mean, std^2), a mean over the dimensions."""
    sample = batch.tensors["next_latents"][:, index]
    return torch.distributions.Normal(mean, std).log_prob(sample).flatten(1).mean(1)


def group_advantages_by_hand(scale: str) -> torch.Tensor:
    groups = torch.tensor(REWARDS).view(2, 4)
    centered = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        return (centered / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    return (centered / (groups.std() + 1e-4)).flatten()


def assert_same_gradient(stages, batch, loss_by_hand: torch.Tensor) -> None:
    """That of the algorithm's loss, a mean over steps and samples, and of one by hand."""
    expected = stages.gradients(loss_by_hand)
    actual = stages.gradients(torch.stack([output.loss.mean() for output in stages.losses(batch).values()]).mean())
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-5
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4 * largest)


def stages_with(tmp_path, **fields):
    # A LoRA that does something from the start, so that both of its matrices have gradients
    return tiny_stages(tmp_path, **{"lora": tiny_lora(init_lora_weights=False)} | fields)


# ---- The gradient ----


def test_the_gradient_of_flow_grpo(tmp_path):
    stages = stages_with(tmp_path)
    (batch,) = stages.micro_batches(REWARDS)
    advantages, loss = group_advantages_by_hand("batch"), 0.0
    for index in range(3):
        # the ratio is 1, so its gradient is that of its log
        loss = loss - (advantages * log_prob(*flow_mean_and_std(stages, batch, index), batch, index)).mean() / 3
    assert_same_gradient(stages, batch, loss)


def test_the_gradient_of_the_kl(tmp_path):
    stages = stages_with(tmp_path, beta=0.04)
    (batch,) = stages.micro_batches([1.0] * 8)  # no advantage: the KL is all of the loss
    sigmas, loss = stages.algorithm.dynamics.schedule.sigmas, 0.0
    for index, step in enumerate(batch.steps):
        mean, std = flow_mean_and_std(stages, batch, index)
        with torch.no_grad(), stages.module.disable_adapter():
            reference, _ = flow_mean_and_std(stages, batch, index)
        diffusion = std / (sigmas[step] - sigmas[step + 1]).sqrt()
        loss = loss + 0.04 * ((mean - reference) ** 2).mean() / (2 * diffusion**2) / 3
    assert_same_gradient(stages, batch, loss)
    for output in stages.losses(batch).values():
        torch.testing.assert_close(output.loss, output.regularization)
        torch.testing.assert_close(output.policy_loss, torch.zeros(8))
        torch.testing.assert_close(output.regularization.detach(), 0.04 * output.stats["kl"])


def test_the_gradient_of_guard(tmp_path):
    stages = stages_with(tmp_path, cls=GuardConfig)
    (batch,) = stages.micro_batches(REWARDS)
    advantages, loss = group_advantages_by_hand("group"), 0.0
    sigmas = stages.algorithm.dynamics.schedule.sigmas
    for index, step in enumerate(batch.steps):
        mean, std = flow_mean_and_std(stages, batch, index)
        old = batch.tensors["means"][:, index]
        noise = (batch.tensors["next_latents"][:, index] - old) / std
        log_ratio = -((old - mean) * noise).flatten(1).mean(1)  # Eq. 8
        loss = loss - (advantages * log_ratio).mean() / (sigmas[step] - sigmas[step + 1]) / 3  # Eq. 12
    assert_same_gradient(stages, batch, loss)


def test_the_gradient_of_slas(tmp_path):
    stages = stages_with(tmp_path, cls=SLASConfig, advantage_clip=0.8, timestep_fraction=0.7)
    (batch,) = stages.micro_batches(REWARDS)
    linear = group_advantages_by_hand("batch").clamp(-0.8, 0.8)
    advantages, loss = linear.sign() * linear.abs() ** 1.25, 0.0
    sigmas, chosen = stages.algorithm.dynamics.schedule.sigmas, batch.tensors["chosen"]
    assert chosen.shape == (8, 2)  # 0.7 of three steps, of each sample its own
    assert {tuple(row) for row in chosen.tolist()} == {(0, 1), (0, 2), (1, 2)}
    for sample, row in enumerate(chosen.tolist()):
        for place, step in enumerate(row):
            one = replace(
                batch,
                prompts=[batch.prompts[sample]],
                tensors={name: tensor[sample : sample + 1] for name, tensor in batch.tensors.items()},
            )
            t, dt = sigmas[step], sigmas[step] - sigmas[step + 1]
            x, v = one.tensors["latents"][:, place], prediction(stages, one, place, step=step)
            mean = x - (v + 0.3**2 / (2 * t) * (x + (1 - t) * v)) * dt
            loss = loss - advantages[sample] * log_prob(mean, 0.3 * dt.sqrt(), one, place).mean() / 16
    assert_same_gradient(stages, batch, loss)


def test_the_gradient_of_vgpo(tmp_path):
    stages = stages_with(tmp_path, cls=VGPOConfig, advantage_clip=50.0)
    instant = torch.tensor([REWARDS[::-1], [0.5] * 8, [0.7] * 8, REWARDS]).T  # (B, T)
    (batch,) = stages.micro_batches(REWARDS, instant=instant)
    q4 = instant[:, 3]
    q3 = instant[:, 2] + 0.9 * q4
    q2 = instant[:, 1] + 0.9 * q3
    q1 = instant[:, 0] + 0.9 * q2
    q = torch.stack([q1, q2, q3, q4], dim=1)
    grouped = q.view(2, 4, 4)
    relative = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(8, 4)
    advantages, loss = q / q.mean(1, keepdim=True) * (relative + 0.05 * q), 0.0
    for index in range(3):
        own = log_prob(*flow_mean_and_std(stages, batch, index), batch, index)
        loss = loss - (advantages[:, index] * own).mean() / 3
    assert_same_gradient(stages, batch, loss)


@pytest.mark.parametrize("sde_type", ["flow", "dance"])
@pytest.mark.parametrize(
    ("ratio", "weighting"),
    [
        ("standard", "none"),
        ("standard", "temp"),
        ("standard", "inverse_dt"),
        ("mean_revised", "none"),
        ("ratio_norm", "none"),
        ("ratio_norm", "inverse_dt"),
    ],
)
def test_every_step_of_guards_ablation_has_a_gradient_on_both_dynamics(ratio, weighting, sde_type, tmp_path):
    # A clip range that is never reached, so that no step loses its gradient
    fields = {"importance_ratio": ratio, "timestep_weighting": weighting, "sde_type": sde_type, "epsilon": 1.0}
    stages = stages_with(tmp_path, **fields)
    (batch,) = stages.micro_batches(REWARDS)
    stages.descend(batch, learning_rate=0.1)
    for output in stages.losses(batch).values():
        norm = stages.policy.gradient_norm(output.policy_loss.mean())
        assert 0 < norm < float("inf")


# ---- Ratios and clipping ----


@pytest.mark.parametrize("importance_ratio", RATIOS)
@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps"])
def test_the_ratio_is_1_before_the_first_update(sde_type, importance_ratio, tmp_path):
    stages = stages_with(tmp_path, sde_type=sde_type, importance_ratio=importance_ratio)
    (batch,) = stages.micro_batches(REWARDS)
    for output in stages.losses(batch).values():
        assert output.stats["deviation"].abs().max() < 1e-6
    assert stages.algorithm.after_update(stages.policy)["ratio/first_update_deviation"] < 1e-6
    # measured once
    assert stages.algorithm.after_update(stages.policy) == {}


@pytest.mark.parametrize(
    ("importance_ratio", "learning_rate", "epsilon"), [("standard", 10.0, 1e-4), ("ratio_norm", 1000.0, 2e-4)]
)
def test_ratio_and_clip_metrics(importance_ratio, learning_rate, epsilon, tmp_path):
    high = 2 * epsilon
    fields = {"importance_ratio": importance_ratio, "epsilon": epsilon, "epsilon_high": high, "scale_epsilon": False}
    stages = tiny_stages(tmp_path, **fields)
    (batch,) = stages.micro_batches(REWARDS)
    stages.descend(batch, learning_rate)
    metrics = Metrics(Accelerator(cpu=True))
    for unit, output in stages.losses(batch).items():
        metrics.add(unit, output)
    logs = metrics.flush(stages.algorithm)
    advantages = group_advantages_by_hand("batch")
    ratios = []
    for index in range(3):
        with torch.no_grad():
            mean, std = flow_mean_and_std(stages, batch, index)
        old, sample = (batch.tensors[name][:, index].double() for name in ("means", "next_latents"))
        if importance_ratio == "standard":
            log_ratio = ((sample - old) ** 2 - (sample - mean) ** 2) / (2 * std**2)
        else:
            log_ratio = -(old - mean) * (sample - old) / std
        ratios.append(log_ratio.flatten(1).mean(1).exp())
    ratios = torch.stack(ratios, dim=1)
    above, below = ratios > 1 + high, ratios < 1 - epsilon
    assert above.any() and below.any() and not (above | below).all()
    assert (ratios - 1).abs().max() > 1e-5
    deviation = {"rel": 1e-2, "abs": 1e-7}
    assert logs["ratio/mean"] - 1 == pytest.approx(ratios.mean().item() - 1, **deviation)
    assert logs["ratio/std"] == pytest.approx(ratios.std(correction=0).item(), **deviation)
    for step in range(3):
        assert logs[f"ratio/mean_step_{step}"] - 1 == pytest.approx(ratios[:, step].mean().item() - 1, **deviation)
        assert logs[f"ratio/std_step_{step}"] == pytest.approx(ratios[:, step].std(correction=0).item(), **deviation)
        assert logs[f"clip_ratio/high_step_{step}"] == pytest.approx(above[:, step].double().mean().item())
        assert logs[f"clip_ratio/low_step_{step}"] == pytest.approx(below[:, step].double().mean().item())
    up = advantages[:, None] > 0
    assert logs["clip_ratio/high_mean"] == pytest.approx((above & up).double().mean().item())
    assert logs["clip_ratio/low_mean"] == pytest.approx((below & ~up).double().mean().item())
    assert logs["clip_ratio/region_mean"] == pytest.approx(logs["clip_ratio/high_mean"] + logs["clip_ratio/low_mean"])


@pytest.mark.parametrize(("epsilon", "clipped"), [(1e-12, True), (1.0, False)])
def test_clipped_samples_have_no_gradient(epsilon, clipped, tmp_path):
    # In one group of two, the first update moves each sample the way its advantage asks for. A clip range of nothing
    # then clips both; a wide one goes on.
    fields = {"per_device_train_batch_size": 2, "num_generations": 2, "sde_window_size": 1}
    stages = stages_with(tmp_path, importance_ratio="ratio_norm", epsilon=epsilon, **fields)
    (batch,) = stages.micro_batches([0.0, 1.0])
    stages.descend(batch, learning_rate=100.0)
    ((_, output),) = stages.losses(batch).items()
    assert (output.stats["low"] + output.stats["high"]).tolist() == ([1.0, 1.0] if clipped else [0.0, 0.0])
    gradients = stages.gradients(output.loss.mean())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values()) != clipped


@pytest.mark.parametrize(
    ("cls", "fields", "low", "high"),
    [
        # the papers' ranges, for 65,536 dimensions, grow with the root of the ratio
        (FlowGRPOConfig, {}, 1e-4, 1e-4),
        (GuardConfig, {}, 2e-6, 2e-6),
        (FlowGRPOConfig, {"epsilon": 3e-4}, 3e-4, 3e-4),
        (FlowGRPOConfig, {"epsilon_high": 3e-4}, 1e-4, 3e-4),
    ],
    ids=str,
)
def test_the_clip_range_scales_with_the_latents_size(cls, fields, low, high, tmp_path):
    algorithm = tiny_stages(tmp_path, cls=cls, **fields).algorithm
    factor = (65536 / (4 * 8 * 8)) ** 0.5
    assert algorithm.epsilon_low == pytest.approx(low * factor)
    assert algorithm.epsilon_high == pytest.approx(high * factor)
    algorithm = tiny_stages(tmp_path, cls=cls, scale_epsilon=False, **fields).algorithm
    assert (algorithm.epsilon_low, algorithm.epsilon_high) == (low, high)


def test_flow_cps_standard_ratio_has_no_variance(tmp_path):
    # Its log-probability is -mean((x' - mean)^2)
    stages = stages_with(tmp_path, sde_type="cps")
    (batch,) = stages.micro_batches(REWARDS)
    stages.descend(batch, learning_rate=1000.0)
    sigmas, level = stages.algorithm.dynamics.schedule.sigmas, stages.args.noise_level
    outputs = stages.losses(batch)
    assert list(outputs) == [0, 1, 2]  # the last step is deterministic
    for index, output in enumerate(outputs.values()):
        t, t_next = sigmas[index], sigmas[index + 1]
        x, v = batch.tensors["latents"][:, index], prediction(stages, batch, index).detach()
        std = t_next * torch.sin(torch.tensor(level * torch.pi / 2))
        mean = (1 - t_next) * (x - t * v) + (t_next**2 - std**2).sqrt() * (x + (1 - t) * v)
        old, sample = batch.tensors["means"][:, index], batch.tensors["next_latents"][:, index]
        log_ratio = ((sample - old).double() ** 2 - (sample - mean).double() ** 2).flatten(1).mean(1)
        deviation = torch.expm1(log_ratio).float()
        assert deviation.abs().max() > 1e-4
        torch.testing.assert_close(output.stats["deviation"], deviation, rtol=1e-2, atol=1e-6)


# ---- KL ----


def test_kl_by_hand(tmp_path):
    stages = tiny_stages(tmp_path, beta=0.04)
    (batch,) = stages.micro_batches(REWARDS)
    stages.descend(batch, learning_rate=1000.0)
    sigmas = stages.algorithm.dynamics.schedule.sigmas
    for index, output in enumerate(stages.losses(batch).values()):
        with torch.no_grad():
            mean, std = flow_mean_and_std(stages, batch, index)
            with stages.module.disable_adapter():
                reference, _ = flow_mean_and_std(stages, batch, index)
        diffusion = std / (sigmas[index] - sigmas[index + 1]).sqrt()
        kl = ((mean - reference).double() ** 2).flatten(1).mean(1) / (2 * diffusion**2)
        assert kl.max() > 1e-7
        torch.testing.assert_close(output.stats["kl"].double(), kl, rtol=1e-3, atol=1e-10)


def test_the_reference_of_full_fine_tuning_is_the_initial_model(tmp_path):
    stages = tiny_stages(tmp_path, beta=0.04, lora=None)
    (batch,) = stages.micro_batches(REWARDS)
    stages.descend(batch, learning_rate=1.0)
    initial = tiny_sd3_pipeline().transformer
    sigmas = stages.algorithm.dynamics.schedule.sigmas
    for index, output in enumerate(stages.losses(batch).values()):
        with torch.no_grad():
            mean, std = flow_mean_and_std(stages, batch, index)
            reference, _ = flow_mean_and_std(stages, batch, index, initial)
        kl = ((mean - reference).double() ** 2).flatten(1).mean(1) / (2 * std**2 / (sigmas[index] - sigmas[index + 1]))
        assert kl.max() > 1e-9
        torch.testing.assert_close(output.stats["kl"].double(), kl, rtol=1e-3, atol=1e-10)


# ---- Forwards ----


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, 4 + 3),
        ({"guidance_scale": 1.0}, 4 + 3),  # guidance is a larger batch, not a second forward
        ({"beta": 0.04}, 4 + 2 * 3),
        ({"dense_rewards": True, "value_scale": 0.1}, 4 + 3),
        ({"sde_window_size": 1}, 4 + 1),
        ({"timestep_fraction": 0.6, "num_inference_steps": 6}, 6 + 3),  # of five
        ({"timestep_fraction": 0.59, "num_inference_steps": 6}, 6 + 2),  # rounded down
        ({"timestep_fraction": 0.1}, 4 + 1),  # but to no less than one
        ({"timestep_fraction": 0.7, "timestep_fraction_per_sample": True}, 4 + 2),
        ({"sde_type": "cps"}, 4 + 3),
        ({"train_last_step": True}, 4 + 4),
    ],
    ids=str,
)
def test_forwards_by_hand(fields, number, tmp_path):
    stages, calls = tiny_stages(tmp_path, **fields), []
    stages.backbone.model.register_forward_hook(lambda *_: calls.append(1))
    (batch,) = stages.micro_batches(REWARDS, instant=torch.ones(8, 4) if "dense_rewards" in fields else None)
    stages.losses(batch)
    assert len(calls) == number
