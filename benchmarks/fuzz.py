"""Mutated files, many of them: what becomes of each, the slowest, the one that took most memory.

    python benchmarks/fuzz.py --count 20000

Each mutation of a sound file is given to `report`, `load` and `verify`. It must be refused by an
error of tiedconv's, or give the very same weights, or, if it was forged with hashes that fit, be a
sound file of another digest; within a second of the processor and 200 MB for each of the three.
Results go to `benchmarks/results/fuzz.json`. Seeds are numbers from --start on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS / "fuzz"), str(TESTS / "helpers")]
RESULT = Path(__file__).parent / "results" / "fuzz.json"


def main() -> None:
    """Run, print what is wrong, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()

    import safetensors
    import torch
    from mutations import KINDS
    from trials import MEGABYTES, SECONDS, campaign, sound_files

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    start = time.process_time()
    tally = campaign(options.count, options.start)
    total: Counter[str] = sum(tally.outcomes.values(), Counter())
    result = {
        "mutations": sum(total.values()),
        "start": options.start,
        "of": [f"{s.name} ({len(s.data):,} bytes)" for s in sound_files()],
        "outcomes": dict(total.most_common()),
        "by_kind": {k: dict(tally.outcomes.get(k, Counter()).most_common()) for k in KINDS},
        "slowest": {"seconds": tally.slowest[0], "which": tally.slowest[1], "most": SECONDS},
        "memory": {"megabytes": tally.fattest[0], "which": tally.fattest[1], "most": MEGABYTES},
        "wrong": tally.wrong,
        "processor_seconds": round(time.process_time() - start),
        "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__},
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "by_kind"}, indent=2))
    if tally.wrong or tally.slowest[0] > SECONDS:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
