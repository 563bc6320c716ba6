"""What the builds contain: source distribution, wheels with and without native part, object files."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from install import ways

from fusedpo import backends

ROOT = Path(__file__).parents[1]
EXTENSION = f"fusedpo/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
LIBRARY = "fusedpo/libfusedpo.so"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDPO_") and k != "PYTHONPATH"}

# The top level of the repository. All of it is in the source distribution.
DIRECTORIES = (".ci", ".github", "bench", "csrc", "docs", "examples", "python", "tests", "triton_kernels")
FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "RELEASE.md",
)
FILES += ("pyproject.toml", "setup.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIRES = PROJECT["build-system"]["requires"]

REPORT = (
    "import fusedpo._C as c; info = c.build_info(); print(c.__file__, info['cpu_capability'], info['torch']); "
    "from fusedpo.__main__ import main; main(['env'])"
)

# Wheels are inspected and run, but not timed. What depends on optimisation is looked for in the installed package.
QUICKLY = {"CMAKE_BUILD_TYPE": "None", "CXXFLAGS": "-O0", "CUDAFLAGS": "-Ofc=max"}
INSTALLED = Path(backends.__file__).parent
BUILT = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

pytestmark = pytest.mark.slow
needs_native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))


def python(*arguments: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def build(hook: str, source: Path, out: Path, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Calls a hook of PEP 517 as pip does."""
    call = f"import setuptools.build_meta as backend; backend.{hook}({str(out)!r})"
    return python(*flags, "-c", call, cwd=source, **options)


def build_with_command(kind: str, source: Path, out: Path, **environment: str) -> None:
    """Calls `python -m build`, which also checks that what the build requires is here."""
    pytest.importorskip("build.__main__", reason="build is not installed (extra [dev])")
    # From elsewhere: the sources may have a directory of that name.
    python("-m", "build", "--no-isolation", kind, "--outdir", out, source, cwd=out, **environment)


def unpack(wheel_directory: Path) -> Path:
    (wheel,) = wheel_directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel_directory / "site")
    return wheel_directory / "site"


