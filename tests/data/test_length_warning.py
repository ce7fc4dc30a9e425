"""Rows that are too long vanish with a word that is in proportion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pe_dpo.data
from pe_dpo.recipe import DataSection


@pytest.fixture
def warnings_of(write_lines: Callable[..., Path], tokenizer: Any) -> Callable[..., list[str]]:
    """What is said of 100 pairs, so many of them 27 tokens long, the others 7."""

    def prepare(longer: int, context: int | None = None, answer: str = "yes", **settings: Any) -> list[str]:
        rows = ({"prompt": f"{n:02}." + "p" * (n < longer) * 20, "chosen": answer, "rejected": "no"} for n in range(100))
        section = DataSection(train=str(write_lines(*rows)), max_length=10, eval=0, **settings)
        return pe_dpo.data.prepare_pairs(section, tokenizer=tokenizer, context_length=context).report.warnings

    return prepare


def test_five_rows_of_a_hundred_vanish_quietly_and_six_do_not(warnings_of: Callable[..., list[str]]) -> None:
    assert warnings_of(5) == []
    assert warnings_of(6) == [
        "6 of 100 rows (6%) are left out because they are longer than 10 tokens: data.max_length: 27 keeps 95%; "
        "data.overlong: truncate_prompt keeps whole answers and cuts the beginning of long prompts"
    ]


def test_the_length_that_is_named_keeps_that_many(warnings_of: Callable[..., list[str]]) -> None:
    assert "data.max_length: 27 keeps 95%" in warnings_of(30)[0]


def test_no_more_is_proposed_than_the_model_takes(warnings_of: Callable[..., list[str]]) -> None:
    assert "data.max_length: 20, the model's context, keeps 70%;" in warnings_of(30, context=20)[0]
    assert "the model's context of 10 tokens has no room for more;" in warnings_of(30, context=10)[0]


def test_cut_prompts_are_not_left_out(warnings_of: Callable[..., list[str]]) -> None:
    assert warnings_of(30, overlong="truncate_prompt") == []
