"""The acceleration methods, by name, and the one way to apply several of them to a pipeline."""

from __future__ import annotations

from collections import UserDict
from collections.abc import (
    Callable,
    Container,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from accelsearch.errors import PlanError, UnsupportedError, nearest
from accelsearch.methods.base import AccelerationMethod, Parameter, Run, Value
from accelsearch.methods.compile import Compile
from accelsearch.methods.deepcache import DeepCache
from accelsearch.methods.plugins import installed
from accelsearch.methods.tgate import TGate
from accelsearch.methods.tome import ToMe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "METHODS",
    "AccelerationMethod",
    "Parameter",
    "Run",
    "Value",
    "active",
    "applied",
    "effective",
    "get",
    "prepared",
    "space",
    "split",
    "starts",
]


class _Methods(UserDict[str, AccelerationMethod]):
    """The registry: ours, and those of other packages.

    They are loaded when first asked for, since these packages import from this one.
    """

    def __init__(self) -> None:
        """Load nothing yet."""

    @cached_property
    def data(self) -> dict[str, AccelerationMethod]:  # type: ignore[override]
        ours = (ToMe(), TGate(), DeepCache(), Compile())
        return {**installed(ours), **{method.name: method for method in ours}}


# In the order in which they are applied, from the inside out: what other packages add, what a
# transformer block computes (its class), what an attention computes (its forward), which blocks
# are computed at all, and by what code all that is computed. Each is free of what lies inside it.
# Names are stored in the RDB and the JSON: never renamed.
METHODS: MutableMapping[str, AccelerationMethod] = _Methods()


