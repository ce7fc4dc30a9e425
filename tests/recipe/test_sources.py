"""Places of data in a recipe: one or several, plain or with more about them; kept through YAML, overrides and resume."""

from pathlib import Path

import pytest
import yaml

from pe_dpo.disk import matching_paths
from pe_dpo.recipe import (
    DataSource,
    Recipe,
    describe_sources,
    list_sources,
    recipe_difference,
    recipe_from_yaml,
    recipe_to_yaml,
    with_absolute_paths,
)

TWO = "[a.jsonl, {path: b.jsonl, weight: 0.5, columns: {chosen: better}}]"


def recipe(data: str, *overrides: str) -> Recipe:
    return recipe_from_yaml(f"model: {{base: b}}\noutput: o\ndata: {{{data}}}\n", "r.yaml", overrides)


@pytest.mark.parametrize("data", [
    f"train: {TWO}", f"train: {TWO}, eval: [c.jsonl, d.jsonl]", "train: 'part-*.jsonl', eval: {path: x, split: test}",
    "train: {path: owner/name, subset: en, split: s, revision: '1.0'}",
])  # fmt: skip
def test_places_survive_the_way_to_yaml_and_back(data: str) -> None:
    first = recipe(data)
    again = recipe_from_yaml(recipe_to_yaml(first), "again.yaml")
    assert again == first
    assert recipe_difference(first, again) == []


@pytest.mark.parametrize("place", ["{path: a}", "[a]", "[{path: a, weight: 1.0}]", "{path: a, split: null}"])
def test_one_place_of_which_only_the_path_is_said_is_its_path(place: str) -> None:
    assert recipe(f"train: {place}") == recipe("train: a")


def test_an_override_may_name_several_places() -> None:
    assert recipe("train: x", f"data.train={TWO}") == recipe(f"train: {TWO}")


def test_a_difference_shows_the_places_whole() -> None:
    assert recipe_difference(recipe("train: a"), recipe("train: [a, b]")) == ["data.train: 'a' → ['a', 'b']"]
    changed = recipe("train: {path: a, weight: 2}")
    (line,) = recipe_difference(recipe("train: a"), changed)
    assert line.startswith("data.train: 'a' → {'path': 'a', 'weight': 2.0,")


def test_places_are_listed_with_their_defaults_and_described_in_a_line() -> None:
    data = recipe(f"train: {TWO}").data
    second = DataSource(path="b.jsonl", weight=0.5, columns={"chosen": "better"})
    assert list_sources(data.train) == [DataSource(path="a.jsonl"), second]
    assert describe_sources(data.train) == "a.jsonl, b.jsonl (weight 0.5)"
    assert describe_sources(recipe("train: {path: o/n, subset: en, split: s, revision: r}").data.train) == (
        "o/n (subset en, split s, revision r)"
    )
    assert (describe_sources(0.1), describe_sources(None)) == ("0.1", "None")


def test_paths_are_made_absolute_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "part-1.jsonl"):
        (tmp_path / name).write_text("{}")
    train = "[a.jsonl, {path: b.jsonl, weight: 2}, 'part-*.jsonl', owner/name]"
    found = with_absolute_paths(recipe(f"train: {train}, eval: [a.jsonl, x]"))
    paths = [source.path for source in list_sources(found.data.train)]
    assert paths == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl", f"{tmp_path}/part-*.jsonl", "owner/name"]
    assert found.data.eval == [f"{tmp_path}/a.jsonl", "x"]
    assert list_sources(found.data.train)[1].weight == 2


def test_a_glob_holds_in_a_folder_whose_name_has_the_marks_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "[my] data").mkdir()
    (tmp_path / "[my] data" / "part-1.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "[my] data")
    found = with_absolute_paths(recipe("train: 'part-*.jsonl'"))
    monkeypatch.chdir(tmp_path)
    assert matching_paths(list_sources(found.data.train)[0].path) == [tmp_path / "[my] data" / "part-1.jsonl"]
    assert with_absolute_paths(found) == found


def test_a_link_to_a_file_without_its_suffix_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0a1b2c").write_text("{}")
    (tmp_path / "real.jsonl").write_text("{}")
    (tmp_path / "train.jsonl").symlink_to("0a1b2c")  # as in a hub's cache
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    found = with_absolute_paths(recipe("train: train.jsonl, eval: link.jsonl")).data
    assert (found.train, found.eval) == (f"{tmp_path}/train.jsonl", f"{tmp_path}/real.jsonl")


def test_a_saved_recipe_is_plain_yaml() -> None:
    saved = yaml.safe_load(recipe_to_yaml(recipe(f"train: {TWO}")))
    assert saved["data"]["train"][0] == "a.jsonl"
    assert saved["data"]["train"][1]["columns"] == {"chosen": "better"}
