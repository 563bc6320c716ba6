"""The operators behind :mod:`fusedpo.advantages`, and the estimators as calls of them.

::

    group_advantages(rewards, ids?, order?, group_size, other?, mask?, estimator, k, unbiased, number, wide)
        -> advantages
    token_advantages(rewards, values?, logprobs?, old_logprobs?, mask?, cu_seqlens?, per_sequence?,
                     estimator, gamma, lam, rho_bar, c_bar, wide) -> advantages, returns
    step_advantages(values, step_rewards, step_ids, wide) -> advantages
    whiten(x, lengths?, mask?, wide) -> whitened

Tensors that are not said to hold integers may have any real dtype, masks too. Everything is computed in float64, in
float32 on devices that have no float64; results are float64 if ``wide``, else float32.

* ``group_advantages``: ``rewards`` ``[G]``. Groups are ``group_size`` samples in a row; or, where ``ids`` ``[G]`` of
  int32 or int64 are given, runs of equal ids, and ``order`` ``[G]`` of int64 says which sample stands where. ``other``:
  for OPO lengths ``[G]``, for ReMax baselines ``[P]``, for an order statistic weights ``[k]``. ``unbiased`` and
  ``number`` are explained in ``GroupParams`` in ``csrc/core/group_advantages.h``.
* ``token_advantages``: ``[B, T]``, ``[T]``, or packed with ``cu_seqlens`` ``[S + 1]``; ``per_sequence`` ``[S]`` is what
  follows the end of a sequence, or the advantage that all its tokens get. ``returns`` are ``[0]`` without ``values``.
* ``step_advantages``: ``[B, S + 1]``, ``[B, S]``, and ``[B, T]`` int32 or int64.
* ``whiten``: any shape; an element counts ``lengths`` times, and not where ``mask`` is 0.

Values outside their domain are a ``ValueError`` on the CPU, and on a GPU a nan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _dtypes, backends, reference
from ..reference.advantages import GAE, VTrace
from ..reference.advantages.segments import result_dtype
from . import define


class Needs(NamedTuple):
    """What an estimator of ``group_advantages`` needs."""

    ranks: bool = False  # the ranks of the samples, and k
    spare: int = 0  # so many more kept samples than k in a group
    other: Literal["sample", "label", "rank"] | None = None  # what ``other`` has a number for


# An estimator's number is its place here; the names and numbers in csrc/core/{group,token}_advantages.h are the same.
GROUP_ESTIMATORS = {
    "raft": Needs(),
    "remax": Needs(other="label"),
    "reinforce_rej": Needs(),
    "dr_grpo": Needs(),
    "grpo": Needs(),
    "rloo": Needs(),
    "opo": Needs(other="sample"),
    "gpg": Needs(),
    "lead": Needs(),
    "normalised_lead": Needs(),
    "maxpo": Needs(ranks=True, spare=1),
    "pkpo s": Needs(ranks=True),
    "pkpo sloo": Needs(ranks=True, spare=1),
    "pkpo sloo-1": Needs(ranks=True),
    "passk": Needs(ranks=True),
    "max_at_k": Needs(ranks=True),
    "order_statistic": Needs(ranks=True, spare=1, other="rank"),
}
ESTIMATORS = tuple(GROUP_ESTIMATORS)
TOKEN_ESTIMATORS = ("to_tokens", "reward_to_go", "gae", "vtrace")

_CHUNK = 256  # samples that share a thread block where there are no groups


def _dtype(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


def _like(x: Tensor, wide: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=_dtype(wide))


define(
    "group_advantages",
    "(Tensor rewards, Tensor? ids, Tensor? order, SymInt group_size, Tensor? other, Tensor? mask, int estimator, "
    "SymInt k, bool unbiased, float number, bool wide) -> Tensor",
    lambda rewards, *args: _like(rewards, args[-1]),
)
define(
    "token_advantages",
    "(Tensor rewards, Tensor? values, Tensor? logprobs, Tensor? old_logprobs, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? per_sequence, int estimator, float gamma, float lam, float rho_bar, float c_bar, bool wide) "
    "-> (Tensor advantages, Tensor returns)",
    lambda rewards, values, *args: (
        _like(rewards, args[-1]),
        rewards.new_empty(0, dtype=_dtype(args[-1])) if values is None else _like(rewards, args[-1]),
    ),
)
define(
    "step_advantages",
    "(Tensor values, Tensor step_rewards, Tensor step_ids, bool wide) -> Tensor",
    lambda values, step_rewards, step_ids, wide: _like(step_ids, wide),
)
define(
    "whiten",
    "(Tensor x, Tensor? lengths, Tensor? mask, bool wide) -> Tensor",
    lambda x, lengths, mask, wide: _like(x, wide),
)


def _wide(*tensors: Tensor) -> bool:
    return result_dtype(*tensors) == torch.float64


def _as_computed(x: Tensor) -> bool:
    """``wide`` for a result that another operator takes: nothing is rounded in between."""
    return x.device.type in ("cpu", "cuda") or _dtypes.wide(x) == torch.float64  # asking these takes an operator


@torch.no_grad()
def _call(operator: str, backend: str, *args: Any) -> Any:
    return getattr(getattr(torch.ops.fusedpo, operator), backend)(*args)


# ----------------------------------------------------------------------------------------------------------- groups


class Groups(NamedTuple):
    """Samples and which are compared: ``group_size`` in a row, or those of equal ``group_ids``, that the mask keeps."""

    rewards: Tensor
    group_size: int | None = None
    group_ids: Tensor | None = None
    mask: Tensor | None = None


class _Call(NamedTuple):
    """What an estimator is for ``group_advantages``."""

    estimator: str
    other: Tensor | None = None
    k: int = 0
    unbiased: bool = False
    number: float = 0.0
    group_size: int | None = None  # in place of that of the groups


def _on_device(weights: Sequence[float], rewards: Tensor) -> Tensor:
    # Asynchronous: a blocking copy would be a host sync.
    w = torch.tensor([float(w) for w in weights], dtype=_dtype(_as_computed(rewards)), device="cpu")
    return w.to(rewards.device, non_blocking=True)


# The functions of the reference for groups. Without them, ``remax`` has a baseline per sample: groups of one.
_GROUP_CALLS: dict[str, Callable[..., _Call]] = {
    "grpo": lambda _, std, eps: _Call("grpo" if std else "dr_grpo", number=eps),
    "dr_grpo": lambda _: _Call("dr_grpo"),
    "rloo": lambda _: _Call("rloo"),
    "opo": lambda rewards, lengths, scope: _Call(
        "opo", lengths, group_size=max(1, rewards.numel()) if scope == "batch" else None
    ),
    "reinforce_rej": lambda _: _Call("reinforce_rej"),
    "raft": lambda _: _Call("raft", group_size=_CHUNK),
    "gpg": lambda _, f_norm: _Call("gpg", number=f_norm),
    "remax": lambda _, baselines: _Call("remax", baselines),
    "reinforce_plus_plus_baseline": lambda _, lengths: _Call("dr_grpo"),
    "maxpo": lambda _, k, scale: _Call("maxpo", k=k, unbiased=scale == "unbiased"),
    "order_statistic": lambda rewards, k, weights, scale: _Call(
        "order_statistic", _on_device(weights, rewards), k=k, unbiased=scale == "unbiased"
    ),
    "pkpo": lambda _, k, variant: _Call(f"pkpo {variant}", k=k),
    "passk": lambda _, k: _Call("passk", k=k),
    "grpo_passk": lambda _, std, eps: _Call("normalised_lead" if std else "lead", number=eps),
    "max_at_k": lambda _, k: _Call("max_at_k", k=k),
}


def estimate_by_kernels(backend: str, name: str, groups: Groups, **numbers: Any) -> Tensor:
    """One operator; ``torch.sort`` before it where groups are given by ids, ``whiten`` after it where that is asked."""
    rewards, call = groups.rewards, _GROUP_CALLS[name](groups.rewards, **numbers)
    group_size = groups.group_size if call.group_size is None else call.group_size
    ids, order, wide = groups.group_ids, None, _wide(rewards)
    whitens = name == "reinforce_plus_plus_baseline"
    if name == "remax":  # ids say which baseline
        wide = _wide(rewards, numbers["baselines"])
    elif ids is not None:
        ids, order = ids.sort(stable=True)
    advantages: Tensor = _call(
        "group_advantages",
        backend,
        rewards,
        ids,
        order,
        1 if group_size is None else _checks.plain(group_size),
        call.other,
        groups.mask,
        ESTIMATORS.index(call.estimator),
        _checks.plain(call.k),
        call.unbiased,
        float(call.number),
        _as_computed(rewards) if whitens else wide,
    )
    if not whitens:
        return advantages
    whitened: Tensor = _call("whiten", backend, advantages, numbers["lengths"], groups.mask, wide)
    return whitened


def estimate(name: str, groups: Groups, **numbers: Any) -> Tensor:
    """A function of the reference for groups, by what is chosen for the device: the reference, or kernels."""
    backend = backends.choose("group_advantages", groups.rewards.device.type)
    if backend != "reference":
        return estimate_by_kernels(backend, name, groups, **numbers)
    given = {field: x for field, x in zip(Groups._fields, groups, strict=True) if x is not None}
    advantages: Tensor = getattr(reference.advantages, name)(**given, **numbers)
    return advantages


# ----------------------------------------------------------------------------------------------------------- tokens


def _tokens(
    backend: str,
    estimator: str,
    rewards: Tensor,
    *,
    values: Tensor | None = None,
    logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    wide: bool | None = None,
) -> tuple[Tensor, Tensor]:
    tensors = (rewards, values, logprobs, old_logprobs, mask, cu_seqlens, bootstrap)
    numbers = (float(x) for x in (gamma, lam, rho_bar, c_bar))
    if wide is None:
        wide = _wide(rewards) if values is None else _wide(rewards, values)
    result: tuple[Tensor, Tensor] = _call(
        "token_advantages", backend, *tensors, TOKEN_ESTIMATORS.index(estimator), *numbers, wide
    )
    return result


def _to_tokens(backend: str, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    wide = _wide(advantages)
    return _tokens(backend, "to_tokens", mask, mask=mask, cu_seqlens=cu_seqlens, bootstrap=advantages, wide=wide)[0]


def _reinforce_plus_plus(backend: str, rewards: Tensor, mask: Tensor | None, **options: Any) -> Any:
    to_go, _ = _tokens(backend, "reward_to_go", rewards, mask=mask, wide=_as_computed(rewards), **options)
    return _call("whiten", backend, to_go, None, mask, _wide(rewards))


def _vineppo(backend: str, values: Tensor, step_rewards: Tensor, step_ids: Tensor, whiten: bool) -> Any:
    wide = _wide(values, step_rewards)
    in_between = _as_computed(values) if whiten else wide
    tokens = _call("step_advantages", backend, values, step_rewards, step_ids, in_between)
    return _call("whiten", backend, tokens, None, step_ids >= 0, wide) if whiten else tokens


def _whiten(backend: str, advantages: Tensor, mask: Tensor | None) -> Any:
    return _call("whiten", backend, advantages, None, mask, _wide(advantages))


# The functions of the reference for tokens: the operator that they need, and what they are by kernels.
_TOKEN_CALLS: dict[str, tuple[str, Callable[..., Any]]] = {
    "to_tokens": ("token_advantages", _to_tokens),
    "reward_to_go": ("token_advantages", lambda backend, x, **a: _tokens(backend, "reward_to_go", x, **a)[0]),
    "gae": ("token_advantages", lambda backend, x, **a: GAE(*_tokens(backend, "gae", x, **a))),
    "vtrace": ("token_advantages", lambda backend, x, **a: VTrace(*_tokens(backend, "vtrace", x, **a))),
    "reinforce_plus_plus": ("token_advantages", _reinforce_plus_plus),
    "vineppo": ("step_advantages", _vineppo),
    "whiten": ("whiten", _whiten),
}


def estimate_tokens_by_kernels(backend: str, name: str, x: Tensor, **arguments: Any) -> Any:
    return _TOKEN_CALLS[name][1](backend, x, **arguments)


def estimate_tokens(name: str, x: Tensor, **arguments: Any) -> Any:
    """A function of the reference whose first argument is ``x``, by what is chosen for the device of ``x``."""
    backend = backends.choose(_TOKEN_CALLS[name][0], x.device.type)
    if backend != "reference":
        return estimate_tokens_by_kernels(backend, name, x, **arguments)
    return getattr(reference.advantages, name)(x, **arguments)
