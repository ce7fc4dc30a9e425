"""`merge`: adapter and base become one model on disk, and nothing appears there that was not shown to be what was trained.

source     adapter whole? its tokenizer, its base's files; pairs to verify on        no weights read
           the adapter as it was trained, or fused with another one, or scaled toward the reference
plan       every tensor of the adapter has its place
unmerged   base loaded as in training, tensor by tensor the one of training; reference and trained model measured
write      files → files, tensor by tensor; share of ΔW kept
verdict    merged model loaded from disk again; relative KL, shift kept
staging    renamed to OUT only if all of this is in its band
"""

from pathlib import Path

from pe_dpo.disk import write_json
from pe_dpo.errors import MergeRefused, UsageError
from pe_dpo.merging.card import merged_card
from pe_dpo.merging.memory import say_memory
from pe_dpo.merging.plan import Dtype, Onto, Plan, Rounding
from pe_dpo.merging.source import describe_scale, open_source
from pe_dpo.merging.unmerged import Unmerged
from pe_dpo.merging.verify import Verdict
from pe_dpo.merging.write import write
from pe_dpo.runs.staging import check_free, staged

REPORT_FILE = "merge_report.json"


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
    best: bool = False,
    force: bool = False,
) -> Verdict:
    """Merge an adapter into its base, verify it, and return what was found; `output` loads in transformers and vLLM.

    Args:
        target: a finished run, or any LoRA adapter.
        output: a folder that must not exist, or be empty.
        onto: "dequantized" adds to the values of the 4-bit codes that were trained on, "original" to the base's own weights,
            whose quantization error was never part of training.
        dtype: of the merged weights; "auto" is that of the base.
        rounding: "auto" is to nearest, and stochastic for a tensor on the 16-bit grid that would lose more than 1 % of ΔW.
        seed: of stochastic rounding; with a tensor's name it determines every bit.
        data: pairs to verify on; by default those that the run held out.
        pairs: how many; 0 verifies tensors only, and loads no model.
        base: where the base lies now, if not where it was.
        quantize: of an adapter that was not trained here, how its base was loaded in training.
        sft: an adapter that was active under this one in training; both are merged.
        scale: a; serves W_ref + a·(W − W_ref) instead of the trained W, and verifies that; 1 is what was trained.
        allow_base_mismatch: go on where the base is not bit for bit the one of training.
        best: of a run, merge the adapter of its best evaluation, see `train.keep_best`.
        force: write a merge that failed verification, with the report that says so.

    Raises:
        UsageError: `output` is taken, the scale is not above 0, or something only the user knows is missing.
        ModelError: base or adapter are not those of training or not whole, or cannot be merged.
        DiskError: the disk is full, or cannot be written; nothing was left there.
        MergeRefused: the merged model is not what was trained; nothing was written.
    """
    output, target = Path(output), Path(target)
    check_free(output)
    if output.absolute().resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{output}: lies in {target}, which is to be merged; choose another output")
    with open_source(
        target, data=data, pairs=pairs, base=base, quantize=quantize, sft=sft, scale=scale,
        allow_base_mismatch=allow_base_mismatch, best=best,
    ) as source:  # fmt: skip
        plan = Plan(source, onto=onto, dtype=dtype, rounding=rounding, seed=seed)
        plan.check_space(output)
        say_memory(plan)
        with staged(output) as folder:
            as_trained = Unmerged(source, source.facts, dtype=plan.dtype) if source.pairs else None
            expected = as_trained
            if as_trained is not None and onto == "original" and source.facts.quantize != "none":
                plain = source.original or source.facts._replace(quantize="none")
                expected = Unmerged(source, plain, dtype=plan.dtype)
            tensors, hashes = write(plan, folder, as_trained.base if as_trained is not None else None)
            verdict = Verdict(plan, folder, tensors, hashes, expected=expected, as_trained=as_trained)
            if verdict.faults and not force:
                wanted = "what was trained" + (f", {describe_scale(source.scale)}" if source.scale != 1 else "")
                raise MergeRefused("\n  ".join([f"{output}: was not written: the merge is not {wanted}:", *verdict.faults]))
            write_json(folder / REPORT_FILE, verdict.report)
            (folder / "README.md").write_text(merged_card(source, verdict.report), encoding="utf-8")
    verdict.folder = output
    return verdict
