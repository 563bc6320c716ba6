"""verl's policy losses, aggregations and KL penalties as oracles, and the cases in which they differ from ours.

In float64 the reference runs, in float32 the kernels. Install verl without its dependencies (``pip install --no-deps
verl``), then codetiming, omegaconf, orjson, ray and tensordict.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from support.policy_loss import AGGREGATIONS, random_batch
from torch import Tensor

import fusedpo
from fusedpo import objectives as O

MISSING = "verl, or something it imports, is not installed (extra [peers])"
verl = pytest.importorskip("verl.trainer.ppo.core_algos", reason=MISSING, exc_type=ImportError)
config = pytest.importorskip("verl.workers.config.actor", reason=MISSING, exc_type=ImportError)

LOW, HIGH = 0.1, 0.15
# verl takes means over the number of tokens + 1e-8
CLOSE = {torch.float64: {"rtol": 1e-7, "atol": 1e-9}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def actor(low: float = LOW, high: float = HIGH, *, policy_loss: dict | None = None, **settings: float):
    """verl's settings."""
    return config.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        policy_loss=config.PolicyLossConfig(**policy_loss or {}),
        **settings,
    )


class Peer(NamedTuple):
    """Our objective but for its aggregation, and verl's settings."""

    ratio: O.Ratio
    trust_region: O.TrustRegion
    config: Any
    only: str | None = None  # the one aggregation that verl does


PEERS = {
    "vanilla": Peer(O.TokenRatio(), O.PPOClip(LOW, HIGH, dual=1.3), actor(clip_ratio_c=1.3)),
    "dppo_tv": Peer(O.TokenRatio(), O.BinaryTV(LOW, HIGH, cap=1.3), actor(clip_ratio_c=1.3)),
    "dppo_kl": Peer(O.TokenRatio(), O.BinaryKL(0.01, 0.015, cap=1.3), actor(0.01, 0.015, clip_ratio_c=1.3)),
    "gspo": Peer(O.SequenceRatio(), O.PPOClip(0.01, 0.02), actor(0.01, 0.02)),
    "sapo": Peer(O.TokenRatio(), O.SAPO(1.5, 2.0), actor(tau_pos=1.5, tau_neg=2.0), only="seq-mean-token-mean"),
    "gpg": Peer(O.OnPolicy(), O.NoTrustRegion(), actor()),
    "geo_mean": Peer(O.SequenceRatio(), O.GMPO(LOW, HIGH), actor(), only="seq-mean-token-mean"),
    "dro": Peer(O.OnPolicy(), O.DRO(0.7), actor(policy_loss={"dro_beta": 0.7})),
    "cispo": Peer(O.TokenRatio(), O.CISPO(LOW, HIGH), actor()),
}


def cast(batch: dict, dtype: torch.dtype) -> dict:
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    return batch | {"logprobs": batch["logprobs"].requires_grad_()}


def theirs(name: str, batch: dict, aggregation: str = "token-mean", config: Any = None) -> tuple[Tensor, dict]:
    return verl.POLICY_LOSS_REGISTRY[name](
        old_log_prob=batch["old_logprobs"],
        log_prob=batch["logprobs"],
        advantages=batch["advantages"],
        response_mask=batch["mask"].to(batch["logprobs"].dtype),
        loss_agg_mode=aggregation,
        config=PEERS[name].config if config is None else config,
        rollout_is_weights=batch.get("is_weights"),
    )


def without(batch: dict, *names: str) -> dict:
    return {name: x for name, x in batch.items() if name not in names}


def assert_same(loss: Tensor, expected: Tensor, batch: dict) -> None:
    """Loss and gradient; what verl's gradient is at masked tokens says nothing."""
    lp = batch["logprobs"]
    torch.testing.assert_close(loss, expected.to(loss.dtype), **CLOSE[lp.dtype])
    gradient, expected_gradient = (torch.autograd.grad(x, lp, retain_graph=True)[0] for x in (loss, expected))
    assert gradient.any()
    torch.testing.assert_close(gradient, expected_gradient, **CLOSE[lp.dtype])


# -------------------------------------------------------------------------------------------------------- policy losses


