"""The registry, parameters, the counting of steps, and applying several methods at once."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelsearch.errors import PlanError, UnsupportedError
from accelsearch.methods import METHODS, applied, effective, get, prepared, space, split, starts
from accelsearch.methods.base import CallSteps, Parameter, Run

RUN = Run(steps=4, guidance_scale=4.0, batch_size=1, height=32, width=32, scheduler="DDIM", seed=0)


def whole(name: str = "level", **fields: Any) -> Parameter:
    defaults: dict[str, Any] = {
        "kind": "int",
        "default": 2,
        "low": 1,
        "high": 5,
        "meaning": "m",
        "source": "s",
    }
    return Parameter(name=name, **(defaults | fields))


class Recorder:
    """A method that writes down what happens to it."""

    libraries = ()

    def __init__(self, name: str, log: list[str], refuses: bool = False) -> None:
        self.name = name
        self.parameters = (
            whole(f"{name}_level", low=0, identity=0),
            whole(f"{name}_width", fixed=True),
        )
        self.run: Run | None = None
        self._log = log
        self._refuses = refuses

    def check(self, pipeline: Any, run: Run) -> None:
        self._log.append(f"check {self.name}")
        if self._refuses:
            raise UnsupportedError(f"{self.name} refuses")

    def space(self, pipeline: Any, run: Run) -> tuple[Parameter, ...]:
        return (self.parameters[0].within(1, 3), self.parameters[1])

    @contextmanager
    def apply(self, pipeline: Any, params: Mapping[str, Any], run: Run) -> Iterator[None]:
        self.run = run
        self._log.append(f"apply {self.name} {list(params.values())}")
        yield
        self._log.append(f"undo {self.name}")

    def full_steps(self, params: Mapping[str, Any]) -> frozenset[int]:
        return frozenset({params[f"{self.name}_level"]})

    def implementation(self) -> str:
        return self.name


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What happens to the methods `first`, `second` and `refuser`, which replace the others."""
    log: list[str] = []
    before = dict(METHODS)
    METHODS.clear()
    for method in (
        Recorder("first", log),
        Recorder("second", log),
        Recorder("refuser", log, refuses=True),
    ):
        METHODS[method.name] = method
    yield log
    METHODS.clear()
    METHODS.update(before)  # all at once: their order is the one that they are applied in


def test_methods_are_registered_under_their_own_names() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {
        name: name for name in METHODS
    }


def test_parameter_names_are_unique_over_all_methods() -> None:
    names = [parameter.name for method in METHODS.values() for parameter in method.parameters]
    assert len(names) == len(set(names))


def test_every_parameter_says_what_it_means_and_where_it_comes_from() -> None:
    for method in METHODS.values():
        assert method.parameters
        for parameter in method.parameters:
            assert parameter.meaning.endswith(".")
            assert parameter.source
            assert parameter.default != parameter.identity


def test_every_library_is_an_installed_distribution_named_in_the_implementation() -> None:
    for method in METHODS.values():
        for library in method.libraries:
            assert f"{library} {importlib.metadata.version(library)}" in method.implementation()


def test_importing_the_methods_imports_neither_torch_nor_a_diffusion_library() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'DeepCache', 'tgate', 'tomesd', 'numpy'}"
    code = f"import sys, accelsearch.methods; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_get_names_the_nearest_method() -> None:
    assert get("deepcache") is METHODS["deepcache"]
    with pytest.raises(PlanError, match=r"unknown method 'deepcash'; did you mean 'deepcache'\?"):
        get("deepcash")


