"""Many workers at once: one process for each GPU of this machine, or jobs on a Slurm cluster.

Whichever worker ends before the plan is done is replaced; one that ends again and again without a
trial is given up. What was measured is in the database, whatever happens here.
"""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from optuna.storages import BaseStorage

from accelsearch.claims import WorkerRow, all_workers
from accelsearch.errors import PlanError, UnsupportedError
from accelsearch.gpus import Gpu, cores
from accelsearch.heartbeat import GRACE_S, Worker
from accelsearch.jobs import WorkerJob
from accelsearch.reconcile import reconcile_all
from accelsearch.storage import engine, make_folder

__all__ = [
    "Crew",
    "Ended",
    "Seat",
    "Slurm",
    "Watcher",
    "launch",
    "sbatch_options",
    "seats_of",
    "slurm_seats",
    "warnings_of",
]

_FUTILE = 3  # workers in a row that may end without a trial
_LONGEST_PAUSE_S = 30.0
_KILL_S = 60.0  # after which a worker that was asked to stop is killed
_YEARS_MIN = 5_000_000  # no limit


@dataclass(frozen=True)
class Seat:
    """The place of one worker, whoever sits on it: its name, its GPU and its environment."""

    name: str
    device: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Slurm:
    """What a Slurm job asks for; `options` are any of sbatch, by their long names."""

    partition: str | None = None
    time_min: int = 60
    gpus: int = 1
    cpus: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Ended:
    """How a worker ended: its exit code, None where it was killed; and what was done about it."""

    seat: str
    code: int | None
    told: str
    replaced: bool


class Watcher(Protocol):
    """Who is told how a launch gets on."""

    def shown(self, crew: Crew) -> None: ...

    def ended(self, ended: Ended) -> None: ...


class _Job(Protocol):
    """A worker that was started: alive until its exit code is known, or that it has none."""

    id: str

    def alive(self) -> bool: ...

    def code(self) -> int | None: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


@dataclass
class _Place:
    seat: Seat
    job: _Job | None = None
    trials: int = 0  # of workers that have left
    at_work: WorkerRow | None = None
    left: set[str] = field(default_factory=set)  # rows of workers that have left
    futile: int = 0
    start_at: float = 0.0
    finished: bool = False
    failed: str = ""


class Crew:
    """The workers of one launch, as they are now."""

    def __init__(self, name: str, seats: Sequence[Seat]) -> None:
        self.name = name
        self.began = time.monotonic()
        self.places = [_Place(seat) for seat in seats]

    def worker(self, seat: Seat) -> str:
        """What the worker on a seat is called in the database."""
        return f"{self.name}/{seat.name}"

    @property
    def trials(self) -> int:
        now = (place.at_work.trials for place in self.places if place.at_work is not None)
        return sum(place.trials for place in self.places) + sum(now)


