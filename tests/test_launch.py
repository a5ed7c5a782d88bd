"""Launching workers on this machine, and what becomes of those that end early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from accelsearch import claims
from accelsearch import launch as module
from accelsearch.claims import all_claims, all_workers
from accelsearch.errors import PlanError
from accelsearch.gpus import Gpu
from accelsearch.heartbeat import Worker
from accelsearch.launch import (
    Crew,
    Ended,
    Seat,
    _noted_interrupts,
    sbatch_options,
    seats_of,
    slurm_seats,
    warnings_of,
)
from accelsearch.storage import Outcome, engine, open_storage, read_studies
from tests.stored import new_database

FREE = Gpu(0, "GPU-aaa", "NVIDIA H100", 80000, 10, 0)
BUSY = Gpu(2, "GPU-ccc", "NVIDIA H100", 80000, 70000, 95)

PLAN = """
model = "shapes"
methods = [["deepcache"]]
budgets = [{ metric = "clip_score", max_loss = 0.0085 }]
[space]
cache_branch_id = { low = 0, high = 6 }  # the stand-in fails at 7, and three failures end a search
[search]
trials = 12
sampler = "grid"
max_retries = 1
"""


class Launch:
    """A launch in a process of its own, with a stand-in for the measurement."""

    def __init__(self, folder: Path, *options: str, url: str = "", **environment: str) -> None:
        self.folder = folder
        self.url = url or new_database(folder)
        self.connections = engine(open_storage(self.url))
        (folder / "plan.toml").write_text(PLAN)
        command = ["launch", str(folder / "plan.toml"), "--logs", str(folder / "logs"), *options]
        self.output = folder / "launch.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "accelsearch", *command],
            env={
                **os.environ,
                "ACCELSEARCH_STORAGE": self.url,
                "ACCELSEARCH_ARTIFACTS": str(folder / "artifacts"),
                "ACCELSEARCH_BENCH": "tests.standin:StandIn",
                "CUDA_VISIBLE_DEVICES": "",
                **environment,
            },
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def workers(self) -> list[Any]:
        rows = all_workers(self.connections)
        return [row for row in rows if not row.identity.name.endswith("launcher")]

    def await_trial(self, but: Sequence[int] = ()) -> Any:
        """A worker that measures, once there is one."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            begun = (claim for claim in all_claims(self.connections) if claim.age_s > 1)
            claimed = {claim.worker for claim in begun}
            for row in self.workers():
                if row.identity.id in claimed and row.identity.pid not in but:
                    return row.identity
            time.sleep(0.1)
        raise AssertionError(self.told())

    def wait(self) -> int:
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()

    def told(self) -> str:
        logs = sorted((self.folder / "logs").rglob("*.out"))
        return "\n".join([self.output.read_text(), *(log.read_text()[-2000:] for log in logs)])

    @property
    def trials(self) -> tuple[Any, ...]:
        (study,) = read_studies(open_storage(self.url))
        return study.trials


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    launches = []

    def start(*options: str, **more: str) -> Launch:
        launches.append(Launch(tmp_path, *options, **more))
        return launches[-1]

    yield start
    for launch in launches:
        launch.process.kill()


def measured(launch: Launch) -> Counter[tuple[Any, ...]]:
    return Counter(
        tuple(sorted(trial.params.items()))
        for trial in launch.trials
        if trial.outcome is not Outcome.INTERRUPTED and trial.reused_from is None
    )


def test_a_killed_worker_is_replaced_and_its_setting_measured_again(
    started: Callable[..., Launch],
) -> None:
    launch = started("--workers", "2", ACCELSEARCH_STANDIN_S="2")
    victim = launch.await_trial()
    os.kill(victim.pid, signal.SIGKILL)
    assert launch.wait() == 0, launch.told()
    assert "was killed" in launch.told()
    assert "replaced" in launch.told()
    assert len(measured(launch)) == 12
    assert set(measured(launch).values()) == {1}
    assert Outcome.RUNNING not in {trial.outcome for trial in launch.trials}
    assert all_workers(engine(open_storage(launch.url))) == ()


def test_an_interrupt_gives_the_running_trials_back(started: Callable[..., Launch]) -> None:
    launch = started("--workers", "1", ACCELSEARCH_STANDIN_S="30")
    worker = launch.await_trial()
    began = time.monotonic()
    os.killpg(launch.process.pid, signal.SIGINT)  # to all, as a terminal does
    assert launch.wait() == 130, launch.told()
    assert time.monotonic() - began < 20
    assert not Path(f"/proc/{worker.pid}").exists()
    (trial,) = launch.trials
    assert (trial.outcome, trial.reason, trial.lost) == (Outcome.INTERRUPTED, "interrupted", False)
    assert all_claims(engine(open_storage(launch.url))) == ()
    assert all_workers(engine(open_storage(launch.url))) == ()


