"""The recipes that come with the package: found by name, shown with their header, copied without overwriting."""

from pathlib import Path

import pytest

from pe_dpo.errors import RecipeError, UsageError
from pe_dpo.recipe import copy_recipe, find_recipe, load_recipe, recipe_header, recipe_names


def test_names_are_sorted_and_without_suffix() -> None:
    names = recipe_names()
    assert names == sorted(names)
    assert "qwen2.5-7b-dpo" in names
    assert not any(name.endswith(".yaml") for name in names)


@pytest.mark.parametrize("source", ["qwen2.5-7b-dpo", "qwen2.5-7b-dpo.yaml", "recipes/qwen2.5-7b-dpo.yaml"])
def test_a_shipped_recipe_is_found_by_name_from_anywhere(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(source).model.base == "Qwen/Qwen2.5-7B-Instruct"


def test_a_file_wins_over_a_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen2.5-7b-dpo.yaml").write_text("mine")
    assert find_recipe("qwen2.5-7b-dpo.yaml").read_text() == "mine"


@pytest.mark.parametrize(("source", "message"), [
    ("qwen2.5-7b-dp", r"no such file and no such recipe; did you mean qwen2\.5-7b-dpo\?"),
    ("zzzzzzzz", "no such file and no such recipe; `pe-dpo recipes list` shows those that come with the package"),
    ("elsewhere/qwen2.5-7b-dpo.yaml", "no such file and no such recipe"),
])  # fmt: skip
def test_a_name_that_is_not_there_is_told_with_the_nearest(source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_recipe(source)


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder; a recipe is a YAML file"):
        find_recipe(tmp_path)


def test_the_header_is_the_comment_at_the_top_without_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# One 8 GB GPU.\n#   Two words.\nmodel: {}  # not this\n# nor this\n")
    assert recipe_header(str(path)) == "One 8 GB GPU.\nTwo words."


def test_a_recipe_without_comment_has_an_empty_header(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {}\n")
    assert recipe_header(str(path)) == ""


def test_a_copy_into_a_folder_keeps_its_name_and_bytes(tmp_path: Path) -> None:
    copy = copy_recipe("smollm3-3b-dpo", tmp_path)
    assert copy == tmp_path / "smollm3-3b-dpo.yaml"
    assert copy.read_bytes() == find_recipe("smollm3-3b-dpo").read_bytes()


def test_a_copy_to_a_file_makes_the_folders_above_it(tmp_path: Path) -> None:
    assert copy_recipe("smollm3-3b-dpo", tmp_path / "a" / "b" / "mine.yaml").name == "mine.yaml"
    assert load_recipe(tmp_path / "a" / "b" / "mine.yaml") == load_recipe("smollm3-3b-dpo")


def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.yaml: exists already; name another file"):
        copy_recipe("smollm3-3b-dpo", mine)
    assert mine.read_text() == "mine"


def test_a_copy_of_no_recipe_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file and no such recipe"):
        copy_recipe("zzzzzzzz", tmp_path / "new" / "x.yaml")
    assert list(tmp_path.iterdir()) == []
