"""Plan files: what they expand to, and the one line that tells what is wrong with them."""

import gc
import hashlib
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import accelsearch
from accelsearch import configuration as module
from accelsearch.configuration import (
    Budget,
    Configuration,
    Plan,
    Range,
    load_plan,
    read_prompts,
)
from accelsearch.contract import Key
from accelsearch.errors import PlanError
from accelsearch.judging import check_held_out

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "studies").glob("*.toml"))

MINIMAL = """
model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
methods = [["deepcache"]]
budgets = [{ metric = "clip_score", max_loss = 0.02 }]
"""
FULL = """
model = "some/checkpoint"
revision = "main"
variant = "fp16"
pipeline = "StableDiffusionXLPipeline"
schedulers = ["EulerDiscreteScheduler", "DDIMScheduler"]
steps = [50, 20]
methods = [["deepcache"], []]
budgets = [{ metric = "ssim", max_loss = 0 }, { metric = "psnr", floor_db = 25 }]
prompts = "own.txt"
images = 2
held_out_images = 2
batch_size = 2
resolution = [832, 1216]
guidance_scale = 5
negative_prompt = "blurry"
dtype = "bfloat16"
device = "cuda:1"
seed = 3
scoring_model = "openai/clip-vit-base-patch32"
[search]
trials = 7
timeout_s = 60
sampler = "grid"
seed = 4
[latency]
min_pairs = 8
max_pairs = 12
precision = 0.05
warmup = 2
[space]
cache_interval = [2, 3, 5]
cache_branch_id = { low = 0, high = 5 }
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a plan, and beside it a list of four prompts, and returns the plan's path."""
    (tmp_path / "own.txt").write_text("a cat\na dog\na cow\na hen\n", encoding="utf-8")

    def plan(text: str | bytes, name: str = "plan.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return plan


def refusal(path: Path, overrides: dict[str, Any] | None = None) -> str:
    """What `load_plan` says after the path of the plan."""
    with pytest.raises(PlanError) as error:
        load_plan(path, overrides)
    told = str(error.value)
    assert told.startswith(f"{path}: ")
    assert "\n" not in told
    return told.removeprefix(f"{path}: ")


# What a plan means


def test_a_plan_needs_three_keys_alone(write: Write) -> None:
    (cell,) = load_plan(write(MINIMAL)).configurations()
    assert (cell.pipeline, cell.scheduler, cell.steps) == (
        "StableDiffusionPipeline",
        "DDIMScheduler",
        20,
    )
    assert (cell.height, cell.width, cell.guidance_scale) == (512, 512, 7.5)
    assert (cell.prompts_name, cell.images, cell.dtype) == ("photo", 24, "float32")
    assert cell.scoring_model == "openai/clip-vit-large-patch14"
    assert (cell.search.trials, cell.search.timeout_s, cell.search.sampler) == (
        30,
        None,
        "guided",
    )
    assert cell.held_out_prompts == ()
    assert (cell.latency.min_pairs, cell.latency.max_pairs) == (6, 40)
    assert cell.space == {}


def test_every_key_of_a_plan_reaches_its_configurations(write: Write) -> None:
    path = write(FULL)
    assert set(tomllib.loads(FULL)) == set(Plan.model_fields)
    first = load_plan(path).configurations()[0]
    assert (first.model, first.revision, first.variant) == ("some/checkpoint", "main", "fp16")
    assert (first.pipeline, first.scheduler, first.steps, first.methods) == (
        "StableDiffusionXLPipeline",
        "EulerDiscreteScheduler",
        50,
        ("deepcache",),
    )
    assert first.budgets == (
        Budget(metric="ssim", max_loss=0.0),
        Budget(metric="psnr", floor_db=25.0),
    )
    assert (first.prompts, first.prompts_name, first.images) == (("a cat", "a dog"), "own.txt", 2)
    assert first.held_out_prompts == ("a cow", "a hen")
    assert (first.batch_size, first.height, first.width) == (2, 832, 1216)
    assert (first.guidance_scale, first.negative_prompt) == (5.0, "blurry")
    assert (first.dtype, first.device, first.seed) == ("bfloat16", "cuda:1", 3)
    assert first.scoring_model == "openai/clip-vit-base-patch32"
    assert (first.search.trials, first.search.timeout_s) == (7, 60.0)
    assert (first.search.sampler, first.search.seed) == ("grid", 4)
    assert (first.latency.min_pairs, first.latency.max_pairs) == (8, 12)
    assert (first.latency.precision, first.latency.warmup) == (0.05, 2)
    assert first.space == {"cache_interval": (2, 3, 5), "cache_branch_id": Range(0, 5)}


def test_the_matrix_expands_schedulers_then_steps_then_methods_as_listed(write: Write) -> None:
    cells = load_plan(write(FULL)).configurations()
    assert [(cell.scheduler[:4], cell.steps, cell.methods) for cell in cells] == [
        ("Eule", 50, ("deepcache",)),
        ("Eule", 50, ()),
        ("Eule", 20, ("deepcache",)),
        ("Eule", 20, ()),
        ("DDIM", 50, ("deepcache",)),
        ("DDIM", 50, ()),
        ("DDIM", 20, ("deepcache",)),
        ("DDIM", 20, ()),
    ]


def test_the_bundled_model_and_sdxl_have_defaults_of_their_own() -> None:
    budgets = (Budget(metric="ssim", max_loss=0.1),)
    bundled = Plan(model="shapes", methods=(("deepcache",),), budgets=budgets)
    assert (bundled.prompts, bundled.scoring_model) == ("shapes", "shapes")
    assert (bundled.resolution, bundled.guidance_scale) == ((128, 128), 3.0)
    large = Plan(model="a/b", pipeline="StableDiffusionXLPipeline", methods=((),), budgets=budgets)
    assert (large.resolution, large.guidance_scale) == ((1024, 1024), 5.0)


def test_a_space_reaches_only_the_methods_that_have_the_parameter(write: Write) -> None:
    accelerated, baseline = load_plan(write(FULL)).configurations()[:2]
    assert set(accelerated.space) == {"cache_interval", "cache_branch_id"}
    assert baseline.space == {}


def test_one_value_fixes_a_parameter(write: Write) -> None:
    (cell,) = load_plan(write(MINIMAL + "[space]\ncache_interval = 3\n")).configurations()
    assert cell.space == {"cache_interval": (3,)}


def test_methods_are_sorted_and_known_from_the_registry(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelsearch.methods import METHODS

    monkeypatch.setitem(METHODS, "aardvark", METHODS["deepcache"])
    path = write(MINIMAL.replace('["deepcache"]', '["deepcache", "aardvark"]'))
    (cell,) = load_plan(path).configurations()
    assert cell.methods == ("aardvark", "deepcache")
    assert refusal(path, {"methods": [["deepcache", "aardvark"], ["aardvark", "deepcache"]]}) == (
        "methods must not repeat a value, got ['aardvark', 'deepcache'] twice "
        "(given by an option, not by the file)"
    )


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_every_scheduler_of_diffusers_is_known(write: Write, name: str) -> None:
    (cell,) = load_plan(write(MINIMAL), {"schedulers": [name]}).configurations()
    assert cell.scheduler == name


def test_names_are_those_that_diffusers_exports() -> None:
    import diffusers

    exported = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert exported <= module._schedulers()
    # The rest needs a library that is not installed here; diffusers says so when it is loaded.
    assert module._schedulers() - exported <= {
        "CosineDPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "LMSDiscreteScheduler",
    }
    assert {"StableDiffusionPipeline", "StableDiffusionXLPipeline"} <= module._pipelines()


def test_names_are_known_to_threads_that_ask_at_once() -> None:
    # In Python 3.11 two syntax trees that grow at once break each other, if a garbage collection
    # lets the other thread run in between.
    def let_others_run(*_: Any) -> None:
        time.sleep(1e-4)

    gc.callbacks.append(let_others_run)
    try:
        with ThreadPoolExecutor(8) as pool:
            module._strings_of_diffusers.cache_clear()
            known = list(pool.map(lambda _: module._pipelines(), range(8)))
    finally:
        gc.callbacks.remove(let_others_run)
    assert len(set(known)) == 1


def test_overrides_replace_single_keys(write: Write) -> None:
    plan = load_plan(
        write(FULL),
        {
            "device": "cpu",
            "steps": [10],
            "search.trials": 2,
            "space.cache_interval": [4],
            "dtype": None,
            "search.sampler": None,
        },
    )
    assert (plan.device, plan.steps, plan.search.trials) == ("cpu", (10,), 2)
    assert (plan.dtype, plan.search.sampler, plan.search.seed) == ("bfloat16", "grid", 4)
    assert plan.space == {"cache_interval": (4,), "cache_branch_id": Range(0, 5)}


def test_an_override_may_open_a_table(write: Write) -> None:
    assert load_plan(write(MINIMAL), {"latency.max_pairs": 9}).latency.max_pairs == 9


def test_a_plan_cannot_be_changed(write: Write) -> None:
    plan = load_plan(write(MINIMAL))
    with pytest.raises(ValidationError, match="frozen"):
        plan.images = 3
    with pytest.raises(ValidationError, match="frozen"):
        plan.configurations()[0].steps = 3


def test_a_plan_with_a_byte_order_mark_and_windows_line_ends_is_read(write: Write) -> None:
    load_plan(write(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()))


# Files and folders


def test_files_and_folders_are_relative_to_the_plan(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = write(MINIMAL)
    monkeypatch.chdir(tmp_path / "elsewhere")
    plan = load_plan(
        path,
        {
            "model": "checkpoint",
            "scoring_model": "./clip",
            "prompts": "own.txt",
            "images": 4,
        },
    )
    assert plan.model == str(tmp_path / "checkpoint")
    assert plan.scoring_model == str(tmp_path / "clip")
    (cell,) = plan.configurations()
    assert cell.prompts == ("a cat", "a dog", "a cow", "a hen")
    assert cell.held_out_prompts == ()
    assert cell.slug.startswith("checkpoint-DDIM-20-")


def test_a_hub_id_and_the_bundled_model_stay_as_they_are(write: Write, tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    path = write(MINIMAL)
    assert load_plan(path).model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    changes = {"model": "shapes", "prompts": "photo"}
    assert load_plan(path, changes).model == "shapes"


def test_comments_blank_lines_and_repeated_prompts_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes("\ufeff# animals\r\n\r\n  a cat \r\nein Bär\r\na cat\r\n".encode())
    assert read_prompts(str(path)) == ("a cat", "ein Bär")


def test_the_built_in_photo_prompts_are_many_distinct_and_short() -> None:
    lines = (
        resources.files("accelsearch.prompts")
        .joinpath("photo.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    assert len(lines) >= 256
    assert read_prompts("photo") == tuple(lines)  # no blank line, comment or repetition
    # CLIP reads 77 tokens; these are English words of about one token each.
    assert max(len(line.split()) for line in lines) <= 25


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_loads(path: Path) -> None:
    cells = load_plan(path).configurations()
    assert len({cell.slug for cell in cells}) == len(cells)
    for cell in cells:
        check_held_out(cell)


def test_the_demo_is_the_bundled_model_on_any_device() -> None:
    (cell,) = load_plan(ROOT / "studies" / "shapes-demo.toml").configurations()
    assert cell.slug == "shapes-DDIM-20-deepcache-clip_score0.02"
    assert (cell.model, cell.device, cell.images, cell.batch_size) == ("shapes", "auto", 16, 1)


# Identities


def cell_of(write: Write, **overrides: Any) -> Configuration:
    changes = {"prompts": "own.txt", "images": 2, **overrides}
    return load_plan(write(MINIMAL), changes).configurations()[0]


def test_an_identity_is_plain_json(write: Write) -> None:
    for cell in load_plan(write(FULL)).configurations():
        identity = cell.identity()
        assert json.loads(json.dumps(identity, allow_nan=False)) == identity
        assert cell.context().items() <= identity.items()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "other/checkpoint"),
        ("revision", "v2"),
        ("variant", "fp16"),
        ("pipeline", "StableDiffusionXLPipeline"),
        ("schedulers", ["PNDMScheduler"]),
        ("steps", [21]),
        ("dtype", "float16"),
        ("resolution", [512, 520]),
        ("batch_size", 2),
        ("guidance_scale", 7.0),
        ("negative_prompt", "blurry"),
        ("seed", 1),
        ("images", 3),
        ("prompts", "photo"),
        ("scoring_model", "shapes"),
    ],
)
def test_the_context_tells_what_changes_the_images(write: Write, key: str, value: Any) -> None:
    assert cell_of(write).context() != cell_of(write, **{key: value}).context()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("methods", [[]]),
        ("budgets", [{"metric": "clip_score", "max_loss": 0.03}]),
        ("space.cache_interval", {"low": 2, "high": 4}),
    ],
)
def test_the_identity_tells_what_is_searched_and_the_context_does_not(
    write: Write, key: str, value: Any
) -> None:
    before, after = cell_of(write), cell_of(write, **{key: value})
    assert before.context() == after.context()
    assert before.identity() != after.identity()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search.trials", 99),
        ("latency.max_pairs", 99),
        ("device", "cpu"),
        ("search.seed", 9),
        ("budgets", [{"metric": "clip_score", "max_loss": 0.02, "bound": 0.3}]),
    ],
)
def test_limits_and_devices_belong_to_no_identity(write: Write, key: str, value: Any) -> None:
    assert cell_of(write).identity() == cell_of(write, **{key: value}).identity()


