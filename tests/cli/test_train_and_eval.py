"""`pe-dpo train` and `pe-dpo eval` on the tiny world: what they print, and that what is evaluated is what was trained."""

import json
import re
import shutil

import pyarrow.parquet
import pytest
import torch


def metrics_of(done):
    """What `eval --json` printed; nothing but JSON may be there."""
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


@pytest.fixture(scope="module")
def evaluated(pe_dpo, trained):
    return metrics_of(pe_dpo("eval", trained[0], "--json"))


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    """The trained adapter as anybody's: only what PEFT needs."""
    folder = tmp_path_factory.mktemp("adapter")
    for path in trained[0].iterdir():
        if path.name.startswith(("adapter_", "tokenizer", "chat_template")):
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def merged(trained, tiny_base, tmp_path_factory):
    """Base and adapter merged by PEFT, with their tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    PeftModel.from_pretrained(base, str(trained[0])).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- train


def test_train_says_what_it_does_and_what_came_of_it(trained):
    folder, done = trained
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "read 33 rows: train.jsonl (24), test.jsonl (9)"
    assert "loss: DPO, beta 0.1, gamma 0.1, margin 0, link logistic, reduce sum; formula: pe-dpo recipes show RECIPE" in lines
    assert "24 pairs to train on, 9 held out (test.jsonl)" in lines
    assert any(line.startswith("step 0: max |log π − log π0| 0, loss 0.6931") for line in lines)
    assert any(re.fullmatch(r"step 2/2  loss \d\.\d{4}  reward accuracy [01]\.\d\d  \d+ s", line) for line in lines)
    assert "What training changed on 9 held-out pairs (95 % Wilson intervals)" in lines
    assert lines[-2:] == [
        f"the adapter lies in {folder}; next: pe-dpo merge {folder} -o MODEL",
        f"how it is loaded and served: pe-dpo serve {folder}",
    ]


def test_train_leaves_a_finished_run_of_the_steps_that_were_asked_for(trained):
    run = json.loads((trained[0] / "run.json").read_text())
    assert (run["status"], run["step"]) == ("finished", 2)
    assert run["pairs"] == {"train": 24, "held_out": 9}


@pytest.mark.slow
def test_training_the_run_s_own_recipe_again_gives_the_same_adapter(pe_dpo, trained, tmp_path):
    done = pe_dpo("train", trained[0] / "recipe.yaml", "-o", tmp_path / "again")
    assert done.code == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (trained[0] / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "loss"), [
    (["--gamma", "0", "--margin", "1"], {"preset": "dpo", "gamma": 0.0, "margin": 1.0, "link": "logistic"}),
    (["--loss", "hinge"], {"preset": "hinge", "gamma": "1x", "margin": 1.0, "link": "hinge"}),
    (["--loss", "simpo", "--set", "loss.reduce=sum"], {"preset": "simpo", "gamma": 0.0, "margin": 1.0, "reduce": "sum"}),
])  # fmt: skip
def test_the_dials_reach_the_run(pe_dpo, recipe_file, tmp_path, arguments, loss):
    from pe_dpo.recipe import load_recipe

    done = pe_dpo("train", recipe_file, "-o", tmp_path / "run", "--set", "train.max_steps=1", *arguments)
    assert (done.code, done.err) == (0, "")
    found = load_recipe(tmp_path / "run" / "recipe.yaml").loss.model_dump()
    assert {key: found[key] for key in loss} == loss
    assert json.loads((tmp_path / "run" / "run.json").read_text())["reference_card"]["run_in_training"] is (loss["gamma"] != 0)


@pytest.mark.slow
def test_mixout_is_a_dial_of_train_and_check(pe_dpo, recipe_file, tmp_path, monkeypatch):
    from pe_dpo.recipe import load_recipe
    from pe_dpo.training.mixing import Mixing

    monkeypatch.setattr(Mixing, "on_train_end", lambda *_, **__: None)  # it measures the noise of p
    done = pe_dpo("train", recipe_file, "-o", tmp_path / "run", "--mixout", 0.5, "--set", "train.max_steps=1")
    assert (done.code, done.err) == (0, "")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").mixout.p == 0.5
    assert pe_dpo("check", recipe_file, "--mixout", 0.5).code == 0
    refused = pe_dpo("check", recipe_file, "--mixout", 1)
    assert refused.code == 2
    assert "mixout.p: found 1" in refused.err


@pytest.mark.slow
def test_the_optimizer_s_dials_reach_the_run(pe_dpo, recipe_file, tmp_path):
    done = pe_dpo("train", recipe_file, "-o", tmp_path / "run", "--lr", "3e-4", "--seed", 5, "--set", "train.max_steps=1")
    assert done.code == 0
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "seed: 5\n" in recipe
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 1
    assert "  learning_rate: 0.0003\n" in recipe


@pytest.mark.slow
def test_overwrite_replaces_a_run(pe_dpo, recipe_file, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-99").mkdir()
    assert pe_dpo("train", recipe_file, "-o", folder, "--overwrite", "--beta", 0.3, "--set", "train.max_steps=1").code == 0
    assert "  beta: 0.3\n" in (folder / "recipe.yaml").read_text()
    assert not (folder / "checkpoint-99").exists()
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_resuming_a_finished_run_trains_no_further(pe_dpo, recipe_file, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    done = pe_dpo("train", recipe_file, "-o", folder, "--resume")
    # `output` is free to change on resume, so the copy may be gone on with.
    assert (done.code, done.err) == (0, "")
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (trained[0] / weights).read_bytes()


# ---------------------------------------------------------------- eval


def test_eval_of_a_run_repeats_what_the_run_measured_at_its_end(evaluated, trained):
    after = json.loads((trained[0] / "run.json").read_text())["after"]
    assert evaluated["kind"] == "run"
    assert evaluated["metrics"].keys() == after.keys()
    assert evaluated["metrics"] == pytest.approx(after, rel=1e-5, abs=1e-5)


def test_eval_gives_shares_an_interval_that_holds_them(evaluated):
    assert {"accuracy/policy", "accuracy/policy_length_matched", "displacement/chosen_fell"} <= set(evaluated["intervals"])
    for key, (low, high) in evaluated["intervals"].items():
        assert 0 <= low <= evaluated["metrics"][key] <= high <= 1


def test_eval_of_a_run_prints_the_tables_that_train_printed_word_for_word(pe_dpo, trained):
    done = pe_dpo("eval", trained[0])
    assert (done.code, done.err) == (0, "")
    first, last = "What training changed on 9 held-out pairs", "the adapter lies in"
    tables = trained[1].out[trained[1].out.index(first) : trained[1].out.index(last)]
    tables = tables.partition("warning: ")[0]
    assert tables in done.out
    said = " ".join(done.out.split())
    for remark in json.loads((trained[0] / "run.json").read_text())["remarks"]:
        assert f"warning: {remark}" in said
    for words in ("before", "after", "moved toward chosen", "reward accuracy", "only the policy ranks right (gained)"):
        assert words in tables


def test_eval_of_what_is_no_run_stands_beside_its_reference(pe_dpo, adapter, tiny_base, tiny_pairs, evaluated):
    """Whose Δ is the policy's Δ at step 0: 9 pairs of which it ranks as many right as run.json says."""
    done = pe_dpo("eval", adapter, "--data", tiny_pairs / "test.jsonl", "--base", tiny_base)
    (header,) = (line for line in done.out.splitlines() if "reference" in line and "adapter" in line and "┃" in line)
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == ["", "reference", "adapter"]
    (loss,) = (line for line in done.out.splitlines() if line.startswith("│ loss "))
    assert [cell.strip() for cell in loss.split("│")[2:-1]] == ["0.6931", f"{evaluated['metrics']['loss']:.4f}"]


