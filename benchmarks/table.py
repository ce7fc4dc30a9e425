"""The tables of speed, of merging and of mixout, from the results that lie in `results/`; tests hold README and pages to them.

docs/speed.md has a table of each command between two marks; the README the short one.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ours import FULL_STACK
from pe_dpo.recipe import find_recipe

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
SHAPES = {
    "hh": "HH: long prompts, short answers",
    "uf": "UltraFeedback's lengths",
    "uf-graph": "the same, four answers to a prompt",
    "polite": "short instructions and answers",
    "near": "answers that differ by a few tokens",
    "long": "answers of 1,000 tokens",
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "nf4": "nf4"}
CASES = ("train-8", "train-64", "train-500", "sweep")
IN_README = (("hh", "nf4"), ("uf", "fp32"), ("uf-graph", "fp32"), ("long", "fp32"))
COMMANDS_IN_README = ("train-64", "sweep")
RECIPES_IN_README = ("qwen3-0.6b-dpo", "qwen3-4b-dpo", "llama-3.1-8b-simpo", "gemma-2-9b-simpo")


def table() -> str:
    """Return the README's table as markdown: times as fast, median (smallest–largest) of the ratios within rounds."""
    lines = ["| | × TRL default | × TRL best |", "|---|---|---|"]
    rows = _load("steps")["rows"]
    for shape, dtype in IN_README:
        if f"{shape} {dtype}" not in rows:
            continue
        found = rows[f"{shape} {dtype}"]["ratios"]
        for words in ("stored", "in step"):
            over = [_spread(found[f"ours, {words} over TRL {peer}"]) for peer in ("default", "best")]
            lines.append(f"| step, {SHAPES[shape]}, {DTYPES[dtype]}, reference {words} | {over[0]} | {over[1]} |")
    for name in COMMANDS_IN_README:
        found = _load(f"commands-{name}")
        over = [_spread(found["ratios"][f"ours over TRL {peer}"]) for peer in ("default", "best")]
        lines.append(f"| {found['title']} | {over[0]} | {over[1]} |")
    peaks = _load("step-hh-fp32-m8k")
    shares = [peaks["peak_mib"][FULL_STACK] / peaks["peak_mib"][peaks[key]] for key in ("trl_default", "trl_best")]
    lines.append(f"| peak memory of the HH step beyond the model, as a share | {shares[0]:.2f} | {shares[1]:.2f} |")
    return "\n".join(lines)


def sizes_table() -> str:
    """Return what the headers of some shipped recipes say, which `tools/recipe_headers.py` writes from their estimates."""
    lines = ["| recipe | the smallest usual card | at least | hours on an RTX 4090 |", "|---|---|---|---|"]
    for name in RECIPES_IN_README:
        header = find_recipe(name).read_text(encoding="utf-8").splitlines()[0]
        card, kind, needed, hours = re.findall(r"One (\d+ GB) GPU; ([^,]+), ([\d.]+ GB) at least; (.*) on an RTX", header)[0]
        lines.append(f"| `{name}`, {kind} | {card} | {needed} | {hours} |")
    return "\n".join(lines)


def measured_cases() -> list[str]:
    """Return the cases of `commands` that have results."""
    return [name for name in CASES if (RESULTS / f"commands-{name}.json").is_file()]


