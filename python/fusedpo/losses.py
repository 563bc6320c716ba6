"""Layer 2: how much should each token's log-prob move? Ratio, forward trace, trust region, KL, entropy, aggregation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import _checks, _tokens, backends, ops, reference
from ._batch import Batch, as_bool, as_float, checked
from .logprobs import (
    as_kernels_take_them,
    check_linear_token_logprobs,
    check_temperature,
    check_vocabulary,
    checked_token_logprobs,
    head_options,
    ids_and_temperature,
    logprobs_from_hidden,
    taken_if_differentiated,
)
from .objectives import Objective, as_objective
from .ops import hidden as ops_hidden
from .ops import one_pass as ops_one_pass
from .ops import opaque_hidden as ops_opaque
from .ops import policy_loss as ops_policy_loss
from .reference import PolicyLossOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed import ContextParallel

__all__ = ["PolicyLossOutput", "policy_loss", "policy_loss_from_hidden", "policy_loss_from_logits"]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective | str,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    is_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    reduction: Literal["mean", "none"] = "mean",
    cp: ContextParallel | None = None,
) -> PolicyLossOutput:
    """The loss of ``objective``; its formulas are in :mod:`fusedpo.objectives`.

    Args:
        logprobs: log-probs in nats under the policy that is trained, floating-point: padded ``[B, T]``, or packed
            ``[T]`` or ``[1, T]`` with ``cu_seqlens``; ``[T]`` without ``cu_seqlens`` is one sequence. "Per token" below
            is this shape.
        old_logprobs: per token, under the policy that sampled. None: ``logprobs.detach()``.
        advantages: per token, or per sequence: ``[B]`` or ``[B, 1]``, packed ``[num_sequences]``. A packed batch with
            as many tokens as sequences takes them per token.
        objective: what is computed; a string is the name of a preset with its defaults
            (:func:`fusedpo.objectives.make`).
        mask: per token, bool, integer or floating-point; nonzero keeps a token. What the other arrays hold at masked
            tokens (nan, inf) reaches neither the loss nor a gradient nor a metric.
        cu_seqlens: ``[num_sequences + 1]``, int32 or int64: where each packed sequence starts, and the number of
            tokens.
        ref_logprobs: per token, under the reference policy; ``objective.kl`` needs it.
        entropy: per token, in nats; ``objective.entropy_coef`` needs it. It may be given without, for the metrics.
        is_weights: as ``advantages``; multiply the policy term of their token.
        denominator: what the sum is divided by instead of the count in this batch: the tokens for ``token-mean``, the
            sequences for ``seq-mean-*`` of a whole accumulated or distributed batch. A number or a 0-d tensor; 0 counts
            as 1.
        loss_scale: a number or a 0-d tensor that multiplies the loss.
        reduction: ``"mean"`` aggregates as ``objective.aggregation`` says; ``"none"`` gives the loss of each token.
        cp: how sequences are split over ranks (:class:`fusedpo.ContextParallel`). Arrays per token are those of this
            rank then, ``cu_seqlens`` and arrays per sequence those of the whole; ``loss`` is this rank's share, its
            gradient that of the sum of the shares of all ranks, and ``metrics`` are those of all their tokens.

    Returns:
        ``loss``: 0-d, or shaped like ``logprobs`` and 0 at masked tokens; float64 for float64 ``logprobs``, else
        float32. ``metrics``: the names in ``fusedpo.reference.METRICS``, 0-d tensors over the kept tokens, 0 if there
        is none. ``clip_frac_low`` and ``clip_frac_high`` are the fractions of tokens whose gradient (CISPO: weight) the
        lower and the upper bound cut, ``clip_frac`` their sum; ``kl`` (to the reference policy) and ``entropy`` are
        means without coefficient, 0 where the objective has no KL part and where no entropy is given; ``approx_kl`` and
        ``approx_kl_k3`` estimate the divergence from the old policy; ``ess`` is the effective sample size of the
        weights ``rho * F`` as a fraction of the tokens; ``clamp_frac`` counts tokens whose log-ratio or log-trace was
        clamped. ``logprobs`` and ``entropy``: the arguments, detached.

    Differentiable with respect to ``logprobs`` and, if ``objective.entropy_coef`` is not 0, ``entropy``; nothing else
    is. With no kept token the loss is 0 and so are the gradients.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, an argument that a
            part of ``objective`` needs and that is None, ``denominator`` where nothing is divided.
    """
    objective = as_objective(objective)
    given = (old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, is_weights, denominator, loss_scale)
    if cp is not None:
        from .distributed import losses

        return losses.policy_loss(logprobs, entropy, Batch(*given), objective, reduction, cp)
    batch = checked(given, "logprobs", logprobs, objective)
    if entropy is not None:
        (entropy,) = _checks.taken(entropy)
        _tokens.check_per_token("entropy", entropy, "logprobs", logprobs)
    _check_entropy_and_reduction(entropy, reduction, objective, denominator)
    return _policy_loss(logprobs, entropy, batch, objective, reduction)


def policy_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective | str,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    is_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    inplace: bool = False,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    cp: ContextParallel | None = None,
) -> PolicyLossOutput:
    """:func:`policy_loss` of the log-probs of ``token_ids`` under ``softmax(logits / temperature)``.

    The gradient is computed with the loss, in one pass over the logits, where that of a token depends on no token
    before it and on at most 256 after it. Otherwise a second pass, in the backward, computes it: for a
    ``SequenceRatio``, a trace that looks back, further ahead or is differentiated, ``LogClip``, ``CPPO`` and ``GMPO``;
    for float16 with a number of at most 1 as ``loss_scale``; and under ``torch.compile`` and functorch.

    Args:
        logits: ``[B, T, V]``, or packed ``[T, V]`` or ``[1, T, V]``; floating-point, rows may be strided.
        token_ids: ``[B, T]``, or ``[T]`` or ``[1, T]``, int32 or int64: the token that each row predicts
            (:func:`fusedpo.next_tokens`). Neither ids nor logits of masked tokens are read.
        temperature: positive number, or a tensor of one value per token.
        loss_scale: as in :func:`policy_loss`. The value of a tensor is not read: with float16 logits it has to be the
            factor of the GradScaler, or the gradient is rounded, and may underflow, before that factor comes.
        inplace: let the gradient overwrite ``logits``, in the backward where it takes two passes, which saves a tensor
            of their size. A use of the logits that was saved before raises then; reading them afterwards gives the
            gradient, undetected. Ignored by the reference, under ``torch.compile`` and where rows share memory.
        tp_group, vocab_start, vocab_size: the vocabulary is split over ranks, or padded, as in
            :func:`fusedpo.token_logprobs`; the gradient takes two passes. All ranks get the same loss, which counts
            once.
        Others as in :func:`policy_loss`. With ``cp`` two passes, too, where a window crosses ranks so often that more
        than a quarter of the rows would be read twice, and with ``positions`` and any window.

    Returns:
        As :func:`policy_loss`; ``logprobs`` and ``entropy`` are those of the tokens, detached, 0 where masked. ``loss``
        is differentiable with respect to ``logits``, through the entropy too if ``objective.entropy_coef`` is not 0.

    Raises:
        As :func:`policy_loss` and :func:`fusedpo.token_logprobs`.
    """
    objective = as_objective(objective)
    given = (old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, is_weights, denominator, loss_scale)
    split = tp_group is not None or vocab_start is not None or vocab_size is not None or cp is not None
    if split or _checks.is_dtensor(logits):
        from .distributed import losses

        return losses.policy_loss_from_logits(
            logits,
            token_ids,
            Batch(*given),
            objective=objective,
            temperature=temperature,
            inplace=inplace,
            split={"tp_group": tp_group, "vocab_start": vocab_start, "vocab_size": vocab_size},
            cp=cp,
        )
    batch = checked(given, "logits", logits, objective, features=1)
    token_ids, temperature = _checks.taken(token_ids, temperature)
    _check_token_ids(token_ids, "logits", logits)
    check_vocabulary(logits)
    _checks.same_device("token_ids", token_ids, "logits", logits)
    check_temperature(temperature, token_ids.shape, "logits", logits)
    backend = None
    if ops.require_grad(logits) and not ops.must_be_functional():
        backend = _one_pass_backend(logits.device, (logits.dtype,), batch, objective)
    if backend is not None and not backends.takes_two_passes(logits, backend):
        results = ops_one_pass.policy_loss_from_logits(
            *as_kernels_take_them(logits, token_ids, temperature),
            batch.as_kernels_take_it(token_ids),
            objective=objective,
            inplace=inplace,
            backend=backend,
        )
        return _output(*results)
    logprobs, entropy = checked_token_logprobs(logits, token_ids, temperature, batch.mask, True, inplace)
    return _policy_loss(logprobs, entropy, batch, objective)


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective | str,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    gradient_threshold: float | None = None,
    num_live: int | None = None,
    skip_zero_advantages: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    is_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    cp: ContextParallel | None = None,
) -> PolicyLossOutput:
    """:func:`policy_loss_from_logits` of the logits ``hidden @ weight.T``, of which one chunk is in memory at a time.

    Where :func:`policy_loss_from_logits` takes one pass, the gradients are computed with the loss, by three matrix
    products; where it takes two, the logits are computed again in the backward.

    Only the tokens that ``mask`` keeps are evaluated; the others cost nothing.

    Args:
        hidden: ``[B, T, H]``, or packed ``[T, H]`` or ``[1, T, H]``: the last hidden state. ``weight``: ``[V, H]``,
            same dtype.
        bias, softcap, logit_scale, chunk_tokens, gradient_threshold: as in :func:`fusedpo.linear_token_logprobs`.
        num_live: how many tokens ``mask`` keeps, if the caller knows: it spares the sync that counts them. A wrong
            number raises where data can be read at no cost (on the CPU, or under ``FUSEDPO_DEBUG=1``) and gives a wrong
            result elsewhere. With ``skip_zero_advantages`` it spares nothing.
        skip_zero_advantages: evaluate only tokens on which the loss or its gradient depends: not those whose advantage
            is 0, if the loss has neither a KL nor an entropy part and no ratio of another token looks at them. Loss and
            gradients are still those of the whole batch, whose tokens are counted for the denominator, for less work.
            The price: ``metrics`` are statistics of the tokens that were evaluated, ``rows`` of them, and no longer
            comparable between steps with more and with fewer zeros. (The reference does not save the work.)
        tp_group, vocab_start, vocab_size: the head is split over ranks, or padded, as in
            :func:`fusedpo.linear_token_logprobs`.
        Others as in :func:`policy_loss_from_logits`.

    Returns:
        As :func:`policy_loss_from_logits`; ``loss`` is differentiable with respect to ``hidden``, ``weight`` and
        ``bias``, once. ``logprobs`` and ``entropy`` are 0 at tokens that are not evaluated. ``metrics`` has two more
        names: ``rows``, how many tokens were evaluated, all kept ones (``tokens``) unless ``skip_zero_advantages``; and
        ``dropped``, the largest probability, of all tokens, that ``gradient_threshold`` has left out of the gradient
        of one (0 where nothing is; where it takes two passes, the backward writes it).

    Raises:
        As :func:`policy_loss_from_logits` and :func:`fusedpo.linear_token_logprobs`.
    """
    objective = as_objective(objective)
    given = (old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, is_weights, denominator, loss_scale)
    split = tp_group is not None or vocab_start is not None or vocab_size is not None or cp is not None
    if split or (_checks.is_dtensor(weight) and _checks.is_dtensor(hidden)):
        from .distributed import losses

        if gradient_threshold:
            raise ValueError("gradient_threshold must be None or 0 where the vocabulary or the sequences are split")
        return losses.policy_loss_from_hidden(
            *(hidden, weight, token_ids, Batch(*given)),
            objective=objective,
            head={"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "chunk_tokens": chunk_tokens},
            temperature=temperature,
            num_live=num_live,
            skip_zero_advantages=skip_zero_advantages,
            split={"tp_group": tp_group, "vocab_start": vocab_start, "vocab_size": vocab_size},
            cp=cp,
        )
    batch = checked(given, "hidden", hidden, objective, features=1)
    token_ids, temperature, softcap, logit_scale, chunk_tokens, gradient_threshold, num_live = _checks.taken(
        token_ids, temperature, softcap, logit_scale, chunk_tokens, gradient_threshold, num_live
    )
    head = head_options(hidden, softcap, logit_scale, chunk_tokens, gradient_threshold)
    _check_token_ids(token_ids, "hidden", hidden)
    evaluated, num_live = _evaluated(token_ids, batch, objective, num_live, skip_zero_advantages)
    backend, opaque = ops_hidden.choose(hidden, head.dtype, opaque=True), ops_hidden.is_opaque(hidden)
    of_tokens = batch.mask if backend != "reference" else evaluated
    check_linear_token_logprobs(hidden, weight, bias, token_ids, temperature=temperature, mask=of_tokens)
    one_pass = None
    if backend != "reference" and ops.require_grad(hidden, weight, bias):
        dtypes = (head.dtype, *(x.dtype for x in (hidden, weight, bias) if x is not None))
        one_pass = _one_pass_backend(hidden.device, dtypes, batch, objective)
    if one_pass is None:
        logprobs, entropy, dropped = logprobs_from_hidden(
            hidden, weight, bias, token_ids, temperature, evaluated, head, num_live=num_live
        )
        out = _policy_loss(logprobs, entropy, batch, objective)
    else:
        hidden, weight, bias = taken_if_differentiated(hidden, weight, bias)
        of_batch, mask = batch.as_kernels_take_it(token_ids), as_bool(evaluated)
        inputs = ops_hidden.Inputs(hidden, weight, bias, *ids_and_temperature(token_ids, temperature), token_ids)
        how: dict[str, Any] = {"objective": objective, "options": head, "backend": one_pass}
        if opaque:
            *results, dropped = ops_opaque.policy_loss_from_hidden(inputs, mask, of_batch, **how)
        else:
            rows = ops_hidden.rows_where(mask, token_ids.numel(), hidden.device, num_live)
            *results, dropped = ops_hidden.policy_loss_from_hidden(inputs._replace(rows=rows), of_batch, **how)
        out = _output(*results)
    out = _of_evaluated(out, batch, evaluated, objective)
    return out._replace(metrics={**out.metrics, "dropped": dropped.to(out.metrics["tokens"].dtype)})


def _evaluated(
    token_ids: Tensor, batch: Batch, objective: Objective, num_live: int | None, skip_zero_advantages: bool
) -> tuple[Tensor | None, int | None]:
    """The mask of the tokens that are evaluated, and how many these are if the caller has said it."""
    if num_live is not None:
        _check_num_live(num_live, token_ids, batch.mask)
    if not isinstance(skip_zero_advantages, bool):
        raise TypeError(f"skip_zero_advantages must be a bool, got {type(skip_zero_advantages).__name__}")
    if not skip_zero_advantages:
        return batch.mask, num_live
    evaluated = ops_hidden.evaluated_tokens(token_ids, batch, objective)
    return evaluated, num_live if evaluated is batch.mask else None


def _of_evaluated(
    out: PolicyLossOutput, batch: Batch, evaluated: Tensor | None, objective: Objective
) -> PolicyLossOutput:
    """With the metrics of the tokens that were evaluated, ``rows`` of them; ``tokens`` counts the whole batch."""
    of = out.metrics
    if evaluated is not batch.mask:
        of = _policy_loss(out.logprobs, out.entropy, batch._replace(mask=evaluated), objective).metrics
    return out._replace(metrics={**of, "tokens": out.metrics["tokens"], "rows": of["tokens"]})


def _policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    batch: Batch,
    objective: Objective,
    reduction: Literal["mean", "none"] = "mean",
) -> PolicyLossOutput:
    backend = backends.choose("policy_loss", logprobs.device.type, logprobs.dtype)
    if backend == "reference":
        return reference.policy_loss(
            logprobs, objective=objective, entropy=entropy, reduction=reduction, **batch._asdict()
        )
    used_entropy = entropy if entropy is None or objective.entropy_coef != 0 else entropy.detach()
    loss, metrics = ops_policy_loss.policy_loss(
        as_float(logprobs),
        None if used_entropy is None else as_float(used_entropy),
        batch.as_kernels_take_it(logprobs),
        objective=objective,
        per_token=reduction == "none",
        backend=backend,
    )
    return _output(loss, metrics, logprobs.detach(), None if entropy is None else entropy.detach())


def _one_pass_backend(
    device: torch.device, dtypes: tuple[torch.dtype, ...], batch: Batch, objective: Objective
) -> str | None:
    """Who computes gradients together with the loss; None: two passes.

    ``dtypes`` are that of the logits, and those of what they are computed from.
    """
    if not ops_one_pass.is_possible(objective):
        return None
    if torch.float16 in dtypes and not isinstance(batch.loss_scale, Tensor) and batch.loss_scale <= 1:
        return None  # a GradScaler's factor comes with the upstream gradient: before it, gradients may be too small
    return backends.kernel_for("one_pass", device.type, dtypes[0])


def _output(loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor | None) -> PolicyLossOutput:
    return PolicyLossOutput(loss, dict(zip(reference.METRICS, metrics.unbind(), strict=True)), logprobs, entropy)


# --------------------------------------------------------------------------------------------------------------- checks


def _check_entropy_and_reduction(
    entropy: Tensor | None, reduction: str, objective: Objective, denominator: float | Tensor | None
) -> None:
    if entropy is None and objective.entropy_coef != 0:
        raise ValueError(f"entropy is needed by objective.entropy_coef={objective.entropy_coef}, got None")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {_checks.brief(reduction)}")
    if reduction == "none" and denominator is not None:
        raise ValueError("denominator must be None with reduction='none', which divides by nothing")


def _check_num_live(num_live: int, token_ids: Tensor, mask: Tensor | None) -> None:
    _checks.whole_number("num_live", num_live, at_least=0, expected="an int or None")
    if num_live > token_ids.numel():
        raise ValueError(
            f"num_live must be at most the number of tokens {token_ids.numel()}, got {_checks.brief(num_live)}"
        )
    if _checks.values_are_free(token_ids):
        kept = token_ids.numel() if mask is None else int(mask.count_nonzero())
        if num_live != kept:
            raise ValueError(f"num_live must be the number of tokens that mask keeps, {kept}, got {num_live}")


def _check_token_ids(token_ids: Tensor, name: str, source: Tensor) -> None:
    _checks.integer("token_ids", token_ids)
    _checks.shape("token_ids", token_ids, source.shape[:-1], f"one id per token of {name}")
