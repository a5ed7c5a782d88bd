"""Other programs' reader on what we export, also while two exports write at the same time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import reader
from optuna.samplers import RandomSampler
from stored import ENVIRONMENT, add_trial, configured, new_database

from accelsearch.export import BOUNDS, PARAMS, export
from accelsearch.storage import create_study, open_storage

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


def test_a_reader_of_the_contract_reads_both_files(tmp_path: Path) -> None:
    database = open_storage(new_database(tmp_path))
    for steps, methods in ((20, ("tome", "deepcache")), (50, ("deepcache",))):
        one = configured(steps=steps, methods=methods)
        study = create_study(database, one, ENVIRONMENT, RandomSampler(seed=0))
        add_trial(study, 2.0, 0.001)
        add_trial(study, 4.0 + steps / 1000, 0.015)
    export(database, tmp_path, artifacts=tmp_path)
    pipeline, scheduler = "StableDiffusionPipeline", "DDIMScheduler"
    assert reader.bounds(tmp_path / BOUNDS) == {
        (pipeline, scheduler, "20", 0.02, ("deepcache", "tome")): round(4.02 * 1.1, 2),
        (pipeline, scheduler, "50", 0.02, ("deepcache",)): round(4.05 * 1.1, 2),
    }
    wanted = (pipeline, scheduler, "20", 0.02, ["deepcache", "tome"])
    found = reader.answer(tmp_path / PARAMS, wanted, 4)
    assert found["speedup"] == pytest.approx(4.02)
    assert found["cache_interval"] == 3
    assert reader.answer(tmp_path / PARAMS, wanted, 4.03) is None


EXPORTING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from optuna.samplers import RandomSampler
from stored import ENVIRONMENT, add_trial, configured, new_database
from accelsearch.export import export
from accelsearch.storage import create_study, open_storage

folder, out, steps, seconds = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
database = open_storage(new_database(folder))
study = create_study(database, configured(steps=steps), ENVIRONMENT, RandomSampler(seed=0))
deadline, count = time.monotonic() + float(seconds), 0
while time.monotonic() < deadline or count < 20:
    count += 1
    add_trial(study, 1 + count / 1000, 0.01)
    export(database, out, artifacts=folder)
print(count)
"""


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_two_exports_at_once_lose_nothing_and_a_reader_sees_whole_files(
    tmp_path: Path, seconds: int
) -> None:
    out = tmp_path / "exports"
    writers = {}
    for steps in (20, 50):
        folder = tmp_path / str(steps)
        folder.mkdir()
        arguments = [str(Path(__file__).parent), folder, out, str(steps), str(seconds)]
        writers[steps] = subprocess.Popen(
            [sys.executable, "-c", EXPORTING, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
        )
    reads, known = 0, 0
    deadline = time.monotonic() + seconds + 120
    try:
        while any(one.poll() is None for one in writers.values()):
            assert time.monotonic() < deadline
            if (out / BOUNDS).exists() and (out / PARAMS).exists():
                assert {one[2] for one in reader.bounds(out / BOUNDS)} <= {"20", "50"}
                count = len(reader.params(out / PARAMS))
                assert count >= known
                reads, known = reads + 1, count
            time.sleep(0.005)  # a core is left to the writers
        told = {steps: int(one.communicate()[0]) for steps, one in writers.items()}
    finally:
        for one in writers.values():
            one.kill()
            one.wait()
    assert [one.returncode for one in writers.values()] == [0, 0]
    assert reads > 10
    assert min(told.values()) > 10
    entries = reader.params(out / PARAMS)
    for steps, count in told.items():
        speedups = {
            round(entry["speedup"], 3) for key, entry in entries.items() if f"'{steps}'" in key
        }
        assert speedups == {round(1 + number / 1000, 3) for number in range(1, count + 1)}
    assert sorted(path.name for path in out.iterdir()) == sorted([BOUNDS, PARAMS])
