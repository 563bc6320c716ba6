"""The machine for PTX, an instruction at a time, against values by hand; and what it must find."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import ptx
import pytest

pytestmark = pytest.mark.skipif(ptx.COMPILER is None, reason="no C++ compiler")


def f(x: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def d(x: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def h(x: float) -> int:
    return struct.unpack("<H", struct.pack("<e", x))[0]


def b(x: float) -> int:
    """Of a bfloat16, which x must be."""
    assert f(x) & 0xFFFF == 0
    return f(x) >> 16


def pair(lower: int, upper: int) -> int:
    return lower | upper << 32


INF, NAN = float("inf"), float("nan")
NAN32, NAN16 = 0x7FFFFFFF, 0x7FFF
TINY = 2.0**-149  # the smallest float32
HEAD = ".version 8.7\n.target sm_100a\n.address_size 64\n"


class Memory:
    """An array that kernels may access; address of a multiple of 256 bytes."""

    def __init__(self, data: bytes, written: bool = True) -> None:
        import torch

        self.tensor = torch.zeros(len(data) + 256, dtype=torch.uint8)
        self.offset = -self.tensor.data_ptr() % 256
        self.size = len(data)
        self.tensor[self.offset : self.offset + self.size] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.written = None if written else bytearray(self.size)

    @property
    def region(self) -> ptx.Region:
        return ptx.Region(self.tensor.data_ptr() + self.offset, self.size, self.written)

    def words(self, form: str = "I") -> list[int]:
        data = bytes(self.tensor[self.offset : self.offset + self.size].tolist())
        return list(struct.unpack(f"<{self.size // struct.calcsize(form)}{form}", data))


def execute(
    body: str,
    *arrays: Memory,
    threads: int = 32,
    blocks: int = 1,
    cluster: int = 1,
    head: str = "",
    shared: int = 0,
) -> dict[str, int]:
    """Runs a body in which %a0, %a1 ... are the addresses of the arrays, %t the thread, and r, q, p registers."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 a{i}" for i in range(len(arrays)))
    loads = "".join(f"ld.param.u64 %a{i}, [a{i}];\n" for i in range(len(arrays)))
    text = f"""{HEAD}{head}
.visible .entry kernel({parameters})
{{
.reg .b64 %a<9>, %q<20>;
.reg .b32 %t, %r<40>;
.reg .pred %p<9>;
{loads}mov.u32 %t, %tid.x;
{body}
ret;
}}"""
    module = ptx.Module(text)
    values = [struct.pack("<Q", x.region.begin) for x in arrays]
    packed = module.pack("kernel", values)
    return module.launch("kernel", (blocks, 1, 1), threads, packed, [x.region for x in arrays], shared, cluster)


def evaluate(instruction: str, *operands: int) -> int:
    """The result of an instruction, of 64 bits. A predicate is an operand or a result where the instruction has one."""
    out = Memory(bytes(8))
    moves = "".join(f"mov.b64 %q{i + 1}, {x & (1 << 64) - 1:#x};\n" for i, x in enumerate(operands))
    sources = ", ".join(f"%q{i + 1}" for i in range(len(operands)))
    code = f"mov.b64 %q0, 0;\n{moves}{instruction} %q0, {sources};\nst.global.b64 [%a0], %q0;"
    execute(code, out, threads=1)
    return out.words("Q")[0]


# ----------------------------------------------------------------------------------------------------------- arithmetic

