"""Samples as users have them: lists, arrays, labels, rows per prompt, trajectories in parts, some that do not count."""

import inspect

import numpy as np
import pytest
import torch

import fusedpo
from fusedpo import advantages, backends
from fusedpo.integrations import _common

native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
LENGTHS = [3, 5, 2, 4, 1, 6, 2, 7]
OPTIONS = {"maxpo": {"k": 2}, "pkpo": {"k": 2}, "passk": {"k": 2}, "order_statistic": {"k": 2, "weights": [0.5, 0.5]}}
OUTCOMES = (*_common.OUTCOME_ESTIMATORS, "remax", "max_at_k", "soft_value")
OPTIONS |= {"max_at_k": {"k": 2}, "soft_value": {"beta": 0.5}}


@pytest.fixture(params=["reference", pytest.param("native", marks=native)])
def backend(request):
    with fusedpo.backend(request.param):
        yield request.param


def options_of(name: str, **given):
    """``given`` and the options that the estimator needs, by the parameters that it has."""
    own = {"lengths": LENGTHS, "baselines": [0.5] * 8, **given}
    names = inspect.signature(getattr(advantages, name)).parameters
    return {key: x for key, x in own.items() if key in names} | OPTIONS.get(name, {})


def tensors(options):
    return {k: torch.tensor(x) if isinstance(x, list) and k != "weights" else x for k, x in options.items()}


@pytest.mark.parametrize("name", OUTCOMES)
def test_lists_arrays_and_rows_are_what_the_tensors_are(backend, name):
    estimator, ids = getattr(advantages, name), [0, 0, 0, 0, 1, 1, 1, 1]
    if name == "remax":
        ids, given = None, options_of(name)
    else:
        given = options_of(name, group_ids=ids)
    want = estimator(torch.tensor(REWARDS), **tensors(given))
    assert want.abs().sum() > 0
    assert torch.equal(estimator(REWARDS, **given), want)
    arrays = {k: np.array(x)[::-1][::-1] if isinstance(x, list) and k != "weights" else x for k, x in given.items()}
    from_array = estimator(np.array(REWARDS), **arrays)
    assert from_array.dtype == torch.float64
    torch.testing.assert_close(from_array.float(), want)
    if "group_ids" in given:
        labels = given | {"group_ids": ["b", "b", "b", "b", "a", "a", "a", "a"]}
        assert torch.equal(estimator(REWARDS, **labels), want)
        labels["group_ids"] = np.array(labels["group_ids"], dtype=object)
        assert torch.equal(estimator(torch.tensor(REWARDS), **labels), want)
    rows = {k: torch.tensor(x).view(2, 4) if isinstance(x, list) and k != "weights" else x for k, x in given.items()}
    rows.pop("group_ids", None)
    rows["mask"] = torch.ones(2, 4)
    by_prompt = estimator(torch.tensor(REWARDS).view(2, 4), **rows)
    assert by_prompt.shape == (2, 4)
    assert torch.equal(by_prompt.flatten(), want)


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_trajectory_in_parts_counts_once(backend, name):
    """Samples 1, 4 and 9 are one trajectory, 2 and 6 another; 5 is a part that does not count."""
    estimator = getattr(advantages, name)
    whole = options_of(name, group_ids=[0, 0, 0, 0, 1, 1, 1, 1])
    want = estimator(torch.tensor(REWARDS, dtype=torch.float64), **tensors(whole))
    of = torch.tensor([0, 1, 2, 3, 1, 1, 2, 4, 5, 1, 6, 7])
    lengths = torch.tensor([3, 2, 1, 4, 2, 9, 1, 1, 6, 1, 2, 7])
    kept = torch.arange(12) != 5
    parts = {key: x[of] if key != "weights" else x for key, x in tensors(whole).items() if isinstance(x, torch.Tensor)}
    parts = {**whole, **parts, **({"lengths": lengths} if "lengths" in whole else {})}
    rewards = torch.tensor(REWARDS, dtype=torch.float64)[of]
    rewards[5] = torch.nan
    got = estimator(rewards, **parts, mask=kept, trajectory_ids=of - 3)
    torch.testing.assert_close(got, want[of].where(kept, 0))
    labels = [f"rollout {i}" for i in of.tolist()]
    assert torch.equal(estimator(rewards, **parts, mask=kept, trajectory_ids=labels), got)
    alone = estimator(
        rewards[kept],
        **{k: x[kept] if isinstance(x, torch.Tensor) else x for k, x in parts.items()},
        trajectory_ids=of[kept],
    )
    torch.testing.assert_close(alone, got[kept])


def test_none_is_a_sample_that_does_not_count(backend):
    want = advantages.rloo(torch.tensor([1.0, 0.0, 0.0, 2.0]), group_size=4, mask=torch.tensor([1, 1, 0, 1]))
    assert torch.equal(advantages.rloo([1, 0, None, 2.0], group_size=4), want)
    assert torch.equal(advantages.rloo([[1, 0, None, 2.0]])[0], want)
    assert torch.equal(advantages.rloo(np.array([1, 0, None, 2.0], dtype=object), group_size=4), want)
    both = advantages.rloo([1, 0, None, 2.0], group_size=4, mask=[1, 0, 1, 1])
    assert both.tolist() == [-1.0, 0.0, 0.0, 1.0]
    assert advantages.maxpo([1, None, 2], k=2, group_size=3, small_groups="zero").tolist() == [0.0] * 3


