"""What is left of a trained adapter in a merged model: ours, with the arithmetic of others as the control that fails.

One adapter is trained here, on the quickstart's base in 4 bit, and made smaller and larger. The others' arithmetic is written
down from what their sources do, without `pe_dpo.merging`: ΔW is read from the adapter's file, 4-bit values come from
bitsandbytes.

Rounding a model of 1.4 M weights to bfloat16 moves its preferences by itself: the mean over these 96 pairs by about 2.5e-4
nats, with or without an adapter. A shift of 0.003, of an update of 4e-4, is served within 6 %, one of 0.015 within 2 %.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from world import write_pairs

from pe_dpo.errors import MergeRefused
from pe_dpo.inference.scorer import Scorer
from pe_dpo.merging.behaviour import Agreement, Behaviour, agreement, measure, verification_failures
from pe_dpo.merging.merge import merge
from pe_dpo.merging.merged_tensor import MergedTensor, mean_kept, stochastically_rounded, tensor_failures
from pe_dpo.merging.plan import Dtype, Plan
from pe_dpo.merging.source import Source, open_source
from pe_dpo.merging.training_base import TrainingBase
from pe_dpo.merging.write import write
from pe_dpo.model.adapter import add_finished_adapter
from pe_dpo.model.attention import switch_on
from pe_dpo.model.base import compute_in, inspect_base, load_base
from pe_dpo.model.fingerprint import parameter_fingerprints
from pe_dpo.model.provenance import quantized_names
from pe_dpo.model.quantization import dequantized, four_bit_layers
from pe_dpo.quickstart.demo import BASE
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.training.train import train

pytestmark = pytest.mark.slow

SIZES = {"small": 4e-4, "slight": 1.5e-3, "middle": 7e-3, "large": 0.15}
"""|ΔW|/|W| of all adapted layers together."""
NOISE = 2.5e-4
"""Of the mean shift, nats, one standard deviation: eight roundings by chance of one model to bfloat16."""
CASES = [("tied", "nf4"), ("untied", "nf4-single")]
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


class Trained(NamedTuple):
    """An adapter, and what it does unmerged."""

    source: Source
    how: dict[str, str]
    """It was trained, for `merge`."""
    base: TrainingBase
    reference: Behaviour
    trained: Behaviour
    measure_floor: Callable[[], Agreement]
    quantized: dict[str, Tensor]
    """By name of the tensor, float32: the values of the 4-bit codes that were trained on."""
    updates: dict[str, Tensor]
    """ΔW, float32."""

    def judge(self, model: Any) -> Agreement:
        """How near a model comes to the trained one."""
        return agreement(look(model, self.source), self.trained, self.reference)

    def failures(self, found: Agreement) -> list[str]:
        """What the merge says against a model that comes so near; its floor is the trained one computed in bfloat16."""
        return verification_failures(found, self.measure_floor())


@pytest.fixture(scope="module")
def trained(made_once: Callable[..., Path]) -> Callable[[str, str, str], Trained]:
    """Made on first use: kind of base, quantization, size."""
    pairs = made_once("table-pairs", lambda folder: write_pairs(folder, train=60, test=96))

    def fill(folder: Path) -> None:
        train(
            recipe_from_yaml(
                f"model: {{base: '{BASE}', quantize: nf4, dtype: float32}}\n"
                f"data: {{train: '{pairs / 'train.jsonl'}'}}\n"
                "train: {learning_rate: 2.8e-4, max_steps: 12, pairs_per_step: 4, warmup: 0, schedule: constant}\n"
                f"output: '{folder / 'run'}'\n",
                "test",
            )
        )

    @cache
    def make(kind: str, quantize: str, size: str) -> Trained:
        run = made_once("table-run", fill) / "run"
        base = BASE if kind == "tied" else made_once("table-untied", _untie)
        adapter = made_once(f"table-{size}", lambda folder: _resize(run, folder, SIZES[size]))
        how = {"base": str(base), "quantize": quantize, "data": str(pairs / "test.jsonl")}
        with open_source(adapter, **how, pairs=96) as source:
            source.facts = source.facts._replace(dtype=torch.float32)
            known = references.get((kind, quantize))
            found = _measured(source, how, known)
            references[kind, quantize] = found.reference
            return found

    references: dict[tuple[str, str], Behaviour] = {}
    return make


def _resize(run: Path, folder: Path, size: float) -> None:
    """Save the run's adapter with its B so much larger or smaller that |ΔW|/|W| is the size."""
    shutil.copy(run / "adapter_config.json", folder)
    weights, updates = load_file(BASE / "model.safetensors"), _updates(run).items()
    now = sum(float(delta.norm()) ** 2 for _, delta in updates) / sum(float(weights[name].norm()) ** 2 for name, _ in updates)
    tensors = load_file(run / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_B.weight")]:
        tensors[name] *= size / now**0.5
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _untie(folder: Path) -> None:
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _measured(source: Source, how: dict[str, str], reference: Behaviour | None) -> Trained:
    model: Any = load_base(source.facts).eval()
    loaded = TrainingBase(source, quantized_names(model), parameter_fingerprints(model), model.device)
    quantized = {f"{name}.weight": dequantized(layer.weight) for name, layer in four_bit_layers(model)}
    reference = reference or look(model, source)
    model = add_finished_adapter(model, source.adapter.folder)
    trained = look(model, source)
    compute_in(model, torch.bfloat16)
    floor = cache(lambda: agreement(look(model, source), trained, reference))
    return Trained(source, how, loaded, reference, trained, floor, quantized, _updates(source.adapter.folder))


def look(model: Any, source: Source) -> Behaviour:
    """Log-probs of all 96 pairs, distributions of three."""
    few = measure(model, source.pairs[::32])
    switch_on(model.get_base_model() if hasattr(model, "get_base_model") else model)
    scorer = Scorer("segments", model.device, token_budget=2048)  # right for a Llama: no need to see it for every model
    return Behaviour(scorer.score_pairs(model, source.pairs), few.distributions)


def _updates(adapter: Path) -> dict[str, Tensor]:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    parts = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        f"{part.removeprefix('base_model.model.')}.weight": config["lora_alpha"]
        / config["r"]
        * (tensors[f"{part}.lora_B.weight"] @ tensors[f"{part}.lora_A.weight"])
        for part in parts
    }


