"""Known-good parameters of an earlier `search_params.json` as the trials that a search tries first.

What they reach here is measured here: an old number is no measurement.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage

from accelsearch import contract
from accelsearch.configuration import Configuration, Range
from accelsearch.contract import Key
from accelsearch.errors import PlanError, shown
from accelsearch.measurement import Environment, ParamValue
from accelsearch.methods import METHODS, split
from accelsearch.objective import environment_of
from accelsearch.storage import create_study, database_errors, study_name

__all__ = ["Imported", "import_params"]


@dataclass(frozen=True)
class Imported:
    """What an import has found for one configuration.

    `waiting` are the settings that the study's next search tries first, `known` counts those that
    it has or had already, and `refused` says of the others why they cannot be tried.
    """

    study: str
    waiting: tuple[dict[str, ParamValue], ...]
    known: int
    refused: tuple[str, ...]


@database_errors()
def import_params(
    path: str | os.PathLike[str],
    configurations: Iterable[Configuration],
    storage: BaseStorage,
    environment: Any = environment_of,
) -> tuple[Imported, ...]:
    """Enqueue the parameters of a file in the studies of the configurations that they are for.

    They are for a configuration of the same pipeline, scheduler, steps and methods, whatever the
    budget, model or GPU they were found with. The fastest comes first. A study without any
    is not made. `environment` tells where a configuration is measured.

    Raises:
        ContractError: the file is malformed.
        StorageError: the storage cannot be written.
    """
    entries = contract.read(path)
    found = []
    for configuration in configurations:
        theirs = [entry for key, entry in entries.items() if _is_for(Key.parse(key), configuration)]
        theirs.sort(key=_speedup, reverse=True)
        found.append(_imported(theirs, configuration, storage, environment(configuration)))
    return tuple(found)


def _imported(
    entries: list[dict[str, Any]],
    configuration: Configuration,
    storage: BaseStorage,
    environment: Environment,
) -> Imported:
    settings: list[dict[str, ParamValue]] = []
    refused = []
    for entry in entries:
        try:
            setting = _setting(entry, configuration)
        except PlanError as error:
            refused.append(str(error))
            continue
        if setting not in settings:
            settings.append(setting)
    name = study_name(configuration, environment)
    if not settings:
        return Imported(name, (), 0, tuple(refused))
    study = create_study(storage, configuration, environment, RandomSampler())
    waiting = []
    for setting in settings:
        before = len(study.get_trials(deepcopy=False))
        study.enqueue_trial(setting, user_attrs={"imported": True}, skip_if_exists=True)
        if len(study.get_trials(deepcopy=False)) > before:
            waiting.append(setting)
    return Imported(name, tuple(waiting), len(settings) - len(waiting), tuple(refused))


def _is_for(key: Key, configuration: Configuration) -> bool:
    own = configuration.key(key.speedup)
    return key.speedup is not None and (key.pipeline, key.scheduler, key.steps, key.methods) == (
        own.pipeline,
        own.scheduler,
        own.steps,
        own.methods,
    )


def _setting(entry: Mapping[str, Any], configuration: Configuration) -> dict[str, ParamValue]:
    """The entry's parameters of the configuration's methods, as far as they are searched.

    Raises:
        PlanError: one is out of its range, or of what the plan leaves to search; or there is none.
    """
    searched = {
        parameter.name
        for name in configuration.methods
        for parameter in METHODS[name].parameters
        if not parameter.fixed or parameter.name in configuration.space
    }
    params = {name: entry[name] for name in searched if name in entry}
    split(params, configuration.methods)
    for name, value in params.items():
        left = configuration.space.get(name)
        if left is not None and not _leaves(left, value):
            raise PlanError(f"{name} must be within the plan's space, got {shown(value)}")
    if not params:
        raise PlanError(f"an entry must have a parameter of {', '.join(sorted(searched)) or 'no'}")
    return dict(sorted(params.items()))


def _leaves(space: tuple[ParamValue, ...] | Range, value: ParamValue) -> bool:
    if isinstance(space, Range):
        return isinstance(value, int | float) and space.low <= value <= space.high
    return any(type(one) is type(value) and one == value for one in space)


def _speedup(entry: Mapping[str, Any]) -> float:
    value = entry.get("speedup")
    return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else 0.0
