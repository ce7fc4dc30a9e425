"""The READMEs' tables of speed, of merging and of mixout, from the results that lie in `results/`; a test holds them to it."""

import json
from pathlib import Path
from typing import Any

from benchmarks.ours import FULL_STACK, IN_STEP

RESULTS = Path(__file__).parent / "results"
STEPS = (
    ("HH-shaped, float32, reference stored", "step-hh-fp32-m8k", FULL_STACK),
    ("HH-shaped, float32, reference in the step", "step-hh-fp32-m8k", IN_STEP),
    ("HH-shaped, bfloat16, reference stored", "step-hh-bf16-m8k", FULL_STACK),
    ("HH-shaped, nf4, ours stored, TRL's in the step (not like for like)", "step-hh-nf4-m8k", FULL_STACK),
    ("HH-shaped, nf4, reference in the step", "step-hh-nf4-m8k", IN_STEP),
    ("UltraFeedback-shaped, float32, reference stored", "step-uf-fp32-m8k", FULL_STACK),
)


def table() -> str:
    """Return the table as markdown: times as fast, median (smallest–largest) of the ratios within rounds."""
    lines = ["| | × TRL default | × TRL best of its grid |", "|---|---|---|"]
    for title, file, rung in STEPS:
        if not (RESULTS / f"{file}.json").is_file():
            continue
        found = _load(file)["ratios"][rung]
        lines.append(f"| step, {title} | {_spread(found['over_trl_default'])} | {_spread(found['over_trl_best'])} |")
    run = _load("run-hh-fp32-m8k")["ratios"]
    for name, title in (("1 epochs", "one epoch, the reference inside"), ("3 epochs", "three epochs")):
        over = [_spread(run[name][f"ours over {peer}"]) for peer in ("TRL default", "TRL best")]
        lines.append(f"| plain loop of {title}, HH, float32 | {over[0]} | {over[1]} |")
    sweep = _load("sweep-hh-fp32-m8k")["over_ours"]
    words = f"plain loop over {len(_load('sweep-hh-fp32-m8k')['values'])} values × three epochs, HH, float32 (one pass)"
    lines.append(f"| {words} | {sweep['TRL default']:.2f} | {sweep['TRL best']:.2f} |")
    peaks = _load("step-hh-fp32-m8k")
    shares = [peaks["peak_mib"][FULL_STACK] / peaks["peak_mib"][peaks[key]] for key in ("trl_default", "trl_best")]
    lines.append(f"| peak memory of the HH step beyond the model, as a share | {shares[0]:.2f} | {shares[1]:.2f} |")
    return "\n".join(lines)


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _spread(values: list[float]) -> str:
    median, low, high = values
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


MERGE_ROWS = (
    ("`pe-dpo merge`: dequantized in float32 + ΔW, rounded to bfloat16 once", "ours: dequantized fp32 + ΔW → bf16"),
    ("`--dtype fp16`", "ours: dequantized fp32 + ΔW → fp16"),
    ("`--onto original`, bfloat16, against the adapter on its own base", "ours: original + ΔW → bf16"),
    ("elsewhere: dequantized to bfloat16 + ΔW → bfloat16", "others: dequantized bf16 + ΔW → bf16"),
    ("elsewhere: original + ΔW → bfloat16, against its own base", "others: original + ΔW → bf16"),
    ("PEFT: merged into the 4-bit model, quantized again", "PEFT merge_and_unload: → nf4 again"),
)


def merge_table() -> str:
    """Return what ways of merging keep of a small, a middle and a large adapter, as markdown."""
    found = {one["size"]: one for one in _load("merge")["table"] if (one["base"], one["quantize"]) == ("tied", "nf4")}
    sizes = ("small", "middle", "large")
    head = " | ".join(f"{found[size]['relative_size']:.0e}: shift {found[size]['shift_trained']:+.4f}" for size in sizes)
    lines = [f"| kept of the update / of the preference shift, at ΔW/W of | {head} |", "|---|---|---|---|"]
    for words, way in MERGE_ROWS:
        rows = [next(row for row in found[size]["rows"] if row["way"] == way) for size in sizes]
        lines.append(f"| {words} | " + " | ".join(f"{row['kept']:.2f} / {row['own_shift_kept']:.2f}" for row in rows) + " |")
    return "\n".join(lines)


def mixout_table() -> str:
    """Return the tables of what mixout costs in time and memory, as markdown."""
    from benchmarks.mixout_cost import cost_lines, memory_lines

    found = _load("mixout")
    return cost_lines(found["layers"] + found["steps"]) + "\n\n" + memory_lines(found["memory"])
