"""Adapters for SkyRL, slime, prime-rl, OpenRLHF, NeMo-RL and AReaL.

Inputs are as the trainer gives them; expected values are the trainer's formula in plain PyTorch, written here; stand-in
modules take the place of what an adapter imports of the trainer. Where a trainer is installed, its own function is the
oracle too.
"""

import enum
import inspect
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import fusedpo
from fusedpo.integrations import _common, areal, nemo_rl, openrlhf, prime_rl, skyrl, slime

np = pytest.importorskip("numpy")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
B, T = 4, 24
LENGTHS = torch.tensor([24, 1, 15, 9])
MASK = torch.arange(T) < LENGTHS[:, None]


@pytest.fixture
def batch():
    old = -torch.rand(B, T) * 2 - 0.1
    logprobs = (old + 0.6 * torch.randn(B, T)).clamp(max=-1e-3).requires_grad_()
    return SimpleNamespace(
        old=old,
        logprobs=logprobs,
        advantages=torch.randn(B, T),
        per_sequence=torch.randn(B, 1).expand(B, T).contiguous(),
        rollout=old + 0.2 * torch.randn(B, T),
        ref=old + 0.3 * torch.randn(B, T),
    )


def stand_in(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    parts = name.split(".")
    for end in range(1, len(parts)):
        parent = ".".join(parts[:end])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    return module


def assert_same(got, want, *leaves):
    """In value, and in the gradients of ``leaves`` for the same upstream gradient."""
    torch.testing.assert_close(got, want.to(got.dtype), **CLOSE)
    gradients = [torch.autograd.grad(1.3 * loss, leaves, retain_graph=True) for loss in (got, want)]
    assert all(gradient.any() for gradient in gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


# The formulas of the trainers, per token.


def clipped(log_ratio, advantages, low, high, dual=None):
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return loss if dual is None else torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)


def sequence_log_ratio(log_ratio, mask):
    return ((log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(log_ratio)


def sum_of(loss, mask=MASK):
    return (loss * mask).sum()


def mean_of_sequences(loss, mask=MASK):
    return (loss * mask).sum(1) / mask.sum(1)


def traced(log_ratio, advantages, n, low=0.2, high=0.2, mask=MASK):
    """NFPO: the clipped loss times the ratios of the next n - 1 tokens, one token at a time."""
    kept = torch.where(mask, log_ratio, 0)
    own = clipped(kept, torch.where(mask, advantages, 0), low, high)
    width = own.shape[1]
    trace = torch.stack([kept[:, t + 1 : min(t + n, width)].sum(1) for t in range(width)], 1).detach().exp()
    return own * trace


def parameters(function):
    return list(inspect.signature(function).parameters)


# ---------------------------------------------------------------------------------------------------------------- SkyRL


def skyrl_config(**settings):
    return SimpleNamespace(
        eps_clip_low=0.15,
        eps_clip_high=0.3,
        clip_ratio_c=1.8,
        sapo=SimpleNamespace(tau_pos=0.8, tau_neg=1.4),
        cispo=SimpleNamespace(cispo_eps_clip_low=0.1, cispo_eps_clip_high=0.4),
        dppo=SimpleNamespace(delta_low=0.3, delta_high=0.01),
        off_policy_correction=SimpleNamespace(
            tis_ratio_type=None,
            sequence_mask_metric=None,
            outlier_token_is_threshold_low=None,
            outlier_token_is_threshold_high=None,
            token_mask_is_threshold_low=None,
            token_mask_is_threshold_high=None,
        ),
        **settings,
    )


def skyrl_formula(name, x):
    log_ratio = x.logprobs - x.old
    if name == "dual_clip":
        return clipped(log_ratio, x.advantages, 0.15, 0.3, dual=1.8)
    if name in ("ppo", "grpo", "dapo"):
        return clipped(log_ratio, x.advantages, 0.15, 0.3)
    if name == "gspo":
        mean = sequence_log_ratio(log_ratio, MASK).detach()
        return clipped(log_ratio - log_ratio.detach() + mean, x.advantages, 0.15, 0.3)
    if name == "cispo":
        return -log_ratio.exp().clamp(0.9, 1.4).detach() * x.advantages * x.logprobs
    if name == "sapo":
        tau = torch.where(x.advantages > 0, 0.8, 1.4)
        return -torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau * x.advantages
    return traced(log_ratio, x.advantages, 3, 0.15, 0.3)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("name", ["ppo", "dual_clip", "dapo", "grpo", "gspo", "cispo", "sapo", "nfpo"])
def test_skyrl_losses(batch, name, mask_dtype):
    """A sum: SkyRL has divided the advantages by what it averages over."""
    loss_fn = skyrl.policy_loss_fn(name, **({"n": 3} if name == "nfpo" else {}))
    assert parameters(loss_fn) == [
        *("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"),
    ]
    mask = MASK.to(mask_dtype)
    loss, metrics = loss_fn(batch.logprobs, batch.old, batch.advantages, skyrl_config(), mask, batch.rollout)
    assert_same(loss, sum_of(skyrl_formula(name, batch)), batch.logprobs)
    assert isinstance(metrics["clip_ratio"], float)


def test_skyrl_dppo_has_the_gradient_of_the_masked_ratio(batch):
    """SkyRL's value is that of the ratio, ours that of the log-prob with a detached ratio: the gradients are equal."""
    loss, _ = skyrl.policy_loss_fn("dppo_tv", cap=None)(
        batch.logprobs, batch.old, batch.advantages, skyrl_config(), MASK
    )
    moved = (batch.logprobs.exp() - batch.old.exp()).detach()
    dropped = (batch.advantages > 0) & (moved > 0.01) | (batch.advantages < 0) & (-moved > 0.3)
    assert (dropped & MASK).any()
    want = sum_of(-(batch.logprobs - batch.old).exp() * batch.advantages * ~dropped)
    gradients = [torch.autograd.grad(x, batch.logprobs)[0] for x in (loss, want)]
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tis_ratio_type", "token"),
        ("sequence_mask_metric", "product"),
        ("outlier_token_is_threshold_high", 100.0),
        ("token_mask_is_threshold_low", 0.1),
    ],
)
def test_skyrl_refuses_corrections(batch, option, value):
    config = skyrl_config()
    setattr(config.off_policy_correction, option, value)
    loss_fn = skyrl.policy_loss_fn("ppo")
    loss_fn(batch.logprobs, batch.old, batch.advantages, config, MASK, None)  # SkyRL corrects nothing then
    with pytest.raises(NotImplementedError, match=f"off_policy_correction.{option}={value!r}"):
        loss_fn(batch.logprobs, batch.old, batch.advantages, config, MASK, batch.rollout)


def test_skyrl_refuses_the_ratio_to_the_rollout(batch):
    config = skyrl_config()
    config.cispo.cispo_anchor = "rollout"
    with pytest.raises(NotImplementedError, match="cispo.cispo_anchor='rollout'"):
        skyrl.policy_loss_fn("cispo")(batch.logprobs, batch.old, batch.advantages, config, MASK)


def test_skyrl_advantages():
    rewards = torch.zeros(B, T).scatter(1, LENGTHS[:, None] - 1, torch.tensor([[1.0], [0.0], [0.5], [2.0]]))
    index = np.array(["b", "a", "b", "a"], dtype=object)
    given = {
        "token_level_rewards": rewards,
        "response_mask": MASK.float(),
        "index": index,
        "values": None,
        "gamma": 1.0,
        "lambd": 1.0,
        "config": None,
    }
    scores = torch.tensor([0.5, -2.0, -0.5, 2.0])  # minus the other one of the pair
    got, returns = skyrl.advantage_estimator("rloo")(**given, grpo_norm_by_std=True)
    torch.testing.assert_close(got, scores[:, None] * MASK)
    torch.testing.assert_close(returns, got)
    plain, _ = skyrl.advantage_estimator("grpo")(**given, grpo_norm_by_std=False)
    torch.testing.assert_close(plain, scores[:, None] / 2 * MASK)
    scaled, _ = skyrl.advantage_estimator("grpo")(**given, grpo_norm_by_std=True)
    std = torch.tensor([0.5, 2.0, 0.5, 2.0]) / 2**0.5
    torch.testing.assert_close(scaled, scores[:, None] / 2 / std[:, None] * MASK, **CLOSE)


ESTIMATORS = {
    **{name: {"k": 2} for name in ("maxpo", "pkpo", "passk")},
    "order_statistic": {"k": 2, "weights": [0.0, 1.0]},
}


@pytest.mark.parametrize("name", skyrl.ESTIMATORS)
def test_rewards_that_no_token_was_kept_for(name):
    """verl's and SkyRL's: the outcome of a rollout that ended in a tool's answer, a judge that gave none."""
    mask = torch.tensor([[1, 1, 0, 1, 0, 0]] * 8)
    at_end, at_kept = torch.zeros(8, 6), torch.zeros(8, 6)
    at_end[:, 5] = at_kept[:, 3] = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1])
    index = np.array(["a", "a", "a", "b", "c", "b", "a", "c"])

    def estimate(rewards, chosen=slice(None)):
        return _common.estimate(name, rewards[chosen], mask[chosen], index[chosen], ESTIMATORS.get(name, {}))

    for got, want in zip(estimate(at_end), estimate(at_kept), strict=True):
        torch.testing.assert_close(got, want)
        assert want.any()
    # Without the two that are not scored, one of each of two groups is left.
    for i, where in ((3, 5), (4, 1)):
        at_end[i, where] = math.nan
    scored = [0, 1, 2, 5, 6, 7]
    for got, want in zip(estimate(at_end), estimate(at_kept, scored), strict=True):
        torch.testing.assert_close(got[scored], want)
        assert not got[[3, 4]].any()


