"""A folder with a GGUF file, an Ollama Modelfile and golden prompts, named only once the file read back is the model."""

import shutil
from collections import Counter
from pathlib import Path

from pe_dpo.errors import ModelError
from pe_dpo.export.gguf_file import GgufFacts, Kind, load_gguf, write_gguf
from pe_dpo.export.golden import (
    QUESTIONS,
    answer_log_probs,
    as_served_by,
    check_golden,
    golden_prompts,
    load_golden,
    mean_divergence,
    read_prompts,
    token_ids,
    with_measured_near_tie,
)
from pe_dpo.export.golden_file import save_golden
from pe_dpo.export.ollama import modelfile
from pe_dpo.inference.policy import Policy
from pe_dpo.model.base import answer_end_tokens, inspect_base, load_base, load_tokenizer
from pe_dpo.runs.serving import MERGE_FILE
from pe_dpo.runs.staging import staged

LOSSLESS = 1e-6
"""Mean KL, in nats, that rounding of float32 sums in another order may leave; measured: 0."""
GOLDEN_FILE = "golden_prompts.jsonl"


def export_gguf(
    model: Path, output: Path, *, kind: Kind, prompts: Path | None, is_checked: bool, has_card: bool
) -> tuple[GgufFacts, str, list[str]]:
    """Write everything into a hidden folder beside the wanted one, check it there, and give it its name.

    Args:
        model: a whole model on disk.
        output: a new or empty folder.
        kind: of numbers in the file.
        prompts: a file of prompts or pairs for the golden prompts; None for five short questions.
        is_checked: whether the file is read back and compared, in 4 bytes of memory a parameter.
        has_card: whether the model's README.md goes along, with what is to be known of the file.

    Returns:
        What was written, the verdict of the check as a sentence, and what else is to be known.

    Raises:
        ModelError: the file read back is not the model, or something cannot be written; nothing is left then.
        UsageError: the output is taken, or the model cannot be written as GGUF.
    """
    from transformers import AutoTokenizer

    with staged(output) as folder:
        facts = write_gguf(model, folder / f"{output.absolute().name}.gguf", kind=kind)
        remarks = list(facts.remarks)
        text, told = modelfile(model, facts.path.name)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        remarks += told
        verdict = _check(model, facts, prompts, is_checked=is_checked)
        # Transformers, reading the tokenizer back, does not know all that llama.cpp does.
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=facts.path.name, trust_remote_code=False)
        golden = load_golden(folder / GOLDEN_FILE)
        other = sum(token_ids(tokenizer, one.rendered) != one.prompt_ids for one in golden)
        if other:
            remarks.append(
                f"transformers reads other token ids for {other} golden prompts; compare with the server's /tokenize"
            )
        if (model / MERGE_FILE).is_file():  # of which adapter it is
            shutil.copyfile(model / MERGE_FILE, folder / MERGE_FILE)
        if has_card:
            said = "\n".join([f"`{facts.path.name}`, {facts.kind}: {verdict}.", "", *(f"- {remark}" for remark in remarks)])
            card = (model / "README.md").read_text(encoding="utf-8").rstrip()
            (folder / "README.md").write_text(f"{card}\n\n## The GGUF file\n\n{said.rstrip()}\n", encoding="utf-8")
    return facts, verdict, remarks


def _check(model: Path, facts: GgufFacts, prompts: Path | None, *, is_checked: bool) -> str:
    """Write golden prompts, read the GGUF file back, compare, and return the verdict as a sentence.

    In float32, in which a lossless file must be equal and a 16-bit one but for near-ties; others are measured. The model is let
    go before its copy is loaded, so that memory holds one of them. Without the check the golden prompts come from the model in
    bfloat16.
    """
    tokenizer, file = load_tokenizer(str(model)), facts.path.parent / GOLDEN_FILE
    info = inspect_base(str(model), quantize="none", dtype="float32" if is_checked else "bfloat16")
    original = load_base(info).eval()
    policy = Policy(original, tokenizer, info, answer_end_tokens(tokenizer, str(model)))
    golden = golden_prompts(policy, QUESTIONS if prompts is None else read_prompts(prompts))
    if not is_checked:
        save_golden(golden, file)
        return f"not read back; {len(golden)} golden prompts of the model in bfloat16"
    expected = list(answer_log_probs(original, golden))
    golden = with_measured_near_tie(original, golden)
    save_golden(golden, file)
    del original, policy
    copy = load_gguf(facts.path, model)
    divergence = mean_divergence(copy, expected, golden)
    found = check_golden(copy, tokenizer, file, near_tie=0.0 if facts.is_lossless else None)
    counts = Counter(one.verdict for one in found)
    measured = f"read back: mean KL {divergence:.2g} nats on {len(golden)} golden prompts"
    if facts.kind in ("q8_0", "q4_0"):
        # A server is measured against these numbers, not those of the model; llama.cpp rounds what flows through to 8 bits.
        served = as_served_by(copy, golden)
        save_golden([one._replace(near_tie=round(1.5 * one.near_tie, 3)) for one in served], file)
        return f"{measured}, {counts['equal']} answers the same"
    if counts["other"] or (facts.is_lossless and divergence > LOSSLESS):
        wrong = "; ".join(
            f"{one.prompt!r}: {two.why}" for one, two in zip(golden, found, strict=True) if two.verdict == "other"
        )
        raise ModelError(f"the GGUF file is not the model; {measured}; {wrong}; nothing was written")
    tied = f", {counts['near tie']} answers left at a near tie" if counts["near tie"] else ""
    return f"{measured}, {sum(one.compared for one in found)} tokens the same{tied}"
