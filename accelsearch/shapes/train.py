"""Train the bundled model from nothing: ``python -m accelsearch.shapes.train --out runs/shapes``.

Three stages, each of which continues where an interrupted run of it stopped: the VAE; the CLIP
model that scores images and whose text half conditions the UNet; the UNet. Look at the pictures
that a stage leaves in the output folder before you spend time on the next: a UNet learns nothing
that its VAE's latents do not hold.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, PreTrainedModel

from accelsearch.shapes import models, scenes
from accelsearch.shapes.fit import fit
from accelsearch.shapes.pictures import save_grid

log = logging.getLogger(__name__)

STAGES = ("vae", "clip", "unet")
_CHUNK = 512  # scenes drawn, encoded or decoded at once
_DROPPED_CAPTIONS = 0.1  # share trained without a caption: what guidance is measured against
_SHARD = "15MB"


@dataclass(frozen=True)
class Stage:
    """How one stage is trained."""

    steps: int
    batch: int
    learning_rate: float
    ema: float


FULL = {
    "vae": Stage(steps=8_000, batch=96, learning_rate=1e-3, ema=0.999),
    "clip": Stage(steps=3_500, batch=1024, learning_rate=1e-3, ema=0.998),
    "unet": Stage(steps=11_000, batch=512, learning_rate=8e-4, ema=0.9995),
}


@dataclass(frozen=True)
class Pool:
    """Training scenes on the device.

    `images` [N, 3, 128, 128] uint8; `ids` and `near_ids` [N, 32] token ids of the caption and of
    the same caption with one attribute changed; `labels` [N, 10] attribute indices, -100 where the
    scene has no second object.
    """

    images: Tensor
    ids: Tensor
    near_ids: Tensor
    labels: Tensor


_LABELS = (
    ("layout", len(scenes.LAYOUTS)),
    ("background", len(scenes.BACKGROUNDS)),
    *(
        (f"{name}{which}", len(values))
        for which in (0, 1)
        for name, values in (
            ("size", scenes.SIZES),
            ("texture", scenes.TEXTURES),
            ("colour", scenes.COLOURS),
            ("shape", scenes.SHAPES),
        )
    ),
)


def labels_of(table: scenes.Scenes) -> Tensor:
    """Every attribute of each scene as an index, [N, 10]; -100 for an object that is not there."""
    columns = [table.layout, table.background]
    for which in (0, 1):
        for column in (table.size, table.texture, table.colour, table.shape):
            values = column[:, which]
            columns.append(values if which == 0 else values.where(table.has_pair, -100))
    return torch.stack(columns, dim=1)


def neighbours(table: scenes.Scenes, seed: int) -> scenes.Scenes:
    """The same scenes with one attribute changed: what a caption must not be mistaken for."""
    generator = torch.Generator().manual_seed(seed)
    count = len(table)
    columns = {name: column.clone() for name, column in vars(table).items()}
    which = torch.randint(2, (count,), generator=generator) * table.has_pair.long()
    rows = torch.arange(count)
    choice = torch.randint(6, (count,), generator=generator)
    for index, (name, values) in enumerate(
        (
            ("size", scenes.SIZES),
            ("texture", scenes.TEXTURES),
            ("colour", scenes.COLOURS),
            ("shape", scenes.SHAPES),
        )
    ):
        shift = torch.randint(1, len(values), (count,), generator=generator)
        column = columns[name]
        changed = (column[rows, which] + shift) % len(values)
        column[rows, which] = torch.where(choice == index, changed, column[rows, which])
    shift = torch.randint(1, len(scenes.BACKGROUNDS), (count,), generator=generator)
    changed = (table.background + shift) % len(scenes.BACKGROUNDS)
    columns["background"] = torch.where(choice == 4, changed, table.background)
    single, pair = len(scenes.POSITIONS), len(scenes.RELATIONS)
    moved = (table.layout + torch.randint(1, single, (count,), generator=generator)) % single
    turned = (
        table.layout - single + torch.randint(1, pair, (count,), generator=generator)
    ) % pair + single
    moved = torch.where(table.has_pair, turned, moved)
    columns["layout"] = torch.where(choice == 5, moved, table.layout)
    return scenes.Scenes(**columns)


def make_pool(count: int, seed: int, device: torch.device) -> Pool:
    """Draw the training scenes; withheld combinations are never among them."""
    started = time.monotonic()
    tokens = models.tokenizer()

    def ids(table: scenes.Scenes) -> Tensor:
        texts = scenes.captions(table)
        encoded = tokens(texts, padding="max_length", truncation=True, return_tensors="pt")
        found: Tensor = encoded.input_ids.to(device)
        return found

    table = scenes.sample(count, seed=seed)
    images = torch.empty(count, 3, scenes.SIDE, scenes.SIDE, dtype=torch.uint8, device=device)
    on_device = table.to(device)
    for rows in _chunks(count):
        images[rows] = (scenes.draw(on_device[rows]) * 255).round().to(torch.uint8)
    near = ids(neighbours(table, seed))
    pool = Pool(images, ids(table), near, labels_of(table).to(device))
    log.info("drew %d scenes in %.0f s", count, time.monotonic() - started)
    return pool


def train_vae(pool: Pool, stage: Stage, run: Run) -> AutoencoderKL | None:
    """Stage 1: L1 reconstruction with a little noise on the latents."""
    vae = models.vae().to(run.device)

    def loss() -> Tensor:
        picked = _pick(pool.images, stage.batch)
        images = picked.float() / 127.5 - 1
        with run.autocast():
            posterior = vae.encode(images).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample.float()
        # Objects cover a tenth of the picture: without a weight, their colours come last.
        background = images[:, :, :1, :1]
        weight = 1 + 2 * ((images - background).abs().amax(1, keepdim=True) > 0.05)
        reconstruction = (weight * (rebuilt - images).abs()).mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        total: Tensor = reconstruction + 1e-4 * kl
        return total

    if not run.fit("vae", vae, loss, stage):
        return None
    _standardise(vae, pool, run)
    with torch.no_grad():
        images = pool.images[:32].float() / 127.5 - 1
        rebuilt = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        log.info("vae: L1 of the reconstruction %.4f on [-1, 1]", (rebuilt - images).abs().mean())
    save_grid(run.out / "vae.png", torch.cat((images, rebuilt)) / 2 + 0.5, columns=16)
    vae.half().save_pretrained(run.out / "pipeline" / "vae", max_shard_size=_SHARD)
    return vae.float()


@torch.no_grad()
def _standardise(vae: AutoencoderKL, pool: Pool, run: Run) -> None:
    """Fold the latents' mean and scale into the 1x1 convolutions around them.

    The UNet then sees latents of zero mean and unit variance in every channel, with the plain
    ``scaling_factor`` of 1 that Stable Diffusion pipelines apply.
    """
    latents = encode(vae, pool.images[:8192], run)
    mean, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= scale[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / scale
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[channels:] -= 2 * scale.log()


def train_clip(pool: Pool, stage: Stage, run: Run) -> CLIPModel | None:
    """Stage 2: contrastive, against the batch and against captions that differ in one attribute.

    Half of the images have passed through the VAE and some carry noise, so that the score speaks
    of the scene and not of how it was rendered. Linear heads, thrown away afterwards, keep every
    attribute readable in both embeddings.
    """
    vae = AutoencoderKL.from_pretrained(run.out / "pipeline" / "vae", dtype=torch.float32)
    rebuilt = torch.empty_like(pool.images)
    vae.to(run.device)
    with torch.no_grad(), run.autocast():
        for rows in _chunks(len(rebuilt)):
            images = pool.images[rows].float() / 127.5 - 1
            images = vae.decode(vae.encode(images).latent_dist.mode()).sample.float()
            rebuilt[rows] = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    clip = models.clip(models.tokenizer()).to(run.device)
    heads = nn.ModuleDict({name: nn.Linear(models.WIDTH, values) for name, values in _LABELS})
    both = nn.ModuleDict({"clip": clip, "heads": heads.to(run.device)})
    own = torch.arange(stage.batch, device=run.device)

    def loss() -> Tensor:
        index = torch.randint(len(pool.images), (stage.batch,), device=run.device)
        through_vae = torch.rand(stage.batch, 1, 1, 1, device=run.device) < 0.5
        images = torch.where(through_vae, rebuilt[index], pool.images[index]).float() / 127.5 - 1
        strength = 0.1 * torch.rand(stage.batch, 1, 1, 1, device=run.device) ** 4
        images = images + strength * torch.randn_like(images)
        ids = torch.cat((pool.ids[index], pool.near_ids[index]))
        with run.autocast():
            seen = clip.visual_projection(clip.vision_model(images).pooler_output).float()
            read = clip.text_projection(clip.text_model(ids).pooler_output).float()
        seen, read = F.normalize(seen, dim=-1), F.normalize(read, dim=-1)
        scale = clip.logit_scale.clamp(max=math.log(100)).exp()
        logits = scale * seen @ read.T
        total = F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : stage.batch].T, own)
        labels = pool.labels[index]
        for column, (name, _) in enumerate(_LABELS):
            for embedding in (seen, read[: stage.batch]):
                # Normalised embeddings are short: the factor gives the heads room to be certain.
                guess = heads[name](embedding * 10)
                total = total + 0.1 * F.cross_entropy(guess, labels[:, column], ignore_index=-100)
        return total

    if not run.fit("clip", both, loss, stage):
        return None
    with torch.no_grad():
        for name, images in (("drawn", pool.images), ("rebuilt", rebuilt)):
            score = clip_scores(clip, images[:1024], pool.ids[:1024])
            log.info("clip: mean score of %s training scenes %.1f", name, score.mean())
    save_clip(clip, run.out)
    return clip


def train_unet(pool: Pool, stage: Stage, run: Run) -> UNet2DConditionModel | None:
    """Stage 3: v-prediction on stored latents, all timesteps weighted alike."""
    folder = run.out / "pipeline"
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).to(run.device)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    text.to(run.device).eval()
    latents = encode(vae, pool.images, run)
    del vae
    unet = models.unet().to(run.device)
    schedule = models.scheduler()
    kept = schedule.alphas_cumprod.to(run.device)
    states = torch.empty(*pool.ids.shape, models.WIDTH, dtype=torch.float16, device=run.device)
    with torch.no_grad():
        for rows in _chunks(len(states)):
            states[rows] = text(pool.ids[rows]).last_hidden_state.half()
        empty = models.tokenizer()("", padding="max_length", return_tensors="pt").input_ids
        unconditional = text(empty.to(run.device)).last_hidden_state.half()

    def loss() -> Tensor:
        index = torch.randint(len(latents), (stage.batch,), device=run.device)
        clean = latents[index].float()
        dropped = torch.rand(stage.batch, 1, 1, device=run.device) < _DROPPED_CAPTIONS
        caption = torch.where(dropped, unconditional, states[index]).float()
        timestep = torch.randint(len(kept), (stage.batch,), device=run.device)
        noise = torch.randn_like(clean)
        signal = kept[timestep][:, None, None, None].sqrt()
        spread = (1 - kept[timestep])[:, None, None, None].sqrt()
        noisy, velocity = signal * clean + spread * noise, signal * noise - spread * clean
        with run.autocast():
            guess = unet(noisy, timestep, caption, return_dict=False)[0].float()
        return F.mse_loss(guess, velocity)

    finished = run.fit("unet", unet, loss, stage)
    pipeline = save_pipeline(unet, run.out)
    _look(pipeline, run)
    return unet if finished else None


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, run: Run) -> Tensor:
    """Latents [N, 4, 16, 16], float32, of uint8 images."""
    found = []
    for rows in _chunks(len(images)):
        pixels = images[rows].float() / 127.5 - 1
        with run.autocast():
            found.append(vae.encode(pixels).latent_dist.mode().float())
    return torch.cat(found)


@torch.no_grad()
def clip_scores(clip: CLIPModel, images: Tensor, ids: Tensor) -> Tensor:
    """100 x cosine of uint8 images and their captions, [N]."""
    pixels = images.float() / 127.5 - 1
    seen = F.normalize(clip.visual_projection(clip.vision_model(pixels).pooler_output), dim=-1)
    read = F.normalize(clip.text_projection(clip.text_model(ids).pooler_output), dim=-1)
    return 100 * (seen * read).sum(-1)


def save_clip(clip: CLIPModel, out: Path) -> None:
    """Write the scoring model, and its text half as the pipeline's text encoder, in fp16."""
    tokens = models.tokenizer()
    _save_half(clip, out / "clip")
    models.clip_processor(tokens).save_pretrained(out / "clip")
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    _save_half(text, out / "pipeline" / "text_encoder")
    tokens.save_pretrained(out / "pipeline" / "tokenizer")
    clip.float()


