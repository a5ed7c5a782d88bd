"""Launching on a real Slurm cluster: `tests/slurm/start.sh` makes one of this machine."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from accelsearch.claims import all_claims, all_workers
from accelsearch.storage import Outcome, engine, open_storage, read_studies
from tests.test_launch import Launch

pytestmark = [pytest.mark.slurm, pytest.mark.postgres]


@pytest.fixture(scope="module")
def cluster() -> None:
    if shutil.which("sinfo") is None:
        pytest.skip("Slurm is not installed: run tests/slurm/start.sh as root")
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0 or not done.stdout.strip():
        pytest.skip("no Slurm cluster answers: run tests/slurm/start.sh as root")


def jobs() -> list[str]:
    command = ["squeue", "--noheader", "--format=%i", "--states=running"]
    return subprocess.check_output(command, text=True).split()


def test_jobs_measure_everything_once_and_a_cancelled_one_is_replaced(
    cluster: None, postgres: Any, tmp_path: Path
) -> None:
    url = postgres.new_database()
    launch = Launch(
        tmp_path,
        *("--cluster", "slurm", "--gpus", "none", "--workers", "2", "--time-min", "10"),
        *("--sbatch", "comment=a test"),
        url=url,
        ACCELSEARCH_STANDIN_S="2",
    )
    try:
        launch.await_trial()
        victim = jobs()[0]
        subprocess.run(["scancel", victim], check=True)
        assert launch.wait() == 0, launch.told()
    finally:
        launch.process.kill()
        subprocess.run(["scancel", *jobs()], check=False, capture_output=True)
    told = launch.told()
    assert f"(job {victim})" in told
    assert "replaced" in told
    (study,) = read_studies(open_storage(url))
    finished = Counter(
        tuple(sorted(trial.params.items()))
        for trial in study.trials
        if trial.outcome is not Outcome.INTERRUPTED and trial.reused_from is None
    )
    assert len(finished) == 12
    assert set(finished.values()) == {1}
    assert Outcome.RUNNING not in {trial.outcome for trial in study.trials}
    workers = {trial.worker.rpartition("/")[2] for trial in study.trials}
    assert workers == {"job0", "job1"}
    connections = engine(open_storage(url))
    assert all_claims(connections) == ()
    assert all_workers(connections) == ()
    password = url.partition("://")[2].partition(":")[2].partition("@")[0]
    for file in (tmp_path / "logs").rglob("*"):
        assert not file.is_file() or password.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_requeued_job_gives_its_trial_back_and_comes_again(
    cluster: None, postgres: Any, tmp_path: Path
) -> None:
    url = postgres.new_database()
    launch = Launch(
        tmp_path,
        *("--cluster", "slurm", "--gpus", "none", "--workers", "1", "--time-min", "10"),
        url=url,
        ACCELSEARCH_STANDIN_S="3",
    )
    try:
        first = launch.await_trial()
        (job,) = jobs()
        # As preemption does: the job is ended, and waits for the machine again.
        subprocess.run(["scontrol", "requeue", job], check=True)
        second = launch.await_trial(but=(first.pid,))
        assert jobs() == [job]
        assert second.pid != first.pid
        assert launch.wait() == 0, launch.told()
    finally:
        launch.process.kill()
        subprocess.run(["scancel", *jobs()], check=False, capture_output=True)
    (study,) = read_studies(open_storage(url))
    outcomes = Counter(trial.outcome for trial in study.trials)
    # The trial of the first run was given back, and its setting measured by the second.
    assert outcomes[Outcome.INTERRUPTED] == 1
    assert Outcome.RUNNING not in outcomes
    assert set(Counter(trial.setting for trial in study.measured).values()) == {1}
    assert len(study.measured) == 12
    (given_back,) = (one for one in study.trials if one.outcome is Outcome.INTERRUPTED)
    assert given_back.setting in {trial.setting for trial in study.measured}
    assert all_claims(engine(open_storage(url))) == ()


def test_an_interrupt_ends_the_jobs(cluster: None, postgres: Any, tmp_path: Path) -> None:
    import signal

    launch = Launch(
        tmp_path,
        *("--cluster", "slurm", "--gpus", "none"),
        url=postgres.new_database(),
        ACCELSEARCH_STANDIN_S="60",
    )
    try:
        launch.await_trial()
        launch.process.send_signal(signal.SIGINT)
        assert launch.wait() == 130, launch.told()
        deadline = time.monotonic() + 30
        while jobs() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert jobs() == []
    finally:
        launch.process.kill()
        subprocess.run(["scancel", *jobs()], check=False, capture_output=True)
    (study,) = read_studies(open_storage(launch.url))
    assert [trial.outcome for trial in study.trials] == [Outcome.INTERRUPTED]