ULP = 2.0**-23  # of 1
FLOATS = [
    # 1 + 2^-24 is halfway between 1 and the next float32
    ("add.f32", (f(1), f(2**-24)), f(1)),
    ("add.rn.f32", (f(1 + ULP), f(2**-24)), f(1 + 2 * ULP)),  # ties to even
    ("add.rz.f32", (f(1), f(3 * 2**-25)), f(1)),
    ("add.rm.f32", (f(-1), f(-(2**-30))), f(-1 - ULP)),
    ("add.rp.f32", (f(1), f(2**-30)), f(1 + ULP)),
    ("add.rz.f32", (f(-1), f(-(2**-30))), f(-1)),
    ("add.sat.f32", (f(1), f(1)), f(1)),
    ("add.sat.f32", (f(-1), f(0.5)), f(0)),
    ("add.sat.f32", (f(NAN), f(1)), f(0)),
    ("add.f32", (f(INF), f(-INF)), NAN32),
    ("add.f32", (0xFFC01234, f(1)), NAN32),
    ("add.f32", (f(TINY), f(0)), f(TINY)),
    ("add.ftz.f32", (f(-TINY), f(-0.0)), f(-0.0)),
    ("sub.rn.f32", (f(1), f(2**-25)), f(1)),
    ("sub.rz.f32", (f(1), f(2**-26)), f(1 - ULP / 2)),
    ("sub.ftz.f32", (f(2**-126), f(2**-127)), f(2**-126)),
    ("mul.rn.f32", (f(1 + ULP), f(1 + ULP)), f(1 + 2 * ULP)),
    ("mul.rp.f32", (f(1 + ULP), f(1 + ULP)), f(1 + 3 * ULP)),
    ("mul.ftz.f32", (f(2**-100), f(-(2**-40))), f(-0.0)),
    ("mul.f32", (f(2**-100), f(2**-40)), f(2**-140)),
    ("mul.f32", (f(0), f(INF)), NAN32),
    ("fma.rn.f32", (f(1 + ULP), f(1 + ULP), f(-1 - 2 * ULP)), f(ULP * ULP)),  # rounded once
    ("fma.rm.f32", (f(1 + ULP), f(1 + ULP), f(0)), f(1 + 2 * ULP)),
    ("fma.rp.f32", (f(1 + ULP), f(1 + ULP), f(0)), f(1 + 3 * ULP)),
    ("fma.rn.sat.f32", (f(2), f(2), f(0)), f(1)),
    ("fma.rn.ftz.f32", (f(TINY), f(1), f(0)), f(0)),
    ("div.rn.f32", (f(1), f(3)), 0x3EAAAAAB),
    ("div.rz.f32", (f(1), f(3)), 0x3EAAAAAA),
    ("div.full.f32", (f(1), f(3)), 0x3EAAAAAB),
    ("div.full.ftz.f32", (f(TINY), f(1)), f(0)),
    ("div.approx.f32", (f(1), f(0)), f(INF)),
    ("rcp.rn.f32", (f(3),), 0x3EAAAAAB),
    ("rcp.rm.f32", (f(3),), 0x3EAAAAAA),
    ("rcp.approx.ftz.f32", (f(-TINY),), f(-INF)),
    ("sqrt.rn.f32", (f(2),), 0x3FB504F3),
    ("sqrt.rp.f32", (f(2),), 0x3FB504F4),
    ("sqrt.approx.f32", (f(-1),), NAN32),
    ("rsqrt.approx.f32", (f(4),), f(0.5)),
    ("rsqrt.approx.ftz.f32", (f(0),), f(INF)),
    ("ex2.approx.f32", (f(-149),), f(TINY)),
    ("ex2.approx.ftz.f32", (f(-149),), f(0)),
    ("ex2.approx.ftz.f32", (f(-INF),), f(0)),
    ("ex2.approx.f32", (f(0.5),), 0x3FB504F3),
    ("lg2.approx.f32", (f(8),), f(3)),
    ("lg2.approx.ftz.f32", (f(TINY),), f(-INF)),
    ("lg2.approx.f32", (f(-1),), NAN32),
    ("min.f32", (f(0), f(-0.0)), f(-0.0)),
    ("max.f32", (f(-0.0), f(0)), f(0)),
    ("max.f32", (f(NAN), f(-1)), f(-1)),
    ("max.NaN.f32", (f(NAN), f(-1)), NAN32),
    ("min.f32", (f(NAN), f(NAN)), NAN32),
    ("min.ftz.f32", (f(-TINY), f(1)), f(-0.0)),
    ("max.f32", (f(1), f(2), f(3)), f(3)),
    ("max.f32", (f(3), f(NAN), f(1)), f(3)),
    ("max.NaN.f32", (f(1), f(2), f(NAN)), NAN32),
    ("max.NaN.f32", (f(NAN), f(2), f(3)), NAN32),
    ("min.f32", (f(1), f(2), f(-3)), f(-3)),
    ("min.NaN.f32", (f(1), f(NAN), f(-3)), NAN32),
    ("abs.f32", (f(-2),), f(2)),
    ("abs.ftz.f32", (f(-TINY),), f(0)),
    ("neg.f32", (f(0),), f(-0.0)),
    ("neg.ftz.f32", (f(TINY),), f(-0.0)),
    ("copysign.f32", (f(-1), f(3)), f(-3)),  # the sign of the first
    ("add.f64", (d(1), d(2**-53)), d(1)),
    ("add.rp.f64", (d(1), d(2**-53)), d(1 + 2**-52)),
    ("sub.rz.f64", (d(1), d(2**-60)), d(1 - 2**-53)),
    ("mul.rm.f64", (d(1 + 2**-52), d(1 + 2**-52)), d(1 + 2 * 2**-52)),
    ("fma.rn.f64", (d(1 + 2**-52), d(1 + 2**-52), d(-1 - 2 * 2**-52)), d(2**-104)),
    ("div.rn.f64", (d(1), d(3)), d(1 / 3)),
    ("rcp.rn.f64", (d(-4),), d(-0.25)),
    ("sqrt.rn.f64", (d(2),), d(2**0.5)),
    ("max.f64", (d(NAN), d(2)), d(2)),
    ("min.f64", (d(-0.0), d(0)), d(-0.0)),
    ("abs.f64", (d(-INF),), d(INF)),
    ("neg.f64", (d(1),), d(-1)),
    ("copysign.f64", (d(-0.0), d(5)), d(-5)),
    # pairs, each rounded for itself
    ("add.rn.f32x2", (pair(f(1), f(10)), pair(f(2), f(-20))), pair(f(3), f(-10))),
    ("add.rp.f32x2", (pair(f(1), f(0)), pair(f(2**-30), f(1))), pair(f(1 + ULP), f(1))),
    ("sub.f32x2", (pair(f(1), f(10)), pair(f(2), f(INF))), pair(f(-1), f(-INF))),
    ("mul.ftz.f32x2", (pair(f(3), f(2**-100)), pair(f(-2), f(2**-40))), pair(f(-6), f(0))),
    ("fma.rn.f32x2", (pair(f(2), f(0)), pair(f(3), f(INF)), pair(f(1), f(1))), pair(f(7), NAN32)),
    # narrow operands
    ("add.f32.bf16", (b(1.5), f(2)), f(3.5)),
    ("sub.rn.f32.bf16", (b(1.5), f(2)), f(-0.5)),
    ("sub.f32.f16", (h(-1.5), f(NAN)), NAN32),
    ("fma.rn.f32.f16", (h(1.5), h(2), f(0.25)), f(3.25)),
    ("fma.rn.sat.f32.bf16", (b(1.5), b(2), f(0.25)), f(1)),
]

