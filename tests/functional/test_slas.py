"""Super-linear shaping and the bound on its power: hand-computed values, the paper's corollary, every edge."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_flow.functional import (
    adapt_power,
    effective_sample_share,
    max_advantage_power,
    max_advantage_power_bounded,
    max_advantage_power_sub_gaussian,
    super_linear,
)


few = settings(deadline=None, derandomize=True, max_examples=60)
numbers = st.floats(-20, 20)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def largest(advantages, limit):
    """The bound with `C = limit`: 2 max_kl / (1 * 1 * 1)."""
    return max_advantage_power(
        double(advantages), grad_sq_norm=1.0, fisher_eigenvalue=1.0, learning_rate=1.0, max_kl=limit / 2
    )


def largest_bounded(bound, limit):
    """The corollary's bound with `C = limit`."""
    return max_advantage_power_bounded(
        bound, grad_sq_norm=1.0, fisher_eigenvalue=1.0, learning_rate=1.0, max_kl=limit / 2
    )


def moment(advantages, power):
    return sum(abs(a) ** (2 * (1 + power)) for a in advantages) / len(advantages)


# Shaping


def test_shaping_by_hand():
    torch.testing.assert_close(super_linear(double([-2, -0.5, 0, 0.5, 2]), 1.0), double([-4, -0.25, 0, 0.25, 4]))
    torch.testing.assert_close(super_linear(double([-4, 0.25]), 0.5), double([-8, 0.125]))  # 4^1.5, 0.25^1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_zero_gives_the_advantages_back_as_they_are(dtype):
    advantages = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    advantages[:2] = torch.tensor([0.0, -0.0])
    shaped = super_linear(advantages, 0.0)
    assert torch.equal(shaped, advantages)
    assert torch.equal(shaped.signbit(), advantages.signbit())
    assert shaped.dtype == dtype


@few
@given(a=numbers, b=numbers, power=st.floats(0, 3))
def test_shaping_is_odd_keeps_signs_and_order_and_fixes_one(a, b, power):
    at_a, at_b, at_minus_a, at_one = super_linear(double([a, b, -a, 1]), power).tolist()
    assert at_minus_a == pytest.approx(-at_a, rel=1e-12)
    assert at_one == pytest.approx(1, rel=1e-12)
    assert at_a * a >= 0
    rounding = 1e-12 * max(abs(at_a), abs(at_b))
    assert a > b or at_a <= at_b + rounding
    assert abs(at_a) >= abs(a) - rounding if abs(a) >= 1 else abs(at_a) <= abs(a) + rounding


@few
@given(a=numbers, first=st.floats(0, 2), second=st.floats(0, 2))
def test_shaping_twice_multiplies_the_exponents(a, first, second):
    twice = super_linear(super_linear(double([a]), first), second)
    torch.testing.assert_close(twice, super_linear(double([a]), (1 + first) * (1 + second) - 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0, 2.5])
def test_gradient_of_shaping_is_finite_everywhere_and_right(power):
    # (1 + gamma) |A|^gamma; at 0 that is 0, or 1 for the identity
    advantages = double([-2, -0.5, 0, 0.5, 2]).requires_grad_()
    (gradient,) = torch.autograd.grad(super_linear(advantages, power).sum(), advantages)
    expected = double([(1 + power) * abs(a) ** power for a in (-2, -0.5, 0, 0.5, 2)])
    torch.testing.assert_close(gradient, expected)


def test_shaping_keeps_shape_and_widens_half_precision():
    shaped = super_linear(torch.full((2, 3), 4.0, dtype=torch.bfloat16), 0.5)
    assert shaped.dtype == torch.float32
    torch.testing.assert_close(shaped, torch.full((2, 3), 8.0))


@pytest.mark.parametrize("power", [-0.1, math.nan, math.inf])
def test_powers_out_of_their_domain_are_refused(power):
    with pytest.raises(ValueError, match="power is"):
        super_linear(torch.zeros(1), power)


# The effective sample size and the power that follows the KL