def test_more_held_out_prompts_change_no_identity(write: Write, tmp_path: Path) -> None:
    before = cell_of(write)
    with (tmp_path / "own.txt").open("a") as file:
        file.write("a fox\n")
    after = load_plan(tmp_path / "plan.toml", {"prompts": "own.txt", "images": 2})
    assert after.configurations()[0].identity() == before.identity()
    expected = hashlib.sha256(b"a cat\na dog").hexdigest()
    assert before.context()["prompts_sha256"] == expected


@pytest.mark.parametrize(
    ("overrides", "slug"),
    [
        ({}, "stable-diffusion-v1-5-DDIM-20-deepcache-clip_score0.02"),
        ({"methods": [[]]}, "stable-diffusion-v1-5-DDIM-20-baseline-clip_score0.02"),
        (
            {
                "model": "größe & co/été/",
                "budgets": [
                    {"metric": "psnr", "floor_db": 25},
                    {"metric": "ssim", "max_loss": 0.125},
                ],
            },
            "t_-DDIM-20-deepcache-psnr25-ssim0.125",
        ),
        (
            {"budgets": [{"metric": "clip_score", "max_loss": 0}]},
            "stable-diffusion-v1-5-DDIM-20-deepcache-clip_score0",
        ),
    ],
)
def test_a_slug_is_a_readable_file_name(write: Write, overrides: dict[str, Any], slug: str) -> None:
    assert cell_of(write, **overrides).slug == slug


