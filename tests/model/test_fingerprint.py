"""Fingerprints: another weight, another quantization, another frozen adapter is another hash; nothing else is."""

import hashlib
import os
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pe_dpo.inference.reference import remembered_fingerprint
from pe_dpo.inference.reference_store import ReferenceStore
from pe_dpo.model import fingerprint
from pe_dpo.model.adapter import REFERENCE, adapter_parameters, as_reference, attach_adapter, save_adapter, start_from_adapter
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.model.fingerprint import base_fingerprint, reference_fingerprint, tensor_fingerprints
from pe_dpo.model.quantization import four_bit_layers

TOKENS = torch.arange(1, 41).reshape(2, 20)
QUANTIZATIONS = ["none", "nf4", "int8"]


def base_identity(facts):
    return fingerprint.base_identity(facts, "cpu")


def load(folder, quantize="none"):
    return load_base(inspect_base(str(folder), quantize=quantize))


def flip_a_bit(tensor):
    flat = tensor.data.reshape(-1).view(torch.uint8)
    flat[flat.numel() // 2] ^= 1


def stir(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.sin(torch.arange(parameter.numel())).reshape(parameter.shape) * 0.1)


@pytest.fixture
def tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **shape))


@pytest.fixture
def sft(tiny_base, tmp_path):
    """A finished adapter on disk."""
    model = attach_adapter(load(tiny_base), rank=4, alpha=8)
    stir(adapter_parameters(model))
    save_adapter(model, tmp_path / "sft")
    return tmp_path / "sft"


@pytest.fixture
def frozen(tiny_base, sft):
    """A model whose reference is the base with a frozen adapter."""
    return start_from_adapter(load(tiny_base), sft, reference="adapter")