@pytest.mark.parametrize(
    ("advantages", "share"),
    [
        ([2, -2, 2, -2], 1.0),
        ([0, 0, -5, 0], 0.25),  # 5^2 / (4 * 25)
        ([1, -3], 0.8),  # 4^2 / (2 * 10)
        ([[1, -3], [1, -3]], 0.8),
        ([0, 0], 0.0),
    ],
)
def test_effective_share_by_hand(advantages, share):
    assert effective_sample_share(double(advantages)).item() == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(
    ("power", "expected"),
    # of Gaussian advantages: E|A|^p is 2^(p / 2) Gamma((p + 1) / 2) / sqrt(pi), so (2 / pi) / 1, 1 / 3, (8 / pi) / 15
    [(0.0, 2 / math.pi), (1.0, 1 / 3), (2.0, 8 / (15 * math.pi))],
)
def test_shaping_shrinks_the_effective_share(power, expected):
    gaussian = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert effective_sample_share(super_linear(gaussian, power)).item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("power", "kl", "expected"),
    [
        (0.5, 0.01, 0.5),  # at the target
        (0.5, 0.01 / math.sqrt(math.e), 0.6),  # 0.2 * log sqrt(e)
        (0.5, 0.01 * math.sqrt(math.e), 0.4),
        (0.5, 1e-9, 0.7),  # by the gain at most
        (0.5, 1.0, 0.3),
        (0.5, 0.0, 0.7),  # an update that did nothing
        (0.1, 1.0, 0.0),  # never below 0
        (1.9, 0.0, 2.0),  # nor above the limit
    ],
)
def test_the_power_follows_the_kl_by_hand(power, kl, expected):
    assert adapt_power(power, kl, 0.01, gain=0.2, max_power=2.0) == pytest.approx(expected, abs=1e-12)


def test_the_power_comes_to_rest_where_the_kl_is_at_its_target():
    # log KL rises by 1.5 for each unit of the power, from half the target at 0: it is there at log 2 / 1.5
    power = 0.0
    for _ in range(40):
        power = adapt_power(power, 0.005 * math.exp(1.5 * power), 0.01, gain=0.2, max_power=2.0)
    assert power == pytest.approx(math.log(2) / 1.5, abs=1e-4)


# The bound


def test_bound_by_hand():
    # all |A| = 2: 2^(2 (1 + gamma)) <= 32 = 2^5 holds up to gamma = 1.5
    assert largest([2, -2, 2], 32) == pytest.approx(1.5, abs=1e-12)


def test_constant_of_the_bound_by_hand():
    # C = 2 * 0.0032 / (0.01^2 * 0.5 * 4) = 0.0064 / 0.0002 = 32
    power = max_advantage_power(
        double([2, -2]), grad_sq_norm=4.0, fisher_eigenvalue=0.5, learning_rate=0.01, max_kl=0.0032
    )
    assert power == pytest.approx(1.5, abs=1e-12)


@few
@given(bound=st.floats(1.01, 50), limit=st.floats(1.1, 1e6))
def test_bound_is_corollary_1_for_advantages_at_their_bound(bound, limit):
    expected = math.log(limit) / (2 * math.log(bound)) - 1
    assert largest([bound, -bound], limit) == pytest.approx(max(expected, 0), rel=1e-9, abs=1e-9)


@few
@given(advantages=st.lists(numbers, min_size=1, max_size=8), limit=st.floats(0.01, 1e4))
def test_the_power_returned_is_allowed_and_no_larger_one_is(advantages, limit):
    power = largest(advantages, limit)
    assert power >= 0
    if power == math.inf:
        # no upper limit: the moments never rise again, or there is nothing to shape
        assert max(map(abs, advantages)) <= 1
        return
    beyond = [power * (1 + 1e-6) + 1e-6 + extra for extra in (0.0, 0.1, 1.0, 10.0)]
    assert all(moment(advantages, p) >= limit * (1 - 1e-12) for p in beyond)
    if power > 0:
        assert moment(advantages, power) <= limit * (1 + 1e-9)


@few
@given(advantages=st.lists(numbers, min_size=1, max_size=8), limit=st.floats(0.01, 1e4), factor=st.floats(1, 100))
def test_a_wider_trust_region_never_allows_less(advantages, limit, factor):
    assert largest(advantages, limit) <= largest(advantages, factor * limit) * (1 + 1e-9) + 1e-9


def test_bound_that_fails_for_linear_advantages_and_holds_for_shaped_ones():
    # 60 advantages of 0.5 and 4 of 1.1: the second moment is 19.84 / 64 = 0.31, above 0.15, then it falls (at gamma
    # 2 it is 8.0 / 64 = 0.126) until the 1.1s take over: the upper end solves 60 * 0.5^p + 4 * 1.1^p = 9.6.
    advantages = [0.5] * 60 + [1.1] * 4
    assert moment(advantages, 0) > 0.15
    power = largest(advantages, 0.15)
    assert power > 2
    assert moment(advantages, power) == pytest.approx(0.15, rel=1e-9)
    assert moment(advantages, power + 1e-6) > 0.15
    # its minimum is about 0.124: below that no power will do
    assert min(moment(advantages, g / 100) for g in range(2000)) > 0.12
    assert largest(advantages, 0.12) == 0


