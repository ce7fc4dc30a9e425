"""`merge --compare`: every way to serve one adapter, on the same held-out pairs, before choosing one.

Each candidate is written beside OUT, loaded from disk, measured, and removed again; one on disk at a time.
"""

from pathlib import Path

from pe_dpo.errors import UsageError
from pe_dpo.merging.behaviour import Agreement
from pe_dpo.merging.merged_tensor import mean_kept
from pe_dpo.merging.plan import Dtype, Onto, Plan, Rounding
from pe_dpo.merging.source import Source
from pe_dpo.merging.unmerged import Unmerged, measure_served
from pe_dpo.merging.write import write
from pe_dpo.runs.staging import scratch


def compare_merges(
    source: Source, *, dtype: Dtype = "auto", rounding: Rounding = "auto", seed: int = 0, work: str | Path | None = None
) -> list[tuple[str, Agreement, float | None]]:
    """Return what reference, unmerged adapter and each merge do on held-out pairs; nothing stays on disk.

    Args:
        source: to merge, with pairs.
        dtype: as for `merge.merge`, and so are the next two.
        work: folder with room for one merged model; by default the one that the source lies in.

    Returns:
        Name of each way to serve, the reference first; how near it comes to base and adapter as in training, or scaled; and the
        share of ΔW in the files, None where nothing is merged.

    Raises:
        UsageError: the source has no pairs. Otherwise as `merge.merge`.
    """
    if not source.pairs:
        raise UsageError(f"{source.folder}: there are no pairs to compare on; ask for some")
    ways: list[Onto] = ["original"] if source.facts.quantize == "int8" else ["dequantized", "original"]
    if source.facts.quantize == "none":
        ways = ["dequantized"]  # the same weights
    plans = [Plan(source, onto=onto, dtype=dtype, rounding=rounding, seed=seed) for onto in ways]
    trained = Unmerged(source, source.facts, dtype=plans[0].dtype)
    candidates: list[tuple[str, Agreement, float | None]] = [
        ("reference", trained.agreement(trained.reference), None),
        ("adapter", trained.agreement(trained.trained), None),
    ]
    if trained.floor is not None:
        candidates.append(("adapter, rounded", trained.floor, None))
    place = Path(work) if work else source.folder.absolute().parent
    for plan in plans:
        plan.check_space(place / "compare")
        with scratch(place / f".{source.folder.absolute().name}.compare") as folder:
            tensors, _ = write(plan, folder, trained.base)
            served = measure_served(source, merged=folder)
        candidates.append((f"onto {plan.onto}", trained.agreement(served), mean_kept(tensors)))
    return candidates