# ---------------------------------------------------------------------------------------------------------- ways of merging


class Merged(NamedTuple):
    """A merged model."""

    model: Any
    tensors: list[MergedTensor]

    @property
    def kept(self) -> float:
        """Share of ΔW in the weights."""
        share = mean_kept(self.tensors)
        assert share is not None
        return share


def ours(of: Trained, folder: Path, dtype: Dtype = "bf16") -> Merged:
    """The default merge, from files to files, loaded from there."""
    tensors, _ = write(Plan(of.source, dtype=dtype), folder, of.base)
    return Merged(load_base(inspect_base(str(folder), quantize="none", dtype="float32")).eval(), tensors)


def sixteen_bit(of: Trained, *, keep_float32: bool = False) -> Merged:
    """4-bit values dequantized to bfloat16, ΔW added, rounded to bfloat16 (or, for comparison, not rounded)."""
    start = {name: weight.bfloat16().float() for name, weight in of.quantized.items()}
    return _with_updates(of, start, torch.float32 if keep_float32 else torch.bfloat16)


def onto_original(of: Trained) -> Merged:
    """The base's own weights, ΔW added, rounded to bfloat16."""
    return _with_updates(of, {}, torch.bfloat16)


def round_trip_of_everything(of: Trained) -> Merged:
    """As `sixteen_bit`, and the embeddings through 4 bits too."""
    merged = sixteen_bit(of)
    _round_trip_embeddings(merged.model, of.source.facts.quantize)
    return merged