MASK = (1 << 64) - 1
INTEGERS = [
    ("add.s32", (0x7FFFFFFF, 1), 0x80000000),
    ("add.u16", (0xFFFF, 2), 1),
    ("add.s64", (MASK, 1), 0),
    ("sub.u32", (0, 1), 0xFFFFFFFF),
    ("mul.lo.u32", (0x10001, 0x10001), 0x20001),
    ("mul.lo.s64", (MASK, 5), MASK - 4),
    ("mul.hi.u32", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mul.hi.s32", (0xFFFFFFFF, 0xFFFFFFFF), 0),
    ("mul.hi.u64", (MASK, MASK), MASK - 1),
    ("mul.hi.s64", (MASK, 7), MASK),
    ("mul.wide.u32", (0xFFFFFFFF, 2), 0x1FFFFFFFE),
    ("mul.wide.s32", (0xFFFFFFFF, 2), MASK - 1),
    ("mul.wide.u16", (0xFFFF, 0xFFFF), 0xFFFE0001),
    ("mul.wide.s16", (0xFFFF, 3), 0xFFFFFFFD),
    ("mad.lo.s32", (3, 0xFFFFFFFF, 10), 7),
    ("mad.wide.u32", (0xFFFFFFFF, 4, 1), 0x3FFFFFFFD),
    ("mad.wide.s32", (0xFFFFFFFF, 4, 1), MASK - 2),
    ("div.s32", (-7, 2), 0xFFFFFFFD),
    ("div.u32", (0xFFFFFFF9, 2), 0x7FFFFFFC),
    ("div.s32", (0x80000000, MASK), 0x80000000),
    ("div.u64", (MASK, 16), MASK >> 4),
    ("rem.s32", (-7, 2), 0xFFFFFFFF),
    ("rem.s64", (-7, 4), MASK - 2),
    ("rem.u32", (7, 4), 3),
    ("min.s32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
    ("min.u32", (0xFFFFFFFF, 1), 1),
    ("max.s64", (MASK, 1), 1),
    ("max.u16", (0xFFFF, 1), 0xFFFF),
    ("abs.s32", (-5,), 5),
    ("neg.s64", (5,), MASK - 4),
    ("not.b32", (0xF0F0F0F0,), 0x0F0F0F0F),
    ("not.b64", (0,), MASK),
    ("and.b32", (0b1100, 0b1010), 0b1000),
    ("or.b64", (0b1100, 0b1010), 0b1110),
    ("xor.b16", (0xFF00, 0x0FF0), 0xF0F0),
    ("shl.b32", (1, 31), 0x80000000),
    ("shl.b32", (1, 32), 0),
    ("shl.b64", (1, 32), 1 << 32),
    ("shr.u32", (0x80000000, 31), 1),
    ("shr.u32", (0x80000000, 32), 0),
    ("shr.s32", (0x80000000, 33), 0xFFFFFFFF),
    ("shr.s32", (0x80000000, 4), 0xF8000000),
    ("shr.s64", (1 << 63, 63), MASK),
    ("shr.b16", (0x8000, 15), 1),
    ("shf.l.wrap.b32", (0x80000000, 1, 33), 3),
    ("shf.r.wrap.b32", (2, 1, 1), 0x80000001),
    ("shf.r.clamp.b32", (2, 7, 40), 7),
    ("bfe.u32", (0xABCD1234, 8, 8), 0x12),
    ("bfe.s32", (0xABCD8234, 8, 8), 0xFFFFFF82),
    ("bfe.s32", (0x80000000, 28, 16), 0xFFFFFFF8),
    ("bfe.u64", (0xAB << 40, 40, 8), 0xAB),
    ("bfe.s64", (0x8B << 40, 40, 8), MASK - 0x74),
    ("bfe.u32", (0xFFFFFFFF, 0, 0), 0),
    ("bfi.b32", (0xFF, 0, 4, 8), 0xFF0),
    ("bfi.b64", (0, MASK, 60, 8), MASK >> 4),
    ("popc.b32", (0xF00F,), 8),
    ("popc.b64", (MASK,), 64),
    ("clz.b32", (1,), 31),
    ("clz.b64", (0,), 64),
    ("brev.b32", (1,), 0x80000000),
    ("prmt.b32", (0x33221100, 0x77665544, 0x7530), 0x77553300),
    ("prmt.b32", (0x80FF7F00, 0, 0xBA98), 0xFFFF0000),  # signs of bytes 3, 2, 1 and 0
    ("lop3.b32", (0xF0, 0xCC, 0xAA, 0x80), 0x80),  # and
    ("lop3.b32", (0xF0, 0xCC, 0xAA, 0x96), 0x96),  # xor
    ("lop3.b32", (0xF0, 0xCC, 0xAA, 0xCA), 0xCA),  # the first chooses
]

CONVERSIONS = [
    ("cvt.rn.f16.f32", (f(1 + 2**-11),), h(1)),
    ("cvt.rn.f16.f32", (f(1 + 3 * 2**-11),), h(1 + 2 * 2**-10)),
    ("cvt.rz.f16.f32", (f(-1 - 3 * 2**-11),), h(-1 - 2**-10)),
    ("cvt.rn.f16.f32", (f(65519),), h(65504)),
    ("cvt.rn.f16.f32", (f(65520),), 0x7C00),
    ("cvt.rz.f16.f32", (f(1e6),), h(65504)),
    ("cvt.rn.f16.f32", (f(-INF),), 0xFC00),
    ("cvt.rn.f16.f32", (f(NAN),), NAN16),
    ("cvt.rn.f16.f32", (f(3 * 2**-25),), h(2 * 2**-24)),  # subnormal, a tie
    ("cvt.rn.f16.f32", (f(2**-25),), 0),
    ("cvt.rn.f16.f32", (f(-(2**-26)),), 0x8000),
    ("cvt.rn.f16.f64", (d(1 + 2**-11 + 2**-40),), h(1 + 2**-10)),
    ("cvt.rn.bf16.f32", (f(1 + 2**-8),), b(1)),
    ("cvt.rn.bf16.f32", (f(1 + 3 * 2**-8),), b(1 + 2 * 2**-7)),
    ("cvt.rz.bf16.f32", (f(1 + 3 * 2**-8),), b(1 + 2**-7)),
    ("cvt.rn.bf16.f32", (0x7F7FFFFF,), 0x7F80),
    ("cvt.rz.bf16.f32", (0x7F7FFFFF,), 0x7F7F),
    ("cvt.rn.bf16.f32", (0xFF800001,), NAN16),
    ("cvt.rn.bf16.f32", (0x00008001,), 1),  # subnormal
    ("cvt.rn.bf16.f64", (d(1 + 2**-8 + 2**-40),), b(1 + 2**-7)),
    ("cvt.rn.bf16x2.f32", (f(1), f(2)), b(1) << 16 | b(2)),  # the first is above
    ("cvt.rz.f16x2.f32", (f(1e6), f(-2)), h(65504) << 16 | h(-2)),
    ("cvt.f32.bf16", (b(-3),), f(-3)),
    ("cvt.f32.f16", (h(2**-24),), f(2**-24)),
    ("cvt.f32.f16", (0xFC00,), f(-INF)),
    ("cvt.f64.f32", (f(0.1),), d(struct.unpack("<f", struct.pack("<f", 0.1))[0])),
    ("cvt.ftz.f64.f32", (f(TINY),), d(0)),
    ("cvt.rn.f32.f64", (d(1 + 2**-24),), f(1)),
    ("cvt.rp.f32.f64", (d(1 + 2**-30),), f(1 + ULP)),
    ("cvt.rm.f32.f64", (d(-1 - 2**-30),), f(-1 - ULP)),
    ("cvt.rz.f32.f64", (d(1e300),), 0x7F7FFFFF),
    ("cvt.rn.f32.f64", (d(1e300),), f(INF)),
    ("cvt.rn.ftz.f32.f64", (d(2**-140),), f(0)),
    ("cvt.sat.f32.f32", (f(1.5),), f(1)),
    ("cvt.sat.f32.f32", (f(NAN),), f(0)),
    ("cvt.ftz.f32.f32", (f(-TINY),), f(-0.0)),
    ("cvt.rni.f32.f32", (f(2.5),), f(2)),
    ("cvt.rmi.f32.f32", (f(-2.5),), f(-3)),
    ("cvt.rpi.f64.f64", (d(2.1),), d(3)),
    ("cvt.rni.s32.f32", (f(-2.5),), 0xFFFFFFFE),
    ("cvt.rzi.s32.f32", (f(-2.9),), 0xFFFFFFFE),
    ("cvt.rpi.s32.f32", (f(2.1),), 3),
    ("cvt.rmi.s64.f64", (d(-2.1),), MASK - 2),
    ("cvt.rzi.s32.f32", (f(1e10),), 0x7FFFFFFF),
    ("cvt.rzi.s32.f32", (f(-1e10),), 0x80000000),
    ("cvt.rzi.u32.f32", (f(-1),), 0),
    ("cvt.rzi.u64.f32", (f(2**70),), MASK),
    ("cvt.rzi.s32.f32", (f(NAN),), 0),
    ("cvt.rzi.u16.f16", (h(1000),), 1000),
    ("cvt.rn.f32.s32", (0xFFFFFFFF,), f(-1)),
    ("cvt.rn.f32.u32", (0xFFFFFFFF,), f(2**32)),
    ("cvt.rz.f32.u32", (0xFFFFFFFF,), f(2**32 - 256)),
    ("cvt.rn.f32.s64", (2**24 + 1,), f(2**24)),
    ("cvt.rp.f32.s64", (2**24 + 1,), f(2**24 + 2)),
    ("cvt.rn.f64.u64", (MASK,), d(2**64)),
    ("cvt.rn.f64.s16", (0xFFFF,), d(-1)),
    ("cvt.rn.f32.u8", (0x1FF,), f(255)),
    ("cvt.s64.s32", (0xFFFFFFFF,), MASK),
    ("cvt.u64.u32", (MASK,), 0xFFFFFFFF),
    ("cvt.u32.s16", (0x8000,), 0xFFFF8000),
    ("cvt.u16.u32", (0x12345,), 0x2345),
    ("cvt.u32.u8", (0x1FF,), 0xFF),
    ("cvt.sat.u8.s32", (-5,), 0),
    ("cvt.sat.u8.s32", (300,), 255),
    ("cvt.sat.s16.s32", (-40000,), 0x8000),
    ("cvt.sat.s32.u64", (MASK,), 0x7FFFFFFF),
]


def width(instruction: str) -> int:
    """Of the result in bits."""
    name = instruction.split(".")
    if name[0] == "popc" or name[0] == "clz":
        return 32
    kind = next(x for x in name[1:] if re.fullmatch(r"[usbf]f?\d+(x2)?", x))
    bits = int(re.search(r"\d+", kind)[0]) * (2 if kind.endswith("x2") else 1)
    return bits * 2 if "wide" in name else bits


@pytest.mark.parametrize(("instruction", "operands", "expected"), FLOATS + INTEGERS + CONVERSIONS)
def test_value(instruction, operands, expected):
    assert evaluate(instruction, *operands) & ((1 << width(instruction)) - 1) == expected


def test_every_form_of_arithmetic_has_a_value():
    """An opcode that is added to the machine comes with one."""
    text = (ptx.MACHINE / "forms.cpp").read_text()
    known = set(re.findall(r'^    \{Op::\w+, "\(?([a-z0-9]+)', text, re.M))
    here = {case[0].split(".")[0] for case in FLOATS + INTEGERS + CONVERSIONS}
    rest = set(re.findall(r"\b([a-z]+[0-9]?)\.", Path(__file__).read_text()))
    assert known - here - rest - {"membar", "nanosleep", "createpolicy", "ldu", "ret", "trap"} == set()


@pytest.mark.parametrize("noise", [1, 2])
def test_approximate_instructions_are_off(noise):
    cases = [
        (n, x) for n in ("ex2", "lg2", "rcp", "sqrt", "rsqrt") for x in (0.3, 0.7, 1.7, 3.0, 5.5, 6.1, 9.9, 17.3, 33.3)
    ]
    names = [f"{name}.approx.f32" for name, _ in cases]
    exact = [evaluate(name, f(x)) for name, (_, x) in zip(names, cases, strict=True)]
    with ptx.options(noise=noise):
        off = [evaluate(name, f(x)) - e for name, (_, x), e in zip(names, cases, exact, strict=True)]
        assert evaluate("ex2.approx.f32", f(0)) == f(1)
        assert evaluate("div.full.f32", f(1), f(0)) == f(INF)
        assert evaluate("rcp.rn.f32", f(3)) == 0x3EAAAAAB
    assert set(off) == set(range(-noise, noise + 1))


COMPARISONS = {
    # less, equal, greater, unordered
    "eq": "0100", "ne": "1010", "lt": "1000", "le": "1100", "gt": "0010", "ge": "0110",
    "equ": "0101", "neu": "1011", "ltu": "1001", "leu": "1101", "gtu": "0011", "geu": "0111",
    "num": "1110", "nan": "0001",
}  # fmt: skip


def compared(instruction: str, a: int, b: int, combined: bool | None = None) -> tuple[int, int]:
    out = Memory(bytes(8))
    combine = "" if combined is None else ", %p2"
    body = f"""mov.pred %p2, {int(bool(combined))};
    mov.b64 %q1, {a:#x}; mov.b64 %q2, {b:#x};
    {instruction} %p0|%p1, %q1, %q2{combine};
    selp.u32 %r0, 1, 0, %p0; selp.u32 %r1, 1, 0, %p1;
    st.global.v2.u32 [%a0], {{%r0, %r1}};"""
    execute(body, out, threads=1)
    return tuple(out.words())


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name):
    for kind, bits in (("f32", f), ("f64", d), ("f16", h), ("bf16", b)):
        for (x, y), expected in zip([(1, 2), (2, 2), (2, 1), (NAN, 1)], COMPARISONS[name], strict=True):
            assert compared(f"setp.{name}.{kind}", bits(x), bits(y)) == (int(expected), 1 - int(expected))
    if name in ("eq", "ne", "lt", "le", "gt", "ge"):
        for kind, pairs in (("s32", [(-1, 1), (1, 1), (1, -1)]), ("u64", [(1, MASK), (1, 1), (MASK, 1)])):
            for (x, y), expected in zip(pairs, COMPARISONS[name], strict=False):
                assert compared(f"setp.{name}.{kind}", x & MASK, y & MASK)[0] == int(expected)


def test_comparisons_with_a_predicate():
    assert compared("setp.lt.and.u32", 1, 2, True) == (1, 0)
    assert compared("setp.lt.and.u32", 1, 2, False) == (0, 0)
    assert compared("setp.lt.or.u32", 2, 1, True) == (1, 1)
    assert compared("setp.lt.xor.u32", 1, 2, True) == (0, 1)
    assert compared("setp.hi.u32", MASK, 1)[0] == compared("setp.lo.u32", 1, 2)[0] == 1
    assert compared("setp.eq.ftz.f32", f(TINY), f(0))[0] == 1
    assert compared("setp.eq.f32", f(TINY), f(0))[0] == 0
    assert compared("setp.nan.or.f16", NAN16, h(1), False) == (1, 0)
    assert compared("setp.num.and.f16", h(INF), h(-2), True) == (1, 0)
    assert compared("setp.lt.f16", h(-2), h(-1)) == (1, 0)  # as integers, the other way round
    assert compared("setp.eq.bf16", b(0.0), b(-0.0)) == (1, 0)


def test_predicates():
    out = Memory(bytes(4 * 8))
    body = """mov.pred %p0, -1; mov.pred %p1, 0;
    and.pred %p2, %p0, %p1; or.pred %p3, %p0, %p1; xor.pred %p4, %p0, %p0; not.pred %p5, %p1;
    and.pred %p6, !%p1, %p0; mov.pred %p7, %p0;
    """
    expected = [0, 1, 0, 1, 1, 1]
    body += "".join(f"selp.b32 %r{i}, 1, 0, %p{i + 2}; st.global.b32 [%a0+{4 * i}], %r{i};\n" for i in range(6))
    body += "selp.b32 %r6, 5, 6, !%p0; st.global.b32 [%a0+24], %r6;\n@%p0 bra done;\n@!%p1 st.global.b32 [%a0+28], 9;\n"
    execute(body + "done:", out, threads=1)
    assert out.words() == [*expected, 6, 0]


def test_packing():
    out = Memory(bytes(24))
    body = """mov.b32 %r0, 0x11223344;
    mov.b32 {%r1, %r2}, %r0; mov.b32 %r3, {%r2, %r1}; mov.b64 %q0, {%r0, %r3}; mov.b64 {%r4, %r5}, %q0;
    mov.b64 {%r6, _}, %q0;
    st.global.v4.b32 [%a0], {%r1, %r3, %r4, %r5}; st.global.b32 [%a0+16], %r6; st.global.b16 [%a0+20], %r0;"""
    execute(body, out, threads=1)
    assert out.words() == [0x3344, 0x33441122, 0x11223344, 0x33441122, 0x11223344, 0x3344]


# ---------------------------------------------------------------------------------------------------------------- warps


def lanes(body: str, values: list[int] | None = None, threads: int = 32) -> list[int]:
    """What a body makes of %r0 in each lane: its %r1."""
    values = list(range(100, 100 + threads)) if values is None else values
    data, out = Memory(struct.pack(f"<{len(values)}I", *values)), Memory(bytes(4 * threads))
    address = "mul.wide.u32 %q0, %t, 4; add.s64 %q1, %a0, %q0; add.s64 %q2, %a1, %q0;"
    execute(
        f"{address} ld.global.b32 %r0, [%q1]; mov.b32 %r1, 0; {body} st.global.b32 [%q2], %r1;",
        data,
        out,
        threads=threads,
    )
    return out.words()


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else None),
        ("down", 3, 31, lambda lane: lane + 3 if lane < 29 else None),
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("idx", 7, 31, lambda lane: 7),
        # segments of 8 lanes
        ("up", 1, 0x1800, lambda lane: lane - 1 if lane % 8 else None),
        ("down", 2, 0x181F, lambda lane: lane + 2 if lane % 8 < 6 else None),
        ("bfly", 8, 0x181F, lambda lane: None if lane % 16 < 8 else lane ^ 8),
        ("idx", 9, 0x181F, lambda lane: lane // 8 * 8 + 1),
    ],
)
def test_shuffles(mode, by, clamp, source):
    shuffled = lanes(f"shfl.sync.{mode}.b32 %r1|%p0, %r0, {by}, {clamp:#x}, -1;")
    inside = lanes(f"shfl.sync.{mode}.b32 %r2|%p0, %r0, {by}, {clamp:#x}, -1; selp.u32 %r1, 1, 0, %p0;")
    for lane in range(32):
        expected = source(lane)
        assert shuffled[lane] == 100 + (lane if expected is None else expected)
        assert inside[lane] == (expected is not None)


