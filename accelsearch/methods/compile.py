"""Compile as a method: its parameters, the pipelines it serves, and what makes a difference.

How it works stands in `accelsearch.hooks.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from accelsearch.errors import UnsupportedError
from accelsearch.hooks.compile import apply_compile, backend, fusible, parts_of, prepared_of
from accelsearch.methods.base import AccelerationMethod, Parameter, Run, Value
from accelsearch.methods.patching import PIXART, STABLE_DIFFUSION, denoiser_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Compile", "backend"]

_IDLE = "none"
_EAGER = "eager"

_MODE = Parameter(
    name="mode",
    kind="choice",
    default="default",
    choices=("default", "max-autotune-no-cudagraphs", _EAGER),
    identity=_IDLE,
    meaning="How torch.compile compiles the repeated parts; eager: not at all, only the rest.",
    source="torch.compile (mode)",
)
_LAYOUT = Parameter(
    name="channels_last",
    kind="choice",
    default=True,
    choices=(False, True),
    fixed=True,
    meaning="Whether convolution weights lie channels last, as tensor cores read them.",
    source="diffusers, Accelerate inference",
)
_FUSED = Parameter(
    name="fuse_qkv",
    kind="choice",
    default=True,
    choices=(False, True),
    fixed=True,
    meaning="Whether an attention's projections of the same input are one product.",
    source="diffusers, fuse_qkv_projections",
)
_CAPTURED = Parameter(
    name="cuda_graphs",
    kind="choice",
    default=True,
    choices=(False, True),
    fixed=True,
    meaning="Whether each kind of step is replayed as a CUDA graph, and no step waits for the GPU.",
    source="torch.cuda.graph",
)


class Compile(AccelerationMethod):
    """Compilation for SD, SDXL, PixArt alpha and PixArt sigma.

    It is applied last, on what the other methods have made of the pipeline. A part is compiled
    as a whole where no other method works inside it, else its untouched parts are. On the CPU
    there are no CUDA graphs.
    """

    name = "compile"
    parameters = (_MODE, _LAYOUT, _FUSED, _CAPTURED)
    pipelines = STABLE_DIFFUSION + PIXART
    libraries = ()
    exact = True
    compiles = True

    def check(self, pipeline: DiffusionPipeline, run: Run) -> None:
        """Raise UnsupportedError unless the denoiser is one of ours, as it was loaded."""
        denoiser = denoiser_of(pipeline, self.name, self.pipelines)
        modules = [module for part in parts_of(pipeline, denoiser) for module in part.modules()]
        if prepared_of(denoiser).applied or any(one._compiled_call_impl for one in modules):
            raise UnsupportedError(
                "compile must not be applied already, but this pipeline's modules are compiled; "
                "leave the first application, or load the pipeline again"
            )
        if any(hasattr(module, "_hf_hook") for module in modules):
            raise UnsupportedError(
                "compile needs all weights on the device, but this pipeline's are offloaded; "
                "load it without offloading, or remove compile from methods"
            )

    def space(self, pipeline: DiffusionPipeline, run: Run) -> tuple[Parameter, ...]:
        """The choices that this device and these attentions leave."""
        denoiser = denoiser_of(pipeline, self.name, self.pipelines)
        # "meta" stands for a pipeline that is anywhere.
        on_gpu = pipeline.device.type in ("cuda", "meta")
        return (
            _MODE,
            _LAYOUT,
            _FUSED if fusible(denoiser) else _FUSED.among((False,)),
            _CAPTURED if on_gpu else _CAPTURED.among((False,)),
        )

    @contextmanager
    def apply(
        self, pipeline: DiffusionPipeline, params: Mapping[str, Value], run: Run
    ) -> Iterator[None]:
        """Compile the pipeline until the exit; the first call inside waits for the compiler."""
        self.check(pipeline, run)
        mode = str(params["mode"])
        if mode == _IDLE:
            yield
            return
        untold = [name for name, phase in run.phases if phase is None]
        if params["cuda_graphs"] and untold:
            raise UnsupportedError(
                f"cuda_graphs needs methods that tell their phase, but {untold[0]} does not; "
                f"set cuda_graphs to false or remove {untold[0]}"
            )
        with apply_compile(
            pipeline,
            mode=mode,
            channels_last=bool(params["channels_last"]),
            fuse_qkv=bool(params["fuse_qkv"]),
            cuda_graphs=bool(params["cuda_graphs"]),
            phases=run.phases,
            how=backend(pipeline.device.type),
        ):
            yield

    def held_bytes(self, pipeline: DiffusionPipeline) -> int:
        """The memory of rearranged weights, graphs, and the buffers between graphs."""
        denoiser = denoiser_of(pipeline, self.name, self.pipelines)
        return prepared_of(denoiser).held_bytes

    def implementation(self) -> str:
        """What compiles, and into what."""
        return f"torch {version('torch')} compile ({backend(_device_type())})"


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
