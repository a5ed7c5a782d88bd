"""A search on MySQL by its URL: tables, claims, signs of life, and two workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from accelsearch import claims
from accelsearch.configuration import load_plan
from accelsearch.heartbeat import Worker
from accelsearch.measurement import Latency, Measurement, Scores
from accelsearch.storage import (
    Outcome,
    create_study,
    engine,
    open_storage,
    read_studies,
    read_study,
    record,
    running_trial,
)
from accelsearch.turns import _distribution
from tests.crew import Crew
from tests.servers import MySql, mysql_server
from tests.standin import BRANCH, INTERVAL, StandIn

pytestmark = pytest.mark.mysql

PLAN = """
model = "shapes"
methods = [["deepcache"]]
budgets = [{ metric = "clip_score", max_loss = 0.0085 }]
[search]
trials = 24
sampler = "random"
"""


@pytest.fixture(scope="module")
def mysql() -> Iterator[MySql]:
    with mysql_server() as server:
        yield server


def test_a_setting_is_claimed_once_and_workers_are_seen_to_live(mysql: MySql) -> None:
    database = engine(open_storage(mysql.new_database()))
    with Worker(database, name="a", beat_s=0.1) as first, Worker(database, name="b") as second:
        assert first.claim(1, {"interval": 2})
        assert not second.claim(1, {"interval": 2})
        assert second.claim(1, {"interval": 3})
        assert first.others(1) == [{"interval": 3}]
        assert first.note(7)
        rows = {row.identity.name: row for row in claims.all_workers(database)}
        assert set(rows) == {"a", "b"}
        assert all(0 <= row.unseen_s < 60 and 0 <= row.age_s < 60 for row in rows.values())
        first.release()
        assert second.others(1) == []
        second.release()
    assert claims.all_workers(database) == ()


def test_a_measurement_of_thousands_of_scores_is_kept_whole(mysql: MySql, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    (configuration,) = load_plan(tmp_path / "plan.toml").configurations()
    url = mysql.new_database()
    environment = StandIn.environment(configuration)
    sampler = optuna.samplers.RandomSampler()
    study = create_study(open_storage(url), configuration, environment, sampler)
    params = {"cache_interval": 3, "cache_branch_id": 0}
    space = {one.name: _distribution(one) for one in (INTERVAL, BRANCH)}
    template = running_trial(params, space, "w")
    trial_id = study._storage.create_new_trial(study._study_id, template)
    scores = tuple(30 + index / 7 for index in range(3000))
    measurement = Measurement(
        params,
        Latency((2.0,) * 6, (1.0,) * 6),
        (Scores("clip_score", scores, scores),),
        None,
        None,
        {"deepcache": "1"},
    )
    trial = optuna.Trial(study, trial_id)
    record(trial, Outcome.FEASIBLE, "loss 0", measurement=measurement)
    study.tell(trial, 2.0)
    # Opened again, as by a second worker: what was widened stays so.
    (stored,) = read_studies(open_storage(url))
    assert stored == read_study(study)
    assert stored.trials[0].measurement == measurement


def test_two_workers_measure_every_setting_once(mysql: MySql, tmp_path: Path) -> None:
    url = mysql.new_database()
    crew = Crew(tmp_path, url, pause_s=0.8, plan=PLAN)
    crew.work(2, 120)
    assert {process.returncode for process in crew.processes} == {0}, crew.logs()
    (study,) = read_studies(open_storage(url))
    assert Outcome.RUNNING not in {trial.outcome for trial in study.trials}
    finished: Counter[Any] = Counter(trial.setting for trial in study.current)
    assert len(finished) == 24
    assert set(finished.values()) == {1}
    assert len({trial.worker for trial in study.trials}) == 2
    assert claims.all_claims(engine(open_storage(url))) == ()
    assert "secret" not in crew.logs()


def test_a_server_that_refuses_is_told_without_the_password(mysql: MySql) -> None:
    from accelsearch.errors import StorageError

    url = sqlalchemy.engine.make_url(mysql.new_database()).set(password="wrong-secret")
    with pytest.raises(StorageError, match="Access denied") as raised:
        open_storage(url.render_as_string(hide_password=False))
    assert "wrong-secret" not in str(raised.value)
