"""What every section of settings is strict about, and values that are written in more than one way."""

import pytest
from pydantic import Field, ValidationError

from vla_rl.run.section import Indices, RunName, Section, States, check_name, parse_indices


class Example(Section):
    number: int = 1
    flag: bool = False
    indices: Indices = Field([0])
    states: States = Field([0])
    name: RunName = None


class Outer(Section):
    inner: Example = Example()


@pytest.mark.parametrize(
    ("written", "meant"), [("0-3,7", [0, 1, 2, 3, 7]), (5, [5]), ([2, 1], [2, 1]), ("random", "random"), (True, True)]
)
def test_ranges_lists_and_one_number_are_indices_and_the_rest_is_left_to_the_type(written, meant):
    assert parse_indices(written) == meant


@pytest.mark.parametrize("written", ["3-1", "a", "1,,2", "0-9999", "-1", "1;2"])
def test_what_is_no_list_of_indices(written):
    with pytest.raises(ValueError, match="is not a list of indices; write it like 0-39,45"):
        parse_indices(written)


@pytest.mark.parametrize(
    "values", [{"number": True}, {"states": [50]}, {"indices": [-1]}, {"numbr": 2}, {"name": "a/b"}]
)
def test_values_of_another_kind_and_unknown_names_are_errors(values):
    with pytest.raises(ValidationError):
        Example(**values)


def test_a_section_of_comments_is_one_of_defaults_and_settings_do_not_change():
    assert Outer(inner=None).inner == Example()
    with pytest.raises(ValidationError, match="frozen"):
        Example().number = 2


@pytest.mark.parametrize("name", ["a", "task0 seed=1", "über", "...", "x" * 255])
def test_names_of_folders(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", " ", ".", "..", "-a", "a/b", "a\nb", "x" * 256])
def test_what_cannot_name_a_folder(name):
    with pytest.raises(ValueError, match="cannot name a folder"):
        check_name(name)
