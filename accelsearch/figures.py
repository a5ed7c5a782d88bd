"""Figures of one stored study, for pages that may be light or dark: plotly, and nothing measured.

Every outcome has a colour and a shape, so that nobody needs to tell colours apart. All text that
comes from outside (names, values, reasons) is escaped: plotly takes tags in a text for markup.
"""

from __future__ import annotations

import html
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.distributions import CategoricalDistribution
from plotly.subplots import make_subplots

from accelsearch.budget import interval_told, loss_told
from accelsearch.configuration import Budget
from accelsearch.measurement import ParamValue, settings_told
from accelsearch.queries import fastest_feasible, is_unconfirmed, pareto_front, verification_told
from accelsearch.storage import Outcome, StoredStudy, StoredTrial

__all__ = [
    "ACCENT",
    "DARK",
    "FEWEST_TRIALS",
    "LIGHT",
    "Axis",
    "importances",
    "loss_axis",
    "parameter_effects",
    "parameter_importances",
    "search_time",
    "speedup_against_loss",
    "varied",
]

FEWEST_TRIALS = 12
"""Trials that it takes to say which parameters matter, and 4 for each parameter."""

ACCENT = "#2f81c4"
# Okabe and Ito's colours, a little lighter or darker, so that each stands out on white and black.
_WARM, _GREEN, _YELLOW, _VIOLET, _GREY = "#d9622b", "#1a9c78", "#d99a1c", "#b07aa8", "#8a919c"
# Name, colour and marker of each outcome that has a speedup, the most telling last: on top.
_LOOKS: dict[Outcome, tuple[str, str, str]] = {
    Outcome.UNSCORED: ("only timed", _GREY, "line-ew-open"),
    Outcome.INTERRUPTED: ("interrupted", _GREY, "cross-thin-open"),
    Outcome.DOMINATED: ("dominated", _GREY, "diamond-open"),
    Outcome.TOO_SLOW: ("too slow", _GREY, "triangle-down-open"),
    Outcome.OVER_BUDGET: ("over budget", _WARM, "x-thin-open"),
    Outcome.FEASIBLE: ("feasible", ACCENT, "circle"),
}
_PARTS = {  # of a trial's time
    "latency": ("timing calls", ACCENT),
    "images": ("making images", _YELLOW),
    "baseline": ("baseline images", _VIOLET),
    "scores": ("scoring", _GREEN),
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def _template(ink: str, faint: str, grid: str, paper: str) -> go.layout.Template:
    axis = {
        "gridcolor": grid,
        "linecolor": faint,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": grid,
        "tickfont": {"color": faint, "size": 12},
        "title": {"font": {"color": ink, "size": 13}, "standoff": 10},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 13, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.03,
                "yanchor": "bottom",
                "title": {"text": ""},
            },
            "hoverlabel": {
                "bgcolor": paper,
                "bordercolor": faint,
                "font": {"family": _FONT, "size": 12, "color": ink},
                "align": "left",
            },
            "margin": {"l": 64, "r": 20, "t": 48, "b": 56},
            "hovermode": "closest",
        }
    )


LIGHT = _template("#1c2127", "#5c6570", "#e7eaee", "#ffffff")
"""The template of figures as they are made."""
DARK = _template("#e8eaed", "#a4acb8", "#2b3038", "#1d2127")
"""The one to show them with on a dark page."""


@dataclass(frozen=True)
class Axis:
    """How a budget's loss is shown: `scale` turns it into the unit that `title` names."""

    title: str
    scale: float
    suffix: str


def loss_axis(budget: Budget) -> Axis:
    """The axis of a budget's loss, in the metric's own unit."""
    if budget.floor_db is not None:
        return Axis(f"mean PSNR below the floor of {budget.floor_db:g} dB (dB)", 1.0, " dB")
    if budget.metric == "ssim":
        return Axis("score loss: 1 − mean SSIM", 1.0, "")
    return Axis(f"score loss: fall of the mean {budget.metric} (%)", 100.0, " %")


