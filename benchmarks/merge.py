"""What is left of an adapter in a merged model: our merges and the arithmetic of others, on adapters that were trained here.

    table    small, middle and large adapter × nf4, nf4-single × tied, untied; every way of merging on held-out pairs
    curve    one trained ΔW, scaled: share of it in the weights, and of the preference shift it makes
    cost     time and peak memory of merging a model of 200 M parameters, against PEFT in 16 bit

`others` is written down from what the others' sources do, and shares no code with `pe_dpo.merging`.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.merge_cost import cost, markdown_cost
from benchmarks.results import Settings, load, machine, save, temporary_folder
from pe_dpo.merging.behaviour import Behaviour, measure
from pe_dpo.merging.merged_tensor import MergedTensor, mean_kept, tensor_failures
from pe_dpo.merging.plan import Plan
from pe_dpo.merging.source import Source, open_source
from pe_dpo.merging.unmerged import Unmerged, free, measure_served
from pe_dpo.merging.write import copy_support_files, write
from pe_dpo.model.base import load_base
from pe_dpo.model.quantization import dequantized, four_bit_layers
from pe_dpo.quickstart import demo
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.training.train import train

PAIRS = 96
SCALES = (1e-5, 3e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2)
"""|ΔW|/|W| of the curve."""


class Size(NamedTuple):
    """How long an adapter is trained, so that |ΔW|/|W| comes out at about 3e-4, 7e-3 and 0.15."""

    learning_rate: float
    steps: int


SIZES = {"small": Size(6e-6, 24), "middle": Size(1.4e-4, 24), "large": Size(6e-4, 96)}


class Way(NamedTuple):
    """One way of merging."""

    title: str
    is_onto_original: bool
    make: Callable[[Source, Unmerged, Path], list[MergedTensor] | tuple[list[MergedTensor], Behaviour]]
    """Writes a model into the folder; or returns its behaviour, where it is none that can be loaded as 16 bit."""


@dataclass(frozen=True)
class MergeSettings(Settings):
    """Results that lie in merge.json."""

    @property
    def name(self) -> str:
        """Name of the results."""
        return "-".join(["merge"] + ["quick"] * self.is_quick)


def run_merge(settings: Settings, *, only_cost: bool = False) -> Path:
    """Make the table, the curve and the cost, print and save them, and return their file.

    Args:
        settings: of the benchmark.
        only_cost: measure the cost again, and leave what was saved of table and curve.
    """
    settings = MergeSettings(**vars(settings))
    if only_cost:
        path = settings.out / f"{settings.name}.json"
        content = load(path) | {"cost": {**cost(temporary_folder(), rounds=settings.rounds), "machine": machine()}}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(markdown_cost(content["cost"]))
        return path
    work = temporary_folder()
    shutil.copytree(demo.PAIRS, work / "pairs")
    content: dict[str, Any] = {"settings": {"held_out_pairs": PAIRS, "sizes": {k: v._asdict() for k, v in SIZES.items()}}}
    content["table"] = [measure_adapter(work, *case) for case in _cases(is_quick=settings.is_quick)]
    print(markdown_table(content["table"]))
    content["curve"] = curve(work, SCALES[::3] if settings.is_quick else SCALES)
    content["cost"] = cost(work, rounds=settings.rounds)
    print(markdown_cost(content["cost"]))
    return save(settings, content)


def _cases(*, is_quick: bool) -> Iterator[tuple[str, str, str]]:
    """Base, quantization and size of each adapter of the table."""
    if is_quick:
        yield "tied", "nf4", "small"
        return
    yield from (("tied", quantize, size) for size in SIZES for quantize in ("nf4", "nf4-single"))
    yield from (("untied", quantize, "small") for quantize in ("nf4", "nf4-single"))


# ----------------------------------------------------------------------------------------------------------------- adapters


def base_of(work: Path, kind: str) -> Path:
    """Return the quickstart's base as it is ("tied"), or with the embedding copied into a head of its own ("untied")."""
    folder = work / "untied"
    if kind == "tied":
        return demo.BASE
    if not folder.is_dir():
        shutil.copytree(demo.BASE, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def trained_adapter(work: Path, kind: str, quantize: str, size: Size, *, seed: int = 0) -> Path:
    """Return the folder of a run: rank 16 on all linear layers, DPO, eight of the quickstart's pairs per step."""
    output = work / f"run-{kind}-{quantize}-{size.learning_rate:g}-{size.steps}-{seed}"
    text = (
        f"model: {{base: '{base_of(work, kind)}', quantize: {quantize}, dtype: float32}}\n"
        f"data: {{train: '{work / 'pairs'}'}}\n"
        f"train: {{learning_rate: {size.learning_rate}, pairs_per_step: 8, max_steps: {size.steps}, warmup: 0, seed: {seed}, "
        f"schedule: constant, eval_every: {size.steps}, save_every: {size.steps}}}\n"
        f"output: '{output}'\n"
    )
    train(recipe_from_yaml(text, "benchmark"))
    return output


def updates_of(adapter: Path) -> dict[str, Tensor]:
    """Return ΔW = α/r · B·A of each tensor of the base, float32, read without pe_dpo."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    scaling = config["lora_alpha"] / config["r"]
    return {
        f"{name.removeprefix('base_model.model.')}.weight": scaling
        * tensors[f"{name}.lora_B.weight"].float()
        @ tensors[f"{name}.lora_A.weight"].float()
        for name in names
    }


# ----------------------------------------------------------------------------------------------------------- ways of merging


def our_way(onto: Any, dtype: Any, rounding: Any = "auto") -> Way:
    """Return one of our merges, as `pe-dpo merge` writes it."""

    def make(source: Source, expected: Unmerged, folder: Path) -> list[MergedTensor]:
        plan = Plan(source, onto=onto, dtype=dtype, rounding=rounding)
        return write(plan, folder, expected.base)[0]

    words = "dequantized fp32 + ΔW" if onto == "dequantized" else "original + ΔW"
    return Way(f"ours: {words} → {dtype}" + f", {rounding}" * (rounding != "auto"), onto == "original", make)


def bf16_dequantized(weight: Tensor, quantize: str) -> Tensor:
    """Return what the others add to: quantized, and dequantized to bfloat16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.bfloat16(), quant_type="nf4", compress_statistics=quantize == "nf4")
    return dequantize_4bit(codes, state).bfloat16()


