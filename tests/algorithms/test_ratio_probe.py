"""The amplified probe: whose weights it runs, what it makes of a ratio, and when it is run."""

import pytest
import torch
from accelerate import Accelerator
from tiny_training import tiny_lora, tiny_stages, tiny_trainer, train, warnings_of

from trl_flow import FlowGRPOConfig, GuardConfig
from trl_flow.algorithms.ratio_probe import RatioProbe
from trl_flow.functional import log_ratio, probed_mean
from trl_flow.trainer.metrics import Metrics


REWARDS = [0.1, 0.5, 0.2, 0.9, 0.4, 0.3, 0.8, 0.7]


def moved_stages(tmp_path, learning_rate: float = 1.0, **fields):
    """Stages whose weights have moved since sampling, and their batch."""
    fields = {"cls": GuardConfig, "lora": tiny_lora(init_lora_weights=False)} | fields
    stages = tiny_stages(tmp_path, **fields)
    (batch,) = stages.micro_batches(REWARDS)
    stages.descend(batch, learning_rate)
    return stages, batch


# ---- The equation ----


def test_a_probed_mean_by_hand():
    # a way of 8 from the old mean, an eighth of it; the gradient is that of the mean
    old, mean = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.5]], requires_grad=True)
    probed = probed_mean(mean, torch.tensor([[5.0, -2.0]]), old, scale=8.0)
    torch.testing.assert_close(probed.detach(), torch.tensor([[1.5, 1.5]]))
    (probed * torch.tensor([[3.0, 7.0]])).sum().backward()
    assert mean.grad.tolist() == [[3.0, 7.0]]


def test_rounding_is_divided_and_a_linear_change_is_kept():
    generator = torch.Generator().manual_seed(0)
    old, change, noise, first, second = torch.randn(5, 4, 4096, generator=generator, dtype=torch.float64)
    rounding, change = 1e-2, 1e-3 * change
    sample, std = old + 0.5 * noise, torch.full((4,), 0.5, dtype=torch.float64)

    def ratio(mean):
        return log_ratio(sample, mean, old, std, kind="ratio_norm")

    exact = ratio(old + change)
    plain = ratio(old + change + rounding * first) - exact
    probed = ratio(probed_mean(old, old + 32 * change + rounding * second, old, scale=32.0)) - exact
    assert probed.square().mean().sqrt() < 2 * plain.square().mean().sqrt() / 32


# ---- The weights ----


def test_the_probes_weights_lie_so_many_times_as_far_away_and_are_put_back(tmp_path):
    stages, _ = moved_stages(tmp_path)
    policy = stages.policy
    before = [p.detach().clone() for p in policy.trained_parameters]
    with policy.at("probe", 8.0):
        assert not torch.is_grad_enabled()
        for p, now, sampled in zip(policy.trained_parameters, before, policy.sampling_weights, strict=True):
            torch.testing.assert_close(p.detach(), sampled + 8 * (now - sampled))
    assert all(torch.equal(p, now) for p, now in zip(policy.trained_parameters, before, strict=True))


def test_the_weights_are_put_back_after_an_error_too(tmp_path):
    stages, _ = moved_stages(tmp_path)
    before = [p.detach().clone() for p in stages.policy.trained_parameters]
    with pytest.raises(RuntimeError, match="out of memory"), stages.policy.at("probe", 8.0):
        raise RuntimeError("out of memory")
    assert all(torch.equal(p, now) for p, now in zip(stages.policy.trained_parameters, before, strict=True))


@pytest.mark.parametrize("lora", ["adapter", None])
def test_autocast_keeps_no_copies_of_the_probes_weights(lora, tmp_path):
    # It keeps the weights that it has cast until the outermost context ends
    lora = tiny_lora(init_lora_weights=False) if lora else None
    stages, batch = moved_stages(tmp_path, lora=lora, bf16=True, learning_rate=0.1)
    condition = stages.policy.condition(batch.prompts)
    latents, timestep = batch.tensors["latents"][:, 0], stages.algorithm.dynamics.schedule.timesteps[0]
    with stages.policy.accelerator.autocast():
        alone = stages.policy.predict(latents, timestep, condition)
        with stages.policy.at("probe", 100.0):
            probed = stages.policy.predict(latents, timestep, condition)
        after = stages.policy.predict(latents, timestep, condition)
    assert (probed - alone).abs().max() > 0.01
    torch.testing.assert_close(after, alone)
    after.sum().backward()
    assert sum(p.grad is not None for p in stages.policy.trained_parameters) > 10


# ---- The ratio ----