def test_skyrl_registration(monkeypatch):
    registries = {"policy_loss": {}, "advantage_estimator": {}}

    def decorator(kind):
        return lambda name: lambda function: registries[kind].setdefault(name, function)

    stand_in(
        monkeypatch,
        "skyrl.backends.skyrl_train.utils.ppo_utils",
        register_policy_loss=decorator("policy_loss"),
        register_advantage_estimator=decorator("advantage_estimator"),
    )
    skyrl.register(maxpo={"k": 2}, grpo={"clip_low": 0.4, "std": False})
    assert set(registries["policy_loss"]) == {"fusedpo_" + n for n in (*_common.PRESETS, "dual_clip") if n != "dro"}
    assert "fusedpo_maxpo" in registries["advantage_estimator"]
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.5], [0.0, 0.0], [0.0, 3.0]])
    got, _ = registries["advantage_estimator"]["fusedpo_maxpo"](
        token_level_rewards=rewards, response_mask=torch.ones(4, 2), index=["p"] * 4
    )
    torch.testing.assert_close(got[:, 0], fusedpo.advantages.maxpo(rewards[:, 1], k=2, group_size=4))
    with pytest.raises(ValueError, match="maxpo has no option 'K'"):
        skyrl.register(maxpo={"K": 2})
    with pytest.raises(ValueError, match="'dro' is neither"):
        skyrl.register(dro={"beta": 0.1})


# ------------------------------------------------------------------------------------------------------------- prime-rl


