"""The contract of `speedup_bounds.json` and `search_params.json`, written once.

Each file is one flat JSON object from keys to entries. A key is `str()` of a tuple of builtins:

    ('StableDiffusionPipeline', 'DDIMScheduler', '50', 'upbound_speedup', 0.02, ['deepcache'])

It holds the pipeline class, the scheduler class, the steps, the word `upbound_speedup` or a
measured speedup, the largest allowed score loss and the sorted methods. Fields may be added to
an entry; none may be renamed or removed, since other programs read them.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypedDict

from accelsearch.errors import ContractError, ExportError, shown

if sys.platform != "win32":
    import fcntl

__all__ = [
    "BUFFER",
    "UPBOUND",
    "BoundEntry",
    "Key",
    "ParamsEntry",
    "buffered",
    "dumps",
    "loads",
    "locked",
    "meets",
    "read",
    "read_text",
    "within",
    "write",
    "write_bytes",
    "write_text",
]

UPBOUND = "upbound_speedup"

# A bound that is a little too high costs one wasted search; one that is too low hides a solution
# for ever.
BUFFER = 1.1


@dataclass(frozen=True)
class Key:
    """The name of one entry; `str(key)` is what stands in the file.

    `speedup` is a measured one (> 0), or None for an upper bound; `max_loss` is >= 0. Numbers and
    strings of NumPy become builtins, which print as the contract wants; methods become sorted.

    Raises:
        ContractError: a field has the wrong type or is out of its range.
    """

    pipeline: str
    scheduler: str
    steps: int
    speedup: float | None
    max_loss: float
    methods: tuple[str, ...]

    def __post_init__(self) -> None:
        fields = {
            "pipeline": _name("pipeline", self.pipeline),
            "scheduler": _name("scheduler", self.scheduler),
            "steps": _steps(self.steps),
            "speedup": None if self.speedup is None else _number("speedup", self.speedup),
            "max_loss": _number("max_loss", self.max_loss),
            "methods": _methods(self.methods),
        }
        if fields["speedup"] == 0:
            raise ContractError(f"a key's speedup must be > 0, got {self.speedup!r}")
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    def __str__(self) -> str:
        speedup = UPBOUND if self.speedup is None else self.speedup
        methods = list(self.methods)
        return str(
            (self.pipeline, self.scheduler, str(self.steps), speedup, self.max_loss, methods)
        )

    @classmethod
    def parse(cls, text: str) -> Key:
        """The key that `text` is the `str()` of, so that `str(Key.parse(text)) == text`.

        Raises:
            ContractError: `text` is anything else.
        """
        if not isinstance(text, str):
            raise ContractError(f"a key must be a string, got {shown(text, 120)}")
        try:
            fields = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            fields = None
        if not isinstance(fields, tuple) or len(fields) != 6:
            raise ContractError(f"a key must look like {_EXAMPLE}, got {shown(text, 120)}")
        pipeline, scheduler, steps, speedup, max_loss, methods = fields
        if not isinstance(steps, str) or not (steps.isascii() and steps.isdecimal()):
            raise ContractError(f"a key's steps must be a string such as '50', got {shown(steps)}")
        if speedup != UPBOUND and not isinstance(speedup, float):
            raise ContractError(
                f"a key's speedup must be {UPBOUND!r} or a float, got {shown(speedup)}"
            )
        if not isinstance(methods, list):
            raise ContractError(f"a key's methods must be a list, got {shown(methods)}")
        try:
            count = int(steps)
        except ValueError:  # Python refuses to convert more than 4300 digits
            raise ContractError(f"a key's steps must be a count, got {shown(steps)}") from None
        bound = speedup == UPBOUND
        key = cls(pipeline, scheduler, count, None if bound else speedup, max_loss, tuple(methods))
        if str(key) != text:
            raise ContractError(f"a key must be written as {key}, got {shown(text, 120)}")
        return key


class _Context(TypedDict, total=False):
    """What an entry says beside its numbers: all that it takes to measure them again."""

    losses: Annotated[dict[str, float], "of each metric that has a budget"]
    scores: Annotated[dict[str, float], "mean score of each metric, of the accelerated images"]
    speedup_interval: Annotated[list[float] | None, "[low, high], 95 %; null of too few pairs"]
    baseline_latency_s: Annotated[float, "median of the unaccelerated calls, a batch each"]
    latency_s: Annotated[float, "median of the accelerated calls, a batch each"]
    compile_s: Annotated[float | None, "what the first call took longer; null: nothing compiles"]
    baseline_peak_memory_bytes: Annotated[int | None, "null where the device does not tell"]
    peak_memory_bytes: Annotated[int | None, "null where the device does not tell"]
    methods: Annotated[list[str], "sorted"]
    implementation: Annotated[dict[str, str], "method -> what ran, with its version"]
    model: Annotated[str, "a hub id, a folder, or shapes, the bundled model"]
    revision: Annotated[str | None, "of a hub id"]
    variant: Annotated[str | None, "of the weights' files, such as fp16"]
    weights: Annotated[str | None, "a digest of a folder's files"]
    dtype: Annotated[str, "float32, float16 or bfloat16"]
    device: Annotated[str, "the name of the GPU or CPU"]
    resolution: Annotated[list[int], "[height, width] in pixels"]
    batch_size: Annotated[int, "images a call"]
    guidance_scale: float
    negative_prompt: str
    prompts: Annotated[str, "the name of the list"]
    prompts_sha256: Annotated[str, "of the prompts that were used, one a line"]
    images: Annotated[int, "how many prompts of the list were used, one image each"]
    seed: Annotated[int, "of the first image; each further one counts up"]
    scoring_model: Annotated[str, "the CLIP model of clip_score"]
    budgets: Annotated[list[dict[str, Any]], "every budget; the key names the first alone"]
    space: Annotated[dict[str, Any], "what the plan left to search of the parameters"]
    environment: Annotated[dict[str, Any], "device, driver, Python and library versions"]
    study: Annotated[str, "the study's name"]
    trial: Annotated[int, "the trial's number in it"]
    scored_images: Annotated[int, "how many of the images the losses are of"]
    loss_intervals: Annotated[
        dict[str, list[float]], "[low, high] of each loss over all images; equal where all count"
    ]
    proven: Annotated[bool, "the losses keep the budgets beyond chance, not by their mean alone"]
    verified: Annotated[bool, "measured again on prompts and seeds that the search never saw"]
    verification: Annotated[
        dict[str, Any] | None,
        "images, losses, loss_intervals and confidence on those prompts; a clip_score's interval "
        "is relative to the mean baseline of the search, its loss to that of these prompts",
    ]
    unverified_because: Annotated[str | None, "null of a verified one"]


class _BoundNumbers(TypedDict):
    max_speedup: Annotated[float, "the measured one and 10 %, to two decimals"]


class BoundEntry(_BoundNumbers, _Context, total=False):
    """One entry of `speedup_bounds.json`."""

    measured_max_speedup: float
    score_loss: Annotated[float, "of the first budget's metric; negative is better"]
    params: Annotated[dict[str, Any], "the parameters that reached it"]
    exhausted: Annotated[bool, "whether every setting there is has been measured"]
    set_aside: Annotated[
        dict[str, Any] | None,
        "trial, speedup, score_loss and params of the fastest setting that is faster than this and "
        "within the budgets, but so close to one that it takes held_out_images to verify it",
    ]


class _ParamsNumbers(TypedDict):
    speedup: Annotated[float, "measured: baseline latency / accelerated latency"]
    score_loss: Annotated[float, "of the first budget's metric; negative is better"]


class ParamsEntry(_ParamsNumbers, _Context, total=False):
    """One entry of `search_params.json`.

    The acceleration parameters stand beside these fields, flat, under the argument names of the
    libraries (`cache_interval`, `ratio`, ...), which a TypedDict cannot declare.
    """

    requests: Annotated[list[float], "the requested speedups that this entry answers"]


def buffered(measured: float) -> float:
    """The upper bound to write for a measured largest speedup: 10 % more, to two decimals."""
    return round(float(measured) * BUFFER, 2)


def meets(speedup: float, score_loss: float, *, requested: float, max_loss: float) -> bool:
    """Whether a result answers a request: fast enough, and within the budget."""
    return bool(speedup >= requested) and within(score_loss, max_loss)


def within(score_loss: float, max_loss: float) -> bool:
    """Whether a score loss keeps a budget; one of zero or less keeps every budget, 0 included."""
    return bool(score_loss <= 0 or score_loss < max_loss)


def dumps(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a file that holds `entries`: ASCII, indented by 2, ending in a line break.

    Raises:
        ContractError: a key is malformed; an entry lacks a field that every reader indexes
            (`max_speedup` of a bound; `speedup` and `score_loss` of params); or an entry holds
            NaN, an infinity or a type that JSON would not give back. The message names the key.
    """
    for text, entry in entries.items():
        key = Key.parse(text)
        try:
            _check_entry(text, entry)
        except RecursionError:
            raise ContractError(f"the entry of {text} is nested too deeply") from None
        for field in ("max_speedup",) if key.speedup is None else ("speedup", "score_loss"):
            if type(entry.get(field)) not in (int, float):
                got = shown(entry[field]) if field in entry else "none"
                raise ContractError(f"the entry of {text} must have a number {field!r}, got {got}")
    return json.dumps(entries, indent=2, allow_nan=False) + "\n"


