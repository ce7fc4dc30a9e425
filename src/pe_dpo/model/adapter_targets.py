"""Which layers a fresh adapter is put on: those of the language model that a text trains, under names that PEFT understands.

    all-linear          every linear layer of the language model but the head, routers and experts
    attention, mlp      those of them in blocks of that name
    a list              names of modules, or the ends of their paths; or patterns for the whole paths of linear layers

Left out whatever is asked for is what an adapter could not change: layers that a text does not reach (vision and audio parts,
layers that attend to images), and layers whose bare weight is read past the adapter on them.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.quantizations import ALTUP_NAMES, STATE_SPACE_NAMES

BLOCKS = {"attention": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn", "moe", "expert")}
"""What the names of blocks have in them, by the word of a recipe."""

UNREACHED = "pairs of text do not reach what is there for images and sounds"
BYPASSED = "their weights are read past an adapter, by fused kernels, say"
ROUTERS = "routers and experts keep the base's weights"
SHARED_NAMES = "PEFT would put it on the experts, which have layers of the same name"
EXCLUDED = "adapter.exclude"

_OTHER_SENSES = ("vision", "visual", "image", "audio", "speech")
_ROUTERS = {"router", "gate", "shared_expert_gate", "experts"}


class Targets(NamedTuple):
    """The layers that get an adapter."""

    names: list[str]
    """For PEFT's target_modules."""
    exclude: str | None
    """For PEFT's exclude_modules: a pattern of what has the same names and gets none."""
    layers: list[str]
    """Paths of the modules that get one; those that PEFT makes of experts' parameters are not among them."""
    left_out: dict[str, list[str]]
    """Paths of linear layers that were asked for and get none, by the reason."""

    def describe(self) -> list[str]:
        """Return what gets no adapter, in lines for a person."""
        lines = []
        for reason, paths in self.left_out.items():
            leaves = sorted({path.rpartition(".")[2] for path in paths})
            shown = ", ".join(leaves[:6]) + (", …" if len(leaves) > 6 else "")
            lines.append(f"no adapter on {shown} ({len(paths)}): {reason}")
        return lines


