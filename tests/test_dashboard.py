"""What optuna-dashboard shows of a database of ours: what is stored, and nothing that is not."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from PIL import Image
from sqlalchemy.engine import make_url

from accelsearch.dashboard import OWN_NOTES, View, application, is_loopback, serve
from accelsearch.errors import DashboardError, StorageError
from accelsearch.measurement import Measurement, Scores
from accelsearch.pictures import keep_picture
from accelsearch.queries import fastest_feasible
from accelsearch.storage import (
    Outcome,
    create_study,
    open_storage,
    read_study,
    record,
    record_aside,
    record_request,
    record_verification,
    running_trial,
)
from tests.browser import chromium
from tests.stored import ENVIRONMENT, configured, measured, new_database

pytest.importorskip("optuna_dashboard", reason="optuna-dashboard comes with the dashboard extra")

ENDS = {
    Outcome.FEASIBLE: TrialState.COMPLETE,
    Outcome.FAILED: TrialState.FAIL,
}


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


@pytest.fixture
def storage(tmp_path: Path) -> BaseStorage:
    return open_storage(new_database(tmp_path))


@pytest.fixture
def study(storage: BaseStorage) -> optuna.Study:
    return started(storage)


def started(storage: BaseStorage, **fields: Any) -> optuna.Study:
    return create_study(storage, configured(**fields), ENVIRONMENT, RandomSampler(seed=0))


def ended(
    study: optuna.Study,
    speedup: float,
    loss: float | None,
    outcome: Outcome = Outcome.FEASIBLE,
    *,
    reason: str = "as told",
    interval: int = 3,
    folder: Path | None = None,
    worker: str = "gpu0",
    measurement: Measurement | None = None,
) -> int:
    """Add a trial as a search does; with a folder, also its picture. Its number."""
    space = {"cache_interval": optuna.distributions.IntDistribution(2, 100)}
    params = {"cache_interval": interval}
    study.enqueue_trial(params)
    trial = study.ask(space)
    trial.set_user_attr("worker", worker)
    if folder is not None:
        keep_picture(folder, trial, Image.new("RGB", (60, 40), (200, 30, 30)))
    found = None
    if outcome is not Outcome.FAILED:
        found = measurement or measured(speedup, loss, params)
    violations = {} if loss is None else {"clip_score": (loss - 0.02) / 0.02}
    record(trial, outcome, reason, measurement=found, violations=violations, seconds={"latency": 2})
    state = ENDS.get(outcome, TrialState.PRUNED)
    study.tell(trial, speedup if state is TrialState.COMPLETE else None, state=state)
    return trial.number


def filled(storage: BaseStorage, folder: Path, **fields: Any) -> optuna.Study:
    """A study with a trial of each kind; 2.3x of trial 1 is its best."""
    study = started(storage, **fields)
    ended(study, 2.0, 0.005, folder=folder, interval=2)
    ended(study, 2.3, 0.015, folder=folder, interval=3, reason="clip_score loss 1.5 % of 2 %")
    over = {"reason": "clip_score loss 6 % of 2 %, 1 of 2 images", "interval": 9}
    ended(study, 4.5, 0.06, Outcome.OVER_BUDGET, **over)
    ended(study, 1.2, None, Outcome.DOMINATED, reason="slower than trial 1", interval=4)
    ended(study, 1.0, None, Outcome.FAILED, reason="images contain NaN", interval=5)
    return study


# The answers of the application, without a server


@dataclass
class Answer:
    status: str
    type: str
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Ask = Callable[..., Answer]


@pytest.fixture
def ask(storage: BaseStorage, artifacts: Path) -> Ask:
    """`ask(path)`: what the dashboard answers; with a method and a body, to a change."""
    app = application(storage, artifacts)

    def ask(
        path: str,
        method: str = "GET",
        body: Any = None,
        host: str = "localhost:1",
        raw: bytes = b"",
        length: str | None = None,
    ) -> Answer:
        sent = raw if body is None else json.dumps(body).encode()
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "1",
            "HTTP_HOST": host,
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(sent)) if length is None else length,
            "wsgi.input": io.BytesIO(sent),
            "wsgi.errors": sys.stderr,
            "wsgi.url_scheme": "http",
        }
        told: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
            told[:] = [status, dict(headers)]

        content = b"".join(app(environ, start))
        return Answer(told[0][:3], told[1].get("Content-Type", ""), content)

    return ask


def shown_trial(ask: Ask, number: int) -> dict[str, Any]:
    (trial,) = [one for one in ask("/api/studies/1").json["trials"] if one["number"] == number]
    attributes = {one["key"]: one["value"] for one in trial["user_attrs"]}
    return {**trial, "user_attrs": attributes}


def shown_note(ask: Ask) -> str:
    body = ask("/api/studies/1").json["note"]["body"]
    assert isinstance(body, str)
    return body


def test_a_trial_over_its_budget_is_shown_as_infeasible_and_stays_as_it_is_stored(
    storage: BaseStorage, study: optuna.Study, ask: Ask
) -> None:
    ended(study, 2.0, 0.01)
    ended(study, 4.0, 0.05, Outcome.OVER_BUDGET, reason="clip_score loss 5 % of 2 %")
    kept, over = shown_trial(ask, 0), shown_trial(ask, 1)
    assert (kept["state"], kept["constraints"]) == ("Complete", [-0.5])
    assert (over["state"], over["constraints"]) == ("Pruned", [pytest.approx(1.5)])
    assert over["user_attrs"]["outcome"] == "over budget"
    assert over["user_attrs"]["reason"] == "clip_score loss 5 % of 2 %"
    assert [one["number"] for one in ask("/api/studies/1").json["best_trials"]] == [0]
    for trial in storage.get_all_trials(1):
        assert "constraints" not in trial.system_attrs
        assert "measurement" in trial.user_attrs


def test_attributes_have_the_numbers_of_the_measurement_in_the_units_of_their_names(
    study: optuna.Study, ask: Ask
) -> None:
    images = {"psnr": Scores("psnr", None, (30.0, 34.0)), "ssim": Scores("ssim", None, (0.9, 0.8))}
    ended(study, 2.0, 0.01, measurement=measured(2.0, 0.0123, {"cache_interval": 3}, **images))
    shown = shown_trial(ask, 0)["user_attrs"]
    assert shown == {
        "outcome": "feasible",
        "reason": "as told",
        "speedup": "2.0",
        "speedup, 95 % interval": "2.00 to 2.00",
        "clip_score loss (%)": "1.23",
        "psnr (dB)": "32.0",
        "ssim loss (%)": "15.0",
        "images scored": "2 of 2",
        "latency (s)": "1.0",
        "baseline latency (s)": "2.0",
        "peak memory (MiB)": "2861.0",
        "baseline peak memory (MiB)": "2384.0",
        "time spent (s)": "2.0",
        "worker": "gpu0",
    }
    sortable = {
        one["key"] for one in ask("/api/studies/1").json["union_user_attrs"] if one["sortable"]
    }
    assert {"speedup", "clip_score loss (%)", "latency (s)", "peak memory (MiB)"} <= sortable


def test_a_trial_that_measured_nothing_says_why(study: optuna.Study, ask: Ask) -> None:
    ended(study, 1.0, None, Outcome.FAILED, reason="out of GPU memory")
    assert shown_trial(ask, 0)["user_attrs"] == {
        "outcome": "failed",
        "reason": "out of GPU memory",
        "time spent (s)": "2.0",
        "worker": "gpu0",
    }


def test_a_running_trial_is_shown_with_its_worker(study: optuna.Study, ask: Ask) -> None:
    distributions = {"cache_interval": optuna.distributions.IntDistribution(2, 10)}
    study.add_trial(running_trial({"cache_interval": 7}, distributions, "gpu3"))
    shown = shown_trial(ask, 0)
    assert shown["state"] == "Running"
    assert shown["user_attrs"]["worker"] == "gpu3"
    assert shown["user_attrs"]["outcome"] == "running"


def test_a_trial_that_held_out_prompts_refute_is_infeasible_and_not_the_best(
    study: optuna.Study, ask: Ask
) -> None:
    ended(study, 2.0, 0.01, interval=2)
    ended(study, 3.0, 0.015)
    record_verification(study, 1, 0, [Scores("clip_score", (100.0,) * 40, (70.0, 71.0) * 20)])
    assert [one["number"] for one in ask("/api/studies/1").json["best_trials"]] == [0]
    refuted = shown_trial(ask, 1)
    assert refuted["constraints"] == pytest.approx([-0.25, (0.295 - 0.02) / 0.02])
    assert refuted["user_attrs"]["held-out prompts"].startswith("not verified on 40 held-out")
    assert shown_trial(ask, 0)["constraints"] == [-0.5]


def test_a_trial_that_was_set_aside_is_not_the_best(study: optuna.Study, ask: Ask) -> None:
    ended(study, 2.0, 0.01, interval=2)
    ended(study, 3.0, 0.015)
    record_aside(study, 1)
    assert [one["number"] for one in ask("/api/studies/1").json["best_trials"]] == [0]
    told = shown_trial(ask, 1)["user_attrs"]["held-out prompts"]
    assert told.startswith("not tried on the held-out prompts")


def test_what_has_changed_since_the_last_look_is_shown(
    study: optuna.Study, storage: BaseStorage
) -> None:
    view = View(storage, Path("none"))
    ended(study, 2.0, 0.01)
    before = view.get_all_trials(1, deepcopy=False)[0]
    assert view.get_all_trials(1, deepcopy=False)[0] is before, "translated once"
    record_verification(study, 0, 0, [Scores("clip_score", (100.0,) * 40, (60.0, 61.0) * 20)])
    assert "held-out prompts" in view.get_all_trials(1, deepcopy=False)[0].user_attrs


def test_the_note_tells_configuration_budget_environment_and_the_best_result(
    storage: BaseStorage, artifacts: Path, ask: Ask
) -> None:
    study = filled(storage, artifacts)
    told = shown_note(ask)
    for part in (
        r"**2.30x \[2.30, 2.30\]** is the fastest within the budget, by trial 1",
        "` cache_interval=3 `",
        "clip_score loss 1.5 % of 2 %",
        "- 2 feasible, 1 over budget, 1 dominated, 1 failed",
        "` hub/sd15 `",
        "` DDIMScheduler `",
        "` clip_score loss of at most 2 % `",
        "` NVIDIA H200 (cuda, driver 570.86, CUDA 12.8) `",
        "torch 2.13.0",
    ):
        assert part in told, part
    ended(study, 2.6, 0.01, interval=6)
    assert "**2.60x" in shown_note(ask), "kept up to date"
    record_request(study, 2.2, "safest")
    assert "2.2x was asked for: trial 5, 2.60x." in shown_note(ask)


def test_a_study_without_trials_has_a_note(study: optuna.Study, ask: Ask) -> None:
    assert "Nothing within the budget yet." in shown_note(ask)
    assert ask("/api/studies/1").json["best_trials"] == []


def test_our_figures_hold_the_trials_and_the_budget(
    storage: BaseStorage, artifacts: Path, ask: Ask
) -> None:
    study = filled(storage, artifacts)
    shown = ask("/api/studies/1").json["plotly_graph_objects"]
    figures = {one["id"]: json.loads(one["graph_object"]) for one in shown}
    assert sorted(figures) == ["search-time", "speedup-against-loss"]
    named = {trace.get("name"): trace for trace in figures["speedup-against-loss"]["data"]}
    assert named["over budget"]["y"] == [4.5]
    assert named["over budget"]["x"] == pytest.approx([6.0])
    assert named["best"]["y"] == [2.3]
    assert "budget 2 %" in json.dumps(figures["speedup-against-loss"]["layout"])
    assert "over budget (1)" in json.dumps(figures["search-time"]["data"])
    ended(study, 2.6, 0.01, interval=6)
    assert '"y": [2.6]' in json.dumps(json.loads(figure_of(ask, "speedup-against-loss"))["data"])


def figure_of(ask: Ask, name: str) -> str:
    shown = ask("/api/studies/1").json["plotly_graph_objects"]
    (figure,) = [one["graph_object"] for one in shown if one["id"] == name]
    assert isinstance(figure, str)
    return figure


def test_studies_of_others_are_shown_as_they_are(storage: BaseStorage, ask: Ask) -> None:
    other = optuna.create_study(storage=storage, study_name="theirs")
    other.set_user_attr("mine", "kept")
    trial = other.ask()
    trial.set_user_attr("note", 3)
    other.tell(trial, 1.0)
    seen = ask("/api/studies/1").json
    assert seen["user_attrs"] == [{"key": "mine", "value": "kept"}]
    assert seen["note"]["body"] == ""
    assert seen["plotly_graph_objects"] == []
    assert seen["trials"][0]["user_attrs"] == [{"key": "note", "value": "3"}]
    assert seen["best_trials"][0]["number"] == 0


def test_a_study_of_a_later_version_is_shown_as_it_is_stored(study: optuna.Study, ask: Ask) -> None:
    ended(study, 2.0, 0.01)
    study.set_user_attr("configuration", {"from": "the future"})
    seen = ask("/api/studies/1").json
    assert {"key": "configuration", "value": '{"from": "the future"}'} in seen["user_attrs"]
    assert shown_trial(ask, 0)["constraints"] == [-0.5]


def test_a_picture_is_shown_from_the_folder_and_none_that_is_not_in_it(
    storage: BaseStorage, study: optuna.Study, artifacts: Path, tmp_path: Path, ask: Ask
) -> None:
    ended(study, 2.0, 0.01, folder=artifacts)
    ended(study, 2.1, 0.01, folder=tmp_path / "elsewhere")
    (picture,) = shown_trial(ask, 0)["artifacts"]
    assert shown_trial(ask, 1)["artifacts"] == []
    trial_id = shown_trial(ask, 0)["trial_id"]
    answer = ask(f"/artifacts/1/{trial_id}/{picture['artifact_id']}")
    assert (answer.status, answer.type) == ("200", "image/jpeg")
    with Image.open(io.BytesIO(answer.body)) as image:
        assert image.size == (60, 40)


@pytest.mark.parametrize("path", ["/dashboard", "/static/bundle.js", "/favicon.ico", "/csv/1"])
def test_a_client_that_says_little_is_answered(study: optuna.Study, ask: Ask, path: str) -> None:
    answer = ask(path)
    assert answer.status == "200"
    assert answer.body


def test_a_table_for_a_spreadsheet_has_the_readable_names(study: optuna.Study, ask: Ask) -> None:
    ended(study, 2.0, 0.01)
    (row,) = csv.DictReader(io.StringIO(ask("/csv/1").body.decode()))
    assert (row["State"], row["speedup"]) == ("COMPLETE", "2.0")
    assert row["UserAttribute clip_score loss (%)"] == "1.0"
    assert row["UserAttribute worker"] == "gpu0"


# It changes nothing but notes


def test_pictures_that_come_and_go_are_shown_while_they_are_there(
    storage: BaseStorage, study: optuna.Study, artifacts: Path
) -> None:
    ended(study, 2.0, 0.01, folder=artifacts)
    view = View(storage, artifacts)

    def shown() -> list[str]:
        (trial,) = view.get_all_trials(1)
        return [key for key in trial.system_attrs if key.startswith("artifacts:")]

    (key,) = shown()
    file = artifacts / key.removeprefix("artifacts:")
    kept = file.read_bytes()
    file.unlink()
    assert shown() == []
    file.write_bytes(kept)
    assert shown() == [key]


def test_own_notes_are_kept_and_ours_are_not_stored(
    storage: BaseStorage, study: optuna.Study, ask: Ask
) -> None:
    note = ask("/api/studies/1").json["note"]
    assert note["body"].endswith(f"\n{OWN_NOTES}\n")
    mine = "Looks *soft* at 3.\n" + "long " * 1000
    saved = {"version": note["version"] + 1, "body": note["body"] + mine}
    assert ask("/api/studies/1/note", "PUT", saved).status == "200"
    stored = storage.get_study_system_attrs(1)
    texts = [stored[key] for key in sorted(stored) if key.startswith("dashboard:note_str")]
    assert "".join(texts) == mine
    ended(study, 2.0, 0.01)
    again = ask("/api/studies/1").json["note"]
    assert again["version"] == note["version"] + 1
    assert again["body"].endswith(f"\n{OWN_NOTES}\n{mine}")
    assert "**2.00x" in again["body"]
    short = {"version": again["version"] + 1, "body": "mine alone"}
    assert ask("/api/studies/1/note", "PUT", short).status == "200"
    assert shown_note(ask).endswith(f"\n{OWN_NOTES}\nmine alone")


def test_two_who_write_a_note_at_once_do_not_overwrite_each_other(
    study: optuna.Study, ask: Ask
) -> None:
    assert ask("/api/studies/1/note", "PUT", {"version": 1, "body": "first"}).status == "200"
    assert ask("/api/studies/1/note", "PUT", {"version": 1, "body": "second"}).status == "409"
    assert shown_note(ask).endswith("\nfirst")


def test_of_two_who_save_a_note_at_the_same_moment_one_succeeds(
    study: optuna.Study, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_read = threading.Barrier(2)
    read = View.get_study_system_attrs

    def together(view: View, study_id: int) -> dict[str, Any]:
        found = read(view, study_id)
        with suppress(threading.BrokenBarrierError):  # the other one has to wait
            both_read.wait(timeout=1)
        return found

    texts = ["first " * 1000, "second " * 1000]
    monkeypatch.setattr(View, "get_study_system_attrs", together)
    with ThreadPoolExecutor(2) as threads:
        bodies = [{"version": 1, "body": text} for text in texts]
        answers = threads.map(lambda body: ask("/api/studies/1/note", "PUT", body).status, bodies)
        statuses = list(answers)
    assert sorted(statuses) == ["200", "409"]
    assert shown_note(ask).endswith(f"\n{texts[statuses.index('200')]}")


@pytest.mark.parametrize("path", ["/api/studies/1/note", "/api/studies/1/1/note"])
def test_a_note_that_cannot_be_read_is_refused_in_words(
    study: optuna.Study, ask: Ask, path: str
) -> None:
    ended(study, 2.0, 0.01)
    for length in ("abc", "-1", "1.5"):
        answer = ask(path, "PUT", {"version": 1, "body": "x"}, length=length)
        assert (answer.status, length in answer.json["reason"]) == ("400", True)
    answer = ask(path, "PUT", raw=b"[" * 100_000)
    assert (answer.status, "nested" in answer.json["reason"]) == ("400", True)


def test_a_note_of_a_trial_is_kept(study: optuna.Study, ask: Ask) -> None:
    ended(study, 2.0, 0.01)
    body = {"version": 1, "body": f"a\n{OWN_NOTES}\nb"}
    assert ask("/api/studies/1/1/note", "PUT", body).status == "200"
    assert shown_trial(ask, 0)["note"] == {"version": 1, "body": f"a\n{OWN_NOTES}\nb"}


@pytest.mark.parametrize("body", [None, 5, [], {"version": 1}, {"version": 1, "body": 7}])
def test_a_note_that_is_none_does_no_harm(study: optuna.Study, ask: Ask, body: Any) -> None:
    before = shown_note(ask)
    assert ask("/api/studies/1/note", "PUT", body).status in ("400", "500")
    assert shown_note(ask) == before


def test_every_route_that_changes_something_but_notes_is_refused(
    storage: BaseStorage, study: optuna.Study, artifacts: Path, ask: Ask
) -> None:
    from optuna_dashboard import wsgi

    ended(study, 2.0, 0.01, folder=artifacts)
    before, files = storage.get_all_trials(1), sorted(artifacts.iterdir())
    routes = {(one.method, one.rule) for one in wsgi(View(storage, artifacts)).routes}
    changing = {(method, rule) for method, rule in routes if method not in ("GET", "HEAD")}
    assert len(changing) > 10, "its routes are found"
    for method, rule in changing:
        path = re.sub(r"<[^>]+>", "1", rule)
        if method == "PUT" and path.endswith("/note"):
            continue
        answer = ask(path, method, {"study_name": "x", "directions": ["maximize"]})
        assert answer.status == "403", rule
        assert "changes nothing but notes" in answer.json["reason"]
    assert [one.study_name for one in storage.get_all_studies()] == [study.study_name]
    assert storage.get_all_trials(1) == before
    assert sorted(artifacts.iterdir()) == files


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in vars(BaseStorage)
        if name.startswith(("set_", "create_", "delete_")) and name != "set_study_system_attr"
    ),
)
def test_the_view_of_a_storage_refuses_to_change_it(storage: BaseStorage, name: str) -> None:
    with pytest.raises(StorageError, match="must not change"):
        getattr(View(storage, Path("none")), name)(1, "x", 1)


def test_the_view_writes_no_attribute_of_a_study_but_notes(
    storage: BaseStorage, study: optuna.Study
) -> None:
    view = View(storage, Path("none"))
    for key in ("study:metric_names", "dashboard:plot_data:x:0", "x dashboard:note_ver"):
        with pytest.raises(StorageError, match="must not change"):
            view.set_study_system_attr(1, key, "x")


# Who can read it


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.3", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_only_loopback_is_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


@pytest.mark.parametrize(
    "host", ["evil.example:8080", "evil.example", "", "127.0.0.1.evil.example"]
)
def test_a_name_of_the_web_that_points_here_is_refused(
    study: optuna.Study, ask: Ask, host: str
) -> None:
    answer = ask("/api/studies", host=host)
    assert answer.status == "403"
    assert study.study_name.encode() not in answer.body


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:8080", "[::1]"])
def test_loopback_names_are_answered(study: optuna.Study, ask: Ask, host: str) -> None:
    assert study.study_name.encode() in ask("/api/studies", host=host).body


# As a process


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    arguments: list[str] = field(default_factory=list)

    def get(self, path: str) -> bytes:
        base = self.url.removesuffix("/dashboard")
        with urllib.request.urlopen(f"{base}{path}", timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def stop(self) -> tuple[int, str, str]:
        """Press Ctrl-C. The exit code, and what was told after the URL."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@contextmanager
