"""The README's numbers are those of the results that were committed."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.peer


def test_the_readme_has_the_table_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import table

    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_on_speed_has_the_tables_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import PAGE, page_tables

    page = PAGE.read_text(encoding="utf-8")
    for name, table in page_tables().items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page


def test_every_step_and_command_was_checked_before_it_was_timed():
    """Steps against float64, ours within the limit or as near to it as TRL's; commands by all losses."""
    import json

    results, limits = ROOT / "benchmarks" / "results", {"fp32": 1e-4, "bf16": 2e-2, "nf4": 2e-2}
    rows = json.loads((results / "steps.json").read_text(encoding="utf-8"))["rows"]
    for name, row in rows.items():
        distances, limit = row["to_float64"], limits[name.split()[1]]
        assert row["cpu_seconds"].keys() == distances.keys()
        theirs = max(far["gradient"] for side, far in distances.items() if side.startswith("TRL "))
        for side, far in distances.items():
            assert far["loss"] <= limit
            assert far["gradient"] <= (2 * limit if side.startswith("TRL ") else max(limit, 1.1 * theirs))
    for path in (path for path in results.glob("commands-*.json") if "screen" not in path.name):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["losses_differ_by"].keys() == found["cpu_seconds"].keys()
        assert max(found["losses_differ_by"].values()) <= 2e-3
        for peer in ("default", "best"):
            over = [a / b for a, b in zip(found["cpu_seconds"][f"TRL {peer}"], found["cpu_seconds"]["ours"], strict=True)]
            assert found["ratios"][f"ours over TRL {peer}"][1:] == pytest.approx([min(over), max(over)])


def test_the_readme_has_what_the_headers_of_recipes_say_of_cards_and_hours(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import sizes_table

    assert f"<!-- sizes -->\n{sizes_table()}\n<!-- end -->" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_result_was_checked_for_agreement_before_it_was_timed():
    """Losses and gradients of every timed variant, against TRL's default, within the limits that the README states."""
    import json

    limits = {"fp32": 1e-4, "bf16": 2e-2, "nf4": 2e-2}
    results = sorted((ROOT / "benchmarks" / "results").glob("step-*.json"))
    assert len(results) >= 4
    for path in results:
        found = json.loads(path.read_text(encoding="utf-8"))
        limit = limits[found["settings"]["dtype"]]
        assert found["round_seconds"].keys() <= found["agreement"].keys()
        for differences in found["agreement"].values():
            for difference in differences.values():
                assert difference["loss"] <= limit
                assert difference["gradient"] <= limit


def test_the_benchmarks_readme_has_what_mixout_costs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import mixout_table

    assert mixout_table() in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_every_arm_of_mixouts_cost_was_checked_before_it_was_timed():
    """Value and gradients against the written-out weight, within the limits that the README states."""
    import json

    limits = {"fp32": 1e-5, "bf16": 2e-2}
    found = json.loads((ROOT / "benchmarks" / "results" / "mixout.json").read_text(encoding="utf-8"))
    assert len(found["layers"]) == 13
    for row in found["layers"]:
        assert row["round_seconds"].keys() == row["agreement"].keys()
        assert all(found <= limits[row["dtype"]] for arm in row["agreement"].values() for found in arm.values())
    for row in found["steps"]:
        assert row["round_seconds"].keys() == row["agreement"].keys()
        for arm in row["agreement"].values():
            assert max(arm["loss"], arm["gradient"]) <= {"fp32": 1e-4, "nf4": 2e-2}[row["dtype"]]


@pytest.mark.parametrize("name", ["column", "element"])
def test_an_arm_with_other_masks_than_mixout_says_is_not_timed(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import mixout_cost
    from benchmarks.agreement import Disagreement

    case = mixout_cost.Case(48, 4, 80)
    arm = mixout_cost.make_arms(case)[name]
    assert max(mixout_cost.check(name, arm, case).values()) < 1e-5
    own, weights = arm.mixout, arm.module.lora_variant["default"]
    weights.mixout = mixout_cost.attach(name, _like(arm.module))
    weights.mixout.draw = 7
    weights.layer = next(iter(weights.mixout.layers))
    assert arm.mixout is own
    with pytest.raises(Disagreement, match=name):
        mixout_cost.check(name, arm, case)


def test_the_element_form_keeps_no_matrix_for_the_backward(monkeypatch):
    """Plain LoRA keeps x Aᵀ, 80 × 4 numbers; the column form r × d and d besides; dropout its mask and what it left of x."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import mixout_cost

    arms = mixout_cost.make_arms(mixout_cost.Case(48, 4, 80))
    kept = {name: round(mixout_cost.kept_mib(arm) * 2**20) for name, arm in arms.items()}
    narrow = 80 * 4 * 4
    assert kept["plain"] == kept["plain, again"] == narrow
    assert kept["column"] == narrow + (4 + 1) * 48 * 4
    assert kept["lora_dropout"] == narrow + 2 * 80 * 48 * 4
    assert kept["element"] < 0.01 * 48 * 48 * 4


def _like(module):
    """Another model with a LoRA layer of the same shape."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from pe_dpo.model.lora import compute_in_base_dtype

    out_features, in_features = module.base_layer.weight.shape
    base = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).train()
    compute_in_base_dtype(model)
    return model


@pytest.fixture(autouse=True)
def _forget_benchmarks():
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        if not name.startswith("benchmarks.crash"):  # other tests hold functions of these, which processes look up by name
            del sys.modules[name]


def test_the_page_on_bases_has_the_table_of_architectures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.architectures.table import architectures_table

    table = architectures_table(ROOT / "benchmarks" / "results" / "architectures.json")
    assert f"<!-- architectures -->\n{table}\n<!-- end -->" in (ROOT / "docs" / "bases.md").read_text(encoding="utf-8")


def test_what_check_calls_ready_is_merged_and_equal_to_plain_peft(monkeypatch):
    """Of at least 60 kinds of bases, in float32 and on nf4; every adapter of them moved."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.architectures.models import ARCHITECTURES
    from benchmarks.architectures.table import is_equal
    from benchmarks.results import load

    rows = load(ROOT / "benchmarks" / "results" / "architectures.json")["rows"]
    assert rows.keys() == ARCHITECTURES.keys()
    assert len(rows) >= 60
    ready = {(name, way): one for name, row in rows.items() for way, one in row["found"].items() if not one["check"]["code"]}
    assert [key for key, one in ready.items() if not is_equal(one)] == []
    assert len(ready) >= 2 * len(rows) - 4


def test_the_page_on_engines_has_the_table_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.engines.table import END, PAGE, START, engines_table

    table = engines_table(ROOT / "benchmarks" / "results" / "engines.json")
    assert f"{START}{table}{END}" in PAGE.read_text(encoding="utf-8")


def test_every_engine_was_measured_and_is_within_its_bounds(monkeypatch):
    """But for what is known of an engine, which is named beside its number."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.engines.measure import CASES
    from benchmarks.results import load

    engines = load(ROOT / "benchmarks" / "results" / "engines.json")["engines"]
    for name, cases in CASES.items():
        rows = engines[name]["rows"]
        assert [(row["artefact"], row["as_in"]) for row in rows] == [(case.artefact, case.as_in) for case in cases]
        assert [row for row in rows if row["broken"]] == []
        assert all(row.get("difference", 0) < row["bound"] for row in rows if not row["known"])
    assert len(engines) == 7


def test_a_process_counts_with_its_children_and_has_a_peak_of_its_own(monkeypatch):
    """A quarter of a second in a child of the child; and 20 MB are not the 300 that this process has."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.processes import CommandFailed, environment, run_process

    burn = "import time\nend = time.process_time() + 0.25\nwhile time.process_time() < end: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {burn!r}])"
    spent = run_process([sys.executable, "-I", "-S", "-c", parent], environment(), ROOT)
    assert 0.25 < spent.cpu_seconds < 0.6
    assert 5 < spent.peak_mib < 60
    with pytest.raises(CommandFailed, match="ended with 3:\nno such thing"):
        run_process([sys.executable, "-I", "-S", "-c", "print('no such thing'); raise SystemExit(3)"], environment(), ROOT)


def test_runs_whose_losses_differ_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.commands import Outcome, check_losses

    theirs = Outcome(1.0, 1.0, [[0.7, 0.5], [0.7, 0.4]])
    found = check_losses({"TRL default": theirs, "ours": theirs._replace(losses=[[0.7, 0.5005], [0.7, 0.4]])})
    assert found["ours"] == pytest.approx(1e-3)
    with pytest.raises(RuntimeError, match="ours: losses differ"):
        check_losses({"TRL default": theirs, "ours": theirs._replace(losses=[[0.7, 0.5], [0.7, 0.41]])})


def test_the_search_for_crashes_found_none():
    """`python -m benchmarks.fuzz`, of which the crashes it found before became tests."""
    import json

    found = json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text(encoding="utf-8"))
    assert set(found["cases"]) == {"rows", "recipe", "template", "safetensors", "adapter", "base"}
    assert min(found["cases"].values()) >= 10_000 and not any(found["crashes"].values())


def test_the_page_of_what_works_with_what_has_the_tables_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.results import load
    from benchmarks.support import KINDS, PAGE, page_tables

    page = PAGE.read_text(encoding="utf-8")
    tables = page_tables()
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page
    rows = load(ROOT / "benchmarks" / "results" / "architectures.json")["rows"]
    kinds = [line.split(" | ") for line in tables["bases"].splitlines()[2:]]
    assert [cells[0].strip("| ") for cells in kinds] == list(KINDS)
    assert sum(int(cells[1]) for cells in kinds) == len(rows)
    refused = [name for name, row in rows.items() if row["found"]["nf4"]["check"]["code"]]
    assert ["`" + name + "`" for name in refused] == [cells[4] for cells in kinds if cells[4] != "–"]


def test_the_page_on_merging_has_what_ways_of_merging_keep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import merge_table

    page = (ROOT / "docs" / "explanation" / "merging.md").read_text(encoding="utf-8")
    assert f"<!-- merge -->\n{merge_table()}\n<!-- end -->" in page