@pytest.mark.parametrize("importance_ratio", ["standard", "mean_revised", "ratio_norm"])
def test_in_float32_the_probe_changes_nothing_but_rounding(importance_ratio, tmp_path):
    outputs = []
    for probe in (0, 4):
        stages, batch = moved_stages(tmp_path, importance_ratio=importance_ratio, ratio_probe=probe, epsilon=1.0)
        losses = stages.losses(batch)
        gradients = stages.gradients(torch.stack([output.loss.mean() for output in losses.values()]).mean())
        outputs.append((torch.stack([output.stats["deviation"] for output in losses.values()]), gradients))
    (plain, gradients), (probed, probed_gradients) = outputs
    assert plain.abs().max() > 1e-5
    torch.testing.assert_close(probed, plain, rtol=0.05, atol=0.02 * plain.abs().max().item())
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(probed_gradients[name], gradient, rtol=0.02, atol=0.01 * largest)


def test_in_bfloat16_the_probe_brings_float32s_ratios_back(tmp_path):
    def deviations(**fields):
        stages, batch = moved_stages(tmp_path, **fields)
        return torch.stack([output.stats["deviation"] for output in stages.losses(batch).values()]).flatten()

    exact, plain, probed = deviations(), deviations(bf16=True, ratio_probe=0), deviations(bf16=True, ratio_probe=32)

    def correlation(values):
        return torch.corrcoef(torch.stack([values, exact]))[0, 1]

    assert correlation(probed) > 0.85  # measured: 0.96; the updates themselves differ, too
    assert correlation(plain) < 0.5  # measured: -0.3


# ---- When it is run, with which k ----


class FakePolicy:
    can_probe = True


def observed(probe: RatioProbe, floor: float) -> dict[str, float]:
    probe.rounding(torch.tensor([floor, -floor]), torch.zeros(2), FakePolicy())
    return probe.after_update(FakePolicy())


@pytest.mark.parametrize(
    ("floor", "scale"),
    [(2.2e-4, 64.0), (1.2e-3, 128.0), (1e-5, 8.0), (5e-5, 16.0)],  # floor / k at most 4e-6, k from 8 to 128
)
def test_the_scale_follows_the_noise_floor(floor, scale):
    probe = RatioProbe("auto", half_precision=True, clip_range=1.6e-5)
    assert probe.scale(FakePolicy()) == 32
    assert observed(probe, floor) == {"ratio/probe_scale": 32}
    assert probe.floor == pytest.approx(floor)
    assert probe.scale(FakePolicy()) == scale
    resumed = RatioProbe("auto", half_precision=True, clip_range=1.6e-5)
    resumed.load_state_dict(probe.state_dict())
    assert resumed.scale(FakePolicy()) == scale


def test_an_update_that_moved_nothing_tells_nothing():
    probe = RatioProbe("auto", half_precision=False, clip_range=1e-4)
    assert observed(probe, 0.0) == {}
    assert probe.is_wanted(FakePolicy())
    observed(probe, 1e-6)
    assert not probe.is_wanted(FakePolicy())  # measured once, without half precision


def test_the_floor_of_rounding_of_a_known_size_is_found_without_the_models_curvature():
    # ratios of forwards with a rounding of 1e-4 each, and a term that grows with the square of the distance
    generator = torch.Generator().manual_seed(0)
    probe = RatioProbe(0, half_precision=True, clip_range=1e-5)
    old, half, whole = 1e-4 * torch.randn(3, 100_000, generator=generator)
    ratio, curvature = 1e-3, 1e-4
    k = probe.scale(FakePolicy())
    assert k == 0.5
    plain, probed = ratio + curvature + whole - old, (k * ratio + k**2 * curvature + half - old) / k
    probe.rounding(plain, probed, FakePolicy())
    probe.after_update(FakePolicy())
    assert probe.floor == pytest.approx(2**0.5 * 1e-4, rel=0.05)


def trained(tmp_path, **fields):
    fields = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-3, "cls": GuardConfig} | fields
    trainer = tiny_trainer(tmp_path, **fields)
    with warnings_of("trl_flow") as warnings:
        trainer.train()
    return [log for log in trainer.state.log_history if "reward" in log or "ratio/mean" in log], warnings


def test_without_a_probe_bfloat16_is_warned_of_with_floor_and_range(tmp_path):
    logs, warnings = trained(tmp_path, bf16=True, ratio_probe=0)
    (warning,) = [warning for warning in warnings if "noise floor" in warning]
    assert f"{logs[1]['ratio/noise_floor']:.1e}" in warning
    assert f"{2e-6 * (65536 / 256) ** 0.5:.1e}" in warning
    assert warning.index("ratio_probe='auto'") < warning.index("fp16=True") < warning.index("float32")
    assert {f"ratio/noise_floor_step_{step}" for step in range(3)} < logs[1].keys()
    assert "ratio/noise_floor" not in logs[0]  # every ratio is 1
    assert "ratio/noise_floor" not in logs[3]  # measured once


