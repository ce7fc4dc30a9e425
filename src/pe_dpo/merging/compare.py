"""`merge --compare`: every way to serve one adapter, on the same held-out pairs, before choosing one.

Each candidate is written beside OUT, loaded from disk, measured, and removed again; one on disk at a time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from pe_dpo.data.encoding import Progress
from pe_dpo.errors import UsageError
from pe_dpo.merging.checks import Onto, check_base_files, check_space
from pe_dpo.merging.merge import Dtype, served_dtype, write_model
from pe_dpo.merging.plan import plan_merge
from pe_dpo.merging.served import as_served, check_scale
from pe_dpo.merging.source import Source, open_source
from pe_dpo.merging.stream import Rounding, mean_kept
from pe_dpo.merging.trained import Trained, measure_merged, measure_trained
from pe_dpo.merging.verdict import base_as_trained
from pe_dpo.merging.verify import Agreement, Behaviour, agreement
from pe_dpo.runs.staging import scratch


class Candidate(NamedTuple):
    """One way to serve, and what it does."""

    name: str
    found: Agreement
    """Against base and adapter as in training, or scaled."""
    kept: float | None
    """Share of ΔW in the files; None where nothing is merged."""


class Comparison(NamedTuple):
    """All ways to serve, the reference first."""

    candidates: list[Candidate]
    pairs: int
    scale: float = 1.0
    """Of all but the reference, toward it; 1 is what was trained."""


def compare_merges(
    target: str | Path,
    *,
    work: str | Path | None = None,
    dtype: Dtype = "auto",
    rounding: Rounding = "auto",
    seed: int = 0,
    data: str | None = None,
    pairs: int = 200,
    base: str | None = None,
    quantize: str | None = None,
    sft: str | Path | None = None,
    scale: float = 1.0,
    allow_base_mismatch: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Return what reference, unmerged adapter and each merge do on held-out pairs; nothing stays on disk.

    Args:
        target: as for `merge.merge`, and so are the others.
        work: folder with room for one merged model; by default the one that the target lies in.

    Raises:
        UsageError: no pairs were asked for. Otherwise as `merge.merge`.
    """
    if not pairs:
        raise UsageError("--compare needs pairs to compare on; leave --pairs out, or name a number")
    check_scale(scale)
    opened = open_source(Path(target), data=data, pairs=pairs, base=base, quantize=quantize, say=say, progress=progress)
    with as_served(opened, sft=sft, scale=scale, say=say) as source:
        served = served_dtype(source.facts, dtype)
        ways: list[Onto] = ["original"] if source.facts.quantize == "int8" else ["dequantized", "original"]
        if source.facts.quantize == "none":
            ways = ["dequantized"]  # the same weights
        for onto in ways:
            check_base_files(source, onto, allow_base_mismatch, say)
        truth = measure_trained(source, source.facts, dtype=served, allow_base_mismatch=allow_base_mismatch, say=say)
        candidates = [
            _candidate("reference", truth.reference, truth),
            _candidate("adapter", truth.trained, truth),
        ]
        if truth.floor:
            name = "adapter, rounded" if truth.computed_in == torch.float32 else "adapter, in float32"
            candidates.append(_candidate(name, truth.floor, truth))
        for onto in ways:
            candidates.append(_merge(source, truth, onto, served, rounding, seed, work, allow_base_mismatch, progress))
    return Comparison(candidates, len(source.pairs), source.scale)


def _merge(
    source: Source,
    truth: Trained,
    onto: Onto,
    dtype: torch.dtype,
    rounding: Rounding,
    seed: int,
    work: str | Path | None,
    allow_base_mismatch: bool,
    progress: Progress,
) -> Candidate:
    plan = plan_merge(source.files, source.adapter, source.facts, dtype=dtype)
    base = truth.base if onto == "dequantized" else base_as_trained(source, onto, None, allow_base_mismatch)
    place = Path(work) if work else source.folder.absolute().parent
    check_space(place / "compare", plan)
    with scratch(place / f".{source.folder.absolute().name}.compare") as folder:
        tensors, _ = write_model(
            source, plan, folder, base, onto=onto, dtype=dtype, rounding=rounding, seed=seed, progress=progress
        )
        found = measure_merged(folder, source, truth.computed_in)
    return _candidate(f"onto {onto}", found, truth, mean_kept(tensors))


def _candidate(name: str, found: Behaviour, truth: Trained, kept: float | None = None) -> Candidate:
    return Candidate(name, agreement(found, truth.trained, truth.reference), kept)
