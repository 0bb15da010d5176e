"""The amplified probe: whose weights it runs, what it makes of a ratio, and when it is run."""

import pytest
import torch
from accelerate import Accelerator
from tiny_training import tiny_lora, tiny_stages, tiny_trainer, train, warnings_of

from trl_flow import FlowGRPOConfig, GuardConfig
from trl_flow.algorithms.ratio_probe import RatioProbe
from trl_flow.functional import best_probe_scale, log_ratio, probe_error, probed_mean, rounding_and_curvature
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


def log_ratios(variance: float, curvature: float, *scales: float) -> dict[float, torch.Tensor]:
    """Of 2,000 samples by the probe's scale, 1 being none: rounding of a forward, and a quadratic model's."""
    generator = torch.Generator().manual_seed(0)
    start = variance**0.5 * torch.randn(2000, generator=generator, dtype=torch.float64)
    found = {}
    for k in (1.0, *scales):
        there = variance**0.5 * torch.randn(2000, generator=generator, dtype=torch.float64)
        found[k] = (k * 1e-3 + k**2 * curvature + there - start) / k
    return found


@pytest.mark.parametrize(("variance", "curvature"), [(1e-8, 0.0), (1e-8, 1e-5), (1e-8, 1e-4), (1e-14, 3e-5)])
def test_rounding_and_curvature_are_told_apart(variance, curvature):
    of = log_ratios(variance, curvature, 0.5, 2.0, 64.0, 128.0)
    near, far = of[2.0] - 3 * of[1.0] + 2 * of[0.5], of[128.0] - of[64.0]
    found, found_curvature = rounding_and_curvature(
        near.square().mean().item(), far.square().mean().item(), scale=128.0
    )
    assert found == pytest.approx(variance, rel=0.2)
    # what is below the rounding at that distance is not seen
    assert found_curvature**0.5 == pytest.approx(curvature, rel=0.1, abs=0.01 * variance**0.5)
    if curvature == 0:
        assert found_curvature == 0


@pytest.mark.parametrize(
    ("variance", "curvature", "scale"),
    [
        (2e-8, 0.0, 128.0),  # nothing but rounding: as far as it goes
        (2e-8, 1e-8**2, 128.0),
        (2e-8, 2e-5**2, 4.0),  # the root of 2e-4 / 2e-5 = 3.2
        (2e-14, 2e-5**2, 1.0),  # float32: no probe is best
    ],
)
def test_the_best_scale_balances_rounding_and_curvature(variance, curvature, scale):
    best = best_probe_scale(variance, curvature)
    assert best == scale
    assert probe_error(best, variance, curvature) <= min(probe_error(2.0**n, variance, curvature) for n in range(8))
    assert probe_error(1, variance, curvature) == pytest.approx((2 * variance) ** 0.5)


class FakePolicy:
    is_adapter = True
    updates_since_sampling = 1

    def __init__(self, generation: int = 0):
        self.generation = generation


def observed(probe: RatioProbe, policy, rounding: float, curvature: float) -> dict[str, float]:
    """An update whose log-ratios have this rounding, a standard deviation, and this curvature."""
    of = log_ratios(rounding**2 / 2, curvature, *probe.scales(policy))
    probe.observe(of.pop(1.0), of)
    return probe.after_update(policy)


def test_the_scale_follows_what_is_measured():
    probe, policy = RatioProbe("auto", half_precision=True, clip_range=1.6e-5), FakePolicy()
    assert probe.scales(policy) == [32, 0.5, 2, 64, 128]
    stats = observed(probe, policy, 1.2e-3, 1e-8)
    assert stats == {"ratio/probe_scale": 32, "ratio/noise_floor": pytest.approx(1.2e-3, rel=0.1)}
    assert probe.scale(policy) == 128
    # as far away, whatever the number of updates
    policy.updates_since_sampling = 4
    assert probe.scales(policy) == [32]
    policy.updates_since_sampling = 200
    assert probe.scales(policy) == []
    # where it is measured again, more curvature brings it down
    assert probe.scales(FakePolicy(generation=2)) == [128]
    observed(probe, FakePolicy(generation=3), 1.2e-3, 1e-4)
    assert probe.scale(FakePolicy()) == 4


def test_where_no_scale_is_better_than_none_it_is_measured_again_all_the_same():
    probe = RatioProbe("auto", half_precision=True, clip_range=1.6e-5)
    observed(probe, FakePolicy(), 1e-9, 1e-3)
    assert probe.scale(FakePolicy()) is None
    assert probe.scales(FakePolicy(generation=1)) == [0.5, 2, 64, 128]
    observed(probe, FakePolicy(generation=1), 1e-3, 0.0)
    assert probe.scale(FakePolicy()) == 128


def test_rounding_is_measured_in_the_phases_1_2_4_8():
    probe = RatioProbe(0, half_precision=True, clip_range=1.6e-5)
    assert [n + 1 for n in range(20) if probe.scales(FakePolicy(n))] == [1, 2, 4, 8, 16]
    assert probe.scales(FakePolicy()) == [0.5, 2]


