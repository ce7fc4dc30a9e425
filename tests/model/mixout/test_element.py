"""Mixout of single weights of a LoRA layer, W̃ = W0 + M ⊙ s·B·A / (1−p), made block by block: held against the whole matrix."""

import plain_mixout
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from pe_dpo.model.adapter import as_reference
from pe_dpo.model.fixed import fixed_weights
from pe_dpo.model.mixout import attach_mixout, masks, weights
from pe_dpo.model.random_bits import random_bits

P = 0.3
ONE_BLOCK, TWO_ROWS, ONE_ROW = 2**20, 20, 3
"""Elements in a block: of 7 × 10, all; two rows, and one in the last block; one row, since less than a row is no block."""
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def elements(monkeypatch):
    """How many elements of a matrix are made at once, from here on."""
    return lambda count: monkeypatch.setitem(weights._BLOCK, "cpu", count)


def parts(model):
    """The base weight, bias, A, B and scale of the one layer."""
    module = model.base_model.model[0]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return module.base_layer.weight, module.base_layer.bias, a, b, module.scaling["default"]


def dense(model, mixout, x):
    """The layer's output by its mixed weight, written out."""
    weight, bias, a, b, scale = parts(model)
    factors = plain_mixout.factors(mixout.seed, mixout.draw, next(iter(mixout.layers)), weight.shape, mixout.p)
    return F.linear(x, plain_mixout.mixed(weight + scale * (b @ a), weight, factors), bias)


def gradients(out, wanted):
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return torch.autograd.grad((out * pull).sum(), wanted)


def assert_close(one, other, tolerance=1e-12):
    assert torch.allclose(one, other, rtol=tolerance, atol=tolerance), float((one - other).abs().max())


# ---------------------------------------------------------------- the mixed weight


@pytest.mark.parametrize("block", [ONE_BLOCK, TWO_ROWS, ONE_ROW])
@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 3, 10), (2, 1, 4, 10), (0, 10)])
def test_a_layer_is_the_mixed_weight_with_its_gradients(layer, elements, block, shape):
    elements(block)
    model = layer()
    mixout = attach_mixout(model, P, seed=0, form="element")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    _, _, a, b, _ = parts(model)
    for draw in (0, 1, (4, 2)):
        mixout.draw = draw
        out, wanted = model(x), dense(model, mixout, x)
        assert_close(out, wanted)
        for one, other in zip(gradients(out, [x, a, b]), gradients(wanted, [x, a, b]), strict=True):
            assert one.shape == other.shape
            assert_close(one, other)


def test_inputs_that_do_not_lie_row_by_row_are_mixed_too(layer, elements):
    elements(TWO_ROWS)
    model = layer()
    mixout = attach_mixout(model, P, seed=0, form="element")
    _, _, a, b, _ = parts(model)
    for x in (torch.randn(10, 5).T, torch.randn(10, 3, 4).permute(2, 1, 0), torch.randn(10).expand(3, 4, 10)):
        x = x.double().requires_grad_()
        out, wanted = model(x), dense(model, mixout, x)
        assert_close(out, wanted)
        for one, other in zip(gradients(out, [x, a, b]), gradients(wanted, [x, a, b]), strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("trained", ["A", "B", "x", "A x", "B x", "A B", "A B x"])
def test_only_what_is_trained_has_a_gradient(layer, elements, trained):
    elements(TWO_ROWS)
    model = layer()
    mixout = attach_mixout(model, P, seed=0, form="element")
    _, _, a, b, _ = parts(model)
    x = torch.randn(4, 10, dtype=torch.float64)
    every = {"A": a, "B": b, "x": x}
    for name, tensor in every.items():
        tensor.requires_grad_(name in trained)
    wanted = [every[name] for name in trained.split()]
    for one, other in zip(gradients(model(x), wanted), gradients(dense(model, mixout, x), wanted), strict=True):
        assert_close(one, other)
    model(x).sum().backward()
    assert [name for name, tensor in every.items() if tensor.grad is not None] == trained.split()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["column", "element"])
