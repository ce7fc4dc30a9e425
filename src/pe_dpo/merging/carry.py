"""What travels along with merged weights so that a server needs nothing else, and can serve nothing else by mistake."""

import errno
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from pe_dpo.errors import ModelError
from pe_dpo.merging.source import Source
from pe_dpo.model.base import load_tokenizer
from pe_dpo.model.provenance import template_fingerprint, tokenizer_fingerprint

_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def carry(source: Source, folder: Path, *, dtype: torch.dtype, config_changes: dict[str, Any]) -> None:
    """Write configuration, generation settings, tokenizer with chat template, and the base's licence files beside the weights.

    Args:
        source: that was merged.
        folder: of the merged weights.
        dtype: of the merged weights.
        config_changes: of the text model's configuration; see `plan.Plan`.

    Raises:
        ModelError: the tokenizer does not come back from disk as it was in training.
    """
    write_config(source.facts.config, folder, dtype=dtype, config_changes=config_changes)
    generation = source.base_folder / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, folder)
    for path in (path for pattern in _LEGAL for path in source.base_folder.glob(pattern) if path.is_file()):
        shutil.copy(path, folder)
    carry_tokenizer(source.tokenizer, folder)


def carry_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer with its chat template, and check that it comes back the same.

    Raises:
        ModelError: it does not.
        OSError: it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no class of its own for a full disk
        raise OSError(errno.EIO, f"the tokenizer's files: {error}") from error
    again = load_tokenizer(str(folder))
    if (tokenizer_fingerprint(again), template_fingerprint(again)) != (
        tokenizer_fingerprint(tokenizer),
        template_fingerprint(tokenizer),
    ):
        raise ModelError(f"{folder}: the tokenizer comes back from disk as another one, and would serve other tokens")


def write_config(config: Any, folder: Path, *, dtype: torch.dtype, config_changes: dict[str, Any]) -> None:
    """Write config.json of merged weights: their dtype, no quantization, what the merge changed."""
    written = type(config).from_dict(config.to_dict())
    for part in {id(part): part for part in (written, written.get_text_config())}.values():
        part.dtype = dtype
        for key, value in config_changes.items():
            setattr(part, key, value)
    if getattr(written, "quantization_config", None) is not None:
        del written.quantization_config
    written.save_pretrained(folder)


def base_licence(folder: Path) -> str | None:
    """Return the licence that the model card of a base names, None if it names none.

    Args:
        folder: of the base.
    """
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        facts = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    return licence if isinstance(licence, str) else None
