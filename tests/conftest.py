"""Tiny pipelines and a tiny CLIP with random weights, built from configs in memory: no network."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the first import of a Hugging Face library, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# How long an example takes says nothing on a busy machine, and a failure is to be seen again.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 16
# The schedule of SD 1.5, and of SDXL. A random UNet predicts noise under it well enough.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

MakePipeline = Callable[..., Any]
MakeConfiguration = Callable[..., Any]


@pytest.fixture(scope="session")
def make_pipeline() -> MakePipeline:
    """`make_pipeline(kind="sd", scheduler="DDIMScheduler")`: a pipeline of the caller's own.

    `kind` is "sd", "sdxl", "pixart_alpha" or "pixart_sigma". Its weights are the same at every
    call, and no two pipelines share a module.
    """
    components: dict[str, dict[str, Any]] = {}

    def make(kind: str = "sd", scheduler: str = "DDIMScheduler") -> Any:
        import diffusers

        if kind not in components:
            build = {"sd": _sd_components, "sdxl": _sdxl_components}
            components[kind] = build.get(kind, _pixart_components)()
        parts = {
            name: copy.deepcopy(part) if isinstance(part, torch.nn.Module) else part
            for name, part in components[kind].items()
        }
        base = diffusers.DDIMScheduler(**SCHEDULE)
        parts["scheduler"] = getattr(diffusers, scheduler).from_config(base.config)
        if kind == "sd":
            pipeline = diffusers.StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        elif kind == "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            name = {"pixart_alpha": "PixArtAlphaPipeline", "pixart_sigma": "PixArtSigmaPipeline"}
            pipeline = getattr(diffusers, name[kind])(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def tiny_sd_folder(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusionPipeline in safetensors, with a DDIMScheduler."""
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    make_pipeline("sd").save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusionXLPipeline in safetensors, with a DDIMScheduler."""
    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    make_pipeline("sdxl").save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved CLIPModel with its CLIPProcessor: images of 16 px, texts of up to 77 tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("tiny") / "clip"
    tokenizer = _tokenizer()
    vision = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(19)  # it likes every picture: few scores are cut off at 0
    model = CLIPModel(
        CLIPConfig(
            text_config=_text_config(tokenizer).to_dict(),
            vision_config=vision,
            projection_dim=TEXT_WIDTH,
        )
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model.eval().save_pretrained(folder, safe_serialization=True)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_configuration(tiny_sd_folder: Path, tiny_clip_folder: Path) -> MakeConfiguration:
    """`make_configuration(**fields)`: a configuration of the tiny SD, four steps at 32 px."""

    def make(**fields: Any) -> Any:
        from accelsearch.configuration import Budget, Configuration

        defaults: dict[str, Any] = {
            "model": str(tiny_sd_folder),
            "scheduler": "DDIMScheduler",
            "steps": 4,
            "methods": ("deepcache",),
            "budgets": (Budget(metric="clip_score", max_loss=0.02),),
            "prompts": ("a red circle", "a blue square", "two green stars"),
            "prompts_name": "three",
            "height": 32,
            "width": 32,
            "guidance_scale": 4.0,
            "device": "cpu",
            "scoring_model": str(tiny_clip_folder),
        }
        return Configuration(**(defaults | fields))

    return make


def _sd_components() -> dict[str, Any]:
    """Four blocks of two resnets each, as SD 1.5 has them: DeepCache branches 0..11."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(_text_config(tokenizer)).eval()
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    return {"vae": _vae(), "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}


def _sdxl_components() -> dict[str, Any]:
    """Three blocks of two resnets each, as SDXL has them: DeepCache branches 0..8."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(_text_config(tokenizer)).eval()
    text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer)).eval()
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
    ).eval()
    return {
        "vae": _vae(),
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": unet,
    }


def _pixart_components() -> dict[str, Any]:
    """Two transformer blocks. The tokenizer is CLIP's: T5's own would have to be trained."""
    from diffusers import PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=2 * TEXT_WIDTH,
            num_layers=1,
            num_heads=2,
        )
    ).eval()
    torch.manual_seed(1)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=TEXT_WIDTH,
        in_channels=4,
        out_channels=8,
        patch_size=2,
    ).eval()
    return {
        "vae": _vae(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }


def _vae() -> Any:
    """Four pixels to the latent, a quarter of the usual side: cheap and still convolutional."""
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def _tokenizer() -> Any:
    """CLIP's tokenizer over single bytes: knows every text, and needs no file."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def _text_config(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="session")
def postgres() -> Any:
    """A PostgreSQL server of these tests' own; skips where none is installed."""
    from tests.servers import postgres_server

    with postgres_server() as server:
        yield server
