"""The base: loaded once, quantized as asked, and never changed by what is done with it."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.architectures.models import ARCHITECTURES
from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import as_reference, attach_adapter
from pe_dpo.model.base import end_token_ids, evaluating, inspect_base, lacks_bfloat16, load_base, load_tokenizer, noise_of
from pe_dpo.model.fingerprint import base_fingerprint
from pe_dpo.model.quantization import check_weights_unpacked, four_bit_experts, four_bit_layers

TOKENS = torch.arange(1, 41).reshape(2, 20)


def packs_weights() -> bool:
    """Whether bitsandbytes would repack 4-bit weights on this CPU."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text()


def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture
def nf4(tiny_base):
    return load_base(inspect_base(str(tiny_base), quantize="nf4"))


def test_the_configuration_is_known_without_the_weights(tiny_base, tmp_path):
    for name in ("config.json",):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    facts = inspect_base(str(tmp_path))
    embeddings, attention, mlp, norms = 320 * 64 * 2, 2 * (64 * 64 * 2 + 64 * 32 * 2), 2 * 3 * 64 * 128, 5 * 64
    assert facts.parameters == embeddings + attention + mlp + norms
    assert (facts.context_length, facts.quantize) == (256, "none")


def test_a_large_base_is_quantized_unless_told_otherwise(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16).save_pretrained(tmp_path)
    assert inspect_base(str(tmp_path)).quantize == "nf4"
    assert inspect_base(str(tmp_path), quantize="none").quantize == "none"


def test_nf4_is_double_quantized_and_leaves_embeddings_and_head_alone(nf4):
    layers = dict(four_bit_layers(nf4))
    assert len(layers) == 14
    assert not any("head" in name or "embed" in name for name in layers)
    state = layers["model.layers.0.mlp.up_proj"].weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)


def test_int8_works_on_the_cpu_and_has_a_gradient_for_the_adapter(tiny_base):
    import bitsandbytes as bnb

    base = load_base(inspect_base(str(tiny_base), quantize="int8"))
    assert isinstance(base.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    plain = load_base(inspect_base(str(tiny_base)))
    assert (logits(base) - logits(plain)).abs().max() < 0.1 * logits(plain).std()
    model = attach_adapter(base, rank=4, alpha=8)
    logits(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_evaluation_generation_and_reference_leave_4_bit_weights_as_they_were(nf4, tiny_base, tmp_path):
    model = attach_adapter(nf4, rank=4, alpha=8)
    before = base_fingerprint(model)
    model.eval()
    with torch.no_grad():
        logits(model)
    with as_reference(model), torch.inference_mode():
        logits(model)
    model.generate(input_ids=TOKENS[:1], max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    check_weights_unpacked(model)
    assert base_fingerprint(model) == before


def test_gradients_after_an_evaluation_are_those_of_the_dequantized_base(nf4, tiny_base):
    """The same adapter on plain linear layers that hold the dequantized weights, as the independent truth."""
    from bitsandbytes.functional import dequantize_4bit

    truth = load_base(inspect_base(str(tiny_base)))
    for name, layer in four_bit_layers(nf4):
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        truth.get_submodule(name).weight.data.copy_(weight)
    gradients = []
    for base in (nf4, truth):
        model = attach_adapter(base, rank=4, alpha=8, seed=3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape)) * 0.1)
        model.eval()
        with torch.no_grad():
            logits(model)
        model.train()
        logits(model).log_softmax(-1)[..., 7].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@pytest.mark.skipif(not packs_weights(), reason="bitsandbytes repacks only on CPUs with avx512_bf16")
def test_weights_repacked_by_hand_are_noticed(nf4):
    name, layer = next(iter(four_bit_layers(nf4)))
    layer.support_avx512bf16_for_cpu = True
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(1, 64))
    with pytest.raises(ModelError, match=rf"{name}: its 4-bit weights were repacked.*load the base again"):
        check_weights_unpacked(nf4)