def test_eval_writes_every_pair_when_asked(pe_dpo, trained, tmp_path, evaluated):
    done = pe_dpo("eval", trained[0], "--pairs", tmp_path / "pairs.parquet", "--json")
    table = pyarrow.parquet.read_table(tmp_path / "pairs.parquet")
    assert done.code == 0
    assert table.num_rows == 9
    assert table["where"].to_pylist() == [f"test.jsonl:{line}" for line in range(1, 10)]
    assert sum(table["loss"].to_pylist()) / 9 == pytest.approx(evaluated["metrics"]["loss"], rel=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]


def test_eval_of_a_run_on_other_pairs_takes_all_of_them(pe_dpo, trained, tiny_pairs):
    found = metrics_of(pe_dpo("eval", trained[0], "--data", tiny_pairs / "train.jsonl", "--json"))
    assert found["metrics"]["pairs"] == 24


def test_eval_of_the_bare_adapter_measures_what_the_run_did(pe_dpo, adapter, tiny_base, tiny_pairs, evaluated):
    found = metrics_of(pe_dpo("eval", adapter, "--data", tiny_pairs / "test.jsonl", "--base", tiny_base, "--json"))
    assert found["kind"] == "adapter"
    assert found["metrics"] == pytest.approx(evaluated["metrics"], rel=1e-5, abs=1e-5)


