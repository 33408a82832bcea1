"""Compare the geometry (cut, fuse, slice_dim, union_volume …) with its brute-force oracle over random small cases.

    python scripts/campaign_geometry.py --cases 1000000 --seed 1

Prints each case that fails with the number that draws it again (``geometry_oracle.check(NUMBER)``); exit code 1 if any did.
"""

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

BATCH = 2000


def run(first: int, count: int) -> tuple[Counter, list[tuple[int, str]]]:
    """The cases `first` to `first + count`: how many of each kind, and those that failed."""
    from geometry_oracle import check

    kinds, failed = Counter(), []
    for number in range(first, first + count):
        try:
            kinds[check(number)] += 1
        except Exception:  # noqa: BLE001  whatever fails is reported
            failed.append((number, traceback.format_exc()))
    return kinds, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1, help="other seeds draw other cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    began, kinds, failed = time.monotonic(), Counter(), []
    starts = range(0, options.cases, BATCH)
    with ProcessPoolExecutor(options.jobs) as pool:
        base = options.seed << 32
        counts = [min(BATCH, options.cases - start) for start in starts]
        for own, wrong in pool.map(run, [base + start for start in starts], counts):
            kinds.update(own)
            for number, text in wrong[:3]:
                print(f"case {number} failed:\n{text}", flush=True)
            failed += wrong
    seconds = time.monotonic() - began
    of = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{options.cases:,} cases in {seconds:.0f} s ({options.cases / seconds:,.0f} a second): {of}; {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
