"""The LoRA update in the base's dtype: PEFT's numbers, in one product."""

import copy

import pytest
import torch
from peft import PeftModel

from pe_dpo.model.adapter import attach_adapter, save_adapter
from pe_dpo.model.base import inspect_base, load_base


@pytest.fixture
def make_policy(tiny_base):
    """A policy with a random B, and PEFT's own computation of the same layers."""

    def make(quantize="none", dtype="float32", dropout=0.0):
        model = attach_adapter(
            load_base(inspect_base(str(tiny_base), quantize=quantize, dtype=dtype)), rank=4, alpha=8, dropout=dropout
        )
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=generator)
        return model

    return make


def as_peft(model):
    """The same model with PEFT's plain LoRA."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if getattr(module, "lora_variant", None):
            module.lora_variant.clear()
            module.cast_input_dtype_enabled = True
    return plain


def outcome(model):
    ids = torch.arange(3, 43).view(2, 20)
    logits = model(input_ids=ids).logits
    (logits.float().log_softmax(-1) * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("quantize", "dtype", "tolerance"),
    [
        ("none", "float32", 1e-6),
        ("nf4", "float32", 1e-6),
        ("none", "bfloat16", 3e-2),
        ("nf4", "bfloat16", 3e-2),
        ("int8", "bfloat16", 5e-2),
    ],
)
def test_logits_and_gradients_are_pefts(make_policy, quantize, dtype, tolerance):
    model = make_policy(quantize, dtype)
    assert sum(bool(getattr(module, "lora_variant", None)) for module in model.modules()) == 14
    (logits, gradients), (wanted, wanted_gradients) = outcome(model), outcome(as_peft(model))
    assert (logits - wanted).float().norm() <= tolerance * wanted.float().norm()
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted_gradients[name]).norm() <= tolerance * wanted_gradients[name].norm(), name


def test_in_bfloat16_no_input_is_copied_to_float32(make_policy):
    """What PEFT does, seen in the dtype that the products of A have."""
    seen = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                seen.append(result.dtype)
            return result

    model = make_policy(dtype="bfloat16")
    with Products(), torch.no_grad():
        model(input_ids=torch.arange(3, 23).view(1, 20))
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    with Products(), torch.no_grad():
        as_peft(model)(input_ids=torch.arange(3, 23).view(1, 20))
    assert torch.float32 in seen


def test_dropout_is_drawn_as_peft_draws_it(make_policy):
    model = make_policy(dropout=0.5).train()
    plain = as_peft(model)
    torch.manual_seed(3)
    mine, _ = outcome(model)
    torch.manual_seed(3)
    theirs, _ = outcome(plain)
    assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("safe", [True, False])
def test_merging_and_unmerging_in_peft_goes_on_working(make_policy, safe):
    model = make_policy().eval()
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        model.merge_adapter(safe_merge=safe)
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        again = model(input_ids=ids).logits
        whole = model.merge_and_unload(safe_merge=safe)(input_ids=ids).logits
    for other in (merged, again, whole):
        assert torch.allclose(other, wanted, atol=1e-5)


def test_what_is_saved_loads_in_plain_peft_to_the_same_logits(make_policy, tiny_base, tmp_path):
    model = make_policy().eval()
    save_adapter(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(load_base(inspect_base(str(tiny_base))), tmp_path / "adapter").eval()
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_a_layer_with_a_variant_of_its_own_is_left_alone(tiny_base):
    from peft import LoraConfig, get_peft_model

    from pe_dpo.model.lora import InBaseDtype, compute_in_base_dtype

    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(inspect_base(str(tiny_base))), config)
    compute_in_base_dtype(model)
    variants = [v for module in model.modules() for v in getattr(module, "lora_variant", {}).values()]
    assert variants
    assert not any(isinstance(variant, InBaseDtype) for variant in variants)