def test_a_key_names_the_first_budget(write: Write) -> None:
    budgets = [{"metric": "psnr", "floor_db": 25}, {"metric": "ssim", "max_loss": 0.125}]
    cell = cell_of(write, budgets=budgets)
    assert cell.key(None) == Key(
        "StableDiffusionPipeline", "DDIMScheduler", 20, None, 0.0, ("deepcache",)
    )
    assert str(cell_of(write).key(2.5)) == (
        "('StableDiffusionPipeline', 'DDIMScheduler', '20', 2.5, 0.02, ['deepcache'])"
    )


# What is wrong with a plan


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"steps": [0]}, "steps[0] must be >= 1, got 0"),
        ({"steps": [20, 2000]}, "steps[1] must be <= 1000, got 2000"),
        ({"steps": [True]}, "steps[0] must be a whole number, got True"),
        ({"steps": ["20"]}, "steps[0] must be a whole number, got '20'"),
        ({"steps": [20.0]}, "steps[0] must be a whole number, got 20.0"),
        ({"steps": 20}, "steps must be a list, got 20"),
        ({"steps": []}, "steps must not be empty, got []"),
        ({"steps": [20, 50, 20]}, "steps must not repeat a value, got 20 twice"),
        ({"stepz": [20]}, "unknown key 'stepz'; did you mean 'steps'? nearest of "),
        (
            {"search.trial": 3},
            "unknown key 'search.trial'; did you mean 'trials'? "
            "valid: 'max_retries', 'sampler', 'seed', 'timeout_s', 'trial_timeout_s', 'trials'",
        ),
        ({"serach.trials": 3}, "unknown key 'serach'; did you mean 'search'? "),
        ({"search": 3}, "search must be a table, got 3"),
        ({"search.trials": 0}, "search.trials must be >= 1, got 0"),
        ({"search.timeout_s": 0}, "search.timeout_s must be > 0, got 0"),
        ({"search.timeout_s": float("inf")}, "search.timeout_s must be finite, got inf"),
        ({"search.sampler": "TPE"}, "search.sampler must be a known sampler, got 'TPE'; did you"),
        ({"latency.precision": "3 %"}, "latency.precision must be a number, got '3 %'"),
        ({"latency.min_pairs": 50}, "latency must have min_pairs <= max_pairs, got min_pairs 50"),
        ({"model": ""}, "model must not be empty, got ''"),
        ({"model": 3}, "model must be a string, got 3"),
        (
            {"pipeline": "StableDifusionPipeline"},
            "pipeline must be a known pipeline class of diffusers, got 'StableDifusionPipeline'; "
            "did you mean 'StableDiffusionPipeline'? nearest of ",
        ),
        ({"pipeline": "DiffusionPipeline"}, "pipeline must be a known pipeline class"),
        (
            {"schedulers": ["DDIMScheduler", "DDIM"]},
            "schedulers[1] must be a known scheduler class of diffusers, got 'DDIM'; "
            "did you mean 'DDIMScheduler'? nearest of ",
        ),
        ({"schedulers": ["DDIMScheduler"] * 2}, "schedulers must not repeat a value"),
        (
            {"methods": [["deepcahe"]]},
            "methods[0][0] must be a known method, got 'deepcahe'; did you mean 'deepcache'? ",
        ),
        ({"methods": ["deepcache"]}, "methods[0] must be a list, got 'deepcache'"),
        ({"methods": [["deepcache"] * 2]}, "methods[0] must not repeat a value, got 'deepcache'"),
        ({"methods": [["deepcache"], ["deepcache"]]}, "methods must not repeat a value, got ['de"),
        ({"methods": []}, "methods must not be empty"),
        ({"budgets": []}, "budgets must not be empty"),
        ({"budgets": ["clip_score"]}, "budgets[0] must be a table, got 'clip_score'"),
        (
            {"budgets": [{"metric": "clip_score", "max_loss": -0.02}]},
            "budgets[0].max_loss must be >= 0, got -0.02",
        ),
        (
            {"budgets": [{"metric": "ssim", "max_loss": 0.1}, {"metric": "clip", "max_loss": 0.1}]},
            "budgets[1].metric must be a known metric, got 'clip'; did you mean 'clip_score'? ",
        ),
        (
            {"budgets": [{"metric": "ssim", "maxloss": 0.1}]},
            "unknown key 'budgets[0].maxloss'; did you mean 'max_loss'? ",
        ),
        ({"budgets": [{"metric": "ssim"}]}, "budgets[0] must name max_loss"),
        ({"budgets": [{"max_loss": 0.1}]}, "budgets[0].metric must be given"),
        (
            {"budgets": [{"metric": "ssim", "max_loss": 0.1}] * 2},
            "budgets must name each metric once, got 'ssim' twice",
        ),
        ({"budgets": [{"metric": "psnr"}]}, "budgets[0] must name floor_db"),
        (
            {"budgets": [{"metric": "psnr", "floor_db": 25, "max_loss": 0.1}]},
            "budgets[0] must name floor_db alone",
        ),
        (
            {"budgets": [{"metric": "ssim", "max_loss": 0.1, "floor_db": 25}]},
            "budgets[0] must name max_loss, not floor_db, for ssim",
        ),
        (
            {"budgets": [{"metric": "psnr", "floor_db": float("nan")}]},
            "budgets[0].floor_db must be finite, got nan",
        ),
        (
            {"budgets": [{"metric": "psnr", "floor_db": 25, "bound": 0}]},
            "budgets[0].bound must be > 0, got 0",
        ),
        (
            {"budgets": [{"metric": "ssim", "max_loss": 0.1, "bound": 0.1}]},
            "budgets[0] must have bound > max_loss, got bound 0.1 and max_loss 0.1",
        ),
        ({"images": 0}, "images must be >= 1, got 0"),
        (
            {"images": 1000},
            "images must be <= 260, the number of prompts in 'photo', got 1000",
        ),
        (
            {"held_out_images": 250},
            "images + held_out_images must be <= 260, the number of prompts in 'photo', "
            "got 24 + 250",
        ),
        ({"batch_size": 32}, "images must be >= batch_size, got images 24 and batch_size 32"),
        ({"resolution": 500}, "resolution must be multiples of 8 pixels, got 500"),
        ({"resolution": [512, 500]}, "resolution must be multiples of 8 pixels, got [512, 500]"),
        ({"resolution": [512]}, "resolution must be pixels, as 512 or as [height, width], got ["),
        ({"resolution": True}, "resolution must be pixels"),
        ({"guidance_scale": -1.0}, "guidance_scale must be >= 0, got -1.0"),
        ({"guidance_scale": True}, "guidance_scale must be a number, got True"),
        (
            {"dtype": "fp16"},
            "dtype must be a known dtype, got 'fp16'; did you mean 'float16'? "
            "valid: 'bfloat16', 'float16', 'float32'",
        ),
        ({"device": "gpu"}, "device must be a device, got 'gpu'; did you mean 'cpu'? valid: "),
        ({"device": "cuda:"}, "device must be a device, got 'cuda:'; did you mean 'cuda:0'? "),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"seed": 2**32}, "seed must be <= 4294967295, got 4294967296"),
        ({"prompts": "phot"}, "prompts must be a built-in list or an existing text file, got "),
        ({"prompts": "\0"}, "prompts must be a name or a path, got '\\x00'"),
        ({"model": "x" * 5000}, "model must be a name or a path"),
        ({"model": "shapes", "revision": "main"}, "revision must be left out: 'shapes' is no hub"),
        ({"model": "./folder", "revision": "main"}, "revision must be left out: '"),
        ({"model": "shapes", "variant": "fp16"}, "variant must be left out"),
        (
            {"space.cache_intervall": [2]},
            "space must name parameters of the plan's methods, got 'cache_intervall'; "
            "did you mean 'cache_interval'? ",
        ),
        ({"methods": [[]], "space.cache_interval": [2]}, "space must name parameters of the plan"),
        ({"space.cache_interval": []}, "space.cache_interval must not be empty"),
        ({"space.cache_interval": [2, 2]}, "space.cache_interval must not repeat a value, got 2"),
        ({"space.cache_interval": [2, 1000]}, "space.cache_interval must be within whole numbers"),
        ({"space.cache_interval": [2.0]}, "space.cache_interval must be within whole numbers of "),
        ({"space.cache_interval": ["2"]}, "space.cache_interval must be within whole numbers of "),
        ({"space.cache_interval": {"low": 5, "high": 2}}, "space.cache_interval must have low <="),
        ({"space.cache_interval": {"low": 5}}, "space.cache_interval must be { low = 2, high = 5"),
        ({"space.cache_interval": float("inf")}, "space.cache_interval must hold finite numbers"),
        ({"space": 3}, "space must be a table, got 3"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(
    write: Write, overrides: dict[str, Any], told: str
) -> None:
    assert refusal(write(MINIMAL), overrides).startswith(told)


def test_a_wrong_value_of_the_file_is_not_blamed_on_an_option(write: Write) -> None:
    told = refusal(write(MINIMAL + "steps = [0]\n"), {"device": "cpu", "schedulers": None})
    assert told == "steps[0] must be >= 1, got 0"


@pytest.mark.parametrize("key", ["model", "methods", "budgets"])
def test_a_missing_key_is_named(write: Write, key: str) -> None:
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(key)]
    assert refusal(write("\n".join(lines))) == f"{key} must be given; it has no default"


