"""Writes the tables of plan.md, methods.md and contract.md from the code that they are about.

python docs/scripts/reference.py            writes them
python docs/scripts/reference.py --check    names those that are out of date; exit code 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen
from generated import run, table
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from accelsearch.architectures import spaces_of
from accelsearch.configuration import (
    SHAPES,
    Budget,
    Known,
    LatencySettings,
    Plan,
    SearchSettings,
)
from accelsearch.methods import METHODS, AccelerationMethod, Parameter
from accelsearch.schema import SCHEMAS, schema

REMEDY = "python docs/scripts/reference.py"

# How the page orders the keys of a plan; each stands in one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "model": ("model", "revision", "variant", "pipeline"),
    "matrix": ("schedulers", "steps", "methods"),
    "budgets": ("budgets",),
    "images": (
        "prompts",
        "images",
        "held_out_images",
        "batch_size",
        "resolution",
        "guidance_scale",
        "negative_prompt",
        "seed",
        "scoring_model",
    ),
    "machine": ("dtype", "device"),
    "tables": ("search", "latency", "space"),
}
_TYPES = {str: "string", int: "whole number", float: "number", bool: "true or false"}
_FEW = 8  # names that are listed; more are only described
_STEPS = 50


def keys(model: type[BaseModel], names: Iterable[str]) -> str:
    """A table of these fields of a model."""
    rows = []
    for name in names:
        field = model.model_fields[name]
        rows.append(
            [
                f"`{name}`",
                _type(name, field.annotation),
                _default(name, field),
                _range(field),
                field.description or "",
            ]
        )
        assert field.description, f"{name} must have a description in configuration.py"
    return table(["key", "type", "default", "range", "meaning"], rows)


def _type(name: str, annotation: Any) -> str:
    if name == "resolution":
        return "whole number, or list of two"
    if name == "methods":
        return "list of lists of strings"
    if annotation in _TYPES:
        return _TYPES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return _type(name, next(one for one in arguments if one is not type(None)))
    if origin is tuple:
        return f"list of {_type(name, arguments[0]).removesuffix('s')}s"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "table"
    return _type(name, arguments[0])  # Annotated


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    if field.default_factory is not None:
        return ""
    if name not in Plan.model_fields or name == "pipeline":
        return _toml(field.default)
    common = _toml(_of(name, "any/model"))
    others = {
        "the bundled model": _toml(_of(name, SHAPES)),
        "SDXL": _toml(_of(name, "any/model", "StableDiffusionXLPipeline")),
    }
    told = [f"; {value} for {whose}" for whose, value in others.items() if value != common]
    return common + "".join(told)


def _of(name: str, model: str, pipeline: str = "StableDiffusionPipeline") -> Any:
    """The value that a plan has which leaves this key out."""
    plan = {
        "model": model,
        "pipeline": pipeline,
        "methods": [["deepcache"]],
        "budgets": [{"metric": "clip_score", "max_loss": 0.02}],
    }
    value = getattr(Plan.model_validate(plan), name)
    square = name == "resolution" and len(set(value)) == 1
    return value[0] if square else value


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{json.dumps(value)}`"


def _range(field: FieldInfo) -> str:
    told: list[str] = []
    for one in _constraints(field):
        if isinstance(one, Known):
            # Whatever other packages add here is no part of this page.
            names = sorted(ours() if one.what == "method" else one.valid())
            each = "each " if get_origin(field.annotation) is tuple else ""
            listed = ", ".join(f"`{name}`" for name in names)
            told.append(f"{each}one of {listed}" if len(names) <= _FEW else f"{each}a {one.what}")
        elif isinstance(one, Ge):
            told.append(f">= {one.ge}")
        elif isinstance(one, Gt):
            told.append(f"> {one.gt}")
        elif isinstance(one, Le):
            told.append(f"<= {one.le}")
        elif isinstance(one, MinLen):
            told.append("not empty")
    return ", ".join(dict.fromkeys(told))


def _constraints(field: FieldInfo) -> list[Any]:
    """What a field demands, its elements included; `Annotated` in `Annotated` is walked."""
    found: list[Any] = []

    def walk(metadata: Iterable[Any]) -> None:
        for one in metadata:
            if isinstance(one, FieldInfo):
                walk(one.metadata)
            elif isinstance(one, AfterValidator):
                found.append(one.func)
            else:
                found.append(one)

    def types(annotation: Any) -> None:
        walk(getattr(annotation, "__metadata__", ()))
        for argument in get_args(annotation) if get_origin(annotation) else ():
            if not isinstance(argument, FieldInfo | AfterValidator):
                types(argument)

    walk(field.metadata)
    types(field.annotation)
    return found


def checked_groups() -> None:
    """Refuse to leave a key out."""
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(Plan.model_fields), set(named) ^ set(Plan.model_fields)


def ours() -> dict[str, AccelerationMethod]:
    """The methods of this package, in the order in which they are applied."""
    return {
        name: method
        for name, method in METHODS.items()
        if type(method).__module__.startswith("accelsearch.")
    }


def parameters(name: str) -> str:
    """The parameters of a method, and what of them makes a difference at full size."""
    method = ours()[name]
    served = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    spaces = {pipeline: _spaces(pipeline).get(name, ()) for pipeline in served}
    rows = []
    for one in method.parameters:
        effective = [
            next((_values(narrow) for narrow in spaces[pipeline] if narrow.name == one.name), "")
            for pipeline in served
        ]
        fixed = " Kept at its default unless a plan's `space` frees it." if one.fixed else ""
        default = f"`{json.dumps(one.default)}`"
        rows.append([f"`{one.name}`", one.range, default, *effective, one.meaning + fixed])
    effect = (
        "stay the same, up to rounding" if method.exact else "change, as far as a budget allows"
    )
    facts = [
        f"- Serves {', '.join(f'`{pipeline}`' for pipeline in method.pipelines)}.",
        f"- Needs {', '.join(f'`{one}`' for one in method.libraries) or 'nothing but torch'}.",
        f"- The images {effect}.",
        *(["- The first call compiles; it is never timed."] if method.compiles else []),
        f"- Sources: {_sources(method.parameters)}.",
    ]
    columns = ["parameter", "range", "default", "SD 1.5", "SDXL", "meaning"]
    return "\n".join(facts) + "\n\n" + table(columns, rows)


def _sources(given: Iterable[Parameter]) -> str:
    """Each source once, in the order of the parameters."""
    parts = (part for one in given for part in one.source.split("; "))
    return "; ".join(dict.fromkeys(parts))


_known_spaces: dict[str, dict[str, tuple[Parameter, ...]]] = {}


def _spaces(pipeline: str) -> dict[str, tuple[Parameter, ...]]:
    if pipeline not in _known_spaces:
        _known_spaces[pipeline] = dict(spaces_of(pipeline, _STEPS)[0])
    return _known_spaces[pipeline]


def _values(parameter: Parameter) -> str:
    """The searched values alone, shorter than `range`: the identity belongs to combinations."""
    if parameter.kind == "choice":
        return ", ".join(json.dumps(one) for one in parameter.choices)
    low, high = parameter.ends
    return f"{low}..{high}" if low != high else f"{low}"


_BOTH = ("speedup_bounds", "search_params")


def entry(name: str) -> str:
    """The fields of one entry of a JSON file; without those that entries of both files have."""
    found = schema(name)["$defs"]["entry"]
    return _fields(found, [one for one in found["properties"] if one not in _shared(name)])


def context() -> str:
    """The fields that entries of `speedup_bounds.json` and `search_params.json` have in common."""
    found = schema(_BOTH[0])["$defs"]["entry"]
    shared = _shared(_BOTH[0])
    return _fields(found, [one for one in found["properties"] if one in shared])


def _shared(name: str) -> set[str]:
    left, right = (schema(one)["$defs"]["entry"]["properties"] for one in _BOTH)
    # Both have a score loss; it is what one of them is about.
    return (left.keys() & right.keys()) - {"score_loss"} if name in _BOTH else set()


def _fields(found: dict[str, Any], names: list[str]) -> str:
    rows = [
        [
            f"`{field}`",
            _json_type(told),
            "always" if field in found.get("required", ()) else "",
            told.get("description", ""),
        ]
        for field, told in ((name, found["properties"][name]) for name in names)
    ]
    return table(["field", "type", "present", "meaning"], rows)


def _json_type(told: dict[str, Any]) -> str:
    if "anyOf" in told:
        return " or ".join(_json_type(one) for one in told["anyOf"])
    if told.get("type") == "array":
        return f"array of {_json_type(told['items'])}s"
    return str(told.get("type", "any"))


def _section(make: Callable[[Any], str], *given: Any) -> Callable[[], str]:
    return lambda: make(*given)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "plan.md": {
        **{
            group: _section(lambda names: keys(Plan, names), names)
            for group, names in GROUPS.items()
        },
        "budget": lambda: keys(Budget, Budget.model_fields),
        "search": lambda: keys(SearchSettings, SearchSettings.model_fields),
        "latency": lambda: keys(LatencySettings, LatencySettings.model_fields),
    },
    "methods.md": {name: _section(parameters, name) for name in ours()},
    "contract.md": {**{name: _section(entry, name) for name in SCHEMAS}, "context": context},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    checked_groups()
    return run(PAGES, parser.parse_args().check, REMEDY)


if __name__ == "__main__":
    raise SystemExit(main())
