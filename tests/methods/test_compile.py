"""What is compile's own: which parts it compiles, that it does so once, and its CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from accelsearch.errors import UnsupportedError
from accelsearch.hooks import compile as compile_hook
from accelsearch.hooks.compile import _group_norms_channels_last, _regions
from accelsearch.methods import METHODS, applied
from accelsearch.methods import compile as compile_module
from accelsearch.methods.compile import backend
from accelsearch.methods.patching import Kept, map_tensors

from .tiny import MakePipeline, apply, images, run_of, state_of

NO_MODE = {"mode": "eager"}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """What dynamo counts, from nothing compiled on; without compilers, so in no time."""
    monkeypatch.setattr(compile_module, "backend", lambda device_type: "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    assert not torch._dynamo.utils.counters["graph_break"]


def operations(pipeline: Any) -> int:
    """How many operators a call dispatches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        images(pipeline)
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def kinds(pipeline: Any) -> list[str]:
    return sorted({type(module).__name__ for module in _regions(pipeline.unet)})


def test_parts_that_no_other_method_works_in_are_compiled_whole(
    make_pipeline: MakePipeline,
) -> None:
    pipeline = make_pipeline()
    whole = ["GroupNorm", "ResnetBlock2D", "Transformer2DModel"]
    assert kinds(pipeline) == whole
    for branch in range(12):
        with apply("deepcache", pipeline, cache_branch_id=branch):
            assert kinds(pipeline) == whole
    with apply("tome", pipeline):
        assert kinds(pipeline) == ["Attention", "FeedForward", "GroupNorm", "ResnetBlock2D"]
    with apply("tgate", pipeline):
        assert kinds(pipeline) == ["FeedForward", "GroupNorm", "ResnetBlock2D"]
    block = next(iter(_regions(pipeline.unet)))
    hook = block.register_forward_hook(lambda *_: None)
    assert block not in list(_regions(pipeline.unet))
    hook.remove()


def test_nothing_is_compiled_twice(make_pipeline: MakePipeline, compiled: dict[str, int]) -> None:
    pipeline = make_pipeline()
    run = run_of(pipeline)
    params = {"cache_branch_id": 0, "cache_interval": 2}
    with applied(pipeline, params, ["compile", "deepcache"], run):
        first = images(pipeline)
        graphs = compiled["unique_graphs"]
        assert graphs > 0
        images(pipeline)
    assert compiled["unique_graphs"] == graphs
    for interval in (2, 3):
        params["cache_interval"] = interval
        with applied(pipeline, params, ["compile", "deepcache"], run):
            again = images(pipeline)
            assert torch.equal(again, first) == (interval == 2)
    images(pipeline)
    assert compiled["unique_graphs"] == graphs


def test_weights_and_projections_are_rearranged_once(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    weights = [one for one in pipeline.unet.parameters() if one.ndim == 4 and one.shape[-1] > 1]
    addresses = [one.data_ptr() for one in weights]
    seen = []
    for _ in range(2):
        with apply("compile", pipeline, **NO_MODE):
            attention = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
            seen.append([one.data_ptr() for one in weights] + [id(attention.to_qkv)])
            assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)
        assert [one.data_ptr() for one in weights] == addresses
        assert not hasattr(attention, "to_qkv")
    assert seen[0] == seen[1]