def test_widths_that_the_repacking_kernel_cannot_take_work_in_evaluation(tmp_path):
    """FFN 172 is no multiple of 32, which bitsandbytes' CPU kernel asserts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    model = load_base(inspect_base(str(tmp_path), quantize="nf4")).eval()
    with torch.no_grad():
        assert logits(model).isfinite().all()


def test_dropout_of_the_base_is_off_in_train_mode(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.5, attn_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_base(inspect_base(str(tmp_path)))
    assert model.training
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}
    assert torch.equal(logits(model), logits(model))


def test_the_fingerprint_sees_one_changed_weight_and_no_adapter(tiny_base, nf4):
    plain = load_base(inspect_base(str(tiny_base)))
    first = base_fingerprint(plain)
    assert base_fingerprint(attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=8)) == first
    assert base_fingerprint(nf4) != first
    plain.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1e-6
    assert base_fingerprint(plain) != first


def test_the_fingerprint_sees_a_changed_scale_of_a_4_bit_weight(nf4):
    first = base_fingerprint(nf4)
    _, layer = next(iter(four_bit_layers(nf4)))
    layer.weight.quant_state.state2.absmax += 1e-3
    assert base_fingerprint(nf4) != first


def test_ends_of_generation_are_read_from_the_generation_config(tiny_base, tmp_path):
    assert end_token_ids(str(tiny_base)) == [load_tokenizer(str(tiny_base)).eos_token_id]
    assert end_token_ids(str(tmp_path)) == []


def test_dropout_that_a_layer_applies_by_a_float_is_off_too(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    OPTForCausalLM(OPTConfig(vocab_size=64, dropout=0.5, **sizes)).save_pretrained(tmp_path)
    model = load_base(inspect_base(str(tmp_path)))
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_tensors_missing_from_the_files_are_not_made_up(tiny_base, tmp_path, quantize):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors of the model are missing .*\(model\.layers\.1\.mlp\.down_proj"):
        load_base(inspect_base(str(base), quantize=quantize))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder; model.base is a folder with config.json, or a hub id"),
        ({}, "no model found there"),
        ({"adapter_config.json": "{}"}, "is an adapter, not a base; name its base in model.base"),
        ({"config.json": "{"}, "no model found there"),
        ({"config.json": '{"model_type": "t5"}'}, "t5 is not a causal language model"),
        (
            {"config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'},
            r"comes as gptq codes, which cannot be trained on",
        ),
    ],
)
def test_what_is_no_base_is_refused_before_any_weights_are_read(tmp_path, files, message):
    folder = tmp_path / "base"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        inspect_base(str(folder))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("phimoe", {"input_jitter_noise": 0.1}),  # whose router draws experts besides, in train mode
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("minimax", {"router_jitter_noise": 0.1}),
    ],
)
def test_the_noise_of_routers_is_off_in_train_mode(name, settings, tmp_path):
    """With it π and π0 would differ before the first step."""
    import json

    ARCHITECTURES[name].save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_base(inspect_base(str(tmp_path)))
    first = logits(model.train())
    assert torch.equal(first, logits(model.train()))
    torch.testing.assert_close(first, logits(model.eval()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "left", "coded"),
    [("mamba", {"x_proj", "dt_proj", "out_proj"}, 2), ("falcon-h1", {"out_proj"}, 16), ("gemma3n", {"prediction_coefs"}, 31)],
)
def test_layers_whose_bare_weight_is_read_are_not_quantized(name, left, coded, tmp_path):
    """A kernel that takes codes for a matrix fails, as Mamba's own forward does; Gemma-3n clips its weight while it trains."""
    ARCHITECTURES[name].save(tmp_path)
    model = load_base(inspect_base(str(tmp_path), quantize="nf4"))
    layers = [path for path, _ in four_bit_layers(model)]
    assert len(layers) == coded
    assert not {path.rpartition(".")[2] for path in layers} & left
    assert logits(attach_adapter(model, rank=2, alpha=4).train()).isfinite().all()