def speedup_against_loss(study: StoredStudy) -> go.Figure:
    """Every measured trial by outcome, speedup against the first budget's loss.

    With the budget, the Pareto front, the best trial and what held-out prompts say of it. Trials
    whose images were never scored have no loss: they stand in a strip of their own.
    """
    budget = study.configuration.budgets[0]
    axis = loss_axis(budget)
    timed = [one for one in study.current if one.speedup is not None]
    scored = [one for one in timed if one.loss(budget) is not None]
    if not timed:
        return _nothing("No trial has been measured yet.")
    strip = len(scored) < len(timed)
    figure = make_subplots(
        cols=2 if strip else 1,
        column_widths=[0.87, 0.13] if strip else None,
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )

    def add(trials: Sequence[StoredTrial], column: int = 1, **look: Any) -> None:
        xs = (
            [_scaled(one, budget, axis) for one in trials]
            if column == 1
            else ["not scored"] * len(trials)
        )
        figure.add_trace(
            go.Scatter(
                x=xs,
                y=[one.speedup for one in trials],
                hovertext=[_hover(study, one) for one in trials],
                **{"mode": "markers", "hoverinfo": "text", **look},
            ),
            row=1,
            col=column,
        )

    add(
        pareto_front(study),
        mode="lines",
        line={"color": _GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )
    for outcome, (name, colour, symbol) in _LOOKS.items():
        marker = {
            "color": colour,
            "symbol": symbol,
            "size": 9,
            "line": {"width": 2, "color": colour},
        }
        if outcome is Outcome.FEASIBLE:
            marker["line"] = {"width": 0}
        here = [one for one in scored if one.outcome is outcome]
        there = [one for one in timed if one.outcome is outcome and one not in scored]
        if here:
            add(here, marker=marker, name=name, legendgroup=name)
        if there:
            add(there, 2, marker=marker, name=name, legendgroup=name, showlegend=not here)
    tried = [one for one in scored if study.verification(one) is not None]
    for name, colour, refuted in (
        ("verified on held-out prompts", _GREEN, False),
        ("not verified on held-out prompts", _WARM, True),
    ):
        ringed = [one for one in tried if is_unconfirmed(study, one) is refuted]
        if ringed:
            ring = {"symbol": "circle-open", "size": 17, "line": {"width": 2}, "color": colour}
            add(ringed, marker=ring, name=name)
    best = fastest_feasible(study)
    if best is not None:
        add(
            [best],
            mode="markers+text",
            marker={"symbol": "star", "size": 15, "color": ACCENT},
            text=[f"<b>{best.speedup:.2f}x</b>"],
            textposition="top center",
            textfont={"size": 14},
            name="best",
        )
    limit = budget.max_loss * axis.scale
    figure.add_vline(x=limit, line={"color": _WARM, "width": 1.5, "dash": "dash"}, row=1, col=1)
    figure.add_annotation(
        x=limit,
        y=1,
        yref="y domain",
        yanchor="top",
        xanchor="left",
        text=f"budget {limit:g}{axis.suffix}" if budget.floor_db is None else "floor",
        showarrow=False,
        font={"color": _WARM, "size": 12},
        xshift=4,
        row=1,
        col=1,
    )
    figure.add_hline(y=1, line={"color": _GREY, "width": 1}, row=1, col=1)
    figure.update_xaxes(title_text=axis.title, row=1, col=1)
    figure.update_yaxes(title_text="speedup (x)", row=1, col=1)
    if strip:
        figure.update_xaxes(showgrid=False, row=1, col=2)
    return _finished(figure, 460)


def search_time(study: StoredStudy) -> go.Figure:
    """Where the time of the search went: the running best over it, and its parts by outcome."""
    spent = [(one, one.seconds) for one in study.trials if sum(one.seconds.values()) > 0]
    if not spent:
        return _nothing("No times are stored with these trials.")
    total_s = sum(sum(seconds.values()) for _, seconds in spent)
    figure = make_subplots(
        rows=2,
        row_heights=[0.55, 0.45],
        vertical_spacing=0.3,  # a phone's legend takes several rows of the height
        subplot_titles=("Best feasible speedup so far", "Time by how trials ended"),
    )
    _running_best(study, figure)
    outcomes = [one for one in Outcome if any(trial.outcome is one for trial, _ in spent)]
    unit, unit_s = _unit(total_s)
    parts = list(dict.fromkeys([*_PARTS, *(part for _, own in spent for part in own)]))
    for part in parts:
        by_outcome = {
            outcome: sum(own.get(part, 0.0) for one, own in spent if one.outcome is outcome)
            for outcome in outcomes
        }
        if sum(by_outcome.values()) == 0:
            continue
        name, colour = _PARTS.get(part, (_text(part), _GREY))
        figure.add_trace(
            go.Bar(
                y=[f"{one.value} ({_count(spent, one)})" for one in outcomes],
                x=[by_outcome[one] / unit_s for one in outcomes],
                orientation="h",
                name=name,
                marker={"color": colour},
                hoverinfo="text",
                hovertext=[
                    f"{one.value}: {name} {_told_s(by_outcome[one])}, "
                    f"{by_outcome[one] / total_s:.0%} of all time"
                    for one in outcomes
                ],
                textposition="none",
            ),
            row=2,
            col=1,
        )
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    figure.update_xaxes(title_text=f"time of trials ({unit})", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False, row=2, col=1)
    _left_titles(figure)
    figure.update_layout(legend={"y": -0.16, "yanchor": "top"})
    return _finished(figure, 440 + 36 * len(outcomes))


def parameter_effects(study: StoredStudy) -> go.Figure:
    """Speedup and the first budget's loss of every measured trial against each parameter."""
    names = varied(study)
    timed = [one for one in study.current if one.speedup is not None]
    if not names:
        return _nothing("No parameter has had two values yet.")
    budget = study.configuration.budgets[0]
    axis = loss_axis(budget)
    figure = make_subplots(
        rows=2,
        cols=len(names),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=min(0.03, 0.3 / len(names)),
        vertical_spacing=0.06,
    )
    for column, name in enumerate(names, 1):
        values = _sorted({one.params[name] for one in timed if name in one.params})
        numeric = all(type(value) in (int, float) for value in values)
        for outcome, (told, colour, symbol) in _LOOKS.items():
            here = [one for one in timed if one.outcome is outcome and name in one.params]
            for row in (1, 2):
                shown = here if row == 1 else [one for one in here if one.loss(budget) is not None]
                if not shown:
                    continue
                figure.add_trace(
                    go.Scatter(
                        x=[
                            one.params[name] if numeric else _text(str(one.params[name]))
                            for one in shown
                        ],
                        y=[
                            one.speedup if row == 1 else _scaled(one, budget, axis) for one in shown
                        ],
                        mode="markers",
                        name=told,
                        legendgroup=told,
                        showlegend=False,
                        marker={
                            "color": colour,
                            "symbol": symbol,
                            "size": 7,
                            "opacity": 0.85,
                            "line": {"width": 1.5, "color": colour},
                        },
                        hovertext=[_hover(study, one) for one in shown],
                        hoverinfo="text",
                    ),
                    row=row,
                    col=column,
                )
        figure.update_xaxes(title_text=_text(name), row=2, col=column)
        if not numeric:
            order = [_text(str(value)) for value in values]
            figure.update_xaxes(
                type="category", categoryorder="array", categoryarray=order, col=column
            )
        elif len(values) <= 8:
            figure.update_xaxes(tickvals=values, col=column)
    shown_names = {trace.name for trace in figure.data}
    for told in shown_names:
        next(one for one in figure.data if one.name == told).showlegend = True
    figure.add_hline(
        y=budget.max_loss * axis.scale,
        line={"color": _WARM, "width": 1.2, "dash": "dash"},
        row=2,
        col="all",
    )
    figure.update_yaxes(title_text="speedup (x)", row=1, col=1)
    short = "loss (%)" if axis.scale != 1 else f"loss{' (dB)' if axis.suffix else ''}"
    figure.update_yaxes(title_text=short, row=2, col=1)
    return _finished(figure, 460)


def parameter_importances(
    study: StoredStudy, found: dict[str, dict[str, float]] | str | None = None
) -> go.Figure:
    """How much each parameter decides about the speedup, and about the first budget's loss.

    `found` is what `importances` says of the study, where that is known already.
    """
    found = importances(study) if found is None else found
    if isinstance(found, str):
        return _nothing(found)
    names = list(next(iter(found.values())))[::-1]
    figure = go.Figure()
    for of, colour in (("score loss", _YELLOW), ("speedup", ACCENT)):
        if of in found:
            shares = [100 * found[of].get(name, 0.0) for name in names]
            figure.add_trace(
                go.Bar(
                    y=[_text(name) for name in names],
                    x=shares,
                    orientation="h",
                    name=f"of the {of}",
                    marker={"color": colour},
                    hoverinfo="text",
                    hovertext=[
                        f"{_text(name)}: {share:.0f} % of what decides about the {of}"
                        for name, share in zip(names, shares, strict=True)
                    ],
                    textposition="none",
                )
            )
    figure.update_layout(barmode="group", bargap=0.4, legend={"traceorder": "reversed"})
    figure.update_xaxes(title_text="importance (% of all parameters)", range=[0, 100])
    figure.update_yaxes(showgrid=False)
    return _finished(figure, 150 + 52 * len(names))


def importances(study: StoredStudy) -> dict[str, dict[str, float]] | str:
    """Each varied parameter's share, 0..1, in what decides; together they are 1.

    The largest first by the sum over what they decide about: "speedup" and "score loss" (of the
    first budget; left out where too few trials were scored). Where there are too few trials to say,
    the reason instead.

    Source: Watanabe, Bansal & Hutter, PED-ANOVA: Efficiently Quantifying Hyperparameter Importance
    in Arbitrary Subspaces, 2023, as Optuna implements it: which parameters separate the best
    quarter of all settings from the others.
    """
    names = varied(study)
    if len(names) < 2:
        return "Fewer than two parameters were varied, so that there is nothing to weigh."
    budget = study.configuration.budgets[0]
    timed = [
        one
        for one in study.current
        if one.speedup is not None and all(name in one.params for name in names)
    ]
    scored = [(one, loss) for one in timed if (loss := one.loss(budget)) is not None]
    needed = max(FEWEST_TRIALS, 4 * len(names))
    if len(timed) < needed:
        return (
            f"{len(timed)} measured trials are too few to say which of {len(names)} parameters "
            f"matter; it takes {needed}."
        )
    told = {"speedup": [(one.params, -(one.speedup or 0.0)) for one in timed]}
    if len(scored) >= needed:
        told["score loss"] = [(one.params, loss) for one, loss in scored]
    weighed = {of: _shares(values, names) for of, values in told.items()}
    found = {of: shares for of, shares in weighed.items() if shares is not None}
    if not found:
        return "All settings are as good as each other: no parameter decides anything."
    order = sorted(names, key=lambda name: -sum(own[name] for own in found.values()))
    return {of: {name: own[name] for name in order} for of, own in found.items()}


def varied(study: StoredStudy) -> list[str]:
    """The parameters that have had two values in measured trials, in the order of their storing."""
    timed = [one for one in study.current if one.speedup is not None]
    names = dict.fromkeys(name for one in timed for name in one.params)
    return [
        name for name in names if len({one.params[name] for one in timed if name in one.params}) > 1
    ]


def _shares(
    told: Sequence[tuple[Mapping[str, ParamValue], float]], names: Sequence[str]
) -> dict[str, float] | None:
    """Importances in making the value small; None where nothing separates the best quarter."""
    distributions = {}
    for name in names:
        values = _sorted({params[name] for params, _ in told})
        if len(values) > 1:
            distributions[name] = CategoricalDistribution(values)
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: params[name] for name in distributions},
                distributions=dict(distributions),
                value=value,
            )
            for params, value in told
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    with warnings.catch_warnings():
        # That all values are alike is told by the importances: they are zero.
        warnings.filterwarnings("ignore", message="Target and region quantiles")
        found = evaluator.evaluate(study)
    total = sum(found.values())
    if total <= 0:
        return None
    return {name: found.get(name, 0.0) / total for name in names}


