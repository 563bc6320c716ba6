"""Preference losses beside the code of TRL 1.16 and Liger: values and gradients."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F

import fusedpo
from fusedpo import objectives as O

P, T = 3, 8  # pairs
BETA = 0.3


def random_batch(dtype=torch.float64):
    mask = torch.rand(2 * P, T) > 0.3
    mask[:, 0] = True
    return {
        "lp": -torch.rand(2 * P, T, dtype=dtype) - 0.1,
        "ref": -torch.rand(2 * P, T, dtype=dtype),
        "mask": mask,
        "log_sum_sq": -torch.rand(2 * P, T, dtype=dtype),
    }


ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def outputs_of(lp, batch):
    """What TRL's fused head gives: 0 where masked."""
    zeros = torch.zeros_like(lp)
    return SimpleNamespace(
        log_probs=lp.masked_fill(~batch["mask"], 0),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=batch["log_sum_sq"],
    )


def inputs_of(batch):
    prompt = torch.zeros(2 * P, 1, dtype=torch.long)
    completion_mask = torch.cat((prompt, batch["mask"].long()), 1)
    return {
        "input_ids": torch.ones_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }


def trl_dpo(lp, batch, loss_types, *, ld_alpha=None, label_smoothing=0.0, weighting=False):
    trl = pytest.importorskip("trl", reason="trl is not installed (extra [peers])")
    chosen, rejected = ((batch["ref"] * batch["mask"]).sum(1)).chunk(2)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=BETA,
        loss_types=loss_types,
        loss_weights=[1.0] * len(loss_types),
        label_smoothing=label_smoothing,
        use_weighting=weighting,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {**inputs_of(batch), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs_of(lp, batch), inputs, False)
    return loss, {name.replace("/", "_"): values[-1] for name, values in trainer._metrics["train"].items()}


def both(batch, product, peer):
    results = []
    for function in (product, peer):
        leaf = batch["lp"].clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results += [loss.detach(), leaf.grad]
    torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[1], results[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("loss_types", "objective", "options"),
    [
        (["sigmoid"], O.dpo(BETA), {}),
        (["hinge"], O.slic(BETA), {}),
        (["ipo"], O.ipo(BETA), {}),
        (["robust"], O.robust_dpo(BETA, label_smoothing=0.2), {"label_smoothing": 0.2}),
        (["sigmoid_norm"], O.dpo(BETA, normalize=True), {}),
        (["sigmoid", "sft"], O.dpo(BETA, sft_coef=1.0), {}),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, list) else "",
)
def test_trl_dpo(loss_types, objective, options):
    batch = random_batch()

    def product(lp):
        return fusedpo.preference_loss(lp, batch["ref"], objective=objective, mask=batch["mask"])

    both(batch, lambda lp: product(lp).loss, lambda lp: trl_dpo(lp, batch, loss_types, **options)[0])
    if not objective.normalize:
        metrics = trl_dpo(batch["lp"], batch, loss_types, **options)[1]
        for name, value in product(batch["lp"]).metrics.items():
            if name not in ("pairs", "nll"):
                assert value.item() == pytest.approx(metrics[name], rel=1e-6), name


def test_trl_ld_dpo():
    """Weights of tokens: 1 up to the shorter length of the pair, alpha beyond."""
    batch = random_batch()
    place = batch["mask"].cumsum(1)
    chosen, rejected = batch["mask"].sum(1).chunk(2)
    shorter = torch.minimum(chosen, rejected).repeat(2)[:, None]
    weights = torch.where(place <= shorter, 1.0, 0.5).double()

    def product(lp):
        options = {"objective": O.dpo(BETA), "mask": batch["mask"], "token_weights": weights}
        return fusedpo.preference_loss(lp, batch["ref"], **options).loss

    reference = {**batch, "ref": batch["ref"] * weights}  # which TRL takes as sums
    both(batch, product, lambda lp: trl_dpo(lp, reference, ["sigmoid"], ld_alpha=0.5)[0])


def test_trl_wpo():
    """Weights of pairs, from the mean over tokens of ``lp - log sum p^2``."""
    batch = random_batch()

    def product(lp):
        options = {"ref_logprobs": batch["log_sum_sq"], "mask": batch["mask"], "normalize": True}
        chosen, rejected = fusedpo.sequence_logprobs(lp.detach(), **options).exp().chunk(2)
        options = {"objective": O.dpo(BETA), "mask": batch["mask"], "weights": chosen * rejected}
        return fusedpo.preference_loss(lp, batch["ref"], **options).loss

    both(batch, product, lambda lp: trl_dpo(lp, batch, ["sigmoid"], weighting=True)[0])


OTHER_FUNCTIONS = {
    "bco_pair": lambda c, r: -F.logsigmoid(c) - F.logsigmoid(-r),
    "nca_pair": lambda c, r: -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r),
    "apo_zero": lambda c, r: 1 - torch.sigmoid(c) + torch.sigmoid(r),
    "sppo_hard": lambda c, r: (c / BETA - 0.5 / BETA) ** 2 + (r / BETA + 0.5 / BETA) ** 2,
}


@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_any_other_function_of_the_sums(name):
    batch = random_batch()

    def product(lp):
        z = BETA * fusedpo.sequence_logprobs(lp, ref_logprobs=batch["ref"], mask=batch["mask"])
        return OTHER_FUNCTIONS[name](*z.chunk(2)).mean()

    both(batch, product, lambda lp: trl_dpo(lp, batch, [name])[0])


