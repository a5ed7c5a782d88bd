"""optuna-dashboard on a database of ours, telling the truth about it.

Nothing is written for it: the pages are answered through a view, which translates a study at the
moment it is read. So studies of any age show the same, workers have nothing more to write, and
nothing stored can contradict the trials. The price is that plain `optuna-dashboard URL` shows the
attributes as they are stored, and neither constraints nor notes nor figures of ours.

The pages change nothing either, but for a person's own notes.
"""

from __future__ import annotations

import copy
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Container, Iterable
from contextvars import ContextVar
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from accelsearch.budget import loss_told, violation
from accelsearch.configuration import Budget
from accelsearch.console import speedup
from accelsearch.errors import DashboardError, StorageError, TrialError
from accelsearch.figures import search_time, speedup_against_loss
from accelsearch.measurement import Scores, score_loss, seconds_told, settings_told
from accelsearch.queries import (
    fastest_feasible,
    is_unconfirmed,
    outcomes,
    targeted,
    verification_told,
)
from accelsearch.storage import StoredStudy, StoredTrial, Verification, is_ours, read_both

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["OWN_NOTES", "View", "application", "is_loopback", "serve"]

OWN_NOTES = "## Own notes"
"""What a person writes into a study's note stands below this line; what is above it is ours."""

_NOTE = re.compile(r"/api/studies/(\d+)(/\d+)?/note")  # of a study, or of one of its trials
_STUDY = re.compile(r"/api/studies/(\d+)/?")
_NOTE_VERSION, _NOTE_TEXT = "dashboard:note_ver", "dashboard:note_str:"
_ARTIFACT = "artifacts:"
_CONSTRAINTS = "constraints"  # the one list that optuna-dashboard reads, as Optuna 4 wrote it
_LEAST_VIOLATION = 1e-9
_FIGURE_PX = 450  # the height that optuna-dashboard leaves for one
_MIB = 2**20

# The study whose page is asked for. optuna-dashboard reads all studies to show one of them, and
# notes and figures of the others would be made for nothing.
_ASKED: ContextVar[int | None] = ContextVar("asked", default=None)