@pytest.mark.parametrize("block", [ONE_BLOCK, TWO_ROWS])
def test_gradients_are_those_of_finite_differences_at_fixed_masks(layer, elements, form, block):
    elements(block)
    model = layer()
    mixout = attach_mixout(model, 0.5, seed=0, form=form)
    a, b = (parts(model)[index] for index in (2, 3))
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)

    def run(x, a, b):
        tensors = {"0.lora_A.default.weight": a, "0.lora_B.default.weight": b}
        return torch.func.functional_call(model.base_model.model, tensors, (x,))

    for draw in (0, 1):
        mixout.draw = draw
        assert torch.autograd.gradcheck(run, (x, a, b))


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(1, 1, 1), (1, 9, 2), (9, 1, 2), (33, 17, 4), (17, 33, 20)])
def test_shapes_that_no_block_divides_are_mixed_as_a_whole(elements, d_in, d_out, rank):
    elements(50)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out)), LoraConfig(r=rank, target_modules=["0"]))
    model.base_model.model[0].lora_B["default"].weight.data.normal_()
    model.double().train()
    mixout = attach_mixout(model, 0.5, seed=3, form="element")
    x = torch.randn(6, d_in, dtype=torch.float64, requires_grad=True)
    _, _, a, b, _ = parts(model)
    out, wanted = model(x), dense(model, mixout, x)
    assert_close(out, wanted)
    for one, other in zip(gradients(out, [x, a, b]), gradients(wanted, [x, a, b]), strict=True):
        assert_close(one, other)


@pytest.mark.slow
def test_the_blocks_size_changes_no_mask_and_results_by_rounding_alone(make_policy, elements):
    def outcome(count):
        elements(count)
        model = make_policy()
        mixout = attach_mixout(model, 0.5, seed=0, form="element")
        kept = [mixout.mask_key(name, layer.parameters[0]).factors(0, (8, 64)) for name, layer in mixout.layers.items()]
        logits = model(input_ids=IDS).logits
        logits.log_softmax(-1).square().sum().backward()
        return kept, logits, [p.grad for p in model.parameters() if p.requires_grad]

    masks, logits, grads = outcome(ONE_BLOCK)
    for count in (1000, 1):
        other_masks, other_logits, other_grads = outcome(count)
        assert all(torch.equal(*pair) for pair in zip(masks, other_masks, strict=True))
        assert torch.allclose(other_logits, logits, rtol=1e-4, atol=1e-4)
        assert all((one - other).norm() <= 1e-4 * one.norm() for one, other in zip(grads, other_grads, strict=True))


def test_a_bfloat16_base_has_the_mixed_update_in_its_own_precision(elements):
    """The base weight is 0, so that the update is all there is: 1e-2 would find a forgotten factor."""
    elements(200)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(30, 20, bias=False)).bfloat16()
    base[0].weight.data.zero_()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).train()
    mixout = attach_mixout(model, P, seed=0, form="element")
    weight, _, a, b, scale = parts(model)
    b.data.normal_()
    assert a.dtype == torch.float32 and weight.dtype == torch.bfloat16
    x = torch.randn(3, 40, 30).bfloat16().requires_grad_()
    out = model(x)
    assert out.dtype == torch.bfloat16
    factors = plain_mixout.factors(0, 0, next(iter(mixout.layers)), (20, 30), P).float()
    exact = F.linear(x.float(), scale * (b @ a) * factors)
    assert (out.float() - exact).norm() < 5e-3 * exact.norm()
    pull = torch.randn_like(exact).bfloat16()
    found = torch.autograd.grad((out * pull).sum(), [x, a, b])
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(found, torch.autograd.grad((exact * pull.float()).sum(), [x, a, b]), strict=True):
        assert (one.float() - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize(("quantize", "dtype", "tolerance"), [("nf4", "float32", 1e-5), ("int8", "bfloat16", 5e-2)])
def test_a_quantized_base_is_mixed_as_well(make_policy, elements, quantize, dtype, tolerance):
    elements(1000)
    model = make_policy(quantize, dtype)
    mixout = attach_mixout(model, 0.5, seed=0, form="element")
    name = list(mixout.layers)[3]
    module = model.get_submodule(name.rpartition(".")[0])
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    x = torch.randn(5, a.shape[1]).to(getattr(torch, dtype))
    factors = plain_mixout.factors(0, 0, name, (len(b), a.shape[1]), 0.5).float()
    wanted = module.base_layer(x).detach().float() + F.linear(x.float(), 2 * (b @ a) * factors)
    found = module(x)
    assert (found.float() - wanted).norm() <= tolerance * wanted.norm()
    for one, other in zip(gradients(found, [a, b]), gradients(wanted, [a, b]), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    model(input_ids=IDS).logits.float().log_softmax(-1).square().sum().backward()
    mixout.check_reached()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_every_token_and_answer_of_a_forward_is_under_one_sampled_model(layer):
    model = layer()
    attach_mixout(model, 0.5, seed=0, form="element")
    row = torch.randn(10, dtype=torch.float64)
    with torch.no_grad():
        out = model(row.expand(4, 6, 10))
    assert torch.equal(out, out[0, 0].expand(4, 6, 7))


def test_a_frozen_adapter_beside_it_is_added_whole(layer):
    """Two active adapters, one of them not trained: only the trained one is mixed."""
    model = layer()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["0"]))
    module = model.base_model.model[0]
    module.lora_B["second"].weight.data.normal_(0, 0.05)
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.double().named_parameters():
        parameter.requires_grad_("lora_" in name and "default" in name)
    mixout = attach_mixout(model, P, seed=0, form="element")
    assert [name.rpartition(".")[2] for name in mixout.layers] == ["default"]
    x = torch.randn(4, 10, dtype=torch.float64)
    assert_close(model(x), dense(model, mixout, x) + F.linear(x, module.get_delta_weight("second")))


