"""Another tool's settings as its file has them: YAML, JSON, or a line of arguments; whose they are is found in their keys.

config.yaml      {rl: dpo, base_model: …}                        Axolotl
train.sh         swift rlhf --rlhf_type dpo --beta 0.1 \\         ms-swift
                 accelerate launch --num_processes 8 scripts/dpo.py --config c.yaml --beta 0.1
"""

import itertools
import operator
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pe_dpo.disk import unlike_a_file
from pe_dpo.errors import UsageError
from pe_dpo.printable import one_line
from pe_dpo.recipe.elsewhere import TOOLS, Tool
from pe_dpo.recipe.strict_yaml import PlainLoader

_PROGRAM = {
    r"\S*run_simpo\.py": "simpo",
    r"(\S*/)?swift rlhf|\S*rlhf\.py": "ms-swift",
    r"(\S*/)?(llamafactory-cli|lmf) train|\S*src/train\.py|\S*train_bash\.py": "llama-factory",
    r"(\S*/)?axolotl train|axolotl\.cli\.train": "axolotl",
    r"(\S*/)?tune run": "torchtune",
    r"(\S*/)?trl (dpo|cpo|orpo|kto|sft|grpo|reward)|\S*(dpo|cpo|orpo|kto|simpo)\w*\.py|trl\.scripts\.\w+": "trl",
}
"""Programs, as a line of arguments names them, and whose they are."""
_NOT_READ = {
    r"\S*open_instruct/\S+\.py|\S*dpo_tune\w*\.py": "open-instruct",
    r"\S*openrlhf\.cli\.\S+": "OpenRLHF",
    r"\S*verl\.trainer\S*": "verl",
}
"""Programs that train on preferences with settings of their own, which are not read."""
_OF_OPEN_INSTRUCT = {"dpo_beta", "dpo_loss_type", "dataset_mixer_list", "mixer_list", "with_tracking"}
_CARDS = ("num_processes", "nproc_per_node", "nproc-per-node", "NPROC_PER_NODE", "num_gpus")
"""How launchers and their variables say how many processes they start."""
_ON_ALL_CARDS = ("trl", "simpo", "axolotl", "llama-factory")
"""Tools that start a process on each visible card where nothing else is said."""
_LARGEST_BYTES = 2_000_000
_MOST_VALUES = 100_000
_LONGEST_VALUE = 10_000
_TOOLS = "\n".join(
    textwrap.fill(f"{tool.title:24} {tool.has}", 80, initial_indent="  ", subsequent_indent=" " * 27) for tool in TOOLS.values()
)


class _Loader(PlainLoader):
    """YAML as these tools read it: `yes` and `off` are booleans, `<<` takes over a mapping; and 1e-6 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (the name PyYAML reads)
        first: list(rules) for first, rules in PlainLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and key.value in seen:
                words = f"{key.value} is written twice, on lines {seen[key.value]} and {line}; keep the one that is meant"
                raise yaml.YAMLError(words)
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep=deep)


_BOOLEAN = re.compile(r"^(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("yYnNoO"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])


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
    cards: int | None = None
    """How many processes the file itself starts; None where it does not say."""

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
    if kind := unlike_a_file(path):
        raise UsageError(f"{path}: is {kind}; name a file of settings")
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UsageError(
                f"{path}: has {path.stat().st_size / 1e6:.0f} MB, and settings have some kB; name a file of settings"
            )
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no text in UTF-8 (byte {error.start}); name a file of settings") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; name a file of settings") from error
    found = _read_line(text, path) if path.suffix.lower() not in (".yaml", ".yml", ".json", ".ipynb") else None
    if found is None and path.suffix.lower() in (".py", ".ipynb"):
        raise UsageError(
            f"{path}: Python is not read; write what it gives to its trainer and adapter into a YAML file, by the names of "
            "TRL's script: model_name_or_path, dataset_name, use_peft: true, lora_r, lora_alpha, beta, learning_rate, …"
        )
    if found is None and path.suffix.lower() in (".sh", ".bash", ".md"):
        raise UsageError(f"{path}: no line in it trains with a tool that is known. Each tool's file has:\n{_TOOLS}")
    if found is None:
        program, cards, values = None, None, read_mapping(path, text)
    else:
        program, cards, values = found
    name = next((tool for pattern, tool in _PROGRAM.items() if program and re.fullmatch(pattern, program)), None)
    if name == "trl" and "gamma_beta_ratio" in values:
        name = "simpo"
    try:
        flat = dict(_flatten(values, ("*",)))
    except RecursionError as error:
        raise UsageError(f"{path}: a part of it holds itself (an alias, *), or is nested too deeply; write it out") from error
    name = name or _recognise(set(flat), path)
    flat = dict(_flatten(values, TOOLS[name].nests))
    standing_for = _interpolate(flat)
    flat = {
        key: value for key, value in flat.items()
        if value is not None and (key in TOOLS[name].keys or key not in standing_for)
    }  # fmt: skip
    return TheirSettings(path, TOOLS[name], name, flat, program, cards)


def read_mapping(path: Path, text: str | None = None) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file, numbers read as YAML 1.2 has them (1e-6 is one).

    Raises:
        UsageError: It cannot be read, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8") if text is None else text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML or JSON: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: cannot be read as YAML or JSON: it is nested too deeply") from error
    except (ValueError, TypeError) as error:  # numbers of many digits, keys that are lists
        raise UsageError(f"{path}: cannot be read as YAML or JSON: {one_line(error)}") from error
    rest, count = [values], 0
    while rest:  # an alias stands for all that it names, and may name aliases
        value = rest.pop()
        rest += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
        count += 1
        if count > _MOST_VALUES:
            raise UsageError(
                f"{path}: has more than {_MOST_VALUES:,} values with what its aliases stand for, or a part of it holds itself "
                "(an alias, *); write them out"
            )
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no settings: a mapping of keys, or a line of arguments, is expected")
    return {str(key): value for key, value in values.items()}


def _recognise(keys: set[str], path: Path) -> str:
    """Return the tool whose keys these are."""
    told = {name: sorted(tool.telling & keys) for name, tool in TOOLS.items() if tool.telling & keys}
    if "simpo" in told:
        told.pop("trl", None)
    if {"model.base", "data.train"} <= keys:
        raise UsageError(f"{path}: is a recipe already; pe-dpo check {shlex.quote(str(path))}")
    if keys & _OF_OPEN_INSTRUCT and not keys & TOOLS["axolotl"].telling:
        raise UsageError(_not_read(path, ", ".join(sorted(keys & _OF_OPEN_INSTRUCT)), "open-instruct"))
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


def _not_read(path: Path, found: str, title: str) -> str:
    return f"{path}: {found} is {title}'s, whose settings are not read; write a recipe by hand. Each tool's file has:\n{_TOOLS}"


def _interpolate(flat: dict[str, Any]) -> set[str]:
    """Put values in the place of ${key}, as in torchtune's files, and return the keys that stand for a part of others."""
    standing_for: set[str] = set()

    def value_of(found: re.Match[str]) -> str:
        standing_for.add(found[1])
        return str(flat.get(found[1], found[0]))

    for _ in range(10):  # a value may name another one that names a third
        before = dict(flat)
        for key, value in flat.items():
            if isinstance(value, str):
                flat[key] = re.sub(r"\$\{([\w.]+)\}", value_of, value, count=20)[:_LONGEST_VALUE]
        if flat == before:
            break
    return standing_for


