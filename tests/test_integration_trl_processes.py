"""``FusedGRPOTrainer`` in two processes, which share groups of samples: DistributedDataParallel over gloo."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

pytest.importorskip("trl", reason="trl is not installed (extra [peers])")

from support.trl_training import HIDDEN, REUSE, assert_same, builder, make_tokenizer, train
from trl import GRPOTrainer

from fusedpo import advantages

PROCESSES = 2
CONFIG = {"per_device_train_batch_size": 2, "num_generations": 4, "max_steps": 6, "ddp_backend": "gloo"}


def work(rank: int, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in {**address, **here}.items()})
    build = builder(make_tokenizer(), path)

    for loss_type in ("grpo", "bnpo", "dapo"):  # one of each normalisation
        config = {"loss_type": loss_type, "epsilon": 0.02} | CONFIG | REUSE
        expected = train(build(GRPOTrainer, **config))
        for fused in ({}, HIDDEN) if loss_type == "dapo" else ({},):  # the loss from hidden states takes what they take
            trainer = build(fused=fused, **config)
            assert trainer.accelerator.num_processes == PROCESSES
            assert_same(train(trainer), expected)

    trainer = build(fused={"advantage_estimator": ("maxpo", {"k": 2})}, **CONFIG, gradient_accumulation_steps=2)
    output = trainer._generate_and_score_completions([{"prompt": "w1"}] * 2)
    rewards = trainer._rewards_per_func[:, 0].float()
    expected = advantages.maxpo(rewards, k=2, group_size=4)
    torch.testing.assert_close(output["advantages"], expected[2 * rank : 2 * rank + 2])
    torch.distributed.barrier()  # gloo aborts a process whose peer has gone
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, tmp_path), PROCESSES)
