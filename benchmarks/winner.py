"""How far the interval of the fastest setting can be trusted, which its own pairs have chosen.

    make bench-winner                       # ten seconds on one core

Settings that are all equally fast are timed as a search times them: six pairs each, then those
that may be the fastest further, until that is known. Told is how often the 95 % interval of the
one that came out holds the speedup that they all have, and by how much it is overstated.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from accelsearch.latency import contender
from accelsearch.measurement import Latency

PAIRS, MAX_PAIRS, PRECISION = 6, 40, 0.03  # the product's
NOISES = (0.02, 0.06)  # standard deviations of a pair's log ratio
SETTINGS = (1, 10, 30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=400)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| noise of a pair | settings | interval holds the speedup | overstated by |")
    print("|---|---|---|---|")
    for noise in NOISES:
        for settings in SETTINGS:
            found = [winner(rng, noise, settings) for _ in range(options.runs)]
            intervals = [one.interval() for one in found]
            held = np.mean([ends is not None and ends[0] <= 1 <= ends[1] for ends in intervals])
            over = np.mean([one.speedup for one in found]) - 1
            print(f"| {noise:.0%} | {settings} | {held:.0%} | {over:.1%} |", flush=True)
    return 0


def winner(rng: np.random.Generator, noise: float, settings: int) -> Latency:
    """The fastest of so many settings, all of speedup 1, once it is known which that is."""
    timed = [rng.normal(0, noise, PAIRS) for _ in range(settings)]
    latencies = [_latency(one) for one in timed]
    while (place := contender(latencies, PRECISION, MAX_PAIRS)) is not None:
        more = min(len(timed[place]), MAX_PAIRS - len(timed[place]))
        timed[place] = np.concatenate([timed[place], rng.normal(0, noise, more)])
        latencies[place] = _latency(timed[place])
    return max(latencies, key=lambda one: one.speedup)


def _latency(ratios: NDArray[np.float64]) -> Latency:
    return Latency(tuple(np.exp(ratios).tolist()), (1.0,) * len(ratios))


if __name__ == "__main__":
    raise SystemExit(main())
