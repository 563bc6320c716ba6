"""Group estimators against a Python loop over groups, and what all share: layouts, masks, dtypes, errors, names."""

import math
import statistics
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedpo
from fusedpo import advantages, backends
from fusedpo.advantages import registry

pytestmark = pytest.mark.usefixtures("implementation")
NAN = math.nan


def loop(oracle, rewards, ids, kept=None):
    """``oracle(list of rewards, indices) -> list`` for each group in turn; 0 for samples left out."""
    result = torch.zeros(len(rewards), dtype=torch.float64)
    kept = torch.ones(len(rewards), dtype=torch.bool) if kept is None else kept
    for label in set(ids.tolist()):
        index = [i for i in range(len(rewards)) if ids[i] == label and kept[i]]
        if index:
            result[index] = torch.tensor(oracle([rewards[i].item() for i in index], index), dtype=torch.float64)
    return result


def grpo_oracle(r, _):
    std = statistics.stdev(r) if len(r) > 1 else 0.0
    return [(x - statistics.fmean(r)) / (std + 1e-6) for x in r]


def dr_grpo_oracle(r, _):
    return [x - statistics.fmean(r) for x in r]


def rloo_oracle(r, _):
    return [r[i] - statistics.fmean(r[:i] + r[i + 1 :]) if len(r) > 1 else 0.0 for i in range(len(r))]


def reinforce_rej_oracle(r, _):
    return r if len(r) == 1 or max(r) > min(r) else [0.0] * len(r)


def opo_oracle(r, index):
    lengths = [LENGTHS[i].item() for i in index]
    baseline = sum(w * x for w, x in zip(lengths, r, strict=True)) / sum(lengths)
    return [x - baseline for x in r]


GROUPS = torch.tensor([-7, 40, 3, 3, 40, 40, 5, 3, -7, 40, 3, 3])  # sizes 2, 4, 5 and 1
KEPT = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
REWARDS = torch.tensor([0.3, 1.5, -2.0, 0.25, 0.3, 0.3, 9.0, 4.0, 0.3, 0.0, 0.25, 1.0], dtype=torch.float64)
LENGTHS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 0, 3, 0, 8])

