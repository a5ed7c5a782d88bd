"""The untrained parts of the bundled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from accelsearch.shapes import models, scenes


@pytest.fixture(scope="module")
def tokens() -> Any:
    return models.tokenizer()


def test_every_word_of_a_caption_is_one_token(tokens: Any) -> None:
    words = scenes.vocabulary()
    ids = [tokens(word, add_special_tokens=False).input_ids for word in words]
    assert {word: len(found) for word, found in zip(words, ids, strict=True)} == dict.fromkeys(
        words, 1
    )
    assert len({found[0] for found in ids}) == len(words)


def test_any_text_can_be_spelt(tokens: Any) -> None:
    for text in ("a photograph of zürich, 2026!", "quartz", "赤い円"):
        ids = tokens(text, add_special_tokens=False).input_ids
        assert tokens.unk_token_id not in ids
        assert tokens.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_the_tokenizer_is_the_same_every_time(tokens: Any) -> None:
    assert models.tokenizer().get_vocab() == tokens.get_vocab()


def test_captions_fit_into_the_model_with_their_end(tokens: Any) -> None:
    longest = "a large solid red star left of a small striped blue ring on a white background"
    ids = tokens(longest).input_ids
    assert ids[0] == tokens.bos_token_id
    assert ids[-1] == tokens.eos_token_id
    assert len(ids) == 18 < models.TOKENS == tokens.model_max_length
    lengths = [len(one) for one in tokens(scenes.captions(scenes.sample(2000, seed=1))).input_ids]
    assert max(lengths) == 18


def test_the_end_of_text_has_not_the_id_that_makes_clip_pool_elsewhere(tokens: Any) -> None:
    assert models.clip(tokens).config.text_config.eos_token_id == tokens.eos_token_id != 2


def test_clip_is_refused_where_the_end_of_text_has_id_2() -> None:
    names = ["<|startoftext|>", "!", "<|endoftext|>", *sorted(ByteLevel.alphabet())]
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    with pytest.raises(AssertionError, match="must not have id 2"):
        models.clip(CLIPTokenizer(vocab=vocab, merges=[]))


@torch.no_grad()
def test_the_text_is_pooled_at_its_end(tokens: Any) -> None:
    text = models.clip(tokens).text_model.eval()
    captions = scenes.captions(scenes.sample(6, seed=2))
    assert len({len(caption.split()) for caption in captions}) > 1
    ids = tokens(captions, padding="max_length", return_tensors="pt").input_ids
    found = text(ids)
    ends = (ids == tokens.eos_token_id).int().argmax(1)
    assert torch.equal(found.pooler_output, found.last_hidden_state[range(6), ends])
    # A causal model: only there does it know the last words.
    other = [caption.rsplit(" ", 2)[0] + " purple ring" for caption in captions]
    changed = text(tokens(other, padding="max_length", return_tensors="pt").input_ids)
    assert (changed.pooler_output - found.pooler_output).abs().amax(1).min() > 1e-4


def test_the_processor_scales_0_to_255_to_plus_minus_one_at_any_size(tokens: Any) -> None:
    processor = models.clip_processor(tokens)
    table = scenes.sample(2, seed=3)
    images = (scenes.draw(table) * 255).round().to(torch.uint8)
    inputs = processor(
        text=scenes.captions(table), images=list(images), return_tensors="pt", padding=True
    )
    assert torch.allclose(inputs["pixel_values"], images / 127.5 - 1, atol=1e-5)
    assert len(inputs["input_ids"]) == 2
    wide = torch.full((3, 64, 96), 255, dtype=torch.uint8)
    assert torch.equal(
        processor(images=[wide], return_tensors="pt")["pixel_values"], torch.ones(1, 3, 128, 128)
    )


@torch.no_grad()
def test_the_vae_takes_128_px_to_16_x_16_latents_and_back() -> None:
    vae = models.vae().eval()
    latents = vae.encode(torch.zeros(1, 3, scenes.SIDE, scenes.SIDE)).latent_dist.mode()
    assert latents.shape == (1, 4, 16, 16)
    assert vae.decode(latents).sample.shape == (1, 3, scenes.SIDE, scenes.SIDE)


@torch.no_grad()
def test_the_unet_takes_the_latents_and_the_text_states() -> None:
    unet = models.unet().eval()
    latents = torch.zeros(1, 4, 16, 16)
    states = torch.zeros(1, models.TOKENS, models.WIDTH)
    assert unet(latents, 10, states).sample.shape == latents.shape
    assert sum(one.numel() for one in unet.parameters()) == pytest.approx(8.9e6, rel=0.01)


def test_the_scheduler_predicts_v_and_ends_in_almost_pure_noise() -> None:
    scheduler = models.scheduler()
    assert scheduler.config.prediction_type == "v_prediction"
    assert 0 < scheduler.alphas_cumprod[-1] < 1e-4
    # Pure noise is where sampling starts, so the last training timestep must be among the steps.
    scheduler.set_timesteps(15)
    assert scheduler.timesteps[0] == 999
