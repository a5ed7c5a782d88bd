"""The script of one stored setting: its text and its name."""

from __future__ import annotations

import re
import textwrap
from functools import cache
from typing import Any

import jinja2

from accelsearch.codegen.literals import Code, comment, literal
from accelsearch.codegen.settings import Application, Settings
from accelsearch.codegen.sources import Imports, excerpt, import_lines

__all__ = ["file_name", "script"]

_WIDTH = 100  # of a line of code
_SHORT = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "PixArtAlphaPipeline": "pixart-alpha",
    "PixArtSigmaPipeline": "pixart-sigma",
}


def script(settings: Settings, requested: float) -> str:
    """The source of a script that stands alone and runs what these settings say.

    `requested` is the speedup that was asked for.

    Raises:
        TaskError: a value cannot stand in a script.
    """
    key = settings.key
    imports, excerpts = excerpt(one.hook for one in settings.applications)
    imports |= _imports(key.pipeline, key.scheduler)
    return _template().render(
        title=comment(_title(settings)),
        rule=Code("# " + "-" * (_WIDTH - 2)),
        packages=comment(" ".join(settings.packages)),
        about=[
            (comment(f"{name:<12}"), comment(value))
            for name, value in {**settings.about, "asked for": f"{requested:g}x"}.items()
        ],
        imports=[Code(section) for section in import_lines(imports, _WIDTH)],
        excerpts=[
            {
                "told": [Code(f" {line}" if line else "") for line in _wrapped(one.told)],
                "code": Code(one.code),
            }
            for one in excerpts
        ],
        applications=settings.applications,
        application=_applied(settings.applications),
        assigned=_assigned,
        model=settings.model,
        bundled=settings.bundled,
        revision=settings.revision,
        variant=settings.variant,
        device=literal(settings.device)
        if settings.device
        else Code('"cuda" if torch.cuda.is_available() else "cpu"'),
        dtype=Code(settings.dtype) if settings.dtype else None,
        steps=key.steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        height=settings.height,
        width=settings.width,
        batch_size=settings.batch_size,
        seed=settings.seed,
        speedup=settings.speedup,
        pipeline=Code(key.pipeline),  # both are checked to be names of classes
        scheduler=Code(key.scheduler),
        has_checker=key.pipeline == "StableDiffusionPipeline",
    )


def file_name(settings: Settings, requested: float) -> str:
    """`sd-ddim-50-deepcache-tgate-4.40x-loss0.02.py`: ASCII letters, digits and `.+-`."""
    key = settings.key
    shown = f"{requested:.2f}" if round(requested, 2) == requested else repr(requested)
    parts = (
        _SHORT[key.pipeline],
        key.scheduler.removesuffix("Scheduler").lower(),
        str(key.steps),
        *(key.methods or ("baseline",)),
        f"{shown}x",
        f"loss{key.max_loss}",
    )
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(parts)).lstrip(".-_")
    return f"{name[:200]}.py"


def _title(settings: Settings) -> str:
    key = settings.key
    how = " + ".join(key.methods) or "nothing"
    short = key.scheduler.removesuffix("Scheduler")
    return f"{key.pipeline} with {short}, {key.steps} steps, accelerated by {how}."


def _wrapped(text: str) -> list[str]:
    """Paragraphs as lines that fit behind a comment sign."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), _WIDTH - 2), ""]
    return lines[:-1]


def _imports(pipeline: str, scheduler: str) -> Imports:
    """What every script imports for itself."""
    return {
        "argparse": ("argparse", None),
        "time": ("time", None),
        "Iterator": ("collections.abc", "Iterator"),
        "AbstractContextManager": ("contextlib", "AbstractContextManager"),
        "contextmanager": ("contextlib", "contextmanager"),
        "nullcontext": ("contextlib", "nullcontext"),
        "Path": ("pathlib", "Path"),
        "median": ("statistics", "median"),
        "torch": ("torch", None),
        "Image": ("PIL", "Image"),
        "DiffusionPipeline": ("diffusers", "DiffusionPipeline"),
        pipeline: ("diffusers", pipeline),
        scheduler: ("diffusers", scheduler),
    }


def _applied(applications: tuple[Application, ...]) -> Any:
    """How an application is written as the item of a with statement, `indent` deep."""
    told = [one.name for one in applications if "phases" in one.hook.arguments]

    def application(one: Application, indent: str) -> Code:
        arguments = ["pipe"]
        for name, value in one.arguments.items():
            arguments.append(f"{name}={literal(value)}")
        if one.name in told:
            phases = tuple(
                f"({literal(before.name)}, {_variable(before)})"
                for before in applications[: applications.index(one)]
            )
            if phases:
                inner = ", ".join(phases)
                arguments.append(f"phases=({inner},)" if len(phases) == 1 else f"phases=({inner})")
        lines = "".join(f"{indent}    {argument},\n" for argument in arguments)
        text = f"{one.hook.function}(\n{lines}{indent})"
        # Named where what is applied later asks which phase it is in.
        later = applications[applications.index(one) + 1 :]
        return Code(f"{text} as {_variable(one)}" if any(o.name in told for o in later) else text)

    return application


def _variable(application: Application) -> str:
    return f"{application.hook.function.removeprefix('apply_')}_phase"


def _assigned(name: str, value: str) -> Code:
    """An assignment of text, as a formatter breaks it."""
    text = literal(value)
    line = f"{name} = {text}"
    if len(line) > _WIDTH >= len(text) + 4:
        return Code(f"{name} = (\n    {text}\n)")
    return Code(line)


def _finalized(value: object) -> object:
    if not isinstance(value, Code):
        raise TypeError(f"a template must print code alone, got {value!r}")
    return value


@cache
def _template() -> jinja2.Template:
    # Not HTML: what is escaped here, and how, is the business of `literals`.
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.PackageLoader("accelsearch.codegen"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalized,
    )
    environment.filters["literal"] = literal
    return environment.get_template("script.py.j2")
