"""What several ranks send in a step, and how long that takes, on paper: tables of docs/distributed.md, by generate.py.

A model, not a measurement: bytes follow from the calls, times from the speeds below and nothing else. Gathers are rings
and small sums trees; nothing overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

VOCAB, WIDTH, ITEM = 151_936, 4_096, 2  # bfloat16
MEMORY = 4.2e12  # bytes per second
LINK, NETWORK = 350e9, 45e9  # bytes per second of a rank, inside of a node and between nodes
NODE = 8  # ranks
CALL, HOP = 20e-6, 5e-6  # seconds: of a collective inside of a node, and of each further step between nodes
FLOAT = 4  # bytes

Line = list[str]


def ring(received: float, ranks: int, *, nodes: bool) -> float:
    """Seconds of a gather of which a rank receives so many bytes, or of a scattered sum."""
    return CALL + (received / NETWORK + (ranks - 1) * HOP if nodes else received / LINK)


def tree(ranks: int) -> float:
    """Of a sum of a few numbers."""
    return CALL + 2 * math.ceil(math.log2(ranks)) * HOP


def passes(tokens: float, columns: float, count: int) -> float:
    """Seconds in which memory moves the logits ``count`` times."""
    return count * tokens * columns * ITEM / MEMORY


def bytes_of(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2g} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def time_of(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.2g} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def both(count: float, seconds: float) -> str:
    return f"{bytes_of(count)}, {time_of(seconds)}"


def vocabulary(tokens: int = 8_192) -> Iterator[Line]:
    """The vocabulary split over ``TP`` ranks of a node: log-probs with entropy, and the gradient of hidden states."""
    for ranks in (2, 4, 8):
        others = ranks - 1
        merged = 4 * FLOAT * tokens * others
        scattered = tokens * WIDTH * ITEM * others / ranks  # of the hidden states, or of their gradient
        logits = tokens * VOCAB * ITEM * others / ranks
        yield [
            str(ranks),
            time_of(passes(tokens, VOCAB / ranks, 3)),
            both(merged, ring(merged, ranks, nodes=False)),
            both(2 * scattered, ring(2 * scattered, ranks, nodes=False)),
            both(2 * scattered, 2 * ring(scattered, ranks, nodes=False)),
            both(logits, ring(logits, ranks, nodes=False)),
        ]


def sequences() -> Iterator[Line]:
    """Sequences split over ``CP`` ranks, all columns on each: a loss from logits in one pass."""
    before, after = 4, 2  # old log-probs, mask, advantages, log-probs at the borders; log-probs and entropy
    for tokens in (131_072, 1_048_576):
        for ranks in (2, 8, 64):
            share = tokens * (ranks - 1) / ranks * FLOAT
            seconds = sum(ring(count * share, ranks, nodes=ranks > NODE) for count in (before, after))
            yield [
                f"{tokens:,}",
                str(ranks),
                both((before + after) * share, seconds),
                time_of(passes(tokens / ranks, VOCAB, 2)),
                f"{seconds / passes(tokens / ranks, VOCAB, 2):.1%}",
            ]


def steps() -> Iterator[Line]:
    """All at once, over thousands of ranks."""
    arrays = 5  # old log-probs, mask, advantages, log-probs, entropy
    for tp, cp, dp, tokens in (
        (8, 1, 256, 32_768),
        (8, 8, 64, 131_072),
        (8, 8, 512, 131_072),
        (8, 64, 32, 1_048_576),
    ):
        of_columns = 4 * FLOAT * tokens / cp * (tp - 1)
        of_tokens = arrays * FLOAT * tokens * (cp - 1) / cp
        seconds = ring(of_columns, tp, nodes=tp > NODE)
        seconds += ring(of_tokens, cp, nodes=tp * cp > NODE) if cp > 1 else 0
        numbers = (1 + 13 + 4) * 8  # denominator; sums and extremes of metrics
        seconds_of_numbers = tree(dp * cp) + tree(dp)
        yield [
            f"{tp * cp * dp:,}",
            f"{tp} x {cp} x {dp}",
            f"{tokens:,}",
            bytes_of(of_columns),
            bytes_of(of_tokens) if cp > 1 else "0",
            time_of(seconds),
            both(numbers, seconds_of_numbers),
            time_of(passes(tokens / cp, VOCAB / tp, 3)),
        ]


TABLES = (
    (
        "Vocabulary split over the ranks of a node, 8,192 tokens",
        (
            *("TP", "logits read twice, written once", "gather of log-probs", "sum of dHidden"),
            *("the same, sequence parallel", "instead: gather of the logits"),
        ),
        vocabulary,
    ),
    (
        "Sequences split, all columns on each rank, a window of four",
        ("tokens", "CP", "two gathers", "logits read once, written once", "gathers, of that"),
        sequences,
    ),
    (
        "Both, and the batch",
        (
            *("ranks", "TP x CP x DP", "tokens of a CP group", "over TP", "over CP", "time of both"),
            *("denominator and metrics, per step", "logits read twice, written once"),
        ),
        steps,
    ),
)


def note() -> str:
    return (
        f"**A model, not measured**: bytes that a rank receives, and times from assumed speeds. V = {VOCAB:,}, H = "
        f"{WIDTH:,}, bfloat16; {MEMORY / 1e12:.1f} TB/s of memory, {LINK / 1e9:.0f} GB/s between the {NODE} ranks of a "
        f"node, {NETWORK / 1e9:.0f} GB/s between nodes; {CALL * 1e6:.0f} us per call and {HOP * 1e6:.0f} us per step "
        "between nodes; nothing overlaps."
    )
