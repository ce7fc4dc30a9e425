"""The files of a tokenizer, carried from where it came from: the base's own, in its own spelling, its template in place.

    tokenizer.json, tokenizer.model, vocab.json, …     byte for byte
    tokenizer_config.json                              without auto_map, as its code is neither run nor carried along; what only
                                                       transformers 5 writes there is spelled as earlier versions write it
    chat template                                      in tokenizer_config.json, chat_template.jinja and chat_template.json,
                                                       wherever the base has it

Whatever is carried is loaded again and must be the tokenizer in use, by what it does to text and by its template; otherwise
transformers writes it anew, and a warning says so.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pe_dpo.disk import TEMPORARY, disk_errors_named
from pe_dpo.errors import ModelError
from pe_dpo.model.base import load_tokenizer
from pe_dpo.model.provenance import template_fingerprint, tokenizer_fingerprint

logger = logging.getLogger(__name__)

Files = dict[str, bytes]
"""Content of files, by their names below a folder."""

CONFIG, TEMPLATE, MORE_TEMPLATES, OF_PROCESSOR = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "chat_template.json",
)
_PLACES = ("name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Where a tokenizer once lay, as versions before 5 write it."""
PATTERNS = (
    *("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "*.model", "tekken.json", "*.tiktoken"),
    *(TEMPLATE, OF_PROCESSOR, f"{MORE_TEMPLATES}/*.jinja"),
)
"""Files of tokenizers, and those of templates."""


def save_tokenizer(tokenizer: Any, folder: Path, origins: Sequence[Path] = ()) -> None:
    """Write a tokenizer with its chat template, and check that it comes back the same.

    Args:
        tokenizer: that is in use.
        folder: with config.json of the same model, if it is to have one.
        origins: folders that may have its files; the first whose files are read as this tokenizer counts.

    Raises:
        ModelError: it does not come back the same.
        OSError: it cannot be written.
    """
    config = folder / "config.json"
    write_files(tokenizer_files(tokenizer, origins, config=config.read_bytes() if config.is_file() else None), folder)
    if _fingerprints(load_tokenizer(str(folder))) != _fingerprints(tokenizer):
        raise ModelError(f"{folder}: the tokenizer comes back from disk as another one, and would serve other tokens")


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files, and the folders below that they lie in."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def tokenizer_files(tokenizer: Any, origins: Sequence[Path], *, config: bytes | None = None) -> Files:
    """Return the files that a tokenizer is loaded from, with its chat template.

    Args:
        tokenizer: that is in use.
        origins: folders that may have its files; the first whose files are read as this tokenizer counts.
        config: content of the config.json that will lie beside them, which has a say in how they are read.

    Raises:
        DiskError: they cannot be written to a place for trying them.
    """
    for origin in origins:
        paths = [path for pattern in PATTERNS for path in sorted(origin.glob(pattern)) if path.is_file()]
        found = {path.relative_to(origin).as_posix(): path.read_bytes() for path in paths}
        carried = _carried(found, tokenizer, config) if found else None
        if carried is not None:
            return carried
    if origins:
        logger.warning(f"{origins[0]}: its files are not read as the tokenizer in use, which transformers writes anew")
    with TemporaryDirectory() as name, disk_errors_named(Path(name), advice=TEMPORARY):
        tokenizer.save_pretrained(name)
        paths = [path for path in Path(name).rglob("*") if path.is_file()]
        written = {path.relative_to(name).as_posix(): path.read_bytes() for path in paths}
    return _carried(written, tokenizer, config) or written


def _carried(found: Mapping[str, bytes], tokenizer: Any, config: bytes | None) -> Files | None:
    """Return a tokenizer's files in a spelling that old and new read, with its template; None if another one is read there."""
    files, wanted = dict(found), _fingerprints(tokenizer)
    try:
        settings = json.loads(files.get(CONFIG, b"{}"))
        known = _known_to_all(settings, type(tokenizer).__name__, stands_alone=config is None)
    except (ValueError, AttributeError):
        return None
    for _ in range(2):
        if known != settings:
            files[CONFIG] = (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode()
        with TemporaryDirectory() as name:
            write_files({**files, **({} if config is None else {"config.json": config})}, Path(name))
            try:
                loaded = _fingerprints(load_tokenizer(name))
            except ModelError:
                return None
        if loaded == wanted:
            return files
        if loaded[0] != wanted[0]:
            return None
        known = _place_template(files, known, tokenizer.chat_template)
    return None


def _fingerprints(tokenizer: Any) -> tuple[str, str | None]:
    """Return what a tokenizer does to text, and its template, each as a hash."""
    return tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer)


def _known_to_all(settings: Mapping[str, Any], kind: str, *, stands_alone: bool) -> dict[str, Any]:
    """Return tokenizer_config.json without code and paths, and in words that versions before 5 know as well."""
    known = {
        key: value
        for key, value in settings.items()
        if key != "auto_map" and not (key in _PLACES and Path(str(value)).is_absolute())
    }
    if stands_alone:  # otherwise config.json says of what kind it is
        known.setdefault("tokenizer_class", kind)
    if known.get("tokenizer_class") == "TokenizersBackend":
        known["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(known.get("extra_special_tokens"), list) and "additional_special_tokens" not in known:
        renamed = {"extra_special_tokens": "additional_special_tokens"}
        known = {renamed.get(key, key): value for key, value in known.items()}
    return known


def _place_template(files: Files, settings: Mapping[str, Any], template: Any) -> dict[str, Any]:
    """Put a chat template into a tokenizer's files where they have one; return its settings with it, where it is in those."""
    named = template if isinstance(template, dict) else {} if template is None else {"default": template}
    default = named.get("default")
    more = {f"{MORE_TEMPLATES}/{name}.jinja": text for name, text in named.items() if name != "default"}
    is_in_file = TEMPLATE in files
    for name in [name for name in files if name == TEMPLATE or name.startswith(f"{MORE_TEMPLATES}/")]:
        del files[name]
    if OF_PROCESSOR in files:
        content = {} if default is None else {"chat_template": default}
        files[OF_PROCESSOR] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    if is_in_file:
        files |= {name: text.encode() for name, text in {TEMPLATE: default, **more}.items() if text is not None}
    placed = {key: value for key, value in settings.items() if key != "chat_template"}
    if template is not None and ("chat_template" in settings or not is_in_file):
        several = [{"name": name, "template": text} for name, text in named.items()]
        placed["chat_template"] = template if isinstance(template, str) else several
    return placed