def use(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on an unpacked wheel. -S keeps the import hook of an editable install away."""
    return python("-S", *arguments, cwd=site, PYTHONPATH=os.pathsep.join([str(site), *sys.path]))


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution. Every wheel here is built from it."""
    out = tmp_path_factory.mktemp("sdist")
    build_with_command("--sdist", ROOT, out)
    (archive,) = out.glob("fusedpo-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def native(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = backends.NATIVE_MISSING
    if missing:
        pytest.skip(f"the installed fusedpo has no native part: {missing}")
    out = tmp_path_factory.mktemp("native")
    build_with_command("--wheel", source, out, **QUICKLY)
    return unpack(out)


def test_source_distribution_is_complete(source: Path) -> None:
    generated = re.compile(r"__pycache__/|_cache/|\.egg-info/|\.so$|/_build\.py$")
    for directory in DIRECTORIES:
        expected = {file for file in files(ROOT / directory) if not generated.search(file)}
        assert {file for file in files(source / directory) if ".egg-info/" not in file} == expected
    for file in FILES:
        assert (source / file).read_bytes() == (ROOT / file).read_bytes()


def test_top_level_of_the_repository() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {file.partition("/")[0] for file in listed.splitlines()} == {*DIRECTORIES, *FILES, ".gitignore"}


def test_native_wheel(native: Path) -> None:
    (wheel,) = native.parent.glob("*.whl")
    abi = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{abi}-{abi}-" in wheel.name
    assert {EXTENSION, LIBRARY, "fusedpo/py.typed", "fusedpo/triton_kernels/__init__.py"} <= files(native)
    assert {path.name for path in native.iterdir()} == {"fusedpo", f"fusedpo-{wheel.name.split('-')[1]}.dist-info"}
    report, environment = use(native, "-c", REPORT).stdout.split("\n", 1)
    file, capability, compiled_with = report.split()
    assert file == str(native / EXTENSION)
    assert capability in ("portable", "avx2", "avx512", "avx512_bf16")
    assert torch.__version__.startswith(compiled_with)
    assert re.search(r"^native: cuda_compiler +(none|NVIDIA [\d.]+)$", environment, re.MULTILINE)


@needs_native
def test_size_of_the_operators() -> None:
    """As compressed in a wheel."""
    assert len(zlib.compress((INSTALLED / "libfusedpo.so").read_bytes())) < 8e5 or backends.HAS_CUDA_KERNELS


@needs_native
def test_the_operators_need_no_python_and_the_stable_abi_alone() -> None:
    """So that one library serves every Python and every torch from the oldest on."""
    listed = ["nm", "-D", "--undefined-only", INSTALLED / "libfusedpo.so"]
    symbols = re.findall(
        r"[UwW] (\S+)$", subprocess.run(listed, capture_output=True, text=True, check=True).stdout, re.M
    )
    assert [name for name in symbols if name.startswith("aoti_torch_")]
    assert [name for name in symbols if re.match(r"_?Py|_Z[A-Z]*(2at|3c10|5torch|8pybind11)", name)] == []
    oldest = re.search(r"TORCH_TARGET_VERSION=0x(..)(..)", (ROOT / "CMakeLists.txt").read_text())
    version = ".".join(str(int(part, 16)) for part in oldest.groups())
    assert f"torch>={version}" in PROJECT["project"]["dependencies"]


def test_metadata_for_a_package_page(source: Path, native: Path) -> None:
    """Strictly checked, with links that work outside of the repository."""
    pytest.importorskip("twine", reason="twine is not installed (extra [dev])")
    archives = [*native.parent.glob("*.whl"), *source.parent.glob("*.tar.gz")]
    assert len(archives) == 2
    python("-m", "twine", "check", "--strict", *archives, cwd=native)
    metadata = next(native.glob("*.dist-info/METADATA")).read_text()
    page = metadata.partition("\n\n")[2]
    links = re.findall(r"\]\(([^)\s]+)", page)
    assert any(link.endswith("/docs/integrations/index.md") for link in links)
    assert [link for link in links if not re.match("https?://|#", link)] == []
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M).group(1) == PROJECT["project"]["version"]


@needs_native
def test_instruction_sets_share_no_weak_symbols() -> None:
    """Of a weak symbol the linker keeps one copy: here, perhaps one that the processor cannot run."""
    definitions = defaultdict(set)
    objects = list(BUILT.glob("CMakeFiles/*.dir/**/*.o"))
    if not objects:
        pytest.skip("the installed fusedpo was not built in this tree")
    variants = {path for path in objects if re.search(r"_(avx2|avx512|avx512_bf16)\.dir/", str(path))}
    if not variants:
        pytest.skip("this processor family has one instruction set")
    for path in objects:
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        for symbol in re.findall(r"^\w+ [VWu] (\S+)$", symbols, re.MULTILINE):
            definitions[symbol].add(path)
    assert definitions, "nm listed no weak symbol at all, not even those of pybind11"
    assert {symbol: paths for symbol, paths in definitions.items() if len(paths) > 1 and paths & variants} == {}


def test_cmake_has_the_only_list_of_native_sources() -> None:
    sources = {
        path.relative_to(ROOT).as_posix() for ending in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{ending}")
    }
    assert set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())) == sources
    for other in ("setup.py", "pyproject.toml", "Makefile"):
        assert re.findall(r"\w+\.(?:cpp|cu)\b", (ROOT / other).read_text()) == []