@pytest.fixture
def loss_outputs(monkeypatch):
    class LossOutputs(SimpleNamespace):
        pass

    stand_in(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    return LossOutputs


def prime_inputs(batch, row, weights=None, ref=None):
    """One sample, 1-D."""
    return SimpleNamespace(
        trainer_logprobs=batch.logprobs[row],
        inference_logprobs=batch.old[row],
        ref_logprobs=ref,
        advantages=batch.advantages[row],
        loss_mask=MASK[row],
        loss_weights=weights,
    )


def test_prime_rl_loss(batch, loss_outputs):
    row, weights = 2, torch.rand(T) + 0.5
    out = prime_rl.policy_loss(prime_inputs(batch, row, weights), objective="nfpo", n=3, clip_high=0.28)
    assert isinstance(out, loss_outputs)
    token = traced((batch.logprobs - batch.old), batch.advantages, 3, 0.2, 0.28)[row]
    assert_same(out.loss, sum_of(token * weights, MASK[row]), batch.logprobs)
    assert all(metric.dim() == 0 and not metric.requires_grad for metric in out.metrics.values())


def test_prime_rl_kl(batch, loss_outputs):
    out = prime_rl.policy_loss(prime_inputs(batch, 0, ref=batch.ref[0]), objective="ppo", kl_coef=0.1, kl_kind="k3")
    d = batch.logprobs[0] - batch.ref[0]
    token = clipped(batch.logprobs[0] - batch.old[0], batch.advantages[0], 0.2, 0.2) + 0.1 * ((-d).exp() - 1 + d)
    assert_same(out.loss, token.sum(), batch.logprobs)
    with pytest.raises(ValueError, match="ref_logprobs"):
        prime_rl.policy_loss(prime_inputs(batch, 0), objective="ppo", kl_coef=0.1)
    with pytest.raises(ValueError, match="nfpo has no option 'window'"):
        prime_rl.policy_loss(prime_inputs(batch, 0), objective="nfpo", window=3)


def test_prime_rl_head():
    head = prime_rl.FusedOutputLinear(8, 23, chunk_size=4)
    hidden, labels = torch.randn(2, 5, 8, requires_grad=True), torch.randint(0, 23, (2, 5))
    temperature = torch.rand(2, 5) + 0.5
    out = head(hidden, labels, temperature)
    logp = ((hidden @ head.weight.T) / temperature[..., None]).log_softmax(-1)
    assert_same(out["logprobs"].square().sum(), logp.gather(-1, labels[..., None]).square().sum(), hidden, head.weight)
    assert_same(out["entropy"].square().sum(), (logp.exp() * logp).sum(-1).square().sum(), hidden, head.weight)
    with pytest.raises(ValueError, match="labels and a temperature"):
        head(hidden, labels)


# ---------------------------------------------------------------------------------------------------------------- slime


@pytest.fixture
def mpu(monkeypatch):
    """Megatron's process groups, of which all have one rank; a test may say that there are others."""
    sizes = SimpleNamespace(data=1)
    stand_in(
        monkeypatch,
        "megatron.core.parallel_state",
        get_tensor_model_parallel_group=lambda: None,
        get_context_parallel_world_size=lambda: 1,
        get_data_parallel_world_size=lambda: sizes.data,
    )
    return sizes


def slime_args(**settings):
    given = {
        "eps_clip": 0.2,
        "eps_clip_high": 0.3,
        "eps_clip_c": None,
        "entropy_coef": 0.0,
        "use_kl_loss": False,
        "kl_loss_coef": 0.0,
        "kl_loss_type": "k3",
        "rollout_temperature": 0.7,
        "advantage_estimator": "grpo",
        "use_rollout_logprobs": False,
        "n_samples_per_prompt": 2,
        "kl_coef": 0.0,
    }
    return SimpleNamespace(**{**given, **settings})


def slime_batch():
    """Prompts and responses one after another, padding last."""
    totals, responses, size = [7, 4, 6], [4, 2, 3], 19
    tokens = [torch.randint(0, size, (total,)) for total in totals]
    loss_masks = [torch.ones(response, dtype=torch.int64) for response in responses]
    loss_masks[0][1] = 0  # a tool's token
    batch = {
        "unconcat_tokens": tokens,
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": loss_masks,
        "advantages": [torch.randn(response) for response in responses],
        "log_probs": [-torch.rand(response) * 3 for response in responses],
        "ref_log_probs": [-torch.rand(response) * 3 for response in responses],
    }
    return batch, torch.randn(1, sum(totals) + 3, size, requires_grad=True)


def slime_reducer(batch):
    def reduce(x):
        parts = x.split(batch["response_lengths"])
        pairs = zip(parts, batch["loss_masks"], strict=True)
        return sum((part * mask).sum() / mask.sum().clamp(min=1) for part, mask in pairs)

    return reduce


def slime_response(batch, logits, temperature):
    """Log-probs and entropies of each response, by slicing as slime does."""
    logps, entropies, end = [], [], 0
    for tokens, total, response in zip(
        batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        end += total
        logp = (logits[0, end - response - 1 : end - 1] / temperature).log_softmax(-1)
        logps.append(logp.gather(-1, tokens[-response:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return logps, entropies


@pytest.mark.parametrize("objective", [None, "nfpo", "gspo"])
def test_slime_loss(mpu, objective):
    batch, logits = slime_batch()
    args = slime_args(entropy_coef=0.02, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="low_var_kl")
    if objective == "nfpo":
        args.fusedpo_objective, args.fusedpo_options = "nfpo", {"n": 3}
    elif objective == "gspo":
        args.advantage_estimator = "gspo"
        batch["advantages"] = [a[:1].expand(len(a)) for a in batch["advantages"]]
    reduce = slime_reducer(batch)
    loss, log = slime.policy_loss(args, batch, logits, reduce)

    logps, entropies = slime_response(batch, logits, 0.7)
    parts = []
    for lp, old, a, mask in zip(logps, batch["log_probs"], batch["advantages"], batch["loss_masks"], strict=True):
        keep = mask.bool()
        if objective == "nfpo":
            parts.append(traced((lp - old)[None], a[None], 3, 0.2, 0.3, keep[None])[0])
        elif objective == "gspo":
            parts.append(clipped(((lp - old) * keep).sum() / keep.sum() + 0 * lp, a, 0.2, 0.3))
        else:
            parts.append(clipped(lp - old, a, 0.2, 0.3))
    d = torch.cat(logps) - torch.cat(batch["ref_log_probs"])
    kl = ((-d).exp() - 1 + d).clamp(-10, 10)
    want = reduce(torch.cat(parts)) - 0.02 * reduce(torch.cat(entropies)) + 0.1 * reduce(kl)
    assert_same(loss, want, logits)
    assert set(log) == {"loss", "pg_loss", "entropy_loss", "ppo_kl", "pg_clipfrac", "kl_loss"}
    torch.testing.assert_close(log["pg_loss"], reduce(torch.cat(parts)).detach(), **CLOSE)
    torch.testing.assert_close(
        log["ppo_kl"], reduce(torch.cat(batch["log_probs"]) - torch.cat(logps)).detach(), **CLOSE
    )
    assert not any(value.requires_grad for value in log.values())


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_slime_unbiased_kl(mpu, kind, on_policy):
    batch, logits = slime_batch()
    batch["ref_log_probs"][0][0] = 2.5  # a k3 beyond 10, once it is weighted
    old = batch.pop("log_probs") if on_policy else batch["log_probs"]
    args = slime_args(use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type=kind)
    reduce = slime_reducer(batch)
    without, _ = slime.policy_loss(slime_args(), batch, logits, reduce)
    loss, log = slime.policy_loss(slime_args(**vars(args) | {"use_unbiased_kl": True}), batch, logits, reduce)

    lp = torch.cat(slime_response(batch, logits, 0.7)[0])
    d = lp - torch.cat(batch["ref_log_probs"])
    kl = {"k1": d, "k2": d.square() / 2}.get(kind, (-d).exp() - 1 + d)
    kl = kl * (lp - (lp.detach() if on_policy else torch.cat(old))).exp()
    if kind == "low_var_kl":
        assert (kl > 10).any()
        kl = kl.clamp(-10, 10)
    assert_same(loss - without, 0.3 * reduce(kl), logits)
    torch.testing.assert_close(log["kl_loss"], reduce(kl).detach(), **CLOSE)


def test_slime_reads_no_logits_of_masked_tokens(mpu):
    batch, logits = slime_batch()
    args = slime_args(entropy_coef=0.02)
    clean, _ = slime.policy_loss(args, batch, logits, slime_reducer(batch))
    garbage = logits.detach().clone()
    garbage[0, 3] = torch.nan  # predicts the tool's token of the first response: prompt of 3, then the second token
    garbage[0, :2] = garbage[0, -3:] = torch.nan  # prompt, padding
    loss, _ = slime.policy_loss(args, batch, garbage.requires_grad_(), slime_reducer(batch))
    loss.backward()
    torch.testing.assert_close(loss, clean)
    assert garbage.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [float("nan"), float("-inf")])
@pytest.mark.parametrize("key", ["log_probs", "ref_log_probs", "advantages"])
def test_slime_garbage_at_masked_tokens(mpu, key, garbage):
    batch, logits = slime_batch()
    args = slime_args(use_kl_loss=True, kl_loss_coef=0.1)

    def loss_log_gradient():
        loss, log = slime.policy_loss(args, batch, logits, slime_reducer(batch))
        return loss, log, torch.autograd.grad(loss, logits)[0]

    clean = loss_log_gradient()
    batch[key][0][1] = garbage  # the tool's token
    torch.testing.assert_close(loss_log_gradient(), clean)


def test_slime_on_policy_without_old_logprobs(mpu):
    batch, logits = slime_batch()
    del batch["log_probs"]
    loss, log = slime.policy_loss(slime_args(), batch, logits, slime_reducer(batch))
    logps, _ = slime_response(batch, logits, 0.7)
    ratio = torch.cat(logps) - torch.cat(logps).detach()
    assert_same(loss, slime_reducer(batch)(clipped(ratio, torch.cat(batch["advantages"]), 0.2, 0.3)), logits)
    assert log["ppo_kl"] == 0


def test_slime_refuses(mpu):
    batch, logits = slime_batch()
    for option in ("use_opsm", "use_tis", "get_mismatch_metrics", "use_score_centering"):
        with pytest.raises(NotImplementedError, match=f"{option}=True"):
            slime.policy_loss(slime_args(**{option: True}), batch, logits, slime_reducer(batch))
    args = slime_args(custom_pg_loss_reducer_function_path="my.reducer")
    with pytest.raises(NotImplementedError, match=r"custom_pg_loss_reducer_function_path='my\.reducer'"):
        slime.policy_loss(args, batch, logits, slime_reducer(batch))
    with pytest.raises(NotImplementedError, match="rollout_top_p=0.9"):
        slime.policy_loss(slime_args(rollout_top_p=0.9), batch, logits, slime_reducer(batch))
    with pytest.raises(NotImplementedError, match="eps_clip_c=3.0 with CISPO"):
        slime.policy_loss(slime_args(eps_clip_c=3.0, advantage_estimator="cispo"), batch, logits, slime_reducer(batch))
    with pytest.raises(NotImplementedError, match="kl_coef=0.1"):
        slime.advantages(slime_args(kl_coef=0.1), {"rewards": [1.0], "loss_masks": [torch.ones(2)]})
    mpu.data = 4
    with pytest.raises(NotImplementedError, match="data_parallel_size=4"):
        slime.advantages(slime_args(), {"rewards": [1.0], "loss_masks": [torch.ones(2)]})


def test_slime_rewards(mpu):
    rewards, args = [1.0, 0.0, 0.5, 2.0, 0.25, 0.75], slime_args(fusedpo_advantage="maxpo", n_samples_per_prompt=3)
    args.fusedpo_advantage_options = {"k": 1}
    want = fusedpo.advantages.maxpo(torch.tensor(rewards), k=1, group_ids=torch.tensor([0, 1, 0, 1, 1, 0]))
    samples = [
        SimpleNamespace(group_index=g, response_length=3, get_reward_value=lambda args, r=r: r)
        for g, r in zip((7, 2, 7, 2, 2, 7), rewards, strict=True)
    ]
    raw, processed = slime.post_process_rewards(args, samples)
    assert raw == rewards
    torch.testing.assert_close(torch.tensor(processed), want)

    data = {"rewards": rewards, "loss_masks": [torch.ones(n, dtype=torch.int64) for n in (2, 1, 3, 2, 2, 4)]}
    slime.advantages(args, data)
    want = fusedpo.advantages.maxpo(torch.tensor(rewards), k=1, group_size=3)
    assert [len(a) for a in data["advantages"]] == [2, 1, 3, 2, 2, 4]
    torch.testing.assert_close(torch.stack([a[0] for a in data["advantages"]]), want)
    torch.testing.assert_close(torch.cat(data["returns"]), torch.cat(data["advantages"]))
    with pytest.raises(ValueError, match="fusedpo_advantage must be one of"):
        slime.post_process_rewards(slime_args(fusedpo_advantage="gae"), samples)


class SlimeSample:
    def __init__(self, reward, group=0, **fields):
        self.reward, self.group_index, self.response_length = reward, group, 3
        vars(self).update(fields)

    def get_reward_value(self, args):
        return self.reward["score"]  # as with --reward-key


@pytest.mark.parametrize("name", ["dr_grpo", "maxpo", "opo", "reinforce_plus_plus_baseline"])
def test_slime_samples_that_count_for_nobody(mpu, name):
    """Removed, aborted and unscorable ones; the group of 5 has none left, that of 6 too few for k."""
    args = slime_args(fusedpo_advantage=name, fusedpo_advantage_options={"k": 2} if name == "maxpo" else {})
    scores, groups = [1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 3.0], [7, 7, 7, 5, 5, 6, 6]
    samples = [SlimeSample({"score": score}, group) for score, group in zip(scores, groups, strict=True)]
    for i in (3, 4, 6):
        samples[i].remove_sample = True
    samples[4].reward = None
    others = [SlimeSample(None, 7), SlimeSample({"score": None}, 7), SlimeSample({"score": math.nan}, 6)]
    raw, processed = slime.post_process_rewards(args, samples[:2] + others + samples[2:])
    assert raw == [1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 2.0, 0.0, 1.0, 3.0]
    assert processed[2:5] == [0.0, 0.0, 0.0]
    assert [processed[i] for i in (6, 7, 9)] == [0.0, 0.0, 0.0]
    left = [samples[i] for i in (0, 1, 2, 5)]
    _, want = slime.post_process_rewards(args, left)
    assert [processed[i] for i in (0, 1, 5, 8)] == want
    assert any(want)
    assert slime.post_process_rewards(args, others)[1] == [0.0] * 3


def test_slime_a_trajectory_counts_once(mpu):
    rollouts = (0, 1, 0, 2, 0, 1)
    scores = [{0: 1.0, 1: 0.0, 2: 0.5}[rollout] for rollout in rollouts]
    fan = [SlimeSample({"score": s}, rollout_id=r) for s, r in zip(scores, rollouts, strict=True)]
    fan += [SlimeSample({"score": s}, 1, rollout_id=r) for s, r in ((2.0, 0), (1.0, 3))]  # another prompt's
    for name in ("dr_grpo", "opo"):
        _, got = slime.post_process_rewards(slime_args(fusedpo_advantage=name), fan)
        rewards, lengths = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([9, 6, 3])
        weights = torch.ones(3) if name == "dr_grpo" else lengths
        want = rewards - (weights * rewards).sum() / weights.sum()
        torch.testing.assert_close(torch.tensor(got), torch.tensor([*want[list(rollouts)], 0.5, -0.5]))
    fan[2].reward = {"score": 0.0}
    with pytest.raises(ValueError, match=r"samples of one trajectory must have one reward and one group"):
        slime.post_process_rewards(slime_args(), fan)


def test_slime_advantages_of_samples_that_count_for_nobody(mpu):
    args = slime_args(fusedpo_advantage="maxpo", fusedpo_advantage_options={"k": 1}, n_samples_per_prompt=4)
    masks = [torch.ones(n, dtype=torch.int64) for n in (2, 1, 3, 2, 2, 4, 1, 1)]
    masks[2][:] = 0
    data = {"rewards": [1.0, 0.0, 9.0, None, math.nan, None, 2.0, None], "loss_masks": masks}
    slime.advantages(args, data)
    assert [a[0].item() for a in data["advantages"]] == [1, -1, 0, 0, 0, 0, 0, 0]


def test_slime_opo_over_the_batch(mpu):
    options = {"fusedpo_advantage": "opo", "fusedpo_advantage_options": {"scope": "batch"}}
    _, got = slime.post_process_rewards(slime_args(**options), [SlimeSample({"score": r}, r) for r in (0.0, 1.0)])
    assert got == [-0.5, 0.5]


def test_slime_tis(mpu):
    old, rollout = (
        [torch.tensor([-1.0, -0.5]), torch.tensor([-2.0])],
        [torch.tensor([-2.5, -0.6]), torch.tensor([-1.0])],
    )
    masks, pg_loss = [torch.ones(2), torch.ones(1)], torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    args = SimpleNamespace(tis_clip=2.0, tis_clip_low=0.5)
    loss, same_masks, metrics = slime.tis(
        args, pg_loss=pg_loss, train_log_probs=old, rollout_log_probs=rollout, loss_masks=masks, total_lengths=[3, 2]
    )
    ratio = torch.tensor([1.5, 0.1, -1.0]).exp()
    torch.testing.assert_close(loss, pg_loss * ratio.clamp(0.5, 2.0))
    assert same_masks is masks
    torch.testing.assert_close(metrics["tis"], ratio)
    torch.testing.assert_close(metrics["tis_clipfrac"], torch.tensor([1.0, 0.0, 1.0]))
    rollout[0][0], masks[0][0] = torch.nan, 0
    loss, _, _ = slime.tis(args, pg_loss=pg_loss, train_log_probs=old, rollout_log_probs=rollout, loss_masks=masks)
    torch.testing.assert_close(loss, pg_loss * torch.tensor([0.0, *ratio[1:].clamp(0.5, 2.0)]))


@pytest.mark.parametrize("dual", [None, 1.5])
def test_slime_compute_policy_loss(batch, dual):
    """``ppo_kl`` is old minus new."""
    log_ratio, a = (batch.logprobs - batch.old).flatten(), batch.advantages.flatten()
    loss, clip = slime.compute_policy_loss(-log_ratio, a, 0.2, 0.3, eps_clip_c=dual)
    assert_same(loss.square().sum(), clipped(log_ratio, a, 0.2, 0.3, dual).square().sum(), batch.logprobs)
    ratio = log_ratio.exp()
    torch.testing.assert_close(clip, (-ratio.clamp(0.8, 1.3) * a > -ratio * a).float())


def test_slime_log_probs():
    logits, tokens = torch.randn(5, 13, requires_grad=True), torch.randint(0, 13, (5,))
    logp = logits.log_softmax(-1)
    lp, entropy = slime.calculate_log_probs_and_entropy(logits, tokens, None, with_entropy=True)
    assert_same(lp.square().sum(), logp.gather(-1, tokens[:, None]).square().sum(), logits)
    assert_same(entropy.square().sum(), (logp.exp() * logp).sum(-1).square().sum(), logits)
    assert lp.shape == (5, 1)
    assert slime.calculate_log_probs_and_entropy(logits, tokens, None)[1] is None
    with pytest.raises(TypeError, match="tp_group must be a torch.distributed.ProcessGroup"):
        slime.calculate_log_probs_and_entropy(logits, tokens, SimpleNamespace(size=lambda: 2))
    with pytest.raises(NotImplementedError, match="log_prob_keep_mask"):
        slime.calculate_log_probs_and_entropy(logits, tokens, None, log_prob_keep_mask=torch.ones(5, 13))


# ------------------------------------------------------------------------------------------------------------- OpenRLHF

CORRECTION = {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.25)}


@pytest.mark.parametrize(
    "counts", [{}, {"dp_size": 2}, {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 12.0}]
)
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("kind", ["ppo", "dual", "gspo", "nfpo"])
def test_openrlhf_loss(batch, kind, token_level, counts):
    """``dp_size`` belongs to the global counts: without them OpenRLHF takes the mean of the micro-batch."""
    settings = {"nfpo": {"objective": "nfpo", "n": 3}, "dual": {"dual_clip": 1.6}, "gspo": {"policy_loss_type": "gspo"}}
    module = openrlhf.PolicyLoss(0.15, 0.3, token_level_loss=token_level, **settings.get(kind, {}))
    advantages = batch.per_sequence if kind == "gspo" else batch.advantages
    log_ratio = batch.logprobs - batch.old
    if kind == "nfpo":
        token = traced(log_ratio, advantages, 3, 0.15, 0.3)
    elif kind == "gspo":
        token, token_level = clipped(sequence_log_ratio(log_ratio, MASK), advantages, 0.15, 0.3), False
    else:
        token = clipped(log_ratio, advantages, 0.15, 0.3, 1.6 if kind == "dual" else None)
    if token_level:
        want = sum_of(token) / counts.get("batch_num_tokens", MASK.sum())
    else:
        want = mean_of_sequences(token).sum() / counts.get("global_batch_size", B)
    loss, clip_ratio, ppo_kl, vllm_kl = module(batch.logprobs, batch.old, advantages, MASK, **counts)
    assert_same(loss, want * (2 if "batch_num_tokens" in counts else 1), batch.logprobs)
    torch.testing.assert_close(ppo_kl, sum_of(-log_ratio).detach() / MASK.sum())
    assert vllm_kl is None
    if kind == "ppo":
        ratio = log_ratio.detach().exp()
        cut = -advantages * ratio < -advantages * ratio.clamp(0.85, 1.3)
        torch.testing.assert_close(clip_ratio, sum_of(cut.float()) / MASK.sum())


def test_openrlhf_without_a_kept_token():
    logprobs = torch.randn(2, 3, requires_grad=True)
    given = (logprobs, logprobs.detach() + 1, torch.ones(2, 3), torch.zeros(2, 3), logprobs.detach())
    for module, numbers in ((openrlhf.PolicyLoss(**CORRECTION), 5), (openrlhf.PolicyLoss(), 3)):
        assert [float(x.detach()) for x in module(*given) if x is not None] == [0.0] * numbers


@pytest.mark.parametrize("mode", ["mask", "clip"])
def test_openrlhf_correction(batch, mode):
    module = openrlhf.PolicyLoss(is_correction_mode=mode, **CORRECTION)
    loss, _, _, vllm_kl, filtered = module(batch.logprobs, batch.old, batch.advantages, MASK, batch.rollout)
    ratio = (batch.old - batch.rollout).exp()
    outside = (ratio < 0.8) | (ratio > 1.25)
    weight = ratio.clamp(0.8, 1.25) if mode == "clip" else torch.where(outside, 0, ratio)
    token = clipped(batch.logprobs - batch.old, batch.advantages, 0.2, 0.2)
    assert_same(loss, sum_of(weight * token) / MASK.sum(), batch.logprobs)
    torch.testing.assert_close(vllm_kl, sum_of(batch.rollout - batch.old) / MASK.sum())
    torch.testing.assert_close(filtered, sum_of(outside.float()) / MASK.sum())
    assert 0 < filtered < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_correction_level": "seq"}, "is_correction_level='seq'"),
        ({"is_correction_level": "token", "policy_loss_type": "gspo"}, "is_correction_level='token'"),
        ({"is_correction_level": "token", "is_correction_gating": "tv"}, "is_correction_gating='tv'"),
        ({"enable_vllm_is_correction": True}, "enable_vllm_is_correction=True"),
        ({"dual_clip": 3.0, "objective": "cispo"}, "dual_clip=3.0 with CISPO"),
    ],
)
def test_openrlhf_refuses(settings, message):
    with pytest.raises(NotImplementedError, match=message):
        openrlhf.PolicyLoss(**settings)


def test_openrlhf_log_probs():
    logits, labels = torch.randn(2, 5, 13, requires_grad=True), torch.randint(0, 13, (2, 5))
    before = logits.detach().clone()
    logp = (logits / 0.7).log_softmax(-1).gather(-1, labels[..., None])
    assert_same(
        openrlhf.log_probs_from_logits(logits, labels, temperature=0.7).square().sum(), logp.square().sum(), logits
    )
    assert torch.equal(logits.detach(), before)
    logp = logits.log_softmax(-1)
    assert_same(openrlhf.compute_entropy(logits).square().sum(), (logp.exp() * logp).sum(-1).square().sum(), logits)


# -------------------------------------------------------------------------------------------------------------- NeMo-RL


@pytest.fixture
def interfaces(monkeypatch):
    class LossType(enum.Enum):
        TOKEN_LEVEL = "token_level"
        SEQUENCE_LEVEL = "sequence_level"

    class LossInputType(enum.Enum):
        LOGPROB = "logprob"

    return stand_in(monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType)


SAMPLE_MASK = torch.tensor([1.0, 1.0, 0.0, 1.0])
NEMO = {"reference_policy_kl_penalty": 0.0, "ratio_clip_min": 0.15, "ratio_clip_max": 0.3}


def nemo_data(batch, advantages=None):
    """``[B, S]`` with a first position that nothing predicts."""

    def shifted(x):
        return torch.cat((torch.full((B, 1), float("nan")), x), 1)

    return {
        "advantages": shifted(batch.advantages if advantages is None else advantages),
        "prev_logprobs": shifted(batch.old),
        "generation_logprobs": shifted(batch.rollout),
        "reference_policy_logprobs": shifted(batch.ref),
        "token_mask": torch.cat((torch.zeros(B, 1), MASK.float()), 1),
        "sample_mask": SAMPLE_MASK,
    }


def nemo_mean(token, token_level):
    if token_level:
        return (token * MASK * SAMPLE_MASK[:, None]).sum() / 40
    return (mean_of_sequences(token) * SAMPLE_MASK).sum() / 10


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("kind", ["ppo", "dual", "cispo", "reinforce", "gspo", "on-policy", "tis", "icepop", "nfpo"])
def test_nemo_rl_loss(batch, interfaces, kind, token_level):
    flags = {
        "dual": {"ratio_clip_c": 1.6},
        "cispo": {"use_cispo": True},
        "reinforce": {"disable_ppo_ratio": True},
        "gspo": {"sequence_level_importance_ratios": True},
        "on-policy": {"force_on_policy_ratio": True},
        "tis": {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": 1.1,
        },
        "icepop": {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "icepop",
            "truncated_importance_sampling_ratio": 1.2,
            "truncated_importance_sampling_ratio_min": 0.8,
        },
    }.get(kind, {})
    cfg = {**NEMO, **flags, "token_level_loss": token_level}
    loss_fn = nemo_rl.ClippedPGLossFn(cfg, **({"objective": "nfpo", "n": 3} if kind == "nfpo" else {}))
    assert loss_fn.input_type is interfaces.LossInputType.LOGPROB
    level = "TOKEN_LEVEL" if token_level else "SEQUENCE_LEVEL"
    assert loss_fn.loss_type is interfaces.LossType[level]

    advantages = batch.per_sequence if kind == "gspo" else batch.advantages
    log_ratio = batch.logprobs - batch.old
    if kind == "cispo":
        token = -advantages * log_ratio.exp().clamp(0.85, 1.3).detach() * batch.logprobs
    elif kind == "reinforce":
        token = -advantages * batch.logprobs
    elif kind == "gspo":
        token = clipped(sequence_log_ratio(log_ratio, MASK), advantages, 0.15, 0.3)
    elif kind == "on-policy":
        token = -advantages * (batch.logprobs - batch.logprobs.detach()).exp()
    elif kind == "nfpo":
        token = traced(log_ratio, advantages, 3, 0.15, 0.3)
    else:
        token = clipped(log_ratio, advantages, 0.15, 0.3, 1.6 if kind == "dual" else None)
    weight = (batch.old - batch.rollout).exp()
    if kind == "tis":
        token = token * weight.clamp(max=1.1)
    elif kind == "icepop":
        token = token * torch.where((weight >= 0.8) & (weight <= 1.2), weight, 0)
    loss, metrics = loss_fn(
        next_token_logprobs=batch.logprobs,
        data=nemo_data(batch, advantages),
        global_valid_seqs=torch.tensor(10.0),
        global_valid_toks=torch.tensor(40.0),
    )
    assert_same(loss, nemo_mean(token, token_level), batch.logprobs)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    assert metrics["num_valid_samples"] == 3
    if kind == "ppo":
        keep = MASK * SAMPLE_MASK[:, None]
        assert metrics["probs_ratio"] == pytest.approx((log_ratio.exp() * keep).sum().item() / 40, rel=1e-5)
        assert metrics["probs_ratio_max"] == pytest.approx(log_ratio.exp()[keep.bool()].max().item(), rel=1e-5)
        shift = batch.old - batch.rollout
        error = (shift.abs().exp() * keep).sum().item() / 40
        assert metrics["token_mult_prob_error"] == pytest.approx(error, rel=1e-5)
        kl = ((shift.exp() - 1 - shift) * keep).sum().item() / 40
        assert metrics["gen_kl_error"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("token_level", [True, False])
def test_nemo_rl_kl(batch, interfaces, kind, token_level):
    """With the gradient through the probability of having sampled the token, whose weight is 1."""
    cfg = {
        **NEMO,
        "reference_policy_kl_penalty": 0.2,
        "reference_policy_kl_type": kind,
        "token_level_loss": token_level,
    }
    loss, metrics = nemo_rl.ClippedPGLossFn(SimpleNamespace(**cfg))(
        batch.logprobs, nemo_data(batch), torch.tensor(10.0), torch.tensor(40.0)
    )
    d = batch.logprobs - batch.ref
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kind] * (batch.logprobs - batch.logprobs.detach()).exp()
    token = clipped(batch.logprobs - batch.old, batch.advantages, 0.15, 0.3)
    assert_same(loss, nemo_mean(token, token_level) + 0.2 * nemo_mean(kl, token_level), batch.logprobs)
    assert metrics["kl_penalty"] == pytest.approx(nemo_mean(kl, token_level).item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("garbage", [float("nan"), float("-inf"), 1e4])
@pytest.mark.parametrize("key", ["prev_logprobs", "generation_logprobs", "reference_policy_logprobs", "logprobs"])
def test_nemo_rl_garbage_at_masked_tokens(batch, interfaces, key, garbage):
    """``where(mask, exp(x), 0)`` has the gradient nan where x overflows."""
    loss_fn = nemo_rl.ClippedPGLossFn({**NEMO, "reference_policy_kl_penalty": 0.2})
    data, logprobs = nemo_data(batch), batch.logprobs.detach()
    masked = data["token_mask"] * SAMPLE_MASK[:, None] == 0

    def loss_metrics_gradient():
        leaf = logprobs.clone().requires_grad_()
        loss, metrics = loss_fn(leaf, data, torch.tensor(10.0), torch.tensor(40.0))
        return loss, torch.tensor(list(metrics.values())), torch.autograd.grad(loss, leaf)[0]

    clean = loss_metrics_gradient()
    if key == "logprobs":
        logprobs = logprobs.masked_fill(masked[:, 1:], garbage)
    else:
        data[key] = data[key].masked_fill(masked, garbage)
    torch.testing.assert_close(loss_metrics_gradient(), clean)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"use_on_policy_kl_approximation": True}, "use_on_policy_kl_approximation"),
        ({"positive_example_nll_weight": 0.1}, "positive_example_nll_weight=0.1"),
        ({"truncated_importance_sampling_type": "seq-mask-tis"}, "truncated_importance_sampling_type='seq-mask-tis'"),
        (
            {"sequence_level_importance_ratios": True, "use_importance_sampling_correction": True},
            "sequence_level_importance_ratios",
        ),
        ({"ratio_clip_c": 3.0, "use_cispo": True}, "ratio_clip_c=3.0 with CISPO"),
    ],
)
def test_nemo_rl_refuses(interfaces, flags, message):
    with pytest.raises(NotImplementedError, match=message):
        nemo_rl.ClippedPGLossFn({**NEMO, **flags})


