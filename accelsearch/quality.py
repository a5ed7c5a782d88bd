"""Score images, and hold the scores of baseline and accelerated images against a budget.

| metric     | score   | better | of an image beside | loss                                 |
|------------|---------|--------|--------------------|--------------------------------------|
| clip_score | 0..100  | higher | its prompt         | relative fall of the mean score      |
| psnr       | dB      | higher | the baseline image | `floor_db` - mean PSNR               |
| ssim       | -1..1   | higher | the baseline image | 1 - mean SSIM                        |

The losses are defined in `measurement.score_losses`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from accelsearch.errors import ModelError, PlanError, nearest
from accelsearch.measurement import Scores, score_loss, score_losses
from accelsearch.pipelines import quiet, reason, resolve_device, resolve_model

if TYPE_CHECKING:
    import torch

    from accelsearch.configuration import Budget, Configuration

__all__ = [
    "METRICS",
    "PSNR_CAP_DB",
    "ClipScore",
    "Metric",
    "Psnr",
    "Scorer",
    "Ssim",
    "load_metrics",
    "load_scorer",
]

# The PSNR of equal images is infinite, which JSON cannot hold. One grey level in every 25 000
# values gives 92 dB; no budget can ask for more than 100.
PSNR_CAP_DB = 100.0


class Metric(ABC):
    """A score of single images, and what it loses against a budget."""

    name: ClassVar[str]
    compares: ClassVar[Literal["prompt", "baseline"]]  # what an image is scored beside
    unit: ClassVar[str]

    @abstractmethod
    def score(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        baseline_images: torch.Tensor | None,
    ) -> list[float]:
        """One score for each image; higher is better.

        `images` and `baseline_images` are uint8 [B, 3, H, W], `prompts` has B. A metric that
        compares with the prompt does not look at `baseline_images`, and the other way round.
        """

    def loss(self, scores: Scores, budget: Budget) -> float:
        """The score loss; within the budget where `contract.within(loss, budget.max_loss)`."""
        return score_loss(scores, budget.floor_db)

    def losses(
        self, scores: Scores, budget: Budget, scale: float | None = None
    ) -> NDArray[np.float64]:
        """The part of each prompt in the loss, float64 [prompts], to test against `max_loss`.

        Their mean is `loss`. `scale` is for relative losses alone, and stands in for the mean
        that they are relative to where that depends on the prompts which are tested.
        """
        return score_losses(scores, budget.floor_db)


@dataclass(frozen=True)
class ClipScore(Metric):
    """100 x the cosine of CLIP's embeddings of image and prompt, and 0 where that is negative.

    Source: Hessel et al., CLIPScore, EMNLP 2021, as computed by torchmetrics.
    """

    scorer: Scorer | None = None

    name = "clip_score"
    compares = "prompt"
    unit = "0..100"

    def score(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        baseline_images: torch.Tensor | None,
    ) -> list[float]:
        if self.scorer is None:
            raise ValueError("clip_score needs a scorer to score; take it from load_metrics")
        return self.scorer(images, prompts)

    def losses(
        self, scores: Scores, budget: Budget, scale: float | None = None
    ) -> NDArray[np.float64]:
        """The part of each prompt in the loss, float64 [prompts], to test against `max_loss`.

        loss_i = max_loss + ((1 - max_loss) baseline_i - accelerated_i) / scale: a test of it is
        one of paired differences, whose mean is below 0 exactly where the budget is kept, however
        large the scale. Not so the relative falls themselves: their mean rests on the mean
        baseline score, which is one of the prompts seen (Fieller).

        `scale` > 0 must not depend on the prompts that are tested: the mean baseline score over
        all prompts, or over others. None: of these prompts, so that the mean is `loss`.

        Raises:
            TrialError: the baseline's mean score is 0 and no scale is given.
        """
        baseline = np.asarray(scores.baseline, dtype=np.float64)
        if scale is None:
            losses = score_losses(scores)  # refuses a mean of 0
            scale = float(baseline.mean())
            share: NDArray[np.float64] = baseline / scale
            return losses + budget.max_loss * (1 - share)
        excess: NDArray[np.float64] = (1 - budget.max_loss) * baseline - scores.accelerated
        return budget.max_loss + excess / scale


@dataclass(frozen=True)
class Psnr(Metric):
    """Peak signal-to-noise ratio of an image beside its baseline image, in dB, 100 at most."""

    name = "psnr"
    compares = "baseline"
    unit = "dB"

    def score(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        baseline_images: torch.Tensor | None,
    ) -> list[float]:
        from torchmetrics.functional.image import peak_signal_noise_ratio

        baseline = _paired(images, baseline_images)
        decibels: torch.Tensor = peak_signal_noise_ratio(
            images.float(), baseline.float(), data_range=255.0, reduction="none", dim=(1, 2, 3)
        )
        return [float(value) for value in decibels.clamp(max=PSNR_CAP_DB)]


@dataclass(frozen=True)
class Ssim(Metric):
    """Structural similarity of an image to its baseline image; 1 where they are equal.

    Source: Wang et al., IEEE TIP 13(4), 2004, with its Gaussian window, as in torchmetrics.
    """

    name = "ssim"
    compares = "baseline"
    unit = "-1..1"

    def score(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        baseline_images: torch.Tensor | None,
    ) -> list[float]:
        from torchmetrics.functional.image import structural_similarity_index_measure

        baseline = _paired(images, baseline_images)
        similarity = structural_similarity_index_measure(
            images.float() / 255, baseline.float() / 255, data_range=1.0, reduction="none"
        )
        return [float(value) for value in similarity]


class Scorer:
    """A CLIP model on its device that scores images beside their prompts."""

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self._model = _Pooled(model.to(device))
        self._processor = processor
        self._device = device
        self._tokens = model.config.text_config.max_position_embeddings

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        """Scores in 0..100 of images, uint8 [B, 3, H, W], beside their B prompts.

        A prompt too long for the model is cut to what it can read.
        """
        import torch
        from torchmetrics.functional.multimodal import clip_score

        _checked(images)
        if len(images) != len(prompts):
            raise ValueError(f"as many prompts as images, got {len(prompts)} and {len(images)}")
        # One by one, because torchmetrics averages over what it is given.
        with torch.inference_mode():
            return [
                float(
                    clip_score(
                        image.to(self._device),
                        prompt,
                        model_name_or_path=lambda: (self._model, self._process),
                    )
                )
                for image, prompt in zip(images, prompts, strict=True)
            ]

    def _process(self, **arguments: Any) -> Any:
        if "text" in arguments:
            # torchmetrics cuts long prompts by itself, but with them the end token, where CLIP
            # reads its embedding: every long prompt would have the same one.
            arguments |= {"truncation": True, "max_length": self._tokens}
        return self._processor(**arguments)


# Ready for `loss` and `losses`; to `score`, clip_score needs the scorer that load_metrics gives it.
METRICS: dict[str, Metric] = {metric.name: metric for metric in (ClipScore(), Psnr(), Ssim())}


def load_metrics(
    configuration: Configuration, names: Iterable[str] | None = None
) -> dict[str, Metric]:
    """The metrics of these names, by default those of the budgets, each ready to score.

    Raises:
        PlanError: a metric is unknown.
        ModelError: the scoring model cannot be loaded; it is loaded for clip_score alone.
    """
    if names is None:
        names = [budget.metric for budget in configuration.budgets]
    metrics: dict[str, Metric] = {}
    for name in names:
        if name not in METRICS:
            raise PlanError(f"unknown metric {name!r}{nearest(name, METRICS)}")
        metrics[name] = METRICS[name]
        if name == ClipScore.name:
            metrics[name] = ClipScore(load_scorer(configuration))
    return metrics


def load_scorer(configuration: Configuration) -> Scorer:
    """The configuration's scoring model, a CLIP in float32, on the configuration's device.

    Raises:
        ModelError: it cannot be had, or is no CLIP in safetensors.
    """
    import torch

    model = configuration.scoring_model
    device = resolve_device(configuration.device)
    folder = resolve_model(model, "clip")
    try:
        if folder is None:
            from huggingface_hub import snapshot_download

            # Apart from loading, since a download should show its progress.
            patterns = ["*.json", "*.txt", "model*.safetensors"]
            folder = Path(snapshot_download(model, allow_patterns=patterns))
        with quiet():
            from transformers import CLIPModel, CLIPProcessor

            clip = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            processor = CLIPProcessor.from_pretrained(folder)
    except Exception as error:
        raise ModelError(
            "scoring_model must be 'shapes', a CLIP folder in safetensors or a hub id that can be "
            f"downloaded, got {model!r}: {reason(error)}"
        ) from error
    return Scorer(clip.eval().requires_grad_(False), processor, device)


class _Pooled:
    """CLIP with features as plain tensors, which torchmetrics expects.

    Since transformers 5 the features come inside of a model output.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = model.config

    def to(self, device: torch.device) -> _Pooled:
        self._model.to(device)
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        return self._model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self._model.get_text_features(input_ids, attention_mask).pooler_output


def _paired(images: torch.Tensor, baseline_images: torch.Tensor | None) -> torch.Tensor:
    if baseline_images is None:
        raise ValueError("baseline images must be given, got none")
    _checked(images)
    _checked(baseline_images)
    if images.shape != baseline_images.shape:
        raise ValueError(
            "images and baseline images must have one shape, "
            f"got {tuple(images.shape)} and {tuple(baseline_images.shape)}"
        )
    return baseline_images


def _checked(images: torch.Tensor) -> None:
    import torch

    # Floats would be scored without complaint, as nearly black images.
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 [B, 3, H, W], got {images.dtype} {tuple(images.shape)}"
        )
