"""The metadata of a run's model card, as hubs read it."""

from pathlib import Path

import pytest
import yaml

from pe_dpo.recipe import load_recipe
from pe_dpo.runs.model_card import model_card


def metadata(base: str, tmp_path: Path) -> dict[str, object]:
    """What a hub reads of the card of a run on a base; the card's text names the base all the same."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"base": base}, "data": {"train": "pairs.jsonl"}, "output": "run"}))
    card = model_card(load_recipe(recipe), {}, {})
    assert f"Base: `{base}`." in card
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("base", ["org/name", "models/a: b", "models/a #1"])
def test_the_metadata_name_the_base_whatever_letters_are_in_it(base: str, tmp_path: Path) -> None:
    assert metadata(base, tmp_path) == {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "preference-optimization", "pe-dpo"],
    }


def test_the_card_names_every_place_of_data(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: b}\noutput: o\ndata: {train: [a.jsonl, {path: o/n, split: s, weight: 2}]}\n")
    assert "Trained by pe-dpo on `a.jsonl, o/n (split s, weight 2)`." in model_card(load_recipe(recipe), {}, {})


def test_a_base_that_is_a_path_is_no_hub_name(tmp_path: Path) -> None:
    (tmp_path / "my: base").mkdir()
    assert "base_model" not in metadata(str(tmp_path / "my: base"), tmp_path)
