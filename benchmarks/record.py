"""Record a whole grid of the bundled model, once, for searches to be replayed against it.

    make bench-record      # needs a GPU: some 20 minutes for each of the two tables

Every setting is timed in pairs with the baseline, from an idle device to an idle device as a
search does, and the images of those calls are scored, prompt by prompt. A call is timed on one
batch of prompts after the other, so that all prompts have their image after as many calls.

A call holds hundreds of images, of every prompt `--images`, the first of which is scored:
few large kernels, so that the GPU sets its pace and not a host that launches them slowly. It is
given its prompts' embeddings and its noise: a search that reads 16 prompts a call hardly notices,
but reading hundreds takes the host a third of an accelerated call, now more, now less. A baseline
call takes several times as long as the accelerated ones, which tell one setting from another. So
a pair may hold several: `--calls`.

The file is an .npz without pickled objects; G settings, P pairs of C accelerated calls each, N
prompts, B calls of a batch:

| array               | type, shape    | what                                                 |
|---------------------|----------------|------------------------------------------------------|
| meta                | string         | JSON: see `described`                                |
| settings            | int16 [G, K]   | of each parameter, the index into its listed values  |
| visited             | int16 [G]      | the place in the order of measuring                  |
| failed              | bool [G]       | no usable images; meta tells why, the rest is NaN    |
| baseline_s          | float64 [G, P] | seconds of a baseline call; call i made batch i mod B |
| accelerated_s       | float64 [G, PC] | seconds of the accelerated calls, pair by pair      |
| warmup_s            | float64 [G]    | seconds of the accelerated call before them          |
| score_s             | float64 [G, B] | seconds of scoring one batch                         |
| clip_score          | float32 [G, N] | 0..100                                               |
| psnr, ssim          | float32 [G, N] | beside the baseline image, as in accelsearch.quality |
| baseline_clip_score | float32 [N]    |                                                      |
| baseline_image_s    | float64 [B]    | seconds of making one batch of baseline images       |
| baseline_score_s    | float64 [B]    | seconds of scoring one                               |
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from accelsearch import methods, pipelines, quality
from accelsearch.configuration import Configuration, load_plan
from accelsearch.errors import TrialError, UnsupportedError
from accelsearch.methods import METHODS, Parameter, Value

PLAN = Path(__file__).parent.parent / "studies" / "shapes-demo.toml"
DATA = Path(__file__).parent / "data"
# Sixths of the prompts, in their order. The truth must be the surest.
SPLITS = {"search": 1, "verification": 2, "truth": 3}
METRICS = ("clip_score", "psnr", "ssim")
STEPS = 20
_FEWEST = 3  # pairs of a setting
FORMAT = 2  # 1: calls read their prompts

# Where the whole product is too large, the part of it that is recorded: the identities, the
# defaults, and values from mild to wild. 13 settings of DeepCache x 12 of T-GATE.
_BOTH: dict[str, tuple[Value, ...]] = {
    "cache_interval": (1, 2, 3, 5, 9),
    "cache_branch_id": (0, 1, 3),
    "gate_step": (4, 6, 8, 11, 15, STEPS),  # the last one gates nothing
    "sp_interval": (1, 5),
    "fi_interval": (1,),
    "warm_up": (2,),
}
# With compile, every setting is replayed from CUDA graphs. Where the host launches slowly, nothing
# else lets a model as small as this show what a setting saves, and a call takes a tenth as long.
_GRAPHS: dict[str, tuple[Value, ...]] = {"mode": ("eager",)}
PARTS: dict[tuple[str, ...], dict[str, tuple[Value, ...]]] = {
    ("deepcache", "tgate"): _BOTH,
    # 13 intervals x 12 branches, and none.
    ("compile", "deepcache"): _GRAPHS | {"cache_interval": tuple(range(1, 15))},
    ("compile", "deepcache", "tgate"): _BOTH | _GRAPHS,
}

Arrays = dict[str, NDArray[Any]]


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="deepcache", help="comma-separated")
    parser.add_argument("--out", type=Path, help="default: by the methods, in benchmarks/data")
    parser.add_argument("--scheduler", help="class of diffusers; default: the demo plan's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="default: float16 on a GPU, else float32")
    parser.add_argument("--prompts", type=int, default=576, help="of all three splits together")
    parser.add_argument("--batch", type=int, default=576, help="prompts of one call")
    parser.add_argument("--images", type=int, default=3, help="of each prompt in a call")
    parser.add_argument("--pairs", type=int, default=1, help="no fewer than calls for all prompts")
    parser.add_argument("--calls", type=int, default=2, help="accelerated ones in each pair")
    parser.add_argument("--limit", type=int, help="record so many settings, evenly spread")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the file, on the same machine"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=float("inf"),
        help="seconds in all: it leaves fewer pairs of each setting, and then fewer settings",
    )
    options = parser.parse_args()
    shares = sum(SPLITS.values())
    if options.prompts % shares or options.prompts % options.batch:
        parser.error(f"--prompts must be a multiple of {shares}, the splits, and of --batch")
    if options.images < 1:
        parser.error(f"--images must be at least 1, got {options.images}")
    if options.scheduler and not options.out:
        parser.error("--scheduler needs --out: the tables of benchmarks/data are the demo plan's")
    configuration = configured(options)
    recorder = Recorder(configuration, options.pairs, options.calls, options.images)
    grid = grid_of(recorder.space)
    chosen = np.linspace(0, len(grid) - 1, min(options.limit or len(grid), len(grid)))
    rows = np.unique(chosen.round().astype(int)).tolist()
    out = options.out or DATA / f"{'+'.join(configuration.methods)}.npz"
    meta = described(configuration, recorder, len(grid))
    before = recorded_before(out, grid, recorder, meta) if options.resume else {}
    rows = [row for row in rows if row not in before]
    setting_s = (options.time_limit - (time.monotonic() - started)) / max(len(rows), 1)
    recorder.take_at_most(setting_s)
    meta["calls"] = recorder.calls
    print(
        f"{meta['environment']['device']}, {configuration.dtype}: {len(rows)} of {len(grid)} "
        f"settings, {recorder.pairs} pairs of each with {recorder.calls} accelerated calls, "
        f"a baseline call takes {min(recorder.baseline_image_s):.3f} s",
        flush=True,
    )
    recorded = dict(before)
    gc.collect()
    gc.freeze()  # what is loaded stays: looking for rubbish between two settings is quick
    gc.disable()
    began = time.monotonic()
    try:
        # At random, so that what a time limit leaves is a fair sample.
        for row in np.random.default_rng(0).permutation(rows).tolist():
            if time.monotonic() - started > options.time_limit:
                print("out of time")
                break
            recorded[row] = recorder.record(grid[row], visited=len(recorded))
            gc.collect()
            done = len(recorded) - len(before)
            if done % 10 == 0:
                took_s = time.monotonic() - began
                left_s = took_s * (len(rows) / done - 1)
                print(f"{done}/{len(rows)}  {took_s:.0f} s, {left_s:.0f} left", flush=True)
            if len(recorded) % 25 == 0:
                write(out, meta, recorder, grid, recorded)
    finally:
        if recorded:
            write(out, meta, recorder, grid, recorded)
    told(out)
    return 0


def configured(options: argparse.Namespace) -> Configuration:
    """The demo plan's configuration, with these methods on what is recorded of their grid."""
    chosen = tuple(sorted(options.methods.split(",")))
    on_gpu = pipelines.resolve_device(options.device).type == "cuda"
    overrides = {
        "methods": [list(chosen)],
        "space": {name: list(values) for name, values in PARTS.get(chosen, {}).items()},
        "schedulers": [options.scheduler] if options.scheduler else None,
        "steps": [STEPS],
        "images": options.prompts,  # of all splits: one call may make them all
        "held_out_images": 0,
        "batch_size": options.batch,
        "dtype": options.dtype or ("float16" if on_gpu else "float32"),
        "device": options.device,
    }
    configuration = load_plan(PLAN, overrides).configurations()[0]
    # More than the prompts: several images of each.
    return configuration.model_copy(update={"batch_size": options.batch * options.images})