def seats_of(gpus: Sequence[Gpu], workers_per_gpu: int, cpu_workers: int) -> list[Seat]:
    """A seat for each worker: on the GPUs, or, without one, `cpu_workers` on the CPU."""
    places: list[tuple[str, Gpu | None]] = [
        (f"gpu{gpu.index}" + (f"-{number}" if number else ""), gpu)
        for number in range(workers_per_gpu)
        for gpu in gpus
    ] or [(f"cpu{number}", None) for number in range(cpu_workers)]
    threads = str(max(1, cores() // len(places)))
    return [
        Seat(name, "CPU" if gpu is None else f"GPU {gpu.index}", _environment(name, gpu, threads))
        for name, gpu in places
    ]


def slurm_seats(gpus: str, workers_per_gpu: int, jobs: int, storage: str) -> list[Seat]:
    """A seat for each Slurm job, whose GPU and cores are for Slurm to choose.

    Raises:
        PlanError: GPUs are chosen by number, or shared; or a file is the storage.
    """
    if gpus not in ("all", "none"):
        raise PlanError(f"--gpus must be all or none on Slurm, which chooses itself, got {gpus!r}")
    if workers_per_gpu != 1:
        raise PlanError(
            "--workers-per-gpu must be 1 on Slurm; share GPUs with its own options, "
            "such as --gpus none --sbatch gres=shard:1"
        )
    if storage.startswith("sqlite"):
        raise PlanError(
            "--storage must be a server's URL on Slurm, such as postgresql://user@host/db: "
            "SQLite is for one machine; `make postgres` starts a server"
        )
    return [
        Seat(name, "Slurm", {"TORCHINDUCTOR_CACHE_DIR": str(_caches() / name)})
        for name in (f"job{number}" for number in range(jobs))
    ]


def warnings_of(gpus: Sequence[Gpu], workers_per_gpu: int, cpu_workers: int) -> list[str]:
    """What will disturb the timing."""
    told = []
    if gpus and workers_per_gpu > 1:
        told.append(
            f"{workers_per_gpu} workers share each GPU: they slow each other down, "
            "and the speedups that they measure with it"
        )
    if not gpus and cpu_workers > 1:
        told.append(f"{cpu_workers} workers share the CPU: its caches and memory are not divided")
    for gpu in gpus:
        if not gpu.free:
            told.append(
                f"GPU {gpu.index} is in use by others "
                f"({gpu.used_mib} of {gpu.memory_mib} MiB, {gpu.load} % load)"
            )
    return told


def launch(
    seats: Sequence[Seat],
    arguments: Sequence[str],
    storage: BaseStorage,
    *,
    logs: Path,
    watcher: Watcher,
    slurm: Slurm | None = None,
    poll_s: float = 1.0,
) -> int:
    """Run a worker on every seat until the plan is done; the exit code.

    `arguments` are those of `accelsearch worker` but for its name. Ctrl-C asks the workers to give
    their trials back and waits for them; a second one kills them.

    Raises:
        UnsupportedError: Slurm is asked for and not there, or refuses the job.
        StorageError: the logs' folder cannot be made.
    """
    crew = Crew(uuid.uuid4().hex[:4], seats)
    start = _on_slurm(slurm, logs) if slurm is not None else _here(logs)
    make_folder(logs, "logs")
    interrupted = False
    with (
        Worker(engine(storage), device="launcher", name=f"{crew.name}/launcher") as launcher,
        _noted_interrupts() as interrupts,
    ):
        try:
            while not all(place.finished for place in crew.places):
                if interrupts:
                    raise KeyboardInterrupt
                _look(crew, storage, launcher)
                for place in crew.places:
                    _tend(place, crew, start, arguments, watcher)
                watcher.shown(crew)
                time.sleep(poll_s)
        except KeyboardInterrupt:
            interrupted = True
            _stop(crew, storage, watcher, poll_s)
        except BaseException:
            for place in crew.places:
                if place.job is not None:
                    place.job.stop()
            raise
        reconcile_all(storage, launcher)
    if interrupted:
        raise KeyboardInterrupt
    return 1 if any(place.failed for place in crew.places) else 0


def _tend(
    place: _Place,
    crew: Crew,
    start: Callable[[Seat, WorkerJob], _Job],
    arguments: Sequence[str],
    watcher: Watcher,
) -> None:
    """See to one seat: start its worker, or find out how it ended."""
    if place.finished:
        return
    if place.job is None:
        if time.monotonic() >= place.start_at:
            name = crew.worker(place.seat)
            command = (*arguments, "--name", name)
            place.job = start(place.seat, WorkerJob(command, place.seat.environment))
        return
    if place.job.alive():
        return
    code = place.job.code()
    ended_in, place.job = place.job.id, None
    done_here = 0 if place.at_work is None else place.at_work.trials
    farewell = "" if place.at_work is None else place.at_work.farewell
    place.trials, place.at_work = place.trials + done_here, None
    place.futile = 0 if done_here else place.futile + 1
    told = {
        None: f"ended itself: {farewell}" if farewell else "was killed",
        0: "is done",
        1: "is done; not every configuration could be searched",
        130: "was interrupted",
    }.get(code, f"ended with exit code {code}")
    told = f"{told} (job {ended_in})"
    if code in (0, 1):
        place.finished, place.failed = True, told if code else ""
    elif place.futile >= _FUTILE:
        place.finished = True
        place.failed = f"{told}; {_FUTILE} in a row ended without a trial: given up, see its log"
    else:
        place.start_at = time.monotonic() + min(2.0**place.futile - 1, _LONGEST_PAUSE_S)
    watcher.ended(Ended(place.seat.name, code, place.failed or told, not place.finished))


def _look(crew: Crew, storage: BaseStorage, launcher: Worker) -> None:
    """See which workers are there, and end those that are silent: they hang in one long call."""
    rows = all_workers(engine(storage))
    cut = launcher.cut
    for place in crew.places:
        here = [row for row in rows if row.identity.name == crew.worker(place.seat)]
        if place.job is None:
            # Who was killed leaves its row behind: it says nothing of who comes next.
            place.left.update(row.identity.id for row in here)
            continue
        here = [row for row in here if row.identity.id not in place.left]
        if here:
            place.at_work = here[-1]  # the latest
            if place.at_work.unseen_s > GRACE_S and not cut:
                place.job.kill()


def _stop(crew: Crew, storage: BaseStorage, watcher: Watcher, poll_s: float) -> None:
    """Let the workers give their trials back; kill those that do not, or all at a second Ctrl-C."""
    jobs = [place.job for place in crew.places if place.job is not None]
    deadline = time.monotonic() + _KILL_S
    try:
        for job in jobs:
            job.stop()
        while any(job.alive() for job in jobs) and time.monotonic() < deadline:
            time.sleep(min(poll_s, 0.2))
    except KeyboardInterrupt:
        pass
    for job in jobs:
        if job.alive():
            job.kill()


def _environment(name: str, gpu: Gpu | None, threads: str) -> dict[str, str]:
    """What a worker finds in its environment, so that no other disturbs it."""
    caches = _caches() / name
    given = os.environ.get("OMP_NUM_THREADS", threads)
    return {
        "CUDA_VISIBLE_DEVICES": "" if gpu is None else gpu.uuid,
        "OMP_NUM_THREADS": given,
        "MKL_NUM_THREADS": given,
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }


def _caches() -> Path:
    return Path(tempfile.gettempdir()) / f"accelsearch-{getpass.getuser()}"


def _here(logs: Path) -> Callable[[Seat, WorkerJob], _Job]:
    import submitit

    def start(seat: Seat, work: WorkerJob) -> _Job:
        executor = submitit.LocalExecutor(folder=logs / seat.name)
        executor.update_parameters(timeout_min=_YEARS_MIN, stderr_to_stdout=True)
        # NumPy is imported before the job can set this.
        with _ignoring_interrupts(), _environ(seat.environment):
            return _Local(executor.submit(work))

    return start


class _Local:
    """A worker on this machine: submitit's controller, and the process below it."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self.id = str(job.job_id)

    def alive(self) -> bool:
        return not self._job.done()

    def code(self) -> int | None:
        return _result(self._job)

    def stop(self) -> None:
        for process in self._processes():
            _signal(process, signal.SIGTERM)

    def kill(self) -> None:
        # From the top: a controller whose task is killed ends by itself.
        for process in reversed(self._processes()):
            _signal(process, signal.SIGKILL)

    def _processes(self) -> list[psutil.Process]:
        """The worker, and below it what compiles for it."""
        try:
            found: list[psutil.Process] = psutil.Process(int(self.id)).children(recursive=True)
            return found
        except psutil.NoSuchProcess:
            return []


def _on_slurm(slurm: Slurm, logs: Path) -> Callable[[Seat, WorkerJob], _Job]:
    import submitit

    if submitit.SlurmExecutor.affinity() <= 0:
        raise UnsupportedError(
            "--cluster slurm must be run where Slurm's commands are, found no srun; "
            "leave it out to use this machine"
        )

    def start(seat: Seat, work: WorkerJob) -> _Job:
        folder = (logs / seat.name).absolute()
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1000)
        wanted: dict[str, Any] = {
            "job_name": f"accelsearch-{seat.name}",
            "time": slurm.time_min,
            "partition": slurm.partition,
            "cpus_per_task": slurm.cpus,
            "gpus_per_node": slurm.gpus or None,
            "stderr_to_stdout": True,
            # Long enough to give a trial back, short enough for jobs of a few minutes.
            "signal_delay_s": min(90, 15 * slurm.time_min),
            "additional_parameters": {"requeue": True, **slurm.options},
        }
        given = {key: value for key, value in wanted.items() if value is not None}
        executor.update_parameters(**given)
        try:
            return _SlurmJob(executor.submit(work))
        except (submitit.core.utils.FailedJobError, OSError) as error:
            raise UnsupportedError(f"Slurm must take the job, but: {error}") from None

    return start


class _SlurmJob:
    """A worker on a cluster. Asked of squeue: many clusters keep no accounts for sacct."""

    _ASK_S = 5.0

    def __init__(self, job: Any) -> None:
        self._job = job
        self.id = str(job.job_id)
        self._asked_at = time.monotonic()
        self._there = True

    def alive(self) -> bool:
        if time.monotonic() - self._asked_at < self._ASK_S:
            return self._there
        self._asked_at = time.monotonic()
        done = _command("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", self.id)
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            return self._there  # the controller does not answer: nobody knows
        states = set(done.stdout.split())
        over = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
        over |= {"OUT_OF_MEMORY", "TIMEOUT", "REVOKED"}
        self._there = bool(states - over)
        return self._there

    def code(self) -> int | None:
        return _result(self._job)

    def stop(self) -> None:
        # To the worker, not to the script around it, which would end at once.
        _command("scancel", "--signal=TERM", self.id)

    def kill(self) -> None:
        _command("scancel", self.id)


def _result(job: Any) -> int | None:
    """The exit code that a worker has left; None where it could not."""
    if not job.paths.result_pickle.exists():
        return None
    error = job.exception()
    if error is not None:
        return None
    code = job.result()
    return code if isinstance(code, int) else None


def _command(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C, which a terminal sends to all: we tell them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C as ever, and noted as well: Python loses one that arrives in a destructor."""
    noted: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which has no say in signals
        yield noted
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _environ(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def sbatch_options(given: Sequence[str]) -> dict[str, str]:
    """Options of sbatch from `NAME=VALUE`.

    Raises:
        PlanError: one is written otherwise.
    """
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise PlanError(f"--sbatch must be NAME=VALUE such as qos=low, got {text!r}")
        options[name.removeprefix("--")] = value
    return options