@pytest.fixture
def own_base(tiny_base, tmp_path):
    """A copy of the tiny base that a test may change."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def test_a_tensor_counts_with_shape_dtype_and_bytes():
    module = nn.Linear(3, 2, bias=False)
    module.weight.data = torch.tensor([[0.0, -1.5, 2.0], [3.0, 0.25, 5.0]])
    written = b"(2, 3) torch.float32\n" + struct.pack("<6f", 0.0, -1.5, 2.0, 3.0, 0.25, 5.0)
    digest = hashlib.sha256(written).hexdigest()
    assert tensor_fingerprints(module) == {"weight": digest}
    assert base_fingerprint(module) == hashlib.sha256(f"weight {digest}\n".encode()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64])
def test_every_dtype_is_hashed_as_it_lies_in_memory(dtype):
    module = nn.Module()
    tensor = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    module.register_buffer("buffer", tensor)
    written = f"(2, 2) {dtype}\n".encode() + bytes(tensor.view(torch.uint8).flatten().tolist())
    assert tensor_fingerprints(module) == {"buffer": hashlib.sha256(written).hexdigest()}


def test_parts_views_scalars_and_empty_tensors_are_hashed_as_wholes(monkeypatch):
    module = nn.Module()
    values = torch.arange(12.0).reshape(3, 4)
    for name, tensor in {"view": values.T, "scalar": torch.tensor(7.0), "empty": torch.empty(0, 3)}.items():
        module.register_buffer(name, tensor)
    monkeypatch.setattr(fingerprint, "_PART_BYTES", 5)
    by_column = [float(4 * row + column) for column in range(4) for row in range(3)]
    assert tensor_fingerprints(module) == {
        "view": hashlib.sha256(b"(4, 3) torch.float32\n" + struct.pack("<12f", *by_column)).hexdigest(),
        "scalar": hashlib.sha256(b"() torch.float32\n" + struct.pack("<f", 7.0)).hexdigest(),
        "empty": hashlib.sha256(b"(0, 3) torch.float32\n").hexdigest(),
    }


def test_persistent_buffers_count_and_others_do_not():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("derived", torch.ones(2), persistent=False)
    assert list(tensor_fingerprints(module)) == ["kept"]


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_one_flipped_bit_of_one_weight_changes_its_tensor_and_the_whole(tiny_base, quantize):
    model = load(tiny_base, quantize)
    whole, tensors = base_fingerprint(model), tensor_fingerprints(model)
    flip_a_bit(model.model.layers[1].mlp.up_proj.weight)
    after = tensor_fingerprints(model)
    assert [name for name in tensors if tensors[name] != after[name]] == ["model.layers.1.mlp.up_proj.weight"]
    assert base_fingerprint(model) != whole


def test_each_scale_of_a_4_bit_weight_counts(tiny_base):
    model = load(tiny_base, "nf4")
    state = dict(four_bit_layers(model))["model.layers.0.mlp.up_proj"].weight.quant_state
    seen = {base_fingerprint(model)}
    for tensor in (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset):
        flip_a_bit(tensor)
        seen.add(base_fingerprint(model))
    state.blocksize *= 2
    assert len(seen | {base_fingerprint(model)}) == 7


def test_the_scales_of_an_8_bit_weight_count(tiny_base):
    model = load(tiny_base, "int8")
    first = base_fingerprint(model)
    flip_a_bit(model.model.layers[0].mlp.up_proj.weight.SCB)
    assert base_fingerprint(model) != first


def test_another_quantization_is_another_hash(tiny_base):
    assert len({base_fingerprint(load(tiny_base, quantize)) for quantize in QUANTIZATIONS}) == 3


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_two_loads_of_one_base_have_one_hash(tiny_base, quantize):
    assert base_fingerprint(load(tiny_base, quantize)) == base_fingerprint(load(tiny_base, quantize))


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_an_adapter_around_the_base_and_its_training_change_no_hash(tiny_base, quantize):
    base = load(tiny_base, quantize)
    whole, tensors = base_fingerprint(base), tensor_fingerprints(base)
    model = attach_adapter(base, rank=4, alpha=8)
    assert tensor_fingerprints(model) == tensors
    stir(adapter_parameters(model))
    assert (base_fingerprint(model), reference_fingerprint(model)) == (whole, whole)


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_a_forward_changes_no_hash(tiny_base, quantize):
    """The first forward of an int8 layer moves its scales to another place."""
    model = attach_adapter(load(tiny_base, quantize), rank=4, alpha=8)
    first = tensor_fingerprints(model)
    model(input_ids=TOKENS).logits.sum().backward()
    with as_reference(model):
        model(input_ids=TOKENS)
    assert tensor_fingerprints(model) == first


def test_names_are_those_of_the_files(tiny_base):
    from safetensors import safe_open

    with safe_open(tiny_base / "model.safetensors", framework="pt") as file:
        assert set(tensor_fingerprints(attach_adapter(load(tiny_base), rank=4, alpha=8))) == set(file.keys())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_tied_weights_count_once_under_a_name_that_an_adapter_does_not_change(tied):
    tensors = tensor_fingerprints(tied)
    assert {"lm_head.weight", "model.embed_tokens.weight"} & set(tensors) == {"lm_head.weight"}
    assert tensor_fingerprints(attach_adapter(tied, rank=2, alpha=4, targets=["q_proj", "embed_tokens"])) == tensors


def test_without_a_frozen_adapter_the_reference_is_the_base(tiny_base, sft):
    model = start_from_adapter(load(tiny_base), sft, reference="base")
    assert reference_fingerprint(model) == base_fingerprint(model) == base_fingerprint(load(tiny_base))


def test_a_frozen_adapter_makes_another_reference_of_the_same_base(tiny_base, frozen):
    assert base_fingerprint(frozen) == base_fingerprint(load(tiny_base))
    assert reference_fingerprint(frozen) != base_fingerprint(frozen)


def test_the_trained_adapter_does_not_change_the_reference(frozen):
    first = reference_fingerprint(frozen)
    stir(adapter_parameters(frozen))
    for module in frozen.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2
    assert reference_fingerprint(frozen) == first


def test_being_used_as_the_reference_does_not_change_it(frozen):
    first = reference_fingerprint(frozen)
    with as_reference(frozen):
        assert reference_fingerprint(frozen) == first


def test_a_bit_of_the_frozen_adapter_changes_the_reference(frozen):
    first = reference_fingerprint(frozen)
    flip_a_bit(next(p for name, p in frozen.named_parameters() if f"lora_B.{REFERENCE}" in name))
    assert reference_fingerprint(frozen) != first


def test_the_scaling_of_the_frozen_adapter_changes_the_reference(frozen):
    first = reference_fingerprint(frozen)
    next(m for m in frozen.modules() if hasattr(m, "lora_A")).scaling[REFERENCE] *= 2
    assert reference_fingerprint(frozen) != first


def test_a_known_hash_of_the_base_saves_the_pass_over_it(frozen):
    assert reference_fingerprint(frozen, base=base_fingerprint(frozen)) == reference_fingerprint(frozen)
    assert reference_fingerprint(frozen, base="another") != reference_fingerprint(frozen)


def test_the_identity_of_a_folder_holds_while_nothing_in_it_changes(own_base):
    assert base_identity(inspect_base(str(own_base))) == base_identity(inspect_base(str(own_base / ".." / "base")))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_written_anew_changes_the_identity_though_its_times_are_set_back(own_base, name):
    facts = inspect_base(str(own_base))
    first, times = base_identity(facts), (own_base / name).stat()
    content = (own_base / name).read_bytes()
    (own_base / name).unlink()
    (own_base / name).write_bytes(content)
    os.utime(own_base / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert base_identity(facts) != first


def test_files_that_are_neither_weights_nor_configuration_do_not_change_the_identity(own_base):
    facts = inspect_base(str(own_base))
    first = base_identity(facts)
    (own_base / "README.md").write_text("new")
    assert base_identity(facts) == first
    (own_base / "model-00002-of-00002.safetensors").write_bytes(b"new")
    assert base_identity(facts) != first


def test_quantization_and_dtype_change_the_identity(tiny_base):
    ways = [("none", "float32"), ("nf4", "float32"), ("none", "bfloat16")]
    identities = {base_identity(inspect_base(str(tiny_base), quantize=quantize, dtype=dtype)) for quantize, dtype in ways}
    assert len(identities) == 3


def test_another_version_of_a_library_changes_the_identity(tiny_base, monkeypatch):
    facts = inspect_base(str(tiny_base))
    seen = {base_identity(facts)}
    for changed in ("torch", "transformers", "bitsandbytes"):
        monkeypatch.setattr(fingerprint, "version", lambda name, changed=changed: "9" if name == changed else "1")
        seen.add(base_identity(facts))
    assert len(seen) == 4


def test_a_hub_name_is_identified_by_its_commit_and_without_one_by_nothing(tiny_base):
    facts = inspect_base(str(tiny_base))._replace(base="someone/model")
    of = {commit: base_identity(facts._replace(config=SimpleNamespace(_commit_hash=commit))) for commit in ("a", "b", None)}
    assert of[None] is None
    assert of["a"] != of["b"]


def test_a_folder_without_weights_is_identified_by_nothing(own_base):
    facts = inspect_base(str(own_base))
    (own_base / "model.safetensors").unlink()
    assert base_identity(facts) is None


def test_the_hash_of_a_base_is_remembered_and_not_computed_again(tiny_base, tmp_path):
    facts = inspect_base(str(tiny_base))
    model = load_base(facts)
    truth = base_fingerprint(model)
    store = ReferenceStore(tmp_path / "reference.sqlite")
    assert remembered_fingerprint(model, facts, store) == truth
    flip_a_bit(model.lm_head.weight)  # only one who reads the weights again would see it
    assert remembered_fingerprint(attach_adapter(model, rank=4, alpha=8), facts, store) == truth


def test_the_hash_of_a_changed_base_is_computed_anew(own_base, tmp_path):
    store = ReferenceStore(tmp_path / "reference.sqlite")
    first = remembered_fingerprint(load(own_base), inspect_base(str(own_base)), store)
    weights = bytearray((own_base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (own_base / "model.safetensors").unlink()
    (own_base / "model.safetensors").write_bytes(weights)
    model = load(own_base)
    assert remembered_fingerprint(model, inspect_base(str(own_base)), store) == base_fingerprint(model) != first


def test_without_a_store_or_an_identity_the_hash_is_computed(tiny_base, tmp_path):
    facts = inspect_base(str(tiny_base))
    model = load_base(facts)
    assert remembered_fingerprint(model, facts, None) == base_fingerprint(model)
    unknown = facts._replace(base="someone/model", config=SimpleNamespace(_commit_hash=None))
    store = ReferenceStore(tmp_path / "reference.sqlite")
    for _ in range(2):
        assert remembered_fingerprint(model, unknown, store) == base_fingerprint(model)
        flip_a_bit(model.lm_head.weight)
