"""Estimators for the best of k samples and other order statistics: max@k, pass@k, top-m@k, median, lower tails.

Notation: n is the number of kept samples in a group; a subset has k of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .. import _checks
from .._ranks import spread_over_ranks
from . import arguments
from .arguments import SmallGroups
from .registry import register
from .samples import Array, samples

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@register("maxpo")
@spread_over_ranks
def maxpo(
    rewards: Array,
    *,
    k: int,
    scale: Literal["mean", "unbiased"] = "mean",
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    small_groups: SmallGroups = "error",
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """MaxPO (2606.06080): leave-two-out advantages for the expected maximum over k samples; ``[G]`` to ``[G]``.

    ``A_i = EI_i - b_i``: the expected improvement of sample i over the best of k - 1 others of its group, minus the
    mean of the same over the other samples, taken in the group without i. It equals the mean of the maximum over the
    subsets of size k that contain i, minus the mean over those that do not. The advantages of a group sum to 0; equal
    rewards get equal advantages, a group of equal rewards exactly 0; ``k=1`` is :func:`rloo`; a constant added to all
    rewards changes nothing. There is no division by a standard deviation.

    ``scale="mean"``: ``A_i``; the group's mean of ``A_i grad log pi(y_i)`` estimates ``1/k`` of the gradient of
    ``E[max of k]``. ``scale="unbiased"``: ``k/n A_i``; the group's *sum* estimates that gradient without bias.

    ``1 <= k <= n - 1`` with n the number of kept samples in the group. In a smaller group, with
    ``small_groups="error"``, ``ValueError``, or nan where that depends on data that is not read (see the package);
    with ``"zero"``, advantage 0. Raises as the package says besides.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    arguments.choice("scale", scale, ("mean", "unbiased"))
    given = arguments.subset_size(k, given, small_groups, spare=1)
    return given.estimate("maxpo", k=k, scale=scale)


