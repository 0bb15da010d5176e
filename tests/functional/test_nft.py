"""DiffusionNFT's equations: values by hand, the authors' formula written again, and optima that are known."""

import pytest
import torch

from trl_flow.functional import implicit_policies, nft_loss, optimality


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def random_case(shape=(3, 2, 5), dtype=torch.float64, seed=0):
    """Predictions, noised and clean latents, noise levels and optimality."""
    generator = torch.Generator().manual_seed(seed)
    v, old, noise, clean = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.2, 1.0, shape[0], dtype=torch.float64)
    over = t.view(-1, *[1] * (len(shape) - 1))
    r = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (v, old, (1 - over) * clean + over * noise, clean, t, r)]


def authors_loss(v, old, noised, clean, t, r, beta):
    """As their code has it, but for its constant factor."""
    t = t.view(-1, *[1] * (v.ndim - 1))
    dims = tuple(range(1, v.ndim))
    positive, negative = beta * v + (1 - beta) * old, (1 + beta) * old - beta * v
    losses = []
    for policy in (positive, negative):
        data = noised - t * policy
        factor = (data.double() - clean.double()).abs().mean(dim=dims, keepdim=True).clip(min=1e-5).detach()
        losses.append(((data - clean) ** 2 / factor).mean(dim=dims))
    return r * losses[0] + (1 - r) * losses[1]


def test_optimality_is_half_for_no_advantage_and_clamped_at_both_ends():
    advantages = torch.tensor([-10.0, -5.0, 0.0, 2.5, 7.0])
    assert optimality(advantages, clip=5.0).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


def test_implicit_policies_mirror_each_other_around_the_old_one():
    v, old = double([[3.0, -1.0]]), double([[1.0, 1.0]])
    positive, negative = implicit_policies(v, old, beta=1.0)
    assert positive.tolist() == [[3.0, -1.0]] and negative.tolist() == [[-1.0, 3.0]]
    positive, negative = implicit_policies(v, old, beta=0.25)
    assert positive.tolist() == [[1.5, 0.5]] and negative.tolist() == [[0.5, 1.5]]
    torch.testing.assert_close((positive + negative) / 2, old)


def test_the_loss_by_hand():
    # t = 1/2, x_0 = (0, 2), noise (2, 0): x_t = (1, 1), target (2, -2)
    v, old = double([[2.0, 0.0]]), double([[0.0, 0.0]])
    case = v, old, double([[1.0, 1.0]]), double([[0.0, 2.0]]), 0.5, double([0.75])
    # beta 1: v_plus = (2, 0), v_minus = (-2, 0). Distances of velocities: (0 + 4) / 2 and (16 + 4) / 2
    assert nft_loss(*case, beta=1.0, self_normalized=False).tolist() == [0.75 * 2 + 0.25 * 10]
    # Of data (0, 1) and (2, 1): errors (0, -1) and (2, -1), squares 1/2 and 5/2, sizes 1/2 and 3/2
    torch.testing.assert_close(nft_loss(*case, beta=1.0), double([0.75 * 1 + 0.25 * 5 / 3]))


