"""Another tool's settings as its file has them: YAML, JSON, or a line of arguments; whose they are is found in their keys.

config.yaml      {rl: dpo, base_model: …}                        Axolotl
train.sh         swift rlhf --rlhf_type dpo --beta 0.1 \\         ms-swift
                 accelerate launch --num_processes 8 scripts/dpo.py --config c.yaml --beta 0.1
"""

import itertools
import operator
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pe_dpo.errors import UsageError
from pe_dpo.recipe.elsewhere import TOOLS, Tool
from pe_dpo.recipe.strict_yaml import PlainLoader

_PROGRAM = {
    r"\S*run_simpo\.py": "simpo",
    r"(\S*/)?swift rlhf|\S*rlhf\.py": "ms-swift",
    r"(\S*/)?(llamafactory-cli|lmf) train|\S*src/train\.py|\S*train_bash\.py": "llama-factory",
    r"(\S*/)?axolotl train|axolotl\.cli\.train": "axolotl",
    r"(\S*/)?tune run": "torchtune",
    r"(\S*/)?trl (dpo|cpo|orpo|kto|sft|grpo|reward)|\S*(dpo|cpo|orpo|kto|simpo)\w*\.py": "trl",
}
"""Programs, as a line of arguments names them, and whose they are."""
_CARDS = ("num_processes", "nproc_per_node", "nproc-per-node", "NPROC_PER_NODE", "num_gpus")
"""How launchers and their variables say how many processes they start."""
_TOOLS = "\n".join(f"  {tool.title:24} {tool.has}" for tool in TOOLS.values())


@dataclass(frozen=True)
class TheirSettings:
    """The settings in one file."""

    path: Path
    tool: Tool
    name: str
    """Of the tool, a key of `TOOLS`."""
    values: dict[str, Any]
    """As written; what is nested in a tool's way has dotted keys. Keys that are written without a value are left out."""
    program: str | None = None
    """The script or command of a line of arguments."""
    cards: int = 1
    """How many processes the file itself starts."""

    @property
    def words(self) -> set[str]:
        """Words in the names of the file, its folder, its program and the run."""
        names = [self.path.stem, self.path.absolute().parent.name, self.program]
        names += [self.values.get(key) for key in ("output_dir", "run_name", "hub_model_id", "wandb_name")]
        return {*re.findall(r"[a-z]+", " ".join(str(name) for name in names if name).lower())}


