"""The command `commands`: whole `pe-dpo train` and `pe-dpo sweep` processes against whole processes of TRL's own trainer.

    a case          rows of HH as messages in a file, a held-out file of 5 % of them, a random or small base, one thread
    ours            pe-dpo train recipe.yaml                              pe-dpo sweep recipe.yaml --grid beta=… --prompts 0
    TRL             trl_run.py, a script as its user writes it            the same once for each value: two run, six counted

Both read text, tokenize, train, evaluate the held-out pairs and save a checkpoint ten times along the way, log every step, and
save the adapter. All of it counts: imports, data, checks, records. The losses of all steps are held against each other before
any time is reported.
"""

import json
import os
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors.torch import save_file

from benchmarks.models import ALPHA, BETA, LEARNING_RATE, RANK
from benchmarks.pairs import draw_pairs, facts, facts_lines, shared_folder
from benchmarks.processes import BEFORE, emptied, environment, package_root, pe_dpo, run_process
from benchmarks.results import Settings, load, save, temporary_folder
from benchmarks.rounds import ratio, spread
from pe_dpo.recipe import load_recipe
from pe_dpo.training.preparation import prepare_run
from pe_dpo.training.train import build_trainer

MODEL = "hh-dialogue-4m"
"""Small, so that 500 steps of TRL's default take minutes, and real, with a tokenizer and a template of its own."""
HELD_OUT_SHARE = 0.05
"""The package's default, made explicit so that both sides hold out the same rows."""
KEPT_CHECKPOINTS = 2
BETAS = (0.0125, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
TRL_VALUES = 2
"""Of a sweep, for which TRL's process is run; those of the other values are counted as the last of these."""
LOSS_TOLERANCE = 2e-3
"""Largest difference of a step's losses, as a share: in float32, over so many steps of Adam."""
SIZES = (1, 2, 4, 8)
"""Of TRL's micro-batches, in the search for its best: without checkpointing, with precomputed references."""
OURS, OLD = "ours", f"ours before ({BEFORE})"


@dataclass(frozen=True)
class CommandSettings(Settings):
    """Results that lie in commands-CASE.json."""

    case: str = ""

    @property
    def name(self) -> str:
        """Name of the results."""
        return "-".join(["commands", self.case] + ["quick"] * self.is_quick)


class Case(NamedTuple):
    """A run."""

    title: str
    shape: Literal["hh", "polite"]
    steps: int
    """Of one epoch."""
    pairs_per_step: int
    epochs: int = 1
    betas: tuple[float, ...] = ()
    """Of a sweep."""


CASES = {
    "train-8": Case("`train`, 8 steps of 8 pairs of HH", "hh", 8, 8),
    "train-64": Case("`train`, 64 steps of 8 pairs of HH, one epoch", "hh", 64, 8),
    "train-500": Case("`train`, 500 steps of 4 short pairs, four epochs", "polite", 125, 4, 4),
    "sweep": Case("`sweep`, 8 values of β × 3 epochs of 4 steps of 8 pairs of HH", "hh", 4, 8, 3, BETAS),
}


class World:
    """The files of a case, and what both sides must agree on: the order of the pairs, and the adapter at the start."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        rows = message_rows(case.shape)
        self.base = shared_folder() / "models" / MODEL
        (folder / "all.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        os.environ["PE_DPO_CACHE"] = str(folder / "cache")  # of this process; those that are timed have their own
        everything = list(prepare_run(self._recipe("all.jsonl", "0")).data.train)
        count = case.steps * case.pairs_per_step
        self.pairs = draw_pairs(everything, count, seeds=100)
        taken = {pair.prompt_key for pair in self.pairs}
        by_prompt = {pair.prompt_key: pair for pair in everything}.values()
        spare = [pair for pair in by_prompt if pair.prompt_key not in taken and len(pair.prompt_ids) <= 512]
        held_out = random.Random(0).sample(spare, ceil(HELD_OUT_SHARE * count))
        for name, some in (("train.jsonl", self.pairs), ("test.jsonl", held_out)):
            lines = [rows[int(re.search(r":(\d+)$", pair.where)[1]) - 1] for pair in some]
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.held_out = len(held_out)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(self._words("train.jsonl", str(folder / "test.jsonl")), encoding="utf-8")
        recipe = load_recipe(self.recipe)
        prepared = prepare_run(recipe)
        if (len(prepared.data.train), len(prepared.data.held_out)) != (count, self.held_out):
            raise RuntimeError(
                f"{len(prepared.data.train)} and {len(prepared.data.held_out)} pairs of {count}, {self.held_out}"
            )
        trainer = build_trainer(recipe, prepared)
        batches = trainer.optimizer_batches()
        self.order: list[list[int]] = []
        for epoch in range(case.epochs):
            batches.set_epoch(epoch)
            self.order.append([index for batch in batches for index in batch])
        adapter = {name.replace(".default.", "."): one.detach() for name, one in trainer.model.named_parameters()}
        save_file({name: one.clone() for name, one in adapter.items() if "lora_" in name}, folder / "adapter.safetensors")

    @property
    def every(self) -> int:
        """Steps between evaluations and checkpoints, on both sides."""
        return ceil(self.case.steps * self.case.epochs / 10)

    def _words(self, train: str, held_out: str) -> str:
        case = self.case
        return (
            f"model: {{base: '{self.base}', quantize: none}}\n"
            f"adapter: {{rank: {RANK}, alpha: {ALPHA}}}\n"
            f"data: {{train: '{self.folder / train}', eval: {held_out}, max_length: 1024, bad_rows: drop}}\n"
            f"loss: {{preset: dpo, beta: {BETA}}}\n"
            f"train: {{pairs_per_step: {case.pairs_per_step}, epochs: {case.epochs}, learning_rate: {LEARNING_RATE}, "
            "schedule: constant}\n"
            f"output: '{self.folder / 'run'}'\n"
        )

    def _recipe(self, train: str, held_out: str) -> Any:
        path = self.folder / "whole.yaml"
        path.write_text(self._words(train, held_out), encoding="utf-8")
        return load_recipe(path)

    @cached_property
    def columns(self) -> dict[str, Any]:
        """Token facts for the results."""
        return {"tokens": facts(self.pairs)._asdict(), "held_out": self.held_out, **self.case._asdict()}


def message_rows(shape: Literal["hh", "polite"]) -> list[str]:
    """Return the lines of a file of pairs as messages: HH's, or short instructions."""
    folder = shared_folder() / "data"
    if shape == "hh":
        return (folder / "hh-harmless-explicit" / "train.messages.jsonl").read_text(encoding="utf-8").splitlines()
    lines = (folder / "rasbt-politeness" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["chosen"] != row["rejected"]]
    turns = [(f"{row['instruction']} {row['input']}".strip(), row["chosen"], row["rejected"]) for row in rows]
    named = [zip(("prompt", "chosen", "rejected"), ("user", "assistant", "assistant"), three, strict=True) for three in turns]
    return [json.dumps({name: [{"role": role, "content": text}] for name, role, text in three}) for three in named]


class Outcome(NamedTuple):
    """What a contestant took, and the loss of every step, run after run."""

    cpu_seconds: float
    peak_mib: float
    losses: list[list[float]]


def run_commands(settings: CommandSettings) -> None:
    """Time every contestant of a case in interleaved rounds, write and print."""
    case = CASES[settings.case]
    if settings.is_quick:
        case = case._replace(steps=min(4, case.steps), betas=case.betas[:2])
    world = World(case, temporary_folder())
    print("\n".join(facts_lines(case.title, facts(world.pairs))))
    best = best_size(settings, case)
    contestants: dict[str, Callable[[], Outcome]] = {
        "TRL default": lambda: of_trl(world, size=0),
        "TRL best": lambda: of_trl(world, size=best),
        OURS: lambda: of_ours(world, package_root()),
        OLD: lambda: of_ours(world, package_root(BEFORE)),
    }
    order, rounds = random.Random(0), []
    for number in range(1, settings.rounds + 1):
        names = order.sample(list(contestants), len(contestants))
        rounds.append({name: contestants[name]() for name in names})
        agreement = check_losses(rounds[-1])
        print(f"  round {number}: " + ", ".join(f"{n} {o.cpu_seconds:.1f} s" for n, o in rounds[-1].items()), flush=True)
        print("    losses: " + ", ".join(f"{name} {found:.1e}" for name, found in agreement.items()), flush=True)
        save(settings, content_of(world, rounds, agreement, best))
    print_rounds(content_of(world, rounds, agreement, best))


def content_of(world: World, rounds: Sequence[Mapping[str, Outcome]], agreement: dict[str, float], best: int) -> dict[str, Any]:
    """Return what is written down of a case."""
    names = list(rounds[0])
    seconds = {name: [one[name].cpu_seconds for one in rounds] for name in names}
    peers = ("TRL default", "TRL best", OLD)
    return {
        **world.columns,
        "trl_best_size": best,
        "trl_processes_run": min(TRL_VALUES, len(world.case.betas)) or 1,
        "losses_differ_by": agreement,
        "cpu_seconds": seconds,
        "peak_mib": {name: [one[name].peak_mib for one in rounds] for name in names},
        "ratios": {f"{name} over {peer}": list(ratio(seconds, name, peer)) for name in (OURS, OLD) for peer in peers},
    }


def print_rounds(content: Mapping[str, Any]) -> None:
    """Print seconds, memory and ratios."""
    for name, values in content["cpu_seconds"].items():
        print(f"  {name:<24} {spread(values)!s:>26} CPU s   {max(content['peak_mib'][name]):6.0f} MiB")
    for name, values in content["ratios"].items():
        print(f"  {name:<48} {values[0]:.2f} ({values[1]:.2f}–{values[2]:.2f})")


def of_ours(world: World, root: Path) -> Outcome:
    """Run `pe-dpo train` or `pe-dpo sweep` with an empty cache."""
    folder = emptied(world.folder / "ours")
    variables = environment(root, PE_DPO_CACHE=str(folder / "cache"))
    if not world.case.betas:
        spent = run_process(pe_dpo("train", str(world.recipe), "-o", str(folder / "run")), variables, folder)
        return Outcome(spent.cpu_seconds, spent.peak_mib, [losses_of_ours(folder / "run")])
    grid = "beta=" + ",".join(map(str, world.case.betas))
    command = pe_dpo("sweep", str(world.recipe), "--grid", grid, "--prompts", "0", "-o", str(folder / "sweep"))
    spent = run_process(command, variables, folder)
    runs = {load_recipe(path).loss.beta: path.parent for path in folder.glob("sweep/**/recipe.yaml")}
    return Outcome(spent.cpu_seconds, spent.peak_mib, [losses_of_ours(runs[beta]) for beta in world.case.betas])


def losses_of_ours(folder: Path) -> list[float]:
    """Return the loss of every step of a run folder."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def of_trl(world: World, *, size: int) -> Outcome:
    """Run TRL's script, once or for the first values of β, with an empty cache of data sets.

    Args:
        world: The case.
        size: pairs in a micro-batch, without checkpointing and with precomputed references; 0 for TRL's defaults.
    """
    case, folder = world.case, emptied(world.folder / "trl")
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": size or case.pairs_per_step,
        "gradient_accumulation_steps": case.pairs_per_step // size if size else 1,
        "num_train_epochs": case.epochs,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": world.every,
        "save_steps": world.every,
        "save_total_limit": KEPT_CHECKPOINTS,
    }
    if size:
        without = {"gradient_checkpointing": False, "precompute_ref_log_probs": True, "per_device_eval_batch_size": size}
        arguments |= without
    spent, losses = [], []
    for beta in case.betas[:TRL_VALUES] or (BETA,):
        asked = {
            "train": str(world.folder / "train.jsonl"), "test": str(world.folder / "test.jsonl"), "base": str(world.base),
            "weights": str(world.folder / "adapter.safetensors"), "output": str(folder / f"beta-{beta}"), "order": world.order,
            "arguments": arguments | {"beta": beta},
            "adapter": {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        }  # fmt: skip
        (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        script = [sys.executable, "-P", str(Path(__file__).with_name("trl_run.py")), str(folder / "asked.json")]
        spent.append(run_process(script, environment(HF_HOME=str(folder / "cache")), folder))
        state = load(folder / f"beta-{beta}" / "trainer_state.json")
        losses.append([line["loss"] for line in state["log_history"] if "loss" in line])
    more = max(0, len(case.betas) - len(spent))  # the first has the cold cache of data sets, the others are like the last
    cpu = sum(one.cpu_seconds for one in spent) + more * spent[-1].cpu_seconds
    return Outcome(cpu, max(one.peak_mib for one in spent), losses)


def check_losses(one: Mapping[str, Outcome]) -> dict[str, float]:
    """Return the largest relative difference of each contestant's losses to TRL's default, over all steps and runs.

    Raises:
        RuntimeError: it is more than `LOSS_TOLERANCE`.
    """
    true = one["TRL default"].losses
    found = {}
    for name, outcome in one.items():
        runs = zip(outcome.losses[: len(true)], true, strict=True)
        pairs = [(a, b) for ours, theirs in runs for a, b in zip(ours, theirs, strict=True)]
        found[name] = max(abs(a / b - 1) for a, b in pairs)
        if not found[name] <= LOSS_TOLERANCE:
            raise RuntimeError(f"{name}: losses differ from TRL's default by {found[name]:.1e}: {outcome.losses} {true}")
    return found


def best_size(settings: CommandSettings, case: Case) -> int:
    """Return TRL's fastest micro-batch for a case, as `--screen` found it; else one pair."""
    path = settings.out / f"commands-{case.shape}-screen.json"
    if not path.is_file():
        return 1
    seconds = load(path)["cpu_seconds"]
    return int(min(seconds, key=seconds.__getitem__))


def screen(settings: CommandSettings) -> None:
    """Time TRL without checkpointing and with precomputed references once for each size of micro-batch, and write it down."""
    case = CASES[settings.case]._replace(steps=8, epochs=1, betas=())
    world = World(case, temporary_folder())
    seconds = {}
    for size in SIZES:
        if case.pairs_per_step % size == 0:
            seconds[str(size)] = of_trl(world, size=size).cpu_seconds
            print(f"  {size} pairs: {seconds[str(size)]:.1f} CPU s", flush=True)
    named = CommandSettings("commands", case=f"{case.shape}-screen", out=settings.out)
    print(save(named, {"cpu_seconds": seconds, "steps": case.steps, "pairs_per_step": case.pairs_per_step}))
