"""Advantages for an order statistic of k samples, max@k above all, from the gaps between a group's sorted rewards.

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

from collections.abc import Sequence
from math import comb, nan

import torch
from torch import Tensor
from torch.nn.functional import pad

from .group import unbiased_std
from .segments import Groups, per_group, result_dtype, shift, suffix_scan, widened


def _all_below(k: int, groups: Groups) -> Tensor:
    """``C(g, k) / C(n - 1, k)`` at rank g, by the recurrence ``w_{n-1} = 1``, ``w_{g-1} = w_g (g - k) / g``."""
    inside = groups.rank < groups.size - 1
    g = widened(groups.rank + 1)
    return suffix_scan(widened(~inside), ((g - k).clamp(min=0) / g).where(inside, 0))


def _sizes(groups: Groups) -> tuple[Tensor, Tensor]:
    """``n`` and ``g`` at each position; g is at least 1, for there is no gap below rank 0."""
    return widened(groups.size), widened(groups.rank.clamp(min=1))


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


def _leave_one_out(rewards: Tensor, groups: Groups, alpha: Tensor) -> Tensor:
    """``sum_{g <= p} alpha_g d_g - sum_{g > p} (n - g)/g alpha_g d_g``: each gap adds 0 to the sum over the group."""
    n, g = _sizes(groups)
    return _gap_sums(rewards, groups, alpha, -(n - g) / g * alpha)


def _scaled(advantages: Tensor, scale: str, k: int, groups: Groups) -> Tensor:
    """nan where no subset of size k leaves a sample out."""
    if scale == "unbiased":
        advantages = advantages * k / groups.size
    return advantages.where(groups.size > k, nan)


@per_group
def max_at_k(r: Tensor, groups: Groups, *, k: int) -> Tensor:
    n, _ = _sizes(groups)
    below = groups.total(_all_below(k, groups) * _gaps(r, groups))
    return (_highest(r, groups) - (n - k) / n * below).where(n >= k, nan)


@per_group
def maxpo(r: Tensor, groups: Groups, *, k: int, scale: str = "mean") -> Tensor:
    return _scaled(_leave_one_out(r, groups, _all_below(k, groups)), scale, k, groups)  # q_i - U_k(-i)


@torch.no_grad()
def maxpo_leave_two_out(rewards: Tensor, *, k: int) -> Tensor:
    """:func:`maxpo` from its definition, over all subsets: one small group ``[n]``, ``2 <= k < n``.

    The expected improvement of i in a group is the mean of ``max(r_i - max T, 0)`` over the subsets T of k - 1 of the
    others. ``A_i`` is that of i, minus the mean over ``j != i`` of that of j in the group without i.
    """
    r, n = widened(rewards), rewards.numel()

    def improvement(i: int, without: int) -> Tensor:
        others = torch.tensor([j for j in range(n) if j not in (i, without)], device=r.device)
        highest = r[torch.combinations(others, k - 1)].amax(-1)
        return (r[i] - highest).clamp(min=0).mean()

    def advantage(i: int) -> Tensor:
        return improvement(i, i) - torch.stack([improvement(j, i) for j in range(n) if j != i]).mean()

    return torch.stack([advantage(i) for i in range(n)]).to(result_dtype(rewards))


@torch.no_grad()
def maxpo_quadratic(rewards: Tensor, *, k: int) -> Tensor:
    """:func:`maxpo` as its authors write it, over all pairs of samples: groups ``[..., n]``, ``2 <= k < n``.

    ``A_i = EI_i - b_i`` with the leave-two-out baseline ``b_i``, the mean over ``j != i`` of the expected improvement
    of j in the group without i. With samples sorted and ``D_jl = max(r_j - r_l, 0)``:
    ``EI_j = sum_l D_jl C(l, k-2) / C(n-1, k-1)``,
    ``b_i = sum_{l != i} (sum_{j != i} D_jl) / (n-1) C(l - [l > i], k-2) / C(n-2, k-1)``.
    """
    n = rewards.shape[-1]
    r, order = widened(rewards).sort(stable=True)
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


def _number_below(k: int, groups: Groups) -> Tensor:
    """Probability that b of k - 1 samples, drawn from the n - 2 not next to gap g, lie below it: ``[G, k]``.

    ``C(g-1, b) C(n-1-g, k-1-b) / C(n-2, k-1)``, as products of the ratios of neighbours from the largest term outwards,
    so that no factor exceeds 1; then divided by the sum.
    """
    n, g = (x[:, None] for x in _sizes(groups))
    b = torch.arange(k - 1, dtype=g.dtype, device=g.device)
    up = ((g - 1 - b) * (k - 1 - b)).clamp(min=0)  # P(b + 1) / P(b) = up / down
    down = ((b + 1) * (n - g - k + 1 + b)).clamp(min=0)
    larger = torch.maximum(up, down)
    rising, falling = (up / larger).cumprod(1), (down / larger).flip(1).cumprod(1).flip(1)
    relative = pad(rising, (1, 0), value=1.0) * pad(falling, (0, 1), value=1.0)
    return relative / relative.sum(1, keepdim=True)


@per_group
def order_statistic(r: Tensor, groups: Groups, *, k: int, weights: Sequence[float], scale: str = "mean") -> Tensor:
    """``f = sum_j w_j s_(j)`` of a subset, sorted: the mean over those of size k with i, minus over those without i.

    That is the mean of what f gains when i takes the place of another sample j, the k - 1 other ones staying. With b of
    these below a gap, a gap between i and j counts ``w_b``. It has i above it and j below with probability
    ``g / (n - 1)``, the reverse with ``(n - g) / (n - 1)``, and b has the same distribution in both. So
    ``alpha_g = g / (n - 1) E[w_b]``; weights 0, ..., 0, 1 give :func:`maxpo`.
    """
    n, g = _sizes(groups)
    # Asynchronous: a blocking copy would be a host sync.
    w = torch.tensor([float(w) for w in weights], dtype=r.dtype, device="cpu").to(r.device, non_blocking=True)
    alpha = g / (n - 1) * (_number_below(k, groups) * w).sum(1)
    return _scaled(_leave_one_out(r, groups, alpha), scale, k, groups)


@per_group
def pkpo(r: Tensor, groups: Groups, *, k: int, variant: str = "sloo-1") -> Tensor:
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


@per_group
def passk(r: Tensor, groups: Groups, *, k: int) -> Tensor:
    n, _ = _sizes(groups)
    beta = (n - k) / n * _all_below(k, groups)  # C(g, k) / C(n, k)
    fail = groups.total(beta * _gaps(r, groups))  # 1 - U_k, or 0 where all samples are wrong
    sigma = (fail * (1 - fail)).sqrt()
    advantages = _leave_one_out(r, groups, beta) / sigma  # (q_i - U_k) / sigma
    return advantages.where(sigma > 0, 0).where(n >= k, nan)


@per_group
def grpo_passk(r: Tensor, groups: Groups, *, std: bool = True, eps: float = 1e-6) -> Tensor:
    advantages = _gaps(r, groups).where(groups.rank == groups.size - 1, 0)
    if std:
        advantages = advantages / (unbiased_std(r, groups) + eps)
    advantages = advantages.where(~_highest(r, groups).isnan(), nan)
    return advantages.where(groups.size > 1, nan)