def running(storage: str, artifacts: Path, *options: str) -> Iterator[Running]:
    """`accelsearch dashboard` on a free port, with the storage in its environment."""
    command = shutil.which("accelsearch", path=str(Path(sys.executable).parent))
    assert command is not None
    arguments = [command, "dashboard", "--artifacts", str(artifacts), "--port", "0", *options]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"ACCELSEARCH_STORAGE": storage, "OMP_NUM_THREADS": "1"},
        # Tests that run in a shell's background ignore Ctrl-C, and what they start would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), process.stderr.read()
        yield Running(process, url, arguments)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.postgres
def test_the_password_of_the_storage_is_told_nowhere(postgres: Any, artifacts: Path) -> None:
    url = postgres.new_database()
    password = make_url(url).password
    assert password
    study = filled(open_storage(url), artifacts)
    with running(url, artifacts) as dashboard:
        pages = [
            dashboard.get(path)
            for path in ("/dashboard", "/api/meta", "/api/studies", "/api/studies/1", "/csv/1")
        ]
        assert study.study_name.encode() in pages[2]
        process = psutil.Process(dashboard.process.pid)
        arguments = " ".join(process.cmdline())
        assert "dashboard" in arguments
        assert password not in arguments
        postgres.restart()
        pages.append(dashboard.get("/api/studies/1"))
        assert json.loads(pages[-1])["name"] == study.study_name, "it comes back with its server"
        code, out, err = dashboard.stop()
    assert password.encode() not in b"".join(pages)
    assert (code, out, err) == (0, "", "")


