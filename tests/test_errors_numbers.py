"""Numbers that are none, or lie outside of what they may be: the error names the argument and says what came."""

import math

import pytest
import torch

import fusedpo
from fusedpo import objectives as O

INF, NAN = math.inf, math.nan
IDS = torch.tensor([0, 1, 2])


def logprobs(**options):
    return fusedpo.token_logprobs(torch.randn(3, 5), IDS, **options)


def linear_logprobs(**options):
    return fusedpo.linear_token_logprobs(torch.randn(3, 4), torch.randn(5, 4), IDS, **options)


def loss_from_logits(**options):
    x = torch.randn(3, 5, requires_grad=True)
    return fusedpo.policy_loss_from_logits(x, IDS, None, torch.ones(3), objective=O.ppo(), **options)


def loss_from_hidden(**options):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    return fusedpo.policy_loss_from_hidden(x, weight, IDS, None, torch.ones(3), objective=O.ppo(), **options)


FROM_HIDDEN = (linear_logprobs, loss_from_hidden)
FROM_ROWS = (logprobs, loss_from_logits, *FROM_HIDDEN)
TEMPERATURE = [
    ("temperature", "1", TypeError, "must be a float or a torch.Tensor, got str"),
    ("temperature", None, TypeError, "must be a float or a torch.Tensor, got NoneType"),
    ("temperature", True, TypeError, "must be a float or a torch.Tensor, got bool"),
    ("temperature", 0, ValueError, "must be positive and finite, got 0"),
    ("temperature", -1.0, ValueError, "must be positive and finite, got -1.0"),
    ("temperature", INF, ValueError, "must be positive and finite, got inf"),
    ("temperature", NAN, ValueError, "must be positive and finite, got nan"),
]
HEAD = [
    ("softcap", "3", TypeError, "must be a float or None, got str"),
    ("softcap", -3.0, ValueError, "must be positive and finite, got -3.0"),
    ("softcap", NAN, ValueError, "must be positive and finite, got nan"),
    ("softcap", INF, ValueError, "must be positive and finite, got inf"),
    ("logit_scale", None, TypeError, "must be a float, got NoneType"),
    ("logit_scale", NAN, ValueError, "must be finite, got nan"),
    ("logit_scale", -INF, ValueError, "must be finite, got -inf"),
    ("logit_scale", 0.0, ValueError, "must not be 0"),
    ("chunk_tokens", 2.5, TypeError, "must be an int or None, got float"),
    ("chunk_tokens", "2", TypeError, "must be an int or None, got str"),
    ("chunk_tokens", True, TypeError, "must be an int or None, got bool"),
    ("chunk_tokens", 0, ValueError, "must be >= 1, got 0"),
]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    ("function", "option", "value", "error", "message"),
    [
        *((function, *row) for function in FROM_ROWS for row in TEMPERATURE),
        *((function, *row) for function in FROM_HIDDEN for row in HEAD),
        (loss_from_hidden, "num_live", 2.5, TypeError, "must be an int or None, got float"),
        (loss_from_hidden, "num_live", -1, ValueError, "must be >= 0, got -1"),
        (loss_from_hidden, "num_live", 4, ValueError, "must be at most the number of tokens 3, got 4"),
    ],
)
def test_options(function, option, value, error, message):
    with pytest.raises(error, match=rf"^{option} {message}"):
        function(**{option: value})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: O.PPOClip("a", 0.2), TypeError, "PPOClip: low must be a float, got str"),
        (lambda: O.PPOClip(0.2, None), TypeError, "PPOClip: high must be a float, got NoneType"),
        (lambda: O.PPOClip(0.2, -1.0), ValueError, "PPOClip: high must be > -1, got -1.0"),
        (lambda: O.PPOClip(NAN), ValueError, "PPOClip: low must be >= 0, got nan"),
        (lambda: O.PPOClip(dual="3"), TypeError, "PPOClip: dual must be a float or None, got str"),
        (lambda: O.PPOClip(dual=0.0), ValueError, "PPOClip: dual must be > 0 or None, got 0.0"),
        (lambda: O.PPOClip(cap=0), ValueError, "PPOClip: cap must be > 0 or None, got 0"),
        (lambda: O.ppo(torch.tensor(0.2)), TypeError, "PPOClip: low must be a float, got Tensor"),
        (lambda: O.LogClip(0.1, "a"), TypeError, "LogClip: high must be a float, got str"),
        (lambda: O.LogClip(0.1, 0.1, power=NAN), ValueError, "LogClip: power must be finite, got nan"),
        (lambda: O.CISPO(None), TypeError, "CISPO: low must be a float, got NoneType"),
        (lambda: O.BinaryTV(True), TypeError, "BinaryTV: low must be a float, got bool"),
        (lambda: O.BinaryTV(cap=NAN), ValueError, "BinaryTV: cap must be > 0 or None, got nan"),
        (lambda: O.BinaryKL(cap="a"), TypeError, "BinaryKL: cap must be a float or None, got str"),
        (lambda: O.CPPO(budget="a"), TypeError, "CPPO: budget must be a float, got str"),
        (lambda: O.CPPO(min_weight=None), TypeError, "CPPO: min_weight must be a float, got NoneType"),
        (lambda: O.SAPO("a"), TypeError, "SAPO: tau_pos must be a float, got str"),
        (lambda: O.VESPO(lambda_neg="a"), TypeError, "VESPO: lambda_neg must be a float, got str"),
        (lambda: O.GMPO(high=[]), TypeError, "GMPO: high must be a float, got list"),
        (lambda: O.DRO(None), TypeError, "DRO: beta must be a float, got NoneType"),
        (lambda: O.DRO(NAN), ValueError, "DRO: beta must be > 0, got nan"),
        (lambda: O.KL("k3", "0.1"), TypeError, "KL: coef must be a float, got str"),
        (lambda: O.KL("k3", NAN), ValueError, "KL: coef must be finite, got nan"),
        (lambda: O.KL("k3", INF), ValueError, "KL: coef must be finite, got inf"),
        (lambda: O.KL("k3", 0.1, clamp="a"), TypeError, "KL: clamp must be a float or None, got str"),
        (lambda: O.KL("k3", 0.1, clamp=0.0), ValueError, "KL: clamp must be > 0 or None, got 0.0"),
        (lambda: O.ppo(entropy_coef="a"), TypeError, "Objective: entropy_coef must be a float, got str"),
        (lambda: O.ppo(entropy_coef=NAN), ValueError, "Objective: entropy_coef must be finite, got nan"),
        (lambda: O.dr_grpo(length_norm="a"), TypeError, "Objective: length_norm must be a float, got str"),
        (lambda: O.dr_grpo(length_norm=0), ValueError, "Objective: length_norm must be > 0, got 0"),
        (lambda: O.two_sided_grpo(delta="a"), TypeError, "two_sided_grpo: delta must be a float, got str"),
        (
            lambda: O.two_sided_grpo(clip_high=None),
            TypeError,
            "two_sided_grpo: clip_high must be a float, got NoneType",
        ),
        (lambda: O.nfpo(2.5), ValueError, "ForwardTrace: n must be an integer >= 1, got 2.5"),
        (lambda: O.grpo(kl="k3"), TypeError, "Objective: kl must be a KL, a float or None, got 'k3'"),
        (lambda: O.Objective("token"), TypeError, "Objective: ratio must be one of .*TokenRatio.*, got 'token'"),
        (lambda: O.nfpo(trust_region=0.2), TypeError, "Objective: trust_region must be one of .*PPOClip.*, got 0.2"),
    ],
)
def test_parts_of_objectives(build, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        build()


def test_bounds_may_be_integers_and_infinite():
    O.PPOClip(0, INF, dual=3, cap=INF)
    O.CISPO(INF, 1)
    O.KL("k3", 0, clamp=INF)
