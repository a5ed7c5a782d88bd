"""DeepCache: compute the deep part of a UNet only every so many steps, and reuse it in between.

Source: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024,
arXiv:2312.00858. The steps that are skipped and the features that are reused are those of the
authors' `DeepCacheSDHelper`, and so are the images. The helper puts a wrapper around every layer,
keeps the output of each, and asks the GPU for the timestep at every step. Here a step that reuses
runs the UNet's own code with the skipped layers out of its lists: nothing waits for the GPU, one
tensor is kept, and the layers can be compiled and the steps captured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.nn import Module, ModuleList

from accelsearch.hooks.shared import CallSteps, Kept, Phase, kept_of, restored

LAYERS = 3  # the library reads a branch id as block * 3 + layer, whatever the UNet


@contextmanager
def apply_deepcache(
    pipeline: Any, *, cache_interval: int, cache_branch_id: int, full_steps: Collection[int] = ()
) -> Iterator[Phase]:
    """Skip the UNet's deep part in all but one of `cache_interval` steps, until the exit.

    A step is computed in full if its index is a multiple of `cache_interval`. The index is the
    library's: the position of the *first* equal timestep. It differs from the count of steps
    where a scheduler repeats timesteps (PNDM, Heun). In each of the `full_steps` another method
    changes what passes through the UNet, so nothing kept before it is reused.
    """
    unet = pipeline.unet
    cut, kept, steps = _cut(unet, cache_branch_id), kept_of(unet), CallSteps(pipeline)
    computed: list[bool] = []
    is_full = True

    def begin(_: Any, __: Any) -> None:
        nonlocal is_full
        index = steps.advance()
        if index == 0:
            kept.drop()
            forced = {step + steps.extra for step in full_steps}
            computed[:] = _computed(pipeline.scheduler, cache_interval, forced)
        is_full = computed[index]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_full:
            return unet_forward(*args, **kwargs)
        with cut.made(kept):
            return unet_forward(*args, **kwargs)

    beginning = unet.register_forward_pre_hook(begin)
    with restored((unet,), "forward"), cut.tapped(kept):
        try:
            unet_forward = unet.forward
            unet.forward = forward
            yield lambda: (cache_branch_id, is_full)
        finally:
            beginning.remove()
            kept.drop()


class _Cut(NamedTuple):
    """Where a branch cuts a UNet in two.

    `source` is the last module that a step skips: its output is the feature that is reused, in
    the place of the mid block's. `lists` are the modules' children that a step computes which
    skips the rest.
    """

    unet: Any
    branch: int
    source: Any
    siblings: Any  # the list of layers that the source is in; None where it is a whole block
    lists: tuple[tuple[Any, dict[str, Any]], ...]  # module, and what replaces its children

    @contextmanager
    def tapped(self, kept: Kept) -> Iterator[None]:
        """The source with its output kept.

        A layer stays as it is, and can be compiled, inside of one that keeps its output. A block
        is asked for more than to be called; its forward is replaced.
        """
        if self.siblings is None:
            with restored((self.source,), "forward"):
                self.source.forward = self._keeping(self.source.forward, kept)
                yield
            return
        tap: Any = Module()
        tap.layer = self.source
        tap.forward = self._keeping(self.source, kept)
        layers = self.siblings._modules
        place = next(name for name, layer in layers.items() if layer is self.source)
        try:
            layers[place] = tap
            yield
        finally:
            layers[place] = self.source

    @contextmanager
    def made(self, kept: Kept) -> Iterator[None]:
        """The UNet without its deep part, which computes from the kept feature upwards."""
        before = [(module, dict(module._modules)) for module, _ in self.lists]
        mid_block = self.unet.mid_block
        with restored((mid_block,), "forward"):
            try:
                mid_block.forward = lambda sample, *_, **__: kept[self._key(sample)]
                for module, children in self.lists:
                    module._modules.update(children)
                yield
            finally:
                for module, own in before:
                    module._modules.update(own)

    def _keeping(self, forward: Any, kept: Kept) -> Any:
        """What a module computes, with its output kept."""

        def keeping(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            feature = output[0] if isinstance(output, tuple) else output
            kept[self._key(feature)] = feature
            return output

        return keeping

    def _key(self, sample: Any) -> tuple[str, int, int]:
        """By the batch as well, since T-GATE halves it from some step on."""
        return ("deepcache", self.branch, len(sample))


def _cut(unet: Any, branch: int) -> _Cut:
    """The cut of this branch, as `DeepCacheSDHelper` numbers them.

    Block b counts from the outside, layer l within it. Computed are the blocks before b, the
    first l layers of down block b, and the last l + 1 of the up block on the same level, which
    take just those layers' outputs by skip connections.
    """
    block, layer = divmod(branch, LAYERS)
    first_up = len(unet.up_blocks) - 1 - block
    down, up = unet.down_blocks[block], unet.up_blocks[first_up]
    first_layer = len(up.resnets) - 1 - layer

    def some(module: Any, part: slice) -> dict[str, Any]:
        lists = ("resnets", "attentions")
        return {
            name: ModuleList(list(module._modules[name])[part])
            for name in lists
            if module._modules.get(name) is not None
        }

    lists = (
        (
            unet,
            {
                "down_blocks": ModuleList(list(unet.down_blocks)[: block + 1]),
                "up_blocks": ModuleList(list(unet.up_blocks)[first_up:]),
            },
        ),
        (down, some(down, slice(layer)) | ({"downsamplers": None} if down.downsamplers else {})),
        (up, some(up, slice(first_layer, None))),
    )
    if first_layer > 0:
        layers = getattr(up, "attentions", None) or up.resnets
        return _Cut(unet, branch, layers[first_layer - 1], layers, lists)
    source = unet.up_blocks[first_up - 1] if first_up > 0 else unet.mid_block
    return _Cut(unet, branch, source, None, lists)


def _computed(scheduler: Any, interval: int, forced: set[int]) -> list[bool]:
    """Whether each of the denoiser's calls computes the whole UNet.

    The interval counts from the first call, and anew from each that is forced.
    """
    found, start = [], 0
    for call, index in enumerate(library_index(scheduler)):
        if call == 0 or call in forced:
            start = index
        found.append((index - start) % interval == 0)
    return found


def library_index(scheduler: Any) -> list[int]:
    """For each step of the scheduler's timesteps, the position of the first equal timestep."""
    first: dict[float, int] = {}
    return [first.setdefault(t, step) for step, t in enumerate(scheduler.timesteps.tolist())]