def read(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The entries of a file, every key checked.

    Raises:
        ContractError: the file cannot be read, is not one flat JSON object of entries, names a
            key twice, or holds a malformed key.
    """
    entries = loads(read_text(path), path)
    if not isinstance(entries, dict):
        raise ContractError(f"{path} must hold one JSON object, got {shown(entries)}")
    for key, entry in entries.items():
        try:
            Key.parse(key)
        except ContractError as error:
            raise ContractError(f"{path}: {error}") from None
        if not isinstance(entry, dict):
            raise ContractError(f"{path}: the entry of {key} must be an object: {shown(entry)}")
    return entries


def write(path: str | os.PathLike[str], entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the file at `path` by `entries`, in one step: readers see the old or the new one.

    The parent folder is created. Whatever fails, the old file stays, and nothing half-written is
    left beside it.

    Raises:
        ContractError: as `dumps`.
        ExportError: the file cannot be written.
    """
    write_text(path, dumps(entries))


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file.

    Raises:
        ContractError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise ContractError(f"{path} must be a readable file: {reason}") from None
    except UnicodeDecodeError as error:
        raise ContractError(f"{path} must be UTF-8 text: {error}") from None


def loads(text: str, path: str | os.PathLike[str]) -> Any:
    """The value of a JSON text; `path` is named where it is malformed.

    Raises:
        ContractError: the text is no JSON, names a field twice, or holds NaN or an infinity.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_refuse_constant, parse_float=_finite
        )
    except ContractError as error:
        raise ContractError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path} must be valid JSON: {error}") from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` by this text, in one step; its folder is created.

    Raises:
        ExportError: the file cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at `path` by these bytes, in one step; its folder is created.

    Raises:
        ExportError: the file cannot be written.
    """
    # A link keeps pointing where it pointed: its target is replaced, not the link.
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ExportError(f"{path} must be writable: {error.strerror or error}") from None
    _sync_folder(target.parent)


def _name(field: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ContractError(f"a key's {field} must be a name, got {shown(value)}")
    return str(value)


def _steps(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ContractError(f"a key's steps must be a whole number >= 1, got {shown(value)}")
    return int(value)


def _number(field: str, value: object) -> float:
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        with contextlib.suppress(OverflowError):  # a whole number beyond every float
            number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ContractError(f"a key's {field} must be a finite number >= 0, got {shown(value)}")
    return number + 0.0  # -0.0 would be another key


def _methods(value: object) -> tuple[str, ...]:
    # A string would pass for a sequence of one-letter names.
    if not isinstance(value, (tuple, list)):
        raise ContractError(f"a key's methods must be a tuple of names, got {shown(value)}")
    names = tuple(sorted(_name("methods", name) for name in value))
    if len(set(names)) != len(names):
        raise ContractError(f"a key's methods must not repeat a name, got {shown(list(names))}")
    return names


def _check_entry(key: str, value: object, path: str = "") -> None:
    """Refuse what JSON cannot hold or would give back as something else.

    The types are compared exactly: np.float64 is a float, and np.str_ a string, yet neither
    belongs in a file that other programs read.
    """
    where = f"{path.removeprefix('.')} in the entry of {key}" if path else f"the entry of {key}"
    if not path and not isinstance(value, dict):
        raise ContractError(f"{where} must be an object, got {shown(value)}")
    if isinstance(value, dict):
        for name, inner in value.items():
            if type(name) is not str:
                raise ContractError(f"{where} must have strings as names, got {shown(name)}")
            _check_entry(key, inner, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_entry(key, inner, f"{path}[{index}]")
    elif type(value) is float and not math.isfinite(value):
        raise ContractError(f"{where} must be finite, got {value!r}")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise ContractError(
            f"{where} must be a builtin type that JSON knows, got {type(value).__name__}"
        )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ContractError(f"{shown(twice)} must stand once in its object, got it twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ContractError(f"numbers must be finite, got {name}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ContractError(f"numbers must be finite, got {text}")
    return number


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep others who call this with the same folder waiting until the exit.

    For whoever reads files, changes what they hold and writes them back. A process that dies
    leaves no lock behind. The folder is created, and removed at the exit if it stayed empty. Where
    the system has no such locks (Windows), nobody waits.

    Raises:
        ExportError: the folder cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    file = Path(folder) / ".accelsearch.lock"
    existed = file.parent.exists()
    try:
        while (descriptor := _lock(file)) is None:
            pass
    except OSError as error:
        raise ExportError(f"{folder} must be writable: {error.strerror or error}") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)
        if not existed:
            with contextlib.suppress(OSError):  # it holds something by now
                file.parent.rmdir()


def _lock(file: Path) -> int | None:
    """The descriptor of the file with the lock on it; None if the file went away meanwhile.

    Whoever held the lock removes the file, and the next one makes a new one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_EXAMPLE = str(Key("StableDiffusionPipeline", "DDIMScheduler", 50, None, 0.02, ("deepcache",)))