def requantized(of: Trained) -> Merged:
    """PEFT's own merge of the 4-bit model."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(load_base(of.source.facts), str(of.source.adapter.folder))
    with pytest.warns(UserWarning, match="may get different generations due to rounding errors"):
        model = model.merge_and_unload().eval()
    after = {f"{name}.weight": dequantized(layer.weight) for name, layer in four_bit_layers(model)}
    return Merged(model, [_share(name, of.quantized[name], delta, after[name]) for name, delta in of.updates.items()])


def _with_updates(of: Trained, start: dict[str, Tensor], dtype: torch.dtype) -> Merged:
    model: Any = load_base(of.source.facts._replace(quantize="none")).eval()
    tensors = []
    with torch.no_grad():
        for name, delta in of.updates.items():
            parameter = model.get_parameter(name)
            weight = start.get(name, parameter.clone())
            parameter.copy_((weight + delta).to(dtype))
            tensors.append(_share(name, weight, delta, parameter))
    return Merged(model, tensors)


def _round_trip_embeddings(model: Any, quantize: str) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    with torch.no_grad():
        for parameter in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            codes = quantize_4bit(parameter.data.bfloat16(), quant_type="nf4", compress_statistics=quantize == "nf4")
            parameter.copy_(dequantize_4bit(*codes))


def _share(name: str, start: Tensor, delta: Tensor, merged: Tensor) -> MergedTensor:
    energy = float((delta.double() ** 2).sum())
    kept = float(((merged - start).double() * delta.double()).sum()) / energy
    return MergedTensor(name, kept, float(delta.norm() / start.norm()), energy, 0.0, "nearest")


def relative_size(of: Trained) -> float:
    """|ΔW|/|W| over all adapted layers together."""
    sizes = [(float(delta.norm()) ** 2, float(of.quantized[name].norm()) ** 2) for name, delta in of.updates.items()]
    return float((sum(delta for delta, _ in sizes) / sum(weight for _, weight in sizes)) ** 0.5)


# ------------------------------------------------------------------------------------------------------------ small adapters


@pytest.mark.parametrize(("kind", "quantize"), CASES)
def test_the_default_merge_keeps_a_small_shift(
    kind: str, quantize: str, trained: Callable[[str, str, str], Trained], tmp_path: Path
) -> None:
    of = trained(kind, quantize, "small")
    assert 2e-4 < relative_size(of) < 4.5e-4
    merged = ours(of, tmp_path)
    found = of.judge(merged.model)
    assert found.shift_trained > 10 * NOISE
    assert found.shift == pytest.approx(found.shift_trained, abs=3 * NOISE)
    assert 0.93 < merged.kept < 1.05
    assert tensor_failures(merged.tensors) == of.failures(found) == []


def test_others_lose_a_small_shift(trained: Callable[[str, str, str], Trained], tmp_path: Path) -> None:
    of = trained("tied", "nf4", "small")
    found = of.judge(ours(of, tmp_path).model)
    for other in (sixteen_bit(of), requantized(of)):
        lost = of.judge(other.model)
        assert other.kept < 0.5
        assert tensor_failures(other.tensors)
        assert lost.shift < 0.5 * lost.shift_trained
        assert lost.shift_trained - lost.shift > 5 * NOISE
    for other in (round_trip_of_everything(of), onto_original(of)):  # quantization errors of other places or none
        lost = of.judge(other.model)
        assert other.kept < 0.5
        assert tensor_failures(other.tensors)
        assert lost.shift_error > 10 * found.shift_error
        assert (lost.relative_kl or 0) > 100


def test_float16_keeps_a_small_shift_within_five_percent(trained: Callable[[str, str, str], Trained], tmp_path: Path) -> None:
    """Its steps are an eighth of bfloat16's, and so is the noise of rounding to them."""
    of = trained("tied", "nf4", "small")
    merged = ours(of, tmp_path, "fp16")
    found = of.judge(merged.model)
    assert found.shift == pytest.approx(found.shift_trained, rel=0.05)
    assert merged.kept == pytest.approx(1, abs=0.02)


def test_the_default_merge_keeps_a_slight_shift_within_five_percent_where_others_lose_a_fifth(
    trained: Callable[[str, str, str], Trained], tmp_path: Path
) -> None:
    of = trained("tied", "nf4", "slight")
    assert 1e-3 < relative_size(of) < 2e-3
    merged, other = ours(of, tmp_path), sixteen_bit(of)
    found, lost = of.judge(merged.model), of.judge(other.model)
    assert found.shift_trained > 40 * NOISE
    assert found.shift == pytest.approx(found.shift_trained, rel=0.05)
    assert merged.kept == pytest.approx(1, abs=0.05)
    assert tensor_failures(merged.tensors) == of.failures(found) == []
    assert other.kept < 0.8 and lost.shift < 0.85 * lost.shift_trained
    assert tensor_failures(other.tensors)


@pytest.mark.parametrize(("kind", "quantize"), CASES)
def test_only_what_was_quantized_in_training_makes_the_round_trip(
    kind: str, quantize: str, trained: Callable[[str, str, str], Trained], tmp_path: Path
) -> None:
    of = trained(kind, quantize, "small")
    merged = ours(of, tmp_path)
    stored, written = load_file(of.source.base_folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    untouched = stored.keys() - of.updates.keys()
    assert {name for name in EMBEDDINGS if name in stored} <= untouched
    assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in untouched)
    # The control: the same weights, only the embeddings through 4 bits.
    _round_trip_embeddings(merged.model, quantize)
    assert not torch.equal(merged.model.get_input_embeddings().weight, stored["model.embed_tokens.weight"].float())
    assert tensor_failures(merged.tensors) == []
    assert any(line.startswith("KL(trained ‖ merged)") for line in of.failures(of.judge(merged.model)))


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_float32_merge_computes_what_was_trained(
    size: str, trained: Callable[[str, str, str], Trained], tmp_path: Path
) -> None:
    of = trained("tied", "nf4", size)
    merged = ours(of, tmp_path, "fp32")
    for wanted, logprobs in zip(of.trained.distributions, look(merged.model, of.source).distributions, strict=True):
        torch.testing.assert_close(logprobs, wanted, rtol=1e-4, atol=1e-4)
    found, control = of.judge(merged.model), of.judge(sixteen_bit(of, keep_float32=True).model)
    assert found.shift == pytest.approx(found.shift_trained, rel=1e-3)
    assert abs(found.kl) < 0.01 * control.kl  # values rounded to bfloat16 before ΔW is added are other values
    assert merged.kept == pytest.approx(1, abs=1e-3)


