"""Mixout of modules that are trained whole beside LoRA, toward their pretrained copies: embedding, norm, linear head."""

import warnings

import plain_mixout
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import as_reference
from pe_dpo.model.mixout import attach_mixout, weights

FORMS = ["column", "element"]
P = 0.3
WHOLE = ["embed", "norm", "head"]
IDS = torch.tensor([[0, 3, 3, 7, 10], [1, 2, 0, 9, 5]])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(11, 8), nn.Linear(8, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11)

    def forward(self, ids):
        return self.head(self.norm(self.linear(self.embed(ids)).tanh()))


def make(whole=WHOLE, dtype=torch.float64, **settings):
    """A PEFT model with LoRA on `linear` and other modules trained whole, all of it changed as after some training."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["linear"], modules_to_save=whole or None, **settings)
    model = get_peft_model(Model(), config).to(dtype).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def written_out(model, mixout, draw=0):
    """The logits by mixed weights as matrices: tokens of the embedding are its units, columns those of linear layers."""
    model = model.base_model.model
    per_element = mixout.form == "element"

    def factors(name, shape):
        return plain_mixout.factors(mixout.seed, draw, f"base_model.model.{name}", shape, mixout.p)

    def mixed(module, key, shape):
        wrapper = getattr(model, module)
        new, old = (getattr(part, key) for part in (wrapper.modules_to_save["default"], wrapper.original_module))
        shape = new.shape if per_element else shape
        return plain_mixout.mixed(new, old, factors(f"{module}.default.{key}", shape).expand(new.shape))

    lora = model.linear
    update = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    base = lora.base_layer
    weight = plain_mixout.mixed(
        base.weight + update, base.weight, factors("linear.default", (6, 8) if per_element else (1, 8)).expand(6, 8)
    )
    hidden = F.linear(F.embedding(IDS, mixed("embed", "weight", (11, 1))), weight, base.bias).tanh()
    hidden = F.layer_norm(hidden, (6,), mixed("norm", "weight", (6,)), mixed("norm", "bias", (6,)))
    return F.linear(hidden, mixed("head", "weight", (1, 6)), mixed("head", "bias", (11,)))


def gradients(out, parameters):
    pull = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    return torch.autograd.grad((out.log_softmax(-1) * pull).sum(), list(parameters))


# ---------------------------------------------------------------- the mixed weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [2**20, 20])
def test_modules_are_mixed_as_written_out_with_their_gradients(monkeypatch, form, block):
    monkeypatch.setitem(weights._BLOCK, "cpu", block)
    model = make()
    mixout = attach_mixout(model, P, seed=0, form=form)
    for draw in (0, 1, (2, 3)):
        mixout.draw = draw
        found, wanted = model(IDS), written_out(model, mixout, draw)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
        both = [gradients(out, trained(model).values()) for out in (found, wanted)]
        for name, one, other in zip(trained(model), *both, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-11), name
    mixout.check_reached()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [[name] for name in WHOLE])
def test_gradients_are_those_of_finite_differences_at_a_fixed_mask(form, whole):
    model = make(whole)
    attach_mixout(model, 0.5, seed=0, form=form)
    parameters = trained(model)

    def run(*values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (IDS,))

    assert torch.autograd.gradcheck(run, tuple(parameters.values()))  # J·u and v·J for random u, v


def test_the_units_of_each_kind_of_parameter():
    """Column: tokens, the head's inputs, every entry of gains and biases. Element: matrices have no units of their own."""
    wanted = {
        "linear.default": 8,
        "embed.default.weight": 11,
        "norm.default.weight": 6,
        "norm.default.bias": 6,
        "head.default.weight": 6,
        "head.default.bias": 11,
    }
    column, element = (attach_mixout(make(), P, seed=0, form=form).layers for form in FORMS)
    assert {name.removeprefix("base_model.model."): layer.units for name, layer in column.items()} == wanted
    matrices = ("linear.default", "embed.default.weight", "head.default.weight")
    found = {name.removeprefix("base_model.model."): layer.units for name, layer in element.items()}
    assert found == wanted | dict.fromkeys(matrices)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_outputs_have_the_mean_and_variance_of_a_weight_under_mixout(form):
    """The head alone: output i has the variance p/(1−p) · (Σ_j x_j² (W − W0)_ij² + (b − b0)_i²)."""
    model = make(["head"])
    mixout, draws = attach_mixout(model, 0.5, seed=0, form=form), 2000
    wrapper = model.base_model.model.head
    x = torch.randn(6, dtype=torch.float64)
    outputs = torch.empty(draws, 11, dtype=torch.float64)
    with torch.no_grad():
        for draw in range(draws):
            mixout.draw = draw
            outputs[draw] = wrapper(x)
        new, old = wrapper.modules_to_save["default"], wrapper.original_module
        z = (outputs.mean(0) - F.linear(x, new.weight, new.bias)) / (outputs.var(0) / draws).sqrt()
        assert z.abs().max() < 4.5
        squares = (outputs - F.linear(x, new.weight, new.bias)).square()
        wanted = (new.weight - old.weight).square() @ x.square() + (new.bias - old.bias).square()
        z = (squares.mean(0) - wanted) / (squares.var(0) / draws).sqrt()
        assert z.abs().max() < 4.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_that_have_not_moved_yet_are_the_reference_to_the_bit(form, dtype):
    torch.manual_seed(0)
    model = get_peft_model(Model().to(dtype), LoraConfig(r=2, target_modules=["linear"], modules_to_save=WHOLE)).train()
    mixout = attach_mixout(model, P, seed=0, form=form)
    for draw in range(3):
        mixout.draw = draw
        with torch.no_grad(), model.disable_adapter():
            reference = model(IDS)
        assert torch.equal(model(IDS), reference)


