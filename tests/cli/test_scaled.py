"""`pe-dpo eval --scale` and `pe-dpo sweep --scale-control`: the finished adapter scaled toward the reference."""

import json
import shutil

import pytest

FILES = {"eval_pairs.parquet", "generations.parquet", "evaluation.json"}
SAMPLING = ("--prompts", 9, "--max-new-tokens", 4)
SAMPLED = ("--prompts", 9, "--set", "generation.max_new_tokens=4", "--set", "train.max_steps=1")


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run to write into."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.mark.slow
def test_eval_writes_what_it_measured_at_each_scale_and_shows_it(pe_dpo, run):
    done = pe_dpo("eval", run, "--scale", "0.5,0.75", *SAMPLING)
    assert (done.code, done.err) == (0, "")
    assert {path.name for path in (run / "scaled").iterdir()} == {"a-0.5", "a-0.75"}
    assert all({path.name for path in folder.iterdir()} == FILES for folder in (run / "scaled").iterdir())
    _, rest = done.out.split("The adapter scaled toward the reference, W0 + a·ΔW")
    rows = [line.split("│")[1].strip() for line in rest.splitlines() if line.startswith("│")]
    assert rows == ["0.5", "0.75", "1"]
    assert "…" not in rest  # in the 80 columns of a test, no title is cut, so that each column can be told


@pytest.mark.slow
def test_as_json_the_scales_stand_beside_the_rest(pe_dpo, run, tmp_path):
    done = pe_dpo("eval", run, "--scale", "0.5", *SAMPLING, "--json", "-o", tmp_path / "out")
    found = json.loads(done.out)
    written = json.loads((tmp_path / "out" / "scaled" / "a-0.5" / "evaluation.json").read_text())
    assert found["scaled"]["0.5"]["metrics"] == written["pairs"] != found["metrics"]
    assert found["scaled"]["0.5"]["generation"]["kl"] == written["generation"]["kl"]
    assert not (run / "scaled").exists()


def test_pairs_that_are_not_the_runs_own_are_measured_and_not_written_into_it(pe_dpo, run, tiny_pairs):
    done = pe_dpo("eval", run, "--scale", "0.5", "--data", tiny_pairs / "train.jsonl")
    assert done.code == 0
    assert "The adapter scaled toward the reference" in done.out
    assert not (run / "scaled").exists()


@pytest.mark.slow
def test_a_scorer_judges_the_answers_at_each_scale_too(pe_dpo, run, tmp_path):
    (tmp_path / "by_length.py").write_text("def score(prompts, answers):\n    return [-len(answer) for answer in answers]\n")
    done = pe_dpo("eval", run, "--scale", "0.5", *SAMPLING, "--scorer", f"{tmp_path / 'by_length.py'}:score")
    assert done.code == 0, done.err
    for place in (run, run / "scaled" / "a-0.5"):
        assert "win_rate" in json.loads((place / "evaluation.json").read_text())["generation"]
    found = json.loads(pe_dpo("compare", run, "--json", "--repeats", 200).out)
    assert found["metric"] == "win_rate"
    assert [arm["name"] for arm in found["arms"]] == ["the base recipe", "the base recipe (scaled to 0.5)"]


def test_without_answers_only_pairs_are_measured(pe_dpo, run):
    assert pe_dpo("eval", run, "--scale", "0.5").code == 0
    assert {path.name for path in (run / "scaled" / "a-0.5").iterdir()} == FILES - {"generations.parquet"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0.5,1", "--scale 0.5,1: 1 does not lie between 0, which is the reference"),
        ("half", "--scale half: write fractions of the adapter with commas between them, as 0.5,0.75"),
        ("0.5,,0.75", "write fractions"),
        ("0.5,0.5", "--scale 0.5,0.5: 0.5 is there twice"),
    ],
)
def test_what_is_no_list_of_fractions_is_refused(pe_dpo, run, recipe_file, tmp_path, words, message):
    done = pe_dpo("eval", run, "--scale", words)
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(done.err.split())
    control = pe_dpo("sweep", recipe_file, "-o", tmp_path / "sweep", "--scale-control", words)
    assert (control.code, control.out) == (2, "")
    assert message.replace("--scale ", "--scale-control ") in " ".join(control.err.split())


def test_an_adapter_without_a_run_is_refused_before_anything_is_loaded(pe_dpo, trained, tiny_pairs, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(trained[0] / name, tmp_path)
    done = pe_dpo("eval", tmp_path, "--data", tiny_pairs / "test.jsonl", "--scale", "0.5")
    assert (done.code, done.out) == (2, "")
    assert "is a bare adapter, and what --scale measures is kept in the folder of a run" in " ".join(done.err.split())


@pytest.mark.slow
def test_a_sweep_measures_every_point_at_each_scale_and_compare_reads_it(pe_dpo, recipe_file, tmp_path):
    folder = tmp_path / "sweep"
    command = ("sweep", recipe_file, "--grid", "gamma=1x,0", *SAMPLED, "-o", folder)
    assert pe_dpo(*command, "--scale-control", "0.5,0.75").code == 0
    for name in ("base", "gamma=0"):
        for scale in (0.5, 0.75):
            assert {path.name for path in (folder / "runs" / name / "seed-0" / "scaled" / f"a-{scale}").iterdir()} == FILES
    found = json.loads(pe_dpo("compare", folder, "--baseline", "scale", "--json", "--repeats", 200).out)
    assert found["baseline"] == "scaling"
    names = [arm["name"] for arm in found["arms"]]
    assert names[:2] == ["the base recipe", "γ = 0"]
    assert names[2:] == [f"{name} (scaled to {scale})" for name in ("the base recipe", "γ = 0") for scale in (0.5, 0.75)]
    table = pe_dpo("compare", folder, "--repeats", 200).out
    assert "6 measured policies" in table
    report = pe_dpo("report", folder)
    assert report.code == 0, report.err


@pytest.mark.slow
def test_a_sweep_that_ran_without_is_another_sweep_as_with_snapshots(pe_dpo, recipe_file, tmp_path):
    command = ("sweep", recipe_file, "--prompts", 0, "--set", "train.max_steps=1", "-o", tmp_path / "sweep")
    assert pe_dpo(*command).code == 0
    for options, key in ((("--scale-control", "0.5"), "generation.scales: [] → [0.5]"),
                         (("--snapshots", 1), "generation.snapshots: 0 → 1")):  # fmt: skip
        done = pe_dpo(*command, *options)
        assert done.code == 2
        assert "holds a sweep that started from another recipe" in done.err
        assert key in done.err
