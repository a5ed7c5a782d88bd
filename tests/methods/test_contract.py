"""What every method in METHODS must keep, alone and in every combination, on tiny SD and SDXL."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch

from accelsearch.errors import UnsupportedError
from accelsearch.methods import METHODS, applied, effective, space, starts

from .tiny import (
    STEPS,
    BodyError,
    MakePipeline,
    apply,
    deepcache_helper,
    fail_at_step,
    images,
    run_of,
    state_of,
    work_of,
)

# First order, one that repeats timesteps to start itself, an exponential integrator, an ancestral
# one that draws noise at each step, and one of second order, which repeats every timestep.
SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
)
REFUSED = {("tgate", "HeunDiscreteScheduler")}

# A deprecation of NumPy that diffusers' schedulers run into.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# An exact method computes the same images by other code. Hooks that count what the modules do would
# be compiled with them, and change what is compiled.
EXACT = {name for name, method in METHODS.items() if method.exact}


def cases(*fast: tuple[str, str], exact: bool = True) -> list[Any]:
    """Each method with each kind and scheduler that it serves; all but the `fast` are slow.

    Exact methods only where `exact`.
    """
    return [
        pytest.param(
            name,
            kind,
            scheduler,
            marks=[] if (kind, scheduler) in fast else [pytest.mark.slow],
        )
        for name in METHODS
        for kind in ("sd", "sdxl")
        for scheduler in SCHEDULERS
        if (name, scheduler) not in REFUSED and (exact or name not in EXACT)
    ]


@pytest.fixture(autouse=True)
def without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile as on a machine without compilers: what is compiled is the same, and in time."""
    monkeypatch.setattr("accelsearch.methods.compile.backend", lambda device_type: "eager")


def check_images(names: Iterable[str], accelerated: torch.Tensor, baseline: torch.Tensor) -> None:
    """Those of exact methods are the baseline's up to rounding, those of any other are not."""
    if EXACT.issuperset(names):
        torch.testing.assert_close(accelerated, baseline, rtol=0, atol=1e-4)
    else:
        assert not torch.equal(accelerated, baseline)


every_method = pytest.mark.parametrize("name", METHODS)
every_kind = pytest.mark.parametrize("kind", ["sd", "sdxl"])
# SDXL is the quicker one.
every_kind_in_time = pytest.mark.parametrize(
    "kind", [pytest.param("sd", marks=pytest.mark.slow), "sdxl"]
)
every_case = pytest.mark.parametrize(
    ("name", "kind", "scheduler"),
    cases(("sd", "DDIMScheduler"), ("sdxl", "EulerAncestralDiscreteScheduler"), exact=False),
)
every_case_once = pytest.mark.parametrize(
    ("name", "kind", "scheduler"), cases(("sdxl", "DDIMScheduler"))
)


@every_case
def test_apply_changes_the_images_with_less_work_and_undoes_it(
    make_pipeline: MakePipeline, name: str, kind: str, scheduler: str
) -> None:
    pipeline = make_pipeline(kind, scheduler)
    with work_of(pipeline) as full_work:
        baseline = images(pipeline)
    with apply(name, pipeline), work_of(pipeline) as less_work:
        accelerated = images(pipeline)
    assert not torch.equal(accelerated, baseline)
    assert sum(less_work) < sum(full_work)
    assert torch.equal(images(pipeline), baseline)


