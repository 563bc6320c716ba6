"""What a policy loss is made of: orthogonal parts, and the named combinations of them.

An :class:`Objective` says how one token's log-prob should move. Its parts are independent, so a new algorithm is a new
combination. Notation of the formulas: ``lp`` current log-prob, ``olp`` old one, ``A`` advantage, ``sg`` stop-gradient,
``x = clamp(lp - olp, -20, 20)``, ``rho = exp(x)``, ``F`` the trace (1 without one), ``M`` a mask of 0 and 1. Losses are
minimised.

An :class:`Objective` can be built inside a function that ``torch.compile`` traces, where a value that is formatted
before an error needs it would break the graph.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, ParamSpec, cast, get_args

import torch

from . import _checks, _names
from .preference_objectives import Preference, cpo, dpo, ipo, kto, orpo, rebel, robust_dpo, simpo, slic

__all__ = [
    "CISPO",
    "CPPO",
    "DRO",
    "GMPO",
    "KL",
    "PRESETS",
    "SAPO",
    "VESPO",
    "Aggregation",
    "BinaryKL",
    "BinaryTV",
    "ForwardTrace",
    "LogClip",
    "NoTrustRegion",
    "Objective",
    "OnPolicy",
    "PPOClip",
    "Preference",
    "Ratio",
    "SequenceRatio",
    "TokenRatio",
    "Trace",
    "TrustRegion",
    "available",
    "cispo",
    "cpo",
    "cppo",
    "ctpo",
    "dapo",
    "dpo",
    "dppo_kl",
    "dppo_tv",
    "dr_grpo",
    "dro",
    "gmpo",
    "grpo",
    "gspo",
    "ipo",
    "kto",
    "luspo",
    "make",
    "nfpo",
    "opo",
    "orpo",
    "ppo",
    "rebel",
    "reinforce",
    "robust_dpo",
    "sapo",
    "simpo",
    "slic",
    "two_sided_grpo",
    "vespo",
]

Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
KLKind = Literal["k1", "k2", "k3", "k3+"]
AGGREGATIONS = get_args(Aggregation)
KL_KINDS = get_args(KLKind)


_LONGEST = 1 << 62  # positions: no sequence has as many


def _check(
    part: str, relation: Literal[">", ">="], bound: float, *, or_none: bool = False, finite: bool = False, **values: Any
) -> None:
    """``values``, by the names of fields of ``part``, are numbers in this ``relation`` to ``bound``."""
    other = " or None" if or_none else ""
    for name, value in values.items():
        if value is None and or_none:
            continue
        _checks.number(f"{part}: {name}", value, f"a float{other}")
        if not (value > bound if relation == ">" else value >= bound):
            fields, got = " and ".join(values), " and ".join(map(_checks.brief, values.values()))
            raise ValueError(f"{part}: {fields} must be {relation} {bound}{other}, got {got}")
        if finite:
            _checks.finite(f"{part}: {name}", value)
        _checks.in_float32(f"{part}: {name}", value)


def _finite(part: str, **values: Any) -> None:
    for name, value in values.items():
        _checks.finite(f"{part}: {name}", value)
        _checks.in_float32(f"{part}: {name}", value)


def _is_count(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


# What a part looks at beside the token itself, as flags: the log-probs of tokens after it; which of the kept tokens of
# its sequence it is and how many there are, which the mask tells; the log-probs of tokens before it; those of all.
TOKEN, AHEAD, PLACE, PREFIX, SEQUENCE = 0, 1, 2, 4, 8


class _Part:
    """Takes the NumPy numbers among its fields for the numbers that they are.

    ``looks_at`` says what the gradient coefficient of a token depends on, ``vanishes`` whether the term of a token with
    the advantage 0 is 0 and has no gradient. A part that declares neither is taken for one of whole sequences, which
    takes two passes, and none of its tokens are skipped.
    """

    @property
    def looks_at(self) -> int:
        return SEQUENCE

    @property
    def vanishes(self) -> bool:
        return False

    def __post_init__(self) -> None:
        for own in fields(self):  # type: ignore[arg-type]  # not vars(self): torch 2.10's compiler does not trace it
            value = getattr(self, own.name) if own.init else None
            number = _checks.plain(value)
            if number is not value:
                object.__setattr__(self, own.name, number)


# --------------------------------------------------------------------------------------------------------------- ratios


@dataclass(frozen=True)
class TokenRatio(_Part):
    """``rho = exp(clamp(lp - olp, -20, 20))`` of the token alone (PPO, GRPO)."""

    looks_at = TOKEN


@dataclass(frozen=True)
class SequenceRatio(_Part):
    """GSPO: every token of a sequence carries ``s = exp(mean_t x_t)``, with the gradient of its own ``lp``.

    The token's ratio is ``exp(min(x - sg(x) + sg(log s), 10))``, where ``x = clamp(lp - olp, -20, 20)``.
    """

    looks_at = SEQUENCE


@dataclass(frozen=True)
class Trace(_Part):
    """The ratio times ``F = exp(clamp(sum of l over a window, -20, 20))``, the likelihood ratio of the neighbours.

    The window holds the ``back`` positions before the token and the ``ahead`` positions after it, not the token itself;
    ``"all"`` reaches to the end of the sequence, where every window ends. ``l = lp - olp`` at kept tokens and 0 at
    masked ones, so a masked position inside the window counts as ratio 1.

    ``Trace(0, 0)`` is :class:`TokenRatio`, ``Trace(0, n - 1)`` is ``ForwardTrace(n)`` (NFPO), ``Trace("all", 0)`` gives
    the prefix ratio (CTPO), ``Trace("all", "all")`` the ratio of the whole sequence (VESPO).

    ``differentiate=False`` takes ``F`` as a weight (no gradient through it). ``differentiate=True`` means the term
    ``-A M (rho - 1) F`` with the mask ``M`` of the trust region detached, differentiated through ``rho`` and ``F``. For
    the whole prefix or the whole suffix, without a trust region, its expectation is exactly the policy improvement, and
    its gradient exact too.
    """

    back: int | Literal["all"] = 0
    ahead: int | Literal["all"] = 0
    differentiate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, count in (("back", self.back), ("ahead", self.ahead)):
            if count != "all" and not _is_count(count, 0):
                got = f"{_checks.brief(self.back)} and {_checks.brief(self.ahead)}"
                raise ValueError(f"Trace: back and ahead must be integers >= 0 or 'all', got {got}")
            if count != "all" and count >= _LONGEST:
                object.__setattr__(self, name, "all")

    @property
    def looks_at(self) -> int:
        back, ahead = self.back != 0, self.ahead != 0
        if self.differentiate:  # the log-prob of a token is in the loss of those whose windows hold it
            back = ahead = back or ahead
        return PREFIX * back | AHEAD * ahead


@dataclass(frozen=True)
class _Length(_Part):
    n: int


@dataclass(frozen=True)
class ForwardTrace(Trace, _Length):
    """NFPO: ``Trace(0, n - 1)``, the ratio times the likelihood ratio of the next ``n - 1`` positions.

    ``n=1`` is :class:`TokenRatio`; ``n >= T`` is the whole suffix.
    """

    def _ahead(self) -> int | Literal["all"]:
        return self.n - 1 if self.n <= _LONGEST else "all"

    # Arguments of Trace, not of this; the second is computed from n, which alone is pickled.
    back: int | Literal["all"] = field(default=0, init=False, repr=False, compare=False)
    ahead: int | Literal["all"] = field(default=cast(Any, property(_ahead)), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _Part.__post_init__(self)
        if not _is_count(self.n, 1):
            raise ValueError(f"ForwardTrace: n must be an integer >= 1, got {_checks.brief(self.n)}")


@dataclass(frozen=True)
class OnPolicy(_Part):
    """No ratio: the loss is ``-A * lp`` (REINFORCE, OPO). ``old_logprobs`` feed the metrics and :class:`DRO` only."""

    looks_at = TOKEN


Ratio = TokenRatio | SequenceRatio | Trace | ForwardTrace | OnPolicy


# -------------------------------------------------------------------------------------------------------- trust regions


@dataclass(frozen=True)
class NoTrustRegion(_Part):
    """``-A * rho * sg(F)``."""

    looks_at = TOKEN
    vanishes = True


@dataclass(frozen=True)
class PPOClip(_Part):
    """``sg(F) * max(-A rho, -A clip(rho, 1 - low, 1 + high))``: ``rho`` counts for at most ``1 + high`` where ``A > 0``
    and for at least ``1 - low`` where ``A < 0``.

    ``dual``: where ``A < 0`` the loss is at most ``-A * dual`` (dual clip, usually 3). ``cap``: the weight ``rho * F``
    is at most ``cap`` (``F`` is lowered to ``cap / rho``). ``on="product"``: the clip (and ``dual``) looks at
    ``rho * sg(F)``.
    """

    looks_at = TOKEN
    vanishes = True

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    cap: float | None = None
    on: Literal["ratio", "product"] = "ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("PPOClip", ">=", 0, low=self.low)
        _check("PPOClip", ">", -1, high=self.high)
        _check("PPOClip", ">", 0, or_none=True, dual=self.dual)
        _check("PPOClip", ">", 0, or_none=True, cap=self.cap)
        if self.on not in ("ratio", "product"):
            raise ValueError(f"PPOClip: on must be 'ratio' or 'product', got {_checks.brief(self.on)}")


@dataclass(frozen=True)
class LogClip(_Part):
    """PPO's clip of the product ``w = rho * sg(F)`` in log space, in a range that grows with the position (CTPO).

    ``max(-A w, -A exp(clip(log w, -low t^power, high t^power)))``, and where ``A < 0`` at most
    ``-A exp(dual t^power)``. ``t`` counts the kept tokens of the sequence up to this one, from 1. ``power=0`` clips all
    positions alike; ``power=0.5`` follows the standard deviation of a sum of ``t`` log-ratios.
    """

    looks_at = PLACE
    vanishes = True

    low: float
    high: float
    dual: float | None = None
    power: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("LogClip", ">=", 0, low=self.low, high=self.high)
        _check("LogClip", ">", 0, or_none=True, dual=self.dual)
        _finite("LogClip", power=self.power)


@dataclass(frozen=True)
class CISPO(_Part):
    """``-A * sg(clip(rho, 1 - low, 1 + high) * F) * lp``: a clipped ratio is a weight, every token keeps a gradient.

    TRL and Liger have no lower bound, and their ``epsilon_high`` is the upper one itself: ``high = epsilon_high - 1``.
    """

    looks_at = TOKEN
    vanishes = True

    low: float = 10.0
    high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("CISPO", ">=", 0, low=self.low)
        _check("CISPO", ">", -1, high=self.high)
        if not 1 - self.low <= 1 + self.high:
            raise ValueError(f"CISPO: 1 - low must be <= 1 + high, got low={self.low} and high={self.high}")


@dataclass(frozen=True)
class BinaryTV(_Part):
    """DPPO-TV: ``-A * sg(min(rho * F, cap) * M) * lp``; ``M`` keeps a token while its probability has moved no further.

    ``A > 0``: ``p - p_old <= high``; otherwise ``p - p_old >= -low``. ``cap=None``: no cap.
    """

    looks_at = TOKEN
    vanishes = True

    low: float = 0.15
    high: float = 0.15
    cap: float | None = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("BinaryTV", ">=", 0, low=self.low, high=self.high)
        _check("BinaryTV", ">", 0, or_none=True, cap=self.cap)


@dataclass(frozen=True)
class BinaryKL(_Part):
    """DPPO-KL: as :class:`BinaryTV`, where ``M`` bounds the KL divergence between the two Bernoulli distributions
    "this token or another": ``p_old (olp - lp) + (1 - p_old) log((1 - p_old + 1e-8) / (1 - p + 1e-8))``.

    ``A > 0``: kept if that is ``<= high`` or ``p <= p_old``; otherwise if it is ``<= low`` or ``p >= p_old``. In it
    ``olp - lp`` is at least -20, and ``1 - p`` at least 0.
    """

    looks_at = TOKEN
    vanishes = True

    low: float = 0.05
    high: float = 0.05
    cap: float | None = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("BinaryKL", ">=", 0, low=self.low, high=self.high)
        _check("BinaryKL", ">", 0, or_none=True, cap=self.cap)


@dataclass(frozen=True)
class CPPO(_Part):
    """``-A M rho * sg(F)``: a bound on the divergence of a token that is tighter early on, and a budget for its prefix.

    With ``D = |p - p_old|`` of the token (binary total variation), ``t`` its place among the ``T`` kept tokens of the
    sequence and ``w_t = 1 - (1 - min_weight) (t - 1) / (T - 1)``, a token is kept where ``A (rho - 1) <= 0``, or where
    ``w_t D_t <= threshold`` and ``sum_{s<=t} w_s D_s <= threshold + budget * sum_{s<t} w_s``.
    """

    looks_at = PLACE | PREFIX
    vanishes = True

    threshold: float = 0.15
    budget: float = 0.015
    min_weight: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("CPPO", ">=", 0, threshold=self.threshold, budget=self.budget)
        _finite("CPPO", min_weight=self.min_weight)
        if not 0 < self.min_weight <= 1:
            raise ValueError(f"CPPO: min_weight must be in (0, 1], got {self.min_weight}")


@dataclass(frozen=True)
class SAPO(_Part):
    """``-A * (4 / tau) * sigmoid(tau (rho - 1)) * sg(F)`` with ``tau = tau_pos`` where ``A > 0``, else ``tau_neg``."""

    looks_at = TOKEN
    vanishes = True

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("SAPO", ">", 0, finite=True, tau_pos=self.tau_pos, tau_neg=self.tau_neg)


@dataclass(frozen=True)
class VESPO(_Part):
    """``-A * sg(phi(rho * F)) * lp`` with ``phi(w) = w^k exp(lambda (1 - w))``, which is 1 at ``w = 1``.

    ``k_pos`` and ``lambda_pos`` hold where ``A >= 0``. ``log w`` is clamped to ``[log 1e-8, 20]``, and ``log phi``,
    whose largest value is ``k log(k / lambda) - k + lambda``, to at most 20.
    """

    looks_at = TOKEN
    vanishes = True

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("VESPO", ">=", 0, finite=True, k_pos=self.k_pos, k_neg=self.k_neg)
        _check("VESPO", ">", 0, finite=True, lambda_pos=self.lambda_pos, lambda_neg=self.lambda_neg)


@dataclass(frozen=True)
class GMPO(_Part):
    """``-A exp(mean_t x'_t)``, where ``x'`` are the token log-ratios clipped before their mean is taken.

    With ``x = clamp(lp - olp, -20, 20)``: ``x' = min(x, high)`` where ``A > 0`` and ``max(x, -low)`` where ``A < 0``.
    As with :class:`SequenceRatio`, which it needs, each token carries the gradient of its own ``x'``.
    """

    looks_at = SEQUENCE
    vanishes = True

    low: float = 0.4
    high: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("GMPO", ">=", 0, low=self.low, high=self.high)


@dataclass(frozen=True)
class DRO(_Part):
    """``-A lp + beta / 2 (lp - olp)^2``: a quadratic penalty in place of a ratio; needs :class:`OnPolicy`."""

    looks_at = TOKEN

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("DRO", ">", 0, finite=True, beta=self.beta)


TrustRegion = NoTrustRegion | PPOClip | LogClip | CISPO | BinaryTV | BinaryKL | CPPO | SAPO | VESPO | GMPO | DRO


# ------------------------------------------------------------------------------------------------------------------- KL


@dataclass(frozen=True)
class KL(_Part):
    """``coef`` times an estimate of the KL divergence to the reference policy (needs ``ref_logprobs``), in nats.

    With ``d = lp - ref``: ``k1 = d``; ``k2 = d^2 / 2``; ``k3 = exp(-d) - 1 + d`` (``d`` clamped to +-20 before
    ``exp``); ``k3+`` has the value of k3 and the gradient of k2. ``clamp`` bounds the value to +-clamp (no gradient
    beyond it). ``weighted`` multiplies it by the token's ratio ``exp(lp - old_lp)``, through which the gradient flows,
    too: where tokens come from the old policy, the expectation of k3, and its gradient, are then those of the KL
    divergence of the current one (TRL's ``use_bias_correction_kl``).
    """

    kind: KLKind
    coef: float
    clamp: float | None = None
    weighted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KL_KINDS:
            raise ValueError(f"KL: kind must be one of {KL_KINDS}, got {_checks.brief(self.kind)}")
        _finite("KL", coef=self.coef)
        _check("KL", ">", 0, or_none=True, clamp=self.clamp)


def _as_kl(kl: KL | float | None) -> KL | None:
    """A number is the coefficient of k3; 0 is no KL."""
    kl = _checks.plain(kl)
    if isinstance(kl, float | int) and not isinstance(kl, bool):
        return KL("k3", kl) if kl != 0 else None
    if kl is not None and not isinstance(kl, KL):
        raise TypeError(f"Objective: kl must be a KL, a float or None, got {_checks.brief(kl)}")
    return kl


# ------------------------------------------------------------------------------------------------------------ objective


@dataclass(frozen=True)
class Objective(_Part):
    """A policy objective: ``aggregate(is_weight * policy_term + kl.coef * kl - entropy_coef * entropy)``.

    ``aggregation`` with ``l`` the per-token loss and ``m`` the mask:

    ===========================  ====================================================================================
    ``token-mean``               ``sum(l m) / sum(m)``
    ``token-sum``                ``sum(l m)``
    ``seq-mean-token-mean``      mean over sequences with any kept token of ``sum_t(l m) / sum_t(m)``
    ``seq-mean-token-sum``       mean over those sequences of ``sum_t(l m)``
    ``seq-mean-token-sum-norm``  ``seq-mean-token-sum / length_norm``; ``length_norm=None`` takes the padded width, or
                                 the longest sequence of a packed batch (Dr. GRPO wants a constant: pass the generation
                                 limit)
    ===========================  ====================================================================================

    A number as ``kl`` is the coefficient of ``KL("k3", ...)``, 0 is None. :meth:`to_dict` and :meth:`from_dict` are for
    configuration files. Raises ``ValueError`` where two parts disagree.
    """

    ratio: Ratio = TokenRatio()
    trust_region: TrustRegion = PPOClip()
    kl: KL | None = None
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token-mean"
    length_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ratio, Ratio):
            raise TypeError(f"Objective: ratio must be one of {Ratio}, got {_checks.brief(self.ratio)}")
        if not isinstance(self.trust_region, TrustRegion):
            raise TypeError(
                f"Objective: trust_region must be one of {TrustRegion}, got {_checks.brief(self.trust_region)}"
            )
        object.__setattr__(self, "kl", _as_kl(self.kl))
        _finite("Objective", entropy_coef=self.entropy_coef)
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"Objective: aggregation must be one of {AGGREGATIONS}, got {_checks.brief(self.aggregation)}"
            )
        if self.length_norm is not None:
            if self.aggregation != "seq-mean-token-sum-norm":
                raise ValueError(f"Objective: length_norm has no meaning with aggregation={self.aggregation!r}")
            _check("Objective", ">", 0, finite=True, length_norm=self.length_norm)
        self._check_ratio_and_trust_region()

    def to_dict(self) -> dict[str, Any]:
        """Names, numbers and dicts of them, as JSON and YAML have it; :meth:`from_dict` is the inverse."""
        parts = {
            name: {"type": type(part).__name__, **{x.name: getattr(part, x.name) for x in fields(part) if x.init}}
            for name, part in (("ratio", self.ratio), ("trust_region", self.trust_region))
        }
        own = {x.name: getattr(self, x.name) for x in fields(self)}
        return {**own, **parts, "kl": None if self.kl is None else asdict(self.kl)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Objective:
        """The objective of :meth:`to_dict`; what is left out has its default, and ``kl`` may be a number.

        Raises ``TypeError`` and ``ValueError`` as the parts do, and for names that do not exist.
        """
        given = _named("Objective", values, cls)
        for name, kinds in (("ratio", RATIOS), ("trust_region", TRUST_REGIONS)):
            if name in given:
                given[name] = _part_of(name, given[name], kinds)
        if isinstance(given.get("kl"), Mapping):
            given["kl"] = KL(**_named("KL", given["kl"], KL))
        return cls(**given)

    def _check_ratio_and_trust_region(self) -> None:
        ratio, region = self.ratio, self.trust_region
        ratio_name, region_name = type(ratio).__name__, type(region).__name__
        if isinstance(ratio, OnPolicy) and not isinstance(region, NoTrustRegion | DRO):
            raise ValueError(
                f"Objective: OnPolicy has no ratio that {region_name} could restrict; use NoTrustRegion or DRO"
            )
        if isinstance(region, DRO) and not isinstance(ratio, OnPolicy):
            raise ValueError(f"Objective: DRO penalises the log-ratio, it has no use for {ratio_name}; use OnPolicy")
        if isinstance(region, GMPO) and not isinstance(ratio, SequenceRatio):
            raise ValueError(f"Objective: GMPO is a mean over the sequence, {ratio_name} is not; use SequenceRatio")
        if isinstance(ratio, SequenceRatio) and isinstance(region, BinaryTV | BinaryKL | CPPO):
            raise ValueError(
                f"Objective: {region_name} compares the probabilities of one token, SequenceRatio has none"
            )
        trace = ratio if isinstance(ratio, Trace) else None
        if isinstance(region, PPOClip) and region.on == "product" and (trace is None or trace.differentiate):
            raise ValueError(
                f"Objective: PPOClip(on='product') needs a Trace or ForwardTrace with differentiate=False, got {ratio}"
            )
        if trace is not None and trace.differentiate:
            if isinstance(region, LogClip | CISPO | SAPO | VESPO):
                raise ValueError(
                    f"Objective: {ratio_name}(differentiate=True) needs a trust region that is a mask of tokens; "
                    f"{region_name} is not one"
                )
            if getattr(region, "cap", None) is not None:
                raise ValueError(
                    f"Objective: {region_name}(cap=...) truncates a detached weight; "
                    f"{ratio_name}(differentiate=True) has none (pass cap=None)"
                )


def _named(what: str, values: Mapping[str, Any], part: type[_Part]) -> dict[str, Any]:
    """``values``, whose names are fields of ``part``."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must be given as a dict, got {_checks.brief(values)}")
    known = [x.name for x in fields(part) if x.init]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise TypeError(f"{what} has no {_checks.brief(name)}, it has {known}{_names.hint(name, known)}")
    return dict(values)


def _part_of(name: str, values: Mapping[str, Any], kinds: Iterable[type[_Part]]) -> _Part:
    by_name = {kind.__name__: kind for kind in kinds}
    kind = values.get("type") if isinstance(values, Mapping) else None
    if kind not in by_name:
        raise ValueError(
            f"{name} must be a dict with a type among {sorted(by_name)}, got {_checks.brief(values)}"
            f"{_names.hint(kind, by_name)}"
        )
    options = {key: value for key, value in values.items() if key != "type"}
    return by_name[kind](**_named(kind, options, by_name[kind]))


PARTS: list[type[_Part]] = [*get_args(Ratio), *get_args(TrustRegion), KL, Objective]
# A checkpoint may hold the objective of a run: torch.load(weights_only=True) takes it.
torch.serialization.add_safe_globals([*PARTS])


def reach(part: Ratio | TrustRegion) -> tuple[int | Literal["all"], int | Literal["all"]]:
    """How many positions before and after a token the log-probs lie that its term looks at."""
    if isinstance(part, Trace):
        return part.back, part.ahead
    return ("all", "all") if part.looks_at & (AHEAD | PREFIX | SEQUENCE) else (0, 0)


# The numbers by which kernels know the parts: from 0 on, none left out; beside that, their order means nothing. The
# enumerations of csrc/core/objective.h have the same.
RATIOS: dict[type[_Part], int] = {TokenRatio: 0, SequenceRatio: 1, Trace: 2, ForwardTrace: 2, OnPolicy: 3}
TRUST_REGIONS: dict[type[_Part], int] = {
    NoTrustRegion: 0,
    PPOClip: 1,
    LogClip: 2,
    CISPO: 3,
    BinaryTV: 4,
    BinaryKL: 5,
    CPPO: 6,
    SAPO: 7,
    VESPO: 8,
    GMPO: 9,
    DRO: 10,
}
KL_NUMBERS: dict[KLKind | None, int] = {None: 0, "k1": 1, "k2": 2, "k3": 3, "k3+": 4}
AGGREGATION_NUMBERS: dict[Aggregation, int] = {
    "token-mean": 0,
    "token-sum": 1,
    "seq-mean-token-mean": 2,
    "seq-mean-token-sum": 3,
    "seq-mean-token-sum-norm": 4,
}


# -------------------------------------------------------------------------------------------------------------- presets

_BOUNDS = {"low": "clip_low", "high": "clip_high"}
OLD_NAMES = dict.fromkeys(("gmpo", "ctpo", "cispo", "dppo_tv", "dppo_kl"), _BOUNDS)

P = ParamSpec("P")


def with_new_names(preset: str, arguments: Mapping[str, Any], stacklevel: int = 2) -> dict[str, Any]:
    """``arguments`` of a preset by the names that they have now. Warns of old ones at the line that called."""
    found = dict(arguments)
    for old, new in OLD_NAMES.get(preset, {}).items():
        if old in found:
            warnings.warn(f"{preset}: {old} is called {new} now", DeprecationWarning, stacklevel=stacklevel + 1)
            if new in found:
                raise TypeError(f"{preset}: {old} and {new} are the same argument, and both were given")
            found[new] = found.pop(old)
    return found


PRESETS: dict[str, Callable[..., Objective]] = {}


def _preset(function: Callable[P, Objective]) -> Callable[P, Objective]:
    """Enters ``function`` into :data:`PRESETS`, and tells what a name that it does not have may stand for."""
    name, known = function.__name__, tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Objective:
        for argument in kwargs:
            if argument not in known:
                kwargs = cast(Any, _with_known_names(name, kwargs, known))
                break
        return function(*args, **kwargs)

    PRESETS[name] = call
    return call


def _with_known_names(preset: str, arguments: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    found = with_new_names(preset, arguments, stacklevel=3)
    for argument in found:
        if argument not in known:
            hint = _names.hint(argument, known)
            raise TypeError(f"{preset} has no argument {argument!r}, it has {list(known)}{hint}")
    return found


@_preset
def ppo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    dual: float | None = None,
    kl: KL | float | None = None,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
) -> Objective:
    """PPO's clipped surrogate (Schulman et al. 2017), optionally with dual clip."""
    return Objective(TokenRatio(), PPOClip(clip_low, clip_high, dual), _as_kl(kl), entropy_coef, aggregation)


@_preset
def grpo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    kl: KL | float | None = None,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "seq-mean-token-mean",
) -> Objective:
    """GRPO (DeepSeekMath): PPO's surrogate, averaged within each sequence and then over sequences."""
    return Objective(TokenRatio(), PPOClip(clip_low, clip_high), _as_kl(kl), entropy_coef, aggregation)


