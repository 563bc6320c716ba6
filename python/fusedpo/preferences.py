"""Losses of segments: a small function of sums of log-probs, over pairs of segments or over single ones.

Every segment gets one coefficient, which all of its tokens carry; the rest is layer 1. From logits that takes two reads
and one write of them: the coefficient of a token depends on the last token of both members of its pair.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _tokens, ops
from ._dtypes import wide
from .advantages import arguments
from .advantages.samples import Array, samples
from .logprobs import check_linear_token_logprobs, head_options, logprobs_from_hidden, token_logprobs
from .ops import hidden as ops_hidden
from .ops import units as ops_units
from .preference_objectives import Preference
from .reference import PolicyLossOutput
from .reference.advantages.segments import group_labels, kept
from .reference.aggregation import scaled
from .reference.layout import layout
from .segments import Segments, segment_sums, segments_of

__all__ = [
    "pairs_from_rewards",
    "preference_loss",
    "preference_loss_from_hidden",
    "preference_loss_from_logits",
    "regression_loss",
]

Pairs = Tensor | Literal["halves", "interleaved"]


def preference_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    *,
    objective: Preference,
    pairs: Pairs = "halves",
    labels: Tensor | None = None,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    label_smoothing: Tensor | None = None,
    reference_point: float | Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    step_ids: Tensor | None = None,
    num_steps: int | None = None,
    token_weights: Tensor | None = None,
    sft_mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    sft_denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
) -> PolicyLossOutput:
    """The loss of ``objective``; its formulas are in :class:`fusedpo.objectives.Preference`.

    "Per pair" below is ``[P]``; for ``link="kto"``, which has no pairs, it means one value per segment:
    ``[num_sequences]`` or ``[num_sequences, S]``.

    Args:
        logprobs: log-probs in nats under the policy that is trained, in the layouts of
            :func:`fusedpo.sequence_logprobs`; so are ``mask``, ``cu_seqlens``, ``step_ids``, ``num_steps`` and
            ``token_weights``.
        ref_logprobs: like ``logprobs``, under the reference policy (REBEL: the one that sampled). None exactly if
            ``objective.reference_free``.
        pairs: which segments are compared. ``"halves"``: the chosen sequences first, then the rejected ones in the same
            order (TRL, OpenRLHF); ``"interleaved"``: chosen, rejected, chosen, ...; or int32 or int64 ``[P, 2]`` of
            (chosen, rejected), numbers of segments: the sequence, with ``step_ids`` ``sequence * S + step``. A segment
            may be in several pairs. A pair with a number below 0 or with a segment without kept token does not count,
            in the mean neither.
        labels: of ``link="kto"``, bool or integer, per segment: positive where it is desirable.
        targets: per pair, floating-point; needed by ``link="square"`` without ``target``: ``r_chosen - r_rejected``.
        weights: per pair, multiply its loss (not the NLL). margins, label_smoothing: per pair, in place of those of
            ``objective``.
        reference_point: a number or a 0-d tensor, in nats: ``z0`` of ``link="kto"``, which needs it. The authors take
            ``max(0, mean of z)`` of completions paired with the prompts of others, over all ranks.
        sft_mask: like ``mask``, the tokens whose NLL ``objective.sft_coef`` adds; None: those of ``mask``.
        denominator: what the sum over pairs is divided by instead of their number in this batch: the pairs of a whole
            accumulated or distributed batch. A number or a 0-d tensor; 0 counts as 1. sft_denominator: the same for the
            NLL of ``sft_aggregation="token-mean"``: the tokens of the chosen segments.
        loss_scale: a number or a 0-d tensor that multiplies the loss.

    Returns:
        ``loss``: 0-d, float64 for float64 ``logprobs``, else float32; 0, with a gradient of 0, without any pair that
        counts. ``metrics``, 0-d means over the pairs that count: ``rewards_chosen`` and ``rewards_rejected``
        (``beta z``), ``rewards_margins``, ``rewards_accuracies``, ``logps_chosen`` and ``logps_rejected`` (sums of log-
        probs), and their number, ``pairs``; for ``link="kto"`` chosen means desirable, the number is ``segments``, and
        there are no accuracies. With an NLL also ``nll``, without coefficient. ``logprobs``: the argument, detached;
        ``entropy``: None.

    Differentiable with respect to ``logprobs``, and nothing else is.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, numbers of
            segments that there are not, an argument that a part of ``objective`` needs and that is None, or that no
            part has a use for.
    """
    _checks.floating("logprobs", logprobs)
    loss = _PreferenceLoss(
        "logprobs",
        logprobs,
        logprobs,
        ref_logprobs,
        objective=objective,
        pairs=pairs,
        labels=labels,
        targets=targets,
        weights=weights,
        margins=margins,
        label_smoothing=label_smoothing,
        reference_point=reference_point,
        mask=mask,
        cu_seqlens=cu_seqlens,
        step_ids=step_ids,
        num_steps=num_steps,
        token_weights=token_weights,
        sft_mask=sft_mask,
        denominator=denominator,
        sft_denominator=sft_denominator,
        loss_scale=loss_scale,
    )
    return PolicyLossOutput(loss(logprobs), loss.metrics(logprobs), logprobs.detach(), None)


@_checks.of_whole_vocabulary(
    "preference_loss(token_logprobs(logits, token_ids, tp_group=tp_group), ...) is the loss of a split vocabulary; "
    "of split sequences gather the log-probs"
)
def preference_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    ref_logprobs: Tensor | None,
    *,
    objective: Preference,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
    skip_shared_prefix: bool = False,
    **options: Any,
) -> PolicyLossOutput:
    """:func:`preference_loss` of the log-probs of ``token_ids`` under ``softmax(logits / temperature)``.

    The logits are read twice and their gradient is written once.

    Args:
        logits, token_ids, temperature, inplace: as in :func:`fusedpo.policy_loss_from_logits`, where two passes are
            taken.
        skip_shared_prefix: do not evaluate the first tokens of a pair as far as both members have the same ones, at the
            same places of their sequences: they cancel in a difference of sums. The two prompts must be the same, and
            ``pairs`` be ``"halves"`` or ``"interleaved"``; not for an objective that normalises, has an NLL or the
            link ``kto``, nor with ``token_weights``. The metrics of chosen and rejected are then without these tokens.
        options: the other arguments of :func:`preference_loss`.

    Returns:
        As :func:`preference_loss`; ``logprobs`` and ``entropy`` are those of the tokens, detached, and 0 at tokens that
        the loss does not depend on. Differentiable with respect to ``logits``.

    Raises:
        As :func:`preference_loss` and :func:`fusedpo.token_logprobs`.
    """
    _checks.floating("logits", logits)
    _check_token_ids(token_ids, "logits", logits)
    loss = _PreferenceLoss(
        "logits", logits, token_ids, ref_logprobs, objective=objective, skip=skip_shared_prefix, **options
    )
    logprobs, entropy = token_logprobs(
        logits,
        token_ids,
        temperature=temperature,
        mask=loss.evaluated.reshape(token_ids.shape),
        return_entropy=True,
        inplace_backward=inplace,
    )
    return PolicyLossOutput(loss(logprobs), loss.metrics(logprobs), logprobs.detach(), entropy.detach())


@_checks.of_whole_vocabulary(
    "preference_loss(linear_token_logprobs(hidden, weight, token_ids, tp_group=tp_group), ...) is the loss of a split "
    "head; of split sequences gather the log-probs"
)
def preference_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    ref_logprobs: Tensor | None,
    *,
    objective: Preference,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    gradient_threshold: float | None = None,
    temperature: float | Tensor = 1.0,
    skip_shared_prefix: bool = False,
    **options: Any,
) -> PolicyLossOutput:
    """:func:`preference_loss_from_logits` of ``hidden @ weight.T``, one chunk of which is in memory at a time.

    Where the tokens of every pair (and of all pairs that share a segment with it) fit into one chunk, their gradients
    are computed while its logits are there: three matrix products, two for a frozen ``weight``. Otherwise the backward
    computes the logits again, one product more; so it does for float16 with a number of at most 1 as ``loss_scale``,
    and under ``torch.compile``, functorch and the reference. ``metrics["products"]`` says how many it takes.

    Args:
        hidden, weight, bias, softcap, logit_scale, chunk_tokens, gradient_threshold: as in
            :func:`fusedpo.linear_token_logprobs`.
        Others as in :func:`preference_loss_from_logits`.

    Returns:
        As :func:`preference_loss_from_logits`; differentiable with respect to ``hidden``, ``weight`` and ``bias``,
        once. ``metrics`` has three more names: ``rows``, how many tokens were evaluated, ``products`` and
        ``dropped`` (:func:`fusedpo.policy_loss_from_hidden`).

    Raises:
        As :func:`preference_loss_from_logits` and :func:`fusedpo.linear_token_logprobs`.
    """
    _checks.floating("hidden", hidden)
    _check_token_ids(token_ids, "hidden", hidden)
    loss = _PreferenceLoss(
        "hidden", hidden, token_ids, ref_logprobs, objective=objective, skip=skip_shared_prefix, **options
    )
    head = head_options(hidden, softcap, logit_scale, chunk_tokens, gradient_threshold)
    mask = loss.evaluated.reshape(token_ids.shape)
    check_linear_token_logprobs(hidden, weight, bias, token_ids, temperature=temperature, mask=mask)

    needed = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    products = 1 + needed[0] + needed[1]
    backend, scale = ops_hidden.choose(hidden, head.dtype), options.get("loss_scale", 1.0)
    rounded = torch.float16 in (hidden.dtype, head.dtype) and not isinstance(scale, Tensor) and scale <= 1
    chunks = None
    if any(needed) and backend != "reference" and not rounded:
        chunks = ops_units.chunks_of_units(
            loss.components(), loss.segments.ids[loss.evaluated], weight.shape[0], head, hidden.device
        )
    if chunks is not None:
        rows = loss.evaluated.nonzero().squeeze(1)
        value, logprobs, entropy, dropped = ops_units.loss_from_hidden(
            hidden,
            weight,
            bias,
            token_ids.to(torch.int64),
            ops.as_scalar(temperature, hidden.device),
            [rows[chunk] for chunk in chunks],
            loss,
            options=head,
            backend=backend,
        )
    else:
        products += any(needed)
        logprobs, entropy, dropped = logprobs_from_hidden(hidden, weight, bias, token_ids, temperature, mask, head)
        value = loss(logprobs)
    counts = {"rows": loss.evaluated.sum(), "products": torch.tensor(float(products), device=hidden.device)}
    metrics = {**loss.metrics(logprobs), **{name: x.float() for name, x in counts.items()}, "dropped": dropped}
    return PolicyLossOutput(value, metrics, logprobs.detach(), entropy.detach())


def regression_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    targets: Tensor,
    *,
    beta: float,
    scale: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    step_ids: Tensor | None = None,
    num_steps: int | None = None,
    token_weights: Tensor | None = None,
    normalize: bool = False,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
) -> PolicyLossOutput:
    """The mean over segments of ``scale * (beta z - target)^2``, ``z`` the sum of ``logprobs - ref_logprobs``.

    A*-PO (2505.20686): ``targets = r - V`` with the soft value ``V`` (:func:`fusedpo.advantages.soft_value`) of samples
    of the reference policy, ``beta=1e-3``. Direct Advantage-Based Policy Optimization (2412.18279):
    ``(z - A / beta)^2 / 2`` of steps is ``scale=0.5 / beta**2``; its ``beta`` is 0.01.

    Args:
        targets: floating-point, one per segment: ``[num_sequences]``, with ``step_ids`` ``[num_sequences, S]``. A
            segment without kept token, or whose target is nan, does not count.
        beta: positive. scale: a number. weights: one per segment, multiply its loss.
        Others as in :func:`fusedpo.sequence_logprobs` and, for segments instead of pairs, :func:`preference_loss`.

    Returns:
        ``loss`` as in :func:`preference_loss`. ``metrics``, 0-d means over the segments that count: ``rewards``
        (``beta z``), ``targets``, ``squared_error``, ``logps`` and their number, ``segments``. ``logprobs`` and
        ``entropy`` as there.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, values.
    """
    _checks.floating("logprobs", logprobs)
    segments = segments_of("logprobs", logprobs, logprobs, mask, cu_seqlens, step_ids, num_steps)
    _tokens.check_per_token("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    if token_weights is not None:
        _tokens.check_per_token("token_weights", token_weights, "logprobs", logprobs)
    arguments.positive("beta", beta)
    _checks.finite("scale", scale)
    _check_units("targets", targets, segments.shape, "logprobs", logprobs)
    if weights is not None:
        _check_units("weights", weights, segments.shape, "logprobs", logprobs)
    _tokens.check_count("denominator", denominator, "logprobs", logprobs)
    _tokens.check_number("loss_scale", loss_scale, "logprobs", logprobs)

    dtype = wide(logprobs)
    sizes = segments.sizes()
    target = _unit_values(targets, dtype)
    counted = (sizes > 0) & ~target.isnan()
    z = segment_sums(logprobs, ref_logprobs, token_weights, segments)
    if normalize:
        z = z / sizes.clamp(min=1)
    error = (beta * z - target).where(counted, 0).square()
    terms = scale * error
    if weights is not None:
        terms = terms * _unit_values(weights, dtype).where(counted, 0)
    loss = terms.sum() / _or_one(counted.sum() if denominator is None else denominator, dtype, logprobs.device)
    with torch.no_grad():
        mean = _mean_over(counted)
        metrics = {
            "rewards": mean(beta * z),
            "targets": mean(target),
            "squared_error": mean(error),
            "logps": mean(segment_sums(logprobs, None, None, segments)),
            "segments": counted.sum().float(),
        }
    return PolicyLossOutput(_scaled(loss, loss_scale, logprobs), metrics, logprobs.detach(), None)


def pairs_from_rewards(
    rewards: Array,
    *,
    group_size: int | None = None,
    group_ids: Array | None = None,
    how: Literal["best_worst", "all"] = "best_worst",
    margin: float = 0.0,
    mask: Array | None = None,
) -> Tensor:
    """``[P, 2]``, int64: (chosen, rejected) samples of a group, whose rewards differ by more than ``margin``.

    Ties make no pair. ``"best_worst"``: the best and the worst of every group, the first of several; ``"all"``: every
    two samples, in the order of the chosen and then the rejected one. Groups and ``mask`` as in
    :mod:`fusedpo.advantages`; a sample whose reward is nan is left out. How many pairs there are depends on the data,
    which costs a sync.

    Raises ``TypeError`` and ``ValueError`` as that package does, ``ValueError`` for a negative ``margin``.
    """
    flat, group_size, group_ids, mask = samples(rewards, group_size, group_ids, mask).groups
    arguments.choice("how", how, ("best_worst", "all"))
    _checks.number("margin", margin)
    if not margin >= 0:
        raise ValueError(f"margin must be >= 0, got {margin}")
    r = flat.detach().double()
    alive = (kept(r, mask) & ~r.isnan()).nonzero().squeeze(1)
    r, labels = r[alive], group_labels(flat, group_size, group_ids)[alive]
    if how == "all":
        better = (r[:, None] - r[None, :] > margin) & (labels[:, None] == labels[None, :])
        return alive[better.nonzero()]
    order = r.argsort(stable=True, descending=True)
    order = order[labels[order].argsort(stable=True)]
    best = _first_of_runs(labels[order], order)
    order = r.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    worst = _first_of_runs(labels[order], order)
    found = r[best] - r[worst] > margin
    return alive[torch.stack((best, worst), 1)[found]]


def _first_of_runs(labels: Tensor, values: Tensor) -> Tensor:
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[1:] = labels[1:] != labels[:-1]
    return values[starts]


# ------------------------------------------------------------------------------------------------------------- the loss


class _PreferenceLoss:
    """What a preference loss is but for the log-probs: called with them, it gives the loss.

    Its gradient with respect to the log-probs of a pair depends on those of that pair alone, and of pairs that share a
    segment with it: everything that the sum over pairs is divided by is known before.
    """

    def __init__(
        self,
        name: str,
        source: Tensor,
        tokens: Tensor,
        ref_logprobs: Tensor | None,
        *,
        objective: Preference,
        pairs: Pairs = "halves",
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        margins: Tensor | None = None,
        label_smoothing: Tensor | None = None,
        reference_point: float | Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        step_ids: Tensor | None = None,
        num_steps: int | None = None,
        token_weights: Tensor | None = None,
        sft_mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
        sft_denominator: float | Tensor | None = None,
        loss_scale: float | Tensor = 1.0,
        skip: bool = False,
    ) -> None:
        if not isinstance(objective, Preference):
            raise TypeError(f"objective must be a fusedpo.objectives.Preference, got {type(objective).__name__}")
        self.objective, self.ref_logprobs, self.token_weights = objective, ref_logprobs, token_weights
        self.loss_scale = loss_scale
        self.segments = segments_of(name, source, tokens, mask, cu_seqlens, step_ids, num_steps)
        for argument, tensor in (("ref_logprobs", ref_logprobs), ("token_weights", token_weights)):
            if tensor is not None:
                _tokens.check_per_token(argument, tensor, name, source, tokens.shape)
        _tokens.check_count("denominator", denominator, name, source)
        _tokens.check_count("sft_denominator", sft_denominator, name, source)
        _tokens.check_number("loss_scale", loss_scale, name, source)
        _check_objective(objective, ref_logprobs, labels, targets, margins, label_smoothing, reference_point)
        if objective.sft_coef == 0 and (sft_mask is not None or sft_denominator is not None):
            raise ValueError("sft_mask and sft_denominator have no meaning with objective.sft_coef=0")
        if sft_denominator is not None and objective.sft_aggregation != "token-mean":
            raise ValueError("sft_denominator is for sft_aggregation='token-mean', the other divides by the pairs")

        self.dtype = wide(source)
        self.sizes = self.segments.sizes()
        single = objective.link == "kto"
        if single:
            if not isinstance(pairs, str) or pairs != "halves":
                raise ValueError("pairs have no meaning with link='kto'")
            self.first = self.second = torch.arange(self.segments.number, device=source.device)
            self.counted = self.sizes > 0
        else:
            both = _numbers_of_pairs(pairs, self.segments, name, source)
            self.first, self.second = both.clamp(min=0).unbind(1)
            has_tokens = self.sizes > 0
            self.counted = (both >= 0).all(1) & has_tokens[self.first] & has_tokens[self.second]
        units = self.segments.shape if single else (self.first.numel(),)

        def per_unit(argument: str, tensor: Tensor | None, otherwise: float) -> Tensor | float:
            if tensor is None:
                return otherwise
            _check_units(argument, tensor, units, name, source)
            return _unit_values(tensor, self.dtype).where(self.counted, 0)

        self.weights = per_unit("weights", weights, 1.0)
        self.margins = per_unit("margins", margins, objective.margin)
        self.targets = per_unit("targets", targets, objective.target or 0.0)
        self.smoothing = per_unit("label_smoothing", label_smoothing, objective.label_smoothing)
        if label_smoothing is not None and _checks.values_are_free(label_smoothing):
            _check_smoothing(label_smoothing, objective)
        if labels is not None:
            _checks.is_tensor("labels", labels)
            _checks.shape("labels", labels, units, "one per segment")
            _checks.same_device("labels", labels, name, source)
            self.desirable = labels.reshape(-1) > 0
        if reference_point is not None:
            _tokens.check_number("reference_point", reference_point, name, source)
            self.reference_point = (
                reference_point.detach().to(self.dtype) if isinstance(reference_point, Tensor) else reference_point
            )
        self.divisor = _or_one(self.counted.sum() if denominator is None else denominator, self.dtype, source.device)

        # Tokens of segments that are in no pair that counts have the coefficient 0.
        used = self._among(self.first) | self._among(self.second)
        self.summed = self.segments.only(self.segments.per_token(used))
        if skip:
            self._check_skip(pairs)
            shared = _shared_prefix(tokens, pairs, self.segments, cu_seqlens)
            self.summed = self.summed.only(~shared)
        self.sft = self.summed
        if objective.sft_coef != 0:
            self._add_sft(sft_mask, sft_denominator, name, source, tokens, cu_seqlens, step_ids)
        self.evaluated = self.summed.kept | self.sft.kept

    def _add_sft(
        self,
        sft_mask: Tensor | None,
        sft_denominator: float | Tensor | None,
        name: str,
        source: Tensor,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        step_ids: Tensor | None,
    ) -> None:
        segments = self.segments
        if sft_mask is not None:
            num_steps = None if step_ids is None else segments.shape[1]
            segments = segments_of(name, source, tokens, sft_mask, cu_seqlens, step_ids, num_steps)
        self.sft = segments.only(segments.per_token(self._among(self.first)))
        self.sft_sizes = self.sft.sizes()
        tokens_of_chosen = self.sft_sizes[self.first].where(self.counted, 0).sum()
        self.sft_divisor = _or_one(
            tokens_of_chosen if sft_denominator is None else sft_denominator, self.dtype, source.device
        )

    def _among(self, numbers: Tensor) -> Tensor:
        """``[segments]``, bool: which are among ``numbers``, of units that count."""
        marks = torch.zeros(self.segments.number + 1, dtype=torch.bool, device=numbers.device)
        return marks.index_fill(0, numbers.where(self.counted, self.segments.number), True)[:-1]

    def _check_skip(self, pairs: Pairs) -> None:
        objective = self.objective
        if objective.normalize or objective.sft_coef != 0 or objective.link == "kto" or self.token_weights is not None:
            raise ValueError(
                "skip_shared_prefix is for differences of sums: not with normalize, sft_coef, link='kto' or "
                "token_weights"
            )
        if isinstance(pairs, Tensor):
            raise ValueError("skip_shared_prefix needs pairs='halves' or 'interleaved', got numbers of segments")

    def __call__(self, logprobs: Tensor) -> Tensor:
        objective = self.objective
        z = self._sums(logprobs)
        loss = (self._link(z) * self.weights).where(self.counted, 0).sum() / self.divisor
        if objective.sft_coef != 0:
            loss = loss + objective.sft_coef * self._nll(logprobs)
        return _scaled(loss, self.loss_scale, logprobs)

    def _sums(self, logprobs: Tensor) -> Tensor:
        z = segment_sums(logprobs, self.ref_logprobs, self.token_weights, self.summed)
        return z / self.sizes.clamp(min=1) if self.objective.normalize else z

    def _link(self, z: Tensor) -> Tensor:
        """The loss of each unit, of any value where it does not count."""
        objective, beta = self.objective, self.objective.beta
        if objective.link == "odds":
            z = z.clamp(max=-1e-6)  # 0 where all tokens are certain
            z = z - _log1mexp(z)
        if objective.link == "kto":
            x = ((z - self.reference_point) * beta).where(self.counted, 0)
            weight = x.new_full((), objective.desirable_weight)
            weight = weight.where(self.desirable, objective.undesirable_weight)
            return weight * torch.sigmoid(x.where(~self.desirable, -x))
        d = (z[self.first] - z[self.second] - self.margins).where(self.counted, 0)
        if objective.link == "square":
            return (d - self.targets / beta).square()
        if objective.link == "hinge":
            return F.relu(1 - beta * d)
        if objective.link == "odds":
            return beta * _minus_log_sigmoid(d)
        right, flipped, e = _minus_log_sigmoid(beta * d), _minus_log_sigmoid(-beta * d), self.smoothing
        if objective.link == "robust":
            return ((1 - e) * right - e * flipped) / (1 - 2 * e)
        return (1 - e) * right + e * flipped

    def _nll(self, logprobs: Tensor) -> Tensor:
        nll = -segment_sums(logprobs, None, None, self.sft)
        if self.objective.sft_aggregation == "seq-mean-token-mean":
            nll, divisor = nll / self.sft_sizes.clamp(min=1), self.divisor
        else:
            divisor = self.sft_divisor
        return nll[self.first].where(self.counted, 0).sum() / divisor

    def metrics(self, logprobs: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            rewards = self.objective.beta * self._sums(logprobs)
            logps = segment_sums(logprobs, None, None, self.summed)
            nll = {} if self.objective.sft_coef == 0 else {"nll": self._nll(logprobs).float()}
        if self.objective.link == "kto":
            chosen, rejected = _mean_over(self.counted & self.desirable), _mean_over(self.counted & ~self.desirable)
            pair = rewards, rewards, logps, logps
            others = {"segments": self.counted.sum().float()}
        else:
            chosen = rejected = _mean_over(self.counted)
            pair = rewards[self.first], rewards[self.second], logps[self.first], logps[self.second]
            others = {
                "rewards_accuracies": chosen((pair[0] > pair[1]).to(self.dtype)),
                "pairs": self.counted.sum().float(),
            }
        r = chosen(pair[0]), rejected(pair[1])
        return {
            "rewards_chosen": r[0],
            "rewards_rejected": r[1],
            "rewards_margins": r[0] - r[1],
            "logps_chosen": chosen(pair[2]),
            "logps_rejected": rejected(pair[3]),
            **others,
            **nll,
        }

    def components(self) -> list[int]:
        """For each segment a number that it has in common with those whose coefficients depend on its log-probs."""
        parent = list(range(self.segments.number))

        def root(x: int) -> int:
            while parent[x] != x:
                parent[x] = parent[parent[x]]
                x = parent[x]
            return x

        pairs = torch.stack((self.first, self.second, self.counted), 1).tolist()
        for chosen, rejected, counted in pairs:
            if counted:
                parent[root(chosen)] = root(rejected)
        return [root(x) for x in range(len(parent))]


def _minus_log_sigmoid(x: Tensor) -> Tensor:
    """``log(1 + exp(-x))``, exact until that is ``-x``. (``logsigmoid`` wakes all threads on the CPU.)"""
    return F.softplus(-x, threshold=600.0 if x.dtype == torch.float64 else 80.0)


def _log1mexp(z: Tensor) -> Tensor:
    """``log(1 - exp(z))`` for ``z < 0``."""
    small = z > -0.6931471805599453
    near, far = z.where(small, -1), z.where(~small, -1)  # neither branch may be infinite where the other is taken
    return torch.where(small, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


def _numbers_of_pairs(pairs: Pairs, segments: Segments, name: str, source: Tensor) -> Tensor:
    """``[P, 2]``, int64: (chosen, rejected)."""
    sequences = segments.shape[0]
    if isinstance(pairs, str):
        if pairs not in ("halves", "interleaved"):
            raise ValueError(f"pairs must be 'halves', 'interleaved' or [P, 2], got {pairs!r}")
        if sequences % 2:
            raise ValueError(f"pairs={pairs!r} needs an even number of sequences, got {sequences}")
        numbers = torch.arange(segments.number, device=source.device)
        if pairs == "halves":
            return numbers.reshape(2, -1).t()
        return numbers.reshape(sequences // 2, 2, -1).transpose(1, 2).reshape(-1, 2)
    _checks.integer("pairs", pairs)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape [P, 2], (chosen, rejected), got {list(pairs.shape)}")
    _checks.same_device("pairs", pairs, name, source)
    if _checks.values_are_free(pairs) and bool((pairs >= segments.number).any()):
        raise ValueError(f"pairs must be less than the number of segments {segments.number}, got {int(pairs.max())}")
    return pairs.to(torch.int64) if segments.number else pairs.new_empty((0, 2), dtype=torch.int64)


def _shared_prefix(tokens: Tensor, pairs: Pairs, segments: Segments, cu_seqlens: Tensor | None) -> Tensor:
    """Which tokens, flat, stand before the first one in which the two sequences of their pair differ."""
    where = layout(tokens, cu_seqlens)
    numbers = torch.arange(segments.shape[0], device=tokens.device)
    half = segments.shape[0] // 2
    partner = (numbers + half) % max(2 * half, 1) if pairs == "halves" else numbers ^ 1
    partner = partner[where.sequence]
    starts = where.lengths.cumsum(0) - where.lengths
    there = where.before < where.lengths[partner]
    other = (starts[partner] + where.before).where(there, 0)
    ids, steps = tokens.reshape(-1), segments.ids - where.sequence * (segments.number // segments.shape[0])
    same = (ids == ids[other]) & (steps == steps[other]) & segments.kept & segments.kept[other]
    same = there & (same | (~segments.kept & ~segments.kept[other]))
    return where.place(~same) == 0


def _mean_over(counted: Tensor) -> Any:
    number = counted.sum().clamp(min=1)
    return lambda x: (x.where(counted, 0).sum() / number).float()


def _or_one(number: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A count as a 0-d tensor, where 0 counts as 1."""
    count = number.detach().to(dtype) if isinstance(number, Tensor) else ops.scalar(number, device).to(dtype)
    return count.where(count != 0, 1)