ESTIMATORS = {
    "grpo": (advantages.grpo, grpo_oracle),
    "grpo-no-std": (partial(advantages.grpo, std=False), dr_grpo_oracle),
    "dr_grpo": (advantages.dr_grpo, dr_grpo_oracle),
    "rloo": (advantages.rloo, rloo_oracle),
    "opo": (partial(advantages.opo, lengths=LENGTHS), opo_oracle),
    "reinforce_rej": (advantages.reinforce_rej, reinforce_rej_oracle),
}
CENTRED = {
    "grpo": advantages.grpo,
    "dr_grpo": advantages.dr_grpo,
    "rloo": advantages.rloo,
    "gpg": advantages.gpg,
    "maxpo": partial(advantages.maxpo, k=2),
    "order_statistic": partial(advantages.order_statistic, k=2, weights=[0.7, -0.2]),
}
EQUAL_REWARDS_GIVE_ZERO = CENTRED | {
    "opo": lambda r, **groups: advantages.opo(r, lengths=torch.arange(1, len(r) + 1), **groups),
    "sloo-1": partial(advantages.pkpo, k=2, variant="sloo-1"),
    "grpo_passk": advantages.grpo_passk,
    "reinforce_rej": advantages.reinforce_rej,
}
BATCH_WIDE = ("gpg", "reinforce_plus_plus_baseline")
GROUPED = EQUAL_REWARDS_GIVE_ZERO | {
    "sloo": partial(advantages.pkpo, k=2, variant="sloo"),
    "reinforce_plus_plus_baseline": lambda r, **groups: advantages.reinforce_plus_plus_baseline(
        r, lengths=torch.ones_like(r, dtype=torch.int64), **groups
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_against_a_loop_over_groups(name):
    estimator, oracle = ESTIMATORS[name]
    equal = estimator(REWARDS, group_size=4)
    torch.testing.assert_close(equal, loop(oracle, REWARDS, torch.arange(12) // 4), rtol=1e-13, atol=1e-14)
    ragged = estimator(REWARDS, group_ids=GROUPS)
    torch.testing.assert_close(ragged, loop(oracle, REWARDS, GROUPS), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_samples_left_out(name, mask_dtype):
    estimator, oracle = ESTIMATORS[name]
    rewards, mask = REWARDS.where(KEPT, NAN), KEPT.to(mask_dtype)
    ragged = estimator(rewards, group_ids=GROUPS, mask=mask)
    torch.testing.assert_close(ragged, loop(oracle, rewards, GROUPS, KEPT), rtol=1e-13, atol=1e-14)
    assert (ragged[~KEPT] == 0).all()
    equal = estimator(rewards, group_size=6, mask=mask)
    torch.testing.assert_close(equal, loop(oracle, rewards, torch.arange(12) // 6, KEPT), rtol=1e-13, atol=1e-14)
    nobody = estimator(torch.full_like(REWARDS, NAN), group_size=6, mask=torch.zeros(12))
    assert (nobody == 0).all()


@pytest.mark.parametrize("name", EQUAL_REWARDS_GIVE_ZERO)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e30, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(name, value, dtype):
    for size in (3, 7, 64, 1000):
        result = EQUAL_REWARDS_GIVE_ZERO[name](torch.full((2 * size,), value, dtype=dtype), group_size=size)
        assert (result == 0).all()


@pytest.mark.parametrize("name", CENTRED)
@settings(max_examples=20)
@given(rewards=st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=40))
def test_advantages_of_a_group_sum_to_zero(name, rewards):
    result = CENTRED[name](torch.tensor(rewards, dtype=torch.float64), group_size=len(rewards))
    assert abs(result.sum()) <= 1e-15 * len(rewards) * result.abs().sum()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "maxpo", "order_statistic", "sloo-1", "grpo_passk"])
@settings(max_examples=20)
@given(rewards=st.lists(st.integers(-9, 9), min_size=3, max_size=40), shift=st.integers(-99, 99))
def test_a_constant_added_to_all_rewards_changes_no_bit(name, rewards, shift):
    rewards = torch.tensor(rewards)  # integers are shifted without rounding
    expected = GROUPED[name](rewards, group_size=len(rewards))
    assert torch.equal(GROUPED[name](rewards + shift, group_size=len(rewards)), expected)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "opo", "gpg"])
def test_a_group_of_one_has_advantage_zero(name):
    estimator = GROUPED[name]
    assert (estimator(torch.tensor([2.5, -1.0]), group_size=1) == 0).all()
    result = estimator(torch.tensor([1.0, 7.0, 0.0]), group_ids=torch.tensor([4, 1, 4]))
    assert result[1] == 0
    assert result[0] > 0 > result[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1.0, 1e4])
def test_nearly_equal_rewards_do_not_explode(dtype, value):
    n = 512
    rewards = torch.full((n,), value, dtype=dtype)
    rewards[7] = torch.nextafter(rewards[7], torch.tensor(math.inf, dtype=dtype))
    ulp = (rewards[7] - rewards[0]).item()
    expected = torch.full((n,), -ulp / (n - 1), dtype=dtype)
    expected[7] = ulp
    # Up to rounding: the difference survives, and nothing else appears.
    torch.testing.assert_close(advantages.rloo(rewards, group_size=n), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(advantages.maxpo(rewards, k=1, group_size=n), expected, rtol=1e-6, atol=0)
    # |r - mean| / std is at most (n - 1) / sqrt(n), whatever the rewards.
    assert advantages.grpo(rewards, group_size=n).abs().max() <= (n - 1) / math.sqrt(n)


@pytest.mark.parametrize("name", [name for name in GROUPED if name not in BATCH_WIDE])
def test_groups_do_not_touch_each_other(name):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (40,), generator=generator)
    rewards = torch.randn(40, generator=generator)
    alone = ids == 1
    size = int(alone.sum())
    if name == "opo":
        estimator = advantages.opo
        lengths = torch.arange(40)
        together = estimator(rewards.where(alone, NAN), lengths=lengths, group_ids=ids)
        apart = estimator(rewards[alone], lengths=lengths[alone], group_size=size)
    else:
        together = GROUPED[name](rewards.where(alone, math.inf), group_ids=ids)
        apart = GROUPED[name](rewards[alone], group_size=size)
    assert torch.equal(together[alone], apart)


# The lengths of opo belong to samples; whitening sums over the batch in its order.
@pytest.mark.parametrize("name", [n for n in GROUPED if n not in ("opo", "reinforce_plus_plus_baseline")])
@settings(max_examples=20)
@given(data=st.data())
def test_order_of_samples_changes_no_bit(name, data):
    sizes = data.draw(st.lists(st.integers(3, 9), min_size=1, max_size=4))
    ids = torch.repeat_interleave(torch.tensor(sizes))
    rewards = torch.tensor(data.draw(st.lists(st.floats(-9, 9, width=32), min_size=len(ids), max_size=len(ids))))
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))))
    expected = GROUPED[name](rewards, group_ids=ids)
    assert torch.equal(GROUPED[name](rewards[order], group_ids=ids[order]), expected[order])


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16])
def test_results_are_float32_except_for_float64(name, dtype):
    rewards = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0])
    result = GROUPED[name](rewards.to(dtype), group_size=4)
    assert result.dtype == torch.float32
    precise = GROUPED[name](rewards.double(), group_size=4)
    assert precise.dtype == torch.float64
    assert torch.equal(result, precise.float())