def get(name: str) -> AccelerationMethod:
    """The method of this name.

    Raises PlanError, naming the nearest, if there is none.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise PlanError(f"unknown method {name!r}{nearest(name, METHODS)}") from None


def space(
    pipeline: DiffusionPipeline, methods: Iterable[str], run: Run, freed: Container[str] = ()
) -> tuple[Parameter, ...]:
    """What there is to search: the effective parameters of the methods, in METHODS order.

    Of the fixed ones only those that are `freed`. A combination's ranges hold the identities of
    its methods, so that whatever a part of it reaches, the whole can reach as well.

    Raises PlanError for an unknown method. Presumes that each method's `check` has passed.
    """
    chosen = {get(name).name for name in methods}
    found = [
        parameter
        for name, method in METHODS.items()
        if name in chosen
        for parameter in method.space(pipeline, run)
        if not parameter.fixed or parameter.name in freed
    ]
    return tuple(one.widened() for one in found) if len(chosen) > 1 else tuple(found)


def starts(
    space: Sequence[Parameter], known: Iterable[Mapping[str, Value]] = (), *, alone: bool = True
) -> list[dict[str, Value]]:
    """Settings to begin a search of `space` with, each once.

    First the `known` ones, each of some of the methods, with the others at their identities; then
    all defaults; then, if wanted, those of each method `alone`. A sampler rarely meets the
    identities of all other methods at once, and a combination may be no better than one of its
    parts. A method that the space keeps from its identity stays on, and a known value that the
    space leaves out is not tried.
    """
    defaults = {parameter.name: parameter.default for parameter in space}
    by_method = _by_method(space)

    def only(names: Container[str]) -> dict[str, Value]:
        idle = {
            parameter.name: parameter.identity
            for name, parameters in by_method.items()
            if name not in names
            for parameter in parameters
            if parameter.identity is not None and parameter.holds_identity
        }
        return defaults | idle

    found = []
    for params in known:
        theirs = {name for name, own in by_method.items() if any(one.name in params for one in own)}
        setting: dict[str, Value] = {**only(theirs), **params}
        fits = setting.keys() == defaults.keys()
        if fits and all(one.accepts(setting[one.name]) for one in space):
            found.append(effective(space, setting))
    found.append(defaults)
    if alone:
        found += [effective(space, only({name})) for name in by_method]
    return [one for index, one in enumerate(found) if one not in found[:index]]


def active(space: Sequence[Parameter], params: Mapping[str, Value]) -> tuple[str, ...]:
    """The methods of a space that these params do not leave at their identity."""
    return tuple(name for name, own in _by_method(space).items() if not _is_idle(own, params))


def effective(space: Sequence[Parameter], params: Mapping[str, Value]) -> dict[str, Value]:
    """The same setting under one name: with a method at its identity, its other params at default.

    Two settings whose effective params are equal make the same images with the same work.
    """
    found = dict(params)
    for parameters in _by_method(space).values():
        if _is_idle(parameters, params):
            found |= {one.name: one.default for one in parameters if one.identity is None}
    return found


def split(params: Mapping[str, Value], methods: Iterable[str]) -> dict[str, dict[str, Value]]:
    """Flat params by method, in METHODS order; a method none of them belongs to has an empty dict.

    Raises PlanError for an unknown method, a parameter that none of the methods has, and a value
    outside the parameter's widest range. What one pipeline makes of it is for `prepared` to say.
    """
    chosen = {get(name).name for name in methods}
    parameters = {
        parameter.name: (name, parameter)
        for name, method in METHODS.items()
        if name in chosen
        for parameter in method.parameters
    }
    by_method: dict[str, dict[str, Value]] = {name: {} for name in METHODS if name in chosen}
    for name, value in params.items():
        if name not in parameters:
            whose = ", ".join(by_method) or "no method"
            raise PlanError(f"unknown parameter {name!r} of {whose}{nearest(name, parameters)}")
        method, parameter = parameters[name]
        if not parameter.accepts(value):
            raise PlanError(f"{name} must be in {parameter.range}, got {value!r}")
        by_method[method][name] = value
    return by_method


@contextmanager
def applied(
    pipeline: DiffusionPipeline,
    params: Mapping[str, Value],
    methods: Iterable[str],
    run: Run,
) -> Iterator[None]:
    """Accelerate the pipeline by all the methods until the exit, which restores it exactly.

    `params` is flat; what it leaves out takes its default on this pipeline. Methods are
    applied in METHODS order and undone last in, first out. One at its identity is not applied:
    it would change nothing, and at a cost.

    Raises, before anything is patched, what `prepared` raises.
    """
    with prepared(pipeline, params, methods, run)():
        yield


def prepared(
    pipeline: DiffusionPipeline,
    params: Mapping[str, Value],
    methods: Iterable[str],
    run: Run,
) -> Callable[[], AbstractContextManager[None]]:
    """Work out once what the methods do, to be entered as often as wanted.

    What is returned makes a context that does what `applied` does; a search enters one for each
    call. The params are as there.

    Raises what `split` raises, and UnsupportedError if a method cannot serve the pipeline or a
    value makes no difference on it.
    """
    by_method = split(params, methods)
    settings: dict[str, dict[str, Value]] = {}
    for name, given in by_method.items():
        METHODS[name].check(pipeline, run)
        parameters = METHODS[name].space(pipeline, run)
        values = {one.name: given.get(one.name, one.default) for one in parameters}
        for parameter in parameters:
            value = values[parameter.name]
            if not parameter.accepts(value):
                raise UnsupportedError(
                    f"{parameter.name} must be in {parameter.range} for this "
                    f"{type(pipeline).__name__} and {run.steps} steps, got {value!r}"
                )
        if not _is_idle(parameters, values):
            settings[name] = values
    marked = [METHODS[name].full_steps(values) for name, values in settings.items()]
    run = replace(run, full_steps=run.full_steps.union(*marked))
    return partial(_in_order, pipeline, settings, run)


@contextmanager
def _in_order(
    pipeline: DiffusionPipeline, settings: Mapping[str, Mapping[str, Value]], run: Run
) -> Iterator[None]:
    with ExitStack() as stack:
        for name, values in settings.items():
            phase = stack.enter_context(METHODS[name].apply(pipeline, values, run))
            run = replace(run, phases=(*run.phases, (name, phase)))
        yield


def _by_method(space: Sequence[Parameter]) -> dict[str, list[Parameter]]:
    by_name = {parameter.name: parameter for parameter in space}
    found = {
        name: [by_name[one.name] for one in method.parameters if one.name in by_name]
        for name, method in METHODS.items()
    }
    return {name: parameters for name, parameters in found.items() if parameters}


def _is_idle(parameters: Iterable[Parameter], values: Mapping[str, Value]) -> bool:
    """Whether a method with these parameters and values changes nothing."""
    identities = {one.name: one.identity for one in parameters if one.identity is not None}
    return bool(identities) and all(
        values[name] == identity for name, identity in identities.items()
    )