def test_native_wheel_with_cuda_beside_a_cpu_torch(source: Path, native: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if "CUDA_HOME" in os.environ else None)
    if nvcc is None:
        pytest.skip("no nvcc")
    build("build_wheel", source, tmp_path, FUSEDPO_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0", **QUICKLY)
    report = (
        "import fusedpo, torch; from fusedpo import _C, backends; info = _C.build_info(); "
        "print(info['cuda_compiler'], info['cuda_architectures'], "
        "backends.why_not('native', 'policy_loss', 'cuda'), "
        "torch._C._dispatch_has_kernel_for_dispatch_key('fusedpo::policy_loss.native', 'CUDA'))"
    )
    site = unpack(tmp_path)
    compiler, version, *rest = use(site, "-c", report).stdout.split()
    assert f"V{version}" in subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    assert [compiler, *rest] == ["NVIDIA", "['90-real']", "None", "True"]


def test_wheel_without_native_part(source: Path, tmp_path: Path) -> None:
    build("build_wheel", source, tmp_path, FUSEDPO_NATIVE="0")
    assert [path.name.split("-", 2)[2] for path in tmp_path.glob("*.whl")] == ["py3-none-any.whl"]
    site = unpack(tmp_path)
    packaged = {f"fusedpo/{file}" for file in files(source / "python/fusedpo")}
    packaged |= {f"fusedpo/triton_kernels/{file}" for file in files(source / "triton_kernels")}
    packaged |= {f"fusedpo/bench/{path.name}" for path in (source / "bench").glob("*.py")}
    assert {file for file in files(site) if ".dist-info/" not in file} == packaged | {"fusedpo/_build.py"}
    assert "--providers" in use(site, "-m", "fusedpo", "bench", "--help").stdout
    # With nothing but torch around it.
    blocked = "import sys; sys.modules.update(dict.fromkeys(['numpy', 'triton', 'rich', 'matplotlib']))"
    script = "import fusedpo, torch; print(fusedpo.token_logprobs(torch.zeros(1, 8), torch.tensor([1])).exp().item())"
    assert use(site, "-c", f"{blocked}; {script}").stdout.strip() == "0.125"


def test_an_isolated_build_does_not_download_torch() -> None:
    assert {re.split(r"\W", requirement)[0] for requirement in REQUIRES} == {"setuptools", "cmake", "ninja", "pybind11"}


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_pages_install_what_the_build_needs(page: str) -> None:
    commands = re.findall(r"^pip install .*", (ROOT / page).read_text(), re.MULTILINE)
    assert shlex.split(commands[0], comments=True)[2:] == REQUIRES
    assert commands[1].startswith("pip install --no-build-isolation .")


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, Any]:
    """Python with what pip's isolated build environments have."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for pattern in ("setuptools*", "_distutils_hack", "pybind11"):
        for path in Path(str(importlib.metadata.distribution("setuptools").locate_file(""))).glob(pattern):
            (tools / path.name).symlink_to(path)
    return {"PYTHONPATH": str(tools)}


@pytest.mark.parametrize("hook", ["prepare_metadata_for_build_wheel", "build_wheel", "build_editable"])
def test_isolated_build_fails_and_says_what_works(hook, source: Path, tmp_path: Path, without_torch) -> None:
    built = build(hook, source, tmp_path, "-S", check=False, **without_torch)
    assert built.returncode != 0
    assert "torch is not installed in this build environment" in built.stderr
    assert f"    pip install 'torch>=2.10' {shlex.join(REQUIRES)}\n" in built.stderr
    assert "    pip install --no-build-isolation .\n" in built.stderr
    assert "FUSEDPO_NATIVE=0 pip install ." in built.stderr


def test_what_an_isolated_build_can_do(source: Path, tmp_path: Path, without_torch) -> None:
    build("build_sdist", source, tmp_path, "-S", **without_torch)
    build("build_wheel", source, tmp_path, "-S", FUSEDPO_NATIVE="0", **without_torch)
    site = unpack(tmp_path)
    assert not {EXTENSION, LIBRARY} & files(site)
    (site / "program.py").write_text("import sys\n\nimport fusedpo\n")
    message = "fusedpo runs without its native kernels: it was built with FUSEDPO_NATIVE=0"
    assert f"program.py:3: UserWarning: {message}\n  import fusedpo\n" in use(site, "program.py").stderr
    assert message not in use(site, "-m", "fusedpo", "env").stderr


def test_build_without_compiler(source: Path, tmp_path: Path) -> None:
    built = build("build_wheel", source, tmp_path, check=False, PATH="", CXX="")
    assert built.returncode != 0
    assert "a C++ compiler not found" in built.stderr
    assert "FUSEDPO_NATIVE=0" in built.stderr


def test_no_text_recommends_a_package_that_is_not_published() -> None:
    """Until the first release: RELEASE.md alone says what is done then."""
    pages = [ROOT / "README.md", ROOT / "setup.py", *ROOT.glob("docs/**/*.md"), *ROOT.glob("python/**/*.py")]
    assert [page for page in pages if re.search(r"pip install [^`\n]*\bfusedpo\b", page.read_text())] == []
    everything = [*pages, ROOT / "Makefile", ROOT / ".ci/run"]
    assert [page for page in everything if re.search("extra[-_]index", page.read_text(), re.IGNORECASE)] == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ways.environment(tmp_path_factory.mktemp("home") / "venv")


@pytest.mark.parametrize("name", ways.QUICK)
def test_ways_to_install(name: str, source: Path, native: Path, home: Path) -> None:
    (sdist,), (wheel,) = source.parent.glob("*.tar.gz"), native.parent.glob("*.whl")
    problem = ways.check(name, source, sdist, wheel, home)
    ways.shell("pip uninstall --yes fusedpo", home, home)
    assert problem is None, problem