def _running_best(study: StoredStudy, figure: go.Figure) -> None:
    """Add the best feasible speedup after each trial, over the hours since the first began."""
    ended = sorted(
        (one.finished, one.number, one)
        for one in study.trials
        if one.finished is not None and one.reused_from is None
    )
    if not ended:
        return
    began = min(when.timestamp() - sum(one.seconds.values()) for when, _, one in ended)
    lasted_s = ended[-1][0].timestamp() - began
    unit, unit_s = _unit(lasted_s)

    def at(when: datetime) -> float:
        return (when.timestamp() - began) / unit_s

    xs, ys, best = [], [], None
    for when, _, one in ended:
        kept = one.feasible(study.configuration) and not is_unconfirmed(study, one)
        if kept and one.speedup is not None and (best is None or one.speedup > best):
            best = one.speedup
            xs.append(at(when))
            ys.append(best)
    if best is not None:
        xs.append(lasted_s / unit_s)
        ys.append(best)
        figure.add_trace(
            go.Scatter(
                x=xs,
                y=ys,
                mode="lines",
                line={"color": ACCENT, "width": 2, "shape": "hv"},
                name="best so far",
                hoverinfo="skip",
                showlegend=False,
            ),
            row=1,
            col=1,
        )
    for outcome, (name, colour, symbol) in _LOOKS.items():
        here = [
            (when, one)
            for when, _, one in ended
            if one.outcome is outcome and one.speedup is not None
        ]
        if here:
            figure.add_trace(
                go.Scatter(
                    x=[at(when) for when, _ in here],
                    y=[one.speedup for _, one in here],
                    mode="markers",
                    marker={
                        "color": colour,
                        "symbol": symbol,
                        "size": 7,
                        "line": {"width": 1.5, "color": colour},
                    },
                    name=name,
                    showlegend=False,
                    hovertext=[_hover(study, one) for _, one in here],
                    hoverinfo="text",
                ),
                row=1,
                col=1,
            )
    figure.update_xaxes(title_text=f"time since the start ({unit})", row=1, col=1)
    figure.update_xaxes(rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="speedup (x)", row=1, col=1)


