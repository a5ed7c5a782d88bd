"""The acceleration methods, by name, and the one way to apply several of them to a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from accelsearch.errors import PlanError, UnsupportedError, nearest
from accelsearch.methods.base import AccelerationMethod, Parameter, Run, Value
from accelsearch.methods.deepcache import DeepCache

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["METHODS", "AccelerationMethod", "Parameter", "Run", "Value", "applied", "get", "split"]

# In the order in which they are applied. Names are stored in the RDB and the JSON: never renamed.
METHODS: dict[str, AccelerationMethod] = {
    "deepcache": DeepCache(),
}


def get(name: str) -> AccelerationMethod:
    """The method of this name.

    Raises PlanError, naming the nearest, if there is none.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise PlanError(f"unknown method {name!r}{nearest(name, METHODS)}") from None


def split(params: Mapping[str, Value], methods: Iterable[str]) -> dict[str, dict[str, Value]]:
    """Flat params by method, in METHODS order; a method none of them belongs to has an empty dict.

    Raises PlanError for an unknown method, a parameter that none of the methods has, and a value
    outside the parameter's widest range. What one pipeline makes of it is for `applied` to say.
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
    applied in METHODS order and undone last in, first out.

    Raises, before anything is patched, what `split` raises, and UnsupportedError if a method
    cannot serve the pipeline or a value makes no difference on it.
    """
    by_method = split(params, methods)
    settings: dict[str, dict[str, Value]] = {}
    for name, given in by_method.items():
        METHODS[name].check(pipeline, run)
        space = METHODS[name].space(pipeline, run)
        for parameter in space:
            value = given.get(parameter.name, parameter.default)
            if not parameter.accepts(value):
                raise UnsupportedError(
                    f"{parameter.name} must be in {parameter.range} for this "
                    f"{type(pipeline).__name__} and {run.steps} steps, got {value!r}"
                )
        settings[name] = {
            parameter.name: given.get(parameter.name, parameter.default) for parameter in space
        }
    with ExitStack() as stack:
        for name, values in settings.items():
            stack.enter_context(METHODS[name].apply(pipeline, values, run))
        yield
