"""Training the bundled model: its scenes, its stages, and what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from accelsearch.configuration import BUNDLED
from accelsearch.quality import Scorer
from accelsearch.shapes import models, scenes, train

CPU = torch.device("cpu")
NAMES = [name for name, _ in train._LABELS]


@pytest.fixture(scope="module")
def table() -> scenes.Scenes:
    return scenes.sample(1000, seed=31)


@pytest.fixture
def run(tmp_path: Path) -> train.Run:
    return train.Run(tmp_path, CPU, seed=1, until=math.inf)


def pool_of(images: Tensor) -> train.Pool:
    nothing = torch.zeros(len(images), 0, dtype=torch.long)
    return train.Pool(images, nothing, nothing, nothing)


def drawn(count: int, seed: int) -> Tensor:
    return (scenes.draw(scenes.sample(count, seed=seed)) * 255).round().to(torch.uint8)


def dtypes(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def generate(pipeline: Any, steps: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(
        scenes.captions(scenes.sample(1, seed=32)),
        num_inference_steps=steps,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    return images


def test_labels_are_the_attributes_that_the_scene_shows(table: scenes.Scenes) -> None:
    labels = train.labels_of(table)
    assert labels.shape == (1000, len(NAMES)) == (1000, 10)
    pair = table.has_pair
    assert torch.equal(labels[:, NAMES.index("layout")], table.layout)
    assert torch.equal(labels[:, NAMES.index("background")], table.background)
    for name in ("size", "texture", "colour", "shape"):
        column = getattr(table, name)
        assert torch.equal(labels[:, NAMES.index(f"{name}0")], column[:, 0])
        second = labels[:, NAMES.index(f"{name}1")]
        assert torch.equal(second[pair], column[pair, 1])
        assert (second[~pair] == -100).all()


def test_labels_stay_below_the_number_of_values(table: scenes.Scenes) -> None:
    largest = train.labels_of(table).amax(0) + 1
    assert dict(zip(NAMES, largest.tolist(), strict=True)) == dict(train._LABELS)


def test_a_neighbour_differs_in_exactly_one_attribute_of_its_caption(table: scenes.Scenes) -> None:
    near = train.neighbours(table, seed=2)
    differing = train.labels_of(table) != train.labels_of(near)
    assert (differing.sum(1) == 1).all()
    assert torch.equal(table.has_pair, near.has_pair)
    pairs = zip(scenes.captions(table), scenes.captions(near), strict=True)
    assert all(own != other for own, other in pairs)


def test_neighbours_change_every_attribute_about_equally(table: scenes.Scenes) -> None:
    differing = train.labels_of(table) != train.labels_of(train.neighbours(table, seed=2))
    shares = dict(zip(NAMES, differing.float().mean(0).tolist(), strict=True))
    for name in ("layout", "background"):
        assert 0.12 < shares[name] < 0.22
    for name in ("size", "texture", "colour", "shape"):
        assert 0.12 < shares[f"{name}0"] + shares[f"{name}1"] < 0.22
        assert shares[f"{name}1"] > 0.03


def test_neighbours_leave_the_scenes_alone_and_follow_their_seed() -> None:
    table, untouched = scenes.sample(50, seed=33), scenes.sample(50, seed=33)
    texts = scenes.captions(train.neighbours(table, seed=2))
    assert scenes.captions(table) == scenes.captions(untouched)
    assert scenes.captions(train.neighbours(table, seed=2)) == texts
    assert scenes.captions(train.neighbours(table, seed=3)) != texts


def test_the_pool_holds_training_scenes_with_their_captions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "_CHUNK", 16)  # the last chunk is not full
    pool = train.make_pool(40, 34, CPU)
    table = scenes.sample(40, seed=34)
    assert torch.equal(pool.images, (scenes.draw(table) * 255).round().to(torch.uint8))
    assert torch.equal(pool.labels, train.labels_of(table))
    assert pool.ids.shape == pool.near_ids.shape == (40, models.TOKENS)
    tokens = models.tokenizer()
    read = [tokens.decode(row, skip_special_tokens=True).strip() for row in pool.ids]
    assert read == scenes.captions(table)
    assert (pool.ids != pool.near_ids).any(1).all()


@torch.no_grad()
def test_standardising_keeps_the_pictures_and_normalises_the_latents(run: train.Run) -> None:
    torch.manual_seed(3)
    vae = models.vae().eval()
    # An untrained encoder's latents are all but standardised.
    vae.quant_conv.weight *= 7
    vae.quant_conv.bias += torch.linspace(-3, 2, 8)
    images = drawn(12, seed=35)
    pixels = images[:2].float() / 127.5 - 1

    def rebuilt(noise: bool) -> Tensor:
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(4)) if noise else posterior.mode()
        found: Tensor = vae.decode(latents).sample
        return found

    before = [rebuilt(noise) for noise in (False, True)]
    latents = train.encode(vae, images, run)
    assert latents.mean((0, 2, 3)).abs().max() > 0.5
    assert not torch.allclose(before[0], before[1], atol=1e-2)

    train._standardise(vae, pool_of(images), run)

    latents = train.encode(vae, images, run)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    for one, other in zip(before, [rebuilt(noise) for noise in (False, True)], strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@torch.no_grad()
def test_latents_do_not_depend_on_the_chunks(
    run: train.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, images = models.vae().eval(), drawn(5, seed=36)
    whole = train.encode(vae, images, run)
    monkeypatch.setattr(train, "_CHUNK", 2)
    assert whole.shape == (5, 4, 16, 16)
    assert torch.allclose(train.encode(vae, images, run), whole, atol=1e-5)


@torch.no_grad()
def test_training_scores_as_the_product_does() -> None:
    from transformers import CLIPProcessor

    clip = CLIPModel.from_pretrained(BUNDLED / "clip", dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(BUNDLED / "clip")
    table = scenes.sample(6, seed=37)
    images = (scenes.draw(table) * 255).round().to(torch.uint8)
    ids = processor.tokenizer(scenes.captions(table), padding="max_length", return_tensors="pt")
    scores = train.clip_scores(clip, images, ids.input_ids)
    expected = Scorer(clip, processor, CPU)(images, scenes.captions(table))
    assert scores.tolist() == pytest.approx(expected, abs=0.05)
    assert scores.min() > 50


def test_what_is_written_loads_and_runs_without_a_dtype(tmp_path: Path) -> None:
    """diffusers and transformers choose different dtypes where they are told none."""
    clip = models.clip(models.tokenizer())
    train.save_clip(clip, tmp_path)
    assert clip.dtype == torch.float32
    models.vae().half().save_pretrained(tmp_path / "pipeline" / "vae")
    unet = models.unet()
    returned = train.save_pipeline(unet, tmp_path)
    assert unet.dtype == torch.float32
    assert dtypes(tmp_path) == {"F16"}
    assert max(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 15e6

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    images = generate(pipeline, steps=1)
    assert images.shape == (1, 3, scenes.SIDE, scenes.SIDE)
    assert torch.equal(images, generate(returned, steps=1))
    assert CLIPModel.from_pretrained(tmp_path / "clip").dtype == torch.float32
    text = CLIPTextModel.from_pretrained(tmp_path / "pipeline" / "text_encoder")
    for name, weight in text.state_dict().items():
        assert torch.equal(weight, clip.text_model.state_dict()[name]), name


def test_a_run_that_is_out_of_time_saves_and_does_not_start_the_next_stage(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--scenes", "8", "--batch", "2", "--minutes", "0"]
    assert train.main(arguments) == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["vae.safetensors"]
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.slow
def test_all_stages_yield_a_pipeline_and_a_scoring_model(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--scenes", "64", "--steps", "2", "--batch", "4"]
    # First stopped at once, as by a machine that goes away, then continued stage by stage.
    assert train.main([*arguments, "--minutes", "0"]) == 0
    assert train.main([*arguments, "--stage", "vae", "clip"]) == 0
    assert train.main(arguments) == 0

    assert {path.name for path in tmp_path.glob("*.png")} == {"vae.png", "unet.png"}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    images = generate(pipeline, steps=2)
    assert images.shape == (1, 3, scenes.SIDE, scenes.SIDE)
    assert images.isfinite().all()
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    tokens = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    for config in (clip.config.text_config, pipeline.text_encoder.config):
        assert config.eos_token_id == tokens.eos_token_id == pipeline.tokenizer.eos_token_id != 2
    assert dtypes(tmp_path / "pipeline") == dtypes(tmp_path / "clip") == {"F16"}
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {
        ".json",
        ".png",
        ".safetensors",
    }
    for name in train.STAGES:
        with safe_open(tmp_path / "checkpoints" / f"{name}.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["progress"])["steps"] == 2
