"""What a policy loss is made of: orthogonal parts, and the named combinations of them.

An :class:`Objective` says how one token's log-prob should move. Its parts are independent, so a new algorithm is a new
combination. Notation of the formulas: ``lp`` current log-prob, ``olp`` old one, ``A`` advantage, ``sg`` stop-gradient,
``rho = exp(lp - olp)``, ``F`` the forward trace (1 without one). Losses are minimised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "CISPO",
    "KL",
    "SAPO",
    "Aggregation",
    "BinaryKL",
    "BinaryTV",
    "ForwardTrace",
    "NoTrustRegion",
    "Objective",
    "OnPolicy",
    "PPOClip",
    "Ratio",
    "SequenceRatio",
    "TokenRatio",
    "TrustRegion",
    "cispo",
    "dapo",
    "dppo_kl",
    "dppo_tv",
    "dr_grpo",
    "grpo",
    "gspo",
    "nfpo",
    "opo",
    "ppo",
    "reinforce",
    "sapo",
]

Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
KLKind = Literal["k1", "k2", "k3", "k3+"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# --------------------------------------------------------------------------------------------------------------- ratios


@dataclass(frozen=True)
class TokenRatio:
    """``rho = exp(clamp(lp - olp, -20, 20))`` of the token alone (PPO, GRPO)."""


@dataclass(frozen=True)
class SequenceRatio:
    """GSPO: every token of a sequence carries ``s = exp(mean_t (lp - olp))``, with the gradient of its own ``lp``.

    The token's ratio is ``exp(min(lp - sg(lp) + sg(log s), 10))``.
    """


@dataclass(frozen=True)
class ForwardTrace:
    """NFPO: the ratio times ``F = exp(sum_{0<k<n} l_{t+k})``, the likelihood ratio of the next ``n - 1`` positions.

    ``l = lp - olp`` at kept tokens and 0 at masked ones, so a masked position inside the window counts as ratio 1; the
    window ends with its sequence. ``n=1`` is :class:`TokenRatio`; ``n >= T`` is the whole suffix.

    ``differentiate=False`` takes ``F`` as a weight (no gradient through it). ``differentiate=True`` means the term
    ``-A M (rho - 1) F`` with the mask ``M`` of the trust region detached, differentiated through ``rho`` and ``F``: for
    ``n >= T`` without a trust region its expectation is exactly the policy improvement, and its gradient exact too.
    """

    n: int
    differentiate: bool = False

    def __post_init__(self) -> None:
        _require(isinstance(self.n, int) and self.n >= 1, f"ForwardTrace: n must be an integer >= 1, got {self.n!r}")


@dataclass(frozen=True)
class OnPolicy:
    """No ratio: the loss is ``-A * lp`` (REINFORCE, OPO). ``old_logprobs`` only feed the metrics."""


Ratio = TokenRatio | SequenceRatio | ForwardTrace | OnPolicy


# -------------------------------------------------------------------------------------------------------- trust regions


@dataclass(frozen=True)
class NoTrustRegion:
    """``-A * rho * sg(F)``."""


@dataclass(frozen=True)
class PPOClip:
    """``sg(F) * max(-A rho, -A clip(rho, 1 - low, 1 + high))``.

    ``dual``: where ``A < 0`` the loss is at most ``-A * dual`` (dual clip, usually 3). ``cap``: the weight ``rho * F``
    is at most ``cap`` (``F`` is lowered to ``cap / rho``). ``on="product"``: the clip (and ``dual``) looks at
    ``rho * sg(F)``.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    cap: float | None = None
    on: Literal["ratio", "product"] = "ratio"

    def __post_init__(self) -> None:
        _require(
            self.low >= 0 and self.high >= 0, f"PPOClip: low and high must be >= 0, got {self.low} and {self.high}"
        )
        _require(self.dual is None or self.dual > 1, f"PPOClip: dual must be > 1 or None, got {self.dual}")
        _require(self.cap is None or self.cap > 0, f"PPOClip: cap must be > 0 or None, got {self.cap}")
        _require(self.on in ("ratio", "product"), f"PPOClip: on must be 'ratio' or 'product', got {self.on!r}")


@dataclass(frozen=True)
class CISPO:
    """``-A * sg(clip(rho, 1 - low, 1 + high) * F) * lp``: a clipped ratio is a weight, every token keeps a gradient."""

    low: float = 10.0
    high: float = 0.2

    def __post_init__(self) -> None:
        _require(self.low >= 0 and self.high >= 0, f"CISPO: low and high must be >= 0, got {self.low} and {self.high}")