@_preset
def dr_grpo(
    clip_low: float = 0.2, clip_high: float = 0.2, *, length_norm: float | None = None, kl: KL | float | None = None
) -> Objective:
    """Dr. GRPO: token sums divided by one constant, ``length_norm`` (the generation limit)."""
    region = PPOClip(clip_low, clip_high)
    return Objective(TokenRatio(), region, _as_kl(kl), aggregation="seq-mean-token-sum-norm", length_norm=length_norm)


@_preset
def two_sided_grpo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    delta: float = 4.0,
    kl: KL | float | None = None,
    aggregation: Aggregation = "seq-mean-token-mean",
) -> Objective:
    """GRPO whose ratio is bounded by ``delta`` where ``A < 0`` too (INTELLECT-2, 2505.07291; TRL's ``delta``).

    That is ``-min(min(rho, delta) A, clip(rho) A)``, which is dual clip for every ``delta > 1 + clip_high``, the range
    that TRL recommends. Any other ``delta > 0`` and ``1 + clip_high`` change places: ``delta`` is the bound where
    ``A > 0``. The default aggregation is GRPO's. INTELLECT-2's code (prime-rl @ a092a54) divides the sum over kept
    tokens by all positions of the micro-batch: ``"seq-mean-token-sum-norm"``, if every row has a token.
    """
    _check("two_sided_grpo", ">=", 0, clip_low=clip_low, clip_high=clip_high)
    _check("two_sided_grpo", ">", 0, delta=delta)
    region = PPOClip(clip_low, min(clip_high, delta - 1), max(delta, 1 + clip_high))
    return Objective(TokenRatio(), region, _as_kl(kl), aggregation=aggregation)