def test_it_listens_on_loopback_alone_and_ctrl_c_stops_it_quietly(
    tmp_path: Path, artifacts: Path
) -> None:
    url = new_database(tmp_path)
    study = started(open_storage(url))
    with running(url, artifacts) as dashboard:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/dashboard", dashboard.url)
        assert study.study_name.encode() in dashboard.get("/api/studies"), "the URL was ready"
        sockets = psutil.Process(dashboard.process.pid).net_connections()
        listening = {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        assert dashboard.stop() == (0, "", "")


def test_a_port_that_is_taken_is_told_in_one_line(storage: BaseStorage, artifacts: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DashboardError, match=rf"listen on 127.0.0.1, port {port}: Address"):
            serve(storage, artifacts, "127.0.0.1", port, ready=lambda _: None)


def test_a_host_that_is_not_of_this_machine_is_told_in_one_line(
    storage: BaseStorage, artifacts: Path
) -> None:
    with pytest.raises(DashboardError, match="must be able to listen on 203"):
        serve(storage, artifacts, "203.0.113.7", 0, ready=lambda _: None)


def test_without_the_extra_the_remedy_is_told(
    storage: BaseStorage, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(DashboardError, match=r"pip install 'accelsearch\[dashboard\]'"):
        serve(storage, artifacts, "127.0.0.1", 0, ready=lambda _: None)


def test_a_storage_that_is_not_there_is_told_in_one_line_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelsearch import cli

    url = f"sqlite:///{tmp_path}/none.db"
    monkeypatch.setattr(sys, "argv", ["accelsearch", "dashboard", "--storage", url])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    told = capsys.readouterr()
    assert (exited.value.code, told.out) == (2, "")
    assert told.err.startswith("accelsearch: storage must exist to be read")
    assert len(told.err.splitlines()) == 1
    assert not (tmp_path / "none.db").exists()


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


class Pages:
    """A browser at a dashboard, and all that went wrong in it."""

    def __init__(self, browser: Any, url: str) -> None:
        self._base = url.removesuffix("/dashboard")
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.problems: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._request)
        self.page.on("response", self._response)

    def open(self, path: str, shown: str) -> str:
        """Open a page, wait until it shows a text, and return all of its text, on one line."""
        self.page.goto(self._base + path)
        self.page.get_by_text(shown, exact=False).first.wait_for(timeout=30_000)
        return " ".join(self.page.inner_text("body").split())

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console {message.type}: {message.text}")

    def _dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self._base, "data:", "blob:")):
            self.problems.append(f"asks another host: {request.url}")

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")