def test_a_misspelt_key_is_told_before_the_one_that_is_missing_for_it(write: Write) -> None:
    told = refusal(write(MINIMAL.replace("budgets", "budget")))
    assert told.startswith("unknown key 'budget'; did you mean 'budgets'?")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model = 'shapes'\nsteps = [20", "a plan must be valid TOML: Unclosed array (at line 2"),
        ("model = 'a'\nmodel = 'b'", "a plan must be valid TOML: Cannot overwrite a value (at lin"),
        ("model 'a'", "a plan must be valid TOML: Expected '=' after a key"),
        ("seed = " + "9" * 5000, "a plan must be valid TOML: "),
        (MINIMAL + "seed = 0x" + "f" * 5000, "seed must be <= 4294967295, got a huge int"),
        ("seed = " + "[" * 5000, "a plan must be valid TOML: "),
        (b"model = 'a'\nname = '\xe9'", "a plan must be UTF-8 text, got byte 0xe9 on line 2; save"),
        (b"\x00", "a plan must be valid TOML: "),
        ("", "model must be given; it has no default"),
    ],
)
def test_a_broken_file_is_told_in_one_line(write: Write, text: str | bytes, told: str) -> None:
    assert refusal(write(text)).startswith(told)


def test_broken_toml_is_told_with_its_line_even_at_the_end(write: Write) -> None:
    for text in ("model = 'a'\n\nsteps = [20", "a = 1\nb =", "a = 1\n\n[search"):
        assert "(at line " in refusal(write(text))