def test_its_state_goes_on_but_in_another_precision():
    probe = RatioProbe("auto", half_precision=True, clip_range=1.6e-5)
    observed(probe, FakePolicy(), 1.2e-3, 1e-8)
    resumed = RatioProbe("auto", half_precision=True, clip_range=1.6e-5)
    resumed.load_state_dict(probe.state_dict())
    assert resumed.state_dict() == probe.state_dict()
    other = RatioProbe(0, half_precision=True, clip_range=1.6e-5)
    other.load_state_dict(probe.state_dict())
    assert other.variance is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_what_cannot_be_measured_changes_nothing(value):
    probe = RatioProbe("auto", half_precision=True, clip_range=1.6e-5)
    probed = {k: torch.full((2,), value / k) for k in probe.scales(FakePolicy())}
    probe.observe(torch.zeros(2), probed)
    assert probe.after_update(FakePolicy()) == {"ratio/probe_scale": 32}
    assert probe.scale(FakePolicy()) == 32


def test_a_probe_that_is_too_short_is_warned_of():
    with warnings_of("trl_flow") as warnings:
        probe = RatioProbe(2.0, half_precision=True, clip_range=1.6e-5)
        observed(probe, FakePolicy(), 1e-3, 0.0)
    (warning,) = warnings
    assert "with ratio_probe=2 the error is still" in warning


def trained(tmp_path, **fields):
    # Guard's own learning rate
    fields = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-4, "cls": GuardConfig} | fields
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


@pytest.mark.parametrize("fields", [{"bf16": True}, {"bf16": True, "ratio_probe": 16}, {}], ids=str)
def test_with_a_probe_or_in_float32_there_is_no_warning(fields, tmp_path):
    logs, warnings = trained(tmp_path, **fields)
    assert warnings == []
    assert logs[1]["ratio/noise_floor"] > 0
    assert ("ratio/probe_scale" in logs[1]) == ("bf16" in fields)


def test_guard_clips_from_its_defaults_on_and_never_at_the_last_step(tmp_path):
    own = {"num_iterations": 1, "steps_per_generation": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    logs, warnings = trained(tmp_path, **own)
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


def test_in_float32_a_high_learning_rate_is_not_taken_for_rounding(tmp_path):
    own = {"num_iterations": 1, "steps_per_generation": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    for seed in range(3):
        logs, warnings = trained(tmp_path / str(seed), **own, seed=seed)
        assert warnings == []


def test_full_fine_tuning_is_warned_of_too(tmp_path):
    logs, warnings = trained(tmp_path, lora=None, bf16=True)
    assert "ratio/probe_scale" not in logs[1]  # with "auto" only an adapter is probed
    assert "noise floor" in warnings[0]


@pytest.mark.parametrize(
    "fields", [{"sde_window_size": 1}, {"timestep_fraction": 0.4}, {"bf16": True, "sde_window_size": 1}], ids=str
)
def test_phases_with_other_steps_are_logged_together(fields, tmp_path):
    # the rounding is measured in some of them only
    own = {"num_inference_steps": 6, "num_iterations": 1, "steps_per_generation": 2, "per_device_train_batch_size": 4}
    logs, _ = trained(tmp_path, **own, **fields, max_steps=10, logging_steps=10)
    assert len({name for log in logs for name in log if name.startswith("ratio/mean_step_")}) > 1


def test_each_samples_own_steps_are_logged_where_there_are_few(tmp_path):
    fields = {"timestep_fraction": 0.2, "timestep_fraction_per_sample": True, "num_inference_steps": 8}
    logs, _ = trained(tmp_path, per_device_train_batch_size=4, steps_per_generation=2, num_iterations=1, **fields)
    assert logs


def test_a_run_resumed_in_the_middle_of_a_phase_may_have_a_probe_from_then_on(tmp_path):
    fields = {"cls": GuardConfig, "bf16": True, "num_iterations": 3, "learning_rate": 1e-3, "save_strategy": "steps"}
    train(tmp_path, **fields, save_steps=8, max_steps=8, ratio_probe=0)  # in the third phase, which does not measure
    trainer = tiny_trainer(tmp_path, **fields, save_steps=100, max_steps=10)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10


def test_weights_are_put_back_if_there_is_no_room_for_the_probes(tmp_path, monkeypatch):
    stages, _ = moved_stages(tmp_path)
    before = [p.detach().clone() for p in stages.policy.trained_parameters]
    calls, lerp = [], torch.Tensor.lerp

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return lerp(*args)

    monkeypatch.setattr(torch.Tensor, "lerp", failing)
    with pytest.raises(RuntimeError, match="out of memory"), stages.policy.at("probe", 8.0):
        pass
    assert all(torch.equal(p, now) for p, now in zip(stages.policy.trained_parameters, before, strict=True))


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
