"""Mixout under torch.compile: one graph without breaks, whose masks are inputs, so that no draw compiles anything anew."""

import shutil

import pytest
import torch
import warm_process
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pe_dpo.model.fixed import fixed_weights
from pe_dpo.model.mixout import attach_mixout

pytestmark = [
    pytest.mark.slow,
    # torch 2.13's own tracer of autograd functions
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

FORMS = ["column", "element"]
IDS = torch.arange(10).view(2, 5)
DRAWS = (0, 1, (2, 3), 7)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11)

    def forward(self, ids):
        return self.head(self.norm(self.second(self.first(self.embed(ids)).tanh())))


def make(form, whole, p=0.5, targets=("first", "second")):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list(targets), modules_to_save=whole or None)
    model = get_peft_model(Model(), config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model, attach_mixout(model, p, seed=0, form=form)


def outcome(run, model):
    model.zero_grad()
    logits = run(IDS)
    logits.log_softmax(-1).square().sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad)]


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        assert torch.allclose(left, right, rtol=1e-6, atol=1e-6)


def test_within_a_step_a_compiled_graph_draws_its_own_masks_where_others_are_kept():
    """What the eager model keeps for a step is known by the address of its key, which no graph can ask for."""
    model, _ = make("element", [])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with fixed_weights():
        assert_same(outcome(compiled, model), outcome(model, model))


@pytest.mark.parametrize("form", FORMS)
def test_draws_and_p_are_inputs_of_one_compiled_graph_that_counts_its_layers_as_reached(form):
    model, mixout = make(form, ["embed", "norm", "head"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)  # a break of the graph is an error
    assert not any(layer.is_reached for layer in mixout.layers.values())
    outcome(compiled, model)
    assert all(layer.is_reached for layer in mixout.layers.values())
    mixout.check_reached()
    found = []
    for draw in DRAWS:
        mixout.draw = draw
        found.append(outcome(compiled, model))
        assert_same(found[-1], outcome(model, model))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same(outcome(compiled, model), found[-1])
    assert not torch.allclose(found[0][0], found[1][0], atol=1e-2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in (0.9, 0.1, 0.0, 1.0):
            mixout.p = p
            assert_same(outcome(compiled, model), outcome(model, model))
    with model.disable_adapter():
        reference = model(IDS)
    assert torch.equal(outcome(compiled, model)[0], reference)  # p is 1
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_draw_set_before_a_compiled_backward_is_an_error(form):
    """Torch's own words: the graph's saved inputs were written over."""
    model, mixout = make(form, ["head"])
    logits = torch.compile(model, backend="aot_eager", fullgraph=True)(IDS)
    mixout.draw = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_evaluation_is_compiled_plain_and_training_stays_mixed_after_it():
    model, mixout = make("element", ["head"], targets=["first"])
    compiled = torch.compile(model, backend="eager")  # without gradients plain LoRA breaks the graph, at mark_dirty
    mixed = outcome(compiled, model)
    plain, _ = make("element", ["head"], p=0.0, targets=["first"])
    with torch.no_grad():
        assert torch.allclose(compiled.eval()(IDS), plain.eval()(IDS), atol=1e-6)
        with mixout.sampled(0):
            assert torch.allclose(compiled(IDS), mixed[0], atol=1e-6)
    compiled.train()
    assert_same(outcome(compiled, model), mixed)


def test_a_language_model_with_a_compiled_layer_has_the_logits_of_the_eager_one(make_policy):
    """What is around its layers is transformers' alone, and takes four times as long to compile."""
    model = make_policy(targets=["q_proj", "v_proj", "down_proj"])
    mixout = attach_mixout(model, 0.5, seed=0, form="element")
    ids = torch.arange(3, 43).view(2, 20)

    def logits():
        found = []
        for draw in (0, 5):
            mixout.draw = draw
            found.append(model(input_ids=ids, use_cache=False).logits)
        return found

    with torch.no_grad():
        expected = logits()
        model.get_base_model().model.layers[0].compile(backend="eager")
        found = logits()
    assert torch.allclose(torch.stack(found), torch.stack(expected), atol=1e-5)
    assert not torch.allclose(*found, atol=1e-2)


GENERATED = """
import torch
from pe_dpo.model.mixout.masks import MaskKey

def mask(key, threshold, factor):
    return MaskKey(key, threshold, factor).factors(3, (103, 10))

numbers = torch.tensor(123456789012345), torch.tensor(2**52), torch.tensor(2.0)
compiled = torch.compile(mask, fullgraph=True)
for _ in range(50):
    found, others = compiled(*numbers), [torch.zeros(50) for _ in range(20)]
    assert torch.equal(found, mask(*numbers))
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_masks_in_generated_code_have_the_same_bits(tmp_path):
    """1,030 elements are no multiple of a vector. In a process of its own: generated code once wrote past its result's end."""
    process = warm_process.start(GENERATED, folder=tmp_path, environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"})
    process.join(timeout=300)
    assert process.exitcode == 0, warm_process.log(process, tmp_path).read_text()[-2000:]
