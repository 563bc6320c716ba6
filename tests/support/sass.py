"""Machine code of NVIDIA GPUs: the instructions of a cubin, its hot loops, and what a loop issues for each element.

No GPU is needed: Triton's package brings ``cuobjdump``, as toolkits do. A loop is found by the branch back to its
head. Its *hot path* is the way from there to the branch back that most iterations take: the one with all exponentials
and all wide accesses, without those by element, which are for the ends of a row; where that does not decide, the
shortest.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


@functools.cache
def find_disassembler() -> str | None:
    """``cuobjdump`` of CUDA_HOME, of PATH, or of Triton's package."""
    if "CUDA_HOME" in os.environ and (found := shutil.which("cuobjdump", path=f"{os.environ['CUDA_HOME']}/bin")):
        return found
    triton = importlib.util.find_spec("triton")
    places = [] if triton is None else triton.submodule_search_locations or []
    bundled = [Path(place) / "backends/nvidia/bin/cuobjdump" for place in places]
    return shutil.which("cuobjdump") or next((str(path) for path in bundled if path.exists()), None)


# ------------------------------------------------------------------------------------------------------- instructions


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate, "" without
    opcode: str  # with modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def may_go_on(self) -> bool:
        """Whether the next instruction may follow."""
        conditional = bool(self.guard) or self.operands.startswith(("P", "!P", "U")) or ".DIV" in self.opcode
        return conditional or self.name not in ("BRA", "EXIT", "RET", "BRX")

    @property
    def width(self) -> int:
        """Bytes that a thread moves by a load or a store."""
        size = re.search(r"\.[US]?(128|64|16|8)\b", self.opcode)
        return int(size[1]) // 8 if size else 4