def test_no_power_is_allowed_when_linear_advantages_are_too_large_and_shaping_makes_it_worse():
    assert largest([2, -2], 3.9) == 0


def test_the_linear_advantages_alone_may_be_allowed():
    assert largest([2, -2], 4.0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "advantages, limit, expected",
    [
        ([0.5, -0.5], 10.0, math.inf),
        ([0.5, -0.5], 0.01, math.inf),  # too large as they are, small enough once shaped, and ever smaller
        ([0.0, 0.0], 0.01, math.inf),
        ([1.0, -1.0], 1.0, math.inf),  # 1 to any power
        ([1.0, -1.0], 0.99, 0.0),
        ([1.0, 0.0], 0.5, math.inf),  # half of them are 1, whatever the power
        ([1.0, 0.0], 0.49, 0.0),
        ([1.0, 0.5], 0.5, 0.0),  # falls towards a half, and never arrives
        ([1.0, 0.5], 0.51, math.inf),
    ],
)
def test_bound_when_no_advantage_is_above_one(advantages, limit, expected):
    assert largest(advantages, limit) == expected


def test_high_powers_do_not_overflow():
    # log 10 / (2 log 1.0001) - 1 = 11512.5
    assert largest([1.0001, 1e-300], 5.0) == pytest.approx(math.log(10) / (2 * math.log(1.0001)) - 1, rel=1e-9)
    assert largest([1e30], 1e300) == pytest.approx(4.0, rel=1e-9)  # 10^(60 (1 + gamma)) <= 10^300
    tiny = max_advantage_power(
        double([10.0]), grad_sq_norm=1e-200, fisher_eigenvalue=1e-200, learning_rate=1e-100, max_kl=0.5
    )
    assert tiny == pytest.approx(299, rel=1e-9)  # C = 10^600, 10^(2 (1 + gamma)) <= 10^600


@pytest.mark.parametrize("name", ["grad_sq_norm", "fisher_eigenvalue", "learning_rate"])
def test_an_update_of_length_zero_allows_everything(name):
    numbers = {"grad_sq_norm": 1.0, "fisher_eigenvalue": 1.0, "learning_rate": 1.0, name: 0.0}
    assert max_advantage_power(double([5.0]), max_kl=0.1, **numbers) == math.inf


@pytest.mark.parametrize(
    "name, value", [("max_kl", 0.0), ("max_kl", -1.0), ("learning_rate", -1.0), ("grad_sq_norm", math.nan)]
)
def test_numbers_out_of_their_domain_are_refused(name, value):
    numbers = {"grad_sq_norm": 1.0, "fisher_eigenvalue": 1.0, "learning_rate": 1.0, "max_kl": 0.1, name: value}
    with pytest.raises(ValueError, match=f"{name} is"):
        max_advantage_power(double([1.0]), **numbers)


def test_advantages_that_are_none_or_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"\(0,\)"):
        largest([], 1.0)
    with pytest.raises(ValueError, match=r"advantages holds 1 .*index \(1,\)"):
        largest([1.0, math.nan], 1.0)


def test_bound_takes_any_shape_and_dtype():
    advantages = torch.full((2, 3), -2.0, dtype=torch.bfloat16, requires_grad=True)
    power = max_advantage_power(advantages, grad_sq_norm=1.0, fisher_eigenvalue=1.0, learning_rate=1.0, max_kl=16.0)
    assert isinstance(power, float)
    assert power == pytest.approx(1.5, abs=1e-12)


# The bound for bounded advantages


@pytest.mark.parametrize(
    "bound, limit, expected",
    [
        (2.0, 32.0, 1.5),  # log 32 / (2 log 2) - 1 = 5 / 2 - 1
        (5.0, 625.0, 1.0),  # 5^4 = 625
        (10.0, 100.0, 0.0),  # the linear advantages use the trust region up
        (10.0, 99.0, 0.0),  # and here they exceed it
        (2.0, 0.5, 0.0),
        (1.0, 1.0, math.inf),  # 1 to any power
        (1.0, 0.99, 0.0),
        (0.5, 0.01, math.inf),
        (0.0, 0.01, math.inf),
    ],
)
def test_corollary_1_by_hand(bound, limit, expected):
    assert largest_bounded(bound, limit) == pytest.approx(expected, abs=1e-12)


def test_constant_of_corollary_1_by_hand():
    # C = 2 * 0.0032 / (0.01^2 * 0.5 * 4) = 32
    power = max_advantage_power_bounded(
        2.0, grad_sq_norm=4.0, fisher_eigenvalue=0.5, learning_rate=0.01, max_kl=0.0032
    )
    assert power == pytest.approx(1.5, abs=1e-12)


