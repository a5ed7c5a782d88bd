"""Methods that other installed packages add, by the entry-point group `accelsearch.methods`.

docs/plugins.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from accelsearch.errors import PluginError
from accelsearch.methods.base import AccelerationMethod, Parameter

__all__ = ["GROUP", "installed"]

GROUP = "accelsearch.methods"

# Of the protocol; those that it does not define by itself must be the method's own.
_MEMBERS = (
    "name",
    "parameters",
    "pipelines",
    "libraries",
    "check",
    "space",
    "apply",
    "implementation",
)


def installed(own: Collection[AccelerationMethod]) -> dict[str, AccelerationMethod]:
    """The methods of other packages, by name, in alphabetical order; `own` are ours.

    Raises:
        PluginError: a package's method cannot be loaded, is not one, or takes a name that is
            taken. A method that is left out in silence would be missed where it matters.
    """
    known, found = {method.name: method for method in own}, {}
    for point in sorted(entry_points(group=GROUP), key=lambda one: (one.name, one.value)):
        method = _loaded(point)
        if method.name in known:
            raise _broken(point, f"another method is called {method.name!r}")
        taken = {parameter.name for one in known.values() for parameter in one.parameters}
        clashing = sorted(taken & {parameter.name for parameter in method.parameters})
        if clashing:
            raise _broken(point, f"another method has a parameter {clashing[0]!r}")
        known[method.name] = found[method.name] = method
    return found


def _loaded(point: EntryPoint) -> AccelerationMethod:
    try:
        loaded = point.load()
        method: Any = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:
        raise _broken(point, f"{type(error).__name__}: {error}") from error
    if AccelerationMethod not in type(method).__mro__:
        raise _broken(point, "it must inherit from AccelerationMethod")
    missing = [
        name
        for name in _MEMBERS
        if getattr(type(method), name, None) is getattr(AccelerationMethod, name)
    ]
    if missing:
        raise _broken(point, f"it must define {missing[0]}")
    if method.name != point.name:
        raise _broken(point, f"it must be called as its entry point, but is {method.name!r}")
    if not method.parameters or not all(type(one) is Parameter for one in method.parameters):
        raise _broken(point, "its parameters must be a tuple of Parameter, and not empty")
    if point.dist is not None and point.dist.name not in method.libraries:
        # Else a study would go on with another version as if nothing had changed.
        raise _broken(point, f"its libraries must name {point.dist.name!r}, its own package")
    checked: AccelerationMethod = method
    return checked


def _broken(point: EntryPoint, why: str) -> PluginError:
    package = "an unknown package" if point.dist is None else f"{point.dist.name}"
    version = "" if point.dist is None else f" {point.dist.version}"
    return PluginError(
        f"method {point.name!r} of package {package}{version} cannot be used: {why}; "
        f"upgrade {package}, or uninstall it"
    )
