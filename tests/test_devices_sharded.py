"""Tensors that are spread over ranks are refused by name, before a kernel or an operator of torch sees them."""

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

import fusedpo
from fusedpo import advantages, aggregation, corrections

T, H, V = 6, 4, 8
IDS, ONES = torch.arange(T), torch.ones(T)
HIDDEN, WEIGHT = torch.ones(T, H), torch.ones(V, H)
PPO = {"old_logprobs": None, "advantages": ONES, "objective": fusedpo.objectives.ppo()}


@pytest.fixture(scope="module", params=[Shard(0), Shard(-1), Replicate()], ids=repr)
def spread(request):
    """A function that spreads a tensor over two ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = DeviceMesh("cpu", [0, 1])
    yield lambda x: distribute_tensor(x, mesh, [request.param])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("implementation", ["reference", "auto"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("token_ids", lambda spread: fusedpo.token_logprobs(torch.ones(T, V), spread(IDS))),
        ("mask", lambda spread: fusedpo.token_logprobs(torch.ones(T, V), IDS, mask=spread(ONES))),
        ("hidden", lambda spread: fusedpo.linear_token_logprobs(spread(HIDDEN), WEIGHT, IDS)),
        ("weight", lambda spread: fusedpo.linear_token_logprobs(HIDDEN, spread(WEIGHT), IDS)),
        ("bias", lambda spread: fusedpo.linear_token_logprobs(HIDDEN, WEIGHT, IDS, bias=spread(torch.ones(V)))),
        ("hidden", lambda spread: fusedpo.policy_loss_from_hidden(spread(HIDDEN), WEIGHT, IDS, **PPO)),
        ("logprobs", lambda spread: fusedpo.policy_loss(spread(-ONES), **PPO)),
        ("ref_logprobs", lambda spread: fusedpo.policy_loss(-ONES, **PPO, ref_logprobs=spread(-ONES))),
        ("rewards", lambda spread: advantages.grpo(spread(ONES), group_size=2)),
        ("rewards", lambda spread: advantages.reward_to_go(spread(torch.ones(2, T)))),
        ("old_logprobs", lambda spread: corrections.importance_weights(spread(-ONES), -ONES)),
        ("tokens", lambda spread: aggregation.aggregate(spread(ONES))),
    ],
)
def test_refused_by_name(implementation, name, call, spread):
    message = rf"^{name} must be a whole plain tensor, got a DTensor.*{name}\.to_local\(\).*LossHead"
    with fusedpo.backend(implementation), pytest.raises(TypeError, match=message):
        call(spread)


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_logits_that_hold_the_whole_vocabulary_are_refused(implementation, spread):
    """Those whose vocabulary is split are not: test_distributed_tensor.py."""
    logits = spread(torch.ones(T, V))
    if logits.placements[0].is_shard(1):
        return
    for call in (fusedpo.token_logprobs, lambda x, ids: fusedpo.policy_loss_from_logits(x, ids, **PPO)):
        with fusedpo.backend(implementation), pytest.raises(TypeError, match=r"^logits must be a plain.*to_local\(\)"):
            call(logits, IDS)
