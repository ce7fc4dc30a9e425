"""A policy scaled toward the reference, W0 + (1−a)·ΔW0 + a·ΔW, and back to the bit."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import (
    POLICY,
    REFERENCE,
    as_reference,
    attach_adapter,
    load_adapter_for_evaluation,
    save_adapter,
    scaled,
    start_from_adapter,
)
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.model.lora import compute_in_base_dtype
from pe_dpo.model.mixout import attach_mixout

TOKENS = torch.arange(1, 41).reshape(2, 20)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Toy(nn.Module):
    """Logits of seven tokens from five inputs, in one layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 7, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture(params=[False, True], ids=["one adapter", "frozen reference"])
def toy(request):
    """The toy with a stirred policy, and with a frozen reference adapter of another rank."""
    torch.manual_seed(0)
    model = get_peft_model(Toy(), LoraConfig(r=2, lora_alpha=6, target_modules=["layer"]), adapter_name=POLICY)
    if request.param:
        model.add_adapter(REFERENCE, LoraConfig(r=3, lora_alpha=2, target_modules=["layer"], use_rslora=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    compute_in_base_dtype(model)
    return model.eval()


def updates(model):
    """s·B·A of both adapters, by hand: alpha/r, and alpha/√r for rank-stabilised LoRA."""
    layer = model.base_model.model.layer
    sizes = {POLICY: 6 / 2, REFERENCE: 2 / 3**0.5}
    found = {name: sizes[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in layer.lora_A}
    return found[POLICY], found.get(REFERENCE, torch.zeros(7, 5, dtype=torch.float64))


@pytest.mark.parametrize("scale", SCALES)
def test_the_logits_are_those_of_the_mixed_weight(toy, scale):
    x = torch.randn(11, 5, dtype=torch.float64)
    policy, reference = updates(toy)
    weight = toy.base_model.model.layer.base_layer.weight + (1 - scale) * reference + scale * policy
    with scaled(toy, scale), torch.no_grad():
        found = toy(x)
    torch.testing.assert_close(found, x @ weight.T + toy.base_model.model.layer.base_layer.bias, rtol=1e-13, atol=1e-13)


def test_kl_from_the_reference_falls_with_the_scale(toy):
    """d KL(π_a ‖ π0)/da = a·Var_{π_a}(δ) for logits l0 + a·δ, so it falls for every x, down to 0."""
    x = torch.randn(11, 5, dtype=torch.float64)

    def log_probs():
        with torch.no_grad():
            return toy(x).log_softmax(-1)

    with as_reference(toy):
        reference = log_probs()
    kls = []
    for scale in SCALES:
        with scaled(toy, scale):
            policy = log_probs()
        kls.append((policy.exp() * (policy - reference)).sum(-1))
    assert kls[0].abs().max() < 1e-13
    assert all((more > less).all() for less, more in itertools.pairwise(kls))


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def stir(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{POLICY}" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05


@pytest.fixture(params=["none", "nf4"])
def quantize(request):
    return request.param


@pytest.fixture(params=["base", "adapter"])
def policy(request, quantize, tiny_base, tmp_path):
    """A policy in training whose reference is the base, or a frozen adapter."""
    facts = inspect_base(str(tiny_base), quantize=quantize)
    model = attach_adapter(load_base(facts), rank=4, alpha=8)
    stir(model)
    if request.param == "adapter":
        save_adapter(model, tmp_path / "sft")
        model = start_from_adapter(load_base(facts), tmp_path / "sft", reference="adapter")
        stir(model, seed=1)
    return model


def state(model):
    """All that a block could leave changed."""
    return (
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [(name, module.training) for name, module in model.named_modules()],
        [dict(module.scaling) for module in model.modules() if hasattr(module, "lora_A")],
        [module.active_adapters for module in model.modules() if hasattr(module, "lora_A")],
        model.active_adapters,
    )


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_after_the_block_all_is_as_before_to_the_bit_also_after_an_exception(policy, training):
    policy.train(training)
    before, facts = logits(policy), state(policy)
    with scaled(policy, 0.5):
        assert not torch.equal(logits(policy), before)
        assert (state(policy)[0], state(policy)[1]) == (facts[0], facts[1])
    assert (torch.equal(logits(policy), before), state(policy)) == (True, facts)
    with pytest.raises(KeyError), scaled(policy, 0.3), as_reference(policy):
        raise KeyError
    assert (torch.equal(logits(policy), before), state(policy)) == (True, facts)


@pytest.mark.slow
def test_an_adapter_that_is_evaluated_stays_frozen(policy, tiny_base, quantize, tmp_path):
    save_adapter(policy, tmp_path / "done")
    model = load_adapter_for_evaluation(load_base(inspect_base(str(tiny_base), quantize=quantize)), tmp_path / "done")
    before, facts = logits(model), state(model)
    with scaled(model, 0.5) as half:
        found = logits(half)
    with scaled(policy, 0.5):
        assert torch.equal(logits(policy), found)
    assert (torch.equal(logits(model), before), state(model)) == (True, facts)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_whole_scale_touches_nothing(policy):
    before = logits(policy)
    with scaled(policy, 1):
        assert torch.equal(logits(policy), before)


def test_the_reference_is_itself_within_the_block_and_the_policy_scaled_again_after_it(policy):
    with as_reference(policy):
        reference = logits(policy)
    with scaled(policy, 0.5):
        half = logits(policy)
        with as_reference(policy):
            assert torch.equal(logits(policy), reference)
        assert torch.equal(logits(policy), half)
    with scaled(policy, 0):
        torch.testing.assert_close(logits(policy), reference, rtol=0, atol=1e-5)


def test_it_is_the_policy_whose_b_was_scaled(policy):
    """An independent way to the same weights: a·(s·B·A) = s·(a·B)·A; at a = ½ the reference's share is the same."""
    other = copy.deepcopy(policy)
    if REFERENCE in policy.peft_config:
        other.base_model.set_adapter([REFERENCE, POLICY], inference_mode=True)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    with scaled(policy, 0.5):
        assert torch.equal(logits(policy), logits(other))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft's own, of its own pattern
def test_bare_parameters_are_scaled_too():
    """Experts and routers, which PEFT wraps once for each of their parameters, one wrapper in the other."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    base, targets = MixtralForCausalLM(config).requires_grad_(False), ["q_proj", "w1", "w2", "w3", "gate"]
    model = attach_adapter(base, rank=2, alpha=4, targets=targets).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5 if "experts" in name else 0.0)
    before, other = logits(model), copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    with scaled(model, 0.5):
        torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-6)
        assert (logits(model) - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)


def test_mixout_draws_the_same_masks_after_the_block(tiny_base):
    model = attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=8)
    stir(model)
    mixout = attach_mixout(model, 0.5, seed=3)
    mixout.draw = 2
    before = logits(model.train())
    with scaled(model, 0.5):
        half = logits(model.eval())
    model.train()
    assert mixout.draw == 2
    assert torch.equal(logits(model), before)
    assert not torch.equal(half, before)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan")])
def test_what_lies_beyond_both_ends_is_refused(policy, scale):
    with pytest.raises(ModelError, match=r"scale is .*: it must lie between 0, which is the reference"), scaled(policy, scale):
        pass
