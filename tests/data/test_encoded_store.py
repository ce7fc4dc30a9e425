"""Encoded pairs on disk: found again to the bit, made anew where anything differs, by one process of several."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_tokenizers import CHATML, build_tokenizer

import pe_dpo.data.encoded_store
from pe_dpo.data import EncodedPair, Encoder, Pair, PreparedData, data_hash, prepare_pairs
from pe_dpo.data import workers as workers_module
from pe_dpo.data.encoded import lengths
from pe_dpo.errors import DataError
from pe_dpo.recipe import DataSection

FIELDS = ("where", "margin", "prompt_key", "beta", "weight")
ARRAYS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_scored", "rejected_scored")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PE_DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pairs"


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the parts that were encoded in this process."""
    sizes: list[int] = []
    part = Encoder.part
    monkeypatch.setattr(Encoder, "part", lambda self, pairs: [sizes.append(len(pairs)), part(self, pairs)][1])
    return sizes


def rows(count: int) -> list[dict[str, Any]]:
    """Pairs of every kind: of several turns, scored in part, with β, too long, identical, empty, doubled, prompts alike."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        kind = number % 9
        prompt = [{"role": "user", "content": f"question {number // 2}"}]
        chosen: Any = [{"role": "assistant", "content": f"good {number}"}]
        if kind == 1:
            chosen = [*chosen, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "more"}]
        rejected = [{"role": "assistant", "content": {2: f"good {number}", 3: "", 4: "long " * 60}.get(kind, "bad")}]
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "b": 0.1 + number})
        found += [found[-1]] if kind == 5 else []
    return found


def section(path: Path, **settings: Any) -> DataSection:
    values = {"train": str(path), "max_length": 200, "bad_rows": "drop", "columns": {"beta": "b"}, "eval": 0.2}
    return DataSection(**(values | settings))


def tokenizer() -> Any:
    return build_tokenizer(template=CHATML, eos="<|im_end|>")


def contents(data: PreparedData) -> Any:
    """All that a run sees of prepared pairs."""

    def of(pair: EncodedPair) -> list[Any]:
        arrays = [getattr(pair, name) for name in ARRAYS]
        kinds = [None if array is None else (array.dtype.str, array.tolist()) for array in arrays]
        return [*(getattr(pair, name) for name in FIELDS), *kinds]

    order = [list(data.report.dropped), list(data.report.noted)]
    hashes = [data_hash(list(side)) for side in (data.train, data.held_out)]
    assert hashes == [data_hash(side) for side in (data.train, data.held_out)]
    return [[of(pair) for pair in side] for side in (data.train, data.held_out)], json.dumps([vars(data.report), order]), hashes


def test_pairs_are_found_again_to_the_bit_by_whoever_asks(
    write_lines: Callable[..., Path], cache: Path, encodings: list[int], tmp_path: Path
) -> None:
    path, settings = write_lines(*rows(60)), {"train": [{"path": str(tmp_path / "train.jsonl"), "weight": 1.5}]}
    first = prepare_pairs(section(path, **settings), tokenizer=tokenizer())
    assert {"identical answers", "empty answer", "longer than max_length"} == {*first.report.dropped}
    assert {pair.chosen_scored is None for pair in first.train} == {True, False}
    made = len(encodings)
    assert made > 0
    again = prepare_pairs(section(path, **settings), tokenizer=tokenizer())
    assert contents(again) == contents(first)
    # A run that is evaluated names the rows that it held out; a name of the path is not what the pairs depend on.
    recorded = first.report.to_dict()
    assert contents(prepare_pairs(section(path, **settings), tokenizer=tokenizer(), recorded=recorded)) == contents(first)
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / path.name)
    there = prepare_pairs(section(path, train=[{"path": str(moved), "weight": 1.5}]), tokenizer=tokenizer())
    assert there.report.sources[0]["source"] == f"{moved} (weight 1.5)"
    assert len(encodings) == made
    whole = write_lines(*rows(2), name="whole.jsonl")  # without a bad row it is all one whether such rows are dropped
    for bad_rows, is_found in (("error", False), ("drop", True)):
        before = len(encodings)
        prepare_pairs(section(whole, bad_rows=bad_rows), tokenizer=tokenizer())
        assert (len(encodings) == before) == is_found
    assert sorted(path.is_symlink() for path in cache.iterdir() if path.suffix != ".lock") == [False] * 2 + [True] * 4
    entry = next(path for path in cache.iterdir() if path.is_dir() and not path.is_symlink())
    umask = os.umask(0)
    os.umask(umask)
    assert [place.stat().st_mode & 0o777 for place in (entry, entry / "train.npy")] == [0o777 & ~umask, 0o666 & ~umask]


def test_nothing_is_found_where_what_determines_the_pairs_differs(
    write_lines: Callable[..., Path], cache: Path, encodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(*rows(9))
    other = build_tokenizer(template=CHATML + "{{ '' }}", eos="<|im_end|>")
    begun = build_tokenizer(template=CHATML, eos="<|im_end|>", bos="<s>")
    prepare_pairs(section(path), tokenizer=tokenizer())
    cases: list[tuple[DataSection, Any, dict[str, Any]]] = [
        (section(path, max_length=190), tokenizer(), {}), (section(path, eval=0.3), tokenizer(), {}),
        (section(path, score="last"), tokenizer(), {}), (section(path, overlong="truncate_prompt"), tokenizer(), {}),
        (section(path, limit=8), tokenizer(), {}), (section(path), other, {}), (section(path), begun, {}),
        (section(path), tokenizer(), {"end_token_ids": [7]}), (section(path), tokenizer(), {"recorded": {"files": {}}}),
        (section(path), tokenizer(), {"recorded": {"held_out_rows": ["train.jsonl:1"]}}),
        (section(path), tokenizer(), {"only": str(path)}),
    ]  # fmt: skip
    for settings, reader, options in cases:
        before = len(encodings)
        prepare_pairs(settings, tokenizer=reader, **options)
        assert len(encodings) > before, (settings, options)
    before, times = len(encodings), path.stat()
    text = path.read_text().replace("good 0", "gone 0")
    path.write_text(text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # of one size and time
    assert prepare_pairs(section(path), tokenizer=tokenizer()).train
    assert len(encodings) > before
    clock = build_tokenizer(template=CHATML + "{% if false %}{{ strftime_now('%Y') }}{% endif %}", eos="<|im_end|>")
    for day, is_found in (("2026-01-01", False), ("2026-01-01", True), ("2026-01-02", False)):
        before = len(encodings)
        prepare_pairs(section(path, template_date=day), tokenizer=clock)
        assert (len(encodings) == before) == is_found


@pytest.mark.parametrize("name", ["tokens.arrow", "margin.npy", "report.json", "checksums.json"])
@pytest.mark.parametrize("how", ["cut", "one bit", "gone"])
def test_a_damaged_entry_is_made_anew(
    name: str, how: str, write_lines: Callable[..., Path], cache: Path, encodings: list[int], warned: list[str]
) -> None:
    path = write_lines(*rows(9))
    first = contents(prepare_pairs(section(path), tokenizer=tokenizer()))
    file = next(cache.glob(f"*/{name}"))
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + (b"" if how == "cut" else bytes([content[middle] ^ 4]) + content[middle + 1 :]))
    if how == "gone":
        file.unlink()
    assert contents(prepare_pairs(section(path), tokenizer=tokenizer())) == first
    assert len(encodings) == 2
    assert len(warned) == ((name, how) != ("checksums.json", "gone"))  # which is an entry that was never finished
    assert contents(prepare_pairs(section(path), tokenizer=tokenizer())) == first
    assert len(encodings) == 2


def test_no_pickle_is_read(write_lines: Callable[..., Path], cache: Path, warned: list[str]) -> None:
    path = write_lines(*rows(9))
    prepare_pairs(section(path), tokenizer=tokenizer())
    entry = next(path for path in cache.iterdir() if (path / "margin.npy").is_file())
    np.save(entry / "margin.npy", np.array([print], dtype=object), allow_pickle=True)
    sums = json.loads((entry / "checksums.json").read_text())
    sums["margin.npy"] = pe_dpo.data.encoded_store._checksum(entry / "margin.npy")
    (entry / "checksums.json").write_text(json.dumps(sums))
    prepare_pairs(section(path), tokenizer=tokenizer())
    assert len(warned) == 1
    assert "pickle" in warned[0]


def test_without_a_place_for_them_pairs_are_the_same(
    write_lines: Callable[..., Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    path = write_lines(*rows(9))
    first = contents(prepare_pairs(section(path), tokenizer=tokenizer()))
    (tmp_path / "file").touch()
    monkeypatch.setenv("PE_DPO_CACHE", str(tmp_path / "file"))
    assert contents(prepare_pairs(section(path), tokenizer=tokenizer())) == first
    assert len(warned) == 1
    assert "encoded pairs cannot be kept there" in warned[0]


def test_the_entries_that_were_used_last_stay(
    write_lines: Callable[..., Path], cache: Path, encodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_lines(*rows(9), name=f"{name}.jsonl") for name in "abc"]
    for path in paths[:2]:
        prepare_pairs(section(path), tokenizer=tokenizer())
    prepare_pairs(section(paths[0]), tokenizer=tokenizer())  # b is the one that was used longest ago
    monkeypatch.setattr(pe_dpo.data.encoded_store, "MOST_BYTES", 2.5 * sum(f.stat().st_size for f in cache.glob("*/*")) / 4)
    prepare_pairs(section(paths[2]), tokenizer=tokenizer())
    made = len(encodings)
    for path, is_there in ((paths[2], True), (paths[0], True), (paths[1], False)):
        prepare_pairs(section(path), tokenizer=tokenizer())
        assert (len(encodings) == made) == is_there, path


def _prepare_in_turn(path: str, log: str) -> None:
    part = Encoder.part

    def counted(self: Encoder, pairs: Any) -> Any:
        with Path(log).open("a") as file:
            file.write("x")
        return part(self, pairs)

    Encoder.part = counted  # type: ignore[method-assign]
    prepare_pairs(section(Path(path)), tokenizer=tokenizer())


def test_of_several_processes_one_encodes(write_lines: Callable[..., Path], cache: Path, tmp_path: Path) -> None:
    path, log, context = write_lines(*rows(60)), tmp_path / "log", multiprocessing.get_context("fork")
    processes = [context.Process(target=_prepare_in_turn, args=(str(path), str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "x"


# ------------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts go to two other processes, and no entry is found."""
    monkeypatch.setattr(workers_module, "PARTS_HERE", 0)
    monkeypatch.setattr(workers_module.os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr("pe_dpo.data.preparation.PAIRS_PER_PART", 7)


def test_other_processes_make_the_same_of_pairs(
    write_lines: Callable[..., Path], cache: Path, encodings: list[int], request: pytest.FixtureRequest
) -> None:
    path = write_lines(*rows(60), "{", *rows(9))
    alone = contents(prepare_pairs(section(path), tokenizer=tokenizer()))
    for entry in cache.iterdir():
        entry.rename(entry.with_name(f"{entry.name}.old"))
    assert sum(encodings) == 77
    request.getfixturevalue("beside")
    assert contents(prepare_pairs(section(path), tokenizer=tokenizer())) == alone
    assert sum(encodings) == 77


@pytest.mark.slow
def test_the_first_fault_is_that_of_the_rows_however_pairs_are_encoded(
    write_lines: Callable[..., Path], cache: Path, beside: None
) -> None:
    faulty = {"prompt": "a<|im_end|>b", "chosen": "good", "rejected": "bad"}
    plain = {"prompt": "a", "chosen": "good", "rejected": "bad"}
    path = write_lines(plain, faulty, *[plain] * 30, {**faulty, "prompt": "c<|im_start|>"}, *[plain] * 30)
    settings = {"bad_rows": "error", "columns": None}
    with pytest.raises(DataError, match=r"train\.jsonl:2: column 'prompt' holds the control token '<\|im_end\|>'"):
        prepare_pairs(section(path, **settings), tokenizer=tokenizer())
    path = write_lines(plain, faulty, *[plain] * 60, "{")
    with pytest.raises(DataError, match=r"train\.jsonl:63: is text; an object with one pair is expected"):
        prepare_pairs(section(path, **settings), tokenizer=tokenizer())
    assert not [entry for entry in cache.iterdir() if entry.suffix != ".lock"]


@pytest.mark.slow
def test_pairs_are_encoded_to_the_end_where_another_process_is_killed(
    write_lines: Callable[..., Path], cache: Path, beside: None, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, here = write_lines(*rows(60)), os.getpid()
    monkeypatch.setattr(workers_module, "PARTS_HERE", 99)
    alone = contents(prepare_pairs(section(path), tokenizer=tokenizer()))
    for entry in cache.iterdir():
        entry.rename(entry.with_name(f"{entry.name}.old"))
    monkeypatch.setattr(workers_module, "PARTS_HERE", 1)
    render = Encoder._render

    def killed(self: Encoder, pair: Pair) -> Any:
        if os.getpid() != here and pair.where == "train.jsonl:30":
            os.kill(os.getpid(), signal.SIGKILL)
        return render(self, pair)

    monkeypatch.setattr(Encoder, "_render", killed)
    assert contents(prepare_pairs(section(path), tokenizer=tokenizer())) == alone
    assert len(warned) == 1
    assert "going on without it" in warned[0]


# ------------------------------------------------------------------------------------------------------------- as columns


def test_columns_are_a_sequence_of_pairs(write_lines: Callable[..., Path], cache: Path) -> None:
    data = prepare_pairs(section(write_lines(*rows(30))), tokenizer=tokenizer())
    pairs: Any = data.train
    every = [pair.where for pair in pairs]
    assert [pair.where for pair in pairs[2:9:3]] == every[2:9:3]
    assert (pairs[-1].where, pairs[np.array([3, 1])][0].where) == (every[-1], every[3])
    assert [pair.where for pair in pairs + data.held_out] == [*every, *(pair.where for pair in data.held_out)]
    assert lengths(pairs).tolist() == lengths(list(pairs)).tolist()
    assert [pair.where for pair in pairs[np.array([2, 0, 2])].distinct()] == [every[2], every[0]]
    with pytest.raises(IndexError):
        pairs[len(pairs)]
    before = int(pairs[0].prompt_ids[0])
    pairs[0].prompt_ids[0] += 1  # of an array of its own, since torch warns of those that cannot be written
    assert int(pairs[0].prompt_ids[0]) == before
