"""The table of engines as Markdown, from the results, and its place in the docs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.engines.measure import CASES
from benchmarks.results import load

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
START, END = "<!-- engines -->\n", "\n<!-- end -->"
HEADER = ("engine", "artefact", "largest difference, nats", "may be", "tokens", "chats", "prompts", "remark")
NAMES = {
    "xllamacpp": "llama.cpp (xllamacpp)",
    "vllm": "vLLM",
    "transformers4": "transformers 4",
    "transformers_serve": "`transformers serve`",
    "ctranslate2": "CTranslate2",
    "mistralrs": "mistral.rs",
    "go_template": "Go's text/template",
}
ARTEFACTS = {
    "merged": "merged, dequantized",
    "merged-original": "merged, original",
    "merged-unscaled": "merged, positions not scaled",
    "adapter": "adapter package of nf4",
    "adapter-none": "adapter package",
    "run-none": "run folder",
    "gguf-f32": "GGUF f32",
    "gguf-f16": "GGUF f16",
    "gguf-q8_0": "GGUF q8_0",
    "gguf-lora": "GGUF LoRA of nf4",
    "gguf-lora-none": "GGUF LoRA",
}


def engines_table(path: Path) -> str:
    """Return the table, a row for each engine and artefact; an engine that is not installed is a row that says so."""
    engines, lines = load(path)["engines"], [HEADER, ("---",) * len(HEADER)]
    for name in CASES:
        rows = engines.get(name, {}).get("rows", [])
        lines += [_cells(NAMES[name], row) for row in rows]
        if not rows:
            lines.append((NAMES[name], *[""] * (len(HEADER) - 2), "not installed"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def put_table(page: Path, table: str) -> None:
    """Write the table between its marks on a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    page.write_text(f"{before}{START}{table}{END}{rest.partition(END)[2]}", encoding="utf-8")


def artefact_name(row: Mapping[str, Any]) -> str:
    """Return what was given to the engine, and how."""
    name = ARTEFACTS.get(row["artefact"], row["artefact"])
    if not row["as_in"]:
        return name
    return str(row["as_in"]) if row["artefact"] == "base" else f"{name}, {row['as_in']}"


def _cells(engine: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    artefact = artefact_name(row)
    if "failed" in row:
        return (engine, artefact, "", "", "", "", "", row["failed"])
    difference = f"{row['difference']:.1e}" if "difference" in row else "–"
    bound = f"{row['bound']:g}" if "difference" in row and not row["known"] else "–"
    counts = [f"{row[part][0]} of {row[part][1]}" if part in row else "–" for part in ("tokens", "chats", "prompts")]
    near = row.get("near_ties", 0)
    remarks = [row["known"], f"{near} left at a near-tie" if near else "", *row["broken"]]
    return (f"{engine} {row['version']}", artefact, difference, bound, *counts, "; ".join(filter(None, remarks)))
