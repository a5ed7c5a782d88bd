"""A batch of tasks: what becomes of each, and that no value becomes code."""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from accelsearch.codegen import Result, Searched, Status, Task, generate
from accelsearch.contract import Key
from accelsearch.errors import ContractError, ExportError, TaskError

from .made import Files, entry, key, write

SCRIPT = "sd-ddim-50-deepcache-2.00x-loss0.02.py"


def asked(speedup: float = 2.0, *methods: str, **fields: Any) -> Task:
    of = key(speedup, *methods, **fields)
    return Task(of.pipeline, of.scheduler, of.steps, of.methods, speedup, of.max_loss)


def became(files: Files, *tasks: Any, **options: Any) -> list[tuple[Status, str]]:
    batch = generate(tasks, **files.arguments(), **options)
    report = files.report()
    assert [one["status"] for one in report] == [one.status.value for one in batch.results]
    assert [one["reason"] for one in report] == [one.reason for one in batch.results]
    assert all(len(one.reason.splitlines()) == 1 for one in batch.results)
    assert batch.failed == any(one.status is Status.FAILED for one in batch.results)
    assert sum(batch.counts.values()) == len(tasks)
    return [(one.status, one.reason) for one in batch.results]


def of_one(files: Files, task: Any, **options: Any) -> tuple[Status, str]:
    (result,) = became(files, task, **options)
    return result


# Which parameters answer


def test_the_one_with_the_smallest_loss_of_those_that_meet_the_request_is_taken(
    tmp_path: Path,
) -> None:
    stored = [
        (key(2.1), entry(key(2.1), score_loss=0.015, trial=0)),
        (key(2.5), entry(key(2.5), score_loss=0.005, trial=1)),
        (key(2.6), entry(key(2.6), score_loss=0.005, trial=2)),
        (key(1.9), entry(key(1.9), score_loss=-0.1, trial=3)),
        (key(3.0), entry(key(3.0), score_loss=0.02, trial=4)),  # at the budget: over it
        (key(3.1, steps=20), entry(key(3.1, steps=20), score_loss=0.0, trial=5)),
        (key(3.2, "tome"), entry(key(3.2, "tome"), score_loss=0.0, trial=6)),
        (key(3.3, max_loss=0.5), entry(key(3.3, max_loss=0.5), score_loss=0.0, trial=7)),
    ]
    files = write(tmp_path, *stored)
    assert of_one(files, asked(2.0).sentence)[0] is Status.GENERATED
    (report,) = files.report()
    assert report["key"] == str(key(2.6))
    assert (report["speedup"], report["score_loss"]) == (2.6, 0.005)
    assert report["file"] == SCRIPT
    of_one(files, asked(2.0).sentence, closest=True)
    assert files.report()[0]["key"] == str(key(2.1))


def test_the_very_key_comes_before_a_smaller_loss(tmp_path: Path) -> None:
    exact, better = key(2.0), key(2.5)
    files = write(tmp_path, (exact, entry(exact)), (better, entry(better, score_loss=0.0)))
    of_one(files, asked(2.0).sentence)
    assert files.report()[0]["key"] == str(exact)


def test_a_loss_of_zero_or_less_meets_every_budget(tmp_path: Path) -> None:
    of = key(2.5, max_loss=0.0)
    files = write(tmp_path, (of, entry(of, score_loss=0.0)))
    assert of_one(files, asked(2.0, max_loss=0.0).sentence)[0] is Status.GENERATED


# The batch


