"""The weights that ship: what is in the folder, and that the model is good enough to measure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from accelsearch.configuration import BUNDLED
from accelsearch.quality import Scorer
from accelsearch.shapes import judge, models, scenes, train

FILES = sorted(path for path in BUNDLED.rglob("*") if path.is_file())
CONFIGS = [path for path in FILES if path.suffix == ".json"]


def name_of(path: Path) -> str:
    return str(path.relative_to(BUNDLED))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """As a stranger loads it: no dtype, no options."""
    pipeline = StableDiffusionPipeline.from_pretrained(BUNDLED / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def clip() -> Any:
    return CLIPModel.from_pretrained(BUNDLED / "clip").eval()


@pytest.fixture(scope="module")
def scorer(clip: Any) -> Scorer:
    return Scorer(clip, CLIPProcessor.from_pretrained(BUNDLED / "clip"), torch.device("cpu"))


@pytest.fixture(scope="module")
def autoencoded(pipeline: Any) -> tuple[scenes.Scenes, Tensor, Tensor, Tensor]:
    """Scenes never trained on, their images and reconstructions in -1..1, and their latents."""
    table = scenes.sample(24, seed=41, pairs=False)
    images = 2 * scenes.draw(table) - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mode()
        rebuilt = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    return table, images, rebuilt, latents


def asked(table: scenes.Scenes) -> list[judge.Reading]:
    colours, backgrounds = tuple(scenes.COLOURS), tuple(scenes.BACKGROUNDS)
    return [
        judge.Reading(
            backgrounds[int(table.background[row])],
            colours[int(table.colour[row, 0])],
            scenes.SHAPES[int(table.shape[row, 0])],
        )
        for row in range(len(table))
    ]


def ids_of(pipeline: Any, prompts: list[str]) -> Tensor:
    found: Tensor = pipeline.tokenizer(
        prompts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return found


def generate(pipeline: Any, prompts: list[str], **arguments: Any) -> Tensor:
    seeds = range(4100, 4100 + len(prompts))
    images: Tensor = pipeline(
        prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **arguments,
    ).images
    return images


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def test_all_weights_together_are_at_most_30_mb_and_each_file_15_mb() -> None:
    sizes = {name_of(path): path.stat().st_size for path in FILES}
    assert 20e6 < sum(sizes.values()) <= 30e6
    assert max(sizes.values()) <= 15e6, sizes


def test_there_are_only_safetensors_and_json() -> None:
    assert {path.suffix for path in FILES} == {".safetensors", ".json"}


def test_every_weight_is_fp16_and_finite() -> None:
    files = [path for path in FILES if path.suffix == ".safetensors"]
    assert {path.parent.name for path in files} == {"clip", "text_encoder", "unet", "vae"}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                assert weight.dtype == torch.float16, (name_of(path), name)
                assert weight.isfinite().all(), (name_of(path), name)


def test_every_shard_that_the_index_names_is_there_and_no_other() -> None:
    index = json.loads(
        (BUNDLED / "pipeline/unet/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    shards = {path.name for path in FILES if path.match("unet/*.safetensors")}
    assert set(index["weight_map"].values()) == shards


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_no_config_tells_where_it_was_made(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "_name_or_path" not in text
    local = re.compile(r"^~?/\w|^[A-Za-z]:[/\\]|/(home|root|tmp|work|mnt|Users)/")
    assert [one for one in strings(json.loads(text)) if local.search(one)] == []


def test_a_plain_load_gives_a_float32_pipeline(pipeline: Any) -> None:
    parts = (pipeline.vae, pipeline.unet, pipeline.text_encoder)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    assert pipeline.safety_checker is None
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"


def test_a_seed_gives_the_same_image_twice_and_another_seed_another(pipeline: Any) -> None:
    def image(seed: int) -> Tensor:
        found: Tensor = pipeline(
            "a large solid red circle in the center on a white background",
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        return found

    first = image(1)
    assert first.shape == (1, 3, scenes.SIDE, scenes.SIDE)
    assert torch.equal(image(1), first)
    assert (image(2) - first).abs().max() > 0.05


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_it_draws_as_well_in_half_precision(dtype: torch.dtype) -> None:
    """Large activations would overflow in fp16."""
    pipeline = StableDiffusionPipeline.from_pretrained(BUNDLED / "pipeline", dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    table = scenes.sample(1, seed=42, pairs=False)
    images = generate(pipeline, scenes.captions(table), num_inference_steps=5, guidance_scale=3.0)
    assert [judge.read(image.float()) for image in images] == asked(table)


def test_the_unet_has_the_topology_of_sd_1_5(pipeline: Any) -> None:
    config = pipeline.unet.config
    assert config.down_block_types == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert config.up_block_types == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert config.mid_block_type == "UNetMidBlock2DCrossAttn"
    assert [len(block.resnets) for block in pipeline.unet.down_blocks] == [2] * 4
    assert [len(block.resnets) for block in pipeline.unet.up_blocks] == [3] * 4
    attentions = [len(block.attentions) for block in pipeline.unet.down_blocks[:3]]
    assert attentions == [2] * 3
    assert [len(block.attentions) for block in pipeline.unet.up_blocks[1:]] == [3] * 3
    assert (config.in_channels, config.out_channels) == (4, 4)
    assert pipeline.vae_scale_factor == 8
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_the_shipped_configs_are_those_that_training_makes(pipeline: Any, part: str) -> None:
    expected, shipped = getattr(models, part)().config, getattr(pipeline, part).config
    for name, value in expected.items():
        if not name.startswith("_"):
            assert shipped[name] == (list(value) if isinstance(value, tuple) else value), name


def test_the_shipped_tokenizers_are_the_one_that_training_uses(pipeline: Any) -> None:
    expected = models.tokenizer()
    prompts = [*scenes.captions(scenes.sample(50, seed=43)), "a photograph of Zürich!", ""]
    ids = expected(prompts, padding="max_length").input_ids
    for tokens in (pipeline.tokenizer, CLIPTokenizer.from_pretrained(BUNDLED / "clip")):
        assert tokens.get_vocab() == expected.get_vocab()
        assert tokens.model_max_length == models.TOKENS
        assert tokens(prompts, padding="max_length").input_ids == ids


def test_clip_reads_its_text_at_the_end(pipeline: Any, clip: Any) -> None:
    tokens = pipeline.tokenizer
    for config in (clip.config.text_config, pipeline.text_encoder.config):
        assert config.eos_token_id == tokens.eos_token_id != 2
        assert config.bos_token_id == tokens.bos_token_id
        assert config.vocab_size == len(tokens)
        assert config.max_position_embeddings == models.TOKENS


def test_the_text_encoder_is_the_text_half_of_the_scoring_model(pipeline: Any, clip: Any) -> None:
    expected = clip.text_model.state_dict()
    shipped = pipeline.text_encoder.state_dict()
    assert set(shipped) == set(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in shipped.items())


@torch.no_grad()
def test_a_linear_probe_reads_every_attribute_from_the_text_embedding(pipeline: Any) -> None:
    def embedded(table: scenes.Scenes) -> tuple[Tensor, Tensor]:
        ids = ids_of(pipeline, scenes.captions(table))
        pooled = torch.cat(
            [pipeline.text_encoder(rows).pooler_output for rows in torch.split(ids, 256)]
        )
        constant = torch.ones(len(pooled), 1)
        return torch.cat((pooled, constant), 1).double(), train.labels_of(table)

    x, labels = embedded(scenes.sample(1200, seed=44))
    # Of withheld combinations, so that none of these captions was fitted or trained on.
    other_x, other_labels = embedded(scenes.sample(400, seed=45, held_out=True))
    right = {}
    for column, (name, values) in enumerate(train._LABELS):
        rows, other_rows = labels[:, column] >= 0, other_labels[:, column] >= 0
        targets = F.one_hot(labels[rows, column], values).double()
        ridge = 1e-3 * torch.eye(x.shape[1], dtype=torch.double)
        weights = torch.linalg.solve(x[rows].T @ x[rows] + ridge, x[rows].T @ targets)
        guess = (other_x[other_rows] @ weights).argmax(1)
        right[name] = float((guess == other_labels[other_rows, column]).double().mean())
    assert set(right) == {
        "layout",
        "background",
        *(f"{name}{which}" for name in ("size", "texture", "colour", "shape") for which in (0, 1)),
    }
    assert min(right.values()) >= 0.98, right


def test_the_vae_rebuilds_pictures(
    autoencoded: tuple[scenes.Scenes, Tensor, Tensor, Tensor],
) -> None:
    table, images, rebuilt, _ = autoencoded
    assert (rebuilt - images).abs().mean() < 0.015
    # The mean hides objects, which cover a tenth of the picture.
    background = images[:, :, :1, :1]
    objects = ((images - background).abs().amax(1, keepdim=True) > 0.05).expand_as(images)
    assert (rebuilt - images)[objects].abs().mean() < 0.05
    readings = [judge.read((image + 1) / 2) for image in rebuilt]
    right = sum(seen == one for seen, one in zip(readings, asked(table), strict=True))
    assert right >= 23


def test_the_latents_are_standardised(
    autoencoded: tuple[scenes.Scenes, Tensor, Tensor, Tensor], pipeline: Any
) -> None:
    latents = autoencoded[3]
    assert pipeline.vae.config.scaling_factor == 1.0
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.3


@torch.no_grad()
def test_the_unet_knows_its_caption_and_what_no_caption_means(
    autoencoded: tuple[scenes.Scenes, Tensor, Tensor, Tensor], pipeline: Any
) -> None:
    """Without an unconditional half, guidance would push away from anything at all."""
    table, _, _, clean = autoencoded
    clean, prompts = clean[:16], scenes.captions(table[:16])
    kept = pipeline.scheduler.alphas_cumprod[500]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean

    def error(texts: list[str]) -> float:
        states = pipeline.text_encoder(ids_of(pipeline, texts)).last_hidden_state
        return F.mse_loss(pipeline.unet(noisy, 500, states).sample, velocity).item()

    own, none, wrong = error(prompts), error([""] * 16), error(prompts[1:] + prompts[:1])
    assert 1.5 * own < none < 0.5 * wrong
    assert none < 0.5 * velocity.square().mean()


@pytest.mark.parametrize("held_out", [False, True], ids=["seen", "held out"])
def test_a_scene_scores_best_with_its_own_caption(scorer: Scorer, held_out: bool) -> None:
    table = scenes.sample(120, seed=46, held_out=held_out)
    images = (scenes.draw(table) * 255).round().to(torch.uint8)
    own = torch.tensor(scorer(images, scenes.captions(table)))
    near = torch.tensor(scorer(images, scenes.captions(train.neighbours(table, seed=47))))
    assert (own > near).double().mean() >= 0.95
    assert own.mean() > 70


def test_held_out_captions_are_drawn_right(pipeline: Any) -> None:
    table = scenes.sample(8, seed=48, held_out=True, pairs=False)
    prompts = scenes.captions(table)
    images = generate(pipeline, prompts, num_inference_steps=15, guidance_scale=3.0)
    readings = [judge.read(image) for image in images]
    right = sum(seen == one for seen, one in zip(readings, asked(table), strict=True))
    assert right >= 7, list(zip(prompts, readings, strict=True))