@pytest.mark.parametrize("name", GROUPED)
def test_results_carry_no_gradient_and_arguments_stay_as_they_are(name):
    rewards = torch.tensor([1.0, 0.0, 2.0, 5.0], requires_grad=True)
    before = rewards.detach().clone()
    assert not GROUPED[name](rewards, group_size=4).requires_grad
    assert torch.equal(rewards, before)


@pytest.mark.parametrize("name", GROUPED)
def test_no_samples(name):
    empty = torch.empty(0)
    assert GROUPED[name](empty, group_size=4).shape == (0,)
    assert GROUPED[name](empty, group_ids=torch.empty(0, dtype=torch.int64)).shape == (0,)


# --------------------------------------------------------------------------------------------------------------- opo


def test_opo_over_the_batch():
    expected = REWARDS - (LENGTHS * REWARDS).sum() / LENGTHS.sum()
    torch.testing.assert_close(advantages.opo(REWARDS, lengths=LENGTHS, scope="batch"), expected)
    kept = advantages.opo(REWARDS.where(KEPT, NAN), lengths=LENGTHS, scope="batch", mask=KEPT)
    expected = REWARDS - (LENGTHS * REWARDS)[KEPT].sum() / LENGTHS[KEPT].sum()
    torch.testing.assert_close(kept, expected.where(KEPT, 0))
    assert advantages.opo(torch.empty(0), lengths=torch.empty(0), scope="batch").shape == (0,)


def test_opo_sample_without_tokens_has_no_weight():
    result = advantages.opo(torch.tensor([8.0, 1.0, 3.0]), lengths=torch.tensor([0.0, 1.0, 3.0]), group_size=3)
    torch.testing.assert_close(result, torch.tensor([8.0, 1.0, 3.0]) - 2.5)
    result = advantages.opo(torch.tensor([math.inf, 1.0, 3.0]), lengths=torch.tensor([0, 1, 3]), group_size=3)
    assert result.tolist() == [math.inf, -1.5, 0.5]


def test_opo_group_without_tokens_has_advantage_zero():
    result = advantages.opo(torch.tensor([8.0, 1.0, 2.0, 4.0]), lengths=torch.tensor([0, 0, 1, 1]), group_size=2)
    assert result.tolist() == [0, 0, -1, 1]


