"""Mixout of modules that are trained whole beside LoRA (PEFT's modules_to_save), toward their pretrained copy.

A linear layer loses input units, or single weights, as a LoRA layer does; an embedding's input units are its tokens; of gains
and biases every entry is a unit. It comes in through a forward hook, so that names and files are PEFT's own.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import POLICY, REFERENCE
from pe_dpo.model.mixout.masks import Form, Mixout
from pe_dpo.model.mixout.weights import mix_elements, mix_units


class WholeModule(NamedTuple):
    """A module that is trained whole.

    Args:
        name: in the model, with its adapter.
        module: that is trained.
        original: its pretrained copy, frozen; the reference's where the reference is an adapter.
        wrapper: PEFT's, which has both; merging takes it away.
        adapter: the name that the module has there.
    """

    name: str
    module: nn.Module
    original: nn.Module
    wrapper: Any
    adapter: str

    @property
    def is_active(self) -> bool:
        """Whether the wrapper's output is the trained module's, not the original's or another adapter's."""
        return not self.wrapper.disable_adapters and self.wrapper.active_adapters[:1] == [self.adapter]

    def units(self, form: Form) -> dict[str, int | None]:
        """Return how many variables each of its parameters has, None for a matrix in the form "element".

        Raises:
            ModelError: it is neither a linear layer nor an embedding, and has more than gains and biases.
        """
        found: dict[str, int | None] = {}
        for key, parameter in self.module.named_parameters():
            axis = _unit_axis(self.module.get_submodule(key.rpartition(".")[0]), parameter)
            if axis is None:
                raise ModelError(
                    f"mixout.p: {self.name} cannot be mixed: its {key} is {tuple(parameter.shape)}; of modules trained whole "
                    "mixout covers linear layers, embeddings, gains and biases. Leave it out of modules_to_save, or set "
                    "mixout.p: 0"
                )
            found[key] = None if form == "element" and parameter.dim() == 2 else parameter.shape[axis]
        return found


def whole_modules(model: nn.Module) -> Iterator[WholeModule]:
    """Yield the modules of a PEFT model that are trained whole, with what they were."""
    from peft.utils import ModulesToSaveWrapper

    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for adapter, module in wrapper.modules_to_save.items():
            if any(parameter.requires_grad for parameter in module.parameters()):
                is_anchored = adapter == POLICY and REFERENCE in wrapper.modules_to_save
                original = wrapper.modules_to_save[REFERENCE] if is_anchored else wrapper.original_module
                yield WholeModule(f"{name}.{adapter}", module, original, wrapper, adapter)


class MixedModule:
    """A forward hook of the wrapper: in training mode the module's output is that of its mixed parameters.

    Args:
        mixout: has the masks, under the module's name and the parameter's.
        whole: the module.
    """

    def __init__(self, mixout: Mixout, whole: WholeModule) -> None:
        self.mixout, self.whole = mixout, whole

    def __call__(self, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output of the mixed module; None, so that `output` stays, in eval mode and with adapters off."""
        module = self.whole.module
        if not self.whole.is_active or not (module.training or self.mixout.is_sampling):
            return None
        targets = dict(self.whole.original.named_parameters())
        mixed = {key: self._mixed(key, parameter, targets[key]) for key, parameter in module.named_parameters()}
        return torch.func.functional_call(self.whole.original, mixed, args, kwargs)

    def _mixed(self, key: str, parameter: Tensor, target: Tensor) -> Tensor:
        name = f"{self.whole.name}.{key}"
        if self.mixout.form == "element" and parameter.dim() == 2:
            return self.mixout.held(mix_elements(parameter, target, self.mixout.mask_key(name, parameter)))
        factors = self.mixout.factors(name, parameter)
        is_rows = _unit_axis(self.whole.module.get_submodule(key.rpartition(".")[0]), parameter) != parameter.dim() - 1
        return self.mixout.held(mix_units(parameter, target, factors[:, None] if is_rows else factors))


def _unit_axis(owner: nn.Module, parameter: Tensor) -> int | None:
    """Along which axis a parameter has its units; None for what mixout does not cover."""
    if parameter.dim() == 1:
        return 0
    if isinstance(owner, nn.Embedding):
        return 0
    return 1 if isinstance(owner, nn.Linear) else None
