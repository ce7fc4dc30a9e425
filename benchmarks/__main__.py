"""The commands: `python -m benchmarks NAME`; README.md says what each measures."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import memory, plot
from benchmarks.results import Settings
from benchmarks.rounds import keep_heap

STEP_ROUNDS = 5
MERGE_ROUNDS = 3
AUDIT_ROUNDS = 3
TABLE_ROUNDS = 3
"""Of `steps`, `starts` and `threads`."""
COMMAND_ROUNDS = {"train-8": 3, "train-64": 1, "train-500": 1, "sweep": 1}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run one command."""
    torch.set_num_threads(1)
    options = _parser().parse_args()
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted")
        raise SystemExit(130) from None


def _table(options: argparse.Namespace) -> None:
    from benchmarks import support
    from benchmarks.table import table, write_page

    write_page()
    support.write_page()
    print(table())


def _claims(options: argparse.Namespace) -> None:
    from benchmarks.claims import write

    print(write())


def _commands(options: argparse.Namespace) -> None:
    from benchmarks.commands import CommandSettings, run_commands, screen

    for case in options.cases or COMMAND_ROUNDS:
        rounds = 1 if options.quick else options.rounds or COMMAND_ROUNDS[case]
        settings = CommandSettings("commands", case=case, rounds=rounds, is_quick=options.quick, out=options.out)
        (screen if options.screen else run_commands)(settings)


def _steps(options: argparse.Namespace) -> None:
    from benchmarks.steps import run_steps

    keep_heap()
    rounds = 1 if options.quick else options.rounds or TABLE_ROUNDS
    settings = Settings("steps", rounds=rounds, is_quick=options.quick, out=options.out)
    run_steps(settings, ("polite",) if options.quick else options.shapes, ("fp32",) if options.quick else options.dtypes)


def _starts(options: argparse.Namespace) -> None:
    from benchmarks.starts import run_starts

    rounds = 1 if options.quick else options.rounds or TABLE_ROUNDS
    run_starts(Settings("starts", rounds=rounds, is_quick=options.quick, out=options.out))


def _data(options: argparse.Namespace) -> None:
    from benchmarks.data_speed import run_data

    sizes = (1000,) if options.quick else tuple(options.sizes)
    run_data(Settings("data", is_quick=options.quick, out=options.out), sizes, tuple(options.sides))


def _threads(options: argparse.Namespace) -> None:
    from benchmarks.threads import run_threads

    rounds = 1 if options.quick else options.rounds or TABLE_ROUNDS
    settings = Settings("threads", rounds=rounds, is_quick=options.quick, out=options.out)
    run_threads(settings, tuple(options.beside), is_alone=options.alone)


def _merge(options: argparse.Namespace) -> None:
    from benchmarks.merge import run_merge

    rounds = 1 if options.quick else options.rounds or MERGE_ROUNDS
    settings = Settings("merge", rounds=rounds, is_quick=options.quick, out=options.out)
    path = run_merge(settings, only_cost=options.only_cost)
    print(path, *([] if options.only_cost else [_plot(path)]))


def _worlds(options: argparse.Namespace) -> None:
    from benchmarks.worlds import run_worlds

    run_worlds(Settings("worlds", is_quick=options.quick, out=options.out))


def _audit(options: argparse.Namespace) -> None:
    from benchmarks.audit_speed import run_audit

    rounds = 1 if options.quick else options.rounds or AUDIT_ROUNDS
    run_audit(Settings("audit", rounds=rounds, is_quick=options.quick, out=options.out))


def _mixout(options: argparse.Namespace) -> None:
    from benchmarks.mixout import run_mixout

    keep_heap()
    run_mixout(Settings("mixout", rounds=1 if options.quick else options.rounds, is_quick=options.quick, out=options.out))


def _architectures(options: argparse.Namespace) -> None:
    from benchmarks.architectures.run import run_architectures
    from benchmarks.architectures.table import architectures_table

    settings = Settings("architectures", out=options.out)
    print(architectures_table(run_architectures(settings, names=options.names, again=options.again)))


def _engines(options: argparse.Namespace) -> None:
    from benchmarks.engines.run import run_engines

    print(run_engines(Settings("engines", out=options.out), names=options.names))


def _estimate(options: argparse.Namespace) -> None:
    from benchmarks.estimate import run_estimate

    print(run_estimate(Settings("estimate", out=options.out)))


def _crash(options: argparse.Namespace) -> None:
    from benchmarks.crash.run import run_crash

    print(run_crash(Settings("crash", out=options.out), kills=options.kills, seed=options.seed))


def _gpu(options: argparse.Namespace) -> None:
    from benchmarks.gpu.proof import run_check, run_proof

    if options.check:
        run_check(options.check, options.out, is_rehearsal=options.rehearse)
        return
    is_right = run_proof(options.out, is_rehearsal=options.rehearse, seconds=options.seconds, names=options.names)
    raise SystemExit(0 if is_right else 1)


def _memory_one(options: argparse.Namespace) -> None:
    settings = Settings(options.command, options.shape, options.dtype, options.model)
    print(json.dumps({"mib": memory.measure_one(options.variant, settings)}))


def _step(options: argparse.Namespace) -> None:
    """Imported here, since what measures memory is quicker without TRL."""
    from benchmarks.step import run_step

    keep_heap()
    settings = Settings("step", options.shape, options.dtype, options.model, is_quick=options.quick, out=options.out)
    run_step(replace(settings, rounds=1 if options.quick else options.rounds or STEP_ROUNDS))