def _hover(study: StoredStudy, trial: StoredTrial) -> str:
    """What a trial's marker tells: outcome, speedup and losses with intervals, params, reason."""
    assert trial.measurement is not None
    configuration = study.configuration
    interval = trial.measurement.latency.interval()
    around = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    lines = [
        f"<b>trial {trial.number}</b>: {trial.outcome.value}",
        f"speedup {trial.speedup:.2f}x{around}",
    ]
    judgement = trial.judgement(configuration)
    for budget in configuration.budgets:
        loss = trial.loss(budget)
        if loss is None:
            continue
        told = loss_told(loss, budget)
        if judgement is not None:
            low, high = judgement.intervals[budget.metric]
            if low != high:
                told += f", {interval_told(low, high, budget)}"
        lines.append(told)
    if trial.measurement.scores:
        seen = len(trial.measurement.scores[0].accelerated)
        lines.append(f"{seen} of {configuration.images} images scored")
    lines += _wrapped(settings_told(trial.params))
    lines += _wrapped(trial.reason)
    verification = study.verification(trial)
    if verification is not None:
        lines += _wrapped(verification_told(study, verification))
    return "<br>".join(lines)


def _text(text: str) -> str:
    """Text from outside, shown as it is. Plotly knows no `&quot;`, and needs none."""
    return html.escape(" ".join(text.split()), quote=False)