def test_one_bad_task_never_stops_the_batch(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))
    good = asked(2.0).sentence
    other_order = "With loss at most 2 % and 2.2x: DeepCache, 50 steps, DDIM, SD1.5"
    tasks = [
        good.replace("StableDiffusion", "Flux"),
        asked(9.0).sentence,
        "",
        other_order,
        good,
        asked(2.0, steps=20).sentence,
        {"sentence": 5},
        None,
        [],
        {"pipeline": "StableDiffusionPipeline"},
    ]
    found = became(files, *tasks)
    assert [status for status, _ in found] == [
        Status.FAILED,
        Status.INFEASIBLE,
        Status.FAILED,
        Status.GENERATED,
        Status.GENERATED,
        Status.SKIPPED,
        *[Status.FAILED] * 4,
    ]
    reasons = [reason for _, reason in found]
    assert "unknown pipeline 'FluxPipeline'" in reasons[0]
    assert reasons[1] == "9x is above the bound of 2.57x"
    assert "empty line" in reasons[2]
    assert "no bound is known for StableDiffusionPipeline, DDIMScheduler, 20 steps" in reasons[5]
    assert "must have a scheduler" in reasons[9]
    assert files.scripts() == [SCRIPT, SCRIPT.replace("2.00x", "2.20x")]


def test_no_task_is_an_empty_report(tmp_path: Path) -> None:
    files = write(tmp_path)
    assert became(files) == []
    assert files.report() == []


def test_fields_do_without_a_sentence_and_must_agree_with_one(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))
    fields = dict(asked(2.0).entry())
    assert of_one(files, fields)[0] is Status.GENERATED
    status, reason = of_one(files, {**fields, "speedup": 2.1})
    assert (status, "must say the same speedup, got 2.0 and 2.1" in reason) == (Status.FAILED, True)
    del fields["sentence"]
    assert of_one(files, fields)[0] is Status.GENERATED
    assert of_one(files, {**fields, "methods": "deepcache"})[0] is Status.FAILED


def test_whoever_waits_hears_of_each_result_in_turn(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))
    told: list[Result] = []
    generate(["", asked(2.0).sentence], **files.arguments(), told=told.append)
    assert [one.status for one in told] == [Status.FAILED, Status.GENERATED]


def test_missing_files_hold_nothing_and_malformed_ones_are_told(tmp_path: Path) -> None:
    files = write(tmp_path)
    files.params.unlink()
    files.bounds.unlink()
    assert of_one(files, asked().sentence)[0] is Status.SKIPPED
    files.params.write_text("[")
    with pytest.raises(ContractError, match="search_params"):
        generate([], **files.arguments())


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))
    files.out.write_text("a file")
    with pytest.raises(ExportError, match="must be writable"):
        generate([asked().sentence], **files.arguments())


# Names of files


def test_tasks_of_different_settings_are_different_files(tmp_path: Path) -> None:
    stored = [key(4.0), key(4.0, max_loss=0.1), key(4.0, "tome", "deepcache"), key(4.0, steps=20)]
    files = write(tmp_path, *((one, entry(one)) for one in stored))
    tasks = [asked(2.0, *one.methods, steps=one.steps, max_loss=one.max_loss) for one in stored]
    tasks += [asked(2.001), asked(2.0)]
    became(files, *(task.sentence for task in tasks))
    assert len(files.scripts()) == 5
    assert files.scripts()[0] == "sd-ddim-20-deepcache-2.00x-loss0.02.py"
    assert "sd-ddim-50-deepcache-tome-2.00x-loss0.02.py" in files.scripts()
    assert "sd-ddim-50-deepcache-2.001x-loss0.02.py" in files.scripts()


# Searches


class Searching:
    """A search that adds parameters to the files, and counts."""

    def __init__(self, files: Files, *finds: tuple[Key, dict[str, Any]], ended: Searched) -> None:
        self.files, self.finds, self.ended, self.calls = files, finds, ended, 0

    def __call__(self, task: Task) -> Searched:
        self.calls += 1
        stored = json.loads(self.files.params.read_text())
        self.files.params.write_text(json.dumps({**stored, **{str(k): e for k, e in self.finds}}))
        return self.ended


def test_what_is_missing_below_the_bound_is_searched_and_then_generated(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))
    search = Searching(files, (key(2.5), entry(key(2.5))), ended=Searched.DONE)
    tasks = [asked(2.0), asked(2.45), asked(2.5), asked(2.6)]
    found = became(files, *(task.sentence for task in tasks), search=search)
    assert [status for status, _ in found] == [
        Status.GENERATED,
        Status.SEARCHED,
        Status.GENERATED,  # of what the search before has found
        Status.INFEASIBLE,
    ]
    assert search.calls == 1