def _plot(path: Path) -> Path:
    """Draw the results of `merge`, `worlds`, `mixout` or `step`."""
    if path.stem.startswith("merge"):
        from benchmarks.merge_plot import plot_merge

        return plot_merge(path)
    if path.stem.startswith("worlds"):
        from benchmarks.worlds_plot import plot_worlds

        return plot_worlds(path)
    if path.stem.startswith("mixout"):
        from benchmarks.mixout_plot import plot_mixout

        return plot_mixout(path)
    return plot.plot_step(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shapes, dtypes = ["hh", "uf", "uf-graph", "polite", "near", "long"], ["fp32", "bf16", "nf4"]
    for name, run in (("step", _step), ("memory-one", _memory_one)):
        command = commands.add_parser(name, help="one step: TRL's grid, ours technique by technique, memory")
        command.set_defaults(run=run)
        command.add_argument("--shape", choices=shapes, default="hh")
        command.add_argument("--dtype", choices=dtypes, default="fp32")
        command.add_argument("--model", choices=["m8k", "m32k"], default="m8k")
        if name == "memory-one":
            command.add_argument("--variant", required=True, help="name of a variant, as `step` prints it")
        else:
            _add_common(command)
    steps = commands.add_parser("steps", help="one step on six shapes of pairs in three dtypes: TRL, before, after")
    steps.set_defaults(run=_steps)
    steps.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    steps.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    _add_common(steps)
    whole = commands.add_parser("commands", help="whole `pe-dpo train` and `sweep` processes against TRL's")
    whole.set_defaults(run=_commands)
    whole.add_argument("cases", nargs="*", help=f"of {', '.join(COMMAND_ROUNDS)}; default: all")
    whole.add_argument("--screen", action="store_true", help="search TRL's best size of micro-batch for these cases")
    _add_common(whole)
    starts = commands.add_parser("starts", help="CPU seconds and peak memory of every command, before and after")
    starts.set_defaults(run=_starts)
    _add_common(starts)
    data = commands.add_parser("data", help="preparing 10,000, 100,000 and a million pairs, before and after")
    data.set_defaults(run=_data)
    data.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    data.add_argument("--sides", nargs="+", choices=["before", "after"], default=["before", "after"])
    _add_common(data)
    threads = commands.add_parser("threads", help="a step on two threads, idle and beside busy processes")
    threads.set_defaults(run=_threads)
    threads.add_argument("--beside", nargs="+", type=int, default=[0, 1, 2], help="busy processes")
    threads.add_argument("--alone", action="store_true", help="with precedence over all else on the machine; needs root")
    _add_common(threads)
    merge = commands.add_parser("merge", help="what is left of an adapter after merging, ours and others'")
    merge.add_argument("--only-cost", action="store_true", help="measure time and memory again, keep the rest of the results")
    merge.set_defaults(run=_merge)
    _add_common(merge)
    worlds = commands.add_parser("worlds", help="κ, β, mixout and the floor where KL and reward are exact")
    worlds.set_defaults(run=_worlds)
    worlds.add_argument("--quick", action="store_true", help="every third value, results of their own")
    worlds.add_argument("--out", type=Path, default=RESULTS)
    audit = commands.add_parser("audit", help="seconds of an audit of 10,000 pairs from a filled store")
    audit.set_defaults(run=_audit)
    _add_common(audit)
    mixout = commands.add_parser("mixout", help="what mixout costs over plain LoRA: a layer, its memory, a step")
    mixout.set_defaults(run=_mixout)
    _add_common(mixout)
    kinds = commands.add_parser("architectures", help="every kind of base, tiny: checked, trained, merged, held against PEFT")
    kinds.set_defaults(run=_architectures)
    kinds.add_argument("names", nargs="*", help="of the table; default: those that this version has not measured yet")
    kinds.add_argument("--again", action="store_true", help="measure those, too, that this version has measured")
    kinds.add_argument("--out", type=Path, default=RESULTS)
    engines = commands.add_parser("engines", help="what merge and export write, in the engines that are installed")
    engines.set_defaults(run=_engines)
    engines.add_argument("names", nargs="*", help="of engines; default: all")
    engines.add_argument("--out", type=Path, default=RESULTS)
    counted = commands.add_parser("estimate", help="memory as it is counted, against the peaks of real runs on the CPU")
    counted.set_defaults(run=_estimate)
    counted.add_argument("--out", type=Path, default=RESULTS)
    crash = commands.add_parser(
        "crash", help="commands killed at random and at every change of the disk, against those that lived"
    )
    crash.set_defaults(run=_crash)
    crash.add_argument("--kills", type=int, default=300, help="in all; 300 take about 20 minutes")
    crash.add_argument("--seed", type=int, default=0)
    crash.add_argument("--out", type=Path, default=RESULTS)
    card = commands.add_parser("gpu", help="the proof on a card; benchmarks/gpu/README.md")
    card.set_defaults(run=_gpu)
    card.add_argument("names", nargs="*", help="of the checks; default: all")
    card.add_argument("--rehearse", action="store_true", help="on the CPU with tiny bases: what can be run without a card")
    card.add_argument("--seconds", type=float, default=520, help="of all checks together")
    card.add_argument("--out", type=Path, default=RESULTS / "gpu")
    card.add_argument("--check", help=argparse.SUPPRESS)
    commands.add_parser("claims", help="write results/claims.json: every stated number with its source").set_defaults(
        run=_claims
    )
    commands.add_parser(
        "table", help="write docs/speed.md and docs/support.md and print the README's table, from the results"
    ).set_defaults(run=_table)
    drawn = commands.add_parser("plot", help="draw the results of `step`, `merge`, `worlds` or `mixout` again")
    drawn.set_defaults(run=lambda options: print(_plot(options.file)))
    drawn.add_argument("file", type=Path)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="one round, few variants, under two minutes")
    command.add_argument("--rounds", type=int, default=0)
    command.add_argument("--out", type=Path, default=RESULTS)


if __name__ == "__main__":
    main()