@_preset
def dapo(clip_low: float = 0.2, clip_high: float = 0.28, *, dual: float | None = None) -> Objective:
    """DAPO (2503.14476): asymmetric clip, mean over the tokens of the batch."""
    return Objective(TokenRatio(), PPOClip(clip_low, clip_high, dual))


@_preset
def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO: PPO's clip on the length-normalised sequence ratio."""
    return Objective(SequenceRatio(), PPOClip(clip_low, clip_high), aggregation="seq-mean-token-mean")


@_preset
def luspo(clip_low: float = 2e-3, clip_high: float = 2.5e-3) -> Objective:
    """LUSPO (2602.05261): GSPO with each sequence weighted by its length, as TRL 1.16 computes it.

    That is the mean over sequences of the sum over tokens. The thresholds are those of the paper's section 5.1, as TRL
    cites it.
    """
    return Objective(SequenceRatio(), PPOClip(clip_low, clip_high), aggregation="seq-mean-token-sum")


@_preset
def gmpo(clip_low: float = 0.4, clip_high: float = 0.4) -> Objective:
    """GMPO (2507.20673): the geometric mean of token ratios that are clipped in log space, mean over sequences.

    As verl's ``geo_mean`` for advantages per sequence, the only kind for which the method is defined.
    """
    return Objective(SequenceRatio(), GMPO(clip_low, clip_high), aggregation="seq-mean-token-mean")


