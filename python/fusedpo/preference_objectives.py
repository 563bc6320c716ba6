"""What a loss of segments is made of: a link of the margin of a pair, or of one segment, and what goes into it.

Notation: ``z`` the sum over a segment of ``lp - ref`` (its mean if normalised), ``d = z_chosen - z_rejected - margin``
of a pair, ``sigma`` the logistic function, ``e`` the label smoothing. Losses are minimised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from . import _checks

__all__ = [
    "Link",
    "Preference",
    "SFTAggregation",
    "cpo",
    "dpo",
    "ipo",
    "kto",
    "orpo",
    "rebel",
    "robust_dpo",
    "simpo",
    "slic",
]

Link = Literal["sigmoid", "robust", "hinge", "square", "odds", "kto"]
SFTAggregation = Literal["token-mean", "seq-mean-token-mean"]
LINKS = get_args(Link)
SFT_AGGREGATIONS = get_args(SFTAggregation)


@dataclass(frozen=True)
class Preference:
    """A preference objective: ``mean over pairs of f(d) + sft_coef * NLL of the chosen segments``.

    ===========  =====================================================================================================
    ``link``     ``f``
    ===========  =====================================================================================================
    ``sigmoid``  ``-(1 - e) log sigma(beta d) - e log sigma(-beta d)`` (DPO 2305.18290, conservative DPO)
    ``robust``   ``[-(1 - e) log sigma(beta d) + e log sigma(-beta d)] / (1 - 2e)`` with ``e < 1/2`` (2403.00409);
                 unbounded below
    ``hinge``    ``max(0, 1 - beta d)`` (SLiC 2305.10425, RSO 2309.06657); gradient 0 at the kink
    ``square``   ``(d - target / beta)^2`` (IPO 2310.12036, REBEL 2404.16767)
    ``odds``     ``-beta log sigma(o_chosen - o_rejected)``, ``o = z - log(1 - exp z)`` (ORPO 2403.07691)
    ``kto``      of one segment: ``weight * sigma(-y beta (z - z0))``, ``y = +-1`` its label, ``z0`` the reference
                 point (KTO 2402.01306)
    ===========  =====================================================================================================

    ``target``, in units of reward: a number, or None where the loss is given ``targets``. ``normalize``: ``z`` is the
    mean over the tokens of the segment. ``reference_free``: there is no ``ref``. ``desirable_weight`` and
    ``undesirable_weight`` are those of ``kto``. ``sft_aggregation``: the NLL is the mean over the tokens of all chosen
    segments, or the mean over pairs of the mean over the tokens of the chosen one.

    Raises ``ValueError`` where two parts disagree.
    """

    link: Link = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    target: float | None = None
    normalize: bool = False
    reference_free: bool = False
    sft_coef: float = 0.0
    sft_aggregation: SFTAggregation = "token-mean"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise ValueError(f"Preference: link must be one of {LINKS}, got {self.link!r}")
        if self.sft_aggregation not in SFT_AGGREGATIONS:
            raise ValueError(
                f"Preference: sft_aggregation must be one of {SFT_AGGREGATIONS}, got {self.sft_aggregation!r}"
            )
        _checks.number("Preference: beta", self.beta)
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"Preference: beta must be positive and finite, got {self.beta}")
        for name in ("margin", "sft_coef", "desirable_weight", "undesirable_weight"):
            _checks.finite(f"Preference: {name}", getattr(self, name))
        if self.target is not None:
            _checks.finite("Preference: target", self.target, "a float or None")
        _checks.number("Preference: label_smoothing", self.label_smoothing)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"Preference: label_smoothing must be in [0, 1], got {self.label_smoothing}")
        self._check_parts()

    def _check_parts(self) -> None:
        link = self.link
        if self.label_smoothing != 0 and link not in ("sigmoid", "robust"):
            raise ValueError(f"Preference: label_smoothing is for link='sigmoid' and 'robust', got {link!r}")
        if link == "robust" and not self.label_smoothing < 0.5:
            raise ValueError(f"Preference: label_smoothing must be < 1/2 for link='robust', got {self.label_smoothing}")
        if self.target is not None and link != "square":
            raise ValueError(f"Preference: target has no meaning with link={link!r}, use 'square'")
        if link == "odds" and not (self.normalize and self.reference_free):
            raise ValueError("Preference: link='odds' needs normalize=True and reference_free=True")
        if link == "kto":
            for name in ("margin", "sft_coef"):
                if getattr(self, name) != 0:
                    raise ValueError(f"Preference: {name} is for pairs, link='kto' has none")
        elif self.desirable_weight != 1 or self.undesirable_weight != 1:
            raise ValueError(
                f"Preference: desirable_weight and undesirable_weight have no meaning with link={link!r}, use 'kto'"
            )


# -------------------------------------------------------------------------------------------------------------- presets


def dpo(
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    sft_coef: float = 0.0,
    sft_aggregation: SFTAggregation = "token-mean",
) -> Preference:
    """DPO (2305.18290), with ``label_smoothing`` conservative DPO; ``beta`` is TRL's and OpenRLHF's default.

    ``normalize=True`` is TRL's ``sigmoid_norm`` (Tulu 3 2411.15124, with ``beta=5``) and SWEET-RL's critic.
    ``sft_coef``: 1 in iterative RPO, 0.005 in RPO, 0.01 in SWEET-RL (``seq-mean-token-mean``).
    """
    return Preference(
        "sigmoid", beta, label_smoothing, normalize=normalize, sft_coef=sft_coef, sft_aggregation=sft_aggregation
    )


def ipo(beta: float = 0.1, *, normalize: bool = True) -> Preference:
    """IPO (2310.12036): ``(d - 1 / (2 beta))^2``.

    ``z`` are means over tokens, as in TRL, whose authors asked those of IPO; ``normalize=False`` takes sums, as
    OpenRLHF and the code of DPO's authors do.
    """
    return Preference("square", beta, target=0.5, normalize=normalize)


def slic(beta: float = 0.1, *, normalize: bool = False) -> Preference:
    """SLiC-HF's hinge loss (2305.10425) of log-ratios, as RSO (2309.06657) has it, which uses ``beta=0.05``."""
    return Preference("hinge", beta, normalize=normalize)


