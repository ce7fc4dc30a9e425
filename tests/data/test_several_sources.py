"""Several places in one recipe: each with its shape and weight, counted apart, sampled by hash."""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pe_dpo.data
from pe_dpo.data import DataReport, EncodedPair, PreparedData
from pe_dpo.data.pairs import prompt_key
from pe_dpo.data.reading import read_places
from pe_dpo.data.sources import find_places, weigh
from pe_dpo.errors import DataError
from pe_dpo.recipe import DataSection

IDS = np.array([1], dtype=np.int32)


def row(prompt: str, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prepare(tokenizer: Any, **settings: Any) -> PreparedData:
    return pe_dpo.data.prepare_pairs(DataSection(max_length=99, **settings), tokenizer=tokenizer)


def wheres(pairs: list[EncodedPair]) -> list[str]:
    return [pair.where for pair in pairs]


def test_a_list_of_paths_is_read_in_its_order_and_each_is_counted(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    one, other = write_lines(row("a"), row("b"), name="one.jsonl"), write_lines(row("c"), name="other.jsonl")
    data = prepare(tokenizer, train=[str(one), str(other)], eval=0)
    assert wheres(data.train) == ["one.jsonl:1", "one.jsonl:2", "other.jsonl:1"]
    assert data.report.files == {"one.jsonl": 2, "other.jsonl": 1}
    assert [(source["pairs"], source["trained_on"]) for source in data.report.sources] == [(2, 2), (1, 1)]
    assert f"pairs to train on: 2 of 2 from {one}, 1 of 1 from {other}" in data.report.lines()
    assert json.loads(json.dumps(data.report.to_dict()))["sources"][1] == {"source": str(other), "pairs": 1, "trained_on": 1}


def test_several_paths_give_the_same_pairs_as_one_file_of_their_rows(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    rows = [row(f"p{number}") for number in range(40)]
    parts = [str(write_lines(*rows[:15], name="one.jsonl")), str(write_lines(*rows[15:], name="other.jsonl"))]
    together, apart = prepare(tokenizer, train=str(write_lines(*rows))), prepare(tokenizer, train=parts)
    for side in ("train", "held_out"):
        assert pe_dpo.data.data_hash(getattr(together, side)) == pe_dpo.data.data_hash(getattr(apart, side))


def test_sources_may_differ_in_shape_and_columns(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    plain = write_lines(row("a"), name="plain.jsonl")
    mapped = write_lines({"q": "b", "best": "yes", "bad": "no"}, name="mapped.jsonl")
    start = "\n\nHuman: c\n\nAssistant:"
    dialogue = write_lines({"chosen": f"{start} yes", "rejected": f"{start} no"}, name="hh.jsonl")
    columns = {"prompt": "q", "chosen": "best", "rejected": "bad"}
    data = prepare(tokenizer, train=[str(plain), {"path": str(mapped), "columns": columns}, str(dialogue)], eval=0)
    assert [tokenizer.decode(pair.prompt_ids) for pair in data.train] == ["a", "b", start]
    assert data.report.shape.count(" | ") == 1


def test_columns_of_a_source_stand_for_those_of_all(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    one = write_lines({"q": "a", "best": "yes", "bad": "no"}, name="one.jsonl")
    other = write_lines({"q": "b", "bad": "yes", "best": "no"}, name="other.jsonl")
    swapped = {"prompt": "q", "chosen": "bad", "rejected": "best"}
    data = prepare(
        tokenizer, train=[str(one), {"path": str(other), "columns": swapped}], eval=0,
        columns={"prompt": "q", "chosen": "best", "rejected": "bad"},
    )  # fmt: skip
    assert [tokenizer.decode(pair.chosen_ids) for pair in data.train] == ["yes<e>", "yes<e>"]


def test_half_a_weight_keeps_the_pairs_of_half_of_the_prompts_by_hash(tokenizer: Any, write_lines: Callable[..., Path]) -> None:
    rows = [row(f"p{number}", answer) for number in range(10) for answer in ("yes", "yea")]
    path = write_lines(*rows)
    data = prepare(tokenizer, train={"path": str(path), "weight": 0.5}, eval=0)
    ranked = sorted(range(10), key=lambda n: hashlib.sha256(prompt_key(f"p{n}").encode()).hexdigest())
    expected = [f"train.jsonl:{2 * number + at}" for number in sorted(ranked[:5]) for at in (1, 2)]
    assert wheres(data.train) == expected
    write_lines(*reversed(rows))
    again = prepare(tokenizer, train={"path": str(path), "weight": 0.5}, eval=0)
    texts = [{tokenizer.decode(pair.prompt_ids) for pair in side.train} for side in (data, again)]
    assert texts[0] == texts[1]
    assert f"pairs to train on: 10 of 20 from {path} (weight 0.5)" in data.report.lines()


@pytest.mark.parametrize(("weight", "counts"), [
    (1.0, {1: 10}), (2.0, {2: 10}), (2.3, {2: 7, 3: 3}), (1.1, {1: 9, 2: 1}), (0.1, {1: 1}), (0.001, {1: 1}),
])  # fmt: skip
def test_a_weight_repeats_whole_copies_and_a_share_of_the_prompts(weight: float, counts: dict[int, int]) -> None:
    pairs = [EncodedPair(IDS, IDS, IDS, 0.0, f"x:{number}", prompt_key(str(number))) for number in range(10)]
    weighed = weigh(pairs, weight)
    assert Counter(Counter(pair.where for pair in weighed).values()) == counts


def test_a_seed_takes_the_pairs_of_other_prompts(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    """The entry in the cache is another one, too."""
    path = str(write_lines(*(row(f"question {number}") for number in range(40))))
    section = DataSection(train={"path": path, "weight": 0.5}, eval=0.0, max_length=99)
    first, *others = (wheres(pe_dpo.data.prepare_pairs(section, tokenizer=tokenizer, seed=s).train) for s in (None, 0, 1, 0))
    assert first == wheres(pe_dpo.data.prepare_pairs(section, tokenizer=tokenizer).train)
    assert [len(one) for one in (first, *others)] == [20] * 4
    assert others[0] == others[2] and len({tuple(one) for one in (first, *others)}) == 3


def test_no_weight_changes_nothing() -> None:
    pairs = [EncodedPair(IDS, IDS, IDS, 0.0, f"x:{number}", "k") for number in range(3)]
    assert weigh(pairs, 1.0) == pairs
    assert weigh([], 0.5) == weigh([], 2.5) == []


def test_held_out_pairs_are_those_without_weights_and_never_repeated(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    one = str(write_lines(*(row(f"p{number}") for number in range(60)), name="one.jsonl"))
    other = str(write_lines(*(row(f"q{number}") for number in range(60)), name="other.jsonl"))
    plain = prepare(tokenizer, train=[one, other], eval=0.1)
    weighed = prepare(tokenizer, train=[{"path": one, "weight": 3}, {"path": other, "weight": 0.25}], eval=0.1)
    assert wheres(weighed.held_out) == wheres(plain.held_out)
    assert len(weighed.held_out) == 12
    times = Counter(pair.where.split(":")[0] for pair in weighed.train)
    trained = Counter(pair.where.split(":")[0] for pair in plain.train)
    assert times == {"one.jsonl": 3 * trained["one.jsonl"], "other.jsonl": round(trained["other.jsonl"] / 4)}


def test_copies_that_a_weight_asks_for_are_no_duplicates_but_the_same_rows_in_two_places_are(
    write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    one, other = write_lines(row("a"), row("b"), name="one.jsonl"), write_lines(row("b"), name="other.jsonl")
    weighed = prepare(tokenizer, train={"path": str(one), "weight": 2}, eval=0)
    assert wheres(weighed.train) == ["one.jsonl:1", "one.jsonl:2"] * 2
    assert "exact duplicate" not in weighed.report.noted
    twice = prepare(tokenizer, train=[str(one), str(other)], eval=0)
    assert twice.report.noted["exact duplicate"] == ["other.jsonl:1"]


def test_one_file_named_twice_is_told_apart_and_its_duplicates_are_counted(
    write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    path = str(write_lines(row("a"), row("b")))
    data = prepare(tokenizer, train=[path, path], eval=0)
    assert data.report.files == {"train.jsonl": 2, "train.jsonl (2)": 2}
    assert data.report.noted["exact duplicate"] == ["train.jsonl (2):1", "train.jsonl (2):2"]


def test_files_of_one_name_are_called_by_their_folders_too(tmp_path: Path, tokenizer: Any) -> None:
    for folder, prompt in (("a", "p"), ("b", "q"), ("c", "r")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pairs.jsonl").write_text(json.dumps(row(prompt)))
    places = [str(tmp_path / folder / "pairs.jsonl") for folder in "abc"]
    data = prepare(tokenizer, train=places[:2], eval=places[2])
    assert data.report.files == {"pairs.jsonl": 1, "b/pairs.jsonl": 1, "c/pairs.jsonl": 1}
    assert (wheres(data.train), wheres(data.held_out)) == (["pairs.jsonl:1", "b/pairs.jsonl:1"], ["c/pairs.jsonl:1"])


def test_held_out_data_come_from_several_places_too(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    train = write_lines(row("a"))
    one, other = write_lines(row("b"), name="one.jsonl"), write_lines(row("c"), row("a"), name="other.jsonl")
    data = prepare(tokenizer, train=str(train), eval=[str(one), str(other)])
    assert wheres(data.held_out) == ["one.jsonl:1", "other.jsonl:1"]
    assert data.report.dropped == {"held-out row whose prompt is in training": ["other.jsonl:2"]}
    assert data.report.held_out_from == "one.jsonl, other.jsonl"


def test_the_held_out_sides_that_folders_bring_are_held_out_together(tmp_path: Path, tokenizer: Any) -> None:
    for folder, prompts in (("x", "ab"), ("y", "cd")):
        (tmp_path / folder).mkdir()
        for name, prompt in zip(("train", "test"), prompts, strict=True):
            (tmp_path / folder / f"{name}.jsonl").write_text(json.dumps(row(prompt)))
    data = prepare(tokenizer, train=[str(tmp_path / "x"), str(tmp_path / "y")])
    assert wheres(data.held_out) == ["test.jsonl:1", "y/test.jsonl:1"]
    shared = prepare(tokenizer, train=[str(tmp_path / "x"), str(tmp_path / "y")], eval=0)
    assert shared.report.unused_files == ["test.jsonl", "y/test.jsonl"]


def test_a_place_that_needs_a_map_is_told_that_it_can_have_one_of_its_own(
    write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    one, other = write_lines(row("a"), name="one.jsonl"), write_lines({"q": "b", "w": "x", "l": "y"}, name="other.jsonl")
    with pytest.raises(DataError, match=rf"\{{columns: \{{.*\nor for this place alone: \{{path: {other}, columns: …\}}"):
        prepare(tokenizer, train=[str(one), str(other)])


def test_no_columns_of_a_place_undo_those_of_all(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    one, other = write_lines({"q": "a", "chosen": "yes", "rejected": "no"}, name="one.jsonl"), write_lines(row("b"))
    data = prepare(tokenizer, train=[str(one), {"path": str(other), "columns": {}}], columns={"prompt": "q"}, eval=0)
    assert [tokenizer.decode(pair.prompt_ids) for pair in data.train] == ["a", "b"]


@pytest.mark.parametrize(("limit", "files"), [(2, {"one.jsonl": 2}), (3, {"one.jsonl": 2, "other.jsonl": 1})])
def test_a_limit_counts_over_all_places(
    write_lines: Callable[..., Path], tokenizer: Any, limit: int, files: dict[str, int]
) -> None:
    one = write_lines(row("a"), row("b"), name="one.jsonl")
    other = write_lines(row("c"), row("d"), name="other.jsonl")
    assert prepare(tokenizer, train=[str(one), str(other)], eval=0, limit=limit).report.files == files


def test_pairs_of_a_place_without_margins_are_noted_where_another_has_them(write_lines: Callable[..., Path]) -> None:
    one = write_lines({**row("a"), "margin": 1}, name="one.jsonl")
    other = write_lines(row("b"), name="other.jsonl")
    section, report = DataSection(train=[str(one), str(other)]), DataReport()
    read_places(find_places(section.train), section, report)
    assert report.noted == {"without a margin where others have one": ["other.jsonl:1"]}


def test_a_glob_takes_every_file_that_it_matches_and_holds_out_by_name(
    write_lines: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    for name in ("part-1", "part-2", "train"):
        write_lines(row(name), name=f"{name}.jsonl")
    (tmp_path / "notes.md").write_text("not data")
    data = prepare(tokenizer, train=str(tmp_path / "*"), eval=0)
    assert wheres(data.train) == ["part-1.jsonl:1", "part-2.jsonl:1", "train.jsonl:1"]
    write_lines(row("t"), name="test.jsonl")
    data = prepare(tokenizer, train=str(tmp_path / "*.jsonl"))
    assert (len(data.train), wheres(data.held_out)) == (3, ["test.jsonl:1"])
    data = prepare(tokenizer, train=str(tmp_path / "part-[2-9].jsonl"), eval=0)
    assert wheres(data.train) == ["part-2.jsonl:1"]


def test_what_is_not_read_of_a_folder_is_named_and_hidden_files_are_no_data(
    write_lines: Callable[..., Path], tmp_path: Path
) -> None:
    write_lines(row("a"), name="pairs.jsonl")
    write_lines(row("b"), name="._pairs.jsonl")
    (tmp_path / "test.jsonl.zst").write_bytes(b"x")
    ((_, train, held_out, unused),) = find_places(str(tmp_path))
    assert ([*train], [*held_out], unused) == (["pairs.jsonl"], [], ["test.jsonl.zst"])


def test_a_packed_file_beside_the_plain_one_is_not_read(write_lines: Callable[..., Path], tmp_path: Path) -> None:
    write_lines(row("a"), name="pairs.jsonl")
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(json.dumps(row("a")).encode()))
    for place in (str(tmp_path), str(tmp_path / "pairs*")):
        ((_, train, _, unused),) = find_places(place)
        assert ([*train], unused) == (["pairs.jsonl"], ["pairs.jsonl.gz"])


def test_a_folder_of_packed_files_alone_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"train\.jsonl\.zst: is packed in a way that is not read; unpack it first"):
        find_places(str(tmp_path))


def test_a_pattern_that_is_no_glob_is_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\*\.jsonl: there is no such file or folder"):
        find_places(str(tmp_path / "**.jsonl"))


def test_a_glob_goes_down_folders(tmp_path: Path, tokenizer: Any) -> None:
    for folder in ("a", "a/b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(json.dumps(row(folder)))
    data = prepare(tokenizer, train=f"{tmp_path}/**/*.jsonl", eval=0)
    assert [(pair.where, tokenizer.decode(pair.prompt_ids)) for pair in data.train] == [
        ("x.jsonl:1", "a/b"), ("a/x.jsonl:1", "a")]  # fmt: skip


def test_folders_below_a_glob_say_which_side_their_files_are_on(tmp_path: Path, tokenizer: Any) -> None:
    for folder in ("test-project/train", "test-project/test", "test-project/more"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.jsonl").write_text(json.dumps(row(folder)))
    data = prepare(tokenizer, train=f"{tmp_path}/test-project/**/*.jsonl")
    assert [tokenizer.decode(pair.prompt_ids) for pair in data.train] == ["test-project/more", "test-project/train"]
    assert [tokenizer.decode(pair.prompt_ids) for pair in data.held_out] == ["test-project/test"]


def test_a_glob_without_a_match_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing-\*\.jsonl: there is no such file or folder.*check the spelling"):
        find_places(str(tmp_path / "nothing-*.jsonl"))


def test_a_file_whose_name_has_the_marks_of_a_glob_is_that_file(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines(row("a"), name="pairs [1].jsonl")
    assert wheres(prepare(tokenizer, train=str(path), eval=0).train) == ["pairs [1].jsonl:1"]


def test_a_run_that_trained_on_what_is_held_out_by_its_name_now_is_read_as_it_was(
    write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    for name, prompts in (("helpful-train", "abcd"), ("helpful-test", "ef"), ("harmless-eval", "gh")):
        folder = write_lines(*map(row, prompts), name=f"{name}.jsonl").parent
    anew = prepare(tokenizer, train=str(folder))
    assert ([*anew.report.files], anew.report.held_out_from) == (
        ["helpful-train.jsonl", "harmless-eval.jsonl"], "harmless-eval.jsonl"
    )  # fmt: skip
    held_out = ["helpful-test.jsonl:1"]
    files = dict.fromkeys(["harmless-eval.jsonl", "helpful-test.jsonl", "helpful-train.jsonl"], 2)
    recorded = {"files": files, "held_out_from": "5.0% of the pairs, split by prompt", "held_out_rows": held_out}
    section = DataSection(train=str(folder), max_length=99)
    then = pe_dpo.data.prepare_pairs(section, tokenizer=tokenizer, recorded=recorded)
    assert ([*then.report.files], wheres(then.held_out), len(then.train)) == ([*files], held_out, 7)
    new = prepare(tokenizer, train=str(folder), eval=0.3)
    assert [*new.report.files] == ["helpful-train.jsonl"]
    section = section.model_copy(update={"eval": 0.3})
    again = pe_dpo.data.prepare_pairs(section, tokenizer=tokenizer, recorded=new.report.to_dict())
    assert (wheres(again.train), wheres(again.held_out)) == (wheres(new.train), wheres(new.held_out))


def test_a_split_of_a_folder_is_read_alone(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    for name in ("train", "test", "extra-00000-of-00002", "extra-00001-of-00002"):
        folder = write_lines(row(name), name=f"{name}.jsonl").parent
    data = prepare(tokenizer, train={"path": str(folder), "split": "extra"}, eval={"path": str(folder), "split": "test"})
    assert wheres(data.train) == ["extra-00000-of-00002.jsonl:1", "extra-00001-of-00002.jsonl:1"]
    assert wheres(data.held_out) == ["test.jsonl:1"]


def test_a_split_that_is_not_there_is_an_error_with_those_that_are(write_lines: Callable[..., Path]) -> None:
    folder = write_lines(row("a")).parent
    write_lines(row("b"), name="test.jsonl")
    with pytest.raises(DataError, match=r"has no split 'dev'; found test, train"):
        find_places(DataSection(train={"path": str(folder), "split": "dev"}).train)


@pytest.mark.parametrize(("key", "what"), [("split", "a file without splits"), ("subset", "a file"), ("revision", "a file")])
def test_what_a_file_cannot_have_is_refused(write_lines: Callable[..., Path], key: str, what: str) -> None:
    path = write_lines(row("a"))
    with pytest.raises(DataError, match=rf"train\.jsonl: is {what}, and `{key}` \(x\) belongs to others; leave it out"):
        find_places(DataSection(train={"path": str(path), key: "x"}).train)


def test_a_split_of_a_saved_dataset_is_read_alone(tmp_path: Path, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list([row(name)]) for name in ("train", "test", "extra")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    data = prepare(tokenizer, train={"path": str(tmp_path / "saved"), "split": "extra"}, eval=0)
    assert (wheres(data.train), data.report.unused_files) == (["saved/extra row 1"], ["saved/train", "saved/test"])
    with pytest.raises(DataError, match=r"saved: has no split 'dev'; found train, test, extra"):
        find_places(DataSection(train={"path": str(tmp_path / "saved"), "split": "dev"}).train)


def test_subset_split_and_revision_reach_datasets_by_its_names(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return datasets.Dataset.from_list([row("a")])

    monkeypatch.setattr("pe_dpo.data.sources.hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "owner/name", "subset": "en", "split": "train_prefs", "revision": "v2"}
    data = prepare(tokenizer, train=[source, "owner/other"], eval=0)
    assert asked == [("owner/name", {"name": "en", "split": "train_prefs", "revision": "v2"}), ("owner/other", {})]
    assert wheres(data.train) == ["owner/name/en/train_prefs row 1", "owner/other row 1"]


@pytest.mark.parametrize(("said", "message"), [
    ("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nExample of usage:\n\t`x`",
     r"owner/name: name one of its subsets: \{path: owner/name, subset: …\}; found 'en', 'de'"),
    ("BuilderConfig 'fr' not found. Available: ['en', 'de']", r"owner/name: name one of its subsets.*found 'en', 'de'"),
    ('Unknown split "dev". Should be one of [\'train\', \'test\'].', r"owner/name: has no split 'dev'; found 'train', 'test'"),
])  # fmt: skip
def test_the_subsets_and_splits_that_there_are_are_told(monkeypatch: pytest.MonkeyPatch, said: str, message: str) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(path: str, **options: Any) -> None:
        raise ValueError(said)

    monkeypatch.setattr("pe_dpo.data.sources.hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=message):
        find_places(DataSection(train={"path": "owner/name", "split": "dev"}).train)


def test_an_address_is_not_fetched() -> None:
    with pytest.raises(DataError, match=r"hf://datasets/a/b: is an address, which is not fetched; name the file here"):
        find_places("hf://datasets/a/b")


def test_a_packed_file_has_the_rows_of_the_plain_one(tmp_path: Path, tokenizer: Any) -> None:
    plain = json.dumps(row("a")) + "\n" + json.dumps(row("b")) + "\n"
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(plain)
    (tmp_path / "y.jsonl").write_bytes(gzip.compress(plain.encode()))  # packed under a name that does not say so
    assert wheres(prepare(tokenizer, train=str(tmp_path / "x.jsonl.gz"), eval=0).train) == ["x.jsonl.gz:1", "x.jsonl.gz:2"]
    assert wheres(prepare(tokenizer, train=str(tmp_path / "y.jsonl"), eval=0).train) == ["y.jsonl:1", "y.jsonl:2"]


def test_a_folder_of_packed_files_is_divided_by_their_names(tmp_path: Path) -> None:
    for name in ("train.jsonl.gz", "test.csv.gz"):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("prompt,chosen,rejected\na,b,c\n" if "csv" in name else json.dumps(row("q")))
    ((_, train, held_out, unused),) = find_places(str(tmp_path))
    assert ([*train], [*held_out], unused) == (["train.jsonl.gz"], ["test.csv.gz"], [])
    assert [values for _, values in held_out["test.csv.gz"]] == [row("a", "b", "c")]


def test_lines_about_hundreds_of_files_stay_short(tmp_path: Path, tokenizer: Any) -> None:
    for number in range(300):
        (tmp_path / f"part-{number:03}.jsonl").write_text(json.dumps(row(f"p{number}")))
    data = prepare(tokenizer, train=f"{tmp_path}/*.jsonl", eval=0)
    read = data.report.lines()[0]
    assert read.startswith("read 300 rows: part-000.jsonl (1), part-001.jsonl (1),")
    assert read.endswith("part-007.jsonl (1) and 292 more")
    (tmp_path / "part-000.jsonl").write_text('{"x": 1}')
    with pytest.raises(DataError, match=r"part-007\.jsonl and 292 more: the columns are") as raised:
        prepare(tokenizer, train=f"{tmp_path}/*.jsonl", limit=1)
    assert len(str(raised.value)) < 600
