"""The best adapter of a run by a metric of its held-out pairs, `train.keep_best`: where it lies, and what is said of it.

    best/     the adapter with tokenizer and base.json, as a packaged adapter; best.json: metric, step, value, hashes
              eval_pairs.parquet, evaluation.json: the held-out pairs as they were measured then

It is replaced as a whole: made in .best.new, the old one moved to .best.old, the new one moved to its place.
"""

import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pe_dpo.disk import sync
from pe_dpo.runs.files import BEST

NEW, OLD = ".best.new", ".best.old"


class BestRecord(BaseModel):
    """What run.json says of the best evaluation; written by `training.best.KeepBest.summary`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    metric: str
    step: int
    value: float
    last: float | None
    """Of the last evaluation; None where it was not defined."""
    evaluations: int
    pairs: int
    luck: float | None = None
    """By how much it looks better than it is, because it was picked; None where that cannot be told."""
    expected: float | None = None
    """What it would be on other pairs."""
    before: float | None = None
    before_is_no_worse: bool = False

    def describe(self) -> str:
        """Return what the best came to, and how much of it is luck, in words."""
        from pe_dpo.metrics.catalogue import METRICS  # which needs NumPy, and `pe-dpo serve` reads where the best lies

        metric = METRICS.get(self.metric)
        title, form = (metric.title, metric.form) if metric else (self.metric, ".4f")
        evaluations = f"{self.evaluations} evaluations" if self.evaluations > 1 else "1 evaluation"
        last = "" if self.last is None else f" (the last: {self.last:{form}})"
        words = f"Best {title} {self.value:{form}} at step {self.step}, of {evaluations}{last}."
        if self.before_is_no_worse and self.before is not None:
            words += f" Before training it was {self.before:{form}}, which is no worse."
        if self.luck is None or self.expected is None:
            return words if self.evaluations == 1 else f"{words} How much of it is luck cannot be told from one prompt."
        return (
            f"{words} It was picked on the {self.pairs} pairs that measured it: about {self.luck:.4f} of it is luck, so that "
            f"{self.expected:.4f} is to be expected on others."
        )


def new_best(run: Path) -> Path:
    """Return an empty folder in which the next best is put together."""
    for name in (NEW, OLD):
        shutil.rmtree(run / name, ignore_errors=True)
    (run / NEW).mkdir()
    return run / NEW


def replace_best(run: Path) -> None:
    """Put what was made in the folder of `new_best` in the place of the best."""
    for path in (run / NEW).rglob("*"):
        sync(path)
    if (run / BEST).exists():
        (run / BEST).rename(run / OLD)
    (run / NEW).rename(run / BEST)
    sync(run)
    shutil.rmtree(run / OLD, ignore_errors=True)


def remove_best(run: Path) -> None:
    """Remove the best of a run, which goes on from before there was one."""
    for name in (NEW, OLD, BEST):
        shutil.rmtree(run / name, ignore_errors=True)


def copy_links(source: Path, target: Path) -> None:
    """Copy a folder of files that are only ever replaced, not rewritten: by links where the disk has them."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
