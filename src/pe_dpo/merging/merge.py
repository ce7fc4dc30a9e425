"""`merge`: adapter and base become one model on disk, and nothing appears there that was not shown to be what was trained.

source     adapter whole? its tokenizer, its base's files; pairs to verify on        no weights read
served     the adapter as it was trained, or on top of another one, or scaled toward the reference
plan       every tensor of the adapter has its place
trained    base loaded as in training, tensor by tensor the one of training; reference and trained model measured
stream     files → files, tensor by tensor; share of ΔW kept
verify     merged model loaded from disk again; relative KL, shift kept
staging    renamed to OUT only if all of this is in its band
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pe_dpo.data.encoding import Progress
from pe_dpo.errors import MergeRefused, ModelError
from pe_dpo.merging.card import merged_card
from pe_dpo.merging.carry import base_licence, carry
from pe_dpo.merging.checks import Onto, check_base_files, check_every_tensor, check_place, check_space
from pe_dpo.merging.plan import Plan, own_dtype, plan_merge
from pe_dpo.merging.served import as_served, check_scale, scale_words
from pe_dpo.merging.source import Source, open_source
from pe_dpo.merging.stream import BaseAsTrained, MergedTensor, Rounding, write_merged
from pe_dpo.merging.verdict import Verdict, base_as_trained, judge, merge_report, truth
from pe_dpo.model.base import BaseFacts
from pe_dpo.model.fingerprint import file_fingerprints
from pe_dpo.model.tensor_files import TensorWriter
from pe_dpo.runs.staging import check_free, staged

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPORT_FILE = "merge_report.json"


class MergeResult(NamedTuple):
    """A merge that was written."""

    folder: Path
    verdict: Verdict
    report: dict[str, Any]
    """As in merge_report.json."""


def merge(
    target: str | Path,
    output: str | Path,
    *,
    onto: Onto = "dequantized",
    dtype: Dtype = "auto",
    rounding: Rounding = "auto",
    seed: int = 0,
    data: str | None = None,
    pairs: int = 32,
    base: str | None = None,
    quantize: str | None = None,
    sft: str | Path | None = None,
    scale: float = 1.0,
    allow_base_mismatch: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> MergeResult:
    """Merge an adapter into its base, verify it, and return what was found; `output` loads in transformers and vLLM.

    Args:
        target: a finished run, or any LoRA adapter.
        output: a folder that must not exist, or be empty.
        onto: "dequantized" adds to the values of the 4-bit codes that were trained on, "original" to the base's own weights,
            whose quantization error was never part of training.
        dtype: of the merged weights; "auto" is that of the base.
        rounding: "auto" is to nearest, and stochastic for a tensor on the 16-bit grid that would lose more than 5 % of ΔW.
        seed: of stochastic rounding.
        data: pairs to verify on; by default those that the run held out.
        pairs: how many; 0 verifies tensors only, and loads no model.
        base: where the base lies now, if not where it was.
        quantize: of an adapter that was not trained here, how its base was loaded in training.
        sft: an adapter that was active under this one in training; both are merged.
        scale: a; serves W_ref + a·(W − W_ref) instead of the trained W, and verifies that; 1 is what was trained.
        allow_base_mismatch: go on where the base is not bit for bit the one of training.
        force: write a merge that failed verification, with the report that says so.
        say: gets lines of facts.
        progress: called with what is done, how much, and of how much.

    Raises:
        UsageError: `output` is taken, the scale is not above 0, or something only the user knows is missing.
        ModelError: base or adapter are not those of training or not whole, or cannot be merged; or the disk is full.
        MergeRefused: the merged model is not what was trained; nothing was written.
    """
    output = Path(output)
    check_free(output)
    check_place(output, Path(target))
    check_scale(scale)
    source = open_source(Path(target), data=data, pairs=pairs, base=base, quantize=quantize, say=say, progress=progress)
    with as_served(source, sft=sft, scale=scale, say=say) as source:
        served = served_dtype(source.facts, dtype)
        plan = plan_merge(source.files, source.adapter, source.facts, dtype=served)
        check_base_files(source, onto, allow_base_mismatch, say)
        check_every_tensor(source, plan, allow_base_mismatch)
        check_space(output, plan)
        with staged(output) as folder:
            trained = truth(source, onto, served, allow_base_mismatch, say)
            tensors, hashes = write_model(
                source, plan, folder, base_as_trained(source, onto, trained, allow_base_mismatch),
                onto=onto, dtype=served, rounding=rounding, seed=seed, progress=progress,
            )  # fmt: skip
            verdict = judge(source, folder, tensors, trained)
            if verdict.faults and not force:
                wanted = "what was trained" + (f", {scale_words(source.scale)}" if source.scale != 1 else "")
                head = f"{output}: was not written: the merge is not {wanted}:"
                raise MergeRefused("\n  ".join([head, *verdict.faults]))
            report = merge_report(source, verdict, onto=onto, dtype=served, rounding=rounding, seed=seed, files=hashes)
            text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
            (folder / REPORT_FILE).write_text(text, encoding="utf-8")
            card = merged_card(source, report, licence=base_licence(source.base_folder))
            (folder / "README.md").write_text(card, encoding="utf-8")
    return MergeResult(output, verdict, report)


def served_dtype(facts: BaseFacts, dtype: Dtype) -> torch.dtype:
    """Return the dtype to write; "auto" is the one that the base comes in."""
    if dtype != "auto":
        return DTYPES[dtype]
    own = own_dtype(facts.config)
    return own if own is not None and own in DTYPES.values() else torch.bfloat16


def write_model(
    source: Source,
    plan: Plan,
    folder: Path,
    base: BaseAsTrained,
    *,
    onto: Onto,
    dtype: torch.dtype,
    rounding: Rounding,
    seed: int,
    progress: Progress,
) -> tuple[list[MergedTensor], dict[str, str]]:
    """Write the merged weights and all that belongs to them; return what became of each tensor, and sha256 of each file.

    Raises:
        ModelError: see `write_merged`; or a file does not read back as it was written.
    """
    with TensorWriter(folder, [output.facts for output in plan.outputs]) as writer:
        tensors = write_merged(
            plan.outputs, source.files, source.adapter, writer, base,
            onto=onto, rounding=rounding, seed=seed, progress=partial(progress, "merging"),
        )  # fmt: skip
    read_back = file_fingerprints(folder, writer.hashes)
    torn = [name for name, value in writer.hashes.items() if read_back[name] != value]
    if torn:
        raise ModelError(f"{torn[0]}: does not read back from disk as it was written; look at the disk")
    carry(source, folder, dtype=dtype, config_changes=plan.config_changes)
    return tensors, writer.hashes