def read_source(path: Path) -> TheirSettings:
    """Return the settings in a file of another tool.

    Args:
        path: YAML or JSON, or a text with a line of arguments (a shell script, say), which may name a YAML file.

    Raises:
        UsageError: It cannot be read, has no settings, or whose they are cannot be told.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); name a file of settings") from error
    found = _read_line(text, path) if path.suffix.lower() not in (".yaml", ".yml", ".json") else None
    if found is None and path.suffix.lower() in (".sh", ".bash", ".md", ".py"):
        raise UsageError(f"{path}: no line in it trains with a tool that is known. Each tool's file has:\n{_TOOLS}")
    if found is None:
        program, cards, values = None, 1, read_mapping(path, text)
    else:
        program, cards, values = found
    name = next((tool for pattern, tool in _PROGRAM.items() if program and re.fullmatch(pattern, program)), None)
    if name == "trl" and "gamma_beta_ratio" in values:
        name = "simpo"
    flat = dict(_flatten(values, ("*",)))
    name = name or _recognise(set(flat), path)
    flat = dict(_flatten(values, TOOLS[name].nests))
    for key, value in flat.items():  # ${key} stands for that key's value, as in torchtune's files
        if isinstance(value, str):
            flat[key] = re.sub(r"\$\{([\w.]+)\}", lambda found: str(flat.get(found[1], found[0])), value)
    flat = {key: value for key, value in flat.items() if value is not None}
    return TheirSettings(path, TOOLS[name], name, flat, program, cards)


def read_mapping(path: Path, text: str | None = None) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file, numbers read as YAML 1.2 has them (1e-6 is one).

    Raises:
        UsageError: It cannot be read, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8") if text is None else text, Loader=PlainLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no settings: a mapping of keys, or a line of arguments, is expected")
    return {str(key): value for key, value in values.items()}


def _recognise(keys: set[str], path: Path) -> str:
    """Return the tool whose keys these are."""
    told = {name: sorted(tool.telling & keys) for name, tool in TOOLS.items() if tool.telling & keys}
    if "simpo" in told:
        told.pop("trl", None)
    if {"model.base", "data.train"} <= keys:
        raise UsageError(f"{path}: is a recipe already; pe-dpo check {path}")
    if not told and "model_name_or_path" in keys:
        return "trl"
    if len(told) == 1:
        return next(iter(told))
    if told:
        found = "; ".join(f"{', '.join(keys)} as {TOOLS[name].title} has them" for name, keys in told.items())
        raise UsageError(f"{path}: whose settings these are is not clear: {found}. Each tool's file has:\n{_TOOLS}")
    raise UsageError(f"{path}: no tool is known whose settings these are. Each tool's file has:\n{_TOOLS}")


def _flatten(values: Mapping[str, Any], nests: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        is_part = isinstance(value, Mapping) and (prefix or key in nests or "*" in nests) and key != "column_map"
        if is_part:
            yield from _flatten(value, nests, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_line(text: str, path: Path) -> tuple[str, int, dict[str, Any]] | None:
    """Return program, processes and settings of the first line of arguments that a known tool reads; None without one."""
    text = re.sub(r"^\s*#.*$", "", re.sub(r"^\s*#.*\\\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    variables: dict[str, str] = {}
    for line in re.sub(r"\\\s*\n", " ", text).splitlines():
        line = _expand(line, variables)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        while words and (assigned := re.fullmatch(r"(?:export )?(\w+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
            words.pop(0)
        if words and words[0] in ("cp", "mv", "cat", "git", "echo"):
            continue
        at = next((at for at in range(len(words)) if _names_program(words, at)), None)
        if at is None:
            continue
        before = {word.lstrip("-"): after for word, after in itertools.pairwise(words)} | variables
        before |= dict(word.lstrip("-").split("=", 1) for word in words[:at] if word.startswith("--") and "=" in word)
        cards = next((before[name] for name in _CARDS if str(before.get(name, "")).isdigit()), "1")
        program = _names_program(words, at)
        rest = words[at + len(program.split()) :]
        return program, int(cards), _arguments(rest, path)
    return None


def _names_program(words: list[str], at: int) -> str:
    """Return the known program that begins at one of some words, its subcommand with it; empty without one."""
    two = " ".join(words[at : at + 2])
    candidates = [two, words[at]] if at + 1 < len(words) and re.fullmatch(r"\w+", words[at + 1]) else [words[at]]
    for candidate in candidates:
        if any(re.fullmatch(pattern, candidate) for pattern in _PROGRAM) and not candidate.startswith("-"):
            return candidate
    return ""


def _expand(line: str, variables: Mapping[str, str]) -> str:
    """Return a line with the script's own variables and sums in the place of what stands for them."""
    line = re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), line)

    results = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
    return re.sub(
        r"\$\((?:expr|\()\s*(\d+)\s*\\?([-+*/])\s*([1-9]\d*)\s*\)\)?",
        lambda found: str(results[found[2]](int(found[1]), int(found[3]))),
        line,
    )


def _arguments(words: list[str], path: Path) -> dict[str, Any]:
    """Return the settings in a line of arguments; --key value wins over what a file given with --config says."""
    given: dict[str, list[str]] = {}
    files: list[str] = []
    key = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given[key] = [value] if equals else []
        elif key:
            given[key].append(word)
        elif "=" in word:
            name, _, value = word.partition("=")
            given[name] = [value]
        else:
            files.append(word)
    files += given.pop("config", [])
    values: dict[str, Any] = {}
    for name in files:
        if name.endswith((".yaml", ".yml", ".json")):
            there = [place / name for place in (path.parent, Path()) if (place / name).is_file()]
            if not there:
                raise UsageError(f"{path}: its settings are in {name}, which is not there; name that file, or put it beside")
            values |= read_mapping(there[0])
    for key, texts in given.items():
        read = [yaml.load(text, Loader=PlainLoader) if text else "" for text in texts]
        if not read and key.startswith(("no_", "no-")):
            values[key[3:].replace("-", "_")] = False
        else:
            values[key.replace("-", "_")] = True if not read else read[0] if len(read) == 1 else read
    return values
