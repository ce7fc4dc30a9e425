"""Which engine is given which artefact, how far its answer may be from transformers' in float32, and how far it is.

A bound is in nats of a log-prob. A greedy token may be another one where it leads by less than twice the bound, since two
log-probs may each be off by it.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engines.artefacts import Get, whole_model
from benchmarks.engines.compare import equal, greedy_faults, largest_difference, unequal

EXACT = 1e-4
"""Of float32 arithmetic in another order."""
SIXTEEN_BITS = 5e-2
"""Of 16-bit caches and products."""
BFLOAT16 = 0.3
"""Of a model that computes in bfloat16."""
EIGHT_BITS = 0.5
"""Of what flows through a layer in 8 bits, as llama.cpp and mistral.rs compute with q8_0; on weights this random."""

MERGED = ("merged", "merged-original")
GGUF = ("gguf-f32", "gguf-f16", "gguf-q8_0")


class Case(NamedTuple):
    """An artefact as an engine is given it."""

    artefact: str
    bound: float = EXACT
    options: Mapping[str, Any] = {}
    """Of the request; names of artefacts become paths, and `command` the words that a package prints."""
    as_in: str = ""
    """How the engine is set, in words, if not exact and alone."""
    known: str = ""
    """What is wrong with the engine here, in words; it is measured, and has no bound."""


CASES: dict[str, tuple[Case, ...]] = {
    "xllamacpp": (
        Case("gguf-f32"),
        Case("gguf-f32", SIXTEEN_BITS, {"cache": "f16", "flash": True}, "its own cache and attention"),
        Case("gguf-f16", SIXTEEN_BITS),
        Case("gguf-q8_0", EIGHT_BITS),
        Case("gguf-lora", options={"lora": "gguf-lora/lora.gguf"}),
        Case("gguf-lora-none", options={"lora": "gguf-lora-none/lora.gguf"}),
    ),
    "vllm": (
        *(Case(name) for name in MERGED),
        Case("base", options={"lora": "adapter-none"}, as_in="adapter package"),
        Case("base", options={"lora": "run-none"}, as_in="run folder"),
        Case("adapter", BFLOAT16, {"command": "adapter"}, "by its printed command"),
    ),
    "transformers4": (
        *(Case(name) for name in MERGED),
        Case("adapter-none", options={"base": "base"}),
        Case("run-none", options={"base": "base"}),
    ),
    "transformers_serve": tuple(Case(name) for name in MERGED),
    "ctranslate2": (
        Case("merged-unscaled"),
        Case("merged", known="its converter leaves out the factor of Llama 3's scaled positions"),
    ),
    "mistralrs": (
        *(Case(name, SIXTEEN_BITS) for name in MERGED),
        Case("adapter-none", SIXTEEN_BITS, {"base": "base"}),
        Case("gguf-f32", SIXTEEN_BITS),
        Case("gguf-f16", SIXTEEN_BITS),
        Case("gguf-q8_0", EIGHT_BITS),
    ),
    "go_template": (Case("gguf-f32", options={"family": "llama"}, as_in="Modelfile"),),
}
"""By engine; what an engine is not given here, it does not read."""


def reference_of(case: Case) -> str:
    """Return the artefact that says what the engine must answer."""
    served = case.options.get("lora") or case.artefact
    return whole_model(str(served).split("/")[0])


def request_for(case: Case, request: Mapping[str, Any], get: Get) -> dict[str, Any]:
    """Return a request with the options of a case, in which names of artefacts are paths."""
    options = dict(case.options)
    for key in ("lora", "base"):
        if key in options:
            name, _, file = options[key].partition("/")
            options[key] = str(get(name) / file)
    if "command" in options:
        package = get(options["command"])
        facts = json.loads((package / "base.json").read_text(encoding="utf-8"))
        (command,) = [one["command"] for one in facts["serving"] if one["engine"] == "vllm"]
        words = [str(get("base")) if word == facts["id"] else word for word in shlex.split(command)]
        options["command"] = [word.replace("FOLDER", str(package)) for word in words]
    return {**request, "options": {**request.get("options", {}), **options}}


def file_of(engine: str, folder: Path) -> Path:
    """Return what of an artefact's folder an engine is given: a Modelfile, a GGUF file, or the folder."""
    if engine == "go_template":
        return folder / "Modelfile"
    return next((path for path in sorted(folder.glob("*.gguf")) if path.name != "lora.gguf"), folder)


def measure(case: Case, answer: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far an answer is from the expected one, part by part, and which bounds it breaks.

    Returns:
        `difference` in nats, `tokens`, `chats` and `prompts` as [equal, all], as far as the engine answers them;
        `near_ties`: prompts that are left at one; `broken`: in words, empty where the engine is right.
    """
    found: dict[str, Any] = {}
    broken, near_tie = [], 2 * case.bound
    if "logprobs" in answer:
        found["difference"] = largest_difference(answer, expected)
        if not found["difference"] < case.bound:
            broken.append(f"{found['difference']:.2g} nats")
    for part, name in (("tokens", "tokens"), ("rendered", "chats"), ("greedy", "prompts"), ("greedy_texts", "prompts")):
        if part in answer:
            found[name] = [equal(answer, expected, part), len(expected[part])]
    if "chat_lengths" in answer and "rendered" not in answer:
        part = "chat_greedy" if "chat_greedy" in answer else "chat_texts"
        wrong = {*unequal(answer, expected, "chat_lengths"), *_wrong(answer, expected, part, near_tie)}
        found["chats"] = [len(expected[part]) - len(wrong), len(expected[part])]
    if "greedy" in answer:
        faults = greedy_faults(answer, expected, near_tie=near_tie)
        found["near_ties"] = len(unequal(answer, expected, "greedy")) - len(faults)
    for name in ("tokens", "chats", "prompts"):
        if name in found and sum(found[name][:1]) + (found.get("near_ties", 0) if name == "prompts" else 0) != found[name][1]:
            broken.append(f"{name} {found[name][0]} of {found[name][1]}")
    return {**found, "broken": [] if case.known else broken}


def _wrong(answer: Mapping[str, Any], expected: Mapping[str, Any], part: str, near_tie: float) -> list[int]:
    """Numbers of the chats that are gone on with otherwise."""
    if part == "chat_texts":
        return unequal(answer, expected, part)
    return greedy_faults(answer, expected, part, near_tie=near_tie)


def expected_of(name: str, request: Mapping[str, Any], get: Get) -> dict[str, Any]:
    """Return what transformers answers for a whole model: its folder, or the numbers that lie in a GGUF file."""
    from benchmarks.engines.compare import expected_answer

    if not name.startswith("gguf"):
        return expected_answer(get(name), request)
    from pe_dpo.export.gguf_file import load_gguf

    loaded: Callable[..., Any] = load_gguf
    return expected_answer(get("merged"), request, network=loaded(file_of("", get(name)), get("merged")))