VALUES = [(i * 2654435761) % 2**32 for i in range(32)]


def signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.u32", sum(VALUES) % 2**32),
        ("min.u32", min(VALUES)),
        ("max.u32", max(VALUES)),
        ("min.s32", min(map(signed, VALUES)) % 2**32),
        ("max.s32", max(map(signed, VALUES)) % 2**32),
        ("and.b32", 0),
        ("or.b32", 0xFFFFFFFF),
    ],
)
def test_redux(instruction, expected):
    assert lanes(f"redux.sync.{instruction} %r1, %r0, -1;", VALUES) == [expected] * 32


def test_redux_of_floats_and_of_some_lanes():
    values = [f(x - 5) for x in range(31)] + [f(NAN)]
    assert lanes("redux.sync.max.f32 %r1, %r0, -1;", values) == [f(25)] * 32
    assert lanes("redux.sync.min.NaN.f32 %r1, %r0, -1;", values) == [NAN32] * 32
    assert lanes("redux.sync.xor.b32 %r1, %r0, -1;", [1] * 31 + [7]) == [6] * 32
    body = """setp.lt.u32 %p0, %t, 4; @!%p0 bra rest;
    redux.sync.add.s32 %r1, %r0, 0xf; bra.uni all; rest: mov.b32 %r1, 7; all:"""
    assert lanes(body) == [100 + 101 + 102 + 103] * 4 + [7] * 28


