"""One turn of a worker: a trial that it alone measures, and how that trial ends.

A setting is chosen first, claimed second, and only then becomes a trial, with all its params and in
one transaction: no trial is ever running without a claim that says whose it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from accelsearch.errors import TrialError
from accelsearch.heartbeat import Worker
from accelsearch.measurement import ParamValue
from accelsearch.methods import Parameter, effective
from accelsearch.storage import complete_recorded, running_trial, say_worker

__all__ = ["finish", "take"]

_DRAFT = -1  # the number and the id of a trial that is not stored


def take(
    study: optuna.Study,
    space: Sequence[Parameter],
    worker: Worker,
    params: Mapping[str, ParamValue] | None = None,
    *,
    enqueued: bool = True,
    trials: Sequence[FrozenTrial] | None = None,
    limit_s: float | None = None,
) -> optuna.Trial | None:
    """A running trial that is this worker's alone; None where another was quicker.

    It is the first enqueued trial that nobody else has claimed the setting of; without one, or if
    the `enqueued` are to be left alone, that of `params`; and without these, one of the sampler's
    choice. Its params are set, all of them. `trials` are the study's, where they have just been
    read.
    """
    storage, study_id = study._storage, study._study_id
    distributions = {one.name: _distribution(one) for one in space}
    if trials is None:
        trials = study.get_trials(deepcopy=False)

    def drafted(fixed: Mapping[str, Any]) -> dict[str, ParamValue]:
        return _listed(space, _draft(study, distributions, fixed, trials))

    for waiting in (one for one in trials if enqueued and one.state is TrialState.WAITING):
        fixed = waiting.system_attrs.get("fixed_params", waiting.params)
        setting = drafted(fixed)
        identity = effective(space, setting)
        trial_id = waiting._trial_id
        if not worker.claim(study_id, identity, trial_id=trial_id, limit_s=limit_s):
            continue
        if _started(storage, trial_id):
            for name, value in setting.items():
                if name not in waiting.params:
                    internal = distributions[name].to_internal_repr(value)
                    storage.set_trial_param(trial_id, name, internal, distributions[name])
            # Last: who reads a running trial with its worker does not read it again.
            say_worker(storage, trial_id, worker.identity.name)
            return optuna.Trial(study, trial_id)
        worker.release()
    setting = dict(params) if params is not None else drafted({})
    if not worker.claim(study_id, effective(space, setting), limit_s=limit_s):
        return None
    template = running_trial(setting, distributions, worker.identity.name)
    trial_id = storage.create_new_trial(study_id, template)
    if not worker.note(trial_id):
        # Taken for dead between the two: what runs without a claim is cleared away.
        worker.release()
        return None
    return optuna.Trial(study, trial_id)


def finish(
    study: optuna.Study,
    trial: optuna.Trial,
    worker: Worker,
    objective: Callable[[optuna.Trial], float],
) -> bool:
    """Run the objective, end the trial as it says, and give the claim up.

    False where the trial was taken away, its worker having been silent for too long: what it
    measured does not count, since another measures it, too.
    """
    try:
        try:
            value = objective(trial)
        except optuna.TrialPruned:
            _end(trial, TrialState.PRUNED)
        except TrialError:
            _end(trial, TrialState.FAIL)
        except UpdateFinishedTrialError:
            raise
        except BaseException:
            kept = _end_recorded(trial)
            if not kept:
                _end(trial, TrialState.FAIL)
            worker.release(finished=kept)
            raise
        else:
            _end(trial, TrialState.COMPLETE, value)
    except UpdateFinishedTrialError:
        worker.release()
        return False
    worker.release(finished=True)
    return True


def _end_recorded(trial: optuna.Trial) -> bool:
    """End a trial that was interrupted after everything was recorded, by its pictures say."""
    try:
        return complete_recorded(trial.storage, trial.storage.get_trial(trial._trial_id))
    except UpdateFinishedTrialError:
        return False


def _end(trial: optuna.Trial, state: TrialState, value: float | None = None) -> None:
    """End a trial as `Study.tell` does, but without reading it again.

    One that another has ended meanwhile was recorded in full, and is what it is.
    """
    if state is TrialState.PRUNED:
        value = trial._cached_frozen_trial.intermediate_values.get(0)
    try:
        trial.storage.set_trial_state_values(
            trial._trial_id, state, None if value is None else (value,)
        )
    except UpdateFinishedTrialError:
        return


class _Drafts:
    """A storage whose trials were read already, and to which nothing is written of a draft."""

    def __init__(self, storage: BaseStorage, trials: Sequence[FrozenTrial]) -> None:
        self._storage = storage
        self._trials = trials

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        found = [one for one in self._trials if states is None or one.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """TPE shares its choice with those who sample meanwhile; the claim does that for us."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def _draft(
    study: optuna.Study,
    distributions: Mapping[str, BaseDistribution],
    fixed: Mapping[str, Any],
    trials: Sequence[FrozenTrial],
) -> dict[str, ParamValue]:
    """A whole setting by the study's sampler around the `fixed` values, without a trial."""
    chosen = {
        name: fixed[name]
        for name, distribution in distributions.items()
        if name in fixed and _contains(distribution, fixed[name])
    }
    if chosen.keys() == distributions.keys():
        return chosen
    study = copy.copy(study)
    study._storage = _Drafts(study._storage, trials)  # type: ignore[assignment]
    trial = FrozenTrial(
        number=_DRAFT,
        trial_id=_DRAFT,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params=chosen,
        distributions={name: distributions[name] for name in chosen},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
    )
    sampler = study.sampler
    sampler.before_trial(study, trial)
    relative = sampler.infer_relative_search_space(study, trial)
    drawn = sampler.sample_relative(study, trial, relative)
    for name, distribution in distributions.items():
        if name in chosen:
            continue
        if distribution.single():
            chosen[name] = _only(distribution)
        elif name in drawn and _contains(distribution, drawn[name]):
            chosen[name] = drawn[name]
        else:
            chosen[name] = sampler.sample_independent(study, trial, name, distribution)
    return chosen


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.choices)
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.kind == "int":
        return IntDistribution(
            int(parameter.low), int(parameter.high), step=int(parameter.step or 1)
        )
    return FloatDistribution(parameter.low, parameter.high, step=parameter.step)


def _listed(space: Sequence[Parameter], setting: Mapping[str, Any]) -> dict[str, ParamValue]:
    """The setting without the rounding errors that Optuna's multiples of a step carry."""
    found = dict(setting)
    for parameter in space:
        if parameter.kind == "float":
            found[parameter.name] = parameter.listed(found[parameter.name])
    return found


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:  # none of the choices
        return False


def _only(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return distribution.low


def _started(storage: BaseStorage, trial_id: int) -> bool:
    """Whether an enqueued trial runs now and is ours."""
    try:
        return storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False
