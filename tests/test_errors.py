"""Errors are one line, and unknown names are answered by the nearest valid ones."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelsearch import errors
from accelsearch.errors import AccelSearchError, PlanError, TrialError, nearest, shown

LEAVES = [
    leaf
    for leaf in vars(errors).values()
    if isinstance(leaf, type) and issubclass(leaf, AccelSearchError)
]


@pytest.mark.parametrize("leaf", LEAVES)
@given(message=st.text())
def test_every_error_is_one_line_whatever_it_quotes(
    leaf: type[AccelSearchError], message: str
) -> None:
    assert len(str(leaf(message)).splitlines()) <= 1


def test_a_message_of_several_lines_keeps_its_words() -> None:
    assert str(PlanError("cannot load\n\n   the model:\r\nno file")) == (
        "cannot load the model: no file"
    )


def test_a_message_of_one_line_is_left_as_it_is() -> None:
    assert str(PlanError("got  'a  b'")) == "got  'a  b'"


def test_bad_input_and_a_failed_trial_exit_differently() -> None:
    assert PlanError("x").exit_code == 2
    assert TrialError("x").exit_code == 1


def test_a_trial_error_carries_its_reason_across_processes() -> None:
    error = pickle.loads(pickle.dumps(TrialError("images contain NaN")))
    assert isinstance(error, TrialError)
    assert error.reason == "images contain NaN"


def test_nearest_guesses_a_misspelt_name_and_lists_all_of_a_few() -> None:
    assert nearest("deepcahe", ["tome", "deepcache"]) == (
        "; did you mean 'deepcache'? valid: 'deepcache', 'tome'"
    )


def test_nearest_guesses_nothing_for_a_name_unlike_all() -> None:
    assert nearest("xyz", ["tome", "deepcache"]) == "; valid: 'deepcache', 'tome'"


def test_nearest_takes_a_beginning_in_any_case_for_the_whole() -> None:
    names = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"]
    assert nearest("ddim", names).startswith("; did you mean 'DDIMScheduler'?")


def test_nearest_shows_five_of_many() -> None:
    names = [f"name{index:02d}" for index in range(13)]
    assert nearest("name07", names[:12]).count("name") == 13  # the guess, and all 12
    told = nearest("nam07", names)
    assert told.startswith("; did you mean 'name07'? nearest of 13 valid names: 'name07', ")
    assert told.partition("names: ")[2].count("name") == 5


def test_nearest_says_where_nothing_is_valid() -> None:
    assert nearest("x", []) == "; there is no valid name"


def test_a_shown_value_is_its_repr_cut_to_what_a_line_bears() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown([1.5, None]) == "[1.5, None]"
    assert len(shown("x" * 1000)) == 80
    assert shown("x" * 1000, 120).endswith("xxx...")
    assert shown(16**5000) == "a huge int"


@given(name=st.text(), valid=st.lists(st.text(min_size=1), min_size=1))
def test_nearest_guesses_a_valid_name_itself(name: str, valid: list[str]) -> None:
    chosen = valid[0]
    assert f"did you mean {chosen!r}?" in nearest(chosen, valid) or any(
        other != chosen and other.casefold() == chosen.casefold() for other in valid
    )
    assert len(nearest(name, valid).splitlines()) == 1
