"""Memory as it is counted, against what PyTorch keeps and against numbers worked by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from counted_setups import llama_8b
from transformers import AutoConfig, AutoModelForCausalLM

from pe_dpo.data import EncodedPair
from pe_dpo.data.batches import pack
from pe_dpo.estimate.lengths import row_of
from pe_dpo.estimate.memory import OPTIMIZER_BYTES, Row, Setup
from pe_dpo.estimate.shape import shape_of
from pe_dpo.inference.logprobs import packed_pair_logprobs
from pe_dpo.model.adapter import attach_adapter
from pe_dpo.model.attention import switch_on
from pe_dpo.model.base import checkpoint_activations
from pe_dpo.recipe.schema import Optimizer

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = ((31, 44, 17), (52, 13, 70), (24, 66, 61), (40, 29, 35), (57, 80, 12))


def pairs() -> list[EncodedPair]:
    generator = np.random.default_rng(0)
    parts = [[generator.integers(3, 300, size).astype(np.int32) for size in sizes] for sizes in LENGTHS]
    return [EncodedPair(*ids, 0.0, str(number), str(number)) for number, ids in enumerate(parts)]


def kept_by_torch(model: Any, path: Any) -> int:
    """Bytes of all storages that autograd holds after a row's forward, parameters and buffers of the model not counted."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed_pair_logprobs(model, pack(pairs()), kind=path)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("kind", "dtype", "options"), [
    ("llama", "float32", {}),
    ("llama", "bfloat16", {}),
    ("llama", "float32", {"path": "dense"}),
    ("llama", "float32", {"dropout": 0.1}),
    ("llama", "float32", {"targets": "attention"}),
    ("llama", "float32", {"targets": "mlp"}),
    ("llama", "bfloat16", {"targets": ["q_proj", "v_proj"]}),
    ("phi3", "float32", {}),
    ("qwen3", "bfloat16", {}),
    ("gemma2", "float32", {}),
    ("gemma3_text", "bfloat16", {}),
    ("mixtral", "float32", {}),
])  # fmt: skip
def test_what_is_counted_of_a_forward_is_what_autograd_keeps(kind: str, dtype: str, options: dict[str, Any]) -> None:
    """Within 4 %: what is left are indices, and copies that depend on how lengths divide by 4 and 16."""
    torch.manual_seed(0)
    path, dropout = options.get("path", "segments"), options.get("dropout", 0.0)
    targets = options.get("targets", "all-linear")
    config = AutoConfig.for_model(kind, **SIZES, **({"num_local_experts": 4} if kind == "mixtral" else {}))
    base = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).requires_grad_(False)
    for module in base.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model = attach_adapter(base, rank=4, alpha=8, targets=targets, dropout=dropout)
    switch_on(model.get_base_model())
    shape = shape_of("x", config)
    setup = Setup(
        shape, "none", getattr(torch, dtype).itemsize, tuple(shape.adapted(targets)), 4, 0, path=path, device="cpu",
        has_dropout=dropout > 0,
    )  # fmt: skip
    counted = setup.row_peak(row_of(pairs(), path))
    passing = counted.keys() & {"tile of logits", "gradients in a layer"}
    assert len(passing) == 1
    kept = sum(size for name, size in counted.items() if name not in passing)
    assert kept == pytest.approx(kept_by_torch(model, path), rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "recomputes"), [
    ("llama", "float32", False), ("llama", "float32", True), ("llama", "bfloat16", False), ("gemma3_text", "float32", False),
    ("gemma2", "float32", False),
])  # fmt: skip
def test_the_peak_of_a_row_is_that_of_torch_s_allocator(kind: str, dtype: str, recomputes: bool) -> None:
    """Forward and backward above what lay there before, gradients included; to 3 %, with recomputation to 8 % and above."""
    from torch.profiler import ProfilerActivity, profile

    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 4096}
    config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).requires_grad_(False)
    model = attach_adapter(base, rank=8, alpha=16)
    if recomputes:
        checkpoint_activations(model.get_base_model())
    switch_on(model.get_base_model())

    def work() -> None:
        scored = packed_pair_logprobs(model, pack(pairs()), kind="segments")
        (scored.chosen - scored.rejected).sum().backward()

    work()  # from now on there are gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]
    peak = max(np.cumsum([one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]))
    shape = shape_of("x", config)
    setup = Setup(
        shape, "none", getattr(torch, dtype).itemsize, tuple(shape.adapted("all-linear")), 8, 0, path="segments", device="cpu",
        recomputes_above=0 if recomputes else None,
    )  # fmt: skip
    counted = sum(setup.row_peak(row_of(pairs(), "segments")).values())
    assert counted == pytest.approx(peak, rel=0.08 if recomputes else 0.03)


