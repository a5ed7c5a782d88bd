"""What methods share that change a pipeline in place: finding its denoiser, and putting it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelsearch.errors import UnsupportedError
from accelsearch.hooks.shared import Kept, kept_of, map_tensors, restored

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

__all__ = [
    "PIXART",
    "STABLE_DIFFUSION",
    "Kept",
    "denoiser_of",
    "forward_is_from",
    "kept_of",
    "map_tensors",
    "restored",
]

STABLE_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PIXART = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")


def denoiser_of(pipeline: DiffusionPipeline, method: str, served: Sequence[str]) -> Any:
    """The UNet or transformer of a pipeline of one of the `served` classes.

    Raises UnsupportedError, naming the method, for any other pipeline, and for a denoiser that
    is compiled or wrapped, so that changes to its modules would not reach what runs.
    """
    import diffusers

    # By name, since importing the other pipelines takes seconds.
    if not any(kind.__name__ in served for kind in type(pipeline).__mro__):
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
    forward = vars(module).get("forward")
    if forward is None:  # nearly always, and there are thousands of modules
        return False
    origin = str(getattr(forward, "__module__", ""))
    return origin == package or origin.startswith(f"{package}.")
