"""The strength that a p of mixout has, where it is known: log-probs that are linear in the update."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pe_dpo.inference.mixout_noise import measure_noise
from pe_dpo.inference.scorer import Scorer
from pe_dpo.model.mixout import attach_mixout
from pe_dpo.objective import PairLogprobs

INPUTS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class LinearScorer(Scorer):
    """Log-prob of a pair's chosen answer: one linear layer's output for the pair's input; of the rejected one: 0."""

    def __init__(self):
        super().__init__("padded", torch.device("cpu"))

    def split(self, pairs):
        return [range(3), range(3, len(pairs))]

    def logprobs(self, model, pairs):
        chosen = model(torch.stack([pair.input for pair in pairs])).squeeze(1)
        lengths = torch.full((len(pairs),), 4)
        return PairLogprobs(chosen, torch.zeros_like(chosen), lengths, torch.ones_like(lengths))


@pytest.fixture
def model():
    torch.manual_seed(1)
    layer = get_peft_model(nn.Sequential(nn.Linear(12, 1)), LoraConfig(r=2, target_modules=["0"])).double()
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return layer.train()


def pairs_and_reference(model):
    pairs, scorer = [SimpleNamespace(input=row) for row in INPUTS], LinearScorer()
    with torch.no_grad(), model.disable_adapter():
        parts = [scorer.logprobs(model, [pairs[index] for index in part]) for part in scorer.split(pairs)]
    return pairs, PairLogprobs(*map(torch.cat, zip(*parts, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize(("p", "form"), [(0.2, "column"), (0.9, "column"), (0.5, "element")])
def test_the_ratio_is_that_of_the_variance_formula(model, p, form):
    """Var[z] = p/(1−p)·Σ_j (x_j ΔW_j)²; with one output unit columns and single weights are the same."""
    module = model.base_model.model[0]
    moved = INPUTS * module.get_delta_weight("default").detach()
    noise, shift = (p / (1 - p) * moved.square().sum(1).mean()).sqrt(), moved.sum(1).square().mean().sqrt()
    pairs, reference = pairs_and_reference(model)
    mixout = attach_mixout(model, p, seed=0, form=form)
    mixout.draw = 7
    found = measure_noise(model, mixout, pairs, LinearScorer(), reference, reduce="sum", masks=1000)
    assert (found.pairs, found.masks) == (5, 1000)
    assert found.shift == pytest.approx(float(shift))
    assert found.noise == pytest.approx(float(noise), rel=0.05)
    assert found.margin_noise == pytest.approx(float(noise / shift), rel=0.05)
    assert f"{found.margin_noise:.2f} of what training moved it" in found.words()
    assert (mixout.draw, mixout.is_sampling, model.training) == (7, False, True)
    per_token = measure_noise(model, mixout, pairs, LinearScorer(), reference, reduce="mean", masks=8)
    assert per_token.shift == pytest.approx(float(shift) / 4)


def test_an_adapter_that_learned_nothing_has_no_ratio(model):
    nn.init.zeros_(model.base_model.model[0].lora_B["default"].weight)
    pairs, reference = pairs_and_reference(model)
    mixout = attach_mixout(model, 0.5, seed=0)
    found = measure_noise(model, mixout, pairs, LinearScorer(), reference, reduce="sum")
    assert (found.margin_noise, found.noise, found.shift) == (None, 0.0, 0.0)
    assert "nothing was learned" in found.words()
