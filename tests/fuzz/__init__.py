"""A fuzzer of the operators and of the public functions: ``python -m fuzz --seconds 3600 --seed 1``.

Every call of an operator with one argument broken raises or returns; what memory it touched is seen by the sanitizers
(``.ci/sanitize -m fuzz``). Every valid call of a function has the value of an oracle in float64 (``oracles``).
"""
