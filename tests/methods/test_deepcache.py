"""What is DeepCache's own: its branches, its intervals, and the UNets that it cannot serve."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from accelsearch.errors import UnsupportedError
from accelsearch.methods import METHODS

from .tiny import MakePipeline, apply, deepcache_helper, images, run_of, work_of

# A deprecation of NumPy that diffusers' schedulers run into.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_deepcache_refuses_a_pipeline_whose_helper_is_enabled(make_pipeline: MakePipeline) -> None:
    from DeepCache import DeepCacheSDHelper

    pipeline = make_pipeline()
    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    with pytest.raises(UnsupportedError, match="disable"):
        METHODS["deepcache"].check(pipeline, run_of(pipeline))
    helper.disable()
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
        pytest.param("sd", 2, tuple(range(12)), marks=pytest.mark.slow),
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
    assert done == sorted(set(done))  # later branches reuse less
    assert not any(torch.equal(*pair) for pair in pairwise(seen))
    # Why there are no others: the library takes those past the end for the last one.
    with deepcache_helper(pipeline, {"cache_interval": 3, "cache_branch_id": branches[-1] + 1}):
        assert torch.equal(images(pipeline), seen[-1])


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_branch_of_deepcache_makes_the_image_of_the_library(
    make_pipeline: MakePipeline, kind: str, interval: int
) -> None:
    pipeline = make_pipeline(kind)
    for branch in range(12 if kind == "sd" else 9):
        params = {"cache_interval": interval, "cache_branch_id": branch}
        with deepcache_helper(pipeline, params):
            expected = images(pipeline)
        pipeline = make_pipeline(kind)  # the helper leaves forwards behind
        with apply("deepcache", pipeline, **params):
            assert torch.equal(images(pipeline), expected), branch


def test_deepcache_does_no_more_work_than_the_library(make_pipeline: MakePipeline) -> None:
    params = {"cache_interval": 3, "cache_branch_id": 4}
    pipeline = make_pipeline()
    with deepcache_helper(pipeline, params), work_of(pipeline) as theirs:
        images(pipeline)
    pipeline = make_pipeline()
    with apply("deepcache", pipeline, **params), work_of(pipeline) as ours:
        images(pipeline)
    assert ours == theirs


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
        ("DDIMScheduler", 50, tuple(range(2, 21))),
        ("HeunDiscreteScheduler", 4, (2, 3, 5)),
        ("HeunDiscreteScheduler", 50, (2, *range(3, 20, 2))),
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
    for value in range(2, 21):
        with apply("deepcache", pipeline, cache_interval=value):
            image = images(pipeline, steps=4)
        known = [other for other, theirs in seen.items() if torch.equal(theirs, image)]
        assert interval.accepts(value) == (not known), f"{value} is as {known}"
        if not known:
            seen[value] = image
