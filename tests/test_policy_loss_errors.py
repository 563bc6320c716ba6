"""Errors of the policy losses: they name the argument, and are raised before anything is computed."""

import pytest
import torch
from support.policy_loss import INF, NAN, REGIONS

import fusedpo
from fusedpo import objectives as O

DETACHED, DIFFERENTIATED = O.ForwardTrace(2), O.ForwardTrace(2, differentiate=True)


@pytest.mark.parametrize(
    ("ratio", "region", "named"),
    [
        *((O.OnPolicy(), region, ("OnPolicy", type(region).__name__)) for region in REGIONS[1:]),
        (O.SequenceRatio(), O.BinaryTV(), ("SequenceRatio", "BinaryTV")),
        (O.SequenceRatio(), O.BinaryKL(), ("SequenceRatio", "BinaryKL")),
        (O.TokenRatio(), O.PPOClip(on="product"), ("PPOClip", "ForwardTrace")),
        (O.SequenceRatio(), O.PPOClip(on="product"), ("PPOClip", "ForwardTrace")),
        (DIFFERENTIATED, O.PPOClip(on="product"), ("PPOClip", "ForwardTrace")),
        (DIFFERENTIATED, O.CISPO(), ("CISPO", "ForwardTrace")),
        (DIFFERENTIATED, O.SAPO(), ("SAPO", "ForwardTrace")),
        (DIFFERENTIATED, O.PPOClip(cap=2.0), ("PPOClip", "ForwardTrace")),
        (DIFFERENTIATED, O.BinaryTV(), ("BinaryTV", "ForwardTrace")),
        (DIFFERENTIATED, O.BinaryKL(), ("BinaryKL", "ForwardTrace")),
    ],
    ids=str,
)
def test_parts_that_disagree_are_both_named(ratio, region, named):
    with pytest.raises(ValueError, match="Objective") as error:
        O.Objective(ratio, region)
    assert all(name in str(error.value) for name in named)


# --------------------------------------------------------------------------------------------------------------- errors


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


KL, BONUS = O.ppo(kl=O.KL("k3", 0.1)), O.ppo(entropy_coef=0.1)
WRONG = [
    (TypeError, "logprobs", {"logprobs": [0.0]}),
    (TypeError, "logprobs", {"logprobs": zeros(2, 3, dtype=torch.int64)}),
    (ValueError, "logprobs", {"logprobs": zeros(2, 3, 4)}),
    (ValueError, "logprobs", {"logprobs": zeros()}),
    (TypeError, "old_logprobs", {"old_logprobs": 0.0}),
    (TypeError, "old_logprobs", {"old_logprobs": zeros(2, 3, dtype=torch.int32)}),
    (ValueError, "old_logprobs", {"old_logprobs": zeros(2, 4)}),
    (ValueError, "old_logprobs", {"old_logprobs": zeros(2, 3, device="meta")}),
    (TypeError, "advantages", {"advantages": 1.0}),
    (TypeError, "advantages", {"advantages": zeros(2, dtype=torch.int64)}),
    (ValueError, "advantages", {"advantages": zeros(3)}),
    (ValueError, "advantages", {"advantages": zeros(1, 3)}),
    (ValueError, "advantages", {"advantages": zeros()}),
    (ValueError, "advantages", {"advantages": zeros(2, device="meta")}),
    (TypeError, "objective", {"objective": 0.2}),
    (TypeError, "objective", {"objective": O.PPOClip()}),
    (TypeError, "mask", {"mask": [True]}),
    (TypeError, "mask", {"mask": zeros(2, 3, dtype=torch.complex64)}),
    (ValueError, "mask", {"mask": zeros(3, 2)}),
    (ValueError, "mask", {"mask": zeros(2, 3, device="meta")}),
    (TypeError, "ref_logprobs", {"ref_logprobs": zeros(2, 3, dtype=torch.bool)}),
    (ValueError, "ref_logprobs", {"ref_logprobs": zeros(2)}),
    (ValueError, "ref_logprobs", {"ref_logprobs": zeros(2, 3, device="meta")}),
    (ValueError, "ref_logprobs", {"objective": KL}),
    (TypeError, "entropy", {"entropy": zeros(2, 3, dtype=torch.int64)}),
    (ValueError, "entropy", {"entropy": zeros(3)}),
    (ValueError, "entropy", {"entropy": zeros(2, 3, device="meta")}),
    (ValueError, "entropy", {"objective": BONUS}),
    (TypeError, "is_weights", {"is_weights": 2.0}),
    (ValueError, "is_weights", {"is_weights": zeros(6)}),
    (ValueError, "is_weights", {"is_weights": zeros(2, device="meta")}),
    (TypeError, "denominator", {"denominator": "8"}),
    (TypeError, "denominator", {"denominator": True}),
    (ValueError, "denominator", {"denominator": zeros(1)}),
    (ValueError, "denominator", {"denominator": zeros(device="meta")}),
    (ValueError, "denominator", {"denominator": -1.0}),
    (ValueError, "denominator", {"denominator": NAN}),
    (ValueError, "denominator", {"denominator": INF}),
    (ValueError, "denominator", {"denominator": torch.tensor(-1.0)}),
    (ValueError, "denominator", {"denominator": 8, "objective": O.ppo(aggregation="token-sum")}),
    (ValueError, "denominator", {"denominator": 8, "reduction": "none"}),
    (TypeError, "loss_scale", {"loss_scale": None}),
    (ValueError, "loss_scale", {"loss_scale": zeros(2)}),
    (ValueError, "loss_scale", {"loss_scale": NAN}),
    (ValueError, "loss_scale", {"loss_scale": -INF}),
    (ValueError, "reduction", {"reduction": "sum"}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 6])}),
]
WRONG_PACKED = [
    (TypeError, "cu_seqlens", {"cu_seqlens": [0, 6]}),
    (TypeError, "cu_seqlens", {"cu_seqlens": zeros(2)}),
    (ValueError, "cu_seqlens", {"cu_seqlens": zeros(2, 1, dtype=torch.int64)}),
    (ValueError, "cu_seqlens", {"cu_seqlens": zeros(0, dtype=torch.int64)}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([1, 6])}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 3, 6])}),
    (ValueError, "cu_seqlens", {"cu_seqlens": zeros(2, dtype=torch.int64, device="meta")}),
    (ValueError, "advantages", {"advantages": zeros(3)}),
    (ValueError, "advantages", {"advantages": zeros(2, 3)}),
]