def test_votes():
    even = "and.b32 %r2, %t, 1; setp.eq.u32 %p0, %r2, 0;"
    assert lanes(f"{even} vote.sync.ballot.b32 %r1, %p0, -1;") == [0x55555555] * 32
    assert lanes(f"{even} vote.sync.ballot.b32 %r1, !%p0, -1;") == [0xAAAAAAAA] * 32
    for mode, expected in (("any", 1), ("all", 0), ("uni", 0)):
        assert lanes(f"{even} vote.sync.{mode}.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1;") == [expected] * 32
    assert lanes(f"{even} @%p0 activemask.b32 %r1;") == [0x55555555, 0] * 16


def test_matrices():
    """Rows of 8 elements of 2 bytes; each lane holds two of row lane / 4."""
    body = """shl.b32 %r2, %t, 4; mov.b32 %r3, buffer; add.u32 %r2, %r2, %r3; and.b32 %r4, %t, 7;
    shl.b32 %r4, %r4, 4; add.u32 %r4, %r4, %r3;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {%r0};
    bar.warp.sync -1;
    shl.b32 %r5, %t, 2; add.u32 %r5, %r5, %r3; ld.shared.b32 %r6, [%r5];
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r4];
    setp.ne.b32 %p0, %r6, %r7; selp.b32 %r1, 0, %r7, %p0;"""
    data = Memory(struct.pack("<32I", *range(100, 132)))
    out = Memory(bytes(128))
    address = "mul.wide.u32 %q0, %t, 4; add.s64 %q1, %a0, %q0; add.s64 %q2, %a1, %q0; ld.global.b32 %r0, [%q1];"
    head = ".shared .align 16 .b8 buffer[128];"
    execute(f"{address}{body} st.global.b32 [%q2], %r1;", data, out, head=head)
    assert out.words() == list(range(100, 132))


