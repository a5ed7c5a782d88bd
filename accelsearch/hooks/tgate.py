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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from tgate.tgate_utils import tgate_scheduler

from accelsearch.hooks.shared import CallSteps, Kept, Phase, kept_of, map_tensors, restored


@contextmanager
def apply_tgate(
    pipeline: Any, *, gate_step: int, sp_interval: int, fi_interval: int, warm_up: int
) -> Iterator[Phase]:
    """Reuse attentions as the library schedules it, until the exit.

    From step `gate_step` (>= 1) on, cross-attention is reused and one half of the guidance
    computed. Of self-attention, one step in `sp_interval` is computed before the gate, one in
    `fi_interval` after it, and every one of the first `warm_up`. A scheduler that starts itself
    (PNDM) is not gated in its extra calls, as in the library.
    """
    params = {
        "gate_step": gate_step,
        "sp_interval": sp_interval,
        "fi_interval": fi_interval,
        "warm_up": warm_up,
    }
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    attentions, gate = attentions_of(denoiser), _Gate(kept_of(denoiser))
    before, after = _gate_hooks(pipeline, gate, params)
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


def attentions_of(denoiser: Any) -> list[Any]:
    """The attentions of the denoiser's transformer blocks.

    One that adds its input to its output (of UNets with attention in the place of transformer
    blocks) has nothing to reuse at this level: its output belongs to its step.
    """
    return [
        module
        for module in denoiser.modules()
        if isinstance(module, Attention) and not module.residual_connection
    ]


@dataclass(frozen=True)
class _Use:
    """What an attention does with its output in a step: store it, or reuse a stored one."""

    store: bool = False
    reuse: bool = False


@dataclass(frozen=True)
class _GateStep:
    """What T-GATE makes of a step; by default, nothing."""

    cross: _Use = _Use()
    own: _Use = _Use()  # self-attention
    stores_mean: bool = False  # of the two halves of the batch
    halved: bool = False


@dataclass
class _Gate:
    """The current step, and what the attentions keep."""

    kept: Kept
    step: _GateStep = _GateStep()


def _gate_schedule(params: dict[str, int], steps: int) -> list[_GateStep]:
    """The library's schedule, without the storing of what no later step reuses."""
    told = [tgate_scheduler(cur_step=step, **params) for step in range(steps)]
    last_cross, last_own = (
        max((step for step in range(steps) if told[step][kind]["reuse"]), default=-1)
        for kind in (0, 1)
    )
    return [
        _GateStep(
            cross=_Use(cross["cache"] and step < last_cross, cross["reuse"]),
            own=_Use(own["cache"] and step < last_own, own["reuse"]),
            stores_mean=not keeps_shape,
            halved=step >= params["gate_step"],
        )
        for step, (cross, own, keeps_shape) in enumerate(told)
    ]


def _gate_hooks(pipeline: Any, gate: _Gate, params: dict[str, int]) -> tuple[Any, Any]:
    """What is to happen before and after each of the denoiser's calls."""
    steps = CallSteps(pipeline)
    schedule: list[_GateStep] = []

    def before(_: Any, __: Any) -> None:
        if steps.advance() == 0:
            schedule[:] = _gate_schedule(params, pipeline.scheduler.num_inference_steps)
            gate.kept.drop()
        gate.step = schedule[steps.step] if steps.step >= 0 else _GateStep()

    def after(_: Any, __: Any, ___: Any) -> None:
        if steps.is_last:
            gate.kept.drop()  # the memory is better used for decoding

    return before, after


def _denoiser_forward(denoiser: Any, gate: _Gate) -> Any:
    """The denoiser's forward that computes the negative half of the batch alone after the gate.

    The output is doubled: guidance between two equal halves changes nothing.
    """
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
