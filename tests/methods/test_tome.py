"""What is ToMe's own: where it can merge, its random choices, and the UNets that it goes past."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelsearch.errors import UnsupportedError
from accelsearch.methods import METHODS, applied

from .tiny import MakePipeline, apply, images, run_of, state_of


def space_of(pipeline: Any, **facts: Any) -> dict[str, Any]:
    space = METHODS["tome"].space(pipeline, run_of(pipeline, **facts))
    return {parameter.name: parameter for parameter in space}


@pytest.mark.parametrize(
    ("kind", "size", "downsamples", "lowest_ratio", "widest_stride"),
    [
        ("sd", 256, (1, 2, 4, 8), 0.05, 8),  # 64 latents to a side, as SD 1.5 has at 512 px
        ("sd", 128, (1, 2, 4, 8), 0.05, 4),
        ("sd", 32, (1, 2, 4), 0.05, 2),
        ("sd", 8, (1,), 0.25, 2),
        ("sdxl", 512, (2, 4), 0.05, 8),  # 128 latents, as SDXL has at 1024 px
        ("sdxl", 32, (2, 4), 0.1, 2),
        ("sdxl", 16, (2,), 0.25, 2),
    ],
)
def test_the_space_is_what_merges_tokens_at_this_resolution(
    make_pipeline: MakePipeline,
    kind: str,
    size: int,
    downsamples: tuple[int, ...],
    lowest_ratio: float,
    widest_stride: int,
) -> None:
    space = space_of(make_pipeline(kind), height=size, width=size)
    assert space["max_downsample"].values() == downsamples
    assert space["ratio"].ends == (lowest_ratio, 0.75)
    assert space["ratio"].accepts(0.0)
    for stride in ("sx", "sy"):
        assert space[stride].ends == (2, widest_stride)
        assert space[stride].fixed


@pytest.mark.parametrize("height", [32, 40, 56, 72])
def test_a_value_of_max_downsample_is_left_out_if_it_is_as_another_or_fails(
    make_pipeline: MakePipeline, height: int
) -> None:
    pipeline = make_pipeline("sdxl")
    offered = space_of(pipeline, height=height)["max_downsample"]
    run = run_of(pipeline, height=height)
    seen = [images(pipeline, height=height, steps=2)]
    for value in (1, 2, 4, 8):
        params = {"ratio": 0.75, "max_downsample": value, "sx": 2, "sy": 2}
        try:
            with METHODS["tome"].apply(pipeline, params, run):
                image = images(pipeline, height=height, steps=2)
        except (RuntimeError, IndexError):
            assert not offered.accepts(value)
            continue
        is_new = not any(torch.equal(image, other) for other in seen)
        assert offered.accepts(value) == is_new, value
        seen.append(image)


def test_sdxl_has_no_attention_to_merge_at_its_finest_level(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("sdxl")
    state = state_of(pipeline)
    with (
        pytest.raises(UnsupportedError, match="max_downsample must be in 2, 4 for this Stable"),
        applied(pipeline, {"max_downsample": 1}, ["tome"], run_of(pipeline)),
    ):
        pytest.fail("the body must not run")
    assert state_of(pipeline) == state


def test_a_resolution_with_single_tokens_is_refused(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("sdxl")
    METHODS["tome"].check(pipeline, run_of(pipeline, height=16, width=16))
    with pytest.raises(UnsupportedError, match="got none at 8 x 8 pixels; raise the resolution"):
        METHODS["tome"].check(pipeline, run_of(pipeline, height=8, width=8))
    with pytest.raises(
        UnsupportedError, match="got 1 x 4, 1 x 2 at 8 x 32 pixels; raise the resolution"
    ):
        METHODS["tome"].check(pipeline, run_of(pipeline, height=8, width=32))


def test_the_seed_of_the_run_chooses_the_tokens_that_are_kept(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    params = {"ratio": 0.5, "max_downsample": 2, "sx": 2, "sy": 2}
    seen = []
    for seed in (1, 2):
        with METHODS["tome"].apply(pipeline, params, run_of(pipeline, seed=seed)):
            seen.append(images(pipeline))
    assert not torch.equal(*seen)


def test_the_global_random_numbers_are_left_alone(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    before = torch.get_rng_state()
    with apply("tome", pipeline):
        images(pipeline)
    assert torch.equal(torch.get_rng_state(), before)


def test_strides_that_a_plan_has_freed_make_a_difference(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    seen = []
    for strides in ({}, {"sx": 4}, {"sy": 4}):
        with applied(pipeline, strides, ["tome"], run_of(pipeline, height=128, width=128)):
            seen.append(images(pipeline, height=64))
    assert not any(torch.equal(seen[0], other) for other in seen[1:])
    assert not torch.equal(seen[1], seen[2])


def test_a_pipeline_that_the_library_has_patched_is_refused(make_pipeline: MakePipeline) -> None:
    import tomesd

    pipeline = make_pipeline()
    tomesd.apply_patch(pipeline)
    with pytest.raises(UnsupportedError, match="remove_patch"):
        METHODS["tome"].check(pipeline, run_of(pipeline))
    tomesd.remove_patch(pipeline)
    state = state_of(pipeline)  # with the attributes that the library leaves behind
    with apply("tome", pipeline):
        assert state_of(pipeline) != state
    assert state_of(pipeline) == state


def test_blocks_that_do_not_run_the_forward_of_their_class_are_refused(
    make_pipeline: MakePipeline,
) -> None:
    compiled, wrapped = make_pipeline(), make_pipeline()
    # What block.compile() does, without the seconds that importing the compiler takes.
    block = compiled.unet.mid_block.attentions[0].transformer_blocks[0]
    block._compiled_call_impl = block._call_impl
    block = wrapped.unet.mid_block.attentions[0].transformer_blocks[0]
    block.forward = block.forward
    for pipeline in (compiled, wrapped):
        with pytest.raises(UnsupportedError, match="apply tome before compiling"):
            METHODS["tome"].check(pipeline, run_of(pipeline))
