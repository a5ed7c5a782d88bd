"""The rows of workers and claims, on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from accelsearch import claims
from accelsearch.heartbeat import Worker, gone, process_lives, setting_key
from accelsearch.storage import engine, open_storage
from tests.stored import new_database


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def connections(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "sqlite":
        url = new_database(tmp_path)
    else:
        url = request.getfixturevalue("postgres").new_database()
    return engine(open_storage(url))


def test_of_two_workers_one_gets_a_setting_and_the_other_does_once_it_is_released(
    connections: Any,
) -> None:
    with Worker(connections) as one, Worker(connections) as two:
        assert one.claim(1, {"a": 1})
        assert not two.claim(1, {"a": 1})
        assert two.others(1) == [{"a": 1}]
        assert one.others(1) == []
        one.release()
        assert two.claim(1, {"a": 1})


def test_settings_of_two_studies_do_not_disturb_each_other(connections: Any) -> None:
    with Worker(connections) as one, Worker(connections) as two:
        assert one.claim(1, {"a": 1})
        assert two.claim(2, {"a": 1})


def test_of_many_that_claim_at_once_exactly_one_gets_it(connections: Any) -> None:
    workers = [Worker(connections) for _ in range(8)]
    got: list[bool] = []
    threads = [
        threading.Thread(target=lambda one=one: got.append(one.claim(1, {"a": 1})))
        for one in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def test_claiming_again_after_a_lost_answer_is_no_conflict_with_oneself(connections: Any) -> None:
    mine = ("x", 1, "setting", {"a": 1}, "me", None)[1:]
    assert claims.insert_claim(connections, *mine)
    assert claims.insert_claim(connections, *mine)
    assert len(claims.all_claims(connections)) == 1


def test_a_claim_that_was_taken_away_is_held_and_can_be_noted_no_more(connections: Any) -> None:
    with Worker(connections) as one, Worker(connections) as other:
        assert one.claim(1, {"a": 1})
        assert one.note(7)
        assert one.holds()
        assert claims.all_claims(connections)[0].trial_id == 7
        claims.remove_worker(connections, one.identity.id)
        assert not one.holds()
        assert other.claim(1, {"a": 1})
        assert not one.holds()
        assert not one.note(8)
        one.release()


def until(happened: Callable[[], object]) -> None:
    """Wait for something that a busy machine may take a while for."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


def test_a_worker_has_a_row_as_long_as_it_lives(connections: Any) -> None:
    with Worker(connections, device="GPU 3", name="here", beat_s=0.05) as one:
        one.at(5)
        one.claim(1, {})
        one.release(finished=True)
        until(lambda: claims.all_workers(connections)[0].trials == 1)
        (row,) = claims.all_workers(connections)
        assert row.identity == one.identity
        assert (row.identity.name, row.identity.device, row.trials, row.study_id) == (
            "here",
            "GPU 3",
            1,
            5,
        )
        assert row.age_s > row.unseen_s >= 0
        assert not gone(row, 60)
    assert claims.all_workers(connections) == ()


def test_a_heartbeat_survives_errors_of_the_database(tmp_path: Path) -> None:
    connections = engine(open_storage(new_database(tmp_path)))
    failing = threading.Event()

    def fail(*arguments: Any) -> None:
        if failing.is_set():
            raise sqlalchemy.exc.OperationalError("", {}, Exception("gone"))

    sqlalchemy.event.listen(connections, "before_cursor_execute", fail)
    with Worker(connections, beat_s=0.02, grace_s=60) as one:
        failing.set()
        until(lambda: one.cut)
        failing.clear()
        mended_s = claims.all_workers(connections)[0].age_s

        def seen_since() -> bool:
            row = claims.all_workers(connections)[0]
            return row.age_s - row.unseen_s > mended_s

        until(seen_since)


def test_whoever_was_cut_off_does_not_take_the_silence_of_others_for_death(
    tmp_path: Path,
) -> None:
    connections = engine(open_storage(new_database(tmp_path)))
    with Worker(connections, grace_s=0.1) as one, Worker(connections, name="other"):
        time.sleep(0.2)
        rows = claims.all_workers(connections)
        assert [row.identity.name for row in one.lost(rows)] == ["other"]
        one._cut_at = time.monotonic()
        assert one.lost(rows) == []


def test_a_worker_taken_for_dead_has_its_row_again_with_the_next_beat(connections: Any) -> None:
    with Worker(connections, beat_s=0.05) as one:
        claims.remove_worker(connections, one.identity.id)
        until(lambda: claims.all_workers(connections))
        assert [row.identity.id for row in claims.all_workers(connections)] == [one.identity.id]


def test_a_process_that_has_ended_lives_no_more_even_unwaited_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        from accelsearch.heartbeat import _process_started

        started = _process_started(process.pid)
        assert started
        assert process_lives(process.pid, started)
        assert not process_lives(process.pid, "1")  # another one of the same number
        process.kill()
        until(lambda: not process_lives(process.pid, started))  # a zombie
    finally:
        process.kill()
        process.wait()
    assert not process_lives(process.pid, started)


def test_a_worker_whose_trial_takes_too_long_says_so_and_ends_itself(tmp_path: Path) -> None:
    url = new_database(tmp_path)
    program = f"""
import time
from accelsearch.heartbeat import Worker
from accelsearch.storage import engine, open_storage
with Worker(engine(open_storage({url!r}))) as one:
    assert one.claim(1, {{"a": 1}}, limit_s=0.3)
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 75, done.stderr
    assert "took longer than 0.3 s" in done.stderr
    (row,) = claims.all_workers(engine(open_storage(url)))
    assert row.farewell == "its trial took longer than 0.3 s"
    assert gone(row)


def test_a_trial_that_ends_in_time_ends_nobody(tmp_path: Path) -> None:
    connections = engine(open_storage(new_database(tmp_path)))
    with Worker(connections, beat_s=0.05) as one:
        assert one.claim(1, {"a": 1}, limit_s=3)
        one.release()
        time.sleep(3.5)


def test_nobody_is_at_work_on_a_database_without_the_tables(tmp_path: Path) -> None:
    connections = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/old.db")
    assert claims.all_workers(connections) == ()
    assert claims.all_claims(connections) == ()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 2}, {"a": 2.0}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": "1"}, {"a": 1}, False),
        ({"a": 0.1}, {"a": 0.2}, False),
    ],
)
def test_settings_have_one_key_exactly_if_they_are_equal(one: Any, other: Any, same: bool) -> None:
    assert (setting_key(one) == setting_key(other)) is same
