"""Mixout of a weight toward its pretrained value, as a function and as a layer for anyone's own loop."""

import copy

import plain_mixout
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import pe_dpo
from pe_dpo.errors import ModelError
from pe_dpo.model.mixout import MixLinear, mixout, weights

FORMS = ["column", "element"]


def pair(*shape, dtype=torch.float64, seed=0):
    """A weight and what it was, near each other."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight = target + 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return weight.to(dtype).requires_grad_(), target.to(dtype).requires_grad_()


def written_out(weight, target, p, form, seed, draw, name):
    shape = weight.shape if form == "element" else weight.shape[-1:]
    return plain_mixout.mixed(weight, target, plain_mixout.factors(seed, draw, name, shape, p).expand(weight.shape))


# ---------------------------------------------------------------- the function


def test_the_package_offers_both():
    assert pe_dpo.mixout is mixout and pe_dpo.MixLinear is MixLinear


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (1, 1), (7, 3)])
@pytest.mark.parametrize("block", [2**20, 20, 1])
def test_the_weight_is_mixed_as_written_out_with_its_gradients(monkeypatch, form, shape, block):
    monkeypatch.setitem(weights._BLOCK, "cpu", block)
    weight, target = pair(*shape)
    pull = torch.randn(shape, dtype=torch.float64)
    for draw in (0, 3, (1, 2)):
        found = mixout(weight, target, 0.3, form=form, seed=9, draw=draw, name="w")
        wanted = written_out(weight, target, 0.3, form, 9, draw, "w")
        assert torch.allclose(found, wanted, rtol=0, atol=1e-15)
        each = [torch.autograd.grad((out * pull).sum(), [weight, target]) for out in (found, wanted)]
        for one, other in zip(*each, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", ["weight", "target", "both"])
def test_gradients_are_those_of_finite_differences_at_a_fixed_mask(monkeypatch, form, trained):
    monkeypatch.setitem(weights._BLOCK, "cpu", 12)
    for shape in ((6,), (5, 6)):
        weight, target = pair(*shape)
        weight.requires_grad_(trained != "target")
        target.requires_grad_(trained != "weight")
        assert torch.autograd.gradcheck(lambda w, t: mixout(w, t, 0.5, form=form, seed=1), (weight, target))


class PublishedMixout(torch.autograd.Function):
    """As the code published with the paper computes it: what its forward divides by 1−p, its backward does not."""

    @staticmethod
    def forward(ctx, weight, target, p, kept):
        ctx.save_for_backward(kept)
        return ((1 - kept) * target + kept * weight - p * target) / (1 - p)

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        return gradient * kept, None, None, None


@pytest.mark.parametrize("form", FORMS)
def test_the_published_codes_gradient_is_1_minus_p_of_the_true_one_and_ours_is_true(form):
    """By central differences; both forwards are equal. At p = ½ the published gradient is 1 where it must be 2."""
    weight, target = pair(5, 6)
    target = target.detach()
    kept = (plain_mixout.factors(2, 0, "", (5, 6) if form == "element" else (6,), 0.5) != 0).double().expand(5, 6)

    def published(w):
        return PublishedMixout.apply(w, target, 0.5, kept)

    def ours(w):
        return mixout(w, target, 0.5, form=form, seed=2)

    assert torch.allclose(published(weight), ours(weight), rtol=0, atol=1e-15)
    step = 1e-4
    differences = torch.zeros(5, 6, dtype=torch.float64)
    with torch.no_grad():
        for index in range(30):
            shift = torch.zeros(30, dtype=torch.float64)
            shift[index] = step
            shift = shift.view(5, 6)
            differences.view(-1)[index] = (ours(weight + shift) - ours(weight - shift)).sum() / (2 * step)
    (true,) = torch.autograd.grad(ours(weight).sum(), weight)
    (wrong,) = torch.autograd.grad(published(weight).sum(), weight)
    assert torch.equal(true, 2 * kept) and 0 < kept.sum() < 30
    assert torch.allclose(differences, true, rtol=0, atol=1e-9)
    assert torch.equal(wrong, true / 2)
    assert torch.autograd.gradcheck(ours, weight)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(published, weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_the_pretrained_weight_itself_stays_what_it_is_to_the_bit(form, dtype, p):
    """The published form rounds there: (M w0 + (1−M) w0 − p w0)/(1−p)."""
    _, target = pair(40, 30, dtype=dtype)
    with torch.no_grad():
        for draw in range(3):
            assert torch.equal(mixout(target.clone(), target, p, form=form, seed=0, draw=draw), target)
        kept = torch.rand(40, 30) >= 0.3
        published = (torch.where(kept, target, target) - 0.3 * target) / (1 - 0.3)
        assert not torch.equal(published.to(dtype), target)


@pytest.mark.parametrize("form", FORMS)
def test_p_0_is_the_weight_p_1_the_target_and_evaluation_the_weight(form):
    weight, target = pair(5, 6)
    state = torch.get_rng_state()
    assert mixout(weight, target, 0.0, form=form) is weight
    assert mixout(weight, target, 0.5, form=form, training=False) is weight
    assert torch.equal(torch.get_rng_state(), state)
    mixed = mixout(weight, target, 1.0, form=form)
    assert torch.equal(mixed, target)
    of_weight, of_target = torch.autograd.grad(mixed.sum(), [weight, target])
    assert not of_weight.any() and bool((of_target == 1).all())


def test_a_column_is_dropped_as_a_whole_and_elements_each_for_itself():
    weight, target = pair(40, 50)
    kept = mixout(weight, target, 0.5, seed=0) != target
    assert torch.equal(kept, kept[:1].expand(40, 50)) and 10 < kept[0].sum() < 40
    kept = mixout(weight, target, 0.5, form="element", seed=0) != target
    assert kept.any(0).all() and kept.any(1).all() and 850 < kept.sum() < 1150


def test_each_entry_of_a_bias_is_a_unit_in_both_forms():
    weight, target = pair(200)
    column, element = (mixout(weight, target, 0.5, form=form, seed=0) for form in FORMS)
    assert torch.equal(column, element)
    assert 60 < int((column == target).sum()) < 140


def test_the_mask_is_a_function_of_seed_draw_and_name():
    weight, target = pair(6, 64)

    def kept(**words):
        return (mixout(weight, target, 0.5, **words) != target)[0]

    state = torch.get_rng_state()
    first = kept(seed=0, draw=0, name="a")
    others = [kept(seed=1), kept(seed=0, draw=1), kept(seed=0, name="b"), kept(seed=0, draw=(0, 1)), kept(seed=0)]
    assert torch.equal(kept(seed=0, draw=0, name="a"), first)
    assert len(torch.stack([first, *others]).unique(dim=0)) == 6
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_seed_torchs_cpu_generator_decides(form):
    weight, target = pair(6, 64)

    def draw():
        return mixout(weight, target, 0.5, form=form)

    torch.manual_seed(3)
    first, second = draw(), draw()
    after = torch.get_rng_state()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(4)
    assert not torch.equal(draw(), first)
    torch.manual_seed(3)
    with torch.device("meta"):  # a default device of the caller's
        assert torch.equal(draw(), first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_without_a_seed_recomputed_activations_have_the_same_mask(form, use_reentrant):
    weight, target = pair(6, 64)
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)

    def run(x):
        return F.linear(x, mixout(weight, target.detach(), 0.5, form=form)).tanh()

    torch.manual_seed(3)
    wanted = torch.autograd.grad(run(x).sum(), [x, weight])
    torch.manual_seed(3)
    checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, wanted[0]) and torch.equal(weight.grad, wanted[1])


@pytest.mark.parametrize(
    ("one", "other"), [((3, 4), (4, 3)), ((3,), (4,)), ((2, 3, 4), (2, 3, 4)), ((), ()), ((3, 4), (4,)), ((1, 4), (3, 4))]
)
@pytest.mark.parametrize("training", [True, False])
def test_weights_of_other_shapes_are_refused(one, other, training):
    with pytest.raises(ValueError, match=r"weight is \(.*\) and target \(.*\); both are \(d_out, d_in\), or both \(d,\)"):
        mixout(torch.zeros(one), torch.zeros(other), 0.5, training=training)


def test_an_impossible_p_or_form_is_refused():
    weight, target = pair(3, 4)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ModelError, match="from 0 to 1"):
            mixout(weight, target, p)
        with pytest.raises(ModelError, match="from 0 to 1"):
            MixLinear(nn.Linear(2, 3), p)
    with pytest.raises(ModelError, match="form is 'elment': it is column or element"):
        mixout(weight, target, 0.5, form="elment")
    with pytest.raises(ModelError, match="form is 'row'"):
        MixLinear(nn.Linear(2, 3), 0.5, form="row")


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_weights_size_is_kept_for_the_backward(form):
    weight, target = pair(64, 48)
    sizes = []

    def note(tensor):
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        mixout(weight, target, 0.5, form=form, seed=0).sum().backward()
        assert max(sizes) <= 48
        written_out(weight, target, 0.5, form, 0, 0, "").sum().backward()
        assert max(sizes) == 64 * 48


def test_a_transposed_weight_is_mixed_as_any_other():
    weight, target = pair(30, 20)
    for form in FORMS:
        found = mixout(weight.T, target.T, 0.5, form=form, seed=0)
        assert torch.equal(found, mixout(weight.T.contiguous(), target.T.contiguous(), 0.5, form=form, seed=0))
        (gradient,) = torch.autograd.grad((found * torch.arange(30)).sum(), weight)
        assert torch.equal(gradient != 0, ((found != target.T) & (torch.arange(30) != 0)).T)


# ---------------------------------------------------------------- moments over masks


@pytest.mark.slow
@pytest.mark.parametrize(("form", "p"), [("column", 0.2), ("element", 0.8)])
def test_outputs_have_the_mean_of_the_weight_and_the_published_variance(form, p):
    """Var of output i: p/(1−p) · Σ_j x_j² (W − W0)_ij²; entries of a bias: p/(1−p) · (b − b0)_i²; gradients have the mean 1."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 6).double()
    layer = MixLinear(linear, p, form=form, seed=4)
    x, draws = torch.randn(9, dtype=torch.float64), 2500
    with torch.no_grad():
        layer.weight += 0.3 * torch.randn(6, 9, dtype=torch.float64)
        layer.bias += 0.3 * torch.randn(6, dtype=torch.float64)
    outputs, slopes = torch.empty(draws, 6, dtype=torch.float64), torch.empty(draws, 6, dtype=torch.float64)
    for number in range(draws):
        layer.draw = number
        out = layer(x)
        outputs[number] = out.detach()
        (slopes[number],) = torch.autograd.grad(out.sum(), layer.bias)
    with torch.no_grad():
        mean = F.linear(x, layer.weight, layer.bias)
        z = (outputs.mean(0) - mean) / (outputs.var(0) / draws).sqrt()
        assert z.abs().max() < 4.5
        squares = (outputs - mean).square()
        change = (layer.weight - layer.target).square() @ x.square() + (layer.bias - layer.target_bias).square()
        z = (squares.mean(0) - p / (1 - p) * change) / (squares.var(0) / draws).sqrt()
        assert z.abs().max() < 4.5
        z = (slopes.mean(0) - 1) / (slopes.var(0) / draws).sqrt()
        assert z.abs().max() < 4.5
        products = (outputs - mean)[:, :, None] * (outputs - mean)[:, None, :]
        z = (products.mean(0) / (products.var(0) / draws).sqrt()).fill_diagonal_(0)
        assert (z.abs().max() < 4.5) == (form == "element")


