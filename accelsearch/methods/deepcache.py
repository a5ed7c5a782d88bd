"""DeepCache: compute the deep part of a UNet only every so many steps, and reuse it in between.

Source: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024,
arXiv:2312.00858. The caching is that of the authors' `DeepCacheSDHelper`; what is added here is
what serving needs: its state never outlives a call, and the pipeline is restored exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from accelsearch.errors import UnsupportedError
from accelsearch.methods.base import AccelerationMethod, CallSteps, Parameter, Run, Value
from accelsearch.methods.patching import denoiser_of, forward_is_from, restored_forwards

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SERVED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
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
    libraries = ("DeepCache",)

    def check(self, pipeline: DiffusionPipeline, run: Run) -> None:
        """Raise UnsupportedError unless the pipeline is an SD or SDXL with an unpatched UNet."""
        unet = denoiser_of(pipeline, self.name, _SERVED)
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
        if any(forward_is_from("DeepCache", module) for module in unet.modules()):
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
    ) -> Iterator[None]:
        """Accelerate the pipeline until the exit, which restores every module's own forward."""
        self.check(pipeline, run)
        from DeepCache import DeepCacheSDHelper

        unet = pipeline.unet
        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(
            cache_interval=params["cache_interval"], cache_branch_id=params["cache_branch_id"]
        )
        # The helper's disable() leaves the old forwards behind as instance attributes.
        with restored_forwards(unet.modules()):
            try:
                helper.enable()
                # In place of the helper's own wrapper, which looks the step up with .item(), a GPU
                # synchronisation at every step, and keeps its state from one call to the next.
                unet.forward = _forward(pipeline, helper, run)
                yield
            finally:
                helper.reset_states()

    def implementation(self) -> str:
        """The library, its version, and the class of it that runs."""
        return f"DeepCache {version('DeepCache')} DeepCacheSDHelper"


def _forward(pipeline: DiffusionPipeline, helper: Any, run: Run) -> Any:
    """The UNet's forward that tells the helper its step, and empties it where it must be."""
    steps = CallSteps(pipeline)
    library_index: list[int] = []
    unet_forward = helper.function_dict["unet_forward"]

    def forward(*args: Any, **kwargs: Any) -> Any:
        index = steps.advance()
        if index == 0:
            library_index[:] = _library_index(pipeline.scheduler)
        if index == 0 or steps.step in run.full_steps:
            helper.start_timestep = None
            helper.cached_output.clear()  # before this step allocates its own
        helper.cur_timestep = library_index[index]
        return unet_forward(*args, **kwargs)

    return forward


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