def grid_of(space: Sequence[Parameter]) -> list[dict[str, Value]]:
    """Every setting of the space once, under its effective name."""
    listed = [parameter.values() for parameter in space]
    names = [parameter.name for parameter in space]
    found = [
        methods.effective(space, dict(zip(names, values, strict=True)))
        for values in itertools.product(*(values for values in listed if values is not None))
    ]
    return [dict(items) for items in dict.fromkeys(tuple(one.items()) for one in found)]


def described(configuration: Configuration, recorder: Recorder, grid: int) -> dict[str, Any]:
    """What the arrays were recorded of, as plain JSON.

    Prompt i, of the list's first N distinct ones, has the seed `seed` + i. `splits` are ranges
    of prompts.
    """
    libraries = {name for method in configuration.methods for name in METHODS[method].libraries}
    environment = pipelines.detect_environment(recorder.pipeline.device, libraries)
    sixth = configuration.images // sum(SPLITS.values())
    ends = [sixth * end for end in itertools.accumulate(SPLITS.values(), initial=0)]
    return {
        "format": FORMAT,
        "environment": environment.to_dict(),
        "configuration": configuration.identity(),
        "methods": list(configuration.methods),
        "grid": grid,
        "parameters": [
            {
                "name": one.name,
                "values": list(one.values() or ()),
                "default": one.default,
                "identity": one.identity,
            }
            for one in recorder.space
        ],
        "prompts": configuration.prompts_name,
        "prompts_sha256": hashlib.sha256("\n".join(recorder.prompts).encode()).hexdigest(),
        "seed": configuration.seed,
        "splits": dict(zip(SPLITS, itertools.pairwise(ends), strict=True)),
        "calls": recorder.calls,
        "images": recorder.images,  # of each prompt in a call, whose first is scored
        "one_by_one_s": recorder.one_by_one_s,  # of scoring one image by accelsearch.quality
    }


