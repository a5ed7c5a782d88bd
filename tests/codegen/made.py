"""Keys, entries and files as an export leaves them, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from accelsearch.contract import Key

PARAMS: dict[str, dict[str, Any]] = {
    "deepcache": {"cache_interval": 2, "cache_branch_id": 0},
    "tgate": {"gate_step": 2, "sp_interval": 2, "fi_interval": 1, "warm_up": 0},
    "tome": {"ratio": 0.5, "max_downsample": 2},
    "compile": {"mode": "eager"},
}


def key(speedup: float | None = 2.34, *methods: str, **fields: Any) -> Key:
    defaults: dict[str, Any] = {
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "DDIMScheduler",
        "steps": 50,
        "max_loss": 0.02,
    }
    return Key(speedup=speedup, methods=methods or ("deepcache",), **(defaults | fields))


def entry(of: Key, **fields: Any) -> dict[str, Any]:
    """The entry of search_params.json under this key."""
    made: dict[str, Any] = {
        "speedup": of.speedup,
        "score_loss": 0.01,
        "speedup_interval": [2.3, 2.4],
        "model": "hub/sd15",
        "revision": None,
        "variant": "fp16",
        "dtype": "float16",
        "device": "NVIDIA H200",
        "resolution": [512, 512],
        "batch_size": 1,
        "guidance_scale": 7.5,
        "negative_prompt": "",
        "seed": 0,
        "environment": {
            "device_type": "cuda",
            "versions": {"torch": "2.13.0+cu128", "diffusers": "0.42.1"},
        },
        "study": "sd15-DDIM-50-deepcache",
        "trial": 7,
    }
    for method in of.methods:
        made |= PARAMS[method]
    return made | fields


class Files(NamedTuple):
    """A folder with both JSON files, and one for the scripts."""

    bounds: Path
    params: Path
    out: Path

    def arguments(self) -> dict[str, Path]:
        return {"bounds": self.bounds, "params": self.params, "out": self.out}

    def report(self) -> list[dict[str, Any]]:
        report: list[dict[str, Any]] = json.loads((self.out / "codegen_report.json").read_text())
        return report

    def scripts(self) -> list[str]:
        return sorted(file.name for file in self.out.glob("*.py"))


def write(
    folder: Path,
    *params: tuple[Key, dict[str, Any]],
    bounds: dict[Key, dict[str, Any]] | None = None,
) -> Files:
    """The files with these params; of each configuration the bound of its fastest one."""
    files = Files(folder / "speedup_bounds.json", folder / "search_params.json", folder / "out")
    if bounds is None:
        bounds = {}
        for one, _ in sorted(params, key=lambda pair: pair[0].speedup or 0):
            measured = one.speedup or 0
            bound = Key(one.pipeline, one.scheduler, one.steps, None, one.max_loss, one.methods)
            bounds[bound] = {
                "max_speedup": round(measured * 1.1, 2),
                "measured_max_speedup": measured,
            }
    files.params.write_text(json.dumps({str(one): told for one, told in params}))
    files.bounds.write_text(json.dumps({str(one): told for one, told in bounds.items()}))
    return files