@pytest.mark.parametrize("tokens", [0.0, 40.0])
def test_nemo_rl_without_a_kept_token(batch, interfaces, tokens):
    """The extremes of a micro-batch without tokens must not be those of the step; NeMo-RL drops infinite ones."""
    loss_fn = nemo_rl.ClippedPGLossFn({**NEMO, "reference_policy_kl_penalty": 0.2})
    data = {**nemo_data(batch), "sample_mask": torch.zeros(B)}
    loss, metrics = loss_fn(batch.logprobs, data, torch.tensor(tokens / 4), torch.tensor(tokens))
    assert (metrics.pop("probs_ratio_min"), metrics.pop("probs_ratio_max")) == (math.inf, -math.inf)
    assert set(metrics.values()) == {0.0}
    assert not torch.autograd.grad(loss, batch.logprobs)[0].any()


@pytest.mark.parametrize(
    ("kind", "correct", "bound", "message"),
    [
        ("tis", False, 2.0, "'tis' needs use_importance_sampling_correction"),
        ("icepop", True, None, "'icepop' needs .*truncated_importance_sampling_ratio$"),
        ("clip", True, 2.0, "must be None, 'tis' or 'icepop', got 'clip'"),
    ],
)
def test_nemo_rl_truncates_nothing_in_silence(interfaces, kind, correct, bound, message):
    flags = {
        "truncated_importance_sampling_type": kind,
        "use_importance_sampling_correction": correct,
        "truncated_importance_sampling_ratio": bound,
    }
    with pytest.raises(ValueError, match=message):
        nemo_rl.ClippedPGLossFn({**NEMO, **flags})


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ({}, lambda w: w),
        ({"truncated_importance_sampling_type": "tis"}, lambda w: w.clamp(0, 1.2)),
        (
            {"truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio_min": 0.8},
            lambda w: torch.where((w >= 0.8) & (w <= 1.2), w, 0),
        ),
        ({"sequence_level_importance_ratios": True}, None),
    ],
    ids=["plain", "tis", "icepop", "sequence"],
)
def test_nemo_rl_metric_of_importance_weights(batch, interfaces, flags, weight):
    """As NeMo-RL has it: after truncation, infinite ones 0, and of whole sequences where the ratio is."""
    cfg = {**NEMO, **flags, "token_level_loss": not flags.get("sequence_level_importance_ratios", False)}
    if weight is not None and flags:
        cfg |= {"use_importance_sampling_correction": True, "truncated_importance_sampling_ratio": 1.2}
    data = nemo_data(batch)
    data["generation_logprobs"][0, 3] = -200.0  # its weight overflows
    _, metrics = nemo_rl.ClippedPGLossFn(cfg)(batch.logprobs, data, torch.tensor(10.0), torch.tensor(40.0))
    shift, keep = batch.old - data["generation_logprobs"][:, 1:], MASK * SAMPLE_MASK[:, None]
    if weight is None:
        w = (shift * keep).sum(1).exp()
        want = (torch.where(w.isinf(), 0, w) * SAMPLE_MASK).sum() / 10
    else:
        w = shift.exp()
        w = torch.where(w.isinf(), 0, w)
        want = (weight(w) * keep).sum() / 40
    assert metrics["sampling_importance_ratio"] == pytest.approx(want.item(), rel=1e-5)
    if weight is not None and flags:
        low = flags.get("truncated_importance_sampling_ratio_min", 0)
        assert metrics["is_oob_ratio"] == pytest.approx((((w < low) | (w > 1.2)) * keep).sum().item() / 40, rel=1e-5)
    else:
        assert "is_oob_ratio" not in metrics