def others_way(title: str, *, start: str, also_embeddings: bool = False) -> Way:
    """Return a merge as others do it in bfloat16.

    Args:
        title: whose.
        start: "bf16" adds to values dequantized to bfloat16, "original" to the base's own.
        also_embeddings: every matrix makes the round trip through 4 bits, those that training never quantized too.
    """

    def make(source: Source, expected: Unmerged, folder: Path) -> list[MergedTensor]:
        updates = updates_of(source.adapter.folder)
        tensors, found = load_file(source.base_folder / "model.safetensors"), []
        for name, weight in tensors.items():
            is_quantized = name.removesuffix(".weight") in expected.base.quantized_layers or (
                also_embeddings and weight.ndim == 2
            )
            if start == "bf16" and is_quantized:
                weight = bf16_dequantized(weight, source.facts.quantize)
            tensors[name] = weight.bfloat16()
            if name in updates:
                tensors[name] = (weight.float() + updates[name]).bfloat16()
                found.append(_kept(name, weight.float(), updates[name], tensors[name].float()))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        copy_support_files(source, folder, dtype=torch.bfloat16, config_changes={})
        return found

    return Way(title, start == "original", make)


def peft_way() -> Way:
    """Return PEFT's own `merge_and_unload` of the 4-bit model, which quantizes again."""

    def make(source: Source, expected: Unmerged, folder: Path) -> tuple[list[MergedTensor], Behaviour]:
        from peft import PeftModel

        model: Any = load_base(source.facts)
        before = {f"{name}.weight": dequantized(layer.weight) for name, layer in four_bit_layers(model)}
        model = PeftModel.from_pretrained(model, str(source.adapter.folder)).merge_and_unload().eval()
        after = {f"{name}.weight": dequantized(layer.weight) for name, layer in four_bit_layers(model)}
        found = [_kept(name, before[name], delta, after[name]) for name, delta in updates_of(source.adapter.folder).items()]
        return found, measure(model, source.pairs)

    return Way("PEFT merge_and_unload: → nf4 again", False, make)


def _kept(name: str, start: Tensor, delta: Tensor, merged: Tensor) -> MergedTensor:
    energy = float(delta.double().square().sum())
    kept = float(((merged - start).double() * delta.double()).sum()) / energy
    return MergedTensor(name, kept, float(delta.norm() / start.norm()), energy, 0.0, "nearest")


DEFAULT = our_way("dequantized", "bf16")
SIXTEEN_BIT = others_way("others: dequantized bf16 + ΔW → bf16", start="bf16")
ONTO_ORIGINAL = others_way("others: original + ΔW → bf16", start="original")
STOCHASTIC = our_way("original", "bf16")
REQUANTIZED = peft_way()
WAYS = (
    DEFAULT,
    our_way("dequantized", "fp16"),
    our_way("dequantized", "fp32"),
    our_way("original", "bf16", "nearest"),
    STOCHASTIC,
    SIXTEEN_BIT,
    others_way("others: the same, embeddings and head through nf4 too", start="bf16", also_embeddings=True),
    ONTO_ORIGINAL,
    REQUANTIZED,
)


# ------------------------------------------------------------------------------------------------------------------- measures