def test_what_lies_there_all_the_time_by_hand() -> None:
    """6,979,321,856 weights at 0.5 + 1/64 + 4/16384 bytes; embedding, head and norms, 1,050,939,392, at 2."""
    fixed = llama_8b().fixed()
    assert fixed == {
        "codes": 3_600_416_768,
        "weights": 2_101_878_784,
        "adapters": 167_772_160,
        "gradients": 167_772_160,
        "optimizer": 335_544_320,
    }


def test_activations_of_a_token_and_layer_by_hand() -> None:
    """Llama-3.1-8B, varlen, bfloat16: two norms' inputs in float32 32,768 B; q 8,192, k and v 4,096, sums 128; gate, its
    activation and up 86,016; inputs of q/k/v, o, gate/up, down 2·(3·4,096 + 14,336); seven times 16 numbers, 224 B."""
    kept = llama_8b().kept_by_layer(Row(tokens=1000, scored=500, keys=1000, scores=0))
    per_token = {name: size / 1000 for name, size in kept.items()}
    assert per_token == {"norms": 32_768, "attention": 12_416, "mlp": 86_016, "inputs of adapters": 53_472}


def test_recomputation_keeps_a_layer_s_input_of_all_layers_and_the_rest_of_one() -> None:
    row = Row(tokens=1000, scored=500, keys=1000, scores=0)
    kept, setup = llama_8b().kept_by_layer(row), llama_8b(recomputes_above=0)
    peak = setup.row_peak(row)
    assert peak["layer inputs"] == 32 * 1000 * 4096 * 2
    assert peak["gradients in a layer"] == pytest.approx(sum(kept.values()) + setup.passing(row))
    assert sum(peak.values()) < 0.15 * sum(llama_8b().row_peak(row).values()) + 0.5e9


def test_the_check_before_training_has_all_logits_of_two_padded_rows() -> None:
    """1,600 scored of 1,600 columns: 128,256 · 1,600 · 3 · 4 bytes of logits (all, those scored, softmax), 2.46 GB."""
    setup = llama_8b()
    assert setup.plain_check(Row(2000, 1600, 2000, 0, columns=1600)) == pytest.approx(2.46e9 + 0.22e9, rel=0.05)


def test_the_check_before_training_has_gradients_of_two_padded_pairs_that_keep_everything() -> None:
    """Rows, their logits, and gradients of the adapters three times: of autograd, one after another, and their difference."""
    setup, short = llama_8b(recomputes_above=0), Row(400, 200, 400, 0, columns=250)
    plain = llama_8b(path="padded").row_peak(short)
    assert setup.gradient_check(short) == pytest.approx(sum(plain.values()) + 12 * 41_943_040)
    assert plain["head"] == 4 * 128_256 * 200


def test_the_check_has_gradients_of_the_two_shortest_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of one of middle length: with all its activations and logits that would be the most that a run takes."""
    from pe_dpo.inference import scorer

    probes: list[list[EncodedPair]] = []
    monkeypatch.setattr(scorer, "_pack", lambda one, model, probe, least: probes.append(probe) or "not asked")
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).requires_grad_(False)
    scorer.choose_scorer(attach_adapter(base, rank=4, alpha=8), pairs())
    sizes = sorted(prompt + max(answers) for prompt, *answers in LENGTHS)
    found = [len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in probes[0]]
    assert found == [sizes[0], sizes[1], sizes[2], sizes[4]]


def test_every_optimizer_has_its_bytes() -> None:
    assert {*OPTIMIZER_BYTES} == {*Optimizer.__args__}


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_an_optimizer_keeps_the_bytes_that_are_counted(name: str) -> None:
    """After one step on a matrix of 256 × 512, per parameter; adafactor's rows and columns are 768 numbers for 131,072."""
    from transformers import Trainer, TrainingArguments

    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=name, use_cpu=True, output_dir="/nowhere"))
    weight = torch.nn.Parameter(torch.zeros(256, 512))
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], **options)
    optimizer.step()
    tensors = [one for state in optimizer.state.values() for one in state.values() if torch.is_tensor(one) and one.dim()]
    assert sum(one.nbytes for one in tensors) / weight.numel() == pytest.approx(OPTIMIZER_BYTES[name], abs=0.03)
