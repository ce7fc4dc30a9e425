"""An adapter as others may have it: weights, configuration, tokenizer, card and base.json; no data, no path of this machine.

A run folder has the pairs that were held out, sampled answers, metrics, checkpoints and a recipe with paths. What is wanted is
listed, so that a file that a later version writes beside the adapter stays at home.
"""

import json
import logging
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from pe_dpo.disk import write_json
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.hub import is_local, public_name
from pe_dpo.runs.files import BASE_FILE
from pe_dpo.runs.loading import loading_lines
from pe_dpo.runs.model_card import model_card
from pe_dpo.runs.records import read_base
from pe_dpo.runs.run import Run

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
SENT = (
    *("adapter_model.safetensors", CONFIG_FILE, BASE_FILE, "README.md"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("tekken.json", "chat_template*", "additional_chat_templates/*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""Patterns of what is sent of an adapter's folder."""
_NAMES_PATHS = ("README.md", "*config.json", BASE_FILE, "merge_report.json", "Modelfile")
_PATH = re.compile(r"(?<![\w./:~-])/[\w.@+-]+/[\w.@+-]+")
"""The beginning of an absolute path: its first two parts."""
_SYSTEM = ("/bin/", "/dev/", "/etc/", "/lib/", "/opt/", "/proc/", "/sys/", "/usr/")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder is one of an adapter, or of a run that has come to one."""
    return (folder / CONFIG_FILE).is_file() and (folder / "adapter_model.safetensors").is_file()


def write_public_adapter(folder: Path, output: Path, *, name: str) -> list[str]:
    """Write what others may have of an adapter's folder, and return what of it stays here, by the first part of its path.

    Args:
        folder: of a run, a packaged adapter, or any other adapter.
        output: an empty folder.
        name: under which they will find it.

    Raises:
        ModelError: a file cannot be read, or nothing but this package loads the base of training.
        UsageError: there is no card.
    """
    left_out = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inside = path.relative_to(folder)
        if any(fnmatch(inside.as_posix(), pattern) and inside.as_posix().count("/") == pattern.count("/") for pattern in SENT):
            (output / inside).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, output / inside)
        else:
            left_out.add(inside.parts[0])
    base = read_base(folder) if (folder / BASE_FILE).is_file() else {}
    if base:
        try:
            loading_lines(base)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error
        if is_local(base["id"]):
            write_json(output / BASE_FILE, base | {"id": public_name(base["id"]), "is_local": True})
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        named = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / CONFIG_FILE}: cannot be read: {error}") from error
    if named and is_local(named):
        write_json(output / CONFIG_FILE, config | {"base_model_name_or_path": None})
        what = f"{CONFIG_FILE} names the base by a path on this machine ({named}), which nobody else has"
        logger.warning(f"{what}; it is left out there: write its hub id in README.md")
    _write_card(folder, output / "README.md", name)
    return sorted(left_out)


def _write_card(folder: Path, card: Path, name: str) -> None:
    """Let a copied card load the adapter by its name; that of a run is written anew where it was not fit to be sent.

    Raises:
        UsageError: there is none.
    """
    text, run = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "", Run(folder)
    if run.exists and ("PeftModel.from_pretrained" not in text or local_path(text)):
        base, info = read_base(folder), run.info
        said = info.describe_memory(), info.describe_skipped(), info.describe_history()
        text = model_card(run.recipe, base, info.before, info.after, *said)
        logger.info("README.md is written anew: without paths of this machine, and with the lines that load the adapter")
    if not text.strip():
        raise UsageError(f"{folder / card.name}: is missing or empty; others must read what this is: write a model card")
    for call in ("PeftModel.from_pretrained(base, ", "AutoTokenizer.from_pretrained("):
        text = text.replace(f"{call}'.')", f"{call}{name!r})")
    card.write_text(text, encoding="utf-8")


def check_no_local_paths(folder: Path, names: list[str]) -> None:
    """Check that cards and configurations name no path of this machine.

    Args:
        folder: that they lie in.
        names: of all files that are sent.

    Raises:
        UsageError: with file, line and path.
    """
    for name in (name for name in names if any(fnmatch(name, pattern) for pattern in _NAMES_PATHS)):
        for number, line in enumerate((folder / name).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            found = local_path(line)
            if found:
                raise UsageError(
                    f"{name}:{number}: names a path of this machine ({found}/…); write what others know it by, and push again"
                )


def local_path(text: str) -> str | None:
    """Return the beginning of the first path in a text that is one of this machine and not of every system; None without."""
    found = (match[0] for match in _PATH.finditer(text))
    return next((path for path in found if not path.startswith(_SYSTEM) and Path(path).exists()), None)
