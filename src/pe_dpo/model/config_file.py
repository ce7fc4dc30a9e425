"""config.json of a model made of a base: the base's own text, changed where the new model is another; read by old and new.

    transformers before 5                                    transformers 5
    torch_dtype                                              dtype
    rope_theta, rope_scaling, partial_rotary_factor          rope_parameters
    rope_theta, rope_scaling, rope_local_base_freq           rope_parameters, one for each kind of layer

Version 5 reads both and writes the new one. What comes from before 5, or follows it (mlx-lm, converters to GGUF), finds no
rotary base and no scaling in the new one, takes positions without them, and says nothing. A base in the old spelling keeps
it; one in the new spelling is given the old one beside it, wherever version 5 shows that the two mean the same.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from pe_dpo.errors import ModelError

logger = logging.getLogger(__name__)

Section = dict[str, Any]
"""A JSON object that is read as a configuration of its own: all of config.json, or its text_config."""

_OLD_NAMES = ("torch_dtype", "num_experts")
"""Keys that version 5 has another name for; of experts in some models only, as their `attribute_map` says."""
_OLD_ROPE = (
    *("rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("rope_local_base_freq", "rotary_emb_base", "rotary_pct"),
)
_NO_MEANING = (
    *("transformers_version", "_name_or_path", "architectures", "auto_map", "quantization_config"),
    *_OLD_NAMES,
    "dtype",
)
"""Keys in which two configurations may differ that describe one arithmetic; the dtype is compared by itself."""
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)
"""What transformers raises for a configuration that does not read."""


def derived_config(base_folder: Path, config: Any, *, dtype: torch.dtype, changes: Mapping[str, Any]) -> str:
    """Return the text of config.json for a model that is made of a base.

    Args:
        base_folder: with the config.json of the base.
        config: of the base, as it was read in training.
        dtype: of the new model's weights.
        changes: what else differs in the configuration of its text model, by the names that transformers gives it.

    Returns:
        The base's own text, byte for byte where nothing differs, without codes and without a name of Python code. Where that
        would not be read as it should be, what transformers writes, and a warning says so.

    Raises:
        ModelError: config.json of the base cannot be read.
    """
    path = base_folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        raw: Section = json.loads(text)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; fetch the model again") from error
    kind = type(config)
    wanted = kind.from_dict(config.to_dict())
    language = wanted.get_text_config()
    for part in {id(part): part for part in (wanted, language)}.values():
        part.dtype = dtype
        for key, value in changes.items():
            if part is language or hasattr(part, key):
                setattr(part, key, value)
    derived = _changed(raw, config, dtype=str(dtype).removeprefix("torch."), changes=changes)
    try:
        read = _read(derived, kind)
        is_right = read.dtype == dtype and _meaning(read.to_dict()) == _meaning(wanted.to_dict())
    except _REFUSALS:
        is_right = False
    if not is_right:
        logger.warning(f"{path}: would not be read as the model that is written; its configuration is written anew")
        if getattr(wanted, "quantization_config", None) is not None:
            del wanted.quantization_config
        derived = json.loads(wanted.to_json_string())
    derived = with_old_spelling(derived, kind)
    return text if derived == raw else json.dumps(derived, indent=2, ensure_ascii=False) + "\n"


def with_old_spelling(raw: Mapping[str, Any], kind: Any) -> Section:
    """Return a config.json with what versions before 5 read beside what only version 5 reads, where both mean the same.

    Args:
        raw: content of a config.json.
        kind: class of transformers that reads it.
    """
    whole = deepcopy(dict(raw))
    config = _read(whole, kind)
    expected = _meaning(config.to_dict())

    def reads_right() -> bool:
        try:
            return bool(_meaning(_read(whole, kind).to_dict()) == expected)
        except _REFUSALS:
            return False

    for section, part in list(_sections(whole, config)):
        for old_name, name in {**part.attribute_map, "torch_dtype": "dtype"}.items():
            if old_name in _OLD_NAMES and section.get(name) is not None and old_name not in section:
                _replace(section, _after(section, name, {old_name: section[name]}))
        if not section.get("rope_parameters") or any(key in section for key in _OLD_ROPE):
            continue
        new = dict(section)
        for old in _old_rope(section["rope_parameters"]):
            _replace(section, {key: value for key, value in new.items() if key != "rope_parameters"} | old)
            means_the_same = reads_right()
            _replace(section, _after(new, "rope_parameters", old))
            if means_the_same and reads_right():
                break
            _replace(section, new)
    return whole


def _read(raw: Mapping[str, Any], kind: Any) -> Any:
    """Return a configuration as it is read from a file, where infinity has a spelling of its own."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return kind.from_pretrained(folder, trust_remote_code=False)