def _wrapped(text: str) -> list[str]:
    return [_text(line) for line in textwrap.wrap(text, 60)[:6]]


def _scaled(trial: StoredTrial, budget: Budget, axis: Axis) -> float:
    loss = trial.loss(budget)
    assert loss is not None
    return loss * axis.scale


def _sorted(values: Iterable[ParamValue]) -> list[ParamValue]:
    """Numbers in their order, then the rest."""
    return sorted(
        values,
        key=lambda one: (isinstance(one, str), one if not isinstance(one, str) else 0, str(one)),
    )


def _count(spent: Sequence[tuple[StoredTrial, Any]], outcome: Outcome) -> int:
    return sum(one.outcome is outcome for one, _ in spent)


def _unit(seconds: float) -> tuple[str, float]:
    """The unit to show a duration in, and its seconds."""
    if seconds < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def _told_s(seconds: float) -> str:
    unit, unit_s = _unit(seconds)
    return f"{seconds / unit_s:.3g} {unit}"


def _left_titles(figure: go.Figure) -> None:
    for annotation in figure.layout.annotations:
        annotation.update(x=0, xanchor="left", font={"size": 13})


def _nothing(why: str) -> go.Figure:
    """A figure that says in words why there is none."""
    figure = go.Figure()
    figure.add_annotation(
        text=_text(why), x=0, y=0.5, xref="paper", yref="paper", xanchor="left", showarrow=False
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return _finished(figure, 120)


def _finished(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(template=LIGHT, height=height)
    return figure