def test_split_sorts_params_by_method_and_keeps_methods_without_any(log: list[str]) -> None:
    assert split({"second_level": 3}, ["second", "first"]) == {
        "first": {},
        "second": {"second_level": 3},
    }


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cache_intervall": 3}, "unknown parameter 'cache_intervall' of deepcache; did you mean "),
        ({"cache_interval": 21}, "cache_interval must be in 1..20, got 21"),
        ({"cache_interval": 0}, "cache_interval must be in 1..20, got 0"),
        ({"cache_interval": True}, "cache_interval must be in 1..20, got True"),
        ({"cache_interval": 2.5}, "cache_interval must be in 1..20, got 2.5"),
        ({"cache_branch_id": "0"}, "cache_branch_id must be in 0..11, got '0'"),
    ],
)
def test_split_refuses_what_the_methods_do_not_take(params: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refusal:
        split(params, ["deepcache"])
    assert str(refusal.value).startswith(message)


def test_split_refuses_parameters_of_a_method_that_is_not_applied() -> None:
    with pytest.raises(PlanError, match="unknown parameter 'cache_interval' of no method"):
        split({"cache_interval": 3}, [])


def test_applied_fills_defaults_applies_in_order_and_undoes_last_in_first_out(
    log: list[str],
) -> None:
    with applied(object(), {"first_level": 3}, ["second", "first"], RUN):
        log.append("body")
    assert log == [
        "check first",
        "check second",
        "apply first [3, 2]",
        "apply second [2, 2]",
        "body",
        "undo second",
        "undo first",
    ]


def test_applied_applies_nothing_when_one_method_refuses(log: list[str]) -> None:
    with (
        pytest.raises(UnsupportedError, match="refuser refuses"),
        applied(object(), {}, ["first", "refuser"], RUN),
    ):
        pytest.fail("the body must not run")
    assert log == ["check first", "check refuser"]


def test_applied_refuses_a_value_without_effect(log: list[str]) -> None:
    with (
        pytest.raises(
            UnsupportedError, match=r"first_level must be in 1\.\.3 or 0 for this object"
        ),
        applied(object(), {"first_level": 5}, ["first"], RUN),
    ):
        pytest.fail("the body must not run")
    assert log == ["check first"]


def test_applied_leaves_a_method_at_its_identity_out(log: list[str]) -> None:
    with applied(object(), {"first_level": 0, "first_width": 4}, ["first", "second"], RUN):
        pass
    assert log == ["check first", "check second", "apply second [2, 2]", "undo second"]


def test_what_is_prepared_is_applied_as_often_as_it_is_entered_and_not_worked_out_again(
    log: list[str],
) -> None:
    accelerate = prepared(object(), {"first_level": 3}, ["first", "second"], RUN)
    checked = ["check first", "check second"]
    assert log == checked
    for _ in range(2):
        with accelerate():
            log.append("body")
    entered = ["apply first [3, 2]", "apply second [2, 2]", "body", "undo second", "undo first"]
    assert log == checked + 2 * entered
    with pytest.raises(UnsupportedError, match="refuser refuses"):
        prepared(object(), {}, ["refuser"], RUN)


def test_applied_tells_each_method_the_full_steps_of_all_that_are_applied(log: list[str]) -> None:
    second: Any = METHODS["second"]
    with applied(object(), {"first_level": 3}, ["first", "second"], RUN):
        assert second.run.full_steps == {3, 2}
    with applied(object(), {"first_level": 0}, ["first", "second"], RUN):
        assert second.run.full_steps == {2}


def test_space_lists_the_parameters_in_order_and_fixed_ones_only_where_freed(
    log: list[str],
) -> None:
    alone = space(object(), ["first"], RUN)
    assert [(one.name, one.range) for one in alone] == [("first_level", "1..3 or 0")]
    freed = space(object(), ["first"], RUN, freed=["first_width"])
    assert [one.name for one in freed] == ["first_level", "first_width"]
    with pytest.raises(PlanError, match="unknown method 'frist'"):
        space(object(), ["frist"], RUN)


def test_the_space_of_a_combination_holds_the_identities(log: list[str]) -> None:
    both = space(object(), ["second", "first"], RUN)
    assert [(one.name, one.range) for one in both] == [
        ("first_level", "0..3"),
        ("second_level", "0..3"),
    ]


def test_a_search_starts_with_the_defaults_and_with_each_method_alone(log: list[str]) -> None:
    assert starts(space(object(), ["first", "second"], RUN)) == [
        {"first_level": 2, "second_level": 2},
        {"first_level": 2, "second_level": 0},
        {"first_level": 0, "second_level": 2},
    ]
    assert starts(space(object(), ["first"], RUN)) == [{"first_level": 2}]
    assert starts(()) == [{}]


def test_a_search_starts_with_the_known_settings_that_its_space_has(log: list[str]) -> None:
    both = space(object(), ["first", "second"], RUN)
    known: list[dict[str, Any]] = [
        {"first_level": 3},
        {"second_level": 1},
        {"first_level": 3},
        {"second_level": 9},
        {"refuser_level": 1},
    ]
    assert starts(both, known)[:3] == [
        {"first_level": 3, "second_level": 0},
        {"first_level": 0, "second_level": 1},
        {"first_level": 2, "second_level": 2},
    ]
    assert len(starts(both, known)) == 5
    assert starts(both, known, alone=False) == starts(both, known)[:3]


def test_a_search_starts_with_no_identity_that_its_plan_excludes(log: list[str]) -> None:
    first, second = space(object(), ["first", "second"], RUN)
    assert starts((first, second.among((3,)))) == [
        {"first_level": 2, "second_level": 3},
        {"first_level": 0, "second_level": 3},
    ]


def test_what_a_method_at_its_identity_ignores_makes_no_other_setting(log: list[str]) -> None:
    both = space(object(), ["first", "second"], RUN, freed=["first_width", "second_width"])
    idle = {"first_level": 0, "first_width": 5, "second_level": 1, "second_width": 4}
    assert effective(both, idle) == {**idle, "first_width": 2}


def test_applied_without_methods_leaves_the_pipeline_alone(
    make_pipeline: Callable[..., Any],
) -> None:
    pipeline = make_pipeline()
    with applied(pipeline, {}, [], RUN):
        assert "forward" not in vars(pipeline.unet)


def test_applied_accelerates_a_pipeline_by_default_settings(
    make_pipeline: Callable[..., Any],
) -> None:
    pipeline = make_pipeline()
    with applied(pipeline, {}, ["deepcache"], RUN):
        assert "forward" in vars(pipeline.unet)
    assert "forward" not in vars(pipeline.unet)


@pytest.mark.parametrize(
    ("parameter", "values", "text"),
    [
        (whole(), (1, 2, 3, 4, 5), "1..5"),
        (whole(identity=1), (1, 2, 3, 4, 5), "1..5"),
        (whole(identity=0), (1, 2, 3, 4, 5), "1..5 or 0"),
        (whole(low=2, high=9, step=3), (2, 5, 8), "2..9 in steps of 3"),
        (
            whole(kind="float", default=0.1, low=0.0, high=0.3, step=0.1),
            (0.0, 0.1, 0.2, 0.3),
            "0.0..0.3 in steps of 0.1",
        ),
        (whole(kind="float", default=0.1, low=0, high=1), None, "0..1"),
        (whole(kind="choice", default="a", choices=("a", "b")), ("a", "b"), "'a', 'b'"),
    ],
)
def test_a_parameter_lists_its_values(
    parameter: Parameter, values: tuple[Any, ...] | None, text: str
) -> None:
    assert parameter.values() == values
    assert parameter.range == text


def test_a_value_with_a_rounding_error_becomes_the_one_that_is_listed() -> None:
    stepped = whole(kind="float", default=0.1, low=0.0, high=0.5, step=0.1)
    assert 0.1 + 0.2 != 0.3
    assert stepped.listed(0.1 + 0.2) == 0.3
    continuous = whole(kind="float", default=0.1, low=0.0, high=0.5)
    assert continuous.listed(0.1 + 0.2) == 0.1 + 0.2


@pytest.mark.parametrize(
    ("parameter", "accepted", "refused"),
    [
        (whole(), [1, 5], [0, 6, 2.5, 2.0, True, "2", None, float("nan")]),
        (whole(low=2, identity=0), [0, 2, 5], [1, False, 0.0]),
        (whole(low=2, high=9, step=3), [2, 5, 8], [3, 9]),
        (
            whole(kind="float", default=0.5, low=0, high=1),
            [0, 0.25, 1],
            [-0.1, 1.5, True, "0.5", float("nan"), float("inf")],
        ),
        (
            whole(kind="float", default=0.5, low=0.1, high=0.75, step=0.1),
            [0.1, 0.1 + 0.2, 0.7],
            [0.0, 0.15, 0.75, 1],
        ),
        (
            whole(kind="float", default=0.5, low=0.1, high=1, identity=0.0),
            [0, 0.0, 0.1],
            [0.05, False],
        ),
        (whole(kind="choice", default=True, choices=(True,)), [True], [1, "True", False]),
        (whole(kind="choice", default=3, choices=(0, 3)), [0, 3], [1, 3.0, False]),
    ],
)
def test_a_parameter_accepts_its_values_alone(
    parameter: Parameter, accepted: list[Any], refused: list[Any]
) -> None:
    assert [value for value in accepted if not parameter.accepts(value)] == []
    assert [value for value in refused if parameter.accepts(value)] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 6}, r"`low <= high` must hold, but got \(low=6, high=5\)"),
        ({"low": None}, r"`low <= high` must hold, but got \(low=None, high=5\)"),
        ({"default": 7}, "default 7 is not in 1..5"),
        ({"kind": "choice", "choices": (2, "a")}, "a choice needs choices of one type"),
        ({"kind": "choice"}, "a choice needs choices of one type"),
        ({"mildest": "lowest"}, "mildest must be low or high, got 'lowest'"),
        (
            {"kind": "choice", "choices": ("a", "b"), "default": "a", "mildest": "low"},
            "mildest needs numbers, got default 'a'",
        ),
    ],
)
def test_a_parameter_must_not_contradict_itself(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(**fields)


def test_a_parameter_ends_at_its_smallest_and_largest_value() -> None:
    assert whole().ends == (1, 5)
    assert whole(kind="float", default=0.5, low=0.0, high=1.0).ends == (0.0, 1.0)
    assert whole(kind="choice", default="a", choices=("a", "b", "c")).ends == ("a", "b", "c")


def test_a_narrowed_parameter_keeps_a_default_in_its_range() -> None:
    assert whole(default=5).within(1, 3).default == 3
    assert whole(default=1).within(2, 3).default == 2
    assert whole(default=2).within(1, 3).default == 2
    assert whole(default=2).among((3, 5)).default == 3
    assert whole(default=2).among((0, 2)).default == 2


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        (whole(), (1, 2, 3, 4, 5)),
        (whole(identity=1), (1, 2, 3, 4, 5)),
        (whole(identity=0), (0, 1, 2, 3, 4, 5)),
        (whole(identity=6), (1, 2, 3, 4, 5, 6)),
        (whole(identity=9), (9, 1, 2, 3, 4, 5)),
        (whole(low=2, high=9, step=3, identity=11), (2, 5, 8, 11)),
        (whole(low=2, high=8, step=3, identity=0), (0, 2, 5, 8)),
        (
            whole(kind="float", default=0.5, low=0.25, high=0.75, step=0.25, identity=0.0),
            (0.0, 0.25, 0.5, 0.75),
        ),
        (whole(kind="float", default=0.5, low=0.25, high=0.75, identity=0.0), None),
        (whole(kind="choice", default="a", choices=("a", "b"), identity="c"), ("c", "a", "b")),
    ],
)
def test_a_widened_parameter_holds_its_identity(
    parameter: Parameter, values: tuple[Any, ...] | None
) -> None:
    widened = parameter.widened()
    assert widened.values() == values
    assert widened.default == parameter.default
    assert widened.holds_identity == (parameter.identity is not None)
    assert widened.widened() == widened