def _scaled(loss: Tensor, loss_scale: float | Tensor, logprobs: Tensor) -> Tensor:
    return scaled(loss, loss_scale).to(torch.promote_types(logprobs.dtype, torch.float32))


def _unit_values(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().reshape(-1).to(dtype)


# --------------------------------------------------------------------------------------------------------------- checks


def _check_token_ids(token_ids: Tensor, name: str, source: Tensor) -> None:
    _checks.integer("token_ids", token_ids)
    _checks.shape("token_ids", token_ids, tuple(source.shape[:-1]), f"one id per token of {name}")
    _checks.same_device("token_ids", token_ids, name, source)


def _check_units(argument: str, tensor: Tensor, units: tuple[int, ...], name: str, source: Tensor) -> None:
    _checks.floating(argument, tensor)
    _checks.shape(argument, tensor, units, "one per pair" if len(units) == 1 else "one per segment")
    _checks.same_device(argument, tensor, name, source)


def _check_smoothing(label_smoothing: Tensor, objective: Preference) -> None:
    below = 0.5 if objective.link == "robust" else 1.0
    if not bool(((label_smoothing >= 0) & (label_smoothing <= below)).all()):
        raise ValueError(f"label_smoothing must be in [0, {below}] with link={objective.link!r}")


def _check_objective(
    objective: Preference,
    ref_logprobs: Tensor | None,
    labels: Tensor | None,
    targets: Tensor | None,
    margins: Tensor | None,
    label_smoothing: Tensor | None,
    reference_point: float | Tensor | None,
) -> None:
    """That everything is there that a part of the objective needs, and nothing that none has a use for."""
    link = objective.link
    needs = {
        "ref_logprobs": (ref_logprobs, not objective.reference_free, f"reference_free={objective.reference_free}"),
        "labels": (labels, link == "kto", f"link={link!r}"),
        "reference_point": (reference_point, link == "kto", f"link={link!r}"),
        "targets": (targets, link == "square" and objective.target is None, f"{link=!r}, target={objective.target}"),
    }
    for argument, (value, needed, part) in needs.items():
        if needed and value is None:
            raise ValueError(f"{argument} is needed by an objective with {part}, got None")
        if not needed and value is not None:
            raise ValueError(f"{argument} has no meaning for an objective with {part}, and must be None")
    if margins is not None and link == "kto":
        raise ValueError("margins are for pairs, link='kto' has none")
    if label_smoothing is not None and link not in ("sigmoid", "robust"):
        raise ValueError(f"label_smoothing has no meaning with {link=!r}, use 'sigmoid' or 'robust'")