@_preset
def vespo(k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0) -> Objective:
    """VESPO (2602.10693): a smooth weight of the whole sequence's ratio. Formula and defaults are those of TRL 1.16.

    TRL puts the ratio of trainer and inference engine into the sequence's ratio: pass the log-probs of the engine as
    ``old_logprobs``, and no ``is_weights``.
    """
    return Objective(Trace("all", "all"), VESPO(k_pos, lambda_pos, k_neg, lambda_neg))


@_preset
def ctpo(
    clip_low: float = 0.025, clip_high: float = 0.05, *, dual: float | None = 0.05, power: float = 0.5
) -> Objective:
    """CTPO (2605.07331): the cumulative ratio of the prefix, clipped in log space by position (authors' code)."""
    return Objective(Trace("all", 0), LogClip(clip_low, clip_high, dual, power))


@_preset
def cispo(clip_low: float = 10.0, clip_high: float = 0.2) -> Objective:
    """CISPO: the clipped ratio as a detached weight; the default, of verl's example, has no lower clip.

    TRL's and Liger's ``epsilon_high`` is ``1 + clip_high``, the bound itself.
    """
    return Objective(TokenRatio(), CISPO(clip_low, clip_high))


@_preset
def sapo(tau_pos: float = 1.0, tau_neg: float = 1.05) -> Objective:
    """SAPO: a sigmoid gate in place of the clip."""
    return Objective(TokenRatio(), SAPO(tau_pos, tau_neg), aggregation="seq-mean-token-mean")