def robust_dpo(beta: float = 0.1, *, label_smoothing: float = 0.1) -> Preference:
    """Robust DPO (2403.00409): unbiased where labels are flipped with the probability ``label_smoothing``."""
    return Preference("robust", beta, label_smoothing)


def simpo(beta: float = 2.0, *, gamma_beta_ratio: float = 0.25, label_smoothing: float = 0.0) -> Preference:
    """SimPO (2405.14734): mean log-probs without reference; the margin is ``gamma_beta_ratio``.

    The defaults are those of the authors' code, whose experiments use ``beta`` 2, 2.5 and 10 and ratios from 0.1 to
    0.8. TRL's ``simpo_gamma`` is ``beta * gamma_beta_ratio``.
    """
    return Preference("sigmoid", beta, label_smoothing, margin=gamma_beta_ratio, normalize=True, reference_free=True)


def cpo(
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    sft_coef: float = 1.0,
    sft_aggregation: SFTAggregation = "token-mean",
) -> Preference:
    """CPO (2401.08417): DPO without reference, plus the NLL of the chosen completions."""
    return Preference(
        "sigmoid", beta, label_smoothing, reference_free=True, sft_coef=sft_coef, sft_aggregation=sft_aggregation
    )


def orpo(beta: float = 0.1, *, sft_coef: float = 1.0, sft_aggregation: SFTAggregation = "token-mean") -> Preference:
    """ORPO (2403.07691): the log odds ratio of mean log-probs, plus the NLL of the chosen sequences.

    TRL takes that NLL over prompt and completion: pass them as ``sft_mask``.
    """
    return Preference(
        "odds", beta, normalize=True, reference_free=True, sft_coef=sft_coef, sft_aggregation=sft_aggregation
    )


def kto(beta: float = 0.1, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Preference:
    """KTO (2402.01306): segments with labels instead of pairs; the loss needs ``labels`` and ``reference_point``."""
    return Preference("kto", beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def rebel(eta: float = 1.0) -> Preference:
    """REBEL (2404.16767): ``(d - eta (r_chosen - r_rejected))^2``; ``targets`` are the differences of the rewards.

    ``ref_logprobs`` are those of the policy that sampled. ``beta`` is ``1 / eta``, so that ``beta z`` is a reward.
    ``eta`` is 1 in most of the authors' scripts, 1e6 in one.
    """
    _checks.number("rebel: eta", eta)
    if not 0 < eta < float("inf"):
        raise ValueError(f"rebel: eta must be positive and finite, got {eta}")
    return Preference("square", 1 / eta)