# ---------------------------------------------------------------- on and off


@pytest.mark.parametrize("form", FORMS)
def test_at_p_1_training_is_the_reference_to_the_bit_and_nothing_is_learned(form):
    model = make(dtype=torch.float32)
    attach_mixout(model, 1.0, seed=0, form=form)
    logits = model(IDS)
    with as_reference(model):
        assert torch.equal(model(IDS), logits)
    assert not any(gradient.any() for gradient in gradients(logits, trained(model).values()))
    assert (model.eval()(IDS) - logits).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_the_reference_and_p_0_are_those_without_mixout(form):
    plain, model = make(), make()
    mixout = attach_mixout(model, P, seed=0, form=form)
    with torch.no_grad():
        training = model(IDS)
        assert (training - plain(IDS)).abs().max() > 0.1
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(IDS), plain(IDS))
        assert torch.equal(model.eval()(IDS), plain.eval()(IDS))
        mixout.p = 0.0
        assert torch.allclose(model.train()(IDS), plain(IDS), rtol=0, atol=1e-14)
        mixout.p = P
        assert torch.equal(model(IDS), training)


def test_a_merged_model_is_mixed_no_more_in_training_mode_either():
    plain, model = make(), make()
    attach_mixout(model, P, seed=0)
    merged, wanted = (one.merge_and_unload().train() for one in (model, plain))
    assert torch.equal(merged(IDS), wanted(IDS))


def test_another_adapters_modules_are_not_mixed():
    model = make()
    attach_mixout(model, P, seed=0)
    mixed = model(IDS)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    other = make()
    with torch.no_grad(), other.disable_adapter():
        assert torch.allclose(model(IDS), other(IDS))  # B = 0, and modules as they were
    model.set_adapter("default")
    assert torch.equal(model(IDS), mixed)


