"""Token merging as a method: its parameters, the pipelines it serves, and what makes a difference.

How it works stands in `accelsearch.hooks.tome`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from accelsearch.errors import UnsupportedError
from accelsearch.methods.base import AccelerationMethod, Parameter, Phase, Run, Value
from accelsearch.methods.patching import STABLE_DIFFUSION, denoiser_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_STEP = 0.05

_RATIO = Parameter(
    name="ratio",
    kind="float",
    default=0.5,
    low=_STEP,
    high=0.75,  # 1 - 1 / (sx * sy) at the smallest strides: more is clamped silently
    step=_STEP,
    identity=0.0,
    meaning="The share of a self-attention's tokens that are merged into similar ones.",
    source="arXiv:2303.17604; tomesd.apply_patch",
)
_DOWNSAMPLE = Parameter(
    name="max_downsample",
    kind="choice",
    default=1,
    choices=(1, 2, 4, 8),
    meaning="Tokens are merged where the UNet has at most this many latents to a token's side.",
    source="arXiv:2303.17604; tomesd.apply_patch",
)
_STRIDE_X = Parameter(
    name="sx",
    kind="int",
    default=2,
    low=2,
    high=8,
    fixed=True,
    meaning="Of every sx by sy tokens one is kept for others to merge into; this is the width.",
    source="arXiv:2303.17604; tomesd.apply_patch",
)
_STRIDE_Y = replace(
    _STRIDE_X,
    name="sy",
    meaning="Of every sx by sy tokens one is kept for others to merge into; this is the height.",
)


@dataclass(frozen=True)
class _Grid:
    """The tokens of a transformer block.

    `downsample` is the library's idea of how many latents lie along a token's side, and `fits`
    whether the library can merge the grid: it derives the sides from the latents', and fails
    where they turn out different, or narrower than two.
    """

    downsample: int
    height: int
    width: int
    fits: bool

    @property
    def tokens(self) -> int:
        return self.height * self.width


class ToMe(AccelerationMethod):
    """Token merging for StableDiffusionPipeline and StableDiffusionXLPipeline.

    Self-attention alone is merged, as the library's author advises. Which token of each sx by sy
    is kept is drawn anew in each block and step; each pipeline call draws the same, from the
    run's seed. (The library forks the global generator once and lets it run on from call to
    call: set `unet._tome_info["args"]["generator"]` to a `torch.Generator` of that seed before
    each call to get these images from the plain library.) Where T-GATE reuses a self-attention,
    its tokens are spread by the matching of another step, as they are by the two libraries.
    """

    name = "tome"
    parameters = (_RATIO, _DOWNSAMPLE, _STRIDE_X, _STRIDE_Y)
    pipelines = STABLE_DIFFUSION
    libraries = ("tomesd",)

    def check(self, pipeline: DiffusionPipeline, run: Run) -> None:
        """Raise UnsupportedError unless the pipeline is an SD or SDXL with blocks to merge in."""
        from accelsearch.hooks.tome import blocks_of

        unet = denoiser_of(pipeline, self.name, self.pipelines)
        blocks = blocks_of(unet)
        if any(type(block).__name__ == "ToMeBlock" for block in blocks):
            raise UnsupportedError(
                "tome must not be applied already, but this unet's blocks are tomesd's; "
                "call tomesd.remove_patch(pipeline) first, or load the pipeline again"
            )
        # The library replaces the class of a block, which either of these goes past: a silent
        # no-op.
        if any(
            "forward" in vars(block) or block._compiled_call_impl is not None for block in blocks
        ):
            raise UnsupportedError(
                "tome needs transformer blocks that run the forward of their class, but this "
                "unet's are compiled or wrapped; apply tome before compiling or hooking them"
            )
        grids = _grids(pipeline, run)
        if not _downsamples(grids):
            told = ", ".join(f"{grid.height} x {grid.width}" for grid in grids) or "none"
            raise UnsupportedError(
                "tome needs transformer blocks of at least 2 x 2 tokens, got "
                f"{told} at {run.height} x {run.width} pixels; "
                "raise the resolution, or remove tome from methods"
            )

    def space(self, pipeline: DiffusionPipeline, run: Run) -> tuple[Parameter, ...]:
        """The settings that merge something, and each max_downsample more than the one before.

        SDXL has no attention at its finest level, so its max_downsample starts at 2.
        """
        grids = _grids(pipeline, run)
        downsamples = _downsamples(grids)
        merged = [grid for grid in grids if grid.downsample <= downsamples[-1]]
        ratios = [float(ratio) for ratio in _RATIO.values() or ()]
        finest = max(grid.tokens for grid in merged)
        return (
            _RATIO.within(next(ratio for ratio in ratios if int(finest * ratio)), ratios[-1]),
            _DOWNSAMPLE.among(downsamples),
            _STRIDE_X.within(2, min(8, *(grid.width for grid in merged))),
            _STRIDE_Y.within(2, min(8, *(grid.height for grid in merged))),
        )

    @contextmanager
    def apply(
        self, pipeline: DiffusionPipeline, params: Mapping[str, Value], run: Run
    ) -> Iterator[Phase]:
        """Accelerate the pipeline until the exit, which gives each block its own class back."""
        self.check(pipeline, run)
        from accelsearch.hooks.tome import apply_tome

        with apply_tome(
            pipeline,
            ratio=float(params["ratio"]),
            max_downsample=int(params["max_downsample"]),
            sx=int(params["sx"]),
            sy=int(params["sy"]),
            seed=run.seed,
        ) as phase:
            yield phase

    def implementation(self) -> str:
        """The library, its version, and the function of it that runs."""
        return f"tomesd {version('tomesd')} apply_patch"


def _grids(pipeline: Any, run: Run) -> list[_Grid]:
    """The grids of at least two tokens at which the UNet has transformer blocks, finest first."""
    from accelsearch.hooks.tome import blocks_of

    unet = pipeline.unet
    scale = pipeline.vae_scale_factor
    top = height, width = run.height // scale, run.width // scale
    sizes = []
    for block in unet.down_blocks:
        sizes.append((height, width))
        if getattr(block, "downsamplers", None):
            height, width = math.ceil(height / 2), math.ceil(width / 2)
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    sizes = [*sizes, (height, width), *reversed(sizes)]
    held = {
        size
        for block, size in zip(blocks, sizes, strict=True)
        if block is not None and blocks_of(block) and math.prod(size) > 1
    }
    return sorted((_grid(top, size) for size in held), key=lambda grid: -grid.tokens)


def _grid(top: tuple[int, int], size: tuple[int, int]) -> _Grid:
    """The grid of this size under latents of the `top` size, as `tomesd` tells it."""
    downsample = math.ceil(math.sqrt(math.prod(top) // math.prod(size)))
    derived = tuple(math.ceil(side / downsample) for side in top)
    return _Grid(downsample, *size, fits=derived == size and min(size) > 1)


def _downsamples(grids: Sequence[_Grid]) -> tuple[int, ...]:
    """The values of max_downsample that each reach more grids than the last, and can run."""
    found: list[int] = []
    reached = 0
    for value in (1, 2, 4, 8):
        merged = [grid for grid in grids if grid.downsample <= value]
        if not all(grid.fits for grid in merged):
            break
        if len(merged) > reached:
            found.append(value)
            reached = len(merged)
    return tuple(found)