@every_kind
def test_less_work_is_done_the_farther_a_parameter_is_from_its_mildest_end(
    make_pipeline: MakePipeline, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    told = [
        (name, parameter)
        for name, method in METHODS.items()
        for parameter in method.space(pipeline, run_of(pipeline))
        if parameter.mildest is not None
    ]
    assert told
    for name, parameter in told:
        done = []
        for end in sorted(parameter.ends, reverse=parameter.mildest == "high"):
            with apply(name, pipeline, **{parameter.name: end}), work_of(pipeline) as work:
                images(pipeline)
            done.append(sum(work))
        assert done[0] > done[-1], f"{name}: {parameter.name}"


@every_kind
@pytest.mark.parametrize("name", sorted(EXACT))
def test_an_exact_method_makes_the_same_images_and_is_undone(
    make_pipeline: MakePipeline, name: str, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    baseline = images(pipeline)
    with apply(name, pipeline):
        check_images([name], images(pipeline), baseline)
    assert torch.equal(images(pipeline), baseline)


@every_kind_in_time
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


@every_kind_in_time
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


@every_case_once
def test_each_call_under_acceleration_is_as_the_first(
    make_pipeline: MakePipeline, name: str, kind: str, scheduler: str
) -> None:
    pipeline = make_pipeline(kind, scheduler)
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


@every_kind_in_time
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


@every_kind_in_time
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


@every_case_once
def test_the_identity_equals_the_baseline(
    make_pipeline: MakePipeline, name: str, kind: str, scheduler: str
) -> None:
    pipeline = make_pipeline(kind, scheduler)
    identity = {
        parameter.name: parameter.identity
        for parameter in METHODS[name].space(pipeline, run_of(pipeline))
        if parameter.identity is not None
    }
    assert identity, f"{name} names no identity, so nothing shows that it can do nothing"
    baseline = images(pipeline)
    # Not by `applied`, which takes this for granted and leaves the method out.
    with apply(name, pipeline, **identity):
        assert torch.equal(images(pipeline), baseline)


@every_kind_in_time
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
                check_images([name], images(pipeline), baseline)


@every_kind_in_time
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


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_is_refused_where_it_is_said_to_be(
    make_pipeline: MakePipeline, scheduler: str
) -> None:
    pipeline = make_pipeline("sd", scheduler)
    state = state_of(pipeline)
    for name, method in METHODS.items():
        if (name, scheduler) not in REFUSED:
            method.check(pipeline, run_of(pipeline))
            continue
        with pytest.raises(UnsupportedError, match=scheduler), apply(name, pipeline):
            pytest.fail("the body must not run")
    assert state_of(pipeline) == state


@contextmanager
def tomesd_by_hand(pipeline: Any, params: dict[str, Any]) -> Iterator[Any]:
    import tomesd

    tomesd.apply_patch(pipeline, **params)
    pipeline.unet._tome_info["args"]["generator"] = torch.Generator().manual_seed(5)
    yield pipeline
    tomesd.remove_patch(pipeline)


@contextmanager
def tgate_loader(pipeline: Any, params: dict[str, Any]) -> Iterator[Any]:
    import tgate

    xl = "XL" in type(pipeline).__name__
    (tgate.TgateSDXLLoader if xl else tgate.TgateSDLoader)(pipeline)
    yield functools.partial(pipeline.tgate, **params)


# How each library is used by hand, and settings to compare, the last of them also in combinations:
# a new method needs an entry here.
ORACLES: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "tome": (
        tomesd_by_hand,
        [{"ratio": 0.3, "max_downsample": 4}, {"ratio": 0.5, "max_downsample": 2}],
    ),
    "tgate": (
        tgate_loader,
        [
            {"gate_step": 2, "sp_interval": 1, "fi_interval": 1, "warm_up": 0},
            {"gate_step": 3, "sp_interval": 2, "fi_interval": 2, "warm_up": 0},
        ],
    ),
    "deepcache": (
        deepcache_helper,
        [
            {"cache_interval": 3, "cache_branch_id": 4},
            {"cache_interval": 2, "cache_branch_id": 0},
        ],
    ),
}


@every_case
def test_the_images_are_those_of_the_library(
    make_pipeline: MakePipeline, name: str, kind: str, scheduler: str
) -> None:
    by_hand, settings = ORACLES[name]
    for params in settings:
        # Two pipelines, since a library may leave its mark on one.
        pipeline, other = make_pipeline(kind, scheduler), make_pipeline(kind, scheduler)
        with apply(name, pipeline, **params):
            accelerated = images(pipeline)
        with by_hand(other, params) as call:
            assert torch.equal(images(call), accelerated)


COMBINATIONS = [
    names for count in range(2, len(METHODS) + 1) for names in combinations(METHODS, count)
]
every_combination = pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)


