"""`pe-dpo sweep`."""

import json
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pe_dpo.cli import console, options
from pe_dpo.printable import counted

if TYPE_CHECKING:
    from pe_dpo.experiments.plan import SweepPlan


def sweep(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    axes: Annotated[list[str] | None, typer.Argument(help="Further axes of --grid: beta=0.05,0.1 …")] = None,
    grid: Annotated[
        str | None,
        typer.Option("--grid", help="KEY=VALUE,VALUE …: a run for every combination. Hyperparameters or section.key."),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option("--also", help='A further grid, "mixout=0.3,0.5 lr=1e-3", from the recipe. Repeatable.')
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each point, with seeds counted up.")] = 1,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the sweep.")] = None,
    prompts: Annotated[
        int | None,
        typer.Option("--prompts", min=0, help="Held-out prompts to sample answers to, for KL; default: the recipe's, else 64."),
    ] = None,
    snapshots: Annotated[
        int | None,
        typer.Option("--snapshots", min=0, help="Measure so often along each run: early stopping, as points of its own."),
    ] = None,
    dropout_control: Annotated[
        bool, typer.Option("--dropout-control", help="For each mixout p a run with dropout p on the adapter's input instead.")
    ] = False,
    scale_control: Annotated[
        str | None,
        typer.Option("--scale-control", help="Measure every adapter scaled toward the reference too: 0.5,0.75. No training."),
    ] = None,
    contrast: Annotated[
        list[str] | None,
        typer.Option(help='What will be tested, named before it is run: "mixout against beta within 2". Repeatable.'),
    ] = None,
    scorer: options.Scorer = None,
    engine: Annotated[Literal["local", "ray"], typer.Option("--engine", help="ray: on several GPUs or machines.")] = "local",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="With ray: runs at once.")] = None,
    set_: options.Settings = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="List the runs, say what they will be able to tell apart, and stop.")
    ] = False,
    like: Annotated[
        Path | None, typer.Option(help="With --plan: the sweep whose variances are assumed; default: this one's, if run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome, or the plan, as JSON.")] = False,
) -> None:
    """Train every point of a grid from one base with one reference pass; started again, it goes on where it was."""
    from pe_dpo.errors import UsageError
    from pe_dpo.experiments.plan import joined_plan, make_plan
    from pe_dpo.recipe import load_recipe

    given = {
        f"--prompts {prompts}": "generation.prompts",
        f"--snapshots {snapshots}": "generation.snapshots",
        f"--scale-control {scale_control}": "generation.scales",
    }
    options.check_once(set_, {words: key for words, key in given.items() if not words.endswith(" None")})
    base = load_recipe(recipe, set_ or [])
    measured = {
        "prompts": (base.generation.prompts or 64) if prompts is None else prompts,
        "snapshots": snapshots,
        "scales": options.scales("--scale-control", scale_control),
    }
    measure = [f"generation.{key}={value}" for key, value in measured.items() if value is not None]
    grids = [([grid] if grid else []) + list(axes or []), *(words.split() for words in also or [])]
    plan = make_plan(
        recipe,
        [axes for axes in grids if axes],
        folder=output,
        overrides=[*measure, *(set_ or [])],
        seeds=range(base.train.seed, base.train.seed + seeds),
        dropout_control=dropout_control,
        contrasts=contrast or (),
    )

    if like is not None and not plan_only:
        raise UsageError(f"--like {like}: is whose variances --plan assumes; give --plan too, or leave it out")
    if plan_only:
        _show_plan(joined_plan(plan), like, as_json=as_json)
        return

    console.start(is_silent=as_json)
    from pe_dpo.experiments.sweep import sweep as run
    from pe_dpo.interruption import listening

    if as_json:
        states, found = run(plan, engine=engine, workers=workers, scorer=scorer), []
        for state in states:  # JSON has no number that is not finite
            metrics = {key: value if math.isfinite(value) else None for key, value in state.metrics.items()}
            outcome = {"point": state.point._asdict(), "status": state.status, "seconds": state.seconds, "metrics": metrics}
            found.append({**outcome, "why": options.in_flags(state.why)})
        console.say(json.dumps(found))
    else:
        with _Progress() as progress:
            states = run(plan, engine=engine, workers=workers, scorer=scorer, tell=progress)
        _say_what_is_next(states, str(plan.folder))
    with listening() as signals:
        if signals.received:
            raise typer.Exit(128 + signals.received)
    if any(state.status != "finished" for state in states):
        raise typer.Exit(1)