# --------------------------------------------------------------------------------------------------------- larger adapters


def test_a_middle_adapter_survives_every_16_bit_merge_and_not_the_4_bit_one(
    trained: Callable[[str, str, str], Trained], tmp_path: Path
) -> None:
    of = trained("tied", "nf4", "middle")
    assert 5e-3 < relative_size(of) < 1e-2
    merged, lost = ours(of, tmp_path), requantized(of)
    found = of.judge(merged.model)
    assert found.shift_kept == pytest.approx(1, abs=0.01) and merged.kept == pytest.approx(1, abs=0.01)
    assert tensor_failures(merged.tensors) == of.failures(found) == []
    assert sixteen_bit(of).kept > 0.95  # where peers are right, they are
    judged = of.judge(lost.model)
    assert lost.kept < 0.2 and (judged.shift_kept or 0) < 0.5
    assert tensor_failures(lost.tensors) and of.failures(judged)


def test_a_large_adapter_survives_any_merge(trained: Callable[[str, str, str], Trained], tmp_path: Path) -> None:
    of = trained("tied", "nf4", "large")
    assert 0.1 < relative_size(of) < 0.3
    found = of.judge(ours(of, tmp_path).model)
    assert found.shift_kept == pytest.approx(1, abs=0.01)
    lost = requantized(of)
    assert 0.7 < lost.kept < 0.98
    assert (of.judge(lost.model).shift_kept or 0) > 0.8


# ---------------------------------------------------------------------------------------------------------- the whole merge


def test_the_merged_model_is_one_that_plain_transformers_serves(
    trained: Callable[[str, str, str], Trained], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    of = trained("tied", "nf4", "small")
    result = merge(of.source.folder, tmp_path / "out", pairs=4, **of.how)
    assert result.faults == [] and result.report["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    now, then = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", BASE))
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who keeps the mill?"}]
    assert now.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == then.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )
    ids = now.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > ids.shape[1]


def test_rounding_to_nearest_onto_the_original_is_refused_and_auto_rounds_by_chance_instead(
    trained: Callable[[str, str, str], Trained], tmp_path: Path, logged: list[str]
) -> None:
    of = trained("tied", "nf4", "small")
    with pytest.raises(MergeRefused, match="of its update kept"):
        merge(of.source.folder, tmp_path / "near", onto="original", rounding="nearest", pairs=0, **of.how)
    assert list(tmp_path.iterdir()) == []
    verdict = merge(of.source.folder, tmp_path / "out", onto="original", pairs=6, **of.how)
    assert {tensor.rounding for tensor in verdict.tensors} == {"stochastic on the grid"}
    assert mean_kept(verdict.tensors) == pytest.approx(1, abs=0.03) and verdict.faults == []
    # What is served is the adapter on the base's own weights, and that is not what was trained: both are said.
    assert any("quantization error was part of training" in line for line in logged)
    assert verdict.held_out is not None and verdict.change is not None
    assert (verdict.change.relative_kl or 0) > 100 > 10 > (verdict.held_out.relative_kl or 0)


def test_stochastic_rounding_is_right_on_average_where_nearest_never_is(
    trained: Callable[[str, str, str], Trained],
) -> None:
    """Mean over 64 seeds against the exact sum, by the share of ΔW in it; noise of a mean falls with its root."""
    of = trained("tied", "nf4", "small")
    name = max(of.updates, key=lambda name: of.updates[name].numel())
    weight, delta = load_file(BASE / "model.safetensors")[name].float(), of.updates[name]
    generator = torch.Generator().manual_seed(0)
    drawn = [stochastically_rounded(weight + delta, torch.bfloat16, generator).float() for _ in range(64)]
    assert _share(name, weight, delta, torch.stack(drawn).mean(0)).kept == pytest.approx(1, abs=0.02)
    assert (_share(name, weight, delta, (weight + delta).bfloat16().float()).kept or 0) < 0.5
    for one in drawn[:4]:
        assert bool(((one - weight - delta).abs() <= (weight + delta).abs() * 2**-7).all())  # one of the two neighbours