def test_fused_projections_dispatch_fewer_operations(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    before = operations(pipeline)
    with apply("compile", pipeline, **NO_MODE, channels_last=False):
        assert operations(pipeline) < before


@pytest.mark.slow
@pytest.mark.skipif(backend("cpu") != "inductor", reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_inductor_dispatches_fewer_operations_for_the_same_images(
    make_pipeline: MakePipeline, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    baseline, before = images(pipeline), operations(pipeline)
    with apply("compile", pipeline):
        torch.testing.assert_close(images(pipeline), baseline, rtol=0, atol=1e-4)
        assert operations(pipeline) < 0.8 * before
    assert torch.equal(images(pipeline), baseline)


def test_compile_serves_pixart_with_tgate(
    make_pipeline: MakePipeline, compiled: dict[str, int]
) -> None:
    pipeline = make_pipeline("pixart_sigma")
    run = run_of(pipeline)

    def images_of(*names: str) -> torch.Tensor:
        with applied(pipeline, {}, names, run):
            return images(pipeline, use_resolution_binning=False)

    baseline, gated = images_of(), images_of("tgate")
    torch.testing.assert_close(images_of("compile"), baseline, rtol=0, atol=1e-4)
    torch.testing.assert_close(images_of("tgate", "compile"), gated, rtol=0, atol=1e-4)
    assert compiled["unique_graphs"] > 0
    assert torch.equal(images_of(), baseline)


def test_compile_refuses_compiled_and_offloaded_pipelines(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    run, block = run_of(pipeline), pipeline.unet.mid_block
    block.compile(backend="eager")
    with pytest.raises(UnsupportedError, match="compiled"):
        METHODS["compile"].check(pipeline, run)
    del block._compiled_call_impl
    block._hf_hook = object()
    with pytest.raises(UnsupportedError, match="offload"):
        METHODS["compile"].check(pipeline, run)


def test_what_cannot_be_fused_or_captured_is_not_offered(make_pipeline: MakePipeline) -> None:
    from diffusers.models.attention_processor import SlicedAttnProcessor

    pipeline = make_pipeline()

    def offered() -> dict[str, Any]:
        space = METHODS["compile"].space(pipeline, run_of(pipeline))
        return {parameter.name: parameter.values() for parameter in space}

    assert offered()["cuda_graphs"] == (False,)
    assert offered()["fuse_qkv"] == (False, True)
    pipeline.unet.set_attn_processor(SlicedAttnProcessor(2))
    assert offered()["fuse_qkv"] == (False,)


def test_a_machine_without_compilers_compiles_without_generated_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert backend("cpu") == backend("cuda") == "eager"
    monkeypatch.setattr("shutil.which", lambda name: name if name == "my-c++" else None)
    monkeypatch.setenv("CXX", "my-c++")
    assert backend("cpu") == "inductor"


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Convolutions in float32: TF32 rounds by more than a method changes on these pipelines."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


SETTINGS: dict[str, dict[str, Any]] = {
    "deepcache": {"cache_interval": 2, "cache_branch_id": 1},
    "tgate": {"gate_step": 4, "sp_interval": 2, "fi_interval": 2, "warm_up": 0},
    "tome": {"ratio": 0.5, "max_downsample": 2},
}
SUBSETS = [
    [],
    ["deepcache"],
    ["tgate"],
    ["tome"],
    ["deepcache", "tgate"],
    ["deepcache", "tome"],
    ["tgate", "tome"],
    ["deepcache", "tgate", "tome"],
]


class Recorded:
    """Stands for a CUDA graph: replays the operators of a call, without its Python."""

    def __init__(self, forward: Callable[..., Any], inputs: Any) -> None:
        self._inputs: list[torch.Tensor] = []
        map_tensors(self._inputs.append, inputs)

        def call(*tensors: torch.Tensor) -> Any:
            given = iter(tensors)
            args, kwargs = map_tensors(lambda _: next(given), inputs)
            return forward(*args, **kwargs)

        self._operators = make_fx(call)(*self._inputs)
        self.output = map_tensors(torch.clone, self._operators(*self._inputs))

    def replay(self) -> None:
        fresh: list[torch.Tensor] = []
        map_tensors(fresh.append, self._operators(*self._inputs))
        stale: list[torch.Tensor] = []
        map_tensors(stale.append, self.output)
        for old, new in zip(stale, fresh, strict=True):
            old.copy_(new)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """What is captured; on the CPU, where there are no CUDA graphs."""
    found: list[Recorded] = []

    def capture(_: Any, forward: Callable[..., Any], kept: Any, inputs: Any) -> Any:
        held = kept.held
        chances = {one: one.get_state() for one in kept.generators.values()}

        def undo() -> None:  # capturing computes nothing
            kept.held = held
            for generator, state in chances.items():
                generator.set_state(state)

        args, kwargs = inputs
        forward(*args, **kwargs)
        undo()
        found.append(Recorded(forward, inputs))
        captured = compile_hook._Graph(found[-1], found[-1].output, kept.held)  # type: ignore[arg-type]
        undo()
        return captured

    monkeypatch.setattr(compile_hook._Graphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    space = METHODS["compile"].space
    monkeypatch.setattr(
        compile_module.Compile,
        "space",
        lambda _, pipeline, run: (*space(pipeline, run)[:3], compile_module._CAPTURED),
    )
    return found


def test_each_kind_of_step_is_captured_once_and_replays_in_every_setting(
    make_pipeline: MakePipeline, captures: list[Recorded]
) -> None:
    pipeline = make_pipeline("sdxl")
    run = run_of(pipeline, 6)
    names = ["deepcache", "tgate"]
    settings = [
        {
            "cache_interval": interval,
            "cache_branch_id": branch,
            "gate_step": gate,
            "sp_interval": 2,
            "warm_up": 1,
        }
        for interval, branch, gate in ((2, 1, 4), (3, 4, 3), (6, 1, 6))
    ]
    baseline = images(pipeline, steps=6)
    expected = []
    for params in settings:
        with applied(pipeline, params, names, run):
            expected.append(images(pipeline, steps=6))
    for params, image in zip(settings, expected, strict=True):
        with applied(pipeline, params | NO_MODE, [*names, "compile"], run):
            close(images(pipeline, steps=6), image, baseline)
    captured = len(captures)
    assert captured < 6 * len(settings)  # steps of one kind share a graph
    for params, image in zip(settings, expected, strict=True):
        with applied(pipeline, params | NO_MODE, [*names, "compile"], run):
            close(images(pipeline, steps=6), image, baseline)
    assert len(captures) == captured
    assert torch.equal(images(pipeline, steps=6), baseline)


def test_what_is_kept_in_one_setting_may_have_another_shape_in_the_next(
    captures: list[Recorded],
) -> None:
    graphs, kept = compile_hook._Graphs((0, 0)), Kept()

    def store(x: torch.Tensor, size: int) -> tuple[torch.Tensor]:
        kept["feature"] = 2 * x[:size]
        return (x,)

    for size in (4, 2, 4, 2):
        call = ((torch.rand(5),), {})
        for name, forward in (
            ("store", partial(store, size=size)),
            ("read", lambda _: (kept["feature"] + 1,)),
        ):
            phases = (("gate", partial(str, name)), ("tome", partial(int, size)))
            output = graphs.run(forward, "setting", phases, kept, call)
        assert torch.equal(output[0], 2 * call[0][0][:size] + 1)
        assert "feature" in kept
        kept.drop()
        assert "feature" not in kept
    assert len(captures) == 4


@pytest.mark.slow
def test_tensors_that_are_kept_may_have_another_shape_in_another_setting(
    make_pipeline: MakePipeline, captures: list[Recorded]
) -> None:
    keeps_tensors_of_other_shapes(make_pipeline())
    assert captures


def keeps_tensors_of_other_shapes(pipeline: Any) -> None:
    """With merged tokens an attention puts out fewer, which T-GATE keeps."""
    run = run_of(pipeline, 4)
    gated = {"gate_step": 3, "sp_interval": 2, "fi_interval": 1, "warm_up": 0}
    settings: list[tuple[list[str], dict[str, Any]]] = [
        (["tgate", "tome"], gated | SETTINGS["tome"]),
        (["tgate"], gated),
    ]
    baseline = images(pipeline, steps=4)
    for _ in range(2):
        for names, params in settings:
            with applied(pipeline, params, names, run):
                expected = images(pipeline, steps=4)
            with applied(pipeline, params | NO_MODE, [*names, "compile"], run):
                close(images(pipeline, steps=4), expected, baseline)


def test_what_changes_between_applications_is_not_forgotten(
    make_pipeline: MakePipeline, captures: list[Recorded]
) -> None:
    def accelerated() -> torch.Tensor:
        with apply("compile", pipeline, **NO_MODE, cuda_graphs=True):
            return images(pipeline)

    pipeline = make_pipeline()
    accelerated()
    unet = pipeline.unet
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    changes: list[Callable[[], object]] = [
        lambda: unet.conv_in.weight.data.mul_(1.5),
        lambda: attention.to_v.weight.data.mul_(3),
        lambda: unet.conv_in.bias.data.add_(0.5),
        lambda: pipeline.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5),
        lambda: pipeline.to(dtype=torch.float64),
    ]
    before = images(pipeline)
    for change in changes:
        change()
        image = images(pipeline)
        close(accelerated(), image, image)
        if change is not changes[-1]:
            assert not torch.equal(image, before)
        before = image


def test_phases_of_two_methods_are_told_apart(captures: list[Recorded]) -> None:
    graphs = compile_hook._Graphs((0, 0))
    kept = Kept()
    call = ((torch.ones(2),), {})
    for which, factor in enumerate((2.0, 3.0)):
        phases = (("first" if which == 0 else "second", lambda: True),)
        output = graphs.run(lambda x, f=factor: (f * x,), "setting", phases, kept, call)
        assert torch.equal(output[0], torch.full((2,), factor))
    assert len(captures) == 2


def test_a_method_that_does_not_tell_its_phase_is_not_captured(
    make_pipeline: MakePipeline, captures: list[Recorded]
) -> None:
    pipeline = make_pipeline()
    run = replace(run_of(pipeline), phases=(("silent", None),))
    params = {one.name: one.default for one in METHODS["compile"].parameters}
    state = state_of(pipeline)
    with (
        pytest.raises(UnsupportedError, match="but silent does not; set cuda_graphs to false"),
        METHODS["compile"].apply(pipeline, params, run),
    ):
        pytest.fail("the body must not run")
    assert state_of(pipeline) == state
    assert not captures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(
    ("names", "kind", "mode"),
    [
        *((names, kind, "eager") for names in SUBSETS for kind in ("sd", "sdxl")),
        ([], "sdxl", "default"),
        (SUBSETS[-1], "sd", "default"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "alone",
)
def test_graphs_replay_what_the_methods_would_compute(
    make_pipeline: MakePipeline, names: list[str], kind: str, mode: str
) -> None:
    pipeline = make_pipeline(kind).to("cuda")
    run = run_of(pipeline, 6)
    params = {name: value for one in names for name, value in SETTINGS[one].items()}

    def both() -> list[torch.Tensor]:
        two = ["a blue square", "a green star"]
        return [
            images(pipeline, steps=6),
            images(pipeline, two, seed=9, height=48, steps=7),
        ]

    baseline = both()
    with applied(pipeline, params, names, run):
        expected = both()
    for _ in range(2):  # captured, then replayed in an application of its own
        with applied(pipeline, params | {"mode": mode}, [*names, "compile"], run):
            for accelerated in (both(), both()):
                for one in zip(accelerated, expected, baseline, strict=True):
                    close(*one)
    assert all(torch.equal(*one) for one in zip(both(), baseline, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("full_precision")
def test_settings_that_share_graphs_do_not_share_what_they_keep(
    make_pipeline: MakePipeline,
) -> None:
    pipeline = make_pipeline().to("cuda")
    run = run_of(pipeline, 6)
    names = ["deepcache", "tgate"]
    settings = [
        {"cache_interval": interval, "gate_step": gate, "sp_interval": 2, "warm_up": 1}
        for interval in (2, 3, 5)
        for gate in (3, 5, 6)
    ]
    baseline = images(pipeline, steps=6)
    expected = []
    for params in settings:
        with applied(pipeline, params, names, run):
            expected.append(images(pipeline, steps=6))
    for _ in range(2):
        for params, image in zip(settings, expected, strict=True):
            with applied(pipeline, params | NO_MODE, [*names, "compile"], run):
                close(images(pipeline, steps=6), image, baseline)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("full_precision")
def test_graphs_keep_tensors_of_another_shape_in_another_setting(
    make_pipeline: MakePipeline,
) -> None:
    keeps_tensors_of_other_shapes(make_pipeline().to("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_step_of_captured_deepcache_waits_for_the_gpu(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline().to("cuda")
    waits = []

    def callback(_: Any, index: int, __: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        # Inside the loop alone: the images are brought to the CPU after it.
        torch.cuda.set_sync_debug_mode("error" if index < 4 else "default")
        waits.append(index)
        return arguments

    with applied(
        pipeline, {"cache_interval": 2, **NO_MODE}, ["deepcache", "compile"], run_of(pipeline)
    ):
        images(pipeline)
        try:
            images(pipeline, callback_on_step_end=callback)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waits == [0, 1, 2, 3, 4]


def close(accelerated: torch.Tensor, expected: torch.Tensor, baseline: torch.Tensor) -> None:
    """Up to rounding, which may turn a choice of ToMe's, and far closer than to the baseline."""
    error = (accelerated - expected).abs().mean()
    assert error < 1e-3
    if not torch.equal(expected, baseline):
        assert error < 0.1 * (expected - baseline).abs().mean()


@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (2, 32, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_group_norm_channels_last_computes_what_torch_does(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(8, 32, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm = norm.to(dtype)
    inputs = (3 * torch.randn(shape) + 1).to(dtype)
    expected = norm(inputs)
    holder = torch.nn.Sequential(norm)
    with _group_norms_channels_last((holder,)):
        assert type(norm) is not torch.nn.GroupNorm
        assert list(_regions(holder)) == [norm]
        found = norm(
            inputs.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else inputs
        )
    assert type(norm) is torch.nn.GroupNorm
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=1e-5 if dtype is torch.float32 else 5e-3)
    assert torch.equal(norm(inputs), expected)