@pytest.mark.parametrize(
    ("ended", "told"),
    [(Searched.NOTHING, "has not found it"), (Searched.TIMEOUT, "ran out of time")],
)
def test_what_a_search_misses_between_the_measured_and_the_buffered_bound_is_no_failure(
    tmp_path: Path, ended: Searched, told: str
) -> None:
    files = write(tmp_path, (key(), entry(key())))
    status, reason = of_one(files, asked(2.5).sentence, search=Searching(files, ended=ended))
    assert status is Status.UNREACHED
    assert reason == f"a search {told}; the fastest measured has 2.34x"


def test_an_exhausted_space_answers_without_a_search(tmp_path: Path) -> None:
    bound = {"max_speedup": 2.57, "measured_max_speedup": 2.34, "exhausted": True}
    files = write(tmp_path, (key(), entry(key())), bounds={key(None): bound})
    search = Searching(files, ended=Searched.NOTHING)
    status, reason = of_one(files, asked(2.5).sentence, search=search)
    assert (status, search.calls) == (Status.UNREACHED, 0)
    assert reason == "all settings are measured, the fastest has 2.34x"


def test_without_a_bound_there_is_a_search_only_where_it_is_asked_for(tmp_path: Path) -> None:
    files = write(tmp_path)
    search = Searching(files, (key(), entry(key())), ended=Searched.DONE)
    assert of_one(files, asked().sentence, search=search)[0] is Status.SKIPPED
    assert search.calls == 0
    assert of_one(files, asked().sentence, search=search, search_unknown=True)[0] is Status.SEARCHED


def test_parameters_without_a_bound_are_searched_on_where_there_is_a_search(tmp_path: Path) -> None:
    # What `target --out` leaves: it knows nothing of faster settings.
    files = write(tmp_path, (key(1.5), entry(key(1.5))), bounds={})
    search = Searching(files, (key(2.5), entry(key(2.5))), ended=Searched.DONE)
    assert of_one(files, asked(2.4).sentence)[0] is Status.SKIPPED
    assert of_one(files, asked(2.4, steps=20).sentence, search=search)[0] is Status.SKIPPED
    assert search.calls == 0
    assert of_one(files, asked(2.4).sentence, search=search)[0] is Status.SEARCHED


def test_without_a_search_what_is_missing_below_the_bound_is_a_failure(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))
    status, reason = of_one(files, asked(2.5).sentence)
    assert status is Status.FAILED
    assert "name a plan with --plan" in reason


def test_a_search_that_fails_is_one_failed_task(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))

    def broken(task: Task) -> Searched:
        raise TaskError("the search failed with exit code 2: mine")

    found = became(files, asked(2.5).sentence, asked(2.0).sentence, search=broken)
    assert found[0] == (Status.FAILED, "the search failed with exit code 2: mine")
    assert found[1][0] is Status.GENERATED


def test_a_search_that_breaks_the_files_is_one_failed_task(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))

    def broken(task: Task) -> Searched:
        files.params.write_text("[")
        return Searched.DONE

    found = became(files, asked(2.5).sentence, asked(2.0).sentence, search=broken)
    assert [status for status, _ in found] == [Status.FAILED, Status.GENERATED]
    assert "search_params.json" in found[0][1]


