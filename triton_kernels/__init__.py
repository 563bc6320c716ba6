"""The Triton implementations of the operators. Importing this registers them; the first call of one imports Triton."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from fusedpo.ops import DEVICES, LIBRARY

if __name__ != "fusedpo.triton_kernels":  # in the root of the repository it is found by another name
    raise ImportError("a second copy would replace the operators of the first: import fusedpo.triton_kernels")

_OPERATORS = {
    "active_columns": ("active_columns", "gradient_at_"),
    "advantages": ("group_advantages", "token_advantages", "step_advantages", "whiten"),
    "exact_kl": ("exact_kl_out",),
    "logprobs": ("token_logprobs", "token_logprobs_backward_out"),
    "one_pass": ("one_pass", "scale_"),
    "token_statistics": ("token_statistics",),
    "row_stats": ("row_stats", "merge_row_stats"),
    "policy_loss": ("policy_loss", "policy_loss_backward", "token_scale"),
}


@cache
def _find(module: str, operator: str) -> Callable[..., Any]:
    return getattr(import_module(f".{module}", __name__), operator)


def _launcher(module: str, operator: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _find(module, operator)(*args, **kwargs)


for _module, _names in _OPERATORS.items():
    for _name in _names:
        for _key in DEVICES:
            LIBRARY.impl(f"{_name}.triton", _launcher(_module, _name), _key)
