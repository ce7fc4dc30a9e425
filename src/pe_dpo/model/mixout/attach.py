"""Which layers of a PEFT model are mixed, and which are refused, with the reason."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import POLICY, REFERENCE
from pe_dpo.model.lora import InBaseDtype, compute_in_base_dtype
from pe_dpo.model.mixout.masks import Form, Layer, Mixout, check_p
from pe_dpo.model.mixout.updates import MixedUpdate
from pe_dpo.model.mixout.whole import MixedModule, WholeModule, whole_modules


class _Update(NamedTuple):
    """One trained adapter of one LoRA layer."""

    name: str
    module: Any
    adapter: str

    def layer(self, form: Form) -> Layer:
        a, b = (part[self.adapter].weight for part in (self.module.lora_A, self.module.lora_B))
        return Layer(None if form == "element" else a.shape[1], (a, b))


def attach_mixout(model: Any, p: float, *, seed: int, form: Form = "column") -> Mixout:
    """Return the mixout of a PEFT model, on in training mode; its `draw` is 0. With p = 0 the model is left as it is.

    Set `draw` to another number for each optimizer step, and call `check_reached` after the first backward. Evaluation,
    generation, adapters off, merging and what is saved are those of plain LoRA.

    Args:
        model: ready to train: LoRA on linear layers, and modules trained whole (modules_to_save).
        p: share that is taken from the reference, 0 ≤ p ≤ 1; at 1 the model is the reference, and nothing is learned.
        seed: of the masks.
        form: "column": one variable per input unit of a layer, or "element": per weight, exact and dear.

    Raises:
        ModelError: p is not in [0, 1], or something is trained that mixout does not cover.
    """
    check_p(p)
    if not p:
        return Mixout(p, seed, form, {})
    compute_in_base_dtype(model)
    updates, whole = list(_updates(model)), list(whole_modules(model))
    layers = {update.name: update.layer(form) for update in updates}
    for module in whole:
        parameters = dict(module.module.named_parameters())
        layers |= {f"{module.name}.{key}": Layer(n, (parameters[key],)) for key, n in module.units(form).items()}
    _check_all(model, updates, layers)
    mixout = Mixout(p, seed, form, layers)
    _attach(mixout, updates, whole)
    return mixout


def _attach(mixout: Mixout, updates: list[_Update], whole: list[WholeModule]) -> None:
    for name, module, adapter in updates:
        anchor = REFERENCE if adapter == POLICY and REFERENCE in module.lora_A else None
        module.lora_variant[adapter] = MixedUpdate(mixout, name, anchor)
    for one in whole:
        one.wrapper.register_forward_hook(MixedModule(mixout, one), with_kwargs=True)


def _check_all(model: nn.Module, updates: list[_Update], layers: dict[str, Layer]) -> None:
    """Check that all that is trained is mixed, with one mask.

    Raises:
        ModelError: it is not, or nothing is trained.
    """
    mixed: dict[int, str] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters:
            other = mixed.setdefault(id(parameter), name)
            if other != name:
                raise ModelError(
                    f"mixout.p: {name} cannot be mixed: it is tied to {other}, and one draw would mix the one weight with two "
                    "masks; leave it out of modules_to_save, or set mixout.p: 0"
                )
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in mixed]
    if left or not updates:
        found = f"{left[0]} is trained" if left else "no layer has a trained LoRA adapter"
        raise ModelError(
            f"mixout.p: {found}, and mixout covers LoRA on linear layers, and modules_to_save beside it; name linear layers in "
            "adapter.targets (q_proj, v_proj, …), or set mixout.p: 0"
        )


def _updates(model: nn.Module) -> Iterator[_Update]:
    """Every adapter that is trained, by the name of layer and adapter; see `_check_plain`."""
    for name, module in model.named_modules():
        for adapter in _trained_adapters(module):
            _check_plain(name, module, adapter)
            yield _Update(f"{name}.{adapter}", module, adapter)


def _trained_adapters(module: Any) -> list[str]:
    """Names of a LoRA layer's adapters with a trained A or B; none for other modules, and for bare parameters."""
    pairs = {name: (a, module.lora_B[name]) for name, a in getattr(module, "lora_A", {}).items() if name in module.lora_B}
    return [name for name, parts in pairs.items() if any(p.requires_grad for part in parts for p in part.parameters())]


def _check_plain(name: str, module: Any, adapter: str) -> None:
    """Check that a layer computes its adapter through our plain variant, without dropout.

    Raises:
        ModelError: it does not.
    """
    reason = None
    if getattr(module.lora_dropout[adapter], "p", 0):
        reason = "it has dropout, which is a second mask of the same input; set adapter.dropout: 0"
    elif module.lora_bias.get(adapter):
        reason = "its adapter has a bias (lora_bias), which is no part of ΔW; make the adapter without one"
    elif module.use_dora.get(adapter):
        reason = "it is a DoRA layer, whose weight is not W0 + ΔW; use plain LoRA"
    elif isinstance(module.lora_variant.get(adapter), MixedUpdate):
        reason = "it is under mixout already; attach it once, and set its `draw` and `p`"
    elif type(module.lora_variant.get(adapter)) is not InBaseDtype:
        kind = type(module.lora_variant.get(adapter) or module)
        reason = f"it is computed by PEFT's {kind.__name__}; mixout covers plain LoRA on linear layers, full, 8-bit or 4-bit"
    if reason:
        raise ModelError(f"mixout.p: {name} cannot be mixed: {reason}, or set mixout.p: 0")