def test_every_policy_loss_is_compared():
    """``bypass_mode`` chooses between ``vanilla`` and REINFORCE, after the corrections of test_corrections.py."""
    own = {name for name in verl.POLICY_LOSS_REGISTRY if not name.startswith("fusedpo_")}  # the others are the plugin's
    assert own == {*PEERS, "clip_cov", "kl_cov", "bypass_mode"}


@both_dtypes
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "aggregation"), [(name, x) for name, peer in PEERS.items() for x in AGGREGATIONS if peer.only in (None, x)]
)
def test_policy_loss(name, aggregation, weighted, dtype):
    peer = PEERS[name]
    batch = cast(without(random_batch(12, 40), "ref_logprobs", "entropy"), dtype)
    if name == "geo_mean":  # a mean over all sequences, and one advantage and one weight for all of a sequence
        batch = {key: x[:-1] for key, x in batch.items()}
        batch |= {key: batch[key][:, :1].expand(11, 40) for key in ("advantages", "is_weights")}
    if not weighted:
        del batch["is_weights"]
    objective = O.Objective(peer.ratio, peer.trust_region, aggregation=aggregation)
    out = fusedpo.policy_loss(**batch, objective=objective)
    expected, metrics = theirs(name, batch, aggregation)
    assert_same(out.loss, expected, batch)
    if name != "gpg":
        assert float(out.metrics["approx_kl"]) == pytest.approx(metrics["actor/ppo_kl"], rel=1e-4, abs=1e-7)
    if name in ("vanilla", "dppo_tv", "dppo_kl", "gspo", "cispo"):
        dual = metrics["actor/pg_clipfrac_lower"] if name == "vanilla" else 0
        assert out.metrics["clip_frac_low"] > 0
        assert out.metrics["clip_frac_high"] > 0
        assert float(out.metrics["clip_frac"]) == pytest.approx(metrics["actor/pg_clipfrac"] + dual, rel=1e-5)


@both_dtypes
@every_aggregation
def test_reinforce(aggregation, dtype):
    batch = cast(without(random_batch(6, 40), "ref_logprobs", "entropy"), dtype)
    objective = O.Objective(O.OnPolicy(), O.NoTrustRegion(), aggregation=aggregation)
    arguments = [batch[name] for name in ("old_logprobs", "logprobs", "advantages", "mask")]
    peer = {"config": actor(), "rollout_is_weights": batch["is_weights"]}
    expected, _ = verl.compute_policy_loss_reinforce(*arguments, aggregation, **peer)
    assert_same(fusedpo.policy_loss(**batch, objective=objective).loss, expected, batch)


@both_dtypes
@every_aggregation
def test_clip_cov(aggregation, dtype):
    """All candidates are drawn: fewer would be drawn at random."""
    batch = cast(without(random_batch(6, 40), "ref_logprobs", "entropy"), dtype)
    arguments = [batch[name] for name in ("logprobs", "old_logprobs", "advantages")]
    weights = fusedpo.covariance.clip_cov_weights(
        *arguments, mask=batch["mask"], clip_low=LOW, clip_high=HIGH, fraction=1.0, low=0.1, high=0.6
    )
    assert 20 < (weights == 0).sum() < batch["mask"].sum() / 2
    settings = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 0.6}
    expected, metrics = theirs("clip_cov", batch, aggregation, actor(policy_loss=settings))
    objective = O.ppo(LOW, HIGH, aggregation=aggregation)
    loss = fusedpo.policy_loss(**batch | {"is_weights": weights * batch["is_weights"]}, objective=objective).loss
    assert_same(loss, expected, batch)
    drawn = (weights == 0).sum() / batch["mask"].sum()
    assert float(drawn) == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-5)


@both_dtypes
@every_aggregation
@pytest.mark.parametrize("fraction", [1e-4, 0.1])
def test_kl_cov(fraction, aggregation, dtype):
    batch = cast(without(random_batch(6, 40), "ref_logprobs", "entropy"), dtype)
    arguments = [batch[name] for name in ("logprobs", "old_logprobs", "advantages")]
    objective = O.Objective(O.TokenRatio(), O.NoTrustRegion(), aggregation=aggregation)
    loss = fusedpo.policy_loss(**batch, objective=objective).loss
    penalty = fusedpo.covariance.kl_cov_penalty(*arguments, mask=batch["mask"], fraction=fraction, coef=0.7)
    loss = loss + fusedpo.aggregation.aggregate(penalty * batch["is_weights"], aggregation, mask=batch["mask"])
    settings = {"kl_cov_ratio": fraction, "ppo_kl_coef": 0.7}
    assert_same(loss, theirs("kl_cov", batch, aggregation, actor(policy_loss=settings))[0], batch)


