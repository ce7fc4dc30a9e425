"""Mixout of modules that are trained whole beside LoRA (PEFT's modules_to_save), toward their pretrained copy.

A linear layer loses input units, or single weights, as a LoRA layer does; an embedding's input units are its tokens; of gains
and biases every entry is a unit. It comes in through a forward hook, so that names and files are PEFT's own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import POLICY
from pe_dpo.model.adapter_config import REFERENCE
from pe_dpo.model.mixout.masks import Form, Layer, Mixout
from pe_dpo.model.mixout.weights import mix_elements, mix_units


def whole_modules(model: nn.Module) -> Iterator["WholeModule"]:
    """Yield the modules of a PEFT model that are trained whole."""
    from peft.utils import ModulesToSaveWrapper

    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for adapter, module in wrapper.modules_to_save.items():
                if any(parameter.requires_grad for parameter in module.parameters()):
                    yield WholeModule(f"{name}.{adapter}", wrapper, adapter)


class WholeModule:
    """A module that is trained whole; once attached, in training mode its output is that of its mixed parameters.

    Args:
        name: in the model, with its adapter.
        wrapper: PEFT's, which has the module and its pretrained copy, frozen; merging takes it away.
        adapter: the name that the module has there.
    """

    def __init__(self, name: str, wrapper: Any, adapter: str) -> None:
        self.name, self.wrapper, self.adapter = name, wrapper, adapter
        self.module: nn.Module = wrapper.modules_to_save[adapter]
        is_anchored = adapter == POLICY and REFERENCE in wrapper.modules_to_save
        self.original: nn.Module = wrapper.modules_to_save[REFERENCE] if is_anchored else wrapper.original_module
        """What it is mixed with: the reference's where the reference is an adapter."""

    def layers(self, form: Form) -> dict[str, Layer]:
        """Return each of its parameters as what has a mask of its own.

        Raises:
            ModelError: it is neither a linear layer nor an embedding, and has more than gains and biases.
        """
        found = {}
        for key, parameter in self.module.named_parameters():
            axis = self._unit_axis(key, parameter)
            if axis is None:
                raise ModelError(
                    f"mixout.p: {self.name} cannot be mixed: its {key} is {tuple(parameter.shape)}; of modules trained whole "
                    "mixout covers linear layers, embeddings, gains and biases. Leave it out of modules_to_save, or set "
                    "mixout.p: 0"
                )
            units = None if form == "element" and parameter.dim() == 2 else parameter.shape[axis]
            found[f"{self.name}.{key}"] = Layer(units, (parameter,))
        return found

    def attach(self, mixout: Mixout) -> None:
        """Let the wrapper's output be that of the mixed parameters, with masks under the names of `layers`."""
        self.mixout = mixout
        self.wrapper.register_forward_hook(self._mixed_output, with_kwargs=True)

    def _mixed_output(self, wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output of the mixed module; None, so that `output` stays, in eval mode and where it is not active."""
        is_active = not wrapper.disable_adapters and wrapper.active_adapters[:1] == [self.adapter]
        if not is_active or not (self.module.training or self.mixout.is_sampling):
            return None
        targets, mixed = dict(self.original.named_parameters()), {}
        for key, parameter in self.module.named_parameters():
            name = f"{self.name}.{key}"
            if self.mixout.form == "element" and parameter.dim() == 2:
                value = mix_elements(parameter, targets[key], self.mixout.mask_key(name, parameter))
            else:
                factors = self.mixout.factors(name, parameter)
                is_rows = self._unit_axis(key, parameter) != parameter.dim() - 1
                value = mix_units(parameter, targets[key], factors[:, None] if is_rows else factors)
            mixed[key] = self.mixout.held(value)
        return torch.func.functional_call(self.original, mixed, args, kwargs)

    def _unit_axis(self, key: str, parameter: Tensor) -> int | None:
        """Along which axis a parameter has its units; None for what mixout does not cover."""
        owner = self.module.get_submodule(key.rpartition(".")[0])
        if parameter.dim() == 1 or isinstance(owner, nn.Embedding):
            return 0
        return 1 if isinstance(owner, nn.Linear) else None