def _show_plan(plan: "SweepPlan", like: Path | None, *, as_json: bool) -> None:
    """The runs, the questions with their hash, and what the design finds."""
    from pe_dpo.experiments.design import designs

    found = designs(plan, like=like)
    if as_json:
        known = [{key: None if math.isnan(value) else value for key, value in one._asdict().items()} for one in found.sizes]
        told: dict[str, Any] = {"contrasts": plan.contrasts, "contrasts_sha256": plan.contrasts_sha256}
        told |= {"design": {**found._asdict(), "seeds": len(plan.seeds), "sizes": known}}
        console.say(json.dumps({"points": [point._asdict() for point in plan.points], **told}))
        return
    runs = [[point.name, str(point.seed)] for point in plan.points]
    console.show_table(f"{counted(len(runs), 'run')} in {plan.folder}", ["run", "seed"], runs)
    if plan.contrasts:
        console.show_table("contrasts", ["tested by themselves"], [[text] for text in plan.contrasts])
        console.say(f"SHA-256 of the contrasts: {plan.contrasts_sha256}")
    seeds = len(plan.seeds)
    together = f"; {found.comparisons} comparisons together (Holm)" if found.comparisons > 1 else ""
    title = f"smallest difference found with 80 % power, points{together}\nassumed: {found.assumed}"
    rows = []
    for one in found.sizes:
        sizes = one.alone, one.in_verdict, one.with_two_more
        rows.append([f"{one.pairs:,}", *("" if math.isnan(size) else f"{100 * size:.1f}" for size in sizes)])
    run, what = counted(seeds, "seed"), "held-out pairs" if found.unit == "pair" else "sampled answers"
    header = [what, f"one test, {run}", f"verdict, {run}", f"verdict, {seeds + 2} seeds"]
    console.show_table(title, header, rows)
    if seeds == 1:
        console.warn("one seed: what runs of other seeds would show is in no interval; a verdict takes --seeds 3, better 5")


class _Progress:
    """How the runs stand: a live table in a terminal, a line for each run that ends elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.live = Live(refresh_per_second=2) if Console().is_terminal else None
        self.seen: set[tuple[str, str]] = set()
        """Folders and outcomes that were told."""
        self.before: int | None = None
        self.began = time.perf_counter()

    def __enter__(self) -> "_Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, states: Sequence[Any]) -> None:
        """Show all points as they are now."""
        ended = [state for state in states if state.status in ("finished", "failed")]
        is_first, self.before = self.before is None, len(ended) if self.before is None else self.before
        done, todo, left = len(ended) - self.before, len(states) - len(ended), ""
        if done and todo:
            minutes = (time.perf_counter() - self.began) / done * todo / 60
            left = f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
        failed = sum(state.status == "failed" for state in ended)
        caption = f"{len(ended)} of {len(states)} runs{f', {failed} failed' if failed else ''}{left}"
        if self.live:
            self.live.update(_table(states, caption, self.live.console.width))
        new = [state for state in ended if (state.point.folder, _outcome(state)) not in self.seen]  # judged, it has another
        self.seen.update((state.point.folder, _outcome(state)) for state in new)
        if not self.live and not is_first:
            for state in new:
                console.say(f"{state.point.folder}: {_outcome(state)}, {state.seconds:.0f} s; {caption}")


def _outcome(state: Any) -> str:
    """A finished run in a few numbers; of any other its status."""
    if state.status != "finished":
        return str(state.status)
    kl = f", KL {state.metrics['kl']:.3g}" if "kl" in state.metrics else ""
    won = f", win rate {state.metrics['win_rate']:.3f}" if "win_rate" in state.metrics else ""
    return f"accuracy/shift {state.metrics['accuracy/shift']:.3f}{kl}{won}" if state.metrics else "finished"


def _table(states: Sequence[Any], caption: str, width: int) -> Any:
    """One row per point, one column per seed."""
    from rich.console import Group
    from rich.text import Text

    seeds = sorted({state.point.seed for state in states})
    cells = {(state.point.name, state.point.seed): _outcome(state) for state in states}
    names = dict.fromkeys(state.point.name for state in states)
    rows = [[name, *(cells.get((name, seed), "") for seed in seeds)] for name in names]
    header = ["run", *(f"seed {seed}" for seed in seeds)]
    return Group(console.make_table("", header, rows, width=width), Text(caption))


def _say_what_is_next(states: Sequence[Any], folder: str) -> None:
    failed = [state for state in states if state.status == "failed"]
    for state in failed:
        console.say(f"failed: {state.point.folder}: {options.in_flags(state.why)}")
    if failed:
        console.say(f"{len(failed)} of {len(states)} runs failed; the same command again tries them once more")
    waiting = [state for state in states if state.status in ("waiting", "interrupted")]
    if waiting:
        console.say(f"still to do: {counted(len(waiting), 'run')}; start the same command again to go on")
    elif any(state.status == "finished" for state in states):
        console.say(f"next: pe-dpo compare {shlex.quote(folder)}; pe-dpo report {shlex.quote(folder)}")