@contextmanager
def writing(url: str, name: str) -> Iterator[list[int]]:
    """A worker that adds a trial every tenth of a second meanwhile, all slower than the best."""
    done, written = threading.Event(), list[int]()

    def work() -> None:
        own = optuna.load_study(study_name=name, storage=open_storage(url))
        while not done.wait(0.1):
            interval = 10 + len(written) % 90
            written.append(
                ended(own, 1.1, None, Outcome.DOMINATED, reason="slower", interval=interval)
            )

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield written
    finally:
        done.set()
        worker.join(timeout=60)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return new_database(tmp_path)
    url: str = request.getfixturevalue("postgres").new_database()
    return url


@pytest.mark.browser
def test_pages_show_what_the_database_holds_while_trials_are_written(
    browser: Any, database: str, artifacts: Path
) -> None:
    storage = open_storage(database)
    study = filled(storage, artifacts)
    with running(database, artifacts) as dashboard, writing(database, study.study_name) as written:
        pages = Pages(browser, dashboard.url)
        assert study.study_name in pages.open("/dashboard", study.study_name)

        stored = read_study(study)
        best = fastest_feasible(stored)
        assert best is not None
        text = pages.open("/dashboard/studies/1", "Best Trial (number=1)")
        assert str(best.speedup) in text
        assert "2.30x [2.30, 2.30], trial 1" in text
        assert "clip_score loss of at most 2 %" in text
        assert "NVIDIA H200 (cuda" in text

        assert "budget 2 %" in text
        assert "Best feasible speedup so far" in text
        drawn = pages.page.wait_for_function(
            "document.getElementById('user-defined-plot:speedup-against-loss')?.data"
        ).json_value()
        (feasible,) = [trace for trace in drawn if trace.get("name") == "feasible"]
        kept = [one for one in stored.trials if one.outcome is Outcome.FEASIBLE]
        assert feasible["y"] == [one.speedup for one in kept]
        assert feasible["x"] == pytest.approx(
            [100 * one.loss(stored.configuration.budgets[0]) for one in kept]
        )
        plots = pages.page.locator("[id^='user-defined-plot:']")
        assert plots.count() == 2
        # Nothing hangs over, once both are drawn: they are drawn anew for every trial.
        pages.page.wait_for_function(
            """[...document.querySelectorAll("[id^='user-defined-plot:']")].every((plot) => {
                const drawn = plot.querySelector("svg.main-svg");
                return drawn && drawn.clientHeight <= plot.clientHeight;
            })"""
        )

        pages.open("/dashboard/studies/1/analytics", "Hyperparameter Relationships")
        pages.page.locator(".plotly .scatterlayer path.point").first.wait_for()

        text = pages.open("/dashboard/studies/1/trials?numbers=2", "over budget")
        assert "Pruned" in text
        assert "reason clip_score loss 6 % of 2 %, 1 of 2 images" in text
        assert f"Value {stored.trials[2].speedup}" in text

        text = pages.open("/dashboard/studies/1/trials?numbers=1", "Trial 1 (trial_id=2)")
        assert "Best Trial" in text
        assert best.measurement is not None
        for line in (
            "outcome feasible",
            f"speedup {best.speedup}",
            "clip_score loss (%) 1.5",
            f"latency (s) {best.measurement.latency.accelerated_median_s}",
            "worker gpu0",
        ):
            assert line in text
        image = pages.page.locator('img[src*="/artifacts/1/2/"]')
        image.wait_for()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 60

        text = pages.open("/dashboard/studies/1/note", "is the fastest within the budget")
        assert "2.30x [2.30, 2.30] is the fastest within the budget, by trial 1:" in text
        assert "DDIMScheduler" in text

        assert written, "trials came in meanwhile"
        latest = written[-1]
        # It may be shown as running at first.
        text = pages.open(f"/dashboard/studies/1/trials?numbers={latest}", "slower")
        assert f"Trial {latest} (" in text
        assert pages.problems == []
        pages.page.close()