_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The code of each kernel."""
    disassembler = find_disassembler()
    assert disassembler is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler, "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse(text)


def parse(text: str) -> dict[str, list[Instruction]]:
    """What ``cuobjdump -sass`` prints."""
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if function := _FUNCTION.search(line):
            code = kernels.setdefault(function[1], [])
        elif found := _INSTRUCTION.search(line):
            code.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
    return kernels


# ---------------------------------------------------------------------------------------------------------- hot loops


class _Loop(NamedTuple):
    begin: int
    end: int
    path: list[Instruction]
    work: tuple[int, int]


def _worth(i: Instruction, widest: int, of_writes: bool) -> int:
    if i.opcode.startswith("MUFU.EX2"):
        return 1000
    if i.name in ("LDG", "STG", "LDS"):
        return 100 if i.width == widest else -60
    return 100 if i.name == "UBLKCP" and of_writes else -1  # the row that comes next is asked for while one is written


def _hot_path(body: Sequence[Instruction]) -> list[Instruction]:
    """From the head to a branch back to it; empty if there is none. Inner loops are gone through once."""
    begin, index = body[0].address, {i.address: n for n, i in enumerate(body)}
    of_writes, widest = writes(body), max((i.width for i in body if i.name in ("LDG", "STG", "LDS")), default=0)
    best: dict[int, tuple[int, int | None]] = {}  # by place: the worth of the way from there, and the next place
    for n in reversed(range(len(body))):
        i = body[n]
        if i.target == begin:
            best[n] = 0, None
            continue
        options = [n + 1] if i.may_go_on else []
        if i.target is not None and i.target > i.address and i.target in index:
            options.append(index[i.target])
        options = [m for m in options if m in best]
        if options:
            follow = max(options, key=lambda m: best[m][0])
            best[n] = best[follow][0] + _worth(i, widest, of_writes), follow
    path, place = [], 0 if 0 in best else None
    while place is not None:
        path.append(body[place])
        place = best[place][1]
    return path


def hot_loops(code: Sequence[Instruction], least: int = 8) -> list[list[Instruction]]:
    """The hot paths of the loops over the elements of a row: with so many exponentials, or words accessed."""
    ends: dict[int, int] = {}
    for i in code:
        if i.target is not None and i.target < i.address:
            ends[i.target] = max(ends.get(i.target, 0), i.address)
    found = []
    for begin, end in ends.items():
        path = _hot_path([i for i in code if begin <= i.address <= end])
        words = sum(max(1, i.width // 4) for i in path if i.name in ("LDG", "STG"))
        found.append(_Loop(begin, end, path, (count(path, "MUFU.EX2"), words)))
    # Loops with exponentials; in a kernel without any, those that move words: not those over tokens, nor of zeros.
    found = next((some for k in (0, 1) if (some := [one for one in found if one.work[k] >= least])), [])

    def contains(one: _Loop, other: _Loop) -> bool:
        return one is not other and one.begin <= other.begin and other.end <= one.end

    def goes_through(one: _Loop, other: _Loop) -> bool:
        return any(other.begin <= i.address <= other.end for i in one.path) or other.work > one.work

    # Not loops over rows, nor those for the ends of a row within others.
    found = [one for one in found if not any(contains(one, other) and goes_through(one, other) for other in found)]
    return [one.path for one in found if not any(contains(other, one) for other in found)]


# ------------------------------------------------------------------------------------------------------------- counts

FMA = {
    "FADD",
    "FMUL",
    "FFMA",
    "FADD2",
    "FMUL2",
    "FFMA2",
    "FADD32I",
    "FMUL32I",
    "FFMA32I",
    "HADD2",
    "HFMA2",
    "HMUL2",
    "FHADD",
}
IMAD = {"IMAD"}  # on half of the lanes of the FMA pipe
ALU = {
    "FMNMX", "FMNMX3", "FSETP", "FSET", "FSEL", "FCHK", "F2FP", "IADD3", "IADD", "IABS", "ISETP", "IMNMX", "VIADD",
    "VIMNMX", "VIMNMX3", "VIADDMNMX", "LOP3", "PLOP3", "LEA", "SHF", "SEL", "PRMT", "MOV", "P2R", "R2P", "SGXT", "BMSK",
    "CS2R", "I2FP", "VOTE", "HMNMX2", "HSETP2", "HSET2", "IADD64", "MOV64IUR",
}  # fmt: skip
OTHERS = {
    "MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV",  # special functions
    "LDG", "STG", "LDS", "STS", "LDC", "LDCU", "LDGSTS", "LDL", "STL", "SHFL", "REDUX", "SYNCS", "UBLKCP", "ATOMG",
    "BAR", "BRA", "BSSY", "BSYNC", "NOP", "WARPSYNC", "CALL", "RET", "EXIT", "YIELD", "BREAK", "ELECT", "DEPBAR",
    "LDGDEPBAR", "S2R", "S2UR", "MEMBAR", "ERRBAR", "CCTL", "FENCE", "LDSM", "STSM", "BMOV", "CREDUX",
}  # fmt: skip


def is_alu(i: Instruction) -> bool:
    """Also what the uniform datapath executes. An instruction that is not known is refused."""
    if i.name in ALU or (i.name.startswith("U") and i.name != "UBLKCP") or i.name in ("R2UR", "VOTEU"):
        return True
    assert i.name in FMA | IMAD | OTHERS, f"to which pipe does {i.opcode} belong?"
    return False


def count(path: Sequence[Instruction], opcode: str) -> int:
    return sum(i.opcode == opcode or i.opcode.startswith(opcode + ".") for i in path)


def moved(path: Sequence[Instruction], name: str) -> int:
    """Bytes that a thread loads or stores; where it loads or stores any 16 at a time, by these alone."""
    widths = [i.width for i in path if i.name == name]
    return sum(width for width in widths if width == 16) or sum(widths)


class Counts(NamedTuple):
    """Of a loop: for each element that it writes, or that it reads where it writes none; barriers of an iteration."""

    issued: float
    alu: float
    fma: float  # of the FMA pipe, where an IMAD takes the time of two
    exponentials: float
    barriers: int


def counts(path: Sequence[Instruction], itemsize: int) -> Counts:
    loaded = max(moved(path, "LDG"), moved(path, "LDS"))
    elements = (moved(path, "STG") or loaded) // itemsize
    return Counts(
        issued=len(path) / elements,
        alu=sum(map(is_alu, path)) / elements,
        fma=sum((i.name in FMA) + 2 * (i.name in IMAD) for i in path) / elements,
        exponentials=count(path, "MUFU.EX2") / elements,
        barriers=count(path, "BAR"),
    )


def writes(path: Sequence[Instruction]) -> bool:
    return any(i.name == "STG" for i in path)


def reads_ahead(path: Sequence[Instruction]) -> bool:
    """Whether a loop that writes reads another row as well."""
    return writes(path) and moved(path, "LDG") >= 2 * moved(path, "STG")
