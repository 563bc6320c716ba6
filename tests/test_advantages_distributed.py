"""Whitening over the tokens of several processes."""

from functools import partial

import pytest
import torch
from torch import distributed, multiprocessing

from fusedpo import advantages

PROCESSES = 2
# Whole batches, split between processes: the second one's share is empty, or entirely masked.
SHARES = [(3, 2), (5, 0)]


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 30, dtype=torch.float64, generator=generator) * 3 + 1
    return tokens, torch.rand(5, 30, generator=generator) < 0.6


def expected(masked_rows):
    tokens, mask = batch()
    mask[masked_rows] = False
    return advantages.whiten(tokens, mask=mask)


def work(rank, path):
    torch.set_num_threads(1)
    start = partial(distributed.init_process_group, "gloo", rank=rank, world_size=PROCESSES)
    start(init_method=f"file://{path}")
    try:
        world = distributed.group.WORLD
        for share in SHARES:
            tokens, mask = (x.split(share)[rank] for x in batch())
            whole = expected([]).split(share)[rank]
            torch.testing.assert_close(advantages.whiten(tokens, mask=mask, group=world), whole, rtol=1e-12, atol=1e-12)
            # Without a group each process is alone.
            torch.testing.assert_close(
                advantages.whiten(tokens, mask=mask), advantages.whiten(tokens, mask=mask, group=None)
            )
        tokens, mask = (x.split((3, 2))[rank] for x in batch())
        if rank == 1:
            mask = torch.zeros_like(mask)
        whole = expected([3, 4]).split((3, 2))[rank]
        torch.testing.assert_close(advantages.whiten(tokens, mask=mask, group=world), whole, rtol=1e-12, atol=1e-12)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
def test_whitening_over_two_processes_is_that_of_the_whole_batch(tmp_path):
    multiprocessing.spawn(work, args=(tmp_path / "rendezvous",), nprocs=PROCESSES)
