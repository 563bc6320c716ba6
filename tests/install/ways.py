"""Ten ways to install fusedpo, and what each must say: ``python tests/install/ways.py [WAY ...]``.

Each runs in a virtual environment of its own, whose torch is this Python's, file by file as hard links. Needs PyPI,
for the tools of the build and uv, a C++ compiler, and minutes. tests/test_packaging.py runs those of ``QUICK``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TOOLS = " ".join(
    f"'{tool}'" for tool in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
)

TWO_COMMANDS = r"pip install 'torch>=2.10' .*\n +pip install --no-build-isolation \."
KERNELS = r"^native: cpu_capability +\w"
NO_KERNELS = r"^native +missing: it was built with FUSEDPO_NATIVE=0"


class Way(NamedTuple):
    """Shell commands, run in the sources, and what must be found: in the output of the last where it fails, else in
    that of ``fusedpo env``."""

    commands: tuple[str, ...]
    prints: str
    fails: bool = False


WAYS = {
    "pip": Way(("pip install .",), TWO_COMMANDS, fails=True),
    "uv": Way(("pip install uv", "uv pip install ."), TWO_COMMANDS, fails=True),
    "pip, pure": Way(("FUSEDPO_NATIVE=0 pip install .",), NO_KERNELS),
    "uv, pure": Way(("pip install uv", "FUSEDPO_NATIVE=0 uv pip install ."), NO_KERNELS),
    "pip, two commands": Way((f"pip install 'torch>=2.10' {TOOLS}", "pip install --no-build-isolation ."), KERNELS),
    "uv, two commands": Way(
        ("pip install uv", f"uv pip install 'torch>=2.10' {TOOLS}", "uv pip install --no-build-isolation ."), KERNELS
    ),
    "editable": Way((f"pip install {TOOLS}", "pip install --no-build-isolation -e ."), KERNELS),
    "sdist": Way((f"pip install {TOOLS}", "pip install --no-build-isolation {sdist}"), KERNELS),
    "wheel": Way(("pip install {wheel}",), KERNELS),
    "no compiler": Way(
        (f"pip install {TOOLS}", "CXX=no-such-compiler pip install --no-build-isolation ."),
        r"a C\+\+ compiler not found",
        fails=True,
    ),
}
QUICK = ("pip", "pip, pure", "wheel")

# The warning of a package without kernels is at the line that imports it.
PROGRAM = """\
import torch

import fusedpo

print(fusedpo.token_logprobs(torch.zeros(1, 8), torch.tensor([1])).exp().item())
"""
WARNING = r"program\.py:3: UserWarning: fusedpo runs without its native kernels"


def needed(name: str, found: dict[str, Distribution]) -> None:
    """The distribution of this name and all that it requires, as far as they are here."""
    try:
        one = distribution(name)
    except PackageNotFoundError:
        return
    if one.name not in found:
        found[one.name] = one
        for requirement in one.requires or ():
            if "extra ==" not in requirement:
                needed(re.split(r"[^\w.-]", requirement)[0], found)


def environment(directory: Path) -> Path:
    """A virtual environment with this Python's torch, which pip and uv take as installed.

    Hard links of files, never links to folders: whoever installs another torch there would overwrite this one.
    """
    venv.create(directory, with_pip=True)
    python = directory / "bin/python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    packages: dict[str, Distribution] = {}
    needed("torch", packages)
    packages.pop("setuptools", None)  # of the way itself
    for package in packages.values():
        for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            link, target = Path(site.strip(), name), Path(str(package.locate_file(name)))
            if target.is_dir() and not link.exists():
                shutil.copytree(target, link, copy_function=_link)
            elif not link.exists():
                _link(target, link)
    return directory


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def shell(command: str, home: Path, cwd: Path) -> tuple[int, str]:
    """Status and output, in the environment; with only its programs and those of the system."""
    path = os.pathsep.join([str(home / "bin"), *os.environ["PATH"].split(os.pathsep)])
    left_out = ("FUSEDPO_", "PYTHON", "CMAKE_PREFIX")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    run = subprocess.run(
        command,
        shell=True,
        cwd=cwd,
        env=kept | {"PATH": path, "VIRTUAL_ENV": str(home)},
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


def check(name: str, source: Path, sdist: Path, wheel: Path, home: Path | None = None) -> str | None:
    """What is wrong with a way, if anything is. ``home``: an :func:`environment` that nothing has been installed in."""
    way = WAYS[name]
    with tempfile.TemporaryDirectory() as folder:
        home = environment(Path(folder, "venv")) if home is None else home
        for command in way.commands:
            filled = command.replace("{sdist}", str(sdist)).replace("{wheel}", str(wheel))
            status, output = shell(filled, home, source)
            if status and not (way.fails and command == way.commands[-1]):
                return f"`{filled}` failed:\n{output}"
        if way.fails:
            if status == 0:
                return f"`{filled}` succeeded"
            return None if re.search(way.prints, output) else f"`{filled}` did not say {way.prints!r}:\n{output}"
        _, output = shell("fusedpo env", home, Path(folder))
        if not re.search(way.prints, output, re.MULTILINE):
            return f"`fusedpo env` did not say {way.prints!r}:\n{output}"
        Path(folder, "program.py").write_text(PROGRAM)
        status, output = shell("python program.py", home, Path(folder))
        if status or "0.125" not in output or bool(re.search(WARNING, output)) != (way.prints == NO_KERNELS):
            return f"a program printed:\n{output}"
    return None


def build(out: Path) -> tuple[Path, Path]:
    """The source distribution and the wheel, by this Python."""
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True, cwd=out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=", ".join(map(repr, WAYS)))
    chosen = parser.parse_args().ways or list(WAYS)
    for name in set(chosen) - set(WAYS):
        parser.error(f"no way is called {name!r}")
    failed = False
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    with tempfile.TemporaryDirectory() as folder:
        sdist, wheel = build(Path(folder))
        for name in chosen:
            subprocess.run(["tar", "-xf", sdist, "-C", folder], check=True)
            problem = check(name, Path(folder, sdist.name.removesuffix(".tar.gz")), sdist, wheel)
            print(f"{name}: {'as it must' if problem is None else problem}", flush=True)
            failed |= problem is not None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
