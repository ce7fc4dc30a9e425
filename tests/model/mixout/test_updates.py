"""Mixout on LoRA: the mixed weight itself, its masks, and where it is off."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import add_finished_adapter, as_reference, attach_adapter, save_adapter, start_from_adapter
from pe_dpo.model.base import checkpoint_activations, inspect_base, load_base
from pe_dpo.model.mixout import attach_mixout
from pe_dpo.model.random_bits import random_bits

P = 0.3
IDS = torch.arange(3, 43).view(2, 20)


def parts(model):
    """The base weight, bias, A, B and scale of the one layer."""
    module = model.base_model.model[0]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return module.base_layer.weight, module.base_layer.bias, a, b, module.scaling["default"]


def mask_of(mixout, layer=0):
    """A layer's factors, as they are drawn now."""
    return columns(mixout, list(mixout.layers)[layer])


def columns(mixout, name):
    """The factors of a layer's input units, as they are drawn now."""
    return mixout.factors(name, mixout.layers[name].parameters[0])


def width(mixout, name):
    return mixout.layers[name].parameters[0].shape[1]


def lora_layer(model, name):
    """The LoRA layer of a layer's name, and its adapter."""
    path, _, adapter = name.rpartition(".")
    return model.get_submodule(path), adapter


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def outcome(model):
    """Logits, and the gradients of a sum of log-probs."""
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    (logits.float().log_softmax(-1) * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    return logits.detach(), gradients(model)


def assert_same_bits(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


# ---------------------------------------------------------------- the mixed weight


def test_a_layer_in_training_is_the_mixed_weight_with_its_gradients(layer):
    """W̃ written out as a matrix: where m = 0 the column is W0's."""
    model = layer()
    mixout = attach_mixout(model, P, seed=0)
    x, pull = torch.randn(4, 6, 10, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, 7, dtype=torch.float64)
    weight, bias, a, b, scale = parts(model)
    got = torch.autograd.grad((out := model(x)).mul(pull).sum(), [x, a, b])
    kept = mask_of(mixout) != 0
    assert 0 < kept.sum() < 10
    mixed = torch.where(kept, weight + scale * (b @ a) / (1 - P), weight)
    want = F.linear(x, mixed, bias)
    assert torch.allclose(out, want, rtol=0, atol=1e-13)
    for one, other in zip(got, torch.autograd.grad(want.mul(pull).sum(), [x, a, b]), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences_at_a_fixed_mask(layer):
    """Lee et al.'s own code fails this: it leaves 1/(1−p) out of the backward."""
    model = layer()
    attach_mixout(model, 0.5, seed=0)
    a, b = (parts(model)[index] for index in (2, 3))
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)

    def run(x, a, b):
        return torch.func.functional_call(
            model.base_model.model, {"0.lora_A.default.weight": a, "0.lora_B.default.weight": b}, (x,)
        )

    assert torch.autograd.gradcheck(run, (x, a, b))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_outputs_have_the_mean_of_plain_lora_and_the_published_variance(layer, p):
    """Variance of output i: p/(1−p) · Σ_j x_j² ΔW_ij². Over all outputs: p/(1−p) · Σ_j x_j² ‖ΔW_:j‖²."""
    model = layer()
    mixout = attach_mixout(model, p, seed=3)
    weight, bias, a, b, scale = parts(model)
    x, update = torch.randn(10, dtype=torch.float64), (scale * b @ a).detach()
    draws = 6_000
    masks = torch.empty(draws, 10, dtype=torch.float64)
    with torch.no_grad():
        for number in range(draws):
            mixout.draw = number
            masks[number] = mask_of(mixout)
        outputs = F.linear(x, weight, bias) + (masks * x) @ update.T
        for number in range(3):  # the layer has these masks
            mixout.draw = number
            assert torch.allclose(model(x), outputs[number], atol=1e-13)
        mean, variance = outputs.mean(0), outputs.var(0)
        z = (mean - F.linear(x, weight + update, bias)) / (variance / draws).sqrt()
    assert z.abs().max() < 4.5
    published = p / (1 - p) * (x.square() * update.square()).sum(1)
    fourth = (outputs - mean).pow(4).mean(0)
    z = (variance - published) / ((fourth - variance.square()) / draws).sqrt()
    assert z.abs().max() < 4.5
    assert variance.sum() == pytest.approx(float(p / (1 - p) * (x.square() * update.square().sum(0)).sum()), rel=0.05)


@pytest.mark.parametrize(("quantize", "dtype", "tolerance"), [("nf4", "float32", 1e-5), ("int8", "bfloat16", 5e-2)])
def test_a_quantized_base_is_mixed_as_well(make_policy, quantize, dtype, tolerance):
    """As the layer's output plus what B, A and the mask make of its input."""
    model = make_policy(quantize, dtype)
    mixout = attach_mixout(model, 0.5, seed=0)
    name = list(mixout.layers)[3]
    module, adapter = lora_layer(model, name)
    x = torch.randn(5, width(mixout, name)).to(getattr(torch, dtype))
    with torch.no_grad():
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        wanted = module.base_layer(x).float() + 2 * (x.float() * columns(mixout, name)) @ a.T @ b.T
        found = module(x).float()
    assert (found - wanted).norm() <= tolerance * wanted.norm()
    logits, gradient = outcome(model)
    assert logits.isfinite().all()
    assert all(g.isfinite().all() and g.any() for g in gradient.values())


# ---------------------------------------------------------------- masks


def test_the_numbers_are_those_of_splitmix64():
    """Its published first outputs for seed 1234567, and for seed 0; we keep the upper 53 bits."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = random_bits(torch.full((3,), 1234567), torch.arange(3))
    assert found.tolist() == [number >> 11 for number in published]
    assert random_bits(torch.tensor([0]), torch.tensor([0])).item() == 0xE220A8397B1DCDAF >> 11


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_units_from_the_reference_is_p(make_policy, p):
    mixout = attach_mixout(make_policy(), p, seed=0)
    units, mixed = 0, 0
    for number in range(40):
        mixout.draw = number
        for name in mixout.layers:
            found = columns(mixout, name)
            assert set(found.unique().tolist()) <= {0.0, float(torch.tensor(1 / (1 - p)))}
            units, mixed = units + len(found), mixed + int((found == 0).sum())
    assert abs(mixed - p * units) < 4.5 * (p * (1 - p) * units) ** 0.5


def test_layers_draws_and_seeds_have_masks_of_their_own_and_the_same_ones_again(make_policy):
    model = make_policy()
    mixout = attach_mixout(model, 0.5, seed=0)
    names = [name for name in mixout.layers if width(mixout, name) == 64]
    first = torch.stack([columns(mixout, name) for name in names])
    mixout.draw = 1
    second = torch.stack([columns(mixout, name) for name in names])
    others = attach_mixout(make_policy(), 0.5, seed=1)
    third = torch.stack([columns(others, name) for name in names])
    every = torch.cat([first, second, third])
    assert len(every.unique(dim=0)) == 3 * 12 == len(every)
    correlation = torch.corrcoef(every).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 64**0.5
    mixout.draw = 0
    assert torch.equal(torch.stack([columns(mixout, name) for name in names]), first)
    again = attach_mixout(make_policy(), 0.5, seed=0)
    assert torch.equal(torch.stack([columns(again, name) for name in reversed(names)]), first.flip(0))


def test_two_adapters_of_one_layer_have_masks_of_their_own(layer):
    model = layer()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    mixout = attach_mixout(model.double(), 0.5, seed=0)
    assert len(mixout.layers) == 2
    assert not torch.equal(mask_of(mixout, 0), mask_of(mixout, 1))


def test_torchs_random_state_is_neither_read_nor_moved(make_policy):
    model = make_policy()
    mixout = attach_mixout(model, 0.5, seed=0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = outcome(model)
    assert torch.equal(torch.get_rng_state(), state)
    mixout.draw = 1
    mixout.draw = 0
    torch.manual_seed(2)
    assert_same_bits(outcome(model), first)


# ---------------------------------------------------------------- on and off


def test_p_0_is_plain_lora_to_the_bit(make_policy):
    model = make_policy()
    variants = [type(v) for m in model.modules() for v in getattr(m, "lora_variant", {}).values()]
    mixout = attach_mixout(model, 0.0, seed=0)
    assert not mixout.layers
    assert [type(v) for m in model.modules() for v in getattr(m, "lora_variant", {}).values()] == variants
    assert_same_bits(outcome(model), outcome(make_policy()))


def test_p_near_0_mixes_nothing_and_gives_the_numbers_of_plain_lora(make_policy):
    """The way through the layer is the same; 2⁻⁵³ < p < 1e-12 never takes a unit away."""
    model = make_policy()
    attach_mixout(model, 1e-12, seed=0)
    assert_same_bits(outcome(model), outcome(make_policy()))


def test_training_is_mixed_and_evaluation_reference_and_merge_are_not(make_policy):
    plain, model = make_policy(), make_policy()
    mixout = attach_mixout(model, 0.5, seed=0)
    assert len(mixout.layers) == 14
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - plain(input_ids=IDS).logits).abs().max() > 0.01
        with as_reference(model), plain.disable_adapter():  # in training mode
            assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        evaluated = plain.eval()(input_ids=IDS).logits
        assert torch.equal(model.eval()(input_ids=IDS).logits, evaluated)
        words = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **words), plain.generate(IDS, **words))
        merged = model.merge_and_unload(safe_merge=True)(input_ids=IDS).logits
        assert torch.equal(merged, plain.merge_and_unload(safe_merge=True)(input_ids=IDS).logits)


def test_an_adapter_that_is_still_zero_mixes_to_the_reference_exactly(tiny_base):
    model = attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=8)
    attach_mixout(model, 0.5, seed=0)
    with torch.no_grad():
        policy = model(input_ids=IDS).logits
        with as_reference(model):
            assert torch.equal(model(input_ids=IDS).logits, policy)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_activations_have_the_same_bits(make_policy, use_reentrant):
    wanted_model, model = make_policy(), make_policy()
    for each in (wanted_model, model):
        attach_mixout(each, 0.5, seed=0).draw = 7
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable  # before 5.23
    enable({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
    assert_same_bits(outcome(model), outcome(wanted_model))


def test_our_own_checkpointing_does_too_with_an_evaluation_in_between(make_policy):
    model = make_policy()
    mixout = attach_mixout(model, 0.5, seed=0)
    mixout.draw = 7
    wanted = outcome(model)
    model.zero_grad()
    checkpoint_activations(model.get_base_model())
    logits = model(input_ids=IDS).logits
    with torch.no_grad(), torch.inference_mode():
        model.eval()(input_ids=IDS)
    model.train()
    (logits.float().log_softmax(-1) * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    assert_same_bits((logits.detach(), gradients(model)), wanted)


def test_masks_first_drawn_in_inference_mode_serve_training_too(make_policy):
    model = make_policy()
    attach_mixout(model, 0.5, seed=0)
    with torch.inference_mode():
        model(input_ids=IDS)
    assert outcome(model)[0].isfinite().all()


def test_every_token_and_row_of_a_forward_has_the_same_mask(layer):
    model = layer()
    attach_mixout(model, 0.5, seed=0)
    row = torch.randn(10, dtype=torch.float64)
    with torch.no_grad():
        out = model(row.expand(4, 6, 10))
    assert torch.equal(out, out[0, 0].expand(4, 6, 7))


def test_what_is_saved_loads_in_plain_peft_without_a_warning_to_the_same_logits(make_policy, tiny_base, tmp_path):
    plain, model = make_policy(), make_policy()
    attach_mixout(model, 0.5, seed=0)
    save_adapter(plain, tmp_path / "plain")
    save_adapter(model, tmp_path / "mixed")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "mixed" / file.name).read_bytes() == file.read_bytes(), file.name
    base = load_base(inspect_base(str(tiny_base)))
    loaded = PeftModel.from_pretrained(base, tmp_path / "mixed").eval()  # warnings are errors in these tests
    as_plain_peft = copy.deepcopy(model).eval()
    for module in as_plain_peft.modules():
        if getattr(module, "lora_variant", None):
            module.lora_variant.clear()
            module.cast_input_dtype_enabled = True
    with torch.no_grad():
        logits = loaded(input_ids=IDS).logits
        assert torch.equal(logits, as_plain_peft(input_ids=IDS).logits)
        assert torch.allclose(logits, model.eval()(input_ids=IDS).logits, atol=1e-5)


# ---------------------------------------------------------------- a reference that is an adapter


def test_with_an_adapter_as_reference_the_pull_is_toward_it(make_policy, tiny_base, tmp_path):
    """W̃ = W0 + ΔW_ref + (ΔW − ΔW_ref)·diag(m)/(1−p); at the start, with ΔW = ΔW_ref, nothing is mixed at all."""
    save_adapter(make_policy(), tmp_path / "sft")
    model = start_from_adapter(load_base(inspect_base(str(tiny_base))), tmp_path / "sft", reference="adapter")
    mixout = attach_mixout(model, 0.5, seed=0)
    assert len(mixout.layers) == 14
    with torch.no_grad():
        policy = model(input_ids=IDS).logits
        with as_reference(model):
            assert torch.allclose(model(input_ids=IDS).logits, policy, atol=1e-5)
    name = next(iter(mixout.layers))
    module, _ = lora_layer(model, name)
    with torch.no_grad():
        module.lora_B["default"].weight.normal_(0, 0.05)
        own, frozen = (module.get_delta_weight(adapter) for adapter in ("default", "reference"))
        mixed = module.base_layer.weight + frozen + (own - frozen) * columns(mixout, name)
        x = torch.randn(5, width(mixout, name))
        assert torch.allclose(module(x), F.linear(x, mixed), atol=1e-5)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_an_impossible_p_is_refused(layer, p):
    with pytest.raises(ModelError, match="from 0 to 1"):
        attach_mixout(layer(), p, seed=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_dropout": 0.1}, "it has dropout, .*set adapter.dropout: 0"),
        ({"lora_bias": True}, r"its adapter has a bias \(lora_bias\)"),
        ({"use_dora": True}, "it is a DoRA layer"),
        ({"bias": "all"}, r"0\.base_layer\.bias is trained, and mixout covers LoRA on linear layers, and modules_to_save"),
    ],
)
def test_what_mixout_does_not_cover_is_refused_with_reason_and_remedy(layer, settings, words):
    with pytest.raises(ModelError, match=f"{words}.*set mixout.p: 0"):
        attach_mixout(layer(**settings), 0.5, seed=0)


def test_other_kinds_of_layers_are_refused(tiny_base):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv, self.linear = nn.Embedding(5, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8)

    for targets, words in ((["embed"], "lora_embedding_A.* is trained"), (["conv"], "computed by PEFT's Conv1d")):
        model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=[*targets, "linear"]))
        with pytest.raises(ModelError, match=words):
            attach_mixout(model, 0.5, seed=0)
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["linear"], modules_to_save=["conv"]))
    with pytest.raises(ModelError, match=r"conv.default cannot be mixed: its weight is \(8, 8, 3\)"):
        attach_mixout(model, 0.5, seed=0)
    parameters = LoraConfig(r=2, target_parameters=["mlp.up_proj.weight"], target_modules=[], task_type="CAUSAL_LM")
    model = get_peft_model(load_base(inspect_base(str(tiny_base))), parameters)
    with pytest.raises(ModelError, match="computed by PEFT's ParamWrapper"):
        attach_mixout(model, 0.5, seed=0)


def test_a_model_without_a_trained_adapter_is_refused(layer):
    model = layer()
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="no layer has a trained LoRA adapter"):
        attach_mixout(model, 0.5, seed=0)


def test_a_layer_that_learned_past_mixout_is_found(layer):
    model = layer()
    mixout = attach_mixout(model, 0.5, seed=0)
    mixout.check_reached()  # nothing was trained yet, as in experts that no token went to
    weight, bias, a, b, scale = parts(model)
    F.linear(torch.randn(4, 10, dtype=torch.float64), weight + scale * (b @ a), bias).sum().backward()
    with pytest.raises(ModelError, match="1 layers were trained without mixout"):
        mixout.check_reached()
    model.zero_grad()
    model(torch.randn(4, 10, dtype=torch.float64)).sum().backward()
    mixout.check_reached()


def test_an_adapter_added_later_leaves_mixout_where_it_is(make_policy, tmp_path):
    model = make_policy()
    save_adapter(model, tmp_path / "other")
    attach_mixout(model, 0.5, seed=0)
    wanted = outcome(model)
    add_finished_adapter(model, tmp_path / "other", name="other")
    model.set_adapter("default")
    assert_same_bits(outcome(model.train()), wanted)


def test_a_model_that_adapters_were_injected_into_is_mixed_without_a_peft_model_around_it(tiny_base):
    from peft import inject_adapter_in_model

    model = load_base(inspect_base(str(tiny_base)))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert list(attach_mixout(model, P, seed=0).layers) == [f"model.layers.{i}.self_attn.q_proj.default" for i in (0, 1)]
