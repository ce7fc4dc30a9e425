"""Where the pairs come from, as the data section of a recipe says it."""

import json
import re
from pathlib import Path
from typing import Any

from pe_dpo.convert.draft import Draft, Said, in_yaml
from pe_dpo.errors import UsageError

Place = dict[str, Any]
"""A place with its path, and split, subset, weight and columns where they are said."""

_FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".arrow")
_SHAREGPT = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
_ALPACA = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
_OURS = {"prompt": "instruction", "query": "input"}
"""Our names for LLaMA-Factory's columns, where they are others."""


def place(path: Any, **more: Any) -> Place:
    """Return a place with what is said of it; what has no value is left out, and so is the one split that a file has."""
    if more.get("split") == "train" and str(path).lower().endswith(_FILES):
        del more["split"]
    return {"path": str(path) if isinstance(path, Path) else path} | {
        key: value for key, value in more.items() if value not in (None, "", {}, 1.0)
    }


def write_places(draft: Draft, here: str, places: list[Place], *origins: Said | str) -> None:
    """Write places: one by its path alone where no more is said of it."""
    for one in places:
        if not isinstance(one["path"], str) or not one["path"].strip():
            said = next((origin for origin in origins if isinstance(origin, Said)), here)
            raise UsageError(f"{draft.source.path}: {said}: {in_yaml(one['path'])} is no path and no name of a data set")
    simple = [one["path"] if set(one) == {"path"} else one for one in places]
    if simple:
        draft.put(here, simple[0] if len(simple) == 1 else simple, *origins)


def write_share(draft: Draft, said: Said) -> None:
    """Write the held-out share; a number of rows is none, and is named."""
    try:
        size = float(said.value or 0)
    except (TypeError, ValueError):
        draft.drop(said, "no number; set data.eval")
        return
    if size < 1:
        draft.put("data.eval", size, said, "0: nothing is held out" if not size else "split by prompt here, by rows there")
    else:
        draft.differs(
            said, f"{size:g} rows there; data.eval is a share here (0.05 without a word): {size:g} / rows of the data"
        )


def write_length(draft: Draft, said: Said, words: str) -> None:
    """Write the longest pair, and what happens to longer ones there and here."""
    if draft.number(said, "data.max_length", int):
        draft.differs(said, words)


def note_unknown(draft: Draft, prefix: str, about: dict[str, Any], known: set[str]) -> None:
    """Note keys of a data set that are not known."""
    draft.unknown += [str(Said(f"{prefix}.{key}", value, True)) for key, value in about.items() if key not in known and value]


def paths_of(about: dict[str, Any], *names: str) -> list[Any]:
    """Return where the rows of a data set lie: each of its `data_files`, or what the first of some keys says."""
    files = about.get("data_files")
    if isinstance(files, dict):
        files = files.get(about.get("split") or "train")
    if files:
        return files if isinstance(files, list) else [files]
    return [next((about[name] for name in names if about.get(name)), None)]


def read_mixture(draft: Draft, value: list[Any]) -> list[Place]:
    """Return the places of a list of data sets, in TRL's or alignment-handbook's words."""
    places = []
    most = max((float(one.get("fraction") or 0) for one in value if isinstance(one, dict)), default=0)
    if most:
        words = "shares of the mixture there; weights of places of one size here: rows taken / rows of each"
        draft.differs("datasets.fraction", words)
    known = {"path", "id", "name", "config", "split", "data_files", "columns", "weight", "fraction"}
    for one in value:
        one = one if isinstance(one, dict) else {"path": one}
        note_unknown(draft, "datasets", one, known)
        weight = one["fraction"] / most if one.get("fraction") else one.get("weight")
        subset, weight = one.get("name") or one.get("config"), weight and float(weight)
        places += [place(path, split=one.get("split"), subset=subset, weight=weight) for path in paths_of(one, "path", "id")]
    return places


def dataset_info(draft: Draft, folder: Said) -> tuple[dict[str, Any], Path]:
    """Return LLaMA-Factory's dataset_info.json, and its folder: `dataset_dir`, or beside the file."""
    here = draft.source.path.parent
    named = Path(str(folder.value))
    for place_of_it in (here / named, named, here, here.parent / named):
        path = place_of_it / "dataset_info.json"
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8"))), place_of_it
            except (OSError, ValueError) as error:
                raise UsageError(f"{path}: cannot be read as JSON: {error}") from error
    return {}, named


def described_place(draft: Draft, name: str, info: dict[str, Any], folder: Path) -> Place:
    """Return the place that dataset_info.json describes under a name, with a column map where its columns need one."""
    if name not in info:
        if str(folder) != "ONLINE":
            draft.differs(f"dataset: {name}", "no dataset_info.json that names it was found; write the file or the hub's name")
        return place(name)
    about = info[name]
    known = {"hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "file_name", "cloud_file_name", "ranking", "formatting"}
    note_unknown(draft, name, about, known | {"columns", "tags", "subset", "split"})
    columns, tags = dict(about.get("columns") or {}), dict(about.get("tags") or {})
    if not about.get("ranking"):
        draft.drop(f"dataset: {name}", "no pairs there: dataset_info.json has no ranking: true", breaks=True)
    is_dialogue = about.get("formatting", "alpaca") in ("sharegpt", "openai")
    usual = _SHAREGPT if is_dialogue else _ALPACA
    path = about.get("hf_hub_url") or about.get("ms_hub_url") or about.get("om_hub_url") or about.get("script_url")
    path = path or folder / str(about.get("file_name") or about.get("cloud_file_name") or name)
    if not is_dialogue and columns.get("query"):
        draft.differs(f"{name}.columns.query: {columns['query']}", "one line break stands before it there, a blank line here")
    if {"images", "videos", "audios"} & columns.keys():
        draft.drop(f"dataset: {name}", "pictures, sounds and films are not here", breaks=True)
    roles = {key: value for key, value in tags.items() if key not in ("role_tag", "content_tag")}
    known = {"user", "human", "gpt", "assistant", "system", "observation", "tool", "function_call", "model", "bot"}
    strange = {key: value for key, value in roles.items() if str(value).lower() not in known}
    if strange or tags.get("role_tag", "from") not in ("from", "role", "speaker"):
        draft.drop(
            f"{name}.tags: {strange or tags}", "roles are read as people write them; other words need a column of messages"
        )
    map_here = {
        _OURS.get(key, key): value for key, value in (usual | columns).items()
        if key in (*usual, "system", "history", "tools") and (key in columns) and value != usual.get(key, key)
    }  # fmt: skip
    if map_here:  # a map names both answers and what they answer
        told = {
            _OURS.get(key, key): columns.get(key, value) for key, value in usual.items() if key in columns or key != "query"
        }
        map_here = told | map_here
    return place(path, subset=about.get("subset"), split=about.get("split"), columns=map_here)


def swift_place(draft: Draft, text: str) -> Place:
    """Return the place in ms-swift's words: hf::owner/name:subset#rows."""
    found = re.fullmatch(r"(?:(?i:hf|ms)::)?([^:#]+)(?::([^#]+))?(?:#(\d+))?", text)
    if found is None:
        return place(text)
    if found[3]:
        draft.drop(f"dataset: {text}", f"{found[3]} rows drawn there; data.limit: {found[3]} takes the first ones")
    subset = found[2] if found[2] not in (None, "default") else None
    if subset and "/" in subset:
        draft.drop(f"dataset: {text}", "several subsets are several places here")
        subset = subset.split("/")[0]
    return place(found[1], subset=subset)