@dataclass
class Recorded:
    """One setting's row of the arrays."""

    visited: int
    failure: str = ""
    warmup_s: float = float("nan")
    baseline_s: list[float] = field(default_factory=list)
    accelerated_s: list[float] = field(default_factory=list)
    score_s: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)


class Recorder:
    """The pipeline, the scorer and the baseline's images, on the GPU and ready to measure."""

    def __init__(
        self, configuration: Configuration, pairs: int, calls: int = 1, images: int = 1
    ) -> None:
        self.configuration = configuration
        self.pipeline = pipelines.load(configuration)
        self.run = pipelines.run_of(configuration)
        self.prompts = configuration.prompts
        self.images = images
        size = configuration.batch_size // images
        self.batches = [slice(start, start + size) for start in range(0, len(self.prompts), size)]
        self.pairs = max(pairs, len(self.batches))
        self.calls = calls
        self._coin = np.random.default_rng(configuration.seed)
        self._clip = Clip(configuration, self.prompts)
        self._inputs = [self._inputs_of(batch) for batch in range(len(self.batches))]
        expected = self._expected()  # and warms up
        made = [self._time({}, batch) for batch in range(len(self.batches))]
        # Other noise, or another prompt, is tens of the 255 levels off; rounding is far below one.
        if (made[0][1].float() - expected.float()).abs().mean() > 1:
            raise SystemExit("images must be those that accelsearch.pipelines.call makes")
        self._baseline = [images for _, images in made]
        self.baseline_image_s = [took_s for took_s, _ in made]
        self._score(0, self._baseline[0])  # warms up
        scored = [self._score(batch, images) for batch, images in enumerate(self._baseline)]
        self.baseline_score_s = [took_s for took_s, _ in scored]
        self.baseline_clip_score = [one for _, scores in scored for one in scores["clip_score"]]
        self.one_by_one_s = self._clip.check(self._baseline[0])

    def take_at_most(self, setting_s: float) -> None:
        """Measure no more pairs than fit into so many seconds, but all prompts."""
        # A setting is a warm-up and its pairs. An accelerated call takes about 2/3 of the
        # baseline's, and scoring little beside them.
        calls = 0.9 * setting_s / min(self.baseline_image_s)
        affordable = int(min((calls - 2 / 3) / (1 + 2 / 3 * self.calls), self.pairs))
        self.pairs = max(affordable, len(self.batches), min(_FEWEST, self.pairs))

    @property
    def space(self) -> tuple[Parameter, ...]:
        """The effective parameters, on what is recorded of them."""
        parts = self.configuration.space
        return tuple(
            one.among(tuple(parts[one.name])) if one.name in parts else one
            for one in methods.space(self.pipeline, self.configuration.methods, self.run)
        )

    def record(self, params: Mapping[str, Value], visited: int) -> Recorded:
        """Time one setting beside the baseline, and score the images that it makes."""
        found = Recorded(visited)
        made: dict[int, torch.Tensor] = {}
        baseline_first = False
        try:
            found.warmup_s, _ = self._time(params, 0)
            for pair in range(self.pairs):
                batch = pair % len(self.batches)
                # As in accelsearch.latency: a coin for every other pair, then the other way round.
                baseline_first = not baseline_first if pair % 2 else self._coin.random() < 0.5
                if baseline_first:
                    found.baseline_s.append(self._time({}, batch)[0])
                for _ in range(self.calls):
                    took_s, made[batch] = self._time(params, batch)
                    found.accelerated_s.append(took_s)
                if not baseline_first:
                    found.baseline_s.append(self._time({}, batch)[0])
            for batch in range(len(self.batches)):
                took_s, scores = self._score(batch, made[batch])
                found.score_s.append(took_s)
                for metric in METRICS:
                    found.scores.setdefault(metric, []).extend(scores[metric])
        except (TrialError, UnsupportedError, torch.OutOfMemoryError) as error:
            return Recorded(visited, failure=pipelines.reason(error))
        return found

    def _time(self, params: Mapping[str, Value], batch: int) -> tuple[float, torch.Tensor]:
        """The seconds of one call, without params of the baseline, and its uint8 images.

        They are the first of each prompt.
        """
        with self._accelerated(params), pipelines.quiet():
            self._synchronize()
            start = time.perf_counter()
            images = self.pipeline(**self._inputs[batch], output_type="pt").images
            self._synchronize()
            took_s = time.perf_counter() - start
        images = images.float()
        if not bool(images.isfinite().all()):
            raise TrialError("images contain NaN")
        pixels = (images * 255).round().to(torch.uint8)
        if bool((pixels.amax(dim=(1, 2, 3)) == 0).any()):
            raise TrialError("images are black")
        return took_s, pixels[: len(self.prompts[self.batches[batch]])]

    def _drawn(self, batch: int) -> tuple[list[str], list[int]]:
        """The prompts and the seeds of a batch's images."""
        prompts, first = list(self.prompts[self.batches[batch]]), self.batches[batch].start
        seeds = [
            self.configuration.seed + first + image * len(self.prompts) + row
            for image in range(self.images)
            for row in range(len(prompts))
        ]
        return prompts * self.images, seeds

    def _inputs_of(self, batch: int) -> dict[str, Any]:
        """What the pipeline is called with for a batch: all that a search's call would work out."""
        prompts, seeds = self._drawn(batch)
        configuration, device = self.configuration, self.pipeline.device
        with torch.inference_mode(), pipelines.quiet():
            texts, negative = self.pipeline.encode_prompt(
                prompts,
                device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=configuration.guidance_scale > 1,
                negative_prompt=[configuration.negative_prompt] * len(prompts),
            )
        scale, channels = self.pipeline.vae_scale_factor, self.pipeline.unet.config.in_channels
        shape = (channels, configuration.height // scale, configuration.width // scale)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return {
            "prompt_embeds": texts,
            "negative_prompt_embeds": negative,
            "latents": randn_tensor((len(seeds), *shape), generators, device, texts.dtype),
            "num_inference_steps": configuration.steps,
            "guidance_scale": configuration.guidance_scale,
            "height": configuration.height,
            "width": configuration.width,
        }

    def _expected(self) -> torch.Tensor:
        """The baseline images of the first batch, made as a search makes them."""
        pixels = pipelines.generate(self.pipeline, self.configuration, *self._drawn(0))
        return pixels[: len(self.prompts[self.batches[0]])].to(self.pipeline.device)

    def _score(self, batch: int, images: torch.Tensor) -> tuple[float, dict[str, list[float]]]:
        """The seconds of scoring a batch, and its scores by metric."""
        start = time.perf_counter()
        pictures, baseline = images.float(), self._baseline[batch].float()
        decibels = peak_signal_noise_ratio(
            pictures, baseline, data_range=255.0, reduction="none", dim=(1, 2, 3)
        )
        similarity = structural_similarity_index_measure(
            pictures / 255, baseline / 255, data_range=1.0, reduction="none"
        )
        scores = {
            "clip_score": self._clip.score(images, self.batches[batch]).tolist(),
            "psnr": decibels.clamp(max=quality.PSNR_CAP_DB).tolist(),
            "ssim": similarity.tolist(),
        }
        return time.perf_counter() - start, scores  # tolist() has waited for the device

    def _accelerated(self, params: Mapping[str, Value]) -> AbstractContextManager[None]:
        if not params:
            return nullcontext()
        return methods.applied(self.pipeline, params, self.configuration.methods, self.run)

    def _synchronize(self) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize(self.pipeline.device)


