"""Samples of a group whose rewards have the largest variance."""

from itertools import combinations

import pytest
import torch

from trl_flow.functional import max_variance_subset


def test_the_lowest_and_the_highest_are_kept_of_each_group():
    rewards = torch.tensor([0.5, 0.9, 0.1, 0.4, 7.0, 7.1, 9.0, 8.0])
    assert max_variance_subset(rewards, 4, 2).tolist() == [1, 2, 4, 6]


@pytest.mark.parametrize("num_kept", range(1, 7))
def test_no_other_subset_has_more_variance(num_kept):
    groups = torch.randn(5, 6, generator=torch.Generator().manual_seed(num_kept)).exp().double()
    chosen = max_variance_subset(groups.flatten(), 6, num_kept).view(5, num_kept)
    for number, (group, own) in enumerate(zip(groups, chosen - 6 * torch.arange(5)[:, None], strict=True)):
        variances = [group[list(subset)].var(correction=0) for subset in combinations(range(6), num_kept)]
        torch.testing.assert_close(group[own].var(correction=0), max(variances), msg=f"group {number}")


def test_of_two_kinds_of_reward_half_are_kept_of_each():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 0, 1, 0])
    assert rewards[max_variance_subset(rewards, 8, 4)].sum() == 2


def test_where_no_reward_differs_so_many_are_kept_all_the_same():
    assert len(max_variance_subset(torch.full((8,), 0.1), 4, 2)) == 4


def test_a_sample_without_reward_is_left_out_first():
    rewards = torch.tensor([0.2, torch.nan, 0.3, 0.9, *[torch.nan] * 4])
    assert max_variance_subset(rewards, 4, 3)[:3].tolist() == [0, 2, 3]
    assert len(max_variance_subset(rewards, 4, 3)) == 6


def test_all_are_kept_in_their_order():
    assert max_variance_subset(torch.randn(8), 4, 4).tolist() == list(range(8))


@pytest.mark.parametrize(("rewards", "num_kept", "match"), [
    (torch.zeros(2, 4), 2, r"\(N,\)"),
    (torch.zeros(6), 2, "whole groups"),
    (torch.tensor([0.0, 1.0, torch.inf, 2.0]), 2, "finite"),
    (torch.zeros(4), 0, "num_kept is 0"),
    (torch.zeros(4), 5, "num_kept is 5"),
])  # fmt: skip
def test_what_is_no_group_is_refused(rewards, num_kept, match):
    with pytest.raises(ValueError, match=match):
        max_variance_subset(rewards, 4, num_kept)
