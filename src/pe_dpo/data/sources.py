"""What a path or a name stands for: the files or splits to train on, the ones to hold out, and the ones left alone.

pairs.jsonl           one file
folder/               train.* (or train-*, train_*) and validation|valid|val|eval|dev|test.*; else every data file
saved dataset/        what `datasets` wrote with save_to_disk
owner/name            a data set of the Hub, read with `datasets`
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pe_dpo.data.files import SUFFIXES, Row, read_rows
from pe_dpo.errors import DataError
from pe_dpo.hub import hub_is_reachable, is_hub_name

HELD_OUT_NAMES = ("validation", "valid", "val", "eval", "dev", "test")  # the first that is there is used


class Part(NamedTuple):
    """One file or split, and how to read it."""

    name: str
    rows: Callable[[], Iterator[Row]]


class Sources(NamedTuple):
    """What there is to train on and to hold out, and the names of the data that is neither."""

    train: list[Part]
    held_out: list[Part]
    unused: list[str]


def find_sources(path: str | Path) -> Sources:
    """The parts that a path or Hub name stands for; files are opened only when their rows are read.

    Args:
        path: A data file, a folder of data files, a folder written by `datasets.save_to_disk`, or a Hub name.
            What looks like a path (a known suffix, a leading `.`, `/` or `~`) is never looked up on the Hub.

    Returns:
        The training and held-out parts, and the names of what stays unused.

    Raises:
        DataError: When there is no such file, the folder holds no data, or the Hub has no such data set or
            cannot be reached.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return Sources([Part(place.name, partial(read_rows, place))], [], [])
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return _saved_dataset(place)
    if place.is_dir():
        return _folder(place)
    if _looks_like_path(str(path)):
        raise DataError(f"{path}: there is no such file or folder (looked from {Path.cwd()}); check the spelling")
    return _hub_dataset(str(path))


def divide_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names to train on and the names to hold out.

    Args:
        names: Stems of files, or names of splits.

    Returns:
        `train` itself, else names that begin with `train-` or `train_` (of several, those that say `pref`); the same
        for the first of `HELD_OUT_NAMES` that is there. Without a training name: everything that is not a
        held-out name; if nothing is, all names, and none held out.
    """
    held_out = next(filter(None, (_named(names, word) for word in HELD_OUT_NAMES)), [])
    train = _named(names, "train")
    if not train:
        reserved = {name for word in HELD_OUT_NAMES for name in names if _is_named(name, word)}
        train = [name for name in names if name not in reserved]
    return (train, held_out) if train else (list(names), [])


def _named(names: Iterable[str], word: str) -> list[str]:
    found = [name for name in names if _is_named(name, word)]
    return [name for name in found if name == word] or [name for name in found if "pref" in name] or found


def _is_named(name: str, word: str) -> bool:
    return name == word or name.startswith((f"{word}-", f"{word}_"))


def _folder(folder: Path) -> Sources:
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise DataError(f"{folder}: no data file in this folder; found {found}; name a {', '.join(SUFFIXES)} file")
    train, held_out = divide_names(list(files))
    twice = [name for name in names if Path(name).stem in train + held_out and name != files[Path(name).stem].name]
    if twice:
        raise DataError(
            f"{folder}: {files[Path(twice[0]).stem].name} and {twice[0]} differ only in their suffix; "
            "name one of the files instead of the folder"
        )
    used = {files[stem].name for stem in train + held_out}
    parts = {stem: Part(path.name, partial(read_rows, path)) for stem, path in files.items()}
    return Sources(
        [parts[stem] for stem in train], [parts[stem] for stem in held_out], [name for name in names if name not in used]
    )


def _saved_dataset(folder: Path) -> Sources:
    import datasets

    try:
        return _splits(folder.name, datasets.load_from_disk(str(folder)))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{folder}: cannot be read as a saved dataset ({error}); save it again") from error


def _hub_dataset(name: str) -> Sources:
    """A data set of the Hub; an unreachable Hub is noticed first, because `datasets` 5.2 retries it for 23 s."""
    import datasets

    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    missing = f"{name}: there is no such file or folder, and as the name of a data set on the Hub"
    if not cached.exists() and not hub_is_reachable():
        raise DataError(f"{missing} it cannot be looked up: the Hub cannot be reached; check the path or the network")
    try:
        return _splits(name, datasets.load_dataset(name))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{missing} it cannot be read ({error}); check the name, or name a file") from error


def _splits(name: str, data: Any) -> Sources:
    if not hasattr(data, "keys"):
        return Sources([Part(name, partial(_dataset_rows, name, data))], [], [])
    parts = {split: Part(f"{name}/{split}", partial(_dataset_rows, f"{name}/{split}", data[split])) for split in data}
    train, held_out = divide_names(list(parts))
    unused = [parts[split].name for split in parts if split not in train + held_out]
    return Sources([parts[split] for split in train], [parts[split] for split in held_out], unused)


def _dataset_rows(name: str, data: Any) -> Iterator[Row]:
    for number, values in enumerate(data, start=1):
        yield Row(f"{name} row {number}", values)


def _looks_like_path(text: str) -> bool:
    known = text.lower().endswith(SUFFIXES)
    return known or text.startswith((".", "/", "~")) or not is_hub_name(text)