@_preset
def dppo_tv(
    clip_low: float = 0.15, clip_high: float = 0.15, *, cap: float | None = 20.0, length_norm: float | None = None
) -> Objective:
    """DPPO with the total-variation mask (2602.04879). The thresholds are those of verl's example."""
    return Objective(
        TokenRatio(), BinaryTV(clip_low, clip_high, cap), aggregation="seq-mean-token-sum-norm", length_norm=length_norm
    )


@_preset
def dppo_kl(
    clip_low: float = 0.05, clip_high: float = 0.05, *, cap: float | None = 20.0, length_norm: float | None = None
) -> Objective:
    """DPPO with the binary KL mask (2602.04879). The thresholds are those of verl's example."""
    return Objective(
        TokenRatio(), BinaryKL(clip_low, clip_high, cap), aggregation="seq-mean-token-sum-norm", length_norm=length_norm
    )


@_preset
def cppo(
    threshold: float = 0.15, budget: float = 0.015, *, min_weight: float = 0.8, length_norm: float | None = None
) -> Objective:
    """CPPO (2606.10968) with binary total variation.

    The defaults are the paper's for a post-trained dense model; its threshold for mixtures of experts is 0.2. For
    base models its budget is ``min(2b, max(b, P90 of D))`` of each sequence with ``b = 0.02``, which is not offered
    here. Its divergence is that of the 20 likeliest tokens, here it is that of the sampled one.
    """
    return Objective(
        TokenRatio(),
        CPPO(threshold, budget, min_weight),
        aggregation="seq-mean-token-sum-norm",
        length_norm=length_norm,
    )


