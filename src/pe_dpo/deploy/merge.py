"""`merge`: adapter and base become one model on disk, and nothing appears there that was not shown to be what was trained.

    source     adapter whole? its tokenizer, its base's files; pairs to verify on        no weights read
    plan       every tensor of the adapter has its place
    trained    base loaded as in training, tensor by tensor the one of training; reference and trained model measured
    stream     files → files, tensor by tensor; share of ΔW kept
    verify     merged model loaded from disk as a user would; relative KL, shift kept
    staging    renamed to OUT only if all of this is in its band
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pe_dpo.data.encoding import Progress
from pe_dpo.deploy.card import merged_card
from pe_dpo.deploy.carry import base_licence, carry
from pe_dpo.deploy.plan import Plan, plan_merge
from pe_dpo.deploy.source import Source, open_source, with_sft
from pe_dpo.deploy.staging import check_free, staged
from pe_dpo.deploy.stream import BaseAsTrained, MergedTensor, Rounding, faults, mean_kept, mean_noise, write_merged
from pe_dpo.deploy.trained import Trained, measure_merged, measure_trained, noise_words
from pe_dpo.deploy.verify import Agreement, agreement, doubts
from pe_dpo.errors import MergeRefused, ModelError
from pe_dpo.model.base import BaseFacts, inspect_base
from pe_dpo.model.fingerprint import config_fingerprint, file_fingerprints
from pe_dpo.model.provenance import changed_files
from pe_dpo.model.tensor_files import TensorWriter
from pe_dpo.training.run_folder import versions

Onto = Literal["dequantized", "original"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPORT_FILE = "merge_report.json"


class Verdict(NamedTuple):
    """What a merge was found to be."""

    tensors: list[MergedTensor]
    held_out: Agreement | None
    """None where no pairs were asked for."""
    floor: Agreement | None
    """The trained model with the noise of the dtype."""
    change: Agreement | None
    """Merged onto the original: how far that is from what was trained on the quantized base."""
    faults: list[str]
    """What is out of its band, in words; empty for a merge that serves what was trained."""

    @property
    def mean_kept(self) -> float | None:
        """Share of ΔW in the files, over all tensors."""
        return mean_kept(self.tensors)


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
        allow_base_mismatch: go on where the base is not bit for bit the one of training.
        force: write a merge that failed verification, with the report that says so.
        say: gets lines of facts.
        progress: called with what is done, how much, and of how much.

    Raises:
        UsageError: `output` is taken, or something only the user knows is missing.
        ModelError: base or adapter are not those of training or not whole, or cannot be merged; or the disk is full.
        MergeRefused: the merged model is not what was trained; nothing was written.
    """
    output = Path(output)
    check_free(output)
    source = open_source(Path(target), data=data, pairs=pairs, base=base, quantize=quantize, say=say, progress=progress)
    with with_sft(source, sft) as source:
        served = served_dtype(source.facts, dtype)
        plan = plan_merge(source.files, source.adapter, source.facts, dtype=served)
        check_base_files(source, onto, allow_base_mismatch, say)
        _check_every_tensor(source, plan, allow_base_mismatch)
        _check_space(output, plan)
        with staged(output) as folder:
            trained = truth(source, onto, served, allow_base_mismatch, say)
            tensors, hashes = write_model(
                source, plan, folder, base_as_trained(source, onto, trained, allow_base_mismatch),
                onto=onto, dtype=served, rounding=rounding, seed=seed, progress=progress,
            )  # fmt: skip
            verdict = judge(source, folder, tensors, trained)
            if verdict.faults and not force:
                head = f"{output}: was not written: the merge is not what was trained:"
                raise MergeRefused("\n  ".join([head, *verdict.faults]))
            report = _report(source, verdict, onto=onto, dtype=served, rounding=rounding, seed=seed, files=hashes)
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
            card = merged_card(source, report, licence=base_licence(source.base_folder))
            (folder / "README.md").write_text(card, encoding="utf-8")
    return MergeResult(output, verdict, report)


def served_dtype(facts: BaseFacts, dtype: Dtype) -> torch.dtype:
    """Return the dtype to write; "auto" is the one that the base comes in."""
    if dtype != "auto":
        return DTYPES[dtype]
    own = facts.config.get_text_config().dtype or facts.config.dtype
    return own if own in DTYPES.values() else torch.bfloat16


def check_base_files(source: Source, onto: Onto, allow_mismatch: bool, say: Callable[[str], None]) -> None:
    """Check what can be checked of the base without reading it into a model.

    Raises:
        ModelError: the base was trained on in a way that no merged weights can repeat, or its files are not those of training
            where only their bytes can tell.
    """
    if source.facts.quantize == "int8" and onto == "dequantized":
        raise ModelError(
            "int8 also rounds what flows through a layer, so that no merged weights compute what was trained; merge --onto "
            "original, or serve with --onto adapter"
        )
    if onto == "original" and source.facts.quantize != "none":
        say("look: onto the original weights: their quantization error was part of training, and is not of what is served")
    if source.record is None:
        return
    if source.record["config"] != config_fingerprint(source.facts.config):
        what = f"{source.base_folder / 'config.json'}: says another arithmetic (norms, rotary, scales, …) than in training"
        if not allow_mismatch:
            raise ModelError(f"{what}; restore it; --allow-base-mismatch merges all the same")
        say(f"look: {what}")
    if onto == "dequantized":
        return  # tensor by tensor as loaded, later
    changed = changed_files(source.record, source.base_folder)
    if changed and allow_mismatch:
        say(f"look: {changed[0]} of the base is not the file of training")
    elif changed:
        raise ModelError(
            f"{source.base_folder / changed[0]}: is not the file of training (sha256); restore the base, or name it with "
            "--base; --allow-base-mismatch merges all the same"
        )


