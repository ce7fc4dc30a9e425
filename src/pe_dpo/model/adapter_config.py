"""What the configuration of a saved adapter says: of which kind it is, and which tensors it has."""

import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from pe_dpo.errors import ModelError, describe_error
from pe_dpo.printable import one_line
from pe_dpo.recipe.schema import MOVING_INITS

REFERENCE = "reference"
"""Name of the frozen adapter where the reference has one, and of its folder beside the policy's adapter."""
TRAINED = "trained"
"""Folder with the trained adapter alone where it was trained over the frozen one: the folder around it has the sum of both."""


def read_adapter_config(folder: str | Path) -> Any:
    """Return the PEFT config of a saved LoRA adapter.

    Raises:
        ModelError: there is no adapter, or one of another kind.
    """
    from peft import PeftConfig

    if not (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: no adapter_config.json there; an adapter is a folder as PEFT or pe-dpo saves it")
    try:
        with without_advice():
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT stumbles over in a file that came from elsewhere
        raise ModelError(f"{folder}: its adapter_config.json cannot be read: {one_line(error)}") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ModelError(f"{folder}: is a {one_line(kind)} adapter; only LoRA is supported")
    if getattr(config, "megatron_config", None):
        raise ModelError(
            f"{folder}: has a megatron_config, for which PEFT would import a module that it names; take an adapter without one"
        )
    for name, is_right in _KINDS.items():
        value = getattr(config, name, None)
        if not is_right(value):
            said = f"{name} is {one_line(repr(value), most=50)}"
            raise ModelError(f"{folder}: its adapter_config.json cannot be used: {said}; take another copy of the adapter")
    return config


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list | set | tuple) and all(isinstance(name, str) for name in value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _is_pattern(value: Any) -> bool:
    """Return whether a text is a pattern of names that is soon found or not, whatever the name."""
    if not isinstance(value, str) or len(value) > 5000 or re.search(r"\)[*+{]|[*+}][*+{]", value):
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return all(len(re.findall(r"[*+]|\{\d*,", part)) <= 8 for part in re.split(r"\|(?![^(]*\))", value))


def _are_by_pattern(value: Any) -> bool:
    is_map = isinstance(value, Mapping)
    return value is None or (is_map and all(_is_pattern(name) and _is_number(one) and one > 0 for name, one in value.items()))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "r": lambda value: isinstance(value, int) and 0 < value < 1_000_000,
    "lora_alpha": _is_number,
    "rank_pattern": _are_by_pattern,
    "alpha_pattern": _are_by_pattern,
    "modules_to_save": _are_names,
    **dict.fromkeys(("target_modules", "exclude_modules"), lambda value: _are_names(value) or _is_pattern(value)),
    "bias": lambda value: isinstance(value, str),
    "base_model_name_or_path": lambda value: value is None or isinstance(value, str),
    "trainable_token_indices": lambda value: value is None or isinstance(value, list | Mapping),
}
"""What stands in PEFT's configuration, where it does not look itself; patterns are tried on every module's name."""


def check_adapter(folder: str | Path) -> Any:
    """Return the PEFT config of a LoRA adapter whose reference is well defined.

    Raises:
        ModelError: as `start_from_adapter`; or see `trained_folder`.
    """
    config = read_adapter_config(folder)
    trained_folder(folder)
    otherwise = merge_first(folder)
    if config.bias != "none":
        raise ModelError(
            f"{folder}: has bias={config.bias}, which stays on when adapters are off and moves the reference; {otherwise}"
        )
    if config.modules_to_save:
        names = ", ".join(config.modules_to_save)
        raise ModelError(f"{folder}: trains whole modules ({names}); only LoRA is supported; {otherwise}")
    if config.use_dora:
        raise ModelError(f"{folder}: is a DoRA adapter; only plain LoRA is supported; {otherwise}")
    check_base_was_kept(folder, config)
    return config


def check_base_was_kept(folder: str | Path, config: Any) -> None:
    """Check that an adapter's base is the one on disk.

    Raises:
        ModelError: it was initialised in a way that took something out of its base.
    """
    init = str(config.init_lora_weights).lower()
    if init.startswith(MOVING_INITS):
        raise ModelError(
            f"{folder}: was initialised by {init}, which changed its base; save it where it was trained with PEFT's "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )


def merge_first(folder: str | Path) -> str:
    """Return what to do with an adapter that is more than an update which can be switched off, in words."""
    command = shlex.join(["pe-dpo", "merge", str(folder), "-o", "BASE"])
    return f"write it into its base first (`{command}`), and take BASE as model.base"


def trained_folder(folder: str | Path) -> Path:
    """Return where the trained adapter lies alone: the folder itself, unless it was trained over a frozen one.

    Raises:
        ModelError: it was, and the frozen one is not there any more; or this is the trained one alone, which is another model.
    """
    trained, frozen, whole = Path(folder) / TRAINED, Path(folder) / REFERENCE, Path(folder).resolve().parent
    beside = (whole / "adapter_config.json", whole / REFERENCE / "adapter_config.json")
    if Path(folder).resolve().name == TRAINED and all(path.is_file() for path in beside):
        raise ModelError(
            f"{folder}: was trained over the adapter in {whole / REFERENCE}, and without that it is another model; name "
            f"{whole}, which has the sum of both"
        )
    if not (trained / "adapter_config.json").is_file():
        return Path(folder)
    if not (frozen / "adapter_config.json").is_file():
        raise ModelError(f"{frozen}: is missing, the adapter over which {trained} was trained; take another copy of the run")
    return trained


def write_adapter_config(folder: str | Path, *, base: str | None, **settings: Any) -> None:
    """Write the adapter_config.json of a LoRA adapter.

    Args:
        folder: of the adapter.
        base: path or hub id of its base.
        settings: fields of PEFT's LoraConfig.
    """
    from peft import LoraConfig

    LoraConfig(base_model_name_or_path=base, inference_mode=True, **settings).save_pretrained(str(folder))


def expected_tensors(base: nn.Module, config: Any) -> set[str]:
    """Return the names of the tensors that an adapter of this configuration has, as PEFT saves them.

    Args:
        base: may be without weights.
        config: of the adapter.

    Raises:
        ModelError: no module of the base matches the configuration.
    """
    from peft import PeftModelForCausalLM, get_peft_model_state_dict

    try:
        with without_advice():
            model = PeftModelForCausalLM(base, deepcopy(config), adapter_name="default", low_cpu_mem_usage=True)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:  # of a config that is none
        why = describe_error(error) if not isinstance(error, ValueError) else str(error).splitlines()[0]
        raise ModelError(f"the adapter does not fit this base: {why}") from error
    return set(get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False))


@contextmanager
def without_advice() -> Iterator[None]:
    """PEFT warns of tied embeddings, unknown fields and missing tensors: all are dealt with, or refused, elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