def test_divergent_lanes_come_together():
    body = """setp.lt.u32 %p0, %t, 20; @%p0 bra first; add.u32 %r1, %r0, 1000; bra.uni together;
    first: add.u32 %r1, %r0, 2000;
    together: shfl.sync.idx.b32 %r1, %r1, 31, 31, -1;"""
    assert lanes(body) == [1131] * 32


def test_jumps_by_a_table_and_loops():
    body = """and.b32 %r2, %t, 1; targets: .branchtargets even, odd; brx.idx %r2, targets;
    even: mov.b32 %r1, 5; bra.uni done; odd: add.u32 %r1, %r1, 1; setp.lt.u32 %p0, %r1, %t; @%p0 bra odd; done:"""
    assert lanes(body) == [5 if lane % 2 == 0 else lane for lane in range(32)]


# --------------------------------------------------------------------------------------------------------------- memory


def test_loads_extend_signs():
    data, out = Memory(struct.pack("<bbhi", -1, -2, -3, -4)), Memory(bytes(48))
    body = """ld.global.s8 %q0, [%a0]; ld.global.u8 %q1, [%a0+1]; ld.global.s16 %q2, [%a0+2];
    ld.global.s32 %q3, [%a0+4];
    ld.global.b16 %q4, [%a0+2]; ld.global.v2.u16 {%q5, %q6}, [%a0+4];"""
    execute(body + "".join(f"st.global.u64 [%a1+{8 * i}], %q{i};" for i in range(6)), data, out, threads=1)
    assert out.words("Q") == [MASK, 0xFE, MASK - 2, MASK - 3, 0xFFFD, 0xFFFC]


def test_atomics():
    data, out = Memory(struct.pack("<IIIIff", 5, 5, 0, 5, 1.0, 0)), Memory(bytes(32 * 4))
    body = """atom.global.add.u32 %r1, [%a0], 2; red.global.max.s32 [%a0+4], -1;
    atom.relaxed.gpu.global.inc.u32 %r2, [%a0+8], 2;
    atom.global.cas.b32 %r3, [%a0+12], 5, 9; red.global.add.f32 [%a0+16], 0f3f000000;
    atom.global.exch.b32 %r4, [%a0+20], %t;
    mul.wide.u32 %q0, %t, 4; add.s64 %q0, %a1, %q0; st.global.u32 [%q0], %r1;"""
    execute(body, data, out)
    assert data.words() == [5 + 64, 5, 32 % 3, 9, f(17), 31]
    assert out.words() == [5 + 2 * i for i in range(32)]
    small = Memory(struct.pack("<II", 0b1100, 7))
    execute("red.global.and.b32 [%a0], 10; red.global.min.u32 [%a0+4], 3;", small, threads=1)
    assert small.words() == [0b1000, 3]


def test_counts_of_sectors_and_waves():
    data = Memory(bytes(4096))
    near = execute("mul.wide.u32 %q0, %t, 4; add.s64 %q0, %a0, %q0; ld.global.u32 %r0, [%q0];", data)
    far = execute(
        "mul.wide.u32 %q0, %t, 128; add.s64 %q0, %a0, %q0; ld.global.u32 %r0, [%q0]; ld.global.u32 %r0, [%q0];", data
    )
    assert [near[x] for x in ("load_requests", "load_bytes", "load_sectors", "unique_load_sectors")] == [1, 128, 4, 4]
    assert [far[x] for x in ("load_requests", "load_bytes", "load_sectors", "unique_load_sectors")] == [2, 256, 64, 32]
    head = ".shared .align 16 .b8 buffer[4096];"
    for factor, waves in ((4, 1), (8, 2), (128, 32)):
        body = f"mad.lo.u32 %r0, %t, {factor}, buffer; st.shared.u32 [%r0], 0;"
        assert execute(body, head=head)["shared_waves"] == waves
    vectors = execute("mad.lo.u32 %r0, %t, 16, buffer; st.shared.v4.u32 [%r0], {%t, %t, %t, %t};", head=head)
    assert vectors["shared_waves"] == 4


# ------------------------------------------------------------------------------------------------------- what is found

