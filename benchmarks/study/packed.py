"""The raw results of a sweep on real pairs in three files without any text, and back.

`pack` keeps the numbers of every run, snapshot and scaled adapter; `unpack` makes a folder of them that `pe-dpo compare` and
`pe-dpo report` read. Log-probs are kept in float32 (1e-5 nats here); losses, scores and rewards are computed from them again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pe_dpo.experiments.plan import read_plan
from pe_dpo.objective import Loss, PairLogprobs
from pe_dpo.recipe import recipe_to_yaml
from pe_dpo.runs.files import ANSWERS_FILE, EVALUATION_FILE, PAIRS_FILE, SWEEP_FILE
from pe_dpo.runs.run import Run

PAIR_NUMBERS = (
    *("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_lengths", "rejected_lengths"),
    *("initial_chosen", "initial_rejected"),
)
ANSWER_NUMBERS = ("kl", "log_policy", "log_reference", "entropy")
OF_A_RUN = (
    *("status", "step", "before", "after", "remarks", "loss", "pairs", "hashes", "versions", "seconds", "start"),
    "scoring",
)


def pack(sweep: Path, folder: Path) -> None:
    """Write plan.json, pairs.parquet and answers.parquet of the finished runs of a sweep."""
    plan = read_plan(sweep)
    runs, pairs, answers = {}, [], []
    for point in plan.points:
        run = sweep / point.folder
        record = json.loads((run / "run.json").read_text()) if (run / "run.json").is_file() else {"status": "not begun"}
        runs[point.folder] = {key: record[key] for key in OF_A_RUN if key in record}
        if record["status"] != "finished":
            continue
        for state in _states(run):
            name = str(state.relative_to(sweep))
            pairs.append(_thin(pq.read_table(state / PAIRS_FILE), name, PAIR_NUMBERS, ["where", "prompt_key"]))
            answers.append(_thin(pq.read_table(state / ANSWERS_FILE), name, ANSWER_NUMBERS,
                                 ["prompt_key", "sample", "tokens", "ended"]))  # fmt: skip
            runs[point.folder].setdefault("evaluations", {})[name] = _without_intervals(state / EVALUATION_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    plan_text = json.loads((sweep / SWEEP_FILE).read_text())
    recipe = recipe_to_yaml(_without_places(plan.recipe))
    content = {"sweep": plan_text, "recipe": recipe, "runs": _rounded(_relative(runs, sweep))}
    (folder / "plan.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    for name, tables in (("pairs", pairs), ("answers", answers)):
        pq.write_table(pa.concat_tables(tables), folder / f"{name}.parquet", compression="zstd", use_dictionary=True)


def unpack(folder: Path, sweep: Path) -> None:
    """Write a sweep folder from packed files; without adapters, texts and metrics along the way."""
    content = json.loads((folder / "plan.json").read_text())
    sweep.mkdir(parents=True)
    (sweep / SWEEP_FILE).write_text(json.dumps(content["sweep"], indent=1))
    (sweep / "recipe.yaml").write_text(content["recipe"])
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("pairs", "answers")}
    plan = read_plan(sweep)
    for point, recipe in zip(plan.points, plan.recipes, strict=True):
        run, record = sweep / point.folder, content["runs"][point.folder]
        run.mkdir(parents=True)
        evaluations = record.pop("evaluations", {})
        (run / "run.json").write_text(json.dumps(record, indent=1))
        (run / "recipe.yaml").write_text(recipe_to_yaml(recipe))
        for name, evaluation in evaluations.items():
            state = sweep / name
            state.mkdir(parents=True, exist_ok=True)
            (state / EVALUATION_FILE).write_text(json.dumps(evaluation, indent=1))
            pairs, answers = (_of(tables[kind], name) for kind in ("pairs", "answers"))
            pq.write_table(_with_loss(pairs, recipe), state / PAIRS_FILE)
            empty = pa.array([""] * len(answers))
            pq.write_table(answers.append_column("prompt", empty).append_column("answer", empty), state / ANSWERS_FILE)


def _states(run: Path) -> Iterator[Path]:
    yield run
    yield from sorted(run.glob("snapshots/*"))
    yield from (state.folder for state in Run(run).scaled)


def _without_intervals(path: Path) -> dict[str, Any]:
    """What was measured; intervals of shares follow from it."""
    return {key: part for key, part in json.loads(path.read_text()).items() if key != "intervals"}


def _thin(table: pa.Table, folder: str, numbers: tuple[str, ...], others: list[str]) -> pa.Table:
    columns: dict[str, Any] = {"folder": pa.array([folder] * len(table)).dictionary_encode().cast(pa.string())}
    columns |= {name: table[name] for name in others}
    columns |= {name: table[name].cast(pa.float32(), safe=False) for name in numbers}
    return pa.table(columns)


def _of(table: pa.Table, folder: str) -> pa.Table:
    own = table.filter(pc.equal(table["folder"], folder)).drop_columns(["folder"])
    narrow = [name for name in own.column_names if own.schema.field(name).type == pa.float32()]
    return pa.table({name: own[name].cast(pa.float64()) if name in narrow else own[name] for name in own.column_names})


def _with_loss(pairs: pa.Table, recipe: Any) -> pa.Table:
    tensors = {name: torch.from_numpy(pairs[name].to_numpy().copy()) for name in PAIR_NUMBERS}
    lengths = tensors["chosen_lengths"], tensors["rejected_lengths"]
    policy = PairLogprobs(tensors["policy_chosen"], tensors["policy_rejected"], *lengths)
    reference = PairLogprobs(tensors["reference_chosen"], tensors["reference_rejected"], *lengths)
    out = Loss(**recipe.loss.coefficients())(policy, reference, torch.zeros(len(pairs)))
    for name in ("loss", "score", "weight", "chosen_reward", "rejected_reward"):
        pairs = pairs.append_column(name, pa.array(getattr(out, name).numpy()))
    return pairs


def _without_places(recipe: Any) -> Any:
    """The recipe with the names of base and data alone, not where they lay."""
    model = recipe.model.model_copy(update={"base": Path(recipe.model.base).name})
    data = recipe.data.model_copy(update={"train": "/".join(Path(recipe.data.train).parts[-2:])})
    store = recipe.reference.model_copy(update={"store": None})
    return recipe.model_copy(update={"model": model, "data": data, "reference": store, "output": "sweep"})


def _rounded(content: Any) -> Any:
    """The same with seven digits of every number."""
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value) for value in content]
    return float(f"{content:.7g}") if isinstance(content, float) else content


def _relative(content: Any, sweep: Path) -> Any:
    """The same without the paths of the machine that ran it."""
    text = json.dumps(content)
    for place in {str(sweep.resolve()), str(sweep)}:
        text = text.replace(f"{place}/", "")
    return json.loads(text)