# What an entry must say


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"cache_interval": None}, "cache_interval must be a whole number in 1..20, got None"),
        ({"cache_interval": 2.0}, "cache_interval must be"),
        ({"cache_interval": True}, "cache_interval must be"),
        ({"cache_interval": "2); import os"}, "cache_interval must be"),
        ({"cache_interval": [2]}, "cache_interval must be"),
        ({"cache_branch_id": 12}, "cache_branch_id must be"),
        ({"cache_branch_id": 10**400}, "cache_branch_id must be"),
        ({"model": None}, "--model"),
        ({"model": 5}, "model must be text"),
        ({"model": "a\0b"}, "model must be text"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16"),
        ({"dtype": ["float16"]}, "dtype must be one of"),
        ({"resolution": [512]}, "resolution must be [height, width]"),
        ({"resolution": [512, -8]}, "resolution must be"),
        ({"batch_size": 0}, "batch_size must be a whole number in 1.."),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number"),
        ({"seed": -1}, "seed must be"),
        ({"environment": []}, "environment must be an object"),
        ({"environment": {"device_type": "tpu"}}, "device_type must be one of cuda, cpu"),
        ({"environment": {"versions": "2"}}, "versions must be an object"),
        ({"negative_prompt": {}}, "negative_prompt must be text"),
        ({"revision": 7}, "revision must be text"),
    ],
    ids=str,
)
def test_a_value_that_is_none_fails_its_task(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    files = write(tmp_path, (key(), entry(key(), **fields)))
    status, reason = of_one(files, asked().sentence)
    assert status is Status.FAILED
    assert told in reason
    assert files.scripts() == []


def test_what_makes_no_difference_may_be_missing_or_strange(tmp_path: Path) -> None:
    strange = {"study": 5, "trial": {}, "device": [], "speedup_interval": "x", "extra": [[[]]]}
    files = write(tmp_path, (key(), entry(key(), **strange)))
    assert of_one(files, asked().sentence)[0] is Status.GENERATED


def test_an_entry_of_the_old_scripts_needs_nothing_but_a_model(tmp_path: Path) -> None:
    old = {"cache_interval": 2, "cache_branch_id": 0, "speedup": 2.34, "score_loss": 0.01}
    files = write(tmp_path, (key(), old))
    assert of_one(files, asked().sentence)[0] is Status.FAILED
    assert of_one(files, asked().sentence, model="my/model")[0] is Status.GENERATED
    text = (files.out / SCRIPT).read_text()
    assert 'MODEL = "my/model"' in text
    assert "guidance_scale" not in text
    assert 'DEVICE = "cuda" if torch.cuda.is_available() else "cpu"' in text


@pytest.mark.parametrize("method", ["tome", "deepcache"])
def test_a_method_must_serve_the_pipeline(tmp_path: Path, method: str) -> None:
    of = key(2.34, method, pipeline="PixArtSigmaPipeline")
    files = write(tmp_path, (of, entry(of)))
    task = asked(2.0, method, pipeline="PixArtSigmaPipeline")
    assert of_one(files, task.sentence) == (
        Status.FAILED,
        f"{method} does not serve a PixArtSigmaPipeline",
    )


def test_a_pipeline_or_method_that_no_script_can_be_made_for_is_told(tmp_path: Path) -> None:
    flux = key(2.34, "tgate", pipeline="FluxPipeline")
    theirs = key(2.34)
    theirs = Key(theirs.pipeline, theirs.scheduler, 50, 2.34, 0.02, ("midskip",))
    files = write(
        tmp_path, (flux, entry(flux)), (theirs, {"speedup": 2.34, "score_loss": 0.0, "model": "x"})
    )
    tasks = [
        Task("FluxPipeline", "DDIMScheduler", 50, ("tgate",), 2.0, 0.02),
        Task("StableDiffusionPipeline", "DDIMScheduler", 50, ("midskip",), 2.0, 0.02),
    ]
    found = became(files, *(task.sentence for task in tasks))
    assert [status for status, _ in found] == [Status.FAILED] * 2
    assert "scripts can be made for known pipelines, got 'FluxPipeline'" in found[0][1]
    assert "methods that bring their hook, got 'midskip'" in found[1][1]


@pytest.mark.parametrize(
    ("method", "identity", "call"),
    [
        ("deepcache", {"cache_interval": 1}, "apply_deepcache"),
        ("tgate", {"gate_step": 50, "sp_interval": 1}, "apply_tgate"),
        ("tome", {"ratio": 0.0}, "apply_tome"),
    ],
)
def test_a_method_at_its_identity_is_left_out(
    tmp_path: Path, method: str, identity: dict[str, Any], call: str
) -> None:
    others = [one for one in ("deepcache", "tgate", "tome") if one != method]
    of = key(2.34, *others, method)
    files = write(tmp_path, (of, entry(of, **identity)))
    assert of_one(files, asked(2.0, *of.methods).sentence)[0] is Status.GENERATED
    text = next(files.out.glob("*.py")).read_text()
    assert call not in text
    assert all(f"apply_{other}(" in text for other in others)


# Values stay values

WILD = st.one_of(
    st.text(),
    st.sampled_from(
        [
            'x"; import os; os.system("rm -rf /") #',
            '\'\'\'\n"""\nimport os\n"""',
            "{{ 7 * 7 }}{% raw %}",
            "\\",
            '\\"',
            "\u202eevil\u2028\x85\x00\x0c",
            "\ud800",
            "a" * 300,
            "../../../../etc/passwd",
        ]
    ),
)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        WILD,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WILD, inner, max_size=3)),
    max_leaves=8,
)
TEXTS = ("model", "revision", "variant", "negative_prompt", "device", "study")


