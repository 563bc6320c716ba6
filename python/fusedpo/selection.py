"""Which tokens a policy gradient is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .reference.advantages.segments import widened

__all__ = ["top_entropy_mask"]


@torch.no_grad()
def top_entropy_mask(entropy: Tensor, mask: Tensor | None = None, *, fraction: float = 0.2) -> Tensor:
    """The kept tokens of highest entropy, where a response takes its turns (2506.01939, "80/20"): bool.

    As TRL's ``top_entropy_quantile=fraction``: a token is chosen if its entropy is at least the quantile
    ``1 - fraction`` of those of all kept tokens in the batch, interpolated linearly; ties at the quantile are all
    chosen. nan counts as the lowest.

    As ``mask`` of a loss, the result takes the other tokens out of the denominator and the metrics, and counts them as
    ratio 1 in a trace. As ``is_weights=result.float()``, they only lose their policy gradient: that is what TRL does.

    Args:
        entropy: in nats, floating-point, any shape; from ``token_logprobs(..., return_entropy=True)`` or
            ``PolicyLossOutput.entropy``.
        mask: like ``entropy``, nonzero keeps a token.
        fraction: of the kept tokens, in (0, 1].

    Returns shape of ``entropy``; nothing is read on the host.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, ``fraction`` outside (0, 1].
    """
    _checks.floating("entropy", entropy)
    _checks.mask(mask, tuple(entropy.shape), "one value per token of entropy", "entropy", entropy)
    _checks.number("fraction", fraction)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {_checks.brief(fraction)}")
    kept = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask != 0
    if entropy.numel() == 0:
        return kept
    values = widened(entropy).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ascending = values.where(kept, torch.inf).reshape(-1).sort().values
    at = (kept.sum() - 1).clamp(min=0).to(values.dtype) * (1 - fraction)
    below, above = ascending[at.floor().long()], ascending[at.ceil().long()]
    # Not interpolated: equal neighbours, as a rounding could miss a tie, and -inf.
    quantile = torch.lerp(below, above, at - at.floor()).where((below != above) & below.isfinite(), above)
    return kept & (values >= quantile)
