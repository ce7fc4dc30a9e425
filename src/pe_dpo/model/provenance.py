"""What a base was in training, tensor by tensor, so that a merge onto another one is refused.

Written beside the adapter as base.json:

    id, revision, quantize, dtype, device, parameters      how it was loaded
    model_class                                           of transformers, that loads it
    prequantized                                          whether its files hold the codes, or the weights they were made of
    quantized_layers                                      which modules were; only these are quantized again
    config                                                sha256 of what the configuration says of the arithmetic
    files                                                 sha256 of configuration and weights on disk
    tensors                                               sha256 of each parameter as loaded, codes and scales together
    tokenizer, chat_template                              sha256
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.hub import hub_is_reachable
from pe_dpo.model.base import BaseInfo, auto_class
from pe_dpo.model.fingerprint import config_fingerprint, file_fingerprints, parameter_fingerprints, plain_name
from pe_dpo.model.quantization import four_bit_experts, four_bit_layers
from pe_dpo.recipe.schema import AdapterSection

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
ASIDE = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode")
"""Of an adapter's configuration: where its base lies, and which versions wrote the file."""
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md")


def base_folder(base: str, revision: str | None = None, *, is_loaded: bool = False) -> Path:
    """Return the folder with the files of a base: its own, or the snapshot in the hub's cache, completed if the hub is there.

    Args:
        base: path or hub id.
        revision: branch, tag or commit of a hub id.
        is_loaded: its files were just read, so that nothing needs to be fetched.

    Raises:
        ModelError: they cannot be had.
    """
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    safetensors = [pattern for pattern in _WEIGHTS if ".bin" not in pattern]
    is_offline = is_loaded or not hub_is_reachable()
    try:
        folder = Path(
            snapshot_download(base, revision=revision, allow_patterns=[*safetensors, *_BESIDE], local_files_only=is_offline)
        )
        if not any(folder.glob("model*.safetensors")):
            wanted = [*_WEIGHTS, *_BESIDE]
            folder = Path(snapshot_download(base, revision=revision, allow_patterns=wanted, local_files_only=is_offline))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base}: its files cannot be had: {str(error).splitlines()[0]}") from error
    return folder


def base_files(info: BaseInfo) -> dict[str, str]:
    """Return sha256 (hex) of a base's configuration and weights on disk; reads them once."""
    folder = base_folder(info.base, info.revision, is_loaded=True)
    return file_fingerprints(folder, _weight_files(folder), believe_names=True)


def base_record(
    model: nn.Module,
    info: BaseInfo,
    tokenizer: Any,
    *,
    files: Mapping[str, str] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what is written of a loaded base, as above; adapters on it do not count. JSON-ready.

    Args:
        model: the base, with or without adapters.
        info: of the base.
        tokenizer: of the run.
        files: its `base_files` where they are known, which saves reading them.
        tensors: its `tensor_fingerprints` where they are known, which saves a pass over the weights.
    """
    return {
        "id": info.base,
        "revision": getattr(model.config, "_commit_hash", None) or info.revision,
        "model_class": auto_class(info.config).__name__,
        "quantize": info.quantize,
        "prequantized": info.is_prequantized,
        "dtype": str(info.dtype).removeprefix("torch."),
        "device": next(model.parameters()).device.type,
        "parameters": info.parameters,
        "quantized_layers": quantized_names(model),
        "config": config_fingerprint(info.config),
        "files": dict(files or base_files(info)),
        "tensors": parameter_fingerprints(model, tensors),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": template_fingerprint(tokenizer),
    }


def quantized_names(model: nn.Module) -> list[str]:
    """Return which layers of a loaded base are 4-bit, and which parameters of experts, by their names without PEFT."""
    return [plain_name(one[0]) for one in (*four_bit_layers(model), *four_bit_experts(model))]


def changed_files(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the names of a base's files that are not what they were in training; reads them all."""
    return changed(record["files"], file_fingerprints(folder, _weight_files(folder)))


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names under which two sets of fingerprints differ, such as those of a base's tensors then and now."""
    return sorted(name for name in {*now, *then} if now.get(name) != then.get(name))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return sha256 (hex) over what a tokenizer does to text, and its special ids; whether it pads or cuts is left out."""
    if getattr(tokenizer, "is_fast", False):
        does = json.loads(tokenizer.backend_tokenizer.to_str())
        for momentary in ("padding", "truncation"):
            does.pop(momentary, None)
    else:
        does = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    ends = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    return hashlib.sha256(json.dumps([does, ends], sort_keys=True).encode()).hexdigest()


def template_fingerprint(tokenizer: Any) -> str | None:
    """Return sha256 (hex) of a tokenizer's chat template, None if it has none."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def adapter_inputs(adapter: AdapterSection) -> dict[str, str]:
    """Return sha256 (hex) of each adapter that a run starts from or trains over, by its key in the recipe.

    Its weights and what its configuration says count; what lies below its folder does not.
    """
    found = {}
    for key, folder in (("start", adapter.start), ("over", adapter.over)):
        if folder is not None:
            own = {name: value for name, value in adapter_fingerprints(Path(folder)).items() if "/" not in name}
            found[key] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    return found


def adapter_fingerprints(folder: Path) -> dict[str, str]:
    """Return sha256 (hex) of a saved adapter's weights and of what its configuration says, and of those in folders below it.

    Where the base lies, and which versions wrote the file, is left out of the configuration.
    """
    found = {}
    for path in sorted({*folder.glob("adapter_*"), *folder.glob("*/adapter_*")}):
        name = path.relative_to(folder).as_posix()
        if path.name == "adapter_model.safetensors" and not name.startswith(("checkpoint-", "best/", ".")):
            found[name] = file_fingerprints(folder, [name])[name]
            config = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
            says = {key: value for key, value in config.items() if key not in ASIDE}
            text = json.dumps(says, sort_keys=True)
            found[f"{name.removesuffix('model.safetensors')}config.json"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def _weight_files(folder: Path) -> list[str]:
    found = {path.name for pattern in _WEIGHTS for path in folder.glob(pattern)}
    return sorted({*found, "config.json"})