ATTACK = (
    '<script>window.ran = 1</script><img src="x" onerror="window.ran = 2">'
    "[link](javascript:window.ran=3) ![i](x) <a href='javascript:window.ran=4'>a</a> "
    "`[out](http://x)` | \n\n# top\n\n<svg onload=window.ran=5>"
)

OWN_ATTACK = f"[link](javascript:window.ran=3) ![i](x)\n\n{ATTACK}"


@pytest.mark.browser
def test_text_that_others_chose_runs_nothing_and_makes_no_markup(
    browser: Any, tmp_path: Path, artifacts: Path
) -> None:
    url = new_database(tmp_path)
    storage = open_storage(url)
    configuration = configured(
        model=ATTACK, prompts=(ATTACK, "b"), prompts_name=ATTACK, negative_prompt=ATTACK
    )
    environment = replace(ENVIRONMENT, device=ATTACK, driver=ATTACK, versions={ATTACK: ATTACK})
    made = create_study(storage, configuration, environment, RandomSampler())
    attributes = dict(made.user_attrs)
    study = optuna.create_study(
        storage=storage, study_name=f"{ATTACK} by hand", direction="maximize"
    )
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    params: dict[str, Any] = {"cache_interval": 3, ATTACK: ATTACK}
    measurement = measured(2.0, 0.01, params)
    ended(study, 2.0, 0.01, folder=artifacts, reason=ATTACK, worker=ATTACK, measurement=measurement)
    trial_id = study.trials[0]._trial_id
    storage.set_study_system_attr(2, f"dashboard:{trial_id}:note_ver", 1)
    storage.set_study_system_attr(2, f"dashboard:{trial_id}:note_str:0", ATTACK)
    with running(url, artifacts) as dashboard:
        pages = Pages(browser, dashboard.url)
        for path, shown in (
            ("/dashboard", "by hand"),
            ("/dashboard/studies/2", "Best Trial (number=0)"),
            ("/dashboard/studies/2/analytics", "by hand"),
            ("/dashboard/studies/2/trials?numbers=0", "Trial 0 ("),
            ("/dashboard/studies/2/note", "is the fastest within the budget"),
        ):
            text = pages.open(path, shown)
            assert "window.ran" in text, "it is shown as text"
            pages.page.wait_for_timeout(500)
            assert pages.page.evaluate("window.ran") is None
            assert pages.page.locator("[onerror], [onload], a[href^=javascript]").count() == 0
            assert pages.page.locator("body script").count() == 0
        note = pages.page.locator("h1, h2, h3").all_inner_texts()
        assert "top" not in note
        assert pages.page.locator("a", has_text=re.compile("link|out")).count() == 0
        assert pages.problems == []
        pages.page.close()


