"""The errors a user can meet, each told in one line: what must hold, what was got, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = [
    "AccelSearchError",
    "BaselineError",
    "ContractError",
    "DashboardError",
    "ExportError",
    "ModelError",
    "PlanError",
    "PluginError",
    "StorageError",
    "TaskError",
    "TrialError",
    "UnsupportedError",
    "nearest",
    "shown",
]


class AccelSearchError(Exception):
    """An error that its reader can act on; `str()` of it is always one line.

    `exit_code` is what the command line exits with: 2 for bad input, 1 for a task that failed.
    """

    exit_code: int = 2

    def __init__(self, message: str) -> None:
        # Messages quote those of other libraries, and these often have several lines.
        lines = (line.strip() for line in message.splitlines())
        super().__init__(" ".join(line for line in lines if line))


class PlanError(AccelSearchError):
    """A plan file, or an option that overrides it, says something that cannot be meant.

    `override` is what an option is to blame for: the key that it overrides, and what must hold of
    it; None where no option is.
    """

    def __init__(self, message: str, override: tuple[str, str] | None = None) -> None:
        super().__init__(message)
        self.override = override


class ModelError(AccelSearchError):
    """A checkpoint, a device or a scorer cannot be loaded."""


class UnsupportedError(AccelSearchError):
    """An acceleration method is asked to serve a pipeline or a setting that it cannot serve."""


class PluginError(AccelSearchError):
    """An installed package says that it adds an acceleration method, but does not."""


class StorageError(AccelSearchError):
    """A storage cannot be opened, or what it holds cannot be read."""


class ContractError(AccelSearchError):
    """A key or an entry of the JSON files is malformed."""


class ExportError(AccelSearchError):
    """Stored results cannot be exported as asked."""


class DashboardError(AccelSearchError):
    """The dashboard cannot be started here."""


class TrialError(AccelSearchError):
    """One trial cannot be measured, for example because its images hold NaN; the study goes on.

    `reason` is short enough for a table: "images contain NaN".
    """

    exit_code = 1

    @property
    def reason(self) -> str:
        return str(self)


class TaskError(AccelSearchError):
    """One task cannot be understood, or no code can be made for it; the batch goes on."""

    exit_code = 1


class BaselineError(TrialError):
    """The unaccelerated pipeline itself makes no usable images, so no trial can be measured."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The ending of a message about an unknown name: the likeliest meant one, and what is valid.

    Up to 12 valid names are all listed, of more the 5 nearest:
    `; did you mean 'deepcache'? valid: 'deepcache', 'tome'`.
    """
    names = sorted(set(valid))
    if not names:
        return "; there is no valid name"
    # Sorting is stable: names that are equally near stay in alphabetical order.
    ranked = sorted(names, key=lambda candidate: -_similarity(name, candidate))
    best = ranked[0]
    guess = f"; did you mean {best!r}?" if _similarity(name, best) >= _LIKELY else ";"
    if len(names) <= _LISTED:
        return f"{guess} valid: {', '.join(map(repr, names))}"
    shown = ", ".join(map(repr, ranked[:_NEAREST]))
    return f"{guess} nearest of {len(names)} valid names: {shown}"


def shown(value: object, limit: int = 80) -> str:
    """The `repr` of a value as a message can bear it: at most `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # Python refuses to write out whole numbers of more than 4300 digits, and deep nestings.
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_LIKELY = 0.5
_LISTED = 12
_NEAREST = 5


def _similarity(name: str, candidate: str) -> float:
    """How likely `name` was written for `candidate`, 0 to 1, whatever the case of the letters."""
    written, meant = name.casefold(), candidate.casefold()
    ratio = SequenceMatcher(None, written, meant, autojunk=False).ratio()
    # "DDIM" stands for "DDIMScheduler", of which it is only a third.
    if len(written) >= 3 and meant.startswith(written):
        return _LIKELY + ratio / 2
    return ratio