@dataclass(frozen=True)
class BinaryTV:
    """DPPO-TV: ``-A * sg(min(rho * F, cap) * M) * lp``; ``M`` keeps a token while its probability has moved no further.

    ``A > 0``: ``p - p_old <= high``; otherwise ``p - p_old >= -low``. ``cap=None``: no cap.
    """

    low: float = 0.15
    high: float = 0.15
    cap: float | None = 20.0

    def __post_init__(self) -> None:
        _check_binary("BinaryTV", self.low, self.high, self.cap)


@dataclass(frozen=True)
class BinaryKL:
    """DPPO-KL: as :class:`BinaryTV`, where ``M`` bounds the KL divergence between the two Bernoulli distributions
    "this token or another": ``p_old (olp - lp) + (1 - p_old) log((1 - p_old + 1e-8) / (1 - p + 1e-8))``.

    ``A > 0``: kept if that is ``<= high`` or ``p <= p_old``; otherwise if it is ``<= low`` or ``p >= p_old``.
    """

    low: float = 0.05
    high: float = 0.05
    cap: float | None = 20.0

    def __post_init__(self) -> None:
        _check_binary("BinaryKL", self.low, self.high, self.cap)


def _check_binary(name: str, low: float, high: float, cap: float | None) -> None:
    _require(low >= 0 and high >= 0, f"{name}: low and high must be >= 0, got {low} and {high}")
    _require(cap is None or cap > 0, f"{name}: cap must be > 0 or None, got {cap}")


@dataclass(frozen=True)
class SAPO:
    """``-A * (4 / tau) * sigmoid(tau (rho - 1)) * sg(F)`` with ``tau = tau_pos`` where ``A > 0``, else ``tau_neg``."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        _require(
            self.tau_pos > 0 and self.tau_neg > 0,
            f"SAPO: tau_pos and tau_neg must be > 0, got {self.tau_pos} and {self.tau_neg}",
        )


TrustRegion = NoTrustRegion | PPOClip | CISPO | BinaryTV | BinaryKL | SAPO


# ------------------------------------------------------------------------------------------------------------------- KL


@dataclass(frozen=True)
class KL:
    """``coef`` times an estimate of the KL divergence to the reference policy (needs ``ref_logprobs``), in nats.

    With ``d = lp - ref``: ``k1 = d``; ``k2 = d^2 / 2``; ``k3 = exp(-d) - 1 + d`` (``d`` clamped to +-20 before
    ``exp``); ``k3+`` has the value of k3 and the gradient of k2. ``clamp`` bounds the value to +-clamp (no gradient
    beyond it).
    """

    kind: KLKind
    coef: float
    clamp: float | None = None

    def __post_init__(self) -> None:
        _require(self.kind in get_args(KLKind), f"KL: kind must be one of {get_args(KLKind)}, got {self.kind!r}")
        _require(self.clamp is None or self.clamp > 0, f"KL: clamp must be > 0 or None, got {self.clamp}")


# ------------------------------------------------------------------------------------------------------------ objective


@dataclass(frozen=True)
class Objective:
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

    Raises ``ValueError`` where two parts disagree.
    """

    ratio: Ratio = TokenRatio()
    trust_region: TrustRegion = PPOClip()
    kl: KL | None = None
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token-mean"
    length_norm: float | None = None

    def __post_init__(self) -> None:
        _require(
            self.aggregation in get_args(Aggregation),
            f"Objective: aggregation must be one of {get_args(Aggregation)}, got {self.aggregation!r}",
        )
        if self.length_norm is not None:
            _require(
                self.aggregation == "seq-mean-token-sum-norm",
                f"Objective: length_norm has no meaning with aggregation={self.aggregation!r}",
            )
            _require(self.length_norm > 0, f"Objective: length_norm must be > 0, got {self.length_norm}")
        ratio, region = self.ratio, self.trust_region
        if isinstance(ratio, OnPolicy):
            _require(
                isinstance(region, NoTrustRegion),
                f"Objective: OnPolicy has no ratio that {type(region).__name__} could restrict; use NoTrustRegion",
            )
        if isinstance(ratio, SequenceRatio):
            _require(
                not isinstance(region, BinaryTV | BinaryKL),
                f"Objective: {type(region).__name__} compares the probabilities of one token, SequenceRatio has none",
            )
        if isinstance(region, PPOClip) and region.on == "product":
            _require(
                isinstance(ratio, ForwardTrace) and not ratio.differentiate,
                "Objective: PPOClip(on='product') needs ForwardTrace(differentiate=False)",
            )
        if isinstance(ratio, ForwardTrace) and ratio.differentiate:
            _require(
                not isinstance(region, CISPO | SAPO),
                f"Objective: ForwardTrace(differentiate=True) needs a trust region that is a mask; "
                f"{type(region).__name__} is not one",
            )
            _require(
                getattr(region, "cap", None) is None,
                f"Objective: {type(region).__name__}(cap=...) truncates a detached weight; "
                "ForwardTrace(differentiate=True) has none (pass cap=None)",
            )