def combined(names: tuple[str, ...]) -> dict[str, Any]:
    """A setting in which each of the methods has something to do, in six steps.

    Exact methods have it at their defaults.
    """
    settings = [ORACLES[name][1][-1] for name in names if name not in EXACT]
    return {name: value for params in settings for name, value in params.items()}


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(name, marks=[] if name == "DDIMScheduler" else [pytest.mark.slow])
        for name in SCHEDULERS
        if name not in {scheduler for _, scheduler in REFUSED}
    ],
)
@every_kind
@every_combination
def test_a_combination_keeps_the_contract(
    make_pipeline: MakePipeline, names: tuple[str, ...], kind: str, scheduler: str
) -> None:
    pipeline = make_pipeline(kind, scheduler)
    params, run = combined(names), run_of(pipeline, 6)
    changing = [name for name in names if name not in EXACT]
    with work_of(pipeline) as full_work:
        baseline = images(pipeline, steps=6)
    with applied(pipeline, params, changing, run), work_of(pipeline) as less_work:
        expected = images(pipeline, steps=6)
    assert not torch.equal(expected, baseline)
    assert sum(less_work) < sum(full_work)
    state = state_of(pipeline)

    torch.manual_seed(1)
    with applied(pipeline, params, names, run):
        first = images(pipeline, steps=6)
        images(pipeline, ["a blue square", "a green star"], seed=9, height=48, steps=7)
        assert torch.equal(images(pipeline, steps=6), first)
    torch.manual_seed(2)
    with pytest.raises(BodyError), applied(pipeline, params, names[::-1], run):
        with pytest.raises(BodyError):
            images(pipeline, steps=6, callback_on_step_end=fail_at_step(2))
        assert torch.equal(images(pipeline, steps=6), first)
        images(pipeline, steps=6, callback_on_step_end=fail_at_step(4))

    assert state_of(pipeline) == state
    assert torch.equal(images(pipeline, steps=6), baseline)
    # To the last bit but for what an exact method rounds.
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-4 if EXACT & {*names} else 0)


@every_kind
def test_a_combination_does_less_work_than_any_part_of_it(
    make_pipeline: MakePipeline, kind: str
) -> None:
    # With a scheduler that every step advances. Others may make a part the cheaper one: the full
    # steps that T-GATE asks of DeepCache cost what the gate saves.
    pipeline = make_pipeline(kind)
    done: dict[tuple[str, ...], int] = {}
    changing = [name for name in METHODS if name not in EXACT]
    subsets = [
        names for count in range(1, len(changing) + 1) for names in combinations(changing, count)
    ]
    for names in subsets:
        with (
            applied(pipeline, combined(names), names, run_of(pipeline, 6)),
            work_of(pipeline) as work,
        ):
            images(pipeline, steps=6)
        done[names] = sum(work)
        for part in combinations(names, len(names) - 1):
            assert not part or done[names] < done[part], f"{names} does no less than {part}"


@every_kind
@every_combination
def test_a_combined_space_holds_every_part(
    make_pipeline: MakePipeline, names: tuple[str, ...], kind: str
) -> None:
    pipeline = make_pipeline(kind)
    run = run_of(pipeline)
    whole = space(pipeline, names, run)
    everything, *alone = starts(whole)
    assert everything == {parameter.name: parameter.default for parameter in whole}
    assert len(alone) == len(names)
    for name, setting in zip(names, alone, strict=True):
        own = {one.name for one in METHODS[name].parameters}
        assert all(one.accepts(setting[one.name]) for one in whole)
        assert all(
            one.holds_identity and setting[one.name] == one.identity
            for one in whole
            if one.identity is not None and one.name not in own
        )
        assert effective(whole, setting) == setting


def test_a_part_of_a_combination_is_as_good_as_alone(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    run = run_of(pipeline)
    _, *alone = starts(space(pipeline, METHODS, run))
    for name, setting in zip(METHODS, alone, strict=True):
        with apply(name, pipeline):
            image = images(pipeline)
        with applied(pipeline, setting, METHODS, run):
            assert torch.equal(images(pipeline), image)