class Clip:
    """quality.ClipScore of whole batches: torchmetrics would take image by image."""

    def __init__(self, configuration: Configuration, prompts: Sequence[str]) -> None:
        from transformers import CLIPModel, CLIPProcessor

        folder = pipelines.resolve_model(configuration.scoring_model, "clip")
        self._quality = quality.ClipScore(quality.load_scorer(configuration))
        self._prompts = prompts
        self._device = pipelines.resolve_device(configuration.device)
        with pipelines.quiet():
            processor = CLIPProcessor.from_pretrained(folder)
            self._model = CLIPModel.from_pretrained(folder, use_safetensors=True).to(self._device)
        shape = processor.image_processor
        if (shape.size["height"], shape.size["width"]) != (
            configuration.height,
            configuration.width,
        ):
            raise SystemExit("the scoring model must take images of the resolution as they are")
        self._mean = torch.tensor(shape.image_mean, device=self._device)[:, None, None]
        self._std = torch.tensor(shape.image_std, device=self._device)[:, None, None]
        tokens = processor(
            text=list(prompts),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
        ).to(self._device)
        with torch.inference_mode():
            self._texts = _unit(self._model.get_text_features(**tokens).pooler_output)

    def score(self, images: torch.Tensor, rows: slice) -> torch.Tensor:
        """100 x cosine, at least 0, of uint8 images [B, 3, H, W] beside the prompts of `rows`."""
        with torch.inference_mode():
            pixels = (images.float() / 255 - self._mean) / self._std
            features = _unit(self._model.get_image_features(pixels).pooler_output)
            return (100 * (features * self._texts[rows]).sum(1)).clamp(min=0)

    def check(self, images: torch.Tensor) -> float:
        """Hold a few scores against accelsearch.quality; the seconds that one takes there."""
        count = min(8, len(images))
        start = time.perf_counter()
        expected = self._quality.score(images[:count], self._prompts[:count], None)
        took_s = (time.perf_counter() - start) / count
        np.testing.assert_allclose(
            self.score(images[:count], slice(0, count)).tolist(), expected, rtol=0, atol=1e-2
        )
        return took_s


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def write(
    out: Path,
    meta: Mapping[str, Any],
    recorder: Recorder,
    grid: Sequence[Mapping[str, Value]],
    recorded: Mapping[int, Recorded],
) -> None:
    """Write what is recorded so far, in the order of the grid, in the place of an earlier file."""
    rows = sorted(recorded)
    found = [recorded[row] for row in rows]
    batches, prompts = len(recorder.batches), len(recorder.prompts)
    timed = recorder.pairs * recorder.calls

    def stacked(values: Iterator[list[float]], width: int, dtype: str) -> NDArray[Any]:
        return np.array([one or [np.nan] * width for one in values], dtype)

    arrays: Arrays = {
        "settings": np.array(
            [
                [one["values"].index(grid[row][one["name"]]) for one in meta["parameters"]]
                for row in rows
            ],
            "int16",
        ),
        "visited": np.array([one.visited for one in found], "int16"),
        "failed": np.array([bool(one.failure) for one in found]),
        "warmup_s": np.array([one.warmup_s for one in found]),
        "baseline_s": stacked((one.baseline_s for one in found), recorder.pairs, "float64"),
        "accelerated_s": stacked((one.accelerated_s for one in found), timed, "float64"),
        "score_s": stacked((one.score_s for one in found), batches, "float64"),
        "baseline_clip_score": np.array(recorder.baseline_clip_score, "float32"),
        "baseline_image_s": np.array(recorder.baseline_image_s),
        "baseline_score_s": np.array(recorder.baseline_score_s),
    }
    for metric in METRICS:
        scores = (one.scores.get(metric, []) for one in found)
        arrays[metric] = stacked(scores, prompts, "float32")
    failures = {str(i): one.failure for i, one in enumerate(found) if one.failure}
    text = json.dumps({**meta, "failures": failures}, allow_nan=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.stem}.part.npz")
    np.savez_compressed(temporary, meta=np.array(text), **arrays)
    temporary.replace(out)