def test_attached_with_p_0_modules_are_left_as_they_are():
    plain, model = make(), make()
    assert not attach_mixout(model, 0.0, seed=0).layers
    assert torch.equal(model(IDS), plain(IDS))
    for one, other in zip(
        gradients(model(IDS), trained(model).values()), gradients(plain(IDS), trained(plain).values()), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_in_eval_mode_a_sampled_model_can_be_asked_for(form):
    model = make()
    mixout = attach_mixout(model, P, seed=0, form=form)
    mixout.draw = 7
    with torch.no_grad():
        wanted = model(IDS)
        mixout.draw = 0
        plain = model.eval()(IDS)
        with mixout.sampled(7):
            assert torch.equal(model(IDS), wanted)
        assert torch.equal(model(IDS), plain)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_what_is_saved_without_mixout_and_loads_in_plain_peft(form, tmp_path):
    plain, model = make(), make()
    mixout = attach_mixout(model, P, seed=0, form=form)
    gradients(model(IDS), trained(model).values())
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "mixed")
    files = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "mixed").iterdir())
    for name in files:
        assert (tmp_path / "mixed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Model().double(), tmp_path / "mixed").eval()  # warnings are errors in these tests
    with torch.no_grad():
        assert torch.allclose(loaded(IDS), model.eval()(IDS), rtol=0, atol=1e-6)  # float32 A and B beside float64
    assert mixout.draw == 0


def test_a_step_of_sgd_moves_what_is_kept_and_nothing_else():
    model = make()
    attach_mixout(model, 0.5, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    name = "base_model.model.head.modules_to_save.default.weight"
    moved = (trained(model)[name] != before[name]).any(0)
    assert torch.equal(moved, plain_mixout.factors(0, 0, "base_model.model.head.default.weight", (6,), 0.5) != 0)
    assert 0 < moved.sum() < 6


# ---------------------------------------------------------------- a reference that is an adapter


@pytest.mark.parametrize("form", FORMS)
def test_with_an_adapter_as_reference_modules_are_pulled_toward_its_own(form):
    model = make()
    model.add_adapter("reference", LoraConfig(r=2, target_modules=["linear"], modules_to_save=WHOLE))
    for name, parameter in model.double().named_parameters():
        if "reference" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
        parameter.requires_grad_("default" in name)
    mixout = attach_mixout(model, 1.0, seed=0, form=form)
    assert len(mixout.layers) == 6
    with torch.no_grad():
        policy = model(IDS)
        model.base_model.set_adapter("reference")
        reference = model.eval()(IDS)
        model.base_model.disable_adapter_layers()
        base = model(IDS)
    assert torch.allclose(policy, reference, rtol=0, atol=1e-12)
    assert (base - reference).abs().max() > 0.1


# ---------------------------------------------------------------- refusals


def with_more(module):
    """A PEFT model with one more module that is trained whole."""

    class WithMore(Model):
        def __init__(self):
            super().__init__()
            self.more = module

        def forward(self, ids):
            return self.head(self.more(self.norm(self.linear(self.embed(ids)).tanh())))

    return get_peft_model(WithMore(), LoraConfig(r=2, target_modules=["linear"], modules_to_save=["more"])).train()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Conv1d(6, 6, 1), r"its weight is \(6, 6, 1\)"),
        (nn.MultiheadAttention(6, 2), r"its in_proj_weight is \(18, 6\)"),
        (nn.GRU(6, 6), r"its weight_ih_l0 is \(18, 6\)"),
        (nn.Sequential(nn.Linear(6, 6), nn.Conv1d(6, 6, 1)), r"its 1\.weight is \(6, 6, 1\)"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_linear_layer_embedding_gain_or_bias_is_refused(module, words, form):
    with pytest.raises(ModelError, match=rf"model\.more\.default cannot be mixed: {words}.*Leave it out of modules_to_save"):
        attach_mixout(with_more(module), P, seed=0, form=form)


@pytest.mark.parametrize("form", FORMS)
def test_a_block_of_modules_is_mixed_part_by_part(form):
    torch.manual_seed(0)
    model = with_more(nn.Sequential(nn.Linear(6, 6), nn.PReLU(), nn.LayerNorm(6)))
    wrapper = model.base_model.model.more
    for parameter in wrapper.modules_to_save["default"].parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    mixout = attach_mixout(model, P, seed=0, form=form)
    new, old = (dict(part.named_parameters()) for part in (wrapper.modules_to_save["default"], wrapper.original_module))
    assert [key for key in new if f"base_model.model.more.default.{key}" in mixout.layers] == list(new)
    mixed = {}
    for key, value in new.items():
        shape = value.shape if form == "element" else value.shape[-1:]
        factors = plain_mixout.factors(0, 0, f"base_model.model.more.default.{key}", shape, P)
        mixed[key] = plain_mixout.mixed(value, old[key], factors.expand(value.shape))
    x = torch.randn(3, 6)
    hidden = F.prelu(F.linear(x, mixed["0.weight"], mixed["0.bias"]), mixed["1.weight"])
    wanted = F.layer_norm(hidden, (6,), mixed["2.weight"], mixed["2.bias"])
    assert torch.allclose(wrapper(x), wanted, atol=1e-6)


def tied_model(**settings):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **settings)).train()


@pytest.mark.parametrize("form", FORMS)
def test_an_embedding_that_is_tied_to_the_head_is_refused(form):
    """One weight would be mixed with two masks in one draw: by tokens as an embedding, by hidden units as a head."""
    model = tied_model(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    words = r"lm_head\.default\.weight cannot be mixed: it is tied to .*embed_tokens\.default\.weight"
    with pytest.raises(ModelError, match=words):
        attach_mixout(model, P, seed=0, form=form)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_modules_that_is_trained_alone_is_mixed_toward_what_it_was(module):
    model = tied_model(modules_to_save=[module])
    mixout = attach_mixout(model, 1.0, seed=0)
    wrapper = model.get_submodule(f"base_model.model.{'model.' if module == 'embed_tokens' else ''}{module}")
    wrapper.modules_to_save["default"].weight.data.add_(1)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        with as_reference(model):
            assert torch.equal(model(input_ids=IDS).logits, logits)
        mixout.p = 0.5
        assert not torch.equal(model(input_ids=IDS).logits, logits)


def test_a_head_that_is_computed_from_its_weight_alone_is_found():
    """A fused loss reads `head.weight` past the module; no forward hook sees that."""
    model = make(["head"])
    mixout = attach_mixout(model, P, seed=0)
    head = model.base_model.model.head
    F.linear(torch.randn(3, 6, dtype=torch.float64), head.weight).sum().backward()
    with pytest.raises(ModelError, match=r"1 layers were trained without mixout \(base_model\.model\.head\.default\.weight"):
        mixout.check_reached()
    model.zero_grad()
    model(IDS).square().sum().backward()
    mixout.check_reached()
