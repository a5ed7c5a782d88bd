"""Published architectures at full size, without their weights: what they cost depends on nothing
else.

Made on torch's meta device they take no memory, and tell what a method can do on such a pipeline;
made on a GPU, with random weights, they tell how fast it is there. The numbers are those of the
checkpoints' own configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelsearch.errors import ModelError, UnsupportedError, nearest
from accelsearch.methods import METHODS, Parameter, Run

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = ["ARCHITECTURES", "Architecture", "build", "run_of", "spaces_of"]


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint is built of; `text` is the width and the number of its text tokens."""

    checkpoint: str  # whose configs these are
    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: tuple[int, int]
    resolution: int
    guidance_scale: float


_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
    "sample_size": 128,
}

ARCHITECTURES: dict[str, Architecture] = {
    "StableDiffusionPipeline": Architecture(
        checkpoint="stable-diffusion-v1-5/stable-diffusion-v1-5",
        denoiser={
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        vae=_VAE | {"scaling_factor": 0.18215, "sample_size": 512},
        text=(768, 77),
        resolution=512,
        guidance_scale=7.5,
    ),
    "StableDiffusionXLPipeline": Architecture(
        checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
        denoiser={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            "layers_per_block": 2,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae=_VAE | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
        text=(2048, 77),
        resolution=1024,
        guidance_scale=5.0,
    ),
    "PixArtAlphaPipeline": Architecture(
        checkpoint="PixArt-alpha/PixArt-XL-2-1024-MS",
        denoiser=_PIXART | {"use_additional_conditions": True},
        vae=_VAE | {"scaling_factor": 0.18215, "sample_size": 512},
        text=(4096, 120),
        resolution=1024,
        guidance_scale=4.5,
    ),
    "PixArtSigmaPipeline": Architecture(
        checkpoint="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        denoiser=_PIXART | {"use_additional_conditions": False},
        vae=_VAE | {"scaling_factor": 0.13025, "sample_size": 1024},
        text=(4096, 300),
        resolution=1024,
        guidance_scale=4.5,
    ),
}


def build(
    pipeline: str, device: torch.device, dtype: torch.dtype, *, seed: int = 0
) -> DiffusionPipeline:
    """A pipeline of this class at full size, with random weights and without its text encoders.

    It takes `prompt_embeds`, and has a DDIMScheduler.

    Raises:
        ModelError: no architecture of that name is known here.
    """
    import diffusers
    import torch

    from accelsearch.pipelines import quiet

    if pipeline not in ARCHITECTURES:
        raise ModelError(
            f"pipeline must be one whose architecture is known, got {pipeline!r}"
            f"{nearest(pipeline, ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[pipeline]
    torch.manual_seed(seed)
    # On the device itself: a billion random numbers take minutes on a CPU.
    with quiet(), device:
        is_unet = "down_block_types" in architecture.denoiser
        part, kind = (
            ("unet", diffusers.UNet2DConditionModel)
            if is_unet
            else ("transformer", diffusers.PixArtTransformer2DModel)
        )
        denoiser = kind(**architecture.denoiser).to(dtype).eval().requires_grad_(False)
        vae = diffusers.AutoencoderKL(**architecture.vae).to(dtype).eval().requires_grad_(False)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if pipeline == "StableDiffusionPipeline":
        parts |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    elif pipeline == "StableDiffusionXLPipeline":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    with quiet():
        made: DiffusionPipeline = getattr(diffusers, pipeline)(
            **{part: denoiser, "vae": vae, "scheduler": scheduler}, **parts
        )
    made.set_progress_bar_config(disable=True)
    return made


def run_of(pipeline: str, *, steps: int = 50, batch_size: int = 1, seed: int = 0) -> Run:
    """The facts of calls of that pipeline at its usual resolution and guidance."""
    architecture = ARCHITECTURES[pipeline]
    return Run(
        steps=steps,
        guidance_scale=architecture.guidance_scale,
        batch_size=batch_size,
        height=architecture.resolution,
        width=architecture.resolution,
        scheduler="DDIMScheduler",
        seed=seed,
    )


def spaces_of(
    pipeline: str, steps: int = 50
) -> tuple[dict[str, tuple[Parameter, ...]], dict[str, str]]:
    """What each method can do on that pipeline at full size, and why the others can do nothing.

    Raises:
        ModelError: no architecture of that name is known here.
    """
    import torch

    made = build(pipeline, torch.device("meta"), torch.float16)
    run = run_of(pipeline, steps=steps)
    spaces, refused = {}, {}
    for name, method in METHODS.items():
        try:
            method.check(made, run)
            spaces[name] = method.space(made, run)
        except UnsupportedError as error:
            refused[name] = str(error)
    return spaces, refused