@pytest.mark.parametrize("is_old", [False, True], ids=["of today", "from before"])
@pytest.mark.parametrize("name", ["bamba", "granite4", "qwen3.5", "qwen3-moe"])
def test_a_base_is_loaded_again_on_the_codes_of_a_run(name, is_old, tmp_path):
    """Before, codes were made of out_proj, and none of experts; Qwen3.5 calls a layer so that has them today, too."""
    ARCHITECTURES[name].save(tmp_path)
    facts = inspect_base(str(tmp_path), quantize="nf4")
    model = load_base(facts._replace(quantize_experts=False, quantize_bypassed=True) if is_old else facts)
    names = [path for path, _ in four_bit_layers(model)] + [path for path, *_ in four_bit_experts(model)]
    assert any("out_proj" in path for path in names) == (name == "qwen3.5" or (is_old and name != "qwen3-moe"))
    assert base_fingerprint(load_base(facts.as_recorded(names))) == base_fingerprint(model)


def test_a_package_that_a_base_needs_is_named(tmp_path):
    from importlib.util import find_spec

    if find_spec("timm"):
        pytest.skip("Gemma-3n's tower can be built here")
    ARCHITECTURES["gemma3n-e2b"].save(tmp_path)
    with pytest.raises(ModelError, match="needs a package that is not installed: TimmWrapperModel requires the timm library"):
        inspect_base(str(tmp_path))


def test_scores_are_capped_where_the_configuration_says_so(tmp_path):
    """transformers before 5.21 computes Gemma-2 by sdpa unless it is told otherwise, which knows no cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=0.01)
    capped = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    capped.model.layers[0].self_attn.q_proj.weight.data.mul_(100)  # without the cap its scores are large
    capped.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_base(inspect_base(str(tmp_path), quantize="none"))), logits(capped.eval()))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_weights_that_a_base_rescales_for_float16_stay_what_they_are(quantize, tmp_path):
    """RWKV divides them in place in eval mode, where 4-bit ones cannot be, and never the updates of an adapter."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=64, rescale_every=1)
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    model = attach_adapter(load_base(inspect_base(str(tmp_path), quantize=quantize)), rank=2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    before, trained = base_fingerprint(model), logits(model.train())
    torch.testing.assert_close(logits(model.eval()), trained, rtol=1e-5, atol=1e-5)
    assert base_fingerprint(model) == before


def test_a_gpu_that_emulates_bfloat16_computes_in_float32(tiny_base, monkeypatch):
    """As torch says of a T4: supported with emulation, which is slower than float32, and not without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_it, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, it=has_it: it or including_emulation
        )
        assert inspect_base(str(tiny_base), quantize="nf4").dtype == dtype
    assert inspect_base(str(tiny_base), dtype="float32").dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert lacks_bfloat16()
    assert inspect_base(str(tiny_base), dtype="bfloat16").dtype == torch.bfloat16, "as asked for"


@pytest.mark.parametrize(
    ("name", "settings", "noise"),
    [
        ("phimoe", {"router_jitter_noise": 0.01, "input_jitter_noise": 0.0}, {"router_jitter_noise": 0.01}),
        ("mixtral", {"router_jitter_noise": 0.1}, {"router_jitter_noise": 0.1}),
        ("llama", {}, {}),
    ],
)
def test_the_noise_of_a_configuration_is_named(name, settings, noise):
    config = ARCHITECTURES[name].config()
    config.update(settings)
    assert noise_of(config) == noise


def test_the_noise_of_dbrx_is_named_and_off():
    from transformers import DbrxConfig, DbrxForCausalLM

    from pe_dpo.model.base import _silence

    sizes = {"vocab_size": 64, "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}
    ffn = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1, "moe_jitter_eps": 0.2, "hidden_size": 32}
    config = DbrxConfig(**sizes, ffn_config=ffn, attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0})
    assert noise_of(config) == {"moe_jitter_eps": 0.2}
    model = DbrxForCausalLM(config).train()
    _silence(model)
    assert torch.equal(logits(model), logits(model))


def test_a_model_is_put_in_eval_mode_as_torch_does_it_but_for_who_has_a_way_of_its_own():
    class Stubborn(torch.nn.Linear):
        def train(self, mode=True):
            return self

    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.Sequential(Stubborn(2, 2), torch.nn.Dropout()), torch.nn.Linear(2, 2)
    )
    router = model[2].eval()
    router.train = lambda mode=True: router
    with evaluating(model):
        assert [part.training for part in model.modules()] == [False, False, False, True, False, False]
        assert not torch.is_grad_enabled()
    assert [part.training for part in model.modules()] == [True, True, True, True, True, False]
