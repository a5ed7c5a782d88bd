"""Sentences: what is understood, and that nothing is guessed."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accelsearch.codegen import Task, parse
from accelsearch.codegen.parse import METHODS, PIPELINES, SCHEDULERS
from accelsearch.contract import Key
from accelsearch.errors import TaskError

STRICT = (
    "Generate a StableDiffusionPipeline pipeline using the DDIMScheduler sampler with 50 steps, "
    "accelerated by deepcache with 4.40x speedup and precision loss not exceeding 0.02."
)
TASK = Task("StableDiffusionPipeline", "DDIMScheduler", 50, ("deepcache",), 4.4, 0.02)
SDXL = Task("StableDiffusionXLPipeline", "DDIMScheduler", 30, ("deepcache", "tgate"), 4, 0.02)


def changed(task: Task, **fields: Any) -> Task:
    return Task(**{**vars(task), **fields})


def refused(sentence: str, *keys: Key) -> str:
    with pytest.raises(TaskError) as error:
        parse(sentence, keys)
    told = str(error.value)
    assert len(told.splitlines()) == 1
    return told


def test_the_sentence_of_the_contract_is_understood() -> None:
    assert parse(STRICT) == TASK
    assert TASK.sentence == STRICT


@given(
    st.builds(
        Task,
        pipeline=st.sampled_from(PIPELINES),
        scheduler=st.sampled_from(SCHEDULERS),
        steps=st.integers(1, 10**6),
        methods=st.lists(st.sampled_from(METHODS), min_size=1, unique=True).map(tuple),
        speedup=st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False),
        max_loss=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
    )
)
@example(TASK)
def test_every_task_comes_back_from_its_sentence(task: Task) -> None:
    assert parse(task.sentence) == task


@pytest.mark.parametrize(
    ("sentence", "task"),
    [
        ("SD1.5, DDIM, 50 steps, DeepCache, 4.4x, 2 %", TASK),
        ("SD 1.5, DDIM, 50 steps, DeepCache, 4.4x, 0.02", TASK),
        ("stable diffusion v1.5 ddim 50-step deep cache 4.4 times faster, 2% loss", TASK),
        ("SDXL, DDIM, 30 steps, DeepCache + T-GATE, 4x, loss at most 2 %", SDXL),
        ("4x speedup of SDXL by T-GATE and DeepCache (DDIM, 30 steps; quality loss ≤ 2 %)", SDXL),
        (
            "With precision loss not exceeding 0.02 and 4x speedup, generate an SDXL pipeline "
            "accelerated by DeepCache & TGATE, using the DDIM sampler with 30 steps.",
            SDXL,
        ),
        (
            "Generate a SDXL pipeline using the DDIM sampler with 30 steps, accelerated by "
            "DeepCache + T-GATE with 4x speedup and precision loss not exceeding 2%.",
            SDXL,
        ),
        (
            "stable-diffusion-xl, euler, steps=28, deep-cache, speedup >= 3, loss < 0.03",
            Task(
                "StableDiffusionXLPipeline", "EulerDiscreteScheduler", 28, ("deepcache",), 3, 0.03
            ),
        ),
        (
            "SD1.5 DPM++ 2M 25 steps ToMe and torch.compile with at least 2.5×, at most 1.5 % loss",
            Task(
                "StableDiffusionPipeline",
                "DPMSolverMultistepScheduler",
                25,
                ("compile", "tome"),
                2.5,
                0.015,
            ),
        ),
        (
            "PixArt-Σ, Euler a, 20 steps, T-GATE, 2x, 7 percent",
            Task("PixArtSigmaPipeline", "EulerAncestralDiscreteScheduler", 20, ("tgate",), 2, 0.07),
        ),
        (
            "PixArt-alpha, Euler, a script, 20 steps, T-GATE, 2x, 7 percent",
            Task("PixArtAlphaPipeline", "EulerDiscreteScheduler", 20, ("tgate",), 2, 0.07),
        ),
    ],
)
def test_looser_sentences_are_understood(sentence: str, task: Task) -> None:
    assert parse(sentence) == task
    assert parse(sentence.upper()) == task
    assert parse(f"  Please {sentence}\n") == task


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("", "empty line"),
        (" \t", "empty line"),
        ("SDXL DDIM 20 steps deepcache", "must name a speedup, such as 4.4x; a largest loss"),
        ("DDIM 20 steps deepcache 4x 2 %", "must name a pipeline"),
        ("SDXL 20 steps deepcache 4x 2 %", "must name a scheduler"),
        ("SDXL DDIM deepcache 4x 2 %", "must name a number of steps"),
        ("SDXL DDIM 20 steps 4x 2 %", "must name a method"),
        ("SDXL DDIM 20 steps deepcache 2x 3x 2 %", "one speedup, got 2.0 and 3.0"),
        ("SDXL DDIM 20 steps deepcache 2x 2 % loss 0.03", "one loss"),
        ("SDXL SD1.5 DDIM 20 steps deepcache 2x 2 %", "one pipeline"),
        ("SDXL DDIM Euler 20 steps deepcache 2x 2 %", "one scheduler"),
        ("SDXL DDIM 20 steps 30 steps deepcache 2x 2 %", "one number of steps"),
        # What would turn the meaning round, or add to it.
        ("SDXL DDIM 20 steps without deepcache tome 4x 2 %", "got 'without'"),
        ("SDXL DDIM 20 steps deepcache 4x loss more than 2 %", "got 'loss'"),
        ("SDXL DDIM 20 steps deepcache no 4x 2 %", "got 'no'"),
        ("Stable Diffusion 1.5, DPM++ 2M Karras, 20 steps, deepcache, 3x, 2 %", "got 'karras'"),
        ("SD2.1, DDIM, 20 steps, deepcache, 2x, 2 %", "got 'sd2.1'"),
        ("SDXL at 512x512, DDIM, 20 steps, deepcache, 2x, 2 %", "got '512x512'"),
        ("SDXL DDIM 20 steps deepcache 4,4x 2 %", "got '4'"),
        ("SDXL DDIM 20 steps deepcache 4-5x 2 %", "got '4-5x'"),
        ("SDXL DDIM 20 steps deepcache -4x 2 %", "got '4x'"),
        ("SDXL DDIM 20 steps deepcache 4x loss -0.02", "got 'loss'"),
        ("SDXL DDIM 20.5 steps deepcache 4x 2 %", "got '20.5'"),
        ("SDXL DDIM 20 steps deepcache 4x 3 0.02", "got '3'"),
        ("SDXL DDIM 20 steps deepcach 4x 2 %", "did you mean 'deepcache'?"),
        ("FluxPipeline DDIM 20 steps deepcache 4x 2 %", "got 'fluxpipeline'"),
        (STRICT.replace("StableDiffusionPipeline", "FluxPipeline"), "unknown pipeline"),
        (STRICT.replace("DDIMScheduler", "DDIMSchedular"), "did you mean 'DDIMScheduler'"),
        (STRICT.replace("deepcache", "deepcach"), "unknown method 'deepcach'; did you mean"),
        (STRICT.replace("deepcache", "deepcache + deepcache"), "must not repeat"),
        (STRICT.replace("4.40x", "0x"), "speedup must be > 0"),
        (STRICT.replace("4.40x", "1e999x"), "must be a finite number"),
        (STRICT.replace("50 steps", f"{'9' * 1000} steps"), "at most"),
        (STRICT * 20, "at most 2000 characters"),
        ("PixArt, DDIM, 20 steps, T-GATE, 2x, 2 %", "PixArtAlphaPipeline or PixArtSigmaPipeline"),
    ],
)
def test_what_is_not_understood_is_told_in_one_line(sentence: str, told: str) -> None:
    if told == "at most":
        # A number of steps that nobody can mean is still a number.
        assert parse(sentence).steps == int("9" * 1000)
        return
    assert told in refused(sentence)


def test_a_name_of_several_pipelines_means_the_one_that_is_stored() -> None:
    sentence = "PixArt, DDIM, 20 steps, T-GATE, 2x, 2 %"
    sigma = Key("PixArtSigmaPipeline", "DDIMScheduler", 20, 2.0, 0.02, ("tgate",))
    alpha = Key("PixArtAlphaPipeline", "DDIMScheduler", 20, 2.0, 0.02, ("tgate",))
    assert parse(sentence, [sigma]).pipeline == "PixArtSigmaPipeline"
    assert "this may mean" in refused(sentence, sigma, alpha)


def test_names_of_stored_keys_are_understood() -> None:
    key = Key("FluxPipeline", "FlowMatchEulerDiscreteScheduler", 4, 2.0, 0.02, ("mid-skip",))
    wanted = Task("FluxPipeline", "FlowMatchEulerDiscreteScheduler", 4, ("mid-skip",), 1.5, 0.02)
    assert parse(wanted.sentence, [key]) == wanted
    loose = "fluxpipeline FlowMatchEulerDiscreteScheduler 4 steps mid-skip 1.5x 2 %"
    assert parse(loose, [key]) == wanted
    assert "unknown pipeline" in refused(wanted.sentence)


WORDS = st.sampled_from(
    re.findall(
        r"\S+|\n",
        "SDXL SD1.5 DDIM Euler DPM++ 50 steps 4x 4.4 x 2 % 0.02"
        " deepcache T-GATE + , loss not exceeding < = at most 1e9 \n",
    )
)


@given(st.one_of(st.text(), st.lists(WORDS).map(" ".join), st.lists(WORDS).map("".join)))
@example("loss " + "<=" * 900)
@example("<" * 1000 + "=" * 900)
@example("loss of is be" * 150)
@example("0" * 2000)
@example("ﬀ²½１０x ％")
def test_any_text_is_a_task_or_one_line(sentence: str) -> None:
    started = time.perf_counter()
    try:
        assert isinstance(parse(sentence), Task)
    except TaskError as error:
        assert len(str(error).splitlines()) == 1
    assert time.perf_counter() - started < 2


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(TaskError, match="must be a sentence, got 5"):
        parse(5)  # type: ignore[arg-type]