@_preset
def dro(beta: float, *, aggregation: Aggregation = "token-mean") -> Objective:
    """DRO as in verl: log-likelihood weighted by the advantage, minus ``beta / 2`` times the squared log-ratio.

    It is also :func:`reinforce` with ``KL("k2", beta)`` and ``ref_logprobs=old_logprobs``. No default of ``beta`` is
    known to us; Tinker's documentation has none either.
    """
    return Objective(OnPolicy(), DRO(beta), aggregation=aggregation)


@_preset
def reinforce(*, kl: KL | float | None = None, entropy_coef: float = 0.0) -> Objective:
    """REINFORCE, and the loss of GPG: ``-A * lp``, mean over tokens. Use ``is_weights`` for off-policy corrections."""
    return Objective(OnPolicy(), NoTrustRegion(), _as_kl(kl), entropy_coef)


@_preset
def opo() -> Objective:
    """OPO (2505.23585): exact on-policy gradient, no KL, no entropy bonus; advantages from ``advantages.opo``."""
    return Objective(OnPolicy(), NoTrustRegion())


@_preset
def nfpo(
    n: int = 4,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    differentiate: bool = False,
    trust_region: TrustRegion | None = None,
    kl: KL | float | None = None,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
) -> Objective:
    """NFPO (2605.20865): PPO's clipped surrogate times the likelihood ratio of the next ``n - 1`` tokens.

    ``trust_region`` replaces the clip, e.g. ``BinaryTV(0.15, 0.15)``. ``nfpo(n=1)`` is :func:`ppo`. The paper's own
    choice of ``n``, thresholds and aggregation is not known to us: the defaults are PPO's.
    """
    region = PPOClip(clip_low, clip_high) if trust_region is None else trust_region
    return Objective(ForwardTrace(n, differentiate), region, _as_kl(kl), entropy_coef, aggregation)


def available() -> tuple[str, ...]:
    """The names of the presets, sorted."""
    return tuple(sorted(PRESETS))


def make(name: str, **options: Any) -> Objective:
    """The preset of this name with its arguments, for configuration files: ``make("nfpo", n=4)``.

    Raises ``ValueError`` for an unknown name, ``TypeError`` for an argument that the preset does not have.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(available())}; got {name!r}{_names.hint(name, PRESETS)}")
    return PRESETS[name](**options)


def as_objective(objective: Objective | str) -> Objective:
    """What a function takes as its ``objective``: an object, or the name of a preset whose defaults are meant."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        return make(objective)
    raise TypeError(f"objective must be a fusedpo.Objective or a preset's name, got {type(objective).__name__}")