SHARED = ".shared .align 16 .b8 buffer[1024];\n"
SLOT = "mov.b32 %r3, buffer; shl.b32 %r2, %t, 2; add.u32 %r2, %r2, %r3;"  # of this thread
NEXT = "add.u32 %r4, %t, 32; and.b32 %r4, %r4, 63; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %r3;"  # of the other warp


def found(body: str, *arrays: Memory, match: str, **launch) -> None:
    with pytest.raises(ptx.Found, match=match):
        execute(body, *arrays, **launch)


def test_out_of_bounds():
    data = Memory(bytes(128))
    address = "mul.wide.u32 %q0, %t, 4; add.s64 %q0, %a0, %q0;"
    execute(f"{address} ld.global.u32 %r0, [%q0];", data)
    found(
        f"{address} ld.global.u32 %r0, [%q0+4];",
        data,
        match="load of 4 bytes out of bounds, 0 bytes behind the end of an array of 128",
    )
    found(
        f"{address} st.global.u32 [%q0+-4], 1;", data, match="store of 4 bytes out of bounds, -132 bytes behind.*lane 0"
    )
    found(f"{SLOT} ld.shared.u32 %r0, [%r2+1024];", head=SHARED, match="of 1024 bytes of shared memory")
    execute(f"{SLOT} st.shared.u32 [%r2+1024], 0;", head=SHARED, shared=128)


def test_misaligned():
    found("ld.global.u32 %r0, [%a0+2];", Memory(bytes(128)), match="misaligned access of 4 bytes")
    found("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a0+8];", Memory(bytes(128)), match="misaligned access of 16 bytes")


def test_uninitialised():
    found(f"{SLOT} ld.shared.u32 %r0, [%r2];", head=SHARED, match="uninitialised shared")
    data = Memory(bytes(128), written=False)
    found("ld.global.u32 %r0, [%a0];", data, match="uninitialised global")
    execute("st.global.u16 [%a0], 1; ld.global.u16 %r0, [%a0];", data, threads=1)
    found("ld.global.u32 %r0, [%a0];", data, match="uninitialised global")


def test_races_between_warps():
    exchange = f"{SLOT} {NEXT} st.shared.u32 [%r2], %t; {{}} ld.shared.u32 %r0, [%r4];"
    found(exchange.format(""), head=SHARED, threads=64, match="races with a (store|load) of warp")
    found(exchange.format("bar.warp.sync -1;"), head=SHARED, threads=64, match="races|uninitialised")
    execute(exchange.format("bar.sync 0;"), head=SHARED, threads=64)
    again = exchange.format("bar.sync 0;") + "{} add.u32 %r5, %t, 1; st.shared.u32 [%r2], %r5;"
    found(again.replace("{}", ""), head=SHARED, threads=64, match="races with a (store|load) of warp")
    execute(again.replace("{}", "bar.sync 0;"), head=SHARED, threads=64)
    one, other = ("mov.b32 %r3, buffer; st.shared.u32 [%r3], %r6;".replace("%r6", x) for x in ("5", "%t"))
    execute(one, head=SHARED, threads=64)  # a value that is there already changes nothing
    found(other, head=SHARED, threads=64, match="store races with a store of warp")


def test_races_within_a_warp():
    other = "xor.b32 %r4, %t, 1; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %r3;"
    exchange = f"{SLOT} {other} st.shared.u32 [%r2], %t; {{}} ld.shared.u32 %r0, [%r4];"
    found(exchange.format(""), head=SHARED, match="load races with a store of warp 0 lane")
    execute(exchange.format("bar.warp.sync -1;"), head=SHARED)
    back = exchange.format("bar.warp.sync -1;") + "{} st.shared.u32 [%r2], 99;"
    found(back.replace("{}", ""), head=SHARED, match="store races with a load of warp 0 lane")
    execute(back.replace("{}", "bar.warp.sync -1;"), head=SHARED)


def test_races_between_blocks():
    data = Memory(bytes(256))
    found(
        "mov.u32 %r0, %ctaid.x; st.global.u32 [%a0], %r0;", data, threads=1, blocks=2, match="races with another block"
    )
    atomic = (
        "atom.global.add.u32 %r1, [%a0+128], 1; setp.eq.u32 %p0, %r1, 0; @%p0 bra first; ld.global.u32 %r0, [%a0]; ret;"
    )
    execute(f"{atomic} first: ", data, threads=1, blocks=2)
    last = """mov.u32 %r0, %ctaid.x; mul.wide.u32 %q0, %r0, 4; add.s64 %q0, %a0, %q0; st.global.u32 [%q0], 5; membar.gl;
    atom.global.add.u32 %r1, [%a0+128], 1; ld.global.u32 %r2, [%a0];"""
    execute(last, Memory(bytes(256)), threads=1, blocks=2)
    found(
        last.replace("atom.global.add.u32 %r1, [%a0+128], 1;", ""),
        Memory(bytes(256)),
        threads=1,
        blocks=2,
        match="another block",
    )


def test_divergent_barriers():
    half = "setp.lt.u32 %p0, %t, 16;"
    found(f"{half} @%p0 bra a; bar.sync 0; bra.uni b; a: bar.sync 0; b:", match="divergent barrier")
    found(f"{half} @%p0 bar.sync 0;", match="a barrier under a predicate")
    found(f"{half} @%p0 bra a; shfl.sync.idx.b32 %r0, %t, 0, 31, -1; a: bar.sync 0;", match="divergent barrier")
    warps = "setp.lt.u32 %p0, %t, 32; @%p0 bra a; bar.sync 0; bra.uni b; a: bar.sync 0; b:"
    found(warps, threads=64, match="different barriers")
    found(f"{half} @%p0 bra a; shfl.sync.idx.b32 %r0, %t, 0, 31, 0xffff0000; a: ", match="does not take part")
    execute(f"{half} @%p0 ret; bar.sync 0;")  # who has returned is not waited for
    execute(f"{half} @%p0 bra a; bra b; a: ret; b: bar.sync 0; bar.warp.sync -1;")


def test_trap():
    found("trap;", match="trap")


def test_random_turns_are_the_same_again():
    body = f"""{SLOT} {NEXT} st.shared.u32 [%r2], %t; bar.sync 0; ld.shared.u32 %r0, [%r4];
    mul.wide.u32 %q0, %t, 4; add.s64 %q0, %a0, %q0; st.global.u32 [%q0], %r0;"""
    for seed in range(4):
        out = Memory(bytes(256))
        with ptx.options(seed=seed):
            execute(body, out, head=SHARED, threads=64)
        assert out.words() == [(i + 32) % 64 for i in range(64)]


