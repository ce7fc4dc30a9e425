"""A base whose decoder layers stay in its files, each with its weights in memory only while it computes.

    always there     embeddings, head, norms: loaded as in any other base
    layer by layer   its weights from the files, in the dtype that is asked for; afterwards a placeholder without memory

Transformers loads, renames and places (`device_map` with "disk"; accelerate's index of the files). Its hooks read every weight
anew in every forward; here a layer is loaded once for all forwards that wait for it (`inference.layerwise`).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from pe_dpo.model.base import BaseInfo, empty_model, load_base
from pe_dpo.model.fingerprint import parameter_fingerprint, parameter_fingerprints

_Weight = tuple[nn.Module, str, str]
"""A module, the name of its weight, and what that is called in the whole model."""


def decoder_layers(model: Any) -> dict[str, nn.Module]:
    """Return the repeated layers of a model, by name: what transformers never splits between devices, in lists of modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    kinds = set(model._no_split_modules or ())
    found: dict[str, nn.Module] = {}
    for path in lists:
        if not any(path.startswith(f"{outer}.") for outer in found):
            layers = model.get_submodule(path).named_children()
            found |= {f"{path}.{name}": layer for name, layer in layers if type(layer).__name__ in kinds}
    return found


class LayersOnDisk:
    """A base without its decoder layers' weights, and these one layer at a time.

    Args:
        info: of the base, not quantized.
        device: to compute on.
        compute_dtype: of what a layer is given; the weights are rounded to the base's dtype before.

    Raises:
        ModelError: as `load_base`.
    """

    def __init__(self, info: BaseInfo, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        folder = mkdtemp(prefix="pe-dpo-")  # for what transformers makes of several tensors, such as experts
        finalize(self, rmtree, folder, ignore_errors=True)
        self._dtype = compute_dtype
        empty = empty_model(info.base, info.config)
        layers = list(decoder_layers(empty))
        places = _places(empty, layers, device)
        says = logging.getLogger("accelerate.big_modeling")
        says.addFilter(_nothing)  # that weights are on disk
        try:
            self.model: Any = load_base(info, device=device, places=places, offload_folder=folder)
            """Ready for adapters, but not for a forward of its own."""
        finally:
            says.removeFilter(_nothing)
        self.layers = {name: self.model.get_submodule(name) for name in layers}
        """By the names that they have without PEFT."""
        self._weights, self._places = _take_hooks(self.model, self.layers)
        self._device = device
        self.fingerprints = self._fingerprints()
        """As `fingerprint.parameter_fingerprints` of the base loaded whole."""
        for name in self.layers:
            self._put_away(name)

    @contextmanager
    def loaded(self, layer: str) -> Iterator[None]:
        """Within the block a layer has its weights."""
        for module, leaf, name in self._places[layer]:
            weight = self._weights[name]
            dtype = self._dtype if weight.is_floating_point() else weight.dtype
            setattr(module, leaf, nn.Parameter(weight.to(self._device, dtype, copy=True), requires_grad=False))
        try:
            yield
        finally:
            self._put_away(layer)

    def _put_away(self, layer: str) -> None:
        """Give a layer placeholders of one number, which is NaN: right in shape, dtype and device for PEFT."""
        for module, leaf, _ in self._places[layer]:
            weight = getattr(module, leaf)
            one = torch.full((), torch.nan, dtype=self._dtype, device=self._device)
            setattr(module, leaf, nn.Parameter(one.expand(weight.shape), requires_grad=False))

    def _fingerprints(self) -> dict[str, str]:
        names: dict[int, str] = {}
        for places in self._places.values():
            for module, leaf, name in places:
                key = id(getattr(module, leaf))
                names[key] = min(name, names.get(key, name))  # tied ones once
        return parameter_fingerprints(self.model) | {
            name: parameter_fingerprint(self._weights[name]) for name in names.values()
        }


def _places(model: nn.Module, on_disk: Sequence[str], device: torch.device) -> dict[str, str]:
    """Where transformers is to put what: some modules on disk, all others on a device."""
    steps = [name.split(".") for name in on_disk]
    above = {"", *(".".join(path[:depth]) for path in steps for depth in range(len(path)))}
    places = dict.fromkeys(on_disk, "disk")
    for path in above:
        module = model.get_submodule(path)
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *module.named_children())
        for name, _ in own:
            whole = f"{path}.{name}" if path else name
            if whole not in above:
                places.setdefault(whole, str(device))
    return places


def _take_hooks(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[Mapping[str, Tensor], dict[str, list[_Weight]]]:
    """Take accelerate's hooks off a model; return the weights on disk by name, and of each layer where they go."""
    from accelerate.hooks import remove_hook_from_module

    weights: Mapping[str, Tensor] = {}
    places: dict[str, list[_Weight]] = {}
    for path, layer in layers.items():
        places[path] = []
        for inner, module in layer.named_modules():
            for leaf, _ in module.named_parameters(recurse=False):
                weights = module._hf_hook.weights_map.dataset
                places[path].append((module, leaf, ".".join(filter(None, (path, inner, leaf)))))
    remove_hook_from_module(model, recurse=True)
    return weights, places


def _nothing(record: logging.LogRecord) -> bool:
    return False