def test_eval_of_an_adapter_finds_the_base_that_it_names(pe_dpo, adapter, tiny_pairs, evaluated):
    found = metrics_of(pe_dpo("eval", adapter, "--data", tiny_pairs / "test.jsonl", "--json"))
    assert found["metrics"]["loss"] == pytest.approx(evaluated["metrics"]["loss"], rel=1e-5)


def test_eval_of_the_merged_model_measures_what_the_run_did(pe_dpo, merged, tiny_base, tiny_pairs, evaluated):
    """W + BA instead of W and BA apart: the same numbers but for float32's rounding."""
    found = metrics_of(pe_dpo("eval", merged, "--data", tiny_pairs / "test.jsonl", "--base", tiny_base, "--json"))
    assert found["kind"] == "model"
    compared = ["loss", "logps/chosen", "logps/rejected", "rewards/margins", "accuracy/policy", "displacement/chosen"]
    assert {key: found["metrics"][key] for key in compared} == pytest.approx(
        {key: evaluated["metrics"][key] for key in compared}, rel=1e-4, abs=1e-4
    )


def test_eval_of_a_model_without_a_base_measures_the_policy_only(pe_dpo, merged, tiny_pairs, evaluated):
    done = pe_dpo("eval", merged, "--data", tiny_pairs / "test.jsonl")
    assert done.code == 0
    assert "no reference given (--base): rewards and loss are those of gamma = 0" in done.out
    found = metrics_of(pe_dpo("eval", merged, "--data", tiny_pairs / "test.jsonl", "--json"))["metrics"]
    assert found["logps/chosen"] == pytest.approx(evaluated["metrics"]["logps/chosen"], rel=1e-4)
    assert f"--json prints all {len(found)} metrics" in done.out
    assert "accuracy/reference" not in found
    assert "displacement/chosen" not in found


def test_the_untrained_base_is_its_own_reference(pe_dpo, tiny_base, tiny_pairs):
    """Δπ = Δ0, so with γ = β every score is 0 and the loss log 2."""
    found = metrics_of(pe_dpo("eval", tiny_base, "--data", tiny_pairs / "test.jsonl", "--base", tiny_base, "--json"))["metrics"]
    assert found["loss"] == pytest.approx(0.6931471805599453, rel=1e-12)
    assert found["rewards/accuracies"] == 0.5
    assert found["displacement/chosen"] == 0.0


def test_a_model_without_finite_log_probs_is_refused_and_not_shown_with_fewer_metrics(pe_dpo, merged, tiny_pairs, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(merged, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 3e38  # finite, and its products are not
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = pe_dpo("eval", folder, "--data", tiny_pairs / "test.jsonl")
    assert done.code != 0
    assert "test.jsonl:1: its log-probs under the policy are not finite (9 such pairs)" in done.err


def test_no_file_of_a_run_or_its_package_has_a_secret_of_the_environment(trained, pe_dpo, tmp_path):
    """Every command of these tests runs with one in the environment, see `conftest.py`."""
    folder, _ = trained
    assert pe_dpo("merge", folder, "--onto", "adapter", "-o", tmp_path / "package").code == 0
    files = [path for place in (folder, tmp_path) for path in place.rglob("*") if path.is_file()]
    assert {"run.json", "recipe.yaml", "README.md", "adapter_config.json"} <= {path.name for path in files}
    assert not [path for path in files if b"hf_plantedsecret" in path.read_bytes()]