def test_nemo_rl_patch_reaches_all_that_build_the_loss(interfaces, monkeypatch):
    class Theirs:
        pass

    places = ("loss", "loss.loss_functions", "grpo", "ppo", "single_controller_utils.setup")
    modules = [stand_in(monkeypatch, f"nemo_rl.algorithms.{x}", ClippedPGLossFn=Theirs) for x in places]
    monkeypatch.setattr(sys.modules["nemo_rl.algorithms"], "loss", modules[0], raising=False)
    try:
        nemo_rl.patch(objective="nfpo", n=3)
        assert all(module.ClippedPGLossFn is nemo_rl.ClippedPGLossFn for module in modules)
        by_patch = modules[2].ClippedPGLossFn(NEMO)
        assert by_patch.objective == nemo_rl.ClippedPGLossFn(NEMO, objective="nfpo", n=3).objective
        own = modules[2].ClippedPGLossFn(NEMO, objective="gspo")
        assert isinstance(own.objective.ratio, fusedpo.objectives.SequenceRatio)
        nemo_rl.patch()
        assert isinstance(
            modules[3].ClippedPGLossFn({**NEMO, "use_cispo": True}).objective.trust_region, fusedpo.objectives.CISPO
        )
        with pytest.raises(ValueError, match="nfpo has no option 'window'"):
            nemo_rl.patch(objective="nfpo", window=3)
    finally:
        nemo_rl.unpatch()
    assert all(module.ClippedPGLossFn is Theirs for module in modules)
    nemo_rl.unpatch()
    assert isinstance(nemo_rl.ClippedPGLossFn(NEMO).objective.ratio, fusedpo.objectives.TokenRatio)


