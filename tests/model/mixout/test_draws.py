"""When a draw and p may be set: after a backward. Between a forward and its backward it is an error, with recomputation too."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from pe_dpo.errors import ModelError
from pe_dpo.model.mixout import attach_mixout

FORMS = ["column", "element"]
KINDS = ["kept", "recomputed", "recomputed, reentrant"]
WORDS = r"this backward belongs to draw 0 with p = 0\.5, and by now the draw is {} and p is {}; set `draw` and `p` only after"


@pytest.fixture
def model():
    """A linear layer, a LoRA layer, and a head and a norm that are trained whole."""

    def make(form, whole=True, **settings):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 5))
        modules = ["3", "4"] if whole else None
        peft = get_peft_model(base, LoraConfig(r=2, target_modules=["2"], modules_to_save=modules, **settings)).train()
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape)
        return peft, attach_mixout(peft, 0.5, seed=0, form=form)

    return make


def forward(model, x, kind):
    return model(x) if kind == "kept" else checkpoint(model, x, use_reentrant=kind.endswith("reentrant"))


def backward(model, out):
    model.zero_grad()
    out.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def inputs():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("name", "value", "now"), [("draw", (1, 2), (r"\(1, 2\)", r"0\.5")), ("p", 0.25, ("0", r"0\.25"))])
def test_a_draw_or_p_set_between_forward_and_backward_is_an_error(model, kind, form, whole, name, value, now):
    peft, mixout = model(form, whole)
    out = forward(peft, inputs(), kind)
    setattr(mixout, name, value)
    with pytest.raises(ModelError, match=WORDS.format(*now)):
        backward(peft, out)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("form", FORMS)
def test_also_with_a_forward_of_the_new_draw_in_between(model, kind, form):
    """Reentrant recomputation cannot tell which of two forwards it repeats; ours is the other one."""
    peft, mixout = model(form)
    out = forward(peft, inputs(), kind)
    mixout.draw = 1
    forward(peft, inputs(), kind)
    with pytest.raises(ModelError, match=WORDS.format("1", r"0\.5")):
        backward(peft, out)


@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("form", FORMS)
def test_also_where_only_a_or_b_is_trained(model, trained, kind, form):
    peft, mixout = model(form, whole=False)
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_(trained in name)
    out = forward(peft, inputs(), kind)
    mixout.draw = 1
    with pytest.raises(ModelError, match=WORDS.format("1", r"0\.5")):
        backward(peft, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_after_the_backward_draws_follow_each_other_and_repeat(model, kind, form):
    peft, mixout = model(form)
    found = []
    for draw in (0, 1, (1, 0), 0):
        mixout.draw = draw
        found.append(backward(peft, forward(peft, inputs(), kind)))
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[3], strict=True))
    for earlier, later in ((0, 1), (1, 2), (0, 2)):
        assert not all(torch.equal(one, other) for one, other in zip(found[earlier], found[later], strict=True))
    mixout.check_reached()


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("form", FORMS)
def test_recomputed_activations_have_the_same_bits_as_kept_ones(model, kind, form):
    peft, mixout = model(form)
    mixout.draw = 3
    wanted = backward(peft, forward(peft, inputs(), "kept"))
    assert all(torch.equal(*pair) for pair in zip(backward(peft, forward(peft, inputs(), kind)), wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_evaluation_the_reference_and_other_forwards_in_between_change_nothing(model, kind, form):
    peft, mixout = model(form)
    mixout.draw = 3
    wanted = backward(peft, forward(peft, inputs(), "kept"))
    out = forward(peft, inputs(), kind)
    other = torch.randn(3, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            peft.eval()(other)
            peft.train()(other)
            with peft.disable_adapter():
                peft(other)
    second = forward(peft, inputs(), kind)
    assert all(torch.equal(*pair) for pair in zip(backward(peft, out), wanted, strict=True))
    assert all(torch.equal(*pair) for pair in zip(backward(peft, second), wanted, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_two_forwards_of_one_draw_are_one_sampled_model(model, form):
    """Micro-batches: gradients of the parts add up to that of the whole, and of two draws they do not."""
    peft, mixout = model(form)
    peft.double()
    x = inputs().detach().double()
    mixout.draw = 2
    whole = backward(peft, peft(x))

    def in_parts(second_draw):
        peft.zero_grad()
        for part, draw in ((x[:1], 2), (x[1:], second_draw)):
            mixout.draw = draw
            peft(part).square().sum().backward()
        return [parameter.grad.clone() for parameter in peft.parameters() if parameter.requires_grad]

    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(in_parts(2), whole, strict=True))
    assert max(float((one - other).abs().max()) for one, other in zip(in_parts(3), whole, strict=True)) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_torchs_random_state_is_neither_read_nor_moved(model, form):
    peft, mixout = model(form)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        mixout.draw = seed
        mixout.draw = 0
        found.append(backward(peft, peft(inputs())))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_a_draw_may_be_set_under_any_gradient_mode(model, form, mode):
    peft, mixout = model(form)
    with mode():
        mixout.draw = 5
        mixout.p = 0.25
    found = backward(peft, peft(inputs()))
    other, its_mixout = model(form)
    its_mixout.draw, its_mixout.p = 5, 0.25
    assert all(torch.equal(*pair) for pair in zip(found, backward(other, other(inputs())), strict=True))
