"""A report as one HTML file that needs no network, or as Markdown."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import plotly.offline
from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from accelsearch import __version__, figures
from accelsearch.budget import loss_told
from accelsearch.measurement import Environment, score_loss, seconds_told, settings_told
from accelsearch.pictures import AMPLIFIED, Pair
from accelsearch.queries import fastest_feasible, is_unconfirmed, outcomes, prompts_expected
from accelsearch.report import findings
from accelsearch.storage import Outcome, StoredStudy, StoredTrial

__all__ = ["LARGEST_BYTES", "PairsOf", "html_page", "markdown"]

LARGEST_BYTES = 9_500_000
"""The size that images may fill a page up to; figures and tables are never left out."""

PairsOf = Callable[[StoredStudy, StoredTrial], Sequence[Pair]]

_CROWDED = 4  # parameters that need more room than a phone has
_SMALL = 256  # px


def html_page(
    studies: Sequence[StoredStudy], stored: Iterable[StoredStudy], pairs_of: PairsOf
) -> str:
    """The page of these studies; `stored` are all there are, for what fewer steps would give.

    `pairs_of` gives the images that a trial has kept.
    """
    told = _told(studies, stored)
    made: dict[str, Any] = {}
    for study, section in zip(studies, told["sections"], strict=True):
        made |= {
            f"{section['id']}-speedup": figures.speedup_against_loss(study),
            f"{section['id']}-effects": figures.parameter_effects(study),
            f"{section['id']}-importances": figures.parameter_importances(
                study, section["weighed"]
            ),
            f"{section['id']}-time": figures.search_time(study),
        }
    drawn = {name: _plain(figure) for name, figure in made.items() if figure.data}
    notes = {
        name: Markup(figure.layout.annotations[0].text)  # noqa: S704  escaped for plotly
        for name, figure in made.items()
        if not figure.data
    }
    charts = {
        "figures": drawn,
        "light": figures.LIGHT.to_plotly_json(),
        "dark": figures.DARK.to_plotly_json(),
    }
    plotly_js, js = plotly.offline.get_plotlyjs(), _resource("report.js")
    left = LARGEST_BYTES - len(plotly_js) - len(json.dumps(charts)) - 20_000
    left -= sum(len(str(one)) for one in told["sections"])
    for index, (section, study) in enumerate(zip(told["sections"], studies, strict=True)):
        best = fastest_feasible(study)
        kept = () if best is None else pairs_of(study, best)
        shown, left = _shown(kept, left, left // (len(studies) - index), section["prompts"])
        section["pairs"], section["dropped"] = shown, len(kept) - len(shown)
        # A trial that was resumed has made a part of its images, the worst perhaps not among them.
        ranked = [row.place for row in section["prompts"]]
        first = min(len(shown), 8)
        section["worst"] = first if [one["place"] for one in shown[:first]] == ranked[:first] else 0
    return (
        _templates(autoescape=True)
        .get_template("report.html.j2")
        .render(
            **told,
            figures=charts,
            notes=notes,
            css=Markup(_resource("report.css")),  # noqa: S704  ours
            plotly=Markup(plotly_js),  # noqa: S704  plotly's own
            js=Markup(js),  # noqa: S704  ours
            policy=_policy(plotly_js, js),
            amplified=AMPLIFIED,
            made=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
            version=__version__,
        )
    )


def markdown(studies: Sequence[StoredStudy], stored: Iterable[StoredStudy]) -> str:
    """The same findings in Markdown, without figures and images."""
    templates = _templates(autoescape=False)
    templates.filters["cell"] = _cell
    return templates.get_template("report.md.j2").render(**_told(studies, stored))


def _templates(*, autoescape: bool) -> Templates:
    return Templates(
        loader=PackageLoader("accelsearch.report"),
        autoescape=autoescape,  # noqa: S701  off for Markdown, which escapes by `_cell`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _resource(name: str) -> str:
    file = resources.files("accelsearch.report") / "templates" / name
    return file.read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """Lets the page's own scripts run, known by their hashes, and nothing be loaded."""
    hashes = (
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    )
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _told(studies: Sequence[StoredStudy], stored: Iterable[StoredStudy]) -> dict[str, Any]:
    """What both kinds of page say."""
    everything = tuple(stored)
    best = [(trial, study) for study in studies if (trial := fastest_feasible(study))]
    top = max(best, key=lambda one: one[0].speedup or 0.0, default=None)
    devices = dict.fromkeys(study.environment.device for study in studies)
    environments = dict.fromkeys(_environment(study.environment) for study in studies)
    return {
        "title": "Nothing keeps its budget yet"
        if top is None
        else f"{top[0].speedup:.2f} times as fast, not verified on held-out prompts"
        if is_unconfirmed(top[1], top[0])
        else f"{top[0].speedup:.2f} times as fast within the budget",
        "summary": findings.summary(studies),
        "devices": ", ".join(devices),
        "top": None if top is None else _bound(top[1], top[0]),
        "sections": [_section(index, study, everything) for index, study in enumerate(studies)],
        "environments": list(environments),
    }