@pytest.mark.parametrize("key", ["curr_logprobs_keep_mask", "curr_logprobs_unfiltered"])
def test_nemo_rl_refuses_filtered_logprobs(batch, interfaces, key):
    data = {**nemo_data(batch), key: MASK}
    with pytest.raises(NotImplementedError, match=key):
        nemo_rl.ClippedPGLossFn(NEMO)(batch.logprobs, data, torch.tensor(10.0), torch.tensor(40.0))


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (nemo_rl, "nemo_rl.distributed.model_utils"),
        (skyrl, "skyrl.backends.skyrl_train.distributed.megatron.model_utils"),
    ],
)
def test_patch_logprobs_reaches_all_that_hold_them(monkeypatch, adapter, name):
    theirs = {own.__name__: type(own.__name__, (), {}) for own in adapter._LOGPROBS[:-1]}  # a version without the last
    module = stand_in(monkeypatch, name, **theirs)
    worker = stand_in(monkeypatch, name.split(".")[0] + ".worker", **theirs)
    try:
        adapter.patch_logprobs()
        adapter.patch_logprobs()
        for own in adapter._LOGPROBS[:-1]:
            assert getattr(module, own.__name__) is getattr(worker, own.__name__) is own
        assert not hasattr(module, adapter._LOGPROBS[-1].__name__)
    finally:
        adapter.unpatch_logprobs()
    for key, original in theirs.items():
        assert getattr(module, key) is getattr(worker, key) is original