def test_trl_kto():
    trl = pytest.importorskip("trl", reason="trl is not installed (extra [peers])")
    batch, labels = random_batch(), torch.tensor([True, False, False, True, True, False])
    policy, reference = torch.tensor([-1.0, -0.2]).double(), torch.tensor([-1.5, -0.3]).double()

    def peer(lp):
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=ACCELERATOR,
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            calculate_KL=True,
            _compute_kl_logps=lambda *_: policy,
            beta=BETA,
            loss_type="kto",
            desirable_weight=1.2,
            undesirable_weight=0.7,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        ref_logps = (batch["ref"] * batch["mask"]).sum(1)
        inputs = {**inputs_of(batch), "label": labels, "ref_logps": ref_logps, "ref_KL_logps": reference}
        return trl.KTOTrainer._compute_loss(trainer, lambda **_: outputs_of(lp, batch), inputs, False)

    def product(lp):
        objective = O.kto(BETA, desirable_weight=1.2, undesirable_weight=0.7)
        options = {"labels": labels, "reference_point": (policy - reference).mean().clamp(min=0)}
        return fusedpo.preference_loss(lp, batch["ref"], objective=objective, mask=batch["mask"], **options).loss

    both(batch, product, peer)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("sigmoid", O.cpo(BETA, sft_coef=0.0, label_smoothing=0.1)),
        ("simpo", O.simpo(BETA, gamma_beta_ratio=0.5, label_smoothing=0.1)),
    ],
)
def test_trl_cpo(kind, objective):
    cpo = pytest.importorskip("trl.experimental.cpo", reason="trl is not installed (extra [peers])")
    batch = random_batch()
    trainer = SimpleNamespace(
        alpha=0.0, beta=BETA, loss_type=kind, simpo_gamma=0.5 * BETA, label_smoothing=0.1, accelerator=ACCELERATOR
    )

    def peer(lp):
        mask = batch["mask"]
        z = (lp * mask).sum(1) / (mask.sum(1) if kind == "simpo" else 1)
        return cpo.CPOTrainer.cpo_loss(trainer, *z.chunk(2))[0].mean()

    both(batch, lambda lp: fusedpo.preference_loss(lp, None, objective=objective, mask=batch["mask"]).loss, peer)


def test_trl_orpo():
    """In float32, to which TRL rounds the log-probs."""
    orpo = pytest.importorskip("trl.experimental.orpo", reason="trl is not installed (extra [peers])")
    batch = random_batch(torch.float32)
    trainer, mask = SimpleNamespace(beta=BETA, accelerator=ACCELERATOR), batch["mask"]
    results = []
    for by_trl in (False, True):
        leaf = batch["lp"].clone().requires_grad_()
        if by_trl:
            z = (leaf * mask).sum(1) / mask.sum(1)
            loss = -orpo.ORPOTrainer.odds_ratio_loss(trainer, *z.chunk(2))[0].mean()
        else:
            loss = fusedpo.preference_loss(leaf, None, objective=O.orpo(BETA, sft_coef=0.0), mask=mask).loss
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------- Liger

V, H = 29, 8


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "robust", "cpo", "simpo", "orpo", "kto"])
def test_liger_from_hidden(kind):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger_kernel is not installed (extra [peers])")
    mask = random_batch()["mask"]
    hidden, weight = torch.randn(2 * P, T, H), torch.randn(V, H)
    ref_hidden, ref_weight = torch.randn(2 * P, T, H), torch.randn(V, H)
    ids = torch.randint(0, V, (2 * P, T))
    target = ids.masked_fill(~mask, -100)
    labels, z0 = torch.tensor([True, False, True, True, False, False]), torch.tensor(0.4)
    with_ref = {"ref_input": ref_hidden, "ref_weight": ref_weight}
    dpo = functools.partial(liger.LigerFusedLinearDPOLoss, beta=BETA, compiled=False)
    loss_of, objective, options, by_reference = {
        "sigmoid": (dpo(), O.dpo(BETA), {}, with_ref),
        "hinge": (
            liger.LigerFusedLinearDPOLoss(beta=BETA, compiled=False, loss_type="hinge"),
            O.slic(BETA),
            {},
            with_ref,
        ),
        "robust": (
            dpo(loss_type="robust", label_smoothing=0.2),
            O.robust_dpo(BETA, label_smoothing=0.2),
            {},
            with_ref,
        ),
        "cpo": (liger.LigerFusedLinearCPOLoss(beta=BETA, alpha=1.0, compiled=False), O.cpo(BETA), {}, {}),
        "simpo": (
            liger.LigerFusedLinearSimPOLoss(beta=BETA, gamma=0.5 * BETA, compute_nll_loss=False, compiled=False),
            O.simpo(BETA, gamma_beta_ratio=0.5),
            {},
            {},
        ),
        "orpo": (liger.LigerFusedLinearORPOLoss(beta=BETA, compiled=False), O.orpo(BETA), {}, {}),
        "kto": (
            liger.LigerFusedLinearKTOLoss(beta=BETA, compiled=False, use_ref_model=True),
            O.kto(BETA),
            {"labels": labels, "reference_point": z0},
            {**with_ref, "preference_labels": labels, "kl": z0},
        ),
    }[kind]
    ref = None
    if not objective.reference_free:
        ref = (ref_hidden @ ref_weight.t()).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    results = []
    for by_liger in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        if by_liger:
            inputs = leaves if kind == "kto" else leaves[::-1]
            loss = loss_of(*inputs, target, **by_reference)
            loss = loss[0] if isinstance(loss, tuple) else loss
        else:
            loss = fusedpo.preference_loss_from_hidden(
                *leaves, ids, ref, objective=objective, mask=mask, **options
            ).loss
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(*results, rtol=2e-4, atol=2e-6)
