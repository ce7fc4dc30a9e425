"""Which layers of a PEFT model are mixed, and which are refused, with the reason."""

from typing import Any

from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import POLICY
from pe_dpo.model.adapter_config import REFERENCE
from pe_dpo.model.lora import InBaseDtype, compute_in_base_dtype
from pe_dpo.model.mixout.masks import Form, Layer, Mixout, check
from pe_dpo.model.mixout.updates import MixedUpdate
from pe_dpo.model.mixout.whole import whole_modules


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
    check(p)
    if not p:
        return Mixout(p, seed, form, {})
    compute_in_base_dtype(model)
    updates: dict[str, tuple[Any, str]] = {}
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        for adapter, part in getattr(module, "lora_A", {}).items():
            # Bare parameters, which PEFT trains as experts or routers, have no B of this name.
            parts = (part, module.lora_B[adapter]) if adapter in module.lora_B else ()
            if any(parameter.requires_grad for part in parts for parameter in part.parameters()):
                _check_plain(name, module, adapter)
                a, b = (part.weight for part in parts)
                updates[f"{name}.{adapter}"] = module, adapter
                layers[f"{name}.{adapter}"] = Layer(None if form == "element" else a.shape[1], (a, b))
    whole = list(whole_modules(model))
    for one in whole:
        layers |= one.layers(form)
    _check_all(model, layers, has_updates=bool(updates))
    mixout = Mixout(p, seed, form, layers)
    for name, (module, adapter) in updates.items():
        # A frozen adapter that acts under the trained one does so by itself, and has no part in the mixture.
        is_anchored = adapter == POLICY and REFERENCE in module.lora_A and REFERENCE not in module.active_adapters
        anchor = REFERENCE if is_anchored else None
        module.lora_variant[adapter] = MixedUpdate(mixout, name, anchor)
    for one in whole:
        one.attach(mixout)
    return mixout


def _check_all(model: nn.Module, layers: dict[str, Layer], *, has_updates: bool) -> None:
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
    if left or not has_updates:
        found = f"{left[0]} is trained" if left else "no layer has a trained LoRA adapter"
        raise ModelError(
            f"mixout.p: {found}, and mixout covers LoRA on linear layers, and modules_to_save beside it; name linear layers in "
            "adapter.targets (q_proj, v_proj, …), or set mixout.p: 0"
        )


def _check_plain(name: str, module: Any, adapter: str) -> None:
    """Check that a layer computes its adapter through our plain variant, without dropout.

    Raises:
        ModelError: it does not.
    """
    variant, reason = module.lora_variant.get(adapter), None
    if getattr(module.lora_dropout[adapter], "p", 0):
        reason = "it has dropout, which is a second mask of the same input; set adapter.dropout: 0"
    elif module.lora_bias.get(adapter):
        reason = "its adapter has a bias (lora_bias), which is no part of ΔW; make the adapter without one"
    elif module.use_dora.get(adapter):
        reason = "it is a DoRA layer, whose weight is not W0 + ΔW; use plain LoRA"
    elif isinstance(variant, MixedUpdate):
        reason = "it is under mixout already; attach it once, and set its `draw` and `p`"
    elif type(variant) is not InBaseDtype:
        kind = type(variant or module).__name__
        reason = f"it is computed by PEFT's {kind}; mixout covers plain LoRA on linear layers, full, 8-bit or 4-bit"
    if reason:
        raise ModelError(f"mixout.p: {name} cannot be mixed: {reason}, or set mixout.p: 0")
