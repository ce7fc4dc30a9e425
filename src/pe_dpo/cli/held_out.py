"""What training changed on held-out pairs, as `train`, `quickstart` and `eval` show it: in the same words, before and after."""

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import typer

from pe_dpo.cli import console
from pe_dpo.printable import counted

if TYPE_CHECKING:
    from pe_dpo.training.train import TrainResult


def show_result(result: "TrainResult") -> None:
    """Print what a run came to, from the main process; leave with 128 + signal when it was interrupted."""
    if os.environ.get("RANK", "0") != "0":
        return
    if result.interrupted_by is not None:
        again = f"pe-dpo train {shlex.quote(str(result.folder / 'recipe.yaml'))} --resume"
        console.say(f"stopped by a signal after step {result.steps}, checkpoint saved; go on with: {again}")
        raise typer.Exit(128 + result.interrupted_by)
    if result.after:
        show_change(result.before, result.after, reduce=result.reduce)
    console.show_lines([f"{line[0].upper()}{line[1:]}" for line in (result.ended, result.best) if line])
    console.show_lines([f"warning: {remark}" for remark in result.remarks])


def show_change(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    reduce: Literal["sum", "mean"],
    columns: tuple[str, str] = ("before", "after"),
) -> None:
    """Print the metrics of held-out pairs before and after, and who ranks them right.

    Args:
        before: metrics at step 0, or of the reference; empty where neither is known.
        after: metrics now.
        reduce: of the loss: whether right and wrong are by sums of log-probs or by means per token.
        columns: how the two are called.
    """
    from pe_dpo.metrics.catalogue import headline_rows

    pairs = int(after["pairs"])
    rows, header = headline_rows(before or after, after), ["", *columns]
    if not before:
        rows, header = [[title, value] for title, _, value in rows], ["", "value"]
    what = "What training changed on" if before else "What the policy makes of"
    title = f"{what} {counted(pairs, 'held-out pair')} (95 % Wilson intervals)"
    console.show_table(title, header, rows)
    prefix, how = ("regimes_per_token", ", per token") if reduce == "mean" else ("regimes", "")
    if before:
        when = "Before: what" if columns[0] == "before" else "What"
        show_quadrants(before, f"{when} the reference already ranks right{how}", prefix)
    show_quadrants(after, f"After: who flipped, and where the loss still pulls{how}", prefix)


def show_quadrants(metrics: Mapping[str, float], title: str, prefix: str) -> None:
    """Print the 2×2 table of policy right/wrong × reference right/wrong: pairs, and share of the gradient weight."""
    from pe_dpo.metrics.quadrants import QUADRANT_TITLES

    if f"{prefix}/ties" not in metrics:
        return
    rows = []
    for name, words in QUADRANT_TITLES.items():
        pairs, share = metrics[f"{prefix}/{name}/pairs"], metrics[f"{prefix}/{name}/weight_share"]
        rows.append([words, f"{pairs:.0f}", f"{share:.1%}"])
    if metrics[f"{prefix}/ties"]:
        rows.append(["ties", f"{metrics[f'{prefix}/ties']:.0f}", ""])
    console.show_table(title, ["pairs that …", "pairs", "share of gradient weight"], rows)
