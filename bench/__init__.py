"""Benchmarks of every operator against what trainers use today: ``python -m fusedpo bench``.

A module per operator yields its cases (:func:`cases`) and, where calls are short, their overhead (:func:`overhead`).
:mod:`.cli` starts processes, :mod:`.launch` is one of them, :mod:`.harness` measures there; :mod:`.record` says what
may be published, :mod:`.report` writes the files, :mod:`.compare` compares two of them.
"""

from .record import OPERATORS

__all__ = ["OPERATORS"]
