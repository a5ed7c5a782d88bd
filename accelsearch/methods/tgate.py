"""T-GATE as a method: its parameters, the pipelines it serves, and what makes a difference.

How it works stands in `accelsearch.hooks.tgate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from accelsearch.errors import UnsupportedError
from accelsearch.methods.base import AccelerationMethod, Parameter, Phase, Run, Value
from accelsearch.methods.patching import (
    PIXART,
    STABLE_DIFFUSION,
    denoiser_of,
    forward_is_from,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_GATED_SHARE = 0.4  # of the steps: the authors' 10 of 25

_GATE = Parameter(
    name="gate_step",
    kind="int",
    default=10,
    low=1,
    high=1000,
    meaning="From this step on cross-attention is reused, and one half of the guidance computed.",
    source="arXiv:2404.02747; tgate.tgate_utils.tgate_scheduler",
)
_PLANNING = Parameter(
    name="sp_interval",
    kind="int",
    default=5,
    low=1,
    high=10,
    identity=1,
    meaning="Before the gate, one step in this many computes self-attention; 1 computes all.",
    source="arXiv:2404.02747; tgate.tgate_utils.tgate_scheduler",
)
_FIDELITY = Parameter(
    name="fi_interval",
    kind="int",
    default=1,
    low=1,
    high=10,
    meaning="After the gate, one step in this many computes self-attention; 1 computes all.",
    source="tgate.tgate_utils.tgate_scheduler",
)
_WARM_UP = Parameter(
    name="warm_up",
    kind="int",
    default=2,
    low=0,
    high=10,
    meaning="So many first steps compute every self-attention.",
    source="arXiv:2404.02747; tgate.tgate_utils.tgate_scheduler",
)


class TGate(AccelerationMethod):
    """T-GATE for SD, SDXL, PixArt alpha and PixArt sigma, with guidance.

    The gate's range and default are shares of the steps, its values are steps, which are what
    the library takes. The identity is a gate after the last step with every self-attention
    computed. A scheduler that starts itself (PNDM) is not gated in its extra calls, as in the
    library.
    """

    name = "tgate"
    parameters = (_GATE, _PLANNING, _FIDELITY, _WARM_UP)
    pipelines = STABLE_DIFFUSION + PIXART
    libraries = ("tgate",)

    def check(self, pipeline: DiffusionPipeline, run: Run) -> None:
        """Raise UnsupportedError unless the library would serve these calls, and has not yet."""
        denoiser = denoiser_of(pipeline, self.name, self.pipelines)
        scheduler = pipeline.scheduler
        if scheduler.order != 1:
            raise UnsupportedError(
                f"tgate needs a scheduler of first order, got {type(scheduler).__name__} of order "
                f"{scheduler.order}; choose DDIMScheduler or DPMSolverMultistepScheduler, or "
                "remove tgate from methods for this scheduler"
            )
        kinds = (type(pipeline).__name__, type(scheduler).__name__)
        if kinds == ("PixArtAlphaPipeline", "PNDMScheduler"):
            raise UnsupportedError(
                "tgate's library cannot run a PixArtAlphaPipeline with PNDMScheduler; choose "
                "another scheduler such as DDIMScheduler, or remove tgate from methods"
            )
        if run.guidance_scale <= 1:
            raise UnsupportedError(
                f"tgate needs guidance, which a guidance_scale of {run.guidance_scale} turns off; "
                "set guidance_scale above 1, or remove tgate from methods"
            )
        if getattr(denoiser.config, "time_cond_proj_dim", None) is not None:
            raise UnsupportedError(
                "tgate needs guidance by a negative prompt, but this model takes its guidance as "
                "an embedding; remove tgate from methods for this model"
            )
        from accelsearch.hooks.tgate import attentions_of

        if any(
            forward_is_from(package, module)
            for module in attentions_of(denoiser)
            for package in ("tgate", "accelsearch.hooks.tgate")
        ):
            raise UnsupportedError(
                "tgate must not be applied already, but this pipeline's attentions are tgate's; "
                "leave the first application, or load the pipeline again"
            )

    def space(self, pipeline: DiffusionPipeline, run: Run) -> tuple[Parameter, ...]:
        """The settings that differ from each other for some setting of the others.

        A longer interval than these computes no step again, as the longest of them does. A later
        warm-up leaves nothing to reuse, as `sp_interval` 1 does.
        """
        steps = run.steps
        gate = replace(
            _GATE,
            high=max(1, steps - 1),
            default=max(1, round(_GATED_SHARE * steps)),
            identity=steps,
        )
        return (
            gate,
            _PLANNING.within(1, min(10, max(1, steps - 2))),
            _FIDELITY.within(1, min(10, steps)),
            _WARM_UP.within(0, min(10, max(0, steps - 4))),
        )

    @contextmanager
    def apply(
        self, pipeline: DiffusionPipeline, params: Mapping[str, Value], run: Run
    ) -> Iterator[Phase]:
        """Accelerate the pipeline until the exit, which restores every module's own forward."""
        self.check(pipeline, run)
        if int(params["gate_step"]) < 1:
            raise UnsupportedError(
                f"gate_step must be >= 1, got {params['gate_step']}: the step before the gate is "
                "the one whose cross-attention is kept"
            )
        from accelsearch.hooks.tgate import apply_tgate

        denoiser: Any = denoiser_of(pipeline, self.name, self.pipelines)
        guarding = denoiser.register_forward_pre_hook(_guard(pipeline))
        try:
            with apply_tgate(
                pipeline,
                gate_step=int(params["gate_step"]),
                sp_interval=int(params["sp_interval"]),
                fi_interval=int(params["fi_interval"]),
                warm_up=int(params["warm_up"]),
            ) as phase:
                yield phase
        finally:
            guarding.remove()

    def full_steps(self, params: Mapping[str, Value]) -> frozenset[int]:
        """The step whose cross-attention is kept, and the first one with half the batch."""
        gate_step = int(params["gate_step"])
        return frozenset({gate_step - 1, gate_step})

    def implementation(self) -> str:
        """The library, its version, and the function of it that runs."""
        return f"tgate {version('tgate')} tgate_scheduler"


def _guard(pipeline: Any) -> Any:
    """A hook before the denoiser's forward that refuses a call without guidance."""

    def hook(_: Any, args: tuple[Any, ...]) -> None:
        if len(args[0]) % 2 or not getattr(pipeline, "do_classifier_free_guidance", True):
            raise UnsupportedError("tgate needs guidance in every call; raise guidance_scale")

    return hook