def test_a_trial_that_hangs_is_tried_again_and_then_failed_with_its_reason(
    started: Callable[..., Launch],
) -> None:
    # The default setting is the first.
    launch = started("--workers", "1", "--trial-timeout-s", "5", ACCELSEARCH_STANDIN_HANGS="3,0")
    assert launch.wait() == 0, launch.told()
    first, again, *others = launch.trials
    assert (first.outcome, first.reason) == (Outcome.INTERRUPTED, "its trial took longer than 5 s")
    assert again.outcome is Outcome.FAILED
    assert again.reason == "its trial took longer than 5 s, 2 times in all"
    assert first.params == again.params == {"cache_interval": 3, "cache_branch_id": 0}
    assert len([trial for trial in others if trial.reused_from is None]) == 11
    assert launch.told().count("ended itself: its trial took longer than 5 s") == 2


def test_what_cannot_be_meant_is_told_before_anything_starts(
    started: Callable[..., Launch],
) -> None:
    launch = started("--gpus", "0")
    assert launch.wait() == 2
    assert "which are none, got 0" in launch.output.read_text()
    assert not (launch.folder / "logs").exists()


def test_logs_that_cannot_be_written_are_told_in_one_line(
    started: Callable[..., Launch], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    launch = started("--logs", str(tmp_path / "file" / "logs"))
    assert launch.wait() == 2
    said = launch.output.read_text().splitlines()
    assert said[-1].startswith("accelsearch: the logs' folder must be writable, got "), said
    assert said[-1].endswith("Not a directory; name another with --logs")
    assert "Traceback" not in launch.output.read_text()


# Seats


def test_each_gpu_has_a_seat_with_it_alone_and_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module, "cores", lambda: 10)
    seats = seats_of((FREE, BUSY), workers_per_gpu=2, cpu_workers=1)
    assert [seat.name for seat in seats] == ["gpu0", "gpu2", "gpu0-1", "gpu2-1"]
    assert [seat.environment["CUDA_VISIBLE_DEVICES"] for seat in seats] == [
        "GPU-aaa",
        "GPU-ccc",
        "GPU-aaa",
        "GPU-ccc",
    ]
    assert {seat.environment["OMP_NUM_THREADS"] for seat in seats} == {"2"}
    assert len({seat.environment["TORCHINDUCTOR_CACHE_DIR"] for seat in seats}) == 4


def test_without_a_gpu_there_are_as_many_seats_as_asked_for() -> None:
    seats = seats_of((), workers_per_gpu=1, cpu_workers=3)
    assert [seat.name for seat in seats] == ["cpu0", "cpu1", "cpu2"]
    assert {seat.environment["CUDA_VISIBLE_DEVICES"] for seat in seats} == {""}


def test_the_threads_that_the_user_has_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (seat,) = seats_of((FREE,), 1, 1)
    assert seat.environment["OMP_NUM_THREADS"] == "3"


def test_what_disturbs_the_timing_is_warned_of() -> None:
    assert warnings_of((FREE,), 1, 1) == []
    assert warnings_of((), 1, 1) == []
    (shared,) = warnings_of((FREE,), 2, 1)
    assert "2 workers share each GPU" in shared
    (used,) = warnings_of((FREE, BUSY), 1, 1)
    assert used == "GPU 2 is in use by others (70000 of 80000 MiB, 95 % load)"
    assert "share the CPU" in warnings_of((), 1, 4)[0]


def test_slurm_is_asked_for_what_it_can_give() -> None:
    assert [seat.name for seat in slurm_seats("all", 1, 2, "postgresql://h/d")] == ["job0", "job1"]
    with pytest.raises(PlanError, match="all or none on Slurm"):
        slurm_seats("0,2", 1, 1, "postgresql://h/d")
    with pytest.raises(PlanError, match="must be 1 on Slurm"):
        slurm_seats("all", 2, 1, "postgresql://h/d")
    with pytest.raises(PlanError, match="SQLite is for one machine"):
        slurm_seats("all", 1, 1, "sqlite:///x.db")


def test_options_of_sbatch_are_names_and_values() -> None:
    assert sbatch_options(["qos=low", "--comment=a=b"]) == {"qos": "low", "comment": "a=b"}
    with pytest.raises(PlanError, match="NAME=VALUE"):
        sbatch_options(["exclusive"])


