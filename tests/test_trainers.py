"""Adapters beside the functions that they take the place of, of the trainers themselves: ``make test-trainers``."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch
from support import ranks
from support.trainers import trainer
from test_integration_adapters import (
    CLOSE,
    CORRECTION,
    MASK,
    areal_given,
    assert_same,
    batch,  # noqa: F401
    parameters,
    skyrl_config,
)

import fusedpo
from fusedpo.integrations import areal, openrlhf, skyrl

V = 53


def same_arguments(ours, theirs, *, more=()):
    """In order, with the same defaults; ``more`` may follow."""
    own, other = (inspect.signature(function).parameters for function in (ours, theirs))
    assert [name for name in own if name not in more] == list(other)
    for name, parameter in other.items():
        assert own[name].default == parameter.default, name


@pytest.fixture
def logits():
    return torch.randn(3, 7, V).mul_(3).requires_grad_(), torch.randint(0, V, (3, 7))


# ------------------------------------------------------------------------------------------------------------- OpenRLHF


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("kind", ["ppo", "dual", "gspo", "mask", "clip"])
def test_openrlhf(batch, kind, token_level):  # noqa: F811
    theirs = trainer("openrlhf.models.loss")
    settings = {
        "dual": {"dual_clip": 1.6},
        "gspo": {"policy_loss_type": "gspo"},
        "mask": {"is_correction_mode": "mask", **CORRECTION},
        "clip": {"is_correction_mode": "clip", **CORRECTION},
    }.get(kind, {})
    settings = {"is_correction_level": "off", "token_level_loss": token_level, **settings}
    given = (batch.logprobs, batch.old, batch.per_sequence, MASK.float(), batch.rollout, 2, 50.0, 12.0)
    got, want = openrlhf.PolicyLoss(0.15, 0.3, **settings)(*given), theirs.PolicyLoss(0.15, 0.3, **settings)(*given)
    assert_same(got[0], want[0], batch.logprobs)
    assert len(got) == len(want)
    for index in (2, 3, 4) if kind == "dual" else (1, 2, 3, 4):  # OpenRLHF does not count the dual clip
        if want[index] is not None:
            torch.testing.assert_close(got[index], want[index], **CLOSE)
    assert parameters(openrlhf.PolicyLoss.forward) == parameters(theirs.PolicyLoss.forward)
    assert set(parameters(theirs.PolicyLoss)) <= set(parameters(openrlhf.PolicyLoss))


def test_openrlhf_log_probs(logits):
    theirs = trainer("openrlhf.models.utils")
    x, ids = logits
    same_arguments(openrlhf.log_probs_from_logits, theirs.log_probs_from_logits)
    for ours, their in (
        (openrlhf.log_probs_from_logits(x, ids, 0.7), theirs.log_probs_from_logits(x.clone(), ids, 0.7)),
        (openrlhf.compute_entropy(x), theirs.compute_entropy(x)),
    ):
        assert_same(ours.square().sum(), their.square().sum(), x)


# ---------------------------------------------------------------------------------------------------------------- AReaL


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["ppo", "dual", "gspo"])
def test_areal(batch, kind, layout):  # noqa: F811
    theirs = trainer("areal.utils.functional.functional")
    given, _ = areal_given(batch, layout)
    settings = {"dual": {"c_clip": 1.6}, "gspo": {"importance_sampling_level": "sequence"}}.get(kind, {})
    given.update(eps_clip=0.15, eps_clip_higher=0.3, **settings)
    got, want = areal.ppo_actor_loss_fn(**given), theirs.ppo_actor_loss_fn(**given)
    assert_same(got[0], want[0], batch.logprobs)
    assert set(got[1]) == set(want[1])
    kept = given["loss_mask"]
    for name, value in want[1].items():
        torch.testing.assert_close(got[1][name][kept], value[kept], **CLOSE)
    same_arguments(areal.ppo_actor_loss_fn, theirs.ppo_actor_loss_fn, more=("objective", "options"))


def test_areal_log_probs(logits):
    theirs = trainer("areal.utils.functional.vocab_parallel")
    x, ids = logits
    for name in ("gather_logprobs", "gather_logprobs_entropy"):
        ours, their = getattr(areal, name), getattr(theirs, name)
        same_arguments(ours, their)
        got, want = ours(x, ids, 0.7), their(x, ids, 0.7)
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True):
            assert_same(a.square().sum(), b.square().sum(), x)


# ---------------------------------------------------------------------------------------------------------------- SkyRL

SKYRL = "skyrl.backends.skyrl_train.utils."


@pytest.mark.parametrize("name", ["ppo", "dual_clip", "gspo", "cispo", "sapo"])
def test_skyrl(batch, name):  # noqa: F811
    theirs = trainer(SKYRL + "ppo_utils")
    function, kind = {
        "ppo": (theirs.ppo_policy_loss, "regular"),
        "dual_clip": (theirs.ppo_policy_loss, "dual_clip"),
        "gspo": (theirs.gspo_policy_loss, "gspo"),
        "cispo": (theirs.compute_policy_loss_cispo, "cispo"),
        "sapo": (theirs.sapo_policy_loss, "sapo"),
    }[name]
    config = skyrl_config(policy_loss_type=kind, loss_reduction="sequence_mean")
    config.cispo.cispo_anchor = "old"  # SkyRL's default; the other one is not the adapter's
    given = (batch.logprobs, batch.old, batch.advantages, config, MASK.float(), None)
    assert_same(skyrl.policy_loss_fn(name)(*given)[0], function(*given)[0], batch.logprobs)
    assert parameters(skyrl.policy_loss_fn(name)) == parameters(function)


@pytest.mark.parametrize(("name", "theirs"), [("rloo", "rloo"), ("grpo", "grpo")])
def test_skyrl_advantages(name, theirs):
    utils = trainer(SKYRL + "ppo_utils")
    rewards, mask = torch.zeros(6, 5), torch.ones(6, 5)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 0.5, 0.2, 0.9, 0.3])
    index = ["a", "a", "a", "b", "b", "b"]
    given = {"token_level_rewards": rewards, "response_mask": mask, "index": index}
    want, _ = getattr(utils, f"compute_{theirs}_outcome_advantage")(**given)
    got, _ = skyrl.advantage_estimator(name)(**given)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def test_skyrl_registers_in_the_real_registries():
    utils = trainer(SKYRL + "ppo_utils")
    skyrl.register(nfpo={"n": 8}, maxpo={"k": 2})
    assert utils.PolicyLossRegistry.get("fusedpo_nfpo").__name__ == "fusedpo_nfpo"
    assert utils.AdvantageEstimatorRegistry.get("fusedpo_maxpo").__name__ == "fusedpo_maxpo"


def test_skyrl_log_probs(logits):
    theirs = trainer(SKYRL + "torch_utils")
    x, ids = logits
    got, want = skyrl.logprobs_from_logits(x, ids, inplace_backward=False), theirs.logprobs_from_logits_v2(x, ids)
    assert_same(got.square().sum(), want.square().sum(), x)


def check_skyrl_megatron(group):
    """SkyRL's own functions on a split vocabulary, before and after what they call is replaced."""
    parallel = types.ModuleType("megatron.core.parallel_state")
    parallel.get_tensor_model_parallel_group = lambda: group
    width = V // group.size()
    start, stop = group.rank() * width, (group.rank() + 1) * width
    logits = torch.randn(3, 7, width * group.size()).mul_(3)[..., start:stop]
    ids, upstream = torch.randint(0, V - 1, (3, 7)), torch.randn(3, 7)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("megatron", "megatron.core"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, parallel.__name__, parallel)
        patch.setattr(sys.modules["megatron"], "core", sys.modules["megatron.core"], raising=False)
        patch.setattr(sys.modules["megatron.core"], "parallel_state", parallel, raising=False)
        patch.setattr(torch, "compile", lambda *_, **__: lambda function: function)
        utils = trainer("skyrl.backends.skyrl_train.distributed.megatron.model_utils")

        def results():
            found = []
            for chunk in (None, 3):
                x = logits.clone().requires_grad_()
                lp = utils.from_parallel_logits_to_logprobs(x, ids, start, stop, group, chunk_size=chunk)
                entropy = utils.vocab_parallel_entropy(x * 1, chunk_size=chunk)
                ((lp * upstream[:, 1:]).sum() + (entropy * upstream).sum()).backward()
                found += [lp.detach(), entropy.detach(), x.grad]
            return found

        want = results()
        skyrl.patch_logprobs()
        try:
            torch.testing.assert_close(results(), want, rtol=1e-4, atol=1e-5)
            assert utils.DistributedLogprob is skyrl._LOGPROBS[0]
        finally:
            skyrl.unpatch_logprobs()