def test_a_missing_plan_is_told_with_the_plans_beside_it(write: Write, tmp_path: Path) -> None:
    write(MINIMAL, "sd15.toml")
    assert refusal(tmp_path / "sd-15.toml") == (
        "a plan must be an existing TOML file; did you mean 'sd15.toml'? valid: 'sd15.toml'"
    )
    assert refusal(tmp_path / "nowhere" / "sd15.toml") == "a plan must be an existing TOML file"


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "a plan must be a readable TOML file: Is a directory"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "prompts must hold at least one prompt, got none in "),
        (b"# only\n\n# comments\n", "prompts must hold at least one prompt, got none in "),
        (b"a cat\n\xff\n", "prompts file "),
        (b"a cat\n", "images must be <= 1, the number of prompts in "),
    ],
)
def test_a_bad_list_of_prompts_is_told_in_one_line(
    write: Write, tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    assert refusal(write(MINIMAL), {"prompts": "bad.txt"}).startswith(told)


json_like = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["shapes", "psnr"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    key=st.sampled_from(
        [
            *Plan.model_fields,
            *(f"search.{name}" for name in module.SearchSettings.model_fields),
            *(f"latency.{name}" for name in module.LatencySettings.model_fields),
            "space.cache_interval",
        ]
    )
    | st.text(),
    value=json_like,
)
def test_whatever_a_key_says_the_plan_loads_or_is_refused_in_one_line(
    write: Write, key: str, value: Any
) -> None:
    try:
        load_plan(write(MINIMAL), {key: value})
    except PlanError as error:
        assert len(str(error).splitlines()) == 1


# Imports


def test_loading_a_plan_imports_neither_torch_nor_diffusers_nor_optuna() -> None:
    code = (
        "import sys, accelsearch;"
        "assert 'pydantic' not in sys.modules;"
        "accelsearch.load_plan(sys.argv[1]).configurations()[0].slug;"
        "print(*sorted({'torch', 'diffusers', 'optuna', 'transformers'} & set(sys.modules)))"
    )
    path = ROOT / "studies" / "sd15.toml"
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.stdout.strip() == ""


@pytest.mark.parametrize("name", accelsearch.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(accelsearch, name) is not None
    assert name in dir(accelsearch)


def test_a_name_that_is_not_public_is_missing() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_plam'"):
        _ = accelsearch.load_plam


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert accelsearch.__version__ == project["version"]


# The prompts of a search, and those that it never sees


def test_the_prompts_have_one_random_order_which_the_seed_alone_decides(write: Write) -> None:
    cells = load_plan(write(MINIMAL), {"images": 24, "steps": [20, 50]}).configurations()
    first, second = (cell.order for cell in cells)
    assert first == second  # of whatever steps
    assert sorted(first) == list(range(24))
    assert first != tuple(range(24))
    other = load_plan(write(MINIMAL), {"images": 24, "seed": 1}).configurations()[0]
    assert other.order != first
    assert sorted(other.order) == list(range(24))


def test_the_order_of_scoring_belongs_to_what_is_measured(write: Write) -> None:
    assert cell_of(write).context()["order"] == "random"
    assert cell_of(write).identity()["order"] == "random"


def test_held_out_prompts_are_the_next_ones_of_the_list(write: Write) -> None:
    def split(images: int, held_out: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        changes = {"prompts": "own.txt", "images": images, "held_out_images": held_out}
        (cell,) = load_plan(write(MINIMAL), changes).configurations()
        return cell.prompts, cell.held_out_prompts

    assert split(2, 1) == (("a cat", "a dog"), ("a cow",))
    assert split(1, 3) == (("a cat",), ("a dog", "a cow", "a hen"))
    assert split(4, 0) == (("a cat", "a dog", "a cow", "a hen"), ())
    with pytest.raises(PlanError, match=r"images \+ held_out_images must be <= 4, .*got 2 \+ 3"):
        split(2, 3)


def test_how_many_prompts_are_held_out_changes_no_identity(write: Write) -> None:
    assert cell_of(write).identity() == cell_of(write, held_out_images=2).identity()