# Who is replaced


class Job:
    """A worker that has ended with this code, or is still alive."""

    id = "7"

    def __init__(self, code: int | None, *, alive: bool = False) -> None:
        self._code, self._alive = code, alive
        self.killed = False

    def alive(self) -> bool:
        return self._alive

    def code(self) -> int | None:
        return self._code

    def stop(self) -> None: ...

    def kill(self) -> None:
        self.killed = True


class Told:
    def __init__(self) -> None:
        self.endings: list[Ended] = []

    def shown(self, crew: Crew) -> None: ...

    def ended(self, ended: Ended) -> None:
        self.endings.append(ended)


class Launcher:
    """One seat of a launch, seen to step by step; whoever sits on it leaves its row behind."""

    def __init__(self, folder: Path) -> None:
        self.storage = open_storage(new_database(folder))
        self.crew, self.told = Crew("x", [Seat("gpu0", "GPU 0", {})]), Told()
        (self.place,) = self.crew.places
        self._worker = Worker(engine(self.storage), name="x/launcher")

    def sits_down(self, trials: int) -> None:
        """A worker on the seat has a row, which says how many trials it has finished."""
        worker = Worker(engine(self.storage), name=self.crew.worker(self.place.seat)).identity
        claims.add_worker(engine(self.storage), worker)
        claims.beat(engine(self.storage), worker.id, trials)

    def falls_silent(self) -> None:
        """All rows are as old as those of workers that hang, or are no more."""
        with engine(self.storage).begin() as connection:
            connection.exec_driver_sql("UPDATE accelsearch_workers SET seen = seen - 1000")

    def looks(self, job: Any = None) -> None:
        """Once around: what is there is looked at, and `job` started where nobody works."""
        self.place.start_at = 0
        module._look(self.crew, self.storage, self._worker)
        module._tend(self.place, self.crew, lambda seat, work: job, (), self.told)


def ends(
    folder: Path, *codes: int | None, trials: Mapping[int, int] | None = None
) -> tuple[list[Ended], int]:
    """What is done when workers on one seat end with these codes, and the trials counted.

    Those whose number is in `trials` have finished as many; the others end before they have a row.
    """
    launcher = Launcher(folder)
    for number, code in enumerate(codes):
        if launcher.place.finished:
            break
        launcher.looks(Job(code))
        if number in (trials or {}):
            launcher.sits_down((trials or {})[number])
        launcher.looks()
    return launcher.told.endings, launcher.crew.trials


@pytest.mark.parametrize("code", [0, 1])
def test_a_worker_that_is_done_is_not_replaced(tmp_path: Path, code: int) -> None:
    ((ended,), _) = ends(tmp_path, code, 0)
    assert not ended.replaced


@pytest.mark.parametrize("code", [None, 2, 75, 130])
def test_a_worker_that_ends_early_is_replaced_until_it_is_futile(
    tmp_path: Path, code: int | None
) -> None:
    endings, _ = ends(tmp_path, code, code, code, code)
    assert [ended.replaced for ended in endings] == [True, True, False]
    assert "3 in a row ended without a trial" in endings[-1].told


def test_a_worker_that_measures_is_always_replaced(tmp_path: Path) -> None:
    endings, trials = ends(tmp_path, None, None, None, None, None, trials={2: 1})
    assert [ended.replaced for ended in endings] == [True, True, True, True, True]
    assert trials == 1


def test_trials_of_a_killed_worker_are_not_counted_again_for_those_after_it(
    tmp_path: Path,
) -> None:
    endings, trials = ends(tmp_path, None, 2, 2, 2, 2, trials={0: 3})
    assert [ended.replaced for ended in endings] == [True, True, True, False]
    assert trials == 3


def test_a_worker_is_killed_for_its_own_silence_alone(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    launcher.looks(Job(None))
    launcher.sits_down(1)
    launcher.looks()  # it was killed
    launcher.falls_silent()
    job = Job(None, alive=True)
    launcher.looks(job)
    launcher.looks()
    assert not job.killed  # it waits in a queue, or still imports
    launcher.sits_down(0)
    launcher.looks()
    assert not job.killed
    launcher.falls_silent()
    launcher.looks()
    assert job.killed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_is_lost_in_a_destructor_is_noted() -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # for it to arrive in here

    before = signal.getsignal(signal.SIGINT)
    with _noted_interrupts() as interrupts:
        Dying()
        assert interrupts == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before