def test_integers_are_the_labels_of_baselines():
    """Labels of another kind are numbered as they appear, which is the order of the prompts."""
    got = [advantages.remax([1.0, 2.0, 3.0], baselines=[0.5, 1.0], group_ids=ids) for ids in ([1, 0, 1], list("bab"))]
    assert got[0].tolist() == [0.0, 1.5, 2.0]
    assert got[1].tolist() == [0.5, 1.0, 2.5]
    assert advantages.remax([[1.0, 2.0], [3.0, 4.0]], baselines=[0.5, 1.0]).tolist() == [[0.5, 1.5], [2.0, 3.0]]


def test_the_standard_deviation_of_the_batch_with_the_mean_of_the_group(backend):
    rewards = torch.tensor([1.0, 1.0 + 1e-4, 5.0, 9.0, 7.0, 2.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 0])
    got = advantages.grpo(rewards, group_ids=[0, 0, 1, 1, 2, 2], std="batch", mask=mask)
    kept = rewards[:5].double()
    centred = torch.tensor([-5e-5, 5e-5, -2.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(got.double(), centred / (kept.std() + 1e-6), rtol=1e-3, atol=1e-9)
    assert got.dtype == torch.float32
    assert advantages.grpo([3.0, 3.0], group_size=2, std="batch").tolist() == [0.0, 0.0]
    assert advantages.grpo([3.0], group_size=1, std="batch").tolist() == [0.0]
    assert torch.equal(advantages.grpo(rewards, group_size=2, std="group"), advantages.grpo(rewards, group_size=2))
    with pytest.raises(ValueError, match="std must be one of"):
        advantages.grpo(rewards, group_size=2, std="prompt")


@pytest.mark.parametrize(
    ("rewards", "options", "error", "message"),
    [
        ("1234", {"group_size": 2}, TypeError, "rewards must be a torch.Tensor, an array or a list of numbers"),
        (["a", "b"], {"group_size": 2}, TypeError, "rewards must be a torch.Tensor, an array or a list of numbers"),
        ([[1.0], [1.0, 2.0]], {}, TypeError, "rewards must be a torch.Tensor, an array or a list of numbers"),
        (REWARDS, {"group_ids": "ab"}, TypeError, "group_ids must be a torch.Tensor, an array or a list of labels"),
        (REWARDS, {"group_ids": [[1]] * 8}, TypeError, "group_ids must hold one label per sample"),
        (REWARDS, {"group_ids": ["a"]}, ValueError, r"group_ids must have shape \[8\]"),
        ([REWARDS], {"group_ids": [0] * 8}, ValueError, "have a group per row: group_ids must be None"),
        ([REWARDS], {"group_size": 4}, ValueError, "have a group per row.*or 8, got 4"),
        ([REWARDS], {"mask": [1] * 8}, ValueError, r"mask must have shape \[1, 8\]"),
        ([[REWARDS]], {}, ValueError, r"rewards must have shape \[G\], one per sample, or \[prompts, samples\]"),
        (REWARDS, {"group_size": 4, "trajectory_ids": [0] * 7}, ValueError, r"trajectory_ids must have shape \[8\]"),
        (REWARDS, {"group_size": 4, "trajectory_ids": torch.ones(8)}, TypeError, "trajectory_ids must have dtype"),
        (
            REWARDS,
            {"group_size": 4, "trajectory_ids": [0, 0, 1, 2, 3, 4, 5, 6]},
            ValueError,
            "one reward .*samples 0 and 1 of trajectory 0",
        ),
        ([1.0, 1.0], {"group_ids": ["a", "b"], "trajectory_ids": [0, 0]}, ValueError, "one reward and one group"),
    ],
)
def test_errors(rewards, options, error, message):
    with pytest.raises(error, match=message):
        advantages.rloo(rewards, **options)


# ----------------------------------------------------------------------------------------------- rewards and penalties

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("packed", [False, True])
def test_an_outcome_stands_at_the_last_kept_token(packed):
    outcomes = [2.0, 3.0, None]
    mask, cu = (MASK.view(-1), torch.tensor([0, 5, 10, 15])) if packed else (MASK, None)
    got = advantages.token_rewards(outcomes, mask, cu_seqlens=cu).reshape(3, 5)
    want = torch.zeros(3, 5)
    want[0, 3] = 2.0
    assert torch.equal(got, want)
    to_go = advantages.reward_to_go(got, mask=MASK)
    assert to_go[0].tolist() == [2.0, 2.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_kl_penalty_is_put_on_its_token_or_on_the_last_one(kind):
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = (-torch.rand(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    outcomes = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    d = logprobs - ref
    kl = {"k1": d, "k2": d.square() / 2, "k3": torch.exp(-d) - 1 + d}[kind] * MASK
    logprobs[MASK == 0] = torch.nan
    given = {"logprobs": logprobs, "ref_logprobs": ref, "kl_coef": 0.1, "kl_kind": kind}
    outcome = advantages.token_rewards(outcomes, MASK)
    torch.testing.assert_close(advantages.token_rewards(outcomes, MASK, **given), outcome - 0.1 * kl)
    last = advantages.token_rewards(outcomes, MASK, kl_at="last", **given)
    assert torch.equal(last != 0, outcome != 0)
    torch.testing.assert_close(last.sum(1), outcome.sum(1) - 0.1 * kl.sum(1))
    with pytest.raises(ValueError, match="ref_logprobs is needed by kl_coef=0.1"):
        advantages.token_rewards(outcomes, MASK, logprobs=ref, kl_coef=0.1)


def test_the_soft_overlong_punishment():
    got = advantages.overlong_penalty([0, 16384, 18432, 20480, 30000], max_length=20480, buffer=4096)
    assert got.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert advantages.overlong_penalty(torch.tensor([9]), max_length=10, buffer=2, factor=0.5).tolist() == [-0.25]
    with pytest.raises(ValueError, match="max_length must be >= 4"):
        advantages.overlong_penalty([1], max_length=3, buffer=4)


# ---------------------------------------------------------------------------------------------- prompts and selections


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [{"group_ids": ["p", "q", "p", "r"]}, {"group_size": 2}])
def test_the_mean_of_a_prompt_then_of_the_prompts(packed, groups):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 6, generator=generator) > 0.4
    mask[3] = False
    ids = groups.get("group_ids", [0, 0, 1, 1])
    means = []
    for prompt in dict.fromkeys(ids):
        rows = [i for i, x in enumerate(ids) if x == prompt]
        if mask[rows].any():
            means.append(tokens[rows][mask[rows]].mean())
    want = torch.stack(means).mean()
    (expected,) = torch.autograd.grad(want, tokens)
    x, m, cu = (tokens.reshape(-1), mask.reshape(-1), torch.arange(5) * 6) if packed else (tokens, mask, None)
    got = fusedpo.aggregate(x.where(m, torch.nan), "prompt-mean", mask=m, cu_seqlens=cu, **groups)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, tokens)[0], expected)
    half = fusedpo.aggregate(x, "prompt-mean", mask=m, cu_seqlens=cu, denominator=2 * len(means), **groups)
    torch.testing.assert_close(half, want / 2)


def test_prompt_weights_give_the_prompt_mean_in_one_pass():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 11, generator=generator, requires_grad=True)
    ids, mask = torch.randint(0, 11, (4, 6), generator=generator), torch.rand(4, 6, generator=generator) > 0.4
    old, a = -2 * torch.rand(4, 6, generator=generator), torch.randn(4, generator=generator)
    weights = fusedpo.prompt_weights(mask, group_size=2)
    objective = fusedpo.objectives.ppo(aggregation="token-sum")
    loss = {"objective": objective, "mask": mask}
    got = fusedpo.policy_loss_from_logits(logits, ids, old, a, is_weights=weights, **loss).loss
    each = fusedpo.policy_loss(fusedpo.token_logprobs(logits, ids), old, a, reduction="none", **loss).loss
    want = fusedpo.aggregate(each, "prompt-mean", mask=mask, group_size=2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (got, want)))
    nothing = fusedpo.prompt_weights(torch.zeros(4, 6), group_size=2)
    assert nothing.tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="exactly one of group_size and group_ids"):
        fusedpo.prompt_weights(mask)
    with pytest.raises(ValueError, match="group_size and group_ids have no meaning with aggregation='token-mean'"):
        fusedpo.aggregate(each, mask=mask, group_size=2)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_the_tokens_of_highest_entropy(fraction):
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(6, 9, generator=generator)
    mask = torch.rand(6, 9, generator=generator) > 0.3
    entropy[~mask] = torch.nan
    got = fusedpo.top_entropy_mask(entropy, mask, fraction=fraction)
    quantile = torch.quantile(entropy[mask].double(), 1 - fraction)
    assert torch.equal(got, mask & (entropy.double() >= quantile))
    assert got.sum() > 0
    if fraction == 1.0:
        assert torch.equal(got, mask)


def test_the_tokens_of_highest_entropy_at_the_edges():
    assert not fusedpo.top_entropy_mask(torch.rand(2, 3), torch.zeros(2, 3)).any()
    assert fusedpo.top_entropy_mask(torch.rand(0)).shape == (0,)
    assert fusedpo.top_entropy_mask(torch.full((7,), 1 / 3), fraction=0.3).all()  # a tie
    with_nan = torch.tensor([torch.nan, torch.nan, 1.0, 2.0])
    assert fusedpo.top_entropy_mask(with_nan, fraction=0.5).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        fusedpo.top_entropy_mask(with_nan, fraction=0)
