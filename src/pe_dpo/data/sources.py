"""What the places that a recipe names stand for, and how often the pairs of each are trained on.

pairs.jsonl           one file; a JSON file of splits is divided like a folder
folder/               train.* (or train-*, train_*) and validation|valid|val|eval|dev|test.*, else those with such a word in
                      their names (helpful-train, evaluation); else every data file
shards/part-*.jsonl   a glob: every data file that it matches; of those, the ones named like held-out data are held out
saved dataset/        what `datasets` wrote with save_to_disk
owner/name            a data set of the Hub, read with `datasets`
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.data.encoded import column, take
from pe_dpo.data.files import FOREIGN_SUFFIXES, SUFFIXES, TEXT_SUFFIXES, check_row, data_format, read_rows
from pe_dpo.data.json_files import number_rows, read_json_splits
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.data.report import list_names
from pe_dpo.data.split import HELD_OUT_NAMES, HELD_OUT_WORDS, named_side, seeded
from pe_dpo.data.text_files import Row
from pe_dpo.disk import map_parts, matching_paths, unlike_a_file
from pe_dpo.errors import DataError
from pe_dpo.hub import hub_is_reachable, is_hub_name
from pe_dpo.recipe.data_section import DataSource, Sources, list_sources


class Rows:
    """The rows of a file or split; a file is opened only when they are read.

    Args:
        read: Yields them.
        files: What holds them; empty where nothing on disk does.
        split: Which of several tables in a file they are; "" where it has one.
        count: How many there are, where that is known; else 0.
    """

    def __init__(self, read: Callable[[], Iterator[Row]], files: Sequence[Path], split: str = "", count: int = 0) -> None:
        self._read, self.files, self.split, self.count = read, files, split, count

    def __iter__(self) -> Iterator[Row]:
        return self._read()

    def fingerprint(self) -> tuple[str, int] | None:
        """Return a sha256 over what the files hold, and about how many rows that is, 0 where that is not known.

        None where no file holds them.

        Raises:
            OSError: A file cannot be read.
        """
        digest, count = hashlib.sha256(f"{self.split} of {len(self.files)} files".encode()), self.count
        for path in self.files:
            parts = map_parts(path, lambda part: (len(part), hashlib.sha256(part).digest(), part.count(b"\n")))
            digest.update(f"{data_format(path)} {[size for size, _, _ in parts]} ".encode())
            digest.update(b"".join(own for _, own, _ in parts))
            is_lines = data_format(path) not in (None, ".json", ".parquet") and path.suffix.lower() != ".gz"
            count += sum(lines for _, _, lines in parts) if is_lines else 0
        return (digest.hexdigest(), count) if self.files else None


Parts = dict[str, Rows]
"""The rows of files or splits by their names."""


class Place(NamedTuple):
    """One of the places that a recipe names, found."""

    source: DataSource
    train: Parts
    """The parts to train on."""
    held_out: Parts
    """The parts to hold out, where it brings such."""
    unused: list[str]
    """The names of what lies there and is not used."""


def find_places(
    sources: Sources, *, to_hold_out: bool = False, taken: dict[str, str] | None = None, by_words: bool = True
) -> list[Place]:
    """Return the places that a recipe names, in its order.

    Args:
        sources: What stands under `data.train` or `data.eval`. What looks like a path (a known suffix, a leading `.`, `/` or
            `~`) is never looked up on the Hub.
        to_hold_out: Whether they are named to be held out: then all of a place is, where it brings no held-out side.
        taken: The parts that were found before, as name: full path; those found now are added. A part is called by its
            file's name, with the folders above it where another part has that name.
        by_words: Whether words further behind in a name say its side, see `named_side`; they did not in earlier runs.

    Raises:
        DataError: There is no such file, the folder holds no data, or the Hub has no such data set or cannot be reached.
    """
    taken = {} if taken is None else taken
    places = [_find(source, taken, by_words=by_words) for source in list_sources(sources)]
    if to_hold_out:
        return [place._replace(train={}, held_out=place.held_out or place.train) for place in places]
    return places


def weigh(pairs: Sequence[EncodedPair], weight: float, seed: int | None = None) -> Sequence[EncodedPair]:
    """Return the pairs as often as a weight says: 2 gives each twice, 0.5 those of half of the prompts, 2.5 both.

    Which prompts a fraction takes is a matter of their hashes, so it depends on no order of rows.

    Args:
        pairs: Of one place, to train on.
        weight: At least the pairs of one prompt are kept.
        seed: Hashed with the prompts; None for the prompts alone.
    """
    whole, fraction = divmod(weight, 1.0)
    every = np.arange(len(pairs))
    repeated = [every] * int(whole)
    if fraction:
        keys = column(pairs, "prompt_key")
        ranked = sorted({*keys}, key=lambda key: hashlib.sha256(seeded(key, seed).encode()).digest())
        kept = {*ranked[: max(round(fraction * len(ranked)), 0 if whole else 1)]}
        repeated.append(every[[key in kept for key in keys]] if len(keys) else every)
    return take(pairs, np.concatenate([every[:0], *repeated]))


def divide_names(names: Sequence[str], *, keeps_all: bool = False, by_words: bool = True) -> tuple[list[str], list[str]]:
    """Return the names to train on and the names to hold out.

    Args:
        names: Stems of files, or names of splits.
        keeps_all: Whether all are trained on that are not named as held out, also where some begin with `train`.
        by_words: As for `find_places`.

    Returns:
        `train` itself, else names that begin with `train-` or `train_` (of several, those that say `pref`); the same
        for the first of `HELD_OUT_NAMES` that is there. Without such a training name words anywhere in a name count too, see
        `named_side`: the first of `HELD_OUT_WORDS` is held out, the others are not used; trained on are the names with a
        training word where something is held out, else everything that is not named as held out; if nothing is, all names,
        and none held out.
    """
    best: dict[str, list[str]] = {}
    for word in ("train", *HELD_OUT_NAMES):
        named = [name for name in names if name == word or name.startswith((f"{word}-", f"{word}_"))]
        best[word] = [name for name in named if name == word] or [name for name in named if "pref" in name] or named
    held_out = next((best[word] for word in HELD_OUT_NAMES if best[word]), [])
    if best["train"] and not keeps_all:
        return best["train"], held_out
    reserved = [name for name in names if named_side(name, by_words=by_words) == "held_out"]
    for word in () if held_out or not by_words else HELD_OUT_WORDS:
        held_out = held_out or [name for name in reserved if re.search(rf"(?<![^-_. ]){word}(?![^-_. ])", name, re.IGNORECASE)]
    words_count = reserved and by_words and not keeps_all
    train = [name for name in names if words_count and named_side(name) == "train"]
    train = train or [name for name in names if name not in reserved]
    return (train, held_out) if train else (list(names), [])


def _find(source: DataSource, taken: dict[str, str], *, by_words: bool) -> Place:
    path = Path(source.path).expanduser()
    if kind := unlike_a_file(path):
        raise DataError(f"{path}: is {kind}, which may have no end; write the rows into a file and name that")
    divide = partial(_divide, taken=taken, by_words=by_words)
    if path.is_file():
        _refuse(source, "a file", "subset", "revision")
        splits = read_json_splits(path) if data_format(path) == ".json" else {}
        if not splits:
            _refuse(source, "a file without splits", "split")
        found = [
            _Part(split, f"{_full_name(path)}/{split}", 2, partial(number_rows, splits[split]), [path], split)
            for split in splits
        ]
        return divide(source, found or [_file(path)])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        _refuse(source, "a saved data set", "subset", "revision")
        try:
            data = datasets.load_from_disk(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{path}: cannot be read as a saved dataset ({error}); save it again") from error
        return divide(source, _splits(data, _full_name(path), shown=1))
    is_folder = path.is_dir()
    files = [file for file in (path.iterdir() if is_folder else matching_paths(source.path)) if not file.name.startswith(".")]
    if files or is_folder:
        _refuse(source, "a folder" if is_folder else "a glob", "subset", "revision")
        top = next((at for at, piece in enumerate(path.parts) if re.search(r"[*?[]", piece)), len(path.parts))
        read = _data_files(sorted(files), path)
        parts = [_file(file, folders=file.parts[top:-1], by_words=by_words) for file in read]
        place = divide(source, parts, keeps_all=not is_folder)
        unread = [file.name for file in sorted(files) if file.suffix.lower() in FOREIGN_SUFFIXES and file not in read]
        return place._replace(unused=place.unused + unread)
    return divide(source.model_copy(update={"split": None}), _hub_splits(source))._replace(source=source)


class _Part(NamedTuple):
    """A file or split that could be used."""

    split: str
    full_name: str
    shown: int
    """How many pieces of the full name it has for people: one for a file, more for a split."""
    read: Callable[[str], Iterator[Row]]
    """Reads its rows, given what it is called."""
    files: Sequence[Path]
    """What holds them."""
    table: str = ""
    """Which of several in a file it is."""
    rows: int = 0
    """How many it has, where that is known."""


def _divide(
    source: DataSource, parts: Sequence[_Part], *, taken: dict[str, str], by_words: bool, keeps_all: bool = False
) -> Place:
    """Return the parts of a place by their sides, each under a name of its own."""
    splits = [part.split for part in parts]
    if source.split is not None:
        train = [split for split in splits if re.fullmatch(rf"{re.escape(source.split)}(-\d+(-of-\d+)?)?", split)]
        held_out: list[str] = []
        if not train:
            raise DataError(f"{source.path}: has no split '{source.split}'; found {list_names(splits)}")
    else:
        train, held_out = divide_names(splits, keeps_all=keeps_all, by_words=by_words)
    files: dict[str, str] = {}
    for part in parts:
        file = part.full_name.rpartition("/")[2]
        other = files.setdefault(_without_suffix(part.full_name) if part.shown == 1 else part.full_name, file)
        if other != file and part.split in train + held_out:
            raise DataError(
                f"{source.path}: {file} and {other} differ only in their suffix; name one of the files instead of the folder"
            )
    sides: tuple[Parts, Parts] = {}, {}
    unused = []
    for part in parts:
        pieces = part.full_name.split("/")
        names = ("/".join(pieces[-shown:]) for shown in range(part.shown, len(pieces) + 1))
        name = next(names)
        if part.split not in train + held_out:
            unused.append(name)
            continue
        if part.full_name in taken.values():
            name = f"{name} ({1 + [*taken.values()].count(part.full_name)})"
        while name in taken:
            name = next(names)
        taken[name] = part.full_name
        sides[part.split in held_out][name] = Rows(partial(part.read, name), part.files, part.table, part.rows)
    return Place(source, *sides, unused)


def _full_name(path: Path) -> str:
    return str(path.parent.resolve() / path.name)  # the file itself may be a link to a name that says nothing


def _without_suffix(name: str) -> str:
    return re.sub(r"\.[^./]+(\.gz)?$", "", name, flags=re.IGNORECASE)


def _file(path: Path, folders: Sequence[str] = (), *, by_words: bool = True) -> _Part:
    """Return a file as a part; its split is the first of these folders or its own name that says a side, else its name."""
    begin_so = [folder for folder in folders if named_side(folder, by_words=False)]
    stem = _without_suffix(path.name)
    split = next(filter(named_side, (*begin_so, stem, *folders) if by_words else begin_so), stem)
    return _Part(split, _full_name(path), 1, partial(read_rows, path), [path])


def _data_files(paths: Sequence[Path], place: Path) -> list[Path]:
    """Return those of a folder or glob that hold data; a packed file is none where it lies there unpacked too.

    Raises:
        DataError: There are none.
    """
    files = [path for path in paths if path.is_file() and data_format(path)]
    files = [path for path in files if path.suffix.lower() != ".gz" or path.with_suffix("") not in files]
    foreign = next((path for path in paths if path.suffix.lower() in FOREIGN_SUFFIXES), None)
    if not files and foreign:
        raise DataError(f"{foreign}: {FOREIGN_SUFFIXES[foreign.suffix.lower()]}")
    if not files:
        found = ", ".join(path.name for path in paths[:10]) or "nothing"
        deeper = f"; files in folders below are named as {place}/**/*" if any(path.is_dir() for path in paths) else ""
        raise DataError(f"{place}: no data file in this folder; found {found}; name a {', '.join(SUFFIXES)} file{deeper}")
    return files


def _splits(data: Any, full_name: str, *, shown: int) -> list[_Part]:
    """Return the splits of what `datasets` read, or all of it where it has none."""

    def rows(values: Any, name: str) -> Iterator[Row]:
        for name_of_column, feature in values.features.items():
            if getattr(feature, "decode", False):  # an image or a sound, which is not looked at
                values = values.cast_column(name_of_column, replace(feature, decode=False))
        try:
            for number, row in enumerate(values, start=1):
                yield f"{name} row {number}", check_row(row)
        except (ImportError, OSError) as error:
            raise DataError(f"{name}: cannot be read ({error}); save the columns of text alone") from error

    def part(values: Any, split: str, name: str, shown: int) -> _Part:
        # Arrow files are read as they are; a table that was filtered since it was written says by its features and rows which.
        files = [Path(file["filename"]) for file in getattr(values, "cache_files", ())]
        table = f"{split}, {getattr(values, '_fingerprint', '')}, {values.features}" if files else ""
        return _Part(split, name, shown, partial(rows, values), files, table, getattr(values, "num_rows", 0))

    if not hasattr(data, "keys"):
        return [part(data, "train", full_name, shown)]
    return [part(data[split], split, f"{full_name}/{split}", shown + 1) for split in data]


def _hub_splits(source: DataSource) -> list[_Part]:
    """Return the splits of a data set of the Hub.

    Raises:
        DataError: It is no name of the Hub, or cannot be looked up, or has no such subset, split or revision.
    """
    name = source.path
    suffixes = (*SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), *FOREIGN_SUFFIXES)
    if "://" in name:
        raise DataError(f"{name}: is an address, which is not fetched; name the file here, or the data set as owner/name")
    if name.lower().endswith(suffixes) or name.startswith((".", "/", "~")) or not is_hub_name(name):
        raise DataError(f"{name}: there is no such file or folder (looked from {Path.cwd()}); check the spelling")
    import datasets

    missing = f"{name}: there is no such file or folder, and as the name of a data set on the Hub"
    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if not cached.exists() and not hub_is_reachable():  # noticed first, because `datasets` 5.2 retries it for 23 s
        raise DataError(f"{missing} it cannot be looked up: the Hub cannot be reached; check the path or the network")
    said = {"name": source.subset, "split": source.split, "revision": source.revision}
    try:
        data = datasets.load_dataset(name, **{key: value for key, value in said.items() if value is not None})
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())
        subsets = re.search(r"(?:available configs|Available): \[(.*?)\]", why)
        if subsets:
            found = subsets[1][:400]
            raise DataError(f"{name}: name one of its subsets: {{path: {name}, subset: …}}; found {found}") from error
        splits = re.search(r"Unknown split .* one of \[(.*?)\]", why)
        if splits:
            raise DataError(f"{name}: has no split '{source.split}'; found {splits[1][:400]}") from error
        raise DataError(f"{missing} it cannot be read ({why[:400]}); check the name, or name a file") from error
    full_name = "/".join(filter(None, (name, source.subset, source.split)))
    return _splits(data, full_name, shown=full_name.count("/") + 1)


def _refuse(source: DataSource, what: str, *keys: str) -> None:
    for key in keys:
        if getattr(source, key) is not None:
            raise DataError(f"{source.path}: is {what}, and `{key}` ({getattr(source, key)}) belongs to others; leave it out")