def _changed(raw: Mapping[str, Any], config: Any, *, dtype: str, changes: Mapping[str, Any]) -> Section:
    """Return a config.json with what differs written where the base has it."""
    whole, language = deepcopy(dict(raw)), config.get_text_config()
    for section, part in list(_sections(whole, config)):
        for key in ("auto_map", "quantization_config"):
            section.pop(key, None)
        if Path(str(section.get("_name_or_path", ""))).is_absolute():  # of this machine, or of another
            del section["_name_or_path"]
        for key in ("dtype", "torch_dtype"):
            if section.get(key) is not None:
                section[key] = dtype
        for key, value in changes.items() if part is config or part is language else ():
            if getattr(part, key, value) != value:
                section[part.attribute_map.get(key, key)] = value
    if whole.get("dtype") is None and whole.get("torch_dtype") is None:
        whole["torch_dtype"] = dtype
    return whole


def _sections(raw: Section, config: Any) -> Iterator[tuple[Section, Any]]:
    """Yield each object of a config.json that is read as a configuration, with what it is read as."""
    from transformers import PreTrainedConfig

    yield raw, config
    for key, value in raw.items():
        part = vars(config).get(key)
        if isinstance(value, dict) and isinstance(part, PreTrainedConfig):
            yield from _sections(value, part)


def _old_rope(rope: Mapping[str, Any]) -> Iterator[Section]:
    """Yield how `rope_parameters` may have been spelled before version 5, the likeliest first."""
    if isinstance(rope.get("full_attention"), dict):
        whole, sliding = rope["full_attention"], rope.get("sliding_attention") or {}
        yield {**_old_theta(whole), "rope_local_base_freq": sliding.get("rope_theta")}
        yield _old_theta(whole)
        return
    if rope.get("rope_type") == "longrope":
        # Phi-3 takes these three keys and no other, and reads the length before scaling beside them.
        factors = {key: rope[key] for key in ("long_factor", "short_factor") if key in rope}
        yield {**_old_theta(rope), "rope_scaling": {"type": "longrope", **factors}}
    yield _old_theta(rope)
    yield {**_old_theta(rope), "rope_scaling": {"rope_type": "default"}}  # of gpt-oss, where no scaling means YaRN
    yield {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor")}


def _old_theta(rope: Mapping[str, Any]) -> Section:
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    is_plain = scaling.keys() <= {"rope_type", "type"} and scaling.get("rope_type", "default") == "default"
    partial = rope.get("partial_rotary_factor")
    return {
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": None if is_plain else scaling,
        **({} if partial is None else {"partial_rotary_factor": partial}),
    }


def _meaning(value: Any) -> Any:
    """Return what a configuration says of arithmetic, however it is spelled."""
    if isinstance(value, dict):
        aside = {*_NO_MEANING, *(_OLD_ROPE if "rope_parameters" in value else ()), *(("type",) if "rope_type" in value else ())}
        return {key: _meaning(inner) for key, inner in value.items() if key not in aside}
    return [_meaning(inner) for inner in value] if isinstance(value, list | tuple) else value


def _after(section: Section, place: str, more: Mapping[str, Any]) -> Section:
    """Return an object with further keys right after one of its own."""
    found: Section = {}
    for key, value in section.items():
        found[key] = value
        found |= more if key == place else {}
    return found


def _replace(section: Section, content: Mapping[str, Any]) -> None:
    content = dict(content)
    section.clear()
    section.update(content)
