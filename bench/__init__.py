"""Benchmarks of every operator against what trainers use today: ``python -m fusedpo bench``.

A module per operator yields its cases (:func:`cases`) and, where calls are short, their overhead (:func:`overhead`).
:mod:`.harness` measures them, :mod:`.report` writes the files, :mod:`.compare` compares two of them.
"""

OPERATORS = ("token_logprobs", "policy_loss", "advantages", "one_pass", "hidden")
