"""Advantages: how good was each sample, step or token?

*Groups.* Rewards ``[G]`` are compared within groups, given by exactly one of ``group_size`` (int: equal, contiguous
groups, such as the samples of one prompt) and ``group_ids`` (int32 or int64 ``[G]``: any sizes, any order, any labels).
``mask`` ``[G]``, 0 where a sample is left out: it gets advantage 0 and is not counted, its reward may be nan. A nan in
a kept reward stays within its group.

*dtypes.* Rewards may be floating-point, integer or bool. Results are float64 for float64 input and float32 otherwise,
computed in float64, and carry no gradient.

*Errors.* ``TypeError`` for wrong types and dtypes, ``ValueError`` for wrong shapes, devices and values. What depends on
data is checked on the CPU, elsewhere under ``FUSEDPO_DEBUG=1``.

*By name.* :func:`compute` calls an estimator by its registered name, :func:`register` adds one, :func:`available` lists
the names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch import Tensor

from . import _checks, backends
from .reference import advantages as reference
from .reference.advantages import GAE
from .reference.advantages.segments import group_labels

__all__ = [
    "GAE",
    "available",
    "compute",
    "dr_grpo",
    "gae",
    "grpo",
    "max_at_k",
    "maxpo",
    "opo",
    "passk",
    "pkpo",
    "register",
    "reinforce_plus_plus",
    "rloo",
    "vineppo",
    "whiten",
]

# -------------------------------------------------------------------------------------------------------------- by name

Estimator = TypeVar("Estimator", bound=Callable[..., Any])

_ESTIMATORS: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Estimator], Estimator]:
    """Decorator that makes an estimator available to :func:`compute` under ``name``; the function itself is returned.

    Raises ``TypeError`` if ``name`` is no string, ``ValueError`` if another function has that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str (use @register('name')), got {type(name).__name__}")

    def add(function: Estimator) -> Estimator:
        if _ESTIMATORS.setdefault(name, function) is not function:
            raise ValueError(
                f"name {name!r} is taken by {_ESTIMATORS[name]!r}; register {function!r} under another one"
            )
        return function

    return add


def compute(name: str, rewards_or_values: Tensor, /, **kwargs: Any) -> Any:
    """Calls the estimator registered under ``name``: ``compute("maxpo", rewards, group_size=16, k=4)``.

    Returns what the estimator returns. Raises ``ValueError`` for an unknown name.
    """
    if name not in _ESTIMATORS:
        raise ValueError(f"name must be one of {', '.join(available())}; got {name!r}")
    return _ESTIMATORS[name](rewards_or_values, **kwargs)


def available() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_ESTIMATORS))


# --------------------------------------------------------------------------------------------------------------- checks


def _check_real(name: str, tensor: Tensor) -> None:
    _checks.is_tensor(name, tensor)
    if tensor.is_complex():
        raise TypeError(f"{name} must be bool, integer or floating-point, got {tensor.dtype}")


def _check_integer(name: str, value: int, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_rewards(rewards: Tensor, mask: Tensor | None) -> None:
    _check_real("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [G], one per sample, got {list(rewards.shape)}")
    _checks.mask(mask, tuple(rewards.shape), "one per sample", "rewards", rewards)


def _check_groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None, mask: Tensor | None) -> None:
    _check_rewards(rewards, mask)
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            f"exactly one of group_size and group_ids is needed, got {'neither' if group_ids is None else 'both'}"
        )
    if group_ids is not None:
        _checks.integer("group_ids", group_ids)
        _checks.shape("group_ids", group_ids, tuple(rewards.shape), "one per sample")
        _checks.same_device("group_ids", group_ids, "rewards", rewards)
    elif group_size is not None:
        _check_integer("group_size", group_size, at_least=1)
        if rewards.numel() % group_size:
            raise ValueError(
                f"group_size must divide the number of rewards, got {group_size} for {rewards.numel()} rewards"
            )


def _check_k(
    k: int, spare: int, rewards: Tensor, group_size: int | None, group_ids: Tensor | None, mask: Tensor | None
) -> None:
    """Every group with a kept sample has at least ``k + spare`` of them."""
    limit = f"the size of the group{f' - {spare}' if spare else ''}"
    if group_size is not None and mask is None:
        if group_size < k + spare:
            raise ValueError(f"k must be at most {limit}, got k={k} and group_size={group_size}")
    elif _checks.values_are_free(*(t for t in (rewards, group_ids, mask) if t is not None)):
        ids = group_labels(rewards, group_size, group_ids)
        labels, sizes = (ids if mask is None else ids[mask != 0]).unique(return_counts=True)
        small = (sizes < k + spare).nonzero()
        if small.numel():
            group, size = int(labels[small[0]]), int(sizes[small[0]])
            raise ValueError(f"k must be at most {limit}, got k={k}, but group {group} has size {size}")


