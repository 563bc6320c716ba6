"""The bits of every operator on fixed inputs, as digests.

``python tests/support/recorded.py native`` prints them for the kernels of one backend, and ``--write`` keeps them in
``recorded.json``, where ``tests/test_recorded_bits.py`` finds them. Bits depend on the instruction set (native) and on
NumPy's functions (Triton's interpreter), so each has an entry of its own. Write them anew in the commit that means to
change them, and say there why.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

FILE = Path(__file__).with_name("recorded.json")

# What Triton's interpreter runs.
FEW = (
    *("token_logprobs torch.bfloat16 7", "from_logits nfpo, entropy, KL, packed"),
    *("policy_loss nfpo, packed", "policy_loss gspo, padded", "policy_loss cppo, padded", "policy_loss ctpo, packed"),
    *("policy_loss nfpo, differentiated, padded", "maxpo", "order_statistic", "grpo", "gae", "vineppo", "whiten"),
)


def random(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers; the normal ones of PyTorch differ between instruction sets."""
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def integers(seed: int, end: int, *shape: int) -> Tensor:
    return torch.randint(end, shape, generator=torch.Generator().manual_seed(seed))


def digest(results: Any) -> str:
    """Of tensors in nested containers, and of their dtypes and shapes."""
    found = hashlib.sha256()
    for x in torch.utils._pytree.tree_leaves(results):
        if isinstance(x, Tensor):
            x = x.detach().contiguous()
            found.update(f"{x.dtype} {list(x.shape)}".encode())
            found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(x).encode())
    return found.hexdigest()[:16]


def key(backend: str) -> str:
    if backend == "native":
        from fusedpo import _C

        return f"native, {_C.build_info()['cpu_capability']}"
    import numpy
    import triton

    features = "AVX512" if numpy._core._multiarray_umath.__cpu_features__.get("AVX512F") else "no AVX512"
    return f"triton {triton.__version__}, interpreter, numpy {numpy.__version__}, {features}"


# ----------------------------------------------------------------------------------------------------------- the cases


def batches(scale: int) -> dict[str, dict[str, Any]]:
    """Arguments that all losses share, by layout; ``scale`` makes sequences longer."""
    T = 17 * scale
    padded = {
        "old_logprobs": random(1, 3, T, low=-3, high=-0.01),
        "advantages": random(2, 3, low=-1, high=1),
        "mask": random(3, 3, T) < 0.7,
        "ref_logprobs": random(4, 3, T, low=-3, high=-0.01),
        "is_weights": random(5, 3, T, low=0.5, high=1.5),
        "denominator": 29.0,
        "loss_scale": 0.25,
    }
    cuts = torch.tensor([0, 1, 1, T, 2 * T + 3, 3 * T])
    packed = {
        **{name: x.reshape(-1) if isinstance(x, Tensor) and x.dim() == 2 else x for name, x in padded.items()},
        "advantages": random(6, 3 * T, low=-1, high=1).where(random(7, 3 * T) < 0.8, 0.0),
        "cu_seqlens": cuts,
    }
    plain = {"old_logprobs": padded["old_logprobs"], "advantages": padded["advantages"]}
    return {"padded": padded, "packed": packed, "plain": plain}


def presets() -> dict[str, Any]:
    from fusedpo import objectives as O

    made = {
        name: getattr(O, name)()
        for name in ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "vespo", "dppo_tv")
    }
    made |= {name: getattr(O, name)() for name in ("dppo_kl", "cppo", "ctpo", "reinforce", "opo", "two_sided_grpo")}
    return made | {
        "dro": O.dro(0.1),
        "luspo": O.luspo(3e-4, 4e-4),
        "nfpo": O.nfpo(4, clip_low=0.1, clip_high=0.2),
        "nfpo, entropy, KL": O.nfpo(3, entropy_coef=0.05, kl=O.KL("k1", 0.1), aggregation="seq-mean-token-mean"),
        "nfpo, differentiated": O.nfpo(4, differentiate=True, entropy_coef=0.1),
        "nfpo, long": O.nfpo(40),
        "grpo, KL": O.grpo(kl=O.KL("k3", 0.1)),
        "ppo, weighted KL": O.ppo(kl=O.KL("k2", 0.1, clamp=1.0, weighted=True)),
        "dual": O.Objective(trust_region=O.PPOClip(0.1, 0.2, dual=1.3), aggregation="token-sum"),
        "product": O.nfpo(2, trust_region=O.PPOClip(0.1, 0.2, cap=1.5, on="product")),
        "back": O.Objective(O.Trace(2, 1), O.NoTrustRegion(), kl=O.KL("k3+", 0.1)),
    }


