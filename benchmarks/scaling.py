"""How many workers one PostgreSQL serves: the measurement is replaced by a wait of 10 s.

The sampler is TPE: the guided search is made for some dozens of trials, not for thousands. Each
worker is `accelsearch worker` in a process of its own, with everything it does but the
pipeline: sampler, claims, trials, heartbeats. They work on one study that holds 2,000 trials.
Efficiency is 10 s over the mean time from the beginning of one wait to that of the next, while all
workers are at work; overhead is what that time is longer than 10 s.

    python benchmarks/scaling.py [--workers 1,8,64] [--trials 2000] [--seconds 90]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from accelsearch.configuration import load_plan
from accelsearch.measurement import Environment, Latency, Measurement, ParamValue, Scores
from accelsearch.methods import Parameter, starts
from accelsearch.objective import Result
from accelsearch.storage import Outcome, create_study, open_storage
from accelsearch.turns import _distribution

ROOT = Path(__file__).parent.parent
WAIT_S = 10.0
PLAN = """
model = "shapes"
methods = [["deepcache"]]
budgets = [{ metric = "clip_score", max_loss = 0.01 }]
[search]
trials = 1000000
sampler = "tpe"
"""


class Waiting:
    """A bench that waits; its results depend on the setting alone, and it needs no torch."""

    space = (
        Parameter("cache_interval", "int", 3, "", "", low=2, high=300),
        Parameter("cache_branch_id", "int", 0, "", "", low=0, high=11),
        Parameter("gate", "float", 0.5, "", "", low=0.0, high=1.0),
    )

    def __init__(self, configuration: Any, say: Callable[[str], None]) -> None:
        self._log = Path(os.environ["ACCELSEARCH_BENCHMARK_LOG"])

    @staticmethod
    def environment(configuration: Any) -> Environment:
        return Environment("a wait", "cpu", None, None, 1, "", {})

    def starts(self, known: Iterable[Mapping[str, ParamValue]] = ()) -> list[dict[str, ParamValue]]:
        return starts(self.space, known)

    def measure(self, params: Mapping[str, ParamValue], **question: Any) -> Result:
        with self._log.open("a") as log:
            log.write(f"{os.getpid()} {time.time():.3f}\n")
        time.sleep(WAIT_S)
        return result_of(params)


def result_of(params: Mapping[str, ParamValue]) -> Result:
    interval = float(params["cache_interval"])
    loss = 0.0002 * interval * (1.5 - float(params["gate"]))
    pairs = 12
    return Result(
        outcome=Outcome.FEASIBLE if loss < 0.01 else Outcome.OVER_BUDGET,
        reason=f"loss {loss:.4f}",
        measurement=Measurement(
            dict(params),
            Latency((1 + 0.01 * interval,) * pairs, (1.0,) * pairs),
            (Scores("clip_score", (50.0,) * 24, (50 * (1 - loss),) * 24),),
            None,
            None,
            {"deepcache": "0"},
        ),
        losses={"clip_score": loss},
        violations={"clip_score": (loss - 0.01) / 0.01},
        seconds={"latency": WAIT_S},
        images=None,
    )


def fill(url: str, plan: Path, count: int) -> None:
    """Store trials as a search leaves them."""
    (configuration,) = load_plan(plan).configurations()
    study = create_study(
        open_storage(url),
        configuration,
        Waiting.environment(configuration),
        optuna.samplers.RandomSampler(),
    )
    chance = random.Random(0)
    for _ in range(count):
        params: dict[str, Any] = {
            "cache_interval": chance.randint(2, 300),
            "cache_branch_id": chance.randint(0, 11),
            "gate": chance.random(),
        }
        result = result_of(params)
        speedup = result.measurement.latency.speedup
        feasible = result.outcome is Outcome.FEASIBLE
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if feasible else TrialState.PRUNED,
                params=params,
                distributions={one.name: _distribution(one) for one in Waiting.space},
                value=speedup,
                intermediate_values={0: speedup},
                user_attrs={
                    "worker": "filled",
                    "reason": result.reason,
                    "seconds": result.seconds,
                    "measurement": result.measurement.to_dict(),
                    "outcome": result.outcome.value,
                },
                system_attrs={"constraints:clip_score": result.violations["clip_score"]},
            )
        )


def run(url: str, plan: Path, workers: int, seconds: float, folder: Path) -> dict[str, float]:
    log = folder / f"{workers}.log"
    log.touch()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "accelsearch", "worker", str(plan)],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                "ACCELSEARCH_STORAGE": url,
                "ACCELSEARCH_ARTIFACTS": str(folder / "artifacts"),
                "ACCELSEARCH_BENCH": "benchmarks.scaling:Waiting",
                "ACCELSEARCH_BENCHMARK_LOG": str(log),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{workers}.err").open("a"),
        )
        for _ in range(workers)
    ]
    try:
        while len(begins(log)) < workers:
            time.sleep(0.5)
            assert all(one.poll() is None for one in processes), (
                folder / f"{workers}.err"
            ).read_text()[-2000:]
        # The last ones to come have disturbed the first trials of the others.
        time.sleep(2 * WAIT_S)
        since, cpu_s = time.time(), sum(cpu_of(one.pid) for one in processes)
        time.sleep(seconds)
        until, cpu_s = time.time(), sum(cpu_of(one.pid) for one in processes) - cpu_s
        load = os.getloadavg()[0]
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
    turns = [
        later - earlier
        for moments in begins(log).values()
        for earlier, later in pairwise(moments)
        if since <= later <= until
    ]
    return {
        "workers": workers,
        "trials": len(turns),
        "efficiency": WAIT_S / mean(turns),
        "overhead_s": mean(turns) - WAIT_S,
        "overhead_p95_s": quantiles(turns, n=20)[-1] - WAIT_S,
        "cpu_s": cpu_s / max(len(turns), 1),
        "load": load,
    }


def begins(log: Path) -> dict[int, list[float]]:
    found = defaultdict(list)
    for line in log.read_text().splitlines():
        pid, moment = line.split()
        found[int(pid)].append(float(moment))
    return found


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", default="1,4,16,32,64")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=90)
    options = parser.parse_args()
    server = ROOT / "storage" / "postgres.sh"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # the server may run as another user
        url = subprocess.check_output([server, "start", folder / "pg"], text=True).strip()
        try:
            plan = folder / "plan.toml"
            plan.write_text(PLAN)
            began = time.monotonic()
            fill(url, plan, options.trials)
            print(f"{options.trials} trials stored in {time.monotonic() - began:.0f} s", flush=True)
            print("| workers | trials | efficiency | overhead | 95 % below | CPU a trial | load |")
            print("|---:|---:|---:|---:|---:|---:|---:|", flush=True)
            for workers in map(int, options.workers.split(",")):
                found = run(url, plan, workers, options.seconds, folder)
                print(
                    f"| {workers} | {found['trials']} | {found['efficiency']:.3f} "
                    f"| {1000 * found['overhead_s']:.0f} ms "
                    f"| {1000 * found['overhead_p95_s']:.0f} ms "
                    f"| {1000 * found['cpu_s']:.0f} ms | {found['load']:.1f} |",
                    flush=True,
                )
        finally:
            subprocess.run([server, "stop", folder / "pg"], check=False)


if __name__ == "__main__":
    main()
