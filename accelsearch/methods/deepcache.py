"""DeepCache as a method: its parameters, the pipelines it serves, and what makes a difference.

How it works stands in `accelsearch.hooks.deepcache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from accelsearch.errors import UnsupportedError
from accelsearch.methods.base import AccelerationMethod, Parameter, Phase, Run, Value
from accelsearch.methods.patching import STABLE_DIFFUSION, denoiser_of, forward_is_from

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LARGEST = 20  # interval: few steps computed, but on a forgiving model images may hold

_INTERVAL = Parameter(
    name="cache_interval",
    kind="int",
    default=3,
    low=1,
    high=_LARGEST,
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
    mildest="high",
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
            for package in ("DeepCache", "accelsearch.hooks.deepcache")
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
        from accelsearch.hooks.deepcache import apply_deepcache

        with apply_deepcache(
            pipeline,
            cache_interval=int(params["cache_interval"]),
            cache_branch_id=int(params["cache_branch_id"]),
            full_steps=run.full_steps,
        ) as phase:
            yield phase

    def implementation(self) -> str:
        """Our version, and the class of the library whose images these are."""
        ours, theirs = version("accelsearch"), version("DeepCache")
        return f"accelsearch {ours}, as DeepCache {theirs} DeepCacheSDHelper"


def _intervals(scheduler: Any, steps: int) -> tuple[int, ...]:
    """The smallest of all intervals that compute the same steps in full, and reuse some.

    From `steps` on every interval computes the first step alone. With Heun's repeated timesteps
    every even one does.
    """
    from accelsearch.hooks.deepcache import library_index

    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    smallest: dict[tuple[bool, ...], int] = {}
    for interval in range(2, _LARGEST + 1):
        full = tuple(index % interval == 0 for index in library_index(fresh))
        smallest.setdefault(full, interval)
    return tuple(interval for full, interval in smallest.items() if not all(full)) or (1,)


def _branches(unet: Any) -> tuple[int, ...]:
    """The branch ids that cut the UNet at different places.

    SD1.5 has 0..11 and SDXL 0..8. In a block of n resnets the layers 0..n can be cut (n is the
    downsampler); the library accepts later layers and blocks too, and makes the same image with
    as much work or more.
    """
    from accelsearch.hooks.deepcache import LAYERS

    return tuple(
        LAYERS * block + layer
        for block, module in enumerate(unet.down_blocks)
        for layer in range(min(LAYERS, len(module.resnets) + 1))
    )


def _narrowed(parameter: Parameter, values: tuple[int, ...]) -> Parameter:
    if values == tuple(range(values[0], values[-1] + 1)):
        return parameter.within(values[0], values[-1])
    return parameter.among(values)