# ------------------------------------------------------------------------------- raft, remax, gpg, reinforce++-baseline


@pytest.mark.parametrize("mask", [None, KEPT, KEPT.float()])
def test_raft(mask):
    rewards = REWARDS if mask is None else REWARDS.where(KEPT, NAN)
    expected = [max(r, 0.0) if mask is None or m else 0.0 for r, m in zip(REWARDS.tolist(), KEPT, strict=True)]
    assert advantages.raft(rewards, mask=mask).tolist() == expected


def test_reinforce_rej_drops_groups_of_equal_rewards_and_keeps_single_samples():
    rewards = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0, 1.0])
    result = advantages.reinforce_rej(rewards, group_ids=torch.tensor([0, 0, 7, 2, 2, 0]))
    assert result.tolist() == [0, 0, 0.5, 0, 1, 0]
    # With what is left out, a group may become one of equal rewards.
    masked = advantages.reinforce_rej(rewards, group_size=3, mask=torch.tensor([1, 1, 0, 1, 1, 1]))
    assert masked.tolist() == [0, 0, 0, 0, 1, 1]


def test_remax():
    greedy = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    per_sample = greedy.repeat_interleave(4)
    expected = REWARDS - per_sample
    assert torch.equal(advantages.remax(REWARDS, baselines=per_sample), expected)
    assert torch.equal(advantages.remax(REWARDS, baselines=greedy, group_size=4), expected)
    ids = torch.tensor([2, 0, 0, 1, 1, 2, 2, 2, 0, 1, 1, 1])
    assert torch.equal(advantages.remax(REWARDS, baselines=greedy, group_ids=ids), REWARDS - greedy[ids])
    result = advantages.remax(
        REWARDS.where(KEPT, NAN), baselines=greedy, group_ids=ids.where(KEPT, 99), mask=KEPT.long()
    )
    assert torch.equal(result, (REWARDS - greedy[ids]).where(KEPT, 0))
    assert advantages.remax(torch.tensor([True]), baselines=torch.tensor([0.25])).tolist() == [0.75]


@pytest.mark.parametrize("f_norm", [1.0, 2.5])
def test_gpg(f_norm):
    not_zero = (REWARDS != 0).sum()
    expected = 12 / not_zero * loop(dr_grpo_oracle, REWARDS, GROUPS) / f_norm
    torch.testing.assert_close(advantages.gpg(REWARDS, f_norm=f_norm, group_ids=GROUPS), expected)
    result = advantages.gpg(REWARDS.where(KEPT, NAN), f_norm=f_norm, group_ids=GROUPS, mask=KEPT)
    alpha = KEPT.sum() / (KEPT & (REWARDS != 0)).sum()
    torch.testing.assert_close(result, alpha * loop(dr_grpo_oracle, REWARDS, GROUPS, KEPT) / f_norm)
    assert advantages.gpg(torch.zeros(4), group_size=2).tolist() == [0] * 4  # no reward other than 0: alpha is finite


