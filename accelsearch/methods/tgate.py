"""T-GATE: from some step on the prompt has had its say, so stop attending to it.

Before the gate, in the planning phase, self-attention is computed only every so many steps. At
the gate the cross-attentions' outputs are kept, as the mean of their conditional and unconditional
halves. After it, in the fidelity phase, they are reused, and since both halves would now be the
same, one of them runs.

Source: Liu et al., "Faster Diffusion via Temporal Attention Decomposition", arXiv:2404.02747. The
schedule is the authors' own, `tgate.tgate_utils.tgate_scheduler`. Their loaders carry it out in
copies of diffusers' pipelines that patch every attention and undo nothing; here the pipeline's own
call runs, with the same images, and is restored exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from accelsearch.errors import UnsupportedError
from accelsearch.methods.base import AccelerationMethod, CallSteps, Parameter, Phase, Run, Value
from accelsearch.methods.patching import (
    PIXART,
    STABLE_DIFFUSION,
    Kept,
    denoiser_of,
    forward_is_from,
    kept_of,
    map_tensors,
    restored,
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
        if any(
            forward_is_from(package, module)
            for module in _attentions(denoiser)
            for package in ("tgate", __name__)
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
        denoiser: Any = denoiser_of(pipeline, self.name, self.pipelines)
        attentions, gate = _attentions(denoiser), _Gate(kept_of(denoiser))
        hooks = _hooks(pipeline, gate, params)
        before, after = hooks
        registered = [
            denoiser.register_forward_pre_hook(before),
            denoiser.register_forward_hook(after),
        ]
        with restored((denoiser, *attentions), "forward"):
            try:
                for attention in attentions:
                    attention.forward = _attention_forward(attention, gate)
                denoiser.forward = _denoiser_forward(denoiser, gate)
                yield lambda: gate.step
            finally:
                for hook in registered:
                    hook.remove()
                gate.kept.drop()

    def full_steps(self, params: Mapping[str, Value]) -> frozenset[int]:
        """The step whose cross-attention is kept, and the first one with half the batch."""
        gate_step = int(params["gate_step"])
        return frozenset({gate_step - 1, gate_step})

    def implementation(self) -> str:
        """The library, its version, and the function of it that runs."""
        return f"tgate {version('tgate')} tgate_scheduler"


@dataclass(frozen=True)
class _Use:
    """What an attention does with its output in a step: store it, or reuse a stored one."""

    store: bool = False
    reuse: bool = False


@dataclass(frozen=True)
class _Step:
    """What T-GATE makes of a step; by default, nothing."""

    cross: _Use = _Use()
    own: _Use = _Use()  # self-attention
    stores_mean: bool = False  # of the two halves of the batch
    halved: bool = False


@dataclass
class _Gate:
    """The current step, and what the attentions keep."""

    kept: Kept
    step: _Step = _Step()


def _schedule(params: Mapping[str, Value], steps: int) -> list[_Step]:
    """The library's schedule, without the storing of what no later step reuses."""
    from tgate.tgate_utils import tgate_scheduler

    told = [tgate_scheduler(cur_step=step, **params) for step in range(steps)]
    last_cross, last_own = (
        max((step for step in range(steps) if told[step][kind]["reuse"]), default=-1)
        for kind in (0, 1)
    )
    return [
        _Step(
            cross=_Use(cross["cache"] and step < last_cross, cross["reuse"]),
            own=_Use(own["cache"] and step < last_own, own["reuse"]),
            stores_mean=not keeps_shape,
            halved=step >= int(params["gate_step"]),
        )
        for step, (cross, own, keeps_shape) in enumerate(told)
    ]


def _hooks(pipeline: Any, gate: _Gate, params: Mapping[str, Value]) -> tuple[Any, Any]:
    """What is to happen before and after each of the denoiser's calls."""
    steps = CallSteps(pipeline)
    schedule: list[_Step] = []

    def before(_: Any, args: tuple[Any, ...]) -> None:
        if steps.advance() == 0:
            guided = getattr(pipeline, "do_classifier_free_guidance", True)
            if len(args[0]) % 2 or not guided:
                raise UnsupportedError("tgate needs guidance in every call; raise guidance_scale")
            schedule[:] = _schedule(params, pipeline.scheduler.num_inference_steps)
            gate.kept.drop()
        gate.step = schedule[steps.step] if steps.step >= 0 else _Step()

    def after(_: Any, __: Any, ___: Any) -> None:
        if steps.is_last:
            gate.kept.drop()  # the memory is better used for decoding

    return before, after


def _denoiser_forward(denoiser: Any, gate: _Gate) -> Any:
    """The denoiser's forward that computes the negative half of the batch alone after the gate.

    The output is doubled: guidance between two equal halves changes nothing.
    """
    import torch

    forward = denoiser.forward

    def gated(*args: Any, **kwargs: Any) -> Any:
        if not gate.step.halved:
            return forward(*args, **kwargs)
        batch = len(args[0])

        def halved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[: batch // 2] if tensor.ndim and len(tensor) == batch else tensor

        args, kwargs = map_tensors(halved, (args, kwargs))
        half = forward(*args, **kwargs)[0]
        return (torch.cat([half, half]),)

    return gated


def _attention_forward(attention: Any, gate: _Gate) -> Any:
    """The attention's forward that keeps its output, or reuses it, as the current step says."""
    forward = attention.forward

    def kept_or_computed(
        hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        step = gate.step
        use = step.own if encoder_hidden_states is None else step.cross
        if use.reuse and (attention, step.halved) in gate.kept:
            return gate.kept[attention, step.halved]
        output = forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        if use.store:
            stored = output
            if step.stores_mean:
                gate.kept.drop((attention, False))  # too large from now on
                negative, positive = output.chunk(2)
                stored = (negative + positive) / 2
            gate.kept[attention, step.halved or step.stores_mean] = stored
        return output

    return kept_or_computed


def _attentions(denoiser: Any) -> list[Any]:
    """The attentions of the denoiser's transformer blocks.

    One that adds its input to its output (of UNets with attention in the place of transformer
    blocks) has nothing to reuse at this level: its output belongs to its step.
    """
    from diffusers.models.attention_processor import Attention

    return [
        module
        for module in denoiser.modules()
        if isinstance(module, Attention) and not module.residual_connection
    ]
