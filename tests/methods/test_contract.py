"""What every method in METHODS must keep, on tiny SD and SDXL pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from accelsearch.errors import UnsupportedError
from accelsearch.methods import METHODS, applied
from accelsearch.methods.base import Run

# First order, an exponential integrator, an ancestral one that draws noise at each step, and two
# that repeat timesteps: PNDM to start itself, Heun at every step.
SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
)
STEPS = 5
SIZE = 32

MakePipeline = Callable[..., Any]

# A deprecation of NumPy that diffusers' schedulers run into.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

every_method = pytest.mark.parametrize("name", METHODS)
every_kind = pytest.mark.parametrize("kind", ["sd", "sdxl"])
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)


def images(
    pipeline: Any,
    prompts: Sequence[str] = ("a red circle",),
    seed: int = 5,
    height: int = SIZE,
    steps: int = STEPS,
    **arguments: Any,
) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    result: torch.Tensor = pipeline(
        list(prompts),
        height=height,
        width=SIZE,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=generators,
        output_type="pt",
        **arguments,
    ).images
    assert result.isfinite().all()
    return result


def run_of(pipeline: Any, steps: int = STEPS) -> Run:
    return Run(
        steps=steps,
        guidance_scale=4.0,
        batch_size=1,
        height=SIZE,
        width=SIZE,
        scheduler=type(pipeline.scheduler).__name__,
        seed=5,
    )


def defaults(name: str, pipeline: Any) -> dict[str, Any]:
    """The method's default on this pipeline, which must not be the identity."""
    space = METHODS[name].space(pipeline, run_of(pipeline))
    return {parameter.name: parameter.default for parameter in space}


def apply(name: str, pipeline: Any, **params: Any) -> Any:
    return METHODS[name].apply(pipeline, defaults(name, pipeline) | params, run_of(pipeline))


@contextmanager
def work_of(pipeline: Any) -> Iterator[list[int]]:
    """How many values the denoiser's innermost modules put out, one entry a module call."""
    work: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: work.append(output.numel()))
        for module in pipeline.unet.modules()
        if not list(module.children())
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def state_of(pipeline: Any) -> list[dict[str, int]]:
    """Every attribute of every module, and of the pipeline, by the identity of its value."""
    modules = [
        module
        for component in pipeline.components.values()
        if isinstance(component, torch.nn.Module)
        for module in component.modules()
    ]
    return [
        {name: id(value) for name, value in vars(holder).items()} for holder in (*modules, pipeline)
    ]


class BodyError(Exception):
    pass