class Truth(NamedTuple):
    """What a merge is judged by."""

    measured: Trained
    """Base (original if that is merged onto) and adapter, unmerged."""
    as_trained: Trained | None
    """The same on the quantized base, where that is another."""


def truth(
    source: Source, onto: Onto, dtype: torch.dtype, allow_mismatch: bool, say: Callable[[str], None]
) -> Truth | None:
    """Return what reference and trained model do, None if there are no pairs to ask them on."""
    if not source.pairs:
        return None
    as_trained = measure_trained(source, source.facts, dtype=dtype, allow_base_mismatch=allow_mismatch, say=say)
    if onto == "dequantized" or source.facts.quantize == "none":
        return Truth(as_trained, None)
    plain = source.facts._replace(quantize="none")
    return Truth(measure_trained(source, plain, dtype=dtype, allow_base_mismatch=allow_mismatch, say=say), as_trained)


def base_as_trained(source: Source, onto: Onto, found: Truth | None, allow_mismatch: bool) -> BaseAsTrained:
    """Return how the base was loaded in training: as it was just loaded, else as the record says.

    Raises:
        ModelError: there is neither.
    """
    if found is not None and onto == "dequantized":
        return found.measured.base
    record = source.record
    if record is None and onto == "dequantized" and source.facts.quantize != "none":
        raise ModelError(
            f"{source.folder}: nothing says which layers of its base were quantized; name pairs with --data, so that the "
            "base is loaded and asked"
        )
    # int8 codes cannot be made again from here; the files were compared instead.
    is_known = not allow_mismatch and source.facts.quantize != "int8"
    was_on_gpu = record is not None and record.get("device") == "cuda"
    return BaseAsTrained(
        quantize=source.facts.quantize,
        dtype=source.facts.dtype,
        quantized_layers=frozenset(record["quantized_layers"] if record else ()),
        tensors=record["tensors"] if record and is_known else {},
        device=torch.device("cuda" if was_on_gpu and torch.cuda.is_available() else "cpu"),
    )


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


def judge(source: Source, folder: Path, tensors: list[MergedTensor], found: Truth | None) -> Verdict:
    """Return the verdict on a merged model on disk: by tensor, and by what it does on the pairs."""
    wrong = faults(tensors)
    if found is None:
        return Verdict(tensors, None, None, None, wrong)
    measured = found.measured
    dtype = str(source.facts.dtype).removeprefix("torch.")
    merged = measure_merged(folder, source, inspect_base(str(folder), quantize="none", dtype=dtype))
    held_out = agreement(merged, measured.trained, measured.reference)
    floor = agreement(measured.floor, measured.trained, measured.reference) if measured.floor else None
    served = found.as_trained
    change = agreement(merged, served.trained, served.reference) if served else None
    return Verdict(tensors, held_out, floor, change, [*wrong, *doubts(held_out, floor)])


def _check_every_tensor(source: Source, plan: Plan, allow_mismatch: bool) -> None:
    """Where no model will be loaded, check by name that the files have what the model has and what training had."""
    if source.pairs or allow_mismatch:
        return
    found = {output.recorded_as for output in plan.outputs}
    has_hashes = source.record is not None and source.facts.quantize != "int8"
    wanted = set(source.record["tensors"]) if source.record and has_hashes else plan.parameters
    if wanted - found:
        raise ModelError(
            f"{source.base_folder}: its files do not have {min(wanted - found)}, or under another name, and without pairs that "
            "cannot be told: leave --pairs 0 out"
        )
    unknown = found - wanted if has_hashes else set()
    if unknown:
        raise ModelError(f"{source.folder / 'base.json'}: says nothing of {min(unknown)}; take another copy of the run")


def _check_space(output: Path, plan: Plan) -> None:
    wanted = sum(tensor.facts.bytes for tensor in plan.outputs)
    free = shutil.disk_usage(output.absolute().parent).free
    if wanted > free:
        raise ModelError(f"{output}: the merged model has {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")


def _report(
    source: Source, verdict: Verdict, *, onto: Onto, dtype: torch.dtype, rounding: Rounding, seed: int, files: dict[str, str]
) -> dict[str, Any]:
    """What merge_report.json says."""
    adapter_file = "adapter_model.safetensors"
    return {
        "verdict": "serves what was trained" if not verdict.faults else "written by force",
        "faults": verdict.faults,
        "onto": onto,
        "dtype": str(dtype).removeprefix("torch."),
        "rounding": rounding,
        "seed": seed,
        "base": {
            "id": source.facts.base,
            "revision": source.record["revision"] if source.record else source.facts.revision,
            "quantize_in_training": source.facts.quantize,
            "was_checked": source.record is not None,
        },
        "adapter_sha256": file_fingerprints(source.adapter.folder, [adapter_file])[adapter_file],
        "mean_kept": verdict.mean_kept,
        "held_out_pairs": len(source.pairs),
        "held_out": _facts(verdict.held_out),
        "noise_floor": _facts(verdict.floor),
        "noise_floor_is": noise_words(source.facts.dtype, dtype),
        "mean_noise": mean_noise(verdict.tensors),
        "against_the_quantized_base": _facts(verdict.change),
        "tensors": [tensor._asdict() for tensor in verdict.tensors],
        "files": files,
        "versions": versions(),
    }


def _facts(found: Agreement | None) -> dict[str, Any] | None:
    return None if found is None else {**found._asdict(), "relative_kl": found.relative_kl}
