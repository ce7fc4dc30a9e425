"""Which layers get an adapter, in bases of many kinds: those that a text trains, and no others."""

import warnings
from collections.abc import Iterable

import pytest
import torch
import transformers as hf

from benchmarks.architectures.models import ARCHITECTURES
from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import attach_adapter
from pe_dpo.model.adapter_targets import BYPASSED, EXCLUDED, ROUTERS, SHARED_NAMES, UNREACHED, find_targets
from pe_dpo.model.base import inspect_base, load_base

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def empty(name: str):
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())


def leaves(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize(
    ("name", "trained", "left_out"),
    [
        ("qwen2.5", ATTENTION | MLP, {}),
        # Experts are bare parameters today, and PEFT's all-linear would train them in some families and not in others.
        ("qwen3-moe", ATTENTION, {ROUTERS: {"experts"}}),
        ("mixtral", ATTENTION, {ROUTERS: {"experts"}}),
        ("gpt-oss", ATTENTION, {ROUTERS: {"experts"}}),
        ("qwen2-moe", ATTENTION | MLP, {ROUTERS: {"experts", "shared_expert_gate"}}),
        ("deepseek-v3", LATENT, {ROUTERS: {"experts"}, SHARED_NAMES: MLP}),
        ("phimoe", ATTENTION, {ROUTERS: {"experts", "router"}}),  # LoRA cannot add to the tuple that these two give
        ("llama4", ATTENTION | MLP, {ROUTERS: {"experts", "router"}}),
        ("mamba", {"in_proj"}, {BYPASSED: {"x_proj", "dt_proj", "out_proj"}}),
        ("falcon-h1", ATTENTION | MLP | {"in_proj"}, {BYPASSED: {"out_proj"}}),
        ("bamba", ATTENTION | MLP | {"in_proj"}, {BYPASSED: {"out_proj"}}),
        ("qwen3.5", ATTENTION | MLP | {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}, {}),
        ("lfm2", {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"}, {}),
        ("gemma3-4b", ATTENTION | MLP, {UNREACHED: {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}}),
        ("mllama", ATTENTION | MLP, {UNREACHED: ATTENTION | MLP}),  # its layers that attend to images
    ],
)
def test_all_linear_means_the_same_in_every_family(name, trained, left_out):
    found = find_targets(empty(name), "all-linear")
    assert leaves(found.layers) == trained
    assert {reason: leaves(paths) for reason, paths in found.left_out.items()} == left_out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["gemma3-4b", "gemma4-e2b", "gemma3n", "phi4-multimodal", "mllama", "llama4", "phimoe", "qwen3-next", "deepseek-v2",
     "mamba", "mamba2", "falcon-h1", "nemotron-h", "jamba", "bamba", "zamba2", "granite4", "qwen3-vl", "mistral3", "llava"],
)  # fmt: skip
def test_every_adapter_gets_a_gradient_from_text(name, tmp_path):
    """Adapters that no text moves cost memory, and say that a layer is trained which is not."""
    ARCHITECTURES[name].save(tmp_path)
    base = load_base(inspect_base(str(tmp_path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = attach_adapter(base, rank=2, alpha=4)
    ids = torch.randint(10, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    updates = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    assert updates
    assert [name for name, parameter in updates.items() if parameter.grad is None or not parameter.grad.any()] == []


@pytest.mark.parametrize("name", ["deepseek-v3", "hunyuan-moe", "qwen3-moe"])
def test_codes_change_nothing_about_targets(name, tmp_path):
    """4-bit experts lie as columns of codes, and PEFT takes the names of layers beside them all the same."""
    ARCHITECTURES[name].save(tmp_path)
    model = load_base(inspect_base(str(tmp_path), quantize="nf4"))
    assert find_targets(model, "all-linear") == find_targets(empty(name), "all-linear")
    assert set(attach_adapter(model, rank=2, alpha=4).base_model.targeted_module_names) == set(
        find_targets(empty(name), "all-linear").layers
    )


def test_a_name_is_one_of_the_language_model_only():
    """The tower of Gemma-3 has a q_proj, too."""
    model = empty("gemma3-4b")
    found = find_targets(model, ["q_proj"])
    assert found.layers == [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    config = attach_adapter(model, rank=2, alpha=4, targets=["q_proj"]).peft_config["default"]
    assert (config.target_modules, config.exclude_modules) == (
        {"self_attn.q_proj"}, r"model\.vision_tower\.encoder\.layers\.\d+\.self_attn\.q_proj",
    )  # fmt: skip


def test_patterns_match_whole_paths():
    layers = find_targets(empty("qwen2.5"), [r".*\.layers\.1\..*(q|v)_proj", "o_proj"]).layers
    assert layers == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("exclude", [["layers.0", "mlp"], [r".*layers\.0\..*", r".*\.mlp\..*"]], ids=["names", "patterns"])
def test_what_is_excluded_gets_no_adapter_nor_anything_in_it(exclude):
    model = empty("qwen2.5")
    found = find_targets(model, "all-linear", exclude)
    kept = [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert sorted(found.layers) == sorted(kept)
    assert len(found.left_out[EXCLUDED]) == 10
    assert sorted(attach_adapter(model, rank=2, alpha=4, exclude=exclude).base_model.targeted_module_names) == sorted(kept)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft's own, of its own pattern
def test_experts_that_are_asked_for_are_trained():
    model = attach_adapter(empty("mixtral"), rank=2, alpha=4, targets=["q_proj", "w1", "w2", "w3"])
    assert model.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("name", "targets", "exclude", "message"),
    [
        ("qwen2.5", ["nowhere"], [], r"adapter\.targets: no linear layer of the base is called nowhere; there are down_proj, "),
        ("qwen2.5", ["mlp"], [], r"adapter\.targets: no linear layer of the base is called mlp; "),
        ("qwen2.5", [r".*\.(q_proj"], [], r"adapter\.targets: .* is no regular expression: missing \)"),
        ("qwen2.5", "all-linear", ["tower"], r"adapter\.exclude: no layer to train is called tower, or lies in it"),
        ("qwen2.5", "all-linear", ["layers"], r"adapter\.targets: no layer is left; .*: adapter\.exclude"),
        ("gemma3-4b", ["fc1"], [], r"adapter\.targets: no layer is left; no adapter on fc1 \(2\): pairs of text do not reach"),
        (
            "deepseek-v3",
            [r".*shared.*"],
            [],
            r"no adapter on down_proj, gate_proj, up_proj \(3\): PEFT would put it on the experts",
        ),
        ("mamba2", ["out_proj"], [], r"no adapter on out_proj \(2\): their weights are read past an adapter"),
    ],
)
def test_targets_that_leave_nothing_are_refused(name, targets, exclude, message):
    with pytest.raises(ModelError, match=message):
        find_targets(empty(name), targets, exclude)
