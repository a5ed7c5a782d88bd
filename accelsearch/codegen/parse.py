"""From a sentence to a task: the strict form that `tasks` writes, and the looser ones of people.

    Generate a StableDiffusionPipeline pipeline using the DDIMScheduler sampler with 50 steps,
    accelerated by deepcache with 4.40x speedup and precision loss not exceeding 0.02.

    SDXL, Euler, 30 steps, DeepCache + T-GATE, 4x, loss at most 2 %

Every word must have been understood and every field be named once. What is left over, or missing,
or said in two ways, is told; nothing is guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from accelsearch.codegen.tasks import Task
from accelsearch.contract import Key
from accelsearch.errors import TaskError, nearest, shown

__all__ = ["PIPELINES", "SCHEDULERS", "Names", "parse"]

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
)
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
METHODS = ("compile", "deepcache", "tgate", "tome")

_T = TypeVar("_T")

_LONGEST = 2000  # characters of a sentence

# What people call them. A blank stands for blanks, hyphens or nothing. The longest that fits wins.
_ALIASES = {
    "pipeline": {
        "StableDiffusionPipeline": r"(?:sd|stable diffusion) (?:v ?)?1\.?[45]|stable diffusion|sd",
        "StableDiffusionXLPipeline": r"(?:sd|stable diffusion) xl(?: base)?(?: (?:v ?)?1\.0)?",
        "PixArtAlphaPipeline": r"pix art (?:alpha|α)",
        "PixArtSigmaPipeline": r"pix art (?:sigma|σ)",
        "PixArtAlphaPipeline or PixArtSigmaPipeline": r"pix art",
    },
    "scheduler": {
        "DDIMScheduler": r"ddim",
        "DDPMScheduler": r"ddpm",
        "DEISMultistepScheduler": r"deis",
        "DPMSolverMultistepScheduler": r"dpm(?: solver)? ?\+\+(?: 2m)?",
        "EulerAncestralDiscreteScheduler": r"euler (?:a|ancestral)",
        "EulerDiscreteScheduler": r"euler(?: discrete)?",
        "HeunDiscreteScheduler": r"heun",
        "LCMScheduler": r"lcm",
        "LMSDiscreteScheduler": r"lms",
        "PNDMScheduler": r"pndm",
        "TCDScheduler": r"tcd",
        "UniPCMultistepScheduler": r"unipc",
    },
    "method": {
        "compile": r"torch\.compile|compil(?:e|ed|ation)",
        "deepcache": r"deep cache",
        "tgate": r"t gate",
        "tome": r"to ?me sd|tome|token merging",
    },
}

_STRICT = re.compile(
    r"Generate an? (?P<pipeline>\w+) pipeline using the (?P<scheduler>\w+) sampler with "
    r"(?P<steps>\d+) steps, accelerated by (?P<methods>[^,]+?) with (?P<speedup>\S+)x speedup and "
    r"precision loss not exceeding (?P<loss>\S+?)\.?",
    re.ASCII,
)
_NUMBER = r"(?<![\w.+-])(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_IS_NUMBER = re.compile(_NUMBER, re.ASCII)
_LOSS_WORD = r"(?:(?:precision|quality|score|accuracy|clip|clip[ _]score) )*loss(?:es)?"
_AT_MOST = (
    r"(?:(?:of|is|be|not exceeding|not more than|no more than|not over|at most|up to|less than|"
    r"lower than|under|below|within|maximum|max\.?|budget|limit(?:ed to)?|[<=≤:]) ?){0,6}"
)
_AT_LEAST = r"(?:(?:of|at least|no less than|not less than|minimum|min\.?|[>=≥:]) ?){0,6}"
_PERCENT = r" ?(%|percent|per cent)"

# In this order: each takes what it matches out of the sentence. The groups of a loss are its number
# and its percent sign.
_LOSSES = (
    re.compile(rf"{_LOSS_WORD} ?{_AT_MOST}{_NUMBER}(?:{_PERCENT})?(?![\w%])"),
    re.compile(rf"{_AT_MOST}{_NUMBER}(?:{_PERCENT})? {_LOSS_WORD}(?!\w)"),
    re.compile(rf"{_AT_MOST}{_NUMBER}{_PERCENT}(?!\w)"),
)
_SPEEDUPS = (
    re.compile(
        rf"{_AT_LEAST}{_NUMBER}[ -]?(?:x|×|times|fold)(?![\w])"
        r"(?: (?:speed[ -]?up|acceleration|faster))?"
    ),
    re.compile(rf"speed[ -]?up ?{_AT_LEAST}{_NUMBER}(?![\w%])"),
    re.compile(rf"{_AT_LEAST}{_NUMBER} speed[ -]?up(?!\w)"),
)
_STEPS = (
    re.compile(r"(?<![\w.])(\d+)[ -]?(?:(?:inference|denoising|sampling|diffusion) )?steps?(?!\w)"),
    re.compile(r"(?<!\w)steps? ?[:=]? ?(\d+)(?![\w.])"),
)
_BARE = re.compile(rf"{_NUMBER}(?![\w%])")

_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "a accelerate accelerated accelerating acceleration an and at be build by can code create "
        "for generate give gives giving i image images in inference is it its make makes me model "
        "of on pipeline please produce run running sampler sampling scheduler script should source "
        "steps that the through to under use uses using via want we which with write",
    )
)


def parse(sentence: str, stored: Iterable[Key] | Names = ()) -> Task:
    """The task that a sentence asks for.

    Names in `stored` keys are understood beside those that everyone knows, and where "PixArt" may
    mean either of two pipelines, the one that they name is meant.

    Raises:
        TaskError: in one line, what of the sentence is not understood, missing or contradictory.
    """
    if not isinstance(sentence, str):
        raise TaskError(f"a task must be a sentence, got {shown(sentence)}")
    if not sentence.strip():
        raise TaskError("a task must be a sentence, got an empty line")
    if len(sentence) > _LONGEST:
        raise TaskError(f"a task must have at most {_LONGEST} characters, got {len(sentence)}")
    names = stored if isinstance(stored, Names) else Names.of(stored)
    text = " ".join(unicodedata.normalize("NFKC", sentence).split())
    return _strict(text, names) or _loose(text, names)


class Names(NamedTuple):
    """The names that may stand in a sentence."""

    pipeline: tuple[str, ...]
    scheduler: tuple[str, ...]
    method: tuple[str, ...]
    stored: frozenset[str]  # pipelines of stored results

    @classmethod
    def of(cls, keys: Iterable[Key]) -> Names:
        keys = list(keys)
        stored = frozenset(key.pipeline for key in keys)
        return cls(
            tuple(sorted({*PIPELINES, *stored})),
            tuple(sorted({*SCHEDULERS, *(key.scheduler for key in keys)})),
            tuple(sorted({*METHODS, *(name for key in keys for name in key.methods)})),
            stored,
        )


def _strict(text: str, names: Names) -> Task | None:
    """The task of a sentence as `tasks` writes it; None if it is not such a one."""
    match = _STRICT.fullmatch(text)
    if match is None or not all(_IS_NUMBER.fullmatch(match[one]) for one in ("speedup", "loss")):
        return None
    methods = tuple(match["methods"].split(" + "))
    for what, name, valid in (
        ("pipeline", match["pipeline"], names.pipeline),
        ("scheduler", match["scheduler"], names.scheduler),
        *(("method", method, names.method) for method in methods),
    ):
        if name not in valid:
            if _aliases(what, name):
                return None  # "SDXL" in the place of a class: for the looser form
            raise TaskError(f"unknown {what} {shown(name)}{nearest(name, valid)}")
    return Task(
        match["pipeline"],
        match["scheduler"],
        _whole(match["steps"]),
        methods,
        float(match["speedup"]),
        float(match["loss"]),
    )


def _loose(text: str, names: Names) -> Task:
    rest = _Rest(text.casefold())
    pipelines = [_meant(one, names) for one in rest.named("pipeline", names.pipeline)]
    schedulers = list(rest.named("scheduler", names.scheduler))
    methods = tuple(dict.fromkeys(rest.named("method", names.method)))
    steps = [_whole(groups[0]) for groups in rest.taken(_STEPS)]
    losses = [_loss(groups[0], groups[1]) for groups in rest.taken(_LOSSES)]
    speedups = [float(groups[0]) for groups in rest.taken(_SPEEDUPS)]
    if not losses:
        # The one number that is left, if it can be nothing else: "4x, 0.02".
        bare = _BARE.findall(rest.text)
        if len(bare) == 1 and "." in bare[0] and float(bare[0]) < 1:
            losses = [_loss(groups[0], "") for groups in rest.taken((_BARE,))]
    rest.refuse(names)
    missing = [
        what
        for what, found in (
            ("pipeline, such as SDXL", pipelines),
            ("scheduler, such as DDIM", schedulers),
            ("number of steps, such as 50 steps", steps),
            ("method, such as DeepCache", methods),
            ("speedup, such as 4.4x", speedups),
            ("largest loss, such as loss 2 %", losses),
        )
        if not found
    ]
    if missing:
        raise TaskError(f"a task must name a {'; a '.join(missing)}; got {shown(text, 120)}")
    return Task(
        _one("pipeline", pipelines),
        _one("scheduler", schedulers),
        _one("number of steps", steps),
        methods,
        _one("speedup", speedups),
        _one("loss", losses),
    )


class _Rest:
    """A sentence, in lower case, from which one thing after another is taken out."""

    def __init__(self, text: str) -> None:
        self.text = text

    def named(self, what: str, valid: Iterable[str]) -> Iterator[str]:
        """Take out what names one of the `valid` names, by its name or by what it is called."""
        patterns = [(name, re.escape(name.casefold())) for name in valid]
        patterns += [(name, alias.replace(" ", "[ -]?")) for name, alias in _ALIASES[what].items()]
        found: list[tuple[int, int, str]] = []
        for name, pattern in patterns:
            for match in re.finditer(rf"(?<![\w.])(?:{pattern})(?![\w+]|\.\w)", self.text):
                found.append((match.start(), -match.end(), name))
        end = 0
        for start, minus_end, name in sorted(found):
            if start >= end:
                end = -minus_end
                self._take(start, end)
                yield name

    def taken(self, patterns: Iterable[re.Pattern[str]]) -> list[tuple[str, ...]]:
        """Take out all that these patterns match; the groups of each match."""
        found: list[tuple[str, ...]] = []
        for pattern in patterns:
            while match := pattern.search(self.text):
                found.append(match.groups(""))
                self._take(*match.span())
        return found

    def refuse(self, names: Names) -> None:
        """Complain of what has not been taken out and carries a meaning."""
        words = re.findall(r"[^\s,;:.()&/|+\0-][^\s,;:()&/|\0]*", self.text)
        unknown = [word.rstrip(".") for word in words if word.rstrip(".") not in _FILLERS]
        if unknown:
            known = (*names.pipeline, *names.scheduler, *names.method)
            guess, found, _ = nearest(unknown[0], known).partition("?")
            raise TaskError(
                f"every word of a task must be understood, got {shown(unknown[0])}"
                + (f"{guess}?" if found else "; leave it out, or say it as in the examples")
            )

    def _take(self, start: int, end: int) -> None:
        # As long as what stood there, so that places that were found before stay right.
        self.text = f"{self.text[:start]}{chr(0) * (end - start)}{self.text[end:]}"


def _aliases(what: str, name: str) -> bool:
    return any(True for _ in _Rest(name.casefold()).named(what, ()))


def _meant(pipeline: str, names: Names) -> str:
    """One of several pipelines that a name may mean, if stored results leave one."""
    several = pipeline.split(" or ")
    left = [one for one in several if one in names.stored] if len(several) > 1 else several
    if len(left) != 1:
        raise TaskError(f"a task must name one pipeline, but this may mean {pipeline}")
    return left[0]


def _one(what: str, found: list[_T]) -> _T:
    distinct = list(dict.fromkeys(found))
    if len(distinct) > 1:
        told = " and ".join(shown(one) for one in distinct)
        raise TaskError(f"a task must name one {what}, got {told}")
    return distinct[0]


def _loss(text: str, percent: str) -> float:
    number = float(text)
    # 7 / 100 is the float that 0.07 is; 7 * 0.01 is not.
    return number / 100 if percent else number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python refuses to convert more than 4300 digits
        raise TaskError(f"a task's steps must be a count, got {shown(text)}") from None
