"""Policy and reference on one base: the reference is what it is said to be, before and after training."""

import copy
import json
import shutil

import pytest
import torch

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import (
    POLICY,
    adapter_parameters,
    as_reference,
    attach_adapter,
    borrowed_base,
    load_adapter_for_evaluation,
    restore_adapter,
    save_adapter,
    start_from_adapter,
)
from pe_dpo.model.base import checkpoint_activations, inspect_base, load_base

TOKENS = torch.arange(1, 41).reshape(2, 20)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(params=["none", "nf4"])
def base(request, tiny_base):
    return load_base(inspect_base(str(tiny_base), quantize=request.param))


def stir(model, seed=0):
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture
def sft(tiny_base, tmp_path):
    """A finished adapter on disk."""
    model = attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=8)
    stir(model, seed=7)
    save_adapter(model, tmp_path / "sft")
    return tmp_path / "sft"


def test_a_fresh_adapter_is_the_reference_to_the_bit_with_dropout_on(base):
    before = logits(base)
    model = attach_adapter(base, rank=4, alpha=8, dropout=0.5)
    assert torch.equal(logits(model), before)


def test_after_training_the_reference_still_is_the_base_to_the_bit(base):
    before = logits(base)
    model = attach_adapter(base, rank=4, alpha=8)
    stir(model)
    assert not torch.equal(logits(model), before)
    with as_reference(model) as frozen:
        assert torch.equal(logits(frozen), before)


def test_the_policy_is_back_and_trainable_after_the_reference(base):
    model = attach_adapter(base, rank=4, alpha=8)
    stir(model)
    trained, policy = [p.data_ptr() for p in adapter_parameters(model)], logits(model)
    with pytest.raises(KeyError), as_reference(model):
        raise KeyError
    assert [p.data_ptr() for p in adapter_parameters(model)] == trained
    assert torch.equal(logits(model), policy)


def test_a_reference_pass_between_forward_and_backward_leaves_the_gradient_alone(base):
    model = attach_adapter(base, rank=4, alpha=8)
    stir(model)
    gradients = []
    for interrupt in (False, True):
        model.zero_grad()
        loss = model(input_ids=TOKENS, use_cache=False).logits.square().mean()
        if interrupt:
            with as_reference(model) as frozen:
                logits(frozen)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter_parameters(model)]))
    assert torch.equal(*gradients)


def test_lora_sits_on_every_linear_layer_but_the_head(base):
    model = attach_adapter(base, rank=4, alpha=8)
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapter_parameters(model)) == 2 * 7 * 2


def test_the_seed_decides_the_adapter_and_leaves_the_global_generator_alone(tiny_base):
    def first(seed):
        return adapter_parameters(attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=8, seed=seed))[0]

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    left, same, other = first(1), first(1), first(2)
    assert torch.rand(1) == expected
    assert torch.equal(left, same)
    assert not torch.equal(left, other)


def test_with_reference_adapter_a_frozen_copy_stays_what_the_adapter_was(base, sft):
    model = start_from_adapter(base, sft, reference="adapter")
    start = logits(model)
    with as_reference(model) as frozen:
        assert torch.equal(logits(frozen), start)
    stir(model)
    assert not torch.equal(logits(model), start)
    with as_reference(model) as frozen:
        assert torch.equal(logits(frozen), start)
    assert not any("reference" in name for name, p in model.named_parameters() if p.requires_grad)


def test_with_reference_base_the_raw_base_is_the_reference(base, sft):
    raw = logits(base)
    model = start_from_adapter(base, sft, reference="base")
    assert not torch.equal(logits(model), raw)
    with as_reference(model) as frozen:
        assert torch.equal(logits(frozen), raw)


def test_what_is_saved_loads_in_plain_peft_with_the_same_logits(base, tiny_base, tmp_path):
    from peft import PeftModel

    model = attach_adapter(base, rank=4, alpha=8)
    stir(model)
    save_adapter(model, tmp_path / "out")
    quantize = "nf4" if getattr(base, "is_loaded_in_4bit", False) else "none"
    fresh = load_base(inspect_base(str(tiny_base), quantize=quantize))
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "out")), logits(model))


