"""How long the report of a large study takes to make, and how large it is.

    python benchmarks/report.py

Stores 500 trials of 100 prompts in a SQLite file, with 512 px images of the best, and makes their
report as a user does, by the command in a process of its own. The measurements are drawn from a
formula: what is measured here is the report.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from accelsearch.budget import violation
from accelsearch.configuration import Budget, Configuration
from accelsearch.measurement import Environment, Latency, Measurement, Scores, score_loss
from accelsearch.pictures import keep_pairs, telling
from accelsearch.storage import Outcome, create_study, open_storage, record

IMAGES, SIDE = 100, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=500)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as folder:
        url = store(Path(folder), trials)
        print(f"{trials} trials of {IMAGES} prompts, images of {SIDE} px; {os.cpu_count()} cores")
        for kind in ("html", "md", "png", "csv"):
            out = Path(folder) / f"report.{kind}"
            began, before = time.monotonic(), cpu_s()
            subprocess.run(
                [
                    *(sys.executable, "-m", "accelsearch", "report", "--storage", url),
                    *("--artifacts", str(Path(folder) / "artifacts"), "--out", str(out)),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            took_s, worked_s = time.monotonic() - began, cpu_s() - before
            size = out.stat().st_size / 1e6
            print(f"{kind:5} {took_s:5.1f} s ({worked_s:.1f} s of a core) {size:6.2f} MB")


def cpu_s() -> float:
    """What all ended child processes have worked, which a busy machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def store(folder: Path, trials: int) -> str:
    """The URL of a new database with one study; a trial that is a new best keeps its images."""
    url = f"sqlite:///{folder}/trials.db"
    configuration = Configuration(
        model="hub/sd15",
        scheduler="DDIMScheduler",
        steps=50,
        methods=("deepcache", "tgate"),
        budgets=(Budget(metric="clip_score", max_loss=0.02),),
        prompts=tuple(f"a photo of subject {number}, in some detail" for number in range(IMAGES)),
        prompts_name="subjects",
        height=SIDE,
        width=SIDE,
    )
    environment = Environment("a GPU", "cuda", "570.86", "12.8", 0, "3.11.9", {"torch": "2.13.0"})
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = create_study(open_storage(url), configuration, environment, sampler)
    chance, best = random.Random(0), 0.0
    for _ in range(trials):
        measurement = drawn(chance)
        speedup = measurement.latency.speedup
        broken = violation(score_loss(measurement.scores[0]), configuration.budgets[0])
        outcome = Outcome.FEASIBLE if broken <= 0 else Outcome.OVER_BUDGET
        trial = study.ask()
        record(
            trial,
            outcome,
            "drawn",
            measurement=measurement,
            violations={"clip_score": broken},
            seconds={"latency": 20.0, "images": 40.0, "scores": 2.0},
        )
        if outcome is Outcome.FEASIBLE and speedup > best:
            best = speedup
            places = telling(measurement, configuration, IMAGES)
            baseline, accelerated = pictures(len(places))
            keep_pairs(
                folder / "artifacts",
                trial,
                baseline,
                accelerated,
                [configuration.order[place] for place in places],
            )
        if outcome is Outcome.FEASIBLE:
            study.tell(trial, speedup)
        else:
            study.tell(trial, state=TrialState.PRUNED)
    return url


def drawn(chance: random.Random) -> Measurement:
    """A setting whose speedup and loss rise together, with noise in both."""
    params = {
        "cache_interval": chance.randint(2, 9),
        "cache_branch_id": chance.randint(0, 11),
        "gate_step": chance.randint(10, 50),
        "sp_interval": chance.randint(1, 5),
        "fi_interval": chance.randint(1, 5),
        "warm_up": chance.randint(0, 5),
    }
    pace = 1 + 0.15 * params["cache_interval"] + 0.6 * (1 - params["gate_step"] / 50)
    ratios = [pace * math.exp(chance.gauss(0, 0.02)) for _ in range(20)]
    loss = 0.004 * params["cache_interval"] - 0.001 * params["cache_branch_id"]
    baseline = tuple(chance.uniform(25, 38) for _ in range(IMAGES))
    accelerated = tuple(one * (1 - loss) + chance.gauss(0, 0.4) for one in baseline)
    return Measurement(
        params=params,
        latency=Latency(tuple(2 * ratio for ratio in ratios), (2.0,) * 20),
        scores=(
            Scores("clip_score", baseline, accelerated),
            Scores("psnr", None, tuple(chance.uniform(18, 30) for _ in baseline)),
            Scores("ssim", None, tuple(chance.uniform(0.6, 0.95) for _ in baseline)),
        ),
        peak_memory_bytes=None,
        baseline_peak_memory_bytes=None,
        implementation={},
    )


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with detail at every scale, as photos have, and the same a little changed."""
    torch.manual_seed(count)
    found = torch.zeros(count, 3, SIDE, SIDE)
    for side in (4, 16, 64, 256):
        noise = torch.randn(count, 3, side, side) * 160 / side**0.5
        found += torch.nn.functional.interpolate(noise, size=(SIDE, SIDE), mode="bicubic")
    changed = found + torch.nn.functional.interpolate(
        torch.randn(count, 3, 32, 32) * 12, size=(SIDE, SIDE), mode="bicubic"
    )
    return (found + 128).clamp(0, 255).byte(), (changed + 128).clamp(0, 255).byte()


if __name__ == "__main__":
    main()