# ---------------------------------------------------------------------------------------------------------------- AReaL


def packed(x):
    return x[MASK]


CU_SEQLENS = torch.cat((torch.zeros(1, dtype=torch.int32), LENGTHS.cumsum(0, dtype=torch.int32)))


def areal_given(batch, layout):
    """Packed 1-D with ``cu_seqlens``, or padded; some kept tokens are masked."""
    keep = MASK.clone()
    keep[0, 3] = keep[2, 1] = False
    take = packed if layout == "packed" else (lambda x: x)
    given = {
        "logprobs": take(batch.logprobs),
        "proximal_logprobs": take(batch.old),
        "old_logprobs": take(batch.rollout),
        "advantages": take(batch.advantages),
        "loss_mask": take(keep),
        "cu_seqlens": CU_SEQLENS if layout == "packed" else None,
    }
    return given, keep


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["ppo", "dual", "gspo", "nfpo"])
def test_areal_loss(batch, kind, layout):
    given, keep = areal_given(batch, layout)
    settings = {
        "dual": {"c_clip": 1.6},
        "gspo": {"importance_sampling_level": "sequence"},
        "nfpo": {"objective": "nfpo", "options": {"n": 3}},
    }.get(kind, {})
    loss, stat = areal.ppo_actor_loss_fn(**given, eps_clip=0.02, eps_clip_higher=0.5, **settings)
    log_ratio, a = batch.logprobs - batch.old, batch.advantages
    if kind == "gspo":
        a = sequence_log_ratio(a, keep)
        token = clipped(sequence_log_ratio(log_ratio, keep), a, 0.02, 0.5)
    elif kind == "nfpo":
        token = traced(log_ratio, a, 3, 0.02, 0.5, keep)
    else:
        token = clipped(log_ratio, a, 0.02, 0.5, 1.6 if kind == "dual" else None)
    assert_same(loss, sum_of(token, keep) / keep.sum(), batch.logprobs)
    assert set(stat) == {"loss", "importance_weight", "approx_kl", "clip_mask", "dual_clip_mask"}
    ratio = (sequence_log_ratio(log_ratio, keep) if kind == "gspo" else log_ratio).detach().exp()
    want = {
        "loss": torch.where(keep, token.detach(), 0),
        "importance_weight": torch.where(keep, ratio, 0),
        "approx_kl": log_ratio.detach(),
        "clip_mask": keep & (-a * ratio < -a * ratio.clamp(0.98, 1.5)),
        "dual_clip_mask": keep & (a < 0) & (ratio > 1.6) & (kind == "dual"),
    }
    for name, value in want.items():
        torch.testing.assert_close(stat[name], packed(value) if layout == "packed" else value, **CLOSE)