@few
@given(
    shares=st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    bound=st.floats(0, 50) | st.just(1.0),
    limit=st.floats(0.01, 1e6) | st.just(1.0),
)
def test_bounded_advantages_are_allowed_no_less_than_the_corollary(shares, bound, limit):
    corollary = largest_bounded(bound, limit)
    assert corollary <= largest([bound * share for share in shares], limit) * (1 + 1e-9) + 1e-9
    # and at their bound no more
    assert corollary == pytest.approx(largest([bound, -bound], limit), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["grad_sq_norm", "fisher_eigenvalue", "learning_rate"])
def test_corollary_1_allows_everything_for_an_update_of_length_zero(name):
    numbers = {"grad_sq_norm": 1.0, "fisher_eigenvalue": 1.0, "learning_rate": 1.0, name: 0.0}
    assert max_advantage_power_bounded(5.0, max_kl=0.1, **numbers) == math.inf


@pytest.mark.parametrize(
    "name, value",
    [("bound", -1.0), ("bound", math.inf), ("max_kl", 0.0), ("learning_rate", -1.0), ("grad_sq_norm", math.nan)],
)
def test_corollary_1_refuses_numbers_out_of_their_domain(name, value):
    numbers = {"bound": 2.0, "grad_sq_norm": 1.0, "fisher_eigenvalue": 1.0, "learning_rate": 1.0, "max_kl": 0.1}
    with pytest.raises(ValueError, match=f"{name} is"):
        max_advantage_power_bounded(**numbers | {name: value})


# The bound for sub-Gaussian advantages


def largest_sub_gaussian(norm, limit, constant=1.0):
    return max_advantage_power_sub_gaussian(
        norm, grad_sq_norm=1.0, fisher_eigenvalue=1.0, learning_rate=1.0, max_kl=limit / 2, constant=constant
    )


@pytest.mark.parametrize(
    "norm, constant, limit, expected",
    [
        (1.0, 1.0, 16.0, 1.0),  # p = 4: (1 * sqrt 4)^4 = 16
        (2.0, 1.0, 256.0, 1.0),  # p = 4: (2 * sqrt 4)^4 = 256
        (1.0, 2.0, 256.0, 1.0),  # p = 4: (2 * sqrt 4)^4 = 256
        (1.0, 1.0, 1.0, 0.0),  # p = 2: (sqrt 2)^2 = 2 is too large
        (3.0, 1.0, 0.01, 0.0),
    ],
)
def test_corollary_2_by_hand(norm, constant, limit, expected):
    assert largest_sub_gaussian(norm, limit, constant) == pytest.approx(expected, abs=1e-9)


@few
@given(norm=st.floats(0.1, 10), limit=st.floats(1e-3, 1e9))
def test_corollary_2_is_the_last_power_within_the_bound(norm, limit):
    def log_moment(power):
        return 2 * (1 + power) * math.log(norm * math.sqrt(2 * (1 + power)))

    power = largest_sub_gaussian(norm, limit)
    assert log_moment(power + 1e-3) > math.log(limit) - 1e-9 or norm**2 * 2 < 1 / math.e
    assert power == 0 or log_moment(power) == pytest.approx(math.log(limit), rel=1e-6, abs=1e-9)


def test_gaussian_advantages_are_allowed_no_less_than_corollary_2():
    # E |A|^p of a unit Gaussian is 2^(p / 2) Gamma((p + 1) / 2) / sqrt(pi); its Orlicz norm is sqrt(8 / 3)
    for limit in (10.0, 1e3, 1e6):
        p = 2 * (1 + largest_sub_gaussian(math.sqrt(8 / 3), limit))
        assert p == 2 or 2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi) <= limit


def test_corollary_2_grows_more_slowly_than_the_logarithm():
    powers = [largest_sub_gaussian(1.0, 10.0**exponent) for exponent in (4, 8, 16, 32)]
    assert all(later < 2 * (earlier + 1) - 1 for earlier, later in zip(powers, powers[1:], strict=False))


def test_corollary_2_refuses_numbers_out_of_their_domain_and_allows_updates_of_length_zero():
    numbers = {"grad_sq_norm": 1.0, "fisher_eigenvalue": 1.0, "learning_rate": 1.0, "max_kl": 0.1}
    with pytest.raises(ValueError, match="norm is 0"):
        max_advantage_power_sub_gaussian(0.0, **numbers)
    with pytest.raises(ValueError, match="constant is -1"):
        max_advantage_power_sub_gaussian(1.0, constant=-1.0, **numbers)
    assert max_advantage_power_sub_gaussian(1.0, **numbers | {"learning_rate": 0.0}) == math.inf
