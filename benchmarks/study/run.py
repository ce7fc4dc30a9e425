"""Run an experiment, or go on with it; measure what its answers are worth; keep the numbers without texts.

FOLDER/NAME/PART/…     the sweeps, as `pe-dpo sweep` leaves them
OUT/NAME.parquet       a row for every measured state of a run: log-probs of held-out pairs, KL and worth of its answers
OUT/NAME.json          what all states share: kinds and π0's log-probs of the pairs, worth of π0's answers
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from benchmarks.results import machine
from benchmarks.study.designs import Part, parts
from benchmarks.study.vale import question_of, reference_worth, worth
from pe_dpo.experiments.plan import read_plan
from pe_dpo.experiments.sweep import sweep
from pe_dpo.metrics.table import AnswerTable, PairTable
from pe_dpo.runs.files import SWEEP_FILE
from pe_dpo.runs.run import Measurements, Run

REFERENCE_SAMPLES = 64
NUMBERS = Path(__file__).resolve().parents[1] / "results" / "study" / "vale"
"""Where they are kept."""


def run(name: str, folder: Path) -> None:
    """Train every run of an experiment that is not finished."""
    for part in parts(name):
        states = sweep(part.plan(folder / name))
        finished = sum(state.status == "finished" for state in states)
        print(f"{name}/{part.name}: {finished} of {len(states)} runs are finished", flush=True)


def collect(name: str, folder: Path, out: Path = NUMBERS) -> None:
    """Write the numbers of all finished sweeps of an experiment, without a text.

    Raises:
        ValueError: states were measured on other pairs or prompts than the first one.
    """
    rows: list[dict[str, Any]] = []
    shared: dict[str, Any] | None = None
    initial: dict[str, list[float]] = {}
    for part in parts(name):
        sweep_folder = folder / name / part.name / "sweep"
        if not (sweep_folder / SWEEP_FILE).is_file():
            continue
        points = [(point, Run(sweep_folder / point.folder)) for point in read_plan(sweep_folder).points]
        if not all(trained.info.is_finished for _, trained in points):
            print(f"{name}/{part.name}: is not finished and is left out")
            continue
        for point, trained in points:
            for state in _states(trained):
                pairs, answers = _tables(state)
                if shared is None:
                    shared = _shared(pairs, answers, folder / name / "held-out.jsonl")
                if list(zip(pairs.where, answers.prompt_key, strict=False)) != shared["keys"]:
                    raise ValueError(f"{state.folder}: was measured on other pairs or prompts than the first one")
                initial.setdefault(part.name, _initial(pairs))
                rows.append(_row(part, point.settings, point.seed, trained, state, pairs, answers))
    if shared is None:
        raise ValueError(f"{folder / name}: no run of this experiment is finished")
    del shared["keys"]
    shared["initial_delta"] = {part: known for part, known in initial.items() if known != initial[next(iter(initial))]}
    out.mkdir(parents=True, exist_ok=True)
    numbers = [f"{column}.list.element" for column in ("chosen", "rejected", "kl")]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        out / f"{name}.parquet",
        compression="zstd",
        use_dictionary=["part", "settings"],
        use_byte_stream_split=numbers,  # half of the bytes
    )
    content = {"command": f"python -m benchmarks.study collect {name}", "machine": machine(), **shared}
    (out / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{len(rows)} states of {name}")


def _states(trained: Run) -> Iterator[Measurements]:
    yield trained
    yield from (state for state in trained.snapshots if state.step != trained.info.step)
    yield from trained.scaled


def _tables(state: Measurements) -> tuple[PairTable, AnswerTable]:
    pairs, answers = state.pairs(with_texts=False), state.answers()
    if pairs is None or answers is None:
        raise ValueError(f"{state.folder}: has no held-out pairs or no answers")
    return pairs.in_order(), answers.in_order()


def _initial(pairs: PairTable) -> list[float]:
    """Δπ of step 0, nats."""
    return [round(float(value), 4) for value in pairs.delta("initial")]


def _row(
    part: Part, settings: dict[str, Any], seed: int, trained: Run, state: Measurements, pairs: PairTable, answers: AnswerTable
) -> dict[str, Any]:
    """The numbers of one state; log-probs in nats."""
    questions = [question_of(prompt) for prompt in answers.prompt]
    values = [worth(*one) for one in zip(questions, answers.answer or (), strict=True)]
    return {
        "part": part.name,
        "draw": part.draw,
        "settings": json.dumps(settings, sort_keys=True),
        "seed": seed,
        "step": state.step,
        "is_end": state is trained,
        "scale": state.scale,
        "seconds": trained.info.seconds,
        "chosen": pairs.policy_chosen.astype(np.float32),
        "rejected": pairs.policy_rejected.astype(np.float32),
        "kl": answers.kl.astype(np.float32),
        "worth": np.asarray(values, dtype=np.int8),
    }


def _shared(pairs: PairTable, answers: AnswerTable, held_out: Path) -> dict[str, Any]:
    """What all states have in common; `keys` tells whether they have."""
    kinds = [json.loads(line)["kind"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    lines = [int(where.rsplit(":", 1)[-1]) for where in pairs.where]
    at = {key: number for number, key in enumerate(answers.prompt_key)}
    return {
        "keys": list(zip(pairs.where, answers.prompt_key, strict=False)),
        "kinds": [kinds[line - 1] for line in lines],
        "pair_questions": [questions_by_line(held_out)[line - 1] for line in lines],
        "chosen_lengths": pairs.chosen_lengths.tolist(),
        "rejected_lengths": pairs.rejected_lengths.tolist(),
        "reference_chosen": [round(value, 5) for value in pairs.reference_chosen.tolist()],
        "reference_rejected": [round(value, 5) for value in pairs.reference_rejected.tolist()],
        "questions": [question_of(prompt) for prompt in answers.prompt],
        "reference_worth": reference_worth([answers.prompt[number] for number in at.values()], samples=REFERENCE_SAMPLES),
    }


def questions_by_line(held_out: Path) -> list[str]:
    """Return the question of every row of the held-out file."""
    return [json.loads(line)["prompt"][-1]["content"] for line in held_out.read_text(encoding="utf-8").splitlines()]
