"""The reference by the layers' own flags: PEFT's numbers for every kind of adapter, without a walk over the model."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pe_dpo.model.adapter import POLICY, REFERENCE, acting, as_reference, scaled
from pe_dpo.model.lora import compute_in_base_dtype

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Toy(nn.Module):
    """Two linear layers, of which only one has an adapter, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.norm, self.wide = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.wide(self.norm(self.narrow(x)))
        return result


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["narrow"]},
    "DoRA": {"target_modules": ["narrow"], "use_dora": True},
    "with a norm trained whole": {"target_modules": ["narrow"], "modules_to_save": ["norm"]},
    "on a bare parameter": {"target_modules": [], "target_parameters": ["wide.weight"]},
}


def adapted(*configs: str) -> Any:
    """A PEFT model with an adapter of each configuration, all stirred, the last ones after the policy's."""
    torch.manual_seed(0)
    names = [POLICY, REFERENCE, "third"]
    model: Any = None
    for name, config in zip(names, configs, strict=False):
        lora = LoraConfig(r=2, lora_alpha=3, **CONFIGS[config])
        if model is None:
            model = get_peft_model(Toy(), lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.5)
    compute_in_base_dtype(model)
    return model.eval()


def state(model: Any) -> list[Any]:
    """All that a block could leave changed."""
    flags = ("_disable_adapters", "_active_adapter", "scaling", "merged_adapters")
    layers = [{flag: copy.copy(vars(module)[flag]) for flag in flags if flag in vars(module)} for module in model.modules()]
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return [layers, required, model.active_adapters, model._adapters_disabled, model.base_model.active_adapter]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_reference_is_what_peft_makes_of_disabled_adapters(config):
    model, plain = adapted(config), adapted(config)
    before, trained = state(model), model(X)
    with as_reference(model) as frozen, torch.no_grad(), plain.disable_adapter():
        found, expected = frozen(X), plain(X)
    assert torch.equal(found, expected)
    assert not torch.equal(found, trained)
    assert torch.equal(model(X), trained)
    assert state(model) == before


@pytest.mark.parametrize("config", ["plain", "DoRA"])
def test_merged_weights_are_taken_apart_for_the_reference_as_peft_does(config):
    model, plain = adapted(config), adapted(config)
    trained = model(X)
    model.merge_adapter()
    plain.merge_adapter()
    with as_reference(model) as frozen, torch.no_grad(), plain.disable_adapter():
        torch.testing.assert_close(frozen(X), plain(X), rtol=0, atol=0)
    torch.testing.assert_close(model(X), trained, rtol=0, atol=1e-5)


def test_a_frozen_adapter_is_the_reference_as_peft_sets_it():
    model, plain = adapted("plain", "plain", "plain"), adapted("plain", "plain", "plain")
    before = state(model)
    plain.base_model.set_adapter([REFERENCE], inference_mode=True)
    with as_reference(model) as frozen:
        assert torch.equal(frozen(X), plain(X))
    assert state(model) == before


def test_both_adapters_act_with_their_shares_as_peft_scales_them():
    model, plain = adapted("plain", "plain"), adapted("plain", "plain")
    before = state(model)
    plain.base_model.set_adapter([REFERENCE, POLICY], inference_mode=True)
    plain.base_model.model.narrow.set_scale(REFERENCE, 0.75)
    plain.base_model.model.narrow.set_scale(POLICY, 0.25)
    with scaled(model, 0.25), torch.no_grad():
        assert torch.equal(model(X), plain(X))
        inside = state(model)
        with as_reference(model):
            pass
        assert state(model) == inside
    assert state(model) == before


def test_modules_trained_whole_go_peft_s_way():
    """A norm of its own for each adapter: the reference has the frozen one's."""
    whole = "with a norm trained whole"
    model, plain = adapted(whole, whole), adapted(whole, whole)
    before = state(model)
    plain.base_model.set_adapter([REFERENCE], inference_mode=True)
    with as_reference(model) as frozen:
        assert torch.equal(frozen(X), plain(X))
    assert state(model) == before


def test_merged_weights_are_taken_apart_before_another_adapter_acts():
    model, plain = adapted("plain", "plain"), adapted("plain", "plain")
    plain.base_model.set_adapter([REFERENCE], inference_mode=True)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"), acting(model, {REFERENCE: 1.0}):
        torch.testing.assert_close(model(X), plain(X), rtol=0, atol=1e-5)


def test_blocks_lie_in_one_another_and_end_with_an_exception():
    model = adapted("plain")
    before = state(model)
    with pytest.raises(KeyError), as_reference(model), as_reference(model):
        raise KeyError
    assert state(model) == before
    with as_reference(model):
        inside = state(model)
        with as_reference(model):
            pass
        assert state(model) == inside


def test_the_model_is_walked_over_once_and_again_when_it_gets_an_adapter(monkeypatch):
    """Of 32 layers each walk takes 8 ms, and PEFT needs five of them in each row of a step."""
    model, walks = adapted("plain"), [0]
    modules = nn.Module.modules

    def counted(self: nn.Module, *args: Any) -> Any:
        walks[0] += self is model
        return modules(self, *args)

    monkeypatch.setattr(nn.Module, "modules", counted)
    found = []
    for _ in range(3):
        with as_reference(model) as frozen:
            found.append(frozen(X))
    assert walks == [1]
    model.add_adapter("third", LoraConfig(r=2, target_modules=["wide"]))
    model.base_model.model.wide.lora_B["third"].weight.data.normal_()
    model.set_adapter("third")
    walks[0] = 0
    with as_reference(model) as frozen:
        assert torch.equal(frozen(X), found[0])
    assert walks == [1]