def measure_adapter(work: Path, kind: str, quantize: str, size: str) -> dict[str, Any]:
    """Return what each way does with one adapter that is trained for it."""
    with _quietly(), open_source(trained_adapter(work, kind, quantize, SIZES[size]), pairs=PAIRS) as source:
        found = measure_ways(source, WAYS)
    name = f"{size}, {quantize}, {kind}"
    print(f"  {name}: |ΔW|/|W| {found['relative_size']:.1e}, shift {found['shift_trained']:+.4f}", flush=True)
    return {"base": kind, "quantize": quantize, "size": size, **found}


def measure_ways(source: Source, ways: Iterable[Way]) -> dict[str, Any]:
    """Return what the trained model shifts, and what each way of merging leaves of it.

    Judged against what was trained on the quantized base; `own` is against the adapter on the base that the way adds to, by
    which our merge judges --onto original too.
    """
    ways = tuple(ways)
    expected = Unmerged(source, source.facts, dtype=torch.bfloat16)
    plain = expected
    if any(way.is_onto_original for way in ways):
        plain = Unmerged(source, source.facts._replace(quantize="none"), dtype=torch.bfloat16)
    trained = expected.agreement(expected.trained)
    rows, size = [], 0.0
    for way in ways:
        folder = temporary_folder()
        made = way.make(source, expected, folder)
        tensors, merged = made if isinstance(made, tuple) else (made, None)
        if merged is None:
            merged = measure_served(source, merged=folder)
        shutil.rmtree(folder)
        free()
        own = plain if way.is_onto_original else expected
        against, against_own = expected.agreement(merged), own.agreement(merged)
        size = size or (sum(t.energy for t in tensors) / sum(t.energy / t.relative_size**2 for t in tensors)) ** 0.5
        shares = [tensor.kept for tensor in tensors if tensor.kept is not None]
        rows.append(
            {
                "way": way.title,
                **against._asdict(),
                "relative_kl": against.relative_kl,
                "own_shift": against_own.shift,
                "own_shift_kept": against_own.shift_kept,
                "own_relative_kl": against_own.relative_kl,
                "kept": mean_kept(tensors),
                "kept_tensors": [min(shares), max(shares)],
                "refused": len(tensor_failures(tensors)) + len(own.failures(against_own)),
            }
        )
    return {
        "relative_size": size,
        "shift_trained": trained.shift,
        "kl_reference": trained.kl_reference,
        "accuracy": trained.accuracy,
        "nll": trained.nll,
        "rows": rows,
    }


def curve(work: Path, scales: Iterable[float]) -> list[dict[str, Any]]:
    """Return what is left of the middle adapter of nf4 when it is scaled; one training, the pairs as in the table."""
    found = []
    with _quietly():
        run = trained_adapter(work, "tied", "nf4", SIZES["middle"], seed=1)
        base = load_file(demo.BASE / "model.safetensors")
        updates = updates_of(run)
        own = (sum(d.square().sum() for d in updates.values()) / sum(base[n].float().square().sum() for n in updates)) ** 0.5
    for scale in scales:
        folder = work / f"scaled-{scale:g}"
        folder.mkdir()
        tensors = load_file(run / "adapter_model.safetensors")
        scaled = {name: t * (scale / float(own)) if "lora_B" in name else t for name, t in tensors.items()}
        save_file(scaled, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        for name in ("adapter_config.json", "base.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(run / name, folder)
        with _quietly(), open_source(folder, data=str(work / "pairs" / "test.jsonl"), pairs=PAIRS) as source:
            ways = measure_ways(source, (DEFAULT, STOCHASTIC, SIXTEEN_BIT, ONTO_ORIGINAL, REQUANTIZED))
        found.append({"scale": scale, **ways})
        print(f"  |ΔW|/|W| {scale:.0e}: " + ", ".join(f"{row['kept']:.3f}" for row in ways["rows"]), flush=True)
    return found


# ---------------------------------------------------------------------------------------------------------------------- table


def markdown_table(adapters: Iterable[dict[str, Any]]) -> str:
    """Return what was measured of each adapter and each way, as markdown."""
    lines = [
        "| adapter, ΔW/W | way | KL | relative | shift | kept | own base | top-1 | ΔW kept | accuracy | NLL | refused |",
        "|" + "---|" * 12,
    ]
    for found in adapters:
        head = f"{found['size']}, {found['quantize']}, {found['base']}, {found['relative_size']:.1e}"
        lines.append(
            f"| **{head}** | trained, unmerged | 0 | 0 | {found['shift_trained']:+.4f} | 1 | | 1 | | "
            f"{found['accuracy']:.3f} | {found['nll']:.4f} | |"
        )
        for row in found["rows"]:
            lines.append(
                f"| | {row['way']} | {row['kl']:.1e} | {row['relative_kl']:.1e} | {row['shift']:+.4f} | "
                f"{row['shift_kept']:.3f} | {row['own_shift_kept']:.3f} | {row['top1']:.4f} | {row['kept']:.3f} | "
                f"{row['accuracy']:.3f} | {row['nll']:.4f} | {'yes' if row['refused'] else 'no'} |"
            )
    return "\n".join(lines)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what libraries print while models load out of the output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        yield
