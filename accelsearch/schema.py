"""JSON Schemas of the files that we write, made from the types that they are written with.

The files in `accelsearch/schemas` are these, for whoever reads ours in another language;
`python -m accelsearch.schema` writes them anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from accelsearch.codegen.generate import ReportEntry
from accelsearch.codegen.tasks import TaskEntry
from accelsearch.contract import BoundEntry, ParamsEntry, write_text
from accelsearch.errors import ExportError, shown

__all__ = ["SCHEMAS", "check", "published", "schema"]

SCHEMAS: Mapping[str, type] = {
    "speedup_bounds": BoundEntry,
    "search_params": ParamsEntry,
    "tasks": TaskEntry,
    "codegen_report": ReportEntry,
}
"""The entries of each file, by its name without `.json`."""

# What str() makes of the key's tuple, as far as a pattern can tell.
_KEYS = {
    "speedup_bounds": r"^\(.+, .+, '[0-9]+', 'upbound_speedup', [0-9.e+-]+, \[.*\]\)$",
    "search_params": r"^\(.+, .+, '[0-9]+', [0-9.e+-]+, [0-9.e+-]+, \[.*\]\)$",
}


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of the file of this name."""
    kind = SCHEMAS[name]
    entry = _model(name).model_json_schema()
    entry["description"] = " ".join((kind.__doc__ or "").split())
    for field, (hint, _) in _fields(kind).items():
        told = entry["properties"][field]
        for noise in ("title", "default"):  # a field may be missing, which is not to be null
            told.pop(noise, None)
        for text in getattr(hint, "__metadata__", ()):
            told["description"] = text
    definitions = {"entry": entry}
    whole: dict[str, Any] = (
        {
            "type": "object",
            "propertyNames": {"pattern": _KEYS[name]},
            "additionalProperties": {"$ref": "#/$defs/entry"},
        }
        if name in _KEYS
        else {"type": "array", "items": {"$ref": "#/$defs/entry"}}
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{name}.json",
        **whole,
        "$defs": definitions,
    }


def published(name: str) -> dict[str, Any]:
    """The schema of this name as it comes with the package."""
    text = (resources.files("accelsearch.schemas") / f"{name}.schema.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def check(name: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to write entries that the schema of the file does not allow.

    Raises:
        ExportError: naming the entry, the field and what is wrong with it.
    """
    for key, entry in entries.items():
        try:
            _model(name).model_validate(entry, strict=True)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(map(str, problem["loc"]))
            raise ExportError(
                f"{field} in the entry of {key} must be as the schema of {name}.json says: "
                f"{problem['msg']}, got {shown(problem['input'])}"
            ) from None


@cache
def _model(name: str) -> type[BaseModel]:
    fields: dict[str, Any] = {
        field: (hint, ... if required else None)
        for field, (hint, required) in _fields(SCHEMAS[name]).items()
    }
    # Fields may be added to an entry, and the parameters of methods stand among them.
    return create_model(SCHEMAS[name].__name__, __config__=ConfigDict(extra="allow"), **fields)


def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Of a TypedDict, the type of each field and whether it is required."""
    found = {}
    for field, hint in get_type_hints(kind, include_extras=True).items():
        # Python 3.11 does not see it in `__required_keys__`.
        optional = get_origin(hint) is NotRequired
        required = field in kind.__required_keys__ and not optional  # type: ignore[attr-defined]
        found[field] = (get_args(hint)[0] if optional else hint, required)
    return found


def _publish() -> None:
    folder = Path(__file__).parent / "schemas"
    for name in SCHEMAS:
        write_text(folder / f"{name}.schema.json", json.dumps(schema(name), indent=2) + "\n")


if __name__ == "__main__":
    _publish()