def serve(
    storage: BaseStorage,
    artifacts: Path,
    host: str,
    port: int,
    ready: Callable[[str], None],
) -> None:
    """Answer requests until Ctrl-C. `ready` is called with the URL as soon as they are.

    Port 0 takes a free one.

    Raises:
        DashboardError: optuna-dashboard is not installed, or nobody can listen there.
    """
    app = application(storage, artifacts, local=is_loopback(host))
    try:
        server = _server(host, port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise DashboardError(
            f"the dashboard must be able to listen on {host}, port {port}: {why}; "
            "choose another with --host or --port (0 takes a free port)"
        ) from None
    with server:
        server.set_app(app)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{server.server_port}/dashboard")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on a host."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def application(storage: BaseStorage, artifacts: Path, *, local: bool = True) -> WSGIApplication:
    """The pages of optuna-dashboard on a view of this storage.

    A `local` one answers only browsers that ask for this machine by its loopback names, so that
    no page of the web can read it through a name of its own that it lets point here.

    Raises:
        DashboardError: optuna-dashboard is not installed.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise DashboardError(
            "the dashboard needs optuna-dashboard, which is not installed "
            f"({error}); run: pip install 'accelsearch[dashboard]'"
        ) from None
    pages: WSGIApplication = wsgi(View(storage, artifacts), FileSystemArtifactStore(artifacts))
    # optuna-dashboard compares a note's version and then writes it row by row: two at once would
    # both succeed, and their rows could mix.
    saving = threading.Lock()

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        method = environ["REQUEST_METHOD"]
        name = re.sub(r":\d*$", "", environ.get("HTTP_HOST", "")).strip("[]")
        if local and not is_loopback(name):
            told = f"this dashboard answers to loopback names alone, got {name!r}; see --host"
            return _refused(start_response, told)
        if method == "PUT" and (note := _NOTE.fullmatch(path)):
            try:
                # Outside the lock: whoever sends slowly must not keep others from saving.
                _take_body(environ, ours=note[2] is None)
            except ValueError as error:
                return _refused(start_response, str(error), "400 Bad Request")
            with saving:
                return _saved(pages, environ, start_response)
        if method not in ("GET", "HEAD"):
            return _refused(start_response, "this dashboard shows, and changes nothing but notes")
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")  # without it optuna-dashboard breaks
        asked = _STUDY.fullmatch(path)
        token = _ASKED.set(int(asked[1]) if asked else None)
        try:
            return pages(environ, start_response)
        finally:
            _ASKED.reset(token)

    return answer


class View(BaseStorage):
    """A storage as optuna-dashboard is to see it: read at every call, never written but for notes.

    Studies that accelsearch did not make, or that this version cannot read, are shown as they
    are stored.
    """

    def __init__(self, storage: BaseStorage, artifacts: Path) -> None:
        self._storage = storage
        self._artifacts = artifacts
        # Made again only where what they are made of has changed.
        self._trials: dict[int, tuple[FrozenTrial, Verification | None, set[str], FrozenTrial]] = {}
        self._notes: dict[int, tuple[StoredStudy, str, dict[str, str]]] = {}

    def get_all_studies(self) -> list[FrozenStudy]:
        studies = []
        for study in self._storage.get_all_studies():
            shown = copy.copy(study)
            if study._study_id == _ASKED.get():
                stored = self._read(study._study_id)[1]
                if stored is not None:
                    # Five of them are seen at once.
                    shown.user_attrs = {**result(stored), **facts(stored)}
                    shown.system_attrs = self._with_ours(study, stored)
            elif is_ours(study):
                shown.user_attrs = {}
            studies.append(shown)
        return studies

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        trials, study = self._read(study_id)
        shown = [
            self._shown(trial, study, index)
            for index, trial in enumerate(trials)
            if states is None or trial.state in states
        ]
        return copy.deepcopy(shown) if deepcopy else shown

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        trials, study = self._read(study_id)
        best = None if study is None else fastest_feasible(study)
        number = self._storage.get_best_trial(study_id).number if best is None else best.number
        return self._shown(trials[number], study, number)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._storage.get_trial(trial_id)  # whoever asks for one asks for its artifacts

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._storage.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._storage.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._storage.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._storage.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._storage.get_study_system_attrs(study_id)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        if not re.fullmatch(r"dashboard:(\d+:)?note_(ver|str:\d+)", key):
            self._refuse()
        self._storage.set_study_system_attr(study_id, key, value)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StorageError("the dashboard must not change what it shows, but for notes")

    create_new_study = delete_study = set_study_user_attr = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = _refuse
    set_trial_intermediate_value = set_trial_user_attr = set_trial_system_attr = _refuse

    def _read(self, study_id: int) -> tuple[list[FrozenTrial], StoredStudy | None]:
        """The trials as they are stored, and what we understand of them in the same order."""
        try:
            return read_both(self._storage, study_id)
        except StorageError:
            return self._storage.get_all_trials(study_id, deepcopy=False), None

    def _shown(self, trial: FrozenTrial, study: StoredStudy | None, index: int) -> FrozenTrial:
        verification = None if study is None else study.verification(study.trials[index])
        known = self._trials.get(trial._trial_id)
        # Files come and go without a word in the trial.
        here = {key for key in trial.system_attrs if self._is_here(key)}
        if known is not None and known[0] is trial and known[1:3] == (verification, here):
            return known[3]
        shown = copy.copy(trial)
        if study is not None:
            shown.user_attrs = dict(attributes(study, study.trials[index]))
        limits = list(trial.constraints.values())
        if study is not None and verification is not None and not verification.verified:
            limits.append(_held_out_violation(study, verification))
        shown.system_attrs = {
            key: value for key, value in trial.system_attrs.items() if key in here
        } | {_CONSTRAINTS: limits}
        if trial.state.is_finished():
            self._trials[trial._trial_id] = trial, verification, here, shown
        return shown

    def _is_here(self, key: str) -> bool:
        """Whether an attribute is no artifact, or one whose file is in the folder."""
        name = key.removeprefix(_ARTIFACT)
        return name == key or (self._artifacts / name).is_file()

    def _with_ours(self, study: FrozenStudy, stored: StoredStudy) -> dict[str, Any]:
        """The system attributes of a study, with our note above its own, and with our figures."""
        known = self._notes.get(study._study_id)
        if known is None or known[0] != stored:
            known = stored, note(stored), figures(stored)
            self._notes[study._study_id] = known
        own = {key: value for key, value in study.system_attrs.items() if _is_note(key)}
        written = "".join(own[f"{_NOTE_TEXT}{index}"] for index in range(len(own)))
        others = {key: value for key, value in study.system_attrs.items() if key not in own}
        return {
            _NOTE_VERSION: 0,
            **others,
            f"{_NOTE_TEXT}0": f"{known[1]}\n{OWN_NOTES}\n{written}",
            **{f"dashboard:plot_data:{name}:0": figure for name, figure in known[2].items()},
        }


def attributes(study: StoredStudy, trial: StoredTrial) -> dict[str, str | int | float]:
    """What a person wants to know of a trial, by names that hold the units."""
    shown: dict[str, str | int | float] = {"outcome": trial.outcome.value, "reason": trial.reason}
    measurement = trial.measurement
    if measurement is not None:
        latency = measurement.latency
        shown["speedup"] = _rounded(latency.speedup)
        interval = latency.interval()
        if interval is not None:
            shown["speedup, 95 % interval"] = f"{interval[0]:.2f} to {interval[1]:.2f}"
        for scores in measurement.scores:
            try:
                name, value = _loss_of(scores)
            except TrialError:
                continue  # of a baseline that scores nothing, nothing can be lost
            shown[name] = _rounded(value)
        if measurement.scores:
            images = len(measurement.scores[0].accelerated)
            shown["images scored"] = f"{images} of {study.configuration.images}"
        sizes = {
            "latency (s)": latency.accelerated_median_s,
            "baseline latency (s)": latency.baseline_median_s,
            "peak memory (MiB)": _mib(measurement.peak_memory_bytes),
            "baseline peak memory (MiB)": _mib(measurement.baseline_peak_memory_bytes),
            "compile time (s)": measurement.compile_s,
        }
        shown |= {name: _rounded(size) for name, size in sizes.items() if size is not None}
    if trial.seconds:
        shown["time spent (s)"] = _rounded(sum(trial.seconds.values()))
    verification = study.verification(trial)
    if verification is not None:
        shown["held-out prompts"] = verification_told(study, verification)
    if trial.reused_from is not None:
        shown["measured by trial"] = trial.reused_from
    if trial.resumes is not None:
        shown["resumes trial"] = trial.resumes
    if trial.worker:
        shown["worker"] = trial.worker
    return shown


def result(study: StoredStudy) -> dict[str, str]:
    """What a study has found so far."""
    best = fastest_feasible(study)
    counted = (f"{count} {outcome.value}" for outcome, count in outcomes(study).items())
    return {
        "fastest within the budget": "none yet"
        if best is None
        else f"{speedup(best)}, trial {best.number}, not verified on held-out prompts"
        if is_unconfirmed(study, best)
        else f"{speedup(best)}, trial {best.number}",
        "trials": ", ".join(counted) or "none",
        **({} if study.stopped is None else {"last search ended": study.stopped}),
    }


def facts(study: StoredStudy) -> dict[str, str]:
    """What a study searches, within which budget, and where."""
    what, where = study.configuration, study.environment
    parts = (
        where.device_type,
        where.driver and f"driver {where.driver}",
        where.cuda and f"CUDA {where.cuda}",
        f"{where.threads} thread{'s' * (where.threads > 1)}" if where.threads else None,
    )
    libraries = {"Python": where.python, **where.versions}
    count = "" if study.settings is None else f" of {study.settings} settings"
    return {
        "budget": " and ".join(map(_limit, what.budgets)),
        "device": f"{where.device} ({', '.join(filter(None, parts))})",
        "methods": ", ".join(what.methods) or "none",
        "model": what.model + (f" at {what.revision}" if what.revision else ""),
        "pipeline": what.pipeline,
        "scheduler": what.scheduler,
        "steps": str(what.steps),
        "prompts": f"{what.prompts_name}, {len(what.prompts)} of them",
        "images": f"{what.height} x {what.width}, batch {what.batch_size}, {what.dtype}, "
        f"guidance {what.guidance_scale:g}",
        "search": f"{what.search.sampler}, at most {what.search.trials} trials{count}",
        "libraries": ", ".join(f"{name} {version}" for name, version in libraries.items()),
    }


def note(study: StoredStudy) -> str:
    """A study's note, in Markdown: the result, what became of the trials, and what was searched.

    All text that others chose stands in code spans, where neither Markdown nor HTML is read.
    """
    best = fastest_feasible(study)
    lines = ["## Result", ""]
    if best is None:
        lines += ["Nothing within the budget yet."]
    else:
        shown = re.sub(r"([\[\]])", r"\\\1", speedup(best))
        kept = (
            "is not verified on held-out prompts, as no other is, and the fastest"
            if is_unconfirmed(study, best)
            else "is the fastest within the budget"
        )
        lines += [f"**{shown}** {kept}, by trial {best.number}:", ""]
        lines += [f"- {_code(settings_told(best.params))}"]
        losses = ((best.loss(budget), budget) for budget in study.configuration.budgets)
        lines += [f"- {loss_told(loss, budget)}" for loss, budget in losses if loss is not None]
        verification = study.verification(best)
        told = "" if verification is None else verification_told(study, verification)
        lines += [f"- {told or 'not judged by held-out prompts'}"]
    for asked, choice in study.requests.items():
        answer = targeted(study, asked, choice)
        told = "nothing yet" if answer is None else f"trial {answer.number}, {answer.speedup:.2f}x"
        lines += ["", f"{asked:g}x was asked for: {told}."]
    lines += ["", "## Trials", "", f"- {result(study)['trials']}"]
    baselines = [
        one.measurement.latency.baseline_median_s for one in study.current if one.measurement
    ]
    if baselines:
        lines += [f"- baseline latency {seconds_told(median(baselines))}"]
    lines += ["", "## Searched", ""]
    lines += [f"- {name}: {_code(told)}" for name, told in facts(study).items()]
    lines += [
        "",
        "What you write below the next line is kept. The rest is made anew at every look.",
    ]
    return "\n".join([*lines, ""])


def figures(study: StoredStudy) -> dict[str, str]:
    """Our figures as JSON of plotly, by names that are fit for HTML."""
    traded, spent = speedup_against_loss(study), search_time(study)
    title = {"text": "Speedup against score loss", "x": 0.02, "y": 0.97, "font": {"size": 18}}
    traded.update_layout(title=title, margin={"t": 100})
    spent.update_layout(legend={"font": {"size": 11}}, margin={"t": 32, "b": 32})
    for figure in (traded, spent):
        # Its ink is for white paper: whether the page is dark, only the browser knows.
        figure.update_layout(height=_FIGURE_PX, paper_bgcolor="white")
    return {"speedup-against-loss": traded.to_json(), "search-time": spent.to_json()}


def _loss_of(scores: Scores) -> tuple[str, float]:
    """What a metric says of a trial, with its unit."""
    if scores.metric == "psnr":
        return "psnr (dB)", fmean(scores.accelerated)
    return f"{scores.metric} loss (%)", 100 * score_loss(scores)


def _limit(budget: Budget) -> str:
    if budget.floor_db is not None:
        return f"psnr of at least {budget.floor_db:g} dB"
    return f"{budget.metric} loss of at most {100 * budget.max_loss:g} %"


def _held_out_violation(study: StoredStudy, verification: Verification) -> float:
    """By how much held-out prompts break a budget; more than 0 also where they are too few."""
    if verification.aside or verification.failure is not None:
        return _LEAST_VIOLATION
    by_metric = {scores.metric: scores for scores in verification.scores}
    return max(
        _LEAST_VIOLATION,
        *(
            violation(score_loss(by_metric[budget.metric], budget.floor_db), budget)
            for budget in study.configuration.budgets
        ),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _mib(size: int | None) -> float | None:
    return None if size is None else size / _MIB


def _code(text: str) -> str:
    """Text of others as a code span of Markdown, on one line."""
    plain = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{ticks} {plain} {ticks}"


def _is_note(key: str) -> bool:
    return re.fullmatch(rf"{_NOTE_TEXT}\d+", key) is not None


def _take_body(environ: WSGIEnvironment, *, ours: bool) -> None:
    """Read a note that a person saves, and take `ours` out: it is made anew at every look.

    Raises:
        ValueError: its length is no number, or its JSON is nested too deeply to be read.
    """
    told = environ.get("CONTENT_LENGTH") or "0"
    if not (told.isascii() and told.isdigit()):
        raise ValueError(f"Content-Length must be a number, got {told!r}")
    sent = environ["wsgi.input"].read(int(told))
    try:
        saved = json.loads(sent)
        if ours:
            above, line, own = saved["body"].partition(f"\n{OWN_NOTES}\n")
            sent = json.dumps(saved | {"body": own if line else above}).encode()
    except RecursionError:
        raise ValueError("a note must be JSON that is not nested so deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # optuna-dashboard says what is wrong with it
    environ["wsgi.input"] = BytesIO(sent)
    environ["CONTENT_LENGTH"] = str(len(sent))


def _saved(
    pages: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    """The answer to a note, as JSON even where there is nothing to say.

    The pages of optuna-dashboard 0.21 read its empty one as JSON, and fail.
    """
    empty = False

    def start(status: str, headers: list[tuple[str, str]], error: Any = None) -> Any:
        nonlocal empty
        empty = status.startswith("204")
        return start_response("200 OK" if empty else status, headers, error)

    body = pages(environ, start)
    return [b"{}"] if empty else body


def _refused(
    start_response: StartResponse, reason: str, status: str = "403 Forbidden"
) -> list[bytes]:
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps({"reason": reason}).encode()]


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # an open request holds nothing up at the end

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of the machine's full name, which can take long.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a browser that went away
            super().handle_error(request, client_address)


class _Server6(_Server):
    address_family = socket.AF_INET6


def _server(host: str, port: int) -> _Server:
    return (_Server6 if ":" in host else _Server)((host, port), _Handler)
