"""What methods share that change a pipeline in place: finding its denoiser, keeping tensors from
step to step, and putting everything back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from accelsearch.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn


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
    origin = str(getattr(vars(module).get("forward"), "__module__", ""))
    return origin == package or origin.startswith(f"{package}.")


@contextmanager
def restored(holders: Iterable[object], *names: str) -> Iterator[None]:
    """Give each module or other object on exit the attributes of these names that it has now.

    What it has not of its own, such as the forward of its class, it has not at the exit either.
    """
    before = [
        (vars(holder), name, name in vars(holder), vars(holder).get(name))
        for holder in holders
        for name in names
    ]
    try:
        yield
    finally:
        for attributes, name, had, value in before:
            if had:
                attributes[name] = value
            else:
                attributes.pop(name, None)


def map_tensors(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The same value with every tensor in it changed, however deep it is nested."""
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(change, one) for one in value)
    if isinstance(value, dict):
        return type(value)(**{name: map_tensors(change, one) for name, one in value.items()})
    return value


class Kept:
    """The tensors that methods keep from one step of a pipeline call for a later one.

    As a rule the tensor itself is kept. Work that is captured in a CUDA graph reads and writes
    the addresses that it was captured with: while `buffers` is a dict, each tensor is copied into
    a buffer in there, which is never freed. `held` names what this pipeline call has kept so far;
    a buffer that is not held is left over from an earlier call. `generators` are the sources of
    chance by device, one each, because captured work goes on drawing from the one that it knew.
    """

    def __init__(self) -> None:
        self.held: frozenset[Hashable] = frozenset()
        self.buffers: dict[Hashable, torch.Tensor] | None = None
        self.generators: dict[torch.device, torch.Generator] = {}
        self._tensors: dict[Hashable, torch.Tensor] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self.held

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return (self._tensors if self.buffers is None else self.buffers)[key]

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        self.held |= {key}
        if self.buffers is None:
            self._tensors[key] = tensor
        elif key in self.buffers:
            self.buffers[key].copy_(tensor)
        else:
            self.buffers[key] = tensor.clone()

    def drop(self, *keys: Hashable) -> None:
        """Keep these no longer; without any, nothing at all."""
        self.held = self.held.difference(keys or self.held)
        for key in keys or tuple(self._tensors):
            self._tensors.pop(key, None)

    def generator(self, device: torch.device, seed: int) -> torch.Generator:
        """This device's generator, at its start from the seed."""
        import torch

        found = self.generators.setdefault(device, torch.Generator(device))
        return found.manual_seed(seed)


_KEPT: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()


def kept_of(denoiser: nn.Module) -> Kept:
    """What is kept for this denoiser, by all methods and over all applications."""
    return _KEPT.setdefault(denoiser, Kept())