def _save_half(model: PreTrainedModel, folder: Path) -> None:
    """Write a model in fp16 with a configuration that asks for fp32.

    Loaded without a dtype, transformers takes the configuration's and diffusers fp32: a pipeline
    of both would not run.
    """
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)


def save_pipeline(unet: UNet2DConditionModel, out: Path) -> StableDiffusionPipeline:
    """Write the whole pipeline in fp16 and return it in float32, loaded back from disk."""
    folder = out / "pipeline"
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float16)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float16),
        text_encoder=text,
        tokenizer=models.tokenizer(),
        unet=unet.half(),
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, max_shard_size=_SHARD)
    _save_half(text, folder / "text_encoder")
    unet.float()
    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def _look(pipeline: StableDiffusionPipeline, run: Run) -> None:
    """Generate a grid of held-out captions beside what was asked for."""
    table = scenes.sample(16, seed=run.seed + 1, held_out=True)
    pipeline.to(run.device)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        scenes.captions(table),
        num_inference_steps=25,
        guidance_scale=3.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(run.seed),
    ).images
    save_grid(run.out / "unet.png", torch.cat((scenes.draw(table), made.cpu())), columns=16)


@dataclass(frozen=True)
class Run:
    """Where and for how long this invocation trains."""

    out: Path
    device: torch.device
    seed: int
    until: float

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; its weight cache would outlive the captured graph, so it is off."""
        cuda = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False)

    def fit(self, name: str, module: nn.Module, loss: Callable[[], Tensor], stage: Stage) -> bool:
        return fit(
            module,
            loss,
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            ema=stage.ema,
            seed=self.seed,
            checkpoint=self.out / "checkpoints" / f"{name}.safetensors",
            until=self.until,
        )


def _pick(rows: Tensor, count: int) -> Tensor:
    return rows[torch.randint(len(rows), (count,), device=rows.device)]


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, count, _CHUNK))


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for, each only once the one before it is done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--steps", type=int, help="steps of each stage instead of the full number")
    parser.add_argument("--batch", type=int, help="batch of each stage instead of the full one")
    parser.add_argument("--scenes", type=int, default=200_000, help="training scenes drawn")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after this")
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    run = Run(options.out, device, options.seed, started + 60 * options.minutes)
    run.out.mkdir(parents=True, exist_ok=True)
    log.info("seed %d on %s", options.seed, device)
    pool = make_pool(options.scenes, options.seed, device)
    trainers = {"vae": train_vae, "clip": train_clip, "unet": train_unet}
    for name in STAGES:
        if name not in options.stage:
            continue
        full = FULL[name]
        stage = Stage(
            options.steps or full.steps, options.batch or full.batch, full.learning_rate, full.ema
        )
        began = time.monotonic()
        if trainers[name](pool, stage, run) is None:
            log.info("%s: out of time; run the same command again to continue", name)
            return 0
        log.info("%s: done in %.0f s", name, time.monotonic() - began)
    facts = {"seed": options.seed, "device": str(device), "seconds": time.monotonic() - started}
    log.info("%s", json.dumps(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