def _check_unit_interval(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _check_tokens(name: str, tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    _check_real(name, tokens)
    if cu_seqlens is None and tokens.dim() not in (1, 2):
        raise ValueError(f"{name} must have shape [B, T] or [T], got {list(tokens.shape)}")
    if cu_seqlens is not None:
        if tokens.dim() != 1 and (tokens.dim() != 2 or tokens.shape[0] != 1):
            raise ValueError(f"{name} must have shape [T] or [1, T] with cu_seqlens, got {list(tokens.shape)}")
        _checks.cu_seqlens(cu_seqlens, tokens.shape[-1], name, tokens)
    _checks.mask(mask, tuple(tokens.shape), f"that of {name}", name, tokens)


# -------------------------------------------------------------------------------------------------- baseline of a group


@register("grpo")
def grpo(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    std: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """GRPO (2402.03300): ``(r - mean) / (std + eps)`` of the group, ``[G]`` to ``[G]``; std is the unbiased one.

    ``std=False``: no division. Equal rewards, and so a group of one, give exactly 0 (for a group of one, verl returns
    its reward). Raises as the module says; ``ValueError`` for ``eps <= 0``.
    """
    _check_groups(rewards, group_size, group_ids, mask)
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.grpo(rewards, group_size=group_size, group_ids=group_ids, std=std, eps=eps, mask=mask)


@register("dr_grpo")
def dr_grpo(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Dr. GRPO (2503.20783): ``r - mean`` of the group, ``[G]`` to ``[G]``; equal rewards give exactly 0."""
    _check_groups(rewards, group_size, group_ids, mask)
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.dr_grpo(rewards, group_size=group_size, group_ids=group_ids, mask=mask)


@register("rloo")
def rloo(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """RLOO (2402.14740): ``r`` minus the mean of the others in the group, ``[G]`` to ``[G]``.

    Equal rewards give exactly 0; so does a group of one, which has no others.
    """
    _check_groups(rewards, group_size, group_ids, mask)
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.rloo(rewards, group_size=group_size, group_ids=group_ids, mask=mask)


@register("opo")
def opo(
    rewards: Tensor,
    *,
    lengths: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scope: Literal["group", "batch"] = "group",
    mask: Tensor | None = None,
) -> Tensor:
    """OPO (2505.23585): ``r - sum(len r) / sum(len)``, the baseline of least variance if gradients grow with length.

    ``[G]`` to ``[G]``. ``lengths`` ``[G]``, >= 0: number of response tokens of each sample. A sample without tokens has
    no weight in the baseline; a group without tokens has advantage 0. A group of one is its own baseline: 0, as in the
    authors' code (verl returns its reward). ``scope="batch"``: one baseline for the whole batch, no groups.
    Raises as the module says; ``ValueError`` for negative lengths, and for groups given with ``scope="batch"``.
    """
    _check_choice("scope", scope, ("group", "batch"))
    if scope == "group":
        _check_groups(rewards, group_size, group_ids, mask)
    else:
        _check_rewards(rewards, mask)
        if group_size is not None or group_ids is not None:
            raise ValueError("scope='batch' has one baseline for all samples: group_size and group_ids must be None")
    _check_real("lengths", lengths)
    _checks.shape("lengths", lengths, tuple(rewards.shape), "one per sample")
    _checks.same_device("lengths", lengths, "rewards", rewards)
    if _checks.values_are_free(*(t for t in (lengths, mask) if t is not None)):
        kept = lengths if mask is None else lengths[mask != 0]
        if not bool((kept >= 0).all()):
            raise ValueError(f"lengths must be >= 0, got {kept.min()}")
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.opo(rewards, lengths=lengths, group_size=group_size, group_ids=group_ids, scope=scope, mask=mask)


# ------------------------------------------------------------------------------------------------------------ best of k


@register("maxpo")
def maxpo(
    rewards: Tensor,
    *,
    k: int,
    scale: Literal["mean", "unbiased"] = "mean",
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """MaxPO (2606.06080): leave-two-out advantages for the expected maximum over k samples; ``[G]`` to ``[G]``.

    ``A_i = EI_i - b_i``: the expected improvement of sample i over the best of k - 1 others of its group, minus the
    mean of the same over the other samples, taken in the group without i. It equals the mean of the maximum over the
    subsets of size k that contain i, minus the mean over those that do not. The advantages of a group sum to 0; equal
    rewards get equal advantages, a group of equal rewards exactly 0; ``k=1`` is :func:`rloo`; a constant added to all
    rewards changes nothing. There is no division by a standard deviation.

    ``scale="mean"``: ``A_i``; the group's mean of ``A_i grad log pi(y_i)`` estimates ``1/k`` of the gradient of
    ``E[max of k]``. ``scale="unbiased"``: ``k/n A_i``; the group's *sum* estimates that gradient without bias.

    ``1 <= k <= n - 1`` with n the number of kept samples in the group, ``ValueError`` otherwise. Where that depends on
    data that is not read (see the module), the group's advantages are nan. Raises as the module says besides.
    """
    _check_groups(rewards, group_size, group_ids, mask)
    _check_integer("k", k, at_least=1)
    _check_choice("scale", scale, ("mean", "unbiased"))
    _check_k(k, 1, rewards, group_size, group_ids, mask)
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.maxpo(rewards, k=k, scale=scale, group_size=group_size, group_ids=group_ids, mask=mask)


@register("pkpo")
def pkpo(
    rewards: Tensor,
    *,
    k: int,
    variant: Literal["s", "sloo", "sloo-1"] = "sloo-1",
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
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
    give 0. Raises as the module says; for ``k`` outside its domain as :func:`maxpo`.
    """
    _check_groups(rewards, group_size, group_ids, mask)
    _check_choice("variant", variant, ("s", "sloo", "sloo-1"))
    _check_integer("k", k, at_least=2 if variant == "sloo-1" else 1)
    _check_k(k, 1 if variant == "sloo" else 0, rewards, group_size, group_ids, mask)
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.pkpo(rewards, k=k, variant=variant, group_size=group_size, group_ids=group_ids, mask=mask)


@register("passk")
def passk(
    rewards: Tensor,
    *,
    k: int,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Pass@k training (2508.10751): the analytic advantage for rewards 0 (wrong) and 1 (right), ``[G]`` to ``[G]``.

    With n kept samples in the group, w of them wrong: ``R = 1 - C(w,k) / C(n,k)``, ``sigma = sqrt(R (1 - R))``; right
    samples get ``(1 - R) / sigma``, wrong ones ``(1 - R - C(w-1,k-1) / C(n-1,k-1)) / sigma``; 0 where ``sigma = 0``.
    It is :func:`maxpo` times ``(n - k) / (n sigma)``.
    Raises as the module says; ``ValueError`` for other rewards; for ``k`` outside ``1 <= k <= n`` as :func:`maxpo`.
    """
    _check_groups(rewards, group_size, group_ids, mask)
    _check_integer("k", k, at_least=1)
    _check_k(k, 0, rewards, group_size, group_ids, mask)
    if _checks.values_are_free(*(t for t in (rewards, mask) if t is not None)):
        kept = rewards if mask is None else rewards[mask != 0]
        other = kept[(kept != 0) & (kept != 1)]
        if other.numel():
            raise ValueError(f"rewards must be 0 or 1 for passk, got {other[0].item()}")
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.passk(rewards, k=k, group_size=group_size, group_ids=group_ids, mask=mask)


def max_at_k(
    rewards: Tensor,
    *,
    k: int,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The unbiased estimate of ``E[max of k]``, pass@k for rewards 0 and 1: a metric, not an advantage.

    The mean of the maximum over all subsets of k samples of a group; ``[G]`` to ``[G]``, every kept sample has the
    value of its group. Raises as the module says; for ``k`` outside ``1 <= k <= n`` as :func:`maxpo`.
    """
    _check_groups(rewards, group_size, group_ids, mask)
    _check_integer("k", k, at_least=1)
    _check_k(k, 0, rewards, group_size, group_ids, mask)
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.max_at_k(rewards, k=k, group_size=group_size, group_ids=group_ids, mask=mask)


# ----------------------------------------------------------------------------------------------------- steps and tokens


@register("gae")
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float,
    lam: float,
) -> GAE:
    """GAE (1506.02438): ``A_t = delta_t + gamma lam A_{t+1}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``.

    ``rewards``, ``values``, ``mask``: ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; ``[T]`` without
    is one sequence. Tokens with mask 0 are skipped: t + 1 is the next kept token of the sequence. They get 0; their
    rewards and values may be nan. A and V are 0 after the end of a sequence: a truncated one is not bootstrapped.

    Returns ``GAE(advantages, returns)``, ``returns = advantages + values``; apply :func:`whiten` to the advantages for
    verl's. Raises as the module says; ``ValueError`` for ``gamma`` or ``lam`` outside [0, 1].
    """
    _check_tokens("rewards", rewards, mask, cu_seqlens)
    _checks.floating("values", values)
    _checks.shape("values", values, tuple(rewards.shape), "that of rewards")
    _checks.same_device("values", values, "rewards", rewards)
    _check_unit_interval("gamma", gamma)
    _check_unit_interval("lam", lam)
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.gae(rewards, values, mask=mask, cu_seqlens=cu_seqlens, gamma=gamma, lam=lam)


@register("reinforce_plus_plus")
def reinforce_plus_plus(
    rewards: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    """REINFORCE++ (2501.03262): the discounted reward-to-go of each token, whitened over all kept tokens of the batch.

    Shapes and mask as in :func:`gae`. Raises as the module says; ``ValueError`` for ``gamma`` outside [0, 1].
    """
    _check_tokens("rewards", rewards, mask, cu_seqlens)
    _check_unit_interval("gamma", gamma)
    backends.choose("advantages", rewards.device.type, rewards.dtype)
    return reference.reinforce_plus_plus(rewards, mask=mask, cu_seqlens=cu_seqlens, gamma=gamma)


@register("vineppo")
def vineppo(values: Tensor, *, step_rewards: Tensor, step_ids: Tensor, whiten: bool = False) -> Tensor:
    """VinePPO (2410.01679): each token of reasoning step s gets ``A_s = r_s + V_{s+1} - V_s``; ``[B, T]``.

    ``values`` ``[B, S + 1]``, floating-point: estimates at the query and after each step; the last is the terminal
    value, 0 for a response that has ended. nan is a missing estimate: ``V_s = r_s + V_{s+1}``, hence ``A_s = 0``; a
    missing terminal value is 0. ``step_rewards`` ``[B, S]``, the outcome on the last step as a rule. A row with fewer
    than S steps is padded with values nan and rewards 0. ``step_ids`` ``[B, T]``, int32 or int64: the step of each
    token, negative for none (advantage 0).

    Per row ``sum_s A_s = sum_s r_s + V_S - V_0``. ``whiten=True`` applies :func:`whiten` to the tokens that have a
    step, as the authors do. Raises as the module says; ``ValueError`` for step ids of S or more.
    """
    _checks.floating("values", values)
    if values.dim() != 2 or values.shape[1] < 1:
        raise ValueError(f"values must have shape [B, S + 1], got {list(values.shape)}")
    batch, steps = values.shape[0], values.shape[1] - 1
    _check_real("step_rewards", step_rewards)
    _checks.shape("step_rewards", step_rewards, (batch, steps), "one less per row than values")
    _checks.same_device("step_rewards", step_rewards, "values", values)
    _checks.integer("step_ids", step_ids)
    if step_ids.dim() != 2 or step_ids.shape[0] != batch:
        raise ValueError(f"step_ids must have shape [{batch}, T] (as many rows as values), got {list(step_ids.shape)}")
    _checks.same_device("step_ids", step_ids, "values", values)
    if _checks.values_are_free(step_ids) and bool((step_ids >= steps).any()):
        raise ValueError(f"step_ids must be less than the number of steps {steps}, got {int(step_ids.max())}")
    backends.choose("advantages", values.device.type, values.dtype)
    return reference.vineppo(values, step_rewards=step_rewards, step_ids=step_ids, whiten=whiten)


def whiten(advantages: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``(a - mean) / sqrt(var + 1e-8)`` over all kept elements, of any shape, with the unbiased variance; 0 elsewhere.

    As verl's ``masked_whiten``, but a single kept element gives 0, not an error. Raises as the module says.
    """
    _check_real("advantages", advantages)
    _checks.mask(mask, tuple(advantages.shape), "that of advantages", "advantages", advantages)
    backends.choose("advantages", advantages.device.type, advantages.dtype)
    return reference.whiten(advantages, mask=mask)
