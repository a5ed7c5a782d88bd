"""DeepCache: compute the deep part of a UNet only every so many steps, and reuse it in between.

Source: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024,
arXiv:2312.00858. The steps that are skipped and the features that are reused are those of the
authors' `DeepCacheSDHelper`, and so are the images. The helper puts a wrapper around every layer,
keeps the output of each, and asks the GPU for the timestep at every step. Here a step that reuses
runs the UNet's own code with the skipped layers out of its lists: nothing waits for the GPU, one
tensor is kept, and the layers can be compiled and the steps captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from accelsearch.errors import UnsupportedError
from accelsearch.methods.base import AccelerationMethod, CallSteps, Parameter, Phase, Run, Value
from accelsearch.methods.patching import (
    STABLE_DIFFUSION,
    Kept,
    denoiser_of,
    forward_is_from,
    kept_of,
    restored,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LAYERS = 3  # the library reads a branch id as block * 3 + layer, whatever the UNet

_INTERVAL = Parameter(
    name="cache_interval",
    kind="int",
    default=3,
    low=1,
    high=10,
    identity=1,
    meaning="One step in this many computes the whole UNet; the others reuse its deep part.",
    source="arXiv:2312.00858, section 3.3 (N); DeepCacheSDHelper.set_params",
)
_BRANCH = Parameter(
    name="cache_branch_id",
    kind="int",
    default=0,
    low=0,
    high=11,
    meaning="The skip branch above which every step is computed; 0 reuses most, and costs most.",
    source="arXiv:2312.00858, section 3.2; DeepCacheSDHelper.set_params",
)


class DeepCache(AccelerationMethod):
    """DeepCache for StableDiffusionPipeline and StableDiffusionXLPipeline.

    A step is computed in full if its index is a multiple of `cache_interval`. The index is the
    library's: the position of the *first* equal timestep. It differs from the count of steps
    where a scheduler repeats timesteps (PNDM, Heun), and is kept there so that exported
    parameters give the same images with the plain library.
    """

    name = "deepcache"
    parameters = (_INTERVAL, _BRANCH)
    pipelines = STABLE_DIFFUSION
    libraries = ("DeepCache",)

    def check(self, pipeline: DiffusionPipeline, run: Run) -> None:
        """Raise UnsupportedError unless the pipeline is an SD or SDXL with an unpatched UNet."""
        unet = denoiser_of(pipeline, self.name, self.pipelines)
        samplers = ((unet.down_blocks, "downsamplers"), (unet.up_blocks, "upsamplers"))
        if unet.mid_block is None or not all(
            hasattr(block, "resnets") and hasattr(block, sampler)
            for blocks, sampler in samplers
            for block in blocks
        ):
            raise UnsupportedError(
                "deepcache needs a unet of resnet blocks with a mid block, got "
                f"{unet.config.down_block_types} and mid block {unet.config.mid_block_type}; "
                "remove deepcache from methods for this model"
            )
        if any(
            forward_is_from(package, module)
            for module in unet.modules()
            for package in ("DeepCache", __name__)
        ):
            raise UnsupportedError(
                "deepcache must not be enabled already, but this unet's forward is DeepCache's; "
                "call disable() on its helper first, or load the pipeline again"
            )

    def space(self, pipeline: DiffusionPipeline, run: Run) -> tuple[Parameter, ...]:
        """The intervals and branches that differ from each other on this pipeline.

        Every pair of them is a setting of its own. Interval 1 is left out, since it reuses
        nothing whatever the branch; a pipeline of one step has no other.
        """
        return (
            _narrowed(_INTERVAL, _intervals(pipeline.scheduler, run.steps)),
            _narrowed(_BRANCH, _branches(pipeline.unet)),
        )

    @contextmanager
    def apply(
        self, pipeline: DiffusionPipeline, params: Mapping[str, Value], run: Run
    ) -> Iterator[Phase]:
        """Accelerate the pipeline until the exit, which restores every module's own forward."""
        self.check(pipeline, run)
        unet = pipeline.unet
        interval, branch = int(params["cache_interval"]), int(params["cache_branch_id"])
        cut, kept, steps = _cut(unet, branch), kept_of(unet), CallSteps(pipeline)
        computed: list[bool] = []
        is_full = True

        def begin(_: Any, __: Any) -> None:
            nonlocal is_full
            index = steps.advance()
            if index == 0:
                kept.drop()
                forced = {step + steps.extra for step in run.full_steps}
                computed[:] = _computed(pipeline.scheduler, interval, forced)
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
                yield lambda: (branch, is_full)
            finally:
                beginning.remove()
                kept.drop()

    def implementation(self) -> str:
        """Our version, and the class of the library whose images these are."""
        ours, theirs = version("accelsearch"), version("DeepCache")
        return f"accelsearch {ours}, as DeepCache {theirs} DeepCacheSDHelper"


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
        from torch.nn import Module

        tap = Module()
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
    from torch.nn import ModuleList

    block, layer = divmod(branch, _LAYERS)
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
    for call, index in enumerate(_library_index(scheduler)):
        if call == 0 or call in forced:
            start = index
        found.append((index - start) % interval == 0)
    return found


def _library_index(scheduler: Any) -> list[int]:
    """For each step of the scheduler's timesteps, the position of the first equal timestep."""
    first: dict[float, int] = {}
    return [first.setdefault(t, step) for step, t in enumerate(scheduler.timesteps.tolist())]


def _intervals(scheduler: Any, steps: int) -> tuple[int, ...]:
    """The smallest of all intervals that compute the same steps in full, and reuse some.

    From `steps` on every interval computes the first step alone. With Heun's repeated timesteps
    every even one does.
    """
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    smallest: dict[tuple[bool, ...], int] = {}
    for interval in range(2, 11):
        full = tuple(index % interval == 0 for index in _library_index(fresh))
        smallest.setdefault(full, interval)
    return tuple(interval for full, interval in smallest.items() if not all(full)) or (1,)


def _branches(unet: Any) -> tuple[int, ...]:
    """The branch ids that cut the UNet at different places.

    SD1.5 has 0..11 and SDXL 0..8. In a block of n resnets the layers 0..n can be cut (n is the
    downsampler); the library accepts later layers and blocks too, and makes the same image with
    as much work or more.
    """
    return tuple(
        _LAYERS * block + layer
        for block, module in enumerate(unet.down_blocks)
        for layer in range(min(_LAYERS, len(module.resnets) + 1))
    )


def _narrowed(parameter: Parameter, values: tuple[int, ...]) -> Parameter:
    if values == tuple(range(values[0], values[-1] + 1)):
        return parameter.within(values[0], values[-1])
    return parameter.among(values)