def read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """The meta data and the arrays of a recorded file."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def recorded_before(
    path: Path, grid: Sequence[Mapping[str, Value]], recorder: Recorder, now: Mapping[str, Any]
) -> dict[int, Recorded]:
    """The rows of an earlier file of the same machine, by their place in the grid.

    `now` is what `described` says of the recording that goes on.
    """
    meta, arrays = read(path)
    before = _circumstances(meta)
    for key, wanted in _circumstances(json.loads(json.dumps(now))).items():
        if before.get(key) != wanted:
            raise SystemExit(
                f"{path} must have been recorded with {key} {wanted!r}, got {before.get(key)!r}; "
                "record it without --resume"
            )
    recorder.pairs, recorder.calls = arrays["baseline_s"].shape[1], meta["calls"]
    places = {tuple(setting.items()): row for row, setting in enumerate(grid)}
    found = {}
    for at, indices in enumerate(arrays["settings"].tolist()):
        values = zip(meta["parameters"], indices, strict=True)
        setting = tuple((one["name"], one["values"][index]) for one, index in values)
        samples = ("baseline_s", "accelerated_s", "score_s")
        found[places[setting]] = Recorded(
            visited=int(arrays["visited"][at]),
            failure=meta["failures"].get(str(at), ""),
            warmup_s=float(arrays["warmup_s"][at]),
            **{name: arrays[name][at].tolist() for name in samples},
            scores={metric: arrays[metric][at].tolist() for metric in METRICS},
        )
    return found


def _circumstances(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What all rows of a table have in common, by `key` or `key.key`."""
    found = {key: meta.get(key) for key in ("format", "images")}
    for group in ("configuration", "environment"):
        found |= {f"{group}.{key}": value for key, value in meta.get(group, {}).items()}
    return found


def told(path: Path) -> None:
    """Print what a file holds."""
    meta, arrays = read(path)
    speedup = np.median(arrays["baseline_s"], axis=1) / np.median(arrays["accelerated_s"], axis=1)
    baseline = arrays["baseline_clip_score"].mean()
    loss = 1 - arrays["clip_score"].mean(axis=1) / baseline
    print(
        f"{path}: {len(speedup)} of {meta['grid']} settings, {int(arrays['failed'].sum())} failed, "
        f"{path.stat().st_size / 1e6:.2f} MB; speedup {np.nanmin(speedup):.2f}"
        f"..{np.nanmax(speedup):.2f}, clip_score loss {np.nanmin(loss):.2%}..{np.nanmax(loss):.2%}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