def find_targets(model: Any, targets: str | Sequence[str], exclude: Sequence[str] = ()) -> Targets:
    """Return which layers of a base get an adapter.

    Args:
        model: the base, with or without weights.
        targets: "all-linear", "attention", "mlp", or names and patterns.
        exclude: names of modules that get none, nor anything in them; or patterns for whole paths.

    Raises:
        ModelError: a name or a pattern matches nothing, or nothing is left.
    """
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    linear = [path for path, part in modules.items() if isinstance(part, nn.Linear | Conv1D) and part is not head]  # or GPT-2's
    weighted = [path for path, part in modules.items() if hasattr(part, "weight")]  # what PEFT may know besides: embeddings
    named = [] if isinstance(targets, str) else list(targets)
    of_experts = _taken_for_experts(model, {*named, *(path.rpartition(".")[2] for path in linear)})
    found = {name: matching(name, linear if _is_pattern(name) else weighted) for name in named}
    unknown = [name for name, paths in found.items() if not paths and name not in of_experts]
    if unknown:
        there = _leaves(linear)
        raise ModelError(f"adapter.targets: no linear layer of the base is called {', '.join(unknown)}; there are {there}")
    wanted = in_blocks(targets, linear) if isinstance(targets, str) else []
    wanted += dict.fromkeys(path for name in named if name not in of_experts for path in found[name])

    outside, bypassed = _unreached(model, wanted), set(bypassed_layers(model))
    excluded = {name: [path for path in wanted if is_within(name, path)] for name in exclude}
    idle = [name for name, paths in excluded.items() if not paths]
    if idle:
        there = _leaves(wanted)
        raise ModelError(f"adapter.exclude: no layer to train is called {', '.join(idle)}, or lies in it; there are {there}")
    left_out: dict[str, list[str]] = {}
    layers: list[str] = []
    for path in wanted:
        leaf = path.rpartition(".")[2]
        reasons = {
            EXCLUDED: any(path in paths for paths in excluded.values()),
            UNREACHED: path in outside,
            BYPASSED: path in bypassed,
            ROUTERS: not named and (bool(_ROUTERS & set(path.split("."))) or "Router" in type(modules[path]).__name__),
            SHARED_NAMES: leaf in of_experts,
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        (layers if reason is None else left_out.setdefault(reason, [])).append(path)
    experts = {name.rpartition(".")[0] for name, part in model.named_parameters() if _rank_of(part) == 3 and "expert" in name}
    if experts and not named:  # bare parameters, no linear layers
        left_out.setdefault(ROUTERS, []).extend(sorted(experts))
    rest = [name for name in named if name in of_experts]
    if not layers and not rest:
        raise ModelError(f"adapter.targets: no layer is left; {'; '.join(Targets([], None, [], left_out).describe())}")
    if named and not left_out and not any(map(_is_pattern, named)):
        return Targets(named, None, layers, left_out)
    names, pattern = _for_peft(layers, modules)
    return Targets([*names, *rest], pattern, layers, left_out)


def bypassed_layers(model: nn.Module) -> list[str]:
    """Return the paths of linear layers whose weight is read, not called: past an adapter, and past the codes of 4 bits.

    Of state spaces (`A_log` and `D`) by fused kernels, https://github.com/huggingface/peft/issues/2556, and in Mamba's plain
    forward; of Gemma-3n's AltUp by itself, since it clips them while training.
    """
    found = []
    for path, module in model.named_modules():
        is_state_space = hasattr(module, "A_log") and hasattr(module, "D")
        leaves = STATE_SPACE_NAMES if is_state_space else ALTUP_NAMES
        found += [
            f"{path}.{name}" for name, child in module.named_children() if name in leaves and isinstance(child, nn.Linear)
        ]
    return found


def in_blocks(kind: str, linear: Sequence[str]) -> list[str]:
    """Paths of the linear layers in blocks of one kind, or of all.

    Raises:
        ModelError: there are none.
    """
    if kind == "all-linear":
        return list(linear)
    blocks = {path: path.lower().split(".")[:-1] for path in linear}
    inside = [path for path, names in blocks.items() if any(word in name for word in BLOCKS[kind] for name in names)]
    if not inside:
        raise ModelError(
            f"adapter.targets: {kind}: no block of the base has a name with {' or '.join(BLOCKS[kind])}; name the layers, "
            f"such as {_leaves(linear)}"
        )
    return inside


def _unreached(model: Any, paths: Iterable[str]) -> set[str]:
    """Those of the layers that only images and sounds go through."""
    config = getattr(model, "config", None)
    if config is None:
        return set()
    text = config.get_text_config()
    decoder = model.get_decoder() if text is not config else model  # else the whole is a language model
    prefix = next((f"{path}." for path, part in model.named_modules() if path and part is decoder), "")
    crossing = [f".layers.{number}." for number in getattr(text, "cross_attention_layers", None) or ()]
    return {
        path
        for path in paths
        if not path.startswith(prefix)
        or any(word in part for word in _OTHER_SENSES for part in path.split("."))
        or any(layer in f".{path}." for layer in crossing)
    }


def _taken_for_experts(model: Any, names: Iterable[str]) -> set[str]:
    """Those of the names that PEFT turns into parameters of experts (0.21, `convert_peft_config_for_transformers`).

    It does so for families whose experts were layers once, also where a dense layer, or a shared expert's, has the name too.
    """
    if not any(_rank_of(parameter) == 3 for parameter in model.parameters()):
        return set()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it wants the other half of two that lie in one parameter
            found.add(name)
            continue
        if name not in config.target_modules:
            found.add(name)
    return found


def _rank_of(parameter: Any) -> int:
    """Dimensions of a parameter; of one that lies as 4-bit codes, those of its values."""
    state = getattr(parameter, "quant_state", None)
    return parameter.dim() if state is None else len(state.shape)


def _for_peft(layers: Sequence[str], modules: Iterable[str]) -> tuple[list[str], str | None]:
    """The names that PEFT finds the layers by, and a pattern of other modules that it would find by them, too."""
    chosen = set(layers)
    others = [path for path in modules if path not in chosen]
    elsewhere = {path.rpartition(".")[2] for path in others}
    names = []
    for path in layers:
        name, rest = path.rpartition(".")[2], path.rpartition(".")[0]
        while rest and (name in elsewhere or name[0].isdigit()):
            rest, _, block = rest.rpartition(".")
            name = f"{block}.{name}"
        names += [] if name in names else [name]
    endings = tuple(f".{name}" for name in names)
    shapes = {re.sub(r"\b\d+\b", "#", path) for path in layers}
    patterns = []
    for path in others:
        if f".{path}".endswith(endings):
            shape = re.sub(r"\b\d+\b", "#", path)
            # The numbers of layers stay only where another layer of the kind does get an adapter.
            patterns.append(re.escape(path) if shape in shapes else re.escape(shape).replace(r"\#", r"\d+"))
    return names, "|".join(dict.fromkeys(patterns)) or None


def _is_pattern(name: str) -> bool:
    return re.search(r"[^\w.\-]", name) is not None


def matching(name: str, paths: Iterable[str]) -> list[str]:
    """The paths that end with a name, or that a pattern matches as a whole."""
    if _is_pattern(name):
        return [path for path in paths if _compiled("targets", name).fullmatch(path)]
    return [path for path in paths if f".{path}".endswith(f".{name}")]


def is_within(name: str, path: str) -> bool:
    """Whether a path has a name in it, or a pattern matches it as a whole."""
    if _is_pattern(name):
        return _compiled("exclude", name).fullmatch(path) is not None
    return f".{name}." in f".{path}."


def _compiled(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ModelError(f"adapter.{key}: {pattern} is no regular expression: {error}") from error


def _leaves(paths: Iterable[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