def test_areal_garbage_at_masked_tokens(batch):
    """``where(mask, exp(x), 0)`` has the gradient nan where x overflows."""
    given, keep = areal_given(batch, "padded")
    loss, _ = areal.ppo_actor_loss_fn(**given, eps_clip=0.2)
    (clean,) = torch.autograd.grad(loss, batch.logprobs)
    leaf = batch.logprobs.detach().masked_fill(~keep, 1e4).requires_grad_()
    dirty, _ = areal.ppo_actor_loss_fn(**{**given, "logprobs": leaf}, eps_clip=0.2)
    dirty.backward()
    torch.testing.assert_close(leaf.grad, clean)
    empty, _ = areal.ppo_actor_loss_fn(**{**given, "logprobs": leaf, "loss_mask": torch.zeros_like(keep)}, eps_clip=0.2)
    assert empty == 0


def test_areal_refuses(batch):
    given, _ = areal_given(batch, "packed")
    with pytest.raises(NotImplementedError, match="rejection_sampling"):
        areal.ppo_actor_loss_fn(**given, eps_clip=0.2, rejection_sampling=SimpleNamespace(level="token"))
    with pytest.raises(NotImplementedError, match="c_clip=3.0 with CISPO"):
        areal.ppo_actor_loss_fn(**given, eps_clip=0.2, c_clip=3.0, objective="cispo")
    with pytest.raises(ValueError, match="importance_sampling_level"):
        areal.ppo_actor_loss_fn(**given, eps_clip=0.2, importance_sampling_level="prompt")
    with pytest.raises(ValueError, match="cu_seqlens"):
        areal.ppo_actor_loss_fn(**{**given, "cu_seqlens": None}, eps_clip=0.2, importance_sampling_level="sequence")
    two = SimpleNamespace(size=lambda: 2)
    for function in (areal.gather_logprobs, areal.gather_logprobs_entropy):
        with pytest.raises(TypeError, match="tp_group must be a torch.distributed.ProcessGroup"):
            function(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64), tp_group=two)


def test_areal_log_probs():
    logits, labels = torch.randn(6, 13, requires_grad=True), torch.randint(0, 13, (6,))
    logp = (logits / 0.7).log_softmax(-1)
    chosen = logp.gather(-1, labels[:, None])[:, 0]
    assert_same(areal.gather_logprobs(logits, labels, 0.7).square().sum(), chosen.square().sum(), logits)
    lp, entropy = areal.gather_logprobs_entropy(logits, labels, temperature=0.7, chunk_size=2)
    assert_same(lp.square().sum(), chosen.square().sum(), logits)
    assert_same(entropy.square().sum(), (logp.exp() * logp).sum(-1).square().sum(), logits)


# ----------------------------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (slime.policy_loss, "args batch logits sum_of_sample_mean"),
        (slime.advantages, "args rollout_data"),
        (slime.compute_policy_loss, "ppo_kl advantages eps_clip eps_clip_high eps_clip_c"),
        (
            slime.calculate_log_probs_and_entropy,
            "logits tokens tp_group with_entropy chunk_size log_prob_keep_mask with_entropy_grad",
        ),
        (skyrl.logprobs_from_logits, "logits labels inplace_backward"),
        (
            openrlhf.PolicyLoss.forward,
            "self log_probs old_log_probs advantages action_mask rollout_log_probs dp_size batch_num_tokens "
            "global_batch_size",
        ),
        (openrlhf.log_probs_from_logits, "logits labels temperature"),
        (
            nemo_rl.ClippedPGLossFn.__call__,
            "self next_token_logprobs data global_valid_seqs global_valid_toks",
        ),
        (prime_rl.FusedOutputLinear.forward, "self hidden_states labels temperature"),
        (
            areal.ppo_actor_loss_fn,
            "logprobs proximal_logprobs old_logprobs advantages eps_clip loss_mask eps_clip_higher c_clip "
            "rejection_sampling importance_sampling_level cu_seqlens objective options",
        ),
        (areal.gather_logprobs, "logits labels temperature tp_group chunk_size"),
    ],
)
def test_argument_order(function, names):
    assert parameters(function) == names.split()