# ---------------------------------------------------------------- the layer


def trained_layer(form="column", p=0.5, dtype=torch.float64, bias=True, **words):
    torch.manual_seed(0)
    layer = MixLinear(nn.Linear(9, 6, bias=bias).to(dtype), p, form=form, **words)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_mixes_its_weight_and_bias_as_written_out(form, bias):
    layer = trained_layer(form, bias=bias, seed=3, name="out")
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    for draw in (0, 1, (2, 3)):
        layer.draw = draw
        weight = written_out(layer.weight, layer.target, 0.5, form, 3, draw, "out.weight")
        shift = written_out(layer.bias, layer.target_bias, 0.5, form, 3, draw, "out.bias") if bias else None
        wanted = F.linear(x, weight, shift)
        found = layer(x)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-14)
        each = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (found, wanted)]
        for one, other in zip(*each, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_layers_gradients_are_those_of_finite_differences(form):
    layer = trained_layer(form)
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


def test_a_layer_in_eval_mode_and_at_p_0_is_a_plain_one():
    layer = trained_layer()
    x = torch.randn(4, 9, dtype=torch.float64)
    plain = F.linear(x, layer.weight, layer.bias)
    assert not torch.allclose(layer(x), plain)
    assert torch.equal(layer.eval()(x), plain)
    layer.train().p = 0.0
    assert torch.equal(layer(x), plain)
    layer.p = 1.0
    assert torch.equal(layer(x), F.linear(x, layer.target, layer.target_bias))


def test_a_layers_state_is_that_of_a_linear_layer_and_loads_both_ways():
    layer, x = trained_layer(), torch.randn(4, 9, dtype=torch.float64)
    assert list(layer.state_dict()) == ["weight", "bias"]
    plain = nn.Linear(9, 6).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain(x), layer.eval()(x))
    other = trained_layer()
    target = other.target.clone()
    other.load_state_dict(nn.Linear(9, 6).double().state_dict())
    assert torch.equal(other.target, target) and not torch.equal(other.eval()(x), layer(x))
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.train()(x), layer.train()(x))


