"""What is T-GATE's own: PixArt, its schedule, the library as its oracle, and what it refuses."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import pytest
import torch

from accelsearch.errors import PlanError, UnsupportedError
from accelsearch.methods import METHODS, applied

from .tiny import (
    BodyError,
    MakePipeline,
    apply,
    denoiser_of,
    images,
    run_of,
    state_of,
    work_of,
)

# Deprecations of NumPy that diffusers' schedulers run into.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PIXART = {"use_resolution_binning": False, "clean_caption": False}
SETTINGS = [
    {"gate_step": 1, "sp_interval": 1, "fi_interval": 2, "warm_up": 0},
    {"gate_step": 2, "sp_interval": 2, "fi_interval": 1, "warm_up": 1},
    {"gate_step": 4, "sp_interval": 2, "fi_interval": 3, "warm_up": 0},
    {"gate_step": 5, "sp_interval": 3, "fi_interval": 1, "warm_up": 1},
]
FIRST_ORDER = (
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
)

every_pixart = pytest.mark.parametrize("kind", ["pixart_alpha", "pixart_sigma"])


def extra_of(kind: str) -> dict[str, Any]:
    return PIXART if kind.startswith("pixart") else {}


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        pytest.param(
            kind,
            scheduler,
            marks=[] if kind.startswith("pixart") else [pytest.mark.slow],
        )
        for kind in ("sd", "sdxl", "pixart_alpha", "pixart_sigma")
        for scheduler in FIRST_ORDER
        if (kind, scheduler) != ("pixart_alpha", "PNDMScheduler")
    ],
)
def test_the_images_are_those_of_the_loader(
    make_pipeline: MakePipeline, kind: str, scheduler: str
) -> None:
    import tgate

    loader = {
        "sd": tgate.TgateSDLoader,
        "sdxl": tgate.TgateSDXLLoader,
        "pixart_alpha": tgate.TgatePixArtAlphaLoader,
        "pixart_sigma": tgate.TgatePixArtSigmaLoader,
    }[kind]
    pipeline = make_pipeline(kind, scheduler)
    prompts = ["a red circle", "a blue square"]
    for params in SETTINGS:
        with apply("tgate", pipeline, **params):
            accelerated = images(pipeline, prompts, **extra_of(kind))
        theirs = loader(make_pipeline(kind, scheduler))  # nothing undoes it
        call = functools.partial(theirs.tgate, **params)
        assert torch.equal(images(call, prompts, **extra_of(kind)), accelerated), params


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        pytest.param(
            kind,
            scheduler,
            marks=[] if (kind, scheduler) == ("sdxl", "DDIMScheduler") else [pytest.mark.slow],
        )
        for kind in ("sd", "sdxl")
        for scheduler in FIRST_ORDER
    ],
)
def test_the_images_with_deepcache_are_those_of_the_loader_for_both(
    make_pipeline: MakePipeline, kind: str, scheduler: str
) -> None:
    import tgate

    loader = {"sd": tgate.TgateSDDeepCacheLoader, "sdxl": tgate.TgateSDXLDeepCacheLoader}[kind]
    pipeline = make_pipeline(kind, scheduler)
    cache = {"cache_interval": 3, "cache_branch_id": 0}
    for gate in (
        {"gate_step": 3, "sp_interval": 1, "fi_interval": 1, "warm_up": 0},
        {"gate_step": 6, "sp_interval": 2, "fi_interval": 2, "warm_up": 1},
    ):
        with applied(pipeline, cache | gate, ["deepcache", "tgate"], run_of(pipeline, 8)):
            accelerated = images(pipeline, steps=8)
            assert torch.equal(images(pipeline, steps=8), accelerated)
        theirs = loader(make_pipeline(kind, scheduler), **cache)
        call = functools.partial(theirs.tgate, **gate)
        assert torch.equal(images(call, steps=8), accelerated), gate


@every_pixart
def test_pixart_is_accelerated_and_restored(make_pipeline: MakePipeline, kind: str) -> None:
    pipeline = make_pipeline(kind)
    with work_of(pipeline) as full_work:
        baseline = images(pipeline, **PIXART)
    state = state_of(pipeline)
    with apply("tgate", pipeline), work_of(pipeline) as less_work:
        accelerated = images(pipeline, **PIXART)
    assert state_of(pipeline) == state
    assert sum(less_work) < 0.9 * sum(full_work)

    def fail(index: int, *_: Any) -> None:
        if index == 3:
            raise BodyError

    with pytest.raises(BodyError), apply("tgate", pipeline):
        other = images(pipeline, ["a blue square", "a green star"], height=48, **PIXART)
        assert torch.equal(images(pipeline, **PIXART), accelerated)
        images(pipeline, callback=fail, **PIXART)
    assert not torch.equal(other[:1, :, :32], accelerated)
    assert not torch.equal(accelerated, baseline)
    assert state_of(pipeline) == state
    assert torch.equal(images(pipeline, **PIXART), baseline)


@pytest.mark.parametrize(
    ("scheduler", "batches"),
    [
        ("DDIMScheduler", [2, 2, 1, 1, 1]),
        # Nine calls before the regular five are not gated.
        ("PNDMScheduler", [2] * 9 + [2, 2, 1, 1, 1]),
    ],
)
def test_half_the_guidance_is_computed_after_the_gate(
    make_pipeline: MakePipeline, scheduler: str, batches: list[int]
) -> None:
    pipeline = make_pipeline("sdxl", scheduler)
    seen: list[int] = []
    pipeline.unet.conv_in.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with apply("tgate", pipeline, gate_step=2):
        images(pipeline)
    assert seen == batches


def test_a_call_leaves_no_activations_behind(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("pixart_sigma")
    outputs: list[Any] = []
    for module in denoiser_of(pipeline).modules():
        if type(module).__name__ == "Attention":
            module.register_forward_hook(lambda *hook: outputs.append(weakref.ref(hook[-1])))
    with apply("tgate", pipeline, gate_step=4, sp_interval=2, fi_interval=2, warm_up=0):
        images(pipeline, **PIXART)
        assert len(outputs) == 2 * 2 * 5
        assert [output for output in outputs if output() is not None] == []


@pytest.mark.parametrize(
    ("steps", "gate", "planning", "fidelity", "warm_up"),
    [
        (1, (1, 1), (1, 1), (1, 1), (0, 0)),
        (2, (1, 1), (1, 1), (1, 2), (0, 0)),
        (5, (1, 4), (1, 3), (1, 5), (0, 1)),
        (50, (1, 49), (1, 10), (1, 10), (0, 10)),
    ],
)
def test_the_space_grows_with_the_steps(
    make_pipeline: MakePipeline,
    steps: int,
    gate: tuple[int, int],
    planning: tuple[int, int],
    fidelity: tuple[int, int],
    warm_up: tuple[int, int],
) -> None:
    pipeline = make_pipeline("pixart_sigma")
    space = METHODS["tgate"].space(pipeline, run_of(pipeline, steps))
    assert [one.ends for one in space] == [gate, planning, fidelity, warm_up]
    assert space[0].identity == steps
    assert space[0].default == max(1, round(0.4 * steps))


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("gate_step", {"sp_interval": 1, "fi_interval": 1, "warm_up": 0}),
        ("sp_interval", {"gate_step": 6, "fi_interval": 1, "warm_up": 0}),
        ("fi_interval", {"gate_step": 1, "sp_interval": 1, "warm_up": 0}),
        ("warm_up", {"gate_step": 6, "sp_interval": 5, "fi_interval": 1}),
    ],
)
def test_each_value_of_a_parameter_makes_another_image_and_those_outside_make_none(
    make_pipeline: MakePipeline, name: str, others: dict[str, int]
) -> None:
    pipeline = make_pipeline("pixart_sigma")
    run = run_of(pipeline, 7)
    parameter = {one.name: one for one in METHODS["tgate"].space(pipeline, run)}[name]
    # A gate past the last step is the baseline, and so late a warm-up is as an interval of 1.
    outside = {"gate_step": {}, "warm_up": others | {"sp_interval": 1, "warm_up": 0}}.get(name)
    seen = []
    if outside == {}:
        seen.append(images(pipeline, steps=7, **PIXART))
    elif outside:
        with METHODS["tgate"].apply(pipeline, outside, run):
            seen.append(images(pipeline, steps=7, **PIXART))
    for value in range(1 if name != "warm_up" else 0, 9):
        with METHODS["tgate"].apply(pipeline, {**others, name: value}, run):
            image = images(pipeline, steps=7, **PIXART)
        is_new = not any(torch.equal(image, other) for other in seen)
        assert is_new == (value in (parameter.values() or ())), value
        seen.append(image)


@pytest.mark.parametrize(
    ("kind", "scheduler", "guidance_scale", "message"),
    [
        ("sd", "DDIMScheduler", 1.0, "guidance_scale of 1.0 turns off; set guidance_scale above 1"),
        ("pixart_alpha", "DDIMScheduler", 0.0, "set guidance_scale above 1"),
        ("pixart_alpha", "PNDMScheduler", 4.0, "choose another scheduler such as DDIMScheduler"),
        ("sd", "HeunDiscreteScheduler", 4.0, "HeunDiscreteScheduler of order 2; choose DDIM"),
        ("sdxl", "KDPM2DiscreteScheduler", 4.0, "KDPM2DiscreteScheduler of order 2; choose DDIM"),
        ("pixart_sigma", "KDPM2AncestralDiscreteScheduler", 4.0, "of order 2; choose DDIM"),
    ],
)
def test_calls_that_break_the_library_are_refused_before_anything_is_patched(
    make_pipeline: MakePipeline, kind: str, scheduler: str, guidance_scale: float, message: str
) -> None:
    pipeline = make_pipeline(kind, scheduler)
    run = run_of(pipeline, guidance_scale=guidance_scale)
    state = state_of(pipeline)
    with pytest.raises(UnsupportedError, match=message), applied(pipeline, {}, ["tgate"], run):
        pytest.fail("the body must not run")
    assert state_of(pipeline) == state


def test_a_gate_before_the_first_step_is_refused(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("pixart_sigma")
    state = state_of(pipeline)
    with (
        pytest.raises(PlanError, match=r"gate_step must be in 1\.\.1000, got 0"),
        applied(pipeline, {"gate_step": 0}, ["tgate"], run_of(pipeline)),
    ):
        pytest.fail("the body must not run")
    with (
        pytest.raises(UnsupportedError, match="gate_step must be >= 1, got 0"),
        apply("tgate", pipeline, gate_step=0),
    ):
        pytest.fail("the body must not run")
    assert state_of(pipeline) == state


def test_a_model_that_is_guided_by_an_embedding_is_refused(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(UnsupportedError, match="takes its guidance as an embedding"):
        METHODS["tgate"].check(pipeline, run_of(pipeline))


def test_a_pipeline_that_the_library_has_patched_is_refused(make_pipeline: MakePipeline) -> None:
    import tgate

    pipeline = tgate.TgateSDXLLoader(make_pipeline("sdxl"))
    METHODS["tgate"].check(pipeline, run_of(pipeline))
    images(functools.partial(pipeline.tgate, gate_step=2))
    with pytest.raises(UnsupportedError, match="load the pipeline again"):
        METHODS["tgate"].check(pipeline, run_of(pipeline))


@pytest.mark.parametrize("kind", ["sdxl", "pixart_sigma"])
def test_a_call_without_guidance_is_refused_rather_than_mixed_up(
    make_pipeline: MakePipeline, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    with (
        apply("tgate", pipeline),
        pytest.raises(UnsupportedError, match="guidance in every call"),
    ):
        images(pipeline, guidance_scale=1.0, **extra_of(kind))


def test_attentions_that_add_their_input_are_left_alone(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.residual_connection = True
    with apply("tgate", pipeline):
        assert "forward" not in vars(attention)