def literals(text: str) -> dict[str, Any]:
    """The literals that a script assigns to its constants."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }


def shape(text: str) -> str:
    """A script's syntax with every literal text left out."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries(dict.fromkeys(TEXTS, WILD)))
@example(dict.fromkeys(TEXTS, 'x"; import os #'))
@example(dict.fromkeys(TEXTS, '"""\nimport os\n"""'))
@example(dict.fromkeys(TEXTS, "\x0c\u2028\r\nimport os"))
def test_no_text_of_an_entry_becomes_code(tmp_path: Path, texts: dict[str, str]) -> None:
    plain = dict.fromkeys(TEXTS, "x")
    scripts = []
    for given_texts in (plain, texts):
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files = write(folder, (key(), entry(key(), **given_texts)))
        status, reason = of_one(files, asked().sentence)
        if status is Status.FAILED:
            assert "must be text" in reason or "which model" in reason
            return
        assert files.scripts() == [SCRIPT]
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            [files.bounds.name, files.params.name, files.out.name]
        )
        scripts.append((files.out / SCRIPT).read_text())
    told = literals(scripts[1])
    assert told["MODEL"] == texts["model"] or texts["model"] == "shapes"
    assert told["REVISION"] == texts["revision"]
    assert told["VARIANT"] == texts["variant"]
    assert told.get("NEGATIVE_PROMPT", "") == texts["negative_prompt"]
    if texts["negative_prompt"] and texts["model"] != "shapes":
        assert shape(scripts[1]) == shape(scripts[0])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(
            [*entry(key(2.34, "deepcache", "tgate", "tome")), "exhausted", "max_speedup", "sx"]
        ),
        JSON,
        max_size=4,
    ),
    st.lists(st.one_of(JSON, WILD), max_size=2),
)
def test_whatever_the_files_and_tasks_hold_there_is_a_report_and_only_a_report(
    tmp_path: Path, fields: dict[str, Any], tasks: list[Any]
) -> None:
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    of = key(2.34, "deepcache", "tgate", "tome")
    bound = {"max_speedup": 2.57, "measured_max_speedup": 2.34}
    wild_bound = {name: value for name, value in fields.items() if name in ("max_speedup",)}
    files = write(
        folder, (of, entry(of, **fields)), bounds={key(None, *of.methods): bound | wild_bound}
    )
    found = became(files, *tasks, asked(2.0, *of.methods).sentence)
    for path in files.out.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name)}
        assert not names & {"os", "eval", "exec", "system"}
    assert len(found) == len(tasks) + 1
    inside = {path.name for path in folder.iterdir()}
    assert inside == {files.bounds.name, files.params.name, files.out.name}
    assert all(path.suffix in (".py", ".json") for path in files.out.iterdir())