# -------------------------------------------------------------------------------------------------------------- presets


def ppo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    dual: float | None = None,
    kl: KL | None = None,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
) -> Objective:
    """PPO's clipped surrogate (Schulman et al. 2017), optionally with dual clip."""
    return Objective(TokenRatio(), PPOClip(clip_low, clip_high, dual), kl, entropy_coef, aggregation)


def grpo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    kl: KL | None = None,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "seq-mean-token-mean",
) -> Objective:
    """GRPO (DeepSeekMath): PPO's surrogate, averaged within each sequence and then over sequences."""
    return Objective(TokenRatio(), PPOClip(clip_low, clip_high), kl, entropy_coef, aggregation)


def dr_grpo(
    clip_low: float = 0.2, clip_high: float = 0.2, *, length_norm: float | None = None, kl: KL | None = None
) -> Objective:
    """Dr. GRPO: token sums divided by one constant, ``length_norm`` (the generation limit)."""
    return Objective(
        TokenRatio(), PPOClip(clip_low, clip_high), kl, aggregation="seq-mean-token-sum-norm", length_norm=length_norm
    )


def dapo(clip_low: float = 0.2, clip_high: float = 0.28, *, dual: float | None = None) -> Objective:
    """DAPO (2503.14476): asymmetric clip, mean over the tokens of the batch."""
    return Objective(TokenRatio(), PPOClip(clip_low, clip_high, dual))


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO: PPO's clip on the length-normalised sequence ratio."""
    return Objective(SequenceRatio(), PPOClip(clip_low, clip_high), aggregation="seq-mean-token-mean")


def cispo(low: float = 10.0, high: float = 0.2) -> Objective:
    """CISPO: the clipped ratio as a detached weight; the default has no lower clip."""
    return Objective(TokenRatio(), CISPO(low, high))


def sapo(tau_pos: float = 1.0, tau_neg: float = 1.05) -> Objective:
    """SAPO: a sigmoid gate in place of the clip."""
    return Objective(TokenRatio(), SAPO(tau_pos, tau_neg), aggregation="seq-mean-token-mean")


def dppo_tv(
    low: float = 0.15, high: float = 0.15, *, cap: float | None = 20.0, length_norm: float | None = None
) -> Objective:
    """DPPO with the total-variation mask (2602.04879)."""
    return Objective(
        TokenRatio(), BinaryTV(low, high, cap), aggregation="seq-mean-token-sum-norm", length_norm=length_norm
    )


def dppo_kl(
    low: float = 0.05, high: float = 0.05, *, cap: float | None = 20.0, length_norm: float | None = None
) -> Objective:
    """DPPO with the binary KL mask (2602.04879)."""
    return Objective(
        TokenRatio(), BinaryKL(low, high, cap), aggregation="seq-mean-token-sum-norm", length_norm=length_norm
    )


def reinforce(*, kl: KL | None = None, entropy_coef: float = 0.0) -> Objective:
    """REINFORCE: ``-A * lp``, mean over tokens. Use ``is_weights`` for off-policy corrections."""
    return Objective(OnPolicy(), NoTrustRegion(), kl, entropy_coef)


def opo() -> Objective:
    """OPO (2505.23585): exact on-policy gradient, no KL, no entropy bonus; advantages from ``advantages.opo``."""
    return Objective(OnPolicy(), NoTrustRegion())


def nfpo(
    n: int = 4,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    differentiate: bool = False,
    trust_region: TrustRegion | None = None,
    kl: KL | None = None,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
) -> Objective:
    """NFPO (2605.20865): PPO's clipped surrogate times the likelihood ratio of the next ``n - 1`` tokens.

    ``trust_region`` replaces the clip, e.g. ``BinaryTV(0.15, 0.15)``. ``nfpo(n=1)`` is :func:`ppo`. The paper's own
    choice of ``n``, thresholds and aggregation is not known to us: the defaults are PPO's.
    """
    region = PPOClip(clip_low, clip_high) if trust_region is None else trust_region
    return Objective(ForwardTrace(n, differentiate), region, kl, entropy_coef, aggregation)
