"""How the files of a base name and cut the tensors that its modules hold.

    one to one       model.language_model.layers.0.mlp.up_proj.weight → model.layers.0.mlp.up_proj.weight
    many to one      experts.0.gate_proj.weight, experts.0.up_proj.weight, experts.1… → experts.gate_up_proj   (E, 2·I, H)
    one to nothing   what another model of the same files has: a vision tower, heads for several tokens

Transformers has the rules and follows them while loading and saving; here the same rules are asked, tensor by tensor.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Layout:
    """Which tensors of the files make which of the modules.

    Args:
        model: of the base, with or without weights.
        file_names: of all tensors in its files.
    """

    def __init__(self, model: Any, file_names: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        self._model, self._held = model, model.state_dict()
        self.module_of: dict[str, str] = {}
        """Name in the modules of each tensor of the files that has one; of one that makes several, the first of them."""
        self._parts: dict[str, list[tuple[str, str]]] = {}
        """Patterns and names of the files' tensors that a rule makes one of, in its order."""
        for name in sorted(file_names, key=dot_natural_key):  # in which experts are counted
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, self._held)
            if target not in self._held and name in self._held:
                target, pattern = name, None
            if target in self._held:
                self.module_of[name] = target
                if pattern is not None:
                    self._parts.setdefault(target, []).append((pattern, name))
        # Rules that matched nothing must not be followed backwards.
        model._weight_conversions = [rule for rule in rules if rule.was_used()]
        self._files_of: dict[str, list[str]] = {}
        for name, target in self.module_of.items():
            self._files_of.setdefault(target, []).append(name)

    def files_of(self, module_name: str) -> list[str]:
        """Return the names of the tensors in the files that make one of the modules; none where they do not have it."""
        return self._files_of.get(module_name, [])

    def is_assembled(self, module_name: str) -> bool:
        """Return whether a tensor of the modules is made of the files' tensors by more than another name."""
        return module_name in self._parts

    def assemble(self, module_name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Return a tensor of the modules, made of those in the files.

        Args:
            module_name: of one that is assembled.
            read: gives a tensor of the files by its name.
        """
        parts = self._parts[module_name]
        rule = deepcopy(self._by_pattern[parts[0][0]])
        for pattern, name in parts:
            rule.add_tensor(module_name, name, pattern, partial(read, name))
        with torch.no_grad():
            made = rule.convert(module_name, model=self._model, config=self._model.config)[module_name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def take_apart(self, module_name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the files that make a tensor of the modules, by name: `assemble` backwards.

        Args:
            module_name: of one that is assembled.
            tensor: in the shape that it has in the modules.

        Raises:
            ValueError: the rules do not lead back to the names that were read, as where they make other tensors as well.
        """
        from transformers.core_model_loading import revert_weight_conversion

        wanted, prefix = self.files_of(module_name), f"{self._model.base_model_prefix}."
        with torch.no_grad():
            found = revert_weight_conversion(self._model, {module_name: tensor})
        back = {name if name in wanted else name.removeprefix(prefix): part for name, part in found.items()}
        if back.keys() != set(wanted):
            raise ValueError(f"{module_name} is made of {', '.join(wanted[:2])}, …, and comes apart as {', '.join(found)[:80]}")
        return back
