"""Where the measurements of a run's adapter lie when it is scaled toward the reference, π_a = W0 + a·ΔW: RUN/scaled/a-0.5/.

It takes no training, so that whatever trains for a smaller KL has to be better than it.

Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903).
"""

from pathlib import Path

FOLDER, _PREFIX = "scaled", "a-"


def scaled_folder(run: Path, scale: float) -> Path:
    """Return where in a run's folder lies what was measured at one scale."""
    return run / FOLDER / f"{_PREFIX}{float(scale)!r}"


def scaled_folders(run: Path) -> dict[float, Path]:
    """Return the folders that there are, by their scales, rising; whatever else lies there is left out."""
    found = {}
    for path in run.glob(f"{FOLDER}/{_PREFIX}*"):
        try:
            scale = float(path.name.removeprefix(_PREFIX))
        except ValueError:
            continue
        if scaled_folder(run, scale) == path:
            found[scale] = path
    return dict(sorted(found.items()))
