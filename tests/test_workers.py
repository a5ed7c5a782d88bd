"""Which configuration of a plan a worker takes, and when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from accelsearch import claims
from accelsearch import workers as module
from accelsearch.configuration import LatencySettings, SearchSettings
from accelsearch.errors import PlanError, UnsupportedError
from accelsearch.heartbeat import Worker
from accelsearch.measurement import Latency
from accelsearch.objective import Bench, environment_of
from accelsearch.storage import create_study, engine, open_storage, record
from accelsearch.study import OTHERS, Progress, Silent, contender_of
from accelsearch.turns import finish, take
from accelsearch.workers import device_told, stand_in, work
from tests.standin import StandIn
from tests.stored import configured, new_database


class Loads(StandIn):
    """Counts what is loaded."""

    loaded: list[int]

    def __init__(self, configuration: Any, say: Any) -> None:
        super().__init__(configuration, say)
        self.loaded.append(configuration.steps)


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    Loads.loaded = []


@pytest.fixture
def storage(tmp_path: Path) -> Any:
    return open_storage(new_database(tmp_path))


@contextmanager
def silent() -> Iterator[Progress]:
    yield Silent()


def plan(*steps: int, trials: int = 3, **fields: Any) -> list[Any]:
    # Not at random: that may repeat a setting, and differs where another worker is there.
    search = SearchSettings(trials=trials, sampler="grid")
    return [configured(model="shapes", steps=one, search=search, **fields) for one in steps]


def day(storage: Any, worker: Worker, configurations: list[Any], bench: Any = Loads) -> Any:
    return work(
        configurations,
        storage,
        worker,
        artifacts=Path(storage._backend.url.removeprefix("sqlite:///")).parent / "artifacts",
        progress_on=silent,
        where=StandIn.environment,
        bench=bench,
        poll_s=0.05,
    )


def studies(storage: Any) -> dict[int, optuna.Study]:
    """The studies by their steps."""
    found = {}
    for one in storage.get_all_studies():
        study = optuna.load_study(study_name=one.study_name, storage=storage)
        found[study.user_attrs["configuration"]["steps"]] = study
    return found


def test_a_worker_searches_every_configuration_and_loads_each_once(storage: Any) -> None:
    with Worker(engine(storage)) as worker:
        done = day(storage, worker, plan(10, 20))
    assert sorted(Loads.loaded) == [10, 20]
    assert {found.stopped for found in done.found.values()} == {"the limit of 3 trials"}
    assert {len(study.trials) for study in studies(storage).values()} == {3}


def test_what_is_done_is_not_loaded_again(storage: Any) -> None:
    with Worker(engine(storage)) as worker:
        day(storage, worker, plan(10))
        Loads.loaded.clear()
        day(storage, worker, plan(10, 20))
    assert Loads.loaded == [20]


def test_a_worker_takes_the_configuration_with_the_fewest_workers_for_what_is_left(
    storage: Any,
) -> None:
    configurations = plan(10, 20, 30, trials=30)
    made = [
        create_study(storage, one, StandIn.environment(one), optuna.samplers.RandomSampler())
        for one in configurations
    ]
    jobs = [module._Job(one, StandIn.environment(one)) for one in configurations]
    with (
        Worker(engine(storage)) as one,
        Worker(engine(storage)) as two,
        Worker(engine(storage)) as me,
    ):
        one.at(made[0]._study_id)
        two.at(made[2]._study_id)
        assert module._neediest(jobs, storage, me).configuration.steps == 20
        two.at(made[1]._study_id)
        assert module._neediest(jobs, storage, me).configuration.steps == 30


def test_a_configuration_that_cannot_be_searched_is_told_and_the_others_go_on(
    storage: Any,
) -> None:
    class Refuses(Loads):
        def __init__(self, configuration: Any, say: Any) -> None:
            super().__init__(configuration, say)
            if configuration.steps == 10:
                raise UnsupportedError("not this one")

    with Worker(engine(storage)) as worker:
        done = day(storage, worker, plan(10, 20), Refuses)
    assert [str(error) for error in done.failed.values()] == ["not this one"]
    assert len(done.found) == 1


def test_a_worker_waits_for_what_others_measure_and_takes_over_what_they_leave(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (configuration,) = plan(10, trials=1)
    study = create_study(
        storage, configuration, StandIn.environment(None), optuna.samplers.RandomSampler()
    )
    default = {"cache_interval": 3, "cache_branch_id": 0}
    with Worker(engine(storage)) as other, Worker(engine(storage)) as worker:
        assert other.claim(study._study_id, default)
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                other.release()

        monkeypatch.setattr(module.time, "sleep", pause)
        stopped = []

        class Watched(Silent):
            def study_finished(self, found: Any) -> None:
                stopped.append(found.stopped)

        done = work(
            [configuration],
            storage,
            worker,
            artifacts=Path(storage._backend.url.removeprefix("sqlite:///")).parent,
            progress_on=lambda: _as_context(Watched()),
            where=StandIn.environment,
            bench=Loads,  # type: ignore[arg-type]
            poll_s=0.05,
        )
    assert stopped == [OTHERS, "the limit of 1 trials"]
    # Less and less often, as long as nothing is left for it.
    assert pauses[:3] == pytest.approx([0.05, 0.075, 0.1125])
    (found,) = done.found.values()
    assert [trial.params for trial in found.study.trials] == [default]


@pytest.mark.parametrize("left", [False, True])
def test_the_time_limit_goes_on_while_a_worker_waits(
    storage: Any, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    now = [0.0]

    class Slow(Loads):
        def measure(self, params: Any, **question: Any) -> Any:
            now[0] += 4.0
            return super().measure(params, **question)

    search = SearchSettings(trials=3, sampler="grid", timeout_s=10.0)
    configuration = configured(model="shapes", search=search)
    study = create_study(
        storage, configuration, StandIn.environment(None), optuna.samplers.RandomSampler()
    )
    with Worker(engine(storage)) as other, Worker(engine(storage)) as worker:
        assert other.claim(study._study_id, {"cache_interval": 3, "cache_branch_id": 0})

        def pause(seconds: float) -> None:
            if seconds:  # the stand-in pauses for none
                now[0] += 3.0
                assert now[0] < 20.0, "it waits for ever"
                if left:
                    other.release()

        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(module.time, "sleep", pause)
        done = day(storage, worker, [configuration], Slow)
        monkeypatch.undo()
    (found,) = done.found.values()
    assert found.stopped == ("the time limit of 10 s" if left else OTHERS)
    assert len(found.study.trials) == 2


class Scattered(Loads):
    """Its pairs scatter evenly by up to 20 %, so that more of them tell more."""

    def measure(self, params: Any, *, pairs: int, **question: Any) -> Any:
        result = super().measure(params, **question)
        noise = [1 + 0.2 * ((index * 0.618) % 1 - 0.5) for index in range(pairs)]
        speedup = result.measurement.latency.speedup
        latency = Latency(tuple(speedup * one for one in noise), (1.0,) * pairs)
        return replace(result, measurement=replace(result.measurement, latency=latency))


@pytest.mark.parametrize("told", [False, True])
def test_a_worker_waits_for_what_another_times_on_and_goes_on_with_it(
    storage: Any, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    with Worker(engine(storage)) as worker:
        coarse = plan(10, latency=LatencySettings(max_pairs=6))
        (found,) = day(storage, worker, coarse, Scattered).found.values()
    best = found.best
    (study,) = studies(storage).values()
    pauses = 0

    def timed_on(trial: optuna.Trial) -> float:
        bench = Scattered(found.study.configuration, Silent().doing)
        result = bench.measure(best.params, pairs=12)
        record(trial, result.outcome, "told", measurement=result.measurement, resumes=best.number)
        return 1.0

    with Worker(engine(storage)) as other, Worker(engine(storage)) as worker:

        def pause(seconds: float) -> None:
            nonlocal pauses
            pauses += seconds > 0  # the stand-in pauses for none
            if seconds and pauses == 3 and told:
                assert finish(study, running, other, timed_on)
            elif seconds and pauses == 3:
                other.release()

        monkeypatch.setattr(module.time, "sleep", pause)
        running = take(study, StandIn.space, other, best.params)
        assert running is not None
        done = day(storage, worker, plan(10), Scattered)
    assert pauses == 3
    (found,) = done.found.values()
    assert found.stopped == "the limit of 3 trials"
    assert contender_of(found.study) is None
    assert found.best.measurement.latency.is_precise(0.03)


@contextmanager
def _as_context(progress: Progress) -> Iterator[Progress]:
    yield progress


def test_a_worker_that_was_told_to_stop_does_even_if_the_signal_was_lost(storage: Any) -> None:
    class Interrupted(Loads):
        def measure(self, params: Any, **question: Any) -> Any:
            worker.stopping = True  # and no exception
            return super().measure(params, **question)

    with Worker(engine(storage)) as worker, pytest.raises(KeyboardInterrupt):
        day(storage, worker, plan(10), Interrupted)
    (study,) = studies(storage).values()
    assert len(study.trials) == 1
    assert claims.all_workers(engine(storage)) == ()


def test_the_bench_of_a_test_is_imported_by_name() -> None:
    assert stand_in(None) == (Bench, environment_of)
    assert stand_in("tests.standin:StandIn") == (StandIn, StandIn.environment)
    for wrong in ("tests.standin", "tests.nothing:StandIn", "tests.standin:Nothing"):
        with pytest.raises(PlanError, match="MODULE:NAME"):
            stand_in(wrong)


@pytest.mark.parametrize(
    ("device", "visible", "told"),
    [
        (None, "2", "GPU 2"),
        (None, "", "CPU"),
        ("cpu", "2", "CPU"),
        (None, None, "auto"),
        ("cuda:1", None, "cuda:1"),
    ],
)
def test_a_worker_says_what_it_measures_on(
    monkeypatch: pytest.MonkeyPatch, device: str | None, visible: str | None, told: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_told(device) == told
