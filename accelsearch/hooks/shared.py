"""What hooks share that change a pipeline in place: counting its steps, keeping tensors from step
to step, and putting everything back.
"""

# Cheap to import: torch is imported where it is used.

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

Phase = Callable[[], Hashable]
"""What a method makes of the denoiser's call under way, told once its forward pre-hooks have run.

In two calls of equal phases the method does the same work, on tensors of the same shapes.
"""

Phases = tuple[tuple[str, Phase | None], ...]
"""By the name of the method; None of one that does not tell."""


class CallSteps:
    """Counts the denoiser's calls within the current pipeline call, from 0.

    A pipeline call begins by giving its scheduler new timesteps, so a new call is told by the
    identity of that tensor: nothing to reset, no GPU synchronisation, and it works for calls
    that somebody else starts and after calls that were broken off.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline = pipeline
        # A reference, not an id(): the id of a freed tensor may be given to the next one.
        self._timesteps: Any = None
        self._index = -1

    def advance(self) -> int:
        """Count one denoiser call and return its index; 0 is the first of a pipeline call."""
        timesteps = self._pipeline.scheduler.timesteps
        if timesteps is self._timesteps:
            self._index += 1
        else:
            self._timesteps = timesteps
            self._index = 0
        return self._index

    @property
    def step(self) -> int:
        """The index of the last call counted, less the calls by which a scheduler starts itself.

        PNDM makes one or more such calls; in them this is negative.
        """
        return self._index - self.extra

    @property
    def extra(self) -> int:
        """The number of calls by which the scheduler starts itself."""
        scheduler: Any = self._pipeline.scheduler
        regular: int = scheduler.num_inference_steps * scheduler.order
        return max(len(scheduler.timesteps) - regular, 0)

    @property
    def is_last(self) -> bool:
        """Whether the last call counted is the last of the pipeline call."""
        return self._index == len(self._pipeline.scheduler.timesteps) - 1


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
    a buffer in there, which is never freed. `generators` are the sources of chance by device, one
    each, because captured work goes on drawing from the one that it knew.
    """

    def __init__(self) -> None:
        self.buffers: dict[Hashable, torch.Tensor] | None = None
        self.generators: dict[torch.device, torch.Generator] = {}
        self._tensors: dict[Hashable, torch.Tensor] = {}
        self._shapes: dict[Hashable, torch.Size] = {}

    @property
    def held(self) -> frozenset[tuple[Hashable, torch.Size]]:
        """What this pipeline call has kept so far, and of which shape.

        A buffer that is not held is left over from an earlier call. By shape there are several:
        what an attention puts out is shorter with merged tokens than without.
        """
        return frozenset(self._shapes.items())

    @held.setter
    def held(self, held: frozenset[tuple[Hashable, torch.Size]]) -> None:
        self._shapes = dict(held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._shapes

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        if self.buffers is None:
            return self._tensors[key]
        return self.buffers[key, self._shapes[key]]

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        self._shapes[key] = tensor.shape
        place = (key, tensor.shape)
        if self.buffers is None:
            self._tensors[key] = tensor
        elif place in self.buffers:
            self.buffers[place].copy_(tensor)
        else:
            self.buffers[place] = tensor.clone()

    def drop(self, *keys: Hashable) -> None:
        """Keep these no longer; without any, nothing at all."""
        for key in keys or tuple(self._shapes):
            self._shapes.pop(key, None)
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
