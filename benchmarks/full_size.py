"""How much each method and combination speeds a full-size pipeline up on this GPU.

    make bench-full-size                    # Stable Diffusion 1.5 at 512 px and SDXL at 1024 px
    benchmarks/full_size.py --pipeline StableDiffusionPipeline --minutes 8

Random weights, drawn text embeddings: nothing is downloaded, and speed does not depend on them.
Every row is the product's own measurement, pairs of baseline and accelerated calls side by side.
Beside the methods stand what they have to beat, fewer steps, and what they are built on, the
libraries used by hand; those are timed by a plain loop too, which must tell the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

from accelsearch import architectures
from accelsearch.architectures import ARCHITECTURES
from accelsearch.configuration import Budget, Configuration, LatencySettings
from accelsearch.latency import Timing, measure_latency
from accelsearch.methods import METHODS, Run, applied, space
from accelsearch.pipelines import call, detect_environment, run_of

LIBRARY, COMPILED = "DeepCache's own helper", "compile + deepcache"
DEEPCACHE = {"cache_interval": 5, "cache_branch_id": 0}
BATCHES = {"StableDiffusionPipeline": 4, "StableDiffusionXLPipeline": 1}


class Embedded:
    """A pipeline that takes prompts, and in their place embeddings drawn at random."""

    embeddings: dict[str, torch.Tensor]
    run: Run  # the facts of its calls
    steps: int | None = None  # instead of those asked for

    def arguments(self, prompt: list[str], arguments: dict[str, Any]) -> dict[str, Any]:
        steps = {} if self.steps is None else {"num_inference_steps": self.steps}
        embeddings = {name: one[: len(prompt)] for name, one in self.embeddings.items()}
        return arguments | steps | embeddings

    def __call__(self, prompt: list[str], **arguments: Any) -> Any:
        return super().__call__(**self.arguments(prompt, arguments))  # type: ignore[misc]


class EmbeddedSD(Embedded, diffusers.StableDiffusionPipeline): ...


class EmbeddedSDXL(Embedded, diffusers.StableDiffusionXLPipeline): ...


KINDS: dict[str, Any] = {
    "StableDiffusionPipeline": EmbeddedSD,
    "StableDiffusionXLPipeline": EmbeddedSDXL,
}


@dataclass
class Setting:
    """A row: methods of ours with their params, or another way to be faster."""

    name: str
    methods: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    otherwise: Callable[[Any], AbstractContextManager[None]] | None = None


def ours(*methods: str, **params: Any) -> Setting:
    given = DEEPCACHE if "deepcache" in methods else {}
    name = " + ".join(sorted(methods)) + (" (graphs alone)" if "mode" in params else "")
    return Setting(name, methods, {**given, **params})


def settings(pipeline: str, steps: int) -> list[Setting]:
    """The rows of one pipeline; the more expensive one gets fewer."""
    half, third = steps // 2, round(steps / 3)
    rows = [
        Setting(LIBRARY, otherwise=helper),
        ours("compile", "deepcache"),
        ours("compile"),
        ours("deepcache"),
        ours("tome"),
        ours("tgate"),
        Setting(f"{half} steps", otherwise=lambda pipe: fewer_steps(pipe, half)),
        ours("compile", "deepcache", "tgate", "tome"),
    ]
    if pipeline == "StableDiffusionPipeline":
        rows += [
            Setting(f"{third} steps", otherwise=lambda pipe: fewer_steps(pipe, third)),
            ours("compile", "deepcache", mode="eager", channels_last=False),
            ours("compile", "tgate"),
            ours("compile", "tome"),
            ours("deepcache", "tgate"),
            ours("deepcache", "tome"),
            ours("tgate", "tome"),
            ours("compile", "deepcache", "tgate"),
            ours("compile", "deepcache", "tome"),
            ours("compile", "tgate", "tome"),
            ours("deepcache", "tgate", "tome"),
        ]
    return rows


@contextmanager
def fewer_steps(pipeline: Any, steps: int) -> Iterator[None]:
    pipeline.steps = steps
    try:
        yield
    finally:
        pipeline.steps = None


@contextmanager
def helper(pipeline: Any) -> Iterator[None]:
    """DeepCache by its own helper, as its README says."""
    from DeepCache import DeepCacheSDHelper

    forwards = {module: vars(module).get("forward") for module in pipeline.unet.modules()}
    made = DeepCacheSDHelper(pipe=pipeline)
    made.set_params(**DEEPCACHE)
    made.enable()
    try:
        yield
    finally:
        made.disable()
        for module, forward in forwards.items():
            if forward is None:
                vars(module).pop("forward", None)


@contextmanager
def tomesd_by_hand(pipeline: Any) -> Iterator[None]:
    import tomesd

    params = defaults(pipeline, ("tome",))
    tomesd.apply_patch(pipeline, ratio=params["ratio"], max_downsample=params["max_downsample"])
    try:
        yield
    finally:
        tomesd.remove_patch(pipeline)


@contextmanager
def tgate_by_hand(pipeline: Any) -> Iterator[None]:
    import tgate

    xl = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
    (tgate.TgateSDXLLoader if xl else tgate.TgateSDLoader)(pipeline)
    kind, library, params = type(pipeline), pipeline.tgate, defaults(pipeline, ("tgate",))

    class Gated(kind):  # type: ignore[misc, valid-type]
        def __call__(self, prompt: list[str], **arguments: Any) -> Any:
            return library(**self.arguments(prompt, arguments), **params)

    pipeline.__class__ = Gated
    try:
        yield
    finally:
        pipeline.__class__ = kind
        for module in pipeline.unet.modules():
            for name in ("forward", "cache"):
                vars(module).pop(name, None)


# By the row that it must agree with.
BY_HAND = {LIBRARY: helper, "tome": tomesd_by_hand, "tgate": tgate_by_hand}


def defaults(pipeline: Any, methods: tuple[str, ...]) -> dict[str, Any]:
    """What the methods do on this pipeline unless told otherwise, but for what is fixed."""
    return {one.name: one.default for one in space(pipeline, methods, pipeline.run)}


def loaded(name: str, device: torch.device, configuration: Configuration) -> Any:
    dtype, batch = getattr(torch, configuration.dtype), configuration.batch_size
    pipeline: Any = architectures.build(name, device, dtype)
    pipeline.__class__ = KINDS[name]
    pipeline.run = run_of(configuration)
    width, tokens = ARCHITECTURES[name].text
    chance = torch.Generator("cpu").manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance).to(device, dtype)

    names = ("prompt_embeds", "negative_prompt_embeds")
    pipeline.embeddings = {one: drawn(batch, tokens, width) for one in names}
    if "XL" in name:
        pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        size = 1280 if width == 2048 else width
        pipeline.embeddings |= {one: drawn(batch, size) for one in pooled}
    return pipeline


def configuration_of(name: str, batch: int, steps: int, dtype: str) -> Configuration:
    architecture = ARCHITECTURES[name]
    prompts = tuple(f"embedding {index}" for index in range(batch))
    return Configuration(
        model=architecture.checkpoint,
        pipeline=name,
        scheduler="DDIMScheduler",
        steps=steps,
        methods=(),
        budgets=(Budget(metric="psnr", floor_db=20.0),),
        prompts=prompts,
        prompts_name="drawn",
        height=architecture.resolution,
        width=architecture.resolution,
        batch_size=batch,
        guidance_scale=architecture.guidance_scale,
        dtype=dtype,
        latency=LatencySettings(min_pairs=6, max_pairs=6),
    )


def way(pipeline: Any, setting: Setting) -> AbstractContextManager[None]:
    if setting.otherwise is not None:
        return setting.otherwise(pipeline)
    return applied(pipeline, setting.params, setting.methods, pipeline.run)


def measured(pipeline: Any, configuration: Configuration, setting: Setting) -> Timing:
    methods = [METHODS[name] for name in setting.methods]
    return measure_latency(
        pipeline,
        configuration,
        lambda: way(pipeline, setting),
        compiles=any(method.compiles for method in methods),
        held_bytes=lambda: sum(method.held_bytes(pipeline) for method in methods),
    )


def plain_loop(pipeline: Any, configuration: Configuration, accelerate: Any) -> float:
    """The speedup as anybody would measure it: a loop without, a loop with, and the medians."""

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def latency() -> float:
        samples = []
        for index in range(6):
            synchronize()
            start = time.perf_counter()
            image(pipeline, configuration)
            synchronize()
            samples += [time.perf_counter() - start] * (index > 0)  # the first one warms up
        return median(samples)

    before = latency()
    with accelerate(pipeline):
        return before / latency()


def image(pipeline: Any, configuration: Configuration) -> torch.Tensor:
    seeds = range(len(configuration.prompts))
    return call(pipeline, configuration, configuration.prompts, list(seeds)).float()


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """In dB, of images in 0..1."""
    error = (one - other).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())


def row(setting: Setting, timing: Timing, pipeline: Any) -> dict[str, Any]:
    latency = timing.latency
    interval = latency.interval()
    assert interval is not None
    return {
        "setting": setting.name,
        "params": defaults(pipeline, setting.methods) | setting.params,
        "speedup": latency.speedup,
        "interval": list(interval),
        "latency_s": latency.accelerated_median_s,
        "baseline_latency_s": latency.baseline_median_s,
        "peak_memory_bytes": timing.peak_memory_bytes,
        "baseline_peak_memory_bytes": timing.baseline_peak_memory_bytes,
        "compile_s": timing.compile_s,
    }


def shown(one: dict[str, Any]) -> str:
    params = ", ".join(f"{name}={value}" for name, value in one["params"].items()) or "-"
    low, high = one["interval"]
    slower = " **slower**" if high < 1 else ""
    memory = "-" if one["peak_memory_bytes"] is None else f"{one['peak_memory_bytes'] / 1e9:.1f}"
    compile_s = "-" if one["compile_s"] is None else f"{one['compile_s']:.0f}"
    return (
        f"| {one['setting']} | {params} | {one['speedup']:.2f}x [{low:.2f}, {high:.2f}]{slower} "
        f"| {one['latency_s']:.3f} | {memory} | {compile_s} |"
    )


def benchmark(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    batch = options.batch or BATCHES[name]
    dtype = "float32" if device.type == "cpu" else "float16"
    configuration = configuration_of(name, batch, options.steps, dtype)
    pipeline = loaded(name, device, configuration)
    print(
        f"\n{name}, {configuration.height} px, batch {batch}, {options.steps} DDIM steps, {dtype}\n"
        "\n| setting | params | speedup | s | peak GB | compile s |\n|---|---|---|---|---|---|",
        flush=True,
    )
    rows, images, plain_loops, profiles = [], {}, {}, {}
    rows_of = settings(name, options.steps)
    wanted = [one for one in rows_of if not options.row or one.name in options.row]
    left_out = []
    started = time.monotonic()
    for setting in wanted:
        if options.minutes and time.monotonic() - started > 60 * options.minutes:
            left_out.append(setting.name)
            continue
        print(f"{time.strftime('%X')} {name}: {setting.name}", file=sys.stderr, flush=True)
        timing = measured(pipeline, configuration, setting)
        rows.append(row(setting, timing, pipeline))
        if not rows[1:]:
            baseline_memory = timing.baseline_peak_memory_bytes or 0
            baseline_s = timing.latency.baseline_median_s
            print(f"| none | - | 1 | {baseline_s:.3f} | {baseline_memory / 1e9:.1f} | - |")
        print(shown(rows[-1]), flush=True)
        if setting.name in BY_HAND and not options.no_plain_loop:
            by_hand = plain_loop(pipeline, configuration, BY_HAND[setting.name])
            print(f"plain loop {by_hand:.3f}x", file=sys.stderr, flush=True)
            plain_loops[setting.name] = by_hand
        if setting.name in (LIBRARY, COMPILED):
            with way(pipeline, setting):
                images[setting.name] = image(pipeline, configuration)
            if len(images) == 2:
                print(f"PSNR {psnr(*images.values()):.1f} dB", file=sys.stderr, flush=True)
            if options.profile and device.type == "cuda":
                profiles[setting.name] = profiled(pipeline, configuration, setting)
    result: dict[str, Any] = {
        "pipeline": name,
        "batch": batch,
        "rows": rows,
        "plain_loop": plain_loops,
        "profile_s": profiles,
    }
    by_name = {one["setting"]: one for one in rows}
    if left_out:
        print(f"\nnot measured within {options.minutes:g} minutes: {', '.join(left_out)}")
    if len(images) == 2:
        library, compiled = (by_name[one]["speedup"] for one in images)
        result["compiled_over_library"] = compiled / library
        result["psnr_db"] = psnr(*images.values())
        print(
            f"\n{COMPILED} is {compiled / library:.2f}x as fast as {LIBRARY}; "
            f"PSNR between their images {result['psnr_db']:.1f} dB",
            flush=True,
        )
    if profiles:
        print(f"\n| where the time goes, s | {' | '.join(profiles)} |")
        print("|---|" + "---|" * len(profiles))
        for kind in [*KERNELS, "other kernels", "GPU idle", "in all"]:
            print(f"| {kind} | {' | '.join(f'{one[kind]:.3f}' for one in profiles.values())} |")
    if plain_loops:
        print("\n| library by hand | plain loop | this product | ratio |\n|---|---|---|---|")
    for told, plain in result["plain_loop"].items():
        product = by_name[told]["speedup"]
        print(f"| {told} | {plain:.3f}x | {product:.3f}x | {product / plain:.3f} |")
    return result


# What a kernel's name says of what it does; the first that fits.
KERNELS = {
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "convolution": ("fprop", "conv", "implicit_gemm", "winograd"),
    "matrix product": ("gemm", "nvjet", "cutlass", "_mm"),
    "compiled normalisation and elementwise": ("triton",),
    "copy and concatenation": ("copy", "Cat", "Memcpy", "Memset"),
}


def profiled(pipeline: Any, configuration: Configuration, setting: Setting) -> dict[str, float]:
    """Where the seconds of one call go, by kind of kernel, and for how long the GPU is idle."""
    from torch.profiler import ProfilerActivity, profile

    with way(pipeline, setting):
        for _ in range(2):
            start = time.perf_counter()
            image(pipeline, configuration)
            torch.cuda.synchronize()
            wall_s = time.perf_counter() - start
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            image(pipeline, configuration)
            torch.cuda.synchronize()
    seconds = dict.fromkeys([*KERNELS, "other kernels"], 0.0)
    for event in profiler.key_averages():
        kind = next(
            (kind for kind, parts in KERNELS.items() if any(part in event.key for part in parts)),
            "other kernels",
        )
        seconds[kind] += event.self_device_time_total / 1e6
    return seconds | {"GPU idle": wall_s - sum(seconds.values()), "in all": wall_s}


def bundled(device: torch.device) -> None:
    """PSNR between the bundled model's images by DeepCache's helper and by ours, compiled."""
    from accelsearch.configuration import load_plan
    from accelsearch.pipelines import load

    plan = Path(__file__).parent.parent / "studies" / "shapes-demo.toml"
    for dtype in ("float32", "float16"):
        overrides = {"steps": [50], "dtype": dtype, "device": str(device), "methods": [[]]}
        configuration = load_plan(plan, {**overrides, "space": {}}).configurations()[0]
        pipeline: Any = load(configuration)
        pipeline.run = run_of(configuration)
        with helper(pipeline):
            library = image(pipeline, configuration)
        with way(pipeline, ours("compile", "deepcache")):
            compiled = image(pipeline, configuration)
        each = [psnr(one[None], other[None]) for one, other in zip(library, compiled, strict=True)]
        print(
            f"\nbundled model, {dtype}, {len(each)} images, 50 steps, "
            f"{COMPILED} against {LIBRARY}: "
            f"PSNR {sum(each) / len(each):.1f} dB, the least {min(each):.1f} dB"
        )


def toys() -> None:
    """Small channels in the place of the published ones: to see that it runs, on any machine."""
    for name, one in ARCHITECTURES.items():
        if name in KINDS:
            small = {"block_out_channels": (32,) * len(one.denoiser["block_out_channels"])}
            heads = {"attention_head_dim": 4}
            if "XL" in name:
                heads |= {
                    "transformer_layers_per_block": 1,
                    "cross_attention_dim": 32,
                    "projection_class_embeddings_input_dim": 32 + 6 * 256,
                }
            ARCHITECTURES[name] = replace(
                one,
                denoiser={**one.denoiser, **small, **heads, "cross_attention_dim": 32},
                vae={**one.vae, "block_out_channels": (32,) * 4},
                text=(32, 77),
                resolution=128,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", choices=KINDS, action="append")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, help="images a call; 4 for SD, 1 for SDXL")
    parser.add_argument("--row", action="append", help="a row by its name; repeatable")
    parser.add_argument("--minutes", type=float, help="begin no row of a pipeline after so many")
    parser.add_argument("--profile", action="store_true", help="where DeepCache's time goes")
    parser.add_argument("--bundled", action="store_true", help="compare images of that model too")
    parser.add_argument(
        "--no-plain-loop", action="store_true", help="time the libraries by the product alone"
    )
    parser.add_argument("--dry-run", action="store_true", help="toys of these shapes, anywhere")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    if options.dry_run:
        toys()
    elif not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed, found none; try --dry-run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    libraries = {name for method in METHODS.values() for name in method.libraries}
    environment = detect_environment(device, libraries)
    print(json.dumps(environment.to_dict()))
    with torch.no_grad():
        found = [benchmark(name, options, device) for name in options.pipeline or KINDS]
        if options.bundled:
            bundled(device)
    if options.out:
        options.out.write_text(
            json.dumps({"environment": environment.to_dict(), "pipelines": found}, indent=1)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