# ---------------------------------------------------------------- memory


def saved_sizes(run, *known):
    """Elements of every tensor that `run` keeps for its backward, but for those that exist anyway."""
    sizes, addresses = [], {tensor.untyped_storage().data_ptr() for tensor in known}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in addresses:
            sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        run().sum().backward()
    return sizes


@pytest.mark.parametrize("form", ["column", "element"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward(form):
    """Of 64 × 48: the mixed weight written out keeps as much as three times."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(48, 64)), LoraConfig(r=2, target_modules=["0"])).train()
    mixout = attach_mixout(model, P, seed=0, form=form)
    x = torch.randn(3, 48, requires_grad=True)
    weight, bias, a, b, _ = parts(model)
    known = (weight, bias, a, b, x)
    assert max(saved_sizes(lambda: model(x), *known)) <= 2 * 64
    if form == "element":
        assert max(saved_sizes(lambda: dense(model, mixout, x), *known)) == 64 * 48


# ---------------------------------------------------------------- moments over masks


@pytest.mark.slow
@pytest.mark.parametrize(("form", "p"), [("element", 0.1), ("element", 0.9), ("column", 0.5)])
def test_outputs_have_the_mean_of_plain_lora_and_the_published_covariance(layer, form, p):
    """Cov of outputs i and k: p/(1−p) · Σ_j x_j² ΔW_ij ΔW_kj where one variable drops the column; 0 for i ≠ k per element."""
    model = layer()
    mixout = attach_mixout(model, p, seed=3, form=form)
    weight, bias, a, b, scale = parts(model)
    x, draws = torch.randn(10, dtype=torch.float64), 3000
    outputs = torch.empty(draws, 7, dtype=torch.float64)
    with torch.no_grad():
        update = scale * (b @ a)
        for number in range(draws):
            mixout.draw = number
            outputs[number] = model(x)
        mean = F.linear(x, weight + update, bias)
        z = (outputs.mean(0) - mean) / (outputs.var(0) / draws).sqrt()
        assert z.abs().max() < 4.5
        products = (outputs - mean)[:, :, None] * (outputs - mean)[:, None, :]
        shared = p / (1 - p) * (update * x.square()) @ update.T
        alone = shared.diag().diag()
        error = (products.var(0) / draws).sqrt()
        own, other = (shared, alone) if form == "column" else (alone, shared)
        assert ((products.mean(0) - own) / error).abs().max() < 4.5
        assert ((products.mean(0) - other) / error).abs().max() > 15


# ---------------------------------------------------------------- the ends of p


@pytest.mark.parametrize("form", ["column", "element"])
def test_at_p_1_training_is_the_reference_to_the_bit_and_nothing_is_learned(make_policy, form):
    model = make_policy()
    mixout = attach_mixout(model, 1.0, seed=0, form=form)
    logits = model(input_ids=IDS).logits
    with as_reference(model):
        assert torch.equal(model(input_ids=IDS).logits, logits)
    logits.log_softmax(-1).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28 and not any(p.grad.any() for p in trained)
    assert (model.eval()(input_ids=IDS).logits - logits).abs().max() > 0.01
    mixout.p = 0.5
    assert not torch.equal(model.train()(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("form", ["column", "element"])
def test_p_set_to_0_is_plain_lora_and_set_again_mixes_as_before(make_policy, form):
    """As a warm-up begins; with columns the bits are those of plain LoRA, per element the order of sums is another."""
    model, plain = make_policy(), make_policy()
    mixout = attach_mixout(model, 0.5, seed=0, form=form)
    with torch.no_grad():
        mixed, wanted = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
        mixout.p = 0.0
        found = model(input_ids=IDS).logits
        assert torch.equal(found, wanted) if form == "column" else torch.allclose(found, wanted, atol=1e-5)
        mixout.p = 0.5
        assert torch.equal(model(input_ids=IDS).logits, mixed)
        assert not torch.allclose(mixed, wanted, atol=1e-2)


def test_eval_mode_is_plain_lora_to_the_bit(make_policy):
    model, plain = make_policy(), make_policy()
    attach_mixout(model, 0.5, seed=0, form="element")
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits)
        with as_reference(model.train()), plain.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


# ---------------------------------------------------------------- a reference that is an adapter


@pytest.mark.parametrize("form", ["column", "element"])
@pytest.mark.parametrize("block", [ONE_BLOCK, TWO_ROWS])
def test_with_an_adapter_as_reference_the_pull_is_toward_it(layer, elements, form, block):
    """W̃ = W0 + ΔW_ref + M ⊙ (ΔW − ΔW_ref)/(1−p), values and gradients; the frozen adapter has another rank and scale."""
    elements(block)
    model = layer()
    model.add_adapter("reference", LoraConfig(r=2, lora_alpha=7, target_modules=["0"]))
    module = model.base_model.model[0]
    module.lora_B["reference"].weight.data.normal_(0, 0.05)
    for name, parameter in model.double().named_parameters():
        parameter.requires_grad_("lora_" in name and "default" in name)
    mixout = attach_mixout(model, P, seed=0, form=form)
    (name,) = mixout.layers
    x = torch.randn(4, 6, 10, dtype=torch.float64, requires_grad=True)
    weight, bias, a, b, scale = parts(model)
    frozen = module.get_delta_weight("reference").detach()
    factors = plain_mixout.factors(0, 0, name, (7, 10) if form == "element" else (1, 10), P)
    out = model(x)
    wanted = F.linear(x, plain_mixout.mixed(weight + scale * (b @ a), weight + frozen, factors.expand(7, 10)), bias)
    assert_close(out, wanted)
    for one, other in zip(gradients(out, [x, a, b]), gradients(wanted, [x, a, b]), strict=True):
        assert_close(one, other)
    mixout.p = 1.0
    with as_reference(model):
        reference = model(x)
    assert_close(model(x), reference)


# ---------------------------------------------------------------- once for all rows of a step


def test_a_mask_is_drawn_once_for_all_rows_of_a_step_and_changes_no_bit(monkeypatch, elements):
    """Two rows, each forward and backward, of a layer that is made in two blocks: two draws instead of eight."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"])).train()
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    mixout, rows = attach_mixout(model, P, seed=1, form="element"), torch.randn(2, 5, 24)
    elements(24 * 20)
    draws = []
    monkeypatch.setattr(masks, "random_bits", lambda *args: draws.append(1) or random_bits(*args))

    def gradient():
        model.zero_grad()
        draws.clear()
        for row in rows:
            model(row).square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    first = gradient()
    assert len(draws) == 8
    with fixed_weights():
        assert torch.equal(gradient(), first)
        assert len(draws) == 2
        mixout.draw = 5
        second = gradient()
        assert len(draws) == 2
    assert not torch.equal(second, first)
    assert torch.equal(gradient(), second)