# --------------------------------------------------------------------------------- KL, entropy, aggregation, value loss

# verl bounds the value of k3 to +-10, and of no other
KLS = {"kl": ("k1", None), "k1": ("k1", None), "mse": ("k2", None), "k2": ("k2", None)}
KLS |= {"low_var_kl": ("k3", 10.0), "k3": ("k3", 10.0), "k3+": ("k3+", None), "low_var_kl+": ("k3+", None)}


@both_dtypes
@pytest.mark.parametrize("name", KLS)
def test_kl_penalty(name, dtype):
    kind, clamp = KLS[name]
    batch = cast(without(random_batch(6, 40, spread=0.5), "is_weights", "entropy"), dtype)
    if kind != "k3+":  # exp(2.5) - 2.5 - 1 = 8.7, exp(3) - 3 - 1 = 16
        batch["ref_logprobs"][0, :4] = batch["logprobs"].detach()[0, :4] + torch.tensor([2.5, -2.5, 3.0, -3.0])
        batch["mask"][0, :4] = True
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    objective = O.reinforce(kl=O.KL(kind, 0.3, clamp))
    penalty = verl.kl_penalty(batch["logprobs"], batch["ref_logprobs"], name)
    out = fusedpo.policy_loss(**batch, objective=objective)
    assert_same(out.loss, 0.3 * verl.agg_loss(penalty, batch["mask"], "token-mean"), batch)


@both_dtypes
@every_aggregation
def test_loss_of_the_actor(aggregation, dtype):
    """Policy loss, entropy and KL penalty are aggregated one by one and added, as in verl.workers.utils.losses."""
    batch = cast(random_batch(6, 40), dtype)
    entropy = batch["entropy"].requires_grad_()
    objective = O.ppo(LOW, HIGH, dual=1.3, kl=O.KL("k3", 0.2, 10.0), entropy_coef=0.05, aggregation=aggregation)
    loss = fusedpo.policy_loss(**batch, objective=objective).loss
    expected, _ = theirs("vanilla", batch, aggregation)
    penalty = verl.kl_penalty(batch["logprobs"], batch["ref_logprobs"], "low_var_kl")
    expected = expected - 0.05 * verl.agg_loss(entropy, batch["mask"], aggregation)
    expected = expected + 0.2 * verl.agg_loss(penalty, batch["mask"], aggregation)
    assert_same(loss, expected, batch)
    gradients = [torch.autograd.grad(x, entropy)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, **CLOSE[dtype])


@both_dtypes
@every_aggregation
@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_aggregation(given, aggregation, dtype):
    """One rank of four. DDP averages gradients, so verl multiplies by the number of ranks what it divides by a count
    of the whole batch: our denominator is that count over the number of ranks (``global_denominator``)."""
    batch = cast(without(random_batch(6, 40), "ref_logprobs", "entropy", "is_weights"), dtype)
    counts = {"dp_size": 4, "batch_num_tokens": 500, "global_batch_size": 22, "loss_scale_factor": 64} if given else {}
    length_norm = 64 if given and aggregation == "seq-mean-token-sum-norm" else None
    options = {}
    if given and aggregation == "token-sum":
        options = {"loss_scale": 4}
    elif given:
        options = {"denominator": (500 if aggregation == "token-mean" else 22) / 4}
    objective = O.Objective(O.OnPolicy(), O.NoTrustRegion(), aggregation=aggregation, length_norm=length_norm)
    tokens = -batch["advantages"] * batch["logprobs"]
    expected = verl.agg_loss(tokens, batch["mask"], aggregation, **counts)
    assert_same(fusedpo.policy_loss(**batch, objective=objective, **options).loss, expected, batch)
    scale = options.pop("loss_scale", 1)
    loss = fusedpo.aggregation.aggregate(tokens, aggregation, mask=batch["mask"], length_norm=length_norm, **options)
    assert_same(scale * loss, expected, batch)