@pytest.mark.parametrize("fields", [{"bf16": True}, {"bf16": True, "ratio_probe": 16}, {}], ids=str)
def test_with_a_probe_or_in_float32_there_is_no_warning(fields, tmp_path):
    logs, warnings = trained(tmp_path, **fields)
    assert warnings == []
    assert logs[1]["ratio/noise_floor"] > 0
    assert ("ratio/probe_scale" in logs[3]) == ("bf16" in fields)


def test_guard_clips_from_its_defaults_on_and_never_at_the_last_step(tmp_path):
    logs, warnings = trained(tmp_path, num_iterations=1, steps_per_generation=2, per_device_train_batch_size=4)
    assert warnings == []
    assert logs[0]["ratio/std"] == pytest.approx(0, abs=1e-7)
    assert logs[1]["ratio/std"] > 1e-6
    assert max(log["clip_ratio/low_mean"] for log in logs) > 0 < max(log["clip_ratio/high_mean"] for log in logs)
    steps = {name[-1] for log in logs for name in log if "step_" in name and name != "step_time"}
    assert steps == {"0", "1", "2"}  # of four


def test_one_update_a_phase_is_warned_of_where_guards_ratio_is_asked_for(tmp_path):
    for cls, fields in ((GuardConfig, {}), (FlowGRPOConfig, {"importance_ratio": "mean_revised"})):
        with warnings_of("trl_flow") as warnings:
            tiny_stages(tmp_path, cls=cls, steps_per_generation=1, **fields)
        (warning,) = warnings
        assert "nothing will be clipped" in warning and "steps_per_generation" in warning
    with warnings_of("trl_flow") as warnings:
        tiny_stages(tmp_path, steps_per_generation=1)
        tiny_stages(tmp_path, cls=GuardConfig, steps_per_generation=1, num_iterations=2)
    assert warnings == []


def test_a_run_in_half_precision_resumes_in_the_middle_of_a_phase(tmp_path):
    fields = {"cls": GuardConfig, "bf16": True, "num_iterations": 3, "max_steps": 5, "learning_rate": 1e-3}
    unbroken = train(tmp_path / "unbroken", **fields)
    saving = fields | {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path / "first", **saving | {"max_steps": 2})
    resumed = train(tmp_path / "first", resume_from_checkpoint=True, **saving)
    assert (tmp_path / "first/checkpoint-2/sampling_weights-0.safetensors").is_file()
    for name, weights in unbroken.items():
        torch.testing.assert_close(resumed[name], weights, rtol=0, atol=1e-5)


def test_a_number_is_taken_for_full_fine_tuning_too(tmp_path):
    logs, _ = trained(tmp_path, lora=None, bf16=True, ratio_probe=8)
    assert logs[1]["ratio/probe_scale"] == 8
    logs, _ = trained(tmp_path, lora=None, bf16=True)
    assert "ratio/noise_floor" not in logs[1]  # with "auto" no copies of all weights are made


# ---- Steps of each sample's own ----


def test_statistics_of_samples_own_steps_are_counted_at_their_steps(tmp_path):
    fields = {"timestep_fraction": 0.7, "timestep_fraction_per_sample": True}
    stages, batch = moved_stages(tmp_path, **fields)
    assert batch.steps == (0, 1, 2)
    metrics, outputs = Metrics(Accelerator(cpu=True)), stages.losses(batch)
    by_step = {step: [] for step in range(3)}
    for unit, output in outputs.items():
        metrics.add(unit, output)
        for sample, place in enumerate(batch.tensors["chosen"][:, unit].tolist()):
            by_step[place].append(output.stats["deviation"][sample].item())
    logs = metrics.flush(stages.algorithm)
    assert sum(map(len, by_step.values())) == 16
    for step, values in by_step.items():
        assert logs[f"ratio/mean_step_{step}"] - 1 == pytest.approx(sum(values) / len(values), abs=1e-7)


def test_a_samples_own_steps_have_the_losses_that_those_steps_have(tmp_path):
    # the same phase, trained on all of its steps, which it keeps in the same order
    own, batch = moved_stages(tmp_path, timestep_fraction=0.7, timestep_fraction_per_sample=True, learning_rate=0.0)
    every, whole = moved_stages(tmp_path, learning_rate=0.0)
    expected = torch.stack([output.loss for output in every.losses(whole).values()], dim=1)
    actual = torch.stack([output.loss for output in own.losses(batch).values()], dim=1)
    torch.testing.assert_close(actual, expected.gather(1, batch.tensors["chosen"]), rtol=1e-4, atol=1e-5)
