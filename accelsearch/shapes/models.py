"""The untrained parts of the bundled model: sizes and configurations, in one place.

Everything is the architecture of Stable Diffusion 1.5 with fewer channels: four down and up
blocks, cross-attention in three of them, two layers a block, an 8x VAE and a CLIP text encoder.
"""

from __future__ import annotations

import itertools

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from accelsearch.shapes import scenes

TOKENS = 32
"""Length that prompts are padded and cut to; the longest caption takes 18."""
WIDTH = 128
"""Width of the text encoder, and so of the UNet's cross-attention."""


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of a caption is one token and any text can be spelt.

    The ids are the same each time: those that a trained model knows. A learnt vocabulary is not,
    since ties between pairs of letters are broken at random.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{symbol}{_END}" for symbol in symbols]
    merges = _merges(scenes.vocabulary())
    base = CLIPTokenizer()
    tokens = [base.bos_token, base.eos_token, *symbols, *endings, *map("".join, merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


_END = "</w>"  # marks a letter that ends its word


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word one token, in the order in which they are applied."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}{_END}"]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            # What earlier words merge comes first, as it will when the word is read.
            pair = min(pairs, key=lambda one: ranks.get(one, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            first = pairs.index(pair)
            pieces[first : first + 2] = ["".join(pair)]
    return list(ranks)


def clip(tokens: CLIPTokenizer) -> CLIPModel:
    """The scoring model; its text half is also the pipeline's text encoder."""
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    # An eos_token_id of 2 would make transformers pool at the highest token id, not at the end.
    if tokens.eos_token_id == 2:
        raise AssertionError("the end-of-text token must not have id 2")
    text = {
        "vocab_size": len(tokens),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    vision = {"image_size": scenes.SIDE, "patch_size": 16}
    return CLIPModel(
        CLIPConfig(
            text_config={**shared, **text},
            vision_config={**shared, **vision},
            projection_dim=WIDTH,
        )
    )


def clip_processor(tokens: CLIPTokenizer) -> CLIPProcessor:
    """What scores 0..255 images of any size with `clip`."""
    side = {"height": scenes.SIDE, "width": scenes.SIDE}
    images = CLIPImageProcessor(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(images, tokens)


def vae() -> AutoencoderKL:
    """128 px images to 4 x 16 x 16 latents and back."""
    return AutoencoderKL(
        block_out_channels=(32, 48, 80, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=scenes.SIDE,
        scaling_factor=1.0,
    )


def unet() -> UNet2DConditionModel:
    """8.9 million parameters; heads of 16 channels, which fused attention kernels accept."""
    return UNet2DConditionModel(
        sample_size=scenes.SIDE // 8,
        block_out_channels=(48, 96, 112, 112),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=(3, 6, 7, 7),
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """v-prediction with linear betas: epsilon prediction learns no flat backgrounds."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