@pytest.mark.parametrize(("error", "argument", "given"), WRONG)
def test_errors_name_the_argument(error, argument, given):
    right = {"logprobs": zeros(2, 3), "old_logprobs": None, "advantages": zeros(2), "objective": O.ppo()}
    with pytest.raises(error, match=rf"^{argument}\b"):
        fusedpo.policy_loss(**right | given)


@pytest.mark.parametrize(("error", "argument", "given"), WRONG_PACKED)
def test_errors_of_packed_arrays(error, argument, given):
    right = {
        "logprobs": zeros(6),
        "old_logprobs": None,
        "advantages": zeros(2),
        "objective": O.ppo(),
        "cu_seqlens": torch.tensor([0, 2, 6]),
    }
    with pytest.raises(error, match=rf"^{argument}\b"):
        fusedpo.policy_loss(**right | given)


FROM_TOKENS = [
    (ValueError, "old_logprobs", {"old_logprobs": zeros(2)}),
    (ValueError, "advantages", {"advantages": zeros(3)}),
    (ValueError, "mask", {"mask": zeros(2)}),
    (ValueError, "mask", {"mask": zeros(2, 3, device="meta")}),
    (ValueError, "ref_logprobs", {"objective": KL}),
    (ValueError, "ref_logprobs", {"ref_logprobs": zeros(2, 3, device="meta")}),
    (ValueError, "is_weights", {"is_weights": zeros(2, device="meta")}),
    (TypeError, "token_ids", {"token_ids": zeros(2, 3)}),
    (ValueError, "token_ids", {"token_ids": zeros(2, 3, 1, dtype=torch.int64)}),
    (ValueError, "temperature", {"temperature": 0.0}),
    (ValueError, "temperature", {"temperature": zeros(2, 3, device="meta")}),
    (ValueError, "denominator", {"denominator": -1}),
    (TypeError, "loss_scale", {"loss_scale": "1"}),
]
FROM_PACKED_TOKENS = {
    "token_ids": zeros(6, dtype=torch.int64),
    "old_logprobs": None,
    "advantages": zeros(6),
    "objective": O.ppo(),
    "cu_seqlens": torch.tensor([0, 4, 3, 6]),
}


@pytest.mark.parametrize(
    ("error", "argument", "given"),
    [*FROM_TOKENS, (TypeError, "logits", {"logits": 1.0}), (ValueError, "logits", {"logits": zeros(2, 1, 3, 5)})],
)
def test_errors_from_logits(error, argument, given):
    right = {
        "logits": zeros(2, 3, 5),
        "token_ids": zeros(2, 3, dtype=torch.int64),
        "old_logprobs": None,
        "advantages": zeros(2),
        "objective": O.ppo(),
    }
    with pytest.raises(error, match=rf"^{argument}\b"):
        fusedpo.policy_loss_from_logits(**right | given)


@pytest.mark.parametrize(
    ("error", "argument", "given"),
    [
        *FROM_TOKENS,
        (TypeError, "hidden", {"hidden": 1.0}),
        (ValueError, "hidden", {"hidden": zeros(4)}),
        (ValueError, "weight", {"weight": zeros(5, 4, device="meta")}),
        (ValueError, "bias", {"bias": zeros(5, device="meta")}),
        (ValueError, "num_live", {"num_live": -1}),
        (ValueError, "num_live", {"num_live": 7}),
        (TypeError, "num_live", {"num_live": 2.0}),
    ],
)
def test_errors_from_hidden(error, argument, given):
    right = {
        "hidden": zeros(2, 3, 4),
        "weight": zeros(5, 4),
        "token_ids": zeros(2, 3, dtype=torch.int64),
        "old_logprobs": None,
        "advantages": zeros(2),
        "objective": O.ppo(),
    }
    with pytest.raises(error, match=rf"^{argument}\b"):
        fusedpo.policy_loss_from_hidden(**right | given)


def test_packed_sequences_must_not_overlap():
    with pytest.raises(ValueError, match=r"^cu_seqlens must not decrease, got \[0, 4, 3, 6\]"):
        fusedpo.policy_loss_from_logits(zeros(6, 5), **FROM_PACKED_TOKENS)
    with pytest.raises(ValueError, match=r"^cu_seqlens must not decrease, got \[0, 4, 3, 6\]"):
        fusedpo.policy_loss_from_hidden(zeros(6, 4), zeros(5, 4), **FROM_PACKED_TOKENS)