@pytest.mark.browser
def test_own_notes_are_written_in_the_page_and_run_nothing(
    browser: Any, tmp_path: Path, artifacts: Path
) -> None:
    url = new_database(tmp_path)
    storage = open_storage(url)
    study = started(storage)
    storage.set_study_system_attr(1, "dashboard:note_ver", 1)
    storage.set_study_system_attr(1, "dashboard:note_str:0", f"mine\n\n{OWN_ATTACK}")
    with running(url, artifacts) as dashboard:
        pages = Pages(browser, dashboard.url)
        pages.open("/dashboard/studies/1/note", "Nothing within the budget yet.")
        assert study.study_name in pages.page.inner_text("body")
        pages.page.wait_for_timeout(500)
        assert pages.page.evaluate("window.ran") is None
        assert pages.page.locator("[onerror], [onload], a[href^=javascript]").count() == 0
        # It is Markdown of the person's own.
        assert pages.page.locator("img[alt=i]").count() == 1
        assert pages.problems == []
        link = pages.page.locator("a", has_text="link")
        link.click()
        assert link.get_attribute("href") == ""
        assert pages.page.evaluate("window.ran") is None

        pages.open("/dashboard/studies/1/note", OWN_NOTES.lstrip("# "))
        pages.page.locator("button:visible").last.click()  # the pencil
        editor = pages.page.locator("textarea:visible").first
        assert editor.input_value().endswith(ATTACK), "as it was written"
        editor.fill(editor.input_value().partition(OWN_NOTES)[0] + f"{OWN_NOTES}\nsoft edges")
        with pages.page.expect_response("**/api/studies/1/note"):
            pages.page.get_by_role("button", name="Save").click()
        stored = storage.get_study_system_attrs(1)
        assert stored["dashboard:note_str:0"] == "soft edges"
        pages.page.get_by_text("Success to save the note").wait_for()
        assert pages.problems == []
        pages.page.close()