@pytest.mark.slow
def test_a_frozen_copy_travels_with_the_adapter_and_is_the_reference_again(base, sft, tiny_base, tmp_path):
    model = start_from_adapter(base, sft, reference="adapter")
    stir(model)
    save_adapter(model, tmp_path / "out")
    quantize = "nf4" if getattr(base, "is_loaded_in_4bit", False) else "none"
    again = load_adapter_for_evaluation(load_base(inspect_base(str(tiny_base), quantize=quantize)), tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    with as_reference(again) as left, as_reference(model) as right:
        expected = logits(right)
        assert torch.equal(logits(left), expected)
    for name, parameter in model.named_parameters():  # the sealed one is restored, whatever lies in memory
        if ".reference." in name:
            parameter.data.add_(0.1)
    restore_adapter(model, tmp_path / "out")
    with as_reference(model) as right:
        assert torch.equal(logits(right), expected)


def test_restoring_a_checkpoint_is_exact_and_strict(tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    model = attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=8)
    stir(model)
    saved = logits(model)
    save_adapter(model, tmp_path)
    stir(model, seed=1)
    restore_adapter(model, tmp_path)
    assert torch.equal(logits(model), saved)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    dropped = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != dropped}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="differing tensors: base_model"):
        restore_adapter(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "lora_only"}, "bias=lora_only, which stays on when adapters are off"),
        ({"modules_to_save": ["lm_head"]}, r"trains whole modules \(lm_head\)"),
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"init_lora_weights": "pissa"}, "was initialised by pissa, which changed its base"),
        ({"peft_type": "IA3", "feedforward_modules": None}, "is a IA3 adapter; only LoRA"),
    ],
)
def test_an_adapter_whose_reference_would_not_be_the_base_is_refused(base, sft, tmp_path, change, message):
    other = shutil.copytree(sft, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    if "peft_type" in change:
        config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (other / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        start_from_adapter(base, other, reference="adapter")


def test_an_adapter_of_another_base_is_refused(sft, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="does not load onto this base"):
        start_from_adapter(load_base(inspect_base(str(tmp_path / "small"))), sft, reference="base")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # all that PEFT does about it
def test_an_adapter_with_missing_tensors_is_not_loaded_half(base, sft):
    from safetensors.torch import load_file, save_file

    weights = load_file(sft / "adapter_model.safetensors")
    save_file({name: w for name, w in weights.items() if "layers.1" not in name}, sft / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"14 tensors of the adapter are missing and 0 are left over"):
        start_from_adapter(base, sft, reference="base")


def test_targets_that_name_nothing_are_refused(base):
    with pytest.raises(ModelError, match=r"adapter\.targets: .* is called nowhere; there are down_proj, gate_proj"):
        attach_adapter(base, rank=4, alpha=8, targets=["nowhere"])


def test_attention_and_mlp_are_the_layers_in_blocks_of_that_name(base):
    for targets, names in (
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
    ):
        model = attach_adapter(copy.deepcopy(base), rank=4, alpha=8, targets=targets)
        assert set(model.peft_config["default"].target_modules) == names


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_a_name_in_both_blocks_is_told_apart_by_its_block():
    from transformers import GPT2Config, GPT2LMHeadModel

    def targeted(targets):
        base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
        return set(attach_adapter(base, rank=2, alpha=4, targets=targets).base_model.targeted_module_names)

    blocks = ("transformer.h.0.", "transformer.h.1.")
    assert targeted("attention") == {block + name for block in blocks for name in ("attn.c_attn", "attn.c_proj")}
    assert targeted("mlp") == {block + name for block in blocks for name in ("mlp.c_fc", "mlp.c_proj")}


def test_a_base_without_such_blocks_says_what_there_is():
    from torch import nn

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(4, 4)

        def get_output_embeddings(self):
            return None

    with pytest.raises(ModelError, match=r"adapter\.targets: mlp: no block of the base has a name with mlp or .*such as wide"):
        attach_adapter(Bare(), rank=2, alpha=4, targets="mlp")


def test_a_rank_stabilized_adapter_is_scaled_by_the_root_of_its_rank(base):
    model = attach_adapter(base, rank=16, alpha=8, targets=["q_proj"], rslora=True)
    (scale,) = {module.scaling[POLICY] for module in model.modules() if hasattr(module, "lora_A")}
    assert scale == 8 / 4


def test_a_folder_without_an_adapter_is_refused(base, tmp_path):
    with pytest.raises(ModelError, match=r"no adapter_config\.json there"):
        start_from_adapter(base, tmp_path, reference="base")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft's own, of its own pattern
def test_experts_that_are_no_modules_are_named_since_they_do_not_merge(base):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
    config = Qwen3MoeConfig(vocab_size=64, **shape)
    experts = attach_adapter(Qwen3MoeForCausalLM(config), rank=2, alpha=4, targets=["gate_proj", "up_proj", "down_proj"])
    assert "gate_up_proj" in parameter_targets(experts)
    named = attach_adapter(Qwen3MoeForCausalLM(config), rank=2, alpha=4, targets=["q_proj"])
    assert parameter_targets(named) == []
    assert parameter_targets(attach_adapter(base, rank=2, alpha=4)) == []


def parameter_targets(model):
    """The bare parameters that the trained adapter is on."""
    return sorted(model.peft_config[POLICY].target_parameters or ())


def facts_of(model):
    """All of a model that a run could leave changed: modules, hooks, what is trained, attention, flags of every module."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    hooks = {name: [len(module._forward_hooks), len(module._forward_pre_hooks)] for name, module in model.named_modules()}
    flags = {
        name: [module.training, getattr(module, "gradient_checkpointing", False)] for name, module in model.named_modules()
    }
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad or parameter.grad is not None]
    return (
        kinds,
        hooks,
        flags,
        trained,
        model.config.to_dict(),
        model.config._attn_implementation,
        hasattr(model, "peft_config"),
    )


def test_a_lent_base_comes_back_as_it_was(base):
    """Recomputed activations leave a hook behind that would make every later run differentiate down to the embeddings."""
    before, facts = logits(base), facts_of(base)
    for _ in range(2):
        with borrowed_base(base), pytest.raises(ZeroDivisionError):
            model = attach_adapter(base, rank=4, alpha=8, dropout=0.5)
            stir(model)
            checkpoint_activations(model)
            base.set_attn_implementation("eager")
            model(input_ids=TOKENS).logits.sum().backward()
            raise ZeroDivisionError
        assert facts_of(base) == facts
        assert torch.equal(logits(base), before)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft's own, of its own pattern
def test_a_lent_base_of_experts_comes_back_as_it_was():
    """PEFT wraps experts once for each of their parameters, one wrapper in the other."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    base = MixtralForCausalLM(config).requires_grad_(False).train()
    before, facts = logits(base), facts_of(base)
    for _ in range(2):
        with borrowed_base(base):
            experts = attach_adapter(base, rank=2, alpha=4, targets=["q_proj", "w1", "w2", "w3", "gate"])
            assert len(parameter_targets(experts)) > 1
        assert facts_of(base) == facts
        assert torch.equal(logits(base.train()), before)


def test_a_saved_adapter_has_no_readme_of_pefts(tiny_base, tmp_path):
    """PEFT compiles a template for it at each checkpoint; a run has a card of its own. All else is what PEFT writes itself."""
    model = attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=8)
    stir(model)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(str(tmp_path / "pefts"), save_embedding_layers=False)
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in (tmp_path / "pefts").iterdir()} == names | {"README.md"}
    assert {file.name for file in (tmp_path / "ours").iterdir()} == names
    assert all((tmp_path / "ours" / name).read_bytes() == (tmp_path / "pefts" / name).read_bytes() for name in names)
