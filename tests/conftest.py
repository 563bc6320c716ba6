"""What all tests share: seeds, threads, memory that shows when nothing wrote to it, and which tests run where."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# Read when OpenMP starts: threads that spin while they wait take the processor from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import ptx
import pytest
import torch

# What Triton compiles is kept for other tests and processes.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "triton"))
# Inductor takes the processor at its word: to try each instruction set, it compiles and starts a process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Without it, deterministic matrix products are not to be had from cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

torch.set_num_threads(2)


class TorchGenerator:
    """torch's generator in the form in which hypothesis seeds generators before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_GENERATOR = TorchGenerator()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_GENERATOR)
hypothesis.settings.register_profile("fusedpo", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("fusedpo")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--triton",
        choices=["ptx", "interpreter"],
        help="without a GPU, Triton kernels run as they are compiled, on the machine of tests/ptx (the default where "
        "there is a C++ compiler), or by Triton's interpreter",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available():
        choose_triton(config.getoption("--triton"))
    # torch.empty is filled with NaN (integers: their maximum), so that an element that no kernel wrote cannot pass.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def choose_triton(how: str | None) -> None:
    """Without a GPU: on the CPU. To be called before anything imports Triton: then it decides whether to interpret."""
    if importlib.util.find_spec("triton") is not None and ptx.COMPILER is not None and how != "interpreter":
        os.environ.pop("TRITON_INTERPRET", None)
        from ptx import triton_device
        from triton import knobs

        knobs.runtime.interpret = False
        triton_device.install(90)
    os.environ["TRITON_INTERPRET"] = "1"  # fusedpo takes Triton on the CPU only with it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first: a worker that starts one at the end leaves the others idle.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
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


@pytest.fixture(autouse=True)
def _loads_of_what_nothing_wrote_are_found(request: pytest.FixtureRequest) -> Iterator[None]:
    if not ptx.runs_triton() or not request.node.get_closest_marker("triton"):
        yield
        return
    from ptx import triton_device

    with triton_device.watched_allocations():
        yield


@pytest.fixture(scope="module", params=["reference", "auto"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module by the reference, and by the kernels where there are any."""
    import fusedpo

    with fusedpo.backend(request.param):
        yield


@pytest.fixture(scope="module")
def on_the_reference() -> Iterator[None]:
    import fusedpo

    with fusedpo.backend("reference"):
        yield


@pytest.fixture(scope="module")
def native() -> Iterator[None]:
    """Forces the native kernels: a silent fall back to the reference would prove nothing."""
    import fusedpo
    from fusedpo import backends

    if backends.NATIVE_MISSING is not None:
        pytest.skip(backends.NATIVE_MISSING)
    with fusedpo.backend("native"):
        yield


@pytest.fixture(params=["PTX_NOISE=1 PTX_SEED=1", "PTX_NOISE=2 PTX_SEED=2 PTX_LATE_COPIES=0"])
def what_devices_may_do(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Approximate instructions are off, warps take turns at random, copies arrive at once."""
    for option in request.param.split():
        monkeypatch.setenv(*option.split("="))
