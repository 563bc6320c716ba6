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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dtypes, backends, reference
from .ops import define
from .reference.advantages import GAE, VTrace
from .reference.advantages.segments import result_dtype

# The numbers of the enumerations in csrc/core/{group,token}_advantages.h.
ESTIMATORS = (
    "raft",
    "remax",
    "reinforce_rej",
    "dr_grpo",
    "grpo",
    "rloo",
    "opo",
    "gpg",
    "lead",
    "normalised_lead",
    "maxpo",
    "pkpo s",
    "pkpo sloo",
    "pkpo sloo-1",
    "passk",
    "max_at_k",
    "order_statistic",
)
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


class Kernels:
    """The functions of :mod:`fusedpo.reference.advantages`, by the operators of one backend.

    One call of an operator per estimator; ``torch.sort`` before it where groups are given by ids, :meth:`whiten` after
    it where the estimator whitens.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend

    @torch.no_grad()
    def _call(self, operator: str, *args: Any) -> Any:
        return getattr(getattr(torch.ops.fusedpo, operator), self._backend)(*args)

    # ------------------------------------------------------------------------------------------------------- groups

    def _groups(
        self,
        estimator: str,
        rewards: Tensor,
        group_size: int | None,
        group_ids: Tensor | None,
        mask: Tensor | None,
        *,
        other: Tensor | None = None,
        k: int = 0,
        scale: str = "mean",
        number: float = 0.0,
        wide: bool = False,
        sort: bool = True,
    ) -> Tensor:
        ids, order = group_ids, None
        if group_ids is not None and sort:
            ids, order = group_ids.sort(stable=True)
        return self._call(
            "group_advantages",
            rewards,
            ids,
            order,
            1 if group_size is None else _checks.plain(group_size),
            other,
            mask,
            ESTIMATORS.index(estimator),
            _checks.plain(k),
            scale == "unbiased",
            float(number),
            wide or rewards.dtype == torch.float64,
        )

    def grpo(
        self,
        rewards: Tensor,
        *,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        std: bool = True,
        eps: float = 1e-6,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("grpo" if std else "dr_grpo", rewards, group_size, group_ids, mask, number=eps)

    def dr_grpo(
        self,
        rewards: Tensor,
        *,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("dr_grpo", rewards, group_size, group_ids, mask)

    def rloo(
        self,
        rewards: Tensor,
        *,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("rloo", rewards, group_size, group_ids, mask)

    def opo(
        self,
        rewards: Tensor,
        *,
        lengths: Tensor,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        scope: str = "group",
        mask: Tensor | None = None,
    ) -> Tensor:
        if scope == "batch":
            group_size = max(1, rewards.numel())
        return self._groups("opo", rewards, group_size, group_ids, mask, other=lengths)

    def reinforce_rej(
        self,
        rewards: Tensor,
        *,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("reinforce_rej", rewards, group_size, group_ids, mask)

    def raft(self, rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self._groups("raft", rewards, _CHUNK, None, mask)

    def gpg(
        self,
        rewards: Tensor,
        *,
        f_norm: float = 1.0,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("gpg", rewards, group_size, group_ids, mask, number=f_norm)

    def remax(
        self,
        rewards: Tensor,
        *,
        baselines: Tensor,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        # Without groups there is a baseline per sample: groups of one.
        wide = _wide(rewards, baselines)
        return self._groups("remax", rewards, group_size, group_ids, mask, other=baselines, wide=wide, sort=False)

    def reinforce_plus_plus_baseline(
        self,
        rewards: Tensor,
        *,
        lengths: Tensor,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        centred = self._groups("dr_grpo", rewards, group_size, group_ids, mask, wide=_as_computed(rewards))
        return self._call("whiten", centred, lengths, mask, _wide(rewards))

    def maxpo(
        self,
        rewards: Tensor,
        *,
        k: int,
        scale: str = "mean",
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("maxpo", rewards, group_size, group_ids, mask, k=k, scale=scale)

    def order_statistic(
        self,
        rewards: Tensor,
        *,
        k: int,
        weights: Sequence[float],
        scale: str = "mean",
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        # Asynchronous: a blocking copy would be a host sync.
        w = torch.tensor([float(w) for w in weights], dtype=_dtype(_as_computed(rewards)), device="cpu")
        w = w.to(rewards.device, non_blocking=True)
        return self._groups("order_statistic", rewards, group_size, group_ids, mask, other=w, k=k, scale=scale)

    def pkpo(
        self,
        rewards: Tensor,
        *,
        k: int,
        variant: str = "sloo-1",
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups(f"pkpo {variant}", rewards, group_size, group_ids, mask, k=k)

    def passk(
        self,
        rewards: Tensor,
        *,
        k: int,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("passk", rewards, group_size, group_ids, mask, k=k)

    def grpo_passk(
        self,
        rewards: Tensor,
        *,
        std: bool = True,
        eps: float = 1e-6,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("normalised_lead" if std else "lead", rewards, group_size, group_ids, mask, number=eps)

    def max_at_k(
        self,
        rewards: Tensor,
        *,
        k: int,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self._groups("max_at_k", rewards, group_size, group_ids, mask, k=k)

    # ------------------------------------------------------------------------------------------------------- tokens

    def _tokens(
        self,
        estimator: str,
        rewards: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        per_sequence: Tensor | None,
        *,
        logprobs: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        gamma: float = 1.0,
        lam: float = 1.0,
        rho_bar: float = 1.0,
        c_bar: float = 1.0,
        wide: bool,
    ) -> tuple[Tensor, Tensor]:
        numbers = (float(x) for x in (gamma, lam, rho_bar, c_bar))
        tensors = (rewards, values, logprobs, old_logprobs, mask, cu_seqlens, per_sequence)
        return self._call("token_advantages", *tensors, TOKEN_ESTIMATORS.index(estimator), *numbers, wide)

    def to_tokens(self, advantages: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return self._tokens("to_tokens", mask, None, mask, cu_seqlens, advantages, wide=_wide(advantages))[0]

    def reward_to_go(
        self,
        rewards: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        gamma: float = 1.0,
        bootstrap: Tensor | None = None,
    ) -> Tensor:
        wide = _wide(rewards)
        return self._tokens("reward_to_go", rewards, None, mask, cu_seqlens, bootstrap, gamma=gamma, wide=wide)[0]

    def gae(
        self,
        rewards: Tensor,
        values: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        gamma: float,
        lam: float,
        bootstrap: Tensor | None = None,
    ) -> GAE:
        wide = _wide(rewards, values)
        return GAE(*self._tokens("gae", rewards, values, mask, cu_seqlens, bootstrap, gamma=gamma, lam=lam, wide=wide))

    def vtrace(
        self,
        rewards: Tensor,
        values: Tensor,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        gamma: float,
        lam: float = 1.0,
        rho_bar: float = 1.0,
        c_bar: float = 1.0,
        bootstrap: Tensor | None = None,
    ) -> VTrace:
        return VTrace(
            *self._tokens(
                "vtrace",
                rewards,
                values,
                mask,
                cu_seqlens,
                bootstrap,
                logprobs=logprobs,
                old_logprobs=old_logprobs,
                gamma=gamma,
                lam=lam,
                rho_bar=rho_bar,
                c_bar=c_bar,
                wide=_wide(rewards, values),
            )
        )

    def reinforce_plus_plus(
        self, rewards: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, gamma: float = 1.0
    ) -> Tensor:
        wide = _as_computed(rewards)
        to_go, _ = self._tokens("reward_to_go", rewards, None, mask, cu_seqlens, None, gamma=gamma, wide=wide)
        return self._call("whiten", to_go, None, mask, _wide(rewards))

    def vineppo(self, values: Tensor, *, step_rewards: Tensor, step_ids: Tensor, whiten: bool = False) -> Tensor:
        wide = _wide(values, step_rewards)
        tokens = self._call("step_advantages", values, step_rewards, step_ids, _as_computed(values) if whiten else wide)
        return self._call("whiten", tokens, None, step_ids >= 0, wide) if whiten else tokens

    def whiten(self, advantages: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self._call("whiten", advantages, None, mask, _wide(advantages))


_KERNELS = {"native": Kernels("native"), "triton": Kernels("triton")}


def implementation(operator: str, tensor: Tensor) -> Any:
    """What has the functions of the reference, for a tensor of this device: the reference, or kernels."""
    backend = backends.choose(operator, tensor.device.type)
    return reference.advantages if backend == "reference" else _KERNELS[backend]