@both_dtypes
@every_aggregation
def test_value_loss(aggregation, dtype):
    batch = cast(random_batch(6, 40), dtype)
    values, old, returns = batch["logprobs"], batch["old_logprobs"], batch["ref_logprobs"]
    out = fusedpo.value_loss(values, old, returns, clip=0.1, mask=batch["mask"], aggregation=aggregation)
    expected, clipped = verl.compute_value_loss(values, returns, old, batch["mask"], 0.1, aggregation)
    assert_same(out.loss, expected, batch)
    assert 0 < float(out.clip_frac) == pytest.approx(float(clipped), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- known differences


def one_token(lp: float, old: float, advantage: float = 1.0) -> dict:
    arrays = {"logprobs": lp, "old_logprobs": old, "advantages": advantage}
    batch = {name: torch.tensor([[x]]) for name, x in arrays.items()}
    return cast(batch | {"mask": torch.ones(1, 1, dtype=torch.bool)}, torch.float32)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_verl_does_not_clamp_every_log_ratio(name):
    """Ours stops at e^20, in every objective."""
    batch = one_token(-1.0, -31.0, advantage=-1.0)
    loss = fusedpo.policy_loss(**batch, objective=O.Objective(O.TokenRatio(), O.NoTrustRegion())).loss
    expected, _ = theirs(name, batch, config=actor())
    torch.testing.assert_close(torch.stack((loss, expected)).log(), torch.tensor([20.0, 30.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "ours", "expected"), [("gspo", 20.0, 30.0), ("geo_mean", 20.0, 30.0)])
def test_verl_does_not_clamp_log_ratios_before_their_mean(name, ours, expected):
    """Over a sequence of ten tokens, of which one has moved."""
    batch = {key: x.detach().expand(1, 10).clone() for key, x in one_token(-31.0, -31.0, advantage=-1.0).items()}
    batch["logprobs"][0, 0] += 30.0
    batch["logprobs"].requires_grad_()
    objective = O.Objective(PEERS[name].ratio, PEERS[name].trust_region, aggregation="seq-mean-token-mean")
    results = fusedpo.policy_loss(**batch, objective=objective).loss, theirs(name, batch)[0]
    torch.testing.assert_close(torch.stack(results).log(), torch.tensor([ours, expected]) / 10, rtol=0, atol=1e-5)


def test_a_token_that_the_old_policy_could_not_sample():
    """Its divergence is -log(1 - p); verl's is NaN, 0 times infinity, which drops the token."""
    batch = one_token(math.log(0.01), -math.inf)
    assert theirs("dppo_kl", batch)[0] == 0
    loss = fusedpo.policy_loss(**batch, objective=O.Objective(O.TokenRatio(), PEERS["dppo_kl"].trust_region)).loss
    torch.testing.assert_close(loss, -1.3 * batch["logprobs"].sum())


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_nothing_is_kept(aggregation):
    """verl: 0 / 0."""
    batch = one_token(-1.0, -1.1) | {"mask": torch.zeros(1, 1, dtype=torch.bool)}
    assert theirs("vanilla", batch, aggregation)[0].isnan()
    assert fusedpo.policy_loss(**batch, objective=O.ppo(aggregation=aggregation)).loss == 0


def test_verl_counts_sequences_without_a_token_in_geo_mean():
    batch = without(random_batch(6, 40), "ref_logprobs", "entropy", "is_weights")
    batch["advantages"] = batch["advantages"][:, :1].expand(6, 40)
    expected, _ = theirs("geo_mean", batch)
    torch.testing.assert_close(fusedpo.policy_loss(**batch, objective=O.gmpo(LOW, HIGH)).loss * 5 / 6, expected)


def test_the_bound_of_k3_plus():
    """verl's bounds the value alone, ours the gradient too."""
    lp = torch.tensor([[-1.0]], requires_grad=True)
    verl.kl_penalty(lp, lp.detach() + 3, "k3+").sum().backward()
    assert lp.grad == -3
    lp.grad = None
    objective = O.reinforce(kl=O.KL("k3+", 1.0, clamp=10.0))
    fusedpo.policy_loss(lp, None, torch.zeros(1), objective=objective, ref_logprobs=lp.detach() + 3).loss.backward()
    assert lp.grad == 0
