"""The parts of an objective that look beyond the token."""

from __future__ import annotations

from fusedpo import objectives as O

TRACES = [
    O.Trace(),
    O.Trace(2, 1),
    O.Trace("all", 0),
    O.Trace(0, "all"),
    O.Trace("all", "all"),
    O.Trace(2, 1, differentiate=True),
    O.Trace("all", 0, differentiate=True),
]
REGIONS = [
    O.LogClip(0.1, 0.2),
    O.LogClip(0.05, 0.1, dual=0.15, power=0.5),
    O.LogClip(0.2, 0.2, dual=0.1, power=-0.5),
    O.CPPO(0.05, 0.01),
    O.CPPO(0.02, 0.005, min_weight=0.3),
    O.VESPO(),
    O.VESPO(0.5, 0.1, 0.0, 4.0),
    O.GMPO(0.1, 0.2),
    O.DRO(0.3),
]