def _section(index: int, study: StoredStudy, everything: Sequence[StoredStudy]) -> dict[str, Any]:
    configuration, best = study.configuration, fastest_feasible(study)
    importances = figures.importances(study)
    fewer = findings.fewer_steps(study, everything)
    baseline = findings.baseline_s(study)
    return {
        "id": f"s{index}",
        "study": study.name,
        "name": findings.name_of(configuration),
        "device": study.environment.device,
        "trials": _trials_told(study),
        "baseline": None if baseline is None else _seconds(baseline),
        "bound": None if best is None else _bound(study, best),
        "fewer": findings.fewer_steps_told(study, fewer),
        "effects": findings.method_effects(study),
        "weighed": importances,
        "few": importances if isinstance(importances, str) else None,
        "importances": []
        if isinstance(importances, str)
        else [
            f"{of}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            for of, shares in importances.items()
        ],
        "crowded": len(figures.varied(study)) >= _CROWDED,
        "metric": configuration.budgets[0].metric,
        "metrics": []
        if best is None or best.measurement is None
        else [one.metric for one in best.measurement.scores],
        "prompts": [] if best is None else findings.prompt_losses(study, best),
        "sure": [] if best is None else findings.sureness(study, best),
        "plan": findings.plan_of(study),
        "prompts_note": f"Its prompts are those of the list {configuration.prompts_name}.",
        "commands": findings.commands(study, best),
    }


def _bound(study: StoredStudy, trial: StoredTrial) -> dict[str, Any]:
    assert trial.measurement is not None
    latency = trial.measurement.latency
    interval = latency.interval()
    losses = []
    for budget in study.configuration.budgets:
        loss = trial.loss(budget)
        if loss is not None:
            value, limit = _loss(loss_told(loss, budget), budget.metric)
            losses.append({"metric": budget.metric, "value": value, "limit": limit})
    return {
        "speedup": f"{latency.speedup:.2f}x",
        "interval": "too few pairs for an interval"
        if interval is None
        else f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}",
        "latency": _seconds(latency.accelerated_median_s),
        "baseline": _seconds(latency.baseline_median_s),
        "losses": losses,
        "settings": settings_told(trial.params),
        "trust": _trust(study, trial),
    }


def _loss(told: str, metric: str) -> tuple[str, str]:
    """What `loss_told` says, in two: `1.3 %` and `of 2 % allowed`."""
    text = told.removeprefix(f"{metric} ").removeprefix("loss ")
    if ", floor " in text:
        value, _, floor = text.partition(", floor ")
        return value, f"floor {floor}"
    value, _, limit = text.partition(" of ")
    return value, f"of {limit} allowed"


def _trust(study: StoredStudy, trial: StoredTrial) -> dict[str, str]:
    found = study.verification(trial)
    if found is None:
        told = "other trials were" if study.shares_spent else "nor was any other trial"
        return {"word": "not tried", "told": told, "mood": ""}
    if found.aside:
        expected = prompts_expected(study, trial)
        told = (
            "too close to its budget" if expected is None else f"it takes some {expected} prompts"
        )
        return {"word": "not tried", "told": told, "mood": ""}
    if found.failure is not None:
        return {"word": "not verified", "told": found.failure, "mood": "bad"}
    by_metric = {one.metric: one for one in found.scores}
    values = [
        _loss(
            loss_told(score_loss(by_metric[one.metric], one.floor_db), one),
            one.metric,
        )[0]
        for one in study.configuration.budgets
    ]
    told = f"{', '.join(values)} on {found.images} prompts"
    if found.verified:
        return {"word": "verified", "told": told, "mood": "good"}
    return {"word": "not verified", "told": told, "mood": "bad"}


def _trials_told(study: StoredStudy) -> str:
    counted = outcomes(study)
    parts = [f"{counted[one]} {one.value}" for one in Outcome if counted[one]]
    total = counted.total()
    return f"{total} setting{'s' * (total != 1)}: {', '.join(parts)}" if parts else "No trial yet"


def _environment(environment: Environment) -> tuple[tuple[str, str], ...]:
    rows = [
        ("Device", environment.device),
        ("Driver", environment.driver or ""),
        ("CUDA", environment.cuda or ""),
        ("Threads", str(environment.threads) if environment.threads else ""),
        ("Python", environment.python),
        ("Versions", ", ".join(f"{name} {one}" for name, one in environment.versions.items())),
    ]
    return tuple((name, told) for name, told in rows if told)


def _shown(
    kept: Sequence[Pair], left: int, share: int, rows: Sequence[findings.PromptLoss]
) -> tuple[list[dict[str, Any]], int]:
    """As many pairs as fit into a share of the bytes left, and what is left then."""
    by_place = {row.place: row for row in rows}
    shown = []
    for pair in kept:
        row = by_place.get(pair.prompt)
        files = (pair.baseline, pair.accelerated, pair.difference)
        cost = sum(len(one) * 4 // 3 for one in files) + 1000
        if row is None or cost > share:
            continue
        width, height = _size(pair.baseline)
        share, left = share - cost, left - cost
        shown.append(
            {
                **{
                    name: f"data:image/webp;base64,{base64.b64encode(one).decode()}"
                    for name, one in zip(
                        ("baseline", "accelerated", "difference"), files, strict=True
                    )
                },
                "width": width,
                "height": height,
                "small": " small" if max(width, height) <= _SMALL else "",
                "place": row.place,
                "prompt": row.prompt,
                "losses": row.losses,
            }
        )
    return shown, left


def _size(file: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(file)) as image:
        return image.size


def _plain(figure: Any) -> dict[str, Any]:
    """A figure as plain JSON, without the template: the page brings its own."""
    found: dict[str, Any] = json.loads(figure.to_json())
    del found["layout"]["template"]
    return found


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 0.9995 else seconds_told(value)


def _cell(text: str) -> str:
    """Text as Markdown shows it literally, on one line."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    for mark in "\\`*_[]|#!~$":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped
