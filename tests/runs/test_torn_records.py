"""Records of a run that are torn, edited or foreign: whoever reads them gets a line that names the file, or goes without.

One tiny sweep, as its runs leave it; each example damages one file of it and reads it again with all that reads runs.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_runs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pe_dpo.errors import PeDpoError, RunFolderError, UsageError
from pe_dpo.experiments.plan import read_plan
from pe_dpo.runs.checkpoints import commit_checkpoint, staging_folder, unusable
from pe_dpo.runs.observations import read_observations
from pe_dpo.runs.records import read_base
from pe_dpo.runs.run import Run
from pe_dpo.runs.serving import describe_folder, steps_to_serve
from pe_dpo.runs.writing import check_run_folder

ALIEN: list[Any] = [
    None,
    True,
    0,
    -1,
    3.5,
    1e999,
    float("nan"),
    "",
    "x",
    "\x00",
    "../..",
    "9" * 5000,
    [],
    [1],
    {},
    {"a": 1},
    [[]],
]
"""What may stand anywhere instead of what belongs there."""
EXAMPLES = int(os.environ.get("PE_DPO_EXAMPLES", "15"))


def write_sweep(folder: Path) -> Path:
    """A sweep of one run that has everything a run can leave, but weights."""
    fake_runs.write_sweep(
        folder, [{}], seeds=(0,), pairs=4, prompts=2, snapshots=1, scales=(0.5,), samples=1, steps=2, scored=False
    )
    run = folder / "runs" / "base" / "seed-0"
    base = {"id": "a/base", "revision": None, "quantize": "nf4", "dtype": "float32", "quantized_layers": ["q"], "tensors": {}}
    (run / "base.json").write_text(json.dumps(base))
    (run / "adapter_model.safetensors").write_bytes(b"")
    report = {"held_out_rows": ["a:1"], "files": {"a": 1}, "template_date": "2026-01-02", "held_out_from": "a"}
    (run / "data_report.json").write_text(json.dumps(report))
    info = json.loads((run / "run.json").read_text())
    info |= {"id": "x", "memory": {"counted": 1e9, "measured": 1e9, "of": "RAM"}, "mixout": {"margin_noise": 0.5}}
    info |= {"gamma_calibration": {"asked": "scale:1", "gamma": 0.1, "interval": [0.1, 0.2]}}
    (run / "run.json").write_text(json.dumps(info))
    (staging_folder(run) / "checkpoint-2").mkdir(parents=True)
    (staging_folder(run) / "checkpoint-2" / "a.bin").write_bytes(b"1")
    commit_checkpoint(run, 2, Run(run).inputs, keep=1)
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("torn") / "sweep")


@pytest.fixture
def own(sweep: Path, tmp_path: Path) -> Path:
    """A copy of the sweep to be damaged for good."""
    return shutil.copytree(sweep, tmp_path / "sweep")


def readers(sweep: Path) -> Iterator[Callable[[], Any]]:
    """All that reads the records of a run."""
    folder = sweep / "runs" / "base" / "seed-0"
    for state in (Run(folder), *Run(folder).snapshots, *Run(folder).scaled):
        yield lambda state=state: (state.evaluation, state.metrics_of_pairs, state.intervals, state.answer_limit)
        yield lambda state=state: (state.estimate("kl"), state.estimate("win_rate"), state.generation)
        yield lambda state=state: (state.pairs(), state.answers())
    run = Run(folder)
    yield lambda: (run.info.describe_memory(), run.inputs, run.remarks, run.data_report, run.kappa, run.asked_gamma)
    yield lambda: (run.curve("loss"), run.has_held_out, run.metrics)
    yield lambda: [unusable(checkpoint, run.inputs) for checkpoint in run.checkpoints()]
    yield lambda: run.resume_point()
    yield lambda: check_run_folder(folder, run.recipe, resume=True, overwrite=False)
    yield lambda: (read_base(folder), describe_folder(folder), steps_to_serve(folder))
    yield lambda: read_plan(sweep)
    yield lambda: read_observations([sweep])


def read_all(sweep: Path) -> list[str]:
    """What all readers say that cannot go on."""
    said = []
    try:
        every = list(readers(sweep))
    except PeDpoError as error:
        return [str(error)]
    for read in every:
        try:
            read()
        except PeDpoError as error:
            said.append(str(error))
    return said


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield above
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from places(value, (*above, key))


def damage(path: Path, moment: random.Random) -> None:
    """Damage a file as a kill, an editor or another program does."""
    data = path.read_bytes()
    if path.suffix == ".json" and moment.random() < 0.7:
        tree = json.loads(data)
        *above, last = moment.choice([place for place in places(tree) if place])
        holder = tree
        for key in above:
            holder = holder[key]
        if moment.random() < 0.25:
            del holder[last]
        else:
            holder[last] = moment.choice(ALIEN)
        path.write_text(json.dumps(tree))
        return
    at = moment.randrange(len(data) + 1)
    foreign = [b"\xff\xfe", b"{", b"\n[1]\n", b'\n{"step": "a"}\n', b'\n{"step": 1, "loss": {}}\n', b"[" * 99_999]
    cut, blank, other = data[:at], data[:at] + bytes(40) + data[at + 40 :], data[:at] + moment.choice(foreign) + data[at:]
    path.write_bytes(moment.choice([cut, blank, other, b""]))


def test_what_is_whole_is_read(sweep: Path) -> None:
    assert read_all(sweep) == []


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
@pytest.mark.slow
def test_whatever_happened_to_a_record_a_line_is_all_that_comes_out(sweep: Path, seed: int) -> None:
    moment = random.Random(seed)
    files = [path for path in sorted(sweep.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml", ".parquet")]
    path = moment.choice(files)
    whole = path.read_bytes()
    try:
        damage(path, moment)
        said = read_all(sweep)
    finally:
        path.write_bytes(whole)
    assert all("\x00" not in line for line in said)


WRONG = [
    ("run.json", '{"memory": {"of": "RAM"}}', "run.json: memory is {'of': 'RAM'}, counted is missing"),
    ("run.json", '{"status": ["finished"]}', "run.json: status is ['finished'], input should be a valid string"),
    ("evaluation.json", '{"generation": {"kl": {"mean": "a"}}}', "evaluation.json: generation.kl.mean is 'a', input should"),
    ("data_report.json", '{"held_out_rows": 3}', "data_report.json: held_out_rows is 3, input should be a valid list"),
    ("base.json", '{"id": "a", "quantize": "nf4", "dtype": "x); y"}', "base.json: dtype is 'x); y', input should"),
    ("base.json", '{"id": "a"}', "base.json: quantize is missing; take another copy of"),
    ("metrics.jsonl", '{"step": 1}\n{"step": "b"}\n', "metrics.jsonl:2: step is 'b', which is no step; remove that line"),
    ("../../../sweep.json", '{"points": [{}], "grids": [], "seeds": []}', "sweep.json: points.0.name is missing; restore"),
]


@pytest.mark.parametrize(("file", "content", "said"), WRONG, ids=range(len(WRONG)))
def test_a_record_that_cannot_be_is_named_with_its_entry(own: Path, file: str, content: str, said: str) -> None:
    (own / "runs" / "base" / "seed-0" / file).write_text(content)
    lines = read_all(own)
    assert [line for line in lines if said in line], lines
    assert all("restore" in line or "take another copy" in line or "remove" in line or "again" in line for line in lines), lines


def test_a_sweep_whose_plan_leads_out_of_its_folder_is_refused(own: Path) -> None:
    plan = json.loads((own / "sweep.json").read_text())
    plan["points"][0]["folder"] = "../elsewhere"
    (own / "sweep.json").write_text(json.dumps(plan))
    for read in (read_plan, lambda folder: read_observations([folder])):
        with pytest.raises(UsageError, match=r"points.0.folder is '../elsewhere', should be a folder below that of the sweep"):
            read(own)


TAILS = {
    "half": b'{"step": 3, "lo',
    "NUL": bytes(64),
    "without its end": b'{"step": 3, "loss": 0.5',
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_the_half_last_line_of_a_killed_run_is_no_matter(own: Path, tail: bytes) -> None:
    run = Run(own / "runs" / "base" / "seed-0")
    whole = run.curve("loss")
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert run.curve("loss") == whole
    assert read_all(own) == []


def test_a_manifest_of_another_kind_is_a_checkpoint_that_is_not_whole(own: Path) -> None:
    run = Run(own / "runs" / "base" / "seed-0")
    for content in ('{"files": {"a.bin": 3}}', '{"files": {"a.bin": {"bytes": 1, "sha256": "x"}}, "inputs": []}', "[" * 99_999):
        (run.folder / "checkpoint-2" / "MANIFEST.json").write_text(content)
        with pytest.raises(RunFolderError, match=r"passed over: MANIFEST\.json cannot be read"):
            run.resume_point()
