"""The fastest acceleration parameters of a diffusion pipeline that keep its images in budget.

Importing this package imports neither torch nor optuna: each public name is imported when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelsearch.configuration import Budget, Configuration, Plan, load_plan
    from accelsearch.contract import Key
    from accelsearch.errors import (
        AccelSearchError,
        ContractError,
        ExportError,
        ModelError,
        PlanError,
        PluginError,
        StorageError,
        TaskError,
        TrialError,
        UnsupportedError,
    )
    from accelsearch.measurement import Environment, Latency, Measurement, Scores
    from accelsearch.methods import METHODS

__all__ = [
    "METHODS",
    "AccelSearchError",
    "Budget",
    "Configuration",
    "ContractError",
    "Environment",
    "ExportError",
    "Key",
    "Latency",
    "Measurement",
    "ModelError",
    "Plan",
    "PlanError",
    "PluginError",
    "Scores",
    "StorageError",
    "TaskError",
    "TrialError",
    "UnsupportedError",
    "__version__",
    "load_plan",
]

__version__ = "0.1.0"

_HOMES = {
    "Budget": "configuration",
    "Configuration": "configuration",
    "Plan": "configuration",
    "load_plan": "configuration",
    "Key": "contract",
    "AccelSearchError": "errors",
    "ContractError": "errors",
    "ExportError": "errors",
    "ModelError": "errors",
    "PlanError": "errors",
    "PluginError": "errors",
    "StorageError": "errors",
    "TaskError": "errors",
    "TrialError": "errors",
    "UnsupportedError": "errors",
    "Environment": "measurement",
    "Latency": "measurement",
    "Measurement": "measurement",
    "Scores": "measurement",
    "METHODS": "methods",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