def fail_at_step(step: int) -> Callable[..., dict[str, Any]]:
    def callback(_: Any, index: int, __: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise BodyError
        return arguments

    return callback


@every_scheduler
@every_kind
@every_method
def test_apply_changes_the_images_with_less_work_and_undoes_it(
    make_pipeline: MakePipeline, name: str, kind: str, scheduler: str
) -> None:
    pipeline = make_pipeline(kind, scheduler)
    with work_of(pipeline) as full_work:
        baseline = images(pipeline)
    with apply(name, pipeline), work_of(pipeline) as less_work:
        accelerated = images(pipeline)
    assert not torch.equal(accelerated, baseline)
    assert sum(less_work) < 0.9 * sum(full_work)
    assert torch.equal(images(pipeline), baseline)


@every_kind
@every_method
def test_apply_leaves_every_attribute_as_it_was(
    make_pipeline: MakePipeline, name: str, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    images(pipeline)  # a call alone leaves its arguments on the pipeline
    state = state_of(pipeline)
    with apply(name, pipeline):
        assert state_of(pipeline) != state
        images(pipeline)
    assert state_of(pipeline) == state


@every_kind
@every_method
def test_apply_restores_the_pipeline_when_the_body_raises(
    make_pipeline: MakePipeline, name: str, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    baseline = images(pipeline)
    state = state_of(pipeline)
    with pytest.raises(BodyError), apply(name, pipeline):
        images(pipeline, callback_on_step_end=fail_at_step(2))
    assert state_of(pipeline) == state
    assert torch.equal(images(pipeline), baseline)


@every_scheduler
@every_method
def test_each_call_under_acceleration_is_as_the_first(
    make_pipeline: MakePipeline, name: str, scheduler: str
) -> None:
    pipeline = make_pipeline("sd", scheduler)
    with apply(name, pipeline):
        first = images(pipeline)
        other = images(pipeline, ["a blue square"], seed=9)
        again = images(pipeline)
        with pytest.raises(BodyError):
            images(pipeline, callback_on_step_end=fail_at_step(1))
        after_a_broken_call = images(pipeline)
    assert not torch.equal(other, first)
    assert torch.equal(again, first)
    assert torch.equal(after_a_broken_call, first)


@every_kind
@every_method
def test_size_batch_and_steps_may_change_from_call_to_call(
    make_pipeline: MakePipeline, name: str, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    two = ["a blue square", "a green star"]
    with apply(name, pipeline):
        alone = images(pipeline, two, height=48, steps=STEPS + 2)
    with apply(name, pipeline):
        images(pipeline)
        assert torch.equal(images(pipeline, two, height=48, steps=STEPS + 2), alone)


@every_kind
@every_method
def test_the_same_seed_gives_the_same_image_in_a_new_application(
    make_pipeline: MakePipeline, name: str, kind: str
) -> None:
    results = []
    for unrelated_seed in (1, 2):
        pipeline = make_pipeline(kind)
        torch.manual_seed(unrelated_seed)
        with apply(name, pipeline):
            results.append(images(pipeline))
    assert torch.equal(*results)


@every_scheduler
@every_method
def test_the_identity_equals_the_baseline(
    make_pipeline: MakePipeline, name: str, scheduler: str
) -> None:
    pipeline = make_pipeline("sd", scheduler)
    identity = {
        parameter.name: parameter.identity
        for parameter in METHODS[name].parameters
        if parameter.identity is not None
    }
    assert identity, f"{name} names no identity, so nothing shows that it can do nothing"
    baseline = images(pipeline)
    with applied(pipeline, identity, [name], run_of(pipeline)):
        assert torch.equal(images(pipeline), baseline)


@every_kind
@every_method
def test_every_bound_of_every_parameter_is_accepted(
    make_pipeline: MakePipeline, name: str, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    run = run_of(pipeline)
    baseline = images(pipeline)
    for parameter in METHODS[name].space(pipeline, run):
        for value in parameter.ends:
            with applied(pipeline, {parameter.name: value}, [name], run):
                assert not torch.equal(images(pipeline), baseline), f"{parameter.name}={value}"


@every_kind
@every_method
def test_values_without_effect_on_this_pipeline_are_refused(
    make_pipeline: MakePipeline, name: str, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    run = run_of(pipeline)
    state = state_of(pipeline)
    narrowed = {parameter.name: parameter for parameter in METHODS[name].space(pipeline, run)}
    assert narrowed.keys() == {parameter.name for parameter in METHODS[name].parameters}
    for parameter in METHODS[name].parameters:
        for value in parameter.ends:
            if narrowed[parameter.name].accepts(value):
                continue
            with (
                pytest.raises(UnsupportedError, match=f"^{parameter.name} must be in .*, got "),
                applied(pipeline, {parameter.name: value}, [name], run),
            ):
                pytest.fail("the body must not run")
    assert state_of(pipeline) == state


@every_method
def test_an_unsupported_pipeline_is_refused_before_anything_is_patched(name: str) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
    )
    pipeline: Any = DDPMPipeline(unet=unet, scheduler=DDIMScheduler())
    run, method = run_of(pipeline), METHODS[name]
    params = {parameter.name: parameter.default for parameter in method.parameters}
    state = state_of(pipeline)
    attempts: list[Callable[[], object]] = [
        lambda: method.check(pipeline, run),
        lambda: method.apply(pipeline, params, run).__enter__(),
        lambda: applied(pipeline, params, [name], run).__enter__(),
    ]
    for refused in attempts:
        with pytest.raises(UnsupportedError, match="DDPMPipeline") as refusal:
            refused()
        assert "\n" not in str(refusal.value)
    assert state_of(pipeline) == state


@every_method
def test_a_second_application_is_refused_and_leaves_the_first_alone(
    make_pipeline: MakePipeline, name: str
) -> None:
    pipeline = make_pipeline()
    baseline = images(pipeline)
    with apply(name, pipeline):
        accelerated = images(pipeline)
        with pytest.raises(UnsupportedError, match="already"), apply(name, pipeline):
            pytest.fail("the body must not run")
        assert torch.equal(images(pipeline), accelerated)
    assert torch.equal(images(pipeline), baseline)


@every_method
def test_forwards_that_others_have_replaced_still_run_and_survive(
    make_pipeline: MakePipeline, name: str
) -> None:
    pipeline = make_pipeline()
    replaced = [pipeline.unet, pipeline.unet.down_blocks[0].resnets[0]]
    calls = 0

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(*args, **kwargs)

        return counted

    for module in replaced:
        module.forward = counting(module.forward)
    theirs = [module.__dict__["forward"] for module in replaced]
    with apply(name, pipeline):
        images(pipeline)
    assert calls >= STEPS
    assert [module.__dict__["forward"] for module in replaced] == theirs


@contextmanager
def deepcache_helper(pipeline: Any, params: dict[str, Any]) -> Iterator[None]:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(**params)
    helper.enable()
    yield
    helper.disable()


# How each library is used by hand, and settings to compare: a new method needs an entry here.
ORACLES: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "deepcache": (
        deepcache_helper,
        [
            {"cache_interval": 2, "cache_branch_id": 0},
            {"cache_interval": 3, "cache_branch_id": 4},
        ],
    ),
}


@every_scheduler
@every_kind
@every_method
def test_the_images_are_those_of_the_library(
    make_pipeline: MakePipeline, name: str, kind: str, scheduler: str
) -> None:
    by_hand, settings = ORACLES[name]
    for params in settings:
        # Two pipelines, since a helper may leave its mark on one.
        pipeline, other = make_pipeline(kind, scheduler), make_pipeline(kind, scheduler)
        with apply(name, pipeline, **params):
            accelerated = images(pipeline)
        with by_hand(other, params):
            assert torch.equal(images(other), accelerated)


def test_deepcache_refuses_a_pipeline_whose_helper_is_enabled(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    params = {"cache_interval": 2, "cache_branch_id": 0}
    with deepcache_helper(pipeline, params), pytest.raises(UnsupportedError, match="disable"):
        METHODS["deepcache"].check(pipeline, run_of(pipeline))
    METHODS["deepcache"].check(pipeline, run_of(pipeline))


def test_deepcache_refuses_a_wrapped_unet_and_one_without_a_mid_block(
    make_pipeline: MakePipeline,
) -> None:
    pipeline = make_pipeline()
    unet = pipeline.unet
    pipeline.unet = torch.nn.Sequential(unet)
    with pytest.raises(UnsupportedError, match="got Sequential"):
        METHODS["deepcache"].check(pipeline, run_of(pipeline))
    pipeline.unet, unet.mid_block = unet, None
    with pytest.raises(UnsupportedError, match="mid block"):
        METHODS["deepcache"].check(pipeline, run_of(pipeline))


@pytest.mark.parametrize(
    ("kind", "layers", "branches"),
    [
        ("sd", 2, tuple(range(12))),
        ("sdxl", 2, tuple(range(9))),
        ("sd", 1, (0, 1, 3, 4)),
    ],
)
def test_each_branch_of_deepcache_cuts_the_unet_at_another_place(
    make_pipeline: MakePipeline, kind: str, layers: int, branches: tuple[int, ...]
) -> None:
    pipeline = make_pipeline(kind)
    if layers == 1:
        pipeline.unet = small_unet()
    space = {
        parameter.name: parameter
        for parameter in METHODS["deepcache"].space(pipeline, run_of(pipeline))
    }
    assert space["cache_branch_id"].values() == branches
    done, seen = [], []
    for branch in branches:
        with apply("deepcache", pipeline, cache_branch_id=branch), work_of(pipeline) as work:
            seen.append(images(pipeline))
        done.append(len(work))
    # Later branches reuse less, and the library takes those past the end for the last one.
    assert done == sorted(set(done))
    assert not any(torch.equal(*pair) for pair in pairwise(seen))
    with apply("deepcache", pipeline, cache_branch_id=branches[-1] + 1), work_of(pipeline) as work:
        assert torch.equal(images(pipeline), seen[-1])
    assert len(work) == done[-1]


def small_unet() -> Any:
    """Two blocks of one resnet each."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize(
    ("scheduler", "steps", "intervals"),
    [
        ("DDIMScheduler", 1, (1,)),
        ("DDIMScheduler", 2, (2,)),
        ("DDIMScheduler", 5, (2, 3, 4, 5)),
        ("DDIMScheduler", 50, (2, 3, 4, 5, 6, 7, 8, 9, 10)),
        ("HeunDiscreteScheduler", 4, (2, 3, 5)),
        ("HeunDiscreteScheduler", 50, (2, 3, 5, 7, 9)),
    ],
)
def test_the_intervals_of_deepcache_compute_different_steps(
    make_pipeline: MakePipeline, scheduler: str, steps: int, intervals: tuple[int, ...]
) -> None:
    pipeline = make_pipeline("sd", scheduler)
    timesteps = pipeline.scheduler.timesteps
    interval, _ = METHODS["deepcache"].space(pipeline, run_of(pipeline, steps))
    assert interval.values() == intervals
    assert interval.accepts(1)
    assert interval.accepts(interval.default)
    assert pipeline.scheduler.timesteps is timesteps


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler"])
def test_an_interval_outside_the_space_of_deepcache_equals_one_inside(
    make_pipeline: MakePipeline, scheduler: str
) -> None:
    pipeline = make_pipeline("sd", scheduler)
    interval, _ = METHODS["deepcache"].space(pipeline, run_of(pipeline, steps=4))
    seen: dict[int, torch.Tensor] = {}
    for value in range(2, 11):
        with apply("deepcache", pipeline, cache_interval=value):
            image = images(pipeline, steps=4)
        known = [other for other, theirs in seen.items() if torch.equal(theirs, image)]
        assert interval.accepts(value) == (not known), f"{value} is as {known}"
        if not known:
            seen[value] = image
