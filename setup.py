"""Builds fusedpo. CMakeLists.txt describes the native part; this file checks that it can be built, and runs CMake.

It fails where it cannot build the kernels, unless FUSEDPO_NATIVE=0 asks for a package without them. FUSEDPO_CUDA=0
leaves out the CUDA kernels and FUSEDPO_CUDA=1 demands them; unset, they are built where there are nvcc and a CUDA build
of torch. CXX, CXXFLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they always mean.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)  # TORCH_TARGET_VERSION in CMakeLists.txt
PURE = os.environ.get("FUSEDPO_NATIVE") == "0"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS = PROJECT["build-system"]["requires"]
HELP = f"""
fusedpo compiles its kernels against the torch that you use, outside of pip's isolated build environments:

    pip install 'torch>={".".join(map(str, OLDEST_TORCH))}' {shlex.join(TOOLS)}
    pip install --no-build-isolation .

With uv, both begin with: uv pip install. A package without the C++ and CUDA kernels: FUSEDPO_NATIVE=0 pip install .
"""


def readme() -> str:
    """README.md for a package page, where links into the repository are absolute."""
    source = PROJECT["project"]["urls"]["Source"]
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{source}/raw/main/", (ROOT / "README.md").read_text())
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{source}/blob/main/", text)


def find_program(*names: str) -> str | None:
    """The first of these programs that is among the scripts of this Python environment or on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def find_torch() -> tuple[Path, dict] | None:
    """Directory and version.py of the installed torch, which is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent
    return directory, runpy.run_path(str(directory / "version.py"))


def obstacle() -> str | None:
    """What stands in the way of building the native part here."""
    if os.name == "nt":
        return "there are no native kernels for Windows"
    if TORCH is None:
        return "torch is not installed in this build environment"
    version = TORCH[1]["__version__"]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {version} is too old"
    tools = {
        "a C++ compiler": find_program(*shlex.split(os.environ.get("CXX", ""))[:1] or ("c++", "g++", "clang++")),
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "cmake": find_program("cmake"),
        "ninja": find_program("ninja"),
        "pybind11": importlib.util.find_spec("pybind11"),
    }
    missing = ", ".join(name for name, found in tools.items() if not found)
    return f"{missing} not found" if missing else None


def check() -> None:
    reason = None if PURE else obstacle()
    if reason:
        sys.exit(f"cannot build the kernels of fusedpo: {reason}.\n{HELP}")


def cuda_options() -> list[str]:
    wanted = os.environ.get("FUSEDPO_CUDA")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if wanted == "1" and nvcc is None:
        sys.exit("FUSEDPO_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on PATH")
    if wanted == "0" or nvcc is None or (wanted != "1" and TORCH[1]["cuda"] is None):
        return ["-DFUSEDPO_CUDA=OFF"]
    # torch writes "8.0 9.0+PTX". CMake writes "80-real;90": a bare number means machine code and PTX.
    wishes = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX").replace(";", " ").replace(".", "").split()
    architectures = [wish.removesuffix("+PTX") if wish.endswith("+PTX") else f"{wish}-real" for wish in wishes]
    return [
        "-DFUSEDPO_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
    ]


class BuildNative(build_ext):
    """Runs CMake, in a directory that outlives pip's temporary ones: a second build compiles what changed."""

    def run(self) -> None:
        self.in_sources = bool(self.inplace)  # super().run() clears it
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        built = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        cmake = find_program("cmake")
        options = [
            f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'python/fusedpo' if self.in_sources else built}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_DIR={TORCH[0]}",
            *cuda_options(),
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run([cmake, "--build", build, *jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        """CMake has written there."""


class Metadata(dist_info):
    """Fails before pip downloads what the package requires."""

    def run(self) -> None:
        check()
        super().run()


class BuildPython(build_py):
    """Also writes fusedpo/_build.py, from which the package knows why it has no native part."""

    def run(self) -> None:
        check()
        super().run()
        package = Path(self.get_package_dir("fusedpo") if self.editable_mode else f"{self.build_lib}/fusedpo")
        if PURE:
            for left_over in (*package.glob("_C.*"), *package.glob("libfusedpo.*")):
                left_over.unlink()
        reason = "it was built with FUSEDPO_NATIVE=0" if PURE else None
        (package / "_build.py").write_text(
            '"""Written by setup.py."""\n\n'
            "# Why this installation has no native part; None if it has one.\n"
            f"NATIVE_MISSING: str | None = {reason!r}\n"
        )


class SourceDistribution(sdist):
    """Also carries the native sources, and what tests and developers need."""

    def make_distribution(self) -> None:
        for directory in (".ci", ".github", "bench", "csrc", "docs", "examples", "tests"):
            self.filelist.graft(directory)
        for file in ("CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "CONTRIBUTING.md", "Makefile", "RELEASE.md"):
            self.filelist.include(file)
        for generated in ("_build.py", "*.so", "*.pyc", ".*_cache/**"):
            self.filelist.global_exclude(generated)
        super().make_distribution()


TORCH = find_torch()

setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=[*find_packages("python"), "fusedpo.bench", "fusedpo.triton_kernels"],
    # A top-level triton_kernels would collide with the package of that name that inference engines use.
    package_dir={"": "python", "fusedpo.bench": "bench", "fusedpo.triton_kernels": "triton_kernels"},
    ext_modules=[] if PURE else [Extension("fusedpo._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "dist_info": Metadata, "sdist": SourceDistribution},
)