# --------------------------------------------------------------------------------------------- clusters and bulk copies

CLUSTER = f"""{SLOT} mov.u32 %r5, %cluster_ctarank; st.shared.u32 [%r2], %r5;
barrier.cluster.arrive.aligned; {{wait}}
cvta.shared.u64 %q0, %q9; xor.b32 %r6, %r5, 1; cvt.u64.u32 %q1, %r2; cvta.shared.u64 %q1, %q1;
    mapa.u64 %q2, %q1, %r6; ld.u32 %r7, [%q2];
{{last}}
mov.u32 %r8, %ctaid.x; mad.lo.u32 %r8, %r8, 32, %t; mul.wide.u32 %q3, %r8, 4; add.s64 %q3, %a0, %q3;
    st.global.u32 [%q3], %r7;"""
WAIT, LAST = "barrier.cluster.wait.aligned;", "barrier.cluster.arrive; barrier.cluster.wait;"


@pytest.mark.parametrize(
    "address", ["", "cvta.to.shared::cluster.u64 %q4, %q2; ld.shared::cluster.u32 %r7, [%q4];",
                "mapa.shared::cluster.u32 %r9, %r2, %r6; ld.shared::cluster.u32 %r7, [%r9];"]
)  # fmt: skip
def test_clusters(address):
    out = Memory(bytes(4 * 128))
    body = CLUSTER.replace("ld.u32 %r7, [%q2];", address or "ld.u32 %r7, [%q2];")
    execute(body.format(wait=WAIT, last=LAST), out, blocks=4, cluster=2, head=SHARED)
    assert out.words() == ([1] * 32 + [0] * 32) * 2
    found(CLUSTER.format(wait="", last=""), out, blocks=4, cluster=2, head=SHARED, match="races|uninitialised")
    found("barrier.cluster.arrive; mov.u32 %r0, %ctaid.x;", out, blocks=3, cluster=2, match="not a multiple")


COPY = """.reg .b64 %from; mov.b32 %r3, buffer; mov.b32 %r9, state; setp.eq.u32 %p0, %t, 0;
@!%p0 bra begin; mbarrier.init.shared::cta.b64 [%r9], 1; fence.mbarrier_init.release.cluster; begin: bar.sync 0;
@!%p0 bra wait; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%a0], 256, [%r9];
wait: {wait} shl.b32 %r2, %t, 2; add.u32 %r2, %r2, %r3; ld.shared.u32 %r0, [%r2];
mul.wide.u32 %q0, %t, 4; add.s64 %q0, %a1, %q0; st.global.u32 [%q0], %r0;"""
POLL = "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0; @!%p1 bra wait;"
COPIED = SHARED + ".shared .align 8 .b8 state[8];\n"


@pytest.mark.parametrize("late", [False, True])
def test_bulk_copies(late):
    data, out = Memory(struct.pack("<64I", *range(64))), Memory(bytes(256))
    with ptx.options(late_copies=late):
        counters = execute(COPY.format(wait=POLL), data, out, threads=64, head=COPIED)
        assert out.words() == list(range(64))
        assert counters["bulk_bytes"] == 256
        found(
            COPY.format(wait=""),
            data,
            out,
            threads=64,
            head=COPIED,
            match="races with a store of a bulk copy|on its way",
        )
        found(
            COPY.format(wait=POLL).replace("[%a0], 256", "[%a0], 264"), data, out, head=COPIED, match="multiples of 16"
        )
        found(COPY.format(wait=POLL).replace("[%a0], 256", "[%a0], 512"), data, out, head=COPIED, match="out of bounds")
    with ptx.options(late_copies=late), pytest.raises(ptx.Found, match="deadlock|on its way"):
        execute(COPY.format(wait=POLL).replace("_, [%r9], 256", "_, [%r9], 512"), data, out, head=COPIED)


def test_an_mbarrier_must_be_one():
    found(
        "mov.b32 %r9, buffer; mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0;",
        head=SHARED,
        match="no mbarrier|uninitialised",
    )


# -------------------------------------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("tanh.approx.f32 %r0, %r1;", "instruction tanh.approx.f32"),
        ("add.rn.bf16 %r0, %r1, %r2;", "instruction add.rn.bf16"),
        ("add.rn.sat.f32x2 %q0, %q1, %q2;", "instruction add.rn.sat.f32x2"),
        ("add.sat.s32 %r0, %r1, %r2;", "instruction add.sat.s32"),
        ("max.xorsign.abs.f32 %r0, %r1, %r2;", "instruction max.xorsign"),
        ("cvt.rn.relu.bf16.f32 %r0, %r1;", "instruction cvt.rn.relu"),
        ("cvt.rn.satfinite.e4m3x2.f32 %r0, %r1, %r2;", "instruction cvt.rn.satfinite"),
        ("ld.local.u32 %r0, [%r1];", "instruction ld.local"),
        ("cp.async.cg.shared.global [%r0], [%q0], 16;", "instruction cp.async"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 %r0, %r1, %r2, %r3;", "instruction mma"),
        ("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r0}, [%r1];", "instruction ldmatrix"),
        ("call f;", "instruction call"),
        ("add.f32 %r0, %r1;", "the number of operands"),
        ("add.f32 %r0, %r1, %r2, %r3;", "the number of operands"),
        ("bar.sync 1;", "a barrier other than number 0"),
        ("bar.sync 0, 64;", "the number of operands"),
        ("mov.u32 %r0, %smid;", "special register %smid"),
        ("mov.u32 %r0, nothing;", "operand nothing"),
        ("bra nowhere;", "no label nowhere"),
        ("ld.global.v2.u32 {%r0, %r1, %r2}, [%a0];", "vector of another length"),
        (".local .b8 stack[16];", "\\.local"),
    ],
)
def test_what_is_not_known_is_refused(line, match):
    with pytest.raises(ptx.Found, match=match):
        execute(line, Memory(bytes(8)))


def test_functions_are_refused():
    with pytest.raises(ptx.Found, match="a function"):
        ptx.Module(f"{HEAD}.func (.param .b32 x) f(.param .b32 y) {{ ret; }}")