def _read_line(text: str, path: Path) -> tuple[str, int | None, dict[str, Any]] | None:
    """Return program, processes and settings of the first line of arguments that a known tool reads; None without one."""
    text = re.sub(r"^\s*#.*$", "", re.sub(r"^\s*#.*\\\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    variables: dict[str, str] = {}
    for line in re.sub(r"\\\s*\n", " ", text).splitlines():
        line = _expand(line, variables)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        if words[:1] == ["export"]:
            words.pop(0)
        while words and (assigned := re.fullmatch(r"(\w+)=(.*?);?", words[0])):
            variables[assigned[1]] = assigned[2]
            words.pop(0)
        if words and words[0] in ("cp", "mv", "cat", "git", "echo"):
            continue
        for word in words:
            title = next((title for pattern, title in _NOT_READ.items() if re.fullmatch(pattern, word)), None)
            if title:
                raise UsageError(_not_read(path, word, title))
        at = next((at for at in range(len(words)) if _names_program(words, at)), None)
        if at is None:
            continue
        before = {word.lstrip("-"): after for word, after in itertools.pairwise(words)} | variables
        before |= dict(word.lstrip("-").split("=", 1) for word in words[:at] if word.startswith("--") and "=" in word)
        program = _names_program(words, at)
        rest = words[at + len(program.split()) :]
        rest = list(itertools.takewhile(lambda word: not re.match(r"\d?>|<|&|\||;$", word), rest))  # 2>&1 | tee log
        return program, _cards(before, program, path), _arguments(rest, path)
    return None


def _cards(before: Mapping[str, str], program: str, path: Path) -> int | None:
    """Return how many processes a line starts: as it says, as accelerate's file beside it says, or one on each card it sees."""
    for name in _CARDS:
        if before.get(name, "").isdigit():
            nodes = next((before[key] for key in ("nnodes", "NNODES") if before.get(key, "").isdigit()), "1")
            return int(before[name]) * (int(nodes) if "nproc" in name.lower() else 1)
    launcher = before.get("config_file")
    for place in (path.parent, Path()):
        if launcher and (place / launcher).is_file():
            count = read_mapping(place / launcher).get("num_processes")
            return count if isinstance(count, int) else None
    tool = next(name for pattern, name in _PROGRAM.items() if re.fullmatch(pattern, program))
    visible = [card for card in before.get("CUDA_VISIBLE_DEVICES", "").split(",") if card.strip()]
    return len(visible) if visible and not launcher and tool in _ON_ALL_CARDS else None


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

    def last_part(found: re.Match[str]) -> str:
        return variables[found[1]].rpartition("/")[2] if found[1] in variables else found[0]

    line = re.sub(r"\$\{(\w+)##\*/\}", last_part, line)
    line = re.sub(r"\$\{(\w+):?-([^${}]*)\}", lambda found: variables.get(found[1]) or found[2], line)
    line = re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables.get(found[1] or found[2], found[0]), line)
    results = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
    return re.sub(
        r"\$\((?:expr|\()\s*(\d+)\s*\\?([-+*/])\s*([1-9]\d*)\s*\)\)?",
        lambda found: str(results[found[2]](int(found[1]), int(found[3]))),
        line,
    )


def _read_argument(text: str) -> Any:
    """Return an argument as YAML reads it, or as the text that it is."""
    try:
        return yaml.load(text, Loader=_Loader) if text else ""
    except (yaml.YAMLError, RecursionError):
        return text


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
        read = [_read_argument(text) for text in texts]
        if not read and key.startswith(("no_", "no-")):
            values[key[3:].replace("-", "_")] = False
        else:
            values[key.replace("-", "_")] = True if not read else read[0] if len(read) == 1 else read
    return values