@pytest.mark.parametrize("mask", [None, KEPT])
def test_reinforce_plus_plus_baseline_whitens_over_tokens(mask):
    rewards = REWARDS if mask is None else REWARDS.where(KEPT, NAN)
    result = advantages.reinforce_plus_plus_baseline(rewards, lengths=LENGTHS, group_ids=GROUPS, mask=mask)
    centred = loop(dr_grpo_oracle, rewards, GROUPS, mask)
    counted = torch.arange(9) < LENGTHS[:, None]
    if mask is not None:
        counted &= mask[:, None]
    tokens = advantages.whiten(centred[:, None].expand(12, 9), mask=counted)
    torch.testing.assert_close(result[:, None].expand(12, 9).where(counted, 0), tokens, rtol=1e-13, atol=1e-14)
    assert (result[~counted.any(1)] == 0).all()
    by_tokens = advantages.to_tokens(advantages.dr_grpo(rewards, group_ids=GROUPS, mask=mask), counted)
    torch.testing.assert_close(advantages.whiten(by_tokens, mask=counted), tokens, rtol=1e-13, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------ errors

R4, IDS4 = torch.arange(4.0), torch.tensor([0, 0, 1, 1])
OVERLAPPING = torch.tensor([0, 3, 2, 4])
STEPS = {"step_rewards": torch.ones(2, 1), "step_ids": IDS4.view(2, 2)}


@pytest.mark.parametrize(
    ("name", "rewards", "kwargs", "error", "match"),
    [
        ("rloo", 1.0, {"group_size": 2}, TypeError, "rewards must be a torch.Tensor"),
        ("rloo", R4.to(torch.complex64), {"group_size": 2}, TypeError, "rewards .*complex64"),
        ("rloo", R4.view(2, 2, 1), {"group_size": 2}, ValueError, r"rewards .*\[G\].*\[2, 2, 1\]"),
        ("rloo", R4, {}, ValueError, "group_size and group_ids .*neither"),
        ("rloo", R4, {"group_size": 2, "group_ids": IDS4}, ValueError, "group_size and group_ids .*both"),
        ("rloo", R4, {"group_size": 3}, ValueError, "group_size must divide .*3 for 4"),
        ("rloo", R4, {"group_size": 0}, ValueError, "group_size must be >= 1, got 0"),
        ("rloo", R4, {"group_size": 2.0}, TypeError, "group_size must be an int, got float"),
        ("rloo", R4, {"group_size": True}, TypeError, "group_size must be an int, got bool"),
        ("rloo", R4, {"group_ids": 2}, TypeError, "group_ids must be a torch.Tensor"),
        ("rloo", R4, {"group_ids": IDS4.float()}, TypeError, "group_ids .*float32"),
        ("rloo", R4, {"group_ids": IDS4[:3]}, ValueError, r"group_ids .*\[4\].*\[3\]"),
        ("rloo", R4, {"group_ids": IDS4.to("meta")}, ValueError, "group_ids .*device"),
        ("rloo", R4, {"group_size": 2, "mask": torch.ones(2)}, ValueError, r"mask .*\[4\].*\[2\]"),
        ("rloo", R4, {"group_size": 2, "mask": 1}, TypeError, "mask must be a torch.Tensor"),
        ("grpo", R4, {"group_size": 2, "eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
        ("grpo", R4, {"group_size": 2, "eps": "1"}, TypeError, "eps must be a float, got str"),
        ("gpg", R4, {"group_size": 2, "f_norm": NAN}, ValueError, "f_norm must be > 0, got nan"),
        ("raft", R4.view(2, 2, 1), {}, ValueError, r"rewards .*\[G\].*\[2, 2, 1\]"),
        ("raft", R4, {"mask": torch.ones(2)}, ValueError, r"mask .*\[4\].*\[2\]"),
        ("remax", R4, {"baselines": 0.5}, TypeError, "baselines must be a torch.Tensor"),
        ("remax", R4, {"baselines": R4[:2]}, ValueError, r"baselines .*\[4\].*without group_size.*\[2\]"),
        ("remax", R4, {"baselines": R4, "group_size": 2}, ValueError, r"baselines .*\[2\].*group.*\[4\]"),
        ("remax", R4, {"baselines": R4.view(2, 2), "group_ids": IDS4}, ValueError, r"baselines .*\[P\].*\[2, 2\]"),
        ("remax", R4, {"baselines": R4[:1], "group_ids": IDS4}, ValueError, "group_ids must be 0 to 0, .*got 1"),
        ("remax", R4, {"baselines": R4.to("meta")}, ValueError, "baselines .*device"),
        (
            "reinforce_plus_plus_baseline",
            R4,
            {"group_size": 2, "lengths": IDS4 - 1},
            ValueError,
            "lengths must be >= 0",
        ),
        ("opo", R4, {"group_size": 2, "lengths": "abcd"}, TypeError, "lengths must be a torch.Tensor"),
        ("opo", R4, {"group_size": 2, "lengths": torch.ones(3)}, ValueError, r"lengths .*\[4\].*\[3\]"),
        ("opo", R4, {"group_size": 2, "lengths": IDS4 - 1}, ValueError, "lengths must be >= 0, got -1"),
        ("opo", R4, {"group_size": 2, "lengths": R4.to("meta")}, ValueError, "lengths .*device"),
        ("opo", R4, {"group_size": 2, "lengths": R4, "scope": "prompt"}, ValueError, "scope .*'group'.*'prompt'"),
        ("opo", R4, {"group_size": 2, "lengths": R4, "scope": "batch"}, ValueError, "scope='batch' .*group_size"),
        ("passk", R4, {"group_size": 2, "k": 0}, ValueError, "k must be >= 1, got 0"),
        ("reinforce_plus_plus", R4, {"cu_seqlens": OVERLAPPING}, ValueError, r"cu_seqlens must not decrease.*3, 2"),
        (
            "gae",
            R4,
            {"values": R4, "gamma": 1.0, "lam": 1.0, "cu_seqlens": OVERLAPPING},
            ValueError,
            r"cu_seqlens must not decrease.*3, 2",
        ),
        (
            "vineppo",
            R4.view(2, 2),
            STEPS | {"step_rewards": STEPS["step_rewards"].to("meta")},
            ValueError,
            "step_rewards .*device of values",
        ),
        (
            "vineppo",
            R4.view(2, 2),
            STEPS | {"step_ids": STEPS["step_ids"].to("meta")},
            ValueError,
            "step_ids .*device of values",
        ),
    ],
)
def test_errors_name_the_argument(name, rewards, kwargs, error, match):
    with pytest.raises(error, match=match):
        advantages.compute(name, rewards, **kwargs)


def test_negative_length_of_a_sample_left_out_is_fine():
    mask = torch.tensor([0, 1, 1, 1])
    assert advantages.opo(R4, lengths=torch.tensor([-1, 1, 1, 1]), group_size=2, mask=mask).isfinite().all()


# ----------------------------------------------------------------------------------------------------------- by name


def test_available_names():
    assert advantages.available() == (
        "dr_grpo",
        "gae",
        "gpg",
        "grpo",
        "grpo_passk",
        "maxpo",
        "opo",
        "optimal_token_baseline",
        "order_statistic",
        "passk",
        "pkpo",
        "raft",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "reinforce_rej",
        "remax",
        "reward_to_go",
        "rloo",
        "vineppo",
        "vtrace",
    )
    for name in advantages.available():
        assert getattr(advantages, name).__name__ == name


def test_compute_calls_the_estimator_by_name():
    by_name = advantages.compute("maxpo", REWARDS, group_size=6, k=4)
    assert torch.equal(by_name, advantages.maxpo(REWARDS, group_size=6, k=4))
    values = torch.zeros(3)
    by_name = advantages.compute("gae", torch.ones(3), values=values, gamma=1.0, lam=1.0)
    assert by_name.returns.tolist() == [3, 2, 1]
    with pytest.raises(ValueError, match=r"name must be one of .*grpo.*'nope'"):
        advantages.compute("nope", REWARDS)


def test_register(monkeypatch):
    monkeypatch.setattr(registry, "_ESTIMATORS", dict(registry._ESTIMATORS))

    @advantages.register("doubled")
    def doubled(rewards, *, by=2):
        return rewards * by

    assert "doubled" in advantages.available()
    assert advantages.compute("doubled", R4, by=3).tolist() == [0, 3, 6, 9]
    assert advantages.register("doubled")(doubled) is doubled  # once more is fine
    with pytest.raises(ValueError, match="name 'doubled' is taken"):
        advantages.register("doubled")(lambda rewards: rewards)
    with pytest.raises(ValueError, match="name 'maxpo' is taken"):
        advantages.register("maxpo")(doubled)
    with pytest.raises(TypeError, match="name must be a str"):
        advantages.register(doubled)


# ------------------------------------------------------------------------------------------------- compiler and GPU


def every_estimator(rewards, ids, mask, lengths, cu_seqlens, step_ids):
    groups = {"group_ids": ids, "mask": mask}
    yield advantages.grpo(rewards, **groups)
    yield advantages.opo(rewards, lengths=lengths, **groups)
    yield advantages.gpg(rewards, **groups)
    yield advantages.raft(rewards, mask=mask)
    yield advantages.reinforce_rej(rewards, **groups)
    yield advantages.remax(rewards, baselines=rewards[:3], **groups)
    yield advantages.reinforce_plus_plus_baseline(rewards, lengths=lengths, **groups)
    yield advantages.maxpo(rewards, k=2, **groups)
    yield advantages.order_statistic(rewards, k=2, weights=[0.25, 0.75], **groups)
    yield advantages.grpo_passk(rewards, **groups)
    yield advantages.pkpo(rewards, k=2, variant="sloo", **groups)
    yield advantages.passk((rewards > 0).where(mask, False), k=2, **groups)
    yield advantages.max_at_k(rewards, k=2, **groups)
    tokens = {"mask": mask, "cu_seqlens": cu_seqlens, "gamma": 0.9}
    kept = rewards.where(mask, 0.0)
    yield from advantages.gae(kept, rewards, lam=0.9, bootstrap=rewards[:3], **tokens)
    yield from advantages.vtrace(kept, rewards, logprobs=rewards, old_logprobs=rewards.flip(0), **tokens)
    yield advantages.reward_to_go(kept, bootstrap=rewards[:3], **tokens)
    yield advantages.reinforce_plus_plus(kept, **tokens)
    yield advantages.to_tokens(rewards[:3], mask, cu_seqlens=cu_seqlens)
    rows = kept.view(3, 4)
    yield advantages.optimal_token_baseline(
        rows, old_logprobs=rows, sum_pi_squared=rows, mask=mask.view(3, 4), group_ids=ids[:3] * 0
    )
    yield advantages.vineppo(rewards.view(2, 6), step_rewards=rewards.view(2, 6)[:, 1:], step_ids=step_ids, whiten=True)


def arguments(device):
    ids = torch.arange(12) % 3
    mask = torch.ones(12, dtype=torch.bool)
    mask[4] = False
    step_ids = torch.tensor([[0, 0, 1, 4, -1], [2, 2, 3, -1, -1]])
    cu_seqlens = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    return [x.to(device) for x in (REWARDS.float(), ids, mask, LENGTHS, cu_seqlens, step_ids)]


def test_compiles_without_a_graph_break():
    compiled = torch.compile(lambda *args: list(every_estimator(*args)), fullgraph=True, backend="eager")
    expected = list(every_estimator(*arguments("cpu")))
    for result, reference in zip(compiled(*arguments("cpu")), expected, strict=True):
        assert torch.equal(result, reference)


def test_a_forced_backend_that_is_missing_raises(monkeypatch):
    monkeypatch.setitem(backends.IMPLEMENTATIONS, "group_advantages", {})
    with fusedpo.backend("triton"), pytest.raises(fusedpo.BackendUnavailable, match="advantages has no triton kernel"):
        advantages.maxpo(R4, k=1, group_size=4)
    with fusedpo.backend("reference"):
        assert advantages.maxpo(R4, k=3, group_size=4).argmax() == 3


@pytest.mark.gpu
def test_no_host_sync():
    expected = list(every_estimator(*arguments("cpu")))
    on_device = arguments("cuda")
    list(every_estimator(*on_device))  # allocations and kernel loading may sync the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = list(every_estimator(*on_device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, reference in zip(results, expected, strict=True):
        # float64 inside: at most the rounding to float32 differs.
        torch.testing.assert_close(result.cpu(), reference, rtol=1.2e-7, atol=1e-7)