def schedulers() -> list[str]:
    """Every scheduler that diffusers declares to fit an SD pipeline, and LCM's kind."""
    from diffusers import DDIMScheduler

    names = {scheduler.__name__ for scheduler in DDIMScheduler().compatibles}
    names -= {"DPMSolverSDEScheduler"}  # needs torchsde
    return sorted(names | {"LCMScheduler", "TCDScheduler", "SASolverScheduler"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, in the schedulers
@pytest.mark.parametrize("name", schedulers())
def test_call_steps_count_the_steps_of_each_call_with_every_scheduler(name: str) -> None:
    import diffusers

    scheduler = getattr(diffusers, name)()
    pipeline = SimpleNamespace(scheduler=scheduler)
    steps = CallSteps(pipeline)
    sample = torch.zeros(1, 4, 8, 8)
    scheduler.set_timesteps(5)
    for _ in range(2):
        counted, regular, last = [], [], []
        for timestep in scheduler.timesteps:
            counted.append(steps.advance())
            regular.append(steps.step)
            last.append(steps.is_last)
            scheduler.scale_model_input(sample, timestep)
            scheduler.step(sample, timestep, sample)
        assert counted == list(range(len(scheduler.timesteps)))
        assert len(counted) >= 5
        # Counted so that the last of five regular steps has index 4, whatever came before.
        assert scheduler.order == 2 or regular[-5:] == list(range(5))
        assert regular[0] <= 0
        assert last == [False] * (len(counted) - 1) + [True]
        scheduler.set_timesteps(5)
    assert steps.advance() == 0
    assert steps.advance() == 1
    scheduler.set_timesteps(5)  # the call was broken off
    assert steps.advance() == 0


def test_call_steps_follow_a_scheduler_that_is_replaced() -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    pipeline = SimpleNamespace(scheduler=DDIMScheduler())
    steps = CallSteps(pipeline)
    assert [steps.advance(), steps.advance()] == [0, 1]
    pipeline.scheduler = EulerDiscreteScheduler()
    assert steps.advance() == 0
