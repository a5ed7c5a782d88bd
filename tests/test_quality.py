"""Scores of images, and their losses against a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accelsearch import measurement
from accelsearch.configuration import Budget
from accelsearch.errors import ModelError, PlanError, TrialError
from accelsearch.measurement import Scores
from accelsearch.quality import METRICS, PSNR_CAP_DB, ClipScore, Scorer, load_metrics, load_scorer

MakeConfiguration = Callable[..., Any]

BUDGETS = {
    "clip_score": Budget(metric="clip_score", max_loss=0.02),
    "psnr": Budget(metric="psnr", floor_db=25.0),
    "ssim": Budget(metric="ssim", max_loss=0.1),
}


@pytest.fixture(scope="module")
def scorer(make_configuration: MakeConfiguration) -> Scorer:
    return load_scorer(make_configuration())


@pytest.fixture
def pictures() -> torch.Tensor:
    """Three smooth pictures, uint8 [3, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 4, 4, generator=generator) * 200 + 25
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return smooth.round().to(torch.uint8)


def noisy(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    return (pictures + sigma * noise).clamp(0, 255).round().to(torch.uint8)


def test_the_registry_holds_the_metrics_that_a_budget_can_name() -> None:
    assert set(METRICS) == set(measurement.METRICS) == set(BUDGETS)
    assert {name: metric.name for name, metric in METRICS.items()} == {
        name: name for name in METRICS
    }
    for name, metric in METRICS.items():
        assert metric.compares == ("prompt" if name == "clip_score" else "baseline")
        assert metric.unit


def test_clip_score_is_the_cosine_of_image_and_prompt(
    scorer: Scorer, pictures: torch.Tensor, tiny_clip_folder: Path
) -> None:
    from transformers import CLIPModel, CLIPProcessor

    prompts = ["a red circle", "a blue square", "two green stars"]
    model = CLIPModel.from_pretrained(tiny_clip_folder)
    processor = CLIPProcessor.from_pretrained(tiny_clip_folder)
    inputs = processor(text=prompts, images=list(pictures), return_tensors="pt", padding=True)
    with torch.inference_mode():
        outputs = model(**inputs)
    cosines = (outputs.image_embeds * outputs.text_embeds).sum(-1)
    expected = [max(100 * float(cosine), 0.0) for cosine in cosines]
    assert scorer(pictures, prompts) == pytest.approx(expected, abs=1e-3)
    assert any(score > 0 for score in expected)
    assert all(type(score) is float for score in scorer(pictures, prompts))


def test_clip_scores_do_not_depend_on_the_batch(scorer: Scorer, pictures: torch.Tensor) -> None:
    prompts = ["a red circle", "a blue square", "two green stars"]
    alone = [
        scorer(picture[None], [prompt])[0]
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    assert scorer(pictures, prompts) == alone
    assert len(set(alone)) == 3


def test_a_prompt_beyond_the_model_is_cut_and_still_read(
    scorer: Scorer, pictures: torch.Tensor
) -> None:
    # One-letter words are one token each; 75 of them just fit beside start and end.
    full, other, more = "e " * 75, "i " * 75, "s " * 50
    cut = scorer(pictures[:1], [full])
    assert cut[0] > 0
    assert scorer(pictures[:1], [full + more]) == cut
    assert scorer(pictures[:1], [other + more]) != cut


def test_psnr_is_that_of_the_mean_squared_error(pictures: torch.Tensor) -> None:
    shifted = pictures.clone()
    shifted[1] += 1
    shifted[2] += 10
    decibels = METRICS["psnr"].score(shifted, ["", "", ""], pictures)
    expected = [PSNR_CAP_DB, 20 * math.log10(255), 20 * math.log10(25.5)]
    assert decibels == pytest.approx(expected, abs=1e-4)
    assert json.loads(json.dumps(decibels, allow_nan=False)) == decibels


def test_ssim_of_equal_images_is_one_and_of_unlike_ones_near_zero(pictures: torch.Tensor) -> None:
    ssim = METRICS["ssim"]
    assert ssim.score(pictures, ["", "", ""], pictures) == pytest.approx([1, 1, 1], abs=1e-6)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randint(0, 256, pictures.shape, generator=generator, dtype=torch.uint8)
    assert all(abs(score) < 0.2 for score in ssim.score(noise, ["", "", ""], pictures))


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_more_noise_scores_lower_and_each_image_by_itself(
    pictures: torch.Tensor, name: str
) -> None:
    metric, prompts = METRICS[name], ["", "", ""]
    scores = [metric.score(noisy(pictures, sigma), prompts, pictures) for sigma in (2, 8, 32)]
    for image in range(3):
        assert scores[0][image] > scores[1][image] > scores[2][image]
    alone = metric.score(noisy(pictures, 8)[1:2], [""], pictures[1:2])
    assert alone == pytest.approx(scores[1][1:2], rel=1e-5)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_images_are_compared_with_baseline_images_of_their_shape(
    pictures: torch.Tensor, name: str
) -> None:
    metric = METRICS[name]
    with pytest.raises(ValueError, match="baseline images must be given"):
        metric.score(pictures, ["", "", ""], None)
    with pytest.raises(ValueError, match=r"one shape, got \(3, 3, 32, 32\) and \(2, 3, 32, 32\)"):
        metric.score(pictures, ["", "", ""], pictures[:2])
    with pytest.raises(ValueError, match="must be uint8"):
        metric.score(pictures / 255, ["", "", ""], pictures)


def test_clip_score_takes_bytes_with_a_prompt_each(scorer: Scorer, pictures: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[B, 3, H, W\], got torch.float32"):
        scorer(pictures / 255, ["", "", ""])
    with pytest.raises(ValueError, match="as many prompts as images, got 1 and 3"):
        scorer(pictures, ["a red circle"])
    with pytest.raises(ValueError, match="take it from load_metrics"):
        METRICS["clip_score"].score(pictures, ["", "", ""], None)


CLIP = Scores("clip_score", baseline=(20.0, 30.0, 25.0), accelerated=(19.0, 30.5, 25.0))
SIMILAR = {
    "clip_score": CLIP,
    "psnr": Scores("psnr", baseline=None, accelerated=(24.0, 30.0, 33.0)),
    "ssim": Scores("ssim", baseline=None, accelerated=(0.8, 0.9, 1.0)),
}


@pytest.mark.parametrize(
    ("name", "loss"), [("clip_score", 0.5 / 75), ("psnr", -4.0), ("ssim", 0.1)]
)
def test_the_loss_is_that_of_the_measurement_and_the_mean_over_prompts(
    name: str, loss: float
) -> None:
    metric, scores, budget = METRICS[name], SIMILAR[name], BUDGETS[name]
    assert metric.loss(scores, budget) == pytest.approx(loss)
    losses = metric.losses(scores, budget)
    assert losses.shape == (3,)
    assert losses.dtype == np.float64
    assert losses.mean() == pytest.approx(loss)


def test_clip_losses_test_the_paired_difference_that_the_budget_names() -> None:
    budget = BUDGETS["clip_score"]
    excess = METRICS["clip_score"].losses(CLIP, budget) - budget.max_loss
    baseline, accelerated = np.array(CLIP.baseline), np.array(CLIP.accelerated)
    difference = (1 - budget.max_loss) * baseline - accelerated
    assert excess == pytest.approx(difference / baseline.mean())


def test_a_fall_of_exactly_the_budget_leaves_no_variance() -> None:
    scores = Scores("clip_score", baseline=(20.0, 40.0), accelerated=(19.6, 39.2))
    assert METRICS["clip_score"].losses(scores, BUDGETS["clip_score"]) == pytest.approx([0.02] * 2)


def test_a_scale_changes_no_side_of_the_budget() -> None:
    metric, budget = METRICS["clip_score"], BUDGETS["clip_score"]
    for scores in (CLIP, Scores("clip_score", CLIP.baseline, (19.0, 29.0, 25.5))):
        own = metric.losses(scores, budget)
        assert metric.losses(scores, budget, 25.0) == pytest.approx(own)  # their mean
        for scale in (1.0, 80.0):
            scaled = metric.losses(scores, budget, scale)
            assert scaled - 0.02 == pytest.approx((own - 0.02) * 25 / scale)
            assert (scaled.mean() < 0.02) == (metric.loss(scores, budget) < 0.02)


def test_a_baseline_that_scores_nothing_has_no_relative_loss() -> None:
    scores = Scores("clip_score", baseline=(0.0, 0.0), accelerated=(1.0, 0.0))
    metric, budget = METRICS["clip_score"], BUDGETS["clip_score"]
    for judge in (metric.loss, metric.losses):
        with pytest.raises(TrialError, match="mean clip_score must be > 0"):
            judge(scores, budget)


def test_load_metrics_loads_what_the_budgets_name(
    make_configuration: MakeConfiguration, scorer: Scorer, pictures: torch.Tensor
) -> None:
    configuration = make_configuration(budgets=(BUDGETS["ssim"], BUDGETS["clip_score"]))
    metrics = load_metrics(configuration)
    assert list(metrics) == ["ssim", "clip_score"]
    clip = metrics["clip_score"]
    assert isinstance(clip, ClipScore)
    prompts = ["a red circle", "a blue square", "two green stars"]
    assert clip.score(pictures, prompts, None) == scorer(pictures, prompts)
    assert clip.loss(CLIP, BUDGETS["clip_score"]) == pytest.approx(0.5 / 75)


def test_metrics_that_need_no_clip_load_none(make_configuration: MakeConfiguration) -> None:
    configuration = make_configuration(scoring_model="nobody/nothing")
    assert list(load_metrics(configuration, ["psnr", "ssim"])) == ["psnr", "ssim"]
    with pytest.raises(ModelError):
        load_metrics(configuration, METRICS)
    with pytest.raises(PlanError, match="unknown metric 'psn'; did you mean 'psnr'"):
        load_metrics(configuration, ["psn"])


@pytest.mark.parametrize("model", ["nobody/nothing", "./nothing", "tiny_sd"])
def test_a_scoring_model_that_is_no_clip_is_refused_in_one_line(
    make_configuration: MakeConfiguration, tiny_sd_folder: Path, model: str
) -> None:
    name = str(tiny_sd_folder) if model == "tiny_sd" else model
    with pytest.raises(ModelError, match=r"^(scoring_)?model must be 'shapes', a ") as refusal:
        load_scorer(make_configuration(scoring_model=name))
    assert "\n" not in str(refusal.value)


def test_a_scoring_model_in_pickle_is_refused(
    make_configuration: MakeConfiguration, tiny_clip_folder: Path, tmp_path: Path
) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(tiny_clip_folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    CLIPProcessor.from_pretrained(tiny_clip_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="in safetensors"):
        load_scorer(make_configuration(scoring_model=str(tmp_path)))


def test_loading_and_scoring_print_nothing(
    make_configuration: MakeConfiguration,
    pictures: torch.Tensor,
    capfd: pytest.CaptureFixture[str],
) -> None:
    load_scorer(make_configuration())(pictures[:1], ["many circles " * 20])
    assert capfd.readouterr() == ("", "")
