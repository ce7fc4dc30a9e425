"""The page for people who come from other tools is made of the data that convert and the loader have."""

import typing

import pytest
from other_tools import BEGIN, PAGE, tables

from pe_dpo.recipe import Recipe, known_keys
from pe_dpo.recipe.elsewhere import TOOLS
from pe_dpo.recipe.section import Section


def test_the_tables_of_the_page_are_those_of_the_data() -> None:
    """Write them anew with `python tools/other_tools.py --write`."""
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) :] == tables()


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_what_a_key_is_said_to_be_here_is_a_key_of_the_recipe(tool) -> None:
    sections = typing.get_type_hints(Recipe)
    assert all(issubclass(kind, Section) for name, kind in sections.items() if name != "output")
    assert {key.name_here for key in tool.keys.values() if key.here} - set(known_keys()) == set()


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_key_that_is_nothing_here_says_why(tool) -> None:
    assert [name for name, key in tool.keys.items() if not key.here and not key.differs] == []


def test_no_two_tools_are_told_by_one_key() -> None:
    told = [key for tool in TOOLS.values() for key in tool.telling]
    assert len(told) == len(set(told))
