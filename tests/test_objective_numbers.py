"""The numbers of parts: one table in Python, which the enumerations of C++ repeat."""

import re
from pathlib import Path
from typing import get_args

import pytest

from fusedpo import objectives as O

HEADER = (Path(__file__).parents[1] / "csrc/core/objective.h").read_text()


def enumeration(name: str) -> dict[str, int]:
    """The names and numbers of a C++ enumeration, without the count of them that ends it."""
    [body] = re.findall(rf"enum {name} : int32_t {{([^}}]*)}};", HEADER)
    *names, count = [enumerator.strip() for enumerator in body.split(",")]
    assert count.startswith("kNum")
    assert all(re.fullmatch(r"k\w+", enumerator) for enumerator in names), "numbers count from 0"
    return {enumerator: number for number, enumerator in enumerate(names)}


def cpp_name(part: type | str | None) -> str:
    """``PPOClip`` is kPPOClip, ``"token-mean"`` kTokenMean and ``"k3+"`` kK3Plus."""
    if part is None:
        return "kNoKL"
    name = part.__name__ if isinstance(part, type) else part.replace("+", "-plus")
    return "k" + "".join(word[0].upper() + word[1:] for word in name.split("-"))


@pytest.mark.parametrize(
    ("name", "table", "parts"),
    [
        ("Ratio", O.RATIOS, get_args(O.Ratio)),
        ("TrustRegion", O.TRUST_REGIONS, get_args(O.TrustRegion)),
        ("KL", O.KL_NUMBERS, (None, *O.KL_KINDS)),
        ("Aggregation", O.AGGREGATION_NUMBERS, O.AGGREGATIONS),
    ],
)
def test_numbers_are_those_of_cpp(name, table, parts):
    assert set(table) == set(parts)
    assert set(table.values()) == set(range(len(set(table.values()))))
    own = {cpp_name(part): number for part, number in table.items() if part is not O.ForwardTrace}
    assert own == enumeration(name)
    assert O.RATIOS[O.ForwardTrace] == O.RATIOS[O.Trace]


def test_flags_are_those_of_cpp():
    [text] = re.findall(r"constexpr int (kAhead = .*);", HEADER)
    flags = {name: int(number) for name, number in (flag.split(" = ") for flag in text.split(", "))}
    own = {"kAhead": O.AHEAD, "kPlace": O.PLACE, "kPrefix": O.PREFIX, "kSequence": O.SEQUENCE}
    assert flags == own | {"kEverything": sum(own.values())}


@pytest.mark.triton
def test_triton_knows_each_number_by_the_name_of_its_part():
    from fusedpo.triton_kernels import objective

    numbers = {
        name.replace("_", ""): number.value
        for name, number in vars(objective).items()
        if name.isupper() and len(name) > 1
    }
    for table, defaults in ((O.RATIOS, {"TOKENRATIO"}), (O.TRUST_REGIONS, {"NOTRUSTREGION"})):
        want = {part.__name__.upper(): number for part, number in table.items() if part is not O.ForwardTrace}
        assert {name: numbers[name] for name in want if name not in defaults} == {
            name: number for name, number in want.items() if name not in defaults
        }
