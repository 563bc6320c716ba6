"""The versions of a trainer that an integration was tested with."""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import PackageNotFoundError, version


@functools.cache
def check_version(package: str, at_least: str, below: str) -> None:
    """Warns once per process if the installed ``package`` is not in the tested range ``at_least <= version < below``.

    A pre-release of ``below`` counts as outside. A package without metadata (a bare source tree) has an unknown
    version, which is outside too.
    """
    from packaging.specifiers import SpecifierSet  # comes with every trainer

    tested = SpecifierSet(f">={at_least},<{below}")
    try:
        found = version(package)
    except PackageNotFoundError:
        found = None
    if found is None or not tested.contains(found, prereleases=True):
        warnings.warn(
            f"fusedpo was tested with {package}>={at_least},<{below}, found {found or 'an unknown version'}: "
            "check that losses agree before you train",
            stacklevel=3,
        )
