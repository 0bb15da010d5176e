"""What is sampled and stored is what the equations say, for each sample alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_models import CLIP_TOKENS, tiny_sd3_pipeline

from trl_flow.backbones import get_backbone
from trl_flow.functional import cps_transition, dance_sde_transition, flow_sde_transition
from trl_flow.rollout import Dynamics, draw_noise, rollout, sample_generator


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


def sample(backbone, condition, places=(0, 1, 2, 3), *, dynamics=None, sde_type="flow", level=0.7, **kwargs):
    """Draws the prompts at `places`, each with generators of its place."""
    kwargs = {"stochastic_steps": ALL, "trained_steps": kwargs.get("stochastic_steps", ALL)} | kwargs
    generators = [sample_generator(1, place) for place in places]
    return rollout(
        backbone,
        backbone.model,
        dynamics or Dynamics(backbone.schedule(STEPS), sde_type=sde_type, noise_level=level),
        {key: value[list(places)] for key, value in condition.items()},
        None,
        guidance_scale=1.0,
        initial_noise=draw_noise(
            backbone.latent_shape(), [sample_generator(0, place) for place in places], torch.device("cpu")
        ),
        generators=generators,
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
    for places in [(0,), (2, 1), (3, 0, 2)]:
        some = sample(backbone, condition, places)
        # Not to the last bit: matrix products of other shapes add up in another order
        torch.testing.assert_close(some.final, together.final[list(places)], rtol=0, atol=1e-5)
        torch.testing.assert_close(some.latents, together.latents[list(places)], rtol=0, atol=1e-5)
    assert (together.final[0] - together.final[3]).abs().max() > 0.1  # one prompt, two samples


# ---- What is stored ----


@pytest.mark.parametrize(
    ("sde_type", "steps"), [("flow", ALL), ("dance", ALL), ("cps", ALL[:-1])], ids=["flow", "dance", "cps"]
)
def test_the_stored_numbers_are_those_of_the_equations(sde_type, steps, backbone, condition):
    t = sample(backbone, condition, sde_type=sde_type, stochastic_steps=steps)
    sigmas = backbone.schedule(STEPS).sigmas
    generators = [sample_generator(1, place) for place in range(len(PROMPTS))]
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
        # log N(x'; mean, std^2), a mean over the dimensions
        normal = torch.distributions.Normal(t.means[:, index], std)
        by_torch = normal.log_prob(t.next_latents[:, index]).flatten(1).mean(1)
        torch.testing.assert_close(t.log_probs[:, index], by_torch, rtol=1e-4, atol=1e-5)
        following = t.latents[:, index + 1] if index + 1 < len(steps) else None
        if following is not None:
            assert torch.equal(t.next_latents[:, index], following)
    if steps == ALL:
        assert torch.equal(t.next_latents[:, -1], t.final)


def test_log_probabilities_without_variance_are_flow_cps_own(backbone, condition):
    dynamics = Dynamics(backbone.schedule(STEPS), sde_type="cps", noise_level=0.7, variance_free=True)
    t = sample(backbone, condition, dynamics=dynamics, stochastic_steps=ALL[:-1])
    by_hand = -((t.next_latents - t.means) ** 2).flatten(2).mean(2)
    torch.testing.assert_close(t.log_probs, by_hand)


def test_steps_outside_the_window_follow_the_ode(backbone, condition):
    t = sample(backbone, condition, stochastic_steps=[1, 2])
    assert t.steps == (1, 2)
    assert t.latents.shape == (4, 2, 4, 8, 8)
    ode = sample(backbone, condition, stochastic_steps=[])
    sigmas = backbone.schedule(STEPS).sigmas
    x = draw_noise((4, 8, 8), [sample_generator(0, place) for place in range(4)], torch.device("cpu"))
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
    some = sample(backbone, condition, trained_steps=[0, 2])
    assert some.steps == (0, 2)
    assert torch.equal(some.final, everything.final)
    for name in ("latents", "next_latents", "means", "log_probs"):
        assert torch.equal(getattr(some, name), getattr(everything, name)[:, [0, 2]])


def test_a_trained_step_must_be_stochastic(backbone, condition):
    with pytest.raises(ValueError, match=r"trained_steps \[0, 3\] must all be in stochastic_steps \[0, 1\]"):
        sample(backbone, condition, stochastic_steps=[0, 1], trained_steps=[0, 3])


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps"])
def test_without_noise_every_dynamics_is_the_ode(sde_type, backbone, condition):
    ode = sample(backbone, condition, stochastic_steps=[])
    # so little noise that log-probabilities still exist
    quiet = sample(backbone, condition, sde_type=sde_type, level=1e-6, stochastic_steps=ALL[:-1])
    torch.testing.assert_close(quiet.final, ode.final, rtol=0, atol=1e-4)


def test_nothing_keeps_a_graph(backbone, condition):
    t = sample(backbone, condition, keep_projections=True)
    for name in ("latents", "next_latents", "means", "log_probs", "final", "projections"):
        assert not getattr(t, name).requires_grad
        assert getattr(t, name).dtype == torch.float32


# ---- Projections ----


def test_projections_by_hand(backbone, condition):
    t = sample(backbone, condition, keep_projections=True)
    assert t.projections.shape == (4, STEPS, 4, 8, 8)
    sigmas = backbone.schedule(STEPS).sigmas
    for step in ALL[:-1]:
        x, sigma = t.next_latents[:, step], sigmas[step + 1]
        with torch.no_grad():
            expected = x - sigma * backbone.guided_prediction(backbone.model, x, sigma * 1000, condition)
        torch.testing.assert_close(t.projections[:, step], expected)
    assert torch.equal(t.projections[:, -1], t.final)


def test_projections_begin_with_the_first_trained_step(backbone, condition):
    everything = sample(backbone, condition, keep_projections=True)
    some = sample(backbone, condition, trained_steps=[1, 3], keep_projections=True)
    assert torch.equal(some.projections, everything.projections[:, 1:])


def test_projections_cost_no_forward(backbone, condition):
    calls = []
    handle = backbone.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        sample(backbone, condition, keep_projections=False)
        without = len(calls)
        sample(backbone, condition, keep_projections=True)
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
    dynamics = Dynamics(schedule, sde_type="dance", noise_level=0.3)
    assert dynamics.dt(0).item() == pytest.approx(0.6)
    assert dynamics.dt(1).item() == pytest.approx(0.4)
    assert dynamics.beta(0).item() == 1
    assert dynamics.beta(1).item() == pytest.approx(1 + 0.09 * 0.6 / 0.8)
