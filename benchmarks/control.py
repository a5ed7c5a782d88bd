"""The A/A control: how often the 95 % interval of no acceleration at all holds 1.00.

    make bench

Times the demo plan's pipeline against itself, again and again, with the product's own
measurement. A method that cannot tell nothing from nothing cannot tell anything from something:
exit code 1 unless 17 of 20 intervals hold 1.00 and none is wider than 5 % to either side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accelsearch.configuration import load_plan
from accelsearch.objective import Bench, environment_of

PLAN = Path(__file__).parent.parent / "studies" / "shapes-demo.toml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    configuration = load_plan(options.plan, {"methods": [[]], "space": {}}).configurations()[0]
    environment = environment_of(configuration)
    print(f"{environment.device}, {environment.versions}")
    bench = Bench(configuration)
    held, widest = 0, 0.0
    for run in range(options.runs):
        latency = bench.measure({}, score=False).measurement.latency
        interval = latency.interval()
        assert interval is not None, "the plan's min_pairs must be at least 6"
        low, high = interval
        held += low <= 1 <= high
        widest = max(widest, (high - low) / 2)
        print(
            f"run {run + 1:2}  {latency.speedup:.3f}x  [{low:.3f}, {high:.3f}]  "
            f"{len(latency.baseline_s)} pairs, baseline {latency.baseline_median_s:.3f} s",
            flush=True,
        )
    print(f"{held} of {options.runs} intervals hold 1.00; the widest is +-{100 * widest:.1f} %")
    return 0 if held >= 0.85 * options.runs and widest <= 0.05 else 1


if __name__ == "__main__":
    raise SystemExit(main())