@ranks.needs_gloo
def test_skyrl_megatron():
    trainer(SKYRL + "torch_utils")  # skipped here where it is not installed
    ranks.run(check_skyrl_megatron, 2)


# -------------------------------------------------------------------------------------------------------- megatron-core


def check_megatron(group):
    """Its cross entropy of a split vocabulary, with a row that is sure of its token."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import cross_entropy

    width = 20
    logits = torch.randn(5, width * group.size()).mul_(3)
    ids, upstream = torch.randint(logits.shape[1], (5,)), torch.randn(5)
    logits[1, ids[1]] = 20.0
    exact = logits.double().requires_grad_()
    exact_logprobs = exact.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    (exact_logprobs * upstream).sum().backward()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)

    def theirs(x):
        with pytest.MonkeyPatch.context() as patch:
            for module in (parallel_state, cross_entropy):
                patch.setattr(module, "get_tensor_model_parallel_group", lambda *_, **__: group, raising=False)
                patch.setattr(module, "get_tensor_model_parallel_rank", group.rank, raising=False)
                patch.setattr(module, "get_tensor_model_parallel_world_size", group.size, raising=False)
            return -cross_entropy.vocab_parallel_cross_entropy(x.clone()[:, None], ids[:, None])[:, 0]

    found = []
    for function in (lambda x: fusedpo.token_logprobs(x, ids, tp_group=group), theirs):
        x = logits[:, columns].clone().requires_grad_()
        logprobs = function(x)
        (logprobs * upstream).sum().backward()
        torch.testing.assert_close(logprobs.double(), exact_logprobs, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(x.grad.double(), exact.grad[:, columns], rtol=1e-5, atol=1e-6)
        found.append((logprobs[1] / exact_logprobs[1] - 1).abs().item())
    ours, of_megatron = found
    assert ours < 1e-5 < of_megatron  # it takes the difference of two numbers that are nearly the same


@ranks.needs_gloo
def test_megatron():
    trainer("megatron.core.parallel_state")  # skipped here where it is not installed
    ranks.run(check_megatron, 2)


# ----------------------------------------------------------------------------------------------------------- torchtitan


@pytest.mark.parametrize("tokens", [None, 61.0])
def test_torchtitan(batch, logits, tokens):  # noqa: F811
    theirs = trainer("torchtitan.experiments.rl.losses.dapo", bare="torchtitan.experiments.rl")
    from fusedpo.integrations import torchtitan

    x, ids = logits
    old = x.detach().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) + 0.3 * torch.randn(3, 7)
    old[0, 2] = -torch.inf  # dropped
    given = {"generator_logprobs": old, "advantages": torch.randn(3, 7), "loss_mask": torch.rand(3, 7) > 0.3}
    given["loss_mask"][0, 2] = True
    config = theirs.DAPOLoss.Config(ratio_clip_low=0.1, ratio_clip_high=0.28)
    got, metrics = torchtitan.PolicyLoss("dapo", clip_low=0.1, clip_high=0.28)(x, ids, tokens, **given)
    want, expected = theirs.DAPOLoss(config)(x, ids, tokens, **given)
    assert_same(got, want, x)
    assert metrics.keys() == expected.keys()
    for name in expected.keys() - {"loss/ratio_clipped_frac"}:  # torchtitan counts where the clip changes nothing, too
        torch.testing.assert_close(metrics[name].float(), expected[name].float(), rtol=1e-4, atol=1e-5)
    same_arguments(torchtitan.PolicyLoss.__call__, theirs.DAPOLoss.__call__)


# -------------------------------------------------------------------------------------------------------------- TorchRL


@pytest.mark.parametrize("aggregation", ["token_mean", "prompt_mean"])
def test_torchrl(batch, aggregation, monkeypatch):  # noqa: F811
    """The whole forward, on a stand-in for the actor: a distribution over the logits."""
    theirs = trainer("torchrl.objectives.llm")
    tensordict = trainer("tensordict")
    ours = trainer("fusedpo.integrations.torchrl")

    class Actor(torch.nn.Module):
        def get_dist(self, td, **_):
            mask = td["attention_mask"]
            dist = torch.distributions.Categorical(logits=td["logits"])
            log_prob = dist.log_prob
            dist.log_prob = lambda action: log_prob(action.clamp(min=0))
            dist.mask = mask
            return dist

        _get_sft_dist = get_dist

    logits = torch.randn(4, 6, V).requires_grad_()
    ids, mask = torch.randint(0, V, (4, 6)), torch.arange(6) >= torch.tensor([0, 2, 1, 3])[:, None]
    old = logits.detach().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) + 0.3 * torch.randn(4, 6)
    data = {"tokens": {"full": ids}, "log_probs": {"full": old}, "advantage": torch.randn(4, 6, 1)}
    data |= {"logits": logits, "attention_mask": mask, "masks": {"all_attention_mask": mask}}
    td = tensordict.TensorDict(data, batch_size=[4])
    options = {"clip_epsilon": (0.1, 0.28), "entropy_bonus": False, "aggregation": aggregation}
    want = theirs.GRPOLoss(Actor(), **options)(td)
    got = ours.GRPOLoss(Actor(), **options)(td)
    assert_same(got.loss_objective.sum(), want.loss_objective.sum(), logits)
    other = ours.GRPOLoss(Actor(), objective="nfpo", options={"n": 2}, **options)(td)
    assert other.loss_objective.sum() != want.loss_objective.sum()
