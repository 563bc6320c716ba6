"""Whether memory is what limits the row kernels: what they issue per logit is what tests/budgets.json has, and at most
75% of what a GPU can issue at the speed of a copy, or the table has the reason. See support/budgets.py."""

from __future__ import annotations

import importlib.util

import cuda_on_cpu
import pytest
from support import budgets, sass

pytestmark = pytest.mark.skipif(sass.find_disassembler() is None, reason="no cuobjdump: the disassembler is not there")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def compare(found: list[dict]) -> None:
    table = {budgets.key(line): {k: v for k, v in line.items() if k != "reason"} for line in budgets.load()}
    compilers = {line["compiler"] for line in found}
    if compilers.isdisjoint(line["compiler"] for line in table.values()):
        pytest.skip(f"the table has no {', '.join(compilers)}")
    expected = {key: line for key, line in table.items() if line["compiler"] in compilers}
    assert {budgets.key(line): line for line in found} == expected, "cd tests && python -m support.budgets"


@pytest.mark.slow
@pytest.mark.triton
def test_triton_kernels():
    compare(budgets.by_triton())


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(not budgets.OTHER_TRITON.exists(), reason=f"{budgets.OTHER_TRITON} is not there")
def test_kernels_of_another_triton():
    compare(budgets.by_triton(budgets.OTHER_TRITON))


@cuda_on_cpu.needs_nvcc
def test_cuda_kernels():
    compare(budgets.rows_of_cuda())


def test_what_is_above_75_percent_has_a_reason():
    lines = budgets.load()
    assert len({budgets.key(line) for line in lines}) == len(lines)
    without = [budgets.key(line) for line in lines if budgets.is_above(line) and not line.get("reason")]
    needless = [budgets.key(line) for line in lines if "reason" in line and not budgets.is_above(line)]
    assert (without, needless) == ([], [])


LOOP = """
        Function : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;                      /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x0000000402047981 */
        /*0020*/              @!P1 BRA 0x60 ;                                  /* 0x0000000402047981 */
        /*0030*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;            /* 0x0000000402047981 */
        /*0040*/                   IADD3 R9, R9, 0x1, RZ ;                     /* 0x0000000402047981 */
        /*0050*/                   BRA 0x30 ;                                  /* 0x0000000402047981 */
        /*0060*/                   MUFU.EX2 R4, R4 ;                           /* 0x0000000402047981 */
        /*0070*/                   MUFU.EX2 R5, R5 ;                           /* 0x0000000402047981 */
        /*0080*/                   FFMA R4, R4, R5, R6 ;                       /* 0x0000000402047981 */
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;               /* 0x0000000402047981 */
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R4 ;            /* 0x0000000402047981 */
        /*00b0*/               @P0 BRA 0x10 ;                                  /* 0x0000000402047981 */
        /*00c0*/                   EXIT ;                                      /* 0x0000000402047981 */
"""


def test_how_a_loop_is_counted():
    """The way around the accesses by element; 4 float32 per iteration."""
    (loop,) = sass.hot_loops(sass.parse(LOOP)["kernel"], least=2)
    assert [i.name for i in loop] == ["LDG", "BRA", "MUFU", "MUFU", "FFMA", "BAR", "STG", "BRA"]
    assert sass.counts(loop, itemsize=4) == sass.Counts(2.0, 0.0, 0.25, 0.5, barriers=1)


def test_what_a_multiprocessor_can_issue():
    """By hand: a copy at 4.3 TB/s moves 4 bytes in 0.2155 clocks of 132 multiprocessors, 27.6 slots of one lane."""
    shares = budgets.shares(sass.Counts(27.58, 0, 0, 3.447, 0), 4, budgets.GPUS["sm_90"])
    assert shares["issue"] == pytest.approx(1, rel=1e-3)
    assert shares["exponentials"] == pytest.approx(1, rel=1e-3)