def write_page() -> None:
    """Put every table into docs/speed.md, between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in page_tables().items():
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"{PAGE.name}: no {start.strip()}")
        text = before + start + made + end + rest[rest.index("<!-- end -->") + len("<!-- end -->") :]
    PAGE.write_text(text, encoding="utf-8")


def page_tables() -> dict[str, str]:
    """Return the tables of docs/speed.md by the names of their marks."""
    made = {
        "commands": commands_table,
        "steps": steps_table,
        "starts": starts_table,
        "data": data_table,
        "threads": threads_table,
    }
    whole = {"starts", "data", "threads"}
    return {name: one() for name, one in made.items() if name not in whole or (RESULTS / f"{name}.json").is_file()}


def commands_table() -> str:
    """Return whole commands, TRL's processes and ours, before and after."""
    lines = [
        "| | CPU s: TRL default, best | ours before → after | × TRL default: before → after | × TRL best: before → after | "
        "peak MiB: TRL default, best, ours before → after |",
        "|---|---|---|---|---|---|",
    ]
    for name in measured_cases():
        found = _load(f"commands-{name}")
        old = next(side for side in found["cpu_seconds"] if side.startswith("ours before"))
        sides = ("TRL default", "TRL best", old, "ours")
        seconds = [f"{statistics.median(found['cpu_seconds'][side]):.0f}" for side in sides]
        peaks = [f"{max(found['peak_mib'][side]):.0f}" for side in sides]
        over = [
            " → ".join(_spread(found["ratios"][f"{side} over TRL {peer}"]) for side in (old, "ours"))
            for peer in ("default", "best")
        ]
        lines.append(
            f"| {found['title']} | {seconds[0]}, {seconds[1]} | {seconds[2]} → {seconds[3]} | {over[0]} | {over[1]} | "
            f"{peaks[0]}, {peaks[1]}, {peaks[2]} → {peaks[3]} |"
        )
    return "\n".join(lines)


def steps_table() -> str:
    """Return the steps on every shape in every dtype."""
    lines = [
        "| | CPU s: TRL default, best | stored: before → after | in step: before → after | stored × TRL default, best | "
        "in step × TRL default, best |",
        "|---|---|---|---|---|---|",
    ]
    rows = _load("steps")["rows"]
    for shape, title in SHAPES.items():
        for dtype, spelt in DTYPES.items():
            if f"{shape} {dtype}" not in rows:
                continue
            row = rows[f"{shape} {dtype}"]
            middle = {name: f"{statistics.median(values):.2f}" for name, values in row["cpu_seconds"].items()}
            over = [
                ", ".join(_spread(row["ratios"][f"ours, {words} over TRL {peer}"]) for peer in ("default", "best"))
                for words in ("stored", "in step")
            ]
            both = [f"{middle[f'before, {words}']} → {middle[f'ours, {words}']}" for words in ("stored", "in step")]
            lines.append(
                f"| {title}, {spelt} | {middle[row['trl_default']]}, {middle[row['trl_best']]} | {both[0]} | {both[1]} | "
                f"{over[0]} | {over[1]} |"
            )
    return "\n".join(lines)


def starts_table() -> str:
    """Return what every command takes on a run of a few steps."""
    lines = ["| | CPU s before → after | peak MiB before → after |", "|---|---|---|"]
    for command, sides in _load("starts")["commands"].items():
        seconds = [f"{statistics.median(run['cpu_seconds'] for run in sides[side]):.1f}" for side in ("before", "after")]
        peaks = [f"{max(run['peak_mib'] for run in sides[side]):.0f}" for side in ("before", "after")]
        lines.append(f"| `pe-dpo {command}` | {' → '.join(seconds)} | {' → '.join(peaks)} |")
    return "\n".join(lines)


def data_table() -> str:
    """Return what preparing pairs takes."""
    columns = ("before", "first"), ("after", "first"), ("after", "again")
    lines = ["| pairs | before: s (CPU s), MiB | after, the first time | after, found again |", "|---|---|---|---|"]
    for size, sides in _load("data")["sizes"].items():
        cells = [_prepared(sides.get(side, {}).get(turn)) for side, turn in columns]
        lines.append(f"| {int(size):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _prepared(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "not run"
    return f"{found['wall_seconds']:.1f} ({found['cpu_seconds']:.1f}), {found['peak_mib']:.0f}"


def threads_table() -> str:
    """Return the wall time of a step on two threads."""
    found = _load("threads")["beside"]
    lines = [
        "| wall s of a step | " + " | ".join(f"beside {busy} busy" if int(busy) else "idle cores" for busy in found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for variant in next(iter(found.values())):
        cells = []
        for rows in found.values():
            values = [seconds for run in rows[variant] for seconds in run["wall_seconds"]]
            cells.append(_spread([statistics.median(values), min(values), max(values)]))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _spread(values: Sequence[float]) -> str:
    """Median (smallest–largest), or one number where there was one round."""
    median, low, high = values
    return f"{median:.2f}" if low == high else f"{median:.2f} ({low:.2f}–{high:.2f})"


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