@register("order_statistic")
@spread_over_ranks
def order_statistic(
    rewards: Array,
    *,
    k: int,
    weights: Sequence[float],
    scale: Literal["mean", "unbiased"] = "mean",
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    small_groups: SmallGroups = "error",
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """Leave-one-out advantages for ``E[sum_j weights_j r_(j)]`` of k samples, sorted by reward; ``[G]`` to ``[G]``.

    ``weights``: k numbers, that of the lowest reward first. :func:`rank_weights` has the usual ones; ``0, ..., 0, 1``
    is :func:`maxpo`, ``1/k, ..., 1/k`` is ``1/k`` :func:`rloo`.

    ``A_i`` is the mean of the statistic over the subsets that contain i, minus the mean over those that do not. As for
    :func:`maxpo`: the advantages of a group sum to 0, equal rewards get equal advantages, a group of equal rewards
    exactly 0, and a constant added to all rewards changes nothing. With ``scale="mean"`` the group's mean of ``A_i grad
    log pi(y_i)`` estimates ``1/k`` of the gradient; with ``scale="unbiased"``, ``k/n A_i``, the group's *sum* is an
    unbiased estimate of it. Time and memory grow with G k.

    ``1 <= k <= n - 1``, as for :func:`maxpo`. Raises as the package says; ``TypeError`` if ``weights`` is not a
    sequence of numbers, ``ValueError`` if it does not have k finite ones.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    arguments.choice("scale", scale, ("mean", "unbiased"))
    given = arguments.subset_size(k, given, small_groups, spare=1)
    if type(weights).__module__ == "numpy" and hasattr(weights, "tolist"):
        weights = weights.tolist()
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(f"weights must be a sequence of {k} floats, got {type(weights).__name__}")
    if len(weights) != k:
        raise ValueError(f"weights must have k={k} entries, one per rank of a subset, got {len(weights)}")
    for weight in weights:
        _checks.finite("weights", weight)
    return given.estimate("order_statistic", k=k, weights=weights, scale=scale)


def rank_weights(
    statistic: Literal["max", "min", "median", "top", "bottom"], *, k: int, m: float | None = None
) -> list[float]:
    """The weights of a statistic of k samples for :func:`order_statistic`, that of the lowest sample first.

    ``"max"``, ``"min"``, ``"median"`` (the mean of the two middle ones for an even k); ``"top"`` and ``"bottom"``: the
    mean of the m highest or lowest, ``0 < m <= k``, where the last of them counts by its fraction if m is no integer.
    ``"bottom"`` with ``m = alpha * k`` is the conditional value at risk at level alpha of the k samples.
    Raises ``ValueError`` for an unknown statistic, for m outside its range, and for m given to another statistic.
    """
    arguments.choice("statistic", statistic, ("max", "min", "median", "top", "bottom"))
    _checks.whole_number("k", k, at_least=1)
    if (m is not None) != (statistic in ("top", "bottom")):
        raise ValueError(f"m is for 'top' and 'bottom', which need it; got m={m} for {statistic!r}")
    if m is not None:
        _checks.number("m", m)
        if not 0 < m <= k:
            raise ValueError(f"m must be > 0 and at most k={k}, got {m}")
    if statistic == "median":
        middle = ((k - 1) // 2, k // 2)
        return [middle.count(j) / 2 for j in range(k)]
    averaged = 1 if m is None else m
    from_the_end = [min(max(averaged - j, 0), 1) / averaged for j in range(k)]
    return from_the_end if statistic in ("min", "bottom") else from_the_end[::-1]


@register("pkpo")
@spread_over_ranks
def pkpo(
    rewards: Array,
    *,
    k: int,
    variant: Literal["s", "sloo", "sloo-1"] = "sloo-1",
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    small_groups: SmallGroups = "error",
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """PKPO (2505.15201): the *sum* over a group of ``s_i grad log pi(y_i)`` is an unbiased gradient of ``E[max of k]``.

    ``[G]`` to ``[G]``. With n the number of kept samples in the group, ``q_i`` the mean of the maximum over the subsets
    of size k that contain i, ``U_k(-i)`` over those that do not, ``EI_i`` the expected improvement of i over the best
    of k - 1 others:

    ==========  ===============================  ===============  ======================================
    variant     ``s_i``                          domain           baseline
    ==========  ===============================  ===============  ======================================
    ``s``       ``k/n q_i``                      ``1 <= k <= n``  none
    ``sloo``    ``k/n q_i - k/(n-1) U_k(-i)``    ``1 <= k < n``   leave-one-out
    ``sloo-1``  ``k/n EI_i``                     ``2 <= k <= n``  leave-one-out, subsets of size k - 1
    ==========  ===============================  ===============  ======================================

    Unlike those of :func:`maxpo` they do not sum to 0 over a group, and with ``s`` and ``sloo`` equal rewards do not
    give 0. Raises as the package says; for ``k`` outside its domain as :func:`maxpo`.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    arguments.choice("variant", variant, ("s", "sloo", "sloo-1"))
    at_least, spare = {"s": (1, 0), "sloo": (1, 1), "sloo-1": (2, 0)}[variant]
    given = arguments.subset_size(k, given, small_groups, at_least=at_least, spare=spare)
    return given.estimate("pkpo", k=k, variant=variant)


@register("passk")
@spread_over_ranks
def passk(
    rewards: Array,
    *,
    k: int,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    small_groups: SmallGroups = "error",
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """Pass@k training (2508.10751): the analytic advantage for rewards 0 (wrong) and 1 (right), ``[G]`` to ``[G]``.

    With n kept samples in the group, w of them wrong: ``R = 1 - C(w,k) / C(n,k)``, ``sigma = sqrt(R (1 - R))``; right
    samples get ``(1 - R) / sigma``, wrong ones ``(1 - R - C(w-1,k-1) / C(n-1,k-1)) / sigma``; 0 where ``sigma = 0``.
    It is :func:`maxpo` times ``(n - k) / (n sigma)``.
    Raises as the package says; ``ValueError`` for other rewards; for ``k`` outside ``1 <= k <= n`` as :func:`maxpo`.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    given = arguments.subset_size(k, given, small_groups)
    flat, counted = given.groups.rewards, given.groups.mask
    if arguments.unchecked("group_advantages", flat, counted):
        kept = flat if counted is None else flat[counted != 0]
        other = kept[(kept != 0) & (kept != 1)]
        if other.numel():
            raise ValueError(f"rewards must be 0 or 1 for passk, got {other[0].item()}")
    return given.estimate("passk", k=k)


@register("grpo_passk")
@spread_over_ranks
def grpo_passk(
    rewards: Array,
    *,
    std: bool = True,
    eps: float = 1e-6,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    small_groups: SmallGroups = "error",
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """Best of n (2503.19595): the best sample gets its lead over the second best, the others 0; ``[G]`` to ``[G]``.

    ``r_i`` minus the maximum of the others where that is positive: a tie at the top leaves everybody with 0. k is the
    size of the group. ``std=True``, verl's default for this name, divides by ``std + eps`` of the group.

    A group needs two samples; ``small_groups`` says what becomes of smaller ones, as for :func:`maxpo`. Not centred.
    Raises as the package says; ``ValueError`` for ``eps <= 0``.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    eps = arguments.positive("eps", eps)
    rule = "every group must have at least 2 samples"
    given = arguments.group_sizes(2, rule, given, small_groups)
    return given.estimate("grpo_passk", std=std, eps=eps)


@spread_over_ranks
def max_at_k(
    rewards: Array,
    *,
    k: int,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """The unbiased estimate of ``E[max of k]``, pass@k for rewards 0 and 1: a metric, not an advantage.

    The mean of the maximum over all subsets of k samples of a group; ``[G]`` to ``[G]``, every kept sample has the
    value of its group. Raises as the package says; for ``k`` outside ``1 <= k <= n`` as :func:`maxpo`.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    given = arguments.subset_size(k, given)
    return given.estimate("max_at_k", k=k)