def test_a_new_layer_is_the_pretrained_one_to_the_bit_and_shares_its_parameters():
    linear = nn.Linear(9, 6)
    layer, x = MixLinear(linear, 0.7), torch.randn(4, 9)
    assert layer.training and torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    with torch.no_grad():
        layer.weight.add_(1)
    assert not torch.equal(layer.target, linear.weight)


def test_the_pretrained_values_follow_to_another_dtype():
    layer, x = trained_layer(), torch.randn(4, 9, dtype=torch.float64)
    wide = layer(x)
    layer.bfloat16()
    assert {tensor.dtype for tensor in (layer.weight, layer.bias, layer.target, layer.target_bias)} == {torch.bfloat16}
    narrow = layer(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow.double() - wide).norm() < 0.02 * wide.norm()


def test_a_copy_is_a_layer_of_its_own():
    layer, x = trained_layer(), torch.randn(4, 9, dtype=torch.float64)
    other = copy.deepcopy(layer)
    first = layer(x)
    assert torch.equal(other(x), first)
    other.draw = 1
    with torch.no_grad():
        other.target.zero_()
        other.bias.zero_()
    assert torch.equal(layer(x), first) and not torch.equal(other(x), first)


@pytest.mark.parametrize("form", FORMS)
def test_draws_seeds_and_names_change_the_mask_and_repeat_it(form):
    x = torch.randn(4, 9, dtype=torch.float64)
    found = []
    for words in ({}, {"seed": 1}, {"name": "b"}):
        layer = trained_layer(form, **words)
        for draw in (0, 1, (0, 1)):
            layer.draw = draw
            found.append(layer(x))
            assert torch.equal(layer(x), found[-1])
    assert len(torch.stack(found).unique(dim=0)) == 9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_activations_have_the_same_bits(form, use_reentrant):
    layers = nn.Sequential(trained_layer(form), nn.Tanh(), MixLinear(nn.Linear(6, 9).double(), 0.5, form=form, name="b"))
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(layers(x).square().sum(), [x, *layers.parameters()])
    checkpoint(layers, x, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip([x, *layers.parameters()], wanted, strict=True):
        assert torch.equal(tensor.grad, gradient)
