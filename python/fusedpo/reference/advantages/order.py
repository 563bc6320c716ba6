"""Advantages for the best of k samples (max@k, pass@k), from the gaps between the sorted rewards of a group.

Notation: n samples with rewards ``r_(0) <= ... <= r_(n-1)``, p the rank of sample i, ``d_g = r_(g) - r_(g-1)`` the gap
below rank g, ``C`` the binomial coefficient, and the means

* ``q_i`` of the maximum over the subsets of size k that contain i;
* ``U_k`` of the maximum over all subsets of size k, ``U_k(-i)`` over those that do not contain i;
* ``EI_i`` of ``max(r_i - max T, 0)`` over the subsets T of size k - 1 that do not contain i (expected improvement).

The maximum of a subset lies below gap g if all its ranks are smaller than g. So each mean is a sum of gaps weighted by
ratios of binomials: only differences of rewards enter, equal rewards drop out exactly, and nothing overflows.
Where a group has too few samples for k, results are nan.
"""

from __future__ import annotations

from math import comb, nan

import torch
from torch import Tensor

from .segments import Groups, per_group, result_dtype, shift, suffix_scan


def _all_below(k: int, groups: Groups) -> Tensor:
    """``C(g, k) / C(n - 1, k)`` at rank g, by the recurrence ``w_{n-1} = 1``, ``w_{g-1} = w_g (g - k) / g``."""
    inside = groups.rank < groups.size - 1
    g = (groups.rank + 1).double()
    return suffix_scan((~inside).double(), ((g - k).clamp(min=0) / g).where(inside, 0))


def _sizes(groups: Groups) -> tuple[Tensor, Tensor]:
    """``n`` and ``g`` at each position, in float64; g is at least 1, for there is no gap below rank 0."""
    return groups.size.double(), groups.rank.clamp(min=1).double()


def _gaps(rewards: Tensor, groups: Groups) -> Tensor:
    return (rewards - rewards.roll(1)).where(groups.rank > 0, 0)


def _highest(rewards: Tensor, groups: Groups) -> Tensor:
    return rewards[groups.start + groups.size - 1]


def _gap_sums(rewards: Tensor, groups: Groups, below: Tensor, above: Tensor) -> Tensor:
    """``sum_{g <= p} below_g d_g + sum_{g > p} above_g d_g`` at each rank p."""
    gaps = _gaps(rewards, groups)
    sums = groups.prefix_sum(below * gaps)
    sums = sums + shift(groups.suffix_sum(above * gaps)).where(groups.rank < groups.size - 1, 0)
    # Equal rewards all take the value at the first of them: a scan may round the same sum differently at each rank.
    first = groups.rank.where((groups.rank == 0) | (gaps != 0), 0)
    return sums[(groups.start + first).cummax(0).values]


def max_at_k(
    rewards: Tensor,
    *,
    k: int,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    def estimate(r: Tensor, groups: Groups) -> Tensor:
        n, _ = _sizes(groups)
        below = groups.total(_all_below(k, groups) * _gaps(r, groups))
        return (_highest(r, groups) - (n - k) / n * below).where(n >= k, nan)

    return per_group(estimate, rewards, group_size, group_ids, mask)


def maxpo(
    rewards: Tensor,
    *,
    k: int,
    scale: str = "mean",
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    def estimate(r: Tensor, groups: Groups) -> Tensor:
        n, g = _sizes(groups)
        alpha = _all_below(k, groups)
        advantages = _gap_sums(r, groups, alpha, -(n - g) / g * alpha)  # q_i - U_k(-i)
        if scale == "unbiased":
            advantages = advantages * k / n
        return advantages.where(n > k, nan)

    return per_group(estimate, rewards, group_size, group_ids, mask)


@torch.no_grad()
def maxpo_quadratic(rewards: Tensor, *, k: int) -> Tensor:
    """:func:`maxpo` as its authors write it, over all pairs of samples: groups ``[..., n]``, ``2 <= k < n``.

    ``A_i = EI_i - b_i`` with the leave-two-out baseline ``b_i``, the mean over ``j != i`` of the expected improvement
    of j in the group without i. With samples sorted and ``D_jl = max(r_j - r_l, 0)``:
    ``EI_j = sum_l D_jl C(l, k-2) / C(n-1, k-1)``,
    ``b_i = sum_{l != i} (sum_{j != i} D_jl) / (n-1) C(l - [l > i], k-2) / C(n-2, k-1)``.
    """
    n = rewards.shape[-1]
    r, order = rewards.double().sort(stable=True)
    rank = torch.arange(n, device=r.device)

    def highest_has_rank(size: int) -> Tensor:
        """Probability that the highest of k - 1 out of ``size`` samples has rank l."""
        return r.new_tensor([comb(below, k - 2) / comb(size, k - 1) for below in range(n)])

    excess = (r[..., :, None] - r[..., None, :]).clamp(min=0)
    improvement = excess @ highest_has_rank(n - 1)
    of_others = (excess.sum(-2, keepdim=True) - excess) / (n - 1)
    rank_without_i = rank - (rank > rank[:, None]).long()
    weight = highest_has_rank(n - 2)[rank_without_i].where(rank != rank[:, None], 0)
    advantages = improvement - (of_others * weight).sum(-1)
    return torch.empty_like(r).scatter(-1, order, advantages).to(result_dtype(rewards))


def pkpo(
    rewards: Tensor,
    *,
    k: int,
    variant: str = "sloo-1",
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    def estimate(r: Tensor, groups: Groups) -> Tensor:
        n, g = _sizes(groups)
        zero = torch.zeros_like(r)
        if variant == "sloo-1":  # k / n EI_i
            return (_gap_sums(r, groups, _all_below(k - 1, groups), zero) * k / n).where(n >= k, nan)
        alpha = _all_below(k, groups)
        short = (n - k) / g * alpha  # C(g-1, k-1) / C(n-1, k-1)
        if variant == "s":  # k / n q_i
            return ((_highest(r, groups) + _gap_sums(r, groups, zero, -short)) * k / n).where(n >= k, nan)
        # k / n q_i - k / (n-1) U_k(-i)
        gaps = _gap_sums(r, groups, k / (n - 1) * alpha, k / (n - 1) * (g - k) / g * alpha - k / n * short)
        return (gaps - k / (n * (n - 1)) * _highest(r, groups)).where(n > k, nan)

    return per_group(estimate, rewards, group_size, group_ids, mask)


def passk(
    rewards: Tensor,
    *,
    k: int,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    def estimate(r: Tensor, groups: Groups) -> Tensor:
        n, g = _sizes(groups)
        beta = (n - k) / n * _all_below(k, groups)  # C(g, k) / C(n, k)
        fail = groups.total(beta * _gaps(r, groups))  # 1 - U_k, or 0 where all samples are wrong
        sigma = (fail * (1 - fail)).sqrt()
        advantages = _gap_sums(r, groups, beta, -(n - g) / g * beta) / sigma  # (q_i - U_k) / sigma
        return advantages.where(sigma > 0, 0).where(n >= k, nan)

    return per_group(estimate, rewards, group_size, group_ids, mask)
