"""``python -m fuzz --seconds 60 --seed 0``: half of the time for each kind of call; stops at the first fault.

With ``--verbose`` every call is named before it is made, for a sanitizer ends the process.
"""

from __future__ import annotations

import argparse
import random
import time

import torch

from . import broken, oracles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="native", choices=("native", "triton"))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)

    counts = {"broken": 0, "refused": 0, "checked": 0}
    rng, end = random.Random(options.seed), time.monotonic() + options.seconds / 2
    while time.monotonic() < end:
        call = broken.broken(rng)
        if options.verbose:
            print(broken.describe(call), flush=True)
        counts["broken"] += 1
        counts["refused"] += broken.run(call, options.backend) is not None
    rng = random.Random(f"oracles {options.seed}")  # the same calls however many came before
    end += options.seconds / 2
    while time.monotonic() < end:
        oracles.check(rng, options.backend)
        counts["checked"] += 1
    print(f"seed {options.seed}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
