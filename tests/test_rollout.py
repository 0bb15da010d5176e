"""What is sampled and stored is what the equations say, for each sample alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_models import CLIP_TOKENS, tiny_sd3_pipeline

from trl_flow.backbones import get_backbone
from trl_flow.dynamics import FlowDynamics
from trl_flow.functional import cps_transition, dance_sde_transition, flow_sde_transition
from trl_flow.rollout import StepPlan, draw_noise, rollout, sample_generator


STEPS = 4
ALL = list(range(STEPS))
PROMPTS = ["a red circle", "two blue squares", "a cat", "a red circle"]


@pytest.fixture(scope="module")
def backbone():
    return get_backbone(tiny_sd3_pipeline(), height=16, width=16, max_sequence_length=CLIP_TOKENS)


@pytest.fixture(scope="module")
def condition(backbone):
    encoded = [backbone.encode_prompt(prompt) for prompt in PROMPTS]
    return {key: torch.cat([one[key] for one in encoded]) for key in encoded[0]}


def sample(
    backbone,
    condition,
    indices=(0, 1, 2, 3),
    *,
    sde_type="flow",
    level=0.7,
    stochastic=ALL,
    kept=None,
    plan=None,
    **kwargs,
):
    """Draws the prompts at `indices`, each with generators of its index."""
    plan = plan or {}
    own = {key: value[list(indices)] for key, value in condition.items()}
    noise = [sample_generator(0, index) for index in indices]
    return rollout(
        lambda x, timestep: backbone.guided_prediction(backbone.model, x, timestep, own),
        FlowDynamics(backbone.schedule(STEPS), sde_type, level),
        draw_noise(backbone.latent_shape(), noise, torch.device("cpu")),
        StepPlan(tuple(stochastic), tuple(stochastic if kept is None else kept), **plan),
        generators=[sample_generator(1, index) for index in indices],
        **kwargs,
    )


# ---- Noise ----


def test_a_samples_noise_does_not_depend_on_the_others():
    shape, cpu = (2, 3, 3), torch.device("cpu")
    together = draw_noise(shape, [sample_generator(5, i) for i in range(4)], cpu)
    for i in range(4):
        assert torch.equal(draw_noise(shape, [sample_generator(5, i)], cpu)[0], together[i])
    assert torch.equal(together[1], torch.randn(shape, generator=sample_generator(5, 1)))


def test_different_keys_give_different_noise():
    # seeds, sampling phases, purposes and samples, in the first numbers and in pairs that a sum or product mixes up
    keys = list(itertools.product(range(3), range(4), (2, 3), range(8)))
    first = {torch.randn(4, generator=sample_generator(*key)).numpy().tobytes() for key in keys}
    assert len(first) == len(keys)


def test_the_noise_is_gaussian():
    noise = draw_noise((4, 16, 16), [sample_generator(0, i) for i in range(100)], torch.device("cpu"))
    number = noise.numel()
    assert abs(noise.mean()) < 4 / number**0.5
    assert abs(noise.var() - 1) < 4 * (2 / number) ** 0.5
    # and that of neighbours independent of each other
    correlation = (noise[:-1] * noise[1:]).mean() * (noise[1:].numel()) ** 0.5
    assert abs(correlation) < 4


def test_the_global_random_state_neither_matters_nor_changes(backbone, condition):
    torch.manual_seed(1)
    first = sample(backbone, condition)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = sample(backbone, condition)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.final, second.final)


def test_a_sample_is_the_same_in_every_batch(backbone, condition):
    together = sample(backbone, condition)
    for indices in [(0,), (2, 1), (3, 0, 2)]:
        some = sample(backbone, condition, indices)
        # To rounding: matrix products of other shapes add up in another order
        torch.testing.assert_close(some.final, together.final[list(indices)], rtol=0, atol=1e-5)
        torch.testing.assert_close(some.latents, together.latents[list(indices)], rtol=0, atol=1e-5)
    assert (together.final[0] - together.final[3]).abs().max() > 0.1  # one prompt, two samples


# ---- What is stored ----


@pytest.mark.parametrize(
    ("sde_type", "steps"), [("flow", ALL), ("dance", ALL), ("cps", ALL[:-1])], ids=["flow", "dance", "cps"]
)
def test_the_stored_numbers_are_those_of_the_equations(sde_type, steps, backbone, condition):
    t = sample(backbone, condition, sde_type=sde_type, stochastic=steps)
    sigmas = backbone.schedule(STEPS).sigmas
    generators = [sample_generator(1, index) for index in range(len(PROMPTS))]
    for index, step in enumerate(steps):
        x, sigma, sigma_next = t.latents[:, index], sigmas[step], sigmas[step + 1]
        with torch.no_grad():
            v = backbone.guided_prediction(backbone.model, x, sigma * 1000, condition)
        if sde_type == "flow":
            expected = flow_sde_transition(v, x, sigma, sigma_next, noise_level=0.7, sigma_max=sigmas[1])
        else:
            function = {"dance": dance_sde_transition, "cps": cps_transition}[sde_type]
            expected = function(v, x, sigma, sigma_next, noise_level=0.7)
        torch.testing.assert_close(t.means[:, index], expected.mean)
        noise = draw_noise(x.shape[1:], generators, torch.device("cpu"))
        std = expected.std.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(t.next_latents[:, index], expected.mean + std * noise)
        following = t.latents[:, index + 1] if index + 1 < len(steps) else None
        if following is not None:
            assert torch.equal(t.next_latents[:, index], following)
    if steps == ALL:
        assert torch.equal(t.next_latents[:, -1], t.final)


def test_steps_outside_the_window_follow_the_ode(backbone, condition):
    t = sample(backbone, condition, stochastic=[1, 2])
    assert t.steps == (1, 2)
    assert t.latents.shape == (4, 2, 4, 8, 8)
    ode = sample(backbone, condition, stochastic=[])
    sigmas = backbone.schedule(STEPS).sigmas
    x = draw_noise((4, 8, 8), [sample_generator(0, index) for index in range(4)], torch.device("cpu"))
    with torch.no_grad():
        x1 = x - backbone.guided_prediction(backbone.model, x, sigmas[0] * 1000, condition) * (sigmas[0] - sigmas[1])
        x3 = t.next_latents[:, 1]
        x4 = x3 - backbone.guided_prediction(backbone.model, x3, sigmas[3] * 1000, condition) * sigmas[3]
    torch.testing.assert_close(t.latents[:, 0], x1)
    torch.testing.assert_close(t.final, x4)
    assert ode.steps == ()
    assert ode.latents.numel() == 0
    assert (ode.final - t.final).abs().max() > 0.1


def test_steps_that_are_not_trained_are_sampled_but_not_stored(backbone, condition):
    everything = sample(backbone, condition)
    some = sample(backbone, condition, kept=[0, 2])
    assert some.steps == (0, 2)
    assert torch.equal(some.final, everything.final)
    for name in ("latents", "next_latents", "means"):
        assert torch.equal(getattr(some, name), getattr(everything, name)[:, [0, 2]])


def test_a_kept_step_must_be_stochastic():
    with pytest.raises(ValueError, match=r"kept steps \(0, 3\) must all be among the stochastic ones \(0, 1\)"):
        StepPlan(stochastic=(0, 1), kept=(0, 3))


def test_steps_may_be_taken_in_two_parts(backbone, condition):
    whole = sample(backbone, condition, stochastic=[2, 3])
    own = {key: value[:2] for key, value in condition.items()}
    x = draw_noise(backbone.latent_shape(), [sample_generator(0, i) for i in range(2)], torch.device("cpu"))
    dynamics = FlowDynamics(backbone.schedule(STEPS), "flow", 0.7)
    for plan, steps in ((StepPlan(), {"last_step": 2}), (StepPlan((2, 3), (2, 3)), {"first_step": 2})):
        part = rollout(
            lambda x, timestep: backbone.guided_prediction(backbone.model, x, timestep, own),
            dynamics,
            x,
            plan,
            generators=[sample_generator(1, i) for i in range(2)],
            **steps,
        )
        x = part.final
    torch.testing.assert_close(part.means, whole.means[:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(part.final, whole.final[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps"])
def test_without_noise_every_dynamics_is_the_ode(sde_type, backbone, condition):
    ode = sample(backbone, condition, stochastic=[])
    # so little noise that the transitions still have a density
    quiet = sample(backbone, condition, sde_type=sde_type, level=1e-6, stochastic=ALL[:-1])
    torch.testing.assert_close(quiet.final, ode.final, rtol=0, atol=1e-4)


def test_nothing_keeps_a_graph(backbone, condition):
    t = sample(backbone, condition, plan={"project": True})
    for name in ("latents", "next_latents", "means", "final", "pred_original_samples"):
        assert not getattr(t, name).requires_grad
        assert getattr(t, name).dtype == torch.float32


# ---- Projections ----


def test_projections_by_hand(backbone, condition):
    t = sample(backbone, condition, plan={"project": True})
    assert t.pred_original_samples.shape == (4, STEPS, 4, 8, 8)
    sigmas = backbone.schedule(STEPS).sigmas
    for step in ALL[:-1]:
        x, sigma = t.next_latents[:, step], sigmas[step + 1]
        with torch.no_grad():
            expected = x - sigma * backbone.guided_prediction(backbone.model, x, sigma * 1000, condition)
        torch.testing.assert_close(t.pred_original_samples[:, step], expected)
    assert torch.equal(t.pred_original_samples[:, -1], t.final)


def test_parts_of_the_steps_give_all_projections(backbone, condition):
    everything = sample(backbone, condition, stochastic=[2, 3], plan={"project": True})
    first = sample(backbone, condition, stochastic=[], plan={"project": True}, last_step=2)
    assert first.pred_original_samples.shape == (4, 1, 4, 8, 8)  # what is after the second step, the third predicts
    torch.testing.assert_close(first.pred_original_samples, everything.pred_original_samples[:, :1])


def test_each_sample_keeps_its_own_steps(backbone, condition):
    everything = sample(backbone, condition)
    own = sample(backbone, condition, plan={"kept_per_sample": 2})
    assert own.steps == (0, 1, 2, 3)
    assert own.chosen.shape == (4, 2)
    assert len({tuple(row) for row in own.chosen.tolist()}) > 1
    torch.testing.assert_close(own.final, everything.final, rtol=0, atol=0)  # drawn after all noise
    for b, row in enumerate(own.chosen.tolist()):
        assert row == sorted(set(row))
        for place, step in enumerate(row):
            for name in ("latents", "next_latents", "means"):
                assert torch.equal(getattr(own, name)[b, place], getattr(everything, name)[b, step])
    # by the sample's own generator: whatever else is in the batch
    one = sample(backbone, condition, [2], plan={"kept_per_sample": 2})
    assert one.chosen.tolist() == own.chosen[2:3].tolist()


def test_projections_cost_no_forward(backbone, condition):
    calls = []
    handle = backbone.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        sample(backbone, condition)
        without = len(calls)
        sample(backbone, condition, plan={"project": True})
    finally:
        handle.remove()
    assert without == STEPS
    assert len(calls) == 2 * STEPS


def test_each_step_is_announced_once(backbone, condition):
    steps = []
    sample(backbone, condition, on_step=steps.append)
    assert steps == ALL


# ---- Dynamics ----


def test_beta_and_dt_by_hand(backbone):
    schedule = replace(backbone.schedule(2), sigmas=torch.tensor([1.0, 0.4, 0.0]))
    dynamics = FlowDynamics(schedule, sde_type="dance", noise_level=0.3)
    assert dynamics.dt(0).item() == pytest.approx(0.6)
    assert dynamics.dt(1).item() == pytest.approx(0.4)
    assert dynamics.beta(0).item() == 1
    assert dynamics.beta(1).item() == pytest.approx(1 + 0.09 * 0.6 / 0.8)
