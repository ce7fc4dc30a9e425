"""Numbers that no run can mean are refused, all at once; those that few do are pointed at; old records stay readable."""

import re

import pytest

from pe_dpo.errors import RecipeError
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.recipe.ranges import RANGES, check_ranges, number_of

TEXT = "model: {base: somewhere}\ndata: {train: pairs.jsonl}\noutput: run\n"


def checked(*overrides):
    return check_ranges(recipe_from_yaml(TEXT, "test", overrides))


def test_defaults_and_what_published_runs_take_are_not_spoken_of():
    assert checked() == []
    assert checked("loss.preset=simpo", "loss.beta=10", "train.learning_rate=1e-3", "train.pairs_per_step=512") == []
    assert checked("loss.preset=ipo", "adapter.rank=256", "train.epochs=3", "loss.gamma=auto") == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rate=50", "train.learning_rate: 50 is not between 1e-12 and 10: Adam moves"),
        ("train.learning_rate=1e-30", "train.learning_rate: 1e-30 is not between"),
        ("train.epochs=5000", "train.epochs: 5000 is not between 0 and 1000"),
        ("train.pairs_per_step=10000000", "train.pairs_per_step: 1e+07 is not between 1 and 1e+06"),
        ("train.tokens_per_microbatch=1000000000", "train.tokens_per_microbatch: 1e+09 is not between"),
        ("adapter.alpha=1e8", "adapter.alpha / adapter.rank: 6.25e+06 is not between 0.0001 and 10000"),
        ("loss.beta=1e8", "loss.beta: 1e+08 is not between 1e-06 and 10000"),
        ("loss.gamma=20000", "loss.gamma: 20000 is not between 0 and 10000"),
        ("loss.margin=-1e8", "loss.margin: -1e+08 is not between -1e+06 and 1e+06"),
    ],
)
def test_a_number_that_no_run_can_mean_is_refused_with_its_range_and_why(override, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        checked(override)


def test_all_that_is_refused_is_said_at_once():
    with pytest.raises(
        RecipeError, match=r"(?s)^train\.epochs: .*\nloss\.beta: .*\ntrain\.weight_decay: 0\.5 at learning_rate 2"
    ):
        checked("train.epochs=2000", "loss.beta=1e6", "train.learning_rate=2", "train.weight_decay=0.5")


def test_what_is_unusual_is_pointed_at():
    said = checked("train.learning_rate=0.5", "train.epochs=50", "loss.beta=500")
    assert [line.split(" (")[0] for line in said] == [
        "train.learning_rate: 0.5 is unusual",
        "train.epochs: 50 is unusual",
        "loss.beta: 500 is unusual",
        "loss.gamma: 500 is unusual",
    ]


def test_each_range_is_about_a_number_of_the_recipe_and_holds_what_is_usual():
    recipe = recipe_from_yaml(TEXT, "test", ["train.max_steps=5", "train.tokens_per_microbatch=9", "data.max_length=64"])
    for key, possible, usual, why in RANGES:
        assert possible[0] <= usual[0] < usual[1] <= possible[1], key
        assert usual[0] <= number_of(recipe, key) <= usual[1], key
        assert why
