"""Judge the bundled model on held-out captions: ``python -m accelsearch.shapes.evaluate``.

Prints the mean CLIP score of generated pictures beside that of the drawn originals, and how often
the colour, shape and background that a one-object caption names are right according to a reader
that does not use the scoring model. About five minutes on two CPU cores, seconds on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from accelsearch.configuration import BUNDLED
from accelsearch.quality import Scorer
from accelsearch.shapes import judge, scenes
from accelsearch.shapes.pictures import save_grid

_SEED = 515151  # of the held-out scenes and of the noise; training uses neither
_BATCH = 32


def held_out(count: int) -> scenes.Scenes:
    """`count` scenes of withheld attribute combinations; the first half hold one object."""
    single = scenes.sample(count // 2, seed=_SEED, held_out=True, pairs=False)
    pair = scenes.sample(count - count // 2, seed=_SEED + 1, held_out=True, pairs=True)
    columns = zip(vars(single).items(), vars(pair).values(), strict=True)
    return scenes.Scenes(**{name: torch.cat((a, b)) for (name, a), b in columns})


def generate(folder: Path, prompts: list[str], *, steps: int, guidance_scale: float) -> Tensor:
    """Images [N, 3, 128, 128] in 0..1, one seed a prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        seeds = range(_SEED + start, _SEED + start + len(batch))
        made.append(
            pipeline(
                batch,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images.cpu()
        )
    return torch.cat(made)


def clip_score(folder: Path, images: Tensor, prompts: list[str]) -> float:
    """The mean CLIP score, as the product measures it, of images [N, 3, H, W] in 0..1."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    scorer = Scorer(model, CLIPProcessor.from_pretrained(folder), torch.device("cpu"))
    scores = scorer((images * 255).round().to(torch.uint8), prompts)
    return sum(scores) / len(scores)


def accuracies(images: Tensor, table: scenes.Scenes) -> dict[str, float]:
    """Share of one-object pictures in which each attribute, and all three, are as asked for."""
    single = (~table.has_pair).nonzero().ravel().tolist()
    colours, backgrounds = tuple(scenes.COLOURS), tuple(scenes.BACKGROUNDS)
    right = {"colour": 0, "shape": 0, "background": 0, "all": 0}
    for row in single:
        seen = judge.read(images[row])
        verdicts = {
            "colour": seen.colour == colours[int(table.colour[row, 0])],
            "shape": seen.shape == scenes.SHAPES[int(table.shape[row, 0])],
            "background": seen.background == backgrounds[int(table.background[row])],
        }
        verdicts["all"] = all(verdicts.values())
        for name, verdict in verdicts.items():
            right[name] += verdict
    return {name: count / len(single) for name, count in right.items()}


def evaluate(
    weights: Path, *, count: int, steps: int, guidance_scale: float, grid: Path | None
) -> dict[str, Any]:
    """All figures as one JSON-safe dict; writes a drawn-beside-generated picture to `grid`."""
    table = held_out(count)
    prompts, drawn = scenes.captions(table), scenes.draw(table)
    made = generate(weights / "pipeline", prompts, steps=steps, guidance_scale=guidance_scale)
    score_drawn = clip_score(weights / "clip", drawn, prompts)
    score_made = clip_score(weights / "clip", made, prompts)
    if grid is not None:
        rows = torch.arange(4)[:, None] * (count // 8) + torch.tensor(
            [0, 1, count // 2, count // 2 + 1]
        )
        rows = rows.ravel().clamp(max=count - 1)
        pairs = torch.stack((drawn[rows], made[rows]), dim=1).flatten(0, 1)
        save_grid(grid, pairs, columns=8)
    return {
        "captions": count,
        "scheduler": "DDIMScheduler",
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": _SEED,
        "clip_score_drawn": round(score_drawn, 2),
        "clip_score_generated": round(score_made, 2),
        "clip_score_ratio": round(score_made / score_drawn, 4),
        "single_object_scenes": int((~table.has_pair).sum()),
        "right": {name: round(share, 4) for name, share in accuracies(made, table).items()},
        "right_in_drawn": {
            name: round(share, 4) for name, share in accuracies(drawn, table).items()
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the figures as JSON; exit code 1 where the model is not good enough to be shipped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--weights", type=Path, default=BUNDLED)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--grid", type=Path, help="write a drawn-beside-generated PNG here")
    parser.add_argument("--out", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    figures = evaluate(
        options.weights,
        count=options.count,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        grid=options.grid,
    )
    text = json.dumps(figures, indent=2)
    sys.stdout.write(text + "\n")
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if figures["clip_score_ratio"] >= 0.8 and figures["right"]["all"] >= 0.9 else 1


if __name__ == "__main__":
    raise SystemExit(main())
