"""What all tests share: seeds, threads, memory that shows when nothing wrote to it, and which tests run where."""

import importlib.util
import os
from collections.abc import Iterator

# Read when OpenMP starts: threads that spin while they wait take the processor from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# Read when a kernel is defined: without a GPU, Triton's interpreter runs the kernels on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Without it, deterministic matrix products are not to be had from cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

torch.set_num_threads(2)
# torch.empty is filled with NaN (integers: their maximum), so that an element that no kernel wrote cannot pass.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


class TorchGenerator:
    """torch's generator in the form in which hypothesis seeds generators before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_GENERATOR = TorchGenerator()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_GENERATOR)
hypothesis.settings.register_profile("fusedpo", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("fusedpo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA or ROCm device",
        "triton": None if importlib.util.find_spec("triton") else "Triton is not installed",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["reference", "auto"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module by the reference, and by the kernels where there are any."""
    import fusedpo

    with fusedpo.backend(request.param):
        yield