@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 6, 6)])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_authors(shape, beta, dtype):
    case = random_case(shape, dtype)
    torch.testing.assert_close(nft_loss(*case, beta=beta), authors_loss(*case, beta=beta).to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("self_normalized", [True, False])
def test_a_sample_that_is_neither_good_nor_bad_has_no_gradient_at_the_old_policy(self_normalized):
    v, old, noised, clean, t, r = random_case()
    v = old.clone().requires_grad_()
    loss = nft_loss(v, old, noised, clean, t, r.fill_(0.5), beta=0.7, self_normalized=self_normalized)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert gradient.abs().max() < 1e-15
    better = nft_loss(v, old, noised, clean, t, r.fill_(0.6), beta=0.7, self_normalized=self_normalized)
    assert torch.autograd.grad(better.sum(), v)[0].abs().max() > 1e-3


@pytest.mark.parametrize("self_normalized", [True, False])
def test_the_gradient_by_finite_differences(self_normalized):
    v, old, noised, clean, t, r = random_case((2, 3))
    beta, sizes = 0.6, None

    def loss(v):
        if not self_normalized:
            return nft_loss(v, old, noised, clean, t, r, beta=beta, self_normalized=False).sum()
        # The size that divides is a constant for the gradient
        errors = [noised - t[:, None] * policy - clean for policy in implicit_policies(v, old, beta=beta)]
        positive, negative = (e.square().mean(1) / size for e, size in zip(errors, sizes, strict=True))
        return (r * positive + (1 - r) * negative).sum()

    errors = [noised - t[:, None] * policy - clean for policy in implicit_policies(v, old, beta=beta)]
    sizes = [error.abs().mean(1) for error in errors]
    v.requires_grad_()
    value = nft_loss(v, old, noised, clean, t, r, beta=beta, self_normalized=self_normalized).sum()
    (gradient,) = torch.autograd.grad(value, v)
    for index in range(v.numel()):
        step = torch.zeros_like(v).flatten()
        step[index] = 1e-6
        step = step.view_as(v)
        with torch.no_grad():
            slope = (loss(v + step) - loss(v - step)) / 2e-6
        assert slope == pytest.approx(gradient.flatten()[index].item(), rel=1e-6, abs=1e-8)


def optimum(old, r, x_t, x_0, t, beta):
    """The `(slope, intercept)` in `x_t` that minimize the plain loss over samples: it is quadratic in them."""
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def loss(weights):
        v = weights[0] * x_t + weights[1]
        return nft_loss(v[:, None], old[:, None], x_t[:, None], x_0[:, None], t, r, beta=beta, self_normalized=False)

    (gradient,) = torch.autograd.grad(loss(weights).mean(), weights)
    hessian = torch.autograd.functional.hessian(lambda w: loss(w).mean(), weights.detach())
    return (-torch.linalg.solve(hessian, gradient)).tolist()


def gaussian_data(mean, std, t, number=200_000):
    """Data and noised data, and of the exact velocity `E[e - x_0 | x_t]` the slope and intercept."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, number, generator=generator, dtype=torch.float64)
    x_0 = mean + std * x_0
    variance = (1 - t) ** 2 * std**2 + t**2
    slope = (t - (1 - t) * std**2) / variance
    return x_0, (1 - t) * x_0 + t * noise, (slope, -mean - slope * (1 - t) * mean)


@pytest.mark.parametrize(("r", "beta"), [(1.0, 1.0), (0.75, 0.5), (0.25, 1.0), (0.5, 0.3)])
def test_the_optimum_for_gaussian_data_and_one_optimality(r, beta):
    t = 0.4
    x_0, x_t, exact = gaussian_data(0.7, 0.5, t)
    old = (0.3, -0.2)  # some other velocity
    found = optimum(old[0] * x_t + old[1], torch.full_like(x_t, r), x_t, x_0, t, beta)
    # v_old + (2 r - 1) / beta (v - v_old)
    expected = [o + (2 * r - 1) / beta * (v - o) for v, o in zip(exact, old, strict=True)]
    assert found == pytest.approx(expected, abs=0.02)


def test_the_optimum_for_gaussian_data_moves_to_where_the_reward_is():
    t, beta, mean, std, c = 0.5, 0.5, 0.2, 0.6, 0.1
    x_0, x_t, (slope, intercept) = gaussian_data(mean, std, t)
    found = optimum(slope * x_t + intercept, 0.5 + c * (x_0 - mean), x_t, x_0, t, beta)
    # 2 c E[(x_0 - mean)(v - v_old) | x_t] / beta, with v - v_old = (E[x_0 | x_t] - x_0) / t
    posterior = 1 / (1 / std**2 + (1 - t) ** 2 / t**2)
    assert found == pytest.approx([slope, intercept - 2 * c * posterior / (t * beta)], abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"beta": 0.0}, "beta is 0"), ({"sigma": 0.0}, "sigma is"), ({"clean": torch.zeros(3, 2, 4)}, "clean has shape")],
)
def test_refused(change, message):
    names = ("prediction", "old_prediction", "noised", "clean", "sigma", "optimality")
    case = dict(zip(names, random_case(), strict=True)) | {"beta": 1.0}
    with pytest.raises(ValueError, match=message):
        nft_loss(**case | change)


def test_a_clip_of_zero_is_refused():
    with pytest.raises(ValueError, match="clip is 0"):
        optimality(torch.zeros(2), clip=0.0)