names = st.text(min_size=1).filter(lambda text: bool(text.strip()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Key,
        names,
        names,
        st.integers(1),
        st.floats(0.01, 1e9),
        st.floats(0, 1e9),
        st.lists(names, unique=True, max_size=2).map(tuple),
    )
)
@example(Key("StableDiffusionPipeline", "X;import os", 5, 2.0, 0.02, ("deepcache",)))
@example(Key("StableDiffusionPipeline", "../../x", 5, 2.0, 0.02, ("deepcache",)))
@example(Key("StableDiffusionPipeline", "class", 5, 2.0, 0.02, ("deepcache",)))
@example(Key("StableDiffusionPipeline", "Sched", 5, 2.0, 0.02, ("../deepcache",)))
@example(Key("StableDiffusionPipeline", "ＤＤＩＭ", 5, 2.0, 0.02, ("deepcache",)))
def test_no_key_becomes_code_or_a_path(tmp_path: Path, of: Key) -> None:
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    told = entry(key()) | {"speedup": of.speedup}
    files = write(folder, (of, told))
    task = Task(of.pipeline, of.scheduler, of.steps, of.methods, 0.005, of.max_loss)
    fields = {name: value for name, value in task.entry().items() if name != "sentence"}
    status, _ = of_one(files, fields)
    assert status in (Status.FAILED, Status.GENERATED)
    assert {path.name for path in folder.iterdir()} == {
        files.bounds.name,
        files.params.name,
        files.out.name,
    }
    assert (status is Status.GENERATED) == bool(files.scripts())
    if status is Status.GENERATED:
        assert of.scheduler.isidentifier()
        assert of.pipeline == "StableDiffusionPipeline"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused_with_their_file(tmp_path: Path, value: float) -> None:
    files = write(tmp_path, (key(), entry(key(), score_loss=value)))
    with pytest.raises(ContractError, match="numbers must be finite"):
        generate([asked().sentence], **files.arguments())


def test_deep_nesting_is_told_in_one_line(tmp_path: Path) -> None:
    for depth in (500, 5000, 100_000):
        deep = '{"x": ' * depth + "1" + "}" * depth
        files = write(tmp_path, (key(), entry(key())))
        text = files.params.read_text()
        files.params.write_text(text[:-2] + f', "extra": {deep}' + text[-2:])
        try:
            status = of_one(files, json.loads("[" * 400 + "]" * 400))[0]
        except ContractError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert status is Status.FAILED


# What is imported


def test_code_generation_imports_neither_torch_nor_optuna(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))
    code = f"""
import sys
from accelsearch.codegen import generate
batch = generate([{asked().sentence!r}], params={str(files.params)!r},
                 bounds={str(files.bounds)!r}, out={str(files.out)!r})
assert not batch.failed
heavy = {{"torch", "optuna", "diffusers", "numpy", "pydantic", "DeepCache", "tgate", "tomesd"}}
ours = {{name for name in sys.modules if name.startswith("accelsearch")}}
print(sorted(heavy & sys.modules.keys()), sorted(ours))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, _, ours = done.stdout.strip().partition("] ")
    assert heavy == "["
    others = [
        name
        for name in ast.literal_eval(ours)
        if not name.startswith(("accelsearch.codegen", "accelsearch.hooks"))
    ]
    assert others == ["accelsearch", "accelsearch.contract", "accelsearch.errors"]


def test_every_subset_of_methods_has_its_script(tmp_path: Path) -> None:
    every = ("deepcache", "tgate", "tome")
    subsets = [subset for count in range(1, 4) for subset in itertools.combinations(every, count)]
    stored = [key(2.34, *subset) for subset in subsets]
    files = write(tmp_path, *((one, entry(one)) for one in stored))
    found = became(files, *(asked(2.0, *subset).sentence for subset in subsets))
    assert [status for status, _ in found] == [Status.GENERATED] * len(subsets)
    assert len(files.scripts()) == len(subsets)


def test_the_documented_call_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, (key(), entry(key())))
    (tmp_path / "tasks.json").write_text(json.dumps([asked().sentence, "?"]))
    page = Path(__file__).parents[2] / "docs" / "codegen.md"
    (source,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(source, {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"generated {Path('scripts') / SCRIPT}"
    assert second.startswith("failed every word of a task must be understood, got '?'")
