"""What methods share that change a pipeline in place: finding its denoiser, putting it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelsearch.errors import UnsupportedError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn


def denoiser_of(pipeline: DiffusionPipeline, method: str, served: Sequence[str]) -> Any:
    """The UNet or transformer of a pipeline of one of the `served` classes.

    Raises UnsupportedError, naming the method, for any other pipeline, and for a denoiser that
    is compiled or wrapped, so that changes to its modules would not reach what runs.
    """
    import diffusers

    if not isinstance(pipeline, tuple(getattr(diffusers, name) for name in served)):
        raise UnsupportedError(
            f"{method} needs a {' or a '.join(served)}, got {type(pipeline).__name__}; "
            f"remove {method} from methods for this pipeline"
        )
    part, kind = (
        ("unet", diffusers.UNet2DConditionModel)
        if hasattr(pipeline, "unet")
        else ("transformer", diffusers.PixArtTransformer2DModel)
    )
    denoiser = getattr(pipeline, part)
    if not isinstance(denoiser, kind):
        raise UnsupportedError(
            f"{method} needs a {kind.__name__} as {part}, got {type(denoiser).__name__}; "
            f"apply {method} before the {part} is compiled or wrapped"
        )
    return denoiser


def forward_is_from(package: str, module: nn.Module) -> bool:
    """Whether the module's forward has been replaced by one that this package defines."""
    origin = str(getattr(vars(module).get("forward"), "__module__", ""))
    return origin == package or origin.startswith(f"{package}.")


@contextmanager
def restored_forwards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give each module on exit the forward that it has now.

    That is its class's as a rule, and its own where others, such as accelerate's hooks, have
    replaced it.
    """
    forwards = {module: vars(module).get("forward") for module in modules}
    try:
        yield
    finally:
        for module, forward in forwards.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