def fitting(objective: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Without a denominator where nothing is divided."""
    return {k: v for k, v in arguments.items() if k != "denominator" or objective.aggregation != "token-sum"}


def token_logprobs(scale: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    import fusedpo

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for V in (7, 130 * scale + 1):
            logits = random(8, 2, 5, V, low=-6, high=6).to(dtype)

            def run(logits: Tensor = logits, V: int = V, **options: Any) -> Any:
                leaf = logits.clone().requires_grad_()
                shape = (2, 5, 3) if options.pop("several", False) else (2, 5)
                logp, entropy = fusedpo.token_logprobs(
                    leaf, integers(9, V, *shape), return_entropy=True, temperature=0.7, **options
                )
                up = random(10, *logp.shape, low=-1), random(11, *entropy.shape, low=-1)
                ((logp * up[0]).sum() + (entropy * up[1]).sum()).backward()
                return logp, entropy, leaf.grad

            yield f"token_logprobs {dtype} {V}", run
            yield f"token_logprobs {dtype} {V}, several ids", lambda run=run: run(several=True)
            yield f"token_logprobs {dtype} {V}, mask", lambda run=run: run(mask=integers(12, 2, 2, 5))


def losses(scale: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    import fusedpo

    for layout, arguments in batches(scale).items():
        for name, objective in presets().items():
            if layout == "plain" and objective.kl is not None:
                continue
            given = fitting(objective, arguments)
            shape = given["old_logprobs"].shape

            def layer_2(reduction: str, objective: Any = objective, given: dict = given, shape: Any = shape) -> Any:
                leaf = random(13, *shape, low=-3, high=-0.01).requires_grad_()
                entropy = random(14, *shape).requires_grad_()
                if reduction == "none":
                    given = {k: v for k, v in given.items() if k != "denominator"}
                out = fusedpo.policy_loss(leaf, objective=objective, entropy=entropy, reduction=reduction, **given)
                out.loss.backward(random(15, *out.loss.shape))
                return out.loss, out.metrics, leaf.grad, entropy.grad

            def fused(dtype: torch.dtype, inplace: bool, objective: Any = objective, given: Any = given) -> Any:
                leaf = random(16, *given["old_logprobs"].shape, 67, low=-3, high=3).to(dtype).requires_grad_()
                ids = integers(17, 67, *given["old_logprobs"].shape)
                out = fusedpo.policy_loss_from_logits(
                    leaf * 1, ids, objective=objective, temperature=1.5, inplace=inplace, **given
                )
                out.loss.backward()
                return out.loss, out.metrics, out.logprobs, out.entropy, leaf.grad

            yield f"policy_loss {name}, {layout}", lambda f=layer_2: f("mean")
            yield f"policy_loss {name}, {layout}, per token", lambda f=layer_2: f("none")
            yield f"from_logits {name}, {layout}", lambda f=fused: f(torch.float32, False)
            if name in ("ppo", "nfpo", "gspo"):
                yield f"from_logits {name}, {layout}, bfloat16", lambda f=fused: f(torch.bfloat16, True)


def hidden(scale: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Hidden states and weights of few bits: the logits are exact, whatever multiplies the matrices."""
    import fusedpo

    given = batches(scale)["packed"]
    states = (integers(18, 9, *given["old_logprobs"].shape, 8) - 4) / 4
    weight = (integers(19, 9, 67, 8) - 4) / 4
    ids = integers(20, 67, *given["old_logprobs"].shape)
    for name, objective in presets().items():
        if name in ("ppo", "nfpo", "nfpo, entropy, KL", "gspo", "cppo"):

            def run(objective: Any = objective) -> Any:
                out = fusedpo.policy_loss_from_hidden(
                    states.clone().requires_grad_(), weight, ids, objective=objective, chunk_tokens=19, **given
                )
                metrics = {metric: x for metric, x in out.metrics.items() if metric != "dropped"}
                return out.loss, metrics, out.logprobs, out.entropy

            yield f"from_hidden {name}", run


def advantages(scale: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    from fusedpo import advantages as A

    rewards, G = random(21, 24, low=-1).round(decimals=1), 24
    ids = torch.cat([integers(22, 5, G), torch.arange(5).repeat(4)])  # every group has at least four samples
    numbers: dict[str, dict[str, Any]] = {
        "grpo": {},
        "dr_grpo": {},
        "rloo": {},
        "opo": {"lengths": integers(23, 9, G)},
        "gpg": {},
        "reinforce_rej": {},
        "grpo_passk": {},
        "maxpo": {"k": 2},
        "pkpo": {"k": 2},
        "passk": {"k": 2},
        "max_at_k": {"k": 2},
        "order_statistic": {"k": 3, "weights": (0.0, 1.0, 0.5)},
    }
    for name, options in numbers.items():
        by_name = getattr(A, name)
        given = (rewards > 0).float() if name == "passk" else rewards
        yield f"{name}, equal groups", lambda f=by_name, r=given, o=options: f(r, group_size=8, **o)

        def by_ids(f: Any = by_name, o: dict = options, name: str = name) -> Any:
            r = random(24, ids.numel()).round(decimals=1)
            o = {k: integers(25, 9, ids.numel()) if k == "lengths" else v for k, v in o.items()}
            return f((r > 0.5).float() if name == "passk" else r, group_ids=ids, **o)

        yield f"{name}, ids", by_ids
    T = 40 * scale
    mask = random(26, 3, T) < 0.8
    per_token, values = random(27, 3, T, low=-1) * mask, random(28, 3, T)
    lp, old = random(29, 3, T, low=-2, high=0), random(30, 3, T, low=-2, high=0)
    yield "gae", lambda: tuple(A.gae(per_token, values, mask=mask, gamma=0.99, lam=0.95))
    yield "reward_to_go", lambda: A.reward_to_go(per_token, mask=mask, gamma=0.9)
    yield "reinforce_plus_plus", lambda: A.reinforce_plus_plus(per_token, mask=mask)
    yield "vtrace", lambda: tuple(A.vtrace(per_token, values, logprobs=lp, old_logprobs=old, mask=mask, gamma=0.9))
    yield "whiten", lambda: A.whiten(values, mask=mask)
    yield "to_tokens", lambda: A.to_tokens(rewards[:3], mask)
    steps = integers(31, 5, 3, T).sort(-1).values - 1
    yield "vineppo", lambda: A.vineppo(random(32, 3, 5), step_rewards=random(33, 3, 4), step_ids=steps)


def digests(backend: str) -> dict[str, str]:
    import fusedpo

    torch.set_num_threads(2)
    scale = 20 if backend == "native" else 1
    found = {}
    with fusedpo.backend(backend):
        for cases in (token_logprobs, losses, hidden, advantages):
            for name, run in cases(scale):
                if backend == "triton" and not name.startswith(FEW):
                    continue  # the interpreter takes seconds for each of the others
                found[name] = digest(run())
    return found


if __name__ == "__main__":
    backend, *options = sys.argv[1:]
    result = {key(backend): digests(backend)}
    if options == ["--write"]:
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps({**kept, **result}, indent=0, sort_keys=True) + "\n")
    else:
        json.dump(result, sys.stdout)
