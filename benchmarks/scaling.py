"""How many workers one PostgreSQL serves: the measurement is replaced by a wait of 10 s.

The sampler is TPE: the guided search is made for some dozens of trials, not for thousands. Each
worker is `accelsearch worker` in a process of its own, with everything it does but the
pipeline: sampler, claims, trials, heartbeats. They work on one study that holds 2,000 trials.
Efficiency is 10 s over the mean time from the beginning of one wait to that of the next, while all
workers are at work; overhead is what that time is longer than 10 s. CPU and statements a trial are
counted in the workers themselves; the server's CPU is that of all its processes.

    python benchmarks/scaling.py [--quick] [--workers 1,8,64] [--trials 2000] [--seconds 90]
                                 [--postgres FOLDER]

PostgreSQL's binaries are those of --postgres, of this machine, or of the package `pgserver`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import optuna
import psutil
import sqlalchemy
from optuna.trial import TrialState
from sqlalchemy.orm import Session

from accelsearch import rows
from accelsearch.configuration import load_plan
from accelsearch.measurement import Environment, Latency, Measurement, ParamValue, Scores
from accelsearch.methods import Parameter, starts
from accelsearch.objective import Result
from accelsearch.storage import Outcome, create_study, engine, open_storage, running_trial
from accelsearch.turns import _distribution

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "storage" / "postgres.sh"
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
        self._statements = 0
        # Of every engine of this process, whoever has made it.
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", self._count)

    def _count(self, *of: Any) -> None:
        self._statements += 1

    @staticmethod
    def environment(configuration: Any) -> Environment:
        return Environment("a wait", "cpu", None, None, 1, "", {})

    def starts(
        self, known: Iterable[Mapping[str, ParamValue]] = (), *, alone: bool = True
    ) -> list[dict[str, ParamValue]]:
        return starts(self.space, known, alone=alone)

    def measure(self, params: Mapping[str, ParamValue], **question: Any) -> Result:
        with self._log.open("a") as log:
            log.write(
                f"{os.getpid()} {time.time():.3f} {time.process_time():.4f} {self._statements}\n"
            )
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
    space = {one.name: _distribution(one) for one in Waiting.space}
    with Session(engine(study._storage)) as session:
        for _ in range(count):
            params: dict[str, Any] = {
                "cache_interval": chance.randint(2, 300),
                "cache_branch_id": chance.randint(0, 11),
                "gate": chance.random(),
            }
            result = result_of(params)
            speedup = result.measurement.latency.speedup
            feasible = result.outcome is Outcome.FEASIBLE
            template = running_trial(params, space, "filled")
            trial_id = rows.add_running(session, study._study_id, template)._trial_id
            told = {
                "reason": result.reason,
                "seconds": result.seconds,
                "measurement": result.measurement.to_dict(),
                "outcome": result.outcome.value,
            }
            constraints = {"constraints:clip_score": result.violations["clip_score"]}
            rows.write(session, trial_id, told, constraints, speedup)
            state = TrialState.COMPLETE if feasible else TrialState.PRUNED
            rows.end(session, trial_id, state, (speedup,))
        session.commit()


@dataclass(frozen=True)
class Begin:
    """The beginning of one wait: when, and what its worker has spent so far."""

    time: float
    cpu_s: float
    statements: int


def run(
    url: str, plan: Path, workers: int, seconds: float, folder: Path, server: psutil.Process
) -> str:
    """One row of the table."""
    log, errors = folder / f"{workers}.log", folder / f"{workers}.err"
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
            stderr=errors.open("a"),
        )
        for _ in range(workers)
    ]
    try:
        while len(begins(log)) < workers:
            time.sleep(0.5)
            assert all(one.poll() is None for one in processes), errors.read_text()[-2000:]
        # The last ones to come have disturbed the first trials of the others.
        time.sleep(2 * WAIT_S)
        since, server_s = time.time(), cpu_of(server)
        time.sleep(seconds)
        until, server_s = time.time(), cpu_of(server) - server_s
        load = os.getloadavg()[0]
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
    turns = [
        (
            later.time - earlier.time,
            later.cpu_s - earlier.cpu_s,
            later.statements - earlier.statements,
        )
        for moments in begins(log).values()
        for earlier, later in pairwise(moments)
        if since <= later.time <= until
    ]
    assert len(turns) > 1, f"--seconds must allow two trials a worker, got {seconds:g}"
    took, cpu_s, statements = zip(*turns, strict=True)
    p95_s = quantiles(took, n=20, method="inclusive")[-1]
    return (
        f"| {workers} | {len(turns)} | {WAIT_S / mean(took):.3f} "
        f"| {1000 * (mean(took) - WAIT_S):.0f} ms | {1000 * (median(took) - WAIT_S):.0f} ms "
        f"| {1000 * (p95_s - WAIT_S):.0f} ms | {1000 * mean(cpu_s):.0f} ms "
        f"| {1000 * server_s / len(turns):.0f} ms | {mean(statements):.0f} | {load:.1f} |"
    )


HEAD = """\
| workers | trials | efficiency | overhead | median | 95 % below | worker's CPU a trial \
| server's CPU a trial | statements a trial | load |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def begins(log: Path) -> dict[int, list[Begin]]:
    found = defaultdict(list)
    for line in log.read_text().splitlines():
        pid, moment, cpu_s, statements = line.split()
        found[int(pid)].append(Begin(float(moment), float(cpu_s), int(statements)))
    return found


def cpu_of(server: psutil.Process) -> float:
    """Seconds of CPU of a server's processes; those that have ended are in the first one's sum."""
    own = server.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in server.children():
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return float(total)


def binaries(named: str | None) -> str | None:
    """The folder of PostgreSQL's binaries; None where `postgres.sh` is to find them."""
    if named is not None or shutil.which("pg_config"):
        return named
    package = importlib.util.find_spec("pgserver")
    if package is None or package.origin is None:
        return None
    return str(Path(package.origin).parent / "pginstall" / "bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", help="default 1,4,16,32,64")
    parser.add_argument("--trials", type=int, default=2000, help="in the study at the start")
    parser.add_argument("--seconds", type=float, help="of each row, default 90")
    parser.add_argument("--postgres", metavar="FOLDER", help="of PostgreSQL's binaries")
    parser.add_argument("--quick", action="store_true", help="1, 8 and 64 workers, 60 s each")
    options = parser.parse_args()
    workers = options.workers or ("1,8,64" if options.quick else "1,4,16,32,64")
    seconds = options.seconds or (60 if options.quick else 90)
    found = binaries(options.postgres)
    environment = {**os.environ, **({} if found is None else {"POSTGRES_BIN": found})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # the server may run as another user
        pg = folder / "pg"
        started = [str(SERVER), "start", str(pg)]
        url = subprocess.check_output(started, text=True, env=environment).strip()
        try:
            plan = folder / "plan.toml"
            plan.write_text(PLAN)
            began = time.monotonic()
            fill(url, plan, options.trials)
            version = sqlalchemy.create_engine(url).connect().exec_driver_sql("SHOW server_version")
            print(
                f"{os.cpu_count()} cores, PostgreSQL {version.scalar()}, {options.trials} trials "
                f"stored in {time.monotonic() - began:.0f} s\n",
                flush=True,
            )
            server = psutil.Process(int((pg / "data" / "postmaster.pid").read_text().split()[0]))
            print(HEAD, flush=True)
            for count in map(int, workers.split(",")):
                print(run(url, plan, count, seconds, folder, server), flush=True)
        finally:
            subprocess.run([str(SERVER), "stop", str(pg)], check=False, env=environment)


if __name__ == "__main__":
    main()
